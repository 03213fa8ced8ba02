"""Each room says which interval of which parameter lives on this rank, and nothing else; README.md has the boundary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from . import fsdp2, local, zero, zero3
from .storage import LayoutError, Storage

__all__ = ["LayoutError", "Storage", "parts", "recognise"]


def parts(params: Sequence[Tensor], names: list[str], whole: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """The lists of tensors that an engine steps one after the other, of a group that holds ``params`` now."""
    if not params:
        return [[flat] for flat in zero3.sub_groups(names, whole)]
    return [list(params)]


def recognise(
    params: Sequence[Tensor],
    names: list[str],
    shapes: Sequence[tuple[int, ...]] | None,
    whole: Mapping[str, Tensor],
    process_group: Any,
) -> Storage:
    """How the parameters of a group are stored now; engines replace them after the optimizer was built.

    Args:
        params: what is in the group at this step.
        names: of the parameters it was built with.
        shapes: of those, where they matter.
        whole: those parameters themselves, as far as they still exist.
        process_group: ranks that hold the same plain parameters and gradients, or None.

    Raises:
        LayoutError: no engine here knows this layout, or it contradicts itself; the message names the parameter.
    """
    for room in (fsdp2, zero3, zero):
        storage = room.recognise(params, names, whole)
        if storage is not None:
            return storage
    return local.recognise(params, names, shapes, process_group)
