"""Callbacks that measure a model in every so-many-th optimizer step, and cost nothing in the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback


class MeasuringCallback(TrainerCallback):
    """What a subclass measures in a step is in the next training log, once.

    Args:
        steps: measure every so many optimizer steps, counted from 1.

    Raises:
        ValueError: ``steps`` below 1; when training begins, under ``torch_compile``.
    """

    option = "steps"
    """What the scripts call it."""

    def __init__(self, steps: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"{self.option} must be a positive integer, got {steps!r}")
        self.steps = steps
        self._metrics: dict[str, float] = {}

    def find(self, model: nn.Module) -> None:
        """Before the first step: what there is to measure; raise if there is nothing."""
        raise NotImplementedError

    def begin(self) -> None:
        """Before the first micro-batch of a measured step."""
        raise NotImplementedError

    def end(self) -> None:
        """Watch no more; also after a step that was cut short."""
        raise NotImplementedError

    def summary(self, device: torch.device) -> dict[str, float]:
        """What was measured, over all ranks."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing has been trained yet."""
        refuse_compiled(args, self.option)
        self.find(kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """``global_step`` counts the steps that are over."""
        if (state.global_step + 1) % self.steps == 0:
            self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Behind the last micro-batch."""
        if state.global_step % self.steps == 0:
            self.end()
            self._metrics = self.summary(args.device)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave everything as it was."""
        self.end()

    def metrics(self) -> dict[str, float]:
        """What the next training log gains, once."""
        out, self._metrics = self._metrics, {}
        return out


def in_training_forward(module: nn.Module) -> bool:
    """Whether this is a forward pass in training mode, and not checkpointing's second one inside a backward pass."""
    return module.training and torch._C._current_graph_task_id() == -1


def refuse_compiled(args: Any, what: str) -> None:
    """A compiled model is traced once, before or after anybody watches.

    Raises:
        ValueError: ``torch_compile`` is set.
    """
    if getattr(args, "torch_compile", False):
        raise ValueError(f"torch_compile hides from {what} what a model computes. Remedy: leave one of them out")
