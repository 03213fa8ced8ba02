"""States of other Muons: what torch's or Moonlight's optimizer would have done next, ours does."""

import pytest
import torch

from hf_muon import Muon, convert

from .reference import relative_error


def _setup(seed=0):
    torch.manual_seed(seed)
    names = ["a", "b", "v"]
    return names, [torch.nn.Parameter(torch.randn(s)) for s in ((12, 20), (24, 8), (7,))]


def _grads(params, seed):
    torch.manual_seed(seed)
    for p in params:
        p.grad = torch.randn_like(p) * 1e-2


def _ours(names, params):
    groups = [
        {"params": list(zip(names[:2], params[:2], strict=True))},
        {"params": [(names[2], params[2])], "algorithm": "adamw"},
    ]
    return Muon(groups, lr=1e-2, weight_decay=0.1)


def _torch(names, params, named):
    matrices, rest = list(zip(names[:2], params[:2], strict=True)), [(names[2], params[2])]
    if not named:
        matrices, rest = params[:2], params[2:]
    return (
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1),
    )


@pytest.mark.parametrize("named", [True, False])
def test_from_torch_goes_on_as_torch_would(named):
    names, theirs = _setup()
    optimizers = _torch(names, theirs, named)
    for seed in range(4):
        _grads(theirs, seed)
        for optimizer in optimizers:
            optimizer.step()
    _, ours = _setup()
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
    muon = _ours(names, ours)
    given = {} if named else {"muon_names": names[:2], "adamw_names": names[2:]}
    muon.load_state_dict(convert.from_torch(muon, *(x.state_dict() for x in optimizers), **given))
    start = [p.detach().clone() for p in ours]
    for seed in range(4, 7):
        for params in (theirs, ours):
            _grads(params, seed)
        for optimizer in (*optimizers, muon):
            optimizer.step()
    for p, q, w in zip(ours, theirs, start, strict=True):
        # bfloat16 Newton-Schulz of directions that differ by a factor: rounding. A wrong form is off by 0.1 or more.
        assert relative_error(p, q, w) < (4e-2 if p.ndim == 2 else 1e-6)


def test_the_wrong_momentum_form_would_be_seen():
    names, theirs = _setup()
    optimizers = _torch(names, theirs, True)
    for seed in range(4):
        _grads(theirs, seed)
        optimizers[0].step()
    saved = optimizers[0].state_dict()
    saved["param_groups"][0]["momentum"] = 0.0  # as if the average were a sum
    _, ours = _setup()
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
    muon = _ours(names, ours)
    muon.load_state_dict(convert.from_torch(muon, saved))
    start = ours[0].detach().clone()
    for params, optimizer in ((theirs, optimizers[0]), (ours, muon)):
        _grads(params, 9)
        params[2].grad = None
        optimizer.step()
    assert relative_error(ours[0], theirs[0], start) > 0.1


def test_to_torch_and_back_is_the_same_state():
    names, params = _setup()
    muon = _ours(names, params)
    for seed in range(3):
        _grads(params, seed)
        muon.step()
    matrices, rest = convert.to_torch(muon.state_dict())
    assert set(matrices) == {"a", "b"} and set(rest) == {"v"}
    group = {"params": [0, 1], "param_names": ["a", "b"], "momentum": 0.95}
    again = {"state": dict(enumerate(matrices.values())), "param_groups": [group]}
    other = {"state": {0: rest["v"]}, "param_groups": [{"params": [0], "param_names": ["v"]}]}
    _, fresh = _setup()
    target = _ours(names, fresh)
    target.load_state_dict(convert.from_torch(target, again, other))
    for p, q in zip(params, fresh, strict=True):
        for key, value in muon.state[p].items():
            assert torch.allclose(target.state[q][key], value, rtol=1e-6, atol=0)


def test_from_moonlight_keeps_the_sum_and_renames_the_averages():
    names, params = _setup()
    muon = _ours(names, params)
    buffers = [torch.randn_like(p) for p in params]
    saved = {
        "state": {
            0: {"momentum_buffer": buffers[0], "use_muon": True},
            1: {"momentum_buffer": buffers[1], "use_muon": True},
            2: {"moment1": buffers[2], "moment2": buffers[2].square(), "step": 5, "use_muon": False},
        },
        "param_groups": [{"params": [0, 1, 2], "momentum": 0.95}],
    }
    muon.load_state_dict(convert.from_moonlight(muon, saved, names))
    assert torch.equal(muon.state[params[1]]["momentum_buffer"], buffers[1])
    assert torch.equal(muon.state[params[2]]["exp_avg_sq"], buffers[2].square())
    assert muon.state[params[2]]["step"] == 5


def test_names_that_do_not_fit_are_errors():
    names, params = _setup()
    muon = _ours(names, params)
    saved = {"state": {0: {"momentum_buffer": torch.zeros(7)}}, "param_groups": [{"params": [0], "momentum": 0.9}]}
    with pytest.raises(ValueError, match="one name for each"):
        convert.from_torch(muon, saved)
    with pytest.raises(ValueError, match="another algorithm"):
        convert.from_torch(muon, saved, muon_names=["v"])
