"""Model cards: they name the optimizer that trained and every setting of its update, and go along with a push."""

import dataclasses
import io
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import cards
import lifecycle
import pytest
import torch
import transformers.trainer
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from trl import SFTConfig

import hf_muon
from hf_muon.integrations.trainer import find_muon

from . import tiny


class Carded(cards.OptimizerCard, Trainer):
    """As in scripts/pretrain.py."""


def make(out, base="some/model", data=("data/mine", "some/set"), **changes):
    options = dict(max_steps=2, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    args = TrainingArguments(**tiny.arguments(out, **{**options, **changes}))
    held_out = tiny.tokens(rows=4, seed=1)
    return Carded(
        model=tiny.qwen2(), args=args, train_dataset=tiny.tokens(), eval_dataset=held_out, base=base, data=data
    )


def rows(out):
    """The section's table, and the whole card."""
    text = (Path(out) / "README.md").read_text()
    section = text.partition("## Optimizer\n")[2].partition("\n##")[0]
    return dict(line[2:-2].split(" | ", 1) for line in section.splitlines() if line.startswith("| ") and line[2] != "|")


def test_the_card_has_every_option_of_the_update_the_shares_and_the_final_loss(tmp_path):
    trainer = make(
        tmp_path, optim_args="momentum=0.9,adamw_lr=1e-4,exclude=*q_proj*", weight_decay=0.05, warmup_steps=1
    )
    lifecycle.train_and_report(trainer)
    found = rows(tmp_path)
    of_the_update = {f.name for f in dataclasses.fields(hf_muon.MuonConfig)} - set(cards.NOT_OF_THE_UPDATE)
    assert of_the_update <= found.keys()
    expected = {"momentum": "0.9", "muon_lr": "0.002", "adamw_lr": "0.0001", "exclude": "*q_proj*", "ns_steps": "5"}
    expected |= {"weight decay": "0.05", "schedule": "linear, warmup_steps 1", "starts from": "some/model"}
    expected |= {"ns_coefficients": "moonlight", "steps": "2 of 8 sequences", "data": "data/mine, some/set"}
    assert {key: found[key] for key in expected} == expected
    report = hf_muon.explain(tiny.qwen2(), exclude="*q_proj*", file=io.StringIO())
    assert found["trained by Muon"].startswith(f"{report.numel('muon'):,} parameters")
    assert found["trained by AdamW"].startswith(f"{report.numel('adamw'):,} parameters")
    last = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row][-1]
    assert found["held-out loss"].startswith(f"{last:.4f} after 2 steps")
    assert f"hf_muon {hf_muon.__version__}" in found["algorithm"]


def test_an_adamw_run_says_so(tmp_path):
    lifecycle.train_and_report(make(tmp_path, optim="adamw_torch", weight_decay=0.1))
    found = rows(tmp_path)
    assert found["algorithm"].startswith("adamw_torch (")
    count = sum(p.numel() for p in tiny.qwen2().parameters())
    assert found["trained by adamw_torch"] == f"{count:,} parameters, all that are trained"
    assert found["weight decay"] == "0.1, not of norms and biases"
    assert "momentum" not in found


def test_what_the_optimizer_has_is_said_not_what_the_run_asked_for(tmp_path):
    # As after a resume, where the checkpoint's options win.
    trainer = make(tmp_path)
    trainer.create_optimizer()
    group = next(group for group in find_muon(trainer.optimizer).param_groups if group["algorithm"] == "muon")
    group.update(momentum=0.8, weight_decay=0.3, lr=0.5)
    trainer.create_model_card()
    found = rows(tmp_path)
    assert (found["momentum"], found["weight decay"], found["muon_lr"]) == ("0.8", "0.3", "0.5")


@pytest.mark.parametrize("on_hub", [True, False])
def test_metadata_name_repositories_of_the_hub_alone(tmp_path, on_hub):
    base, data = ("some/model", "some/set") if on_hub else ("runs/x/y", "data/offline/sft")
    make(tmp_path, base=base, data=[data]).create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.datasets) == ((base, [data]) if on_hub else (None, None))
    assert (f"[{base}](https://huggingface.co/{base})" in card.text) == on_hub
    assert (f"[{data}](https://huggingface.co/datasets/{data})" in card.text) == on_hub
    assert "trained from scratch" not in card.text and "unknown dataset" not in card.text


