import copy
import math
import warnings

import pytest
import torch

from hf_muon import MatrixLayout, Muon
from hf_muon.optimizer import newton_schulz  # the name the step itself uses

from .reference import relative_error


def _param(*shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape).to(dtype))


def _mixed(**options):
    """A matrix, a stack of three, a fused q/k/v with grouped heads, a convolution, and a vector under AdamW."""
    params = [_param(16, 24), _param(3, 8, 12), _param(16, 12), _param(6, 4, 3, 3), _param(9)]
    layouts = [
        MatrixLayout((16, 24)),
        MatrixLayout((3, 8, 12), batch=1, sizes=(4, 4)),
        MatrixLayout((16, 12), sizes=(8, 4, 4)),
        MatrixLayout((6, 4, 3, 3)),
    ]
    groups = [
        {
            "params": [(f"w{i}", p) for i, p in enumerate(params[:4])],
            "matrices": [x.key() for x in layouts],
            "kinds": ["mlp", "experts", "attention", "conv"],
        },
        {"params": [("v", params[4])], "algorithm": "adamw"},
    ]
    return params, Muon(groups, lr=1e-2, **options)


def _grads(params, seed):
    torch.manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape).to(p.dtype)


def _by_hand(p, grads, matrices, lr=1e-2, decay=0.1, mu=0.95):
    """Equations (1)-(4) on explicit slices: ``matrices`` are index tuples, each one logical matrix."""
    w, m = p.detach().clone(), torch.zeros_like(p)
    for g in grads:
        m = mu * m + g
        d = g + mu * m
        for index in matrices:
            block = d[index].flatten(1)
            o = newton_schulz(block, dtype=torch.float32).view(d[index].shape)
            w[index] = w[index] - lr * (0.2 * math.sqrt(max(block.shape)) * o + decay * w[index])
    return w


def test_update_rms_is_that_of_all_elements_of_a_large_matrix():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(520, 1040))  # more than a block; momentum and weights start at zero
    weight.grad = torch.randn(520, 1040)
    weight.grad[:100] *= 1e-3  # rows at the beginning and at the end move unequally
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0)
    optimizer.step()
    rms = weight.detach().square().mean().sqrt().item()
    assert optimizer.metrics()["muon/update_rms"] == pytest.approx(rms, rel=1e-4)
    assert weight[:100].square().mean() < 0.9 * weight.square().mean()


def test_one_process_on_a_cpu_takes_small_turns_and_no_larger_than_asked():
    weights = [torch.nn.Parameter(torch.zeros(1024, 512)) for _ in range(9)]
    for weight in weights:
        weight.grad = torch.ones(1024, 512)
    for size, turns in ((2**27, 3), (2**20, 9), (2**21, 5)):  # bytes in bfloat16; a matrix has 2^20
        optimizer = Muon(weights, lr=0.1, exchange_bytes=size)
        optimizer.step()
        unit = optimizer._unit(optimizer.param_groups[0])
        assert len(unit.exchange.turns(range(9))) == turns


def test_every_logical_matrix_is_updated_by_the_papers_rule_on_its_own():
    params, optimizer = _mixed(ns_dtype="float32")
    start = [p.detach().clone() for p in params]
    history = []
    for seed in range(5):
        _grads(params, seed)
        history.append([p.grad.clone() for p in params])
        optimizer.step()
    cuts = [
        [(slice(None),)],
        [(e, slice(r, r + 4)) for e in range(3) for r in (0, 4)],
        [(slice(0, 8),), (slice(8, 12),), (slice(12, 16),)],
        [(slice(None),)],
    ]
    for i, index in enumerate(cuts):
        want = _by_hand(start[i], [g[i] for g in history], index)
        # Weights of size 1 travel 0.01 here: float32's 6e-8 is 1e-5 of the way.
        assert relative_error(params[i], want, start[i]) < 3e-5, i


def test_gradients_are_never_modified():
    params, optimizer = _mixed()
    _grads(params, 0)
    copies = [p.grad.clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p.grad, c) for p, c in zip(params, copies, strict=True))


def test_momentum_is_the_sum_form_in_float32_also_for_bf16_weights():
    p = _param(8, 8, dtype=torch.bfloat16)
    optimizer = Muon([p], momentum=0.5)
    total = torch.zeros(8, 8)
    for seed in range(3):
        _grads([p], seed)
        total = 0.5 * total + p.grad.float()
        optimizer.step()
    buffer = optimizer.state[p]["momentum_buffer"]
    assert buffer.dtype == torch.float32 and torch.equal(buffer, total)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
