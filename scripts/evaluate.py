"""The paper's benchmarks with lm-evaluation-harness: ``python scripts/evaluate.py runs/x --suite sft --chat_template``.

Suites: ``sft`` (the paper's Tables 6 and 7) and ``pretrain`` (Tables 4 and 5), or tasks of the harness by name. Writes
``results.json`` and ``results.md``, beside the paper's numbers, after every benchmark; one that fails costs no other.

Offline: ``--data_dir DIR`` reads ``DIR/TASK/SPLIT.jsonl`` for every task that has such a folder (parts of a group by
their own names: ``DIR/mmlu_anatomy/test.jsonl``), with the columns of the task's own data set, and downloads nothing:
what is not there must be in the cache. HumanEval and MBPP run what the model wrote: they need
``--confirm_run_unsafe_code``, and run it in scripts/sandbox.py, which says what that does not protect against.

Needs ``pip install ".[eval]"``; one process, on several GPUs with ``--model_args parallelize=true`` or with vLLM's
``--model_args tensor_parallel_size=8``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import sandbox
import yaml
from benchmarks import SUITES, Benchmark, Result, choose, markdown, pick

TASKS = Path(__file__).resolve().parent.parent / "recipes" / "evaluation"


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; 1 if a benchmark failed."""
    options = make_parser().parse_args(argv)
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit('evaluate: lm-evaluation-harness is not installed: pip install ".[eval]"')
    benchmarks = choose(options.suite)
    if options.data_dir:  # before anything of HuggingFace is imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as overrides:
        model, tasks = prepare(options, Path(overrides))
        facts = provenance(options)
        results: list[Result] = []
        for number, benchmark in enumerate(benchmarks, start=1):
            print(f"[{number}/{len(benchmarks)}] {benchmark.name}", flush=True)
            results.append(measure(benchmark, lambda **call: evaluate(model, tasks, options, call), options))
            write(options.out, options.suite, results, facts)
    print(markdown(options.suite, results, facts))
    return int(any(result.error for result in results))


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that a recipe wrote, or a hub name")
    parser.add_argument("--suite", default="sft", help=f"{', '.join(SUITES)}, or TASK,TASK,... (default: %(default)s)")
    parser.add_argument("--backend", choices=["hf", "vllm"], default="hf")
    parser.add_argument("--model_args", default="", help="KEY=VALUE,... for the backend: dtype=bfloat16, revision=main")
    parser.add_argument("--trust_remote_code", action="store_true", help="let a hub repository run its own code")
    parser.add_argument("--chat_template", action="store_true", help="ask in the tokenizer's chat template: after SFT")
    parser.add_argument("--batch_size", default="auto", help="a number, or auto (default)")
    parser.add_argument("--device", help="cpu, cuda:0, ...; default: the backend's choice")
    parser.add_argument("--limit", type=int, help="only the first examples of each task: for a try, not for results")
    parser.add_argument("--data_dir", type=Path, help="offline data: DIR/TASK/SPLIT.jsonl")
    parser.add_argument("--max_gen_toks", type=int, help="of an answer; default: the task's")
    parser.add_argument("--confirm_run_unsafe_code", action="store_true", help="run programs that the model wrote")
    parser.add_argument("--out", type=Path, default=Path("results/evaluation"), help="default: %(default)s")
    return parser


def model_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What the backend is built with.

    Raises:
        ValueError: ``--model_args`` is no list of KEY=VALUE, or names the model again.
    """
    arguments: dict[str, Any] = {"pretrained": options.model}
    if options.backend == "hf" and options.device == "cpu":
        arguments["dtype"] = "float32"
    for pair in filter(None, options.model_args.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or key == "pretrained":
            raise ValueError(f"--model_args: {pair!r} is not KEY=VALUE, or gives the model twice")
        arguments[key] = yaml.safe_load(value)
    if options.trust_remote_code:
        arguments["trust_remote_code"] = True
    return arguments


def task_of(benchmark: Benchmark, *, chat: bool) -> tuple[str, str]:
    """(task, metric) with or without a chat template."""
    if not chat:
        return benchmark.task, benchmark.metric
    return benchmark.chat_task or benchmark.task, benchmark.chat_metric or benchmark.metric


def prepare(options: argparse.Namespace, overrides: Path) -> tuple[Any, Any]:
    """The model and the harness's tasks, with ours and with local data."""
    # This file has a library's name, which must be found instead of it.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    import evaluate as metrics
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    # Its code_eval would be downloaded, and run programs with all rights of this process.
    load = metrics.load
    metrics.load = lambda name, *more, **named: (
        sandbox.CodeEval() if name == "code_eval" else load(name, *more, **named)
    )
    paths = [TASKS]
    if options.data_dir:
        write_overrides(TaskManager(include_path=[TASKS]).task_index, options.data_dir, overrides)
        paths.append(overrides)
    tasks = TaskManager(include_path=paths)
    more = {"batch_size": options.batch_size, "device": options.device}
    return get_model(options.backend).create_from_arg_obj(model_arguments(options), more), tasks


