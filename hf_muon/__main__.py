"""``python -m hf_muon explain MODEL``: what Muon would train in a model, without loading its weights."""

from __future__ import annotations

import argparse
import sys

from .config import MuonConfig
from .routing import Report, route


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hf_muon", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("explain", help="which parameter goes to Muon, which to AdamW, and why")
    command.add_argument("model", help="a config.json, a directory with one, or a hub id")
    command.add_argument("--optim-args", default="", help='as in TrainingArguments, e.g. "per_head=true,exclude=a.*"')
    command.add_argument("--architecture", help="a transformers class name; default: the one the config names")
    command.add_argument("--trust-remote-code", action="store_true", help="let a hub repository run its own model code")
    command.add_argument("--summary", action="store_true", help="totals only, no line per parameter kind and reason")
    options = parser.parse_args(argv)
    from .integrations.models import on_meta

    try:
        config = MuonConfig.from_optim_args(options.optim_args)
        model = on_meta(options.model, options.architecture, trust_remote_code=options.trust_remote_code)
        report = Report(tuple(route(model, config)))
    except (ValueError, OSError) as error:
        print(f"hf_muon explain: {error}", file=sys.stderr)
        return 1
    print(report.summary() if options.summary else report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
