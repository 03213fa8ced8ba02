"""The paper's experiments in miniature: what would run, what is chosen, what is skipped, what the reports say."""

import json
import math
import shlex
import sys
from pathlib import Path

import paper
import paper_report
import pytest

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(ROOT.glob("recipes/paper/*.yaml"))
PROVENANCE = {"command": "c", "commit": "x", "versions": {"torch": "2"}, "python": "3", "machine": "m"}


def small(*models, **changes):
    base = {
        "report": "arms",
        "seeds": [1, 2],
        "reference": "muon",
        "models": {
            name: paper.Model(config_overrides="", tokens=25600, learning_rates=[0.1, 0.2, 0.3], batches=[2])
            for name in models or ("m",)
        },
        "arms": {"adamw": paper.Arm(recipe="a.yaml"), "muon": paper.Arm(recipe="m.yaml", like="adamw")},
    }
    return paper.Experiment(**base | changes)


@pytest.fixture
def faked(monkeypatch):
    """Training ends at once: a table of losses by (arm, rate, seed) answers, an exception is raised."""
    table, started = {}, []

    def train(line):
        words = dict(zip(line[::2], line[1::2], strict=True))
        arm = {"a.yaml": "adamw", "m.yaml": "muon"}[words["--config"]]
        key = arm, float(words["--learning_rate"]), int(words["--seed"])
        started.append(key)
        loss, steps = table.get(key, 5.0), int(words["--max_steps"])
        if isinstance(loss, Exception):
            raise loss
        sizes = [{"step": s, "query": 0.1, "mlp": 0.2, "all": 0.1 + s / 100, "largest": 1.0} for s in (0, steps)]
        base = {"parameters": 1000, "tokens": 25600, "steps": steps, "scheduled_steps": steps}
        return base | {"eval_loss": loss, "train_loss": loss - 1, "curve": [[0, 9.0], [steps, loss]], "sizes": sizes}

    monkeypatch.setattr(paper, "train", train)
    return table, started


def finish(experiment, out):
    results = paper.finished(experiment, out)
    paper.run_all(experiment, out, results)
    return results


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_command_of_a_recipe_is_parsed_by_the_script_without_unknown_keys(path, monkeypatch, tmp_path):
    import pretrain

    import hf_muon

    monkeypatch.chdir(ROOT)
    experiment = paper.read_experiment(path)
    rate = {cell.arm: cell for cell in paper.cells(experiment, {})}
    assert {arm for arm, options in experiment.arms.items() if not options.like} == rate.keys()
    for name, model in experiment.models.items():
        for arm in experiment.arms:
            line = paper.command(experiment, paper.Cell(name, arm, *model.grid()[0], 1), tmp_path)
            arguments, _, training = pretrain.make_parser().parse_args_and_config(line)
            assert arguments.block_size == paper.BLOCK
            assert training.max_steps * training.per_device_train_batch_size * paper.BLOCK == pytest.approx(
                model.tokens, rel=0.01
            )
            if training.optim == "muon":
                hf_muon.MuonConfig.from_optim_args(training.optim_args)


@pytest.mark.parametrize("model", [*paper.read_experiment(ROOT / "recipes/paper/scaling.yaml").models.values()])
def test_a_model_of_the_scaling_law_has_20_tokens_per_parameter_besides_embeddings(model, monkeypatch):
    import pretrain
    from weights import WeightSizes

    monkeypatch.chdir(ROOT)
    options = pretrain.PretrainArguments(
        dataset_name="x", config_name="recipes/paper/model", config_overrides=model.config_overrides
    )
    network = pretrain.build_model(options, 0)
    sizes = WeightSizes(network)
    inner = sum(p.numel() for name, p in network.named_parameters() if "embed" not in name and "lm_head" not in name)
    assert sizes.parameters == inner
    assert model.tokens / inner == pytest.approx(20, abs=0.3)


def test_weight_sizes_are_the_rms_by_hand():
    import pretrain
    import torch
    from weights import WeightSizes

    options = pretrain.PretrainArguments(dataset_name="x", config_name=str(ROOT / "recipes/paper/model"))
    network = pretrain.build_model(options, 0)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.fill_(3.0 if "q_proj" in name else -4.0 if "mlp" in name else 0.0 if p.ndim == 2 else 99.0)
    sizes = WeightSizes(network)
    sizes.on_evaluate(None, type("State", (), {"global_step": 7}), None)
    h, i = 64, 172
    everything = math.sqrt((9 * h * h + 16 * 3 * h * i) / (4 * h * h + 3 * h * i))
    assert sizes.rows == [
        {"step": 7, "query": 3.0, "mlp": 4.0, "all": pytest.approx(everything, rel=1e-6), "largest": 4.0}
    ]


