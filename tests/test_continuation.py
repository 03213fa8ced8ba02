"""Pretraining on a schedule in tokens: rates, batches and data by step; resuming; taking another run's state over."""

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import torch
from continuation import Shuffled, StepBatches, Streamed, TokenArguments, make_run
from pretrain import build_model, collate, make_parser, make_trainer
from transformers import TrainingArguments

from hf_muon.integrations.trainer import find_muon
from hf_muon.moonlight.balance import BIAS
from hf_muon.moonlight.schedules import BatchRamp, Run, Schedule, Stage

from . import tiny, tiny_moonlight
from .reference import relative_error

ROOT = Path(__file__).parent.parent
BLOCK = 16
STAGES = ["linear 0 to 4e-3 over 2 steps", "cosine 4e-3 to 1e-3 until 512", "linear 1e-3 to 0 until 768"]
# Steps of 4, 4 and then 8 sequences of 16 tokens: 64, 128, 256, 384, ...
RAMP = ["4", "8 from 100"]
RATES = [0, 2e-3, 4e-3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts, a model and a tokenizer in folders, and a cache that goes with them."""
    root, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for split, count in (("train", 40), ("test", 4)):
        (root / "text").mkdir(exist_ok=True)
        lines = ["".join(rng.choices("abcdefgh ", k=rng.randrange(5, 60))) for _ in range(count)]
        (root / "text" / f"{split}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tiny.qwen2().save_pretrained(root / "model")
    tiny_moonlight.model().save_pretrained(root / "moe")
    tiny.tokenizer().save_pretrained(root / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        yield root


def prepare(corpus, out, *options, model="model", **changes):
    """The script's own trainer, on a schedule of 7 steps unless told otherwise."""
    start = () if "continue_from" in changes else ("--model_name_or_path", str(corpus / model))
    settings = dict(
        dataset_name=corpus / "text",
        block_size=BLOCK,
        per_device_train_batch_size=2,
        learning_rate=4e-3,
        weight_decay=0.1,
        max_test_blocks=4,
        optim="muon",
        **{"use_cpu": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True},
    )
    pairs = [(f"--{key}", str(value)) for key, value in {**settings, **changes}.items()]
    schedule = ["--lr_stages", *STAGES, "--batch_ramp", *RAMP]
    arguments, tokens, args = make_parser().parse_args_and_config(
        ["--output_dir", str(out), *start, *schedule, *(part for pair in pairs for part in pair), *options]
    )
    return make_trainer(arguments, tokens, args, build_model(arguments, 0), tiny.tokenizer())


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in b)


def logged(trainer, key):
    return [row[key] for row in trainer.state.log_history if "loss" in row]


def watch(trainer):
    """Sequences of every optimizer step, as the model gets them."""
    seen, forward = [], trainer.model.forward

    def watched(*args, input_ids=None, **kwargs):
        if trainer.model.training:
            seen.append((trainer.state.global_step, input_ids.tolist()))
        return forward(*args, input_ids=input_ids, **kwargs)

    trainer.model.forward = watched
    return seen


def test_rates_and_batches_follow_the_schedule_step_by_step(corpus, tmp_path):
    trainer = prepare(corpus, tmp_path)
    seen = watch(trainer)
    trainer.train()
    run = trainer.run
    assert trainer.args.max_steps == run.steps == len(logged(trainer, "loss")) == 7
    assert logged(trainer, "learning_rate") == pytest.approx([run.rate(step) for step in range(7)], rel=1e-9)
    assert logged(trainer, "learning_rate")[:3] == pytest.approx(RATES)
    assert logged(trainer, "muon/lr") == logged(trainer, "learning_rate")
    sizes = [sum(len(rows) for step, rows in seen if step == wanted) for wanted in range(7)]
    assert sizes == [4, 4, 8, 8, 8, 8, 8]
    assert {len(rows) for _, rows in seen} == {2}, "forward passes of per_device_train_batch_size"


def test_the_highest_rate_of_the_stages_stands_for_learning_rate(corpus, tmp_path):
    trainer = prepare(corpus, tmp_path, learning_rate=1e-3, max_steps=4)
    trainer.train()
    expected = [trainer.run.rate(step) / 4 for step in range(4)]
    assert logged(trainer, "learning_rate") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("counts_tokens", [False, True])
