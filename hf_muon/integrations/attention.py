"""Attention logits of a model in training, as transformers' attention functions are given queries and keys.

Every model of transformers 5 asks ``AttentionInterface.get_interface`` for its attention function and calls it with
queries and keys behind the rotary embedding. While somebody watches, and only then, that method is replaced by one
whose answer also shows them to the watchers; attention itself is computed as before.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_utils import AttentionInterface

from ..analysis.attention import THRESHOLD, Logits, Visible, attention_logits
from .measuring import MeasuringCallback, in_training_forward

_CALLS = {"ALL_ATTENTION_FUNCTIONS", "get_interface"}


class Watcher(Protocol):
    """Sees each call of attention in a training forward, once."""

    def see(self, module: nn.Module, implementation: str, query: Tensor, key: Tensor, mask: Any, options: Any) -> None:
        """``query`` [B, H, Tq, D] and ``key`` [B, Hk, Tk, D], with what else the attention function was given."""


_watchers: list[weakref.ref[Any]] = []
# What was there, and what we put there.
_patch: tuple[Any, Any] | None = None
_INTERFACE: Any = AttentionInterface


def watch(watcher: Watcher) -> None:
    """Show ``watcher`` every call from now on, until :func:`unwatch`; it is held weakly."""
    global _patch
    if all(ref() is not watcher for ref in _watchers):
        _watchers.append(weakref.ref(watcher, _drop))
    if _patch is None:
        original = _INTERFACE.get_interface
        _patch = original, _shown(original)
        _INTERFACE.get_interface = _patch[1]


def unwatch(watcher: Watcher) -> None:
    """The opposite of :func:`watch`; without watchers, transformers is as it was."""
    for ref in [r for r in _watchers if r() is watcher]:
        _drop(ref)


def _drop(ref: weakref.ref[Any]) -> None:
    global _patch
    if ref in _watchers:
        _watchers.remove(ref)
    # Where somebody has wrapped ours, taking ours out would take theirs out too; without a watcher it shows nobody.
    if not _watchers and _patch is not None and _INTERFACE.get_interface is _patch[1]:
        _INTERFACE.get_interface, _patch = _patch[0], None


def _shown(original: Any) -> Any:
    @functools.wraps(original)
    def get_interface(self: AttentionInterface, attn_implementation: str, default: Any) -> Any:
        function = original(self, attn_implementation, default)

        @functools.wraps(function)
        def attend(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any = None,
            *a: Any,
            **options: Any,
        ) -> Any:
            # What is being compiled cannot be watched.
            if not torch.compiler.is_compiling() and in_training_forward(module):
                # Without a graph: checkpointing compares the tensors that both forwards saved for it.
                with torch.no_grad():
                    for watcher in [ref() for ref in _watchers]:
                        if watcher is not None:
                            watcher.see(module, attn_implementation, query, key, attention_mask, options)
            return function(module, query, key, value, attention_mask, *a, **options)

        return attend

    return get_interface


def observable(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of ``model`` that call transformers' attention interface, by name.

    Raises:
        ValueError: there is none; the message names the model and the remedy.
    """
    found = {
        name.replace("_checkpoint_wrapped_module.", ""): module
        for name, module in model.named_modules()
        if any(names >= _CALLS for names in _names_in_code(type(module)))  # type: ignore[arg-type]
    }
    if not found:
        raise ValueError(
            f"the attention of {type(model).__name__} cannot be observed: none of its modules calls transformers' "
            "attention interface. Remedy: leave attention logits and qk_clip out, or use a model class of transformers "
            "5 that takes attn_implementation (Llama, Qwen, DeepSeek-V3, ...)"
        )
    return found


@functools.cache
def _names_in_code(cls: Any) -> tuple[frozenset[str], ...]:
    functions = [f for base in cls.__mro__ if base is not nn.Module for f in vars(base).values()]
    return tuple(
        frozenset(inspect.unwrap(f).__code__.co_names)
        for f in functions
        if isinstance(f, FunctionType) and isinstance(inspect.unwrap(f), FunctionType)
    )


