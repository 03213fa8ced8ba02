"""Resuming under the Trainer from a consolidated checkpoint, on any engine; and refusing what would be half loaded."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from .. import canonical
from ..checkpoint import OPTIMIZER_FILE, check_zero
from ..optimizer import Muon
from .models import stored_names
from .trainer import find_muon

logger = logging.getLogger("hf_muon")

_REMEDY = "Remedy: python -m hf_muon consolidate {folder} OUT, then resume from OUT"


def consolidated(folder: str | None) -> bool:
    """Whether ``folder`` holds a state for every engine."""
    file = Path(folder or "") / OPTIMIZER_FILE
    return file.is_file() and canonical.is_canonical(torch.load(file, "cpu", weights_only=True, mmap=True))


def load(muon: Muon, folder: str) -> None:
    """Put this rank's part of a consolidated checkpoint into an optimizer, weights included.

    The file is mapped into memory, so a rank reads only what it stores.
    """
    muon.load_state_dict(torch.load(Path(folder) / OPTIMIZER_FILE, "cpu", weights_only=True, mmap=True))


def with_any_deepspeed_checkpoint(original: Any) -> Any:
    """Wrap ``deepspeed_load_checkpoint`` as the Trainer knows it."""

    @functools.wraps(original)
    def deepspeed_load_checkpoint(engine: Any, folder: str, load_module_strict: bool = True) -> None:
        muon = find_muon(engine.optimizer)
        if muon is None:
            return original(engine, folder, load_module_strict=load_module_strict)
        if consolidated(folder):
            load(muon, folder)
            _refresh(engine.optimizer)
            logger.info("resumed from the consolidated checkpoint %s; DeepSpeed's loss scale starts anew", folder)
            return None
        check_zero(folder)
        ranks = {m[1] for m in (re.search(r"zero_pp_rank_(\d+)_", f.name) for f in Path(folder).glob("*/*optim*")) if m}
        if len(ranks) != engine.dp_world_size:
            raise ValueError(
                f"{folder} was saved by {len(ranks) or 'no'} DeepSpeed ranks, and {engine.dp_world_size} are running. "
                + _REMEDY.format(folder=folder)
            )
        return original(engine, folder, load_module_strict=load_module_strict)

    return deepspeed_load_checkpoint


def with_any_fsdp_checkpoint(original: Any) -> Any:
    """Wrap ``Trainer._load_optimizer_and_scheduler``."""

    @functools.wraps(original)
    def _load_optimizer_and_scheduler(self: Trainer, checkpoint: str | None) -> None:
        muon = find_muon(self.optimizer)
        if muon is None or checkpoint is None or not self.is_fsdp_enabled or not consolidated(checkpoint):
            return original(self, checkpoint)
        load(muon, checkpoint)
        schedule = Path(checkpoint) / "scheduler.pt"
        if schedule.is_file() and self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(torch.load(schedule, weights_only=True))
        return None

    return _load_optimizer_and_scheduler


def with_whole_models(original: Any) -> Any:
    """Wrap ``Trainer._load_from_checkpoint``."""

    @functools.wraps(original)
    def _load_from_checkpoint(self: Trainer, resume_from_checkpoint: str, model: Any = None) -> None:
        muon = find_muon(self.optimizer)
        if self.is_fsdp_enabled and muon is not None and consolidated(resume_from_checkpoint):
            return None  # the weights come with the optimizer's state, each rank's own part
        if self.is_fsdp_enabled and muon is not None and (Path(resume_from_checkpoint) / OPTIMIZER_FILE).exists():
            raise ValueError(
                f"{resume_from_checkpoint} was not saved by FSDP. " + _REMEDY.format(folder=resume_from_checkpoint)
            )
        original(self, resume_from_checkpoint, model)
        if not self.is_fsdp_enabled and self.args.optim in ("muon", "hf_muon"):
            target = self.model if model is None else model
            if isinstance(target, PreTrainedModel) and (Path(resume_from_checkpoint) / "config.json").is_file():
                _load_converted(target, resume_from_checkpoint)
        return None

    return _load_from_checkpoint


def _load_converted(model: PreTrainedModel, folder: str) -> None:
    """Load the weights that the hub's layout stores under other names (experts one by one).

    transformers 5.23 saves a model in that layout, and its Trainer resumes by plain names: fused experts would silently
    stay as they were initialized.
    """
    stored = stored_names(Path(folder))
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    lost = [name for name, _ in model.named_parameters() if name not in stored and name not in tied]
    if not stored or not lost:
        return
    fresh = dict(type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype).named_parameters())
    missing = [name for name in lost if name not in fresh]
    if missing:
        raise ValueError(f"{folder} holds no weights for {missing[:3]}, which this model trains")
    with torch.no_grad():
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        for name in lost:
            parameters[name].copy_(fresh[name])


def _refresh(engine_optimizer: Any) -> None:
    """Bring the model's low-precision weights up to the master weights that were just loaded."""
    if hasattr(engine_optimizer, "update_lp_params"):  # ZeRO-1, ZeRO-2, BF16_Optimizer
        engine_optimizer.update_lp_params()
        return
    persistent = engine_optimizer.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
    for index in range(len(engine_optimizer.fp16_groups)):
        engine_optimizer._reassign_or_swap_out_partitioned_parameters(index)
    if persistent:
        persistent[0].all_gather(persistent)
