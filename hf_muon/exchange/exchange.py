"""From slices of parameters, wherever they are stored, to whole matrices on their owners, and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..matrices import MatrixLayout
from . import collectives
from .layout import REPLICATED, Placement, span_on
from .ownership import Job, plan_jobs, plan_turns


class Slice(NamedTuple):
    """Elements ``[start, stop)`` of what this rank stores of parameter ``param`` of the group."""

    param: int
    start: int
    stop: int


@dataclass(frozen=True)
class Stack:
    """Equal matrices that this rank owns, ``[n, rows, cols]`` as stored, and their logical shape (A, B)."""

    matrices: Tensor
    shape: tuple[int, int]


class Exchange:
    """The plan for one group of parameters, and its turns.

    Args:
        layouts: the matrices of each parameter.
        placements: where each parameter lives; the same on every rank.
        rank, ranks: of ``group``.
        group: process group of the ranks that share these parameters; unused with one rank.
        budget: elements that a rank orthogonalizes at a time; a larger matrix comes alone.
    """

    def __init__(
        self,
        layouts: Sequence[MatrixLayout],
        placements: Sequence[Placement],
        *,
        rank: int = 0,
        ranks: int = 1,
        group: Any = None,
        budget: int,
    ) -> None:
        self.rank, self.ranks, self.group, self.budget = rank, ranks, group, budget
        self.jobs = plan_jobs(layouts, placements, ranks)
        # Where this rank's part of each parameter begins.
        self.begins = [span_on(p, rank, 0)[0] for p in placements]
        self._turns: dict[frozenset[int], list[Turn]] = {}

    def turns(self, active: Collection[int]) -> list[Turn]:
        """The turns of a step in which the parameters ``active`` have gradients (the same on every rank)."""
        key = frozenset(active)
        if key not in self._turns:
            jobs = [job for job in self.jobs if job.param in key]
            # Which parameters have gradients hardly ever changes; where it changes at random, memory must not fill.
            self._turns = {key: [Turn(self, t) for t in plan_turns(jobs, self.ranks, self.budget)]}
        return self._turns[key]

    def to_matrices(
        self, active: Collection[int], values: Callable[[Turn], Sequence[Tensor]], like: Tensor
    ) -> Iterator[tuple[Turn, list[Stack]]]:
        """Every turn and the whole matrices that this rank owns in it.

        While the caller computes on those, the slices of the next turn are on their way.

        Args:
            active: the parameters that have gradients.
            values: gives the 1-D values of a turn's :attr:`Turn.slices`.
            like: any tensor of their dtype and device; a rank that holds nothing in a turn still takes part.
        """
        turns = self.turns(active)
        coming: list[Callable[[], list[Stack]]] = []
        for i, turn in enumerate(turns):
            if not coming:
                coming.append(turn.send(values(turn), like))
            for following in turns[i + 1 : i + 2]:
                if following.travels:  # what stays need not be held early
                    coming.append(following.send(values(following), like))
            yield turn, coming.pop(0)()


class Turn:
    """Some matrices on every owner: first :meth:`send`, then :meth:`to_storage`.

    Every rank goes through the same turns in the same order; collectives happen in those where anything travels.
    """

    def __init__(self, exchange: Exchange, jobs: tuple[Job, ...]) -> None:
        self.exchange = exchange
        self.jobs = jobs
        rank = exchange.rank
        self._owned = [job for job in jobs if job.owner == rank]
        self._replicated = exchange.ranks > 1 and any(job.holders == REPLICATED for job in jobs)
        self.travels = any(job.straddles for job in jobs)
        # (job, slice of it stored here), in the order in which both sides of a message go through it
        self._here: list[tuple[Job, Slice]] = []
        self._incoming: list[list[tuple[Job, int]]] = [[] for _ in range(exchange.ranks)]
        for job in jobs:
            if job.holders == REPLICATED:
                if job.owner == rank:
                    self._here.append((job, Slice(job.param, job.start, job.stop)))
                continue
            for span in job.holders:
                if span.rank == rank:
                    begin = exchange.begins[job.param]
                    self._here.append((job, Slice(job.param, span.start - begin, span.stop - begin)))
                elif job.owner == rank:
                    self._incoming[span.rank].append((job, span.stop - span.start))
        self._groups = _by_shape(self._owned)
        self.runs = _runs(self.slices)  # of what is stored here

    @property
    def slices(self) -> list[Slice]:
        """What :meth:`send` takes, of what is stored here."""
        return [piece for _, piece in self._here]

    def send(self, values: Sequence[Tensor], like: Tensor) -> Callable[[], list[Stack]]:
        """Send the values of :attr:`slices` to the owners of their matrices.

        Returns:
            A function that waits for what others send and gives the stacks that this rank owns; call it once.
        """
        rank, ranks = self.exchange.rank, self.exchange.ranks
        parts: dict[Job, list[tuple[int, Tensor]]] = {job: [] for job in self._owned}
        outgoing: list[list[Tensor]] = [[] for _ in range(ranks)]
        for (job, _), value in zip(self._here, values, strict=True):
            if job.owner == rank:
                parts[job].append((rank, value))
            else:
                outgoing[job.owner].append(value)
        sizes = [sum(n for _, n in pieces) for pieces in self._incoming]
        arrived = collectives.all_to_all(outgoing, sizes, like, self.exchange.group) if self.travels else None

        def stacks() -> list[Stack]:
            for source, buffer in enumerate(arrived() if arrived is not None else ()):
                pieces = self._incoming[source]
                for (job, _), part in zip(pieces, buffer.split([n for _, n in pieces]), strict=True):
                    parts[job].append((source, part))
            # A parameter's elements are stored in the order of the ranks.
            whole = {job: _join([t for _, t in sorted(found, key=lambda x: x[0])]) for job, found in parts.items()}
            parts.clear()
            return [Stack(_stack(members, whole), shape) for shape, members in self._groups]

        return stacks

    def to_storage(self, results: Sequence[Tensor], like: Tensor) -> Iterator[tuple[Slice, Tensor]]:
        """Updates, one stack per stack of :meth:`send`, as 1-D tensors of the slices stored here.

        Args:
            results: the stacks.
            like: any tensor of their dtype and device; a rank that owns nothing in this turn still takes part.
        """
        exchange = self.exchange
        done: dict[Job, Tensor] = {}
        for (_, members), result in zip(self._groups, results, strict=True):
            _unstack(members, result, done)
        if self._replicated:
            yield from self._to_all(done, like)
            return
        incoming = [0] * exchange.ranks
        outgoing: list[list[Tensor]] = [[] for _ in range(exchange.ranks)]
        for job, piece in self._here:
            if job.owner != exchange.rank:
                incoming[job.owner] += piece.stop - piece.start
        for job in self._owned:
            for span in job.holders:
                if span.rank != exchange.rank:
                    outgoing[span.rank].append(done[job][span.start - job.start : span.stop - job.start])
        received = [like.new_empty(0)] * exchange.ranks
        if self.travels:
            received = collectives.all_to_all(outgoing, incoming, like, exchange.group)()
        at = [0] * exchange.ranks
        for job, piece in self._here:
            if job.owner == exchange.rank:
                begin = exchange.begins[job.param] + piece.start - job.start
                yield piece, done[job][begin : begin + piece.stop - piece.start]
            else:
                begin = at[job.owner]
                at[job.owner] += piece.stop - piece.start
                yield piece, received[job.owner][begin : at[job.owner]]

    def _to_all(self, done: dict[Job, Tensor], like: Tensor) -> Iterator[tuple[Slice, Tensor]]:
        """One owner after the other sends its updates to all: nothing is padded, and one owner's share is held."""
        owned: list[list[Job]] = [[] for _ in range(self.exchange.ranks)]
        for job in self.jobs:
            owned[job.owner].append(job)
        for owner, jobs in enumerate(owned):
            if not jobs:
                continue
            sizes = [job.numel for job in jobs]
            mine = owner == self.exchange.rank
            updates = torch.cat([done.pop(job) for job in jobs]) if mine else like.new_empty(sum(sizes))
            collectives.broadcast(updates, owner, self.exchange.group)
            for job, part in zip(jobs, updates.split(sizes), strict=True):
                yield Slice(job.param, job.start, job.stop), part


