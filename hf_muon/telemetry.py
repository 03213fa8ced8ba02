"""What a run shows of its optimizer: update and weight RMS per kind, learning rates, skipped steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("hf_muon")


class Telemetry:
    """Collects device-side sums during a step; numbers leave the device only when :meth:`metrics` is called."""

    def __init__(self) -> None:
        self.skipped_steps = 0
        """Steps that changed nothing because a gradient was not finite."""
        self.skipped_matrices = 0
        """Matrices whose gradient was not finite when the optimizer saw it, summed over those steps. Clipping by the
        global norm spreads one NaN to every gradient before that."""
        self._squares: dict[str, list[Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._rates: dict[str, float] = {}

    def start_step(self, param_groups: Iterable[dict[str, Any]]) -> None:
        """Forget the last step's updates, and note this step's learning rates.

        They are noted here because a scheduler has moved on by the time a Trainer logs.
        """
        self._squares.clear()
        self._counts.clear()
        self._rates.clear()
        for group in param_groups:
            key = "muon/lr" if group["algorithm"] == "muon" else "muon/adamw_lr"
            self._rates.setdefault(key, group["lr"])

    def record_skip(self, reason: str, matrices: int = 0) -> None:
        """Count a step that changed nothing; warn at the first, second, fourth, eighth, ... of them."""
        self._squares.clear()
        self._counts.clear()
        self.skipped_steps += 1
        self.skipped_matrices += matrices
        if self.skipped_steps & (self.skipped_steps - 1) == 0:
            logger.warning("step skipped, nothing changed: %s (%d skipped so far)", reason, self.skipped_steps)

    def record_update(self, kind: str, update: Tensor) -> None:
        """Add one scaled update (before the learning rate) to its kind."""
        self._squares.setdefault(kind, []).append(_norm(update).square())
        self._counts[kind] = self._counts.get(kind, 0) + update.numel()

    def metrics(self, param_groups: Iterable[dict[str, Any]]) -> dict[str, float]:
        """``muon/...`` log entries for the last step; kinds are those of the routing report.

        ``muon/update_rms[/kind]`` is the RMS of what multiplies the learning rate (target 0.2), absent if the step was
        skipped; ``muon/weight_rms[/kind]`` is that of the parameters as they are now, AdamW's included.
        """
        out = _rms_by_kind("muon/update_rms", _sums(self._squares), self._counts)
        out.update(_rms_by_kind("muon/weight_rms", *_weights(param_groups)))
        out.update(self._rates)
        out["muon/skipped_steps"] = self.skipped_steps
        out["muon/skipped_matrices"] = self.skipped_matrices
        return out


def _weights(groups: Iterable[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
    squares: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}
    for group in groups:
        kinds = group.get("kinds") or [group["algorithm"]] * len(group["params"])
        for kind, p in zip(kinds, group["params"], strict=True):
            squares.setdefault(kind, []).append(_norm(p.detach()).square())
            counts[kind] = counts.get(kind, 0) + p.numel()
    return _sums(squares), counts


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)).float()


def _sums(values: dict[str, list[Tensor]]) -> dict[str, float]:
    """Sums of scalars per key, with one transfer from each device rather than one per scalar."""
    out = dict.fromkeys(values, 0.0)
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for key, scalars in values.items():
        for scalar in scalars:
            by_device.setdefault(scalar.device, []).append((key, scalar))
    for pairs in by_device.values():
        for (key, _), number in zip(pairs, torch.stack([scalar for _, scalar in pairs]).tolist(), strict=True):
            out[key] += number
    return out


def _rms_by_kind(prefix: str, squares: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    if not total:
        return {}
    out = {prefix: math.sqrt(sum(squares.values()) / total)}
    out.update({f"{prefix}/{kind}": math.sqrt(squares[kind] / counts[kind]) for kind in sorted(counts) if counts[kind]})
    return out
