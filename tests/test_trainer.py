"""``optim="muon"`` in the Trainer: what is trained, how, and what is logged."""

import logging
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType

import hf_muon
from hf_muon import Muon, MuonFactory

from . import tiny
from .distributed import scenarios


def make(tmp_path, model=None, cls=Trainer, data=None, eval_data=None, **options):
    """A Trainer on the tiny model; five steps of four rows unless told otherwise."""
    defaults = dict(weight_decay=0.1, max_steps=5, per_device_train_batch_size=4, seed=7)
    args = TrainingArguments(**tiny.arguments(tmp_path, **{**defaults, **options}))
    return cls(model=model or tiny.qwen2(), args=args, train_dataset=data or tiny.tokens(), eval_dataset=eval_data)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_training_learns_and_logs_what_muon_did(tmp_path):
    trainer = make(tmp_path, max_steps=100, learning_rate=1e-2, lr_scheduler_type="constant")
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert logs[-1]["loss"] < 0.6 * logs[0]["loss"]
    for key in ("muon/update_rms", "muon/update_rms/attention", "muon/update_rms/mlp", "muon/weight_rms/mlp"):
        assert all(0 < x[key] < 1 for x in logs), key
    assert all(x["muon/lr"] == x["muon/adamw_lr"] == x["learning_rate"] == 1e-2 for x in logs)
    assert all(x["muon/skipped_steps"] == x["muon/skipped_matrices"] == 0 for x in logs)
    assert not any(key.startswith("muon/") for x in trainer.state.log_history if "loss" not in x for key in x)


