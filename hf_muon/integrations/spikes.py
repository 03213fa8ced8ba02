"""Spikes of loss and gradient norm: in which step, in which layer, and on which batch."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ..exchange import collectives
from ..optimizer import Muon
from .trainer import find_muon

logger = logging.getLogger("hf_muon")

_SIGMA = 1.4826
"""The standard deviation of a normal distribution, by its median absolute deviation."""
_FLOOR = 0.01
"""Of the median: the least that counts as noise, where a value hardly changes at all."""
_ROWS, _CHARACTERS = 4, 60
_FORGET = 0.9
"""Of the running mean of a layer's squared gradient norm that its growth is measured by."""


class RobustWindow:
    """Judges numbers by the median of those before: high is ``median + sigmas * max(1.4826 MAD, 0.01 |median|)``.

    MAD is the median absolute deviation. Neither moves with a few spikes in the window; after half a window of higher
    values, these are what is usual.

    Args:
        length: of the window.
        sigmas: see above.
        least: numbers to have seen before any is judged.
    """

    def __init__(self, length: int, sigmas: float, least: int) -> None:
        self.values: deque[float] = deque(maxlen=length)
        self.sigmas, self.least = sigmas, least

    def passed(self, value: float) -> float | None:
        """The threshold, if ``value`` is above it or not finite; then take ``value`` in."""
        threshold = math.inf
        if len(self.values) >= self.least:
            middle = median(self.values)
            spread = median(abs(v - middle) for v in self.values)
            threshold = middle + self.sigmas * max(_SIGMA * spread, _FLOOR * abs(middle))
        if not math.isfinite(value):
            return threshold
        self.values.append(value)
        return threshold if value > threshold else None


@dataclass(frozen=True, kw_only=True)
class Spike:
    """One step in which the loss or the gradient norm jumped."""

    step: int
    """As in ``global_step`` behind it."""
    what: str
    """``loss`` or ``grad_norm`` (before clipping)."""
    value: float
    threshold: float
    """That the value passed; infinite if the value was not finite before enough had been seen."""
    largest: str
    """The parameter with the largest gradient norm in that step; empty without Muon."""
    grown: str
    """The one whose gradient norm had grown most over its running mean."""
    growth: float
    """How many times."""
    batches: tuple[str, ...]
    """Each rank's micro-batch with the largest loss, largest first: shape, :func:`batch_digest`, beginning of rows."""

    def __str__(self) -> str:
        layers = f"largest gradient: {self.largest}; grown most: {self.grown} ({self.growth:.3g} times)"
        where = layers if self.largest else "gradients by layer are seen with optim='muon' only"
        return (
            f"spike in step {self.step}: {self.what} {self.value:.4g} (threshold {self.threshold:.4g}); {where}; "
            f"batch: {self.batches[0] if self.batches else 'unknown'}"
        )


