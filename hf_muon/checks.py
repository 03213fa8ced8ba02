"""What Muon refuses, before anything is changed: groups at construction, parameters and gradients at each step."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .coefficients import schedule
from .config import NS_DTYPES, SCALE_ALIASES, SCALES
from .matrices import MatrixLayout

logger = logging.getLogger("hf_muon")

ALGORITHMS = ("muon", "adamw")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """``value`` if it is a finite number in ``[low, high)``.

    Raises:
        TypeError: a tensor: schedulers write ``group["lr"]``, and a tensor closed over elsewhere would drift from it.
        ValueError: anything else that is not such a number.
    """
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Python number, got a tensor {value!r}: pass {name}.item()")
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) < high:
        raise ValueError(f"{name} must be a number in [{low}, {high}), got {value!r}")
    return float(value)


def positive_int(name: str, value: Any) -> int:
    """``value`` if it is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def ns_dtype_name(value: str | torch.dtype) -> str:
    """``"bfloat16"`` or ``"float32"``, from either spelling; the name is what state dicts hold."""
    name = str(value).removeprefix("torch.")
    if name not in NS_DTYPES:
        raise ValueError(f"ns_dtype must be one of {', '.join(NS_DTYPES)}, got {value!r}")
    return name


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    """All numbers and choices of one group."""
    if group["algorithm"] not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {group['algorithm']!r}")
    number("lr", group["lr"], 0.0)
    number("weight_decay", group["weight_decay"], 0.0)
    if not isinstance(group["kahan_sum"], bool):
        raise ValueError(f"kahan_sum must be True or False, got {group['kahan_sum']!r}")
    if group["algorithm"] == "adamw":
        if not isinstance(group["betas"], (tuple, list)) or len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers, got {group['betas']!r}")
        number("betas[0]", group["betas"][0], 0.0, 1.0)
        number("betas[1]", group["betas"][1], 0.0, 1.0)
        number("eps", group["eps"], 0.0)
        return
    number("momentum", group["momentum"], 0.0, 1.0)
    if number("update_rms", group["update_rms"], 0.0) == 0.0:
        raise ValueError("update_rms must be positive, got 0")
    if not isinstance(group["nesterov"], bool):
        raise ValueError(f"nesterov must be True or False, got {group['nesterov']!r}")
    if group["momentum_dtype"] not in NS_DTYPES:
        choices = ", ".join(NS_DTYPES)
        raise ValueError(f"momentum_dtype must be one of {choices}, got {group['momentum_dtype']!r}")
    if group["adjust_lr_fn"] not in (*SCALES, *SCALE_ALIASES):
        choices = ", ".join((*SCALES, *SCALE_ALIASES))
        raise ValueError(f"adjust_lr_fn must be one of {choices}, got {group['adjust_lr_fn']!r}")
    if group["adjust_lr_fn"] == "sqrt_hidden_size" and not group.get("hidden_size"):
        raise ValueError(
            "adjust_lr_fn='sqrt_hidden_size' needs hidden_size, the H of 0.2 * sqrt(H): the model's config "
            "has none, so give hidden_size in the group"
        )
    schedule(group["ns_coefficients"], group["ns_steps"])


def names(group: Mapping[str, Any]) -> list[str]:
    """A name for each parameter of a group, for messages."""
    given = group.get("param_names")
    return list(given) if given else [f"parameter {i}" for i in range(len(group.get("shapes", group["params"])))]


def check_parameters(group: Mapping[str, Any]) -> None:
    """Dtypes, duplicates and, under Muon, that every parameter has a matrix layout of its own shape."""
    if not group["params"]:
        raise ValueError(f"empty {group['algorithm']!r} parameter group: leave it out, or check what should be in it")
    if len({id(p) for p in group["params"]}) != len(group["params"]):
        raise ValueError("a parameter appears twice in one group: tied weights must be given once")
    half = [name for name, p in zip(names(group), group["params"], strict=True) if p.dtype == torch.float16]
    if half:
        logger.warning(
            "%s (and %d more) has float16 weights: AdamW's eps=1e-8 is 0 there and updates round away; load the model "
            "in float32 (with fp16=True for the arithmetic) or in bfloat16",
            half[0],
            len(half) - 1,
        )
    for name, p in zip(names(group), group["params"], strict=True):
        if type(p) not in (torch.nn.Parameter, Tensor) and not isinstance(p, DTensor):
            raise ValueError(
                f"{name} is a {type(p).__name__}, and only plain tensors and FSDP2's DTensors are trained: quantized "
                "weights must be frozen or converted"
            )
        if p.dtype not in FLOATS:
            raise ValueError(
                f"{name} has dtype {p.dtype}: only real floating-point weights can be trained (quantized weights: "
                "freeze them and train adapters)"
            )
        if group["algorithm"] == "muon" and "matrices" not in group and p.ndim != 2:
            raise ValueError(
                f"{name} of shape {list(p.shape)} is not a matrix: build the groups with hf_muon.param_groups(model), "
                "or put it into a group with algorithm='adamw'"
            )
    for key in ("matrices", "kinds"):
        if key in group and len(group[key]) != len(group["params"]):
            raise ValueError(f"group has {len(group['params'])} parameters but {len(group[key])} entries in {key!r}")


def check_layouts(group: Mapping[str, Any]) -> None:
    """At construction: each parameter has the shape that its matrices were read from (engines may replace it later)."""
    for name, p, key in zip(names(group), group["params"], group.get("matrices", ()), strict=False):
        shape = MatrixLayout.of(key).shape
        if tuple(getattr(p, "ds_shape", p.shape)) != shape:
            raise ValueError(f"{name} has shape {list(p.shape)}, but its matrices were described for {list(shape)}")


