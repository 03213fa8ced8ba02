"""Checkpoints of any engine as the one that every engine reads, and states of other Muons as ours.

A Trainer checkpoint holds the optimizer in the engine's own form: ``optimizer.pt`` (one process, DDP), shards of flat
tensors under ``global_step*`` (DeepSpeed ZeRO), ``optimizer.bin`` or ``optimizer_0/`` (FSDP2). :func:`read` turns each
into a canonical state (:mod:`hf_muon.canonical`) without any engine installed; :func:`consolidate` writes it as a
checkpoint that ``resume_from_checkpoint`` takes on any engine and number of ranks.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import canonical, checks

OPTIMIZER_FILE = "optimizer.pt"
SCHEDULE_FILE = "scheduler.pt"
# What belongs to one engine's own form; the model's files, the schedule and the Trainer's state are copied.
_ENGINE_FILES = re.compile(r"^(global_step\d+|latest|zero_to_(fp32|torch)\.py|optimizer.*|pytorch_model_fsdp.*)$")


def read(folder: str | Path) -> dict[str, Any]:
    """The optimizer state of a checkpoint, whole and by parameter name, on the CPU.

    Args:
        folder: a Trainer checkpoint of any engine. Loaded with ``weights_only=True``.

    Returns:
        A canonical state dict; ``weights`` holds what the engine's optimizer files say, which for one process and DDP
        is nothing (the model's own files are exact there).

    Raises:
        FileNotFoundError: no optimizer state in ``folder``.
        ValueError: another optimizer's state, or shards that do not make up whole parameters.
    """
    folder = Path(folder)
    zero = zero_folder(folder)
    if zero is not None:
        return _read_zero(zero)
    for name, directory in (("optimizer.bin", False), ("optimizer_0", True)):
        if (folder / name).exists():
            model = folder / ("pytorch_model_fsdp_0" if directory else "pytorch_model_fsdp.bin")
            return _read_fsdp(_load_dcp if directory else _load, folder / name, model)
    if not (folder / OPTIMIZER_FILE).exists():
        raise FileNotFoundError(
            f"{folder} holds no optimizer state: no {OPTIMIZER_FILE}, global_step* or optimizer.bin"
        )
    state_dict = _load(folder / OPTIMIZER_FILE)
    checks.check_algorithms(state_dict)
    if canonical.is_canonical(state_dict):
        return state_dict
    return canonical.make(state_dict["param_groups"], canonical.by_name(state_dict), {})


def zero_folder(folder: str | Path) -> Path | None:
    """Where DeepSpeed keeps the state of a checkpoint: what its ``latest`` names, for older ones may lie beside it."""
    folder = Path(folder)
    latest = folder / "latest"
    if latest.is_file():
        return folder / latest.read_text().strip()
    return max(folder.glob("global_step*"), key=lambda p: p.stat().st_mtime, default=None)


def consolidate(
    folder: str | Path,
    out: str | Path,
    weights: Callable[[list[str]], Mapping[str, Tensor]] | None = None,
    write_model: Callable[[str, Mapping[str, Tensor]], None] | None = None,
) -> dict[str, Any]:
    """Write ``folder`` as a checkpoint for every engine and number of ranks into the new folder ``out``.

    Args:
        folder: a Trainer checkpoint.
        out: must not exist; appears only when it is complete.
        weights: gives the weights of these parameters from the model's own files, where the optimizer's hold none.
        write_model: writes the model's files into a folder that has none (ZeRO-3, sharded FSDP2), from its weights.

    Returns:
        The canonical state that was written to ``out/optimizer.pt``.

    Raises:
        FileExistsError: ``out`` exists.
        FileNotFoundError, ValueError: see :func:`read`.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: name a new folder")
    state = read(folder)
    missing = [n for g in state["param_groups"] for n in g["param_names"] if n not in state["weights"]]
    if weights is not None and missing:
        state["weights"].update(weights(missing))
    missing = [name for name in missing if name not in state["weights"]]
    if missing:
        raise ValueError(
            f"{folder} keeps the weights of {missing[0]} and others in the model's files only: give `weights` to read "
            "them, as python -m hf_muon consolidate does"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for path in folder.iterdir():
            if not _ENGINE_FILES.match(path.name):
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, partial / path.name)
        if write_model is not None and not any(partial.glob("*.safetensors")):
            write_model(str(partial), state["weights"])
        schedule = _zero_schedule(folder)
        if schedule and not (partial / SCHEDULE_FILE).exists():
            torch.save(schedule, partial / SCHEDULE_FILE)
        torch.save(state, partial / OPTIMIZER_FILE)
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return state


class _Plain:
    """Stands for DeepSpeed's own classes in its files: kept as data, none of their code runs."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def _load(path: Path) -> Any:
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stubs: list[Any] = [(_Plain, name) for name in unknown if name.startswith("deepspeed.")]
    with torch.serialization.safe_globals(stubs):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _load_dcp(folder: Path) -> Any:
    """A checkpoint of torch.distributed.checkpoint, whole."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "whole.pt"
        dcp_to_torch_save(folder, target)
        # Not mapped into memory, because the file goes.
        return torch.load(target, map_location="cpu", weights_only=True)


def _read_fsdp(load: Any, optimizer: Path, model: Path) -> dict[str, Any]:
    state_dict = load(optimizer)
    state_dict = state_dict.get("optimizer", state_dict)
    checks.check_algorithms(state_dict)
    groups = state_dict["param_groups"]
    weights: dict[str, Tensor] = {}
    if model.exists():
        found = load(model)
        found = found.get("model", found)
        weights = {n: found[n] for g in groups for n in g["param_names"] if n in found}
    return canonical.make(groups, state_dict["state"], weights)


_RANK_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")


def _read_zero(folder: Path) -> dict[str, Any]:
    """DeepSpeed: every rank's flat tensors, taken apart by what the optimizer noted of their layout."""
    files: dict[int, Path] = {}
    for path in folder.iterdir():
        found = _RANK_FILE.search(path.name)
        if found and int(found[2]):
            raise ValueError(f"{path.name}: checkpoints of tensor-parallel DeepSpeed runs are not read")
        if found:
            files[int(found[1])] = path
    if not files or sorted(files) != list(range(len(files))):
        raise ValueError(f"{folder} holds the optimizer states of ranks {sorted(files)}: some are missing")
    groups: list[dict[str, Any]] = []
    parts: dict[tuple[str, str], list[tuple[int, int, Tensor]]] = {}
    steps: dict[str, Tensor] = {}
    for rank in sorted(files):
        groups = _take_rank(_load(files[rank])["optimizer_state_dict"], parts, steps, files[rank])
    whole = {key: _whole(*key, found) for key, found in parts.items()}
    shapes = {name: shape for g in groups for name, shape in zip(g["param_names"], g["shapes"], strict=True)}
    state: dict[str, dict[str, Tensor]] = {name: {} for name in shapes}
    weights = {}
    for (name, key), tensor in whole.items():
        if key == "weight":
            weights[name] = tensor.view(shapes[name])
        else:
            state[name][key] = tensor.view(shapes[name])
            if name in steps:
                state[name]["step"] = steps[name]
    return canonical.make(groups, state, weights)


def _zero_schedule(folder: Path) -> Any:
    """The state of a schedule of DeepSpeed's own, which it keeps beside the model."""
    zero = zero_folder(folder)
    file = next(iter(sorted(zero.glob("*_model_states.pt"))), None) if zero is not None else None
    return _load(file).get("lr_scheduler") if file is not None else None


def check_zero(folder: str | Path) -> None:
    """That a DeepSpeed checkpoint, if there is one in ``folder``, holds this package's optimizer.

    Raises:
        ValueError: another optimizer's. DeepSpeed itself would find something else to say, or nothing.
    """
    zero = zero_folder(folder)
    file = next(iter(sorted(zero.glob("*zero_pp_rank_*_optim_states.pt"))), None) if zero is not None else None
    if file is not None:
        saved = _load(file)["optimizer_state_dict"]
        base = saved.get("base_optimizer_state") or saved["optimizer_state_dict"]
        checks.check_algorithms(base if isinstance(base, dict) else {})


def _take_rank(
    saved: dict[str, Any],
    parts: dict[tuple[str, str], list[tuple[int, int, Tensor]]],
    steps: dict[str, Tensor],
    path: Path,
) -> list[dict[str, Any]]:
    """Add one rank's slices to ``parts``; returns its groups."""
    base = saved.get("base_optimizer_state") or saved["optimizer_state_dict"]
    flats = saved.get("single_partition_of_fp32_groups") or saved["fp32_flat_groups"]
    if not isinstance(base, dict):
        raise ValueError(f"{path.name}: saved with elastic_checkpoint, which drops the optimizer's groups: turn it off")
    checks.check_algorithms(base)
    for g, group in enumerate(base["param_groups"]):
        if "shards" not in group:
            raise ValueError(f"{path.name}: saved before the first step, or by a version that noted no layout")
        # ZeRO-1 and -2 have one flat tensor for each group; ZeRO-3 numbers them over all groups.
        for index, part in zip(group["params"], sorted(group["shards"]), strict=True):
            flat = flats[part if "fp32_flat_groups" in saved else g]
            state = base["state"].get(index, {})
            for name, offset, start, stop in group["shards"][part]:
                here = slice(offset, offset + stop - start)
                for key in canonical.SHARED[group["algorithm"]]:
                    if key in state:
                        parts.setdefault((name, key), []).append((start, stop, state[key][here]))
                parts.setdefault((name, "weight"), []).append((start, stop, flat[here]))
                if "step" in state:
                    steps[name] = state["step"]
    return base["param_groups"]


def _whole(name: str, key: str, found: list[tuple[int, int, Tensor]]) -> Tensor:
    found = sorted((x for x in found if x[1] > x[0]), key=lambda x: x[0])
    ends = [0, *(stop for _, stop, _ in found)]
    if [start for start, _, _ in found] != ends[:-1]:
        raise ValueError(
            f"{key} of {name} is stored in {[x[:2] for x in found]}: a rank's part is missing or there twice"
        )
    return torch.cat([tensor.detach() for _, _, tensor in found])
