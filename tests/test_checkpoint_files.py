"""What a consolidated checkpoint takes from the model's own files."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import hf_muon
from hf_muon import canonical
from hf_muon.integrations import checkpoints, models
from tests import tiny


class Buffered(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(6, 6, bias=False)
        self.frozen = torch.nn.Linear(6, 6, bias=False).requires_grad_(False)
        self.register_buffer("bias_of_experts", torch.zeros(4))


def _saved(folder, weights):
    model = Buffered()
    optimizer = hf_muon.Muon([{"params": [("hidden.weight", model.hidden.weight)]}])
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    momentum = {"hidden.weight": {"momentum_buffer": torch.ones(6, 6)}}
    torch.save(canonical.make(groups, momentum, weights), folder / "optimizer.pt")
    save_file(
        {"frozen.weight": torch.full((6, 6), 2.0), "bias_of_experts": torch.arange(4.0)}, folder / "model.safetensors"
    )
    return model, optimizer


def test_buffers_and_frozen_weights_come_from_the_models_files(tmp_path):
    model, optimizer = _saved(tmp_path, {"hidden.weight": torch.full((6, 6), 3.0)})
    checkpoints.load(optimizer, str(tmp_path), model)
    assert torch.equal(model.bias_of_experts, torch.arange(4.0))
    assert (model.frozen.weight == 2).all() and (model.hidden.weight == 3).all()
    assert (optimizer.state[model.hidden.weight]["momentum_buffer"] == 1).all()


def test_a_state_without_the_trained_weights_is_refused(tmp_path):
    model, optimizer = _saved(tmp_path, {})
    with pytest.raises(ValueError, match="no weights for"):
        checkpoints.load(optimizer, str(tmp_path), model)
    assert not optimizer.state


def test_adapters_are_found_under_the_names_of_their_files(tmp_path):
    options = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "r": 4}
    model = get_peft_model(tiny.qwen2(tie_word_embeddings=False), LoraConfig(init_lora_weights=False, **options))
    model.save_pretrained(tmp_path)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = models.trained_weights(str(tmp_path), list(trained))
    assert trained and all(torch.equal(found[name], p) for name, p in trained.items())