@pytest.mark.parametrize(
    ("mode", "factor"),
    [
        ("sqrt_max_dims", lambda a, b: 0.4 * math.sqrt(max(a, b))),
        ("match_rms_adamw", lambda a, b: 0.4 * math.sqrt(max(a, b))),
        ("sqrt_hidden_size", lambda a, b: 0.4 * math.sqrt(32)),
        ("original", lambda a, b: math.sqrt(max(1, a / b))),
        ("inverse_rms", None),
    ],
)
def test_scale_modes_of_table_1(mode, factor, shape):
    p = _param(*shape)
    start = p.detach().clone()
    optimizer = Muon(
        [p], lr=1.0, weight_decay=0.0, adjust_lr_fn=mode, update_rms=0.4, hidden_size=32, ns_dtype="float32"
    )
    _grads([p], 1)
    optimizer.step()
    change = start - p.detach()
    if factor is None:  # "Update Norm": whatever O is, the RMS is the target
        assert change.square().mean().sqrt().item() == pytest.approx(0.4, rel=1e-5)
        return
    want = newton_schulz(p.grad, dtype=torch.float32) * factor(*shape)
    assert (change - want).norm() / want.norm() < 1e-5


def test_the_logical_shape_decides_the_scale_of_a_transposed_weight():
    # "original" is the one mode in which rows and columns differ: stored [in, out], A is the number of columns.
    p = _param(16, 64)
    start = p.detach().clone()
    group = {"params": [p], "matrices": [MatrixLayout((16, 64), transposed=True).key()]}
    optimizer = Muon([group], lr=1.0, weight_decay=0.0, adjust_lr_fn="original", ns_dtype="float32")
    _grads([p], 1)
    optimizer.step()
    want = newton_schulz(p.grad, dtype=torch.float32) * 2.0
    assert ((start - p.detach()) - want).norm() / want.norm() < 1e-5


def test_zero_gradient_changes_nothing_but_the_decay():
    p = _param(8, 8)
    optimizer = Muon([p], lr=0.1, weight_decay=0.5, momentum=0.0)
    _grads([p], 0)
    optimizer.step()
    start = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, start * (1 - 0.1 * 0.5))


def test_zeros_before_the_first_step_make_the_state_and_change_nothing():
    # torch.distributed.checkpoint and DeepSpeed without ZeRO step once with zero gradients to have a state to fill.
    params, optimizer = _mixed()
    start = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, s) for p, s in zip(params, start, strict=True))
    assert all(optimizer.state[p] for p in params) and optimizer.state[params[4]]["step"] == 0
    assert "muon/update_rms" not in optimizer.metrics()


def test_a_parameter_without_a_gradient_is_left_alone():
    params, optimizer = _mixed()
    _grads(params, 0)
    params[1].grad = None
    start = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], start) and params[1] not in optimizer.state


def test_one_row_and_one_column_and_channels_last_weights():
    for p in (_param(1, 16), _param(16, 1)):
        optimizer = Muon([p], lr=0.1, weight_decay=0.0)
        start = p.detach().clone()
        _grads([p], 1)
        optimizer.step()
        assert p.isfinite().all() and not torch.equal(p, start)
    dense, strided = _param(6, 4, 3, 3), _param(6, 4, 3, 3)
    strided.data = strided.data.to(memory_format=torch.channels_last)
    for p in (dense, strided):
        optimizer = Muon([{"params": [p], "matrices": [MatrixLayout((6, 4, 3, 3)).key()]}], lr=0.1)
        _grads([p], 2)
        optimizer.step()
    assert torch.equal(dense, strided) and strided.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 4])
def test_a_non_finite_gradient_skips_the_step_and_is_counted(value, where):
    params, optimizer = _mixed()
    _grads(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
    _grads(params, 1)
    params[where].grad.view(-1)[0] = value
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before[0], strict=True))
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[key], before[1][index][key]) for key in state)
    metrics = optimizer.metrics()
    assert metrics["muon/skipped_steps"] == 1
    assert metrics["muon/skipped_matrices"] == (0 if where == 4 else 1)


