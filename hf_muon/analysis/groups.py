"""The groups that figure 4 of the paper averages matrices in, and what the pieces of fused weights are called."""

from __future__ import annotations

import re

GROUPS = ("AttnQO", "AttnKV", "Experts", "SharedExperts", "Router", "Dense")
"""The paper's six (section 3.4), in its order. Dense is every MLP without experts, in models of any family."""

_KINDS = {"experts": "Experts", "shared_experts": "SharedExperts", "router": "Router", "mlp": "Dense", "lora": "LoRA"}
_QUERY_OUTPUT = re.compile(r"(^|_)(w?q|query|w?o|out|output|dense|c_proj)(_|\d*$)", re.IGNORECASE)
_KEY_VALUE = re.compile(r"(^|_)(w?[kv]|kv|w?kv|keys?|values?)(_|\d*$)", re.IGNORECASE)
_FUSED_QKV = re.compile(r"qkv|query_key_value|c_attn|att_proj|in_proj_weight", re.IGNORECASE)
_GATE_UP = re.compile(r"gate_(and_)?up", re.IGNORECASE)


def attribute(parameter: str) -> str:
    """What a weight is called: ``q_proj`` of ``model.layers.0.self_attn.q_proj.weight``."""
    parts = [part for part in parameter.split(".") if part != "weight"]
    return parts[-1] if parts else parameter


def layer_of(parameter: str) -> int | None:
    """The first number in a name; None where there is none."""
    return next((int(part) for part in parameter.split(".") if part.isdigit()), None)


def piece_names(parameter: str, pieces: int, blocks: int = 1) -> tuple[str, ...]:
    """Names of the pieces that a weight is cut into; numbers where the name does not say them in order.

    Args:
        parameter: its name.
        pieces: how many.
        blocks: how often they repeat: a ``qkv_proj`` with several blocks may be in another order (CodeGen's is).
    """
    name = attribute(parameter)
    if pieces == 1:
        return ("",)
    if pieces == 2 and _GATE_UP.search(name):
        return "gate", "up"
    if pieces in (2, 3) and _FUSED_QKV.search(name):
        # Two are of cross attention, whose queries come from elsewhere.
        ordered = blocks == 1 or "qkv_proj" not in name.lower()
        return ("q", "k", "v")[-pieces:] if ordered else ("q", "kv0", "kv1")[-pieces:]
    return tuple(map(str, range(pieces)))


def group_of(kind: str, parameter: str, piece: str = "") -> str:
    """One of :data:`GROUPS`; for what the paper's models do not have, the kind (``Conv``, ``Attention``, ...).

    Args:
        kind: as in the routing report (``python -m hf_muon explain``).
        parameter: its name.
        piece: see :func:`piece_names`.
    """
    if kind != "attention":
        return _KINDS.get(kind, kind.capitalize())
    name = attribute(parameter)
    if _FUSED_QKV.search(name):
        return {"q": "AttnQO", "k": "AttnKV", "v": "AttnKV"}.get(piece[:1], "Attention")
    if _KEY_VALUE.search(name):
        return "Attention" if _QUERY_OUTPUT.search(name) else "AttnKV"
    return "AttnQO" if _QUERY_OUTPUT.search(name) else "Attention"
