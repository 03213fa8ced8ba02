"""Spikes are named by step, layer and batch, noise is not; and the RMS of hidden layers' outputs."""

import importlib
import logging
import math
import random

import pytest
import torch
import watching
from transformers import TrainingArguments

from hf_muon import AttentionLogitsCallback, Muon, OutputRMSCallback, SpikeCallback, param_groups
from hf_muon.integrations.spikes import RobustWindow, batch_digest

from . import tiny
from .distributed.worker import SequentialTrainer

STEPS, AT, ROWS = 64, 60, 4
VICTIM = "model.layers.1.mlp.down_proj"


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_muon"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "spike" in r.getMessage()]


def data(strange_step=None):
    """Learnable rows, and in one step rows whose labels are nonsense."""
    rows = tiny.tokens(rows=STEPS * ROWS)
    if strange_step is not None:
        rng = random.Random(1)
        for row in rows[(strange_step - 1) * ROWS : strange_step * ROWS]:
            text = "".join(chr(rng.randrange(33, 127)) for _ in row["input_ids"])
            row["input_ids"] = tiny.tokenizer()(text)["input_ids"]
            row["labels"] = row["input_ids"]
    return rows


def trainer(tmp_path, callback, rows, **options):
    defaults = dict(max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=3e-3, lr_scheduler_type="constant")
    args = TrainingArguments(**tiny.arguments(tmp_path, **{**defaults, **options}))
    return SequentialTrainer(
        model=tiny.qwen2(), args=args, train_dataset=rows, callbacks=[callback], processing_class=tiny.tokenizer()
    )


def test_a_strange_batch_is_named_by_step_and_text(tmp_path, warnings):
    callback = SpikeCallback(window=16, least=8)
    rows = data(AT)
    run = trainer(
        tmp_path, callback, rows, learning_rate=1e-2, gradient_accumulation_steps=2, per_device_train_batch_size=2
    )
    run.train()
    assert {spike.step for spike in callback.spikes} == {AT}
    (spike,) = [s for s in callback.spikes if s.what == "loss"]
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert spike.value == pytest.approx(losses[AT - 1], rel=1e-4) and spike.threshold < spike.value
    strange = torch.tensor([row["input_ids"] for row in rows[(AT - 1) * ROWS : AT * ROWS]])
    text = spike.batches[0]
    assert any(f"digest {batch_digest(part)}" in text for part in strange.split(2))
    assert any(f"micro-batch {i} of 2, input_ids [2, 16]" in text for i in (1, 2))
    assert sum(repr(tiny.tokenizer().decode(row)) in text for row in strange) == 2
    (message, *others) = warnings()
    assert len(others) < 2 and f"spike in step {AT}: loss" in message and text in message
    assert run.state.log_history[-2]["spike/steps"] == 1


@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_a_layer_whose_gradient_jumps_is_named_before_and_behind_clipping(tmp_path, warnings, clip):
    callback = SpikeCallback(window=16, least=8)
    run = trainer(tmp_path, callback, data(), max_grad_norm=clip)
    weight = run.model.get_submodule(VICTIM).weight
    weight.register_hook(lambda grad: grad * 100 if run.state.global_step == AT - 1 else grad)
    run.train()
    (spike,) = callback.spikes
    assert (spike.step, spike.what, spike.largest, spike.grown) == (
        AT,
        "grad_norm",
        f"{VICTIM}.weight",
        f"{VICTIM}.weight",
    )
    norms = [row["grad_norm"] for row in run.state.log_history if "loss" in row]
    assert spike.value == pytest.approx(norms[AT - 1]) and spike.growth > 10 * clip
    assert len(warnings()) == 1 and f"{VICTIM}.weight" in warnings()[0]


def test_what_the_step_refuses_it_refuses_in_its_own_words():
    # Gradients are read behind the step: read before it, this one would fail on its rank alone, and the others wait.
    model = tiny.qwen2()
    muon = Muon(param_groups(model))
    SpikeCallback().on_train_begin(None, None, None, optimizer=muon)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    weight = model.get_submodule(VICTIM).weight
    weight.grad = weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match=f"{VICTIM}.weight has a sparse gradient"):
        muon.step()


def test_without_muon_step_and_batch_are_still_named(tmp_path, warnings):
    callback = SpikeCallback(window=16, least=8)
    trainer(tmp_path, callback, data(AT), optim="adamw_torch", learning_rate=1e-2).train()
    assert {spike.step for spike in callback.spikes} == {AT}
    assert all("gradients by layer are seen with optim='muon' only" in text for text in warnings())