def test_parts_of_a_batch_train_like_the_whole_of_it(corpus, tmp_path, counts_tokens):
    options = dict(dataset_streaming=counts_tokens, optim="sgd", max_grad_norm=1.0)
    parts, whole = (prepare(corpus, tmp_path, per_device_train_batch_size=n, **options) for n in (3, 8))
    for trainer in (parts, whole):
        trainer.model_accepts_loss_kwargs = counts_tokens  # whether the model takes the batch's count of tokens
        trainer.train()
    start = dict(tiny.qwen2().named_parameters())
    for name, weight in weights(whole).items():
        moved = (weight - start[name]).abs().max()
        # Only the order of summation differs. SGD, because Adam's first steps blow rounding up.
        assert (weights(parts)[name] - weight).abs().max() < 1e-3 * moved + 1e-8, name
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(dataset_streaming=True),
        dict(model="moe", expert_bias_rate=1e-3),
        dict(model="moe", optim="adamw_torch"),
    ],
)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(corpus, tmp_path, options):
    options = dict(options, save_strategy="steps", save_steps=3)
    whole = prepare(corpus, tmp_path / "whole", **options)
    whole.train()
    resumed = prepare(corpus, tmp_path / "whole", **options)
    batches = watch(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert batches[0][0] == 3
    assert same(weights(resumed), weights(whole))
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_a_resumed_stream_begins_where_it_was_left(corpus, tmp_path, caplog, monkeypatch):
    options = dict(dataset_streaming=True, save_strategy="steps", save_steps=3, max_steps=3)
    prepare(corpus, tmp_path, **options).train()
    saved = json.loads((tmp_path / "checkpoint-3" / "data_state.json").read_text())
    assert saved["read"] == 4 + 4 + 8
    trainer = prepare(corpus, tmp_path, **{**options, "max_steps": 4})
    monkeypatch.setattr(type(trainer.batches.source.dataset), "__iter__", counting := Counting())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert counting.rows == 8, "the blocks of step 3 alone"


class Counting:
    """Counts what a stream yields."""

    def __init__(self):
        self.rows, self.original = 0, datasets.IterableDataset.__iter__

    def __get__(self, stream, owner):
        def iterate():
            for row in self.original(stream):
                self.rows += 1
                yield row

        return iterate


@pytest.mark.parametrize("optim", ["muon", "adamw_torch"])
def test_cut_in_with_carried_state_is_bit_equal_to_one_run(corpus, tmp_path, optim):
    options = dict(optim=optim, save_strategy="steps", save_steps=3, decay_everything=True)
    whole = prepare(corpus, tmp_path / "whole", **options)
    whole.train()
    # The first 3 steps took 4 + 4 + 8 sequences.
    options |= dict(continue_from=tmp_path / "whole" / "checkpoint-3", start_step=3, skip_tokens=16 * BLOCK)
    carried = prepare(corpus, tmp_path / "carried", **options)
    carried.train()
    assert carried.state.global_step == 4
    assert same(weights(carried), weights(whole))
    assert logged(carried, "loss") == logged(whole, "loss")[3:]
    assert logged(carried, "learning_rate") == logged(whole, "learning_rate")[3:]
    fresh = prepare(corpus, tmp_path / "fresh", carry_optimizer=False, **options)
    fresh.train()
    assert logged(fresh, "loss")[0] == logged(whole, "loss")[3], "the same weights and data"
    assert not same(weights(fresh), weights(whole))


def test_carried_muon_state_keeps_this_runs_options(corpus, tmp_path):
    prepare(corpus, tmp_path / "first", max_steps=2, save_strategy="steps", save_steps=2).train()
    options = dict(continue_from=tmp_path / "first" / "checkpoint-2", optim_args="momentum=0.9,muon_lr=1e-3")
    trainer = prepare(
        corpus, tmp_path / "next", weight_decay=0.05, max_steps=1, rewarm_steps=4, start_step=2, **options
    )
    trainer.train()
    group = find_muon(trainer.optimizer).param_groups[0]
    assert [group[key] for key in ("momentum", "weight_decay", "initial_lr")] == [0.9, 0.05, 1e-3]
    assert logged(trainer, "learning_rate") == [0.0], "re-warming begins at 0"


def test_a_resumed_continuation_takes_its_own_state_not_the_carried_one(corpus, tmp_path):
    prepare(corpus, tmp_path / "first", max_steps=3, save_strategy="steps", save_steps=3).train()
    options = dict(continue_from=tmp_path / "first" / "checkpoint-3", start_step=3, save_strategy="steps", save_steps=2)
    whole = prepare(corpus, tmp_path / "next", **options)
    whole.train()
    resumed = prepare(corpus, tmp_path / "next", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "next" / "checkpoint-2"))
    assert same(weights(resumed), weights(whole))


