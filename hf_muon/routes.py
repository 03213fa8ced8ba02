"""The record of one routing decision."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from .matrices import MatrixLayout


@dataclass(frozen=True)
class Route:
    """Where one parameter goes, and why."""

    name: str
    parameter: nn.Parameter = field(repr=False)
    algorithm: str
    """``muon`` or ``adamw``."""
    kind: str
    """What it is, for reports and logs: attention, mlp, experts, router, ... or embedding, head, norm, bias, ..."""
    reason: str
    layout: MatrixLayout | None
    """The matrices in it; ``None`` under AdamW."""
    tied: tuple[str, ...] = ()
    """Other names of the same parameter."""
