"""The arithmetic of one step, as stateless functions: momentum, scale, decay and apply, and AdamW for the rest.

Elementwise functions work on any slice of a parameter; only :func:`scale_` must see whole matrices, and it takes
their logical shape rather than reading it off a tensor, so that a shard can never be mistaken for a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .config import SCALE_ALIASES

# Elementwise passes over large tensors on a CPU are made in blocks that stay in its cache: 1.3-1.5x faster.
_BLOCK = 2**18


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Aligned parts of 1-D tensors (others, and those on a GPU, come whole)."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= _BLOCK or any(t.ndim != 1 for t in tensors):
        return iter([tensors])
    return zip(*(t.split(_BLOCK) for t in tensors), strict=True)


def accumulate_(momentum_buffer: Tensor, grad: Tensor, momentum: float) -> None:
    """Equation (1): ``M <- mu M + G``. A sum, not an average; ``grad`` may be of lower precision."""
    if grad.dtype == momentum_buffer.dtype:
        torch.add(grad, momentum_buffer, alpha=momentum, out=momentum_buffer)
    else:
        for m, g in blocks(momentum_buffer, grad):  # summed in the wider type, rounded once
            m.copy_(torch.add(g, m, alpha=momentum))


def direction(grad: Tensor, momentum_buffer: Tensor, momentum: float, nesterov: bool, like: Tensor) -> Tensor:
    """What is orthogonalized: ``G + mu M`` (Nesterov, footnote 1 of the paper) or ``M``, placed as ``like``."""
    if not nesterov:
        return momentum_buffer.to(like)
    if like.device != grad.device or grad.dtype == like.dtype == momentum_buffer.dtype:
        return torch.add(grad, momentum_buffer, alpha=momentum).to(like)
    out = torch.empty_like(grad, dtype=like.dtype)
    for target, g, m in blocks(out, grad, momentum_buffer):
        target.copy_(torch.add(g, m, alpha=momentum))
    return out


def scale(shape: tuple[int, int], adjust_lr_fn: str, update_rms: float, hidden_size: int | None = None) -> float:
    """What multiplies an orthogonalized matrix of logical ``shape`` (A output rows, B input columns).

    The factors are those of section 3.1 and Table 1 of the paper, and torch's default:

    * ``sqrt_max_dims``: ``update_rms * sqrt(max(A, B))`` ("Adjusted LR", equation (4));
    * ``inverse_rms``: ``update_rms / RMS(O)`` ("Update Norm"), per matrix: 1 here, and :func:`equalize_` follows;
    * ``sqrt_hidden_size``: ``update_rms * sqrt(hidden_size)`` ("Baseline");
    * ``original``: ``sqrt(max(1, A / B))``, without ``update_rms``.
    """
    a, b = shape
    adjust_lr_fn = SCALE_ALIASES.get(adjust_lr_fn, adjust_lr_fn)
    if adjust_lr_fn == "sqrt_max_dims":
        return update_rms * math.sqrt(max(a, b))
    if adjust_lr_fn == "original":
        return math.sqrt(max(1.0, a / max(b, 1)))
    if adjust_lr_fn == "sqrt_hidden_size":
        if hidden_size is None:
            raise ValueError("adjust_lr_fn='sqrt_hidden_size' needs hidden_size (H in 0.2 * sqrt(H)) in the group")
        return update_rms * math.sqrt(hidden_size)
    if adjust_lr_fn == "inverse_rms":
        return 1.0
    raise ValueError(f"unknown adjust_lr_fn {adjust_lr_fn!r}")


def equalize_(stack: Tensor, update_rms: float) -> Tensor:
    """Give every matrix of ``[n, A, B]`` the RMS ``update_rms``, in place; a zero matrix stays zero."""
    norm = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    factor = update_rms * math.sqrt(stack[0].numel()) / norm.masked_fill(norm == 0, 1.0)
    return stack.mul_(factor.to(stack.dtype))


def apply_(param: Tensor, update: Tensor, lr: float, weight_decay: float, lost: Tensor | None = None) -> None:
    """Equation (4) with decoupled decay: ``W <- (1 - lr * weight_decay) W - lr * update``, in place.

    A parameter of half precision is computed in float32 and rounded once, not after each of the two operations;
    ``lost`` is what that rounding has taken from it so far, and is added back first (Kahan, 1965).
    """
    if lost is not None:
        for weight, change, rest in blocks(param, update, lost):
            exact = whole(weight, rest).mul_(1 - lr * weight_decay).add_(change, alpha=-lr)
            split_(exact, weight, rest)
        return
    for weight, change in blocks(param, update):
        if is_half(weight):
            weight.copy_(weight.float().mul_(1 - lr * weight_decay).add_(change, alpha=-lr))
        else:
            weight.mul_(1 - lr * weight_decay).add_(change, alpha=-lr)


def is_half(p: Tensor) -> bool:
    """Whether weights have no float32 of their own to add small updates to."""
    return p.dtype in (torch.bfloat16, torch.float16)


def whole(weight: Tensor, lost: Tensor) -> Tensor:
    """A half-precision weight and what rounding took from it, in float32."""
    return weight.to(torch.float32, copy=True).add_(lost)


def split_(exact: Tensor, weight: Tensor, lost: Tensor) -> None:
    """Round ``exact`` into ``weight``, and keep the rest in ``lost``; ``exact`` is used up."""
    weight.copy_(exact)
    lost.copy_(exact.sub_(weight))


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step by torch's own fused implementation: bit-equal to ``AdamW(fused=True)``, the Trainer's default.

    Where that cannot be (other devices than CPU and GPU; gradients of another type or with other strides than their
    weights), it is the single-tensor one, bit-equal to ``AdamW(foreach=False)``.
    """
    hyper: dict[str, Any] = {"beta1": betas[0], "beta2": betas[1], "lr": lr, "weight_decay": weight_decay, "eps": eps}
    together: dict[bool, list[tuple[Tensor, Tensor, dict[str, Tensor]]]] = {True: [], False: []}
    for p, grad, state in zip(params, grads, states, strict=True):
        if "compensation" in state:  # one by one: each needs a float32 copy
            exact, wide = whole(p, state["compensation"]), grad.float()
            _adamw([(exact, wide, state)], hyper, fused=_fusable(exact, wide, state))
            split_(exact, p, state["compensation"])
        else:
            together[_fusable(p, grad, state)].append((p, grad, state))
    for fused, members in together.items():
        _adamw(members, hyper, fused=fused)


def _fusable(p: Tensor, grad: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether torch's fused kernel, which walks memory and ignores strides, is right for a parameter."""
    others = (grad, state["exp_avg"], state["exp_avg_sq"])
    alike = all(t.dtype == p.dtype and t.stride() == p.stride() for t in others)
    # What a copy has the same strides as lies in memory without gaps.
    dense = p.is_contiguous() or torch.empty_like(p, device="meta").stride() == p.stride()
    return p.device.type in ("cpu", "cuda") and alike and dense


def _adamw(members: list[tuple[Tensor, Tensor, dict[str, Tensor]]], hyper: dict[str, Any], *, fused: bool) -> None:
    params, grads, states = [m[0] for m in members], [m[1] for m in members], [m[2] for m in members]
    adamw(
        params,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        foreach=False,
        fused=fused,
        amsgrad=False,
        maximize=False,
        **hyper,
    )
