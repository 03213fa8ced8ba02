"""The factor on the output of the routed experts (figure 6 of the paper)."""

from __future__ import annotations

import torch


def gate_scaling_factor(num_experts: int, top_k: int, *, trials: int = 100_000, seed: int = 0) -> float:
    """What routed experts must be multiplied by to keep the output RMS of a dense layer.

    The mean over ``trials`` of ``1 / sqrt(sum p^2)``, where ``p`` are the ``top_k`` largest sigmoids of
    ``num_experts`` Gaussian logits, divided by their sum: figure 6 of "Muon is Scalable for LLM Training". Moonlight's
    ``routed_scaling_factor`` of 2.446 is that of 64 experts and 6 per token.

    Args:
        num_experts: routed experts of a layer.
        top_k: experts per token.
        trials: draws; the result's standard error is below 1e-4 at the default for Moonlight's numbers.
        seed: of the draws.

    Raises:
        ValueError: ``top_k`` is not in [1, num_experts], or ``trials`` is below 1.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be in [1, num_experts={num_experts}], got {top_k}")
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    logits = torch.randn(trials, num_experts, generator=torch.Generator().manual_seed(seed))
    p = logits.sigmoid().topk(top_k).values
    p = p / p.sum(dim=-1, keepdim=True)
    return float(p.square().sum(dim=-1).rsqrt().double().mean())
