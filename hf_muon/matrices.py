"""How one parameter is one or more logical matrices. Pure shapes: nothing here knows models or optimizers.

Muon orthogonalizes matrices, and a parameter is often several: 64 experts in one 3-D tensor, gate and up in one
Linear, q, k and v in one projection, the groups of a convolution, the heads of an attention layer. A
:class:`MatrixLayout` says which, and hands out strided views of any tensor of the parameter's shape (the gradient,
the momentum, the parameter itself), one view per piece, that together cover every element exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache

from torch import Tensor

Key = tuple[tuple[int, ...], int, int, int, int, tuple[int, ...], tuple[int, ...], bool]


@dataclass(frozen=True)
class MatrixLayout:
    """The logical matrices of one parameter.

    A tensor of ``shape`` is read as ``batch`` leading dimensions of independent matrices, one dimension of rows, and
    the remaining dimensions flattened to columns. Rows or columns (``dim`` 0 or 1) may then be cut: the dimension is
    ``blocks`` repetitions of consecutive runs of ``sizes``, and run *i* of every block belongs to piece *i*.

    ======================================== ======== ================ ==========
    weight                                   batch    blocks           sizes
    ======================================== ======== ================ ==========
    Linear [out, in]                         0        1                (out,)
    experts [E, 2I, H], gate then up         1        1                (I, I)
    the same, gate and up interleaved        1        I                (1, 1)
    q, k, v one after the other              0        1                (Q, K, V)
    q, k, v of head 1, then of head 2, ...   0        heads            (d, d, d)
    convolution [out, in / g, kh, kw]        0        1, ``groups`` g  (out / g,)
    ======================================== ======== ================ ==========
    """

    shape: tuple[int, ...]
    """Shape of the parameter."""
    batch: int = 0
    """Number of leading dimensions that count matrices, not rows."""
    groups: int = 1
    """The row dimension holds this many independent matrices one after the other (grouped convolutions)."""
    dim: int = 0
    """What ``sizes`` cuts: 0 the rows, 1 the columns."""
    blocks: int = 1
    """How often the pattern of ``sizes`` repeats along the cut dimension."""
    sizes: tuple[int, ...] = ()
    """Length of each piece inside one block; empty means one piece, uncut."""
    heads: tuple[int, ...] = ()
    """Per piece, into how many equal matrices its cut dimension divides (per-head orthogonalization); empty: one."""
    transposed: bool = False
    """Stored [in, out]: the logical matrix is the transpose. Only the shape in the update scale depends on it."""

    def __post_init__(self) -> None:
        rows, cols = self._rows_cols()
        length = (rows, cols)[self.dim]
        sizes = self.sizes or (length,)
        if self.blocks * sum(sizes) != length:
            raise ValueError(
                f"pieces {sizes} x {self.blocks} blocks do not cover dimension {self.dim} of {length} in {self.shape}"
            )
        if self.heads and len(self.heads) != len(sizes):
            raise ValueError(f"{len(self.heads)} head counts for {len(sizes)} pieces")
        for size, heads in zip(sizes, self.heads or (1,) * len(sizes), strict=True):
            if heads < 1 or (self.blocks * size) % heads:
                raise ValueError(
                    f"{self.blocks * size} rows or columns do not divide into {heads} heads in {self.shape}"
                )

    def _rows_cols(self) -> tuple[int, int]:
        """Shape of one uncut matrix as stored."""
        if len(self.shape) < self.batch + 2:
            raise ValueError(f"shape {self.shape} is no matrix after {self.batch} batch dimensions")
        if self.dim not in (0, 1) or (self.dim == 1 and len(self.shape) != self.batch + 2):
            raise ValueError(f"cannot cut dimension {self.dim} of shape {self.shape}")
        rows = self.shape[self.batch]
        if self.groups < 1 or rows % self.groups:
            raise ValueError(f"{rows} rows do not divide into {self.groups} groups")
        return rows // self.groups, math.prod(self.shape[self.batch + 1 :])

    @property
    def count(self) -> int:
        """Number of uncut matrices."""
        return math.prod(self.shape[: self.batch]) * self.groups

    def matrices(self) -> tuple[tuple[int, int, int], ...]:
        """Per piece ``(n, A, B)``: how many matrices, output rows A, input columns B (logical, not as stored)."""
        out = []
        for n, rows, cols in self._stored():
            out.append((n, cols, rows) if self.transposed else (n, rows, cols))
        return tuple(out)

    def total(self) -> int:
        """Number of logical matrices in the parameter."""
        return sum(n for n, _, _ in self.matrices())

    def _stored(self) -> list[tuple[int, int, int]]:
        rows, cols = self._rows_cols()
        sizes = self.sizes or ((rows, cols)[self.dim],)
        out = []
        for size, heads in zip(sizes, self.heads or (1,) * len(sizes), strict=True):
            length = self.blocks * size // heads
            out.append((self.count * heads, length, cols) if self.dim == 0 else (self.count * heads, rows, length))
        return out

    def slabs(self) -> tuple[Slab, ...]:
        """The parameter as consecutive runs of elements that each hold whole matrices, as few in each as possible.

        A slab is what can be orthogonalized without the rest of the parameter: one expert's gate, the rows of q, one
        group of a convolution. Matrices whose elements interleave share a slab.
        """
        rows, cols = self._rows_cols()
        sizes = self.sizes or (rows,)
        if self.dim == 1 or self.blocks > 1:
            whole = MatrixLayout((rows, cols), 0, 1, self.dim, self.blocks, self.sizes, self.heads, self.transposed)
            parts = [(rows * cols, whole)]
        else:
            heads = self.heads or (1,) * len(sizes)
            parts = [
                (size // h * cols, MatrixLayout((size // h, cols), transposed=self.transposed))
                for size, h in zip(sizes, heads, strict=True)
                for _ in range(h)
            ]
        out, start = [], 0
        for _ in range(self.count):
            for numel, layout in parts:
                out.append(Slab(start, start + numel, layout))
                start += numel
        return tuple(out)

    def pieces(self, tensor: Tensor) -> list[Tensor]:
        """One strided view of ``tensor`` per piece, for any strides; writing to a view writes to ``tensor``."""
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"layout of {self.shape} given a tensor of {tuple(tensor.shape)}")
        if self.groups > 1:
            tensor = tensor.unflatten(self.batch, (self.groups, -1))
        if not self.sizes:
            return [tensor]
        at = self.batch + (self.groups > 1) + self.dim
        tensor = tensor.unflatten(at, (self.blocks, sum(self.sizes)))
        return list(tensor.split(self.sizes, dim=at + 1))

    def to_matrices(self, piece: Tensor, index: int) -> Tensor:
        """Piece ``index`` as ``[n, rows, cols]``, as stored (a copy where its strides need one)."""
        n, rows, cols = self._stored()[index]
        heads = self.heads[index] if self.heads else 1
        if self.dim == 0 or heads == 1:
            return piece.reshape(n, rows, cols)
        return piece.reshape(self.count, rows, heads, cols).transpose(1, 2).reshape(n, rows, cols)

    def from_matrices(self, stack: Tensor, index: int, like: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrices`: ``stack`` in the shape of the piece ``like``."""
        _, rows, cols = self._stored()[index]
        heads = self.heads[index] if self.heads else 1
        if self.dim == 1 and heads > 1:
            stack = stack.reshape(self.count, heads, rows, cols).transpose(1, 2)
        return stack.reshape(like.shape)

    def key(self) -> Key:
        """The layout as plain tuples and numbers, so that it can live in a state dict (``weights_only`` safe)."""
        return astuple(self)

    @staticmethod
    def of(key: Sequence[object]) -> MatrixLayout:
        """The layout of a :meth:`key`, lists accepted for tuples (a key that went through JSON)."""
        return _layout(tuple(tuple(v) if isinstance(v, list) else v for v in key))


@dataclass(frozen=True)
class Slab:
    """Elements ``[start, stop)`` of a flattened parameter, and the matrices in them (a 2-D layout of their own)."""

    start: int
    stop: int
    layout: MatrixLayout


@cache
def _layout(key: tuple[object, ...]) -> MatrixLayout:
    return MatrixLayout(*key)  # type: ignore[arg-type]
