"""Pretrain a causal language model on packed text with any optimizer of the Trainer, ``optim="muon"`` among them.

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/pretrain.py \
        --config recipes/offline/pretrain/config_muon.yaml [--learning_rate 4e-3 ...]

Texts are tokenized, joined with a separator and cut into blocks of ``block_size`` tokens, once: ``datasets`` caches it.
``lr_stages`` and ``batch_ramp`` replace the Trainer's schedule by one counted in tokens, to be entered anywhere;
``dataset_streaming`` then packs while it trains. ``continue_from`` goes on from another run's checkpoint, with its
optimizer state or without.
A killed run goes on from its last checkpoint when started again with the same ``output_dir``.
"""

from __future__ import annotations

import hf_muon  # isort: skip  (first: the parser reads the optimizer names when it is built)

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from cards import OptimizerCard
from continuation import Shuffled, Streamed, TokenArguments, TokenTrainer, make_run
from datasets import Dataset, IterableDataset, load_dataset
from datasets.utils import tqdm
from lifecycle import model_source, progress_bars, train_and_report
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from trl import TrlParser
from watching import WatchArguments

from hf_muon.integrations.continuation import CarryOptimizerState
from hf_muon.integrations.moe import ExpertBalanceCallback
from hf_muon.moonlight.schedules import Run, parse_tokens


@dataclass
class PretrainArguments(WatchArguments):
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
    model_subfolder: str | None = field(
        default=None, metadata={"help": "Folder in it that holds the model: Moonlight_hf_step_42000."}
    )
    continue_from: str | None = field(
        default=None, metadata={"help": "Checkpoint of another run: start from its weights and its optimizer state."}
    )
    carry_optimizer: bool = field(
        default=True, metadata={"help": "False: continue_from gives the weights, and the optimizer's state is fresh."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Start from random weights of this config."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to that config: num_hidden_layers=4,hidden_size=128"}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the model's or the config's."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the tokenizer's own code. The model is always one of transformers."}
    )
    dtype: str = field(default="float32", metadata={"help": "Dtype of the weights: float32, bfloat16 or auto."})
    attn_implementation: str | None = field(default=None, metadata={"help": "For instance flash_attention_2."})
    spectra_steps: int | None = field(
        default=None, metadata={"help": "Log SVD entropy, stable rank and spectral norm by group, every so many steps."}
    )

    def __post_init__(self) -> None:
        if sum(map(bool, (self.model_name_or_path, self.continue_from, self.config_name))) != 1:
            raise ValueError(
                "give one of model_name_or_path (trained weights), continue_from (those of a checkpoint of ours) and "
                "config_name (random weights)"
            )
        if self.model_subfolder and not self.model_name_or_path:
            raise ValueError("model_subfolder is a folder in model_name_or_path: give both")
        if self.config_overrides and self.config_name is None:
            raise ValueError("config_overrides changes a config: use it with config_name")
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {self.block_size}")

    def start(self) -> str:
        """What a model card says that training starts from."""
        if self.model_name_or_path:
            return "/".join(filter(None, (self.model_name_or_path, self.model_subfolder)))
        if self.continue_from:
            return f"{self.continue_from} with {'its' if self.carry_optimizer else 'fresh'} optimizer state"
        changes = f" with {self.config_overrides}" if self.config_overrides else ""
        return f"random weights ({self.config_name}{changes})"

    def weights(self) -> str | None:
        """Folder or hub name of the weights to start from, if they are not random."""
        if self.model_name_or_path:
            return model_source(self.model_name_or_path, self.model_subfolder, self.model_revision)
        return self.continue_from


def make_parser() -> TrlParser:
    """The parser of this script; the tests read every recipe with it."""
    return TrlParser((PretrainArguments, TokenArguments, TrainingArguments))


def build_model(arguments: PretrainArguments, seed: int) -> Any:
    """Load the weights, or draw them from ``seed``."""
    options: dict[str, Any] = {"dtype": arguments.dtype, "attn_implementation": arguments.attn_implementation}
    source = arguments.weights()
    if source:
        return AutoModelForCausalLM.from_pretrained(source, revision=arguments.model_revision, **options)
    config = AutoConfig.from_pretrained(arguments.config_name, revision=arguments.model_revision)
    if arguments.config_overrides:
        config.update_from_string(arguments.config_overrides)
    set_seed(seed)  # the weights are the same on every rank and for every optimizer
    return AutoModelForCausalLM.from_config(config, **options)


def load_blocks(arguments: PretrainArguments, tokenizer: Any, streaming: bool = False) -> dict[str, Any]:
    """Both splits as blocks of ``block_size`` tokens; a streamed training split is cut while it is read."""
    raw = load_dataset(arguments.dataset_name, name=arguments.dataset_config, streaming=streaming)
    if arguments.dataset_train_split not in raw:
        raise ValueError(f"{arguments.dataset_name} has no split {arguments.dataset_train_split!r}: {sorted(raw)}")
    wanted = {"train": arguments.dataset_train_split, "test": arguments.dataset_test_split}
    blocks = {
        name: _cut(raw[split], arguments, tokenizer, name).with_format("torch")
        for name, split in wanted.items()
        if split in raw
    }
    limit = arguments.max_test_blocks
    if streaming and "test" in blocks:
        if not limit:
            raise ValueError("a streamed test split has no known end: set max_test_blocks")
        taken = list(tqdm(blocks["test"].take(limit), total=limit, desc="cutting test into blocks"))
        blocks["test"] = Dataset.from_list(taken).with_format("torch")
    elif limit and len(blocks.get("test", ())) > limit:
        # Evenly spread: the first blocks would all be from a few files.
        stride = len(blocks["test"]) / limit
        blocks["test"] = blocks["test"].select([int(i * stride) for i in range(limit)])
    return blocks


