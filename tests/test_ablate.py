"""The swap ablation: what it would run, what it skips, what a failure costs, and figures computed by hand."""

import dataclasses
import itertools
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import ablate
import ablate_report
import pytest

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(ROOT.glob("recipes/ablations/*.yaml"))
DENSE = ROOT / "recipes/ablations/dense.yaml"
# A cell that needs no training: it leaves the state that the Trainer leaves, or dies.
FAKE = """
import json, pathlib, sys
loss, fails, folder = sys.argv[1:]
if fails == "True": sys.exit("out of memory")
rows = [{"step": 0, "eval_loss": 9.0}, {"step": 5, "eval_loss": float(loss), "eval_mean_token_accuracy": 0.5}]
pathlib.Path(folder, "trainer_state.json").write_text(json.dumps({"log_history": rows}))
"""


def name(path):
    return path.stem


def arm(*rates, **options):
    return ablate.Arm(recipe="x.yaml", learning_rates=rates, options=options)


def small(**changes):
    arms = {"muon": arm(0.1, 0.2), "adamw": arm(0.1, 0.2)}
    base = {"seeds": [1, 2], "accelerate_config": "cpu.yaml", "pretrain": arms, "sft": arms}
    return ablate.Ablation(**base | changes)


@pytest.fixture
def faked(monkeypatch):
    """Cells end at once; the loss grows with the rate, and the groups in the set fail."""
    failing, started = set(), []

    def command(ablation, cell, out):
        if not isinstance(cell.rate, str):
            loss, folder = cell.rate + cell.seed, str(out / cell.name)
            return [sys.executable, "-c", FAKE, str(loss), str(cell.name in failing), folder]
        return ["never"]

    def run(line, **options):
        started.append(Path(line[-1]).relative_to(Path(line[-1]).parents[1]).as_posix())
        return real(line, **options)

    real = subprocess.run
    monkeypatch.setattr(ablate, "command", command)
    monkeypatch.setattr(ablate.subprocess, "run", run)
    return failing, started


def finish(ablation, out):
    results = ablate.read_results(ablation, out)
    ablate.run_all(ablation, out, results, total=0)
    return results


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_every_command_of_a_recipe_is_parsed_by_its_script_without_unknown_keys(path, monkeypatch, tmp_path):
    import pretrain
    import sft

    monkeypatch.chdir(ROOT)
    ablation = ablate.read_ablation(path)
    planned = list(ablate.cells(ablation, tmp_path, {}, guess=True))
    assert {cell.seed for cell in planned} == set(ablation.seeds)
    for cell in planned:
        line = ablate.command(ablation, cell, tmp_path)
        script = next(i for i, part in enumerate(line) if part.startswith("scripts/"))
        assert (ROOT / line[script]).is_file()
        assert (ROOT / line[line.index("--config_file") + 1]).is_file()
        if isinstance(cell.rate, str):
            continue
        module = {"scripts/pretrain.py": pretrain, "scripts/sft.py": sft}[line[script]]
        parsed = module.make_parser().parse_args_and_config(
            [*line[script + 1 :], "--use_cpu", "true", "--bf16", "false"]
        )
        training = next(part for part in parsed if hasattr(part, "learning_rate"))
        assert (training.learning_rate, training.seed) == (cell.rate, cell.seed)
        assert training.output_dir == str(tmp_path / cell.name)


def test_dry_run_of_the_public_checkpoints_prints_the_papers_four_runs_a_seed(capsys, monkeypatch, tmp_path):
    recipe = str(ROOT / "recipes/ablations/moonlight.yaml")
    monkeypatch.setattr(sys, "argv", ["ablate.py", recipe, "--out", str(tmp_path), "--dry-run"])
    assert ablate.main() == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()[1:]]
    runs = [dict(itertools.pairwise(line)) for line in lines]
    assert len(runs) == 12
    assert {run["--learning_rate"] for run in runs} == {"5e-05"}
    assert {run["--seed"] for run in runs} == {"42", "43", "44"}
    pairs = {(run["--model_name_or_path"], Path(run["--config"]).stem) for run in runs}
    models, recipes = ("checkpoints/Moonlight-1.2T", "checkpoints/Moonlight-A-1.2T"), ("config_muon", "config_adamw")
    assert pairs == {(model, recipe) for model in models for recipe in recipes}
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_options_reach_the_command_line_with_the_arms_own_last(tmp_path):
    ablation = small(
        sft_options={"max_steps": 7, "packing": True}, remedies={"soft": arm(0.1, max_steps=9, k=["a", "b"])}
    )
    cell = next(c for c in ablate.cells(ablation, tmp_path, {}, guess=True) if c.group.name == "sft/adamw-soft")
    text = shlex.join(ablate.command(ablation, cell, tmp_path))
    assert "--packing true --max_steps 9" in text.replace(
        "--max_steps 9 --packing true", "--packing true --max_steps 9"
    )
    assert "--k a b" in text
    assert "--max_steps 7" not in text
    assert f"--model_name_or_path {tmp_path}/pretrain/adamw_lrBEST-OF-0.1-0.2_seed1" in text


