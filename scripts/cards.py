"""What ``README.md`` beside a trained model says of its training: ``class Mine(OptimizerCard, Trainer)``.

The card is the Trainer's own or TRL's, whenever it is written (TRL does at every checkpoint), with one more section:
optimizer and every setting of its update, start, data, held-out loss.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard
from lifecycle import held_out_losses

import hf_muon
from hf_muon.config import UPDATE_KEYS
from hf_muon.integrations.registry import NAMES
from hf_muon.integrations.trainer import find_muon

logger = logging.getLogger("hf_muon")

# How both templates begin; they know neither a local base model nor the data ("a fine-tuned version of None").
FIRST_SENTENCE = re.compile(r"^This model (?:is a fine-tuned version of|was trained from scratch on) .*$", re.M)
SECTION = "## Training procedure"
# How the work is shared out; the update is the same.
NOT_OF_THE_UPDATE = ("share_newton_schulz", "exchange_bytes")


class OptimizerCard:
    """For any Trainer; a card that cannot be written is a warning and never ends a run.

    Args:
        base: the model that training starts from, as the card should name it.
        data: what it is trained on, likewise; names of hub repositories among them are linked.
        schedule: instead of the Trainer's own.
    """

    def __init__(
        self, *args: Any, base: str, data: Sequence[str], schedule: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.base, self.data, self.schedule = base, list(data), schedule
        # Before an engine takes the parameters apart.
        self.shares = _shares(self.model, self.args)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer, with a section of ours; on the main process alone."""
        if not self.is_world_process_zero():
            return
        try:
            if not args:
                kwargs.setdefault("model_name", Path(self.args.hub_model_id or self.args.output_dir).name)
            super().create_model_card(*args, **kwargs)
            self._complete(Path(self.args.output_dir) / "README.md")
        except Exception as error:
            logger.warning("the model card was not written or lacks the optimizer: %r", error)

    def _complete(self, file: Path) -> None:
        card = ModelCard.load(file)
        # The hub refuses a card whose metadata name anything but its own repositories.
        card.data.base_model = self.base if _on_hub(self.base) else None
        card.data.datasets = [name for name in self.data if _on_hub(name)] or None
        if hasattr(self.model, "peft_config"):
            card.data.library_name = "peft"
        data = ", ".join(_link(name, "datasets/") for name in self.data)
        text = FIRST_SENTENCE.sub(lambda _: f"Trained from {_link(self.base)} on {data}.", card.text, count=1)
        text = text.replace('model="None"', f'model="{self.args.output_dir}"')  # TRL's example, when nothing is pushed
        before, heading, after = text.partition(SECTION)
        section = "## Optimizer\n\n| | |\n|---|---|\n" + "".join(f"| {k} | {v} |\n" for k, v in facts(self).items())
        card.text = f"{before.rstrip()}\n\n{section}\n{heading}{after}"
        card.save(file)


def _on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _link(name: str, folder: str = "") -> str:
    return f"[{name}](https://huggingface.co/{folder}{name})" if _on_hub(name) else name


def _shares(model: Any, args: Any) -> dict[str, str]:
    """How many parameters which algorithm trains."""
    if args.optim.value not in NAMES:
        count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        return {f"trained by {args.optim.value}": f"{count:,} parameters, all that are trained"}
    config = hf_muon.MuonConfig.from_optim_args(args.optim_args)
    report = hf_muon.explain(model, config, file=io.StringIO())
    total = max(report.numel(), 1)
    return {
        f"trained by {label}": f"{report.numel(name):,} parameters ({report.numel(name) / total:.1%})"
        for name, label in (("muon", "Muon"), ("adamw", "AdamW"))
    }


def facts(trainer: Any) -> dict[str, Any]:
    """The rows of the section."""
    args, losses = trainer.args, held_out_losses(trainer.state, trainer.args)
    rows: dict[str, Any] = {"starts from": trainer.base, "data": ", ".join(trainer.data)}
    if losses:
        rows["held-out loss"] = f"{losses.after:.4f} after {losses.step:,} steps"
        rows["held-out loss"] += "" if math.isnan(losses.before) else f", {losses.before:.4f} before training"
    ours = args.optim.value in NAMES
    name = "Muon, and AdamW for what is no hidden matrix" if ours else args.optim.value
    rows |= {"algorithm": f"{name} (hf_muon {hf_muon.__version__}, transformers {transformers.__version__})"}
    rows |= trainer.shares | schedule(trainer)
    rows |= muon_settings(trainer) if ours else {"optim_args": args.optim_args or "none"}
    rows |= {"AdamW betas, eps": f"{args.adam_beta1:g}, {args.adam_beta2:g}, {args.adam_epsilon:g}"}
    dtypes = {str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters() if p.requires_grad}
    rows["precision"] = "trained weights " + " and ".join(sorted(dtypes))
    rows["precision"] += ", bf16 arithmetic" if args.bf16 else ", fp16 arithmetic" if args.fp16 else ""
    return rows | {"max_grad_norm": args.max_grad_norm, "seed": args.seed}


def schedule(trainer: Any) -> dict[str, Any]:
    """Learning rate, decay and batch over the run."""
    args = trainer.args
    rows: dict[str, Any] = {"learning rate": f"{args.learning_rate:g}", "weight decay": f"{args.weight_decay:g}"}
    if args.optim.value not in NAMES and not getattr(trainer, "decay_everything", False):
        rows["weight decay"] += ", not of norms and biases"
    if trainer.schedule:
        return rows | trainer.schedule | {"steps": f"{trainer.state.max_steps:,}"}
    rows["schedule"] = args.lr_scheduler_type.value
    if args.lr_scheduler_kwargs:
        rows["schedule"] += ", " + ", ".join(f"{key} {value}" for key, value in args.lr_scheduler_kwargs.items())
    if args.warmup_steps:
        rows["schedule"] += f", warmup_steps {args.warmup_steps:g}"
    sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return rows | {"steps": f"{trainer.state.max_steps:,} of {sequences:,} sequences"}


def muon_settings(trainer: Any) -> dict[str, Any]:
    """Every option of the update: those of the optimizer that has trained, where a checkpoint's won, else the run's."""
    config = hf_muon.MuonConfig.from_optim_args(trainer.args.optim_args)
    rows = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in NOT_OF_THE_UPDATE}
    for key in ("muon_lr", "adamw_lr"):
        rows[key] = trainer.args.learning_rate if rows[key] is None else rows[key]
    muon = find_muon(trainer.optimizer)
    for group in muon.param_groups if muon is not None else ():
        rows[f"{group['algorithm']}_lr"] = group.get("initial_lr", group["lr"])
        if group["algorithm"] == "muon":
            rows |= {key: group[key] for key in UPDATE_KEYS} | {"weight decay": f"{group['weight_decay']:g}"}
    rows = {key: "off" if value is None else value for key, value in rows.items()}
    return {key: "; ".join(value) or "none" if key in ("include", "exclude") else value for key, value in rows.items()}
