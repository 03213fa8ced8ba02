"""Count the bytes that each engine sends in a step with AdamW and with Muon, and check the plan against them.

    python scripts/comm_report.py [--ranks 2 3 4] [--markdown docs/communication.md]

Ranks are processes on this machine (gloo, CPU). Collectives are counted where torch dispatches them, whoever calls
them: this package, DeepSpeed, DDP's reducer or FSDP2. Nothing is timed, except that it takes a few minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from comm_meter import Meter, storages
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import hf_muon
from hf_muon.plan import Plan, plan

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
LAYERS = (5, 15)
EXCHANGE_BYTES = 2**14
WARM_UP = 2  # DDP arranges its buckets anew after the first step, and ZeRO-3 records the order of modules.
STAGE3 = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
# What DDP reduces and gathers here is float32; the others run in bfloat16 with float32 master weights.
WIRE = {"ddp": dict(grad_bytes=4, param_bytes=4)}


def small_model(layers: int) -> Qwen2ForCausalLM:
    """A Qwen2 whose matrices straddle ranks, and whose rows 5 ranks would not divide."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, intermediate_size=120, num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_hidden_layers=layers, tie_word_embeddings=False))


def build(engine: str, optim: str, layers: int) -> tuple[torch.optim.Optimizer, Callable[..., None], Callable]:
    """The optimizer, one training step, and which tensors hold the matrices' state."""
    model: nn.Module = small_model(layers)
    if engine == "fsdp2":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        for module in (*model.model.layers, model):
            fully_shard(module, mp_policy=policy)
    groups = hf_muon.param_groups(model)
    group = dist.group.WORLD if engine == "ddp" else None
    optimizer: torch.optim.Optimizer
    if optim == "muon":
        optimizer = hf_muon.Muon(groups, process_group=group, exchange_bytes=EXCHANGE_BYTES)
    else:
        optimizer = torch.optim.AdamW([{"params": g["params"]} for g in groups])
    if engine.startswith("zero"):
        return optimizer, *_deepspeed(int(engine[-1]), model, optimizer)
    wrapped = nn.parallel.DistributedDataParallel(model) if engine == "ddp" else model

    def step(batch: dict[str, Tensor]) -> None:
        wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return optimizer, step, lambda: optimizer.param_groups[0]["params"]


