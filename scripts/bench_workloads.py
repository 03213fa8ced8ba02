"""Shapes of real models for ``scripts/bench.py``: matrices and vectors of some layers, fused as in transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_muon.matrices import MatrixLayout


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One row of the table."""

    note: str
    """How much of which model."""
    matrices: tuple[MatrixLayout, ...]
    others: tuple[tuple[int, ...], ...] = ()
    """Shapes of what AdamW trains."""
    rounds: int = 15
    """Interleaved steps of every contender."""

    @property
    def elements(self) -> tuple[int, int]:
        """Of the matrices, and of the rest."""
        sizes = ([torch.Size(s).numel() for s in shapes] for shapes in ([m.shape for m in self.matrices], self.others))
        muon, adamw = map(sum, sizes)
        return muon, adamw


def _llama(hidden: int, kv: int, mlp: int, layers: int, vocabulary: int) -> dict[str, tuple]:
    """Separate projections, two norms and Qwen2's biases in each layer; ``vocabulary`` rows for both embeddings."""
    shapes = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(mlp, hidden)] * 2 + [(hidden, mlp)]
    vectors = [(hidden,)] * 3 + [(kv,)] * 2
    return {
        "matrices": tuple(MatrixLayout(s) for s in shapes * layers),
        "others": tuple(vectors * layers + ([(vocabulary, hidden)] if vocabulary else [])),
    }


def _experts(number: int, hidden: int, mlp: int) -> tuple[MatrixLayout, ...]:
    up = MatrixLayout((number, 2 * mlp, hidden), batch=1, sizes=(mlp, mlp))
    return up, MatrixLayout((number, hidden, mlp), batch=1)


WORKLOADS = {
    "demo": Workload(
        note="the demo's Qwen2, 1.8M parameters, whole",
        **_llama(128, 64, 384, 4, 2 * 4096),
        rounds=60,
    ),
    "qwen2.5-0.5b": Workload(
        note="4 of 24 layers of Qwen2.5-0.5B, and as much of its embedding",
        **_llama(896, 128, 4864, 4, 151936 * 4 // 24),
    ),
    "qwen2.5-7b": Workload(
        note="1 of 28 layers of Qwen2.5-7B, without embeddings", **_llama(3584, 512, 18944, 1, 0), rounds=3
    ),
    "moonlight-experts": Workload(note="4 of the 64 experts of a layer of Moonlight", matrices=_experts(4, 2048, 1408)),
    "small-experts": Workload(note="64 experts of 64 x 64, fused", matrices=_experts(64, 64, 64), rounds=40),
    "lora": Workload(
        note="rank-16 adapters on q, k, v, o of 4 layers of Qwen2.5-7B",
        matrices=tuple(
            MatrixLayout(s)
            for out, into in ((3584, 3584), (512, 3584), (512, 3584), (3584, 3584)) * 4
            for s in ((16, into), (out, 16))
        ),
        rounds=30,
    ),
}


def tensors(workload: Workload, device: torch.device, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Random weights of deviation 0.02 and gradients of deviation 1, matrices first, then the others."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [m.shape for m in workload.matrices] + list(workload.others)
    weights = [torch.randn(s, generator=generator, device=device) * 0.02 for s in shapes]
    return weights, [torch.randn(s, generator=generator, device=device) for s in shapes]


def single(workload: Workload, values: list[Tensor]) -> list[Tensor]:
    """The matrices of a fused parameter one by one, as views, for optimizers that take only 2-D parameters."""
    out = []
    for layout, value in zip(workload.matrices, values, strict=False):
        for piece in layout.pieces(value):
            out.extend(piece.reshape(-1, *piece.shape[-2:]).unbind() if piece.ndim > 2 else [piece])
    return out