def visible_keys(
    module: nn.Module, implementation: str, query: Tensor, key: Tensor, mask: Any, options: Any
) -> Visible:
    """What the attention function of this name makes of a mask and of the options that it is given.

    Raises:
        ValueError: an attention function that is not one of transformers'.
    """
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if isinstance(mask, BlockMask):
        return Visible(function=mask.mask_mod)
    if "flash" in (implementation or ""):
        segments = _segments(options, query) if mask is None else None
        return Visible(
            causal=bool(causal),
            offset=key.shape[2] - query.shape[2],  # FlashAttention aligns the last query with the last key
            window=options.get("sliding_window"),
            keys=mask,
            segments=segments,
        )
    if implementation not in ("eager", "sdpa", "flex_attention", None):
        raise ValueError(
            f"{type(module).__name__} attends with {implementation!r}, whose masks are not known here. Remedy: "
            "attn_implementation eager, sdpa, flash_attention_2 (3, 4, or its kernel) or flex_attention"
        )
    # Without a mask SDPA is causal by itself; eager and flex attend to everything.
    return Visible(causal=bool(causal) and mask is None and implementation == "sdpa" and query.shape[2] > 1, dense=mask)


def _segments(options: Any, query: Tensor) -> Tensor | None:
    """Which packed sequence each token is of, as FlashAttention is told it or infers it from positions."""
    length, bounds = query.shape[2], options.get("cu_seq_lens_q")
    if bounds is not None:
        starts = torch.zeros(length + 1, dtype=torch.int64, device=query.device)
        starts[bounds.to(query.device).long()] = 1
        return starts[:length].cumsum(0)[None]
    positions = options.get("position_ids")
    if positions is None or query.shape[0] != 1 or length == 1:
        return None
    positions = positions.reshape(-1)[-length:]
    return (positions == positions.min()).long().cumsum(0)[None]


def label(name: str, names: Iterable[str]) -> str:
    """The number of a layer; its whole name where that is not the only one with the number."""

    def number(text: str) -> str | None:
        return next((part for part in text.split(".") if part.isdigit()), None)

    mine = number(name)
    return mine if mine is not None and [number(n) for n in names].count(mine) == 1 else name


class AttentionLogitsCallback(MeasuringCallback):
    """Logs the largest attention logits (figure 7 of the paper): ``callbacks=[AttentionLogitsCallback(100)]``.

    In every ``steps``-th optimizer step (counted from 1) each training forward is measured, over all micro-batches and
    ranks; in between nothing is watched. The next training log then holds ``attention/max_logit`` (the largest of the
    model), ``attention/max_logit/LAYER`` and ``attention/share_above_100``: how many of all logits, in all layers and
    heads, are above 100. What a logit is: :mod:`hf_muon.analysis.attention`.

    Args:
        steps: measure every so many optimizer steps.

    Raises:
        ValueError: ``steps`` below 1; when training begins, a model that cannot be observed.
        RuntimeError: in the first measured step, if no attention was seen.
    """

    option = "attention_logits_steps"

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self._labels: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._found: dict[str, Logits] = {}

    def find(self, model: nn.Module) -> None:
        """The modules that call attention."""
        found = observable(model)
        self._labels.clear()
        for name, module in found.items():
            self._labels[module] = label(name, found)

    def begin(self) -> None:
        """Watch one step."""
        self._found = {}
        watch(self)

    def end(self) -> None:
        """Leave transformers as it was."""
        unwatch(self)

    def see(self, module: nn.Module, implementation: str, query: Tensor, key: Tensor, mask: Any, options: Any) -> None:
        """One call of attention."""
        name = self._labels.get(module)
        if name is not None:
            visible = visible_keys(module, implementation, query, key, mask, options)
            new = attention_logits(query, key, scaling=options.get("scaling"), visible=visible)
            self._found[name] = self._found[name] | new if name in self._found else new

    def summary(self, device: torch.device) -> dict[str, float]:
        """Two small all-reduces."""
        names = sorted(set(self._labels.values()), key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n))
        found, self._found = self._found, {}
        return _summary(found, names, device)


def _summary(found: Mapping[str, Logits], names: list[str], device: torch.device) -> dict[str, float]:
    """Over all ranks. A layer that a rank did not use (no image in its batch) may be another rank's."""
    missing = torch.tensor(-torch.inf, device=device)
    largest = torch.stack([found[n].largest.max().to(device) if n in found else missing for n in names])
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for logits in found.values():
        counts += torch.stack([logits.above, logits.total]).to(counts)
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        dist.all_reduce(counts)
    above, total = counts.tolist()
    if total == 0:
        raise RuntimeError(
            "no attention was seen in a step that should be measured: a kernel or a compiler has replaced the forward "
            "of the model's attention. Remedy: leave that, or attention_logits_steps, out"
        )
    values = {f"attention/max_logit/{n}": v for n, v in zip(names, largest.tolist(), strict=True) if v != -torch.inf}
    return {
        "attention/max_logit": max(values.values()),
        **values,
        f"attention/share_above_{THRESHOLD:.0f}": above / total,
    }
