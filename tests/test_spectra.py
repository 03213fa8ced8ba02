"""Spectra against numpy and closed forms; the estimates against the exact numbers; which matrices there are."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from hf_muon.analysis.groups import GROUPS, group_of, piece_names
from hf_muon.analysis.spectra import estimate, spectrum
from hf_muon.logical import logical_matrices
from hf_muon.routing import route

from . import tiny, tiny_moonlight


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_values(values, columns=None, seed=0):
    """A matrix of these singular values in random directions."""
    n = len(values)
    left, right = (torch.linalg.qr(normal(m, n, seed=seed + i)).Q for i, m in enumerate((n, columns or n)))
    return left * values @ right.mT


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (1, 30), (30, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_equals_numpys_svd(shape, dtype):
    matrix = normal(3, *shape).to(dtype)
    found = spectrum(matrix)
    for i, plain in enumerate(matrix.double().numpy()):
        s = np.linalg.svd(plain, compute_uv=False)
        q = s**2 / (s**2).sum()
        entropy = -(q * np.log(q)).sum() / np.log(len(s)) if len(s) > 1 else math.nan
        norm = np.linalg.norm(plain)
        assert found.singular_values[i].numpy() == pytest.approx(s, rel=1e-6)
        expected = [entropy, norm**2 / s[0] ** 2, s[0], s[-1], np.linalg.cond(plain), norm / math.sqrt(plain.size)]
        names = ("entropy", "stable_rank", "spectral_norm", "smallest", "condition", "rms")
        assert [getattr(found, n)[i].item() for n in names] == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_float32_finds_the_entropy_of_float64():
    matrix = normal(100, 300)
    exact, single = spectrum(matrix), spectrum(matrix, dtype=torch.float32)
    assert single.singular_values.dtype == torch.float32
    assert single.entropy.item() == pytest.approx(exact.entropy.item(), abs=1e-6)
    assert single.condition.item() == pytest.approx(exact.condition.item(), rel=1e-4)


def test_an_orthogonal_matrix_has_entropy_one_and_rank_one_has_none():
    orthogonal = torch.linalg.qr(normal(48, 48, dtype=torch.float64)).Q
    rank_one = torch.outer(normal(48, dtype=torch.float64), normal(48, seed=1, dtype=torch.float64))
    found = spectrum(torch.stack([orthogonal, rank_one]))
    assert found.entropy.tolist() == pytest.approx([1, 0], abs=1e-12)
    assert found.stable_rank.tolist() == pytest.approx([48, 1])
    assert not math.copysign(1, found.entropy[1]) < 0


@pytest.mark.parametrize("rows", [384, 768])
def test_a_square_gaussian_has_a_stable_rank_of_a_quarter_of_its_rows(rows):
    # ||W||_F^2 = n^2 and ||W||_2 -> 2 sqrt(n); the largest value's deviation shrinks as n^(-2/3).
    found = spectrum(normal(rows, rows))
    assert found.stable_rank.item() == pytest.approx(rows / 4, rel=2 * rows ** (-2 / 3))


def test_what_is_not_defined_is_nan_and_spoils_no_other_matrix_of_the_batch():
    matrices = normal(4, 8, 6)
    matrices[1] = 0
    matrices[2, 3, 3] = math.nan
    matrices[3, 0, 0] = math.inf
    found = spectrum(matrices)
    alone = spectrum(matrices[0])
    for name in ("singular_values", "entropy", "stable_rank", "spectral_norm", "smallest", "condition", "rms"):
        values = getattr(found, name)
        assert torch.equal(values[0], getattr(alone, name))
        assert values[2:].isnan().all(), name
    assert found.spectral_norm[1] == found.rms[1] == 0
    assert all(getattr(found, name)[1].isnan() for name in ("entropy", "stable_rank", "condition"))


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(0, 3), torch.ones(2, 2, dtype=torch.int64)])
def test_what_is_no_matrix_is_refused(bad):
    with pytest.raises(ValueError, match="expected floating"):
        spectrum(bad)


RISING = torch.arange(1, 513).float()
# Name: matrix, and how large the root mean square error of the entropy over seeds may be.
SPECTRA = {
    "flat": (lambda: with_values(torch.ones(512)), 1e-5),
    "gaussian": (lambda: normal(512, 1024), 0.002),
    "power 1/2": (lambda: with_values(RISING**-0.5, 700), 0.002),
    "power 1": (lambda: with_values(RISING**-1), 0.002),
    "nearly rank 1": (lambda: with_values(torch.where(RISING == 1, 1.0, 0.01)), 0.002),
    "rank 4": (lambda: with_values(torch.where(RISING <= 4, 1.0, 0.0)), 0.002),
    "half": (lambda: with_values(torch.where(RISING <= 256, 1.0, 1e-3)), 0.002),
    "exponential": (lambda: with_values(torch.exp(-RISING / 50)), 0.012),
    "step": (lambda: with_values(torch.where(RISING <= 100, 1.0, 0.1)), 0.012),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_estimates_keep_the_errors_that_they_claim(name):
    make, bound = SPECTRA[name]
    matrix = make()
    exact = spectrum(matrix)
    errors = []
    for seed in range(6):
        found = estimate(matrix, seed=seed)
        errors.append(found.entropy.item() - exact.entropy.item())
        assert found.spectral_norm.item() == pytest.approx(exact.spectral_norm.item(), rel=1e-4)
        assert found.stable_rank.item() == pytest.approx(exact.stable_rank.item(), rel=2e-4)
    assert math.sqrt(sum(e * e for e in errors) / 6) < bound


def test_an_estimate_of_a_batch_is_that_of_its_members_and_a_tall_matrix_is_its_transpose():
    matrices = torch.stack([normal(512, 700), with_values(RISING**-0.5, 700)])
    expected = [estimate(matrix).entropy.item() for matrix in matrices]
    assert estimate(matrices).entropy.tolist() == pytest.approx(expected, abs=1e-5)
    assert estimate(matrices.mT).entropy.tolist() == pytest.approx(expected, abs=1e-5)


def test_small_matrices_are_decomposed_and_not_estimated():
    matrix = normal(200, 900)
    assert estimate(matrix).entropy.item() == pytest.approx(spectrum(matrix).entropy.item(), abs=1e-6)


@pytest.mark.parametrize("rows", [64, 300])
def test_an_estimate_of_what_is_not_defined_is_nan(rows):
    matrices = normal(3, rows, 300)
    matrices[0] = 0
    matrices[1, 0, 0] = math.nan
    found = estimate(matrices)
    assert found.entropy.isnan().tolist() == found.stable_rank.isnan().tolist() == [True, True, False]
    assert found.spectral_norm[0] == 0 and found.spectral_norm[1].isnan()


def matrices_of(model, **options):
    return {
        (m.layer, m.module): (m, m.of(model.get_parameter(m.parameter)))
        for m in logical_matrices(route(model), **options)
    }


def test_fused_weights_are_the_matrices_that_another_model_has_apart():
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, pad_token_id=0)
    fused, apart = Phi3ForCausalLM(Phi3Config(**shape)), LlamaForCausalLM(LlamaConfig(**shape))
    layer, other = fused.model.layers[0], apart.model.layers[0]
    with torch.no_grad():
        attention = [getattr(other.self_attn, f"{x}_proj").weight for x in "qkv"]
        layer.self_attn.qkv_proj.weight.copy_(torch.cat(attention))
        layer.mlp.gate_up_proj.weight.copy_(torch.cat([other.mlp.gate_proj.weight, other.mlp.up_proj.weight]))
        layer.self_attn.o_proj.weight.copy_(other.self_attn.o_proj.weight)
        layer.mlp.down_proj.weight.copy_(other.mlp.down_proj.weight)
    renamed = {"self_attn.qkv_proj.{}": "qkv", "mlp.gate_up_proj.{}": ("gate", "up")}
    found = matrices_of(fused)
    expected = matrices_of(apart)
    assert len(found) == len(expected) == 7
    for name, (matrix, weight) in found.items():
        plain = name[1]
        for pattern, pieces in renamed.items():
            for piece in pieces:
                if plain == pattern.format(piece):
                    plain = f"{plain.split('.')[0]}.{piece}_proj"
        twin, same = expected[0, plain]
        assert torch.equal(weight, same) and matrix.group == twin.group
        assert (matrix.rows, matrix.columns) == tuple(weight.shape)


def test_experts_stored_transposed_and_interleaved_are_taken_apart():
    config = GptOssConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    found = matrices_of(model)
    for expert in range(4):
        for start, piece in enumerate(("gate", "up")):
            matrix, weight = found[0, f"mlp.experts.gate_up_proj.{expert}.{piece}"]
            assert torch.equal(weight, stack[expert, :, start::2])
            assert (matrix.rows, matrix.columns, matrix.group) == (24, 16, "Experts")
    assert found[0, "mlp.router"][0].group == "Router"


def test_groups_of_moonlight_are_the_papers_six_with_some_experts_of_each_layer():
    model = tiny_moonlight.model()
    found = matrices_of(model, experts=3)
    assert {matrix.group for matrix, _ in found.values()} == set(GROUPS)
    assert [name for (layer, name), (m, _) in found.items() if layer == 0 and m.group == "Dense"] == [
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    for layer in (1, 2):
        chosen = {m.expert for m, _ in found.values() if m.layer == layer and m.expert is not None}
        assert len(chosen) == 3
        names = {name for at, name in found if at == layer and ".experts." in name}
        assert len(names) == 9, "gate, up and down of the same three"
    assert found.keys() == matrices_of(tiny_moonlight.model(seed=1), experts=3).keys(), "the same in every model"
    assert len(matrices_of(model)) == 3 * 4 + 3 + 2 * (8 * 3 + 1 + 3)


@pytest.mark.parametrize("model", [tiny.qwen2, tiny_moonlight.model], ids=["qwen2", "moonlight"])
def test_the_matrices_cover_what_muon_trains_exactly_once(model):
    model = model()
    counts = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for matrix in logical_matrices(route(model)):
        matrix.of(counts[matrix.parameter]).add_(1)
    for found in route(model):
        assert counts[found.name].unique().tolist() == [1 if found.layout else 0], found.name


def test_convolutions_are_read_group_by_group():
    model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4))
    found = list(logical_matrices(route(model)))
    assert [tuple(m.of(model[0].weight).shape) for m in found] == [(3, 18)] * 4
    assert torch.equal(found[2].of(model[0].weight), model[0].weight[6:9].flatten(1))
    assert {m.group for m in found} == {"Conv"}


def test_gpt2_stores_transposed_and_its_shapes_are_logical():
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16, bos_token_id=0, eos_token_id=0)
    )
    found = matrices_of(model)
    matrix, weight = found[0, "mlp.c_fc"]
    assert (matrix.rows, matrix.columns) == (128, 32) and weight.shape == (32, 128)
    assert torch.equal(found[0, "attn.c_attn.v"][1], model.transformer.h[0].attn.c_attn.weight[:, 64:])


@pytest.mark.parametrize(
    ("kind", "name", "pieces", "groups"),
    [
        ("attention", "h.0.attn.query_key_value.weight", 3, ["AttnQO", "AttnKV", "AttnKV"]),
        ("attention", "h.0.crossattention.c_attn.weight", 2, ["AttnKV", "AttnKV"]),
        ("attention", "h.0.attn.in_proj_qkvz.weight", 4, ["Attention"] * 4),
        ("attention", "layer.0.attention.self.query.weight", 1, ["AttnQO"]),
        ("attention", "layer.0.attention.self.value.weight", 1, ["AttnKV"]),
        ("attention", "layer.0.attention.output.dense.weight", 1, ["AttnQO"]),
        ("attention", "block.0.layer.0.SelfAttention.k.weight", 1, ["AttnKV"]),
        ("attention", "layers.0.self_attn.kv_a_proj_with_mqa.weight", 1, ["AttnKV"]),
        ("attention", "layers.0.self_attn.q_a_proj.weight", 1, ["AttnQO"]),
        ("attention", "layers.0.self_attn.out_proj.weight", 1, ["AttnQO"]),
        ("attention", "layers.0.linear_attn.in_proj.weight", 1, ["Attention"]),
        ("mlp", "layers.0.mlp.gate_up_proj.weight", 2, ["Dense", "Dense"]),
        ("lora", "layers.0.self_attn.q_proj.lora_A.default.weight", 1, ["LoRA"]),
    ],
)
def test_group_of_names_in_other_families(kind, name, pieces, groups):
    assert [group_of(kind, name, piece) for piece in piece_names(name, pieces)] == groups


def test_pieces_in_an_unknown_order_are_numbered():
    # CodeGen has q, v, k in each of four blocks.
    assert piece_names("h.0.attn.qkv_proj.weight", 3, blocks=4) == ("q", "kv0", "kv1")
    assert piece_names("layers.0.self_attn.qkv_proj.weight", 3) == ("q", "k", "v")
    assert piece_names("layers.0.x_proj.weight", 3) == ("0", "1", "2")
