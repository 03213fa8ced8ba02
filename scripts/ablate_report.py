"""Tables and figure of ``scripts/ablate.py``: the shape of the paper's Table 6, means and spreads over seeds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plot import BLUE, GREEN, VERMILION, finish, plt

if TYPE_CHECKING:
    from ablate import Ablation

Row = dict[str, Any]
NAMES = {"adamw": "AdamW", "muon": "Muon"}
METRICS = {"eval_loss": "held-out SFT loss", "eval_mean_token_accuracy": "assistant-token accuracy"}
# Table 6 of arXiv 2502.16982 (Moonlight@1.2T and Moonlight-A@1.2T, tulu-3), by pretraining and SFT optimizer.
PAPER = {
    "MMLU (0-shot CoT, EM)": {"muon-muon": 55.7, "adamw-muon": 55.3, "muon-adamw": 50.2, "adamw-adamw": 52.0},
    "HumanEval (0-shot, pass@1)": {"muon-muon": 57.3, "adamw-muon": 53.7, "muon-adamw": 52.4, "adamw-adamw": 53.1},
    "MBPP (0-shot, pass@1)": {"muon-muon": 55.6, "adamw-muon": 55.5, "muon-adamw": 55.2, "adamw-adamw": 55.2},
    "GSM8K (5-shot, EM)": {"muon-muon": 68.0, "adamw-muon": 62.1, "muon-adamw": 64.9, "adamw-adamw": 64.6},
}
# Differences that the paper's claim is about, lower loss being better: (what, minus what).
CONTRASTS = [("muon-muon", "adamw-adamw"), ("muon-muon", "muon-adamw"), ("adamw-muon", "adamw-adamw")]


class Table:
    """The finished cells of a run, by group, learning rate and seed."""

    def __init__(self, ablation: Ablation, rows: list[Row], chosen: dict[str, float | None]) -> None:
        self.ablation, self.rows, self.chosen = ablation, rows, chosen
        pairs = [(before, after) for after in ablation.sft for before in ablation.pretrain]
        self.pairs = [f"{before}-{after}" for before, after in pairs]
        self.remedies = [f"{ablation.remedies_for}-{name}" for name in ablation.remedies]

    def best(self, pair: str, metric: str, phase: str = "sft") -> dict[int, float]:
        """Values by seed at the chosen rate."""
        group = f"{phase}/{pair}"
        cells = [r for r in self.rows if r["group"] == group and r["learning_rate"] == self.chosen.get(group)]
        return {row["seed"]: row[metric] for row in cells if metric in row}

    def difference(self, pair: str, reference: str, metric: str = "eval_loss") -> list[float]:
        """``pair`` minus ``reference`` over the seeds that both have."""
        ours, theirs = self.best(pair, metric), self.best(reference, metric)
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

    def label(self, pair: str) -> str:
        """``AdamW/Muon``, or the name of a remedy."""
        before, _, after = pair.partition("-")
        return after if pair in self.remedies else f"{NAMES.get(before, before)}/{NAMES.get(after, after)}"


def write_report(
    out: Path, ablation: Ablation, rows: list[Row], chosen: dict[str, float | None], provenance: dict[str, Any]
) -> str:
    """Write ``results.json``, ``results.md`` and ``results.png``; return the Markdown."""
    table = Table(ablation, rows, chosen)
    text = "\n".join(
        [*main_table(table), *contrasts(table), *remedies(table), *sweeps(table), *footer(rows, provenance)]
    )
    summary = {"chosen_learning_rates": chosen, "summary": summarize(table), "provenance": provenance, "cells": rows}
    (out / "results.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(text, encoding="utf-8")
    draw(table, out / "results.png")
    return text


def summarize(table: Table) -> dict[str, Any]:
    """Mean, sd and n of every pair and remedy."""
    summary: dict[str, Any] = {}
    for pair in (*table.pairs, *table.remedies):
        values = {metric: list(table.best(pair, metric).values()) for metric in METRICS}
        summary[pair] = {
            metric: {"mean": statistics.fmean(v), "sd": statistics.stdev(v) if len(v) > 1 else None, "n": len(v)}
            for metric, v in values.items()
            if v
        }
    return summary


def spread(values: list[float], *, sign: str = "") -> str:
    """Mean ± sample standard deviation (n); one value has no spread."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):{sign}.3f}"
    return f"{mean} (n=1)" if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f} (n={len(values)})"


def verdict(differences: list[float]) -> str:
    """Lower or higher beyond the spread, which is twice the standard deviation of the paired differences."""
    if len(differences) < 2:
        return "one seed"
    mean, sd = statistics.fmean(differences), statistics.stdev(differences)
    if abs(mean) <= 2 * sd:
        return "within the spread"
    return "lower beyond the spread" if mean < 0 else "higher beyond the spread"


def rate(value: float | None) -> str:
    """A learning rate, or a dash."""
    return "-" if value is None else f"{value:g}"


