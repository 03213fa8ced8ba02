"""Spectra of trained weights: SVD entropy, stable rank and singular values of every matrix of a series of checkpoints.

    python scripts/spectra.py runs/offline/pretrain-muon runs/offline/pretrain-adamw --out results/spectra
    python scripts/spectra.py muon=A/Moonlight_hf_step_2000 adamw=A/Moonlight_adam_hf_step_2000 --out results/moonlight

A CHECKPOINT is a folder with config.json and model*.safetensors; a folder of such folders, named checkpoint-N or
..._step_N, which stands for all of them; or a hub repository owner/name[/folder][@revision]. NAME= before it names the
run, by default the optimizer in the folder's name. Matrices are read one by one, so memory follows the largest matrix,
not the model. Checkpoints that OUT already has are kept: stop and start again at will, add others, draw anew.

Writes spectra.parquet (a row per matrix, with its singular values), spectra.csv, summary.json and the figures: figure 4
of the paper (arXiv 2502.16982) and the same of the stable rank; figures 9 and 10, when two runs are compared.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from cells import exit_with, provenance
from huggingface_hub import snapshot_download
from plot import default_label
from spectra_report import write_report

from hf_muon import MuonConfig
from hf_muon.analysis.spectra import spectrum
from hf_muon.integrations.stored import StoredModel
from hf_muon.moonlight.schedules import moonlight

_STEP = re.compile(r"^(?P<run>.*?)[-_]?(checkpoint-|step[-_]?)(?P<step>\d+)$")
_HUB = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(/(?P<folder>[\w./-]+))?(@(?P<revision>[\w./-]+))?$")


@dataclass(frozen=True)
class Checkpoint:
    """One model of one run."""

    run: str
    step: int
    source: str
    """A folder, or a hub repository as on the command line."""
    tokens: int | None = None


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="[NAME=]CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="runs; default: both, the one with Muon first")
    parser.add_argument("--experts", type=int, default=3, help="of each layer, 0 for all (default 3, as the paper)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of experts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="of the SVD")
    parser.add_argument("--tokens_per_step", type=int, help="for the figures' axis, where the checkpoint does not say")
    parser.add_argument("--optim_args", default="", help="routing options of Muon: include=...,exclude=...")
    parser.add_argument("--architecture", help="a transformers class name; default: the one the config names")
    return parser


def main() -> int:
    """Measure what is missing, save after every checkpoint, report; 1 if a matrix had no spectrum."""
    arguments = make_parser().parse_args()
    options = {name: getattr(arguments, name) for name in ("experts", "seed", "dtype", "optim_args", "architecture")}
    found = find_checkpoints(arguments.checkpoints, arguments.tokens_per_step)
    file = arguments.out / "spectra.parquet"
    table = read_table(file, options, found)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, checkpoint in enumerate(found, 1):
        key = f"{checkpoint.run} {checkpoint.step}"
        if key in table.attrs["checkpoints"]:
            continue
        start = time.perf_counter()
        rows, ignored = measure(checkpoint, device=arguments.device, **options)
        entry = {
            **{"source": checkpoint.source, "matrices": len(rows), "seconds": round(time.perf_counter() - start, 1)},
            # The most that this process has had in memory until now; Linux counts in KiB.
            "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
        attrs = {**table.attrs, "checkpoints": {**table.attrs["checkpoints"], key: {**entry, "ignored": ignored}}}
        table = pd.concat([table, as_table(rows)], ignore_index=True)
        table.attrs = attrs
        save(table, file)
        print(f"[{number}/{len(found)}] {key}: {len(rows)} matrices, {entry['seconds']} s", flush=True)
    about = {
        **provenance("python scripts/spectra.py " + " ".join(sys.argv[1:])),
        "device": arguments.device,
    }
    print(write_report(table, arguments.out, compare=arguments.compare, about=about))
    odd = table[table["note"] != ""]
    for row in odd.itertuples():
        print(f"NO ENTROPY: {row.run} step {row.step}: {row.parameter} {row.module} is {row.note}", file=sys.stderr)
    return 1 if len(odd) else 0


def find_checkpoints(named: Iterable[str], tokens_per_step: int | None = None) -> list[Checkpoint]:
    """All checkpoints that the command line names, run by run, by step.

    Raises:
        ValueError: no such folder or repository name, or two checkpoints of one run at one step.
    """
    found: dict[tuple[str, int], Checkpoint] = {}
    for text in named:
        name, _, source = text.rpartition("=")
        folder = Path(source)
        if folder.is_dir():
            inside = [d for d in folder.iterdir() if _STEP.match(d.name) and (d / "config.json").is_file()]
            members = [str(path) for path in inside] or [source]
        elif _HUB.match(source) and not source.startswith("."):
            members = [source]
        else:
            raise ValueError(f"{source} is no folder, and no hub repository owner/name[/folder][@revision]")
        for member in members:
            new = _describe(member, name, tokens_per_step)
            old = found.setdefault((new.run, new.step), new)
            if old is not new:
                raise ValueError(
                    f"{old.source} and {new.source} are both step {new.step} of run {new.run}: name runs, NAME=..."
                )
    return sorted(found.values(), key=lambda c: (c.run, c.step))


def _describe(source: str, name: str, tokens_per_step: int | None) -> Checkpoint:
    folder = Path(source.partition("@")[0])
    if folder.is_dir():
        folder = folder.resolve()
    state_file = folder / "trainer_state.json"
    state = json.loads(state_file.read_text()) if state_file.is_file() else {}
    named = _STEP.match(folder.name)
    step = int(named["step"]) if named else state.get("global_step", 0)
    tokens = state.get("num_input_tokens_seen") or (tokens_per_step * step if tokens_per_step else None)
    moonlight_run = re.match(r"moonlight_(adam_)?hf_step", folder.name, re.IGNORECASE)
    if moonlight_run:
        name = name or ("AdamW" if moonlight_run[1] else "Muon")
        tokens = tokens or moonlight().ramp.tokens_before(step)
    plain = folder.parent if named and not named["run"] else Path(named["run"] if named else folder)
    return Checkpoint(name or default_label(plain), step, source, tokens)


def local_folder(source: str) -> str:
    """The folder of a checkpoint; a hub repository's is downloaded, without weights of other formats."""
    if Path(source).is_dir():
        return source
    parts = _HUB.match(source)
    assert parts is not None
    folder = parts["folder"] or ""
    patterns = [f"{folder}/{name}".lstrip("/") for name in ("*.json", "model*.safetensors")]
    try:
        return str(Path(snapshot_download(parts["repo"], revision=parts["revision"], allow_patterns=patterns)) / folder)
    except OSError as error:
        raise OSError(f"{source} is no folder here, and cannot be fetched as a hub repository: {error}") from error


