"""Run a script or module that nobody edited with ``optim="muon"`` registered first.

    accelerate launch -m hf_muon.run trl.scripts.sft --optim muon ...
    python -m hf_muon.run my_script.py --optim muon ...

The script's argument parser reads the optimizer choices when it is built, so ``import hf_muon`` must come before it.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import runpy
import sys
import time

import hf_muon

hf_muon.register()  # the import did it; this line says why the import is there

_USAGE = "usage: python -m hf_muon.run SCRIPT.py|MODULE [ARGS ...]"
_SETTLE = 1.0
"""Seconds; between the Trainer's last collective and the shutdown were 0.03."""


def settle() -> None:
    """Before the end of a launched rank: give gloo's threads the time to drop the last collective's tensors.

    Dropping a tensor takes the interpreter's lock, and a thread that asks for it while Python shuts down aborts the
    process: a run that has trained and saved all is then reported as failed (pytorch issue 190489). Destroying the
    process group does not wait for the threads once DistributedDataParallel has used it.
    """
    if "WORLD_SIZE" in os.environ:  # a single rank uses gloo and DistributedDataParallel as well
        time.sleep(_SETTLE)


def main() -> None:
    """Run ``sys.argv[1]`` as ``__main__`` with the remaining arguments.

    Raises:
        SystemExit: no target was given, or it is neither a file nor an importable module.
    """
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(_USAGE)
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    atexit.register(settle)
    target = sys.argv[1]
    if target.endswith(".py") or os.path.isfile(target):
        if not os.path.isfile(target):
            raise SystemExit(f"hf_muon.run: no such script: {target}")
        sys.argv = sys.argv[1:]
        sys.path.insert(0, os.path.dirname(os.path.abspath(target)))
        runpy.run_path(target, run_name="__main__")
        return
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.util.find_spec(target)
    except ModuleNotFoundError as error:
        # A parent package that is missing is our message; one that fails to import something else has its own.
        if error.name is None or not f"{target}.".startswith(f"{error.name}."):
            raise
        found = None
    if found is None:
        raise SystemExit(f"hf_muon.run: no such module or script: {target}")
    runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