def test_the_routing_summary_is_logged_at_start(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_muon"), "propagate", True)
    with caplog.at_level("INFO", logger="hf_muon"):
        make(tmp_path).create_optimizer()
    assert "muon" in caplog.text and "adamw" in caplog.text and "embedding" in caplog.text


def test_other_optimizers_log_nothing_of_ours(tmp_path):
    trainer = make(tmp_path, optim="adamw_torch")
    trainer.train()
    assert not any(key.startswith("muon/") for x in trainer.state.log_history for key in x)


def _reference(options, steps=5, batches=None):
    """The same run by hand: plain loop, plain optimizer, clipping on the gradients."""
    model = tiny.qwen2()
    optimizer = Muon(hf_muon.param_groups(model, lr=2e-3, weight_decay=0.1), **options)
    for rows in batches:
        optimizer.zero_grad()
        for row in rows:
            ids = torch.tensor([r["input_ids"] for r in row])
            (model(input_ids=ids, labels=ids).loss / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
    return weights(model)


class _Sequential(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_clipping_and_accumulation_act_on_gradients_before_momentum(tmp_path, accumulation):
    data = tiny.tokens()
    trainer = make(
        tmp_path,
        cls=_Sequential,
        data=data,
        lr_scheduler_type="constant",
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.2,
        optim_args="ns_dtype=float32",
    )
    trainer.train()
    chunks = [data[i : i + 4] for i in range(0, 5 * 4 * accumulation, 4)]
    batches = [chunks[i : i + accumulation] for i in range(0, len(chunks), accumulation)]
    want = _reference({"ns_dtype": "float32"}, batches=batches)
    start = weights(tiny.qwen2())
    norms = [x["grad_norm"] for x in trainer.state.log_history if "loss" in x]
    assert min(norms) > 0.2, "clipping must be active for this test to mean anything"
    for name, p in weights(trainer.model).items():
        # Loss averaging over micro-batches rounds differently in the two loops; the rule is the same.
        assert (p - want[name]).norm() <= 1e-4 * (want[name] - start[name]).norm() + 1e-7, name


def test_muon_lr_and_adamw_lr_are_separate_and_both_logged(tmp_path):
    trainer = make(tmp_path, optim_args="muon_lr=4e-3,adamw_lr=1e-3", lr_scheduler_type="linear", max_steps=4)
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert [x["muon/lr"] for x in logs] == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    assert [x["muon/adamw_lr"] for x in logs] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    # The Trainer's own entry is that of the first group, Muon's.
    assert [x["learning_rate"] for x in logs] == pytest.approx([x["muon/lr"] for x in logs])


_SCHEDULER_KWARGS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "polynomial": {"lr_end": 1e-7},
}


@pytest.mark.parametrize("kind", [s.value for s in SchedulerType])
def test_two_learning_rates_survive_every_scheduler(tmp_path, kind):
    options = {"eval_strategy": "steps", "eval_steps": 1} if kind in ("reduce_lr_on_plateau", "greedy") else {}
    trainer = make(
        tmp_path,
        optim_args="muon_lr=4e-3,adamw_lr=1e-3",
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=_SCHEDULER_KWARGS.get(kind),
        warmup_steps=0 if options or kind == "constant" else 1,
        max_steps=4,
        eval_data=tiny.tokens(rows=4, seed=1) if options else None,
        **options,
    )
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert len(logs) == 4
    for x in logs:
        if kind == "polynomial":  # its floor lr_end is absolute, the same for both groups
            assert x["muon/lr"] >= x["muon/adamw_lr"]
        else:
            assert x["muon/lr"] == pytest.approx(4 * x["muon/adamw_lr"], rel=1e-6), kind


def test_no_decay_option_is_the_trainers_own_rule(tmp_path):
    trainer = make(tmp_path, model=tiny.qwen2(tie_word_embeddings=False), optim_args="decay_norms_and_biases=false")
    trainer.create_optimizer()
    names = {p: n for n, p in trainer.model.named_parameters()}
    decayed = {names[p] for g in trainer.optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    assert decayed == set(trainer.get_decay_parameter_names(trainer.model))
    paper = make(tmp_path)
    paper.create_optimizer()
    assert all(g["weight_decay"] == 0.1 for g in paper.optimizer.param_groups)


@pytest.mark.parametrize("pure", [False, True])
def test_bf16_autocast_and_pure_bf16_weights(tmp_path, pure):
    model = tiny.qwen2().to(torch.bfloat16) if pure else tiny.qwen2()
    trainer = make(tmp_path, model=model, bf16=not pure, max_steps=60, learning_rate=1e-2, lr_scheduler_type="constant")
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert logs[-1]["loss"] < 0.7 * logs[0]["loss"]
    muon = trainer.optimizer.optimizer
    assert all(muon.state[p]["momentum_buffer"].dtype == torch.float32 for p in muon.param_groups[0]["params"])
    assert all(p.dtype == (torch.bfloat16 if pure else torch.float32) for p in trainer.model.parameters())


def test_gradient_checkpointing_changes_nothing(tmp_path):
    results = []
    for on in (False, True):
        trainer = make(tmp_path, gradient_checkpointing=on)
        trainer.train()
        results.append(weights(trainer.model))
    assert same(*results)


def test_torch_compile(tmp_path):
    # The "eager" backend goes through the Trainer's whole compile path (wrapping, state dicts, names) without a C++
    # compiler; what the compiled graph computes is torch's business.
    results = []
    for on in (False, True):
        trainer = make(tmp_path, torch_compile=on, torch_compile_backend="eager" if on else None)
        trainer.train()
        results.append(weights(trainer.model))
    start = weights(tiny.qwen2())
    for name in results[0]:
        assert (results[0][name] - results[1][name]).norm() <= 1e-3 * (results[0][name] - start[name]).norm() + 1e-7


class _PoisonOnce(TrainerCallback):
    """Put a NaN into one gradient at the second step, as a bad batch would."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = math.nan


def test_a_nan_gradient_is_skipped_counted_and_training_goes_on(tmp_path):
    trainer = make(tmp_path, max_grad_norm=0.0)
    trainer.add_callback(_PoisonOnce())
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert [x["muon/skipped_steps"] for x in logs] == [0, 1, 1, 1, 1]
    assert logs[-1]["muon/skipped_matrices"] == 1
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert all(math.isfinite(x["loss"]) for x in logs)


class _PoisonForward(TrainerCallback):
    """A NaN in the loss of the third step, with the Trainer's default clipping."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.handle = None
        if state.global_step == 2:
            layer = model.model.layers[0]
            self.handle = layer.register_forward_hook(lambda m, i, o: (o[0] if isinstance(o, tuple) else o) * math.nan)

    def on_step_end(self, args, state, control, **kwargs):
        if self.handle is not None:
            self.handle.remove()


def test_a_nan_loss_under_default_clipping_is_survived(tmp_path):
    trainer = make(tmp_path)
    trainer.add_callback(_PoisonForward())
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert [x["muon/skipped_steps"] for x in logs] == [0, 0, 1, 1, 1]
    assert ["muon/update_rms" in x for x in logs] == [True, True, False, True, True]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_hook_for_subclasses_and_factory_equal_the_name(tmp_path):
    class Mine(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = hf_muon.create_optimizer(self.model, self.args)
            return self.optimizer

    by_name = make(tmp_path)
    by_hook = make(tmp_path, cls=Mine, optim="adamw_torch")
    by_factory = Trainer(
        model=tiny.qwen2(),
        args=by_name.args,
        train_dataset=tiny.tokens(),
        optimizer_cls_and_kwargs=(MuonFactory, {"lr": 2e-3, "weight_decay": 0.1}),
    )
    for trainer in (by_name, by_hook, by_factory):
        trainer.train()
    assert same(weights(by_name.model), weights(by_hook.model))
    assert same(weights(by_name.model), weights(by_factory.model))


def test_factory_refuses_unknown_options():
    with pytest.raises(ValueError, match="momentun.*momentum, nesterov"):
        MuonFactory()(tiny.qwen2(), lr=1e-3, momentun=0.9)


def test_frozen_models_are_refused_with_a_remedy(tmp_path):
    model = tiny.qwen2().requires_grad_(False)
    with pytest.raises(ValueError, match="(?i)frozen|trainable"):
        make(tmp_path, model=model).create_optimizer()


def test_fsdp_version_1_is_refused_before_training(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RuntimeError, match="fsdp_version: 2"):
        MuonFactory()(tiny.qwen2(), lr=1e-3)
    monkeypatch.setenv("FSDP_VERSION", "2")
    MuonFactory()(tiny.qwen2(), lr=1e-3)


def test_resume_with_fused_experts_is_bit_exact(tmp_path):
    # transformers saves experts one by one, and its Trainer would not find them again under the fused name.
    def run(folder, steps, resume=None):
        model = scenarios.model("moe", "float32")
        trainer = make(tmp_path / folder, model=model, max_steps=steps, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=resume)
        return dict(trainer.model.named_parameters())

    whole = run("whole", 6)
    resumed = run("parts", 6, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(resumed[name], p) for name, p in whole.items())


def test_the_best_model_is_loaded_with_its_fused_experts(tmp_path):
    # The first of three is made the best, so that the experts of the last step would be seen.
    trainer = make(
        tmp_path, model=scenarios.model("moe", "float32"), eval_data=tiny.tokens(rows=8, seed=1), max_steps=3,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=2e-2,
    )  # fmt: skip
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert max(losses) == losses[0] == trainer.evaluate()["eval_loss"]
    best = trainer.model.from_pretrained(tmp_path / "checkpoint-1")
    assert same(weights(trainer.model), weights(best))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(tmp_path, dtype):
    def run(folder, steps, resume=False):
        trainer = make(
            tmp_path / folder,
            model=tiny.qwen2().to(dtype),
            max_steps=steps,
            save_strategy="steps",
            save_steps=3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=2,
        )
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer

    whole = run("whole", 6)
    run("parts", 3)
    resumed = run("parts", 6, resume=True)
    assert resumed.state.global_step == 6
    assert same(weights(whole.model), weights(resumed.model))
    a, b = (t.optimizer.optimizer.state_dict()["state"] for t in (whole, resumed))
    assert all(torch.equal(v, b[i][k]) and v.dtype == b[i][k].dtype for i, s in a.items() for k, v in s.items())


def test_resuming_an_adamw_checkpoint_is_a_clear_error(tmp_path):
    make(tmp_path, optim="adamw_torch", max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="another optimizer's.*fresh"):
        make(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("lora", ["both", "B"])
def test_lora(tmp_path, lora):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.qwen2(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    start = weights(model)
    trainer = make(tmp_path, model=model, optim_args=f"lora={lora}", learning_rate=1e-2)
    trainer.train()
    names = {p: n for n, p in trainer.model.named_parameters()}
    muon = {names[p] for p in trainer.optimizer.optimizer.param_groups[0]["params"]}
    assert all("lora_B" in n or (lora == "both" and "lora_A" in n) for n in muon)
    assert len(muon) == (28 if lora == "both" else 14)
    after = weights(trainer.model)
    assert all(torch.equal(after[n], start[n]) == ("lora" not in n) for n in start)
