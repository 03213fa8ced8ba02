"""Resuming under the Trainer from a consolidated checkpoint, on any engine; and refusing what would be half loaded."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, Trainer

from .. import canonical
from ..checkpoint import OPTIMIZER_FILE, SCHEDULE_FILE, check_zero, zero_folder
from ..optimizer import Muon
from .models import stored_names
from .trainer import find_muon

logger = logging.getLogger("hf_muon")

_REMEDY = "Remedy: python -m hf_muon consolidate {folder} OUT, then resume from OUT"


def consolidated(folder: str | None) -> bool:
    """Whether ``folder`` holds a state for every engine."""
    file = Path(folder or "") / OPTIMIZER_FILE
    return file.is_file() and canonical.is_canonical(torch.load(file, "cpu", weights_only=True, mmap=True))


def load(muon: Muon, folder: str, model: nn.Module) -> None:
    """Put this rank's part of a consolidated checkpoint into an optimizer and the model it trains.

    The files are mapped into memory, so a rank reads only what it stores.

    Raises:
        ValueError: weights that are trained are missing, and would stay as they were initialized.
    """
    state_dict = torch.load(Path(folder) / OPTIMIZER_FILE, "cpu", weights_only=True, mmap=True)
    names = [name for group in muon.param_groups for name in group["param_names"]]
    lost = [name for name in names if name not in state_dict["weights"]]
    if lost:
        raise ValueError(f"{folder} holds no weights for {lost[:3]}. " + _REMEDY.format(folder=folder))
    muon.load_state_dict(state_dict)
    _load_untrained(model, Path(folder), set(names))


def _load_untrained(model: nn.Module, folder: Path, trained: set[str]) -> None:
    """Buffers and frozen weights, from the model's own files: no optimizer holds them."""
    stored = stored_names(folder)
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if name in trained or name not in stored:
            continue
        with safe_open(stored[name], framework="pt") as opened, torch.no_grad():
            value = opened.get_tensor(name)
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
            if not hasattr(tensor, "ds_tensor"):
                tensor.copy_(value)
                continue
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters(tensor, modifier_rank=0):
                if dist.get_rank() == 0:
                    tensor.copy_(value)


def with_any_deepspeed_checkpoint(original: Any) -> Any:
    """Wrap ``deepspeed_load_checkpoint`` as the Trainer knows it."""

    @functools.wraps(original)
    def deepspeed_load_checkpoint(engine: Any, folder: str, load_module_strict: bool = True) -> None:
        muon = find_muon(engine.optimizer)
        if muon is None:
            return original(engine, folder, load_module_strict=load_module_strict)
        if consolidated(folder):
            load(muon, folder, engine.module)
            _refresh(engine.optimizer)
            if engine.lr_scheduler is not None:  # DeepSpeed's own; the Trainer loads its own itself
                engine.lr_scheduler.load_state_dict(torch.load(Path(folder) / SCHEDULE_FILE, weights_only=True))
            logger.info("resumed from the consolidated checkpoint %s; DeepSpeed's loss scale starts anew", folder)
            return None
        check_zero(folder)
        saved = zero_folder(folder)
        names = [f.name for f in saved.glob("*_optim_states.pt")] if saved is not None else []
        ranks = {found[1] for found in (re.search(r"zero_pp_rank_(\d+)_", name) for name in names) if found}
        if len(ranks) != engine.dp_world_size:
            raise ValueError(
                f"{folder} was saved by {len(ranks) or 'no'} DeepSpeed ranks, and {engine.dp_world_size} are running. "
                + _REMEDY.format(folder=folder)
            )
        return original(engine, folder, load_module_strict=load_module_strict)

    return deepspeed_load_checkpoint


def with_any_state(original: Any) -> Any:
    """Wrap ``Trainer._load_optimizer_and_scheduler``, which skips without a word what it does not find."""

    @functools.wraps(original)
    def _load_optimizer_and_scheduler(self: Trainer, checkpoint: str | None) -> None:
        muon = find_muon(self.optimizer)
        if muon is None or checkpoint is None or self.is_deepspeed_enabled:
            return original(self, checkpoint)
        if not consolidated(checkpoint):
            if not self.is_fsdp_enabled and not (Path(checkpoint) / OPTIMIZER_FILE).is_file():
                raise ValueError(
                    f"{checkpoint} holds no {OPTIMIZER_FILE}: it was saved by DeepSpeed or FSDP, or without the state. "
                    + _REMEDY.format(folder=checkpoint)
                )
            return original(self, checkpoint)
        load(muon, checkpoint, cast(nn.Module, self.model))
        schedule = Path(checkpoint) / SCHEDULE_FILE
        if schedule.is_file() and self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(torch.load(schedule, weights_only=True))
        return None

    return _load_optimizer_and_scheduler


def with_whole_models(original: Any) -> Any:
    """Wrap ``Trainer._load_from_checkpoint``."""

    @functools.wraps(original)
    def _load_from_checkpoint(self: Trainer, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled and find_muon(self.optimizer) is not None:
            if consolidated(resume_from_checkpoint):
                return None  # the weights come with the optimizer's state, each rank's own part
            if not any(Path(resume_from_checkpoint).glob("pytorch_model_fsdp*")):
                raise ValueError(
                    f"{resume_from_checkpoint} was not saved by FSDP. " + _REMEDY.format(folder=resume_from_checkpoint)
                )
        original(self, resume_from_checkpoint, model)
        # Whatever the optimizer: an AdamW run that is compared with a Muon run must resume as exactly.
        if not self.is_fsdp_enabled:
            target = self.model if model is None else model
            if isinstance(target, PreTrainedModel) and (Path(resume_from_checkpoint) / "config.json").is_file():
                _load_converted(target, resume_from_checkpoint)
        return None

    return _load_from_checkpoint


def with_whole_best_model(original: Any) -> Any:
    """Wrap ``Trainer._load_best_model``, which would leave fused experts as the last step left them."""

    @functools.wraps(original)
    def _load_best_model(self: Trainer) -> None:
        original(self)
        # DeepSpeed's and FSDP's own checkpoints have the names of the model in training.
        best = Path(self.state.best_model_checkpoint or "")
        own_format = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if not own_format and isinstance(self.model, PreTrainedModel) and (best / "config.json").is_file():
            _load_converted(self.model, str(best))

    return _load_best_model


def _load_converted(model: PreTrainedModel, folder: str) -> None:
    """Load the weights that the hub's layout stores under other names (experts one by one).

    transformers 5.23 saves a model in that layout, and its Trainer loads by plain names: fused experts would stay as
    they are, initialized or trained, with a warning at most.
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
