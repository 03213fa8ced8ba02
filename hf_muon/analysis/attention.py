"""The largest attention logits, exactly, from the queries and keys that an attention kernel is given.

A logit is ``scaling * q . k`` of a query and a key that it may attend to, with whatever rotary embedding the model has
applied; biases, soft caps and sinks come later and are not in it. Products are summed in float32, so that the numbers
are the same whichever kernel (eager, SDPA, FlashAttention, flex) then attends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLD = 100.0
"""Above it a logit counts as large: figure 7 of the paper, and tau of Kimi K2's QK-Clip (arXiv 2507.20534)."""
_CAUSAL_ROWS = 128
"""Queries at a time where later ones see more keys: what none of them sees is not computed."""
BUDGET = 2**24
"""Logits held at a time: 64 MiB in float32, whatever the length of the sequence."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Visible:
    """Which keys each query may attend to; all that is given must allow it.

    Queries at padding are left out of every number, as FlashAttention leaves them out of its work. Where queries and
    keys are equally many, that is a query that may not attend to the key at its own position.
    """

    causal: bool = False
    """A query sees keys up to its own position."""
    offset: int = 0
    """Position of the first query among the keys."""
    window: int | None = None
    """A query sees this many keys up to its own; a bidirectional window sees as many after it."""
    keys: Tensor | None = None
    """[B, Tk]: false or zero at padding."""
    segments: Tensor | None = None
    """[B or 1, T]: number of the packed sequence that a token belongs to; only within it is attended."""
    dense: Tensor | None = None
    """[B or 1, H or 1, Tq, Tk or more]: true where visible, or added to logits: the dtype's minimum where not."""
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    """A ``mask_mod`` of flex attention: (batch, head, query, key) to bool."""

    def seen(self, start: int, stop: int, keys: int) -> tuple[int, int]:
        """Of ``keys``: how many all queries from ``start`` to ``stop`` see, and behind how many none sees any."""
        others = (self.window, self.keys, self.segments, self.dense, self.function)
        only_causal = self.causal and all(x is None for x in others)
        free = start + self.offset + 1 if only_causal else 0
        last = stop + self.offset if self.causal else keys
        return min(max(free, 0), keys), min(max(last, 1), keys)

    def block(self, start: int, stop: int, shape: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
        """Queries ``start`` to ``stop`` of ``shape`` (B, H, Tq, Tk): bool, broadcasts to [B, H, stop - start, Tk].

        None if they see everything.
        """
        batch, heads, queries, keys = shape
        rows = torch.arange(start, stop, device=device).view(1, 1, -1, 1)
        columns = torch.arange(keys, device=device).view(1, 1, 1, -1)
        parts = []
        if self.causal:
            parts.append(columns <= rows + self.offset)
        if self.window is not None:
            parts.append((rows + self.offset - columns).abs() < self.window)
        if self.keys is not None:
            real = self.keys.bool()
            parts.append(real[:, None, None, :])
            if queries == keys:
                parts.append(real[:, None, start:stop, None])
        if self.segments is not None:
            parts.append(self.segments[:, None, start:stop, None] == self.segments[:, None, None, :])
        if self.dense is not None:
            parts.append(_allowed(self.dense[:, :, start:stop, :keys]))
            if queries == keys:
                own = self.dense[:, :, :, :keys].diagonal(dim1=-2, dim2=-1)[:, :, start:stop, None]
                parts.append(_allowed(own))
        if self.function is not None:
            b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
            h = torch.arange(heads, device=device).view(1, -1, 1, 1)
            # Written for single indices; what flex attention can compile is elementwise, and so broadcasts.
            parts.append(self.function(b, h, rows, columns))
            if queries == keys:
                parts.append(self.function(b, h, rows, rows))
        out = None
        for part in parts:
            out = part if out is None else out & part
        return out


def _allowed(mask: Tensor) -> Tensor:
    # Additive masks hold the dtype's minimum, or an infinity; half of it is far below any bias that a model adds.
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()


@dataclass(frozen=True, eq=False)
class Logits:
    """What one call of attention showed, on the device of its queries; add two up with ``|``."""

    largest: Tensor
    """[H], float32: the largest logit of each query head; minus infinity where nothing was visible."""
    above: Tensor
    """int64: how many logits, over all heads, are above the threshold."""
    total: Tensor
    """int64: how many there are."""

    def __or__(self, other: Logits) -> Logits:
        return Logits(torch.maximum(self.largest, other.largest), self.above + other.above, self.total + other.total)


@torch.no_grad()
def attention_logits(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float | None = None,
    visible: Visible | None = None,
    threshold: float = THRESHOLD,
    budget: int = BUDGET,
) -> Logits:
    """The largest logit of each head, and the number above ``threshold``, without holding all of them.

    Args:
        query: [B, H, Tq, D], as the kernel gets them: after the rotary embedding.
        key: [B, Hk, Tk, D]; H is a multiple of Hk, and query head h reads key head ``h // (H / Hk)``.
        scaling: of the products; default ``D ** -0.5``.
        visible: what may be attended to; default everything.
        threshold: see above.
        budget: logits held at a time, at least those of one query.

    Raises:
        ValueError: heads that do not divide, or a ``scaling`` that is not positive.
    """
    batch, heads, queries, size = query.shape
    groups, keys = key.shape[1], key.shape[2]
    if heads % groups:
        raise ValueError(f"{heads} query heads do not divide over {groups} key heads")
    query, key = _as_the_kernel_sees(query), _as_the_kernel_sees(key)
    scaling = size**-0.5 if scaling is None else float(scaling)
    if not scaling > 0:
        raise ValueError(f"scaling must be positive, got {scaling}")
    visible = visible or Visible()
    # Where no logit can be above the threshold none is counted, which saves a pass over them.
    some = bool((logit_bound(query, key, scaling=scaling) > threshold).any())
    largest = torch.full((groups, heads // groups), -math.inf, device=query.device)
    above = torch.zeros((), dtype=torch.int64, device=query.device)
    total = torch.zeros_like(above)
    rows = max(1, min(budget // max(1, batch * heads * keys), _CAUSAL_ROWS if visible.causal else queries))
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        free, last = visible.seen(start, stop, keys)
        part = query[:, :, start:stop].reshape(batch * groups, -1, size)
        scores = _product(part, key[:, :, :last].reshape(batch * groups, last, size))
        scores = scores.view(batch, heads, stop - start, last)
        mask = visible.block(start, stop, (batch, heads, queries, keys), query.device) if free < last else None
        total += scores[..., :free].numel() if mask is not None else scores.numel()
        if mask is not None:
            mask, masked = mask[..., free:last], scores[..., free:]
            masked.masked_fill_(~mask, -math.inf)
            total += mask.sum() * (masked.numel() // max(1, mask.numel()))
        largest = torch.maximum(largest, scores.amax(dim=(0, 2, 3)).view_as(largest))
        if some:
            above += (scores > threshold / scaling).sum()
    return Logits(largest.flatten() * scaling, above, total)


@torch.no_grad()
def logit_bound(query: Tensor, key: Tensor, *, scaling: float | None = None) -> Tensor:
    """[H]: what no logit of a head can exceed, ``|scaling| max |q| max |k|``; shapes as in :func:`attention_logits`.

    It reads queries and keys once, where the logits themselves cost a product.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q, k = (torch.linalg.vector_norm(_as_the_kernel_sees(x).float(), dim=-1).amax(dim=(0, 2)) for x in (query, key))
    # A little above: norms are rounded too.
    return q * k.repeat_interleave(q.numel() // k.numel()) * abs(scaling) * (1 + 1e-5)


def _as_the_kernel_sees(tensor: Tensor) -> Tensor:
    """Under autocast attention is computed from rounded queries and keys."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind):
        return tensor.detach().to(torch.get_autocast_dtype(kind))
    return tensor.detach()


def _product(query: Tensor, key: Tensor) -> Tensor:
    """``query @ key^T`` of [n, T, D], summed and kept in float32."""
    with torch.autocast(query.device.type, enabled=False):
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            return torch.bmm(query, key.mT, out_dtype=torch.float32)
        return torch.bmm(query.float(), key.float().mT)
