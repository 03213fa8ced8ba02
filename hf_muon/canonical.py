"""The one optimizer state that every engine reads: whole tensors by parameter name, as one process would save them.

It is a state dict of :class:`hf_muon.Muon` over whole parameters with one more key, ``weights``: the trained weights
themselves, at full precision, because sharded engines keep master copies that no model file holds. The mark under
``hf_muon_format`` tells it from what an engine saves of its own shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .exchange.layout import span_on
from .units import Unit
from .update import is_half

MARK, VERSION = "hf_muon_format", 1
SHARED = {"muon": ("momentum_buffer", "compensation"), "adamw": ("exp_avg", "exp_avg_sq", "compensation")}
"""The state that lies as the parameters do, by algorithm, where it exists; AdamW also counts its steps."""
NOT_OPTIONS = ("params", "shards", *checks.STRUCTURE)

State = Mapping[str, Mapping[str, Tensor]]


def is_canonical(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict holds whole tensors for any engine."""
    return MARK in state_dict


def make(groups: Sequence[Mapping[str, Any]], state: State, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """A canonical state dict.

    Args:
        groups: optimizer groups with ``param_names``; what belongs to one engine's layout is left out.
        state: parameter name -> state; parameters that never had a gradient are absent.
        weights: parameter name -> weight, for some or all names.
    """
    ids: dict[str, int] = {}
    packed = []
    for group in groups:
        if "param_names" not in group:
            raise ValueError(
                "this optimizer's parameters have no names: build its groups with hf_muon.param_groups(model)"
            )
        names = list(group["param_names"])
        ids.update({name: len(ids) + i for i, name in enumerate(names)})
        packed.append({k: v for k, v in group.items() if k != "shards"} | {"params": [ids[name] for name in names]})
    return {
        MARK: VERSION,
        "state": {ids[name]: dict(values) for name, values in state.items() if values},
        "param_groups": packed,
        "weights": dict(weights),
    }


def by_name(state_dict: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
    """Parameter name -> state, of a canonical or a one-process state dict."""
    pairs = (pair for g in state_dict["param_groups"] for pair in zip(g["params"], g["param_names"], strict=True))
    return {name: state_dict["state"][i] for i, name in pairs if i in state_dict["state"]}


def match(groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The saved group of each present one.

    Raises:
        ValueError: unknown format; a parameter that only one side has; one that another algorithm trained.
    """
    if state_dict[MARK] != VERSION:
        raise ValueError(
            f"optimizer state of format {state_dict[MARK]}, and this version reads {VERSION}: update hf_muon"
        )
    saved = {name: group for group in state_dict["param_groups"] for name in group["param_names"]}
    ours = {name: group for group in groups for name in checks.names(group)}
    odd = sorted(set(saved) ^ set(ours))
    odd = odd or [name for name in ours if ours[name]["algorithm"] != saved[name]["algorithm"]]
    if odd:
        raise ValueError(
            f"the saved state is of other parameters, or they are trained by another algorithm, e.g. {odd[:5]}: "
            f"{checks.STATE_REMEDY}"
        )
    out = []
    for group in groups:
        found = {id(saved[name]): saved[name] for name in checks.names(group)}
        if len(found) > 1:
            raise ValueError(
                f"the group of {checks.names(group)[0]} is split in the saved state: {checks.STATE_REMEDY}"
            )
        out.append(next(iter(found.values())))
    return out


def spread(units: Iterable[Unit], state_dict: Mapping[str, Any], state: Any) -> None:
    """Put this rank's part of everything where it is stored.

    Args:
        units: how the parameters are stored.
        state_dict: canonical.
        state: the optimizer's ``state``, which is filled.

    Raises:
        ValueError: a saved tensor of another size; nothing has been changed then.
    """
    found, weights = by_name(state_dict), state_dict["weights"]
    units = list(units)
    for unit in units:
        for name, numel in zip(unit.names, unit.numels, strict=True):
            for key, tensor in (*found.get(name, {}).items(), ("weight", weights.get(name))):
                if tensor is not None and key != "step" and tensor.numel() != numel:
                    raise ValueError(f"{key} of {name} has {tensor.numel()} elements in the saved state, not {numel}")
    for unit in units:
        _spread_state(unit, found, state)
        views = unit.weights()
        for i, name in enumerate(unit.names):
            if name in weights:
                views[i].copy_(_part(weights[name], unit, i))
                if "compensation" in found.get(name, {}) and not is_half(views[i]):  # float32 holds both
                    views[i].add_(_part(found[name]["compensation"], unit, i))
        unit.storage.write_back(views)


def _spread_state(unit: Unit, found: Mapping[str, Mapping[str, Tensor]], state: Any) -> None:
    storage = unit.storage
    members: dict[int, list[int]] = {}
    for i in range(len(unit.names)):  # one flat holder for all, or one for each
        members.setdefault(0 if len(storage.holders) == 1 else i, []).append(i)
    for h, inside in members.items():
        holder, saved = storage.holders[h], [found.get(unit.names[i], {}) for i in inside]
        if not any(saved):
            state.pop(holder, None)
            continue
        for key in SHARED[unit.group["algorithm"]]:
            dtype = next((values[key].dtype for values in saved if key in values), None)
            if dtype is None or (key == "compensation" and not is_half(holder)):
                state[holder].pop(key, None)
                continue
            state[holder][key] = torch.zeros_like(holder, dtype=dtype, memory_format=torch.contiguous_format)
        if unit.group["algorithm"] == "adamw":
            steps = [float(values["step"]) for values in saved if values]
            state[holder]["step"] = torch.tensor(max(steps), dtype=torch.float32)
    for key in SHARED[unit.group["algorithm"]]:
        views = storage.flat([state[h].get(key) if h in state else None for h in storage.holders])
        for i, view in enumerate(views):
            if view is not None and key in found.get(unit.names[i], {}):
                view.copy_(_part(found[unit.names[i]][key], unit, i))


def _part(whole: Tensor, unit: Unit, i: int) -> Tensor:
    start, stop = span_on(unit.storage.placements[i], unit.storage.rank, whole.numel())
    return whole.reshape(-1)[start:stop]
