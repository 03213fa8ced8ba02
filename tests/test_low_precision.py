"""bfloat16 weights without float32 masters, and momentum in bfloat16."""

import copy

import pytest
import torch

from hf_muon import Muon, canonical, clip

BF16 = torch.bfloat16


def _make(dtype, lr, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in ((24, 32), (16,))]
    names = [[("weight", params[0])], [("bias", params[1])]]
    groups = [{"params": names[0]}, {"params": names[1], "algorithm": "adamw"}]
    return params, Muon(groups, lr=lr, weight_decay=0.1, ns_dtype="float32", **options)


def _train(params, optimizer, steps, start=0):
    for step in range(start, start + steps):
        torch.manual_seed(100 + step)
        for p in params:
            p.grad = (torch.randn(p.shape) + 0.5).to(p.dtype)
        optimizer.step()


def _whole(p, optimizer):
    return p.detach().float() + optimizer.state[p].get("compensation", torch.zeros_like(p)).float()


def test_small_updates_are_lost_in_plain_bf16_and_add_up_with_kahan_sum():
    lr, steps = 1e-4, 60
    exact, optimizer = _make(torch.float32, lr)
    with torch.no_grad():
        for p in exact:
            p.copy_(p.to(BF16))
    start = [p.detach().clone() for p in exact]
    _train(exact, optimizer, steps)
    moved = {}
    for kahan in (False, True):
        params, optimizer = _make(BF16, lr, kahan_sum=kahan)
        _train(params, optimizer, steps)
        for p, q, s in zip(params, exact, start, strict=True):
            error = (_whole(p, optimizer) - q).norm() / (q - s).norm()
            moved[kahan, p.ndim] = error.item()
    # Gradients are rounded to bf16 in one of the two, so that they cannot agree entirely.
    assert moved[True, 2] < 0.02 and moved[True, 1] < 0.02
    assert moved[False, 2] > 0.5 and moved[False, 1] > 0.5, "60 updates of 1e-4 vanish beside weights of 1"


def test_rounding_is_the_weights_nearest_bf16_and_the_rest_is_kept():
    params, optimizer = _make(BF16, 1e-2, kahan_sum=True)
    _train(params, optimizer, 3)
    for p in params:
        lost = optimizer.state[p]["compensation"]
        assert lost.dtype == BF16 and lost.abs().max() > 0
        assert torch.equal((p.float() + lost.float()).to(BF16), p.detach())


@pytest.mark.parametrize("form", ["own", "canonical"])
def test_a_resumed_run_with_both_options_is_bit_for_bit_the_uninterrupted_one(form):
    options = dict(kahan_sum=True, momentum_dtype="bfloat16")
    params, optimizer = _make(BF16, 1e-3, **options)
    _train(params, optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in params]
    if form == "canonical":
        named = dict(zip(("weight", "bias"), weights, strict=True))
        saved = canonical.make(saved["param_groups"], canonical.by_name(saved), named)
    _train(params, optimizer, 4, start=4)
    again, resumed = _make(BF16, 1e-3, **options)
    with torch.no_grad():
        for p, w in zip(again, weights, strict=True):
            p.copy_(w)
    resumed.load_state_dict(saved)
    assert resumed.state[again[0]]["momentum_buffer"].dtype == BF16
    assert resumed.state[again[1]]["exp_avg_sq"].dtype == torch.float32
    _train(again, resumed, 4, start=4)
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(v, resumed.state[q][k]) for k, v in optimizer.state[p].items())


def test_rows_that_are_clipped_scale_with_what_rounding_took_from_them():
    wholes, weights = {}, {}
    for factor in (1.0, 0.7):
        params, optimizer = _make(BF16, 1e-3, kahan_sum=True)
        factors = {"weight": torch.full((24,), factor), "bias": torch.full((16,), factor)}
        factors["weight"][::2] = 1.0
        optimizer.row_factors = lambda unit, factors=factors: {n: factors[n] for n in unit.names}
        _train(params, optimizer, 1)
        wholes[factor] = [_whole(p, optimizer) for p in params]
        weights[factor] = params[0].detach().clone()
    # Two bfloat16 numbers hold 16 bits and more; without the rest, 8 bits would be left.
    for kept, clipped in ((wholes[1.0][0][1::2], wholes[0.7][0][1::2]), (wholes[1.0][1], wholes[0.7][1])):
        assert torch.allclose(clipped, 0.7 * kept, rtol=2**-15, atol=0)
    assert torch.equal(weights[0.7][::2], weights[1.0][::2]), "rows that are not clipped keep their bits"


