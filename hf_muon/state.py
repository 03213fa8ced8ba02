"""The optimizer's state, made where it is missing: one momentum for a matrix, AdamW's two moments for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import NS_DTYPES
from .units import Unit
from .update import is_half

State = dict[Tensor, dict[str, Any]]


def momenta(state: State, unit: Unit) -> dict[int, Tensor]:
    """This rank's part of the momentum of each parameter of a unit, 1-D; made where there is a gradient."""
    holders = unit.storage.holders
    for p in holders:
        if p.grad is not None and "momentum_buffer" not in state[p]:
            # Not the weights' type: the sum form reaches 20 gradients at momentum 0.95, and in bfloat16 a new gradient
            # of relative size 1/256 would be lost.
            dtype = NS_DTYPES[unit.group["momentum_dtype"]]
            dtype = torch.promote_types(p.dtype, dtype) if dtype == torch.float32 else dtype
            state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        elif p in state and not state[p]["momentum_buffer"].is_contiguous():
            # A loaded one may have the strides of its parameter: its flat form would be a copy, and lose updates.
            state[p]["momentum_buffer"] = state[p]["momentum_buffer"].contiguous()
    buffers = [state[p].get("momentum_buffer") if p in state else None for p in holders]
    return {i: m for i, m in enumerate(unit.storage.flat(buffers)) if m is not None}


def compensations(state: State, unit: Unit) -> list[Tensor | None]:
    """Per holder, what rounding has taken from its weights so far, or None; made where the option asks for it."""
    holders = unit.storage.holders
    for p in holders:
        if unit.group["kahan_sum"] and is_half(p) and p.grad is not None and "compensation" not in state[p]:
            state[p]["compensation"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
    return [state[p].get("compensation") if p in state and is_half(p) else None for p in holders]


def adam(state: State, unit: Unit) -> list[Tensor]:
    """The holders that have a gradient, with AdamW's state made where it is missing."""
    params = [p for p in unit.storage.holders if p.grad is not None]
    for p in params:
        dtype = torch.promote_types(p.dtype, torch.float32) if unit.group["kahan_sum"] else p.dtype
        if "exp_avg" not in state[p]:
            state[p]["step"] = torch.zeros((), dtype=torch.float32)  # bfloat16 cannot count past 256
            for key in ("exp_avg", "exp_avg_sq"):
                state[p][key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        for key in ("exp_avg", "exp_avg_sq"):  # loaded ones may be of weights of another type, or lie otherwise
            if state[p][key].dtype != dtype or state[p][key].stride() != p.stride():
                loaded = state[p][key]
                state[p][key] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format).copy_(loaded)
        # A GPU's fused AdamW counts there; checkpoints of other engines have it on the CPU.
        state[p]["step"] = state[p]["step"].to(p.device)
    compensations(state, unit)
    return params
