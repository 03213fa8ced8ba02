"""``Muon``: the optimizer whose :meth:`~Muon.step` is the paper's algorithm, and AdamW for what is no matrix."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import canonical, checks, clip, engines, state, update
from .coefficients import Coefficients
from .config import NS_DTYPES
from .exchange import collectives
from .exchange.exchange import Exchange, Stack, Turn
from .matrices import MatrixLayout
from .orthogonalize import newton_schulz
from .telemetry import Record, Telemetry
from .units import Unit, build, forget, non_finite, ready

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
        adjust_lr_fn: update scale, one of :data:`hf_muon.config.SCALES`, or ``"match_rms_adamw"``, the default.
        update_rms: the 0.2 above.
        hidden_size: H of ``adjust_lr_fn="sqrt_hidden_size"``.
        betas, eps: of the AdamW groups.
        process_group: ranks that hold the same parameters and the same, already averaged, gradients (DDP), to share
            out Newton-Schulz. Sharded engines (DeepSpeed ZeRO, FSDP2) are recognised by their tensors and need none.
        exchange_bytes: matrices of at most this many bytes (in ``ns_dtype``) are orthogonalized at a time on a rank;
            the transient memory of a step is a small multiple of it, whatever the size of the model. A single process
            on a CPU takes at most 2 million elements at a time, which is faster there.
        momentum_dtype, kahan_sum: see :class:`hf_muon.MuonConfig`.

    Raises:
        ValueError, TypeError: at construction, for any value outside its range, a tensor ``lr``, an empty group, a
            parameter that is no matrix, not floating, frozen like all the others, or given twice.
        RuntimeError: from :meth:`step`, for a gradient or a layout that is not served; nothing has been changed then.

    A NaN or infinity (or more than 1e36) in any gradient skips the whole step, and :attr:`telemetry` counts it.
    """

    telemetry: Telemetry
    row_factors: Callable[[Unit], Mapping[str, Tensor]] | None = None
    """Asked before a unit is stepped: what rows of its parameters are multiplied by behind its update (QK-Clip)."""

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
        process_group: Any = None,
        exchange_bytes: int = 2**27,
        momentum_dtype: str | torch.dtype = "float32",
        kahan_sum: bool = False,
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
            momentum_dtype=momentum_dtype,
            kahan_sum=kahan_sum,
        )
        self.telemetry = Telemetry()
        self.process_group = process_group
        self.exchange_bytes = checks.positive_int("exchange_bytes", exchange_bytes)
        self._units: dict[tuple[int, ...], Unit] = {}
        # Weakly: under FSDP2 these would keep the unsharded model alive.
        self._whole: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
        super().__init__(params_or_groups, defaults)
        if not any(p.requires_grad for group in self.param_groups for p in group["params"]):
            raise ValueError("every parameter given to Muon is frozen (requires_grad=False): nothing would be trained")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``torch.optim.Optimizer`` does, after checking all of it."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["ns_dtype"] = checks.ns_dtype_name(group["ns_dtype"])
            group["momentum_dtype"] = str(group["momentum_dtype"]).removeprefix("torch.")
            checks.check_hyperparameters(group)
            checks.check_parameters(group)
            if group["algorithm"] == "muon" and "matrices" not in group:
                group["matrices"] = [MatrixLayout(tuple(p.shape)).key() for p in group["params"]]
            group["shapes"] = [tuple(getattr(p, "ds_shape", p.shape)) for p in group["params"]]
            checks.check_layouts(group)
            if "param_names" in group:
                self._whole.update(zip(group["param_names"], group["params"], strict=True))
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; ``p.grad`` is only read.

        On several ranks every one of them must call it, as often as the others.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All are asked before any is stepped, because they may refuse.
        for unit, factors in [(u, self.row_factors(u) if self.row_factors else {}) for u in self._prepare()]:
            if unit.exchange is None:
                self._step_adamw(unit)
            else:
                self._step_muon(unit, unit.exchange)
            if factors:
                clip.rescale_(unit, factors, unit.storage.flat(state.compensations(self.state, unit)))
            self._share(unit)
        return loss

    def _step_muon(self, unit: Unit, exchange: Exchange) -> None:
        """Algorithm 1 of the paper: elementwise where slices are stored, Newton-Schulz where whole matrices are."""
        group, record = unit.group, self.telemetry.record(unit.key)
        lr, decay, mu = group["lr"], group["weight_decay"], group["momentum"]
        lost = dict(enumerate(unit.storage.flat(state.compensations(self.state, unit))))
        wire = torch.empty(0, dtype=NS_DTYPES[group["ns_dtype"]], device=unit.storage.device)
        weights, momenta, grads = unit.weights(), state.momenta(self.state, unit), unit.grads
        for i, grad in grads.items():
            update.accumulate_(momenta[i], grad, mu)  # storage: M <- mu M + G

        def directions(turn: Turn) -> list[Tensor]:
            # Rounded once, here, to what Newton-Schulz computes in: a slice that travels is the same as one that stays.
            runs = [
                (update.direction(grads[i][a:b], momenta[i][a:b], mu, group["nesterov"], wire), lengths)
                for (i, a, b), lengths in turn.runs
            ]
            return [part for run, lengths in runs for part in run.split(lengths)]

        for turn, stacks in exchange.to_matrices(grads, directions, wire):  # exchange: whole matrices on their owners
            results = [self._orthogonalize(stack, group) for stack in stacks]  # compute: 0.2 sqrt(max(A, B)) O
            del stacks
            for (i, a, b), change in turn.to_storage(results, wire):  # exchange: where W is stored
                change = change.to(weights[i].device)
                rest = None if (rest := lost.get(i)) is None else rest[a:b]
                update.apply_(weights[i][a:b], change, lr, decay, rest)  # storage: W <- W - lr (change + decay W)
                record.update(unit.kinds[i], change)
            results, change = [], wire  # what is left of this turn must not outlive it
        unit.storage.write_back(weights)

    def _orthogonalize(self, stack: Stack, group: dict[str, Any]) -> Tensor:
        self.telemetry.orthogonalized += len(stack.matrices)
        scaling = group["adjust_lr_fn"], group["update_rms"], group["hidden_size"]
        ortho = newton_schulz(
            stack.matrices,
            steps=group["ns_steps"],
            coefficients=group["ns_coefficients"],
            dtype=NS_DTYPES[group["ns_dtype"]],
            scale=update.scale(stack.shape, *scaling),
        )
        return update.equalize_(ortho, group["update_rms"]) if scaling[0] == "inverse_rms" else ortho

    def _prepare(self) -> list[Unit]:
        """The units that this call must step, after every check; none if nothing may change."""
        # DeepSpeed calls this group by group, and ZeRO-3 leaves the other groups empty meanwhile.
        units = [self._unit(group) for group in self.param_groups if group["params"]]
        verdict = ready(units, look_for_zero=not self.state)
        if verdict.zero:
            # Nobody trains with zeros from the start: an engine (DCP, DeepSpeed without ZeRO) wants the state to exist.
            for unit in units:
                (state.adam if unit.exchange is None else state.momenta)(self.state, unit)
                state.compensations(self.state, unit)
        if verdict.zero or not verdict.any:
            forget(units)
            return []
        for unit in units:
            unit.seen = True
            rate = "muon/lr" if unit.exchange is not None else "muon/adamw_lr"
            self.telemetry.start(unit.key, Record(unit.kinds, unit.weights, (rate, unit.group["lr"])))
        if verdict.finite:
            return units
        self.telemetry.record_skip(*non_finite(units))
        for unit in units:
            self._share(unit)
        return []

    def _share(self, unit: Unit) -> None:
        storage = unit.storage
        if storage.sharded:
            self.telemetry.record(unit.key).share(lambda x: collectives.total(x, storage.group), storage.device)
        forget([unit])

    def _unit(self, group: dict[str, Any]) -> Unit:
        """How ``group`` is stored now; recognised anew whenever its tensors are others than before."""
        key = tuple(map(id, group["params"]))
        if key not in self._units:
            self._units[key] = build(group, self._whole, self.process_group, self._budget(group))
        unit = self._units[key]
        unit.group = group  # load_state_dict replaces the dict
        if unit.shards is not None:
            # Travels in the engine's own checkpoint, where it says which elements its flat tensors hold.
            saved = group.setdefault("shards", {}).setdefault(unit.storage.part, unit.shards)
            if [tuple(x) for x in saved] != unit.shards:
                unit.storage = replace(unit.storage, problem=checks.other_layout(unit.names[0]))
        return unit

    def _budget(self, group: dict[str, Any]) -> int:
        return max(1, self.exchange_bytes // NS_DTYPES[group.get("ns_dtype", "float32")].itemsize)

    def _step_adamw(self, unit: Unit) -> None:
        storage, group = unit.storage, unit.group
        params = state.adam(self.state, unit)
        grads = [p.grad for p in params if p.grad is not None]
        update.adamw_(
            [storage.local(p) for p in params],
            [storage.local(grad) for grad in grads],
            [
                {k: storage.local(v) for k, v in self.state[p].items() if k != "compensation" or update.is_half(p)}
                for p in params
            ],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def metrics(self) -> dict[str, float]:
        """``muon/...`` numbers of the last step, for logging; see :meth:`hf_muon.telemetry.Telemetry.metrics`."""
        return self.telemetry.metrics()

    def __getstate__(self) -> dict[str, Any]:
        """For ``pickle`` and ``copy.deepcopy``; :attr:`row_factors` refuse there, for they hold the model."""
        return {**super().__getstate__(), "row_factors": self.row_factors and clip.not_copied}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "telemetry"):
            self.telemetry = Telemetry()
            self.process_group, self.exchange_bytes = None, 2**27
            self._units, self._whole = {}, WeakValueDictionary()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, bit for bit, or a consolidated state (on any engine and number of ranks).

        As in torch, the saved hyper-parameters replace the present ones; a warning names those that differ. Which
        matrices a parameter holds is taken from the present groups. A consolidated state (``python -m hf_muon
        consolidate``) also sets the weights, to the full precision in which they were trained.

        Raises:
            ValueError: the state is another optimizer's, or of a model with other parameters; nothing is changed then.
        """
        checks.check_algorithms(state_dict)
        if canonical.is_canonical(state_dict):
            saved = canonical.match(self.param_groups, state_dict)
        else:
            checks.check_state_dict(self.param_groups, state_dict)
            saved = state_dict["param_groups"]
        for text in checks.warnings(self.param_groups, saved):
            logger.warning(text)
        if canonical.is_canonical(state_dict):
            units = [
                self._unit({**group, "params": params})
                for group in self.param_groups
                for params in engines.parts(group["params"], checks.names(group), self._whole)
            ]
            canonical.spread(units, state_dict, self.state)
            for group, other in zip(self.param_groups, saved, strict=True):
                group.update({k: v for k, v in other.items() if k not in canonical.NOT_OPTIONS})
            return
        present = [  # and what the version that saved this did not know yet
            {k: group[k] for k in group if k in checks.STRUCTURE[1:] or (k in checks.NEWER and k not in other)}
            for group, other in zip(self.param_groups, saved, strict=True)
        ]
        super().load_state_dict(state_dict)
        for group, structure in zip(self.param_groups, present, strict=True):
            group.update(structure)
        # torch casts floating state to the parameter's dtype, which would round the float32 state of bfloat16 weights;
        # what was saved is put back as it was.
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                if key == "compensation" and not update.is_half(p):
                    del self.state[p][key]
                elif value.shape == p.shape and value.dtype != p.dtype:
                    self.state[p][key] = value.detach().to(device=p.device, copy=True)