def test_a_row_that_is_not_clipped_keeps_its_bits_even_where_its_rest_is_half_a_unit():
    params, optimizer = _make(BF16, 1e-3, kahan_sum=True)
    _train(params, optimizer, 1)
    weight, rest = params[0], optimizer.state[params[0]]["compensation"]
    with torch.no_grad():
        weight.fill_(1 + 2**-7)  # an odd last bit: rounding the sum would go to the even neighbour
        rest.fill_(2**-8)
    factor = torch.ones(24)
    factor[0] = 0.5
    unit = optimizer._unit(optimizer.param_groups[0])
    clip.rescale_(unit, {"weight": factor}, [rest.view(-1)])
    assert (weight[1:] == 1 + 2**-7).all() and (rest[1:] == 2**-8).all()
    assert torch.allclose(weight[0].float() + rest[0].float(), torch.tensor(0.5 * (1 + 2**-7 + 2**-8)), rtol=2**-15)


def test_kahan_sum_changes_nothing_for_float32_weights():
    runs = [_make(torch.float32, 1e-3, kahan_sum=kahan) for kahan in (False, True)]
    for params, optimizer in runs:
        _train(params, optimizer, 3)
        assert all("compensation" not in optimizer.state[p] for p in params)
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))


def test_momentum_in_bf16_is_half_the_memory_and_within_its_rounding():
    runs = [_make(torch.float32, 1e-3, momentum_dtype=d) for d in ("float32", BF16)]
    for params, optimizer in runs:
        _train(params, optimizer, 20)
    wide, narrow = (optimizer.state[params[0]]["momentum_buffer"] for params, optimizer in runs)
    assert narrow.dtype == BF16 and narrow.nbytes * 2 == wide.nbytes
    # 20 roundings of 2^-9 each, damped by 0.95 a step.
    assert 0 < (narrow.float() - wide).norm() / wide.norm() < 2e-2


@pytest.mark.parametrize(("key", "value"), [("kahan_sum", 1), ("momentum_dtype", "float16")])
def test_other_values_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        _make(torch.float32, 1e-3, **{key: value})


def test_a_checkpoint_from_before_these_options_loads():
    params, optimizer = _make(torch.float32, 1e-3)
    _train(params, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["kahan_sum"], group["momentum_dtype"]
    optimizer.load_state_dict(saved)
    _train(params, optimizer, 1, start=1)


@pytest.mark.parametrize("form", ["own", "canonical"])
@pytest.mark.parametrize(("saved_as", "loaded_as"), [(BF16, torch.float32), (torch.float32, BF16)])
@pytest.mark.parametrize("kahan", [False, True])
def test_a_state_of_weights_of_another_type_trains_on(form, saved_as, loaded_as, kahan):
    params, optimizer = _make(saved_as, 1e-3, kahan_sum=kahan)
    _train(params, optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in params]
    exact = [_whole(p, optimizer) for p in params]
    if form == "canonical":
        named = dict(zip(("weight", "bias"), weights, strict=True))
        saved = canonical.make(saved["param_groups"], canonical.by_name(saved), named)
    again, resumed = _make(loaded_as, 1e-3, kahan_sum=kahan)
    with torch.no_grad():
        for p, w in zip(again, weights, strict=True):
            p.copy_(w)
    resumed.load_state_dict(saved)
    if form == "canonical" and loaded_as == torch.float32:
        # What rounding had taken is in the float32 weights now.
        assert all(torch.equal(p.detach(), e) for p, e in zip(again, exact, strict=True))
    begin = [_whole(q, resumed) for q in again]
    _train(params, optimizer, 4, start=4)
    _train(again, resumed, 4, start=4)
    for p, q, e, s in zip(params, again, exact, begin, strict=True):
        assert ("compensation" in resumed.state[q]) == (kahan and loaded_as == BF16)
        ours, theirs = _whole(q, resumed), _whole(p, optimizer)
        assert (ours - theirs).norm() < 1e-2 * theirs.norm(), "no more than bf16's own rounding"
        if kahan:
            assert ((ours - s) - (theirs - e)).norm() < 0.1 * (theirs - e).norm()


def test_a_stale_compensation_does_not_survive_a_canonical_state_without_one():
    params, optimizer = _make(BF16, 1e-3)
    _train(params, optimizer, 2)
    state = optimizer.state_dict()
    named = {name: p.detach().clone() for name, p in zip(("weight", "bias"), params, strict=True)}
    plain = canonical.make(state["param_groups"], canonical.by_name(state), named)
    again, other = _make(BF16, 1e-3, kahan_sum=True)
    _train(again, other, 2)
    other.load_state_dict(plain)
    assert all("compensation" not in other.state[p] for p in again)
