"""Tables and figures of ``scripts/paper.py``, with the paper's own numbers (arXiv 2502.16982) beside ours."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scaling
from ablate_report import footer, markdown, spread, verdict
from plot import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, finish, plt

if TYPE_CHECKING:
    from paper import Experiment

Row = dict[str, Any]
Chosen = dict[str, tuple[float, int] | None]
UNIT = 1e12  # FLOPs: what the miniature's compute is counted in
DAY = 8.64e19  # FLOPs in a PFLOP/s-day, the paper's unit
# Table 3; compute of Table 2's smallest and largest model.
PUBLISHED = {
    "muon": scaling.PowerLaw(2.506, -0.052, 6 * 399e6 * 8.92e9 / DAY, 6 * 1.5e9 * 38.91e9 / DAY),
    "adamw": scaling.PowerLaw(2.608, -0.054, 6 * 399e6 * 8.92e9 / DAY, 6 * 1.5e9 * 38.91e9 / DAY),
}
COLOURS = (VERMILION, ORANGE, BLUE, SKY, GREEN, PURPLE, "0.35", "0.55", "0.7", "0.8")


def write_report(out: Path, experiment: Experiment, rows: list[Row], chosen: Chosen, provenance: dict[str, Any]) -> str:
    """Write ``results.json``, ``results.md`` and ``results.png``; return the Markdown."""
    lines, summary = (scaling_tables if experiment.report == "scaling" else arm_tables)(experiment, rows, chosen)
    text = "\n".join([*lines, *searches(experiment, rows, chosen), *footer(rows, provenance)])
    summary = {"chosen": chosen, **summary, "provenance": provenance, "cells": rows}
    (out / "results.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(text, encoding="utf-8")
    (draw_scaling if experiment.report == "scaling" else draw_arms)(experiment, rows, chosen, out / "results.png")
    return text


def of(rows: list[Row], chosen: Chosen, model: str, arm: str) -> dict[int, Row]:
    """Runs of one arm at its chosen point, by seed."""
    point = chosen.get(f"{model}/{arm}")
    return {
        row["seed"]: row
        for row in rows
        if (row["model"], row["arm"]) == (model, arm) and point == (row["learning_rate"], row["batch"])
    }


def losses(runs: Iterable[Row]) -> list[float]:
    """Final held-out losses."""
    return [row["eval_loss"] for row in runs]


def paired(runs: dict[int, Row], reference: dict[int, Row]) -> list[float]:
    """Differences of final held-out loss over the seeds that both have."""
    return [runs[seed]["eval_loss"] - reference[seed]["eval_loss"] for seed in runs if seed in reference]


def searches(experiment: Experiment, rows: list[Row], chosen: Chosen) -> list[str]:
    """The searches: mean loss of every point that was run, the chosen one bold, marked where it lies at the end."""
    lines = []
    for name, model in experiment.models.items():
        for arm in (arm for arm, options in experiment.arms.items() if not options.like and len(model.grid()) > 1):
            best, cells = chosen[f"{name}/{arm}"], []
            for rate, batch in model.grid():
                here = (name, arm, rate, batch)
                values = [
                    r["eval_loss"] for r in rows if (r["model"], r["arm"], r["learning_rate"], r["batch"]) == here
                ]
                text = f"{rate:g}/{batch}: {spread(values)}"
                cells.append(f"**{text}**" if (rate, batch) == best else text)
            edge = "yes" if best and best[0] in (min(model.learning_rates), max(model.learning_rates)) else "no"
            lines.append([name, arm, "; ".join(cells), edge])
    header = ["model", "arm", "learning rate/sequences per step: held-out loss", "best rate at the end"]
    return ["Searches:", "", *markdown(header, lines)] if lines else []


# One model, several arms: Table 1, Table 8, figure 2.


def measures(row: Row) -> dict[str, float]:
    """The paper's columns of Tables 1 and 8, and the largest weight."""
    last, first = row["sizes"][-1], row["sizes"][0]
    return {
        **{"train": row["train_loss"], "val": row["eval_loss"]},
        **{"query RMS": last["query"], "MLP RMS": last["mlp"]},
        **{"all RMS": last["all"], "growth": last["all"] / first["all"], "largest": last["largest"]},
    }


def run_arms(experiment: Experiment, rows: list[Row], chosen: Chosen) -> dict[tuple[str, str], str]:
    """(model, arm) of what was run, and its name in a table: the model's only where there are several."""
    pairs = [(m, a) for m in experiment.models for a in experiment.arms if of(rows, chosen, m, a)]
    return {(m, a): a if len(experiment.models) == 1 else f"{m} {a}" for m, a in pairs}


