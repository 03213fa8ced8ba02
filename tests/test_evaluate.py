"""Evaluation: what is asked of the harness, how its answers are read, and runs of it where it is installed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluate as script
import pytest
import yaml
from benchmarks import COLUMNS, SUITES, Result, choose, markdown, pick

from . import tiny, tiny_benchmarks

ROOT = Path(__file__).resolve().parent.parent
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm-eval is not installed: pip install ".[eval]"'
)


def options(*arguments):
    return script.make_parser().parse_args(["runs/x", *arguments])


def test_without_the_harness_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install .*eval"):
        script.main([str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_suites_have_the_papers_benchmarks_and_shots():
    shots = {suite: {b.name: b.shots for b in group} for suite, group in SUITES.items()}
    assert shots["sft"] == {"MMLU (0-shot CoT)": 0, "HumanEval": 0, "MBPP": 0, "GSM8K": 5}
    given = {"MMLU": 5, "MMLU-pro": 5, "BBH": 3, "TriviaQA": 5, "GSM8K": 4, "C-Eval": 5, "CMMLU": 5}
    ours = {"HumanEval": 0, "MBPP": 3, "MATH": 4, "CMath": 3}
    assert shots["pretrain"] == given | ours
    assert all(len(b.paper) == len(COLUMNS[suite]) for suite, group in SUITES.items() for b in group)


def test_a_chat_template_changes_the_code_tasks_alone():
    sft = {b.name: b for b in SUITES["sft"]}
    assert script.task_of(sft["HumanEval"], chat=True) == ("humaneval_instruct", "pass@1,create_test")
    assert script.task_of(sft["MBPP"], chat=True) == ("mbpp_instruct", "pass_at_1,extract_code")
    assert script.task_of(sft["MBPP"], chat=False) == ("mbpp", "pass_at_1,none")
    assert script.task_of(sft["GSM8K"], chat=True) == ("gsm8k", "exact_match,strict-match")


def test_tasks_by_name_keep_the_papers_shots_and_others_their_own():
    chosen = choose("gsm8k, cmath,arc_easy")
    assert [(b.name, b.task, b.shots) for b in chosen] == [
        ("GSM8K", "gsm8k", 5),
        ("CMath", "cmath", 3),
        ("arc_easy", "arc_easy", None),
    ]
    with pytest.raises(ValueError, match="name one of sft, pretrain"):
        choose(",")


def test_backends_get_the_model_and_what_the_user_adds():
    assert script.model_arguments(options("--device", "cpu")) == {"pretrained": "runs/x", "dtype": "float32"}
    more = options("--backend", "vllm", "--model_args", "tensor_parallel_size=8,dtype=bfloat16", "--trust_remote_code")
    assert script.model_arguments(more) == {
        **{"pretrained": "runs/x", "tensor_parallel_size": 8, "dtype": "bfloat16", "trust_remote_code": True}
    }
    for wrong in ("dtype", "pretrained=y"):
        with pytest.raises(ValueError, match="--model_args"):
            script.model_arguments(options("--model_args", wrong))


def test_the_wanted_metric_is_read_in_per_cent_and_a_missing_one_is_an_error():
    metrics = {"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.1, "f1,none": 0.5, "f1_stderr,none": "N/A"}
    assert pick(metrics, "acc,none") == ("acc,none", 25.0, 10.0)
    assert pick(metrics, "f1,none") == ("f1,none", 50.0, None)
    assert pick(metrics, "") == ("acc,none", 25.0, 10.0)
    with pytest.raises(ValueError, match=r"no metric 'em,none' among acc,none, f1,none"):
        pick(metrics, "em,none")


def test_a_failing_benchmark_is_a_result_and_a_row():
    def call(**_):
        raise RuntimeError("no | data")

    result = script.measure(SUITES["sft"][3], call, options())
    assert (result.value, result.error) == (None, "RuntimeError: no | data")
    rows = [line for line in markdown("sft", [result], {"model": "m", "limit": 3}).splitlines() if "GSM8K" in line]
    assert rows[0].split(" | ")[4:] == [
        "failed: RuntimeError: no / data",
        *("68.0", "62.1", "64.9", "64.6", "89.8", "85.8 |"),
    ]


def test_the_table_has_the_papers_numbers_and_says_when_it_is_no_comparison():
    result = Result(name="HumanEval", task="humaneval", shots=0, metric="pass@1,create_test", value=50.0, examples=164)
    text = markdown("pretrain", [result], {"model": "m", "limit": 2})
    assert "| HumanEval | `humaneval` | 0 | `pass@1,create_test` | 50.0 (n=164) | 29.3 | 37.2 | 48.1 |" in text
    assert "First 2 examples" in text
    assert "First" not in markdown("pretrain", [result], {"model": "m", "limit": None})


def test_every_table_row_has_as_many_cells_as_the_header():
    for suite, group in SUITES.items():
        results = [Result(name=b.name, task=b.task, shots=b.shots) for b in group]
        rows = [line for line in markdown(suite, results, {"model": "m"}).splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) == 1 and len(rows) == len(group) + 2


def index(tmp_path):
    """As of the harness: one task, one group."""
    (tmp_path / "gsm8k.yaml").write_text("task: gsm8k\n")
    return {
        "gsm8k": SimpleNamespace(yaml_path=tmp_path / "gsm8k.yaml", cfg={"task": "gsm8k"}),
        "mmlu": SimpleNamespace(yaml_path=tmp_path / "mmlu.yaml", cfg={"group": "mmlu", "task": ["a"]}),
    }


def test_local_data_becomes_a_task_file_that_includes_the_harness_own(tmp_path):
    data, out = tiny_benchmarks.write(tmp_path / "data", ["gsm8k"]), tmp_path / "out"
    out.mkdir()
    script.write_overrides(index(tmp_path), data, out)
    assert [file.name for file in out.iterdir()] == ["gsm8k.yaml"]
    files = {split: str(data / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}
    assert yaml.safe_load((out / "gsm8k.yaml").read_text()) == {
        "include": str(tmp_path / "gsm8k.yaml"),
        "task": "gsm8k",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }


@pytest.mark.parametrize("folder", ["gsm9k/test.jsonl", "mmlu/test.jsonl", "gsm8k/test.json", "README"])
def test_local_data_that_no_task_would_read_is_an_error(tmp_path, folder):
    file = tmp_path / "data" / folder
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(ValueError, match=r"data_dir|is not named like a task"):
        script.write_overrides(index(tmp_path), tmp_path / "data", tmp_path)


def test_cmath_asks_in_chinese_and_takes_the_last_number():
    from jinja2 import Template

    task = yaml.safe_load((ROOT / "recipes/evaluation/cmath.yaml").read_text())
    row = tiny_benchmarks.CMATH
    assert Template(task["doc_to_text"]).render(**row) == f"问题：{row['question']}\n答案："
    assert Template(task["doc_to_target"]).render(**row) == "5"
    (asked,) = [f["filter"][0] for f in task["filter_list"]]
    assert asked["group_select"] == -1
    for answer, number in {
        "2+3=5": "5",
        "共5个。": "5",
        "答案是1,250元": "1,250",
        "是3.50。": "3.50",
        "1/2": "1/2",
    }.items():
        assert re.findall(asked["regex_pattern"], answer)[-1] == number
    assert any(b.task == "cmath" and b.metric == "exact_match,last-number" for b in SUITES["pretrain"])


def harness(code_or_arguments, tmp_path):
    """A process of its own: the harness imports a library that is named like the script."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    command = [sys.executable, *code_or_arguments]
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


