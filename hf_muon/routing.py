"""Which parameter goes where: a model to routes.

Muon trains hidden matrices. Embeddings, heads, norms, biases, tables and vectors are AdamW's. Every decision is made
by structure (the module that owns the parameter, its shape, where it sits) and carries its reason. What looks like
several matrices but cannot be read as such is an error that names the parameter and the remedy.
"""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatchcase
from typing import Any, TextIO

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .config import MuonConfig
from .layouts import Options, Place, cut_layout, module_layout, raw_layout, shape_of
from .matrices import MatrixLayout
from .report import Report
from .roles import Roles, embeddings, heads, is_convolution
from .routes import Route

__all__ = ["Report", "Route", "explain", "route"]

_REMEDY = (
    "put its name into include (Muon trains it as one matrix, or one per leading index) or exclude (AdamW's), or "
    "set split_fused=false (no fused weight is cut)"
)


def route(model: nn.Module, config: MuonConfig | None = None) -> list[Route]:
    """Every trainable parameter of ``model`` exactly once, in the model's order.

    Raises:
        ValueError: no trainable or no Muon parameter; one that is not floating or is quantized; a fused weight or a
            stack of matrices whose layout is unknown; include or exclude patterns that match nothing or contradict.
    """
    config = MuonConfig.merged(config, {})
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model (nn.Module) is routed, got a {type(model).__name__}")
    places, tied, parameters = _places(model)
    if not places:
        raise ValueError(
            "the model has no trainable parameter: unfreeze some, or attach adapters, before the optimizer"
        )
    overrides = _overrides(config, {n: (n, *tied[n]) for n in places})
    inputs, outputs = embeddings(model), heads(model)
    routes = []
    for name, place in places.items():
        parameter = parameters[name]
        _check_tensor(name, parameter)
        try:
            found = _decide(place, parameter, inputs, outputs, config, overrides.get(name))
        except ValueError as error:
            remedy = "drop it from include" if overrides.get(name) else _REMEDY
            raise ValueError(f"{name} {list(place.shape)}: {error}; {remedy}") from error
        routes.append(Route(name, parameter, "muon" if found[2] else "adamw", *found, tied[name]))
    if not any(r.algorithm == "muon" for r in routes):
        raise ValueError(
            f"Muon would train none of the {len(routes)} trainable parameters (all are embeddings, heads, vectors or "
            "excluded): use AdamW for this run, or name hidden matrices in include"
        )
    return routes


def explain(
    model: nn.Module, config: MuonConfig | None = None, *, file: TextIO | None = None, **overrides: Any
) -> Report:
    """Print and return which parameters Muon would train, which AdamW, and why.

    Args:
        model: the model to train.
        config: options.
        file: where to print; default standard output.
        **overrides: fields of :class:`MuonConfig` by name; they win over ``config``.
    """
    report = Report(tuple(route(model, MuonConfig.merged(config, overrides))))
    print(report, file=file or sys.stdout)
    return report