def test_sweep_runs_first_and_the_other_seeds_run_at_its_best_rate(faked, tmp_path):
    _, started = faked
    results = finish(small(), tmp_path)
    assert all(results.values())
    assert started[:3] == ["pretrain/muon_lr0.1_seed1", "pretrain/muon_lr0.2_seed1", "pretrain/muon_lr0.1_seed2"]
    assert sorted(started) == sorted(results) and len(started) == 2 * 3 + 4 * 3
    assert not [cell for cell in started if "lr0.2_seed2" in cell], "the worse rate has the sweep's seed only"


def test_finished_cells_are_skipped_and_a_larger_recipe_adds_only_its_new_ones(faked, tmp_path):
    _, started = faked
    finish(small(), tmp_path)
    started.clear()
    finish(small(), tmp_path)
    assert started == []
    finish(small(seeds=[1, 2, 3], remedies={"soft": arm(0.1)}), tmp_path)
    added = {f"{group}_lr0.1_seed3" for group in ("pretrain/muon", "pretrain/adamw")}
    added |= {f"sft/{a}-{b}_lr0.1_seed3" for a in ("muon", "adamw") for b in ("muon", "adamw")}
    assert set(started) == added | {f"sft/adamw-soft_lr0.1_seed{seed}" for seed in (1, 2, 3)}


def test_a_finished_cell_of_another_recipe_is_refused(tmp_path, monkeypatch):
    cell = next(ablate.cells(small(), tmp_path, {}))
    (tmp_path / cell.name).mkdir(parents=True)
    (tmp_path / cell.name / "result.json").write_text(
        json.dumps({"eval_loss": 1.0, "command": "accelerate launch old"})
    )
    with pytest.raises(SystemExit, match="another --out"):
        ablate.read_results(small(), tmp_path)


def test_a_failed_cell_is_reported_and_costs_only_what_builds_on_it(faked, tmp_path, capsys):
    failing, started = faked
    failing |= {"pretrain/muon_lr0.1_seed2", "sft/adamw-adamw_lr0.2_seed1"}
    results = finish(small(), tmp_path)
    assert {cell for cell, result in results.items() if result is None} == failing
    lost = {"sft/muon-muon_lr0.1_seed2", "sft/muon-adamw_lr0.1_seed2"}
    assert len(started) == 18 - len(lost)
    assert not lost & set(started)
    assert "pretrain/muon_lr0.1_seed2: FAILED" in capsys.readouterr().out
    assert "out of memory" in (tmp_path / "pretrain/muon_lr0.1_seed2/log.txt").read_text()
    failing.clear()
    started.clear()
    assert all(finish(small(), tmp_path).values())
    assert set(started) == lost | {"pretrain/muon_lr0.1_seed2", "sft/adamw-adamw_lr0.2_seed1"}


def test_a_diverged_rate_is_never_the_best():
    ablation = small()
    group = ablate.groups(ablation)[0]
    results = {f"pretrain/muon_lr{rate}_seed1": {"eval_loss": loss} for rate, loss in ((0.1, float("nan")), (0.2, 9.0))}
    assert ablate.choose(group, ablation, results) == 0.2


