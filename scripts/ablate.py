"""Swap the optimizer between pretraining and fine-tuning: the paper's Table 6, and remedies where the two differ.

    python scripts/ablate.py recipes/ablations/dense.yaml [--out results/ablate] [--dry-run]

A recipe names, for each of the two phases, a recipe per optimizer and the learning rates to sweep. The first seed
sweeps; the rate with the lowest held-out loss is then run with the other seeds. Every pretrained model is fine-tuned
with every optimizer, and one of them with the recipe's remedies too. Each cell is an ``accelerate launch`` of
scripts/pretrain.py or scripts/sft.py: stop and start again at will, finished cells are skipped and a half-done one goes
on from its checkpoint. A recipe can grow: more rates, seeds or remedies add cells and keep the finished ones.
Writes ``results.json``, ``results.md`` and ``results.png``.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ablate_report import write_report
from cells import ROOT, provenance, write_result
from cells import read_results as cells_done

Rate = float | str  # a text stands for a rate that a sweep has yet to choose
Results = dict[str, dict[str, Any] | None]  # by cell; None: it failed in this run


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train in one phase: a recipe with its sweep, or a checkpoint that somebody else pretrained."""

    recipe: str = ""
    checkpoint: str = ""
    learning_rates: tuple[float, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.recipe) == bool(self.checkpoint) or bool(self.recipe) != bool(self.learning_rates):
            raise ValueError(f"an arm has either a checkpoint, or a recipe and learning_rates: {self}")
        if not all(isinstance(rate, float) for rate in self.learning_rates):
            raise ValueError(f"learning_rates must be numbers with a dot (YAML reads 2e-5 as text): {self}")


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A recipe of ``recipes/ablations``."""

    seeds: list[int]
    accelerate_config: str
    pretrain: dict[str, Arm]
    sft: dict[str, Arm]
    pretrain_options: dict[str, Any] = field(default_factory=dict)
    sft_options: dict[str, Any] = field(default_factory=dict)
    remedies: dict[str, Arm] = field(default_factory=dict)
    remedies_for: str = "adamw"

    def __post_init__(self) -> None:
        if not self.seeds or self.remedies_for not in self.pretrain or self.sft.keys() & self.remedies.keys():
            raise ValueError("needs seeds, remedies_for among the pretrain arms, and remedies with names of their own")


@dataclass(frozen=True)
class Group:
    """The cells of one arm: ``sft/adamw-muon`` is Muon's fine-tuning of what AdamW pretrained."""

    name: str
    arm: Arm
    parent: str | None = None


@dataclass(frozen=True)
class Cell:
    """One training run."""

    group: Group
    rate: Rate
    seed: int
    source: str | None = None

    @property
    def name(self) -> str:
        """Folder below ``--out``."""
        return cell_name(self.group.name, self.rate, self.seed)


def cell_name(group: str, rate: Rate, seed: int) -> str:
    """``sft/adamw-muon_lr0.003_seed1``."""
    return f"{group}_lr{rate if isinstance(rate, str) else format(rate, 'g')}_seed{seed}"


def main() -> int:
    """Run what is missing, report all; 1 if a cell failed or could not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, help="default: results/ablate-NAME")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of what is missing")
    arguments = parser.parse_args()
    # Cells run from the repository's root, wherever this was started.
    out = (arguments.out or Path(f"results/ablate-{arguments.recipe.stem}")).resolve()
    ablation = read_ablation(arguments.recipe)
    results = read_results(ablation, out)
    every = list(cells(ablation, out, results, guess=True))
    todo = [cell for cell in every if cell.name not in results]
    print(f"{len(every)} cells, {len(every) - len(todo)} already done in {out}", flush=True)
    if arguments.dry_run:
        print(*(shlex.join(command(ablation, cell, out)) for cell in todo), sep="\n")
        return 0
    run_all(ablation, out, results, len(every))
    done = [row for cell in cells(ablation, out, results) if (row := results.get(cell.name))]
    if done:
        chosen = {group.name: choose(group, ablation, results) for group in groups(ablation)}
        print(write_report(out, ablation, done, chosen, provenance(f"python scripts/ablate.py {arguments.recipe}")))
    for name in (name for name, result in results.items() if result is None):
        print(f"FAILED: {name}; see {out / name / 'log.txt'}; start again to retry", file=sys.stderr)
    if left := len(every) - len(done):
        print(f"{left} of {len(every)} cells failed or build on one that did", file=sys.stderr)
    return 1 if left else 0


def read_ablation(path: Path) -> Ablation:
    """Read a recipe; an unknown or a missing key is a TypeError that names it."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    for phase in ("pretrain", "sft", "remedies"):
        arms = raw.get(phase, {}).items()
        raw[phase] = {name: Arm(**arm | {"learning_rates": tuple(arm.get("learning_rates", ()))}) for name, arm in arms}
    return Ablation(**raw)


def groups(ablation: Ablation) -> list[Group]:
    """Pretraining, then every pair, then the remedies."""
    pretraining = [Group(f"pretrain/{name}", arm) for name, arm in ablation.pretrain.items() if arm.recipe]
    pairs = [(parent, name, arm) for name, arm in ablation.sft.items() for parent in ablation.pretrain]
    pairs += [(ablation.remedies_for, name, arm) for name, arm in ablation.remedies.items()]
    return pretraining + [Group(f"sft/{parent}-{name}", arm, parent) for parent, name, arm in pairs]


