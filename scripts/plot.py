"""Draw training runs side by side: loss of all, and the size of Muon's updates.

    python scripts/plot.py runs/offline/sft-muon runs/offline/sft-adamw --out runs/offline/sft.png

Each folder holds the ``trainer_state.json`` that the Trainer writes; the name of a run is what its optimizer was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a server

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart with any colour vision; line styles differ as well, for print.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
RUN_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
TARGET_RMS = 0.2  # of the update divided by the learning rate: the paper's choice (Table 8)
UPDATE_RMS = "muon/update_rms"


def main() -> None:
    """Read the runs, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of training runs")
    parser.add_argument("--labels", nargs="+", help="their names in the legend (default: from the folder)")
    parser.add_argument("--out", type=Path, default=Path("comparison.png"), help="default: %(default)s")
    parser.add_argument("--title", default=None)
    arguments = parser.parse_args()
    labels = arguments.labels or [default_label(run) for run in arguments.runs]
    if len(labels) != len(arguments.runs):
        parser.error(f"{len(arguments.runs)} runs but {len(labels)} labels")
    histories = {label: read_history(run) for label, run in zip(labels, arguments.runs, strict=True)}
    draw(histories, arguments.out, title=arguments.title)
    print(f"figure: {arguments.out}")


def default_label(run: Path) -> str:
    """``runs/offline/sft-muon`` is Muon."""
    names = {"muon": "Muon", "adamw": "AdamW"}
    tail = run.resolve().name.rsplit("-", 1)[-1].rsplit("_", 1)[-1].lower()
    return names.get(tail, run.resolve().name)


def read_history(run: Path) -> list[dict[str, Any]]:
    """The log history of a finished or a running run.

    Raises:
        FileNotFoundError: there is no ``trainer_state.json`` in the folder or its checkpoints.
    """
    found = [file for file in run.glob("checkpoint-*/trainer_state.json") if file.parent.name[11:].isdigit()]
    checkpoints = sorted(found, key=lambda file: int(file.parent.name[11:]))
    for file in (run / "trainer_state.json", *reversed(checkpoints)):
        if file.is_file():
            return json.loads(file.read_text())["log_history"]
    raise FileNotFoundError(f"no trainer_state.json in {run}: is it the output_dir of a training run?")


def series(history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged number, the last value per step."""
    values = {row["step"]: float(row[key]) for row in history if key in row}
    return sorted(values), [values[step] for step in sorted(values)]


def draw(histories: dict[str, list[dict[str, Any]]], out: Path, *, title: str | None = None) -> None:
    """Left the losses, right the update RMS of the runs that logged it (one panel only if none did)."""
    with_rms = {label: rows for label, rows in histories.items() if series(rows, UPDATE_RMS)[0]}
    columns = 2 if with_rms else 1
    figure, axes = plt.subplots(1, columns, figsize=(5.2 * columns, 3.9), squeeze=False, layout="constrained")
    draw_losses(axes[0, 0], histories)
    if with_rms:
        draw_update_rms(axes[0, 1], next(iter(with_rms.values())))
    if title:
        figure.suptitle(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def draw_losses(axes: Axes, histories: dict[str, list[dict[str, Any]]]) -> None:
    """Training loss thin, held-out loss with marks and its last value in the legend."""
    for colour, (label, history) in zip(RUN_COLOURS, histories.items(), strict=False):
        steps, losses = series(history, "loss")
        axes.plot(steps, losses, color=colour, linewidth=1.0, alpha=0.55)
        steps, losses = series(history, "eval_loss")
        if steps:
            text = f"{label}: held out {losses[-1]:.3f}"
            axes.plot(steps, losses, color=colour, linewidth=1.8, marker="o", markersize=4.5, label=text)
        else:
            axes.plot([], [], color=colour, label=label)
    axes.plot([], [], color="0.4", linewidth=1.0, alpha=0.7, label="thin: training loss")
    finish(axes, xlabel="step", ylabel="loss (nats per token)", title="Loss")


def draw_update_rms(axes: Axes, history: list[dict[str, Any]]) -> None:
    """RMS of Muon's update over the learning rate, all matrices and per kind, with the target."""
    kinds = sorted({key for row in history for key in row if key.startswith(UPDATE_RMS + "/")})
    for colour, key in zip((*RUN_COLOURS[1:], "0.5", "0.7"), kinds, strict=False):
        axes.plot(*series(history, key), color=colour, linewidth=1.0, label=key.removeprefix(UPDATE_RMS + "/"))
    axes.plot(*series(history, UPDATE_RMS), color=BLUE, linewidth=2.0, label="all matrices")
    axes.axhline(TARGET_RMS, color="black", linestyle=":", linewidth=1.2, label=f"target {TARGET_RMS}")
    axes.set_ylim(0, 2 * TARGET_RMS)
    finish(axes, xlabel="step", ylabel="update RMS / learning rate", title="Size of Muon's updates")


def finish(axes: Axes, *, xlabel: str, ylabel: str, title: str) -> None:
    """Labels, a light grid, a legend without a box."""
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
