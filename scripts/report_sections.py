"""The sections of ``scripts/report.py`` that draw what a run has logged, and what ``scripts/spectra.py`` has found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report_figures import STYLES, Figure, Line, chart, colours, data_uri
from report_runs import Run, Series, read_json

LARGEST_IMAGE = 4 * 2**20  # bytes, of a spectra folder
PNG = b"\x89PNG\r\n\x1a\n"
NARROW = 3  # columns of a table beside which there is room for another section
MEAN = "A training loss is the mean over the steps since the entry before."


@dataclass(frozen=True)
class Table:
    """Cells of text, the first row and the first column being names."""

    title: str
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """One heading of the page; without figures and tables, only what would fill it."""

    name: str
    title: str
    missing: str
    """What would fill it, and how to log it."""
    lead: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, figure: Figure | None, *, without: Iterable[str] = ()) -> None:
        """A figure, if there is one, and the runs that could not be in it."""
        if figure is not None:
            self.figures.append(figure)
            if names := list(without):
                self.notes.append(f"{figure.title}: not logged by {', '.join(names)}.")

    def __bool__(self) -> bool:
        return bool(self.figures or self.tables)

    @property
    def size(self) -> str:
        """How much of a wide page it takes."""
        if any(len(table.rows[0]) > NARROW for table in self.tables) or len(self.figures) > 2:
            return "large"
        return "medium" if len(self.figures) == 2 else "small"


def overlay(section: Section, runs: Sequence[Run], key: str, title: str, ylabel: str, **options: Any) -> None:
    """One number of all runs in one figure."""
    lines = [Line(run.label, run.series(key), *look) for run, look in zip(runs, colours(len(runs)), strict=True)]
    figure = chart(title, lines, ylabel=ylabel, **options)
    section.add(figure, without=[line.label for line in lines if not line.data.steps])


def by_kind(
    section: Section,
    runs: Sequence[Run],
    key: str,
    title: str,
    ylabel: str,
    *,
    x: str = "step",
    scale: str = "",
    target: Callable[[Run], tuple[float, str] | None] = lambda run: None,
) -> None:
    """What was logged as ``key`` and ``key/...``: a figure per run, all on one scale."""
    lines = {}
    for run in runs:
        names = run.keys(f"{key}/")
        lines[run.label] = [Line(name.removeprefix(f"{key}/"), run.series(name, x=x)) for name in names]
        lines[run.label].append(Line("all", run.series(key, x=x), "black", "-"))
    every = [line for members in lines.values() for line in members]
    for run in runs:
        options = {"ylabel": ylabel, "target": target(run), "beside": every, "scale": scale}
        section.add(chart(f"{title}: {run.label}", lines[run.label], **options))
    lost = [label for label, members in lines.items() if not any(line.data.steps for line in members)]
    if any(line.data for line in every) and lost:
        section.notes.append(f"{title}: not logged by {', '.join(lost)}.")


def summary(runs: Sequence[Run]) -> Table:
    """A column per run."""

    def last(run: Run, key: str) -> str:
        values = run.series(key).finite()
        gaps = " (the last entry is not finite)" if run.series(key).gaps()[-1:] > [s for s, _ in values[-1:]] else ""
        return f"{values[-1][1]:.4g} at step {values[-1][0]:,}{gaps}" if values else f"-{gaps}"

    def peak(run: Run) -> str:
        return max((f"{v:.4g}" for _, v in run.series("learning_rate").finite()), key=float, default="-")

    def state(run: Run, key: str) -> str:
        value = run.state.get(key)
        return f"{value:,}" if isinstance(value, (int, float)) and not isinstance(value, bool) and value else "-"

    evaluated = [{step for step, _ in run.series("eval_loss").finite()} for run in runs]
    # Losses at the ends of runs that end at different steps do not compare.
    differ = len({max(steps, default=None) for steps in evaluated}) > 1
    common = max(set.intersection(*evaluated), default=None) if differ else None
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("folder", lambda run: str(run.folder)),
        ("log", lambda run: str(run.state_file.relative_to(run.folder))),
        (
            "trained by",
            lambda run: {True: "hf_muon.Muon", False: "another optimizer", None: "not recorded"}[run.is_muon],
        ),
        ("steps", lambda run: f"{state(run, 'global_step')} of {state(run, 'max_steps')}".removesuffix(" of -")),
        ("training loss", lambda run: last(run, "loss")),
        ("held-out loss", lambda run: last(run, "eval_loss")),
    ]
    if common is not None:
        name = f"held-out loss at step {common:,}, the last that all have"
        rows.append((name, lambda run: f"{dict(run.series('eval_loss').finite())[common]:.4f}"))
    rows += [
        ("largest learning rate logged", peak),
        ("skipped steps", lambda run: "-" if (n := run.count("muon/skipped_steps")) is None else f"{n:,}"),
        ("tokens seen", lambda run: state(run, "num_input_tokens_seen")),
        ("seconds of training", lambda run: last(run, "train_runtime").partition(" ")[0]),
    ]
    cells = [[name, *map(cell, runs)] for name, cell in rows]
    return Table("", [["", *(run.label for run in runs)], *(row for row in cells if set(row[1:]) != {"-"})])


def losses(runs: Sequence[Run]) -> Section:
    """Training and held-out, of one or several held-out sets."""
    section = Section("losses", "Losses", "Set logging_steps, and eval_strategy for held-out losses.", MEAN)
    overlay(section, runs, "loss", "Training loss", "loss")
    pattern = re.compile(r"eval_(.+_)?loss")
    for key in sorted({key for run in runs for key in run.keys("eval_") if pattern.fullmatch(key)}):
        name = key.removeprefix("eval_").removesuffix("loss").strip("_")
        overlay(section, runs, key, f"Held-out loss {name}".strip(), "loss")
    ends = {run.label: run.last_step for run in runs}
    if section and len(set(ends.values())) > 1:
        text = ", ".join(f"{label} {step:,}" for label, step in ends.items())
        section.notes.append(f"The logs end at different steps ({text}): compare at equal steps.")
    return section


def logged(runs: Sequence[Run]) -> list[Section]:
    """Everything else that stands in the log."""
    muon = 'Logged by every run with optim="muon".'
    out = [Section("update-rms", "Update RMS", muon, "RMS of what multiplies Muon's learning rate, by kind of matrix.")]
    by_kind(out[-1], runs, "muon/update_rms", "Update RMS", "update RMS / learning rate", scale="zero", target=_target)
    out.append(Section("weight-rms", "Weight RMS", muon, "RMS of the parameters by kind, those of AdamW too."))
    by_kind(out[-1], runs, "muon/weight_rms", "Weight RMS", "RMS of weights")
    hint = "Add hf_muon.OutputRMSCallback(100), or --output_rms_steps 100 in the scripts."
    out.append(Section("output-rms", "Output RMS", hint, "RMS of the outputs of hidden layers, by kind."))
    by_kind(out[-1], runs, "output_rms", "Output RMS", "RMS of outputs")
    out.append(Section("learning-rates", "Learning rates", "Set logging_steps."))
    _rates(out[-1], runs)
    out.append(Section("gradient-norm", "Gradient norm", "Set max_grad_norm and logging_steps.", "Before clipping."))
    overlay(out[-1], runs, "grad_norm", "Gradient norm", "gradient norm")
    out.append(Section("skipped-steps", "Skipped steps", muon, "Steps that a gradient that is not finite left out."))
    _counters(out[-1], runs, {"muon/skipped_steps": "skipped steps", "muon/skipped_matrices": "skipped matrices"})
    hint = "Add hf_muon.SpikeCallback(), or --detect_spikes in the scripts."
    out.append(
        Section("spikes", "Spikes", hint, "Steps whose loss or gradient norm jumped. The run's warnings name them.")
    )
    _counters(out[-1], runs, {"spike/steps": "steps with a spike"})
    hint = "Add hf_muon.AttentionLogitsCallback(100), or --attention_logits_steps 100 in the scripts."
    out.append(Section("attention", "Attention logits", hint, "The largest of the model and of each layer."))
    by_kind(out[-1], runs, "attention/max_logit", "Largest logit", "logit")
    overlay(out[-1], runs, "attention/share_above_100", "Share of logits above 100", "share", scale="zero")
    overlay(out[-1], runs, "muon/qk_clip/heads", "Heads that QK-Clip scaled, since the entry before", "heads")
    overlay(out[-1], runs, "muon/qk_clip/min_gamma", "Smallest factor of QK-Clip", "gamma")
    hint = (
        "For mixture-of-experts models, add ExpertBalanceCallback(model), or --expert_bias_rate to scripts/pretrain.py."
    )
    lead = "Load of the busiest expert over the mean, minus one."
    out.append(Section("experts", "Expert load balance", hint, lead))
    by_kind(out[-1], runs, "moe/max_violation", "Largest violation", "violation")
    overlay(out[-1], runs, "moe/max_bias", "Largest bias", "bias")
    return out


def _target(run: Run) -> tuple[float, str] | None:
    """What the optimizer was set to, if a checkpoint says so."""
    value = next((g.get("update_rms") for g in run.groups if g.get("algorithm") == "muon"), None)
    return (value, f"set to {value:g}") if isinstance(value, float) and 0 < value < 1e9 else None


def _rates(section: Section, runs: Sequence[Run]) -> None:
    """The Trainer's and Muon's two; equal ones in one line."""
    names = {"learning_rate": "Trainer's", "muon/lr": "Muon's", "muon/adamw_lr": "AdamW's"}
    lines = []
    for i, (run, (colour, _)) in enumerate(zip(runs, colours(len(runs)), strict=True)):
        found: dict[Any, tuple[str, Series]] = {}
        for key, name in names.items():
            data = run.series(key)
            # NaN is not equal to itself; its text is.
            before = found.get(repr(data))
            found[repr(data)] = (f"{before[0]}, {name}" if before else name, data)
        kept = [pair for pair in found.values() if pair[1]]
        for j, (name, data) in enumerate(kept):
            label = run.label if len(kept) == 1 else f"{run.label}: {name}"
            lines.append(Line(label, data, colour, STYLES[(i + j) % len(STYLES)]))
    section.add(chart("Learning rate", lines, ylabel="learning rate", scale="zero"))


def _counters(section: Section, runs: Sequence[Run], names: dict[str, str]) -> None:
    """Totals, and a figure of what is not zero."""
    totals = [[run.label, *(run.count(key) for key in names)] for run in runs]
    rows = [[label, *(f"{n:,}" for n in counts)] for label, *counts in totals if None not in counts]
    if rows:
        section.tables.append(Table("", [["", *names.values()], *rows]))
    for i, (key, name) in enumerate(names.items(), 1):
        if any(counts[i] for counts in totals):
            overlay(section, runs, key, f"{name.capitalize()} so far", name, scale="zero")
    if rows and (lost := [label for label, *counts in totals if None in counts]):
        section.notes.append(f"Not logged by {', '.join(lost)}.")


def spectra(runs: Sequence[Run], folder: Path | None) -> Section:
    """From the log, and from the folder of ``scripts/spectra.py``.

    Raises:
        ValueError: the folder is none of that script.
    """
    hint = (
        "Run scripts/spectra.py on the checkpoints and give its folder as --spectra, or train with --spectra_steps 100."
    )
    lead = "SVD entropy (1: all singular values are equal) and stable rank of hidden matrices, means by group."
    section = Section("spectra", "Spectra of weights", hint, lead)
    for key, name in (("entropy", "SVD entropy"), ("stable_rank", "Stable rank"), ("spectral_norm", "Spectral norm")):
        by_kind(section, runs, f"spectra/{key}", f"{name} in training", name, x="spectra/step")
    if folder is not None:
        _from_folder(section, runs, folder)
    return section


def _from_folder(section: Section, runs: Sequence[Run], folder: Path) -> None:
    found = read_json(folder / "summary.json")
    try:
        means = {
            key: {run: {g: _column(steps, g) for g in dict.fromkeys(g for row in steps.values() for g in row)}
                  for run, steps in by_run.items()}
            for key, by_run in found["mean_by_group"].items()
        }  # fmt: skip
        shares, names = found.get("compare"), [Path(str(name)).name for name in found.get("figures", [])]
        if shares and shares["share_higher"] is not None:
            head = ["step", *shares["by_step"]]
            values = [f"{value:.0%}" for value in shares["by_step"].values()]
            title = f"Share of matrices whose SVD entropy is higher under {shares['A']} than under {shares['B']}"
            section.tables.append(Table(title, [head, ["share", *values]]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'summary.json'} is not what scripts/spectra.py writes: {error!r}") from None
    looks = dict(zip([run.label for run in runs], colours(len(runs)), strict=True))
    for key, name in (("entropy", "SVD entropy"), ("stable_rank", "Stable rank")):
        by_run = means.get(key, {})
        spare = dict(zip(by_run, colours(len(by_run)), strict=True))
        for group in dict.fromkeys(g for groups in by_run.values() for g in groups):
            lines = [
                Line(run, by_run[run][group], *looks.get(run, spare[run]))
                for run in sorted(by_run, key=lambda run: list(looks).index(run) if run in looks else len(looks))
                if group in by_run[run]
            ]
            section.add(chart(f"{name}, {group}", lines, ylabel=name))
    for file in (folder / name for name in names if name.startswith("singular_values")):
        content = file.read_bytes() if file.is_file() and file.stat().st_size <= LARGEST_IMAGE else b""
        if content.startswith(PNG):
            title = file.stem.replace("_", " ").capitalize()
            alt = f"{title}: singular values over the largest, one panel per matrix, of the runs compared."
            section.figures.append(Figure(title, data_uri(content, "image/png"), alt))
        else:
            section.notes.append(f"{file.name} is no PNG image of at most {LARGEST_IMAGE >> 20} MiB and was left out.")


def _column(steps: dict[str, dict[str, float]], group: str) -> Series:
    at = sorted((int(step), float(row[group])) for step, row in steps.items() if group in row)
    return Series([step for step, _ in at], [value for _, value in at])