# A model that answers the first question of every task rightly and the others wrongly.
ORACLE = """
import importlib.util, sys
from lm_eval.api.model import LM
sys.path.insert(0, "SCRIPTS")
spec = importlib.util.spec_from_file_location("script", "SCRIPTS/evaluate.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
RIGHT = {"gsm8k": "so\\n#### 5", "mmlu_cot_llama_abstract_algebra": "The best answer is B.", "cmath": "2+3=5",
         "mmlu_pro_math": "It is 4. The answer is (B).", "bbh_cot_fewshot_boolean_expressions": "the answer is False.",
         "triviaqa": " no. 1", "minerva_math_algebra": "Final Answer: The final answer is $2$. I hope it is correct.",
         "humaneval": "    return 1\\n", "mbpp": "def one():\\n    return 1\\n"}

class Oracle(LM):
    def generate_until(self, requests):
        return [RIGHT[r.task_name] if r.doc_id == 0 else "    return 2  # 6" for r in requests]

    def loglikelihood(self, requests):
        return [(0.0 if (r.arguments[1] == " B") == (r.doc_id == 0) else -9.0, False) for r in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

import lm_eval.api.registry as registry
registry.get_model = lambda name: type("Made", (), {"create_from_arg_obj": staticmethod(lambda *_: Oracle())})
raise SystemExit(script.main(sys.argv[1:]))
"""


