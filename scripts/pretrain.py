"""Pretrain a causal language model on packed text with any optimizer of the Trainer, ``optim="muon"`` among them.

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/pretrain.py \
        --config recipes/offline/pretrain/config_muon.yaml [--learning_rate 4e-3 ...]

Texts are tokenized, joined with a separator and cut into blocks of ``block_size`` tokens, once: ``datasets`` caches it.
A killed run goes on from its last checkpoint when started again with the same ``output_dir``.
"""

from __future__ import annotations

import hf_muon  # noqa: F401  # isort: skip  (first: the parser reads the optimizer names when it is built)

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from lifecycle import train_and_report
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from trl import TrlParser


@dataclass
class PretrainArguments:
    """Model and data; the names are those of TRL and of transformers' language-modeling examples."""

    dataset_name: str = field(metadata={"help": "Hub name, or a folder with train.jsonl and test.jsonl."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on, if there is one."})
    dataset_text_field: str = field(default="text", metadata={"help": "Column with the text."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes for tokenizing."})
    block_size: int = field(default=1024, metadata={"help": "Tokens per training example."})
    document_separator: str | None = field(
        default=None, metadata={"help": "Token between documents; default: the tokenizer's eos token."}
    )
    max_test_blocks: int | None = field(default=None, metadata={"help": "Evaluate on this many blocks only."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Weights to start from."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    config_name: str | None = field(default=None, metadata={"help": "Start from random weights of this config."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to that config: num_hidden_layers=4,hidden_size=128"}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the model's or the config's."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the weights: float32, bfloat16 or auto."})
    attn_implementation: str | None = field(default=None, metadata={"help": "For instance flash_attention_2."})

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.config_name is None):
            raise ValueError("give one of model_name_or_path (trained weights) and config_name (random weights)")
        if self.config_overrides and self.config_name is None:
            raise ValueError("config_overrides changes a config: use it with config_name")
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {self.block_size}")


def make_parser() -> TrlParser:
    """The parser of this script; the tests read every recipe with it."""
    return TrlParser((PretrainArguments, TrainingArguments))


def build_model(arguments: PretrainArguments, seed: int) -> Any:
    """Load the weights, or draw them from ``seed``."""
    options: dict[str, Any] = {"dtype": arguments.dtype, "attn_implementation": arguments.attn_implementation}
    if arguments.model_name_or_path:
        return AutoModelForCausalLM.from_pretrained(
            arguments.model_name_or_path, revision=arguments.model_revision, **options
        )
    config = AutoConfig.from_pretrained(arguments.config_name, revision=arguments.model_revision)
    if arguments.config_overrides:
        config.update_from_string(arguments.config_overrides)
    set_seed(seed)  # the weights are the same on every rank and for every optimizer
    return AutoModelForCausalLM.from_config(config, **options)


def load_blocks(arguments: PretrainArguments, tokenizer: Any) -> DatasetDict:
    """Both splits as blocks of ``block_size`` tokens."""
    raw = load_dataset(arguments.dataset_name, name=arguments.dataset_config)
    if arguments.dataset_train_split not in raw:
        raise ValueError(f"{arguments.dataset_name} has no split {arguments.dataset_train_split!r}: {sorted(raw)}")
    wanted = {"train": arguments.dataset_train_split, "test": arguments.dataset_test_split}
    blocks = DatasetDict()
    for name, split in wanted.items():
        if split in raw:
            blocks[name] = _cut(raw[split], arguments, tokenizer, name)
    if arguments.max_test_blocks and len(blocks.get("test", ())) > arguments.max_test_blocks:
        # Evenly spread: the first blocks would all be from a few files.
        stride = len(blocks["test"]) / arguments.max_test_blocks
        blocks["test"] = blocks["test"].select([int(i * stride) for i in range(arguments.max_test_blocks)])
    return blocks


def _cut(split: Dataset, arguments: PretrainArguments, tokenizer: Any, name: str) -> Dataset:
    if arguments.dataset_text_field not in split.column_names:
        raise ValueError(
            f"no column {arguments.dataset_text_field!r} among {split.column_names}: set dataset_text_field"
        )
    separator = arguments.document_separator or tokenizer.eos_token
    separator_id = tokenizer.get_vocab().get(separator)
    if separator_id is None:
        raise ValueError(f"document_separator {separator!r} is no token of {tokenizer.name_or_path}")
    blocks = split.map(
        cut_into_blocks,
        batched=True,  # one batch is 1000 texts: only the last tokens of each thousand are lost
        remove_columns=split.column_names,
        num_proc=arguments.dataset_num_proc,
        desc=f"cutting {name} into blocks",
        fn_kwargs={
            "tokenizer": tokenizer,
            "column": arguments.dataset_text_field,
            "separator_id": separator_id,
            "block_size": arguments.block_size,
        },
    )
    if len(blocks) == 0:
        raise ValueError(f"the {name} split has fewer than block_size={arguments.block_size} tokens")
    return blocks.with_format("torch")


def cut_into_blocks(
    batch: dict[str, list[str]], *, tokenizer: Any, column: str, separator_id: int, block_size: int
) -> dict[str, list[list[int]]]:
    """Tokenize, put the separator behind every text, join, and cut; an incomplete last block is dropped."""
    encoded = tokenizer(batch[column], add_special_tokens=False, return_attention_mask=False, verbose=False)
    stream = list(chain.from_iterable(ids + [separator_id] for ids in encoded["input_ids"]))
    return {"input_ids": list(_pieces(stream, block_size))}


def _pieces(stream: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(stream) - size + 1, size):
        yield stream[start : start + size]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack blocks. Every token is a target: a collator that masks padding would also mask the separator."""
    tokens = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "labels": tokens.clone()}


def main() -> None:
    """Parse, build, train."""
    arguments, training_args = make_parser().parse_args_and_config()
    source = arguments.tokenizer_name or arguments.model_name_or_path or arguments.config_name
    tokenizer = AutoTokenizer.from_pretrained(source, revision=arguments.model_revision)
    model = build_model(arguments, training_args.seed)
    with training_args.main_process_first(desc="tokenizing"):
        blocks = load_blocks(arguments, tokenizer)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks["train"],
        eval_dataset=blocks.get("test"),
        data_collator=collate,
        processing_class=tokenizer,
    )
    per_step = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
    trainer.accelerator.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(blocks['train']):,} blocks of "
        f"{arguments.block_size} tokens, {per_step * arguments.block_size:,} tokens per step; "
        f"optim={training_args.optim.value}"
    )
    train_and_report(trainer)


if __name__ == "__main__":
    main()