def check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    """A dense gradient of the parameter's own shape."""
    if grad.is_sparse or grad.layout != torch.strided:
        raise RuntimeError(f"{name} has a sparse gradient ({grad.layout}): use a dense one (Embedding(sparse=False))")
    if grad.is_complex() or grad.shape != param.shape:
        raise RuntimeError(
            f"{name} of shape {list(param.shape)} has a {grad.dtype} gradient of shape {list(grad.shape)}"
        )


# The momentum sum reaches 1 / (1 - 0.95) = 20 gradients, and Nesterov doubles it: above this, finite gradients could
# still overflow float32's 3.4e38 and poison the buffer.
LARGEST = 1e36


def all_finite(grads: list[Tensor]) -> bool:
    """Whether no gradient holds a NaN, an infinity or more than 1e36: one pass, one synchronisation per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        if grad.numel():
            by_device.setdefault(grad.device, []).append(grad)
    # The norm bounds the entries, and is several times faster than their maximum; its squares overflow early, though.
    return all(_below(same, 2.0) or _below(same, math.inf) for same in by_device.values())


def _below(grads: list[Tensor], order: float) -> bool:
    norms = torch._foreach_norm(grads, order)
    return bool((torch.stack([n.float() for n in norms]) <= LARGEST).all())


STATE_REMEDY = "load the checkpoint of a hf_muon run of the same model, or start with a fresh optimizer (no resume)"


def check_algorithms(state_dict: Mapping[str, Any]) -> None:
    """That a saved optimizer state is this package's."""
    saved = state_dict.get("param_groups")
    if not saved or any("algorithm" not in group for group in saved):
        raise ValueError(
            f"the saved state is another optimizer's, not hf_muon's (its groups name no algorithm): {STATE_REMEDY}"
        )


def check_state_dict(groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """That a state saved by the same engine belongs to these groups, and that what it would put into them is valid."""
    check_algorithms(state_dict)
    saved = state_dict["param_groups"]
    ours = [(group["algorithm"], len(names(group))) for group in groups]
    theirs = [(group["algorithm"], len(names(group))) for group in saved]
    if ours != theirs:
        raise ValueError(
            f"the saved state has groups {theirs}, the model has {ours}: another model, or include, exclude, lora or "
            f"decay_norms_and_biases differ from those of the saved run: {STATE_REMEDY}"
        )
    for group, other in zip(groups, saved, strict=True):
        check_hyperparameters({**group, **other})
        if "param_names" in group and "param_names" in other and group["param_names"] != other["param_names"]:
            odd = sorted(set(group["param_names"]) ^ set(other["param_names"]))[:5]
            raise ValueError(
                f"the saved state is of other parameters (or of another order), e.g. {odd}: {STATE_REMEDY}"
            )
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                f"the state of {names(group)[0]} and the others was saved in {len(other['params'])} tensors, and is "
                f"now in {len(group['params'])}: {_ENGINE_REMEDY}"
            )
        flat = len(group["params"]) != len(names(group))
        for i, (p, index) in enumerate(zip(group["params"], other["params"], strict=True)):
            for key, value in state_dict["state"].get(index, {}).items():
                if key != "step" and value.shape != p.shape:
                    raise ValueError(
                        f"{key} saved for {names(group)[0 if flat else i]} has shape {list(value.shape)}, not "
                        f"{list(p.shape)}: {_ENGINE_REMEDY if flat else STATE_REMEDY}"
                    )


def other_layout(name: str) -> str:
    """The message for a flat state that was saved in another order than that of this run."""
    return f"the optimizer state of {name} and the others was saved in another layout: {_ENGINE_REMEDY}"


_ENGINE_REMEDY = (
    "another engine or number of ranks. Remedy: python -m hf_muon consolidate CHECKPOINT OUT, then resume from OUT"
)


# What a parameter is follows from the model and today's options, never from a checkpoint.
STRUCTURE = ("params", "param_names", "shapes", "matrices", "kinds", "hidden_size")
_SCHEDULED = ("lr", "initial_lr")
# Options that checkpoints of the first version do not have.
NEWER = ("momentum_dtype", "kahan_sum")


def warnings(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a user should know of a checkpoint that is about to replace the options of these groups."""
    found = [d for group, other in zip(groups, saved, strict=True) for d in differences(group, other)]
    out = [f"the checkpoint's setting wins over this run's: {text}" for text in dict.fromkeys(found)]
    if any(group.get("matrices") != other.get("matrices") for group, other in zip(groups, saved, strict=True)):
        # Momentum is elementwise, so it stays valid.
        out.append("this checkpoint was made with fused weights cut into other matrices; today's cuts are used")
    return out


def differences(group: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """The hyper-parameters in which a checkpoint differs from the options of this run, in words."""
    keys = [key for key in saved if key in group and key not in (*STRUCTURE, "shards", *_SCHEDULED)]
    out = [f"{key}={saved[key]!r} (not {group[key]!r})" for key in keys if saved[key] != group[key]]
    # A schedule moves lr; what a run asked for is what the schedule starts from.
    base, asked = (g.get("initial_lr", g["lr"]) for g in (saved, group))
    if base != asked:
        out.append(f"{group['algorithm']} learning rate {base!r} (not {asked!r})")
    return out
