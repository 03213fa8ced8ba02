"""Who orthogonalizes what, and in which turn: pure integers, computed alike on every rank.

Each job (a slab of matrices) gets one owner. A matrix that is whole somewhere stays there; one that straddles ranks
goes to the holder of most of it, unless that rank has its share of the Newton-Schulz work already; and if the busiest
rank is still too busy, it gives whole matrices away, as long as little enough travels.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from ..matrices import MatrixLayout
from .layout import REPLICATED, Placement, cut

# Work per rank may exceed the mean by this much before matrices travel for balance alone.
TOLERANCE = 1.05
# At most this share of (ranks - 1) times all elements may travel for balance: 4 % of what a data-parallel step sends
# anyway (each rank sends (ranks - 1) / ranks of all elements, twice).
MOVE_SHARE = 0.04


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Job:
    """One slab of one parameter: what one rank orthogonalizes at once."""

    param: int
    """Index of the parameter in its group."""
    start: int
    stop: int
    layout: MatrixLayout
    """The matrices in it; 2-D."""
    holders: Placement
    """Who stores it, in elements of the parameter; empty: everybody stores all."""
    owner: int = -1

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start

    @property
    def cost(self) -> int:
        """Floating-point operations of one Newton-Schulz step on its matrices."""
        return sum(n * step_flops(a, b) for n, a, b in self.layout.matrices())

    @property
    def straddles(self) -> bool:
        """Whether some of it is stored where it is not computed."""
        return self.holders != REPLICATED and any(span.rank != self.owner for span in self.holders)


def step_flops(a: int, b: int) -> int:
    """Operations of ``X X^T``, its square, and the product with ``X``, on the smaller side."""
    small, large = min(a, b), max(a, b)
    return 4 * small * small * large + 2 * small**3


def plan_jobs(layouts: Sequence[MatrixLayout], placements: Sequence[Placement], ranks: int) -> list[Job]:
    """Every slab of every parameter with its owner, in the order of the parameters."""
    jobs = [
        Job(i, slab.start, slab.stop, slab.layout, cut(placement, slab.start, slab.stop))
        for i, (layout, placement) in enumerate(zip(layouts, placements, strict=True))
        for slab in layout.slabs()
    ]
    return [replace(job, owner=owner) for job, owner in zip(jobs, _assign(jobs, ranks), strict=True)]


def _assign(jobs: list[Job], ranks: int) -> list[int]:
    if ranks == 1:
        return [0] * len(jobs)
    costs = [job.cost for job in jobs]
    owners = [-1] * len(jobs)
    loads = [0] * ranks
    for i, job in enumerate(jobs):
        if len(job.holders) == 1:
            owners[i] = job.holders[0].rank
            loads[owners[i]] += costs[i]
    limit = TOLERANCE * sum(costs) / ranks
    heap = [(0, r) for r in range(ranks)]  # for replicated jobs only, which come alone
    for i in sorted((i for i in range(len(jobs)) if owners[i] < 0), key=lambda i: (-costs[i], i)):
        job = jobs[i]
        if job.holders == REPLICATED:
            load, owner = heapq.heappop(heap)
            heapq.heappush(heap, (load + costs[i], owner))
        else:
            # Shares are compared in percent: that the last of equal chunks is an element short must not decide.
            owner = min(
                job.holders,
                key=lambda s: (
                    max(0.0, loads[s.rank] + costs[i] - limit),
                    -round(100 * (s.stop - s.start) / job.numel),
                    loads[s.rank],
                    s.rank,
                ),
            ).rank
        owners[i] = owner
        loads[owner] += costs[i]
    if jobs and jobs[0].holders != REPLICATED:
        _even_out(jobs, costs, owners, loads)
    return owners


def _even_out(jobs: list[Job], costs: list[int], owners: list[int], loads: list[int]) -> None:
    """Move jobs off the busiest ranks, in place, while that helps and little enough travels."""
    ranks = len(loads)
    limit = TOLERANCE * sum(loads) / ranks
    owned: list[set[int]] = [set() for _ in loads]
    for i, owner in enumerate(owners):
        owned[owner].add(i)
    left = MOVE_SHARE * (ranks - 1) * sum(job.numel for job in jobs)
    left -= sum(_travels(job, owner) for job, owner in zip(jobs, owners, strict=True))
    while left > 0:
        source = max(range(ranks), key=lambda r: (loads[r], -r))
        target = min(range(ranks), key=lambda r: (loads[r], r))
        excess = loads[source] - limit
        if excess <= 0:
            return
        # The smallest job that takes the whole excess away, else the largest there is; the target must stay below.
        fitting = [i for i in owned[source] if loads[target] + costs[i] < loads[source]]
        enough = [i for i in fitting if costs[i] >= excess and loads[target] + costs[i] <= limit]
        best = (
            min(enough, key=lambda i: (costs[i], i))
            if enough
            else max(fitting, key=lambda i: (costs[i], -i), default=-1)
        )
        if best < 0 or _travels(jobs[best], target) > left:
            return
        left -= _travels(jobs[best], target) - _travels(jobs[best], source)
        owners[best] = target
        owned[source].remove(best)
        owned[target].add(best)
        loads[source] -= costs[best]
        loads[target] += costs[best]


def _travels(job: Job, owner: int) -> int:
    """Elements that come from other ranks, and go back."""
    return sum(s.stop - s.start for s in job.holders if s.rank != owner)


def plan_turns(jobs: Sequence[Job], ranks: int, budget: int) -> list[tuple[Job, ...]]:
    """The jobs in turns of at most ``budget`` elements on each owner (or one job, if that is larger).

    Every rank works through its own queue, so that no rank waits while others compute. What travels comes first, in as
    few turns as possible; equal shapes come together.
    """
    queues: list[list[Job]] = [[] for _ in range(ranks)]
    for job in sorted(
        jobs, key=lambda j: (not j.straddles, j.layout.matrices(), j.layout.transposed, j.param, j.start)
    ):
        queues[job.owner].append(job)
    chunks = [list(_chunks(queue, budget)) for queue in queues]
    return [tuple(itertools.chain(*turn)) for turn in itertools.zip_longest(*chunks, fillvalue=())]


def _chunks(queue: list[Job], budget: int) -> list[list[Job]]:
    out: list[list[Job]] = []
    room = 0
    for job in queue:
        if not out or job.numel > room:
            out.append([])
            room = budget
        out[-1].append(job)
        room -= job.numel
    return out


def work(jobs: Sequence[Job], ranks: int) -> list[int]:
    """Newton-Schulz operations per step of the iteration, by rank."""
    out = [0] * ranks
    for job in jobs:
        out[job.owner] += job.cost
    return out


def traffic(jobs: Sequence[Job], ranks: int) -> list[int]:
    """Elements that each rank sends in one optimizer step: slices to owners, updates back to storage.

    Multiply by the bytes of an element on the wire. The updates of replicated parameters go around a ring: every rank
    but the one before the owner passes them on.
    """
    sent = [0] * ranks
    last = [0] * ranks
    for job in jobs:
        for span in job.holders:
            if span.rank != job.owner:
                sent[span.rank] += span.stop - span.start
                sent[job.owner] += span.stop - span.start
        last[job.owner - 1] += job.numel if job.holders == REPLICATED else 0
    replicated = sum(last)
    return [s + replicated - x for s, x in zip(sent, last, strict=True)] if ranks > 1 else sent


def elements(layouts: Sequence[MatrixLayout]) -> int:
    """Elements of all matrices."""
    return sum(prod(layout.shape) for layout in layouts)
