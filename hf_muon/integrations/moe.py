"""Expert balancing in the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..moonlight.balance import MOONLIGHT_RATE, ExpertBalancer


class ExpertBalanceCallback(TrainerCallback):
    """Moonlight's balancing of experts: ``Trainer(model, ..., callbacks=[ExpertBalanceCallback(model)])``.

    The training logs gain ``moe/...``: :meth:`hf_muon.moonlight.balance.ExpertBalancer.metrics`. The biases are part of
    the model and travel with its checkpoints.

    Args:
        model: the model that the Trainer is given.
        rate: u, or a function of the optimizer step (from 0) that gives it; 0 leaves the biases alone and still logs.

    Raises:
        ValueError: no router of ``model`` has a bias.
    """

    def __init__(self, model: nn.Module, rate: float | Callable[[int], float] = MOONLIGHT_RATE) -> None:
        self.balancer = ExpertBalancer(model)
        self.rate = rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once per optimizer step, behind the last micro-batch. ``global_step`` has counted the step already."""
        self.balancer.step(self.rate(state.global_step - 1) if callable(self.rate) else self.rate)

    def metrics(self) -> dict[str, float]:
        """What the Trainer's log gains."""
        return self.balancer.metrics()
