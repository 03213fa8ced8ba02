"""The optimizers that ``scripts/bench.py`` compares, each over its own copy of a workload's weights."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from bench_workloads import Workload, single
from torch import Tensor
from torch.nn import Parameter

import hf_muon
from hf_muon.coefficients import schedule

LR, DECAY = 1e-3, 0.1


class Contender:
    """An optimizer and the weights that it trains; gradients are shared with the others."""

    decay = 1 - LR * DECAY
    """What the first step multiplies weights by."""
    coefficients = "moonlight"
    """Of its five Newton-Schulz steps, by our name."""

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

    fused: bool | None = None

    def build(self) -> None:  # noqa: D102
        self.optimizers = [self.muon(self.matrices(), lr=LR, weight_decay=DECAY)]
        if self.others:
            self.optimizers.append(torch.optim.AdamW(self.others, lr=LR, weight_decay=DECAY, fused=self.fused))

    def muon(self, matrices: list[Parameter], **options: float) -> torch.optim.Optimizer:
        """The optimizer of the matrices."""
        return torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)


class TorchFused(Torch):
    """The same with the fused AdamW, which has to be asked for; the Trainer does."""

    fused = True


class Dion(TorchFused):
    """The Muon of the dion package, with the coefficients that it has in PyTorch, and torch's fused AdamW."""

    coefficients = "you"

    def muon(self, matrices: list[Parameter], **options: float) -> torch.optim.Optimizer:  # noqa: D102
        from dion import Muon

        return Muon(matrices, mu=0.95, nesterov=True, adjust_lr="rms_norm", use_polar_express=False, **options)


class GramNewtonSchulz(TorchFused):
    """The Muon of the gram-newton-schulz package, with the paper's schedule, and torch's fused AdamW."""

    def muon(self, matrices: list[Parameter], **options: float) -> torch.optim.Optimizer:  # noqa: D102
        from gram_newton_schulz import Muon

        triples = [list(triple) for triple in schedule("moonlight", 5)]
        return Muon(matrices, ns_coefficients=triples, ns_use_kernels=torch.cuda.is_available(), **options)


class EmergingOptimizers(TorchFused):
    """The Muon of the emerging-optimizers package, with the paper's schedule, and torch's fused AdamW."""

    def muon(self, matrices: list[Parameter], **options: float) -> torch.optim.Optimizer:  # noqa: D102
        from emerging_optimizers.orthogonalized_optimizers import Muon

        return Muon(matrices, nesterov=True, coefficient_type="quintic", extra_scale_factor=0.2, **options)


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


# By name, and what must be installed.
ALL: dict[str, tuple[Callable[..., Contender], str]] = {
    "hf_muon": (Ours, "torch"),
    "torch": (Torch, "torch"),
    "torch-fused": (TorchFused, "torch"),
    "deepspeed": (DeepSpeed, "deepspeed"),
    "deepspeed-gram": (DeepSpeedGram, "deepspeed"),
    "dion": (Dion, "dion"),
    "emerging-optimizers": (EmergingOptimizers, "emerging_optimizers"),
    "gram-newton-schulz": (GramNewtonSchulz, "gram_newton_schulz"),
    "adamw": (AdamW, "torch"),
}
CONTENDERS = {name: make for name, (make, module) in ALL.items() if importlib.util.find_spec(module) is not None}
