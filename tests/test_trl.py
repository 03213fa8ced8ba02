"""TRL's trainers construct, step once with ``optim="muon"``, and log what it did."""

import pytest
import torch
from datasets import Dataset
from transformers import Qwen2ForSequenceClassification

from hf_muon import Muon

from . import tiny

PROMPT = [{"role": "user", "content": "count to three"}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("1 2 3", "no"))


def _options(tmp_path):
    options = dict(max_steps=1, per_device_train_batch_size=2, bf16=False)
    return tiny.arguments(tmp_path, optim_args="muon_lr=2e-3", learning_rate=1e-3, **options)


def _train(trainer):
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, Muon)
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert logs and all(x["muon/lr"] == 2e-3 and x["muon/update_rms"] > 0 for x in logs)
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert any(n.endswith("q_proj.weight") for n in moved)


@pytest.mark.parametrize("assistant_only_loss", [False, True])
def test_sft(tmp_path, assistant_only_loss):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**_options(tmp_path), max_length=64, assistant_only_loss=assistant_only_loss)
    data = Dataset.from_list([{"messages": PROMPT + GOOD}] * 4)
    _train(SFTTrainer(tiny.qwen2(), args=args, train_dataset=data, processing_class=tiny.tokenizer()))


def test_dpo(tmp_path):
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list([{"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}] * 4)
    args = DPOConfig(**_options(tmp_path), max_length=64)
    # Given a reference model, because TRL would look for one by the name of the hub checkpoint.
    _train(
        DPOTrainer(
            tiny.qwen2(), ref_model=tiny.qwen2(), args=args, train_dataset=data, processing_class=tiny.tokenizer()
        )
    )


def test_reward(tmp_path):
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(0)
    model = Qwen2ForSequenceClassification(tiny.config(num_labels=1))
    data = Dataset.from_list([{"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}] * 4)
    args = RewardConfig(**_options(tmp_path), max_length=64)
    trainer = RewardTrainer(model, args=args, train_dataset=data, processing_class=tiny.tokenizer())
    _train(trainer)
    muon = {id(p) for p in trainer.optimizer.optimizer.param_groups[0]["params"]}
    assert id(model.score.weight) not in muon


def test_grpo(tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(**_options(tmp_path), num_generations=2, max_completion_length=8, temperature=1.0, beta=0.0)
    data = Dataset.from_list([{"prompt": PROMPT}] * 4)

    def reward(completions, **kwargs):
        return [float(i % 2) for i, _ in enumerate(completions)]

    trainer = GRPOTrainer(
        tiny.qwen2(), reward_funcs=reward, args=args, train_dataset=data, processing_class=tiny.tokenizer()
    )
    _train(trainer)
