"""One optimizer state for every engine and number of ranks: resume from what another one saved."""

import shutil

import pytest
import torch
from transformers import Qwen2MoeForCausalLM

from hf_muon import canonical, checkpoint
from hf_muon.__main__ import main
from tests.distributed import scenarios
from tests.distributed.launch import joined, launch
from tests.reference import relative_error

SOURCES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SMALL = {"zero3": {"zero": {"sub_group_size": 9000}}, "bf16_optimizer": {"bf16": True}}  # several sub-groups of a group


def spec(engine, name=None, **more):
    return {"name": name or engine, "engine": engine, "model": "moe", "steps": 6, **SMALL.get(engine, {}), **more}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Runs of 6 steps on 3 ranks that saved after 3, the same resumed from there, and the whole state of each."""
    out = tmp_path_factory.mktemp("saved")
    engines = (*SOURCES, "bf16_optimizer")
    runs = [spec(engine, save_steps=3) for engine in engines]
    resumed = [spec(e, f"{e}-resumed", resume=str(out / e / "run" / "checkpoint-3")) for e in engines]
    adamw = spec("zero1", "adamw", optim="adamw_torch", steps=3, save_steps=3)
    crossed = [
        spec("zero1", "adamw-resumed", resume=str(out / "adamw" / "run" / "checkpoint-3"), fails=True),
        spec("fsdp2", "ddp-under-fsdp2", resume=str(out / "ddp" / "run" / "checkpoint-3"), fails=True),
        spec("fsdp2", "zero1-under-fsdp2", resume=str(out / "zero1" / "run" / "checkpoint-3"), fails=True),
        spec("ddp", "zero1-under-ddp", resume=str(out / "zero1" / "run" / "checkpoint-3"), fails=True),
    ]
    found = launch(out, 3, [*runs, *resumed, adamw, *crossed])
    for engine in engines:
        assert main(["consolidate", str(out / engine / "run" / "checkpoint-3"), str(out / f"{engine}-whole")]) == 0
    return out, found


def start():
    return {n: p.detach().flatten() for n, p in scenarios.model("moe", "float32").named_parameters()}


@pytest.mark.parametrize("engine", [*SOURCES, "bf16_optimizer"])
def test_resume_on_the_same_engine_and_size_is_bit_exact(saved, engine):
    _, found = saved
    for key in ("weights", "momentum"):
        whole, resumed = joined(found[engine], key), joined(found[f"{engine}-resumed"], key)
        assert whole and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("engine", SOURCES)
def test_every_engine_writes_the_same_whole_state(saved, engine):
    out, _ = saved
    reference = checkpoint.read(out / "ddp-whole")
    state = checkpoint.read(out / f"{engine}-whole")
    ours, theirs = canonical.by_name(state), canonical.by_name(reference)
    assert ours.keys() == theirs.keys() and state["weights"].keys() == reference["weights"].keys()
    for name, values in theirs.items():
        assert {k: v.shape for k, v in ours[name].items()} == {k: v.shape for k, v in values.items()}
        for key in values:
            # Gradients are summed over ranks in another order; second moments square that.
            assert torch.allclose(ours[name][key], values[key], rtol=1e-3, atol=1e-7), (name, key)


TARGETS = {1: ("single",), 2: ("ddp", "zero1", "zero2", "zero3", "fsdp2"), 4: ("zero1", "zero3")}


@pytest.mark.parametrize("ranks", TARGETS)
def test_any_engine_goes_on_from_any_other_at_another_size(saved, tmp_path, ranks):
    out, found = saved
    pairs = [(source, target) for source in SOURCES for target in TARGETS[ranks]]
    specs = [spec(target, f"{source}-to-{target}", resume=str(out / f"{source}-whole")) for source, target in pairs]
    resumed = launch(tmp_path, ranks, specs)
    begin, reference = start(), joined(found["ddp"], "weights")
    for name, results in resumed.items():
        weights = joined(results, "weights")
        assert [row["step"] for row in results[0]["logs"]] == [1, 2, 3, 4, 5, 6]
        for parameter, weight in weights.items():
            # Biases of keys have gradients of 1e-9, whose rounding AdamW turns into steps of full size.
            limit = 1e-3 if parameter.endswith("bias") else 1e-4
            assert relative_error(weight, reference[parameter], begin[parameter]) < limit, (name, parameter)


def test_a_deepspeed_checkpoint_of_another_size_is_refused_with_the_command_that_helps(saved, tmp_path):
    out, _ = saved
    specs = [
        spec(engine, resume=str(out / source / "run" / "checkpoint-3"), fails=True)
        for engine, source in (("zero1", "zero1"), ("zero3", "zero3"), ("zero2", "ddp"))
    ]
    for name, results in launch(tmp_path, 2, specs).items():
        for result in results:
            assert "python -m hf_muon consolidate" in result["error"], name


def test_states_of_another_optimizer_or_engine_are_refused_on_every_rank(saved):
    _, found = saved
    assert all("another optimizer's" in result["error"] for result in found["adamw-resumed"])
    for name in ("ddp-under-fsdp2", "zero1-under-fsdp2", "zero1-under-ddp"):
        assert all("python -m hf_muon consolidate" in result["error"] for result in found[name]), name


def test_the_consolidated_model_is_the_trained_one(saved):
    out, found = saved
    weights = joined(found["zero3"], "weights")
    state = (
        checkpoint.read(out / "zero3" / "run" / "checkpoint-6") if (out / "zero3/run/checkpoint-6").exists() else None
    )
    assert state is not None and all(torch.equal(state["weights"][n].flatten(), w) for n, w in weights.items())
    model = Qwen2MoeForCausalLM.from_pretrained(out / "zero3-whole")
    saved_weights = checkpoint.read(out / "zero3-whole")["weights"]
    assert all(torch.equal(p, saved_weights[n]) for n, p in model.named_parameters() if n in saved_weights)


def test_the_checkpoint_that_latest_names_is_read(saved, tmp_path):
    out, _ = saved
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(out / "zero1" / "run" / "checkpoint-3", folder)
    shutil.copytree(out / "zero1" / "run" / "checkpoint-6" / "global_step6", folder / "global_step6")  # an older run's
    adamw = [v["step"] for v in canonical.by_name(checkpoint.read(folder)).values() if "step" in v]
    assert adamw and all(step == 3 for step in adamw)


def test_weights_in_the_models_files_only_must_be_given(saved, tmp_path):
    out, _ = saved
    with pytest.raises(ValueError, match="give `weights`"):
        checkpoint.consolidate(out / "ddp" / "run" / "checkpoint-3", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_missing_rank_and_an_existing_folder_are_errors(saved, tmp_path, capsys):
    out, _ = saved
    broken = tmp_path / "checkpoint-3"
    shutil.copytree(out / "zero1" / "run" / "checkpoint-3", broken)
    next(broken.glob("global_step*/*rank_1_*optim*")).unlink()
    assert main(["consolidate", str(broken), str(tmp_path / "new")]) == 1
    assert "some are missing" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert main(["consolidate", str(out / "zero1" / "run" / "checkpoint-3"), str(out / "zero1-whole")]) == 1
    assert "exists" in capsys.readouterr().err
