"""The few collectives of a step. Tensors travel as bytes, so that every backend can carry every dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_to_all(outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[int], like: Tensor, group: Any) -> list[Tensor]:
    """Send the 1-D tensors ``outgoing[r]`` to each rank r; returns what came, ``incoming[r]`` elements from each."""
    parts = [part for parts in outgoing for part in parts]
    send = torch.cat(parts) if parts else like.new_empty(0)
    received = like.new_empty(sum(incoming))
    size = like.element_size()
    dist.all_to_all_single(
        received.view(torch.uint8),
        send.view(torch.uint8),
        [n * size for n in incoming],
        [sum(part.numel() for part in parts) * size for parts in outgoing],
        group=group,
    )
    return list(received.split(list(incoming)))


def all_gather(own: Sequence[Tensor], lengths: Sequence[int], like: Tensor, group: Any) -> list[Tensor]:
    """Everybody's 1-D tensors, joined, ``lengths[r]`` elements from rank r; padded to the longest on the way."""
    longest = max(lengths)
    send = torch.cat([*own, like.new_zeros(longest - sum(t.numel() for t in own))])
    received = like.new_empty(len(lengths) * longest)
    _all_gather(received.view(torch.uint8), send.view(torch.uint8), group=group)
    return [part[:n] for part, n in zip(received.split(longest), lengths, strict=True)]


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
