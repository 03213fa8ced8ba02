"""Spectra in the Trainer's logs: the right numbers of the right step, and nothing else changed."""

import re

import pytest
import torch
from transformers import Trainer, TrainingArguments

import hf_muon
from hf_muon.analysis.spectra import spectrum

from . import tiny, tiny_moonlight

KEYS = {f"spectra/{number}/{group}" for number in ("entropy", "stable_rank", "spectral_norm") for group in
        ("AttnQO", "AttnKV", "Dense")} | {"spectra/step"}  # fmt: skip


def train(out, steps=None, model=None, **options):
    model = model or tiny.qwen2()
    args = TrainingArguments(**tiny.arguments(out, **{"max_steps": 6, "seed": 7, **options}))
    callbacks = [hf_muon.SpectraCallback(model, steps)] if steps else []
    trainer = Trainer(model=model, args=args, train_dataset=tiny.tokens(), callbacks=callbacks)
    trainer.train()
    return model, [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("optimizer", ["muon", "adamw_torch"])
def test_logs_hold_the_exact_spectra_of_the_step_and_training_is_untouched(tmp_path, optimizer):
    model, logs = train(tmp_path, 3, optim=optimizer)
    measured = {row["step"]: {key for key in row if key.startswith("spectra/")} for row in logs}
    assert measured == {step: KEYS if step in (3, 6) else set() for step in range(1, 7)}
    assert [row["spectra/step"] for row in logs if "spectra/step" in row] == [3, 6]
    # Of each group there are four matrices at most, so that k and v of two layers are all of AttnKV.
    attention = [getattr(layer.self_attn, f"{x}_proj").weight for layer in model.model.layers for x in "kv"]
    found = [spectrum(weight) for weight in attention]
    for name in ("entropy", "stable_rank", "spectral_norm"):
        expected = sum(getattr(each, name).item() for each in found) / 4
        assert logs[-1][f"spectra/{name}/AttnKV"] == pytest.approx(expected, rel=1e-5)
    plain, plain_logs = train(tmp_path / "plain", optim=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert [row["loss"] for row in logs] == [row["loss"] for row in plain_logs]


def test_between_logs_the_last_measurement_counts(tmp_path):
    _, logs = train(tmp_path, 2, max_steps=10, logging_steps=5)
    assert [(row["step"], row["spectra/step"]) for row in logs] == [(5, 4), (10, 10)]


def test_of_experts_some_are_measured_and_all_groups_of_moonlight_are_there():
    model = tiny_moonlight.model()
    callback = hf_muon.SpectraCallback(model, 1, per_group=3)
    chosen = [matrix for matrices in callback.matrices.values() for matrix in matrices]
    counts = {group: sum(m.group == group for m in chosen) for group in {m.group for m in chosen}}
    assert counts == dict(AttnQO=3, AttnKV=3, Experts=3, SharedExperts=3, Router=2, Dense=3)
    experts = [matrix for matrix in chosen if matrix.group == "Experts"]
    values = [spectrum(m.of(model.get_parameter(m.parameter))).entropy.item() for m in experts]
    assert callback.measure()["spectra/entropy/Experts"] == pytest.approx(sum(values) / 3, rel=1e-5)
    again = hf_muon.SpectraCallback(tiny_moonlight.model(seed=1), 1, per_group=3)
    assert again.matrices == callback.matrices, "the same on every rank and in every run"


def test_an_engine_that_keeps_other_parameters_is_refused_by_name_before_training():
    model = tiny.qwen2()
    callback = hf_muon.SpectraCallback(model, 1)
    name = next(iter(callback.matrices))
    owner, _, attribute = name.rpartition(".")
    # As FSDP1 leaves it: this rank's part, flat.
    setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(torch.zeros(7)))
    with pytest.raises(RuntimeError, match=re.escape(name) + ".*FSDP1"):
        callback.on_train_begin(None, None, None)


@pytest.mark.parametrize("options", [{"steps": 0}, {"per_group": 0}])
def test_what_measures_nothing_is_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        hf_muon.SpectraCallback(tiny.qwen2(), **options)


def test_pretraining_takes_it_as_an_option():
    import pretrain

    parse = pretrain.make_parser().parse_args_into_dataclasses
    options = ["--dataset_name", "d", "--config_name", "c", "--output_dir", "o", "--use_cpu", "true"]
    for extra, expected in (([], []), (["--spectra_steps", "50"], [50])):
        arguments, tokens, _ = parse([*options, *extra])
        callbacks = pretrain.make_callbacks(arguments, tokens, tiny.qwen2(), None)
        assert [c.steps for c in callbacks] == expected
