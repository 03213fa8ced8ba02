"""Time the optimizer step of Muon beside its peers, on the shapes of real models.

    python scripts/bench.py [WORKLOAD ...] [--device cuda] [--json FILE]
    python scripts/bench.py demo --profile    # where our own step spends its time, by operation

All contenders run in one process, interleaved and in a new order every round, so that a drifting machine drifts for all
of them; ratios are taken within a round. Each is compared with float64 before it is timed. For a quiet figure leave the
machine alone; OMP_NUM_THREADS sets the number of threads.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_contenders import ALL, CONTENDERS, Contender
from bench_workloads import WORKLOADS, Workload, single, tensors
from cells import write_whole
from comm_meter import Meter
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from hf_muon.coefficients import schedule

BAND = 0.06  # of bf16 Newton-Schulz around float64, on Gaussian gradients


def clock(device: torch.device) -> float:
    """Seconds, after all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call."""
    start = clock(device)
    step()
    return clock(device) - start


def matmul_rate(device: torch.device, size: int = 2048) -> float:
    """bf16 operations per second of a square product: the best of 8, in this run."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / min(timed(lambda: torch.mm(a, b), device) for _ in range(8))


def error(contender: Contender, workload: Workload, start: list[Tensor], grads: list[Tensor]) -> float:
    """Largest relative error of the direction of the first update against float64, over one matrix of every shape.

    Matrices of more than 8 million elements are left to the smaller ones: they would take float64 minutes.
    """
    worst = 0.0
    before, after, gradients = (single(workload, x) for x in (start, contender.whole(), grads))
    shapes = {m.shape: i for i, m in enumerate(before)}
    smallest = min(m.numel() for m in before)
    for i in [i for shape, i in shapes.items() if shape.numel() <= max(smallest, 2**23)]:
        want = exact(gradients[i], contender.coefficients).flatten()
        got = (before[i] * contender.decay - after[i]).double().flatten()
        got = got * (want @ got / (got @ got))  # scales differ between peers
        worst = max(worst, float((got - want).norm() / want.norm()))
    return worst


