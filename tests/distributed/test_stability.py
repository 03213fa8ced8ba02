"""QK-Clip, attention logits and spikes under every engine at 2 ranks, against one process on the same batches."""

import pytest
import torch

from hf_muon.integrations.spikes import batch_digest
from tests import tiny
from tests.distributed import scenarios
from tests.distributed.launch import joined, launch
from tests.reference import relative_error

pytestmark = pytest.mark.distributed

# Logits of these models are about 0.01 to 0.1: a threshold that many heads pass in each step, and many do not.
TAU = 0.03


def run(name: str, engine: str, **more) -> dict:
    options = {"qk_clip": TAU}
    return {
        "name": name, "engine": engine, "model": "qwen2", "steps": 5, "attention_logits_steps": 1, "options": options,
        "arguments": {"learning_rate": 2e-2}, **more,
    }  # fmt: skip


ONE = [run("one", "ddp"), run("unclipped", "ddp", options={})]
EXACT = [
    run("ddp", "ddp", accumulate=2),
    run("zero1", "zero1"),
    run("zero2", "zero2", accumulate=3),
    run("zero3", "zero3", zero={"sub_group_size": 3000}, record=True),
    run("fsdp2", "fsdp2", fsdp={"activation_checkpointing": True}),
]
SPIKES = [
    run(f"spike-{engine}", engine, steps=7, spikes=True, options={}, max_grad_norm=0.5,
        fault={"kind": "large", "rank": 1, "step": 5})
    for engine in ("ddp", "zero1", "zero3", "fsdp2")
]  # fmt: skip
HALF = [run("bf16_optimizer", "bf16_optimizer", bf16=True), run("zero1-fp16", "zero1", fp16=True, scale_power=20)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return {**launch(folder / "1", 1, ONE), **launch(folder / "2", 2, EXACT + HALF + SPIKES)}


def weights(result):
    return {n: p.float().flatten() for n, p in result["model"].items()}


@pytest.mark.parametrize("spec", EXACT, ids=lambda spec: spec["name"])
def test_clipped_weights_equal_those_of_one_process(results, spec):
    one, ours = weights(results["one"][0]), weights(results[spec["name"]][0])
    unclipped = weights(results["unclipped"][0])
    start = {n: p.detach().flatten() for n, p in scenarios.model("qwen2", "float32").named_parameters()}
    for name in one:
        # As in test_engines.py: gradients are summed in another order; AdamW divides small ones, key biases most.
        limit = 1e-4 if one[name].numel() > 32 and "norm" not in name and "embed" not in name else 1e-3
        if "k_proj.bias" not in name:
            assert relative_error(ours[name], one[name], start[name]) < limit, name
        if "q_proj.weight" in name:
            assert relative_error(unclipped[name], one[name], start[name]) > 0.05, f"{name} was not clipped"


@pytest.mark.parametrize("spec", EXACT + HALF, ids=lambda spec: spec["name"])
def test_every_rank_logs_the_logits_and_clips_of_one_process(results, spec):
    one = results["one"][0]["logs"]
    keys = [k for k in one[0] if k.startswith(("attention/", "muon/qk_clip/"))]
    heads = [row["muon/qk_clip/heads"] for row in one]
    assert len(keys) == 2 + 2 + 2 and min(heads) > 0 and heads[-1] < 8
    ranks = [[{k: row[k] for k in keys} for row in r["logs"]] for r in results[spec["name"]]]
    assert ranks[0] == ranks[1]
    if spec in EXACT:
        for ours, expected in zip(ranks[0], one, strict=True):
            assert ours == pytest.approx({k: expected[k] for k in keys}, rel=1e-3)


@pytest.mark.parametrize("spec", EXACT + HALF, ids=lambda spec: spec["name"])
def test_logits_stay_about_the_threshold_that_they_pass_without_a_clip(results, spec):
    rows = results[spec["name"]][0]["logs"]
    free = results["unclipped"][0]["logs"]
    assert free[-1]["attention/max_logit"] > 2 * TAU
    assert rows[-1]["attention/max_logit"] < 0.75 * free[-1]["attention/max_logit"]


@pytest.mark.parametrize("spec", EXACT + HALF, ids=lambda spec: spec["name"])
def test_the_model_is_the_scaled_master_weights_on_all_ranks(results, spec):
    found = results[spec["name"]]
    for name, weight in joined(found, "weights").items():
        for result in found:
            assert torch.equal(result["model"][name].flatten(), weight.to(result["model"][name].dtype)), name


def test_fp16_steps_that_overflow_are_skipped_and_clip_nothing(results):
    for result in results["zero1-fp16"]:
        rows = result["logs"]
        assert 0 < result["overflows"] < len(rows)
        assert [row["muon/qk_clip/heads"] for row in rows[: result["overflows"]]] == [0] * result["overflows"]
        assert rows[-1]["muon/qk_clip/heads"] > 0


def test_projections_lie_in_several_sub_groups_of_zero3(results):
    assert len({tuple(step["unit"]) for step in results["zero3"][0]["steps"]}) > 3


@pytest.mark.parametrize("spec", SPIKES, ids=lambda spec: spec["name"])
def test_a_gradient_that_jumps_on_one_rank_is_named_on_all(results, spec):
    found = [result["spikes"] for result in results[spec["name"]]]
    assert found[0] == found[1]
    ((step, what, largest, grown, batches),) = found[0]
    weight = f"{scenarios.VICTIM}.weight"
    assert (step, what, largest, grown) == (6, "grad_norm", weight, weight)
    rows = torch.tensor([row["input_ids"] for row in tiny.tokens(rows=400)[5 * 12 : 6 * 12]])
    # The sampler deals the rows of a global batch to the ranks in turn, or each rank a run of them.
    parts = [*rows.split(6), rows[::2], rows[1::2]]
    assert [b.split(",")[0] for b in sorted(batches)] == ["rank 0", "rank 1"]
    assert all(any(f"digest {batch_digest(part)}" in b for part in parts) for b in batches)
