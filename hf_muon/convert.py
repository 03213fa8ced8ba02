"""States of other Muons as ours, and back. The two momentum forms differ by a factor and nothing else.

Our and Moonlight's buffer is the sum ``M <- mu M + G``; that of torch.optim.Muon is the average
``B <- mu B + (1 - mu) G``, so ``M = B / (1 - mu)``. Under Nesterov both orthogonalize the same direction, and
Newton-Schulz does not see the factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from . import canonical, checks
from .optimizer import Muon


def from_torch(
    optimizer: Muon,
    muon: Mapping[str, Any],
    adamw: Mapping[str, Any] | None = None,
    *,
    muon_names: Sequence[str] | None = None,
    adamw_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The state of a torch.optim.Muon (and of a torch.optim.AdamW beside it) for ``optimizer.load_state_dict``.

    Args:
        optimizer: where it will be loaded; its groups and options stay as they are.
        muon: state dict of the torch.optim.Muon.
        adamw: state dict of the torch.optim.AdamW.
        muon_names: names of the parameters in ``muon``, in order; default: its ``param_names``, which torch saves for
            optimizers built from named parameters.
        adamw_names: the same for ``adamw``.

    Returns:
        A canonical state: on any engine, whatever is not in it starts afresh.

    Raises:
        ValueError: no names, or names that ``optimizer`` does not train with that algorithm.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for name, group, values in _named(muon, muon_names):
        if "momentum_buffer" in values:
            state[name] = {"momentum_buffer": values["momentum_buffer"].float() / (1 - group["momentum"])}
    for name, _, values in _named(adamw or {"state": {}, "param_groups": []}, adamw_names):
        if "exp_avg" in values:
            state[name] = {key: values[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return _for(optimizer, state)


def from_moonlight(optimizer: Muon, saved: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The state of Moonlight's own optimizer (its ``examples/toy_train.py``) for ``optimizer.load_state_dict``.

    Its momentum is a sum, as ours; what it calls ``moment1`` and ``moment2`` are AdamW's averages.

    Args:
        optimizer: where it will be loaded.
        saved: the state dict.
        names: of its parameters, in its order: those of Muon, then those of AdamW.

    Raises:
        ValueError: see :func:`from_torch`.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for name, _, values in _named(saved, names):
        if "momentum_buffer" in values:
            state[name] = {"momentum_buffer": values["momentum_buffer"].float()}
        elif "moment1" in values:
            step = Tensor([float(values["step"])]).squeeze(0)
            state[name] = {"step": step, "exp_avg": values["moment1"], "exp_avg_sq": values["moment2"]}
    return _for(optimizer, state)


def to_torch(saved: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Parameter name -> state for torch.optim.Muon (momentum as an average), and for torch.optim.AdamW.

    Args:
        saved: a one-process or consolidated state dict of :class:`hf_muon.Muon`.
    """
    found = canonical.by_name(saved)
    muon: dict[str, dict[str, Tensor]] = {}
    adamw: dict[str, dict[str, Tensor]] = {}
    for group in saved["param_groups"]:
        for name in group["param_names"]:
            if name in found and group["algorithm"] == "muon":
                muon[name] = {"momentum_buffer": found[name]["momentum_buffer"] * (1 - group["momentum"])}
            elif name in found:
                adamw[name] = dict(found[name])
    return muon, adamw


def _named(
    saved: Mapping[str, Any], names: Sequence[str] | None
) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Name, group and state of every parameter of a state dict."""
    places = [(group, i) for group in saved["param_groups"] for i in group["params"]]
    if names is None:
        names = [name for group in saved["param_groups"] for name in group.get("param_names", ())]
    if len(names) != len(places):
        raise ValueError(f"{len(places)} parameters in the saved state and {len(names)} names: give one name for each")
    return [(n, group, saved["state"].get(i, {})) for n, (group, i) in zip(names, places, strict=True)]


def _for(optimizer: Muon, state: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    algorithms = {n: g["algorithm"] for g in optimizer.param_groups for n in checks.names(g)}
    odd = [n for n, v in state.items() if algorithms.get(n) != ("muon" if "momentum_buffer" in v else "adamw")]
    if odd:
        raise ValueError(f"{odd[:5]} are trained by another algorithm in this optimizer, or not at all")
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return canonical.make(groups, state, {})
