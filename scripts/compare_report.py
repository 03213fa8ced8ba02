"""Tables and figure of ``scripts/compare.py``: means and spreads over seeds, differences paired by seed."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from plot import BLUE, SKY, VERMILION, finish, plt

Result = dict[str, Any]
Arm = tuple[str, int]  # optimizer, steps
NAMES = {"adamw": "AdamW", "muon": "Muon"}


def write_report(out: Path, results: list[Result], provenance: dict[str, Any]) -> str:
    """Write ``results.json``, ``results.md`` and ``results.png``; return the Markdown."""
    arms = by_arm(results)
    best = best_adamw(arms)
    text = "\n".join([*table(arms), "", *paired_table(arms, best), "", *footer(results, provenance), ""])
    summary = {"best_adamw_learning_rate": best[1] if best else None, "provenance": provenance, "cells": results}
    (out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    (out / "results.md").write_text(text)
    draw(arms, best, out / "results.png")
    return text


def by_arm(results: list[Result]) -> dict[Arm, dict[float, dict[int, Result]]]:
    """Arm (optimizer, steps) -> learning rate -> seed -> result; AdamW first, larger budgets first."""
    arms: dict[Arm, dict[float, dict[int, Result]]] = defaultdict(lambda: defaultdict(dict))
    for result in sorted(results, key=lambda r: (r["optimizer"], -r["steps"], r["learning_rate"], r["seed"])):
        arms[result["optimizer"], result["steps"]][result["learning_rate"]][result["seed"]] = result
    return arms


def best_adamw(arms: dict[Arm, dict[float, dict[int, Result]]]) -> tuple[Arm, float] | None:
    """AdamW's tuned learning rate: the lowest mean held-out loss."""
    means = {
        (arm, rate): statistics.fmean(losses(seeds))
        for arm, rates in arms.items()
        if arm[0] == "adamw"
        for rate, seeds in rates.items()
    }
    return min(means, key=means.__getitem__) if means else None


def losses(seeds: dict[int, Result]) -> list[float]:
    """Final held-out losses."""
    return [result["eval_loss"] for result in seeds.values()]


def spread(values: list[float]) -> str:
    """Mean +- sample standard deviation (n); one value has no spread."""
    if len(values) < 2:
        return f"{values[0]:.3f} (n=1)"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f} (n={len(values)})"


def label(arm: Arm, arms: dict[Arm, Any]) -> str:
    """``Muon, 1.70M tokens``."""
    tokens = next(iter(next(iter(arms[arm].values())).values()))["tokens"]
    return f"{NAMES[arm[0]]}, {tokens / 1e6:.2f}M tokens"


def table(arms: dict[Arm, dict[float, dict[int, Result]]]) -> list[str]:
    """Final held-out loss per arm and learning rate."""
    rates = sorted({rate for by_rate in arms.values() for rate in by_rate})
    lines = ["Held-out loss after training, mean ± sd over seeds:", ""]
    lines.append("| run | " + " | ".join(f"lr {rate:g}" for rate in rates) + " |")
    lines.append("|---|" + "---|" * len(rates))
    for arm, by_rate in arms.items():
        cells = [spread(losses(by_rate[rate])) if rate in by_rate else "-" for rate in rates]
        lines.append(f"| {label(arm, arms)} | " + " | ".join(cells) + " |")
    return lines


def paired_table(arms: dict[Arm, dict[float, dict[int, Result]]], best: tuple[Arm, float] | None) -> list[str]:
    """Muon minus the tuned AdamW, and minus AdamW at the same learning rate, seed by seed."""
    if best is None:
        return []
    reference_arm, reference_rate = best
    header = f"AdamW at its best lr {reference_rate:g}"
    lines = ["Muon's held-out loss minus AdamW's, paired by seed (negative: Muon is better):", ""]
    lines += [f"| run | minus {header} | by seed | minus AdamW at the same lr |", "|---|---|---|---|"]
    for arm, by_rate in arms.items():
        if arm[0] != "muon":
            continue
        for rate, seeds in by_rate.items():
            tuned = differences(seeds, arms[reference_arm][reference_rate])
            same = differences(seeds, arms[reference_arm].get(rate, {}))
            if tuned:
                by_seed = ", ".join(f"{value:+.3f}" for value in tuned)
                equal = spread(same) if same else "-"
                lines.append(f"| {label(arm, arms)}, lr {rate:g} | {spread(tuned)} | {by_seed} | {equal} |")
    return lines


def differences(seeds: dict[int, Result], reference: dict[int, Result]) -> list[float]:
    """Differences of final loss over the seeds that both have."""
    return [seeds[seed]["eval_loss"] - reference[seed]["eval_loss"] for seed in seeds if seed in reference]


def footer(results: list[Result], provenance: dict[str, Any]) -> list[str]:
    """How it was made."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for result in results:
        seconds[result["optimizer"]].append(result["seconds"] / result["steps"])
    pace = ", ".join(f"{NAMES[name]} {statistics.fmean(values):.2f}" for name, values in seconds.items())
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return [
        f"Seconds per step, start-up and evaluation included: {pace}.",
        f"Command: `{provenance['command']}`; commit {provenance['commit']}; {versions}, Python "
        f"{provenance['python']}; {provenance['machine']}.",
    ]


def draw(arms: dict[Arm, dict[float, dict[int, Result]]], best: tuple[Arm, float] | None, out: Path) -> None:
    """Left: final loss against learning rate. Right: held-out loss during training at the tuned AdamW's rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.9), layout="constrained")
    full = max(steps for _, steps in arms)
    for arm, by_rate in arms.items():
        colour = VERMILION if arm[0] == "adamw" else (BLUE if arm[1] == full else SKY)
        style = {"color": colour, "linestyle": "-" if arm[1] == full else "--", "marker": "o", "markersize": 4.5}
        rates = sorted(by_rate)
        means = [statistics.fmean(losses(by_rate[rate])) for rate in rates]
        sds = [statistics.stdev(values) if len(values := losses(by_rate[rate])) > 1 else 0.0 for rate in rates]
        left.errorbar(rates, means, yerr=sds, capsize=3, label=label(arm, arms), **style)
        rate = best[1] if best and best[1] in by_rate else rates[0]
        curves = [dict(map(tuple, result["eval_curve"])) for result in by_rate[rate].values()]
        steps = [step for step in sorted(curves[0]) if all(step in curve for curve in curves)]
        middle = [statistics.fmean(curve[step] for curve in curves) for step in steps]
        right.plot(steps, middle, label=f"{label(arm, arms)}, lr {rate:g}", **style)
    left.set_xscale("log")
    ticks = sorted({rate for by_rate in arms.values() for rate in by_rate})
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    finish(left, xlabel="learning rate", ylabel="held-out loss", title="After training (mean ± sd over seeds)")
    finish(right, xlabel="step", ylabel="held-out loss", title="During training (mean over seeds)")
    figure.savefig(out, dpi=150)
    plt.close(figure)
