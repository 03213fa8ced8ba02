"""What a run shows of its optimizer: update and weight RMS per kind, learning rates, skipped steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from .update import blocks

logger = logging.getLogger("hf_muon")


class Record:
    """The numbers of one step of one unit: sums that stay on the device until they are asked for."""

    def __init__(self, kinds: Sequence[str], weights: Callable[[], Sequence[Tensor]], rate: tuple[str, float]) -> None:
        self.kinds = tuple(kinds)
        self.weights = weights  # asked for when needed: engines replace storage, and it must not be kept alive here
        self.rate = rate
        self._squares: dict[str, list[Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._shared: Tensor | None = None

    def update(self, kind: str, change: Tensor) -> None:
        """Add one scaled update, or a part of one (before the learning rate), to its kind."""
        if change.numel():
            self._squares.setdefault(kind, []).append(_norm(change).square())
            self._counts[kind] = self._counts.get(kind, 0) + change.numel()

    def forget_updates(self) -> None:
        """Of a step that another part of the program then skipped."""
        self._squares.clear()
        self._counts.clear()
        if self._shared is not None:
            self._shared[:, :2] = 0

    def share(self, total: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Sum over the ranks that hold the other parts, so that every rank shows the same numbers.

        Done in the step, which all ranks take, and not when somebody asks: a rank that logs alone would wait for ever.
        """
        squares, counts = self.weight_squares()
        table = [
            [_sum(self._squares.get(kind, ()), device), self._counts.get(kind, 0), squares.get(kind, 0.0), counts[kind]]
            for kind in sorted(set(self.kinds))
        ]
        flat = [torch.as_tensor(x, dtype=torch.float32, device=device) for row in table for x in row]
        self._shared = total(torch.stack(flat)).view(-1, 4)
        self._squares.clear()

    def weight_squares(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Sums of squares of this rank's weights as they are now, and how many there are."""
        squares: dict[str, Tensor] = {}
        counts = dict.fromkeys(self.kinds, 0)
        for kind, weight in zip(self.kinds, self.weights(), strict=True):
            if weight.numel():
                square = _norm(weight.detach()).square()
                squares[kind] = squares[kind] + square.to(squares[kind].device) if kind in squares else square
                counts[kind] += weight.numel()
        return squares, counts

    def rows(self) -> dict[str, tuple[float, float, float, float]]:
        """Per kind: sum of squares and count of the updates, and of the weights."""
        kinds = sorted(set(self.kinds))
        if self._shared is not None:
            return {kind: tuple(row) for kind, row in zip(kinds, self._shared.tolist(), strict=True)}
        squares, counts = self.weight_squares()
        device = self.weights()[0].device
        sums = [_sum(self._squares.get(kind, ()), device) for kind in kinds]
        sums += [_sum([squares[kind]] if kind in squares else (), device) for kind in kinds]
        numbers = torch.stack(sums).tolist()
        return {
            kind: (numbers[i], self._counts.get(kind, 0), numbers[len(kinds) + i], counts[kind])
            for i, kind in enumerate(kinds)
        }


class Telemetry:
    """Collects the records of the last step, one per unit; engines step one unit after the other."""

    def __init__(self) -> None:
        self.skipped_steps = 0
        """Steps that changed nothing because a gradient was not finite."""
        self.skipped_matrices = 0
        """Matrices whose gradient was not finite where this rank stores it, summed over those steps. Clipping by the
        global norm spreads one NaN to every gradient before that."""
        self.orthogonalized = 0
        """Matrices that this rank has orthogonalized in all steps."""
        self._records: dict[Hashable, Record] = {}

    def start(self, key: Hashable, record: Record) -> Record:
        """Replace the record of a unit by that of the step that begins.

        Learning rates are noted here because a scheduler has moved on by the time a Trainer logs.
        """
        self._records[key] = record
        return record

    def record(self, key: Hashable) -> Record:
        """The record of the step that a unit is in."""
        return self._records[key]

    def record_skip(self, reason: str, matrices: int = 0) -> None:
        """Count a step that changed nothing; warn at the first, second, fourth, eighth, ... of them."""
        for record in self._records.values():
            record.forget_updates()
        self.skipped_steps += 1
        self.skipped_matrices += matrices
        if self.skipped_steps & (self.skipped_steps - 1) == 0:
            logger.warning("step skipped, nothing changed: %s (%d skipped so far)", reason, self.skipped_steps)

    def metrics(self) -> dict[str, float]:
        """``muon/...`` log entries for the last step; kinds are those of the routing report.

        ``muon/update_rms[/kind]`` is the RMS of what multiplies the learning rate (target 0.2), absent if the step was
        skipped; ``muon/weight_rms[/kind]`` is that of the parameters, AdamW's included. Both are the same on every rank
        and engine; nothing is communicated here.
        """
        updates: dict[str, tuple[float, float]] = {}
        weights: dict[str, tuple[float, float]] = {}
        out: dict[str, float] = {}
        for record in self._records.values():
            for kind, (square, count, weight_square, weight_count) in record.rows().items():
                updates[kind] = _plus(updates.get(kind), square, count)
                weights[kind] = _plus(weights.get(kind), weight_square, weight_count)
            out.setdefault(*record.rate)
        rates = dict(out)
        out = _rms_by_kind("muon/update_rms", updates) | _rms_by_kind("muon/weight_rms", weights) | rates
        out["muon/skipped_steps"] = self.skipped_steps
        out["muon/skipped_matrices"] = self.skipped_matrices
        return out


def _plus(pair: tuple[float, float] | None, square: float, count: float) -> tuple[float, float]:
    return (square, count) if pair is None else (pair[0] + square, pair[1] + count)


def _norm(tensor: Tensor) -> Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(part, dtype=wide) for (part,) in blocks(tensor)]
    return (norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))).float()


def _sum(scalars: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.stack([s.to(device) for s in scalars]).sum() if scalars else torch.zeros((), device=device)


def _rms_by_kind(prefix: str, sums: dict[str, tuple[float, float]]) -> dict[str, float]:
    total = sum(count for _, count in sums.values())
    if not total:
        return {}
    out = {prefix: math.sqrt(sum(square for square, _ in sums.values()) / total)}
    out.update({f"{prefix}/{kind}": math.sqrt(sums[kind][0] / sums[kind][1]) for kind in sorted(sums) if sums[kind][1]})
    return out
