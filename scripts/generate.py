"""Text from any checkpoint that a recipe made: ``python scripts/generate.py runs/x --chat "Who are you?"``.

``--prompt`` continues a text, as a base model does; ``--chat`` asks in the chat template and prints the answer. Greedy
unless ``--temperature`` is given. Folders of LoRA adapters are read with the base model that they name.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cells import exit_with
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.generation.streamers import BaseStreamer


def main(argv: Sequence[str] | None = None) -> None:
    """Generate once and print."""
    options = make_parser().parse_args(argv)
    model, tokenizer = load(options)
    if options.seed is not None:
        set_seed(options.seed)
    print(generate(model, tokenizer, options))


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that a recipe wrote, or a hub name")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="continue this text")
    what.add_argument("--chat", help="answer this")
    parser.add_argument("--system", help="with --chat: the system's turn")
    parser.add_argument("--chat_template", type=Path, help="with --chat: a .jinja file; default: the tokenizer's own")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top_p", type=float, default=1.0, help="of the probability to sample from (default: all)")
    parser.add_argument("--seed", type=int, help="of the sampling")
    parser.add_argument("--dtype", default="auto", help="default: what the weights were saved in")
    parser.add_argument("--device_map", default="auto", help="cpu, cuda:0, or auto (default): all GPUs")
    parser.add_argument("--tokenizer", help="default: the model's own")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the tokenizer be a repository's own code")
    return parser


class Bar(BaseStreamer):
    """New tokens as a progress bar on a terminal; the text comes when it is whole."""

    def __init__(self, total: int) -> None:
        self.bar = tqdm(total=total, desc="generating", unit=" tokens", disable=None, leave=False)
        self.asked = False

    def put(self, value: torch.Tensor) -> None:
        """One token, after the prompt."""
        self.bar.update(1 if self.asked else 0)
        self.asked = True

    def end(self) -> None:
        """Take the bar away."""
        self.bar.close()


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer; the model is never remote code, which could not have been trained."""
    name = options.tokenizer or options.model
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype, device_map=options.device_map)
    return model.eval(), tokenizer


def encode(tokenizer: Any, options: argparse.Namespace) -> torch.Tensor:
    """The tokens to continue, one row.

    Raises:
        ValueError: an option of ``--chat`` without it, or a tokenizer that has no template.
    """
    if options.chat is None:
        if options.system is not None or options.chat_template is not None:
            raise ValueError("--system and --chat_template belong to --chat")
        return tokenizer(options.prompt, return_tensors="pt")["input_ids"]
    template = options.chat_template.read_text(encoding="utf-8") if options.chat_template else tokenizer.chat_template
    if not template:
        raise ValueError("the tokenizer has no chat template: give one with --chat_template")
    talk = [{"role": "system", "content": options.system}] if options.system is not None else []
    talk.append({"role": "user", "content": options.chat})
    return tokenizer.apply_chat_template(
        talk, chat_template=template, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def stops(model: Any, tokenizer: Any, *, chat: bool) -> list[int]:
    """The tokens that end a text: the model's and the tokenizer's, and for a chat the known ends of a turn.

    A base checkpoint often names only its end of text, and would go on to ask itself the next question.
    """
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ends = [*ends, tokenizer.eos_token_id]
    if chat:
        vocabulary = tokenizer.get_vocab()
        ends += [vocabulary.get(text) for text in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")]
    return sorted({end for end in ends if end is not None})


def generate(model: Any, tokenizer: Any, options: argparse.Namespace) -> str:
    """The new text alone, without the token that ended it."""
    tokens = encode(tokenizer, options).to(model.device)
    ends = stops(model, tokenizer, chat=options.chat is not None)
    sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    with torch.inference_mode():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=options.max_new_tokens,
            eos_token_id=ends,
            streamer=Bar(options.max_new_tokens),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
            **(sampling if options.temperature > 0 else {"do_sample": False}),
        )
    return tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    exit_with(main, "generate")