def test_metrics_are_the_rms_of_what_was_applied():
    params, optimizer = _mixed(weight_decay=0.0)
    start = [p.detach().clone() for p in params]
    _grads(params, 0)
    optimizer.step()
    metrics = optimizer.metrics()
    for p, s, kind in zip(params, start, ["mlp", "experts", "attention", "conv"], strict=False):
        applied = ((s - p.detach()) / 1e-2).square().mean().sqrt().item()
        assert metrics[f"muon/update_rms/{kind}"] == pytest.approx(applied, rel=1e-3)
        assert metrics[f"muon/weight_rms/{kind}"] == pytest.approx(p.square().mean().sqrt().item(), rel=1e-5)
    assert metrics["muon/lr"] == metrics["muon/adamw_lr"] == 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_and_go_on_is_bit_exact(dtype, tmp_path):
    def run(steps, resume_at=None):
        params, optimizer = _mixed()
        for p in params:
            p.data = p.data.to(dtype)
        for step in range(steps):
            if step == resume_at:
                torch.save((optimizer.state_dict(), [p.detach() for p in params]), tmp_path / "state.pt")
                state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
                params, optimizer = _mixed()
                for p, w in zip(params, weights, strict=True):
                    p.data = w.clone()
                optimizer.load_state_dict(state)
            _grads(params, step)
            optimizer.step()
        return params, optimizer

    whole, resumed = run(6), run(6, resume_at=3)
    assert all(torch.equal(a, b) for a, b in zip(whole[0], resumed[0], strict=True))
    a, b = whole[1].state_dict(), resumed[1].state_dict()
    assert a["param_groups"] == b["param_groups"]
    for index, state in a["state"].items():
        for key, value in state.items():
            assert torch.equal(value, b["state"][index][key]) and value.dtype == b["state"][index][key].dtype


def test_deepcopy_and_pickle_carry_on():
    params, optimizer = _mixed()
    _grads(params, 0)
    optimizer.step()
    clone = copy.deepcopy(optimizer)
    for group in clone.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    clone.step()
    assert clone.metrics()["muon/update_rms"] > 0


def test_a_state_of_another_optimizer_or_model_is_refused_and_nothing_is_touched():
    params, optimizer = _mixed()
    _grads(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    adamw = torch.optim.AdamW([{"params": params[:4]}, {"params": params[4:]}])
    adamw.step()
    fewer = Muon([{"params": [("w0", _param(16, 24))]}])
    renamed = copy.deepcopy(before)
    renamed["param_groups"][0]["param_names"][0] = "other"
    reshaped = copy.deepcopy(before)
    reshaped["state"][0]["momentum_buffer"] = torch.zeros(2, 2)
    for bad, message in [
        (adamw.state_dict(), "another optimizer"),
        (fewer.state_dict(), "the model has"),
        (renamed, "'other'"),
        (reshaped, "shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(v, after["state"][i][k]) for i, s in before["state"].items() for k, v in s.items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1e-3}, ValueError, "lr must be"),
        ({"lr": math.nan}, ValueError, "lr must be"),
        ({"lr": math.inf}, ValueError, "lr must be"),
        ({"lr": torch.tensor(1e-3)}, TypeError, "lr.item"),
        ({"lr": "1e-3"}, ValueError, "'1e-3'"),
        ({"weight_decay": -0.1}, ValueError, "-0.1"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"momentum": math.nan}, ValueError, "momentum"),
        ({"nesterov": "yes"}, ValueError, "'yes'"),
        ({"ns_steps": 0}, ValueError, "ns_steps"),
        ({"ns_coefficients": "none"}, ValueError, "polar_express"),
        ({"ns_dtype": "float16"}, ValueError, "bfloat16, float32"),
        ({"adjust_lr_fn": "spectral"}, ValueError, "sqrt_max_dims"),
        ({"adjust_lr_fn": "sqrt_hidden_size"}, ValueError, "hidden_size"),
        ({"update_rms": 0}, ValueError, "update_rms"),
    ],
)
def test_bad_hyper_parameters_name_the_value(options, error, message):
    with pytest.raises(error, match=message):
        Muon([_param(4, 4)], **options)


class _Wrapped(torch.Tensor):
    """Stands for a sharded or quantized tensor."""


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda: [], "empty"),
        (lambda: [{"params": []}], "empty 'muon'"),
        (lambda: [{"params": [("norm.weight", _param(4))]}], "norm.weight of shape"),
        (lambda: [{"params": [("conv.weight", _param(4, 4, 3))]}], "param_groups"),
        (lambda: [_param(4, 4).requires_grad_(False)], "frozen"),
        (lambda: [torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)], "int8"),
        (lambda: [torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.cfloat))], "complex64"),
        (lambda: [_param(4, 4)] * 2, "twice"),
        (lambda: [_Wrapped(torch.zeros(4, 4)).requires_grad_()], "is a _Wrapped.*only plain tensors"),
        (lambda: [{"params": [_param(4, 4)], "algorithm": "sgd"}], "'sgd'"),
        (lambda: [{"params": [_param(4, 4)], "matrices": []}], "entries in 'matrices'"),
        (lambda: [{"params": [_param(4)], "algorithm": "adamw", "betas": (0.9, 1.5)}], "1.5"),
    ],
)
def test_bad_parameters_are_refused_by_name(groups, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own warning of a duplicate, which we make an error
        with pytest.raises(ValueError, match=message):
            Muon(groups())


def test_sparse_gradients_are_refused_before_anything_changes():
    params, optimizer = _mixed()
    _grads(params, 0)
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="w0 has a sparse gradient"):
        optimizer.step()
    assert not optimizer.state


