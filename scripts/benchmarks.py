"""The paper's benchmarks: the harness's task, shots and metric for each, and what the paper measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Columns of the paper's tables, in the order of Benchmark.paper.
COLUMNS = {
    "sft": (
        *("Moonlight@1.2T Muon/Muon", "AdamW/Muon", "Muon/AdamW", "AdamW/AdamW"),  # Table 6: pretraining/SFT
        *("Qwen2.5-7B Adam", "Qwen2.5-7B Muon"),  # Table 7
    ),
    "pretrain": ("Moonlight-A@1.2T", "Moonlight@1.2T", "Moonlight"),  # Tables 4 and 5
}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One row of a table."""

    name: str
    task: str
    """Of lm-evaluation-harness, or of recipes/evaluation."""
    metric: str
    """``METRIC,FILTER`` in the harness's results; empty for a task that the paper does not have: all are shown."""
    shots: int | None = None
    """None: the task's own."""
    chat_task: str = ""
    """With a chat template, if it is another one."""
    chat_metric: str = ""
    paper: tuple[float, ...] = ()
    note: str = ""


SUITES: dict[str, tuple[Benchmark, ...]] = {
    "sft": (
        Benchmark(
            name="MMLU (0-shot CoT)",
            task="mmlu_cot_llama",
            metric="exact_match,strict_match",
            shots=0,
            paper=(55.7, 55.3, 50.2, 52.0, 71.4, 70.8),
        ),
        Benchmark(
            name="HumanEval",
            task="humaneval",
            metric="pass@1,create_test",
            chat_task="humaneval_instruct",
            shots=0,
            paper=(57.3, 53.7, 52.4, 53.1, 79.3, 77.4),
        ),
        Benchmark(
            name="MBPP",
            task="mbpp",
            metric="pass_at_1,none",
            chat_task="mbpp_instruct",
            chat_metric="pass_at_1,extract_code",
            shots=0,
            paper=(55.6, 55.5, 55.2, 55.2, 71.9, 71.6),
        ),
        Benchmark(
            name="GSM8K",
            task="gsm8k",
            metric="exact_match,strict-match",
            shots=5,
            paper=(68.0, 62.1, 64.9, 64.6, 89.8, 85.8),
        ),
    ),
    "pretrain": (
        Benchmark(name="MMLU", task="mmlu", metric="acc,none", shots=5, paper=(60.2, 60.4, 70.0)),
        Benchmark(
            name="MMLU-pro", task="mmlu_pro", metric="exact_match,custom-extract", shots=5, paper=(26.8, 28.1, 42.4)
        ),
        Benchmark(name="BBH", task="bbh", metric="exact_match,get-answer", shots=3, paper=(45.3, 43.2, 65.2)),
        Benchmark(
            name="TriviaQA",
            task="triviaqa",
            metric="exact_match,remove_whitespace",
            shots=5,
            paper=(57.4, 58.1, 66.3),
            note="the paper takes the full set, the harness the validation set without context",
        ),
        Benchmark(name="HumanEval", task="humaneval", metric="pass@1,create_test", shots=0, paper=(29.3, 37.2, 48.1)),
        Benchmark(
            name="MBPP",
            task="mbpp",
            metric="pass_at_1,none",
            shots=3,
            paper=(49.2, 52.9, 63.8),
            note="the paper gives no shots; these are the harness's",
        ),
        Benchmark(name="GSM8K", task="gsm8k", metric="exact_match,strict-match", shots=4, paper=(43.8, 45.0, 77.4)),
        Benchmark(
            name="MATH",
            task="minerva_math",
            metric="exact_match,none",
            shots=4,
            paper=(16.1, 19.8, 45.3),
            note="the paper gives no shots; these are the harness's",
        ),
        Benchmark(
            name="CMath",
            task="cmath",
            metric="exact_match,last-number",
            shots=3,
            paper=(57.8, 60.2, 81.1),
            note="the paper gives neither shots nor prompt; recipes/evaluation/cmath.yaml has ours",
        ),
        Benchmark(name="C-Eval", task="ceval-valid", metric="acc,none", shots=5, paper=(57.2, 59.9, 77.2)),
        Benchmark(name="CMMLU", task="cmmlu", metric="acc,none", shots=5, paper=(58.2, 58.8, 78.2)),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one benchmark."""

    name: str
    task: str
    shots: int | None
    metric: str = ""
    value: float | None = None
    """In per cent."""
    stderr: float | None = None
    examples: int = 0
    every_metric: dict[str, Any] = field(default_factory=dict)
    """As the harness gave them, of the task and of its parts."""
    seconds: float = 0.0
    error: str = ""


def choose(suite: str) -> tuple[Benchmark, ...]:
    """A suite by name, or benchmarks and other tasks of the harness by theirs: ``gsm8k,cmath,arc_easy``.

    A task that a suite has is taken with its shots, those of fine-tuning first.

    Raises:
        ValueError: no task is named.
    """
    if suite in SUITES:
        return SUITES[suite]
    names = [name.strip() for name in suite.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--suite {suite!r}: name one of {', '.join(SUITES)}, or tasks of the harness")
    known = {b.task: b for group in (SUITES["pretrain"], SUITES["sft"]) for b in group}
    return tuple(known.get(name) or Benchmark(name=name, task=name, metric="") for name in names)


def pick(metrics: Mapping[str, Any], wanted: str) -> tuple[str, float | None, float | None]:
    """(name, value, standard error), the last two in per cent, of the wanted or else the first metric.

    Raises:
        ValueError: the harness no longer reports what was wanted.
    """
    numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and "," in k and "_stderr" not in k}
    if wanted and wanted not in numbers:
        raise ValueError(f"no metric {wanted!r} among {', '.join(numbers)}")
    name = wanted or next(iter(numbers), "")
    metric, _, kind = name.partition(",")
    error = metrics.get(f"{metric}_stderr,{kind}")
    value = numbers.get(name)
    return (
        name,
        None if value is None else 100 * value,
        100 * error if isinstance(error, (int, float)) else None,
    )


def markdown(suite: str, results: Sequence[Result], facts: Mapping[str, Any]) -> str:
    """The table beside the paper's numbers, and what it was made with."""
    columns = COLUMNS.get(suite, ())
    benchmarks = {b.name: b for b in choose(suite)}
    lines = [f"# {facts['model']}, {suite}", ""]
    if facts.get("limit"):
        lines += [f"**First {facts['limit']} examples of each task only: not comparable with the paper.**", ""]
    lines += ["| benchmark | task | shots | metric | this model | " + "".join(f"{c} | " for c in columns)]
    lines += ["|---|---|---|---|---|" + "---|" * len(columns)]
    for result in results:
        value = f"failed: {result.error}" if result.error else "no metric"
        if result.value is not None:
            value = f"{result.value:.1f}" + (f" ± {result.stderr:.1f}" if result.stderr is not None else "")
            value += f" (n={result.examples:,})"
        shots = "task's own" if result.shots is None else str(result.shots)
        cells = [
            result.name,
            f"`{result.task}`",
            shots,
            f"`{result.metric}`",
            value.replace("|", "/").replace("\n", " "),
        ]
        paper = benchmarks[result.name].paper if columns else ()
        lines.append("| " + " | ".join([*cells, *(f"{number:.1f}" for number in paper)]) + " |")
    lines += ["", "±: standard error over examples, of one run. The other columns are the paper's." if columns else ""]
    lines += [f"* {b.name}: {b.note}." for b in benchmarks.values() if b.note]
    lines += ["", *(f"* {key}: {value}" for key, value in facts.items())]
    return "\n".join(lines).rstrip() + "\n"
