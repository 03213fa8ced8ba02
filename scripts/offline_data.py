"""Build the offline data: ``python scripts/offline_data.py --out data/offline``.

Everything comes from the running Python's standard library, without a download, in under a minute:

    pretrain/{train,test}.jsonl   {"text": ...}, one source file per line
    sft/{train,test}.jsonl        {"id", "messages", "source"}, the schema of allenai/tulu-3-sft-mixture
    benchmarks/offline_choice/    {"question", "choices", "answer"}: held-out questions with four answers each
    model/                        byte-level BPE tokenizer (ChatML) and a small Qwen2 with seeded random weights
    manifest.json                 what was built, with counts; a second run finds it and does nothing

``load_dataset("data/offline/sft")`` reads a folder's two splits, so the recipes name the folders.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stdlib_corpus import SourceFile, conversations, source_files

# Raise it whenever a change here or in stdlib_corpus.py changes what is written.
DATA_VERSION = 2
VOCABULARY = 4096
SEED = 0
# A separator of texts that is not the end of a chat turn, as in Qwen2.5: padding reuses it.
SEPARATOR, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# ChatML. The generation markers are what `assistant_only_loss: true` masks by; the end of turn is inside them, so the
# model learns to stop.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def main() -> None:
    """Build, or find what a finished run has built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/offline"), help="folder to write (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="rebuild even if the folder is complete")
    arguments = parser.parse_args()
    identity = {"data_version": DATA_VERSION, "python": platform.python_version()}
    manifest_file = arguments.out / "manifest.json"
    if not arguments.force and _matches(manifest_file, identity):
        print(f"{arguments.out} is complete (Python {identity['python']}, data version {DATA_VERSION}); nothing to do")
        return
    # The manifest is written last and removed first: a killed run never looks complete.
    manifest_file.unlink(missing_ok=True)
    for folder in ("pretrain", "sft", "benchmarks", "model"):
        shutil.rmtree(arguments.out / folder, ignore_errors=True)
    start = time.perf_counter()
    counts = build(arguments.out)
    manifest_file.write_text(json.dumps({**identity, "counts": counts}, indent=2) + "\n")
    print(f"done in {time.perf_counter() - start:.0f} s: {arguments.out}")


def _matches(manifest_file: Path, identity: dict[str, Any]) -> bool:
    try:
        manifest = json.loads(manifest_file.read_text())
    except (OSError, ValueError):
        return False
    return all(manifest.get(key) == value for key, value in identity.items())


def build(out: Path) -> dict[str, int]:
    """Write all parts below ``out`` and return their counts."""
    files = source_files()
    splits = {"train": [f for f in files if not f.held_out], "test": [f for f in files if f.held_out]}
    counts: dict[str, int] = {}
    for split, members in splits.items():
        counts[f"pretrain_{split}_files"] = _write_lines(
            out / "pretrain" / f"{split}.jsonl", ({"text": file.text} for file in members)
        )
    print(f"[1/4] texts: {counts['pretrain_train_files']} files to train on, {counts['pretrain_test_files']} held out")

    talks = {split: list(_unique(members)) for split, members in splits.items()}
    known = {_answers(row) for row in talks["train"]}
    talks["test"] = [row for row in talks["test"] if _answers(row) not in known]
    for split, rows in talks.items():
        counts[f"sft_{split}_conversations"] = _write_lines(out / "sft" / f"{split}.jsonl", rows)
    questions = list(_questions(talks["test"]))
    counts["questions"] = _write_lines(out / "benchmarks" / "offline_choice" / "test.jsonl", questions)
    print(
        f"[2/4] conversations: {len(talks['train'])} to train on, {len(talks['test'])} held out (other modules), "
        f"{len(questions)} of them as questions with four answers"
    )

    tokenizer = build_tokenizer([file.text for file in splits["train"]], talks["train"])
    for split, members in splits.items():
        counts[f"pretrain_{split}_tokens"] = _count_tokens(tokenizer, [file.text for file in members])
    for split, rows in talks.items():
        texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
        counts[f"sft_{split}_tokens"] = _count_tokens(tokenizer, texts)
    print(
        f"[3/4] tokenizer: {len(tokenizer)} tokens; texts {counts['pretrain_train_tokens']:,} + "
        f"{counts['pretrain_test_tokens']:,} held out, conversations {counts['sft_train_tokens']:,} + "
        f"{counts['sft_test_tokens']:,} held out"
    )
    counts["model_parameters"] = build_model(tokenizer, out / "model")
    print(f"[4/4] model: Qwen2 from config, {counts['model_parameters']:,} parameters, random weights (seed {SEED})")
    return counts


def _unique(files: Iterable[SourceFile]) -> Iterator[dict[str, Any]]:
    """Numbered rows without repetitions: copies of a method (``close``, ``flush``) have the same words."""
    seen: set[str] = set()
    for file in files:
        for number, messages in enumerate(conversations(file)):
            row = {"id": f"stdlib_{file.module}_{number}", "messages": messages, "source": f"python-stdlib/{file.path}"}
            if _answers(row) not in seen:
                seen.add(_answers(row))
                yield row


def _questions(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Questions that are answered in words, with the answers of three others: a guess is right in 25 %."""
    talks = [row["messages"] for row in rows if len(row["messages"]) == 2 and "```" not in _answers(row)]
    for i, (asked, _) in enumerate(talks):
        choices = [talks[(i + k * len(talks) // 4) % len(talks)][1]["content"] for k in range(4)]
        right = i % 4
        choices = choices[-right:] + choices[:-right] if right else choices
        yield {"question": asked["content"], "choices": choices, "answer": right}


def _answers(row: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in row["messages"] if message["role"] == "assistant")


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row) + "\n")
            count += 1
    return count


def build_tokenizer(texts: list[str], rows: list[dict[str, Any]], vocabulary: int = VOCABULARY) -> Any:
    """A byte-level BPE trained on the training split, with ChatML's special tokens and template.

    It is a ``Qwen2Tokenizer``, with that class's own way to cut text into words: ``AutoTokenizer`` loads this class for
    every Qwen2 model whatever was saved, and would cut differently than a tokenizer of our own making was trained to.
    """
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    pattern = Qwen2Tokenizer().backend_tokenizer
    core = Tokenizer(models.BPE())
    core.normalizer, core.pre_tokenizer, core.decoder = pattern.normalizer, pattern.pre_tokenizer, pattern.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR, TURN_START, TURN_END],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts + [_answers(row) for row in rows], trainer=trainer)
    trained = json.loads(core.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        eos_token=TURN_END,
        pad_token=SEPARATOR,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def small_vocabulary(data: Path) -> None:
    """``vocabulary-1024`` in a folder that :func:`build` wrote, once: with 4,096 tokens, tiny models are embeddings."""
    if (data / "vocabulary-1024" / "tokenizer.json").is_file():
        return
    lines = (data / "pretrain" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = build_tokenizer([json.loads(line)["text"] for line in lines], [], vocabulary=1024)
    tokenizer.save_pretrained(data / "vocabulary-1024")


def _count_tokens(tokenizer: Any, texts: list[str]) -> int:
    return sum(len(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch(texts))


def build_model(tokenizer: Any, out: Path) -> int:
    """Save a small Qwen2 (0.79M parameters besides embedding and head) and its tokenizer; return all it has."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(SEED)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,  # as in the 7B and 16B models that the full-size recipes train
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(SEPARATOR),
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model.num_parameters()


if __name__ == "__main__":
    main()
