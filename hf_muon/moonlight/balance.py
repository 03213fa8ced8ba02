"""Spreading tokens over experts without an auxiliary loss: Moonlight's bias update (appendix C of the paper).

A router adds a bias to its scores when it chooses experts, and only then. After every optimizer step the bias of an
expert that had fewer tokens than its share rises, and that of one that had more falls.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BIAS = "e_score_correction_bias"
"""What transformers calls the bias (deepseek_v3, glm4_moe, ...)."""
MOONLIGHT_RATE = 1e-3
"""u of the paper's stages 1 and 2 (section 3.3); 0 in stage 3."""


def bias_update(load: Tensor, rate: float) -> Tensor:
    """``u * (sign(e) - mean(sign(e)))``, with ``e`` the mean load minus an expert's own.

    The paper writes ``b_i <- b_i + u * (sign(e_i) - sign(e).mean())`` and calls ``e_i`` the violation of expert i. The
    bias is added to the scores that experts are chosen by, so it must rise where load is missing: ``e_i`` is positive
    there, as in DeepSeek's auxiliary-loss-free balancing. Less its mean, the update sums to zero over the experts: it
    keeps the biases small and does not change which are chosen.

    Args:
        load: [..., experts] tokens that each expert was chosen for.
        rate: u.

    Returns:
        [..., experts], float32.
    """
    load = load.double()
    sign = (load.mean(dim=-1, keepdim=True) - load).sign()
    return (rate * (sign - sign.mean(dim=-1, keepdim=True))).float()


def max_violation(load: Tensor) -> Tensor:
    """How much the busiest expert has above its share: ``(max - mean) / mean``, 0 when all have the same.

    The MaxVio of "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664).

    Args:
        load: [..., experts], not all zero in any row.

    Returns:
        [...], float64.
    """
    load = load.double()
    mean = load.mean(dim=-1)
    return (load.amax(dim=-1) - mean) / mean


class ExpertBalancer:
    """Counts what the routers of a model choose, and moves their biases once per optimizer step.

    Counted are forward passes in training mode, every one once: evaluation is not, and neither is the second forward
    pass of activation checkpointing, which runs inside the backward pass. Padding is routed like any token and counted.
    Biases are float32 from here on, whatever dtype the model is cast to later: in bfloat16 a step of 1e-3 would be lost
    on a bias above 0.25. Make it before an engine wraps the model.

    Args:
        model: with routers that hold ``e_score_correction_bias`` and return the chosen experts, [tokens, top_k].

    Raises:
        ValueError: the model has no such router.
    """

    def __init__(self, model: nn.Module) -> None:
        found = {name: m for name, m in model.named_modules() if isinstance(getattr(m, BIAS, None), Tensor)}
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no router with {BIAS}: expert balancing is for deepseek_v3 and the models "
                "that share its router; leave it out for others"
            )
        self.routers = found
        self._load: dict[str, Tensor] = {}
        self._violation: dict[str, float] = {}
        for name, router in found.items():
            _keep_bias_in_float32(router)
            router.register_forward_hook(functools.partial(self._hook, name))

    def _hook(self, name: str, router: nn.Module, inputs: Any, output: Any) -> None:
        # A graph task is running exactly while autograd is in a backward pass: checkpointing's second forward.
        if router.training and torch._C._current_graph_task_id() == -1:
            self._count(name, output)

    @torch.no_grad()
    def _count(self, name: str, output: Any) -> None:
        parts = output if isinstance(output, (tuple, list)) else (output,)
        chosen = [t for t in parts if isinstance(t, Tensor) and not t.is_floating_point()]
        if len(chosen) != 1:
            raise RuntimeError(f"{name} returns no indices of the chosen experts: its load cannot be balanced")
        experts = getattr(self.routers[name], BIAS).numel()
        index = chosen[0].reshape(-1).long()
        if name not in self._load:
            # One place more: under expert parallelism other ranks' experts have the number behind the last.
            self._load[name] = torch.zeros(experts + 1, dtype=torch.int64, device=index.device)
        self._load[name].index_add_(0, index, torch.ones_like(index))

    @torch.no_grad()
    def step(self, rate: float = MOONLIGHT_RATE) -> None:
        """After an optimizer step: share the counts between ranks, move the biases, count anew.

        Args:
            rate: u; at 0 the biases stay as they are, and only the violation is measured.

        Raises:
            RuntimeError: a router counted nothing, or experts that it does not have.
        """
        silent = [name for name in self.routers if name not in self._load]
        if silent:
            raise RuntimeError(
                f"{silent[0]} and {len(silent) - 1} more routers chose no expert since the last step: call step() once "
                "after each optimizer step, and let no compiler or kernel replace the routers' forward"
            )
        load = torch.stack([self._load.pop(name) for name in self.routers])
        if dist.is_initialized():
            # Ranks that share the same tokens (tensor parallelism) count them alike, which changes no sign.
            dist.all_reduce(load)
        if load[:, -1].any():
            raise RuntimeError(
                "routers chose experts of other ranks: expert balancing does not serve expert parallelism"
            )
        load = load[:, :-1]
        self._violation = dict(zip(self.routers, max_violation(load).tolist(), strict=True))
        for router, change in zip(self.routers.values(), bias_update(load, rate), strict=True):
            getattr(router, BIAS).add_(change)  # in place: DDP and checkpoints know this tensor

    def metrics(self) -> dict[str, float]:
        """``moe/max_violation`` (mean over layers), ``moe/max_violation/LAYER``, ``moe/max_bias``; of the last step."""
        if not self._violation:
            return {}
        biases = [getattr(router, BIAS).abs().max() for router in self.routers.values()]
        return {
            "moe/max_violation": sum(self._violation.values()) / len(self._violation),
            **{f"moe/max_violation/{_short(name)}": value for name, value in self._violation.items()},
            "moe/max_bias": float(torch.stack(biases).max()),
        }


def _short(name: str) -> str:
    """The number of the layer; the whole name where there is none."""
    return next((part for part in name.split(".") if part.isdigit()), name)


def _keep_bias_in_float32(router: nn.Module) -> None:
    """Casts of the model (``.bfloat16()``, as DeepSpeed does) leave the bias in float32; moves to a device do not."""
    setattr(router, BIAS, getattr(router, BIAS).float())
    # A bound method, because copies of the model then act on themselves.
    router._apply = MethodType(_apply, router)  # type: ignore[method-assign]


def _apply(router: nn.Module, fn: Any, *args: Any, **kwargs: Any) -> nn.Module:
    before = getattr(router, BIAS)
    type(router)._apply(router, fn, *args, **kwargs)
    after = getattr(router, BIAS)
    if after.dtype != torch.float32:
        setattr(router, BIAS, before.to(after.device))
    return router