def _cut(split: Any, arguments: PretrainArguments, tokenizer: Any, name: str) -> Any:
    columns = split.column_names or list(next(iter(split)))
    if arguments.dataset_text_field not in columns:
        raise ValueError(f"no column {arguments.dataset_text_field!r} among {columns}: set dataset_text_field")
    separator = arguments.document_separator or tokenizer.eos_token
    separator_id = tokenizer.get_vocab().get(separator)
    if separator_id is None:
        raise ValueError(f"document_separator {separator!r} is no token of {tokenizer.name_or_path}")
    options: dict[str, Any] = {
        "batched": True,  # one batch is 1000 texts: only the last tokens of each thousand are lost
        "remove_columns": columns,
        "fn_kwargs": {
            "tokenizer": tokenizer,
            "column": arguments.dataset_text_field,
            "separator_id": separator_id,
            "block_size": arguments.block_size,
        },
    }
    if isinstance(split, IterableDataset):
        return split.map(cut_into_blocks, **options)
    blocks = split.map(
        cut_into_blocks, num_proc=arguments.dataset_num_proc, desc=f"cutting {name} into blocks", **options
    )
    if len(blocks) == 0:
        raise ValueError(f"the {name} split has fewer than block_size={arguments.block_size} tokens")
    return blocks


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


def make_callbacks(arguments: PretrainArguments, tokens: TokenArguments, model: Any, run: Run | None) -> list[Any]:
    """Taking over an optimizer's state, balancing experts, spectra and watching, as far as the options ask for them."""
    callbacks: list[Any] = arguments.watchers()
    if arguments.continue_from and arguments.carry_optimizer:
        callbacks.append(CarryOptimizerState(arguments.continue_from))
    if tokens.expert_bias_rate is not None:
        rate, until = tokens.expert_bias_rate, tokens.expert_bias_until
        last = parse_tokens(until) if until else None
        callbacks.append(
            ExpertBalanceCallback(model, lambda step: 0.0 if last and run and run.tokens(step) >= last else rate)
        )
    if arguments.spectra_steps is not None:
        callbacks.append(hf_muon.SpectraCallback(model, arguments.spectra_steps))
    return callbacks


class PretrainTrainer(OptimizerCard, Trainer):
    """The Trainer, whose model card names the optimizer."""


def make_trainer(
    arguments: PretrainArguments, tokens: TokenArguments, args: TrainingArguments, model: Any, tokenizer: Any
) -> Trainer:
    """The Trainer, on its own schedule or on one in tokens; says what it will do."""
    run = make_run(tokens, args, arguments.block_size) if tokens.lr_stages else None
    with args.main_process_first(desc="tokenizing"):
        blocks = load_blocks(arguments, tokenizer, tokens.dataset_streaming)
    options: dict[str, Any] = {
        "model": model,
        "args": args,
        "eval_dataset": blocks.get("test"),
        "data_collator": collate,
        "processing_class": tokenizer,
        "callbacks": make_callbacks(arguments, tokens, model, run),
        "base": arguments.start(),
        "data": [arguments.dataset_name],
    }
    if run is None:
        trainer: Trainer = PretrainTrainer(train_dataset=blocks["train"], **options)
        sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        batch = f"{sequences * arguments.block_size:,} tokens per step"
    else:
        source = Streamed(blocks["train"]) if tokens.dataset_streaming else Shuffled(blocks["train"], args.seed)
        skip = parse_tokens(tokens.skip_tokens) // arguments.block_size
        options |= {"skip": skip, "decay_everything": tokens.decay_everything, "schedule": tokens.described()}
        trainer = TokenTrainer(run=run, source=source, **options)
        batch = f"schedule from {run.tokens(0):,} to {run.tokens(args.max_steps):,} tokens in {args.max_steps:,} steps"
    size = "a stream of" if tokens.dataset_streaming else f"{len(blocks['train']):,}"
    trainer.accelerator.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; {size} blocks of {arguments.block_size} tokens, "
        f"{batch}; optim={args.optim.value}"
    )
    return trainer


def prepare(line: list[str] | None = None) -> Trainer:
    """A Trainer from the words of a command line, those of this process by default."""
    arguments, tokens, training_args = make_parser().parse_args_and_config(line)
    progress_bars(training_args)
    source = arguments.tokenizer_name or arguments.weights() or arguments.config_name
    tokenizer = AutoTokenizer.from_pretrained(
        source, revision=arguments.model_revision, trust_remote_code=arguments.trust_remote_code
    )
    model = build_model(arguments, training_args.seed)
    return make_trainer(arguments, tokens, training_args, model, tokenizer)


if __name__ == "__main__":
    train_and_report(prepare())
