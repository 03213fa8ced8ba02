"""What the scripts that run a grid of cells do alike: results that are whole or absent, and where they come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def exit_with(main: Callable[[], int | None], name: str) -> None:
    """Run a script; what its user can mend (a wrong path or value) is one line behind the script's name."""
    try:
        status = main()
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error}")
    sys.exit(status)


def write_whole(file: Path, text: str) -> None:
    """All of it or, when killed meanwhile, what was there before."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def write_result(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write ``result.json`` last and at once: its presence means that the cell is done."""
    write_whole(folder / "result.json", json.dumps(result))
    return result


def read_results(out: Path) -> dict[str, Any]:
    """Finished cells by their folder below ``out``."""
    files = sorted(out.glob("*/*/result.json"))
    return {str(file.parent.relative_to(out)): json.loads(file.read_text(encoding="utf-8")) for file in files}


def provenance(command: str, *, threads: int | str | None = None) -> dict[str, Any]:
    """What somebody needs to repeat it; ``threads`` of a cell, by default those of OMP_NUM_THREADS."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    git = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    packages = ("torch", "transformers", "trl", "accelerate", "datasets")
    threads = threads or os.environ.get("OMP_NUM_THREADS")
    return {
        "command": command.strip(),
        "commit": git.stdout.strip() or "unknown",
        "versions": {name: metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={threads}",
    }
