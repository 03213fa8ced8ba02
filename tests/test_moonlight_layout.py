"""Moonlight's checkpoint as the hub stores it, through transformers' own class, against a forward written by hand."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from . import tiny_moonlight


def hub_weights(config, dtype=torch.bfloat16, seed=0):
    """Names and shapes of the hub's files: every expert on its own, attention as MLA has it."""
    c, draw = config, torch.Generator().manual_seed(seed)
    heads, qk = c["num_attention_heads"], c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    hidden, shapes = c["hidden_size"], {}

    def mlp(name, width):
        shapes.update({f"{name}.{part}_proj.weight": (width, hidden) for part in ("gate", "up")})
        shapes[f"{name}.down_proj.weight"] = (hidden, width)

    shapes["model.embed_tokens.weight"] = shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    shapes["model.norm.weight"] = (hidden,)
    for i in range(c["num_hidden_layers"]):
        layer, attention = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{attention}.q_proj.weight"] = (heads * qk, hidden)
        shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden)
        shapes[f"{attention}.kv_a_layernorm.weight"] = (c["kv_lora_rank"],)
        shapes[f"{attention}.kv_b_proj.weight"] = (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"])
        shapes[f"{attention}.o_proj.weight"] = (hidden, heads * c["v_head_dim"])
        if i < c["first_k_dense_replace"]:
            mlp(f"{layer}.mlp", c["intermediate_size"])
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (c["n_routed_experts"], hidden)
        shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
        for j in range(c["n_routed_experts"]):
            mlp(f"{layer}.mlp.experts.{j}", c["moe_intermediate_size"])
        mlp(f"{layer}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=draw)
        # Large enough that norms, biases and the choice of experts all matter.
        weights[name] = (1 + 0.3 * noise if "norm" in name else 0.25 * noise).to(dtype)
        if name.endswith("bias"):
            weights[name] = 0.3 * noise
    return weights


def write_hub_checkpoint(folder, seed=0, **changes):
    """A folder as the hub has it: bf16 in two shards, and a config that names remote code (which is not there)."""
    config = tiny_moonlight.hub_config(**changes)
    remote = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    remote["AutoModelForCausalLM"] = "modeling_deepseek.DeepseekV3ForCausalLM"
    weights = hub_weights(config, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": remote}))
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in weights.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return config, weights


def rms_norm(x, gain, eps):
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * gain


def swiglu(x, w, name):
    gate, up, down = (w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def rotate(x, theta):
    """Neighbouring pairs as complex numbers, turned by position x frequency. x: [tokens, heads, even]."""
    frequency = theta ** (-torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1])
    angle = torch.arange(x.shape[0], dtype=torch.float64)[:, None] * frequency
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)


def attention(x, w, name, c):
    """Multi-head latent attention, one sequence, keys and values written out per head."""
    tokens, heads, nope, rank = x.shape[0], c["num_attention_heads"], c["qk_nope_head_dim"], c["kv_lora_rank"]
    q = (x @ w[f"{name}.q_proj.weight"].T).view(tokens, heads, -1)
    latent = x @ w[f"{name}.kv_a_proj_with_mqa.weight"].T
    shared_key = rotate(latent[:, None, rank:], c["rope_theta"]).expand(-1, heads, -1)
    # The hub's code gives this norm no eps: its class's 1e-6, not the config's.
    up = rms_norm(latent[:, :rank], w[f"{name}.kv_a_layernorm.weight"], 1e-6) @ w[f"{name}.kv_b_proj.weight"].T
    key, value = up.view(tokens, heads, -1).split([nope, c["v_head_dim"]], dim=-1)
    q = torch.cat([q[..., :nope], rotate(q[..., nope:], c["rope_theta"])], dim=-1)
    scores = torch.einsum("qhd,khd->hqk", q, torch.cat([key, shared_key], dim=-1)) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
    out = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value)
    return out.flatten(1) @ w[f"{name}.o_proj.weight"].T


def experts(x, w, name, c):
    """Token by token: sigmoid scores, chosen with the bias, weighed without it."""
    scores = torch.sigmoid(x @ w[f"{name}.gate.weight"].T)
    out = swiglu(x, w, f"{name}.shared_experts")
    for t, row in enumerate(scores):
        order = (row + w[f"{name}.gate.e_score_correction_bias"]).argsort(descending=True)
        chosen = order[: c["num_experts_per_tok"]].tolist()
        total = sum(row[j] for j in chosen)
        for j in chosen:
            out[t] += c["routed_scaling_factor"] * row[j] / total * swiglu(x[t], w, f"{name}.experts.{j}")
    return out


def by_hand(ids, weights, c):
    """Logits of one sequence in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        normed = rms_norm(x, w[f"{layer}.input_layernorm.weight"], c["rms_norm_eps"])
        x = x + attention(normed, w, f"{layer}.self_attn", c)
        normed = rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"], c["rms_norm_eps"])
        dense = i < c["first_k_dense_replace"]
        x = x + (swiglu(normed, w, f"{layer}.mlp") if dense else experts(normed, w, f"{layer}.mlp", c))
    return rms_norm(x, w["model.norm.weight"], c["rms_norm_eps"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_of_a_hub_checkpoint_equal_a_forward_by_hand(tmp_path, implementation):
    config, weights = write_hub_checkpoint(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation=implementation, output_loading_info=True
    )
    assert type(model) is DeepseekV3ForCausalLM, "transformers' own, though the config names remote code"
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, config["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
    for row, sequence in zip(logits.double(), ids, strict=True):
        expected = by_hand(sequence, weights, config)
        assert expected.std() > 0.5
        # float32 against float64 through three layers.
        assert torch.allclose(row, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_saving_gives_the_hubs_names_and_values_back(tmp_path, dtype):
    _, weights = write_hub_checkpoint(tmp_path / "hub")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=dtype)
    assert model.lm_head.weight.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(saved[name].double(), tensor.double()), name
        assert saved[name].dtype == (tensor.dtype if dtype == "auto" else torch.float32), name
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["model_type"] == "deepseek_v3"
    assert written["routed_scaling_factor"] == 2.446
