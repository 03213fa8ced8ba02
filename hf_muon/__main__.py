"""What Muon would train in a model (``explain``), and what a step would cost (``plan``), without loading weights."""

from __future__ import annotations

import argparse
import json
import sys

from torch import nn

from .checkpoint import consolidate
from .config import MuonConfig
from .groups import param_groups
from .plan import ENGINES, plan, table
from .routing import Report, route


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = _parser().parse_args(argv)
    from .integrations.models import on_meta

    try:
        if options.command == "consolidate":
            print(_consolidate(options.checkpoint, options.out))
            return 0
        config = MuonConfig.from_optim_args(options.optim_args)
        model = on_meta(options.model, options.architecture, trust_remote_code=options.trust_remote_code)
        print({"explain": _explain, "plan": _plan}[options.command](model, config, options))
    except (ValueError, OSError) as error:
        print(f"hf_muon {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hf_muon", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--optim-args", default="", help='as in TrainingArguments, e.g. "per_head=true,exclude=a.*"')
    common.add_argument("--architecture", help="a transformers class name; default: the one the config names")
    common.add_argument("--trust-remote-code", action="store_true", help="let a hub repository run its own model code")
    source = "a config.json, a directory with one, or a hub id"

    command = commands.add_parser(
        "explain", parents=[common], help="which parameter goes to Muon, which to AdamW, and why"
    )
    command.add_argument("model", help=source)
    command.add_argument("--summary", action="store_true", help="totals only, no line per parameter kind and reason")

    command = commands.add_parser("plan", parents=[common], help="communication, memory and balance of a step")
    command.add_argument("--config", dest="model", required=True, metavar="MODEL", help=source)
    command.add_argument("--engine", action="append", required=True, choices=ENGINES, help="may be repeated")
    command.add_argument("--dp", action="append", type=int, help="data-parallel ranks; may be repeated (default 8)")
    command.add_argument("--grad-bytes", type=int, default=2, help="of a gradient element on the wire")
    command.add_argument("--param-bytes", type=int, default=2, help="of a weight element on the wire")
    command.add_argument("--json", action="store_true", help="numbers in bytes and operations instead of a table")

    command = commands.add_parser(
        "consolidate", help="a checkpoint of any engine as one that every engine and number of ranks resumes from"
    )
    command.add_argument("checkpoint", help="a checkpoint-N folder of a Trainer run with optim='muon'")
    command.add_argument("out", help="the new folder")
    return parser


def _consolidate(checkpoint: str, out: str) -> str:
    from .integrations.models import trained_weights, write_model

    state = consolidate(checkpoint, out, lambda names: trained_weights(checkpoint, names), write_model)
    elements = sum(t.numel() for values in state["state"].values() for t in values.values())
    return (
        f"{out}: {len(state['weights']):,} weights and {elements:,} elements of state; resume_from_checkpoint takes it"
    )


def _explain(model: nn.Module, config: MuonConfig, options: argparse.Namespace) -> str:
    report = Report(tuple(route(model, config)))
    return report.summary() if options.summary else str(report)


def _plan(model: nn.Module, config: MuonConfig, options: argparse.Namespace) -> str:
    groups = param_groups(model, config)
    wire = dict(grad_bytes=options.grad_bytes, param_bytes=options.param_bytes)
    plans = [plan(groups, engine, n, config, **wire) for engine in options.engine for n in options.dp or [8]]
    if options.json:
        return json.dumps([p.summary() for p in plans], indent=1)
    return f"{table(plans)}\nper rank and step; collectives as rings; hf_muon/plan.py has the conventions"


if __name__ == "__main__":
    raise SystemExit(main())
