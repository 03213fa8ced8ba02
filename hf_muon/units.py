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

# What a CPU that exchanges nothing orthogonalizes at a time, in elements: larger batches are no faster there, and
# buffers so large that the allocator returns them to the system after every use cost more than what is done with them.
CPU_TURN = 2**21


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
    layout: str = field(repr=False)
    """All that the plan follows from, in words: the same on every rank."""
    layout_digest: int = field(init=False)
    seen: bool = False
    """Whether a step has been taken with it: what cannot change is compared between ranks once."""
    grads: dict[int, Tensor] = field(default_factory=dict)
    """Of this step, by parameter: this rank's part, 1-D; those without a gradient are absent."""

    def __post_init__(self) -> None:
        self.layout_digest = zlib.crc32(self.layout.encode())  # once: at scale the words are megabytes

    @property
    def key(self) -> tuple[str, str]:
        """Names the unit in telemetry."""
        named = "param_names" in self.group
        return self.group["algorithm"], self.names[0] if named else str(id(self.storage.holders[0]))

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
        alone_on_cpu = storage.ranks == 1 and storage.device.type == "cpu"
        exchange = Exchange(
            [layouts[i] for i in members],
            storage.placements,
            rank=storage.rank,
            ranks=storage.ranks,
            group=storage.group,
            budget=min(budget, CPU_TURN) if alone_on_cpu else budget,
        )
    numels = [prod(group["shapes"][i]) for i in members]
    for i, numel, placement in zip(members, numels, storage.placements, strict=True):
        if placement and placement[-1].stop != numel:
            raise LayoutError(
                f"{names[i]} had {numel} elements and has {placement[-1].stop} now: tensor parallelism, or another "
                "engine that cuts parameters by itself, is not served; nothing has been changed"
            )
    what = zip(names, kinds, group["shapes"], layouts or names, strict=True)
    described = (storage.engine, storage.ranks, budget, members, storage.placements, list(what))
    return Unit(
        group=group,
        storage=storage,
        names=[names[i] for i in members],
        kinds=[kinds[i] for i in members],
        numels=numels,
        exchange=exchange,
        layout=repr(described),
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
        # DeepSpeed steps group by group, so that zeros in one say nothing of the others.
        look = look_for_zero and all(unit.storage.offsets is None for unit in units)
        zero = look and bool(grads) and not any(bool(grad.any()) for grad in grads)
    except (RuntimeError, TypeError, ValueError) as caught:
        error = caught
    together: dict[int, list[Unit]] = {}
    for unit in units:
        if unit.storage.ranks > 1:
            together.setdefault(id(unit.storage.group), []).append(unit)
    for same in together.values():
        finite, zero = _agree(same, error, finite, zero)
    if error is not None:
        forget(units)
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


def forget(units: Sequence[Unit]) -> None:
    """Let go of the gradients of a step that is over."""
    for unit in units:
        unit.grads = {}


def _agree(units: list[Unit], error: Exception | None, finite: bool, zero: bool) -> tuple[bool, bool]:
    """One small collective: whether all ranks' gradients are finite, and zero; raises on all ranks if they disagree."""
    storage = units[0].storage
    present = [sorted(unit.grads) for unit in units]
    options = [{k: v for k, v in u.group.items() if k not in (*checks.STRUCTURE, "shards")} for u in units]
    digests = [
        zlib.crc32(repr(x).encode())
        for x in (
            [unit.layout_digest for unit in units],
            [sorted(o.items()) for o in options],
            present,
            [] if error is not None else _replica_norms(units),
        )
    ]
    values = [error is not None, not finite, not zero, *digests, *(-d for d in digests)]
    failed, bad, some, *both = collectives.maximum([int(v) for v in values], storage.device, storage.group)
    if failed:
        raise error or RuntimeError("another rank cannot take this step and says why; nothing has been changed here")
    differ = [high != -low for high, low in zip(both[: len(digests)], both[len(digests) :], strict=True)]
    if any(differ):
        _explain(units, differ, options, present)
    return not bad, not some


def _replica_norms(units: list[Unit]) -> list[tuple[str, list[float]]]:
    """Of weights and gradients that should be equal on all ranks, before the first step."""
    out = []
    for unit in units:
        if unit.storage.engine == "ddp" and not unit.seen:
            for i, name in enumerate(unit.names):
                both = (unit.storage.holders[i].detach(), unit.grads.get(i))
                out.append((name, [float(torch.linalg.vector_norm(t)) for t in both if t is not None]))
    return out


def _explain(units: list[Unit], differ: list[bool], options: list[dict[str, Any]], present: list[list[int]]) -> None:
    """All ranks know that they disagree; find out in what, and raise."""
    storage = units[0].storage
    what, mine, remedy = (
        ("where parameters live", [u.layout for u in units], "the same model and arguments"),
        ("the optimizer's options", options, "the same arguments"),
        (
            "which parameters have gradients",
            [u.names[i] for u, found in zip(units, present, strict=True) for i in found],
            "DistributedDataParallel (find_unused_parameters=True), or gradients for the same parameters,",
        ),
        (
            "weights or gradients that should be replicas",
            _replica_norms(units),
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