def _deepspeed(stage: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Callable, Callable]:
    import deepspeed

    config = {
        # Defaults would keep all of so small a model whole on every ZeRO-3 rank.
        "zero_optimization": {"stage": stage, **(dict.fromkeys(STAGE3, 0) if stage == 3 else {})},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(batch: dict[str, Tensor]) -> None:
        engine.backward(engine(**batch).loss)
        engine.step()

    def matrices() -> list[Tensor]:
        host = engine.optimizer
        if stage < 3:
            return host.param_groups[0]["params"]
        pairs = zip(host.fp32_partitioned_groups_flat, host.sub_group_to_group_id.values(), strict=True)
        return [flat for flat, group in pairs if group == 0]

    return step, matrices


def measure(engine: str, optim: str, layers: int) -> dict[str, Any]:
    """One rank's numbers of one step."""
    optimizer, step, matrices = build(engine, optim, layers)
    tokens = torch.arange(32).reshape(2, 16) % 96
    batch = {"input_ids": tokens, "labels": tokens}
    meter = Meter()
    meter.watch(optimizer)
    for _ in range(WARM_UP):
        step(batch)
    with meter:
        step(batch)
    state = [t for p in matrices() for t in optimizer.state[p].values() if isinstance(t, Tensor) and t.ndim]
    return {
        "outside": sum(n for (inside, _), n in meter.bytes.items() if not inside),
        "matrices": sum(n for (inside, name), n in meter.bytes.items() if inside and name != "allreduce_"),
        "small": sum(n for (inside, name), n in meter.bytes.items() if inside and name == "allreduce_"),
        "peak": meter.peak,
        "state": sum(s.nbytes() for s in storages(state)),
        "orthogonalized": optimizer.telemetry.orthogonalized / (WARM_UP + 1) if optim == "muon" else 0,
    }


def worker(out: Path, engines: Sequence[str]) -> None:
    """All cases on this rank."""
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    found = [
        {"engine": engine, "optim": optim, "layers": layers, **measure(engine, optim, layers)}
        for engine in engines
        for layers in LAYERS
        for optim in ("adamw", "muon")
        if (optim, layers) != ("adamw", LAYERS[1])
    ]
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()  # gloo aborts a rank that still talks to one that has left
    sys.stdout.flush()
    os._exit(0)


def run(ranks: int, engines: Sequence[str] = ENGINES) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """(engine, optimizer, layers) -> what each of ``ranks`` processes measured."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [__file__, "--worker", folder, "--engines", *engines]
        path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",  # ranks share the cores
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # ninja, for DeepSpeed
        }
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-8000:])
        results = [json.loads((Path(folder) / f"rank{r}.json").read_text()) for r in range(ranks)]
    return {(row[0]["engine"], row[0]["optim"], row[0]["layers"]): list(row) for row in zip(*results, strict=True)}


def predict(engine: str, ranks: int, layers: int) -> Plan:
    """What the plan says of a case."""
    config = hf_muon.MuonConfig(exchange_bytes=EXCHANGE_BYTES)
    return plan(hf_muon.param_groups(small_model(layers)), engine, ranks, config, **WIRE.get(engine, {}))


def rows(ranks: int, results: dict[tuple[str, str, int], list[dict[str, Any]]]) -> tuple[list[str], list[str]]:
    """Lines of the two tables."""
    traffic, memory = [], []
    for engine in dict.fromkeys(key[0] for key in results):
        adamw, muon = (results[engine, optim, LAYERS[0]] for optim in ("adamw", "muon"))
        expected = predict(engine, ranks, LAYERS[0])
        extra = [r["matrices"] for r in muon]
        base = sum(r["outside"] + r["small"] + r["matrices"] for r in adamw) / ranks
        total = sum(r["outside"] + r["small"] + r["matrices"] for r in muon) / ranks
        cells = [f"{base:,.0f}", f"{total:,.0f}", f"{sum(extra) / ranks:,.0f}", f"{max(extra):,.0f}"]
        cells += [f"{sum(extra) / ranks / base:.1%}", "equal" if extra == list(expected.extra_bytes) else "DIFFERS"]
        cells += [f"{sum(r['small'] for r in muon) / ranks:,.0f}"]
        cells += [f"{sum(r['orthogonalized'] for r in muon) / expected.matrices:g}"]
        cells += [f"{max(r['state'] for r in muon):,}", f"{max(r['state'] for r in adamw):,}"]
        traffic.append(f"| {engine} | {ranks} | {' | '.join(cells)} |")
        peaks = [(max(r["peak"] for r in results[engine, "muon", n]), predict(engine, ranks, n)) for n in LAYERS]
        cells = [f"{peak:,} | {p.transient_bytes:,}" for peak, p in peaks]
        memory.append(f"| {engine} | {ranks} | {' | '.join(cells)} |")
    return traffic, memory


HEAD = """# What a step sends

Made by `python scripts/comm_report.py --markdown docs/communication.md` with {versions} (gloo, CPU).

Bytes that leave one rank in one optimizer step (mean over the ranks unless it says max), counted where torch dispatches
collectives: this package's, DeepSpeed's, those of DDP's reducer and of FSDP2. Conventions for N ranks: an all-reduce of
B bytes sends 2 (N - 1) / N B per rank, a reduce-scatter or all-gather (N - 1) / N B of the full buffer, a broadcast
B from every rank but the last of its ring, an all-to-all what leaves the rank. The model is a Qwen2 of {layers} layers
and width 48; gradients and weights travel in bfloat16 (DDP: float32), momentum-applied gradients and updates in
bfloat16. DeepSpeed all-reduces gradients under ZeRO-1 and -2 (`use_multi_rank_bucket_allreduce`), more than the
reduce-scatter of the plan.

* *extra*: what Muon's matrices add, to their owners and back; *plan*: whether `hf_muon.plan` says the same number of
  bytes for every rank.
* *small*: the all-reduces in which ranks agree on a step and share its metrics; they do not grow with the matrices.
* *NS*: how often each matrix is orthogonalized, over all ranks.
* *state*: of the optimizer for the matrices, on the rank that stores the most. Muon's is half of AdamW's.

| engine | ranks | AdamW | Muon | extra | extra, max | extra / AdamW | plan | small | NS | Muon state | AdamW state |
|---|---|---|---|---|---|---|---|---|---|---|---|
{traffic}

## Transient memory

Peak of the tensors that a step of Muon allocates and gives back, on the worst rank, with `exchange_bytes` {budget:,}
(a buffer inside of an operator is not seen), and the bound that `hf_muon.plan` states. It follows the budget, not the
model, which has {layers} layers and then {more}.

| engine | ranks | {layers} layers | bound | {more} layers | bound |
|---|---|---|---|---|---|
{memory}"""


def document(traffic: list[str], memory: list[str]) -> str:
    """The report."""
    packages = ("torch", "deepspeed", "transformers")
    return HEAD.format(
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        traffic="\n".join(traffic),
        memory="\n".join(memory),
        layers=LAYERS[0],
        more=LAYERS[1],
        budget=EXCHANGE_BYTES,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--markdown", type=Path, help="write here as well")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.engines)
    tables = [rows(n, run(n, options.engines)) for n in options.ranks]
    text = document([r for t, _ in tables for r in t], [r for _, m in tables for r in m])
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
