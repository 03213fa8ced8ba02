"""The sections of ``scripts/report.py`` about the model and the settings, from what lies beside the log."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from report_runs import Run, read_json, settings
from report_sections import Section, Table

from hf_muon import MuonConfig, param_groups
from hf_muon.integrations.models import on_meta
from hf_muon.plan import plan, table
from hf_muon.report import Report
from hf_muon.routing import route


def model_sections(runs: Sequence[Run], engines: Sequence[str], ranks: Sequence[int]) -> list[Section]:
    """Routing and communication plan; runs of one model share them."""
    hint = "Needs the config.json of the trained model in the run's folder."
    routing = Section(
        "routing", "What Muon trains", hint, "By the run's config.json, with the router's default options."
    )
    lead = "What a step sends, computes and holds on each rank, by hf_muon.plan with default options."
    plans = Section("plan", "Communication plan", hint, lead)
    found: dict[str, tuple[list[Run], Any, Report]] = {}
    for run in runs:
        try:
            if not (run.folder / "config.json").is_file():
                raise ValueError("there is no config.json")
            model = on_meta(str(run.folder.resolve()))
            report = Report(tuple(route(model, MuonConfig())))
            found.setdefault(str(report), ([], model, report))[0].append(run)
        except Exception as error:  # a config can make transformers raise anything; the other sections stand without it
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            routing.notes.append(f"{run.label}: not routed: {reason}")
            plans.notes.append(f"{run.label}: no plan: {reason}")
    for members, model, report in found.values():
        labels = ", ".join(run.label for run in members)
        routing.tables.append(Table(labels, [list(cells) for cells in report.cells()]))
        routing.notes += [report.summary(), *(_check_routing(run, report) for run in members)]
        groups = param_groups(model, MuonConfig())
        text = table([plan(groups, engine, n) for engine in engines for n in ranks])
        head, *rows = [re.split(" {2,}", line.strip()) for line in text.splitlines()]
        # A number and its unit stay on one line.
        plans.tables.append(Table(labels, [head, *([cell.replace(" ", "\u00a0") for cell in row] for row in rows)]))
    if plans:
        plans.notes.append("Per rank and step, gradients and weights of 2 bytes on the wire, collectives as rings.")
    return [routing, plans]


def _check_routing(run: Run, report: Report) -> str:
    """The checkpoint knows what was really done; options such as exclude are in no other file."""
    done = {n: g["algorithm"] for g in run.groups if "algorithm" in g for n in g.get("param_names", ())}
    if not done:
        known = {
            False: "was not trained by Muon: this is what Muon would train",
            True: "has no optimizer.pt to compare with",
        }
        return f"{run.label} {known.get(run.is_muon, 'does not say what it was trained by')}."
    planned = {r.name: r.algorithm for r in report.routes}
    odd = sorted(name for name in {*done, *planned} if done.get(name) != planned.get(name))
    if odd:
        return f"{run.label} was trained otherwise, as its optimizer.pt shows: {len(odd)} parameters, such as {odd[0]}."
    return f"{run.label}: its optimizer.pt has the same parameters under the same algorithms."


def recorded(runs: Sequence[Run]) -> list[Section]:
    """Settings, versions and command, as far as files of the run hold them."""
    hint = "Keep a checkpoint with optimizer.pt (one process, DDP, ZeRO consolidated), or a model card."
    options = Section("settings", "Optimizer settings", hint)
    for run in runs:
        if run.groups_file is not None:
            columns = [settings(group) for group in run.groups]
            keys = list(dict.fromkeys(key for column in columns for key in column))
            head = ["", *(f"group {i}" for i in range(len(columns)))]
            name = f"{run.label}: {run.groups_file.relative_to(run.folder)}"
            options.tables.append(Table(name, [head, *([k, *(c.get(k, "-") for c in columns)] for k in keys)]))
        for heading in ("Optimizer", "Training hyperparameters"):
            if rows := run.card.get(heading):
                name = f"{run.label}: model card, {heading.lower()}"
                options.tables.append(Table(name, [["", "value"], *map(list, rows.items())]))
    lost = [run.label for run in runs if run.groups_file is None and not run.card]
    if options and lost:
        options.notes.append(f"Not recorded by {', '.join(lost)}.")
    hint = "A run's config.json and model card hold versions."
    about = Section("versions", "Versions and command", hint)
    rows = [["", "transformers, by config.json", "model card", "command"]]
    for run in runs:
        card = ", ".join(f"{name} {version}" for name, version in run.card.get("Framework versions", {}).items())
        rows.append([run.label, _config_version(run), card or "not recorded", "not recorded"])
    about.tables.append(Table("", rows))
    about.notes.append("The Trainer keeps the command in none of its JSON files; training_args.bin is never unpickled.")
    return [options, about]


def _config_version(run: Run) -> str:
    try:
        return str(read_json(run.folder / "config.json").get("transformers_version", "not recorded"))
    except ValueError:
        return "not recorded"
