"""What is wrong on one rank stops or skips the step on all of them, by name, and never hangs."""

import re

import pytest
import torch

from tests.distributed.launch import joined, launch
from tests.distributed.replay import replay, same

pytestmark = pytest.mark.distributed

STEPS = 5
RANK_1 = {"rank": 1, "step": 2}


def run(name: str, engine: str, **more) -> dict:
    return {"name": name, "engine": engine, "model": "qwen2", "steps": STEPS, "record": True, **more}


def refused(name: str, engine: str, message: str, **more) -> dict:
    return run(name, engine, fails=message, **more)


def on_rank_1(**options) -> dict:
    return {"by_rank": {"1": {"options": options}}}


REPLICAS = {"loop": "replicas"}
LIVE = "ranks disagree about where parameters live.*rank 1 has"
MISSING = {"fault": {"kind": "missing", **RANK_1}}
GRADIENTS = "ranks disagree about which parameters have gradients.*rank 0 has.*down_proj.*rank 1 has"
CHANGED = {"fault": {"kind": "changed", **RANK_1}}
REFUSED = [
    *[
        refused(f"options-{e}", e, "the optimizer's options.*0.95.*rank 1 has.*0.9,", **on_rank_1(momentum=0.9))
        for e in ("ddp", "zero1", "zero2", "zero3", "fsdp2")
    ],
    refused("heads", "ddp", LIVE, **REPLICAS, **on_rank_1(per_head="true")),
    refused("budget", "ddp", LIVE + ".* 250, ", **REPLICAS, **on_rank_1(exchange_bytes=1000)),
    refused("model", "ddp", LIVE, **REPLICAS, by_rank={"1": {"model": "wide"}}),
    refused("frozen", "ddp", LIVE, **REPLICAS, by_rank={"1": {"model": "frozen"}}),
    refused("missing-ddp", "ddp", GRADIENTS, **REPLICAS, **MISSING),
    refused("missing-fsdp2", "fsdp2", GRADIENTS, loop="fsdp2", **MISSING),
    refused(
        "apart", "ddp", "should be replicas.*down_proj.*rank 1 has.*down_proj", **REPLICAS,
        fault={"kind": "other", "rank": 1, "step": 0},
    ),
    *[refused(f"changed-{e}", e, "changed after deepspeed.init", **CHANGED) for e in ("zero1", "zero2", "zero3")],
    *[
        refused(f"section-{kind}", "zero2", message, deepspeed={"optimizer": {"type": kind, "params": {"lr": 1e-3}}})
        for kind, message in (("AdamW", "never ask for optim"), ("Muon", "own Muon has no RMS matching"))
    ],
    refused("ratio", "zero3", "ratio below 1", zero={"offload_optimizer": {"device": "cpu", "ratio": 0.5}}),
    refused("fsdp1", "fsdp2", "FSDP version 1", fsdp={"version": 1}),
    refused("columns", "fsdp2", r"placements \(Shard\(dim=1\),\).*first dimension", loop="shard1"),
]  # fmt: skip
NAN = [
    run(f"nan-{engine}-{bf16}-{clip}", engine, bf16=bf16, max_grad_norm=clip, fault={"kind": "nan", **RANK_1})
    for engine, bf16 in (
        *((engine, False) for engine in ("ddp", "zero1", "zero2", "zero3", "fsdp2")),
        *((engine, True) for engine in ("zero1", "bf16_optimizer", "zero3")),
    )
    for clip in (0.0, 0.5)
] + [
    # A Trainer multiplies all gradients by their norm, NaN or not; here one rank alone has it.
    run(f"nan-alone-{loop}", engine, loop=loop, fault={"kind": "nan", **RANK_1})
    for loop, engine in (("replicas", "ddp"), ("fsdp2", "fsdp2"))
]
UNUSED = run("unused", "ddp", arguments={"ddp_find_unused_parameters": True}, fault={"kind": "unused", **RANK_1})


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("refused"), 2, REFUSED, timeout=120)


@pytest.fixture(scope="module")
def survivors(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("survived"), 2, [*NAN, UNUSED], timeout=120)


@pytest.mark.parametrize("spec", REFUSED, ids=lambda spec: spec["name"])
def test_every_rank_raises_and_one_says_by_name_what_is_wrong(refusals, spec):
    errors = [result.get("error", "none") for result in refusals[spec["name"]]]
    told = [e for e in errors if re.search(spec["fails"], e, re.DOTALL)]
    assert told
    assert all(e in told or "another rank cannot take this step" in e for e in errors), errors


def unharmed(spec: dict, results: list[dict], steps: int) -> None:
    """All ranks took ``steps`` steps, and nothing but those has changed weights and momentum."""
    expected = replay(spec, results)
    for result in results:
        units = len({tuple(step["unit"]) for step in result["steps"]})
        assert len(result["steps"]) == steps * units
    for key in ("weights", "momentum"):
        for name, values in joined(results, key).items():
            assert torch.isfinite(values).all() and same(key, name, values, expected), f"{key} of {name}"


@pytest.mark.parametrize("spec", NAN, ids=lambda spec: spec["name"])
def test_a_nan_in_one_gradient_on_one_rank_skips_the_step_on_all(survivors, spec):
    results = survivors[spec["name"]]
    unharmed(spec, results, STEPS - 1)
    # Whether DeepSpeed has seen it before it would call the optimizer, or the optimizer itself.
    assert [r["logs"][-1]["muon/skipped_steps"] for r in results] == [1, 1]


def test_a_layer_that_one_rank_does_not_use_trains_on_under_ddp(survivors):
    unharmed(UNUSED, survivors["unused"], STEPS)
