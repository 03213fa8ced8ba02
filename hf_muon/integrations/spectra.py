"""Spectra during training: what ``scripts/spectra.py`` finds in checkpoints, cheaply, for some matrices."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..analysis.spectra import estimate
from ..config import MuonConfig
from ..layouts import shape_of
from ..logical import LogicalMatrix, logical_matrices
from ..routing import route

_NUMBERS = ("entropy", "stable_rank", "spectral_norm")


class SpectraCallback(TrainerCallback):
    """Logs spectra every ``steps`` steps: ``Trainer(model, ..., callbacks=[SpectraCallback(model, 100)])``.

    Training logs gain ``spectra/entropy/GROUP``, ``spectra/stable_rank/GROUP`` and ``spectra/spectral_norm/GROUP``,
    means over the same few matrices each time, and ``spectra/step``, the step that they are of: the last measured
    before the log. Groups are those of figure 4 of the paper (:data:`hf_muon.analysis.groups.GROUPS`); the numbers and
    their errors are those of :func:`hf_muon.analysis.spectra.estimate`, of the weights as the model computes with them.
    With any optimizer, on one process, DDP, ZeRO and FSDP2: a sharded parameter is gathered for as long as it is
    measured, a stack of experts as a whole.

    Args:
        model: the model that the Trainer is given; of it, the trainable matrices.
        steps: measure after so many optimizer steps, again and again.
        per_group: matrices of each group.
        config: routing options, where the model needs some.
        seed: of the choice of matrices.

    Raises:
        ValueError: ``steps`` or ``per_group`` below 1; a model that cannot be routed.
        RuntimeError: at the start of training: an engine that keeps parameters in another way (FSDP1).
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int = 100,
        *,
        per_group: int = 4,
        config: MuonConfig | None = None,
        seed: int = 0,
    ) -> None:
        if steps < 1 or per_group < 1:
            raise ValueError(f"steps and per_group must be at least 1, got {steps} and {per_group}")
        self.steps = steps
        self.matrices = _sample(model, per_group, config, seed)
        # The modules and not their parameters, which engines replace.
        self._owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in self.matrices}
        self._shapes = {name: shape_of(model.get_parameter(name)) for name in self.matrices}
        self._pending: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse an engine whose parameters cannot be found again."""
        for name in self.matrices:
            self._parameter(name)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once per optimizer step, on every rank: gathering needs them all."""
        if state.global_step % self.steps == 0:
            self._pending = {**self.measure(), "spectra/step": float(state.global_step)}

    def metrics(self) -> dict[str, float]:
        """What the Trainer's log gains: each measurement once."""
        found, self._pending = self._pending, {}
        return found

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The log entries for the weights as they are now; the same on every rank."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for name, matrices in self.matrices.items():
            with _whole(self._parameter(name)) as parameter:
                for matrix in matrices:
                    numbers = estimate(matrix.of(parameter))
                    for key in _NUMBERS:
                        found[f"spectra/{key}/{matrix.group}"].append(getattr(numbers, key).double().cpu())
        return {key: float(torch.stack(found[key]).mean()) for key in sorted(found)}

    def _parameter(self, name: str) -> Any:
        parameter = getattr(self._owners[name], name.rpartition(".")[2], None)
        if parameter is None or shape_of(parameter) != self._shapes[name]:
            raise RuntimeError(
                f"SpectraCallback: {name} {list(self._shapes[name])} is no parameter of that shape in training: "
                "spectra are measured on one process, DDP, DeepSpeed ZeRO and FSDP2; with another engine (FSDP1) drop "
                "the callback and use scripts/spectra.py on the checkpoints"
            )
        return parameter


def _sample(model: nn.Module, per_group: int, config: MuonConfig | None, seed: int) -> dict[str, list[LogicalMatrix]]:
    """``per_group`` matrices of each group, by parameter; the same on every rank."""
    groups: dict[str, list[LogicalMatrix]] = defaultdict(list)
    for matrix in logical_matrices(route(model, config), experts=1, seed=seed):
        groups[matrix.group].append(matrix)
    draw = random.Random(seed)
    chosen: dict[str, list[LogicalMatrix]] = defaultdict(list)
    for members in groups.values():
        for matrix in draw.sample(members, min(per_group, len(members))):
            chosen[matrix.parameter].append(matrix)
    return dict(chosen)


@contextmanager
def _whole(parameter: Any) -> Iterator[Tensor]:
    """The whole of a parameter, on every rank."""
    if isinstance(parameter, DTensor):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_tensor"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(parameter):
            yield parameter
    else:
        yield parameter
