"""QK-Clip: which rows are scaled, that logits then are at the threshold, and what is refused."""

import copy
import math
import pickle

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
)

import hf_muon
from hf_muon import clip
from hf_muon.analysis.attention import attention_logits
from hf_muon.integrations import attention
from hf_muon.integrations.clip import attach, find_heads

from . import tiny, tiny_moonlight
from .distributed.worker import SequentialTrainer
from .test_attention_logits import big, forward, measure

SIZES = dict(
    vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=256,
)  # fmt: skip


def seeded(make):
    torch.manual_seed(3)
    return make()


def with_biases(model):
    """Biases that matter: they start at zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj.bias"):
                p.normal_(std=0.3)
    return model


MODELS = {
    "gqa": lambda: big(with_biases(tiny.qwen2()), 80),
    "plain": lambda: big(seeded(lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 4}))), 80),
    "one key head": lambda: big(tiny.qwen2(num_key_value_heads=1), 80),
    "mla": lambda: big(tiny_moonlight.model(), 200),
    "mla with q_lora": lambda: big(tiny_moonlight.model(q_lora_rank=12), 200),
    "yarn": lambda: big(tiny.qwen2(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}), 80),
}
IDS = torch.tensor([row["input_ids"] for row in tiny.tokens(rows=4)])


def optimizer(model, threshold, **options):
    """A Muon whose update is nothing, so that what changes is the clip."""
    options = {"lr": 0.0, "weight_decay": 0.0, **options}
    muon = hf_muon.Muon(hf_muon.param_groups(model, **options), **options)
    return muon, attach(model, muon, threshold)


def step(model, muon, ids=IDS):
    muon.zero_grad()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    muon.step()


def heads_of(model, ids=IDS):
    """[layers, H] largest logits."""
    return torch.stack([x.largest for x in measure(forward(model, ids))])


def between(largest):
    """A threshold that some heads pass and some do not."""
    ordered = largest.flatten().sort().values
    return float(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean())


@pytest.mark.parametrize("kind", MODELS)
def test_a_clipped_head_ends_at_the_threshold_and_the_others_where_they_were(kind):
    model = MODELS[kind]()
    # The first layer: those above see other inputs once it has changed.
    before = heads_of(model)[0]
    tau = between(before)
    muon, clipping = optimizer(model, tau)
    step(model, muon)
    after = heads_of(model)[0]
    over = before > tau
    assert 0 < over.sum() < len(over)
    assert after[over] == pytest.approx([tau] * int(over.sum()), rel=1e-5)
    assert after[~over].tolist() == pytest.approx(before[~over].tolist(), rel=1e-5)
    assert clipping.metrics()["muon/qk_clip/min_gamma"] <= float(tau / before.max()) * (1 + 1e-6)
    assert clipping.metrics() == {"muon/qk_clip/heads": 0, "muon/qk_clip/min_gamma": 1.0}


FAMILIES = [
    *("arcee", "cohere", "cohere2", "ernie4_5", "gemma2", "glm4", "gpt_oss", "granite", "minicpm3", "ministral3"),
    *("mixtral", "nemotron", "olmo", "phi", "seed_oss", "smollm3", "stablelm", "starcoder2"),
]
LATENT = dict(
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
)
EXTRA = {"gpt_oss": {"num_local_experts": 4}, "mixtral": {"num_local_experts": 4}, "minicpm3": LATENT}


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_other_families_end_at_the_threshold_too(family):
    options = {**SIZES, "head_dim": 8, "pad_token_id": 0, **EXTRA.get(family, {})}
    if family == "minicpm3":
        del options["head_dim"]  # there it is the size of the rotary part
    model = seeded(lambda: AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**options)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("q_proj.", "k_proj.", "q_b_proj.", "kv_b_proj.")):
                p.mul_(60).add_(torch.randn_like(p) * 0.3)
    before = heads_of(model)[0]
    tau = between(before)
    step(model, optimizer(model, tau)[0])
    assert heads_of(model)[0].tolist() == pytest.approx(before.clamp(max=tau).tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", ["gqa", "mla", "mla with q_lora"])
def test_all_logits_of_a_head_are_multiplied_by_its_gamma(kind):
    model = MODELS[kind]()
    before = forward(model, IDS)[0]
    largest = measure([before])[0].largest
    tau = between(largest)
    step(model, optimizer(model, tau)[0])
    after = forward(model, IDS)[0]
    gamma = (tau / largest).clamp(max=1.0)
    a, b = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT for _, _, q, k, _, _ in (before, after))
    assert torch.allclose(b, a * gamma.view(1, -1, 1, 1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_below_the_threshold_every_weight_keeps_its_bits(kind):
    plain, clipped = MODELS[kind](), MODELS[kind]()
    muon = hf_muon.Muon(hf_muon.param_groups(plain, lr=1e-3), lr=1e-3)
    step(plain, muon)
    step(clipped, optimizer(clipped, 1e9, lr=1e-3, weight_decay=0.1)[0])
    for (name, p), q in zip(plain.named_parameters(), clipped.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_only_query_and_key_rows_of_clipped_groups_change():
    model = MODELS["gqa"]()
    before = copy.deepcopy(model.state_dict())
    largest = heads_of(model)
    tau = float(largest.flatten().sort().values[-2:].mean())  # one head of all passes it
    step(model, optimizer(model, tau)[0])
    layer, head = (int(x) for x in (largest == largest.max()).nonzero()[0])
    prefix, dim, group = f"model.layers.{layer}.self_attn.", 8, head // 2
    changed = {
        (name, *{int(r) // dim for r in (p != before[name]).view(p.shape[0], -1).any(1).nonzero().flatten()})
        for name, p in model.state_dict().items()
        if not torch.equal(p, before[name])
    }
    queries = (2 * group, 2 * group + 1)
    expected = {(f"{prefix}q_proj.{x}", *queries) for x in ("weight", "bias")}
    assert changed == expected | {(f"{prefix}k_proj.{x}", group) for x in ("weight", "bias")}


def test_latent_attention_leaves_the_shared_rotary_key_and_the_values_alone():
    model = MODELS["mla"]()
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer(model, 1.0)[0])
    for i in range(3):
        prefix = f"model.layers.{i}.self_attn."
        after = model.state_dict()
        kv = f"{prefix}kv_b_proj.weight"
        old, new = (x[kv].view(4, 16, -1) for x in (before, after))
        assert torch.equal(old[:, 8:], new[:, 8:]) and not torch.equal(old[:, :8], new[:, :8])
        assert torch.equal(before[f"{prefix}kv_a_proj_with_mqa.weight"], after[f"{prefix}kv_a_proj_with_mqa.weight"])
        old, new = (x[f"{prefix}q_proj.weight"].view(4, 12, -1) for x in (before, after))
        root, gamma = (new / old)[:, :8].mean((1, 2)), (new / old)[:, 8:].mean((1, 2))
        assert torch.allclose(root.square(), gamma, rtol=1e-4) and (gamma < 1).all()


def test_optimizer_state_is_that_of_the_same_step_without_a_clip():
    states = []
    for tau in (None, 1.0):
        model = MODELS["gqa"]()
        muon = hf_muon.Muon(hf_muon.param_groups(model, lr=1e-3), lr=1e-3)
        if tau:
            attach(model, muon, tau)
        step(model, muon)
        states.append(muon.state_dict())
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for a, b in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_largest_of_all_micro_batches_decides():
    model, one = MODELS["gqa"](), MODELS["gqa"]()
    tau = between(heads_of(model)[0])
    for m, batches in ((model, IDS.split(1)), (one, [IDS])):
        muon, _ = optimizer(m, tau)
        for ids in batches:
            m.train()(input_ids=ids, labels=ids).loss.backward()
        muon.step()
    for (name, p), q in zip(model.named_parameters(), one.named_parameters(), strict=True):
        assert torch.allclose(p, q[1], rtol=1e-5), name


def test_layers_whose_bound_is_below_the_threshold_cost_no_product(monkeypatch):
    model = MODELS["gqa"]()
    calls = []
    monkeypatch.setattr(
        "hf_muon.integrations.clip.attention_logits", lambda *a, **k: calls.append(1) or attention_logits(*a, **k)
    )
    for tau, expected in ((1e9, 0), (1.0, 2)):
        step(model, optimizer(model, tau)[0])
        assert len(calls) == expected


def test_a_skipped_step_clips_nothing():
    model = MODELS["gqa"]()
    before = copy.deepcopy(model.state_dict())
    muon, _ = optimizer(model, 1.0, lr=1e-3)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    model.model.layers[0].mlp.down_proj.weight.grad[0, 0] = math.nan
    muon.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert muon.metrics()["muon/skipped_steps"] == 1


def test_infinite_logits_are_not_divided_by():
    assert clip.gammas(torch.tensor([50.0, 200.0, math.inf, math.nan, -math.inf]), 100.0).tolist() == [1, 0.5, 1, 1, 1]


@pytest.mark.parametrize("exclude", [(), ("*q_proj*", "*k_proj*")], ids=["muon", "adamw"])
def test_a_step_without_a_training_forward_is_an_error_and_changes_nothing(exclude):
    model = MODELS["gqa"]()
    muon = hf_muon.Muon(hf_muon.param_groups(model, exclude=exclude), lr=1e-3)
    attach(model, muon, 1.0)
    step(model, muon)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="no attention in training mode since the last step"):
        muon.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def trainer(tmp_path, model, **options):
    args = TrainingArguments(
        **tiny.arguments(tmp_path, **{"max_steps": 4, "per_device_train_batch_size": 4, **options})
    )
    return SequentialTrainer(model=model, args=args, train_dataset=tiny.tokens())


def test_the_trainer_clips_logs_and_resumes_bit_for_bit(tmp_path):
    options = {"optim_args": "qk_clip=2", "gradient_checkpointing": True, "save_steps": 2, "save_strategy": "steps"}
    options["learning_rate"] = 3e-2
    whole = trainer(tmp_path / "a", MODELS["gqa"](), **options)
    whole.train()
    rows = [row for row in whole.state.log_history if "loss" in row]
    assert (
        all(row["muon/qk_clip/heads"] > 0 for row in (rows[0], rows[-1])) and 0 < rows[0]["muon/qk_clip/min_gamma"] < 1
    )
    assert heads_of(whole.model, IDS).max() < 10 < heads_of(MODELS["gqa"](), IDS).max()
    again = trainer(tmp_path / "b", tiny.qwen2(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_without_the_option_nothing_is_watched(tmp_path):
    run = trainer(tmp_path, tiny.qwen2(), max_steps=1)
    run.train()
    assert not any("qk_clip" in key for row in run.state.log_history for key in row)
    assert all(ref() is None for ref in attention._watchers)


def test_an_optimizer_that_is_gone_watches_no_more(tmp_path):
    model = MODELS["gqa"]()
    muon, clipping = optimizer(model, 1.0)
    assert any(ref() is clipping for ref in attention._watchers)
    muon.row_factors = None
    del clipping
    assert not attention._watchers


def test_a_copy_that_would_not_clip_refuses_to_step():
    model = MODELS["gqa"]()
    muon, _ = optimizer(model, 1.0, lr=1e-3)
    for copied in (copy.deepcopy(muon), pickle.loads(pickle.dumps(muon))):
        params = [p for group in copied.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match="attach"):
            copied.step()
        assert all(map(torch.equal, params, before))
        copied.row_factors = None
        copied.step()
        assert not any(map(torch.equal, params, before))


def frozen():
    model = tiny.qwen2()
    model.model.layers[1].self_attn.k_proj.weight.requires_grad_(False)
    return model


def tied():
    model = tiny.qwen2()
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    return model


def lora():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny.qwen2(), LoraConfig(target_modules=["q_proj"]))


REFUSED = {
    r"layers.0.self_attn \(Qwen3Attention\): q_norm, k_norm may normalize": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, head_dim=8)
    ),
    r"Phi3Attention\): it holds .*qkv_proj \(Linear\).*fused weights": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    r"OlmoAttention\): clip_qkv clamps": lambda: OlmoForCausalLM(OlmoConfig(**SIZES, clip_qkv=3.0)),
    r"layers.1.self_attn .*k_proj.weight is frozen": frozen,
    r"layers.0.self_attn.q_proj.weight and model.layers.1.self_attn.q_proj.weight are one parameter": tied,
    r"q_proj \(Linear\), k_proj|q_proj \(Linear\).*adapters \(LoRA\)": lora,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_not_scale_is_refused_by_name(message):
    model = REFUSED[message]()
    with pytest.raises(ValueError, match=f"qk_clip cannot serve .*{message}.*Remedy"):
        find_heads(model)


def test_a_norm_without_a_module_is_found_in_the_first_forward(tmp_path, monkeypatch):
    rope = "transformers.models.qwen2.modeling_qwen2.apply_rotary_pos_emb"
    monkeypatch.setattr(rope, lambda q, k, cos, sin: (torch.nn.functional.normalize(q, dim=-1), k))
    run = trainer(tmp_path, tiny.qwen2(), optim_args="qk_clip=100")
    with pytest.raises(ValueError, match="qk_clip cannot serve model.layers.0.self_attn: a norm, a clamp"):
        run.train()
    assert run.state.global_step == 0


def test_bert_has_its_own_names_and_is_served():
    model = BertForMaskedLM(
        BertConfig(vocab_size=264, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    )
    (heads,) = find_heads(model).values()
    assert (heads.heads, heads.key_heads, heads.sizes) == (4, 4, (8,))
    assert heads.names[0] == tuple(f"bert.encoder.layer.0.attention.self.query.{x}" for x in ("weight", "bias"))
    before = heads_of(model.train())[0]
    model.bert.encoder.layer[0].attention.self.dropout.p = 0.0
    assert before.shape == (4,)


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "no"])
def test_a_threshold_that_is_no_positive_number_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="qk_clip"):
        TrainingArguments(**tiny.arguments(tmp_path, optim_args=f"qk_clip={value}"))


def test_groups_alone_and_compiled_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="qk_clip needs the model beside the optimizer"):
        hf_muon.param_groups(tiny.qwen2(), qk_clip=100.0)
    with pytest.raises(ValueError, match="torch_compile hides from qk_clip"):
        TrainingArguments(**tiny.arguments(tmp_path, optim_args="qk_clip=100", torch_compile=True))
    muon = hf_muon.create_optimizer(tiny.qwen2(), TrainingArguments(**tiny.arguments(tmp_path)), qk_clip=50.0)
    assert muon.row_factors.threshold == 50.0
