"""Trajectories of Moonlight's own optimizer, and torch's, as references."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from hf_muon import Muon

from .reference import relative_error

MATRICES = ("q_proj", "up_proj", "down_proj", "router", "tall")
OTHERS = ("norm", "embed", "bias")


def _replay(reference, ns_dtype, steps=8):
    params = {n: torch.nn.Parameter(reference[f"init.{n}"].clone()) for n in MATRICES + OTHERS}
    groups = [
        {"params": [(n, params[n]) for n in MATRICES]},
        {"params": [(n, params[n]) for n in OTHERS], "algorithm": "adamw"},
    ]
    optimizer = Muon(groups, lr=2e-3, weight_decay=0.1, ns_dtype=ns_dtype, betas=(0.9, 0.95))
    for step in range(steps):
        for name, p in params.items():
            p.grad = reference[f"grad.{step}.{name}"].clone()
        optimizer.step()
        yield step, params


@pytest.mark.parametrize(("file", "ns_dtype", "tolerance"), [("ns32", "float32", 1e-5), ("ns16", "bfloat16", 5e-2)])
def test_every_matrix_follows_moonlights_own_code(data, file, ns_dtype, tolerance):
    # 5e-2 for bf16: both round, in different product orders, and the schedule amplifies it (1.5e-2..4e-2 seen).
    reference = load_file(data / f"moonlight_toy_train_{file}.safetensors")
    for step, params in _replay(reference, ns_dtype):
        for name in MATRICES:
            error = relative_error(params[name], reference[f"param.{step}.{name}"], reference[f"init.{name}"])
            assert error <= tolerance, (step, name)


def test_adamw_parameters_follow_moonlights_own_code(data):
    reference = load_file(data / "moonlight_toy_train_ns32.safetensors")
    for step, params in _replay(reference, "float32"):
        for name in OTHERS:
            # Its AdamW adds eps before the bias correction, ours is torch's: equal while sqrt(v) >> eps = 1e-8.
            error = relative_error(params[name], reference[f"param.{step}.{name}"], reference[f"init.{name}"])
            assert error <= 1e-5, (step, name)


@pytest.mark.parametrize(
    "change", [{"nesterov": False}, {"ns_coefficients": "you"}, {"momentum": 0.9}, {"adjust_lr_fn": "original"}]
)
def test_the_oracle_notices_a_wrong_rule(data, change):
    reference = load_file(data / "moonlight_toy_train_ns32.safetensors")
    p = torch.nn.Parameter(reference["init.up_proj"].clone())
    optimizer = Muon([p], lr=2e-3, weight_decay=0.1, ns_dtype="float32", **change)
    for step in range(8):
        p.grad = reference[f"grad.{step}.up_proj"].clone()
        optimizer.step()
    assert relative_error(p, reference["param.7.up_proj"], reference["init.up_proj"]) > 0.05


def test_equals_torch_muon_within_the_bf16_band():
    # torch's momentum is an average (EMA), ours a sum; orthogonalization removes the factor.
    torch.manual_seed(0)
    start = torch.randn(48, 96) * 0.02
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    a = Muon([ours], lr=2e-3, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(8):
        ours.grad = torch.randn_like(start)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    assert relative_error(ours, theirs, start) < 5e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_adamw_groups_are_bit_equal_to_torch_adamw(dtype):
    torch.manual_seed(0)
    start = [torch.randn(s, dtype=dtype) for s in [(7,), (5, 3), (), (2, 3, 4)]]
    ours, theirs = ([torch.nn.Parameter(s.clone()) for s in start] for _ in range(2))
    hyper = dict(lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.03)
    a = Muon([{"params": ours, "algorithm": "adamw"}], **hyper)
    b = torch.optim.AdamW(theirs, fused=True, **hyper)
    for step in range(20):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = None if step == 3 and x.ndim == 2 else torch.randn_like(x)
            y.grad = None if x.grad is None else x.grad.clone()
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)
        for key, value in b.state[y].items():
            assert torch.equal(a.state[x][key], value), key


@pytest.mark.parametrize(
    "layout",
    [
        lambda: torch.arange(48.0).view(6, 8)[:, :5],  # gaps: a view of a larger tensor
        lambda: torch.arange(30.0).view(5, 6).T,
        lambda: torch.arange(120.0).view(2, 5, 3, 4).to(memory_format=torch.channels_last),
    ],
    ids=["gaps", "transposed", "channels_last"],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_adamw_of_weights_that_lie_otherwise_equals_contiguous_ones(layout, resumed):
    base = layout()
    around = base.untyped_storage()
    outside = sum(torch.frombuffer(bytearray(around), dtype=torch.float32).tolist()) - base.sum().item()
    odd, plain = (
        torch.nn.Parameter(base),
        torch.nn.Parameter(base.detach().clone(memory_format=torch.contiguous_format)),
    )
    a, b = (Muon([{"params": [("w", p)], "algorithm": "adamw"}], lr=0.1) for p in (odd, plain))
    for step in range(4):
        grad = torch.linspace(-1, 1, base.numel()).view(base.shape) * (step + 1)
        odd.grad, plain.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
        if resumed and step == 1:
            a.load_state_dict(copy.deepcopy(b.state_dict()))  # moments that lie as the other's weights do
    assert torch.allclose(odd, plain, rtol=1e-6, atol=1e-6)
    after = sum(torch.frombuffer(bytearray(around), dtype=torch.float32).tolist()) - base.sum().item()
    assert after == pytest.approx(outside, abs=1e-3), "memory beside the weights was written to"