class SpikeCallback(TrainerCallback):
    """Warns when the loss or the gradient norm of a step jumps, and names step, layer and batch.

    What a jump is: :class:`RobustWindow`, over the steps before; not a number or an infinity always is. A warning is
    given for the first of several such steps in a row; all are in :attr:`spikes`, and training logs gain
    ``spike/steps``, their number so far. The loss is that of the whole step, over micro-batches and ranks; the gradient
    norm is the Trainer's, before clipping. Layers are named by gradients as they reach Muon, on every engine.

    It costs one pass over the gradients and one small all-reduce per step, and reads two numbers from the device.

    Args:
        window: steps to judge by.
        sigmas: robust standard deviations above the median; 8 is far out of the noise of a steady run, whose gradient
            norms have heavier tails than a normal distribution.
        least: steps before any is judged.

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(self, window: int = 64, sigmas: float = 8.0, least: int = 16) -> None:
        if not 2 <= least <= window or not sigmas > 0:
            raise ValueError(f"2 <= least <= window and sigmas > 0 are needed, got {least}, {window}, {sigmas}")
        self.spikes: list[Spike] = []
        self._windows = {what: RobustWindow(window, sigmas, least) for what in ("loss", "grad_norm")}
        self._batches: list[tuple[Tensor, Mapping[str, Any]]] = []
        self._squares: dict[str, Tensor] = {}
        self._usual: dict[str, Tensor] = {}
        self._group: Any = None
        self._hook: Any = None
        self._tokenizer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are read where the optimizer gets them, because engines keep them in different places."""
        self._tokenizer = kwargs.get("processing_class")
        muon = find_muon(kwargs.get("optimizer"))
        self._remove_hook()
        if muon is not None:
            # Behind the step, which only reads them: what it refuses, it refuses on all ranks alike.
            self._hook = muon.register_step_post_hook(self._take_gradients)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the optimizer and of the last batch."""
        self._remove_hook()
        self._batches, self._squares = [], {}

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    @torch.no_grad()
    def _take_gradients(self, muon: Muon, args: Any, kwargs: Any) -> None:
        """Squared norms by parameter name, of what this rank stores; an engine may step in several calls."""
        for group in muon.param_groups:
            if not group["params"]:
                continue
            unit = muon._unit(group)
            storage = unit.storage
            if storage.sharded:
                self._group = storage.group
            for name, grad in zip(unit.names, storage.flat([p.grad for p in storage.holders]), strict=True):
                if grad is not None:
                    norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
                    self._squares[name] = norm.float().square().to(storage.device)

    def add_batch(self, inputs: Mapping[str, Any], loss: Tensor) -> None:
        """One micro-batch and its share of the step's loss."""
        self._batches.append((loss.detach(), {k: v for k, v in inputs.items() if isinstance(v, Tensor)}))

    def judge(self, step: int, grad_norm: Tensor | float | None) -> None:
        """Once behind each optimizer step, on all ranks."""
        if not self._batches:
            return  # the Trainer comes by again at the end of an epoch
        batches, self._batches = self._batches, []
        squares, self._squares = self._squares, {}
        loss = torch.stack([loss.float() for loss, _ in batches]).sum()
        norm = grad_norm.item() if isinstance(grad_norm, Tensor) else grad_norm
        values = torch.stack([loss, torch.full_like(loss, math.nan if norm is None else norm)])
        if dist.is_initialized():
            values = collectives.total(values, dist.group.WORLD) / dist.get_world_size()
        now = dict(zip(("loss", "grad_norm"), values.tolist(), strict=True))
        if norm is None:
            del now["grad_norm"]
        before = {spike.what for spike in self.spikes if spike.step == step - 1}
        found = [
            (what, value, t) for what, value in now.items() if (t := self._windows[what].passed(value)) is not None
        ]
        if found:
            layers, batch = self._layers(squares), self._batch(batches)
            for what, value, threshold in found:
                spike = Spike(step=step, what=what, value=value, threshold=threshold, batches=batch, **layers)
                self.spikes.append(spike)
                if what not in before and int(os.environ.get("RANK", "0")) == 0:
                    logger.warning("%s", spike)
        for name, square in squares.items():
            usual = self._usual.get(name, square)
            if square.isfinite():
                self._usual[name] = usual * _FORGET + square * (1 - _FORGET)

    def _layers(self, squares: Mapping[str, Tensor]) -> dict[str, Any]:
        if not squares:
            return {"largest": "", "grown": "", "growth": math.nan}
        names = list(squares)
        table = torch.stack([torch.stack([squares[n], self._usual.get(n, squares[n])]) for n in names])
        if self._group is not None:
            table = collectives.total(table, self._group)
        now, usual = table.nan_to_num(nan=math.inf).sqrt().unbind(1)
        growth = now / usual.clamp(min=torch.finfo(torch.float32).tiny)
        most = int(growth.argmax())
        return {"largest": names[int(now.argmax())], "grown": names[most], "growth": float(growth[most])}

    def _batch(self, batches: list[tuple[Tensor, Mapping[str, Any]]]) -> tuple[str, ...]:
        losses = [float(loss.nan_to_num(nan=math.inf)) for loss, _ in batches]
        worst = max(range(len(losses)), key=losses.__getitem__)
        rank = int(os.environ.get("RANK", "0"))
        text = f"rank {rank}, micro-batch {worst + 1} of {len(batches)}, {self._describe(batches[worst][1])}"
        mine = (losses[worst], text)
        everybody = collectives.gather_objects(mine, dist.group.WORLD) if dist.is_initialized() else [mine]
        return tuple(text for _, text in sorted(everybody, key=lambda pair: -pair[0]))

    def _describe(self, inputs: Mapping[str, Tensor]) -> str:
        name = "input_ids" if "input_ids" in inputs else next(iter(sorted(inputs)), None)
        if name is None:
            return "no tensors"
        tensor = inputs[name]
        out = f"{name} {list(tensor.shape)}, digest {batch_digest(tensor)}"
        if name == "input_ids" and hasattr(self._tokenizer, "decode"):
            rows = [self._tokenizer.decode(row[:_CHARACTERS].tolist())[:_CHARACTERS] for row in tensor[:_ROWS]]
            out += "".join(f", {row!r}" for row in rows)
        return out

    def metrics(self) -> dict[str, float]:
        """What training logs gain."""
        return {"spike/steps": len({spike.step for spike in self.spikes})}


def batch_digest(tensor: Tensor) -> str:
    """16 hexadecimal digits of the values of a batch, by which to find it in the data again.

    BLAKE2s over the numbers in row-major order, integers as int64 and others as float32.
    """
    plain = tensor.detach().cpu()
    plain = plain.float() if plain.is_floating_point() else plain.long()
    return hashlib.blake2s(plain.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def _callbacks(trainer: Trainer) -> list[SpikeCallback]:
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, SpikeCallback)]


def with_watched_batches(original: Any) -> Any:
    """Wrap ``Trainer.training_step``, the one place that has a batch and its loss."""

    @functools.wraps(original)
    def training_step(self: Trainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = original(self, model, inputs, *args, **kwargs)
        for callback in _callbacks(self):
            callback.add_batch(inputs if isinstance(inputs, Mapping) else {}, loss)
        return loss

    return training_step


def with_judged_steps(original: Any) -> Any:
    """Wrap ``Trainer._maybe_log_save_evaluate``, which is given the gradient norm of each step."""

    @functools.wraps(original)
    def _maybe_log_save_evaluate(self: Trainer, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        for callback in _callbacks(self):
            callback.judge(self.state.global_step, grad_norm)
        original(self, tr_loss, grad_norm, *args, **kwargs)

    return _maybe_log_save_evaluate
