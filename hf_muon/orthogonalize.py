"""Newton-Schulz orthogonalization: tensors in, tensors out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .coefficients import Coefficients, Triple, schedule

# Working copies of a stack are made for at most this many elements at a time (128 MiB in bf16), so that the transient
# memory of orthogonalizing a stack of experts does not grow with their number.
MAX_ELEMENTS = 2**26
# The Gram form pays from this aspect ratio on: 12 m^2 n + 22 m^3 operations in five steps, not 20 m^2 n + 10 m^3.
# On smaller matrices it saves nothing that is worth its rounding, which on Gaussian matrices is twice that of plain
# iteration (0.02 for 0.01); and after more steps than these, a schedule that does not converge multiplies it.
GRAM_ASPECT, GRAM_SIZE, GRAM_STEPS = 2.0, 256, 6
# Rounding in the Gram matrix of small singular values grows by a^2 with every step that it is carried along; beyond
# this, the form starts again from the matrix itself. In bf16, 20 (one step carried at a = 3.4445) stays within 1.6
# times plain iteration's error on spectra that decay; 150 (two) makes 10 steps of the same schedule overflow. A
# schedule with a steeper step (polar_express) would be carried nowhere, and is iterated plainly.
GRAM_GROWTH = 20.0
# Thin matrices (LoRA factors, routers) take it in float64: two large products instead of ten are fewer than that costs,
# it is more exact than plain iteration in bf16, and TF32 is nowhere. There rounding may grow by 2^45 more.
THIN_SIZE, THIN_ASPECT, THIN_GROWTH = 64, 8, GRAM_GROWTH * 2**45
# On a CPU, batched bf16 products of matrices at least this large run at half the rate of single ones, and of smaller
# ones at twice it.
CPU_SINGLE = 256


@torch.no_grad()
def newton_schulz(
    G: Tensor,
    *,
    steps: int = 5,
    coefficients: Coefficients = "moonlight",
    dtype: torch.dtype = torch.bfloat16,
    scale: float = 1.0,
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
        scale: multiplies the result, in the coefficients of the last step.

    Returns:
        ``[..., A, B]`` in ``dtype``, a new tensor. With ``"moonlight"`` its singular values lie in about [0.68, 1.20],
        less for those below about 1.5e-3 of the norm.

    Raises:
        ValueError: fewer than two dimensions, an integer or complex ``G``, an unknown schedule.
    """
    *triples, last = schedule(coefficients, steps)
    triples.append((last[0] * scale, last[1] * scale, last[2] * scale))
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


def _iterate(stack: Tensor, triples: Sequence[Triple], dtype: torch.dtype) -> Tensor:
    """The iteration on ``[n, A, B]``, on the side whose Gram matrix is the smaller."""
    half = dtype in (torch.bfloat16, torch.float16)
    small, large = sorted(stack.shape[-2:])
    gentle = len(triples) <= GRAM_STEPS and all(a * a <= GRAM_GROWTH for a, _, _ in triples[:-1])
    gram = half and gentle and small >= GRAM_SIZE and large >= GRAM_ASPECT * small
    form = _gram_form if gram else _plain_form
    # Not on Apple's GPUs, for one, which have no float64.
    thin = half and small <= THIN_SIZE and large >= THIN_ASPECT * small and stack.device.type in ("cpu", "cuda")
    with torch.autocast(stack.device.type, enabled=False):
        if half and stack.device.type == "cpu" and small >= CPU_SINGLE:
            results = [_on_small_side(_unit_norm(x, (), x.dtype).to(dtype), triples, form) for x in stack]
            return torch.stack(results) if len(results) > 1 else results[0][None]
        if thin:
            form = functools.partial(_gram_form, limit=THIN_GROWTH)
            return _on_small_side(_unit_norm(stack, (-2, -1), torch.float64), triples, form).to(dtype)
        wide = torch.promote_types(stack.dtype, torch.float32)
        return _on_small_side(_unit_norm(stack, (-2, -1), wide).to(dtype), triples, form)


def _on_small_side(X: Tensor, triples: Sequence[Triple], form: Callable[[Tensor, Sequence[Triple]], Tensor]) -> Tensor:
    if X.shape[-2] <= X.shape[-1]:
        return form(X, triples)
    if X.ndim == 2 and X.device.type == "cpu":
        return _transposed(form(_transposed(X), triples))
    return form(X.mT, triples).mT


def _transposed(X: Tensor) -> Tensor:
    """A contiguous transpose, copied in strips that stay in the cache: CPUs multiply by transposed views slowly."""
    out = X.new_empty(X.shape[::-1])
    for columns, rows in zip(out.split(64, dim=1), X.split(64), strict=True):
        columns.copy_(rows.T)
    return out


def _plain_form(X: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Every step on the matrix itself."""
    for a, b, c in triples:
        gram = X @ X.mT
        X = _fused(X, _fused(gram, gram, gram, b, c), X, a)
    return X


def _gram_form(X: Tensor, triples: Sequence[Triple], limit: float = GRAM_GROWTH) -> Tensor:
    """The same polynomials from the small side: ``X_k = Q_k X``, with ``R_k = X_k X_k^T`` carried along beside ``Q_k``.

    The form of the gram-newton-schulz package (2026); where it starts again is ours, see GRAM_GROWTH.
    """
    Q: Tensor | None = None
    R, growth = X @ X.mT, 1.0
    for a, b, c in triples[:-1]:
        Q, Z = _times(Q, R, a, b, c)
        growth *= a * a
        if growth <= limit:
            R = Z @ (R @ Z)
        else:
            X, Q, growth = Q @ X, None, 1.0
            R = X @ X.mT
    Q, _ = _times(Q, R, *triples[-1])
    return Q @ X


def _times(Q: Tensor | None, R: Tensor, a: float, b: float, c: float) -> tuple[Tensor, Tensor]:
    """``Q Z`` and ``Z = a I + b R + c R^2``."""
    Z = _fused(R, R, R, b, c)
    Z.diagonal(dim1=-2, dim2=-1).add_(a)
    return (Z if Q is None else Q @ Z), Z


def _fused(base: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """``beta * base + alpha * left @ right``, for matrices or stacks of them."""
    return (torch.addmm if base.ndim == 2 else torch.baddbmm)(base, left, right, beta=beta, alpha=alpha)


def _unit_norm(X: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """X divided by its Frobenius norm over ``dims`` (empty: all), without an epsilon that small gradients would feel.

    A power of two that brings the largest entry to about 1 comes first, exactly, so that no square over- or underflows.
    """
    options: dict[str, Any] = {"dim": dims, "keepdim": True} if dims else {}
    work = X.to(torch.float32 if dtype == torch.float16 else dtype)
    exact = torch.promote_types(work.dtype, torch.float32)
    if work.device.type == "cpu":  # where looking at a number costs nothing
        norm = torch.linalg.vector_norm(work, **options, dtype=exact)
        if bool(((norm > 1e-15) & (norm < 1e15)).all()):
            return work / norm.to(work.dtype) if dims else work / norm
    peak = torch.linalg.vector_norm(work, math.inf, **options)
    largest = 1022 if work.dtype == torch.float64 else 126
    power = torch.exp2(-torch.log2(peak.masked_fill(peak == 0, 1.0).to(exact)).floor_().clamp_(-largest, largest))
    work = work * power.to(work.dtype)
    norm = torch.linalg.vector_norm(work, **options, dtype=exact)
    return work.div_(norm.masked_fill_(norm == 0, 1.0))
