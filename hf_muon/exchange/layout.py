"""Which elements of which parameter live on which rank: pure integers, the same on every rank and on paper.

A parameter is its elements in row-major order, 0 to its size. Every engine stores at most one interval of a parameter
on a rank; the functions here are the four ways in which engines cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Elements ``[start, stop)`` of one parameter, on one rank."""

    rank: int
    start: int
    stop: int


Placement = tuple[Span, ...]
"""Where one parameter lives: its non-empty spans by rank, covering it once. Empty: every rank holds all of it."""

REPLICATED: Placement = ()


def flat_placements(offsets: Sequence[int], numels: Sequence[int], partition: int, ranks: int) -> list[Placement]:
    """ZeRO-1 and -2: parameters lie one after the other in one buffer, which is cut into equal partitions.

    Args:
        offsets: where each parameter starts in the buffer (alignment may leave gaps).
        numels: number of elements of each.
        partition: elements of the buffer on each rank.
        ranks: number of ranks.

    Raises:
        ValueError: a parameter ends beyond the last partition.
    """
    out = []
    for offset, numel in zip(offsets, numels, strict=True):
        if offset < 0 or offset + numel > partition * ranks:
            raise ValueError(f"elements {offset}..{offset + numel} lie outside of {ranks} partitions of {partition}")
        first, last = offset // partition, (offset + numel - 1) // partition
        out.append(
            tuple(
                Span(r, max(r * partition, offset) - offset, min((r + 1) * partition, offset + numel) - offset)
                for r in range(first, last + 1)
            )
        )
    return out


def even_placement(numel: int, ranks: int, unit: int = 1) -> Placement:
    """ZeRO-3 (``unit`` 1) and FSDP2 (``unit``: elements of one index of the first dimension): chunks of equal size.

    All chunks are as large as the first, but for the last one or ones, which may be smaller or empty.
    """
    chunk = math.ceil(numel // unit / ranks) * unit
    return tuple(Span(r, r * chunk, min((r + 1) * chunk, numel)) for r in range(ranks) if r * chunk < numel)


def span_on(placement: Placement, rank: int, numel: int) -> tuple[int, int]:
    """``(start, stop)`` of what ``rank`` holds; ``(0, 0)`` if it holds nothing."""
    if placement == REPLICATED:
        return 0, numel
    return next(((s.start, s.stop) for s in placement if s.rank == rank), (0, 0))


def cut(placement: Placement, start: int, stop: int) -> Placement:
    """The part of a placement inside ``[start, stop)``, still counted from the parameter's first element."""
    clipped = (Span(s.rank, max(s.start, start), min(s.stop, stop)) for s in placement)
    return tuple(s for s in clipped if s.start < s.stop)