def _places(model: nn.Module) -> tuple[dict[str, Place], dict[str, tuple[str, ...]], dict[str, nn.Parameter]]:
    """Trainable parameters by first name, the other names of each, and the tensors."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
            tensors[id(parameter)] = parameter
    places, tied, parameters = {}, {}, {}
    for key, (first, *others) in names.items():
        parts = first.split(".")
        path = tuple(modules[".".join(parts[:i])] for i in range(len(parts)))
        places[first] = Place(first, shape_of(tensors[key]), path)
        tied[first], parameters[first] = tuple(others), tensors[key]
    return places, tied, parameters


Decision = tuple[str, str, "MatrixLayout | None"]


def _decide(
    place: Place, parameter: nn.Parameter, inputs: Roles, outputs: Roles, config: MuonConfig, override: str | None
) -> Decision:
    """The structural decision, unless include or exclude overrides it."""
    if override == "exclude":
        # A norm stays a norm: what decides about its weight decay is what it is, not who asked for AdamW.
        kind = _vector(place)[0] if len(place.shape) < 2 else "excluded"
        return kind, "matched by exclude", None
    if override is None:
        return _classify(place, parameter, inputs, outputs, config)
    if len(place.shape) < 2:
        raise ValueError("matched by include, but it is no matrix")
    try:
        found = _classify(place, parameter, inputs, outputs, config)
    except ValueError:
        found = ("included", "", None)  # the layout that nobody knows: one matrix, as asked
    if found[2] is not None:
        return found
    batch = 0 if is_convolution(place.module) else len(place.shape) - 2
    return "included", "matched by include", MatrixLayout(place.shape, batch=batch)


def _classify(place: Place, parameter: nn.Parameter, inputs: Roles, outputs: Roles, config: MuonConfig) -> Decision:
    """Kind, reason and layout of one parameter, by structure."""
    shape, module = place.shape, place.module
    if len(shape) < 2 or ("norm" in type(module).__name__.lower() and not isinstance(module, nn.Linear)):
        return _vector(place)
    for kind, roles in (("embedding", inputs), ("head", outputs)):
        if id(parameter) in roles:
            return kind, roles[id(parameter)], None
    if "lora_embedding_A" in place.parts or "lora_embedding_B" in place.parts:
        return "lora", "LoRA factor of an embedding", None
    if "parametrizations" in place.parts or (place.attr in ("weight_g", "weight_v") and hasattr(module, "weight_g")):
        # Weight norm divides by the norm of this tensor: its scale means nothing, nor does an update of set size.
        return "vector", "part of a parametrization, not the matrix itself", None
    if sum(d > 1 for d in shape) < 2 or 1 in (shape[0], shape[1]) and len(shape) == 2:
        return "vector", "one row or column", None
    options = Options(config.split_fused, config.per_head)
    factor = next((part for part in place.parts if part in ("lora_A", "lora_B")), None)
    if factor:
        return _lora(place, factor, options, config.lora)
    if is_convolution(module) and module.in_channels == module.groups:
        return "conv", "depthwise: one column of taps per channel, nothing is mixed", None
    layout = module_layout(place, options)
    if layout is not None:
        kind = _label(place)
        return kind, f"hidden matrix ({type(module).__name__})", layout
    raw = raw_layout(place, options)
    if raw is not None:
        return raw[0], f"hidden {raw[0]} held as a raw parameter of {type(module).__name__}", raw[1]
    if place.attr.endswith("bias"):
        return "bias", "bias", None
    return "table", f"raw parameter of {type(module).__name__}: a table or constant, no matrix", None


def _vector(place: Place) -> Decision:
    if place.attr.endswith("bias"):
        return "bias", "bias", None
    if "norm" in type(place.module).__name__.lower():
        return "norm", "norm gain", None
    return "vector", "vector or scalar", None


def _lora(place: Place, factor: str, options: Options, choice: str) -> Decision:
    """Both factors are hidden matrices; B's rows are the outputs of the layer it adapts, and cut like them."""
    if factor == "lora_A" and choice == "B":
        return "lora", "LoRA A factor, lora=B", None
    depth = place.parts.index(factor)
    layer, shape = place.path[depth], place.shape
    experts = getattr(layer, "num_experts", 1)
    if experts > 1 and len(shape) == 2:
        # PEFT keeps A as [E r, in] and B as [out, r E], the expert running fastest.
        if factor == "lora_A":
            return "lora", "LoRA factor, per expert", MatrixLayout(shape, groups=experts)
        return (
            "lora",
            "LoRA factor, per expert",
            MatrixLayout(shape, dim=1, blocks=shape[1] // experts, sizes=(1,) * experts),
        )
    if factor == "lora_B" and len(shape) == 2 and options.split:
        above = Place(".".join(place.parts[:depth]), shape, place.path[:depth])
        layout = cut_layout(above, options)
    else:
        layout = MatrixLayout(shape)
    return "lora", f"LoRA factor {factor[-1]}", layout


# Words in the names of classes and attributes around a matrix, first match counts; a label for reports and logs only.
_LABELS = (
    ("shared_experts", re.compile(r"shared_?(experts?|mlp)", re.IGNORECASE)),
    ("experts", re.compile(r"experts", re.IGNORECASE)),
    ("router", re.compile(r"router|topkgat|gating", re.IGNORECASE)),
    ("attention", re.compile(r"attention|attn|\bmixer|deltanet", re.IGNORECASE)),
    ("mlp", re.compile(r"mlp|ffn?\b|feed_?forward|dense|intermediate|output", re.IGNORECASE)),
)


def _label(place: Place) -> str:
    if is_convolution(place.module):
        return "conv"
    near = [*place.parts[-5:-1], *(type(m).__name__ for m in place.path[-4:-1])]
    return next((kind for kind, words in _LABELS if any(words.search(n) for n in near)), "projection")


def _overrides(config: MuonConfig, names: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """First name of a parameter to ``include`` or ``exclude``; tied names count too."""
    found: dict[str, str] = {}
    for option, patterns in (("include", config.include), ("exclude", config.exclude)):
        for pattern in patterns:
            hits = [first for first, all_names in names.items() if any(fnmatchcase(n, pattern) for n in all_names)]
            if not hits:
                raise ValueError(
                    f"{option} pattern {pattern!r} matches no trainable parameter: patterns are shell globs over the "
                    f"whole name, e.g. '*q_proj*'; names look like {next(iter(names))!r}"
                )
            for name in hits:
                if found.setdefault(name, option) != option:
                    raise ValueError(f"{name} is matched by include and by exclude ({pattern!r}): drop it from one")
    return found


# What arithmetic on storage works for: quantized and wrapped tensors are subclasses of these.
_PLAIN = (torch.Tensor, nn.Parameter, DTensor)


def _check_tensor(name: str, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point() or type(parameter) not in _PLAIN or type(parameter.data) not in _PLAIN:
        raise ValueError(
            f"{name} is trainable but a {type(parameter.data).__name__} of {parameter.dtype}, not plain floats: "
            "freeze it (quantized models train through adapters) or convert it"
        )
