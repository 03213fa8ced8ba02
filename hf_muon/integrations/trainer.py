"""From ``TrainingArguments`` to a :class:`hf_muon.Muon`: the hook behind ``optim="muon"``, also as a Python API."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

from torch import nn

from ..config import MuonConfig
from ..groups import param_groups
from ..optimizer import Muon
from ..routing import Report, route
from . import clip, engines

logger = logging.getLogger("hf_muon")

_MAX_WRAPPERS = 4  # accelerate's, an engine's, and some to spare; a wrapper that wraps itself must not hang a log


class MuonFactory:
    """``optimizer_cls_and_kwargs=(MuonFactory, {...})`` for any Trainer, without registering anything.

    The keywords are ``lr`` (required), ``weight_decay``, ``betas``, ``eps`` and the fields of :class:`MuonConfig`.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Any,
    ) -> Muon:
        """The optimizer for ``model``; see the class."""
        config = MuonConfig.merged(None, options)
        engines.refuse_unsupported()
        engines.keep_client_optimizer()
        optimizer = Muon(
            param_groups(model, dataclasses.replace(config, qk_clip=None), lr=lr, weight_decay=weight_decay),
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
            process_group=engines.replicas() if config.share_newton_schulz else None,
            exchange_bytes=config.exchange_bytes,
        )
        if config.qk_clip is not None:
            clip.attach(model, optimizer, config.qk_clip)
        if int(os.environ.get("RANK", "0")) == 0:
            logger.info("The optimizer of this run is hf_muon.Muon.\n%s", Report(tuple(route(model, config))))
        return optimizer


def arguments(args: Any, config: MuonConfig) -> dict[str, Any]:
    """Keywords for :class:`MuonFactory` from ``TrainingArguments``: its lr, weight decay, betas and eps."""
    return {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)},
    }


def create_optimizer(model: nn.Module, args: Any, **options: Any) -> Muon:
    """The optimizer ``optim="muon"`` would build, for a ``Trainer`` subclass's own ``create_optimizer``.

    Args:
        model: the model as the Trainer holds it.
        args: its ``TrainingArguments``; lr, weight decay, betas, eps and ``optim_args`` are read from it.
        options: :class:`MuonConfig` fields that override ``optim_args``.

    Raises:
        ValueError: an unknown or malformed option, or a model that cannot be routed (:func:`hf_muon.explain`).
        RuntimeError: an engine is active that would not train with this optimizer.
    """
    config = MuonConfig.from_optim_args(args.optim_args)
    return MuonFactory()(model, **{**arguments(args, config), **options})


def find_muon(optimizer: Any) -> Muon | None:
    """The :class:`hf_muon.Muon` inside accelerate's wrappers, if that is what is training."""
    for _ in range(_MAX_WRAPPERS):
        if isinstance(optimizer, Muon):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None
