"""A new run that takes over the optimizer state of another one, and nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from .. import canonical, checkpoint
from ..optimizer import Muon
from .checkpoints import _refresh
from .trainer import find_muon

_REMEDY = "Remedy: carry_optimizer: false starts the optimizer's state fresh"


class CarryOptimizerState(TrainerCallback):
    """Before its first step, a run gets the momentum (or AdamW's averages) of a checkpoint.

    Learning rate, weight decay and all other options stay this run's own, as does the step count: for everything at
    once, ``resume_from_checkpoint`` is the way. A resumed run is left alone. Muon's state is taken over from any engine
    and number of ranks to any other; AdamW's only in one process and under DDP.

    Args:
        folder: a Trainer checkpoint of the same model and optimizer.

    Raises:
        ValueError: ``folder`` holds no optimizer state.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir() or not any((*self.folder.glob("optimizer*"), *self.folder.glob("global_step*"))):
            raise ValueError(f"{folder} holds no optimizer state. {_REMEDY}")

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Parameters are where they will stay by now, and nothing has been trained."""
        if state.global_step == 0:
            carry_over(optimizer, self.folder)


def carry_over(optimizer: Any, folder: str | Path) -> None:
    """Put the state of a checkpoint into a fresh optimizer, whose options stay as they are.

    Args:
        optimizer: :class:`hf_muon.Muon` or ``torch.optim.AdamW``, in any wrappers of accelerate and DeepSpeed.
        folder: see :class:`CarryOptimizerState`.

    Raises:
        ValueError: the state is of another optimizer or model; nothing is changed then.
    """
    muon = find_muon(optimizer)
    if muon is None:
        _carry_adamw(_innermost(optimizer), Path(folder))
        return
    saved = checkpoint.read(folder)
    canonical.match(muon.param_groups, saved)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in muon.param_groups]
    muon.load_state_dict(canonical.make(groups, canonical.by_name(saved), saved["weights"]))
    while not isinstance(optimizer, Muon):
        if hasattr(optimizer, "update_lp_params") or hasattr(optimizer, "fp16_groups"):
            _refresh(optimizer)  # DeepSpeed: the weights came with the state
        optimizer = optimizer.optimizer


def _innermost(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _carry_adamw(optimizer: Any, folder: Path) -> None:
    file = folder / checkpoint.OPTIMIZER_FILE
    if not isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adam)) or not file.is_file():
        raise ValueError(
            f"the state in {folder} is carried over to hf_muon.Muon, and from one process or DDP to torch's AdamW, not "
            f"to {type(optimizer).__name__}. {_REMEDY}"
        )
    saved = torch.load(file, "cpu", weights_only=True, mmap=True)
    present = optimizer.state_dict()["param_groups"]
    _check_adamw(optimizer, saved, present, folder)
    # The options of `present` and the values of `saved`: both number the parameters in the order of the groups.
    ids = [i for group in saved["param_groups"] for i in group["params"]]
    ours = [i for group in present for i in group["params"]]
    state = {i: saved["state"][j] for i, j in zip(ours, ids, strict=True) if j in saved["state"]}
    optimizer.load_state_dict({"state": state, "param_groups": present})


def _check_adamw(optimizer: Any, saved: Mapping[str, Any], present: Any, folder: Path) -> None:
    theirs = saved["param_groups"]
    if any("algorithm" in group for group in theirs):
        raise ValueError(f"the state in {folder} is that of hf_muon.Muon, and this run trains with AdamW. {_REMEDY}")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = [[len(group["params"]) for group in groups] for groups in (present, theirs)]
    whole = sizes[0] == sizes[1] and not any(isinstance(p, DTensor) for p in params)
    ids = [i for group in theirs for i in group["params"]]
    states = [saved["state"].get(i, {}) for i in ids]
    if not whole or any("exp_avg" in s and s["exp_avg"].shape != p.shape for s, p in zip(states, params, strict=True)):
        raise ValueError(
            f"the AdamW state in {folder} has groups of {sizes[1]} parameters, and this run of {sizes[0]}, or their "
            f"shapes differ, or an engine has sharded them: another model, or another rule for weight decay. {_REMEDY}"
        )
