"""The exchange of one process: every matrix is whole here, so it only stacks equal shapes and takes them apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..matrices import MatrixLayout

# Pieces are stacked until a batch holds this many elements (256 MiB in float32): enough to fill a device with small
# matrices, and a bound on the transient memory that does not depend on the model's depth.
BATCH_ELEMENTS = 2**26


@dataclass(frozen=True, eq=False)
class Piece:
    """One piece of one parameter: strided views of its tensors, and what matrices they hold."""

    param: Tensor
    grad: Tensor
    momentum_buffer: Tensor
    layout: MatrixLayout
    index: int
    """Which piece of ``layout``."""
    kind: str

    @property
    def matrices(self) -> tuple[int, int, int]:
        """``(n, A, B)``: logical matrices in this piece."""
        return self.layout.matrices()[self.index]


def pieces(param: Tensor, grad: Tensor, momentum_buffer: Tensor, layout: MatrixLayout, kind: str) -> Iterator[Piece]:
    """The pieces of one parameter; each element belongs to exactly one."""
    views = zip(layout.pieces(param), layout.pieces(grad), layout.pieces(momentum_buffer), strict=True)
    for index, (p, g, m) in enumerate(views):
        yield Piece(p, g, m, layout, index, kind)


def batches(all_pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces of equal matrix shape and device together, in bounded batches, in a fixed order."""
    by_shape: dict[tuple[object, ...], list[Piece]] = {}
    for piece in all_pieces:
        # As stored, not as computed: a transposed weight may stack only with its like.
        key = (piece.matrices[1:], piece.layout.transposed, piece.param.device)
        by_shape.setdefault(key, []).append(piece)
    for same in by_shape.values():
        batch: list[Piece] = []
        elements = 0
        for piece in same:
            if batch and elements + piece.param.numel() > BATCH_ELEMENTS:
                yield batch
                batch, elements = [], 0
            batch.append(piece)
            elements += piece.param.numel()
        yield batch


def to_matrices(batch: list[Piece], tensors: list[Tensor]) -> Tensor:
    """``tensors`` (one per piece, in its shape) as one stack of whole matrices ``[n, rows, cols]``, as stored."""
    stacks = [piece.layout.to_matrices(tensor, piece.index) for piece, tensor in zip(batch, tensors, strict=True)]
    return stacks[0] if len(stacks) == 1 else torch.cat(stacks)


def to_storage(batch: list[Piece], stack: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """The inverse of :func:`to_matrices`: each piece with its own part of ``stack``, in the piece's shape."""
    parts = stack.split([piece.matrices[0] for piece in batch])
    for piece, part in zip(batch, parts, strict=True):
        yield piece, piece.layout.from_matrices(part, piece.index, piece.param)
