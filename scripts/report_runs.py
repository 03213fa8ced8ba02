"""What ``scripts/report.py`` reads of a run: its log, model card and optimizer settings. Nothing of it is trusted."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

LARGEST = 1e150
"""Beyond it a number cannot be drawn on an axis with margins and ticks."""
_PER_PARAMETER = {"params", "param_names", "kinds", "shapes", "matrices"}
_MUON_ONLY = {"momentum", "nesterov", "ns_steps", "ns_coefficients", "ns_dtype", "adjust_lr_fn", "update_rms"}


@dataclass(frozen=True)
class Series:
    """One logged number. What is not finite is a NaN, which is a gap in a line."""

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return any(map(math.isfinite, self.values))

    def finite(self) -> list[tuple[int, float]]:
        """Steps and values that can be drawn."""
        return [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]

    def gaps(self) -> list[int]:
        """Steps of the others."""
        return [s for s, v in zip(self.steps, self.values, strict=True) if not math.isfinite(v)]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One output folder of a Trainer."""

    label: str
    folder: Path
    state_file: Path
    state: dict[str, Any]
    history: list[dict[str, Any]]
    notes: list[str]
    """What of it could not be used, and why."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Of the newest checkpoint's optimizer, as in its ``state_dict``."""
    groups_file: Path | None = None
    card: dict[str, dict[str, str]] = field(default_factory=dict)
    """Tables of the model card: ``Optimizer``, ``Training hyperparameters``, ``Framework versions``."""

    def series(self, key: str, *, x: str = "step") -> Series:
        """The last value at each step of what was logged as ``key``, or at ``x`` where an entry has that."""
        found: dict[int, float] = {}
        for row in self.history:
            value = _number(row.get(key))
            at = row.get(x, row["step"])
            at = int(at) if isinstance(at, float) and at.is_integer() else at
            if value is not None and _is_step(at):
                found[at] = value
        return Series(sorted(found), [found[step] for step in sorted(found)])

    def keys(self, prefix: str) -> list[str]:
        """Logged names that begin with ``prefix``, numbered ones by number."""
        names = {key for row in self.history for key in row if key.startswith(prefix)}
        return sorted(names, key=lambda n: [(0, int(p), "") if _small(p) else (1, 0, p) for p in re.split(r"(\d+)", n)])

    def count(self, key: str) -> int | None:
        """What a counter that a resumed process begins again at zero has counted in all; None if it was not logged."""
        values = [value for _, value in self.series(key).finite()]
        if not values:
            return None
        return int(
            sum(now - before if now >= before else now for before, now in zip([0, *values], values, strict=False))
        )

    @property
    def last_step(self) -> int:
        """Of the log."""
        return max((row["step"] for row in self.history), default=0)

    @property
    def is_muon(self) -> bool | None:
        """Whether hf_muon.Muon trained it; None if neither the log nor a checkpoint tells."""
        if self.keys("muon/") or any("algorithm" in group for group in self.groups):
            return True
        return False if self.groups or self.series("loss") else None


def read_run(folder: Path, label: str) -> Run:
    """A run from its folder, finished or not.

    Raises:
        ValueError: it is no run, or its log cannot be read; the message names the file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    checkpoints = sorted(
        (d for d in folder.glob("checkpoint-*") if _small(d.name[11:])), key=lambda d: int(d.name[11:]), reverse=True
    )
    newest = [d / "trainer_state.json" for d in checkpoints if (d / "trainer_state.json").is_file()][:1]
    files = [file for file in (folder / "trainer_state.json", *newest) if file.is_file()]
    if not files:
        raise ValueError(f"no trainer_state.json in {folder}: is it the output_dir of a training run?")
    states = [(_read_state(file), file) for file in files]
    # A run that goes on leaves the state of its earlier end in the folder, so the longer one is the log.
    state, file = max(states, key=lambda pair: _whole(pair[0].get("global_step")))
    rows = [row for row in state["log_history"] if isinstance(row, dict) and _is_step(row.get("step"))]
    notes = []
    if lost := len(state["log_history"]) - len(rows):
        notes.append(f"{lost} entries of the log have no step and were left out")
    groups, groups_file, note = _read_groups([folder, *checkpoints])
    return Run(
        label=label,
        folder=folder,
        state_file=file,
        state=state,
        history=rows,
        notes=notes + ([note] if note else []),
        groups=groups,
        groups_file=groups_file,
        card=_read_card(folder / "README.md"),
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ValueError: there is none; the message names the file.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{file} is no readable JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object")
    return found


def _read_state(file: Path) -> dict[str, Any]:
    state = read_json(file)
    if not isinstance(state.get("log_history"), list):
        raise ValueError(f"{file} has no list log_history: is it of a Trainer?")
    return state


def _read_groups(folders: list[Path]) -> tuple[list[dict[str, Any]], Path | None, str]:
    """Of the newest ``optimizer.pt``: its groups without tensors, its file, and why there are none."""
    for file in (folder / "optimizer.pt" for folder in folders):
        if not file.is_file():
            continue
        try:
            # Tensors on the meta device: a state of many gigabytes is not read. What a pickle would run is refused.
            state = torch.load(file, map_location="meta", weights_only=True, mmap=True)
            groups = [_checked(group) for group in state["param_groups"]]
        except Exception as error:  # a damaged file may raise anything, and the report does without it
            return (
                [],
                None,
                f"{file} was not read: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            )
        return groups, file, ""
    return [], None, ""


def _checked(group: dict[str, Any]) -> dict[str, Any]:
    names = group.get("param_names", [])
    if group.get("algorithm", "muon") not in ("muon", "adamw") or not all(isinstance(name, str) for name in names):
        raise ValueError("its groups are of no optimizer known here")
    return {**group, "params": list(group["params"]), "param_names": list(names)}


def settings(group: dict[str, Any]) -> dict[str, str]:
    """What one optimizer group was set to, without what is said per parameter."""
    hidden = {None: set(), "muon": {"betas", "eps"}, "adamw": {*_MUON_ONLY, "hidden_size"}}.get(
        group.get("algorithm"), set()
    )
    shown = {"tensors": str(len(group.get("params", ())))}
    for key, value in group.items():
        if key not in _PER_PARAMETER | hidden and value is not None:
            shown[str(key)] = f"{value:g}" if isinstance(value, float) else str(value)[:100]
    return shown


def _read_card(file: Path) -> dict[str, dict[str, str]]:
    """``| key | value |`` and ``- key: value`` lines below the headings that model cards have."""
    found: dict[str, dict[str, str]] = {}
    heading = ""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        if line.startswith("#"):
            heading = line.lstrip("#").strip()
        row = re.match(r"\|\s*([^|\-][^|]*?)\s*\|\s*(.*?)\s*\|$", line) or re.match(r"- ([^:]+): (.+)$", line)
        if row and heading in ("Optimizer", "Training hyperparameters", "Framework versions"):
            found.setdefault(heading, {})[row[1]] = row[2]
    return found


def _number(value: Any) -> float | None:
    """A logged number, NaN for what is not finite or beyond all axes, None for what is none."""
    if isinstance(value, str) and value.strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < LARGEST else math.nan


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _whole(value: Any) -> int:
    return value if _is_step(value) else 0


def _small(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 16
