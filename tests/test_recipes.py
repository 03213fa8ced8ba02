"""Every recipe is parsed by its own script, strictly; the offline ones are run for a few steps as a user runs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(ROOT.glob("recipes/*/*/config_*.yaml"))
ACCELERATE = sorted(ROOT.glob("recipes/accelerate_configs/*.yaml"))
SECTIONS = ("# Model arguments", "# Data training arguments")
OFFLINE = ["pretrain/config_muon.yaml", "pretrain/config_adamw.yaml", "sft/config_muon.yaml", "sft/config_adamw.yaml"]


def name(path):
    return str(path.relative_to(ROOT / "recipes"))


def parse(path, *overrides):
    import pretrain
    import sft

    script = {"sft": sft, "pretrain": pretrain, "pretrain-continue": pretrain}[path.parent.name]
    # Parsing builds the training arguments, which look for a GPU that the test machine may lack.
    return script.make_parser().parse_args_and_config(
        ["--config", str(path), "--use_cpu", "true", "--bf16", "false", *overrides]
    )


def test_there_are_recipes():
    assert {name(path) for path in RECIPES} >= {f"offline/{path}" for path in OFFLINE}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_is_parsed_by_its_script_without_unknown_keys(path):
    parsed = parse(path)
    training = next(part for part in parsed if hasattr(part, "learning_rate"))
    assert training.optim.value == ("muon" if path.stem.startswith("config_muon") else "adamw_torch")
    # YAML 1.1 reads 2e-5 without a dot as a string, which would surface only in the optimizer.
    for key in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm"):
        assert isinstance(getattr(training, key), (int, float)), key


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_names_hardware_and_global_batch_first_and_has_the_sections(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert "global batch" in lines[0]
    assert all(section in lines for section in SECTIONS)
    assert any(line.endswith(" trainer config") and line.startswith("# ") for line in lines)


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("config_muon")], ids=name)
def test_muon_and_adamw_recipes_differ_in_the_optimizer_alone(path):
    muon = yaml.safe_load(path.read_text())
    adamw = yaml.safe_load(path.with_name(path.name.replace("muon", "adamw")).read_text())
    different = {key for key in muon.keys() | adamw.keys() if muon.get(key) != adamw.get(key)}
    # A state is carried over from a run of the same optimizer.
    different -= {"continue_from"} if path.parent.name == "pretrain-continue" else set()
    assert different == {"optim", "optim_args", "output_dir"}


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem.startswith("config_muon")], ids=name)
def test_muon_recipe_options_are_options_of_the_package(path):
    import hf_muon

    hf_muon.MuonConfig.from_optim_args(yaml.safe_load(path.read_text())["optim_args"])


def test_an_unknown_key_is_an_error(tmp_path):
    recipe = tmp_path / "sft" / "config_muon.yaml"
    recipe.parent.mkdir()
    recipe.write_text("max_seq_length: 8\noutput_dir: x\n")
    with pytest.raises(ValueError, match="max_seq_length"):
        parse(recipe)


def test_moonlight_template_marks_assistant_turns_and_refuses_unknown_roles():
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (ROOT / "recipes/moonlight-16b-a3b/chat_template.jinja").read_text()
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    rendered, spans = render_jinja_template([talk], chat_template=template, return_assistant_tokens_mask=True)
    question, answer = (
        "<|im_user|>user<|im_middle|>Who?<|im_end|>",
        "<|im_assistant|>assistant<|im_middle|>Me.<|im_end|>",
    )
    assert rendered[0] == question + answer
    assert [rendered[0][start:end] for start, end in spans[0]] == ["Me.<|im_end|>"]
    prompt, _ = render_jinja_template([talk[:1]], chat_template=template, add_generation_prompt=True)
    assert prompt[0].endswith("<|im_assistant|>assistant<|im_middle|>")
    with pytest.raises(TemplateError, match="unknown role"):
        render_jinja_template([[{"role": "tool", "content": "x"}]], chat_template=template)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_accelerate_config_has_only_keys_that_accelerate_knows(path):
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    config = ClusterConfig.from_yaml_file(str(path))
    options = vars(launch_command_parser().parse_args(["script.py"]))
    for key in config.deepspeed_config:
        assert key in options, key
    for key in config.fsdp_config:
        assert key in options, key


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The offline data of a few modules: building and tokenizing all of it would take longer than a few steps."""
    import offline_data

    files = offline_data.source_files()
    few = [file for file in files if not file.held_out][:40] + [file for file in files if file.held_out][:4]
    out = tmp_path_factory.mktemp("data") / "offline"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline_data, "source_files", lambda: few)
        offline_data.build(out)
    return out


