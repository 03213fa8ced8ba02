"""Start the worker on some ranks, and read what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def launch(out: Path, ranks: int, specs: list[dict], timeout: int = 600) -> dict[str, list[dict]]:
    """Scenario name -> what each rank left. A worker that does not end is an error after ``timeout`` seconds."""
    out.mkdir(parents=True, exist_ok=True)
    scenarios = out / f"scenarios-{ranks}.json"
    scenarios.write_text(json.dumps(specs))
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--module"]
    command = [sys.executable, *(many if ranks > 1 else ["-m"]), "tests.distributed.worker", str(out), str(scenarios)]
    env = {
        **os.environ,
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",  # ranks share the cores
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # ninja, for DeepSpeed
    }
    with subprocess.Popen(
        command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun takes its workers with it; killed, it would leave them hanging
            stdout, stderr = process.communicate()
            left = [
                s["name"] for s in specs if not all((out / s["name"] / f"rank{r}.pt").exists() for r in range(ranks))
            ]
            raise AssertionError(f"still running after {timeout} s, in {left[:1]}: {stdout}{stderr[-6000:]}") from None
    assert process.returncode == 0, stdout + stderr
    found = {
        spec["name"]: [torch.load(out / spec["name"] / f"rank{r}.pt", weights_only=True) for r in range(ranks)]
        for spec in specs
    }
    for spec in specs:
        for rank, result in enumerate(found[spec["name"]]):
            unexpected = "error" in result and not spec.get("fails")
            assert not unexpected, f"{spec['name']}, rank {rank}: {result.get('traceback')}"
    return found


def joined(results: list[dict], key: str) -> dict[str, torch.Tensor]:
    """Parameter name -> all its elements, 1-D, from the slices under ``key`` of all ranks."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for result in results:
        for name, (start, tensor) in result[key].items():
            parts.setdefault(name, {}).update({start: tensor} if tensor.numel() else {})
    return {name: torch.cat([found[start] for start in sorted(found)]) for name, found in parts.items()}
