"""``optim="muon"`` wherever transformers and TRL accept an optimizer name."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate.accelerator
import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

import hf_muon
from hf_muon import MuonConfig
from hf_muon.config import UPDATE_KEYS
from hf_muon.integrations import registry

from . import tiny


def _args(tmp_path, **options):
    return TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, **options)


@pytest.mark.parametrize("name", ["muon", "hf_muon"])
def test_training_arguments_accept_the_name_and_serialize_it(tmp_path, name):
    args = _args(tmp_path, optim=name, optim_args="momentum=0.9,ns_steps=5")
    assert args.optim == name and isinstance(args.optim, OptimizerNames)
    assert args.to_dict()["optim"] == name and json.loads(args.to_json_string())["optim"] == name
    assert copy.deepcopy(args).optim is args.optim
    assert [pickle.loads(pickle.dumps(args, protocol)).optim for protocol in (2, 4, 5)] == [args.optim] * 3


def test_set_optimizer(tmp_path):
    args = _args(tmp_path).set_optimizer("muon", learning_rate=1e-3, args="ns_steps=6")
    assert args.optim == "muon" and args.optim_args == "ns_steps=6"


def test_argument_parsers_and_yaml(tmp_path):
    from trl import SFTConfig, TrlParser

    argv = ["--output_dir", str(tmp_path), "--optim", "muon", "--optim_args", "momentum=0.9"]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(argv)
    assert args.optim == "muon"
    config = tmp_path / "config.yaml"
    config.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\noptim: muon\noptim_args: momentum=0.9,nesterov=false\n"
    )
    (args,) = TrlParser(SFTConfig).parse_args_and_config(["--config", str(config)])
    assert args.optim == "muon" and args.optim_args == "momentum=0.9,nesterov=false"


def test_training_args_bin_loads_in_a_process_that_imports_nothing_of_ours(tmp_path):
    torch.save(_args(tmp_path, optim="muon"), tmp_path / "training_args.bin")
    code = (
        "import sys, torch, transformers; assert 'hf_muon' not in sys.modules; "
        f"args = torch.load({str(tmp_path / 'training_args.bin')!r}, weights_only=False); "
        "assert args.optim.value == 'muon' and 'hf_muon' in sys.modules; print('loaded')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "loaded", out.stderr


def test_register_is_idempotent_and_undoable():
    def snapshot():
        wrapped = [owner.__dict__[name] for owner, name, _ in registry._WRAPS]
        return list(OptimizerNames), dict(_OPTIMIZER_HANDLERS), wrapped

    before = snapshot()
    hf_muon.register()
    assert snapshot() == before
    hf_muon.unregister()
    try:
        assert "muon" not in [m.value for m in OptimizerNames]
        assert not hasattr(OptimizerNames, "MUON")
        with pytest.raises(ValueError, match="muon is not a valid OptimizerNames"):
            OptimizerNames("muon")
        assert all(a is not b for a, b in zip(snapshot()[2], before[2], strict=True))
        assert Trainer.log.__code__.co_filename.endswith("transformers/trainer.py")
    finally:
        hf_muon.register()
    assert [m.value for m in OptimizerNames] == [m.value for m in before[0]]


def test_a_muon_of_transformers_own_is_neither_replaced_nor_clobbered(caplog, monkeypatch):
    hf_muon.unregister()
    monkeypatch.setattr(registry, "_handler", object())  # stands for another owner of the name
    theirs = registry._add_member("muon")
    _OPTIMIZER_HANDLERS[theirs] = their_handler = lambda ctx: None
    monkeypatch.undo()
    monkeypatch.setattr(registry.logger, "propagate", True)
    try:
        with caplog.at_level("WARNING", logger="hf_muon"):
            hf_muon.register()
        assert "ships its own optim='muon'" in caplog.text and "'hf_muon' selects this package's" in caplog.text
        assert _OPTIMIZER_HANDLERS[theirs] is their_handler
        assert registry._is_ours(OptimizerNames("hf_muon")) and not registry._is_ours(OptimizerNames("muon"))
        hf_muon.unregister()
        assert OptimizerNames("muon") is theirs
    finally:
        del _OPTIMIZER_HANDLERS[theirs]
        registry._remove_member(theirs)
        hf_muon.register()
    assert registry._is_ours(OptimizerNames("muon"))


def test_an_enum_name_of_transformers_own_is_not_taken():
    hf_muon.unregister()
    theirs = registry._add_member("MUON")  # a member named MUON with a value that is not "muon"
    try:
        hf_muon.register()
        assert OptimizerNames.MUON is theirs and OptimizerNames("muon").name == "HF_MUON_MUON"
        hf_muon.unregister()
        assert OptimizerNames.MUON is theirs and list(OptimizerNames)[-1] is theirs
    finally:
        registry._remove_member(theirs)
        hf_muon.register()


def test_a_later_patch_of_another_library_survives_unregister(monkeypatch):
    ours = Trainer.__dict__["log"]

    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "log", theirs)
    hf_muon.register()
    hf_muon.unregister()
    assert Trainer.__dict__["log"] is theirs
    hf_muon.register()
    assert Trainer.__dict__["log"] is theirs, "wrapped once is enough"


def test_every_option_reaches_the_optimizer_by_name(tmp_path):
    text = (
        "momentum=0.8,nesterov=false,ns_steps=6,ns_coefficients=2/-1.5/0.5,ns_dtype=float32,adjust_lr_fn=original,"
        "update_rms=0.3,muon_lr=1e-2,adamw_lr=2e-3,decay_norms_and_biases=false"
    )
    args = _args(tmp_path, optim="muon", optim_args=text, weight_decay=0.07)
    args.adam_beta1, args.adam_beta2, args.adam_epsilon = 0.7, 0.8, 1e-5
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    muon, adamw, plain = cls()(tiny.qwen2(), **kwargs).param_groups
    config = MuonConfig.from_optim_args(text)
    assert {key: muon[key] for key in UPDATE_KEYS} == {key: getattr(config, key) for key in UPDATE_KEYS}
    assert (muon["lr"], adamw["lr"], plain["lr"]) == (1e-2, 2e-3, 2e-3)
    assert (muon["weight_decay"], adamw["weight_decay"], plain["weight_decay"]) == (0.07, 0.07, 0.0)
    assert adamw["betas"] == (0.7, 0.8) and adamw["eps"] == 1e-5


def test_optim_args_reach_the_config():
    text = (
        "momentum=0.9, nesterov=false, ns_steps=2, ns_coefficients=3/-4/2;2/-1.5/0.5, ns_dtype=float32, "
        "adjust_lr_fn=inverse_rms, update_rms=0.4, muon_lr=1e-2, adamw_lr=1e-3, decay_norms_and_biases=no, "
        "split_fused=0, per_head=true, lora=B, include=a.*;b, exclude=lm_head*"
    )
    assert MuonConfig.from_optim_args(text) == MuonConfig(
        momentum=0.9,
        nesterov=False,
        ns_steps=2,
        ns_coefficients=((3.0, -4.0, 2.0), (2.0, -1.5, 0.5)),
        ns_dtype="float32",
        adjust_lr_fn="inverse_rms",
        update_rms=0.4,
        muon_lr=1e-2,
        adamw_lr=1e-3,
        decay_norms_and_biases=False,
        split_fused=False,
        per_head=True,
        lora="B",
        include=("a.*", "b"),
        exclude=("lm_head*",),
    )
    assert MuonConfig.from_optim_args(None) == MuonConfig.from_optim_args("") == MuonConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("momentun=0.9", "unknown optim_args key 'momentun'.*momentum, nesterov"),
        ("momentum", "'momentum' is not key=value; valid keys: momentum"),
        ({"momentum": 0.9}, "must be one string.*got a dict"),
        ("lr=0.1", "TrainingArguments' own"),
        ("ns_coefficients=1/2/3", "diverge"),
        ("momentum=0.9,", "malformed"),
        ("momentum=", "malformed"),
        ("momentum=a=b", "malformed"),
        ("momentum=0.9,momentum=0.8", "twice"),
        ("momentum=high", "momentum='high'"),
        ("momentum=1.5", "momentum must be"),
        ("momentum=nan", "momentum must be"),
        ("nesterov=maybe", "expected true or false"),
        ("ns_dtype=float16", "bfloat16, float32"),
        ("ns_steps=2.5", "ns_steps='2.5'"),
        ("muon_lr=-1", "muon_lr must be"),
        ("lora=A", "both, B"),
    ],
)
def test_bad_optim_args_are_errors_before_the_first_step(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        _args(tmp_path, optim="muon", optim_args=text)
    late = _args(tmp_path).set_optimizer("muon", args=text)
    with pytest.raises(ValueError, match=message):
        Trainer.get_optimizer_cls_and_kwargs(late, torch.nn.Linear(4, 4))


@pytest.mark.parametrize("native", ["Muon", "AdamW"])
@pytest.mark.parametrize("where", ["hf_deepspeed_config", "deepspeed_plugin"])
def test_an_optimizer_section_of_deepspeed_is_refused(tmp_path, native, where):
    # The Trainer would train with that one and never look at optim. Set afterwards: building them needs the engine.
    args = _args(tmp_path, optim="muon")
    config = {"optimizer": {"type": native, "params": {}}}
    setattr(args, where, SimpleNamespace(config=config, deepspeed_config=config))
    with pytest.raises(RuntimeError, match="clips the orthogonalized" if native == "Muon" else "never ask for optim"):
        registry._check(args)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"zero_optimization": {"stage": 0}}, "ZeRO-1, or DDP"),
        ({"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}}, "autotp_size"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"check_grad_overflow": False}}, "check_grad_overflow"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "AdamW"),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "consolidate"),
        ({"zero_optimization": {"stage": 1}, "checkpoint": {"load_universal": True}}, "consolidate"),
    ],
)
def test_modes_of_deepspeed_that_would_train_wrong_are_refused(tmp_path, config, word):
    args = _args(tmp_path, optim="muon")
    args.hf_deepspeed_config = SimpleNamespace(config=config)
    with pytest.raises(RuntimeError, match=word):
        registry._check(args)


@pytest.mark.parametrize("version", [1, None])
def test_fsdp_version_1_is_refused(tmp_path, monkeypatch, version):
    args = _args(tmp_path, optim="muon")
    args.fsdp = True
    args.fsdp_plugin_args = {"fsdp_version": version}
    with pytest.raises(RuntimeError, match="fsdp_version: 2"):
        registry._check(args)
    args.fsdp_plugin_args = {"fsdp_version": 2}
    registry._check(args)


def test_registration_without_deepspeed_installed(tmp_path, monkeypatch):
    registry.unregister()
    monkeypatch.delattr(accelerate.accelerator, "map_pytorch_optim_to_deepspeed", raising=False)
    try:
        registry.register()
        assert _args(tmp_path, optim="muon").optim == "muon"
    finally:
        registry.unregister()
        monkeypatch.undo()
        registry.register()


def test_other_optimizers_are_untouched(tmp_path):
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(_args(tmp_path, optim="adamw_torch"), torch.nn.Linear(2, 2))
    assert cls is torch.optim.AdamW and "momentum" not in kwargs


def test_the_launcher_runs_files_and_modules_nobody_edited(tmp_path):
    script = tmp_path / "plain.py"
    script.write_text(
        "import sys\nfrom transformers import HfArgumentParser, TrainingArguments\nimport sibling\n"
        "(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()\n"
        "print(__name__, args.optim.value, sys.argv[1:])\n"
    )
    (tmp_path / "sibling.py").write_text("")
    argv = ["--optim", "muon", "--output_dir", "out"]
    env = {**os.environ, "PYTHONPATH": str(Path(hf_muon.__file__).parents[1])}
    for target, cwd in ((str(script), None), ("plain", tmp_path)):
        command = [sys.executable, "-m", "hf_muon.run", target, *argv]
        out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)
        assert out.stdout.strip() == f"__main__ muon {argv}", out.stderr
    for target in ("missing.py", "no.such.module"):
        command = [sys.executable, "-m", "hf_muon.run", target]
        out = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert out.returncode == 1 and "no such" in out.stderr and target in out.stderr
