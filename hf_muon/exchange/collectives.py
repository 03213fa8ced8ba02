"""The few collectives of a step. Tensors travel as bytes, so that every backend can carry every dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_to_all(
    outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[int], like: Tensor, group: Any
) -> Callable[[], list[Tensor]]:
    """Send the 1-D tensors ``outgoing[r]`` to each rank r.

    Returns:
        A function that waits for what comes, ``incoming[r]`` elements from each; call it once.
    """
    parts = [part for parts in outgoing for part in parts]
    send = torch.cat(parts) if parts else like.new_empty(0)
    received = like.new_empty(sum(incoming))
    size = like.element_size()
    work = dist.all_to_all_single(
        received.view(torch.uint8),
        send.view(torch.uint8),
        [n * size for n in incoming],
        [sum(part.numel() for part in parts) * size for parts in outgoing],
        group=group,
        async_op=True,
    )

    def arrived() -> list[Tensor]:
        nonlocal send
        work.wait()
        del send  # held until here: it was being read
        return list(received.split(list(incoming)))

    return arrived


def broadcast(values: Tensor, source: int, group: Any) -> Tensor:
    """The 1-D tensor of rank ``source`` of the group, on all of them; in place."""
    dist.broadcast(values.view(torch.uint8), group_src=source, group=group)
    return values


def maximum(values: Sequence[int], device: torch.device, group: Any) -> list[int]:
    """Element-wise maximum over the ranks."""
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor.tolist()


def total(values: Tensor, group: Any) -> Tensor:
    """Element-wise sum over the ranks, in place."""
    dist.all_reduce(values, op=dist.ReduceOp.SUM, group=group)
    return values


def gather_objects(value: Any, group: Any) -> list[Any]:
    """Everybody's small plain object: only on the way to an error message."""
    out: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, value, group=group)
    return out
