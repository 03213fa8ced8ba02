"""The arithmetic of one step, as stateless functions: momentum, scale, decay and apply, and AdamW for the rest.

Elementwise functions work on any slice of a parameter; only :func:`scale_` must see whole matrices, and it takes
their logical shape rather than reading it off a tensor, so that a shard can never be mistaken for a matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .config import SCALE_ALIASES


def accumulate_(momentum_buffer: Tensor, grad: Tensor, momentum: float) -> None:
    """Equation (1): ``M <- mu M + G``. A sum, not an average; ``grad`` may be of lower precision."""
    momentum_buffer.mul_(momentum).add_(grad)


def direction(grad: Tensor, momentum_buffer: Tensor, momentum: float, nesterov: bool) -> Tensor:
    """What is orthogonalized: ``G + mu M`` (Nesterov, footnote 1 of the paper) or ``M``."""
    return torch.add(grad, momentum_buffer, alpha=momentum) if nesterov else momentum_buffer


def scale_(
    stack: Tensor, shape: tuple[int, int], adjust_lr_fn: str, update_rms: float, hidden_size: int | None = None
) -> Tensor:
    """Scale orthogonalized matrices ``[n, ...]`` of logical ``shape`` (A output rows, B input columns), in place.

    The factors are those of section 3.1 and Table 1 of the paper, and torch's default:

    * ``sqrt_max_dims``: ``update_rms * sqrt(max(A, B))`` ("Adjusted LR", equation (4));
    * ``inverse_rms``: ``update_rms / RMS(O)`` ("Update Norm"), per matrix;
    * ``sqrt_hidden_size``: ``update_rms * sqrt(hidden_size)`` ("Baseline");
    * ``original``: ``sqrt(max(1, A / B))``, without ``update_rms``.
    """
    a, b = shape
    adjust_lr_fn = SCALE_ALIASES.get(adjust_lr_fn, adjust_lr_fn)
    if adjust_lr_fn == "sqrt_max_dims":
        return stack.mul_(update_rms * math.sqrt(max(a, b)))
    if adjust_lr_fn == "original":
        return stack.mul_(math.sqrt(max(1.0, a / max(b, 1))))
    if adjust_lr_fn == "sqrt_hidden_size":
        if hidden_size is None:
            raise ValueError("adjust_lr_fn='sqrt_hidden_size' needs hidden_size (H in 0.2 * sqrt(H)) in the group")
        return stack.mul_(update_rms * math.sqrt(hidden_size))
    if adjust_lr_fn == "inverse_rms":
        norm = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True, dtype=torch.float32)
        factor = update_rms * math.sqrt(a * b) / norm.masked_fill(norm == 0, 1.0)
        return stack.mul_(factor.to(stack.dtype))
    raise ValueError(f"unknown adjust_lr_fn {adjust_lr_fn!r}")


def apply_(param: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
    """Equation (4) with decoupled decay: ``W <- (1 - lr * weight_decay) W - lr * update``, in place.

    A parameter of half precision is computed in float32 and rounded once, not after each of the two operations.
    """
    if param.dtype in (torch.bfloat16, torch.float16):
        param.copy_(param.float().mul_(1 - lr * weight_decay).add_(update, alpha=-lr))
    else:
        param.mul_(1 - lr * weight_decay).add_(update, alpha=-lr)


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
    """One AdamW step by torch's own single-tensor implementation, hence bit-equal to ``AdamW(foreach=False)``."""
    adamw(
        params,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        foreach=False,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