def measure(
    checkpoint: Checkpoint,
    *,
    experts: int,
    seed: int,
    dtype: str,
    device: str,
    optim_args: str = "",
    architecture: str | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per matrix; and the tensors in the files that the model has no use for."""
    config = MuonConfig.from_optim_args(optim_args)
    if config.per_head:
        raise ValueError("per_head=true cuts by head, and the spectra are of whole projections: leave it out")
    model = StoredModel(local_folder(checkpoint.source), config, architecture)
    rows = []
    for matrix in model.matrices(experts=experts, seed=seed):
        result = spectrum(model.read(matrix).to(device), dtype=getattr(torch, dtype))
        numbers = {
            name: getattr(result, name).item()
            for name in ("entropy", "stable_rank", "spectral_norm", "smallest", "condition", "rms")
        }
        note = "not finite" if math.isnan(numbers["rms"]) else "zero" if numbers["rms"] == 0 else ""
        if not note and min(matrix.rows, matrix.columns) == 1:
            note = "one row or column"
        rows.append(
            {
                **{"run": checkpoint.run, "step": checkpoint.step, "tokens": checkpoint.tokens},
                **{
                    name: getattr(matrix, name) for name in ("layer", "module", "parameter", "expert", "piece", "group")
                },
                **{"A": matrix.rows, "B": matrix.columns, **numbers, "note": note},
                "singular_values": result.singular_values.float().cpu().numpy(),
            }
        )
    return rows, model.ignored


def as_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows with integer columns that can be empty."""
    return pd.DataFrame(rows).astype({"tokens": "Int64", "layer": "Int64", "expert": "Int64"})


def read_table(file: Path, options: dict[str, Any], wanted: list[Checkpoint]) -> pd.DataFrame:
    """What an earlier call left, of the checkpoints that are wanted now.

    Raises:
        ValueError: it was measured with other options, or from another source.
    """
    if not file.is_file():
        table = pd.DataFrame()
        table.attrs = {"options": options, "checkpoints": {}}
        return table
    table = pd.read_parquet(file)
    if table.attrs["options"] != options:
        raise ValueError(f"{file} was made with {table.attrs['options']}, not {options}: use another --out")
    for c in wanted:
        known = table.attrs["checkpoints"].get(f"{c.run} {c.step}", {"source": c.source})["source"]
        if known != c.source:
            raise ValueError(f"{file} has {c.run} step {c.step} from {known}, not from {c.source}: use another --out")
    return table


def save(table: pd.DataFrame, file: Path) -> None:
    """Both forms, each written whole or not at all."""
    partial = file.with_suffix(".partial")
    table.to_parquet(partial)
    partial.replace(file)
    table.drop(columns="singular_values").sort_values(["run", "step"], kind="stable").to_csv(partial, index=False)
    partial.replace(file.with_suffix(".csv"))


if __name__ == "__main__":
    exit_with(main, "spectra")
