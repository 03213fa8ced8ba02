"""Newton-Schulz orthogonalization: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from .coefficients import Coefficients, schedule

# Working copies of a stack are made for at most this many elements at a time (128 MiB in bf16), so that the transient
# memory of orthogonalizing a stack of experts does not grow with their number.
MAX_ELEMENTS = 2**26


@torch.no_grad()
def newton_schulz(
    G: Tensor,
    *,
    steps: int = 5,
    coefficients: Coefficients = "moonlight",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Approximate ``U V^T`` of ``G = U S V^T`` for every matrix in a stack (equation (2) of arXiv 2502.16982).

    Autocast is off inside, so ``dtype`` is what is computed in; float32 products follow torch's own precision setting
    (TF32 is off by default). The result does not depend on the scale of ``G``: each matrix is divided by its largest
    entry and then by its Frobenius norm, in float32, so that neither 1e-30 nor 1e30 under- or overflows. A zero matrix
    gives exactly zero. A NaN or infinity makes its own matrix NaN and no other.

    Args:
        G: ``[..., A, B]``, any strides, any floating dtype; not modified.
        steps: number of iterations.
        coefficients: a named schedule of :mod:`hf_muon.coefficients`, ``(a, b, c)``, or one triple per step.
        dtype: arithmetic of the iteration, and dtype of the result.

    Returns:
        ``[..., A, B]`` in ``dtype``, a new tensor. With ``"moonlight"`` its singular values lie in about [0.68, 1.15],
        less for those below about 1e-3 of the norm.

    Raises:
        ValueError: fewer than two dimensions, an integer or complex ``G``, an unknown schedule.
    """
    triples = schedule(coefficients, steps)
    if G.ndim < 2 or not G.is_floating_point():
        raise ValueError(f"newton_schulz needs real matrices [..., A, B], got shape {list(G.shape)} of {G.dtype}")
    if G.numel() == 0:
        return torch.zeros_like(G, dtype=dtype, memory_format=torch.contiguous_format)
    stack = G.reshape(-1, *G.shape[-2:])
    size = max(1, MAX_ELEMENTS // stack[0].numel())
    if size >= len(stack):
        return _iterate(stack, triples, dtype).reshape(G.shape)
    out = torch.empty(stack.shape, dtype=dtype, device=G.device)
    for chunk, target in zip(stack.split(size), out.split(size), strict=True):
        target.copy_(_iterate(chunk, triples, dtype))
    return out.reshape(G.shape)


def _iterate(stack: Tensor, triples: tuple[tuple[float, float, float], ...], dtype: torch.dtype) -> Tensor:
    """The iteration on ``[n, A, B]``, on the side whose Gram matrix is the smaller."""
    with torch.autocast(stack.device.type, enabled=False):
        return _polynomials(_unit_norm(stack).to(dtype), triples)


def _polynomials(X: Tensor, triples: tuple[tuple[float, float, float], ...]) -> Tensor:
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    for a, b, c in triples:
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def _unit_norm(stack: Tensor) -> Tensor:
    """Each matrix divided by its Frobenius norm, without an epsilon that small gradients would feel."""
    work = stack.to(torch.promote_types(stack.dtype, torch.float32))
    peak = work.abs().amax(dim=(-2, -1), keepdim=True)
    work = work / peak.masked_fill(peak == 0, 1.0)
    norm = torch.linalg.vector_norm(work, dim=(-2, -1), keepdim=True)
    return work.div_(norm.masked_fill(norm == 0, 1.0))
