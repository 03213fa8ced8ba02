"""How large the weights of a model are, while it trains."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

# Table 1 and Table 8 of arXiv 2502.16982 give the RMS of the query and of the MLP weights.
KINDS = {"query": ("q_proj",), "mlp": ("gate_proj", "up_proj", "down_proj")}


class WeightSizes(TrainerCallback):
    """At every evaluation: RMS of the query, MLP and all hidden matrices, and the largest weight of these.

    Args:
        model: a causal language model with Llama's names.

    Raises:
        ValueError: it has no parameter of one of the kinds.
    """

    def __init__(self, model: nn.Module) -> None:
        outer = {
            id(p)
            for module in (model.get_input_embeddings(), model.get_output_embeddings())
            for p in module.parameters()
        }
        inner = {name: p for name, p in model.named_parameters() if id(p) not in outer}
        self.parameters = sum(p.numel() for p in inner.values())
        """Parameters besides embedding and head, the N of a scaling law."""
        self.matrices = {name: p for name, p in inner.items() if p.ndim == 2}
        self.rows: list[dict[str, float]] = []
        for kind in KINDS:
            if not self._of(kind):
                raise ValueError(f"the model has no {kind} weights: expected names with {KINDS[kind]}")

    def _of(self, kind: str) -> list[torch.Tensor]:
        return [p for name, p in self.matrices.items() if name.split(".")[-2] in KINDS[kind]]

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure."""
        everything = list(self.matrices.values())
        row = {"step": state.global_step, **{kind: rms(self._of(kind)) for kind in KINDS}, "all": rms(everything)}
        self.rows.append(row | {"largest": max(p.detach().abs().max().item() for p in everything)})


@torch.no_grad()
def rms(tensors: list[torch.Tensor]) -> float:
    """Root mean square over all elements of all tensors."""
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors) / sum(t.numel() for t in tensors))