def exact(matrix: Tensor, coefficients: str = "moonlight") -> Tensor:
    """Five steps of a schedule on singular values in float64."""
    u, s, v = torch.linalg.svd(matrix.double().cpu(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in schedule(coefficients, 5):
        s = a * s + b * s**3 + c * s**5
    return (u * s @ v).to(matrix.device)


def measure(name: str, workload: Workload, names: list[str], device: torch.device) -> dict[str, Any]:
    """Every contender on one workload: checked, counted, then timed."""
    start, grads = tensors(workload, device)
    made = {n: CONTENDERS[n](workload, [w.clone() for w in start], grads) for n in names if n in CONTENDERS}
    out: dict[str, Any] = {"note": workload.note, "elements": workload.elements, "rounds": workload.rounds, "steps": {}}
    for n, contender in made.items():
        contender.step()
        wrong = None if n == "adamw" else error(contender, workload, start, grads)
        if wrong is not None and wrong > BAND:
            raise SystemExit(f"{n} on {name}: first update is {wrong:.3f} from float64, more than {BAND}: not timed")
        contender.step()
        meter = Meter()
        with FlopCounterMode(display=False) as flops, meter:
            meter.inside = True
            contender.step()
            meter.inside = False
        out["steps"][n] = {"error": wrong, "operations": flops.get_total_flops(), "peak_bytes": meter.peak}
    seconds: dict[str, list[float]] = {n: [] for n in made}
    order = list(made)
    for _ in tqdm(range(workload.rounds), desc=name, leave=False):
        random.shuffle(order)
        for grad in grads:
            grad.normal_()
        for n in order:
            seconds[n].append(timed(made[n].step, device))
    for n, values in seconds.items():
        row = out["steps"][n]
        row["seconds"] = values
        row["median"], row["low"], row["high"] = statistics.median(values), *_quartiles(values)
        ratios = [ours / theirs for ours, theirs in zip(seconds["hf_muon"], values, strict=True)]
        row["ours_to_this"] = [statistics.median(ratios), *_quartiles(ratios)]
        row["rate"] = row["operations"] / row["median"]
    return out


def profile(workload: Workload, device: torch.device, steps: int = 50) -> str:
    """Markdown: our step's milliseconds and calls by torch operation, without those it calls in turn; the ten longest.

    The profiler itself takes a few microseconds per call, so that the sum is more than the step takes without it.
    """
    start, grads = tensors(workload, device)
    ours = CONTENDERS["hf_muon"](workload, start, grads)
    for _ in range(5):
        ours.step()
    seconds = sorted(timed(ours.step, device) for _ in range(steps))
    with torch.profiler.profile() as recorded:
        for _ in range(steps):
            timed(ours.step, device)
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(recorded.key_averages(), key=lambda row: -getattr(row, attribute))
    total = sum(getattr(row, attribute) for row in rows)
    lines = [
        f"{1e3 * statistics.median(seconds):.2f} ms a step",
        "",
        "| operation | ms | calls |",
        "| --- | --- | --- |",
    ]
    for row in rows[:10]:
        lines.append(f"| {row.key} | {getattr(row, attribute) / 1e3 / steps:.2f} | {row.count / steps:.0f} |")
        total -= getattr(row, attribute)
    return "\n".join([*lines, f"| others | {total / 1e3 / steps:.2f} | |"])


def _quartiles(values: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    return cuts[0], cuts[2]


def table(results: dict[str, Any]) -> str:
    """Markdown, one line per workload and contender."""
    peak = results["matmul_rate"]
    lines = [
        "| workload | optimizer | step, ms (quartiles) | hf_muon / this | error | transient, MB | operations | rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, work in results["workloads"].items():
        for n, row in work["steps"].items():
            low, mid, high = (1e3 * row[k] for k in ("low", "median", "high"))
            ratio, first, third = row["ours_to_this"]
            cells = [
                name,
                n,
                f"{mid:.1f} ({low:.1f}-{high:.1f})",
                "" if n == "hf_muon" else f"{ratio:.2f} ({first:.2f}-{third:.2f})",
                "" if row["error"] is None else f"{row['error']:.3f}",
                f"{row['peak_bytes'] / 1e6:.1f}",
                f"{row['operations'] / 1e9:.1f} G",
                f"{row['rate'] / peak:.0%}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument(
        "--contenders", nargs="*", default=list(ALL), help=f"default: all installed of {', '.join(ALL)}"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--compile", action="store_true", help="let DeepSpeed compile its kernels, as it does by itself"
    )
    parser.add_argument("--profile", action="store_true", help="of our own step only, nothing is compared")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    unknown = sorted({*options.workloads} - {*WORKLOADS})
    if unknown:
        parser.error(f"unknown workloads {unknown}; there are {', '.join(WORKLOADS)}")
    unknown = sorted({*options.contenders} - {*ALL})
    if unknown:
        parser.error(f"unknown contenders {unknown}; there are {', '.join(ALL)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} sees no GPU here")
    missing = sorted({"hf_muon", *options.contenders} - {*CONTENDERS})
    if missing:
        print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
    if not options.compile:  # minutes per shape on a CPU
        torch.compiler.set_stance("force_eager")
    device = torch.device(options.device)
    if options.profile:
        for name in options.workloads:
            print(f"{name}: {profile(WORKLOADS[name], device)}")
        return
    names = list(dict.fromkeys(["hf_muon", *options.contenders]))
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "matmul_rate": matmul_rate(device),
        "workloads": {},
    }
    for name in options.workloads:
        results["workloads"][name] = measure(name, WORKLOADS[name], names, device)
        if options.json:  # after each: the next may take more memory than there is
            write_whole(options.json, json.dumps(results, indent=1) + "\n")
    print(table(results))
    for name, work in results["workloads"].items():
        print(f"{name}: {work['note']}; {work['rounds']} rounds")
    print("rate: operations done per second, as a share of a bf16 product's, measured in the same run")
    rate = results["matmul_rate"] / 1e12
    print(
        f"torch {results['torch']}, {results['device']}, {results['threads']} threads, bf16 matmul {rate:.2f} TFLOP/s"
    )


if __name__ == "__main__":
    main()
