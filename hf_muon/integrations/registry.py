"""Makes ``optim="muon"`` a valid choice of ``transformers.TrainingArguments``, and takes it back.

transformers has no plugin point for optimizers, so this adds a member to its ``OptimizerNames`` enum and a handler to
its table, and wraps two methods of ``Trainer``: ``log`` (to add ``muon/...`` to the training logs) and
``get_optimizer_cls_and_kwargs`` (to explain a malformed ``optim_args``). All of it is idempotent and undone by
:func:`unregister`.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from transformers import Trainer
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
from transformers.training_args import OptimizerNames

from ..config import MuonConfig
from .trainer import MuonFactory, arguments, find_muon

logger = logging.getLogger("hf_muon")

NAMES = ("muon", "hf_muon")
"""``optim`` values of this package. The second is ours even if a future transformers has a "muon" of its own."""

_WRAPPED = "_hf_muon_original"


def register() -> None:
    """Add ``optim="muon"`` (and ``"hf_muon"``) to transformers; calling it again changes nothing.

    A "muon" that transformers itself ships is left alone, and a warning says that it is the one in use.
    """
    for name in NAMES:
        member = OptimizerNames._value2member_map_.get(name)
        if member is None:
            _OPTIMIZER_HANDLERS[_add_member(name)] = _handler
        elif not _is_ours(member):
            logger.warning(
                "this transformers ships its own optim=%r, which stays in use under that name; "
                "optim='hf_muon' selects this package's Muon.",
                name,
            )
    if not hasattr(Trainer.log, _WRAPPED):
        Trainer.log = _with_muon_metrics(Trainer.log)
    if not hasattr(Trainer.get_optimizer_cls_and_kwargs, _WRAPPED):
        wrapped = _with_checked_optim_args(Trainer.get_optimizer_cls_and_kwargs)
        Trainer.get_optimizer_cls_and_kwargs = staticmethod(wrapped)


def unregister() -> None:
    """Undo :func:`register`: transformers is as it was."""
    for name in NAMES:
        member = OptimizerNames._value2member_map_.get(name)
        if member is not None and _is_ours(member):
            _OPTIMIZER_HANDLERS.pop(member, None)
            _remove_member(member)
    if hasattr(Trainer.log, _WRAPPED):
        Trainer.log = getattr(Trainer.log, _WRAPPED)
    if hasattr(Trainer.get_optimizer_cls_and_kwargs, _WRAPPED):
        original = getattr(Trainer.get_optimizer_cls_and_kwargs, _WRAPPED)
        Trainer.get_optimizer_cls_and_kwargs = staticmethod(original)


def member(value: str) -> OptimizerNames:
    """The enum member of an ``optim`` value; what a pickled ``TrainingArguments`` calls to find ours again."""
    register()
    return OptimizerNames(value)


def _handler(ctx: OptimizerContext) -> tuple[type[MuonFactory], dict[str, Any]]:
    """The handler protocol of transformers: what to call, and with which keywords."""
    return MuonFactory, arguments(ctx.args, MuonConfig.from_strings(ctx.optim_args))


def _is_ours(optim: Any) -> bool:
    return isinstance(optim, OptimizerNames) and _OPTIMIZER_HANDLERS.get(optim) is _handler


def _add_member(value: str) -> OptimizerNames:
    """A new member of a closed enum, made as ``EnumType`` makes them."""
    new = str.__new__(OptimizerNames, value)
    new._name_, new._value_ = value.upper(), value
    new.__objclass__ = OptimizerNames
    new._sort_order_ = len(OptimizerNames._member_names_)
    # By default an enum member pickles as "OptimizerNames('muon')", which fails in a process that has not imported
    # this package; through our function the unpickling of training_args.bin imports it.
    new.__reduce_ex__ = lambda protocol: (member, (value,))
    OptimizerNames._member_names_.append(new._name_)
    OptimizerNames._member_map_[new._name_] = new
    OptimizerNames._value2member_map_[value] = new
    if hasattr(OptimizerNames, "_hashable_values_"):  # CPython >= 3.12 looks values up here too
        OptimizerNames._hashable_values_.append(value)
    type.__setattr__(OptimizerNames, new._name_, new)
    return new


def _remove_member(old: OptimizerNames) -> None:
    OptimizerNames._member_names_.remove(old._name_)
    del OptimizerNames._member_map_[old._name_]
    del OptimizerNames._value2member_map_[old._value_]
    if hasattr(OptimizerNames, "_hashable_values_"):
        OptimizerNames._hashable_values_.remove(old._value_)
    type.__delattr__(OptimizerNames, old._name_)


def _with_muon_metrics(original: Any) -> Any:
    @functools.wraps(original)
    def log(self: Trainer, logs: dict[str, float], start_time: float | None = None) -> None:
        optimizer = find_muon(self.optimizer)
        # Training logs only: evaluation and the closing summary have no step of their own to describe.
        if optimizer is not None and "loss" in logs and "learning_rate" in logs:
            logs.update(optimizer.metrics())
        original(self, logs, start_time)

    setattr(log, _WRAPPED, original)
    return log


def _with_checked_optim_args(original: Any) -> Any:
    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        if _is_ours(args.optim):
            MuonConfig.from_optim_args(args.optim_args)
        return original(args, model)

    setattr(get_optimizer_cls_and_kwargs, _WRAPPED, original)
    return get_optimizer_cls_and_kwargs
