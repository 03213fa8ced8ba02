"""Singular values of matrices, and the numbers of section 3.4 of the paper (arXiv 2502.16982) that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-30
"""Against division by zero where the quotient is multiplied by zero afterwards."""


@dataclass(frozen=True)
class Spectrum:
    """The spectra of a batch of matrices ``[..., A, B]``; every field has the batch's shape, but for the first.

    NaN is what is not defined: all of it for a matrix with an element that is not finite; entropy, stable rank and
    condition of a zero matrix; the entropy of a matrix with one row or column.
    """

    singular_values: Tensor
    """``[..., min(A, B)]``, descending."""
    entropy: Tensor
    """``-(1 / log n) sum q log q`` of ``q = s^2 / sum s^2``: 1 if all n singular values are equal, 0 at rank 1."""
    stable_rank: Tensor
    """``||W||_F^2 / ||W||_2^2``, from 1 to n."""
    spectral_norm: Tensor
    """The largest singular value."""
    smallest: Tensor
    """The smallest singular value."""
    condition: Tensor
    """Largest over smallest; infinite where the smallest is zero."""
    rms: Tensor
    """Root mean square of the elements."""


def spectrum(matrices: Tensor, *, dtype: torch.dtype = torch.float64) -> Spectrum:
    """Singular values of every matrix, by SVD.

    Args:
        matrices: ``[..., A, B]``, of any floating dtype; rows and columns may be swapped.
        dtype: to compute in. float32 is about twice as fast, and its small singular values (below 1e-6 of the largest)
            are rounding.

    Raises:
        ValueError: no matrices, or not floating.
    """
    matrices, finite = _checked(matrices, dtype)
    values = torch.linalg.svdvals(matrices)
    values = torch.where(finite[..., None], values, math.nan)
    squares = values.square()
    total = squares.sum(-1)
    norm, smallest = values[..., 0], values[..., -1]
    return Spectrum(
        singular_values=values,
        entropy=entropy(values),
        stable_rank=total / norm.square(),
        spectral_norm=norm,
        smallest=smallest,
        condition=norm / smallest,
        rms=(total / (matrices.shape[-2] * matrices.shape[-1])).sqrt(),
    )


def entropy(values: Tensor) -> Tensor:
    """SVD entropy of singular values ``[..., n]``; NaN if they are all zero, or only one."""
    squares = values.square()
    shares = squares / squares.sum(-1, keepdim=True)
    total = -torch.special.xlogy(shares, shares).sum(-1)
    # At rank 1 the sum is a negative zero.
    return total.abs() / math.log(values.shape[-1]) if values.shape[-1] > 1 else torch.full_like(total, math.nan)


@dataclass(frozen=True)
class Estimate:
    """What is watched during training; NaN as in :class:`Spectrum`."""

    entropy: Tensor
    stable_rank: Tensor
    spectral_norm: Tensor


def estimate(
    matrices: Tensor, *, exact_up_to: int = 256, rank: int = 16, probes: int = 16, steps: int = 24, seed: int = 0
) -> Estimate:
    """Entropy, stable rank and spectral norm at the cost of some thousand products with a vector.

    Lanczos quadrature on the smaller Gram matrix (Ubaru, Chen, Saad, "Fast Estimation of tr(f(A)) via Stochastic
    Lanczos Quadrature", 2017), from random vectors and from the directions of its largest eigenvalues, which random
    vectors see too unevenly (Meyer et al., "Hutch++", arXiv 2010.09649). The Frobenius norm is exact.

    Errors, held by tests/test_spectra.py at 512 and 1024 rows: the spectral norm within 1e-4 of itself; the entropy's
    root mean square error over seeds below 0.002 for Gaussian matrices and power laws, below 0.012 for spectra that
    fall off between the 50th and the 100th value, which is the worst found.

    Args:
        matrices: ``[..., A, B]``.
        exact_up_to: matrices with at most this many rows or columns are decomposed instead.
        rank: leading directions followed for themselves.
        probes: random vectors besides.
        steps: of the Lanczos iteration.
        seed: of the vectors; the same on every rank, so that all find the same numbers.
    """
    if min(matrices.shape[-2:]) <= max(exact_up_to, rank + probes, steps):
        exact = spectrum(matrices, dtype=torch.float32)
        return Estimate(exact.entropy, exact.stable_rank, exact.spectral_norm)
    matrices, finite = _checked(matrices, torch.float32)
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = matrices.mT
    rows, total = matrices.shape[-2], matrices.square().sum((-2, -1))
    # Eigenvalues in units of their mean, which is known: what is estimated has no linear part left to be wrong in.
    matrices = matrices / (total / rows).sqrt().clamp_min(_TINY)[..., None, None]
    diagonal, off = _lanczos(matrices, _starts(matrices, rank, probes, seed), steps)
    off_diagonal = torch.diag_embed(off, offset=1)
    nodes, vectors = torch.linalg.eigh(torch.diag_embed(diagonal) + off_diagonal + off_diagonal.mT)
    nodes = nodes.clamp_min(0)
    seen = (vectors[..., 0, :].square() * (torch.special.xlogy(nodes, nodes) - nodes + 1)).sum(-1)
    deficit = (seen[..., :rank].sum(-1) + (rows - rank) * seen[..., rank:].mean(-1)) / rows
    largest = nodes.amax((-2, -1)).to(total.dtype)
    known = finite & (total > 0)
    norm = torch.where(total > 0, (total / rows * largest).sqrt(), 0)
    return Estimate(
        entropy=torch.where(known, 1 - deficit.to(total.dtype) / math.log(rows), math.nan),
        stable_rank=torch.where(known, rows / largest, math.nan),
        spectral_norm=torch.where(finite, norm, math.nan),
    )


def _starts(matrices: Tensor, rank: int, probes: int, seed: int) -> Tensor:
    """Unit vectors ``[..., rows, rank + probes]``: the leading directions, and random ones orthogonal to them."""
    draw = torch.Generator().manual_seed(seed)
    random = torch.randn(matrices.shape[-2], rank + probes, generator=draw).to(matrices)
    random = random.expand(*matrices.shape[:-2], *random.shape)
    leading = random[..., :rank]
    for _ in range(3):  # subspace iteration
        leading = torch.linalg.qr(matrices @ (matrices.mT @ leading)).Q
    others = random[..., rank:]
    for _ in range(2):  # once leaves rounding
        others = others - leading @ (leading.mT @ others)
    return torch.cat([leading, others / others.norm(dim=-2, keepdim=True)], -1)


def _lanczos(matrices: Tensor, vectors: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Tridiagonal forms of ``W W^T`` seen from each vector: diagonals ``[..., vectors, steps]``, and the ones beside.

    Every new vector is made orthogonal to all before it, twice: without that, large eigenvalues are found repeatedly.
    """
    basis, diagonal, off = [vectors], [], []
    for step in range(steps):
        image = matrices @ (matrices.mT @ basis[-1])
        diagonal.append((image * basis[-1]).sum(-2))
        if step + 1 == steps:
            break
        for _ in range(2):
            for known in basis:
                image = image - known * (image * known).sum(-2, keepdim=True)
        length = image.norm(dim=-2)
        # Of a matrix with fewer directions than there are steps only rounding is left: the rest of its form is zero.
        length = torch.where(length > 1e-5 * diagonal[0].abs(), length, 0)
        off.append(length)
        basis.append(torch.where(length[..., None, :] > 0, image / length.clamp_min(_TINY)[..., None, :], 0))
    return torch.stack(diagonal, -1).double(), torch.stack(off, -1).double()


def _checked(matrices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrices in ``dtype``, those that are not finite zeroed (an SVD of them fails), and which are finite."""
    if matrices.ndim < 2 or 0 in matrices.shape[-2:] or not matrices.is_floating_point():
        raise ValueError(f"expected floating [..., A, B], got {matrices.dtype} {list(matrices.shape)}")
    matrices = matrices.detach().to(dtype)
    finite = matrices.isfinite().flatten(-2).all(-1)
    if not finite.all():
        matrices = torch.where(finite[..., None, None], matrices, 0)
    return matrices, finite
