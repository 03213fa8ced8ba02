"""``Muon``: the optimizer whose :meth:`~Muon.step` is the paper's algorithm, and AdamW for what is no matrix."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checks, update
from .coefficients import Coefficients
from .config import NS_DTYPES
from .exchange import local as exchange
from .matrices import MatrixLayout
from .orthogonalize import newton_schulz
from .telemetry import Telemetry

logger = logging.getLogger("hf_muon")


class Muon(Optimizer):
    """Muon of "Muon is Scalable for LLM Training" (arXiv 2502.16982), equations (1)-(4), with AdamW beside it.

    For a matrix W of shape [A, B]: ``M <- momentum * M + G``; ``O`` = Newton-Schulz of ``G + momentum * M``;
    ``W <- W - lr * (0.2 * sqrt(max(A, B)) * O + weight_decay * W)``. Because every update then has RMS 0.2, AdamW's
    learning rate and weight decay carry over.

    Args:
        params_or_groups: matrices; or groups as :func:`hf_muon.param_groups` makes them. A group's ``algorithm`` is
            ``"muon"`` (default) or ``"adamw"``; its optional ``matrices`` (one
            :meth:`hf_muon.matrices.MatrixLayout.key` per parameter) says which logical matrices a parameter holds,
            and ``kinds`` names them in the metrics.
        lr: learning rate of groups that do not set their own.
        weight_decay: decoupled, for Muon and AdamW groups alike.
        momentum, nesterov: equation (1) and footnote 1. The buffer is the sum form, in float32.
        ns_steps, ns_coefficients, ns_dtype: see :func:`hf_muon.newton_schulz`.
        adjust_lr_fn: update scale, one of :data:`hf_muon.config.SCALES`; ``"match_rms_adamw"`` is an alias of the
            default.
        update_rms: the 0.2 above.
        hidden_size: H of ``adjust_lr_fn="sqrt_hidden_size"``.
        betas, eps: of the AdamW groups.

    Raises:
        ValueError, TypeError: at construction, for any value outside its range, a tensor ``lr``, an empty group, a
            parameter that is no matrix, not floating, frozen like all the others, or given twice.
        RuntimeError: from :meth:`step`, for a sparse or misshapen gradient, or a parameter that a distributed engine
            has re-laid out; nothing has been changed then.

    A NaN or infinity (or more than 1e36) in any gradient skips the whole step: parameters, momentum and AdamW state
    stay as they were, and :attr:`telemetry` counts it.
    """

    telemetry: Telemetry

    def __init__(
        self,
        params_or_groups: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: Coefficients = "moonlight",
        ns_dtype: str | torch.dtype = "bfloat16",
        adjust_lr_fn: str = "sqrt_max_dims",
        update_rms: float = 0.2,
        *,
        hidden_size: int | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = dict(
            algorithm="muon",
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            ns_coefficients=ns_coefficients,
            ns_dtype=checks.ns_dtype_name(ns_dtype),
            adjust_lr_fn=adjust_lr_fn,
            update_rms=update_rms,
            hidden_size=hidden_size,
            betas=tuple(betas),
            eps=eps,
        )
        self.telemetry = Telemetry()
        super().__init__(params_or_groups, defaults)
        if not any(p.requires_grad for group in self.param_groups for p in group["params"]):
            raise ValueError("every parameter given to Muon is frozen (requires_grad=False): nothing would be trained")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer`` does, after checking all of it."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["ns_dtype"] = checks.ns_dtype_name(group["ns_dtype"])
            checks.check_hyperparameters(group)
            checks.check_parameters(group)
            if group["algorithm"] == "muon":
                group.setdefault("matrices", [MatrixLayout(tuple(p.shape)).key() for p in group["params"]])
                checks.check_storage(group, _layouts(group))
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; ``p.grad`` is only read."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._ready():
            return loss
        for group in self.param_groups:
            if group["algorithm"] == "adamw":
                self._step_adamw(group)
                continue
            lr, decay, mu = group["lr"], group["weight_decay"], group["momentum"]
            pieces = self._accumulate(group)  # storage: M <- mu M + G
            for batch in exchange.batches(pieces):
                slices = [update.direction(x.grad, x.momentum_buffer, mu, group["nesterov"]) for x in batch]
                matrices = exchange.to_matrices(batch, slices)  # exchange: whole matrices
                del slices
                matrices = self._orthogonalize(matrices, batch[0].matrices[1:], group)  # compute: 0.2 sqrt(max(A, B)) O
                for piece, change in exchange.to_storage(batch, matrices):  # exchange: where W is stored
                    update.apply_(piece.param, change, lr, decay)  # storage: W <- W - lr (change + decay W)
                    self.telemetry.record_update(piece.kind, change)
        return loss

    @staticmethod
    def _orthogonalize(matrices: Tensor, shape: tuple[int, int], group: dict[str, Any]) -> Tensor:
        ortho = newton_schulz(
            matrices,
            steps=group["ns_steps"],
            coefficients=group["ns_coefficients"],
            dtype=NS_DTYPES[group["ns_dtype"]],
        )
        return update.scale_(ortho, shape, group["adjust_lr_fn"], group["update_rms"], group["hidden_size"])

    def _ready(self) -> bool:
        """Check everything before anything changes; false if the step must be skipped."""
        grads: list[Tensor] = []
        for group in self.param_groups:
            # torch's chained schedulers end at -1e-21 where they mean 0, and AdamW takes that too.
            checks.number("lr", group["lr"], -1e-12)
            if group["algorithm"] == "muon":
                checks.check_storage(group, _layouts(group))
            for name, p in zip(checks.names(group), group["params"], strict=True):
                if p.grad is not None:
                    checks.check_gradient(name, p, p.grad)
                    grads.append(p.grad)
        if not grads:
            return False
        self.telemetry.start_step(self.param_groups)
        if checks.all_finite(grads):
            return True
        self._record_skip()
        return False

    def _record_skip(self) -> None:
        """Count what was not finite, and name the first parameter."""
        bad: list[str] = []
        matrices = 0
        for group in self.param_groups:
            layouts = _layouts(group) if group["algorithm"] == "muon" else [None] * len(group["params"])
            for name, p, layout in zip(checks.names(group), group["params"], layouts, strict=True):
                if p.grad is not None and not checks.all_finite([p.grad]):
                    bad.append(name)
                    matrices += _non_finite_matrices(p.grad, layout) if layout is not None else 0
        self.telemetry.record_skip(f"{len(bad)} gradients are not finite, the first of {bad[0]}", matrices)

    def _accumulate(self, group: dict[str, Any]) -> list[exchange.Piece]:
        """Apply momentum where it is stored, and list the pieces whose matrices are now due."""
        kinds = group.get("kinds") or ["matrix"] * len(group["params"])
        out: list[exchange.Piece] = []
        for p, layout, kind in zip(group["params"], _layouts(group), kinds, strict=True):
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                # At least float32 whatever the weights are: the sum form reaches 20 gradients at momentum 0.95, and
                # in bfloat16 a new gradient of relative size 1/256 would be lost.
                state["momentum_buffer"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            update.accumulate_(state["momentum_buffer"], p.grad, group["momentum"])
            out.extend(exchange.pieces(p, p.grad, state["momentum_buffer"], layout, kind))
        return out

    def _step_adamw(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32)  # bfloat16 cannot count past 256
                self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        update.adamw_(
            params,
            [p.grad for p in params],
            [self.state[p] for p in params],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def metrics(self) -> dict[str, float]:
        """``muon/...`` numbers of the last step, for logging; see :meth:`hf_muon.telemetry.Telemetry.metrics`."""
        return self.telemetry.metrics(self.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickling and ``copy.deepcopy`` carry only groups and state; counters start anew."""
        super().__setstate__(state)
        if not hasattr(self, "telemetry"):
            self.telemetry = Telemetry()

    def _pairs(self, state_dict: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return list(zip(self.param_groups, state_dict["param_groups"], strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, bit for bit.

        As in torch, the saved hyper-parameters replace the present ones; a warning names those that differ. Which
        matrices a parameter holds is taken from the present groups.

        Raises:
            ValueError: the state is another optimizer's, or of a model with other parameters; nothing is changed then.
        """
        checks.check_state_dict(self.param_groups, state_dict)
        present = [{k: group[k] for k in checks.STRUCTURE[1:] if k in group} for group in self.param_groups]
        pairs = self._pairs(state_dict)
        for text in dict.fromkeys(d for ours, saved in pairs for d in checks.differences(ours, saved)):
            logger.warning("the checkpoint's setting wins over this run's: %s", text)
        if any(ours.get("matrices") != saved.get("matrices") for ours, saved in pairs):
            # Momentum is elementwise, so it stays valid.
            logger.warning("this checkpoint was made with fused weights cut into other matrices; today's cuts are used")
        super().load_state_dict(state_dict)
        for group, structure in zip(self.param_groups, present, strict=True):
            group.update(structure)
        # torch casts floating state to the parameter's dtype, which would round the float32 momentum of bfloat16
        # weights; what was saved is put back as it was.
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            saved = state_dict["state"].get(i, {}).get("momentum_buffer")
            if saved is not None and saved.dtype != p.dtype:
                self.state[p]["momentum_buffer"] = saved.detach().to(device=p.device, copy=True)


def _layouts(group: dict[str, Any]) -> list[MatrixLayout]:
    return [MatrixLayout.of(key) for key in group["matrices"]]


def _non_finite_matrices(grad: Tensor, layout: MatrixLayout) -> int:
    """How many logical matrices of ``grad`` hold a NaN, an infinity or more than the momentum can sum."""
    stacks = (layout.to_matrices(piece, i) for i, piece in enumerate(layout.pieces(grad)))
    return sum(int((~(stack.abs() <= checks.LARGEST).flatten(1).all(dim=1)).sum()) for stack in stacks)