def test_first_seed_searches_two_best_meet_every_seed_and_muon_takes_over_the_better_mean(faked, tmp_path):
    table, started = faked
    # 0.2 is best with the first seed alone; over both, 0.1 is.
    table |= {("adamw", 0.1, 1): 3.1, ("adamw", 0.2, 1): 3.0, ("adamw", 0.3, 1): 4.0}
    table |= {("adamw", 0.1, 2): 3.1, ("adamw", 0.2, 2): 3.6}
    results = finish(small(), tmp_path)
    assert started[:3] == [("adamw", rate, 1) for rate in (0.1, 0.2, 0.3)]
    assert sorted(started[3:5]) == [("adamw", 0.1, 2), ("adamw", 0.2, 2)]
    assert started[5:] == [("muon", 0.1, 1), ("muon", 0.1, 2)]
    assert paper.best_points(small(), results) == {"m/adamw": (0.1, 2), "m/muon": (0.1, 2)}


def test_finished_cells_are_skipped_and_what_was_running_starts_anew(faked, tmp_path):
    _, started = faked
    finish(small(), tmp_path)
    count, cell = len(started), tmp_path / "m/muon_lr0.1_batch2_seed2"
    finish(small(), tmp_path)
    assert len(started) == count
    (cell / "result.json").rename(cell / "result.json.partial")
    finish(small(), tmp_path)
    assert started[count:] == [("muon", 0.1, 2)]


def test_a_changed_recipe_does_not_reuse_results(faked, tmp_path):
    finish(small(), tmp_path)
    with pytest.raises(SystemExit, match="the recipe has changed"):
        paper.finished(small(options={"weight_decay": 0.0}), tmp_path)


def test_a_failed_point_is_logged_and_never_chosen(faked, tmp_path):
    table, _ = faked
    table |= {("adamw", 0.1, 1): RuntimeError("out of memory"), ("adamw", 0.2, 1): float("nan")}
    results = finish(small(), tmp_path)
    assert results["m/adamw_lr0.1_batch2_seed1"] is None
    assert "out of memory" in (tmp_path / "m/adamw_lr0.1_batch2_seed1/log.txt").read_text()
    assert paper.best_points(small(), results)["m/muon"] == (0.3, 2)


def test_an_unknown_report_reference_or_source_of_a_rate_is_an_error():
    for change in ({"report": "x"}, {"reference": "x"}, {"arms": {"m": paper.Arm(recipe="m.yaml", like="x")}}):
        with pytest.raises(ValueError, match="must be one of|needs seeds"):
            small(**{"reference": "", **change})


def test_report_of_arms_has_the_hand_computed_figures_beside_the_papers(faked, tmp_path):
    table, _ = faked
    table |= {("adamw", 0.1, 1): 3.0, ("adamw", 0.1, 2): 3.2, ("muon", 0.1, 1): 2.5, ("muon", 0.1, 2): 2.9}
    arms = small().arms | {"muon": paper.Arm(recipe="m.yaml", like="adamw", paper={"train": 2.7, "val": 2.8})}
    experiment = small(arms=arms)
    results = finish(experiment, tmp_path)
    chosen = paper.best_points(experiment, results)
    rows = [row for row in results.values() if row]
    text = paper_report.write_report(tmp_path, experiment, rows, chosen, PROVENANCE)
    row = "| {} | {} ± {sd} (n=2) | {} ± {sd} (n=2) | 0.1 ± 0 | 0.2 ± 0 | 1.1 ± 0 | 11 ± 0 | 1 ± 0 | {} | {} |"
    gap = "+0.400 ± 0.141 (n=2): higher beyond the spread"
    assert row.format("adamw", "2.100", "3.100", gap, "-", sd="0.141") in text
    assert row.format("muon", "1.700", "2.700", "-", "2.7 / 2.8 / - / -", sd="0.283") in text
    assert json.loads((tmp_path / "results.json").read_text())["summary"]["m/muon"]["val"]["n"] == 2
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_report_of_a_scaling_law_gives_the_ratio_of_known_curves_and_refuses_beyond_them(tmp_path):
    sizes = {"s1": 1e6, "s2": 1e7, "s3": 1e8}
    rows, chosen = [], {}
    for model, tokens in sizes.items():
        for arm, a in (("adamw", 4.0), ("muon", 4.0 * 0.5**0.1)):
            chosen[f"{model}/{arm}"] = (0.1, 2)
            loss = a * (6e6 * tokens / 1e12) ** -0.1
            cell = {"model": model, "arm": arm, "learning_rate": 0.1, "batch": 2, "tokens": tokens, "parameters": 10**6}
            end = {"steps": 9, "scheduled_steps": 9, "eval_loss": loss, "curve": [[9, loss]], "seconds": 1.0}
            rows += [{**cell, **end, "seed": seed} for seed in (1, 2)]
    experiment = small(*sizes, report="scaling")
    text = paper_report.write_report(tmp_path, experiment, rows, chosen, PROVENANCE)
    assert "| s2 (60 TFLOP) | 0.500 [0.500, 0.500] |" in text
    assert "| s1 (6 TFLOP) | not reported: this curve was measured from 6 to 600, not at 3 |" in text
    assert "| paper's fits, over its own range | 0.44 to 0.49 (its text says about 0.52) |" in text
    rows = [row for row in rows if (row["model"], row["arm"], row["seed"]) != ("s1", "muon", 2)]
    assert "no fit" in paper_report.write_report(tmp_path, experiment, rows, chosen, PROVENANCE)


