"""The benchmark compares equals: same matrices, same update, and it refuses a wrong one."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import bench
import bench_training
import bench_workloads
from bench_contenders import CONTENDERS, Torch
from bench_workloads import WORKLOADS, Workload, single, tensors

from hf_muon.matrices import MatrixLayout

TINY = Workload(
    note="tiny",
    matrices=(MatrixLayout((3, 8, 12), batch=1, sizes=(4, 4)), MatrixLayout((16, 12))),
    others=((12,),),
    rounds=2,
)


def test_fused_parameters_and_single_matrices_are_the_same_elements_in_all_workloads():
    for name, workload in WORKLOADS.items():
        weights = [torch.empty(s, device="meta") for s in [m.shape for m in workload.matrices]]
        assert sum(m.numel() for m in single(workload, weights)) == workload.elements[0], name
        assert len(single(workload, weights)) == sum(m.total() for m in workload.matrices), name


def test_single_matrices_are_views_of_the_fused_ones():
    weights, _ = tensors(TINY, torch.device("cpu"))
    for matrix in single(TINY, weights):
        matrix.fill_(7.0)
    assert all((w == 7).all() for w in weights[:2]) and not (weights[2] == 7).any()


@pytest.mark.parametrize("name", ["hf_muon", "torch"])
def test_contenders_follow_float64(name):
    weights, grads = tensors(TINY, torch.device("cpu"))
    contender = CONTENDERS[name](TINY, [w.clone() for w in weights], grads)
    contender.step()
    assert 0 < bench.error(contender, TINY, weights, grads) < bench.BAND


def test_a_contender_with_a_wrong_update_is_not_timed(monkeypatch):
    class Wrong(Torch):
        def step(self):
            super().step()
            self.weights[1].add_(torch.randn_like(self.weights[1]))

    monkeypatch.setitem(CONTENDERS, "torch", Wrong)
    with pytest.raises(SystemExit, match="torch on tiny: first update is"):
        bench.measure("tiny", TINY, ["hf_muon", "torch"], torch.device("cpu"))


def test_a_run_counts_operations_and_writes_every_number(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench_workloads.WORKLOADS, "tiny", TINY)
    monkeypatch.setattr(
        sys, "argv", ["bench", "tiny", "--contenders", "torch", "adamw", "--json", str(tmp_path / "x.json")]
    )
    bench.main()
    steps = json.loads((tmp_path / "x.json").read_text())["workloads"]["tiny"]["steps"]
    # X X^T, its square and the product with X, five times, on the smaller side.
    matrices = [(n, min(a, b), max(a, b)) for m in TINY.matrices for n, a, b in m.matrices()]
    by_hand = sum(5 * n * (4 * small * small * large + 2 * small**3) for n, small, large in matrices)
    assert steps["hf_muon"]["operations"] == steps["torch"]["operations"] == by_hand
    assert steps["adamw"]["operations"] == 0 and len(steps["torch"]["seconds"]) == TINY.rounds
    assert "| tiny | torch |" in capsys.readouterr().out


def test_operations_of_a_training_step_on_paper():
    operations, passed = bench_training.on_paper(bench_training.MODELS["Qwen2.5-7B"][0])
    # 28 layers: q and o, k and v, gate and up and down; (A, B), the smaller first; X X^T, its square, the product.
    shapes = {(3584, 3584): 2, (512, 3584): 2, (3584, 18944): 3}
    assert operations == 5 * 28 * sum(n * (4 * a * a * b + 2 * a**3) for (a, b), n in shapes.items())
    matrices = 28 * sum(n * a * b for (a, b), n in shapes.items())
    vectors = 28 * (2 * 3584 + 3584 + 2 * 512) + 3584
    assert passed == matrices + vectors + 3584 * 152064


def test_the_share_at_measured_rates_counts_plain_iteration():
    steps = {"torch": {"operations": 100.0}, "hf_muon": {"median": 5.0, "operations": 80.0}}
    assert bench_training.rate({"workloads": {"x": {"steps": steps}}, "matmul_rate": 40.0}, "x") == 0.5


def test_a_profile_names_operations_and_calls():
    text = bench.profile(TINY, torch.device("cpu"), steps=3)
    assert " ms a step" in text and text.count("\n| aten::") >= 5 and "\n| others | " in text


@pytest.mark.parametrize("wrong", [["nope"], ["demo", "--contenders", "nope"]])
def test_what_the_benchmark_does_not_know_is_refused_before_it_runs(wrong, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *wrong])
    with pytest.raises(SystemExit):
        bench.main()
    assert "['nope']; there are" in capsys.readouterr().err


def test_training_overhead_needs_both_steps_of_each_models_workload(monkeypatch, tmp_path, capsys):
    file = tmp_path / "bench.json"
    (_, there), (_, lacking), *_ = bench_training.MODELS.values()
    steps = {"hf_muon": {"median": 1.0}, "torch": {"median": 1.0}}
    workloads = {there: {"steps": steps}, lacking: {"steps": {"torch": {"median": 1.0}}}}
    file.write_text(json.dumps({"matmul_rate": 1.0, "workloads": workloads}))
    monkeypatch.setattr(sys, "argv", ["bench_training", "--bench", str(file)])
    with pytest.raises(SystemExit):
        bench_training.main()
    said = capsys.readouterr().err
    assert lacking in said and there not in said and "run scripts/bench.py" in said