def _runs(slices: Sequence[Slice]) -> list[tuple[Slice, list[int]]]:
    """Slices that lie side by side in a parameter as one, with the length of each: elementwise work is done by run."""
    runs: list[tuple[Slice, list[int]]] = []
    for piece in slices:
        if runs and runs[-1][0].param == piece.param and runs[-1][0].stop == piece.start:
            before, lengths = runs[-1]
            runs[-1] = before._replace(stop=piece.stop), [*lengths, piece.stop - piece.start]
        else:
            runs.append((piece, [piece.stop - piece.start]))
    return runs


_Member = tuple[Job, int, int]  # a job, which piece of its layout, how many matrices


def _by_shape(jobs: Sequence[Job]) -> list[tuple[tuple[int, int], list[_Member]]]:
    """Pieces of jobs whose matrices may share a stack: of equal shape, stored alike."""
    groups: dict[tuple[int, int, bool], list[_Member]] = {}
    for job in jobs:
        for index, (n, a, b) in enumerate(job.layout.matrices()):
            groups.setdefault((a, b, job.layout.transposed), []).append((job, index, n))
    return [((a, b), members) for (a, b, _), members in groups.items()]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _stack(members: list[_Member], whole: dict[Job, Tensor]) -> Tensor:
    stacks = []
    for job, index, _ in members:
        piece = job.layout.pieces(whole[job].view(job.layout.shape))[index]
        stacks.append(job.layout.to_matrices(piece, index))
    return _join(stacks)


def _unstack(members: list[_Member], stack: Tensor, done: dict[Job, Tensor]) -> None:
    """Write each member's matrices back into the row-major elements of its job."""
    for (job, index, _), part in zip(members, stack.split([n for _, _, n in members]), strict=True):
        if not job.layout.sizes and not job.layout.heads:  # one piece: nothing to interleave with
            done[job] = part.reshape(-1)
            continue
        if job not in done:
            done[job] = part.new_empty(job.numel)
        piece = job.layout.pieces(done[job].view(job.layout.shape))[index]
        piece.copy_(job.layout.from_matrices(part, index, piece))
