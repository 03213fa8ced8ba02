"""Figures and summary of ``scripts/spectra.py``: figures 4, 9 and 10 of the paper, and the share of matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter
from plot import RUN_COLOURS, plt

from hf_muon.analysis.groups import GROUPS

KEYS = ["step", "parameter", "expert", "piece"]
"""What tells a matrix from every other of its run."""
COLUMNS = {"entropy": "SVD entropy", "stable_rank": "stable rank"}
ATTENTION = {"AttnQO", "AttnKV", "Attention"}
PANELS_DOWN = 32  # layers in one figure of singular values; a deeper model takes several


def write_report(table: pd.DataFrame, out: Path, *, compare: list[str] | None, about: dict[str, Any]) -> str:
    """Draw, write ``summary.json``, and return it as text for people.

    Args:
        table: a row per matrix.
        out: the folder.
        compare: runs A and B; None for both runs where there are two.
        about: what the summary says of where the numbers come from.
    """
    table = table[np.isfinite(table["entropy"])]
    pair = chosen_pair(sorted(table["run"].unique()), compare)
    figures = [draw_groups(table, out / f"{column}.png", column, pair or ()) for column in COLUMNS]
    means = {column: macro_average(table, column) for column in COLUMNS}
    summary: dict[str, Any] = {**about, "checkpoints": table.attrs["checkpoints"], "options": table.attrs["options"]}
    summary["mean_by_group"] = {
        column: {run: {int(s): row.dropna().to_dict() for s, row in part.droplevel("run").iterrows()}
                 for run, part in frame.groupby(level="run")}
        for column, frame in means.items()
    }  # fmt: skip
    lines = [_as_text(means["entropy"], means["stable_rank"])]
    if pair:
        both = paired(table, *pair)
        summary["compare"] = {"A": pair[0], "B": pair[1], **shares(both)}
        lines.append(_share_text(summary["compare"]))
        if len(both):
            figures += draw_values(table, both, pair, out)
    summary["figures"] = [figure.name for figure in figures]
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return "\n".join([*lines, *(f"figure: {figure}" for figure in figures)])


def chosen_pair(runs: list[str], compare: list[str] | None) -> tuple[str, str] | None:
    """Runs A and B.

    Raises:
        ValueError: a run that is not there.
    """
    if compare:
        lost = [run for run in compare if run not in runs]
        if lost:
            raise ValueError(f"no run {lost[0]!r} among {runs}")
        return compare[0], compare[1]
    if len(runs) != 2:
        return None
    first, second = sorted(runs, key=lambda run: "muon" not in run.lower())
    return first, second


def macro_average(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Means over the matrices of a layer, then over layers: a row per run and step, a column per group."""
    index = ["run", "step", "group"]
    layers = table.groupby([*index, "layer"], dropna=False)[column].mean()
    wide = layers.groupby(level=index).mean().unstack("group")
    return wide[_ordered(wide.columns)]


def _ordered(groups: Any) -> list[str]:
    """The paper's groups in its order, then others."""
    return [g for g in GROUPS if g in groups] + sorted(g for g in groups if g not in GROUPS)