def launch(recipe, data, out, *options, processes=1):
    """``accelerate launch`` of a recipe's script; the output, and the log history it left."""
    recipe = ROOT / "recipes" / recipe
    script = recipe.parent.name.partition("-")[0]
    config = yaml.safe_load(recipe.read_text())
    moved = [key for key in config if str(config[key]).startswith("data/offline")]
    paths = [part for key in moved for part in (f"--{key}", str(data / Path(config[key]).relative_to("data/offline")))]
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "recipes/accelerate_configs/cpu.yaml"), "--num_processes", str(processes)]
    command += [str(ROOT / "scripts" / f"{script}.py"), "--config", str(recipe), *paths, "--output_dir", str(out)]
    command += ["--per_device_train_batch_size", "2", "--logging_steps", "1", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)])
    environment["HF_DATASETS_CACHE"] = str(data.parent / "cache")
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    state = json.loads((out / "trainer_state.json").read_text())
    return run.stdout + run.stderr, state


@pytest.mark.parametrize("recipe", OFFLINE)
def test_offline_recipe_trains_and_reports_held_out_loss_before_and_after(recipe, data, tmp_path):
    options = ["--max_steps", "3", "--eval_steps", "3", "--save_steps", "3"]
    if recipe.startswith("pretrain"):
        options += ["--block_size", "64"]
    output, state = launch(f"offline/{recipe}", data, tmp_path, *options)
    losses = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert sorted(losses) == [0, 3]
    assert results["eval_loss"] == losses[3] < losses[0] == results["eval_loss_before"]
    assert f"held-out loss: {losses[0]:.4f} before training, {losses[3]:.4f} after 3 steps" in output
    assert (tmp_path / "model.safetensors").is_file()
    if recipe.endswith("muon.yaml"):
        assert "Muon 42.8%" in output, "the routing summary"
        sizes = [row["muon/update_rms"] for row in state["log_history"] if "muon/update_rms" in row]
        assert len(sizes) == 3
        assert all(0.1 < size < 0.3 for size in sizes)


def test_a_killed_run_resumes_and_ends_where_an_uninterrupted_one_does(data, tmp_path):
    recipe, whole, killed = "offline/pretrain/config_muon.yaml", tmp_path / "whole", tmp_path / "killed"
    options = ["--max_steps", "4", "--block_size", "64", "--eval_steps", "2", "--save_steps", "2"]
    _, expected = launch(recipe, data, whole, *options, "--save_total_limit", "2")
    # What a kill while checkpoint-4 was written leaves behind.
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(whole / checkpoint, killed / checkpoint)
    (killed / "checkpoint-4" / "trainer_state.json").unlink()
    output, resumed = launch(recipe, data, killed, *options, "--save_total_limit", "2")
    assert f"resuming from {killed / 'checkpoint-2'}" in output
    assert (killed / "_incomplete-checkpoint-4").is_dir()
    keys = ("step", "loss", "eval_loss", "grad_norm", "muon/update_rms")
    histories = [
        [[row.get(key) for key in keys] for row in state["log_history"] if "train_runtime" not in row]
        for state in (expected, resumed)
    ]
    assert histories[0] == histories[1]
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("path", [p for p in RECIPES if "lr_stages:" in p.read_text()], ids=name)
def test_recipe_in_tokens_has_a_schedule_whose_peak_is_its_learning_rate(path):
    from continuation import make_run

    arguments, tokens, args = parse(path)
    run = make_run(tokens, args, arguments.block_size)
    assert run.schedule.peak == args.learning_rate
    assert args.weight_decay == 0.1 and tokens.decay_everything
    if "moonlight" in str(path):
        from hf_muon.moonlight import schedules

        assert (tuple(tokens.lr_stages), tuple(tokens.batch_ramp)) == (
            schedules.MOONLIGHT_STAGES,
            schedules.MOONLIGHT_RAMP,
        )
        assert (run.start_step, run.steps) == (160_933, 14_901)


