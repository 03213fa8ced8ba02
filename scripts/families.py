"""Route every model family that transformers can build from its config class, and print the table.

    python scripts/families.py [--markdown docs/families.md] [--only NAME ...]

Models are built on the meta device: shapes and modules, no memory. Needs no network.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_muon.report import Report
from hf_muon.routing import route

# The most complete model of a family: its language model if it has one, else what trains it, else the bare model.
MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_PRETRAINING_MAPPING",
    "MODEL_MAPPING",
)


# Families whose default config cannot build its own model: the missing or contradictory fields, filled in. Dotted names
# reach into sub-configs; a "config" entry builds the family's model from that sub-config.
_HUNYUAN = {"head_dim": 128}
_COMPASS = {
    "rope_parameters": {k: {"rope_type": "default", "rope_theta": 1e4} for k in ("full_attention", "sliding_attention")}
}
_QSA = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
}
_NO_PLE = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}
FIXES: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config.num_attention_heads": 16},
    "autoformer": {"prediction_length": 24},
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "cohere_compass": {f"text_config.{k}": v for k, v in _COMPASS.items()},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config.rope_theta": 1e4},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense"] + ["sparse"] * 47},
    "diffusion_gemma": {
        "text_config.num_experts": 8,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 704,
    },
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "emu3": {"vocabulary_map": {"<image>": 8711}},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    # An assistant shares every layer's keys and values with its target, which its text config then refuses to build.
    "gemma4_assistant": {"text_config": _NO_PLE, "text_config.num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 0},
    "gemma3n": {"config": "text_config"},  # its vision tower needs timm
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "1/2"},
    "hunyuan_v1_dense": _HUNYUAN,
    "hunyuan_v1_moe": _HUNYUAN,
    "hunyuan_vl": {"text_config.head_dim": 128},
    "hunyuan_vl_text": _HUNYUAN,
    "informer": {"prediction_length": 24},
    "lfm2_moe": {"layer_types": (["conv", "conv", "full_attention"] * 11)[:32]},
    "ministral": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {f"text_config.{k}": v for k, v in _QSA.items()},
    "qwen4_exp_text": _QSA,
    "time_series_transformer": {"prediction_length": 24},
}


class CannotBuild(Exception):
    """Why a family is left out."""


def families() -> list[str]:
    """Every model type that has a config class."""
    return sorted(CONFIG_MAPPING.keys())


def config_of(family: str) -> Any:
    """The family's default config, repaired where it has to be."""
    fixes = FIXES.get(family, {})
    early = {k: v for k, v in fixes.items() if "." not in k and k != "config"}
    config = CONFIG_MAPPING[family](**early)
    for name, value in fixes.items():
        *path, last = name.split(".")
        place = config
        for part in path:
            place = getattr(place, part)
        if path:
            setattr(place, last, value)
    return getattr(config, fixes["config"]) if "config" in fixes else config


def build(family: str) -> nn.Module:
    """The family's model on the meta device.

    Raises:
        CannotBuild: with the reason.
    """
    try:
        config = config_of(family)
    except Exception as error:
        raise CannotBuild(f"config: {_first_line(error)}") from None
    errors = []
    for mapping in _mappings():
        try:
            classes = mapping.get(type(config), None)
        except Exception as error:
            errors.append(_first_line(error))
            continue
        if classes is None:
            continue
        cls = classes[0] if isinstance(classes, (list, tuple)) else classes
        try:
            with torch.device("meta"):
                return cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
        except Exception as error:
            errors.append(f"{cls.__name__}: {_first_line(error)}")
    raise CannotBuild(errors[0] if errors else "part of another family: no auto class builds it alone")


def _mappings() -> Iterator[Any]:
    others = [n for n in vars(modeling_auto) if n.endswith("_MAPPING") and n.startswith("MODEL_") and n not in MAPPINGS]
    return (getattr(modeling_auto, name) for name in (*MAPPINGS, *others) if hasattr(modeling_auto, name))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # What follows are install hints and paths of this machine.
    line = re.split(r" but it was not found| neither in <| Should contain one of", lines[0])[0] if lines else ""
    return f"{type(error).__name__}: {line}"[:160]


def fused_kinds(model: nn.Module, report: Report) -> str:
    """The weights that hold several matrices, with how many each."""
    counts: Counter[str] = Counter()
    for found in report.routes:
        if found.layout is not None and len(found.layout.sizes) > 1:
            parts = found.name.removesuffix(".weight").split(".")
            named = next(
                (p for p in reversed(parts) if not p.isdigit() and p not in ("linear", "conv", "convolution")),
                parts[-1],
            )
            counts[f"{named} x{len(found.layout.sizes)}"] += 1
        elif found.layout is not None and found.layout.batch:
            counts[f"{found.kind} per matrix"] += 1
    return ", ".join(name for name, _ in counts.most_common(6))


def rows(only: list[str] | None = None) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """The table, and what could not be built with the reason."""
    table, missing = [], []
    for family in families():
        if only and family not in only:
            continue
        try:
            model = build(family)
        except CannotBuild as error:
            missing.append((family, str(error)))
            continue
        report = Report(tuple(route(model)))
        total, muon = report.numel(), report.numel("muon")
        shares = (f"{muon / total:.1%}", f"{1 - muon / total:.1%}")
        table.append((family, type(model).__name__, f"{total:,}", *shares, fused_kinds(model, report)))
    return table, missing


def markdown(table: list[tuple[str, ...]], missing: list[tuple[str, str]]) -> str:
    """Both lists as a page."""
    alone = [name for name, why in missing if why.startswith("part of another")]
    broken = [(name, why) for name, why in missing if not why.startswith("part of another")]
    muon = sum(float(row[3].rstrip("%")) for row in table) / max(len(table), 1)
    out = [
        "# Which parameters Muon trains, family by family",
        "",
        f"Made by `scripts/families.py` on the meta device: {len(table)} families of transformers "
        f"{importlib.metadata.version('transformers')}, each in its default configuration (mean Muon share "
        f"{muon:.1f} %). "
        "`name xN`: one weight holds N matrices; `per matrix`: one matrix per expert or block.",
        "",
        "| family | model | parameters | Muon | AdamW | several matrices in one weight |",
        "|---|---|---:|---:|---:|---|",
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        f"## Not built alone ({len(alone)})",
        "",
        "Parts of other families: no auto class builds them, so they are routed inside their family's model.",
        "",
        ", ".join(alone),
        "",
        f"## Cannot be built here ({len(broken)})",
        "",
        *(f"- {name}: {why}" for name, why in broken),
        "",
    ]
    return "\n".join(out)


def main() -> None:
    """Print the page, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--only", nargs="*", help="only these families")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    start = time.perf_counter()
    table, missing = rows(args.only)
    page = markdown(table, missing)
    print(page)
    print(
        f"{len(table)} families routed, {len(missing)} not built, {time.perf_counter() - start:.0f} s", file=sys.stderr
    )
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(page)


if __name__ == "__main__":
    main()
