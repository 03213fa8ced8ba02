"""The pages beside the recipes: their commands are parsed by what would run them, their numbers are the planner's."""

import json
import os
import re
import shlex
import shutil
import subprocess

import pytest

from .test_recipes import ROOT, data, launch  # noqa: F401  # data is a fixture

PAGES = sorted(ROOT.glob("recipes/*/README.md"))
BLOCK = re.compile(r"```bash\n(.*?)```", re.S)
SLURM = ROOT / "recipes" / "slurm" / "sft.slurm"


def commands():
    return [
        (page.parent.name, line)
        for page in PAGES
        for block in BLOCK.findall(page.read_text())
        for line in block.splitlines()
    ]


def parse_training(words):
    """As ``accelerate launch`` and the script would: an unknown option or a missing file is an error."""
    import pretrain
    import sft
    from accelerate.commands.launch import launch_command_parser

    launched = launch_command_parser().parse_args(words)
    script = {"scripts/sft.py": sft, "scripts/pretrain.py": pretrain}[launched.training_script]
    assert (ROOT / launched.config_file).is_file()
    rest = launched.training_script_args
    rest[rest.index("--config") + 1] = str(ROOT / rest[rest.index("--config") + 1])
    parsed = script.make_parser().parse_args_and_config([*rest, "--use_cpu", "true", "--bf16", "false"])
    return launched, next(part for part in parsed if hasattr(part, "learning_rate"))


def test_every_recipe_folder_has_its_page():
    assert {page.parent.name for page in PAGES} == {path.parents[1].name for path in ROOT.glob("recipes/*/sft/*.yaml")}


@pytest.mark.parametrize(("page", "line"), commands())
def test_command_is_parsed_by_what_would_run_it(page, line):
    import evaluate
    import generate

    words = shlex.split(line)
    if words[:2] == ["accelerate", "launch"]:
        parse_training(words[2:])
    elif words[0] == "sbatch":
        assert (ROOT / words[2]).is_file() and (ROOT / words[3]).is_file()
        assert (ROOT / f"recipes/accelerate_configs/{words[4]}.yaml").is_file()
    else:
        scripts = {"scripts/generate.py": generate, "scripts/evaluate.py": evaluate}
        assert words[0] == "python" and (ROOT / words[1]).is_file()
        if words[1] in scripts:
            scripts[words[1]].make_parser().parse_args(words[2:])


def test_launches_on_several_machines_keep_the_global_batch():
    seen = []
    for page, line in commands():
        if "--num_machines" not in line:
            continue
        words = shlex.split(line)
        launched, training = parse_training(words[2:])
        config = words[words.index("--config") + 1]
        alone = ["--config_file", "recipes/accelerate_configs/zero1.yaml", "scripts/sft.py", "--config", config]
        _, single = parse_training(alone)
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
        assert (
            launched.num_processes * batch
            == 8 * single.per_device_train_batch_size * single.gradient_accumulation_steps
        )
        seen.append((page, launched.machine_rank))
    assert sorted(seen) == [(page, rank) for page in ("moonlight-16b-a3b", "qwen2.5-7b") for rank in (0, 1)]


@pytest.mark.parametrize("model", ["qwen2.5-7b", "moonlight-16b-a3b"])
def test_memory_table_is_the_planners(model, capsys):
    from hf_muon.__main__ import main

    config = ROOT / "recipes" / model / "config.json"
    engines = ("zero1", "zero3", "fsdp2")
    named = [word for engine in engines for word in ("--engine", engine)]
    assert main(["plan", "--config", str(config), *named, "--dp", "8", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    parameters = plans[0]["adamw_state_bytes"]  # 8 bytes an element on 8 ranks
    rows = re.findall(r"^\| (ZeRO-1|ZeRO-3|FSDP2) \| (.*) \|$", (config.parent / "README.md").read_text(), re.M)
    for (engine, cells), plan in zip(rows, plans, strict=True):
        told = [0.0 if cell == "-" else float(cell) for cell in cells.split(" | ")]
        split = 1 if engine == "ZeRO-1" else 8
        size = 4 if engine == "FSDP2" else 2
        whole = size * parameters / split
        parts = [whole, whole, 0 if engine == "FSDP2" else 4 * parameters / 8]
        parts += [plan["state_bytes"], plan["adamw_state_bytes"], plan["transient_bytes"]]
        parts = [part / 2**30 for part in parts]
        parts.append(sum(parts) - parts[4])
        assert told[:7] == pytest.approx(parts, abs=0.051), engine
        assert told[7] == pytest.approx(plan["ratio"], abs=5e-5), engine


def test_slurm_starts_every_machine_with_its_rank_and_passes_options_on(tmp_path):
    stubs = {
        "srun": 'shift\nfor rank in 0 1; do SLURM_NODEID=$rank "$@"; done',
        "scontrol": "printf 'first\\nsecond\\n'",
        "accelerate": "printf '%s\\n' \"$@\" END",
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "123456"}
    environment["SLURM_JOB_NODELIST"] = "node[1-2]"
    recipe = "recipes/qwen2.5-7b/sft/config_muon.yaml"
    run = subprocess.run(
        [shutil.which("bash"), str(SLURM), recipe, "zero1", "--gradient_accumulation_steps", "1", "--run_name", "a b"],
        **dict(cwd=ROOT, env=environment, capture_output=True, text=True, check=True),
    )
    launches = [part.split("\n") for part in run.stdout.removesuffix("END\n").split("END\n")]
    assert len(launches) == 2
    for rank, words in enumerate(launches):
        assert words.pop() == ""
        launched, training = parse_training(words[1:])
        assert (launched.machine_rank, launched.num_machines, launched.num_processes) == (rank, 2, 16)
        assert (launched.main_process_ip, launched.main_process_port) == ("first", 20000 + 123456 % 20000)
        assert (training.gradient_accumulation_steps, training.run_name) == (1, "a b")
    usage = subprocess.run([shutil.which("bash"), str(SLURM)], env=environment, capture_output=True, check=False)
    assert usage.returncode == 2


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_lora_recipe_trains_adapters_that_generation_reads(optimizer, data, tmp_path, capsys):  # noqa: F811
    import generate

    options = ["--max_steps", "3", "--eval_steps", "3", "--save_steps", "3"]
    _, state = launch(f"offline/sft/config_{optimizer}_lora.yaml", data, tmp_path, *options)
    losses = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    assert losses[3] < losses[0]
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()
    arguments = [str(tmp_path), "--chat", "What does json.loads do?", "--max_new_tokens", "4", "--device_map", "cpu"]
    options = generate.make_parser().parse_args(arguments)
    model, tokenizer = generate.load(options)
    assert any("lora_B" in name and weight.abs().sum() > 0 for name, weight in model.named_parameters())
    assert tokenizer.eos_token_id in generate.stops(model, tokenizer, chat=True)
    generate.generate(model, tokenizer, options)