def test_offline_continuation_takes_a_run_on_with_its_optimizer_state(data, tmp_path):
    options = ["--block_size", "64", "--max_steps", "2", "--eval_steps", "2", "--save_steps", "2"]
    _, before = launch(
        "offline/pretrain/config_muon.yaml", data, tmp_path / "first", *options, "--max_test_blocks", "8"
    )
    recipe, checkpoint = "offline/pretrain-continue/config_muon.yaml", str(tmp_path / "first" / "checkpoint-2")
    options += ["--continue_from", checkpoint, "--max_test_blocks", "8"]
    output, after = launch(recipe, data, tmp_path / "next", *options)
    assert "a stream of blocks of 64 tokens, schedule from" in output
    rates = [row["learning_rate"] for row in after["log_history"] if "learning_rate" in row]
    assert rates[0] == 0 < rates[1] < 4e-4, "re-warming towards the end of the cosine"
    first, second = (
        {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
        for state in (before, after)
    )
    assert sorted(second) == [0, 2]
    assert second[0] < first[0], "from the weights that the first run left"


def test_fine_tuning_starts_from_a_subfolder(data, tmp_path):
    # The last of two values of an option counts.
    options = ["--model_name_or_path", str(data), "--model_subfolder", "model", "--max_steps", "1", "--eval_steps", "1"]
    launch("offline/sft/config_adamw.yaml", data, tmp_path, *options, "--learning_rate", "0.0")
    start, end = (load_file(folder / "model.safetensors") for folder in (data / "model", tmp_path))
    assert start.keys() == end.keys()
    assert all((start[key] == end[key]).all() for key in start)


def test_a_finished_run_is_not_trained_again(data, tmp_path):
    options = ["--max_steps", "2", "--eval_steps", "2", "--save_steps", "2"]
    launch("offline/sft/config_adamw.yaml", data, tmp_path, *options)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "trainer_state.json").unlink()
    output, state = launch("offline/sft/config_adamw.yaml", data, tmp_path, *options)
    assert "is trained to its end" in output
    assert state["global_step"] == 2
    assert (tmp_path / "model.safetensors").is_file(), "taken from the last checkpoint"


def test_plot_draws_losses_and_update_rms(tmp_path):
    import plot

    for optimizer in ("muon", "adamw"):
        history = [{"step": 0, "eval_loss": 8.0}]
        for step in (1, 2, 3):
            row = {"step": step, "loss": 8.0 - step}
            if optimizer == "muon":
                row |= {"muon/update_rms": 0.2, "muon/update_rms/mlp": 0.19, "muon/update_rms/attention": 0.21}
            history += [row, {"step": step, "eval_loss": 8.0 - step}]
        run = tmp_path / f"sft-{optimizer}"
        run.mkdir()
        (run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    histories = {plot.default_label(run): plot.read_history(run) for run in sorted(tmp_path.glob("sft-*"))}
    assert sorted(histories) == ["AdamW", "Muon"]
    assert plot.series(histories["Muon"], "muon/update_rms") == ([1, 2, 3], [0.2, 0.2, 0.2])
    assert plot.series(histories["AdamW"], "muon/update_rms") == ([], [])
    plot.draw(histories, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    with pytest.raises(FileNotFoundError, match="output_dir"):
        plot.read_history(tmp_path / "nothing")


def test_comparison_pairs_runs_by_seed(tmp_path):
    import compare_report

    finals = {("adamw", 0.1): (3.0, 3.2), ("adamw", 0.2): (3.1, 3.3), ("muon", 0.1): (2.5, 2.8)}
    results = [
        {
            **{"optimizer": optimizer, "learning_rate": rate, "steps": 2, "seed": seed, "tokens": 2_000_000},
            **{"eval_loss": loss, "seconds": 4.0, "eval_curve": [[0, 8.0], [2, loss]], "train_curve": []},
        }
        for (optimizer, rate), losses in finals.items()
        for seed, loss in enumerate(losses)
    ]
    provenance = {"command": "c", "commit": "x", "versions": {"torch": "2"}, "python": "3", "machine": "m"}
    text = compare_report.write_report(tmp_path, results, provenance)
    assert "| AdamW, 2.00M tokens | 3.100 ± 0.141 (n=2) | 3.200 ± 0.141 (n=2) |" in text
    assert "AdamW at its best lr 0.1" in text
    assert "| Muon, 2.00M tokens, lr 0.1 | -0.450 ± 0.071 (n=2) | -0.500, -0.400 | -0.450 ± 0.071 (n=2) |" in text
    assert json.loads((tmp_path / "results.json").read_text())["best_adamw_learning_rate"] == 0.1
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_comparison_runs_what_is_missing_only(tmp_path, capsys, monkeypatch):
    import compare

    monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(tmp_path), "--dry_run", "--seeds", "1", "2"])
    assert compare.main() == 0
    assert capsys.readouterr().out.count("pretrain.py --config") == 2 * 3 * 3
    done = tmp_path / "cells" / "muon_lr0.004_steps830_seed2"
    done.mkdir(parents=True)
    (done / "result.json").write_text(json.dumps({"seconds": 83.0, "steps": 830}))
    assert compare.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("pretrain.py --config") == 17
    assert str(done) not in printed
    assert "0.10 s a step (measured here)" in printed
