"""The paper's experiments in miniature: a grid of models and arms, each cell a pretraining with a schedule of its own.

    python scripts/offline_data.py
    python scripts/paper.py recipes/paper/scaling.yaml [--out results/paper-scaling] [--dry-run]

A recipe names models (size, tokens, the grid of learning rates and batches) and arms (a recipe of scripts/pretrain.py
and options). The first seed searches the grid, its two best points are run with the other seeds, and the lower mean is
chosen. An arm with ``like`` searches nothing: it takes what was chosen for another arm, as the paper gives Muon what
was tuned for AdamW.

All cells run in this process, for starting Python would take longer than many of them. Stop and start again at will:
finished cells are skipped, the one that was running starts anew. Models, arms, rates and seeds can be added later.
Writes ``results.json``, ``results.md`` and ``results.png``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from cells import ROOT, provenance, read_results, write_result
from paper_report import write_report

BLOCK = 128  # tokens per sequence, as in recipes/paper/pretrain
FINALISTS = 2
REPORTS = ("arms", "scaling")
Point = tuple[float, int]  # learning rate, sequences per step
Results = dict[str, dict[str, Any] | None]  # by cell; None: it failed in this run


@dataclass(frozen=True, kw_only=True)
class Model:
    """A size, its budget, and the grid that is searched for it."""

    config_overrides: str
    tokens: float
    learning_rates: list[float]
    batches: list[int]

    def grid(self) -> list[Point]:
        """Every learning rate with every batch."""
        return [(rate, batch) for batch in self.batches for rate in self.learning_rates]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train; ``like`` names the arm whose best point it takes over."""

    recipe: str
    options: dict[str, Any] = field(default_factory=dict)
    like: str = ""
    paper: dict[str, float] = field(default_factory=dict)
    """The paper's figures for it, by column of the report."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A recipe of ``recipes/paper``."""

    report: str
    seeds: list[int]
    models: dict[str, Model]
    arms: dict[str, Arm]
    options: dict[str, Any] = field(default_factory=dict)
    reference: str = ""
    """The arm that the others are compared with."""

    def __post_init__(self) -> None:
        if self.report not in REPORTS:
            raise ValueError(f"report must be one of {REPORTS}, got {self.report!r}")
        if self.reference and self.reference not in self.arms:
            raise ValueError(f"reference must be one of {list(self.arms)}, got {self.reference!r}")
        searching = {name for name, arm in self.arms.items() if not arm.like}
        if not self.seeds or not all(arm.like in searching for arm in self.arms.values() if arm.like):
            raise ValueError(f"needs seeds, and every 'like' among the arms that search: {sorted(searching)}")


@dataclass(frozen=True)
class Cell:
    """One training run."""

    model: str
    arm: str
    learning_rate: float
    batch: int
    seed: int

    @property
    def name(self) -> str:
        """Folder below ``--out``."""
        return f"{self.model}/{self.arm}_lr{self.learning_rate:g}_batch{self.batch}_seed{self.seed}"


def main() -> int:
    """Run what is missing, report all; 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, help="default: results/paper-NAME")
    parser.add_argument("--models", nargs="+", help="run only these of the recipe now; the report has all that is done")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of what can run now")
    arguments = parser.parse_args()
    out = (arguments.out or ROOT / "results" / f"paper-{arguments.recipe.stem}").resolve()
    experiment = read_experiment(arguments.recipe)
    results = finished(experiment, out)
    now = only(experiment, arguments.models)
    todo = [cell for cell in cells(now, results) if cell.name not in results]
    print(f"{len(results)} cells done in {out}, {len(todo)} to run before the next choice", flush=True)
    if arguments.dry_run:
        print(*(shlex.join(command(now, cell, out)) for cell in todo), sep="\n")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a second run must not write into the same cells
        run_all(now, out, results)
    rows = [row for cell in cells(experiment, results) if (row := results.get(cell.name))]
    if rows:
        chosen = best_points(experiment, results)
        print(write_report(out, experiment, rows, chosen, provenance(f"python scripts/paper.py {arguments.recipe}")))
    failed = [name for name, result in results.items() if result is None]
    for name in failed:
        print(f"FAILED: {name}; see {out / name / 'log.txt'}; start again to retry", file=sys.stderr)
    return 1 if failed else 0


def read_experiment(path: Path) -> Experiment:
    """Read a recipe; an unknown or a missing key is a TypeError that names it."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    raw["models"] = {name: Model(**model) for name, model in raw["models"].items()}
    raw["arms"] = {name: Arm(**arm) for name, arm in raw["arms"].items()}
    return Experiment(**raw)


def only(experiment: Experiment, names: list[str] | None) -> Experiment:
    """The experiment with these of its models; all if none are named."""
    if unknown := set(names or ()) - experiment.models.keys():
        raise SystemExit(f"the recipe has no models {sorted(unknown)}: {list(experiment.models)}")
    models = {name: model for name, model in experiment.models.items() if not names or name in names}
    return replace(experiment, models=models)


def cells(experiment: Experiment, results: Results) -> Iterator[Cell]:
    """What can run as far as the results tell: the grid with the first seed, its best with all, what reuses it."""
    first, *others = experiment.seeds
    for name, model in experiment.models.items():
        for arm, options in experiment.arms.items():
            if options.like:
                best = choose(experiment, name, options.like, results)
                runs = [(best, seed) for seed in experiment.seeds if best]
            else:
                runs = [(point, first) for point in model.grid()]
                runs += [(point, seed) for point in finalists(experiment, name, arm, results) for seed in others]
            yield from (Cell(name, arm, *point, seed) for point, seed in runs)


