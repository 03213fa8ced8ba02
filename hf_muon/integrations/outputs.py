"""The size of what hidden layers give out: without weight decay it grows out of bfloat16's precision (figure 2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..routing import route
from .measuring import MeasuringCallback, in_training_forward


class OutputRMSCallback(MeasuringCallback):
    """Logs ``output_rms`` and ``output_rms/KIND``: the RMS of the outputs of hidden layers, in every ``steps``-th step.

    Hidden layers are the modules that own what Muon would train, and kinds those of :func:`hf_muon.explain`. The RMS is
    over all elements, micro-batches and ranks. Weights and updates have theirs in ``muon/weight_rms`` and
    ``muon/update_rms``.
    """

    option = "output_rms_steps"

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self._kinds: dict[nn.Module, str] = {}
        self._hooks: list[Any] = []
        self._squares: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def find(self, model: nn.Module) -> None:
        """By the routing of the optimizer."""
        modules = dict(model.named_modules())
        owners = {r.name.rpartition(".")[0]: r.kind for r in route(model) if r.algorithm == "muon"}
        self._kinds = {modules[name]: kind for name, kind in owners.items()}

    def begin(self) -> None:
        """Hooks are on the model in measured steps only."""
        self.end()
        self._squares, self._counts = {}, {}
        self._hooks = [module.register_forward_hook(self._add) for module in self._kinds]

    def end(self) -> None:
        """Take them off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _add(self, module: nn.Module, inputs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(output, Tensor) and in_training_forward(module):
            kind = self._kinds[module]
            # Over elements in float32, whatever the dtype: squares of bfloat16 are rounded, and float16's overflow.
            wide = torch.promote_types(output.dtype, torch.float32)
            square = torch.linalg.vector_norm(output.detach(), dtype=wide).float().square()
            before = self._squares.get(kind)
            self._squares[kind] = square if before is None else before.to(square.device) + square
            self._counts[kind] = self._counts.get(kind, 0) + output.numel()

    def summary(self, device: torch.device) -> dict[str, float]:
        """One small all-reduce."""
        kinds = sorted(set(self._kinds.values()))
        squares = [self._squares.get(kind, torch.zeros((), device=device)).to(device) for kind in kinds]
        counts = torch.tensor([float(self._counts.get(kind, 0)) for kind in kinds], device=device)
        table = torch.stack([torch.stack(squares), counts])
        if dist.is_initialized():
            dist.all_reduce(table)
        means = table[0] / table[1]
        values = {f"output_rms/{k}": v for k, v in zip(kinds, means.sqrt().tolist(), strict=True) if v == v}
        return {"output_rms": float((table[0].sum() / table[1].sum()).sqrt()), **values}
