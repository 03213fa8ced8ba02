"""Routes to optimizer groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import UPDATE_KEYS, MuonConfig
from .roles import peek
from .routing import Route, route


def param_groups(
    model: nn.Module,
    config: MuonConfig | None = None,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    **overrides: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`hf_muon.Muon`: one for Muon, then one (or two, see below) for AdamW.

    Args:
        model: the model to train, before or after wrapping with PEFT.
        config: options.
        lr: learning rate of every group, unless ``config.muon_lr`` or ``config.adamw_lr`` says otherwise; default:
            what the optimizer is given.
        weight_decay: of every group, default likewise; with ``decay_norms_and_biases=False`` norms and biases form a
            third group without decay, as in the Trainer.
        **overrides: fields of :class:`MuonConfig` by name; they win over ``config``.

    Raises:
        ValueError: see :func:`route`; or a parameter in no group, or in two; or ``qk_clip``, which groups cannot do.
    """
    # What nobody asked for stays out of the groups, so that arguments of the optimizer itself are not overruled.
    asked = UPDATE_KEYS if config is not None else tuple(key for key in UPDATE_KEYS if key in overrides)
    config = MuonConfig.merged(config, overrides)
    if config.qk_clip is not None:
        raise ValueError(
            "qk_clip needs the model beside the optimizer, and groups alone would not clip. Remedy: "
            "hf_muon.integrations.clip.attach(model, optimizer, qk_clip), or optim='muon' in a Trainer"
        )
    routes = route(model, config)
    _check_partition(model, routes)
    decayed = [_has_decay(r, config) for r in routes]
    muon = [r for r in routes if r.algorithm == "muon"]
    adamw = [r for r, d in zip(routes, decayed, strict=True) if r.algorithm == "adamw" and d]
    plain = [r for r, d in zip(routes, decayed, strict=True) if r.algorithm == "adamw" and not d]
    hidden_size = _hidden_size(model)
    matrices: dict[str, Any] = {
        "matrices": [r.layout.key() for r in muon if r.layout is not None],
        **({} if hidden_size is None else {"hidden_size": hidden_size}),
        **{key: getattr(config, key) for key in asked},
    }
    # Few groups: DeepSpeed flattens and partitions each group on its own.
    rounding = {"kahan_sum": config.kahan_sum} if "kahan_sum" in asked else {}
    groups = []
    for members, algorithm, rate, decay, more in (
        (muon, "muon", config.muon_lr, weight_decay, matrices),
        (adamw, "adamw", config.adamw_lr, weight_decay, rounding),
        (plain, "adamw", config.adamw_lr, 0.0, rounding),
    ):
        rates = {"lr": lr if rate is None else rate, "weight_decay": decay}
        group = {
            "params": [(r.name, r.parameter) for r in members],
            "algorithm": algorithm,
            "kinds": [r.kind for r in members],
            **{key: value for key, value in rates.items() if value is not None},
            **more,
        }
        if members:
            groups.append(group)
    return groups


def _check_partition(model: nn.Module, routes: list[Route]) -> None:
    """Every trainable parameter in exactly one route."""
    routed = [id(r.parameter) for r in routes]
    twice = {r.name for r in routes if routed.count(id(r.parameter)) > 1} if len(set(routed)) < len(routed) else set()
    missing = (
        [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in set(routed)] if not twice else []
    )
    if twice or missing:
        raise ValueError(
            f"parameters in two groups: {sorted(twice)}; in none: {missing}: this is a bug, please report it"
        )


def _has_decay(found: Route, config: MuonConfig) -> bool:
    return config.decay_norms_and_biases or found.kind not in ("norm", "bias")


def _hidden_size(model: nn.Module) -> int | None:
    """Width of the residual stream, for the baseline scale of Table 1."""
    config = peek(model, "config")
    for place in (config, peek(config, "text_config")):
        size = peek(place, "hidden_size")
        if isinstance(size, int):
            return size
    return None
