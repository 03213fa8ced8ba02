"""Makes ``optim="muon"`` a valid choice of ``transformers.TrainingArguments``, and takes it back.

transformers has no plugin point for optimizers, so this adds a member to its ``OptimizerNames`` enum and a handler to
its table, and wraps some functions: ``Trainer.log`` adds ``muon/...`` to the training logs;
``AcceleratedOptimizer.step`` counts the steps that a loss scaler skips; ``TrainingArguments.__post_init__`` and
``Trainer.get_optimizer_cls_and_kwargs`` refuse, as early as it can be known, a malformed ``optim_args`` and an engine
that would train with something else. All of it is idempotent and undone by :func:`unregister`.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import accelerate.accelerator
import transformers.trainer
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
from transformers.training_args import OptimizerNames, TrainingArguments

from ..config import MuonConfig
from . import checkpoints
from .engines import refuse_unsupported, with_client_optimizer
from .moe import ExpertBalanceCallback
from .spectra import SpectraCallback
from .trainer import MuonFactory, arguments, find_muon

logger = logging.getLogger("hf_muon")

NAMES = ("muon", "hf_muon")
"""``optim`` values of this package. The second is ours even if a future transformers has a "muon" of its own."""

# (owner, method) -> (what was there, what we put there)
_installed: dict[tuple[Any, str], tuple[Any, Any]] = {}
# The enum is closed to type checkers, as it is to everybody else.
_ENUM: Any = OptimizerNames


def register() -> None:
    """Add ``optim="muon"`` (and ``"hf_muon"``) to transformers; calling it again changes nothing.

    A "muon" that transformers itself ships is left alone, and a warning says that it is the one in use.
    """
    for name in NAMES:
        member = _ENUM._value2member_map_.get(name)
        if member is None:
            _OPTIMIZER_HANDLERS[_add_member(name)] = _handler
        elif not _is_ours(member):
            logger.warning(
                "this transformers ships its own optim=%r, which stays in use under that name; "
                "optim='hf_muon' selects this package's Muon.",
                name,
            )
    for owner, name, wrap in _WRAPS:
        # accelerate has its DeepSpeed functions only where DeepSpeed is installed.
        absent = owner is accelerate.accelerator and name not in owner.__dict__
        if (owner, name) not in _installed and not absent:
            original = owner.__dict__[name]
            static = isinstance(original, staticmethod)
            wrapped = wrap(original.__func__ if static else original)
            wrapped = staticmethod(wrapped) if static else wrapped
            _installed[owner, name] = (original, wrapped)
            setattr(owner, name, wrapped)


def unregister() -> None:
    """Undo :func:`register`: transformers is as it was."""
    for name in NAMES:
        member = _ENUM._value2member_map_.get(name)
        if member is not None and _is_ours(member):
            _OPTIMIZER_HANDLERS.pop(member, None)
            _remove_member(member)
    for (owner, name), (original, wrapped) in list(_installed.items()):
        # Where somebody has wrapped ours, taking ours out would take theirs out too; without a Muon it does little.
        if owner.__dict__[name] is wrapped:
            setattr(owner, name, original)
            del _installed[owner, name]


def member(value: str) -> OptimizerNames:
    """The enum member of an ``optim`` value; what a pickled ``TrainingArguments`` calls to find ours again."""
    register()
    return OptimizerNames(value)


def _handler(ctx: OptimizerContext) -> tuple[type[MuonFactory], dict[str, Any]]:
    """The handler protocol of transformers: what to call, and with which keywords."""
    return MuonFactory, arguments(ctx.args, MuonConfig.from_strings(ctx.optim_args))


def _is_ours(optim: Any) -> bool:
    return isinstance(optim, OptimizerNames) and _OPTIMIZER_HANDLERS.get(optim) is _handler


def _add_member(value: str) -> Any:
    """A new member of a closed enum, made as ``EnumType`` makes them."""
    new: Any = str.__new__(_ENUM, value)
    # A transformers of the future may use the name MUON for a value of its own.
    name = value.upper() if value.upper() not in _ENUM._member_map_ else f"HF_MUON_{value.upper()}"
    new._name_, new._value_ = name, value
    new.__objclass__ = _ENUM
    new._sort_order_ = len(_ENUM._member_names_)
    # By default an enum member pickles as "OptimizerNames('muon')", which fails in a process that has not imported
    # this package; through our function the unpickling of training_args.bin imports it.
    new.__reduce_ex__ = lambda protocol: (member, (value,))
    _ENUM._member_names_.append(new._name_)
    _ENUM._member_map_[new._name_] = new
    _ENUM._value2member_map_[value] = new
    if hasattr(_ENUM, "_hashable_values_"):  # CPython >= 3.12 looks values up here too
        _ENUM._hashable_values_.append(value)
    type.__setattr__(_ENUM, new._name_, new)
    return new


def _remove_member(old: Any) -> None:
    _ENUM._member_names_.remove(old._name_)
    del _ENUM._member_map_[old._name_]
    del _ENUM._value2member_map_[old._value_]
    if hasattr(_ENUM, "_hashable_values_"):
        _ENUM._hashable_values_.remove(old._value_)
    type.__delattr__(_ENUM, old._name_)


def _with_muon_metrics(original: Any) -> Any:
    @functools.wraps(original)
    def log(self: Trainer, logs: dict[str, float], start_time: float | None = None) -> None:
        optimizer = find_muon(self.optimizer)
        # Training logs only: evaluation and the closing summary have no step of their own to describe.
        if "loss" in logs and "learning_rate" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, (ExpertBalanceCallback, SpectraCallback)):
                    logs.update(callback.metrics())
            if optimizer is not None:
                logs.update(optimizer.metrics())
                # DeepSpeed finds an overflow itself, and then never calls the optimizer.
                logs["muon/skipped_steps"] += getattr(getattr(self, "deepspeed", None), "skipped_steps", 0)
        original(self, logs, start_time)

    return log


def _counting_scaler_skips(original: Any) -> Any:
    @functools.wraps(original)
    def step(self: AcceleratedOptimizer, closure: Any = None) -> None:
        original(self, closure)
        # With a loss scaler, an overflow means that the optimizer's own step was never called.
        optimizer = find_muon(self)
        if optimizer is not None and self.scaler is not None and self.step_was_skipped:
            optimizer.telemetry.record_skip("the loss scaler found an infinity")

    return step


def _with_checked_optim_args(original: Any) -> Any:
    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        _check(args)
        return original(args, model)

    return get_optimizer_cls_and_kwargs


def _with_early_checks(original: Any) -> Any:
    @functools.wraps(original)
    def __post_init__(self: TrainingArguments) -> None:
        original(self)
        _check(self)

    return __post_init__


def _check(args: TrainingArguments) -> None:
    """Refuse what could not train with this package's Muon.

    DeepSpeed's config may hold an "optimizer" section, and the Trainer then builds that one and never asks for
    ``optim``: only a check on the arguments themselves can see it.
    """
    if _is_ours(args.optim):
        MuonConfig.from_optim_args(args.optim_args)
        refuse_unsupported(args)


_WRAPS: tuple[tuple[Any, str, Any], ...] = (
    (Trainer, "log", _with_muon_metrics),
    (AcceleratedOptimizer, "step", _counting_scaler_skips),
    (Trainer, "get_optimizer_cls_and_kwargs", _with_checked_optim_args),
    (TrainingArguments, "__post_init__", _with_early_checks),
    (Trainer, "_load_from_checkpoint", checkpoints.with_whole_models),
    (Trainer, "_load_optimizer_and_scheduler", checkpoints.with_any_state),
    (transformers.trainer, "deepspeed_load_checkpoint", checkpoints.with_any_deepspeed_checkpoint),
    (accelerate.accelerator, "map_pytorch_optim_to_deepspeed", with_client_optimizer),
)
