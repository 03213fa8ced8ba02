"""Supervised fine-tuning with TRL's SFTTrainer and any optimizer of the Trainer, ``optim="muon"`` among them.

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/sft.py \
        --config recipes/offline/sft/config_muon.yaml [--learning_rate 1e-3 ...]

Data: ``dataset_name`` (a hub name, or a folder with train.jsonl and test.jsonl), or TRL's ``datasets:`` mixture, where
``path: json`` with ``data_files`` reads local files. Conversations in ``messages`` that are malformed or do not fit
``max_length`` are left out and reported in ``bad_rows.jsonl`` (``bad_rows: refuse`` stops at malformed ones;
``drop_overlong: false`` lets TRL cut what does not fit, end token included). A killed run goes on from its last
checkpoint when started again with the same ``output_dir``.
"""

from __future__ import annotations

import hf_muon  # noqa: F401  # isort: skip  (first: the parser reads the optimizer names when it is built)

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cards import OptimizerCard
from conversations import Reporter, Rules, check, has_messages, keep_good, load
from datasets import Dataset
from lifecycle import model_source, progress_bars, train_and_report
from transformers import AutoTokenizer, set_seed
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from watching import WatchArguments


@dataclass
class SFTScriptArguments(WatchArguments, ScriptArguments):
    """TRL's script arguments and some of ours."""

    drop_overlong: bool = field(
        default=True,
        metadata={"help": "Leave out conversations longer than max_length: cut, they would lack their end token."},
    )
    bad_rows: str = field(
        default="skip",
        metadata={"help": "Malformed conversations: leave them out (skip), or stop before training (refuse)."},
    )
    max_turn_characters: int = field(
        default=100_000, metadata={"help": "A turn of as many characters makes a conversation malformed."}
    )
    held_out: int | None = field(
        default=None,
        metadata={"help": "Evaluate on this many rows of the test split or, without one, taken from the training one."},
    )

    model_subfolder: str | None = field(
        default=None, metadata={"help": "Folder in the model's that holds it: Moonlight_hf_step_42000."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the model's own folder."})

    def __post_init__(self) -> None:
        if self.bad_rows not in ("skip", "refuse"):
            raise ValueError(f"bad_rows={self.bad_rows!r} must be skip or refuse")
        if self.held_out is not None and (self.held_out < 1 or self.dataset_streaming):
            raise ValueError(f"held_out={self.held_out} must be at least 1, and a streamed dataset cannot be split")


def make_parser() -> TrlParser:
    """The parser of this script; the tests read every recipe with it."""
    return TrlParser((SFTScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))


def load_splits(script_args: SFTScriptArguments, mixture: DatasetMixtureConfig, seed: int) -> tuple[Any, Any | None]:
    """Training split, and the held-out split if there is one."""
    if bool(mixture.datasets) == bool(script_args.dataset_name):
        raise ValueError("give one of dataset_name and datasets (a mixture)")
    if mixture.datasets:
        set_seed(seed)  # TRL draws the test split without a seed: every process would have another one
        splits = get_dataset(mixture)
        return splits["train"], splits.get("test")
    splits = load(script_args.dataset_name, script_args.dataset_config, streaming=script_args.dataset_streaming)
    if script_args.dataset_train_split not in splits:
        raise ValueError(
            f"{script_args.dataset_name} has no split {script_args.dataset_train_split!r}, only {sorted(splits)}: "
            "set dataset_train_split"
        )
    return splits[script_args.dataset_train_split], splits.get(script_args.dataset_test_split)


def load_tokenizer(args: SFTConfig, model_args: ModelConfig, name: str | None = None) -> Any:
    """The model's tokenizer or that of ``name``, with the chat template that the run asks for."""
    tokenizer = AutoTokenizer.from_pretrained(
        name or model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    if args.assistant_only_loss and not tokenizer.is_fast:
        raise ValueError(
            f"assistant_only_loss needs a fast tokenizer, and {type(tokenizer).__name__} is not: set it to false or "
            "convert the tokenizer"
        )
    return tokenizer


def conversation_rules(script_args: SFTScriptArguments, args: SFTConfig, tokenizer: Any) -> Rules:
    """What a conversation must be like in this run."""
    template = Path(args.chat_template_path) if args.chat_template_path else None
    return Rules(
        tokenizer=tokenizer,
        template=template.read_text(encoding="utf-8") if template and template.is_file() else None,
        max_tokens=args.max_length if script_args.drop_overlong else None,
        max_turn_characters=script_args.max_turn_characters,
    )


def hold_out(train: Dataset, test: Dataset | None, count: int) -> tuple[Dataset, Dataset]:
    """``count`` evenly spread rows to evaluate on: of the test split or, without one, taken out of the training one."""
    source = train if test is None else test
    if test is None and count >= len(train):
        raise ValueError(f"held_out={count} would leave nothing of {len(train)} rows to train on")
    count = min(count, len(source))
    chosen = [i * len(source) // count for i in range(count)]  # no seed: the same rows in every run
    if test is None:
        train = train.select(sorted(set(range(len(train))) - set(chosen)))
    return train, source.select(chosen)


def prepare_splits(
    script_args: SFTScriptArguments, mixture: DatasetMixtureConfig, args: SFTConfig, tokenizer: Any
) -> tuple[Any, Any | None]:
    """Load both splits, check every conversation, and leave out what fails."""
    splits = dict(zip(("train", "test"), load_splits(script_args, mixture, args.seed), strict=True))
    rules = conversation_rules(script_args, args, tokenizer)
    checked = [name for name, split in splits.items() if has_messages(split)]
    for name in checked:
        splits[name] = check(splits[name], rules, processes=args.dataset_num_proc, name=name)
    if script_args.held_out:  # before anything is left out: the same rows whatever max_length is
        checked += ["test"] if checked and splits["test"] is None else []
        splits["train"], splits["test"] = hold_out(splits["train"], splits["test"], script_args.held_out)
    reporter = Reporter(Path(args.output_dir), writes=args.process_index == 0)
    for name in checked:
        splits[name] = keep_good(splits[name], reporter, name=name, refuse=script_args.bad_rows == "refuse")
    return splits["train"], splits["test"]


class FineTuner(OptimizerCard, SFTTrainer):
    """TRL's trainer, whose model card names the optimizer."""


def data_names(script_args: SFTScriptArguments, mixture: DatasetMixtureConfig) -> list[str]:
    """What a model card says of the data."""
    if script_args.dataset_name:
        return [script_args.dataset_name]
    return [str(part.data_files or part.path) for part in mixture.datasets]


def main() -> None:
    """Parse, build, train."""
    script_args, args, model_args, mixture = make_parser().parse_args_and_config()
    progress_bars(args)
    if not model_args.model_name_or_path:
        raise ValueError("model_name_or_path is missing: a hub name or a folder")
    base = "/".join(filter(None, (model_args.model_name_or_path, script_args.model_subfolder)))
    model_args.model_name_or_path = model_source(
        model_args.model_name_or_path, script_args.model_subfolder, model_args.model_revision
    )
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        # Never remote code for the model unless asked; a recipe may allow it for the tokenizer alone.
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }
    tokenizer = load_tokenizer(args, model_args, script_args.tokenizer_name)
    with args.main_process_first(desc="loading the data"):
        train, test = prepare_splits(script_args, mixture, args, tokenizer)
    trainer = FineTuner(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        base=base,
        data=data_names(script_args, mixture),
        callbacks=script_args.watchers(),
    )
    train_and_report(trainer)


if __name__ == "__main__":
    main()