def test_a_bad_lr_from_a_scheduler_is_refused_before_anything_changes():
    params, optimizer = _mixed()
    _grads(params, 0)
    optimizer.param_groups[1]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.step()
    assert not optimizer.state


def test_parameters_re_laid_out_by_an_engine_are_refused_by_name():
    params, optimizer = _mixed()
    optimizer.param_groups[0]["params"] = [_param(100)]
    with pytest.raises(RuntimeError, match="4 parameters .* now holds 1"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = [_param(384), *params[1:4]]
    with pytest.raises(RuntimeError, match=r"w0 was routed as \[16, 24\] but is now"):
        optimizer.step()
    assert not optimizer.state


def test_closure_and_empty_step():
    p = _param(4, 4)
    optimizer = Muon([p])
    assert optimizer.step() is None

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    loss = optimizer.step(closure)
    assert loss.item() > 0 and not torch.equal(p, before)


def test_grad_scaler_skips_and_recovers():
    p = _param(4, 4)
    optimizer = Muon([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = p.detach().clone()
    scaler.scale((p * math.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, before) and not optimizer.state and scaler.get_scale() == 1.0
    optimizer.zero_grad()
    scaler.scale((p**2).sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(p, before)


def test_an_overflow_under_accelerates_scaler_is_counted_and_leaves_no_stale_update_rms():
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    p = _param(4, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = AcceleratedOptimizer(Muon([p]), device_placement=False, scaler=scaler)
    for factor in (1.0, math.inf):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        optimizer.step()
    metrics = optimizer.optimizer.metrics()
    assert metrics["muon/skipped_steps"] == 1 and "muon/update_rms" not in metrics


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_gradients_make_ordinary_steps(scale):
    plain, scaled = _param(8, 12), _param(8, 12)
    start = plain.detach().clone()
    for p, factor in ((plain, 1.0), (scaled, scale)):
        optimizer = Muon([p], lr=0.1, ns_dtype="float32")
        for seed in range(3):
            _grads([p], seed)
            p.grad *= factor
            optimizer.step()
        assert optimizer.telemetry.skipped_steps == 0
    assert relative_error(scaled, plain, start) < 1e-4


def test_finite_gradients_too_large_to_sum_are_skipped():
    p = _param(4, 4)
    optimizer = Muon([p])
    for _ in range(3):
        p.grad = torch.full_like(p, 3e38)
        optimizer.step()
    assert optimizer.telemetry.skipped_steps == 3 and not optimizer.state and p.isfinite().all()


def test_skips_are_warned_about_by_name(caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("hf_muon"), "propagate", True)
    params, optimizer = _mixed()
    for _ in range(5):
        _grads(params, 0)
        params[1].grad[0, 0, 0] = math.nan
        optimizer.step()
    warned = [text for text in dict.fromkeys(caplog.messages) if "skipped" in text]
    assert len(warned) == 3 and "the first of w1 (4 skipped so far)" in warned[2]
    assert "muon/update_rms" not in optimizer.metrics()


def test_half_precision_weights_are_rounded_once():
    p = _param(16, 24, dtype=torch.bfloat16)
    start = p.detach().clone()
    optimizer = Muon([p], lr=1e-2, weight_decay=0.1, ns_dtype="float32")
    _grads([p], 1)
    optimizer.step()
    g = p.grad.float()
    change = 0.2 * math.sqrt(24) * newton_schulz(1.95 * g, dtype=torch.float32)
    want = (start.float() * (1 - 1e-2 * 0.1) - 1e-2 * change).to(torch.bfloat16)
    # The same float32 value must be rounded; a different last bit of the sum can move it by one bfloat16 step at most.
    assert (p != want).float().mean() < 0.01


def test_float64_weights_train_and_log():
    p = _param(6, 6, dtype=torch.float64)
    optimizer = Muon([p], ns_dtype="float32")
    _grads([p], 0)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float64
    assert optimizer.metrics()["muon/weight_rms"] > 0


def test_autocast_does_not_change_the_arithmetic():
    torch.manual_seed(0)
    G = torch.randn(16, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = newton_schulz(G, dtype=torch.float32)
    assert inside.dtype == torch.float32 and torch.equal(inside, newton_schulz(G, dtype=torch.float32))


def test_torchs_own_schedulers_may_end_a_hair_below_zero():
    p = _param(4, 4)
    optimizer = Muon([p], lr=1e-3)
    optimizer.param_groups[0]["lr"] = -4.4e-21
    _grads([p], 0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = -1e-3
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.step()


def test_the_step_counter_of_adamw_does_not_saturate_under_a_bf16_default_dtype():
    p = _param(3)
    optimizer = Muon([{"params": [p], "algorithm": "adamw"}])
    torch.set_default_dtype(torch.bfloat16)
    try:
        p.grad = torch.ones_like(p)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[p]["step"].dtype == torch.float32


def test_resuming_with_other_options_keeps_todays_matrices_and_says_what_differs(caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("hf_muon"), "propagate", True)

    def make(sizes, momentum):
        p = _param(8, 4)
        group = {"params": [("w", p)], "matrices": [MatrixLayout((8, 4), sizes=sizes).key()]}
        return p, Muon([group], momentum=momentum)

    p, old = make((), 0.9)
    _grads([p], 0)
    old.step()
    _, new = make((4, 4), 0.5)
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["matrices"] == [MatrixLayout((8, 4), sizes=(4, 4)).key()]
    assert new.param_groups[0]["momentum"] == 0.9
    assert "momentum=0.9 (not 0.5)" in caplog.text and "cut into other matrices" in caplog.text
    broken = old.state_dict()
    broken["param_groups"][0] = {**broken["param_groups"][0], "momentum": 7}
    with pytest.raises(ValueError, match="momentum"):
        new.load_state_dict(broken)
    assert new.param_groups[0]["momentum"] == 0.9


def test_a_learning_rate_that_a_checkpoint_overrules_is_named(caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("hf_muon"), "propagate", True)
    old, new = Muon([_param(4, 4)], lr=1e-3), Muon([_param(4, 4)], lr=5e-4)
    torch.optim.lr_scheduler.LambdaLR(old, lambda step: 0.5)
    new.load_state_dict(old.state_dict())
    assert "muon learning rate 0.001 (not 0.0005)" in caplog.text


def test_float16_weights_are_warned_about(caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("hf_muon"), "propagate", True)
    Muon([("w", _param(4, 4, dtype=torch.float16))])
    assert "w (and 0 more) has float16 weights" in caplog.text


def test_a_refused_group_is_not_half_added():
    optimizer = Muon([_param(4, 4)])
    with pytest.raises(ValueError, match="not a matrix"):
        optimizer.add_param_group({"params": [_param(3)]})
    assert len(optimizer.param_groups) == 1


def test_a_loaded_state_is_a_copy():
    p = _param(4, 4, dtype=torch.bfloat16)
    saver, loader = Muon([p]), Muon([_param(4, 4, dtype=torch.bfloat16)])
    _grads([p], 0)
    saver.step()
    state = saver.state_dict()
    before = state["state"][0]["momentum_buffer"].clone()
    loader.load_state_dict(state)
    _grads(loader.param_groups[0]["params"], 1)
    loader.step()
    assert torch.equal(state["state"][0]["momentum_buffer"], before)


def test_weights_of_one_logical_shape_stored_both_ways_are_not_stacked_together():
    # Both are [64, 16] matrices, one stored as [16, 64]; each must come out as if it were alone.
    for options in ({"adjust_lr_fn": "original"}, {}):
        plain, stored = _param(64, 16), _param(16, 64, seed=1)
        layouts = [MatrixLayout((64, 16)).key(), MatrixLayout((16, 64), transposed=True).key()]
        together = Muon([{"params": [plain, stored], "matrices": layouts}], ns_dtype="float32", **options)
        alone = [torch.nn.Parameter(p.detach().clone()) for p in (plain, stored)]
        _grads([plain, stored], 2)
        for p, copy_, layout in zip((plain, stored), alone, layouts, strict=True):
            copy_.grad = p.grad.clone()
            Muon([{"params": [copy_], "matrices": [layout]}], ns_dtype="float32", **options).step()
        together.step()
        assert all(torch.equal(p, q) for p, q in zip((plain, stored), alone, strict=True))