def test_expert_biases_move_until_the_stage_that_leaves_them(corpus, tmp_path):
    options = dict(model="moe", expert_bias_rate=1e-2, save_strategy="steps", save_steps=1)
    trainer = prepare(corpus, tmp_path, expert_bias_until=512, **options)
    trainer.train()
    biases = [_biases(tmp_path / f"checkpoint-{step}", trainer.model) for step in range(1, 8)]
    moved = [not torch.equal(a, b) for a, b in pairwise(biases)]
    # Steps begin at 0, 64, 128, 256, 384, 512, 640 tokens.
    assert biases[0].abs().max() > 5e-3
    assert moved == [True, True, True, True, False, False]
    assert len(logged(trainer, "moe/max_violation")) == 7


def _biases(folder, model):
    loaded = type(model).from_pretrained(folder)
    return torch.cat([tensor for name, tensor in loaded.named_buffers() if name.endswith(BIAS)])


def test_decay_of_everything_reaches_norms_under_adamw(corpus, tmp_path):
    trainer = prepare(corpus, tmp_path, optim="adamw_torch", decay_everything=True)
    groups = trainer.create_optimizer().param_groups
    assert sum(len(g["params"]) for g in groups if g["weight_decay"] == 0.1) == len(list(trainer.model.parameters()))
    excepted = prepare(corpus, tmp_path, optim="adamw_torch").create_optimizer().param_groups
    assert any(g["params"] for g in excepted if g["weight_decay"] == 0)


def test_the_card_names_the_stages_and_where_they_were_entered(corpus, tmp_path):
    prepare(corpus, tmp_path, start_step=2, rewarm_steps=4).create_model_card()
    card = (tmp_path / "README.md").read_text()
    rows = {"lr_stages": "; ".join(STAGES), "batch_ramp": "; ".join(RAMP), "start_step": 2, "rewarm_steps": 4}
    assert all(f"| {key} | {value} |\n" in card for key, value in rows.items())
    assert "| schedule |" not in card


def numbered(count):
    rows = [{"input_ids": [i] * 2} for i in range(count)]
    return datasets.Dataset.from_list(rows).with_format("torch")


def test_ranks_together_read_what_one_rank_reads():
    ramp = BatchRamp.parse(["4", "8 from 12"], sequence_length=2)
    run = Run(schedule=Schedule(stages=(Stage.parse("constant 1 until 400"),), ramp=ramp))

    def first(ranks, rank, step=0):
        stream = StepBatches(Shuffled(numbered(10), 3), run, collate, rank, ranks, skip=1)
        stream.first_step = step
        iterator = iter(stream)
        return [next(iterator)["input_ids"][:, 0].tolist() for _ in range(4)]

    one = first(1, 0)
    assert [len(batch) for batch in one] == [4, 4, 8, 8]
    assert [a + b for a, b in zip(first(2, 0), first(2, 1), strict=True)] == one
    assert first(1, 0, step=2)[:2] == one[2:]
    # Row 0 of the first pass is skipped, the others come once; the second pass has all of them in another order.
    flat = [row for batch in one for row in batch]
    assert len(set(flat[:9])) == 9 and sorted(flat[9:19]) == list(range(10))
    assert flat[9:18] != flat[:9]


