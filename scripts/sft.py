"""Supervised fine-tuning with TRL's SFTTrainer and any optimizer of the Trainer, ``optim="muon"`` among them.

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/sft.py \
        --config recipes/offline/sft/config_muon.yaml [--learning_rate 1e-3 ...]

Data: ``dataset_name`` (a hub name, or a folder with train.jsonl and test.jsonl), or TRL's ``datasets:`` mixture, where
``path: json`` with ``data_files`` reads local files. Conversations in ``messages`` that do not fit ``max_length`` are
left out (``drop_overlong: false`` lets TRL cut them, end token included). A killed run goes on from its last checkpoint
when started again with the same ``output_dir``.
"""

from __future__ import annotations

import hf_muon  # noqa: F401  # isort: skip  (first: the parser reads the optimizer names when it is built)

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from lifecycle import train_and_report
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


@dataclass
class SFTScriptArguments(ScriptArguments):
    """TRL's script arguments and one of ours."""

    drop_overlong: bool = field(
        default=True,
        metadata={"help": "Leave out conversations longer than max_length: cut, they would lack their end token."},
    )


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
    splits = load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )
    if script_args.dataset_train_split not in splits:
        raise ValueError(
            f"{script_args.dataset_name} has no split {script_args.dataset_train_split!r}, only {sorted(splits)}: "
            "set dataset_train_split"
        )
    return splits[script_args.dataset_train_split], splits.get(script_args.dataset_test_split)


def load_tokenizer(args: SFTConfig, model_args: ModelConfig) -> Any:
    """The model's tokenizer, with the chat template that the run asks for."""
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
    )
    if args.assistant_only_loss and not tokenizer.is_fast:
        raise ValueError(
            f"assistant_only_loss needs a fast tokenizer, and {type(tokenizer).__name__} is not: set it to false or "
            "convert the tokenizer"
        )
    return tokenizer


def drop_overlong(split: Any, tokenizer: Any, args: SFTConfig, name: str) -> tuple[Any, int | None]:
    """The conversations that fit, and how many did not (unknown for a stream)."""
    template = None
    if args.chat_template_path:
        file = Path(args.chat_template_path)
        template = file.read_text(encoding="utf-8") if file.is_file() else None
    options: dict[str, Any] = {"fn_kwargs": {"tokenizer": tokenizer, "template": template, "limit": args.max_length}}
    if isinstance(split, Dataset):
        options |= {"num_proc": args.dataset_num_proc, "desc": f"Dropping what does not fit from {name} dataset"}
        kept = split.filter(fits, **options)
        return kept, len(split) - len(kept)
    return split.filter(fits, **options), None


def fits(row: dict[str, Any], *, tokenizer: Any, template: str | None, limit: int) -> bool:
    """Whether a conversation, special tokens included, has at most ``limit`` tokens."""
    encoded = tokenizer.apply_chat_template(row["messages"], chat_template=template, return_dict=True)
    return len(encoded["input_ids"]) <= limit


def prepare_splits(
    script_args: SFTScriptArguments, mixture: DatasetMixtureConfig, args: SFTConfig, tokenizer: Any
) -> tuple[Any, Any | None]:
    """Load both splits and leave out what does not fit."""
    train, test = load_splits(script_args, mixture, args.seed)
    if not script_args.drop_overlong or args.max_length is None:
        return train, test
    kept = []
    for name, split in (("train", train), ("test", test)):
        if split is not None and "messages" in (split.column_names or []):
            split, dropped = drop_overlong(split, tokenizer, args, name)
            if dropped and args.process_index == 0:
                print(f"{name}: {dropped} conversations longer than {args.max_length} tokens left out of the data")
        kept.append(split)
    return kept[0], kept[1]


def main() -> None:
    """Parse, build, train."""
    script_args, args, model_args, mixture = make_parser().parse_args_and_config()
    if not model_args.model_name_or_path:
        raise ValueError("model_name_or_path is missing: a hub name or a folder")
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        # Never remote code for the model unless asked; a recipe may allow it for the tokenizer alone.
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }
    tokenizer = load_tokenizer(args, model_args)
    with args.main_process_first(desc="loading the data"):
        train, test = prepare_splits(script_args, mixture, args, tokenizer)
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    train_and_report(trainer)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    main()
