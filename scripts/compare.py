"""Compare Muon with AdamW on the offline pretraining recipe: learning rates x seeds x token budgets, paired by seed.

    python scripts/offline_data.py
    python scripts/compare.py --out results/compare --parallel 2 --threads 1

Every cell is a run of ``scripts/pretrain.py`` with a complete schedule of its own. A seed draws the initial weights and
the order of the data, the same for both optimizers: differences are paired. Stop and start again at will: what is done
is skipped, and a half-done one goes on from its checkpoint. Writes ``results.json``, ``results.md``, ``results.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cells import ROOT, provenance, write_result
from compare_report import write_report

RECIPES = ROOT / "recipes" / "offline" / "pretrain"
TOKENS_PER_STEP = 16 * 256  # the recipe's batch
# Measured on one core of a server CPU; only the estimate before the first finished cell depends on it.
SECONDS_PER_STEP = 0.55


@dataclass(frozen=True)
class Cell:
    """One training run."""

    optimizer: str
    learning_rate: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Folder name."""
        return f"{self.optimizer}_lr{self.learning_rate:g}_steps{self.steps}_seed{self.seed}"


def main() -> int:
    """Run what is missing, report all; 1 if a cell failed."""
    arguments = parse_arguments()
    cells = grid(arguments)
    todo = [cell for cell in cells if read_result(arguments.out, cell) is None]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} already done in {arguments.out}")
    print_estimate(arguments, todo)
    if arguments.dry_run:
        for cell in todo:
            print(" ".join(command(arguments, cell)))
        return 0
    failed = run_all(arguments, todo)
    results = [result for cell in cells if (result := read_result(arguments.out, cell)) is not None]
    if results:
        command_line = f"python scripts/compare.py {' '.join(sys.argv[1:])}"
        print(write_report(arguments.out, results, provenance(command_line, threads=arguments.threads)))
    for name in failed:
        print(
            f"FAILED: {name}; see {arguments.out / 'cells' / name / 'log.txt'}; start again to retry", file=sys.stderr
        )
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    """The grid and how to run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/compare"))
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tokens", type=float, default=3.4e6, help="budget of a run (default: %(default)g)")
    parser.add_argument("--muon_shares", type=float, nargs="+", default=[1.0, 0.5], help="Muon's shares of the budget")
    parser.add_argument("--parallel", type=int, default=1, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads per cell")
    parser.add_argument("--dry_run", action="store_true", help="print the commands only")
    parser.add_argument("extra", nargs="*", help="after --: more options for scripts/pretrain.py, in every cell")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()  # cells run from the repository's root
    return arguments


def grid(arguments: argparse.Namespace) -> list[Cell]:
    """Seed by seed, so that a stopped comparison has complete pairs."""
    steps = max(1, round(arguments.tokens / TOKENS_PER_STEP))
    cells = []
    for seed in arguments.seeds:
        for rate in arguments.learning_rates:
            cells.append(Cell("adamw", rate, steps, seed))
            cells += [Cell("muon", rate, max(1, round(steps * share)), seed) for share in arguments.muon_shares]
    return cells


def command(arguments: argparse.Namespace, cell: Cell) -> list[str]:
    """The command line of one cell."""
    every = str(max(1, cell.steps // 4))
    return [
        *(sys.executable, str(ROOT / "scripts" / "pretrain.py")),
        *("--config", str(RECIPES / f"config_{cell.optimizer}.yaml")),
        *("--learning_rate", f"{cell.learning_rate:g}", "--max_steps", str(cell.steps), "--seed", str(cell.seed)),
        *("--eval_steps", every, "--save_steps", every, "--disable_tqdm", "true"),
        *("--output_dir", str(arguments.out / "cells" / cell.name)),
        *arguments.extra,
    ]


def run_all(arguments: argparse.Namespace, todo: list[Cell]) -> list[str]:
    """Run the missing cells, ``parallel`` at a time; return the names of those that failed."""
    start, failed = time.perf_counter(), []
    with ThreadPoolExecutor(max_workers=arguments.parallel) as pool:
        jobs = {pool.submit(run_cell, arguments, cell): cell for cell in todo}
        for done, job in enumerate(as_completed(jobs), start=1):
            cell, result = jobs[job], job.result()
            left = (time.perf_counter() - start) / done * (len(todo) - done) / 60
            if result is None:
                failed.append(cell.name)
            text = "FAILED" if result is None else f"held-out loss {result['eval_loss']:.4f}, {result['seconds']:.0f} s"
            print(f"[{done}/{len(todo)}] {cell.name}: {text}; about {left:.0f} min left", flush=True)
    return failed


def run_cell(arguments: argparse.Namespace, cell: Cell) -> dict[str, Any] | None:
    """One subprocess; its result, or None if it failed."""
    folder = arguments.out / "cells" / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(arguments.threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
    }
    start = time.perf_counter()
    with (folder / "log.txt").open("a") as log:
        code = subprocess.run(
            command(arguments, cell), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code != 0:
        return None
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [row for row in history if "eval_loss" in row]
    result = {
        **asdict(cell),
        "tokens": cell.steps * TOKENS_PER_STEP,
        "eval_loss_before": losses[0]["eval_loss"],
        "eval_loss": losses[-1]["eval_loss"],
        "seconds": time.perf_counter() - start,
        "eval_curve": [[row["step"], row["eval_loss"]] for row in losses],
        "train_curve": [[row["step"], row["loss"]] for row in history if "loss" in row],
    }
    return write_result(folder, result)


def read_result(out: Path, cell: Cell) -> dict[str, Any] | None:
    """The result of a finished cell."""
    file = out / "cells" / cell.name / "result.json"
    return json.loads(file.read_text()) if file.is_file() else None


def print_estimate(arguments: argparse.Namespace, todo: list[Cell]) -> None:
    """Hours to expect, from the cells that are done if there are any."""
    done = [json.loads(file.read_text()) for file in arguments.out.glob("cells/*/result.json")]
    rate = sum(r["seconds"] for r in done) / sum(r["steps"] for r in done) if done else SECONDS_PER_STEP
    minutes = sum(cell.steps for cell in todo) * rate / 60 / max(1, min(arguments.parallel, len(todo) or 1))
    basis = "measured here" if done else "a guess: one server core"
    print(f"{len(todo)} cells to run, about {minutes:.0f} min at {rate:.2f} s a step ({basis})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