def write_overrides(index: Mapping[str, Any], data_dir: Path, out: Path) -> None:
    """For every folder of ``data_dir`` a task file in ``out`` that reads its JSON lines and is otherwise the same.

    Raises:
        ValueError: there is no folder, one is not named like a task, or one has no splits.
    """
    folders = sorted(path for path in data_dir.glob("*") if path.is_dir())
    if not folders:
        raise ValueError(f"--data_dir {data_dir} has no folders: expected {data_dir}/TASK/SPLIT.jsonl")
    for folder in folders:
        splits = {file.stem: str(file.resolve()) for file in sorted(folder.glob("*.jsonl"))}
        entry = index.get(folder.name)
        if entry is None or entry.yaml_path is None or "group" in entry.cfg or not splits:
            raise ValueError(f"{folder} is not named like a task of the harness, or has no SPLIT.jsonl")
        task = {"include": str(entry.yaml_path), "task": folder.name, "dataset_path": "json", "dataset_name": None}
        task["dataset_kwargs"] = {"data_files": splits}
        (out / f"{folder.name}.yaml").write_text(yaml.safe_dump(task))


def evaluate(model: Any, tasks: Any, options: argparse.Namespace, call: dict[str, Any]) -> dict[str, Any]:
    """One call of the harness."""
    import lm_eval

    return lm_eval.simple_evaluate(
        model,
        task_manager=tasks,
        batch_size=options.batch_size,
        limit=options.limit,
        apply_chat_template=options.chat_template,
        gen_kwargs={"max_gen_toks": options.max_gen_toks} if options.max_gen_toks else None,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        log_samples=False,
        **call,
    )


def measure(benchmark: Benchmark, call: Callable[..., dict[str, Any]], options: argparse.Namespace) -> Result:
    """One benchmark; whatever goes wrong in it becomes its result."""
    task, metric = task_of(benchmark, chat=options.chat_template)
    named = {"name": benchmark.name, "task": task, "shots": benchmark.shots}
    start = time.perf_counter()
    try:
        got = call(tasks=[task], num_fewshot=benchmark.shots)
        metrics = got.get("groups", {}).get(task) or got["results"][task]
        metric, value, stderr = pick(metrics, metric)
    except Exception as error:
        print(f"{benchmark.name} failed: {error!r}", file=sys.stderr, flush=True)
        return Result(**named, metric=metric, error=f"{type(error).__name__}: {error}"[:300])
    return Result(
        **named,
        metric=metric,
        value=value,
        stderr=stderr,
        examples=sum(counts["effective"] for counts in got.get("n-samples", {}).values()),
        every_metric=got["results"],
        seconds=round(time.perf_counter() - start, 1),
    )


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were made with."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("lm_eval", "transformers", "torch"))
    facts = {"model": options.model, "backend": options.backend, "chat template": options.chat_template}
    facts |= {"limit": options.limit, "data": str(options.data_dir or "hub"), "versions": versions}
    if options.confirm_run_unsafe_code:
        facts["sandbox"] = ", ".join(
            f"{what}: {'yes' if held else 'NO'}" for what, held in sandbox.protections().items()
        )
    return facts


def write(out: Path, suite: str, results: Sequence[Result], facts: Mapping[str, Any]) -> None:
    """``results.json`` and ``results.md``."""
    body = {"suite": suite, **facts, "results": [asdict(result) for result in results]}
    (out / "results.json").write_text(json.dumps(body, indent=1, default=str) + "\n")
    (out / "results.md").write_text(markdown(suite, results, facts))


if __name__ == "__main__":
    raise SystemExit(main())
