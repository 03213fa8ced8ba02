"""Bytes that a rank sends, and bytes that an optimizer's step allocates, counted where torch dispatches operators."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def sent(name: str, args: Sequence[Any], ranks: int, rank: int) -> float:
    """Bytes that leave one rank, along rings; for a reduce the mean over the ranks of ``N - 1`` sends.

    Raises:
        NotImplementedError: a collective that has no convention here; none may go uncounted.
    """
    first, second = (sum(t.nbytes for t in tree_leaves(x) if isinstance(t, Tensor)) for x in args[:2])
    if name == "broadcast_":  # the rank before the root is the last, and passes nothing on
        return 0 if rank == (args[2] - 1) % ranks else first
    if name in ("allreduce_", "reduce_"):
        return (2 if name == "allreduce_" else 1) * (ranks - 1) / ranks * first
    if name == "_allgather_base_":  # (output, input, ...), as the others
        return (ranks - 1) * second
    if name == "_reduce_scatter_base_":
        return (ranks - 1) / ranks * second
    if name == "alltoall_base_":
        splits = args[4]
        return (sum(splits) - splits[rank]) * args[1].element_size()
    raise NotImplementedError(f"no convention for c10d::{name}")


class Meter(TorchDispatchMode):
    """Bytes sent by (inside the optimizer's step or not, collective), and the peak of what that step allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[bool, str]] = Counter()
        self.inside = False
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._old: dict[int, StorageWeakRef] = {}

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Tell the optimizer's step from the rest."""
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "inside", True))
        optimizer.register_step_post_hook(lambda *_: setattr(self, "inside", False))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            self.bytes[self.inside, name] += sent(name, args, dist.get_world_size(), dist.get_rank())
        if not self.inside:
            return func(*args, **(kwargs or {}))
        for storage in storages((args, kwargs)):
            if storage._cdata not in self._live:
                self._old.setdefault(storage._cdata, StorageWeakRef(storage))
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage._cdata not in self._old:
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        if self._now() > self.peak:
            time.sleep(0.002)  # gloo's thread lets go of a finished message a moment after the call has returned
            self.peak = max(self.peak, self._now())
        return out

    def _now(self) -> int:
        self._live = {key: found for key, found in self._live.items() if not found[0].expired()}
        return sum(size for _, size in self._live.values())


def storages(tree: Any) -> list[Any]:
    """Of every tensor in a tree: what is stored on this rank."""
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tree_leaves(tree) if isinstance(t, Tensor)]
    return [t.untyped_storage() for t in tensors]