def paired(table: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """Matrices that both runs have at the same step: their keys, group, layer, and both entropies as ``a``, ``b``."""
    sides = [table[table["run"] == run] for run in (a, b)]
    left = sides[0][[*KEYS, "group", "layer", "module", "entropy"]].rename(columns={"entropy": "a"})
    return left.merge(sides[1][[*KEYS, "entropy"]].rename(columns={"entropy": "b"}), on=KEYS)


def shares(both: pd.DataFrame) -> dict[str, Any]:
    """Of how many matrices A's entropy exceeds B's: in all, by step, by group, and by group at the last step."""
    higher = both.assign(higher=both["a"] > both["b"])
    last = higher[higher["step"] == higher["step"].max()]

    def by(frame: pd.DataFrame, column: str) -> dict[str, float]:
        return {str(key): round(float(value), 4) for key, value in frame.groupby(column)["higher"].mean().items()}

    return {
        "matrices": len(both),
        "share_higher": round(float(higher["higher"].mean()), 4) if len(both) else None,
        "by_step": by(higher, "step"),
        "by_group": by(higher, "group"),
        "last_step": {"matrices": len(last), "by_group": by(last, "group")},
    }


def _as_text(entropy: pd.DataFrame, stable_rank: pd.DataFrame) -> str:
    lines = []
    for run, part in entropy.groupby(level="run"):
        last = part.index[-1]
        lines.append(f"{run}, step {last[1]}: SVD entropy / stable rank")
        for group in part.columns[part.loc[last].notna()]:
            lines.append(f"  {group:<14}{part.loc[last, group]:.4f}  {stable_rank.loc[last, group]:8.2f}")
    return "\n".join(lines)


def _share_text(found: dict[str, Any]) -> str:
    a, b = found["A"], found["B"]
    if not found["matrices"]:
        return f"{a} and {b} have no step in common: nothing to compare"
    step, last = list(found["by_step"].items())[-1]
    return (
        f"SVD entropy of {a} above that of {b}: {found['share_higher']:.1%} of {found['matrices']} pairs at "
        f"{len(found['by_step'])} steps; {last:.1%} of {found['last_step']['matrices']} at step {step}"
    )


def draw_groups(table: pd.DataFrame, file: Path, column: str, first: tuple[str, ...] = ()) -> Path:
    """Figure 4 of the paper for one number: a panel per group, a line per run, the ``first`` of them first."""
    means = macro_average(table, column)
    runs = [*first, *sorted(set(table["run"]) - set(first))]
    in_tokens = table["tokens"].notna().all()
    tokens = table.groupby(["run", "step"])["tokens"].first()
    columns = min(3, len(means.columns))
    down = -(-len(means.columns) // columns)
    figure, axes = plt.subplots(down, columns, figsize=(3.5 * columns, 2.6 * down + 0.4), squeeze=False)
    for panel, group in zip(axes.flat, means.columns, strict=False):
        for colour, run in zip(RUN_COLOURS * len(runs), runs, strict=False):
            part = means.loc[run, group].dropna()
            at = [int(tokens[run, step]) if in_tokens else step for step in part.index]
            panel.plot(at, part, color=colour, marker="o", markersize=3.5, linewidth=1.5, label=run)
        panel.set_title(group, loc="left", fontsize=10)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        if in_tokens:
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    for panel in list(axes.flat)[len(means.columns) :]:
        panel.set_axis_off()
    for panel in axes[-1]:
        panel.set_xlabel("tokens" if in_tokens else "step", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(f"{COLUMNS[column]}, mean over layers", x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    return _saved(figure, file)


def draw_values(table: pd.DataFrame, both: pd.DataFrame, pair: tuple[str, str], out: Path) -> list[Path]:
    """Figures 9 and 10: singular values over the largest, a panel per matrix, at the last step that both have."""
    both = both[both["step"] == both["step"].max()]
    values = {
        run: table[(table["run"] == run) & (table["step"] == both["step"].max())].set_index(KEYS)["singular_values"]
        for run in pair
    }
    files = []
    for name, members in (
        ("attention", both[both["group"].isin(ATTENTION)]),
        ("mlp", both[~both["group"].isin(ATTENTION)]),
    ):
        layers = sorted(members["layer"].fillna(-1).unique())
        for start in range(0, len(layers), PANELS_DOWN):
            shown = layers[start : start + PANELS_DOWN]
            page = members[members["layer"].fillna(-1).isin(shown)]
            number = f"-{start // PANELS_DOWN + 1}" if len(layers) > PANELS_DOWN else ""
            files.append(_draw_page(page, shown, values, pair, out / f"singular_values_{name}{number}.png"))
    return files


def _draw_page(
    page: pd.DataFrame, layers: list[int], values: dict[str, pd.Series], pair: tuple[str, str], file: Path
) -> Path:
    """A row per layer, its matrices in the model's order."""
    rows = [list(page[page["layer"].fillna(-1) == layer].itertuples()) for layer in layers]
    across = max(map(len, rows))
    figure, axes = plt.subplots(
        len(rows), across, figsize=(1.25 * across + 0.6, 1.2 * len(rows) + 1.0), squeeze=False, sharey=True
    )
    for panels, members, layer in zip(axes, rows, layers, strict=True):
        panels[0].set_ylabel(f"layer {layer}" if layer >= 0 else "", fontsize=7)
        for panel in panels[len(members) :]:
            panel.set_axis_off()
        for panel, member in zip(panels, members, strict=False):
            for colour, run in zip(RUN_COLOURS, pair, strict=False):
                _draw_spectrum(panel, values[run].loc[tuple(getattr(member, key) for key in KEYS)], colour)
            panel.set_title(_short(member.module), fontsize=6, pad=2)
            if member.a < member.b:
                panel.spines[:].set(color="red", linewidth=1.8)
    handles = [plt.Line2D([], [], color=c, label=run) for c, run in zip(RUN_COLOURS, pair, strict=False)]
    handles.append(
        plt.Line2D([], [], color="red", marker="s", mfc="none", ls="", label=f"{pair[0]}'s entropy is lower")
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.42 / figure.get_figheight()), h_pad=0.4, w_pad=0.3)
    title = f"singular values over the largest, sorted; step {page['step'].iloc[0]}"
    top = 1 - 0.08 / figure.get_figheight()
    figure.text(0.01, top, title, va="top", fontsize=8)
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 1 - 0.2 / figure.get_figheight()),
                  ncols=3, frameon=False, fontsize=7)  # fmt: skip
    return _saved(figure, file)


def _draw_spectrum(panel: Axes, values: np.ndarray, colour: str) -> None:
    panel.plot(np.linspace(0, 1, len(values)), values / values[0], color=colour, linewidth=1.1)
    panel.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])


def _short(module: str) -> str:
    """A title that fits: ``mlp.experts.gate_up_proj.3.gate`` is ``expert 3 gate``."""
    parts = module.split(".")
    if "experts" in parts and parts[-1] != parts[parts.index("experts") + 1]:
        tail = parts[parts.index("experts") + 2 :]
        name = parts[parts.index("experts") + 1].removesuffix("_proj") if len(tail) == 1 else tail[1]
        return f"expert {tail[0]} {name}"
    prefix = "shared " if any(part.startswith("shared") for part in parts) else ""
    number = parts[-2] if parts[-1] in "qkv" and len(parts) > 1 else ""
    return prefix + (f"{number} {parts[-1]}" if number else parts[-1] if parts[-1] != "gate" else "router")


def _saved(figure: Any, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file
