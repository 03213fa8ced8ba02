"""Whole plain tensors: one process, or replicas on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..exchange.layout import REPLICATED, Span
from .storage import LayoutError, Storage

_REMEDY = (
    "a distributed engine has re-laid the parameters out in a way that is not served. Remedy: DDP, DeepSpeed ZeRO-1, "
    "-2, -3 or FSDP2 (FSDP version 1 flattens parameters: use fsdp_version: 2), with groups from "
    "hf_muon.param_groups(model); nothing has been changed"
)


def recognise(params: Sequence[Tensor], names: list[str], shapes: Any, process_group: Any) -> Storage:
    """See :func:`hf_muon.engines.recognise`; the last one asked, so it refuses what is left over."""
    if len(params) != len(names):
        raise LayoutError(f"a group of {len(names)} parameters (first: {names[0]}) now holds {len(params)}: {_REMEDY}")
    for name, p, shape in zip(names, params, shapes or [None] * len(names), strict=True):
        if type(p) not in (torch.nn.Parameter, Tensor) or (shape is not None and tuple(p.shape) != tuple(shape)):
            now = f"{type(p).__name__} of shape {list(p.shape)}"
            raise LayoutError(f"{name} was routed as {list(shape or ())} but is now a {now}: {_REMEDY}")
    ranks = 1 if process_group is None else dist.get_world_size(process_group)
    shared = ranks > 1
    return Storage(
        engine="ddp" if shared else "local",
        members=tuple(range(len(names))),
        holders=tuple(params),
        placements=tuple(REPLICATED if shared else (Span(0, 0, p.numel()),) for p in params),
        flat=_flat,
        device=params[0].device,
        rank=dist.get_rank(process_group) if shared else 0,
        ranks=ranks,
        group=process_group if shared else None,
    )


def _flat(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.reshape(-1) for t in tensors]