def cells(ablation: Ablation, out: Path, results: Results, *, guess: bool = False) -> Iterator[Cell]:
    """What can run as far as the results tell; with ``guess`` also what waits for a sweep or for pretraining."""
    first, *others = ablation.seeds
    for group in groups(ablation):
        best = choose(group, ablation, results, guess=guess)
        runs = [(rate, first) for rate in group.arm.learning_rates]
        runs += [(best, seed) for seed in others if best is not None]
        for rate, seed in runs:
            source = source_of(group, seed, ablation, out, results, guess=guess) if group.parent else None
            if source or not group.parent:
                yield Cell(group, rate, seed, source)


def choose(group: Group, ablation: Ablation, results: Results, *, guess: bool = False) -> Rate | None:
    """The rate of the sweep with the lowest held-out loss; None, or a name to print, while the sweep is not done."""
    rates = group.arm.learning_rates
    sweep = {rate: cell_name(group.name, rate, ablation.seeds[0]) for rate in rates}
    losses = {rate: result["eval_loss"] for rate, name in sweep.items() if (result := results.get(name))}
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if finite and all(name in results for name in sweep.values()):
        return min(finite, key=finite.__getitem__)
    if len(rates) == 1 and results.get(sweep[rates[0]], {}) is not None:
        return rates[0]
    return "BEST-OF-" + "-".join(f"{rate:g}" for rate in rates) if guess else None


def source_of(
    group: Group, seed: int, ablation: Ablation, out: Path, results: Results, *, guess: bool = False
) -> str | None:
    """The model to fine-tune, None if it is not pretrained yet: the same seed's, at its optimizer's best rate."""
    arm = ablation.pretrain[group.parent or ""]
    if arm.checkpoint:
        return arm.checkpoint
    best = choose(Group(f"pretrain/{group.parent}", arm), ablation, results, guess=guess)
    name = cell_name(f"pretrain/{group.parent}", best, seed) if best is not None else ""
    return str(out / name) if guess or results.get(name) else None


def command(ablation: Ablation, cell: Cell, out: Path) -> list[str]:
    """The command line of one cell, to be run from the repository's root."""
    phase = cell.group.name.partition("/")[0]
    options = ablation.pretrain_options if phase == "pretrain" else ablation.sft_options
    flags = {
        "config": cell.group.arm.recipe,
        **({"model_name_or_path": cell.source} if cell.source else {}),
        **{**options, **cell.group.arm.options},
        "learning_rate": cell.rate,
        "seed": cell.seed,
        "output_dir": out / cell.name,
    }
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ablation.accelerate_config]
    line.append(f"scripts/{phase}.py")
    for key, value in flags.items():
        values = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
        line += [f"--{key}", *map(str, values)]
    return line


def portable(line: list[str], out: Path) -> str:
    """A command without what differs between machines."""
    return shlex.join(["accelerate", "launch", *line[3:]]).replace(str(out), "OUT")


def run_all(ablation: Ablation, out: Path, results: Results, total: int) -> None:
    """Run what is missing, one at a time, into ``results``; each result can make further cells known."""
    while cell := next((cell for cell in cells(ablation, out, results) if cell.name not in results), None):
        result = results[cell.name] = run_cell(ablation, cell, out)
        text = "FAILED"
        if result:
            accuracy = result.get("eval_mean_token_accuracy")
            text = f"held-out loss {result['eval_loss']:.4f}"
            text += f", accuracy {accuracy:.4f}, " if accuracy is not None else ", "
            text += f"{result['seconds']:.0f} s"
        left = seconds_left(ablation, out, results) / 60
        done = sum(other.name in results for other in cells(ablation, out, results, guess=True))
        print(f"[{done}/{total}] {cell.name}: {text}; about {left:.0f} min left", flush=True)


def seconds_left(ablation: Ablation, out: Path, results: Results) -> float:
    """Missing cells of a phase times the mean of its finished ones (of all, before it has any)."""
    taken: dict[str, list[float]] = {"": [0.0] if not any(results.values()) else []}
    for name, result in results.items():
        if result:
            for phase in ("", name.partition("/")[0]):
                taken.setdefault(phase, []).append(result["seconds"])
    todo = [cell for cell in cells(ablation, out, results, guess=True) if cell.name not in results]
    return sum(statistics.fmean(taken.get(cell.name.partition("/")[0], taken[""])) for cell in todo)


def run_cell(ablation: Ablation, cell: Cell, out: Path) -> dict[str, Any] | None:
    """One subprocess; its result, or None if it failed."""
    folder, line = out / cell.name, command(ablation, cell, out)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        # Every process of the cell inherits this file and so holds the lock: when only this script was killed, its last
        # cell lives on, and a second one must not write into the same folder.
        fcntl.flock(log, fcntl.LOCK_EX)
        code = subprocess.run(line, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    state = folder / "trainer_state.json"
    if code != 0 or not state.is_file():
        return None
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    evaluations = [row for row in history if "eval_loss" in row]
    if not evaluations:
        return None
    result = {
        **{"group": cell.group.name, "learning_rate": cell.rate, "seed": cell.seed},
        **{key: evaluations[-1][key] for key in ("eval_loss", "eval_mean_token_accuracy") if key in evaluations[-1]},
        **{"eval_loss_before": evaluations[0]["eval_loss"], "steps": evaluations[-1]["step"]},
        **{"seconds": round(time.perf_counter() - start, 1), "command": portable(line, out)},
    }
    return write_result(folder, result)


def read_results(ablation: Ablation, out: Path) -> Results:
    """Finished cells.

    Raises:
        SystemExit: a finished cell was run with other options than the recipe has now.
    """
    results: Results = cells_done(out)
    for cell in cells(ablation, out, results):
        result = results.get(cell.name)
        if result and result["command"] != portable(command(ablation, cell, out), out):
            raise SystemExit(
                f"{out / cell.name} was run as\n{result['command']}\nand the recipe has changed: use another --out"
            )
    return results


if __name__ == "__main__":
    sys.exit(main())
