"""The optimizers that ``scripts/bench.py`` compares, each over its own copy of a workload's weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from bench_workloads import Workload, single
from torch import Tensor
from torch.nn import Parameter

import hf_muon

LR, DECAY = 1e-3, 0.1


class Contender:
    """An optimizer and the weights that it trains; gradients are shared with the others."""

    decay = 1 - LR * DECAY
    """What the first step multiplies weights by."""

    def __init__(self, workload: Workload, weights: list[Tensor], grads: list[Tensor]) -> None:
        self.workload, self.weights, self.grads = workload, weights, grads
        count = len(workload.matrices)
        self.others = [_leaf(w, g) for w, g in zip(weights[count:], grads[count:], strict=True)]
        self.build()

    def matrices(self) -> list[Parameter]:
        """One 2-D parameter per matrix, on the memory of the fused ones."""
        pairs = zip(single(self.workload, self.weights), single(self.workload, self.grads), strict=True)
        return [_leaf(w, g) for w, g in pairs]

    def build(self) -> None:
        """Make the optimizers."""
        raise NotImplementedError

    def step(self) -> None:
        """One update of everything."""
        for optimizer in self.optimizers:
            optimizer.step()

    def whole(self) -> list[Tensor]:
        """The weights now."""
        return self.weights

    optimizers: list[torch.optim.Optimizer]


def _leaf(weight: Tensor, grad: Tensor) -> Parameter:
    parameter = Parameter(weight)
    parameter.grad = grad
    return parameter


class Ours(Contender):
    """hf_muon, fused parameters as they are."""

    def build(self) -> None:  # noqa: D102
        layouts = self.workload.matrices
        fused = [_leaf(w, g) for w, g in zip(self.weights, self.grads, strict=False)][: len(layouts)]
        groups: list[dict] = [{"params": fused, "matrices": [m.key() for m in layouts]}]
        groups += [{"params": self.others, "algorithm": "adamw"}] if self.others else []
        self.optimizers = [hf_muon.Muon(groups, lr=LR, weight_decay=DECAY)]


class Torch(Contender):
    """torch.optim.Muon with RMS matching, and torch.optim.AdamW, both as they come."""

    def build(self) -> None:  # noqa: D102
        options = {"lr": LR, "weight_decay": DECAY}
        self.optimizers = [torch.optim.Muon(self.matrices(), adjust_lr_fn="match_rms_adamw", **options)]
        self.optimizers += [torch.optim.AdamW(self.others, **options)] if self.others else []


class AdamW(Contender):
    """torch's fused AdamW for everything: the cost of a step without Muon."""

    def build(self) -> None:  # noqa: D102
        fused = [_leaf(w, g) for w, g in zip(self.weights, self.grads, strict=True)]
        self.optimizers = [torch.optim.AdamW(fused, lr=LR, weight_decay=DECAY, fused=True)]


class DeepSpeed(Contender):
    """DeepSpeed's own per-matrix update, applied as its optimizer does, and torch's fused AdamW."""

    method = "standard"

    def build(self) -> None:  # noqa: D102
        self.parameters = self.matrices()
        self.momenta = [torch.zeros_like(p) for p in self.parameters]
        self.scales = [
            0.2 * math.sqrt(max(p.shape)) / math.sqrt(max(1, p.shape[0] / p.shape[1])) for p in self.parameters
        ]
        options = {"lr": LR, "weight_decay": DECAY, "fused": True}
        self.optimizers = [torch.optim.AdamW(self.others, **options)] if self.others else []

    @torch.no_grad()
    def step(self) -> None:  # noqa: D102
        from deepspeed.runtime.zero.muon.original_muon import muon_update

        for p, momentum, scale in zip(self.parameters, self.momenta, self.scales, strict=True):
            assert p.grad is not None
            # It averages in place of the gradient, which the others still need.
            change = muon_update(p.grad.clone(), momentum, beta=0.95, ns_method=self.method)
            p.mul_(1 - LR * DECAY).add_(change.reshape(p.shape), alpha=-LR * scale)
        super().step()


class DeepSpeedGram(DeepSpeed):
    """The same with its Gram form."""

    method = "gram"


CONTENDERS: dict[str, Callable[..., Contender]] = {"hf_muon": Ours, "torch": Torch, "adamw": AdamW}
try:
    from deepspeed.runtime.zero.muon.original_muon import muon_update  # noqa: F401
except ImportError:
    pass
else:
    CONTENDERS |= {"deepspeed": DeepSpeed, "deepspeed-gram": DeepSpeedGram}
