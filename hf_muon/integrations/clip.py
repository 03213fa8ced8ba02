"""QK-Clip in training: which weights make which head, their largest logits, and factors for the optimizer."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import clip
from ..analysis.attention import attention_logits, logit_bound
from ..optimizer import Muon
from ..roles import peek
from ..units import Unit
from .attention import observable, visible_keys, watch

_PAIRS = (("q_proj", "k_proj"), ("query", "key"))
# Latent attention normalizes before its last projections, whose rows then make the heads.
_HARMLESS_NORMS = ("q_a_layernorm", "kv_a_layernorm")
_TOLERANCE = 0.05
"""Of norms before and behind the rotary embedding, which is computed in bfloat16 at worst."""


@dataclass(frozen=True, eq=False)
class Heads:
    """How the rows of two projections make the heads of one attention module."""

    name: str
    query: nn.Module
    key: nn.Module
    names: tuple[tuple[str, ...], tuple[str, ...]]
    """Parameters (weight, and bias if there is one) of the query and of the key projection."""
    heads: int
    key_heads: int
    sizes: tuple[int, ...]
    """(head_dim,); or (nope, rope, value) in latent attention."""

    def factors(self, gamma: Tensor) -> dict[str, Tensor]:
        """By parameter name, for [H] gammas."""
        latent = len(self.sizes) == 3
        both = clip.latent(gamma, *self.sizes) if latent else clip.grouped(gamma, self.key_heads, *self.sizes)
        return {name: factor for names, factor in zip(self.names, both, strict=True) for name in names}

    def check(self, query: Tensor, key: Tensor, made: Mapping[nn.Module, Tensor]) -> None:
        """That queries and keys are the projections' outputs, rotated at most: only then do logits scale with rows.

        Raises:
            ValueError: anything else happens in between.
        """
        nope, rope, value = self.sizes if len(self.sizes) == 3 else (*self.sizes, 0, 0)
        for tensor, projection, heads, rest in (
            (query, self.query, self.heads, rope),
            (key, self.key, self.key_heads, value),
        ):
            out = made.get(projection)
            tensor = tensor if out is None else tensor[:, :, tensor.shape[2] - out.shape[-2] :]  # behind a prefix
            batch, _, length, _ = tensor.shape
            if out is None or tensor.shape[1] != heads or out.numel() != batch * length * heads * (nope + rest):
                raise ValueError(self.refusal("its queries and keys do not have the sizes of its projections"))
            before = out.view(batch, length, heads, nope + rest).transpose(1, 2).float()
            parts = [(before[..., :nope], tensor[..., :nope])]
            if projection is self.query and rope:
                parts.append((before[..., nope:], tensor[..., nope:]))
            if not all(_same_up_to_scale(a, b) for a, b in parts):
                raise ValueError(
                    self.refusal("a norm, a clamp or the like comes between its projections and its logits")
                )

    def refusal(self, why: str) -> str:
        """The message for a module that cannot be clipped."""
        return f"qk_clip cannot serve {self.name}: {why}, so that scaling rows would not scale logits. {_REMEDY}"


_REMEDY = "Remedy: leave qk_clip out for this model"


def _same_up_to_scale(before: Tensor, after: Tensor) -> bool:
    """Whether each head's vectors [B, H, T, d] have kept their norms, but for one factor per head."""
    a, b = (torch.linalg.vector_norm(x.float(), dim=-1).transpose(0, 1).flatten(1) for x in (before, after))
    counted = a > 1e-3 * a.amax(dim=1, keepdim=True)
    ratio = torch.where(counted, b / a, torch.nan)
    middle = ratio.nanmedian(dim=1, keepdim=True).values
    return bool(((ratio - middle).abs().nan_to_num() <= _TOLERANCE * middle.abs().nan_to_num()).all())


def find_heads(model: nn.Module) -> dict[nn.Module, Heads]:
    """The attention modules of ``model`` and what makes their heads.

    Raises:
        ValueError: a module whose queries or keys are normalized, clamped, made by a fused, adapted, quantized, frozen
            or shared weight, or otherwise not known to scale with rows; the message names it.
    """
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {module: _heads(name, module, names) for name, module in observable(model).items()}


