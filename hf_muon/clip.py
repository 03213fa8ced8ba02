"""QK-Clip, the arithmetic: from the largest logit of each head to factors for rows of query and key weights.

Kimi K2 (arXiv 2507.20534, section 2.1): after the optimizer step, a head whose largest logit S passed tau is scaled by
``gamma = tau / S``, in the weights that make its queries and keys. In multi-head latent attention the parts without
position share it, ``sqrt(gamma)`` each, and the rotary part of the query takes all of it: the rotary key belongs to all
heads. With grouped queries a key head belongs to several query heads, which the report does not treat: here it takes
the square root of the smallest gamma of its group, and each query head what its own gamma still lacks, so that every
head's logits are scaled by its own gamma and by nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .exchange.layout import span_on
from .units import Unit
from .update import split_, whole


def gammas(largest: Tensor, threshold: float) -> Tensor:
    """``min(1, tau / S)`` per head, float32; 1 where S is not finite, for the gradients of such a step are not either.

    Args:
        largest: [H] largest logits.
        threshold: tau.
    """
    over = (largest > threshold) & largest.isfinite()
    return torch.where(over, threshold / largest.clamp(min=threshold), 1.0).float()


def grouped(gamma: Tensor, key_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Factors for the rows of ``q_proj`` [H * head_dim] and of ``k_proj`` [Hk * head_dim]; biases alike."""
    per_group = gamma.view(key_heads, -1)
    key = per_group.amin(dim=1, keepdim=True).sqrt()
    return (per_group / key).flatten().repeat_interleave(head_dim), key.flatten().repeat_interleave(head_dim)


def latent(gamma: Tensor, nope: int, rope: int, value: int) -> tuple[Tensor, Tensor]:
    """Factors for the rows of the query projection [H * (nope + rope)] and of ``kv_b_proj`` [H * (nope + value)]."""
    root, one = gamma.sqrt()[:, None], torch.ones_like(gamma)[:, None]
    query = torch.cat((root.expand(-1, nope), gamma[:, None].expand(-1, rope)), dim=1)
    return query.flatten(), torch.cat((root.expand(-1, nope), one.expand(-1, value)), dim=1).flatten()


@torch.no_grad()
def rescale_(unit: Unit, factors: Mapping[str, Tensor], lost: Sequence[Tensor | None]) -> None:
    """Scale the rows of parameters of a unit, in whatever part of them is stored here.

    Args:
        unit: whose weights have just been updated.
        factors: by parameter name, one factor per row (per element of a vector); others are left alone.
        lost: by parameter, what rounding has taken from its weights (``kahan_sum``): it is scaled with them.
    """
    weights = unit.weights()
    named = [(i, factors[name]) for i, name in enumerate(unit.names) if name in factors]
    for i, factor in named:
        start, stop = span_on(unit.storage.placements[i], unit.storage.rank, unit.numels[i])
        if start == stop:
            continue
        width = unit.numels[i] // factor.numel()
        first, last = start // width, math.ceil(stop / width)
        each = factor[first:last].to(weights[i].device).repeat_interleave(width)
        each = each[start - first * width : stop - first * width]
        if (rest := lost[i]) is None:
            weights[i].mul_(each)
        else:
            scaled = each != 1  # the others keep their bits: rounding their whole again could turn a tie
            part, left = weights[i][scaled], rest[scaled]
            split_(whole(part, left).mul_(each[scaled]), part, left)
            weights[i][scaled], rest[scaled] = part, left
    if named:
        unit.storage.write_back(weights)


def not_copied(unit: Unit) -> Mapping[str, Tensor]:
    """In place of factors in a copy of an optimizer, which does not hold the model that they come from."""
    raise RuntimeError(
        f"this copy of an optimizer with qk_clip does not know the model (in the step of {unit.names[0]}): "
        "hf_muon.integrations.clip.attach(model, optimizer, threshold) makes it clip; or set row_factors to None"
    )