def arm_tables(experiment: Experiment, rows: list[Row], chosen: Chosen) -> tuple[list[str], dict[str, Any]]:
    """Every arm of every model: losses, sizes of the weights, and the difference to the reference."""
    lines, summary = [], {}
    for (model, arm), name in run_arms(experiment, rows, chosen).items():
        paper, runs = experiment.arms[arm].paper, of(rows, chosen, model, arm)
        values = [measures(row) for row in runs.values()]
        columns = {key: [value[key] for value in values] for key in values[0]}
        summary[f"{model}/{arm}"] = {
            key: {"mean": statistics.fmean(v), "sd": statistics.stdev(v) if len(v) > 1 else None, "n": len(v)}
            for key, v in columns.items()
        }
        cells = [spread(columns[key]) if key in ("train", "val") else small(columns[key]) for key in columns]
        reference = of(rows, chosen, model, experiment.reference)
        difference = paired(runs, reference) if arm != experiment.reference else []
        cells.append(f"{spread(difference, sign='+')}: {verdict(difference)}" if difference else "-")
        beside = " / ".join(f"{paper[key]:g}" if key in paper else "-" for key in list(columns)[:4])
        lines.append([name, *cells, beside if paper else "-"])
    header = [
        "arm",
        "train loss",
        "held-out loss",
        "query RMS",
        "MLP RMS",
        "all matrices",
        "times the start",
        "largest",
    ]
    header += [f"held-out loss minus {experiment.reference}'s", "paper: train / val / query / MLP"]
    return markdown(header, lines), {"summary": summary}


def small(values: list[float]) -> str:
    """Mean ± sd of sizes of weights: four figures, n is in the columns of losses."""
    sd = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{sd}"