def _heads(name: str, module: nn.Module, names: Mapping[int, list[str]]) -> Heads:
    where = f"qk_clip cannot serve {name} ({type(module).__name__})"
    norms = [n for n, c in module.named_children() if "norm" in type(c).__name__.lower() and n not in _HARMLESS_NORMS]
    if norms:
        raise ValueError(
            f"{where}: {', '.join(norms)} may normalize its queries and keys, and scaling weights before a norm "
            f"changes nothing; QK-norm bounds the logits by itself. {_REMEDY}"
        )
    if peek(peek(module, "config"), "clip_qkv") is not None:
        raise ValueError(f"{where}: clip_qkv clamps its queries and keys, which then do not scale. {_REMEDY}")
    latent = isinstance(peek(module, "kv_b_proj"), nn.Module)
    query = peek(module, "q_b_proj") if latent and peek(module, "q_b_proj") is not None else peek(module, "q_proj")
    key = peek(module, "kv_b_proj")
    if not latent:
        pairs = [(peek(module, q), peek(module, k)) for q, k in _PAIRS]
        query, key = next(((q, k) for q, k in pairs if q is not None and k is not None), (None, None))
    # The type itself: adapters and quantized layers are subclasses, or stand where the Linear was.
    if type(query) is not nn.Linear or type(key) is not nn.Linear:
        there = [f"{n} ({type(c).__name__})" for n, c in module.named_children()]
        raise ValueError(
            f"{where}: it holds {', '.join(there)}, and QK-Clip needs plain Linears q_proj and k_proj (or q_proj or "
            f"q_b_proj, and kv_b_proj): fused weights, adapters (LoRA) and quantized layers are not served. {_REMEDY}"
        )
    params = tuple(tuple(p for p in (x.weight, x.bias) if p is not None) for x in (query, key))
    for p in (*params[0], *params[1]):
        if not p.requires_grad:
            raise ValueError(
                f"{where}: {names[id(p)][0]} is frozen and would not be scaled. Remedy: train it, or no qk_clip"
            )
        if len(names[id(p)]) > 1:
            raise ValueError(f"{where}: {' and '.join(names[id(p)])} are one parameter of several modules. {_REMEDY}")
    sizes: tuple[Any, ...]
    if latent:
        sizes = tuple(peek(module, n) for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    else:
        sizes = (peek(module, "head_dim") or peek(module, "attention_head_size"),)
    rows = (
        (sizes[0], sizes[0]) if not latent else (sum(sizes[:2]), sizes[0] + sizes[2]) if None not in sizes else (0, 0)
    )
    if not all(rows) or query.out_features % rows[0] or key.out_features % rows[1]:
        raise ValueError(f"{where}: the size of its heads is unknown or does not divide its projections. {_REMEDY}")
    found = tuple(tuple(names[id(p)][0] for p in group) for group in params)
    heads, key_heads = query.out_features // rows[0], key.out_features // rows[1]
    return Heads(name, query, key, (found[0], found[1]), heads, key_heads, sizes)


class QKClip:
    """Watches the logits of a model and tells its optimizer by what to scale rows; made by :func:`attach`.

    The maxima are taken over the training forwards since the last step, of all ranks. Where :func:`logit_bound` already
    says that a layer is below the threshold its logits are not computed. A step that is skipped clips nothing, and what
    was seen before it counts for the next one, which starts from the same weights.
    """

    def __init__(self, model: nn.Module, threshold: float) -> None:
        self.threshold = threshold
        self._heads: weakref.WeakKeyDictionary[nn.Module, Heads] = weakref.WeakKeyDictionary(find_heads(model))
        self._order = list(self._heads.values())
        self._names = {name for h in self._order for names in h.names for name in names}
        self._largest: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        self._handed: set[str] | None = None
        self._clipped, self._least = 0, 1.0
        # Until each module has been checked: what its projections gave.
        self._made: dict[nn.Module, Tensor] = {}
        keep = functools.partial(_keep, self._made)  # not a method: the model must not keep this alive
        self._hooks = {p: p.register_forward_hook(keep) for h in self._order for p in (h.query, h.key)}
        watch(self)

    def see(self, module: nn.Module, implementation: str, query: Tensor, key: Tensor, mask: Any, options: Any) -> None:
        """One call of attention."""
        heads = self._heads.get(module)
        if heads is None:
            return
        if heads.query in self._hooks:
            heads.check(query, key, self._made)
            visible_keys(
                module, implementation, query, key, mask, options
            )  # an unknown mask is an error now, not later
            for projection in (heads.query, heads.key):
                self._hooks.pop(projection).remove()
                self._made.pop(projection, None)
        scaling = options.get("scaling")
        largest = logit_bound(query, key, scaling=scaling)
        if (largest > self.threshold).any():
            visible = visible_keys(module, implementation, query, key, mask, options)
            largest = attention_logits(query, key, scaling=scaling, visible=visible).largest
        # Infinities come with gradients that stop the step.
        largest = torch.where(largest.isfinite(), largest, -torch.inf)
        before = self._largest.get(heads.name)
        self._largest[heads.name] = largest if before is None else torch.maximum(before, largest)

    def __call__(self, unit: Unit) -> dict[str, Tensor]:
        """Factors for the rows of a unit's parameters, before it is stepped; what a new step asks first decides it.

        Raises:
            RuntimeError: no rank has seen any attention since the last step.
        """
        mine = [name for name in unit.names if name in self._names]
        if not mine:
            return {}
        # Engines step unit after unit, all ranks the same; a unit that comes again is of the next step.
        if self._handed is None or not self._handed.isdisjoint(mine):
            self._factors = self._decide(unit.storage.device)
            self._handed = set()
        self._handed.update(mine)
        return {name: self._factors[name] for name in mine if name in self._factors}

    def _decide(self, device: torch.device) -> dict[str, Tensor]:
        unseen = torch.tensor(-torch.inf, device=device)
        rows = [self._largest.get(h.name, unseen.expand(h.heads)).to(device) for h in self._order]
        self._largest = {}
        largest = torch.cat(rows)
        if dist.is_initialized():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        largest = largest.cpu()
        if (largest == -torch.inf).all():
            raise RuntimeError(
                "qk_clip has seen no attention in training mode since the last step, and nothing has been changed: "
                "the model was not run, or a kernel or a compiler has replaced its attention. Remedy: leave that, or "
                "qk_clip, out"
            )
        out: dict[str, Tensor] = {}
        for heads, row in zip(self._order, largest.split([h.heads for h in self._order]), strict=True):
            gamma = clip.gammas(row, self.threshold)
            if (gamma < 1).any():
                self._clipped += int((gamma < 1).sum())
                self._least = min(self._least, float(gamma.min()))
                out.update(heads.factors(gamma))
        return out

    def metrics(self) -> dict[str, float]:
        """``muon/qk_clip/...`` since the last call: ``heads`` that were clipped, and the least gamma, ``min_gamma``."""
        out = {"muon/qk_clip/heads": self._clipped, "muon/qk_clip/min_gamma": self._least}
        self._clipped, self._least = 0, 1.0
        return out


def _keep(made: dict[nn.Module, Tensor], projection: nn.Module, inputs: Any, output: Tensor) -> None:
    if projection.training:
        made[projection] = output.detach()


def attach(model: nn.Module, optimizer: Muon, threshold: float) -> QKClip:
    """Let ``optimizer`` clip the heads of ``model``; ``optim_args="qk_clip=100"`` does it in a Trainer.

    A copy of the optimizer (``copy.deepcopy``, pickle) refuses to step until it is attached itself.

    Args:
        model: as :func:`hf_muon.param_groups` was given it, before an engine wraps it.
        optimizer: of that model.
        threshold: tau; Kimi K2 used 100.

    Raises:
        ValueError: see :func:`find_heads`; or a projection that the optimizer does not train.
    """
    clipping = QKClip(model, threshold)
    trained = {name for group in optimizer.param_groups for name in group.get("param_names", ())}
    lost = sorted(clipping._names - trained)
    if lost:
        raise ValueError(f"qk_clip needs an optimizer of named parameters that trains {lost[0]} too")
    found: Callable[[Unit], Mapping[str, Tensor]] = clipping
    optimizer.row_factors = found
    return clipping
