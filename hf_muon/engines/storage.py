"""What the optimizer needs to know of where a group's parameters are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..exchange.layout import Placement


class LayoutError(RuntimeError):
    """Parameters are laid out in a way that no engine here serves; nothing has been changed."""


@dataclass(frozen=True, eq=False)
class Storage:
    """Where the parameters of one group (or of the part of it that an engine steps at once) live."""

    engine: str
    """For messages and reports: ``local``, ``ddp``, ``zero``, ``zero3``, ``fsdp2``."""
    members: tuple[int, ...]
    """Which of the group's names are stored here, in the order of everything below."""
    holders: tuple[Tensor, ...]
    """The tensors in ``group["params"]``; optimizer state belongs to them."""
    placements: tuple[Placement, ...]
    """Per member: where its elements are, over the ranks of ``group``."""
    flat: Callable[[Sequence[Tensor | None]], list[Tensor | None]] = field(repr=False)
    """From tensors that lie as the holders do (weights, gradients) to this rank's part of each member, 1-D."""
    device: torch.device
    """Where matrices are computed; holders may be offloaded elsewhere."""
    offsets: tuple[int, ...] | None = None
    """Where each member's part begins in a flat holder; None if every member has a holder of its own."""
    part: int = 0
    """Which of the engine's flat tensors the holder is, where it makes several of one group."""
    problem: str = ""
    """What contradicts this layout on this rank: an error that all ranks must hear of, or the others would wait."""
    rank: int = 0
    ranks: int = 1
    group: Any = None
    """Process group; None with one rank."""

    @property
    def sharded(self) -> bool:
        """Whether ranks hold different elements."""
        return self.ranks > 1 and self.engine != "ddp"

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that lies as a holder does, in its shape."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def write_back(self, weights: Sequence[Tensor | None]) -> None:
        """Store weights that :attr:`flat` had to copy, because their elements are not in row-major order."""
        for holder, weight in zip(self.holders, weights, strict=False):
            if self.engine in ("local", "ddp") and not holder.is_contiguous() and weight is not None:
                holder.copy_(weight.view(holder.shape))