def draw_arms(experiment: Experiment, rows: list[Row], chosen: Chosen, out: Path) -> None:
    """Final losses, losses on the way, and the growth of the weights, means over seeds."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    names = run_arms(experiment, rows, chosen)
    for place, ((pair, name), colour) in enumerate(zip(names.items(), COLOURS, strict=False)):
        runs = list(of(rows, chosen, *pair).values())
        values = [row["eval_loss"] for row in runs]
        sd = statistics.stdev(values) if len(values) > 1 else 0.0
        left.plot(values, [place] * len(values), "o", color=colour, alpha=0.4, markersize=4)
        left.errorbar(statistics.fmean(values), place, xerr=sd, fmt="D", color=colour, capsize=4, markersize=5)
        style = {"color": colour, "label": name, "linestyle": "--" if "no_decay" in name else "-", "linewidth": 1.4}
        curves = np.mean([row["curve"] for row in runs], axis=0)[1:]  # before training all are alike
        middle.plot(curves[:, 0], curves[:, 1], **style)
        right.plot(*np.mean([[[s["step"], s["all"]] for s in row["sizes"]] for row in runs], axis=0).T, **style)
    left.plot([], [], "D", color="0.3", markersize=5, label="mean ± sd")
    left.set_yticks(range(len(names)), list(names.values()))
    left.invert_yaxis()
    finish(left, xlabel="held-out loss (nats per token)", ylabel="", title="At the end")
    finish(middle, xlabel="step", ylabel="held-out loss", title="On the way (mean)")
    finish(right, xlabel="step", ylabel="RMS of the hidden matrices", title="Size of the weights (mean)")
    figure.savefig(out, dpi=150)
    plt.close(figure)


# Several models, two arms: the scaling law.


def scaling_fits(experiment: Experiment, rows: list[Row], chosen: Chosen) -> dict[str, scaling.Fit]:
    """A fit per arm; empty while an arm has fewer than three sizes with every seed."""
    fits = {}
    for arm in experiment.arms:
        runs = [
            row for model in whole_models(experiment, rows, chosen) for row in of(rows, chosen, model, arm).values()
        ]
        points = scaling.final_points(runs, unit=UNIT)
        if len(points) > 2:
            fits[arm] = scaling.fit(points)
    return fits if len(fits) == len(experiment.arms) else {}


def whole_models(experiment: Experiment, rows: list[Row], chosen: Chosen) -> list[str]:
    """The sizes of which every arm has every seed."""
    seeds = set(experiment.seeds)
    return [m for m in experiment.models if all(of(rows, chosen, m, arm).keys() == seeds for arm in experiment.arms)]


def scaling_tables(experiment: Experiment, rows: list[Row], chosen: Chosen) -> tuple[list[str], dict[str, Any]]:
    """Sizes and losses; fits; the FLOP ratio where both curves were measured."""
    lines, computes = [], {}
    for model in whole_models(experiment, rows, chosen):
        muon, adamw = (of(rows, chosen, model, arm) for arm in ("muon", "adamw"))
        row = next(iter(adamw.values()))
        n, d = row["parameters"], row["tokens"]
        computes[model] = 6 * n * d / UNIT
        cells = [model, f"{n:,}", f"{d / 1e6:.2f}M", f"{d / n:.1f}", f"{computes[model]:.3f}"]
        cells += [
            f"{row['learning_rate']:g}",
            f"{row['batch']} x 128",
            spread(losses(adamw.values())),
            spread(losses(muon.values())),
        ]
        lines.append([*cells, spread(paired(muon, adamw), sign="+")])
    header = ["model", "N", "D", "D/N", "C = 6ND (TFLOP)", "lr", "batch", "AdamW", "Muon", "Muon - AdamW, paired"]
    fits = scaling_fits(experiment, rows, chosen)
    text = markdown(header, lines)
    if not fits:
        return [*text, "Fewer than three sizes are complete: no fit.", ""], {}
    ratios = {model: ratio_at(fits, compute) for model, compute in computes.items()}
    text += [*fit_table(fits), *ratio_table(computes, ratios)]
    summary = {
        arm: {"a": f.law.a, "b": f.law.b, "a_interval": f.interval("a"), "b_interval": f.interval("b")}
        for arm, f in fits.items()
    }
    return text, {"fits": summary, "ratios": ratios}


def ratio_at(fits: dict[str, scaling.Fit], compute: float) -> dict[str, Any]:
    """The ratio with its interval, or why there is none."""
    try:
        ratio, (low, high) = scaling.measured_ratio(fits["muon"], fits["adamw"], compute)
    except scaling.OutOfRange as reason:
        return {"reason": str(reason)}
    return {"ratio": ratio, "low": low, "high": high}


def fit_table(fits: dict[str, scaling.Fit]) -> list[str]:
    """Ours beside Table 3: a depends on the unit, b does not."""
    lines = []
    for arm, f in fits.items():
        (a_low, a_high), (b_low, b_high), paper = f.interval("a"), f.interval("b"), PUBLISHED[arm]
        ours = [f"{f.law.a:.3f} [{a_low:.3f}, {a_high:.3f}]", f"{f.law.b:.4f} [{b_low:.4f}, {b_high:.4f}]"]
        lines.append([arm, *ours, f"{f.residual_sd:.4f}", f"{paper.a:g} C^{paper.b:g} (PFLOP/s-days)"])
    header = ["L = a C^b, C in TFLOP", "a [95 %]", "b [95 %]", "residual sd of log L", "paper"]
    return markdown(header, lines)


def ratio_table(computes: dict[str, float], ratios: dict[str, dict[str, Any]]) -> list[str]:
    """Muon's compute over AdamW's at equal loss."""
    lines = []
    for model, found in ratios.items():
        text = found.get("reason") or f"{found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
        lines.append([f"{model} ({computes[model]:.3g} TFLOP)", text])
    muon, adamw = PUBLISHED["muon"], PUBLISHED["adamw"]
    low, high = (scaling.flop_ratio(muon, adamw, compute) for compute in (adamw.low, adamw.high))
    lines.append(["paper's fits, over its own range", f"{low:.2f} to {high:.2f} (its text says about 0.52)"])
    return markdown(["AdamW's compute", "Muon's compute at equal loss / AdamW's [95 %]"], lines)


def draw_scaling(experiment: Experiment, rows: list[Row], chosen: Chosen, out: Path) -> None:
    """Losses at the end of complete schedules with both fits; the FLOP ratio where both curves were measured."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.0), layout="constrained")
    fits, models = scaling_fits(experiment, rows, chosen), whole_models(experiment, rows, chosen)
    for arm, colour, name in (("adamw", VERMILION, "AdamW"), ("muon", BLUE, "Muon, AdamW's rate and batch")):
        runs = [row for model in models for row in of(rows, chosen, model, arm).values()]
        left.plot([6 * r["parameters"] * r["tokens"] / UNIT for r in runs], losses(runs), "o", color=colour, alpha=0.5)
        if fits:
            law = fits[arm].law
            x = np.geomspace(law.low, law.high, 50)
            left.plot(x, [law.loss(c) for c in x], color=colour, label=f"{name}: {law.a:.3f} C^{law.b:.4f}")
    left.set(xscale="log", yscale="log")
    finish(left, xlabel="C = 6 N D (TFLOP)", ylabel="held-out loss (nats per token)", title="Complete schedules")
    if fits:
        x = np.geomspace(fits["adamw"].law.low, fits["adamw"].law.high, 200)
        found = [(c, r) for c in x if "ratio" in (r := ratio_at(fits, c))]
        if found:
            at = [c for c, _ in found]
            right.plot(at, [r["ratio"] for _, r in found], color=BLUE, label="miniature")
            right.fill_between(at, *([r[key] for _, r in found] for key in ("low", "high")), color=BLUE, alpha=0.2)
    right.axhspan(0.44, 0.49, color="0.6", alpha=0.4, label="paper's fits over the paper's range")
    right.axhline(1, color="black", linewidth=1, linestyle=":")
    right.set(xscale="log", ylim=(0, None))
    finish(right, xlabel="AdamW's compute (TFLOP)", ylabel="Muon's / AdamW's at equal loss", title="FLOP ratio")
    figure.savefig(out, dpi=150)
    plt.close(figure)