def test_a_cell_waits_for_the_process_that_a_killed_run_left_behind(faked, tmp_path):
    cell = next(ablate.cells(small(), tmp_path, {}))
    (tmp_path / cell.name).mkdir(parents=True)
    # What inherits the log of a run inherits its lock, as the training process of a killed ablate.py does.
    hold = "import fcntl, subprocess, sys; log = open(sys.argv[1], 'a'); fcntl.flock(log, fcntl.LOCK_EX);"
    hold += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1); print(7)'], stdout=log)"
    subprocess.check_call([sys.executable, "-c", hold, str(tmp_path / cell.name / "log.txt")])
    start = time.perf_counter()
    assert ablate.run_cell(small(), cell, tmp_path)
    assert time.perf_counter() - start > 0.9
    assert (tmp_path / cell.name / "log.txt").read_text() == "7\n"


@pytest.mark.parametrize(
    "bad",
    [{"recipe": "x"}, {"checkpoint": "c", "learning_rates": (0.1,)}, {}, {"recipe": "x", "learning_rates": ("1e-3",)}],
)
def test_an_arm_without_one_way_to_train_is_refused(bad):
    with pytest.raises(ValueError, match="learning_rates"):
        ablate.Arm(**bad)


def test_an_unknown_key_of_a_recipe_is_named(tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(DENSE.read_text() + "\nnope: 1\n")
    with pytest.raises(TypeError, match="nope"):
        ablate.read_ablation(recipe)


def test_table_figure_and_verdicts_are_those_computed_by_hand(tmp_path):
    ablation = dataclasses.replace(small(seeds=[1, 2]), remedies={"soft": arm(0.1)})
    losses = {"muon-muon": (1.0, 1.2), "adamw-muon": (2.0, 2.2), "muon-adamw": (1.5, 1.7), "adamw-adamw": (2.0, 2.3)}
    losses["adamw-soft"] = (1.5, 1.6)
    rows = [
        {"group": f"sft/{pair}", "learning_rate": 0.1, "seed": seed, "eval_loss": loss, "seconds": 30.0}
        | {"eval_mean_token_accuracy": loss / 10}
        for pair, pair_losses in losses.items()
        for seed, loss in enumerate(pair_losses, start=1)
    ]
    rows.append(rows[0] | {"learning_rate": 0.2, "eval_loss": 5.0})
    chosen = {f"sft/{pair}": 0.1 for pair in losses}
    provenance = {"command": "c", "commit": "x", "versions": {"torch": "2"}, "python": "3", "machine": "m"}
    text = ablate_report.write_report(tmp_path, ablation, rows, chosen, provenance)
    lines = text.splitlines()
    assert "|  | Muon/Muon | AdamW/Muon | Muon/AdamW | AdamW/AdamW |" in lines
    means = ["1.100 ± 0.141 (n=2)", "2.100 ± 0.141 (n=2)", "1.600 ± 0.141 (n=2)", "2.150 ± 0.212 (n=2)"]
    assert "| held-out SFT loss | " + " | ".join(means) + " |" in lines
    assert "| paper: GSM8K (5-shot, EM) | 68.0 | 62.1 | 64.9 | 64.6 |" in lines
    assert "| Muon/Muon minus AdamW/AdamW | -1.050 ± 0.071 (n=2) | -1.000, -1.100 | lower beyond the spread |" in text
    assert "| AdamW/Muon minus AdamW/AdamW | -0.050 ± 0.071 (n=2) | +0.000, -0.100 | within the spread |" in text
    assert "| soft | 0.1 | 1.550 ± 0.071 (n=2) | 0.155 ± 0.007 (n=2) | -0.550 ± 0.071 (n=2): lower beyond" in text
    assert "| sft/muon-muon | **1.000** | 5.000 | yes |" in lines
    summary = json.loads((tmp_path / "results.json").read_text())["summary"]
    assert summary["adamw-adamw"]["eval_loss"] == pytest.approx({"mean": 2.15, "sd": 0.2121320, "n": 2})
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_held_out_rows_are_spread_evenly_and_never_trained_on():
    import sft
    from datasets import Dataset

    rows = Dataset.from_dict({"i": list(range(10))})
    train, test = sft.hold_out(rows, None, 3)
    assert test["i"][:] == [0, 3, 6]
    assert train["i"][:] == [1, 2, 4, 5, 7, 8, 9]
    assert sft.hold_out(rows, test, 2)[0] is rows
    assert sft.hold_out(rows, test, 2)[1]["i"][:] == [0, 3]
    assert sft.hold_out(rows, test, 99)[1]["i"][:] == [0, 3, 6]
    with pytest.raises(ValueError, match="nothing of 10 rows"):
        sft.hold_out(rows, None, 10)
