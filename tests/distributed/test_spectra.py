"""The spectra that a sharded model logs are those of one process."""

import pytest

from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed

ENGINES = ("ddp", "zero2", "zero3", "fsdp2")


def spec(engine: str) -> dict:
    # In float32, where two steps of an engine differ from one process's by rounding alone.
    return {"name": engine, "engine": engine, "model": "moe", "steps": 2, "spectra": 1}


def test_spectra_of_shards_equal_those_of_one_process_on_every_rank(tmp_path):
    (single,) = launch(tmp_path / "one", 1, [spec("ddp")])["ddp"]
    expected = [{k: v for k, v in row.items() if k.startswith("spectra/")} for row in single["logs"]]
    assert [row["spectra/step"] for row in expected] == [1, 2]
    groups = ("AttnQO", "AttnKV", "Router", "Experts", "SharedExperts")
    assert expected[0].keys() >= {f"spectra/entropy/{group}" for group in groups}
    found = launch(tmp_path / "two", 2, [spec(engine) for engine in ENGINES])
    for engine in ENGINES:
        for rank in found[engine]:
            for row, wanted in zip(rank["logs"], expected, strict=True):
                assert {k: row[k] for k in row if k.startswith("spectra/")} == pytest.approx(wanted, rel=1e-4), engine
