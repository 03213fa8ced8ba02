"""Writes docs/equivalence.md: every engine against one process, and DeepSpeed's own Muon beside ours.

Run it as ``python -m tests.distributed.table``; it takes some minutes.
"""

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from tests.distributed import scenarios
from tests.distributed.launch import ROOT, joined, launch
from tests.distributed.replay import replay, same
from tests.reference import relative_error

ENGINES = ("ddp", "zero1", "zero2", "bf16_optimizer", "zero3", "fsdp2")
RANKS = (2, 3, 4)
PRECISIONS = ("float32", "bfloat16")
LR = 2e-3
CLIPS = (0.0, 1.0, 0.1)
OUT = ROOT / "docs" / "equivalence.md"
TEXT = """# Every engine against one process

{steps} steps of a two-layer Qwen2 of width 32 (14 matrices, tied embedding, global batch {batch}, lr {lr}, clipping at
{clip}, which acts in every step) by the Trainer under each engine, against the Trainer on one process with the same
global batches. Weights, gradients and momentum are float32 and Newton-Schulz is in the precision named. Under
BF16_Optimizer the forward is in bfloat16, so that only the replay can be equal.

Command: `python -m tests.distributed.table`. {versions}.

* *matrices*: the largest `||W - W_ref|| / ||W_ref - W_0||` of a matrix; *together*: that of all matrices as one vector.
* *AdamW*: the largest of AdamW's parameters beside Muon; *plain AdamW*: the largest of any parameter in a run of plain
  AdamW under the same engine, which is what the engine alone does to Adam.
* *update RMS*: of the last step, before the learning rate, the same in the logs of every rank. One process:
  {reference}.
* *replay*: whether one process that steps through the gradients the ranks recorded ends at the same bits, in all
  momentum and all weights that Muon trains, and within float32's last bits in AdamW's (torch's fused AdamW rounds the
  end of a tensor otherwise than the rest, and shards end elsewhere).

| engine | ranks | Newton-Schulz | matrices | together | AdamW | plain AdamW | update RMS | replay |
|---|---|---|---|---|---|---|---|---|
{rows}

Gradients are summed over ranks in another order. In float32 the schedule amplifies that from 1e-7 to 1e-5; in bfloat16
it flips roundings. The replay shows that nothing else differs.

## DeepSpeed's own Muon

The same model under ZeRO-1 at 2 ranks in float32, weight decay 0: RMS of a step's change of all matrices, divided by
the learning rate, with DeepSpeed's `"type": "Muon"` and with `optim="muon"`. The norm of the gradients is about 0.7,
so that the Trainer's default `max_grad_norm` of 1.0 should do nothing, and 0.1 should clip. DeepSpeed writes its update
into the gradient and clips that, so that `max_grad_norm` decides the size of the step; the factor grows with the root
of the summed ranks of a model's matrices.

| | step | max_grad_norm 0 (off) | 1.0 | 0.1 |
|---|---|---|---|---|
{native}
"""


def spec(name: str, engine: str, **more) -> dict:
    return {"name": name, "engine": engine, "model": "qwen2", "steps": 20, "max_grad_norm": 0.5, **more}


def native(steps: int, clip: float, ours: bool) -> dict:
    section = {"optimizer": {"type": "Muon", "params": {"lr": LR, "momentum": 0.95, "weight_decay": 0.0}}}
    theirs = {"native": True, "optim": "adamw_torch", "deepspeed": section}
    name = f"{['native', 'ours'][ours]}-{steps}-{clip}"
    more = {"arguments": {"weight_decay": 0.0}, **({} if ours else theirs)}
    return {**spec(name, "zero1", **more), "steps": steps, "max_grad_norm": clip}


def muon(engine: str, precision: str) -> dict:
    half = {"bf16": True} if engine == "bf16_optimizer" else {}
    return spec(f"{engine}-{precision}", engine, ns_dtype=precision, record=True, **half)


def worst(ours: dict, reference: dict, start: dict, names: list[str]) -> float:
    return max(relative_error(ours[n], reference[n], start[n]) for n in names)


def row(found: dict, one: dict, start: dict, ranks: int, run: dict) -> str:
    """One line of the first table."""
    engine, precision, results = run["engine"], run["ns_dtype"], found[run["name"]]
    exact = replay(run, results)
    equal = all(same(key, n, v, exact) for key in ("weights", "momentum") for n, v in joined(results, key).items())
    rms = {result["logs"][-1]["muon/update_rms"] for result in results}
    numbers = ["-"] * 4
    if engine != "bf16_optimizer":
        ours, reference, plain = results[0]["model"], one[precision][0]["model"], found[f"{engine}-plain"][0]["model"]
        matrices = list(results[0]["momentum"])
        adamw = [n for n in ours if n not in matrices]
        together = [torch.cat([x[n].flatten() for n in matrices]) for x in (ours, reference, start)]
        errors = worst(ours, reference, start, matrices), relative_error(*together)
        errors += worst(ours, reference, start, adamw), worst(plain, one["plain"][0]["model"], start, adamw)
        numbers = [f"{e:.1e}" for e in errors]
    logged = f"{rms.pop():.5f}" if len(rms) == 1 else "ranks differ"
    return f"| {' | '.join([engine, str(ranks), precision, *numbers, logged, 'yes' if equal else '**no**'])} |"


def main() -> None:
    """Run everything and write the file."""
    folder = Path(tempfile.mkdtemp())
    start = {n: p.detach() for n, p in scenarios.model("qwen2", "float32").named_parameters()}
    singles = [spec(p, "ddp", ns_dtype=p) for p in PRECISIONS] + [spec("plain", "ddp", optim="adamw_torch")]
    one = launch(folder / "1", 1, singles)
    rows = []
    for ranks in RANKS:
        runs = [muon(engine, precision) for engine in ENGINES for precision in PRECISIONS]
        plain = [spec(f"{e}-plain", e, optim="adamw_torch") for e in ENGINES if e != "bf16_optimizer"]
        found = launch(folder / str(ranks), ranks, runs + plain)
        rows += [row(found, one, start, ranks, run) for run in runs]
    kinds = [(ours, clip) for ours in (False, True) for clip in CLIPS]
    found = launch(folder / "native", 2, [native(s, clip, ours) for ours, clip in kinds for s in (1, 7, 8)])
    lines = []
    for ours in (False, True):
        for before, after in ((0, 1), (7, 8)):
            cells = []
            for clip in CLIPS:
                new = found[native(after, clip, ours)["name"]][0]["model"]
                old = found[native(before, clip, ours)["name"]][0]["model"] if before else start
                change = torch.cat([(new[n] - old[n]).flatten() for n in new if new[n].ndim == 2 and "embed" not in n])
                cells.append(f"{change.square().mean().sqrt() / LR:.4f}")
            lines.append(f"| {'this package' if ours else 'DeepSpeed'} | {after} | {' | '.join(cells)} |")
    names = ("torch", "transformers", "accelerate", "deepspeed")
    text = TEXT.format(
        steps=20,
        batch=scenarios.GLOBAL_BATCH,
        clip=0.5,
        lr=LR,
        versions=", ".join(f"{n} {version(n)}" for n in names)
        + f"\n(gloo on a CPU), Python {platform.python_version()}",
        reference=", ".join(f"{one[p][0]['logs'][-1]['muon/update_rms']:.5f} in {p}" for p in PRECISIONS),
        rows="\n".join(rows),
        native="\n".join(lines),
    )
    OUT.write_text(text)


if __name__ == "__main__":
    main()