def finalists(experiment: Experiment, model: str, arm: str, results: Results) -> list[Point]:
    """The best points of the first seed, none while that search is not done.

    More than one: near its largest stable rate a run's loss depends on the seed, and one lucky seed would tune badly.
    """
    grid = experiment.models[model].grid()
    losses = {point: loss(Cell(model, arm, *point, experiment.seeds[0]), results) for point in grid}
    if None in losses.values():
        return []
    return sorted(grid, key=lambda point: losses[point] or math.inf)[:FINALISTS]


def choose(experiment: Experiment, model: str, arm: str, results: Results) -> Point | None:
    """The finalist with the lowest mean loss over seeds; None while one of their runs is missing, or if all failed."""
    means: dict[Point, float] = {}
    for point in finalists(experiment, model, arm, results):
        losses = [loss(Cell(model, arm, *point, seed), results) for seed in experiment.seeds]
        if None in losses:
            return None
        means[point] = sum(value for value in losses if value is not None) / len(losses)
    best = min(means, key=means.__getitem__, default=None)
    return best if best and math.isfinite(means[best]) else None


def loss(cell: Cell, results: Results) -> float | None:
    """Held-out loss; None: not run yet; infinite: it failed or ended in NaN."""
    if cell.name not in results:
        return None
    row = results[cell.name]
    return row["eval_loss"] if row and math.isfinite(row["eval_loss"]) else math.inf


def best_points(experiment: Experiment, results: Results) -> dict[str, Point | None]:
    """The chosen point of every ``model/arm``."""
    return {
        f"{model}/{arm}": choose(experiment, model, options.like or arm, results)
        for model in experiment.models
        for arm, options in experiment.arms.items()
    }


def command(experiment: Experiment, cell: Cell, out: Path) -> list[str]:
    """The words of ``python scripts/pretrain.py`` that are this cell."""
    model, arm = experiment.models[cell.model], experiment.arms[cell.arm]
    flags = {
        "config": arm.recipe,
        "config_overrides": model.config_overrides,
        **experiment.options,
        **arm.options,
        "learning_rate": f"{cell.learning_rate:g}",
        "per_device_train_batch_size": cell.batch,
        "max_steps": max(1, round(model.tokens / (cell.batch * BLOCK))),
        "seed": cell.seed,
        "output_dir": out / cell.name,
    }
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


def portable(line: list[str], out: Path) -> str:
    """A command without what differs between machines."""
    return shlex.join(["python", "scripts/pretrain.py", *line]).replace(str(out), "OUT")


def finished(experiment: Experiment, out: Path) -> Results:
    """Finished cells.

    Raises:
        SystemExit: one of them was run with other options than the recipe has now.
    """
    results: Results = dict(read_results(out))
    for cell in cells(experiment, results):
        row = results.get(cell.name)
        if row and row["command"] != portable(command(experiment, cell, out), out):
            raise SystemExit(
                f"{out / cell.name} was run as\n{row['command']}\nand the recipe has changed: use another --out"
            )
    return results


def run_all(experiment: Experiment, out: Path, results: Results) -> None:
    """Run what is missing, one at a time, into ``results``; each result can make further cells known."""
    while cell := next((cell for cell in cells(experiment, results) if cell.name not in results), None):
        row = results[cell.name] = run_cell(experiment, cell, out)
        text = f"held-out loss {row['eval_loss']:.4f}, {row['seconds']:.0f} s" if row else "FAILED"
        print(f"[{len(results)}] {cell.name}: {text}", flush=True)


def run_cell(experiment: Experiment, cell: Cell, out: Path) -> dict[str, Any] | None:
    """Train in this process, with what it prints in ``log.txt``; None if it failed."""
    folder, line = out / cell.name, command(experiment, cell, out)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        try:
            with contextlib.chdir(ROOT), contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                measured = train(line)
        except Exception:
            traceback.print_exc(file=log)
            return None
    result = {**asdict(cell), **measured, "seconds": round(time.perf_counter() - start, 1)}
    return write_result(folder, result | {"command": portable(line, out)})


def train(line: list[str]) -> dict[str, Any]:
    """One run of scripts/pretrain.py: losses, sizes of the weights, and whether the schedule was completed."""
    from lifecycle import train_and_report
    from offline_data import small_vocabulary
    from pretrain import prepare
    from weights import WeightSizes

    small_vocabulary(ROOT / "data" / "offline")
    trainer = prepare(line)
    sizes = WeightSizes(trainer.model)
    trainer.add_callback(sizes)
    train_and_report(trainer)
    history = trainer.state.log_history
    curve = [[row["step"], row["eval_loss"]] for row in history if "eval_loss" in row]
    return {
        **{"parameters": sizes.parameters, "tokens": trainer.args.max_steps * trainer.args.train_batch_size * BLOCK},
        **{"steps": trainer.state.global_step, "scheduled_steps": trainer.args.max_steps},
        "eval_loss": curve[-1][1],
        "train_loss": [row["loss"] for row in history if "loss" in row][-1],  # mean over the last logging_steps
        "curve": curve,
        "sizes": sizes.rows,
    }


if __name__ == "__main__":
    sys.exit(main())
