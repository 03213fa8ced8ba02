"""The measurements of docs/stability.md: what watching costs, and what QK-Clip does where logits grow.

python scripts/stability.py cost                  # a table of paired step times
python scripts/stability.py runs --out runs/st    # two short runs at too high a learning rate, and their figure
python scripts/stability.py families              # which causal language models qk_clip serves, and why not others
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import torch
from plot import BLUE, VERMILION, finish, plt
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_muon
from hf_muon.integrations.attention import unwatch, watch
from hf_muon.integrations.clip import attach, find_heads

ROOT = Path(__file__).parent.parent
TAU = 100.0  # Kimi K2's
RUNS = {"no clip": "", f"qk_clip={TAU:.0f}": f",qk_clip={TAU:.0f}"}
SIZES = {"short": (4, 256), "long": (1, 1024)}
"""Name -> batch, tokens."""
HIDDEN, LAYERS = 256, 2


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "runs", "families"))
    parser.add_argument("--steps", type=int, default=None, help="default: 12 of each kind; 80 for the runs")
    parser.add_argument("--learning_rate", type=float, default=0.1, help="of the runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/stability"), help="of the runs (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.what == "cost":
        print(cost_table(arguments.steps or 12))
        return
    if arguments.what == "families":
        print(served_families())
        return
    for name, options in RUNS.items():
        run(arguments.out / folder(name), options, arguments.learning_rate, arguments.steps or 80)
    print(draw(arguments.out, arguments.out / "stability.png"))


def folder(name: str) -> str:
    """Of a run."""
    return name.replace(" ", "-").replace("=", "-")


def run(out: Path, options: str, learning_rate: float, steps: int) -> None:
    """One pretraining run on the offline data, unless it is there."""
    if (out / "trainer_state.json").is_file():
        return
    changes = {
        "optim_args": f"momentum=0.95{options}", "learning_rate": learning_rate, "max_steps": steps,
        "weight_decay": 0.0, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10, "block_size": 128,
        "max_test_blocks": 32, "eval_strategy": "no", "save_strategy": "no", "logging_steps": 2,
        "attention_logits_steps": 2, "detect_spikes": True, "output_dir": out,
    }  # fmt: skip
    recipe = ROOT / "recipes/offline/pretrain/config_muon.yaml"
    given = [text for key, value in changes.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, str(ROOT / "scripts/pretrain.py"), "--config", str(recipe), *given]
    subprocess.run(command, cwd=ROOT, check=True)


def draw(out: Path, figure: Path) -> str:
    """Largest logit and loss over the steps; returns a line of numbers per run."""
    fig, (logits, loss) = plt.subplots(1, 2, figsize=(10, 4))
    lines = []
    for (name, _), colour, style in zip(RUNS.items(), (VERMILION, BLUE), ("--", "-"), strict=True):
        history = json.loads((out / folder(name) / "trainer_state.json").read_text())["log_history"]
        rows = [row for row in history if "attention/max_logit" in row]
        steps = [row["step"] for row in rows]
        logits.plot(steps, [row["attention/max_logit"] for row in rows], style, color=colour, label=name)
        loss.plot(steps, [row["loss"] for row in rows], style, color=colour, label=name)
        lines.append(summary(name, history, rows))
    logits.axhline(TAU, color="grey", linewidth=0.8)
    logits.set_yscale("log")
    finish(logits, xlabel="step", ylabel="largest logit", title="Attention logits (line: tau)")
    finish(loss, xlabel="step", ylabel="loss", title="Training loss")
    fig.tight_layout()
    fig.savefig(figure, dpi=110)
    return "\n".join(lines)


def summary(name: str, history: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """One row of the table of runs."""
    largest = max(row["attention/max_logit"] for row in rows)
    share = max(row["attention/share_above_100"] for row in rows)
    clips = sum(row.get("muon/qk_clip/heads", 0) for row in rows)
    evaluated = [row["eval_loss"] for row in history if "eval_loss" in row]
    mean = statistics.fmean(row["loss"] for row in rows[-5:])
    return (
        f"| {name} | {largest:.0f} | {rows[-1]['attention/max_logit']:.0f} | {share:.1e} | {clips:.0f} | {mean:.3f} | "
        f"{evaluated[-1]:.3f} | {rows[-1]['spike/steps']} |"
    )


def served_families() -> str:
    """The causal language models that can be built on the meta device, by whether they are served, or why not."""
    found: dict[str, list[str]] = defaultdict(list)
    reasons = ("cannot be observed", "may normalize", "one parameter", "needs plain Linears", "clamps")
    for family in families.families():
        if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            continue
        try:
            find_heads(families.build(family))
            found["served"].append(family)
        except families.CannotBuild:
            found["not built"].append(family)
        except ValueError as error:
            found[next((r for r in reasons if r in str(error)), str(error))].append(family)
    return "\n".join(f"{len(names)} {reason}: {' '.join(names)}" for reason, names in found.items())


def cost_table(count: int) -> str:
    """Step times by kind of step, paired with the plain step before them."""
    torch.set_num_threads(1)
    lines = ["| tokens | step | ratio to a plain step: median (quartiles) | n |", "|---|---|---|---|"]
    for batch, tokens in SIZES.values():
        ratios = measure(batch, tokens, count)
        for kind, values in ratios.items():
            low, middle, high = statistics.quantiles(values, n=4)
            lines.append(f"| {batch} x {tokens} | {kind} | {middle:.3f} ({low:.3f} to {high:.3f}) | {len(values)} |")
    return "\n".join(lines)


def measure(batch: int, tokens: int, count: int) -> dict[str, list[float]]:
    """Ratios of times; every kind of step alternates with a plain one, on the same weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).train()
    ids = torch.randint(0, 4096, (batch, tokens))
    muon = hf_muon.Muon(hf_muon.param_groups(model, lr=0.0), lr=0.0)
    logits, outputs = hf_muon.AttentionLogitsCallback(1), hf_muon.OutputRMSCallback(1)
    logits.find(model), outputs.find(model)
    # Far above every logit, and far below.
    clips = {tau: attach(model, muon, tau) for tau in (1e9, 1e-9)}
    muon.row_factors = None

    def plain() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        muon.step()
        muon.zero_grad()

    def measured(callback: Any) -> Callable[[], None]:
        def step() -> None:
            callback.begin()
            plain()
            callback.end()
            callback.summary(torch.device("cpu"))

        return step

    def clipped(tau: float) -> Callable[[], None]:
        def step() -> None:
            muon.row_factors = clips[tau]
            watch(clips[tau])
            plain()
            unwatch(clips[tau])
            muon.row_factors = None

        return step

    for clipping in clips.values():
        unwatch(clipping)
    kinds = {
        "attention logits logged": measured(logits),
        "output RMS logged": measured(outputs),
        "qk_clip, all bounds below": clipped(1e9),
        "qk_clip, all logits computed": clipped(1e-9),
        "plain again": plain,
    }
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    for i in range(count + 1):
        for kind, step in kinds.items():
            pair = [seconds(plain), seconds(step)]
            if i:  # the first of each warms up
                ratios[kind].append(pair[1] / pair[0])
    return ratios


def seconds(step: Callable[[], None]) -> float:
    """Of processor time, of one call."""
    begin = time.process_time()  # one thread, and other programs may share the machine
    step()
    return time.process_time() - begin


if __name__ == "__main__":
    main()
