"""A group as it is stored at this step, and the check that all ranks are about to do the same with it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, engines
from .engines import LayoutError, Storage
from .exchange import collectives
from .exchange.exchange import Exchange
from .exchange.layout import span_on
from .exchange.ownership import Job
from .matrices import MatrixLayout


@dataclass(eq=False)
class Unit:
    """The parameters of one group, or the part of them that an engine steps at once."""

    group: dict[str, Any]
    storage: Storage
    names: list[str]
    kinds: list[str]
    numels: list[int]
    """Elements of each whole parameter."""
    exchange: Exchange | None
    """None for AdamW, which needs no matrices."""
    layout_digest: int
    seen: bool = False
    """Whether a step has been taken with it: what cannot change is compared between ranks once."""
    grads: dict[int, Tensor] = field(default_factory=dict)
    """Of this step, by parameter: this rank's part, 1-D; those without a gradient are absent."""

    @property
    def key(self) -> tuple[str, str]:
        """Names the unit in telemetry."""
        return self.group["algorithm"], self.names[0]

    @property
    def shards(self) -> list[tuple[str, int, int, int]] | None:
        """What a flat holder holds, for its checkpoint: name, offset in the holder, start and stop in the parameter."""
        storage = self.storage
        if storage.offsets is None:
            return None
        spans = [span_on(placement, storage.rank, 0) for placement in storage.placements]
        return [(n, offset, a, b) for n, offset, (a, b) in zip(self.names, storage.offsets, spans, strict=True)]

    def weights(self) -> list[Tensor]:
        """This rank's part of each parameter, 1-D."""
        return [w for w in self.storage.flat([p.detach() for p in self.storage.holders]) if w is not None]


def build(group: dict[str, Any], whole: Mapping[str, Tensor], process_group: Any, budget: int) -> Unit:
    """Recognise how ``group`` is stored, and plan its exchange.

    Raises:
        LayoutError: see :func:`hf_muon.engines.recognise`.
    """
    names = checks.names(group)
    muon = group["algorithm"] == "muon"
    layouts = [MatrixLayout.of(key) for key in group["matrices"]] if muon else []
    if muon and len(layouts) != len(names):
        raise LayoutError(f"the muon group of {names[0]} has {len(names)} parameters but {len(layouts)} layouts")
    storage = engines.recognise(group["params"], names, group["shapes"], whole, process_group)
    members = storage.members
    kinds = group.get("kinds") or ["matrix" if muon else "adamw"] * len(names)
    exchange = None
    if muon:
        exchange = Exchange(
            [layouts[i] for i in members],
            storage.placements,
            rank=storage.rank,
            ranks=storage.ranks,
            group=storage.group,
            budget=budget,
        )
    numels = [prod(group["shapes"][i]) for i in members]
    text = repr(
        (
            storage.engine,
            storage.ranks,
            [names[i] for i in members],
            group["shapes"],
            layouts,
            storage.placements,
            budget,
        )
    )
    return Unit(
        group=group,
        storage=storage,
        names=[names[i] for i in members],
        kinds=[kinds[i] for i in members],
        numels=numels,
        exchange=exchange,
        layout_digest=zlib.crc32(text.encode()),
    )


class Verdict(NamedTuple):
    """What all ranks know of a step's gradients."""

    any: bool
    """There is one."""
    finite: bool
    """None holds a NaN, an infinity or more than the momentum can sum."""
    zero: bool
    """All are exactly zero (not looked at unless asked)."""


def ready(units: Sequence[Unit], *, look_for_zero: bool = False) -> Verdict:
    """Check everything before anything changes, on all ranks alike.

    Raises:
        RuntimeError: a gradient that cannot be used, here or on another rank; ranks that disagree about layouts,
            options or which parameters have gradients. All ranks raise.
    """
    error: Exception | None = None
    finite, zero = True, False
    try:
        for unit in units:
            _take_gradients(unit)
        grads = [grad for unit in units for grad in unit.grads.values()]
        finite = checks.all_finite(grads)
        zero = look_for_zero and not any(bool(grad.any()) for grad in grads)
    except (RuntimeError, TypeError, ValueError) as caught:
        error = caught
    together: dict[int, list[Unit]] = {}
    for unit in units:
        if unit.storage.ranks > 1:
            together.setdefault(id(unit.storage.group), []).append(unit)
    for same in together.values():
        finite, zero = _agree(same, error, finite, zero)
    if error is not None:
        raise error
    return Verdict(any(unit.grads for unit in units), finite, zero)


def _take_gradients(unit: Unit) -> None:
    # torch's chained schedulers end at -1e-21 where they mean 0, and AdamW takes that too.
    checks.number("lr", unit.group["lr"], -1e-12)
    storage = unit.storage
    if storage.problem:
        raise LayoutError(storage.problem)
    unit.grads = {}
    for name, p in zip(unit.names, storage.holders, strict=False):
        if p.grad is not None:
            checks.check_gradient(name, storage.local(p), storage.local(p.grad))
    unit.grads = {i: g for i, g in enumerate(storage.flat([p.grad for p in storage.holders])) if g is not None}


