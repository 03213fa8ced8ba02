"""DeepSpeed ZeRO-3: every parameter is cut into one chunk per rank, and sub-groups of chunks are flattened together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..exchange.layout import even_placement, span_on
from .storage import LayoutError, Storage


def recognise(params: Sequence[Tensor], names: list[str], whole: Mapping[str, Any]) -> Storage | None:
    """See :func:`hf_muon.engines.recognise`; None if this is not ZeRO-3's layout."""
    engine = _engine(names, whole)
    if engine is None or len(params) != 1:
        return None
    flat = params[0]
    index = next((i for i, t in enumerate(engine.fp32_partitioned_groups_flat) if t is flat), None)
    if index is None:
        raise LayoutError(f"ZeRO-3 steps a tensor that is none of its sub-groups, in the group of {names[0]}")
    _check_engine(engine, names[0])
    members = engine.fp16_groups[index]
    position = {id(whole[name]): i for i, name in enumerate(names) if name in whole}
    if any(id(p) not in position for p in members):
        raise LayoutError(f"a sub-group of ZeRO-3 holds parameters beside those of the group of {names[0]}")
    group = members[0].ds_process_group
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    placements = tuple(even_placement(p.ds_numel, ranks) for p in members)
    begins = [0, *accumulate(p.partition_numel() for p in members)]
    slices, problem = [], ""
    for p, placement, begin in zip(members, placements, begins, strict=False):
        name = names[position[id(p)]]
        a, b = span_on(placement, rank, p.ds_numel)
        if p.partition_numel() != placement[0].stop or p.ds_process_group is not group:
            raise LayoutError(f"{name}: ZeRO-3 cuts it into chunks of {p.partition_numel()}, not {placement[0].stop}")
        slices.append((begin, begin + b - a))
        ours = flat.detach()[begin : begin + b - a].to(device=p.ds_tensor.device, dtype=p.ds_tensor.dtype)
        if not torch.equal(ours.nan_to_num(), p.ds_tensor.detach()[: b - a].nan_to_num()):
            problem = (
                f"the weights of {name} are not where ZeRO-3's sub-group should hold them. Either they were "
                "changed after deepspeed.initialize, or its layout is an unknown one; nothing has been changed"
            )
    return Storage(
        engine="zero3",
        members=tuple(position[id(p)] for p in members),
        holders=(flat,),
        placements=placements,
        flat=lambda tensors: [None if tensors[0] is None else tensors[0][a:b] for a, b in slices],
        device=members[0].device,
        offsets=tuple(a for a, _ in slices),
        part=index,
        problem=problem,
        rank=rank,
        ranks=ranks,
        group=group,
    )


def sub_groups(names: list[str], whole: Mapping[str, Any]) -> list[Tensor]:
    """All flat tensors of a group; between steps ZeRO-3 leaves the group itself empty."""
    engine = _engine(names, whole)
    ours = {id(whole[name]) for name in names if name in whole}
    if engine is None:
        return []
    return [
        f
        for f, group in zip(engine.fp32_partitioned_groups_flat, engine.fp16_groups, strict=True)
        if id(group[0]) in ours
    ]


def _engine(names: list[str], whole: Mapping[str, Any]) -> Any:
    return next((x for n in names if (x := getattr(whole.get(n), "_z3_optimizer", None)) is not None), None)


def _check_engine(engine: object, name: str) -> None:
    """Modes in which ZeRO-3 would not step this optimizer, or not with these tensors."""
    if getattr(engine, "offload_optimizer", False) and getattr(engine, "partial_offload", 1.0) < 1.0:
        raise LayoutError(
            f"{name}: offload_optimizer.ratio below 1 makes ZeRO-3 train some parameters with AdamW: set it to 1"
        )
    if getattr(engine, "swap_optimizer", False):
        raise LayoutError(f"{name}: optimizer state offloaded to NVMe is not served: offload it to the CPU")
    if type(engine).__name__ != "DeepSpeedZeroOptimizer_Stage3":
        raise LayoutError(f"{name}: {type(engine).__name__} is not served, only plain ZeRO-3")