def markdown(header: list[str], lines: list[list[str]]) -> list[str]:
    """A table, with an empty line behind it."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)] + [""]


def main_table(table: Table) -> list[str]:
    """Table 6's shape, ours above and the paper's below."""
    lines = [
        [text] + [spread([*table.best(pair, key).values()]) for pair in table.pairs] for key, text in METRICS.items()
    ]
    lines.append(["SFT learning rate"] + [rate(table.chosen.get(f"sft/{pair}")) for pair in table.pairs])
    parents = [pair.partition("-")[0] for pair in table.pairs]
    lines.append(["pretraining learning rate"] + [rate(table.chosen.get(f"pretrain/{parent}")) for parent in parents])
    losses = [spread([*table.best(parent, "eval_loss", "pretrain").values()]) for parent in parents]
    lines.append(["held-out loss of pretraining"] + losses)
    for name, scores in PAPER.items():
        lines.append([f"paper: {name}"] + [str(scores.get(pair, "-")) for pair in table.pairs])
    title = "Optimizer of pretraining / of SFT; mean ± sd over seeds, at the sweep's rate of lowest held-out loss:"
    return [title, "", *markdown([""] + [table.label(pair) for pair in table.pairs], lines)]


def contrasts(table: Table) -> list[str]:
    """What the paper's claim is about, paired by seed."""
    lines = []
    for ours, theirs in CONTRASTS:
        if values := table.difference(ours, theirs):
            accuracy = spread(table.difference(ours, theirs, "eval_mean_token_accuracy"), sign="+")
            by_seed = ", ".join(f"{value:+.3f}" for value in values)
            name = f"{table.label(ours)} minus {table.label(theirs)}"
            lines.append([name, spread(values, sign="+"), by_seed, verdict(values), accuracy])
    header = ["paired by seed", "held-out SFT loss", "by seed", "verdict", "accuracy"]
    return (
        [*markdown(header, lines), "Beyond the spread: the mean difference exceeds twice its sd.", ""] if lines else []
    )


def remedies(table: Table) -> list[str]:
    """Variants of Muon's fine-tuning of one pretrained model, against plain Muon and against AdamW."""
    parent, lines = table.ablation.remedies_for, []
    for pair in (f"{parent}-muon", f"{parent}-adamw", *table.remedies) if table.remedies else ():
        losses, accuracy = ([*table.best(pair, metric).values()] for metric in METRICS)
        cells = [table.label(pair), rate(table.chosen.get(f"sft/{pair}")), spread(losses), spread(accuracy)]
        for reference in (f"{parent}-muon", f"{parent}-adamw"):
            values = table.difference(pair, reference) if pair != reference else []
            cells.append(f"{spread(values, sign='+')}: {verdict(values)}" if values else "-")
        lines.append(cells)
    header = ["SFT", "lr", *METRICS.values(), "loss minus plain Muon's", "loss minus AdamW's"]
    title = f"Remedies: SFT of the model that {NAMES.get(parent, parent)} pretrained."
    return [title, "", *markdown(header, lines)] if lines else []


def sweeps(table: Table) -> list[str]:
    """Held-out loss of the first seed at every rate; the chosen one bold, and marked where the sweep ends with it."""
    seed = table.ablation.seeds[0]
    text = [f"Sweeps, held-out loss with seed {seed}:", ""]
    for phase in ("pretrain", "sft"):
        rows = [row for row in table.rows if row["seed"] == seed and row["group"].startswith(f"{phase}/")]
        rates, lines = sorted({row["learning_rate"] for row in rows}), []
        for group in dict.fromkeys(row["group"] for row in rows):
            cells = {row["learning_rate"]: row["eval_loss"] for row in rows if row["group"] == group}
            best = table.chosen.get(group)
            bold = {value: f"**{loss:.3f}**" if value == best else f"{loss:.3f}" for value, loss in cells.items()}
            edge = "yes" if len(cells) > 1 and best in (min(cells), max(cells)) else "no"
            lines.append([group, *(bold.get(value, "-") for value in rates), edge])
        if lines:
            text += markdown([phase, *(f"lr {value:g}" for value in rates), "best at the end of the sweep"], lines)
    return text


def footer(rows: list[Row], provenance: dict[str, Any]) -> list[str]:
    """How it was made."""
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    seconds = sum(row["seconds"] for row in rows)
    return [
        f"{len(rows)} cells, {seconds / 60:.0f} min. Command: `{provenance['command']}`; commit "
        f"{provenance['commit']}; {versions}, Python {provenance['python']}; {provenance['machine']}.",
        "",
    ]


def draw(table: Table, out: Path) -> None:
    """Loss and accuracy of every pair, and the losses of the remedies if there are any."""
    panels = [(table.pairs, metric) for metric in METRICS]
    if table.remedies:
        parent = table.ablation.remedies_for
        panels.append(([f"{parent}-muon", f"{parent}-adamw", *table.remedies], "eval_loss"))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.3 * len(panels), 3.6), layout="constrained")
    for axis, (pairs, metric) in zip(axes, panels, strict=True):
        for place, pair in enumerate(pairs):
            values = [*table.best(pair, metric).values()]
            if values:
                colour = GREEN if pair in table.remedies else BLUE if pair.endswith("-muon") else VERMILION
                sd = statistics.stdev(values) if len(values) > 1 else 0.0
                axis.plot(values, [place] * len(values), "o", color=colour, alpha=0.35, markersize=4)
                axis.errorbar(statistics.fmean(values), place, xerr=sd, fmt="D", color=colour, capsize=4, markersize=5)
        axis.plot([], [], "o", color="0.6", markersize=4, label="one seed")
        axis.plot([], [], "D", color="0.3", markersize=5, label="mean ± sd")
        axis.set_yticks(range(len(pairs)), [table.label(pair) for pair in pairs])
        axis.invert_yaxis()
        title = "Remedies" if pairs is not table.pairs else "Optimizer of pretraining / SFT"
        finish(axis, xlabel=METRICS[metric], ylabel="", title=title)
    figure.savefig(out, dpi=150)
    plt.close(figure)
