"""The optimizer's state, made where it is missing: one momentum for a matrix, AdamW's two moments for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .units import Unit

State = dict[Tensor, dict[str, Any]]


def momenta(state: State, unit: Unit) -> dict[int, Tensor]:
    """This rank's part of the momentum of each parameter of a unit, 1-D; made where there is a gradient."""
    holders = unit.storage.holders
    for p in holders:
        if p.grad is not None and "momentum_buffer" not in state[p]:
            # At least float32 whatever the weights are: the sum form reaches 20 gradients at momentum 0.95, and
            # in bfloat16 a new gradient of relative size 1/256 would be lost.
            dtype = torch.promote_types(p.dtype, torch.float32)
            state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        elif p in state and not state[p]["momentum_buffer"].is_contiguous():
            # A loaded one may have the strides of its parameter: its flat form would be a copy, and lose updates.
            state[p]["momentum_buffer"] = state[p]["momentum_buffer"].contiguous()
    buffers = [state[p].get("momentum_buffer") if p in state else None for p in holders]
    return {i: m for i, m in enumerate(unit.storage.flat(buffers)) if m is not None}


def adam(state: State, unit: Unit) -> list[Tensor]:
    """The holders that have a gradient, with AdamW's state made where it is missing."""
    params = [p for p in unit.storage.holders if p.grad is not None]
    for p in params:
        if not state[p]:
            state[p]["step"] = torch.zeros((), dtype=torch.float32)  # bfloat16 cannot count past 256
            state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        # A GPU's fused AdamW counts there; checkpoints of other engines have it on the CPU.
        state[p]["step"] = state[p]["step"].to(p.device)
    return params
