"""Small real models, tokenizer and data, made from configs: nothing is downloaded."""

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")
    tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tok.chat_template = CHATML
    return tok


def config(**changes) -> Qwen2Config:
    """Two layers, width 32, grouped-query attention."""
    options = dict(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=257,
        eos_token_id=256,
        bos_token_id=None,
    )
    return Qwen2Config(**{**options, **changes})


def qwen2(seed=0, **changes) -> Qwen2ForCausalLM:
    """A seeded model of :func:`config`."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config(**changes))


def arguments(out, **changes) -> dict:
    """Keywords for any TrainingArguments: a few quiet steps of Muon on the CPU, logged one by one."""
    options = dict(
        output_dir=str(out),
        optim="muon",
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return {**options, **changes}


def tokens(rows=64, length=16, seed=0) -> list[dict[str, list[int]]]:
    """Learnable sequences: arithmetic progressions modulo the byte range."""
    rng = random.Random(seed)
    out = []
    for _ in range(rows):
        start, step = rng.randrange(256), rng.randrange(1, 8)
        ids = [(start + step * i) % 256 for i in range(length)]
        out.append({"input_ids": ids, "labels": ids})
    return out