def test_a_card_that_fails_is_a_warning_and_the_run_ends_well(tmp_path, caplog, monkeypatch):
    def broken(trainer):
        raise RuntimeError("no facts")

    monkeypatch.setattr(cards, "facts", broken)
    monkeypatch.setattr(logging.getLogger("hf_muon"), "propagate", True)
    lifecycle.train_and_report(make(tmp_path))
    assert "no facts" in caplog.text
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "trainer_state.json").is_file()


def test_a_run_settles_when_all_is_saved_and_the_process_group_gone(tmp_path, monkeypatch):
    trainer, order = make(tmp_path), []
    monkeypatch.setattr(trainer, "end", lambda: order.append("end"))
    monkeypatch.setattr(lifecycle, "settle", lambda: order.append((tmp_path / "README.md").is_file()))
    lifecycle.train_and_report(trainer)
    assert order == ["end", True]


def test_another_rank_writes_no_card(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not (tmp_path / "README.md").exists()


def test_the_best_models_loss_is_reported_when_that_is_what_is_saved(tmp_path):
    trainer = make(
        tmp_path, eval_steps=1, save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True, learning_rate=1e-2,
    )  # fmt: skip
    lifecycle.train_and_report(trainer)
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert losses[1] > losses[2]
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] == losses[1]
    assert rows(tmp_path)["held-out loss"].startswith(f"{losses[1]:.4f} after 1 steps")


@pytest.mark.parametrize("adapters", [False, True])
def test_fine_tuning_keeps_trls_card_around_ours(tmp_path, adapters):
    import sft
    from peft import LoraConfig

    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    trainer = sft.FineTuner(
        model=tiny.qwen2(),
        args=SFTConfig(**tiny.arguments(tmp_path, max_steps=1, max_length=64, per_device_train_batch_size=1)),
        train_dataset=Dataset.from_list([{"messages": talk}] * 4),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if adapters else None,
        base="runs/a/base",
        data=["data/offline/sft"],
    )
    lifecycle.train_and_report(trainer)
    text = (tmp_path / "README.md").read_text()
    assert "Trained from runs/a/base on data/offline/sft." in text and "None" not in text
    assert "trained using [TRL]" in text and text.index("## Optimizer") < text.index("## Training procedure")
    assert text.count("## Optimizer") == 1
    assert rows(tmp_path)["algorithm"].startswith("Muon")
    assert ModelCard.load(tmp_path / "README.md").data.library_name == ("peft" if adapters else "transformers")
    assert rows(tmp_path)["trained by Muon"].startswith("256 " if adapters else "18,432 ")


@pytest.fixture
def hub(monkeypatch):
    """Uploads, as what lay in the folder at that moment; nothing leaves the machine."""
    seen = []

    def upload(*, repo_id, folder_path, ignore_patterns, **_):
        copy = Path(folder_path).parent / f"uploaded-{len(seen)}"
        shutil.copytree(folder_path, copy, ignore=shutil.ignore_patterns(*ignore_patterns))
        seen.append((repo_id, copy))
        return SimpleNamespace(is_done=lambda: True)

    api = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name), upload_folder=upload)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: api)
    monkeypatch.setattr(lifecycle, "upload_folder", upload)
    return seen


def test_a_push_carries_the_final_model_and_card_also_when_the_run_was_already_finished(tmp_path, hub):
    options = dict(push_to_hub=True, hub_model_id="me/model", hub_strategy="end")
    lifecycle.train_and_report(make(tmp_path / "run", **options))
    ((repository, pushed),) = hub
    assert repository == "me/model"
    assert rows(pushed)["held-out loss"].split()[1:4] == ["after", "2", "steps,"]
    trained = load_file(tmp_path / "run" / "model.safetensors")
    # A run that finds nothing to do holds untrained weights, which must not be what it saves and pushes.
    lifecycle.train_and_report(make(tmp_path / "run", **options))
    assert not torch.equal(trained["model.norm.weight"], tiny.qwen2().model.norm.weight)
    for _, folder in hub:
        saved = load_file(folder / "model.safetensors")
        assert all(torch.equal(saved[name], weight) for name, weight in trained.items())
        assert not list(folder.glob("checkpoint-*")) and (folder / "README.md").is_file()
    assert len(hub) == 2
