"""What Muon adds to a training step over AdamW: on paper for full-size models, and measured on a small one.

    python scripts/bench_training.py [--rounds 15] [--bench FILE] [--json FILE]

On paper: operations of Newton-Schulz beside those of forward and backward (6 per weight that a token passes, and per
token). It is the share of time where both run at one rate and elementwise work costs nothing beside them. With the
JSON of scripts/bench.py, also at its rates: the optimizer step at what it reached there on matrices of that model, all
its elementwise work counted, and forward and backward at the whole rate of a product, which is less than they take.
Measured: the demo's Qwen2 on random tokens, forward, backward and step, the two optimizers in turns.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from bench import clock
from tqdm.auto import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

import hf_muon
from hf_muon.exchange.ownership import step_flops
from hf_muon.integrations.models import on_meta
from hf_muon.routing import route

# Tokens of an optimizer step: Moonlight's stage 2 (4096 x 8K) and 1 (2048 x 8K), and its tulu-3 fine-tuning's scale.
TOKENS = (2**25, 2**24, 2**19)
# Each model's configuration, and its workload in bench.py.
MODELS = {
    "Qwen2.5-7B": ("recipes/qwen2.5-7b/config.json", "qwen2.5-7b"),
    "Moonlight-16B-A3B": ("recipes/moonlight-16b-a3b/config.json", "moonlight-experts"),
}


def on_paper(config: str) -> tuple[float, float]:
    """(operations of Newton-Schulz in an optimizer step of 5 steps each, weights that a token passes)."""
    model = on_meta(config)
    experts = getattr(model.config, "n_routed_experts", None) or 1
    share = (getattr(model.config, "num_experts_per_tok", None) or 1) / experts
    operations = passed = 0.0
    for found in route(model, hf_muon.MuonConfig()):
        if found.layout is not None:
            operations += sum(5 * n * step_flops(a, b) for n, a, b in found.layout.matrices())
        if found.kind != "embedding":  # a lookup; the head is a product
            passed += found.parameter.numel() * (share if ".experts." in found.name else 1.0)
    return operations, passed


def rate(bench: dict[str, Any], workload: str) -> float:
    """Operations of plain iteration per second of our whole optimizer step, as a share of a product's rate."""
    steps = bench["workloads"][workload]["steps"]
    return steps["torch"]["operations"] / steps["hf_muon"]["median"] / bench["matmul_rate"]


def measured(rounds: int) -> dict[str, list[float]]:
    """Seconds of whole training steps of the demo's model, 16 x 256 tokens, by optimizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **{"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": False},
    )
    tokens = torch.randint(4096, (16, 256))
    models = {name: Qwen2ForCausalLM(config) for name in ("muon", "adamw")}
    optimizers: dict[str, torch.optim.Optimizer] = {
        "muon": hf_muon.Muon(hf_muon.param_groups(models["muon"]), lr=1e-3),
        "adamw": torch.optim.AdamW(models["adamw"].parameters(), lr=1e-3, fused=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    for i in tqdm(range(rounds + 2), desc="training steps", leave=False):
        random.shuffle(order)
        for name in order:
            start = clock(tokens.device)
            models[name](input_ids=tokens, labels=tokens).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if i >= 2:
                seconds[name].append(clock(tokens.device) - start)
    return seconds


def main() -> None:
    """Print both, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bench", type=Path, help="the JSON of scripts/bench.py on this machine")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = json.loads(options.bench.read_text()) if options.bench else None
    measured_there = {w: {*work["steps"]} for w, work in bench["workloads"].items()} if bench else {}
    lacking = [w for _, w in MODELS.values() if bench and not {"hf_muon", "torch"} <= measured_there.get(w, set())]
    if lacking:
        parser.error(
            f"{options.bench} has no hf_muon and torch on {', '.join(lacking)}: run scripts/bench.py with them"
        )
    out: dict[str, Any] = {"on_paper": {}}
    print("| model | tokens a step | Newton-Schulz, operations | forward and backward | share | at measured rates |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (config, workload) in MODELS.items():
        operations, passed = on_paper(config)
        reached = rate(bench, workload) if bench else None
        for tokens in TOKENS:
            training = 6 * passed * tokens
            share = operations / training
            row = {"newton_schulz": operations, "training": training, "rate": reached}
            out["on_paper"][f"{name}, {tokens} tokens"] = row
            cells = [name, f"{tokens:,}", f"{operations:.2e}", f"{training:.2e}", f"{share:.2%}"]
            cells.append(f"{share / reached:.2%}" if reached else "")
            print("| " + " | ".join(cells) + " |")
    seconds = out["seconds"] = measured(options.rounds)
    ratios = [a / b for a, b in zip(seconds["muon"], seconds["adamw"], strict=True)]
    low, mid, high = statistics.quantiles(ratios, n=4, method="inclusive")
    times = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    print(
        f"\nthe demo's model, 4,096 tokens a step: Muon {times['muon']:.0f} ms, AdamW {times['adamw']:.0f} ms; "
        f"Muon / AdamW {mid:.3f} ({low:.3f}-{high:.3f}), n = {options.rounds}, {torch.get_num_threads()} threads"
    )
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