def test_dry_run_prints_what_would_run(monkeypatch, capsys, tmp_path):
    recipe = str(ROOT / "recipes/paper/scaling.yaml")
    options = ["--out", str(tmp_path), "--models", "56k", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["paper.py", recipe, *options])
    assert paper.main() == 0
    first, *lines = capsys.readouterr().out.splitlines()
    grid = paper.read_experiment(ROOT / "recipes/paper/scaling.yaml").models["56k"].grid()
    assert "0 cells done" in first and len(lines) == len(grid)
    assert "--config" in shlex.split(lines[0])
    monkeypatch.setattr(sys, "argv", ["paper.py", recipe, "--models", "1T"])
    with pytest.raises(SystemExit, match="no models"):
        paper.main()


def test_a_cell_trains_end_to_end_and_measures_what_a_report_needs(monkeypatch, tmp_path):
    text = "def f(x):\n    return x + 1  # one more\n\n" * 40
    data = tmp_path / "data" / "offline" / "pretrain"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text * 2}) + "\n")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    experiment = paper.read_experiment(ROOT / "recipes/paper/scaling.yaml")
    model = experiment.models["25k"]
    experiment.models["25k"] = paper.Model(
        config_overrides=model.config_overrides, tokens=4 * 2 * 128, learning_rates=[8e-3], batches=[2]
    )
    row = paper.run_cell(experiment, paper.Cell("25k", "muon", 8e-3, 2, 1), tmp_path / "out")
    assert row is not None, next((tmp_path / "out").rglob("log.txt")).read_text()
    assert (row["steps"], row["scheduled_steps"], row["parameters"], row["tokens"]) == (4, 4, 25_248, 1024)
    assert row["curve"][-1] == [4, row["eval_loss"]] and row["eval_loss"] < row["curve"][0][1]
    assert [size["step"] for size in row["sizes"]][::4] == [0, 4]
    assert "--output_dir OUT/25k/muon" in row["command"]


def test_toy_train_takes_the_options_of_the_example():
    import pretrain
    import toy_train
    from transformers import AutoConfig

    words = shlex.split("--model qwen --optimizer muon --dataset openwebtext-100k --hidden_size 896 --lr 1e-3")
    line = toy_train.command([*words, "--", "--max_steps", "3", "--use_cpu", "true"])
    arguments, _, training = pretrain.make_parser().parse_args_and_config(line)
    assert (training.optim, training.learning_rate, training.max_steps) == ("muon", 1e-3, 3)
    assert (arguments.dataset_name, training.per_device_train_batch_size) == ("Elriggs/openwebtext-100k", 16)
    config = AutoConfig.from_pretrained(arguments.config_name)
    config.update_from_string(arguments.config_overrides)
    assert (config.hidden_size, config.vocab_size, config.num_hidden_layers) == (896, 151_936, 12)
    assert pretrain.make_parser().parse_args_and_config(
        [*toy_train.command(["--optimizer", "adamw"]), "--use_cpu", "true"]
    )[2].optim == ("adamw_torch")
    with pytest.raises(SystemExit):
        toy_train.command(["--hidden_size", "100"])
