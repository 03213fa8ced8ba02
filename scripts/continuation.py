"""Training counted in tokens for ``pretrain.py``: schedule in stages, batch ramp, and data that knows where it stands.

A run is a :class:`hf_muon.moonlight.schedules.Run`: which step it begins with, and what each step's learning rate and
batch are. Data follow from the step alone, for any number of ranks, so a resumed run reads on where it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from cards import OptimizerCard
from datasets.utils import tqdm
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_muon.moonlight.schedules import BatchRamp, Run, Schedule, Stage, parse_tokens

logger = logging.getLogger("hf_muon")

DATA_STATE = "data_state.json"


@dataclass
class TokenArguments:
    """A schedule counted in tokens instead of the Trainer's. Numbers of tokens are written 4096, 200B or 5.2T."""

    lr_stages: list[str] | None = field(
        default=None,
        metadata={
            "help": "Stages: 'linear 0 to 4.2e-4 over 2000 steps', 'cosine 4.2e-4 to 4.2e-5 until 5.2T', 'constant "
            "1e-4 over 3B tokens'. The highest rate stands for learning_rate, the others in proportion."
        },
    )
    batch_ramp: list[str] | None = field(
        default=None, metadata={"help": "Sequences per optimizer step over all ranks: '2048', '4096 from 200B'."}
    )
    start_tokens: str | None = field(default=None, metadata={"help": "Enter the schedule after so many tokens."})
    start_step: int | None = field(default=None, metadata={"help": "Enter the schedule at this step of it."})
    rewarm_steps: int = field(default=0, metadata={"help": "Rise from 0 to the schedule's rate in so many steps."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read, tokenize and pack while training."})
    skip_tokens: str = field(default="0", metadata={"help": "Leave out so many tokens of the data first."})
    decay_everything: bool = field(
        default=False,
        metadata={
            "help": "Weight decay on norms and biases under AdamW too (Muon's default; the Trainer excepts them)."
        },
    )
    expert_bias_rate: float | None = field(
        default=None, metadata={"help": "Balance experts by their biases with this u (Moonlight: 1e-3)."}
    )
    expert_bias_until: str | None = field(default=None, metadata={"help": "u is 0 from so many tokens on."})

    def described(self) -> dict[str, str]:
        """The schedule for a model card."""
        parts = {"lr_stages": "; ".join(self.lr_stages or ()), "batch_ramp": "; ".join(self.batch_ramp or ())}
        entered = {"start_tokens": self.start_tokens, "start_step": self.start_step, "rewarm_steps": self.rewarm_steps}
        return parts | {key: str(value) for key, value in entered.items() if value}

    def __post_init__(self) -> None:
        if bool(self.lr_stages) != bool(self.batch_ramp):
            raise ValueError("lr_stages and batch_ramp are one schedule: give both or neither")
        if not self.lr_stages:
            needed = [
                name
                for name, default in (
                    *(("start_tokens", None), ("start_step", None), ("rewarm_steps", 0), ("skip_tokens", "0")),
                    *(("dataset_streaming", False), ("decay_everything", False), ("expert_bias_until", None)),
                )
                if getattr(self, name) != default
            ]
            if needed:
                raise ValueError(f"{', '.join(needed)}: of a schedule in tokens; give lr_stages and batch_ramp")
        if self.start_tokens is not None and self.start_step is not None:
            raise ValueError("start_tokens and start_step say the same: give one of them")
        if self.expert_bias_until is not None and self.expert_bias_rate is None:
            raise ValueError("expert_bias_until ends a balancing that expert_bias_rate begins: give both")


def make_run(tokens: TokenArguments, args: TrainingArguments, block_size: int) -> Run:
    """The run that the options describe; fills in ``args.max_steps`` where it is not given.

    Raises:
        ValueError: options that contradict each other, or a batch that the ranks cannot share.
    """
    ramp = BatchRamp.parse(tokens.batch_ramp or (), block_size)
    schedule = Schedule(stages=tuple(Stage.parse(text) for text in tokens.lr_stages or ()), ramp=ramp)
    start = tokens.start_step or 0
    if tokens.start_tokens is not None:
        start = ramp.steps_until(parse_tokens(tokens.start_tokens))
    run = Run(schedule=schedule, start_step=start, rewarm_steps=tokens.rewarm_steps)
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            "batch_ramp says how many sequences a step takes, and per_device_train_batch_size how many a forward pass: "
            f"leave gradient_accumulation_steps at 1, got {args.gradient_accumulation_steps}"
        )
    if args.warmup_steps or args.lr_scheduler_type != "linear" or args.lr_scheduler_kwargs:
        raise ValueError("lr_stages is the schedule: leave lr_scheduler_type, its kwargs and warmup_steps out")
    odd = [count for _, count in ramp.entries if count % args.world_size]
    if odd:
        raise ValueError(f"batch_ramp: {odd[0]} sequences cannot be shared by {args.world_size} ranks")
    if args.dataloader_num_workers:
        raise ValueError("data of a schedule in tokens are read in the training process: dataloader_num_workers: 0")
    args.max_steps = run.steps if args.max_steps <= 0 else args.max_steps
    if args.max_steps > run.steps:
        raise ValueError(f"max_steps={args.max_steps:,}, and the schedule ends after {run.steps:,} steps of this run")
    return run


class Shuffled:
    """The rows of a dataset with a length, each pass in an order of its own."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def rows(self, start: int) -> Iterator[dict[str, torch.Tensor]]:
        """Without end, from row ``start`` of the first pass on."""
        number, offset = divmod(start, len(self.dataset))
        while True:
            generator = torch.Generator().manual_seed(self.seed + number)
            for index in torch.randperm(len(self.dataset), generator=generator).tolist()[offset:]:
                yield self.dataset[index]
            number, offset = number + 1, 0

    def state(self) -> dict[str, Any]:
        """Nothing: the order follows from the seed."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class Streamed:
    """The rows of a stream in stored order; its place is saved, so that a resumed run need not read it all again."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.read = 0  # rows since the first pass began
        self.passes = 0
        self._restored: dict[str, Any] = {}

    def rows(self, start: int) -> Iterator[dict[str, torch.Tensor]]:
        """Without end, from row ``start`` of the first pass on."""
        self.read, self.passes = 0, 0
        if self._restored and self._restored["read"] <= start:
            self.read, self.passes = self._restored["read"], self._restored["passes"]
        elif start:
            logger.warning("reading over %d sequences of the stream; nothing is trained meanwhile", start)
        self.dataset.set_epoch(self.passes)
        bar = tqdm(total=start, initial=self.read, desc="reading over", unit=" blocks", disable=self.read >= start)
        if self.read:
            self.dataset.load_state_dict(self._restored["stream"])
        while True:
            before = self.read
            for row in self.dataset:
                self.read += 1
                if self.read > start:
                    bar.close()
                    yield row
                bar.update()
            if self.read == before:
                raise ValueError("the stream has no block of block_size tokens: give more text or smaller blocks")
            self.passes += 1
            self.dataset.set_epoch(self.passes)
            logger.warning("the stream is read to its end; pass %d begins", self.passes + 1)

    def state(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"read": self.read, "passes": self.passes, "stream": self.dataset.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Begin there."""
        self._restored = state


class StepBatches(IterableDataset):
    """One item per optimizer step: this rank's share of its sequences."""

    def __init__(self, source: Any, run: Run, collate: Callable[..., Any], rank: int, ranks: int, skip: int) -> None:
        self.source, self.run, self.collate = source, run, collate
        self.rank, self.ranks, self.skip = rank, ranks, skip
        self.first_step = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        step = self.first_step
        rows = self.source.rows(self.skip + self.run.sequences_before(step))
        while True:
            share = self.run.batch(step) // self.ranks
            here = list(islice(rows, share * self.ranks))
            yield self.collate(here[self.rank * share : (self.rank + 1) * share])
            step += 1


class _SaveDataState(TrainerCallback):
    def __init__(self, source: Any) -> None:
        self.source = source

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            (folder / DATA_STATE).write_text(json.dumps(self.source.state()))


class TokenTrainer(OptimizerCard, Trainer):
    """The Trainer on a schedule in tokens: learning rate, batch and data follow from the step."""

    def __init__(self, *, run: Run, source: Any, skip: int, decay_everything: bool, **kwargs: Any) -> None:
        self.run, self.decay_everything = run, decay_everything
        super().__init__(**kwargs)
        # The data are placed by step: the Trainer's own skipping counts batches of one size.
        self.args.ignore_data_skip = True
        rank, ranks = self.args.process_index, self.args.world_size
        self.batches = StepBatches(source, run, self.data_collator, rank, ranks, skip)
        self.add_callback(_SaveDataState(source))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """As the Trainer; a stream goes on where the checkpoint's run left it."""
        state = Path(resume_from_checkpoint or "") / DATA_STATE
        if resume_from_checkpoint and state.is_file():
            self.batches.source.restore(json.loads(state.read_text()))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Batches of this rank, from the step that the run stands at when it begins to read."""
        trainer = self

        class FromHere(DataLoader):
            def __iter__(self) -> Any:
                self.dataset.first_step = trainer.state.global_step
                return super().__iter__()

        return FromHere(self.batches, batch_size=None)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """All of them, if asked for: the paper decays everything."""
        if self.decay_everything:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The run's rates, in proportion to the highest of the schedule."""
        if self.lr_scheduler is None:
            peak = self.run.schedule.peak
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: self.run.rate(step) / peak)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A whole optimizer step's sequences in forward passes of ``per_device_train_batch_size``.

        The Trainer accumulates a fixed number of batches, and a ramp changes it: for the Trainer a step is one batch.
        """
        columns = [tensor.split(self.args.train_batch_size) for tensor in inputs.values()]
        parts = [dict(zip(inputs, rows, strict=True)) for rows in zip(*columns, strict=True)]
        rows = len(inputs["input_ids"])
        total = torch.zeros((), device=self.args.device)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            # What the loss of a model that takes no token count is divided by: its part of the rows.
            self.current_gradient_accumulation_steps = rows / len(part["input_ids"])
            self.accelerator.gradient_state._set_sync_gradients(last)
            # DeepSpeed is told by the flag alone, as in the Trainer's own loop.
            waits = not last and not self.is_deepspeed_enabled
            with self.accelerator.no_sync(model=model) if waits else contextlib.nullcontext():
                total += super().training_step(model, part, num_items_in_batch)
        return total