def test_a_stream_at_its_end_begins_anew_and_can_be_resumed_there():
    whole = Streamed(numbered(5).to_iterable_dataset()).rows(0)
    expected = [next(whole)["input_ids"][0].item() for _ in range(14)]
    assert expected == [0, 1, 2, 3, 4] * 2 + [0, 1, 2, 3]
    left = Streamed(numbered(5).to_iterable_dataset())
    rows = left.rows(0)
    for _ in range(7):
        next(rows)
    state = json.loads(json.dumps(left.state()))
    for restored in (state, None):
        source = Streamed(numbered(5).to_iterable_dataset())
        if restored:
            source.restore(restored)
        rows = source.rows(7)
        assert [next(rows)["input_ids"][0].item() for _ in range(7)] == expected[7:]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "kind"), [("ddp", "MULTI_CPU"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED"), ("fsdp2", "FSDP")]
)
def test_two_ranks_equal_one_process(corpus, tmp_path, engine, kind):
    # With a carried state, experts to balance, and steps of several forward passes.
    first = dict(model="moe", optim_args="ns_dtype=float32", per_device_train_batch_size=1)
    prepare(corpus, tmp_path / "first", save_strategy="steps", save_steps=2, max_steps=2, **first).train()
    options = dict(first, continue_from=str(tmp_path / "first" / "checkpoint-2"), start_step=2, expert_bias_rate=1e-3)
    one = prepare(corpus, tmp_path / "one", **options)
    one.train()
    (tmp_path / "options.json").write_text(json.dumps(options))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--module"]
    command += ["tests.distributed.continuation_worker", str(corpus), str(tmp_path), engine]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}", "HF_DATASETS_CACHE": str(corpus / "cache")}
    environment = {**os.environ, **paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert f"| trained by Muon | {one.shares['trained by Muon']} |" in (tmp_path / "run" / "README.md").read_text()
    start = dict(one.model.from_pretrained(options["continue_from"]).named_parameters())
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["kind"] == kind
        for name, bias in found["buffers"].items():
            assert torch.equal(bias, one.model.get_buffer(name)), name
        for name, weight in weights(one).items():
            # Sums over ranks in another order, which Newton-Schulz amplifies.
            assert relative_error(found["weights"][name], weight, start[name].detach()) < 1e-3, name
        for key in ("moe/max_violation", "learning_rate"):
            assert [row[key] for row in found["logs"]] == logged(one, key)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(gradient_accumulation_steps=2), "leave gradient_accumulation_steps at 1"),
        (dict(lr_scheduler_type="cosine"), "lr_stages is the schedule"),
        (dict(warmup_steps=3), "lr_stages is the schedule"),
        (dict(max_steps=8), "ends after 7 steps"),
        (dict(start_step=7), "no step 7"),
        (dict(start_step=1, start_tokens=64), "give one of them"),
        (dict(dataloader_num_workers=1), "dataloader_num_workers: 0"),
        (dict(expert_bias_rate=1e-3), "no router"),
        (dict(dataset_streaming=True, max_test_blocks=0), "set max_test_blocks"),
    ],
)
def test_options_that_contradict_are_refused(corpus, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(corpus, tmp_path, **changes)


def test_options_of_a_schedule_in_tokens_are_refused_without_one():
    with pytest.raises(ValueError, match="give both or neither"):
        TokenArguments(lr_stages=STAGES)
    with pytest.raises(ValueError, match="rewarm_steps, dataset_streaming"):
        TokenArguments(rewarm_steps=3, dataset_streaming=True)


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path, monkeypatch):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setattr(TrainingArguments, "world_size", 3)
    with pytest.raises(ValueError, match="4 sequences cannot be shared by 3 ranks"):
        make_run(TokenArguments(lr_stages=STAGES, batch_ramp=RAMP), args, BLOCK)


def test_state_that_cannot_be_carried_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="no optimizer state.*carry_optimizer: false"):
        prepare(corpus, tmp_path, continue_from=corpus / "model")
    prepare(corpus, tmp_path / "first", max_steps=1, save_strategy="steps", save_steps=1).train()
    options = dict(continue_from=tmp_path / "first" / "checkpoint-1", max_steps=1)
    with pytest.raises(ValueError, match="that of hf_muon.Muon, and this run trains with AdamW"):
        prepare(corpus, tmp_path / "next", optim="adamw_torch", **options).train()


def test_a_subfolder_of_a_local_folder_is_loaded_by_name(corpus, tmp_path):
    (tmp_path / "Moonlight_hf_step_2000").symlink_to(corpus / "moe")
    options = dict(model_name_or_path=tmp_path, model_subfolder="Moonlight_hf_step_2000")
    trainer = prepare(corpus, tmp_path / "out", **options)
    assert same(weights(trainer), dict(tiny_moonlight.model().named_parameters()))
    with pytest.raises(ValueError, match="no model in a subfolder 'Moonlight_hf_step_9'"):
        prepare(corpus, tmp_path / "out", **{**options, "model_subfolder": "Moonlight_hf_step_9"})


def test_of_a_hub_repository_the_subfolder_alone_is_downloaded(tmp_path, monkeypatch):
    import lifecycle

    asked = []
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "config.json").write_text("{}")
    monkeypatch.setattr(lifecycle, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    assert lifecycle.model_source("some/model", "step", "v1") == str(tmp_path / "step")
    assert asked == [(("some/model",), {"revision": "v1", "allow_patterns": "step/*"})]
    assert lifecycle.model_source("some/model", None, "v1") == "some/model"
