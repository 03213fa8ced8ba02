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
        refuse_unsupported_engine()
        optimizer = Muon(
            param_groups(model, config, lr=lr, weight_decay=weight_decay),
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
        )
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
        RuntimeError: DeepSpeed or FSDP is active.
    """
    config = MuonConfig.from_optim_args(args.optim_args)
    return MuonFactory()(model, **{**arguments(args, config), **options})


def refuse_unsupported_engine(args: Any = None) -> None:
    """Fail before the engine re-lays the parameters out, not after.

    Args:
        args: ``TrainingArguments``, whose ``deepspeed`` and ``fsdp`` name an engine before it has started.

    Raises:
        RuntimeError: DeepSpeed, FSDP or Megatron-LM is configured or active.
    """
    flags = {"DeepSpeed": "ACCELERATE_USE_DEEPSPEED", "FSDP": "ACCELERATE_USE_FSDP"}
    active = [name for name, key in (("DeepSpeed", "deepspeed"), ("FSDP", "fsdp")) if getattr(args, key, None)]
    active += [name for name, variable in flags.items() if os.environ.get(variable, "").lower() in ("1", "true")]
    active += _accelerator_engines()
    if active:
        raise RuntimeError(
            f"optim='muon' serves one process and DDP in this version, and {active[0]} is active: launch with a "
            "multi-GPU or multi-CPU (DDP) accelerate config, or choose another optimizer"
        )


def _accelerator_engines() -> list[str]:
    from accelerate.state import AcceleratorState

    kind = str(AcceleratorState._shared_state.get("distributed_type", "")).rpartition(".")[2]
    return {"DEEPSPEED": ["DeepSpeed"], "FSDP": ["FSDP"], "MEGATRON_LM": ["Megatron-LM"]}.get(kind, [])


def find_muon(optimizer: Any) -> Muon | None:
    """The :class:`hf_muon.Muon` inside accelerate's wrappers, if that is what is training."""
    for _ in range(_MAX_WRAPPERS):
        if isinstance(optimizer, Muon):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None