def test_a_loss_that_is_not_a_number_is_a_spike_from_the_first_step(tmp_path, warnings):
    callback = SpikeCallback()
    run = trainer(tmp_path, callback, data(), max_steps=3)
    original = run.compute_loss
    run.compute_loss = lambda *a, **k: original(*a, **k) * (math.nan if run.state.global_step == 1 else 1.0)
    run.train()
    assert {(s.step, s.what) for s in callback.spikes} == {(2, "loss"), (2, "grad_norm")}


def test_training_that_learns_raises_none_and_is_left_as_it_is(tmp_path, warnings):
    callback = SpikeCallback(window=16, least=8)
    watched, plain = trainer(tmp_path, callback, data()), trainer(tmp_path, OutputRMSCallback(100), data())
    watched.train(), plain.train()
    assert not callback.spikes and not warnings()
    for (name, p), q in zip(watched.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("noise", ["normal", "lognormal", "falling", "constant"])
def test_steady_noise_passes_no_threshold(noise):
    rng = random.Random(0)
    draw = {
        "normal": lambda i: 3.0 + rng.gauss(0, 0.2),
        "lognormal": lambda i: math.exp(rng.gauss(0, 0.3)),  # as gradient norms are
        "falling": lambda i: 10 * math.exp(-i / 500) + rng.gauss(0, 0.1),
        "constant": lambda i: 2.0,
    }[noise]
    window = RobustWindow(64, 8.0, 16)
    assert [window.passed(draw(i)) for i in range(5000)] == [None] * 5000
    assert window.passed(draw(5000) + 20) is not None


def test_a_few_spikes_do_not_hide_the_next_and_a_new_level_becomes_usual():
    rng = random.Random(0)
    window = RobustWindow(20, 8.0, 10)
    for _ in range(20):
        assert window.passed(1 + rng.gauss(0, 0.05)) is None
    assert all(window.passed(3 + rng.gauss(0, 0.05)) is not None for _ in range(5))
    later = [window.passed(3 + rng.gauss(0, 0.05)) for _ in range(20)]
    assert later[-1] is None


@pytest.mark.parametrize("options", [dict(least=1), dict(window=4, least=8), dict(sigmas=0.0)])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="2 <= least <= window and sigmas > 0"):
        SpikeCallback(**options)


def test_output_rms_is_that_of_all_outputs_of_the_hidden_layers_of_a_kind(tmp_path):
    options = dict(learning_rate=0.0, optim="adamw_torch", max_steps=2)
    run = trainer(
        tmp_path, OutputRMSCallback(2), data(), per_device_train_batch_size=2, gradient_accumulation_steps=2, **options
    )
    model = tiny.qwen2().train()
    seen = {"attention": [], "mlp": []}
    for name, module in model.named_modules():
        kind = "attention" if "self_attn." in name else "mlp"
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(
                lambda m, i, out, kind=kind: seen[kind].append(out.detach().double().flatten())
            )
    model(input_ids=torch.tensor([row["input_ids"] for row in data()[ROWS : 2 * ROWS]]))
    expected = {f"output_rms/{k}": float(torch.cat(v).square().mean().sqrt()) for k, v in seen.items()}
    expected["output_rms"] = float(torch.cat([x for v in seen.values() for x in v]).square().mean().sqrt())
    run.train()
    first, second = [row for row in run.state.log_history if "loss" in row]
    assert {k: v for k, v in second.items() if "output" in k} == pytest.approx(expected, rel=1e-5)
    assert not any("output" in k for k in first)
    assert not any(module._forward_hooks for module in run.model.modules())


@pytest.mark.parametrize("script", ["pretrain", "sft"])
def test_both_training_scripts_take_the_watching_options(script, tmp_path):
    parser = importlib.import_module(script).make_parser()
    source = {"pretrain": "config_name", "sft": "model_name_or_path"}[script]
    given = "--attention_logits_steps 5 --output_rms_steps 7 --detect_spikes --use_cpu --bf16 false --dataset_name x"
    given = [*given.split(), f"--{source}", "x", "--output_dir", str(tmp_path)]
    arguments = parser.parse_args_and_config(given)[0]
    logits, outputs, spikes = arguments.watchers()
    assert (type(logits), logits.steps) == (AttentionLogitsCallback, 5)
    assert (type(outputs), outputs.steps) == (OutputRMSCallback, 7)
    assert type(spikes) is SpikeCallback
    assert watching.WatchArguments().watchers() == []
    with pytest.raises(ValueError, match="output_rms_steps must be a positive integer, got 0"):
        watching.WatchArguments(output_rms_steps=0).watchers()
