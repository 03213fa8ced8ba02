"""The example of Moonlight's README on this package: a Qwen-like model of 12 layers, pretrained from random weights.

    python scripts/offline_data.py
    python scripts/toy_train.py --model qwen --optimizer muon --hidden_size 896 --lr 1e-3
    python scripts/toy_train.py --model qwen --optimizer adamw --dataset openwebtext-100k --hidden_size 896 --lr 1e-3

``--dataset offline`` (the default) needs no download; its vocabulary has 4,096 tokens, where the example's has 151,936.
What follows after ``--`` are options of ``scripts/pretrain.py``: ``-- --max_steps 3 --use_cpu true``.
"""

from __future__ import annotations

import argparse

from cells import ROOT

MODELS = {"qwen": "recipes/paper/toy"}
# Text, tokenizer, vocabulary of the model. The example's own names: Moonlight, examples/toy_train.py.
DATASETS = {
    "offline": (str(ROOT / "data/offline/pretrain"), str(ROOT / "data/offline/model"), 4096),
    "openwebtext-100k": ("Elriggs/openwebtext-100k", "Qwen/Qwen2.5-0.5B", 151936),
}
OPTIMIZERS = {"muon": "muon", "adamw": "adamw_torch"}


def command(words: list[str] | None = None) -> list[str]:
    """The example's options as those of ``scripts/pretrain.py``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen")
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="muon")
    parser.add_argument("--dataset", choices=sorted(DATASETS), default="offline")
    parser.add_argument("--hidden_size", type=int, default=1024, help="a multiple of 32: 16 heads of an even size")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--wd", type=float, default=0.1)
    parser.add_argument("extra", nargs="*", help="after --: more options for scripts/pretrain.py")
    options = parser.parse_args(words)
    if options.hidden_size % 32:
        parser.error(f"--hidden_size must be a multiple of 32 (16 heads of an even size), got {options.hidden_size}")
    text, tokenizer, vocabulary = DATASETS[options.dataset]
    flags = {
        "config": str(ROOT / "recipes/paper/toy/train.yaml"),
        "config_name": str(ROOT / MODELS[options.model]),
        "config_overrides": f"hidden_size={options.hidden_size},vocab_size={vocabulary}",
        "tokenizer_name": tokenizer,
        "dataset_name": text,
        "optim": OPTIMIZERS[options.optimizer],
        "learning_rate": f"{options.lr:g}",
        "weight_decay": f"{options.wd:g}",
        "output_dir": f"runs/toy/{options.model}-{options.optimizer}-lr{options.lr:g}",
    }
    return [word for key, value in flags.items() for word in (f"--{key}", value)] + options.extra


if __name__ == "__main__":
    from lifecycle import train_and_report
    from pretrain import prepare

    train_and_report(prepare(command()))