def _agree(units: list[Unit], error: Exception | None, finite: bool, zero: bool) -> tuple[bool, bool]:
    """One small collective: whether all ranks' gradients are finite, and zero; raises on all ranks if they disagree."""
    storage = units[0].storage
    present = [sorted(unit.grads) for unit in units]
    options = [{k: v for k, v in u.group.items() if k not in (*checks.STRUCTURE, "shards")} for u in units]
    digests = [
        zlib.crc32(repr([unit.layout_digest for unit in units]).encode()),
        zlib.crc32(repr([sorted(o.items()) for o in options]).encode()),
        zlib.crc32(repr(present).encode()),
        0 if error is not None else _replica_digest([u for u in units if u.storage.engine == "ddp" and not u.seen]),
    ]
    values = [error is not None, not finite, not zero, *digests, *(-d for d in digests)]
    failed, bad, some, *both = collectives.maximum([int(v) for v in values], storage.device, storage.group)
    if failed:
        raise error or RuntimeError("another rank cannot take this step and says why; nothing has been changed here")
    differ = [high != -low for high, low in zip(both[: len(digests)], both[len(digests) :], strict=True)]
    if any(differ):
        _explain(units, differ, options, present)
    return not bad, not some


def _replica_digest(units: list[Unit]) -> int:
    """Of weights and gradients that should be equal on all ranks; 0 if there are none to compare."""
    tensors = [t for u in units for t in (*u.storage.holders, *u.grads.values()) if t.numel()]
    if not tensors:
        return 0
    norms = torch._foreach_norm([t.detach() for t in tensors])
    return zlib.crc32(repr([float(n) for n in norms]).encode())


def _explain(units: list[Unit], differ: list[bool], options: list[dict[str, Any]], present: list[list[int]]) -> None:
    """All ranks know that they disagree; find out in what, and raise."""
    storage = units[0].storage
    what, mine, remedy = (
        ("where parameters live", [(u.names, u.storage.engine, u.storage.placements) for u in units], "the same model"),
        ("the optimizer's options", options, "the same arguments"),
        (
            "which parameters have gradients",
            [u.names[i] for u, found in zip(units, present, strict=True) for i in found],
            "DistributedDataParallel (find_unused_parameters=True), or gradients for the same parameters,",
        ),
        (
            "weights or gradients that should be replicas",
            [[float(t.norm()) for t in u.storage.holders] for u in units],
            "DistributedDataParallel, or share_newton_schulz=false for ranks that train apart,",
        ),
    )[differ.index(True)]
    everybody = [repr(x) for x in collectives.gather_objects(mine, storage.group)]
    other = next((r for r, text in enumerate(everybody) if text != everybody[0]), 0)
    at = next((i for i, (a, b) in enumerate(zip(everybody[0], everybody[other], strict=False)) if a != b), 0)
    at = max(0, at - 80)
    raise LayoutError(
        f"ranks disagree about {what}: rank 0 has ...{everybody[0][at : at + 160]}..., rank {other} has "
        f"...{everybody[other][at : at + 160]}... Remedy: {remedy} on every rank; nothing has been changed"
    )


def non_finite(units: Sequence[Unit]) -> tuple[str, int]:
    """What was not finite on this rank, in words, and how many matrices it touches."""
    bad: list[str] = []
    matrices = 0
    for unit in units:
        for i, grad in unit.grads.items():
            if checks.all_finite([grad]):
                continue
            bad.append(unit.names[i])
            for job in unit.exchange.jobs if unit.exchange is not None else ():
                if job.param == i:
                    matrices += _non_finite_matrices(grad, job, unit.storage)
    if not bad:
        return "a gradient on another rank is not finite", 0
    return f"{len(bad)} gradients are not finite, the first of {bad[0]}", matrices


def _non_finite_matrices(grad: Tensor, job: Job, storage: Storage) -> int:
    """How many matrices of a job hold a NaN, an infinity or more than the momentum can sum, in what is stored here."""
    begin, end = span_on(storage.placements[job.param], storage.rank, grad.numel())
    whole = grad.new_zeros(job.numel)
    a, b = max(begin, job.start), min(end, job.stop)
    if a < b:
        whole[a - job.start : b - job.start] = grad[a - begin : b - begin]
    stacks = [
        job.layout.to_matrices(piece, i) for i, piece in enumerate(job.layout.pieces(whole.view(job.layout.shape)))
    ]
    return sum(int((~(stack.abs() <= checks.LARGEST).flatten(1).all(dim=1)).sum()) for stack in stacks)
