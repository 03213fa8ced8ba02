"""Moonlight from its own config, shrunk: one dense layer, two with experts, everything that the architecture has."""

import json
from pathlib import Path

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

CONFIG = Path(__file__).parent.parent / "recipes" / "moonlight-16b-a3b" / "config.json"
SMALL = dict(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=256,
)


def hub_config(**changes) -> dict:
    """The recipe's config.json with small numbers."""
    return {**json.loads(CONFIG.read_text()), **SMALL, **changes}


def model(seed=0, **changes) -> DeepseekV3ForCausalLM:
    """A seeded model with random weights."""
    torch.manual_seed(seed)
    options = {k: v for k, v in hub_config(**changes).items() if k not in ("torch_dtype", "transformers_version")}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**options))