@needs_harness
def test_a_model_that_is_right_on_the_first_of_two_questions_scores_half_on_every_task(tmp_path):
    data = tiny_benchmarks.write(tmp_path / "data")
    tasks = "gsm8k,mmlu_cot_llama_abstract_algebra,mmlu_abstract_algebra,humaneval,mbpp,cmath,triviaqa,mmlu_pro_math"
    tasks += ",bbh_cot_fewshot_boolean_expressions,ceval-valid_law,cmmlu_anatomy"
    if importlib.util.find_spec("math_verify"):  # of lm-eval[math]
        tasks += ",minerva_math_algebra"
    code = ["-c", ORACLE.replace("SCRIPTS", str(ROOT / "scripts")), "m", "--suite", tasks, "--data_dir", str(data)]
    run = harness([*code, "--limit", "2", "--confirm_run_unsafe_code", "--out", str(tmp_path / "out")], tmp_path)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {r["task"]: (r["value"], r["examples"]) for r in results["results"]} == dict.fromkeys(
        tasks.split(","), (50.0, 2)
    )
    assert set(results["sandbox"].split(", ")) == {
        f"{what}: {'yes' if held else 'NO'}" for what, held in script.sandbox.protections().items()
    }


@needs_harness
def test_a_checkpoint_is_evaluated_with_its_chat_template_and_no_code_runs_unasked(tmp_path):
    tiny.qwen2(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    data = tiny_benchmarks.write(tmp_path / "data")
    arguments = [str(ROOT / "scripts/evaluate.py"), str(tmp_path / "model"), "--data_dir", str(data), "--chat_template"]
    arguments += ["--suite", "gsm8k,humaneval", "--device", "cpu", "--batch_size", "2", "--max_gen_toks", "4"]
    run = harness([*arguments, "--out", str(tmp_path / "out")], tmp_path)
    assert run.returncode == 1, "a benchmark failed"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    math, code = results["results"]
    assert (math["task"], math["value"], math["examples"], math["error"]) == ("gsm8k", 0.0, 3, "")
    assert code["task"] == "humaneval_instruct"
    assert "confirm_run_unsafe_code" in code["error"]
    assert "HumanEval" in (tmp_path / "out" / "results.md").read_text()


@needs_harness
def test_the_harness_has_every_task_and_metric_that_the_suites_name(tmp_path):
    program = """
import sys; sys.path.insert(0, "SCRIPTS")
from benchmarks import SUITES
sys.path.pop(0)
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
index = TaskManager(include_path="TASKS").task_index
for suite in SUITES.values():
    for b in suite:
        for task, wanted in ((b.task, b.metric), (b.chat_task or b.task, b.chat_metric or b.metric)):
            metric, kind = wanted.split(",")
            cfg = load_yaml(index[task].yaml_path, resolve_func=False)
            listed = cfg.get("aggregate_metric_list") or cfg["metric_list"]
            # pass@1 is of a function pass_at_k with k: [1], and pass_at_1 of utils.pass_at_1.
            names = [m["metric"].rpartition(".")[2].replace("pass_at_k", "pass@1") for m in listed]
            assert metric in names, (task, names)
            filters = [f["name"] for f in cfg.get("filter_list", [])] + [m.get("filter_list") for m in listed]
            assert kind in filters or kind == "none" and not any(filters), (task, filters)
"""
    program = program.replace("SCRIPTS", str(ROOT / "scripts")).replace('TASKS"', f'{ROOT / "recipes/evaluation"}"')
    run = harness(["-c", program], tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
