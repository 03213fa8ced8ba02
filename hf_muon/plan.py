"""What a step would cost on paper: the layout and ownership code that the optimizer runs, for any number of ranks.

Conventions: bytes that leave one rank in one optimizer step. Collectives are rings: a reduce-scatter or an all-gather
of E elements sends ``(N - 1) / N * E`` elements per rank, an all-reduce twice that; an all-to-all sends what leaves the
rank. AdamW then sends, for all trained elements: DDP an all-reduce of gradients; ZeRO-1 and -2 a reduce-scatter of
gradients and an all-gather of weights; ZeRO-3 and FSDP2 a reduce-scatter and two all-gathers. Muon sends the same, and
what is listed as extra; one small all-reduce per group, for agreement and metrics, is in neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import prod
from typing import Any

from .config import NS_DTYPES, MuonConfig
from .exchange.layout import REPLICATED, Placement, Span, even_placement, flat_placements
from .exchange.ownership import Job, plan_jobs, plan_turns, traffic, work
from .matrices import MatrixLayout
from .orthogonalize import MAX_ELEMENTS

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
MAX_RANKS = 4096
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One engine at one number of ranks; bytes and operations are of one optimizer step."""

    engine: str
    ranks: int
    adamw_bytes: float
    """Sent by each rank whatever the optimizer is."""
    extra_bytes: tuple[int, ...]
    """Sent by each rank for Muon besides: matrices to their owners, and updates back."""
    flops: tuple[int, ...]
    """Of Newton-Schulz on each rank."""
    matrices: int
    """On all ranks together; each is orthogonalized once."""
    state_bytes: int
    """Optimizer state of the rank that stores the most: float32, one value per element under Muon and two else."""
    adamw_state_bytes: int
    """The same if AdamW trained everything."""
    transient_bytes: int
    """What a step allocates for a while on any rank, at most."""

    @property
    def extra_mean(self) -> float:
        """Mean over the ranks."""
        return sum(self.extra_bytes) / self.ranks

    @property
    def ratio(self) -> float:
        """Bytes sent under Muon, by those under AdamW; 1 where nobody sends anything."""
        return 1 + self.extra_mean / self.adamw_bytes if self.adamw_bytes else 1.0

    @property
    def imbalance(self) -> float:
        """Newton-Schulz work of the busiest rank, by the mean."""
        return max(self.flops) * self.ranks / sum(self.flops)

    def summary(self) -> dict[str, Any]:
        """The numbers of the table, by name."""
        out = {k: v for k, v in asdict(self).items() if k not in ("extra_bytes", "flops")}
        return out | {
            "extra_bytes_mean": self.extra_mean,
            "extra_bytes_max": max(self.extra_bytes),
            "ratio": self.ratio,
            "ratio_max": 1 + max(self.extra_bytes) / self.adamw_bytes if self.adamw_bytes else 1.0,
            "flops_mean": sum(self.flops) / self.ranks,
            "imbalance": self.imbalance,
            "matrices_per_rank": self.matrices / self.ranks,
        }


def plan(
    groups: Sequence[Mapping[str, Any]],
    engine: str,
    ranks: int,
    config: MuonConfig | None = None,
    *,
    grad_bytes: int = 2,
    param_bytes: int = 2,
    sub_group_size: int = 10**9,
) -> Plan:
    """What one step costs.

    Args:
        groups: what :func:`hf_muon.param_groups` makes of a model, which may be on the meta device.
        engine: one of :data:`ENGINES`.
        ranks: data-parallel ranks, 1 to 4096.
        config: options; ``exchange_bytes``, ``ns_dtype``, ``ns_steps`` and ``share_newton_schulz`` matter here.
        grad_bytes: of an element when gradients are reduced.
        param_bytes: of an element when weights are gathered.
        sub_group_size: DeepSpeed's option of that name, ZeRO-3 only: elements that it steps at a time on a rank.

    Raises:
        ValueError: an unknown engine, or ranks outside of their range.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; valid: {', '.join(ENGINES)}")
    if not 1 <= ranks <= MAX_RANKS:
        raise ValueError(f"ranks must be in [1, {MAX_RANKS}], got {ranks}")
    config = config or MuonConfig()
    shapes = [[tuple(p.shape) for _, p in group["params"]] for group in groups]
    stored = [_stored(s, engine, ranks) for s in shapes]
    state = [(4 if group["algorithm"] == "muon" else 8) * n for group, n in zip(groups, stored, strict=True)]
    size = NS_DTYPES[config.ns_dtype].itemsize
    alone = engine == "ddp" and not config.share_newton_schulz  # every rank does everything
    sharing = 1 if alone else ranks
    sent, operations, matrices, transient = [0] * ranks, [0] * ranks, 0, 0
    for group, members in zip(groups, shapes, strict=True):
        if group["algorithm"] != "muon":
            continue
        layouts = [MatrixLayout.of(key) for key in group["matrices"]]
        matrices += sum(layout.total() for layout in layouts)
        for unit in _units(members, engine, sharing, sub_group_size):
            jobs = plan_jobs(
                [layouts[i] for i in unit], _placements([members[i] for i in unit], engine, sharing), sharing
            )
            budget = max(1, config.exchange_bytes // size)
            sent = [a + size * b for a, b in zip(sent, traffic(jobs, sharing) * (ranks // sharing), strict=True)]
            costs = work(jobs, sharing) * (ranks // sharing)
            operations = [a + config.ns_steps * b for a, b in zip(operations, costs, strict=True)]
            transient = max(transient, _transient(plan_turns(jobs, sharing, budget), sharing, size))
    trained = sum(prod(shape) for members in shapes for shape in members)
    each = {"ddp": 2 * grad_bytes, "zero3": grad_bytes + 2 * param_bytes, "fsdp2": grad_bytes + 2 * param_bytes}
    return Plan(
        engine=engine,
        ranks=ranks,
        adamw_bytes=each.get(engine, grad_bytes + param_bytes) * trained * (ranks - 1) / ranks,
        extra_bytes=tuple(sent),
        flops=tuple(operations),
        matrices=matrices,
        state_bytes=sum(state),
        adamw_state_bytes=8 * sum(stored),
        transient_bytes=transient,
    )


def _placements(shapes: Sequence[Shape], engine: str, ranks: int) -> list[Placement]:
    numels = [prod(shape) for shape in shapes]
    if engine in ("zero1", "zero2"):
        begins = [0, *accumulate(numels)]
        return flat_placements(begins[:-1], numels, _partition(shapes, ranks), ranks)
    if engine == "ddp":
        return [REPLICATED if ranks > 1 else (Span(0, 0, n),) for n in numels]
    units = [prod(shape[1:]) if engine == "fsdp2" else 1 for shape in shapes]
    return [even_placement(n, ranks, unit) for n, unit in zip(numels, units, strict=True)]


def _partition(shapes: Sequence[Shape], ranks: int) -> int:
    """DeepSpeed pads a group's buffer to a multiple of two elements per rank, and leaves no gaps in it by default."""
    return 2 * -(-sum(map(prod, shapes)) // (2 * ranks))


def _stored(shapes: Sequence[Shape], engine: str, ranks: int) -> int:
    """Elements of a group on the first rank, which holds the most."""
    if engine in ("zero1", "zero2"):
        return _partition(shapes, ranks)
    return sum(p[0].stop if p else prod(s) for s, p in zip(shapes, _placements(shapes, engine, ranks), strict=True))


def _units(shapes: Sequence[Shape], engine: str, ranks: int, sub_group_size: int) -> Iterator[list[int]]:
    """What an engine steps at once: the whole group, but for ZeRO-3's sub-groups."""
    sizes = [-(-prod(shape) // ranks) for shape in shapes]
    unit: list[int] = []
    for i in range(len(shapes)):
        unit.append(i)
        full = engine == "zero3" and sum(sizes) > sub_group_size and sum(sizes[j] for j in unit) >= sub_group_size
        if full or i == len(shapes) - 1:
            yield unit
            unit = []


def _transient(turns: Sequence[tuple[Job, ...]], ranks: int, size: int) -> int:
    """Bytes that a turn holds at once on any rank, at most: before, in and after Newton-Schulz.

    Before: slices, those that arrive, joined matrices and stacks of them. In it: stacks, results, and for a chunk of
    them two copies in float32. After: results, their elements in order, and the messages; and what one slice needs in
    float32 while it is made or applied.
    """
    largest = max((job.numel for turn in turns for job in turn), default=0)
    peak = 0
    for turn in turns:
        held: Counter[int] = Counter()
        sent: Counter[int] = Counter()
        came: Counter[int] = Counter()
        owned: Counter[int] = Counter()
        for job in turn:
            owned[job.owner] += job.numel
            for rank, start, stop in job.holders or (Span(job.owner, job.start, job.stop),):
                held[rank] += stop - start
                if rank != job.owner:
                    sent[rank] += stop - start
                    came[job.owner] += stop - start
        replicated = ranks > 1 and any(job.holders == REPLICATED for job in turn)
        gathered = 2 * max(owned.values()) if replicated else 0
        for rank in {*held, *owned}:
            own, arrives, leaves = owned[rank], came[rank], sent[rank]
            chunk = min(own, max(MAX_ELEMENTS, largest))
            before = size * (held[rank] + arrives + 2 * own) + 4 * largest
            within = size * (2 * own + arrives + chunk) + 8 * chunk
            after = size * (2 * own + arrives + leaves + gathered) + 4 * largest
            peak = max(peak, before, within, after)
    return peak


def table(plans: Sequence[Plan]) -> str:
    """Aligned text, one line per plan."""
    lines = [
        ["engine", "ranks", "AdamW sends", "Muon more: mean", "max", "Muon/AdamW", "state", "AdamW's state"]
        + ["NS TFLOP", "max/mean", "matrices", "transient <="]
    ]
    for p in plans:
        cells = [p.engine, f"{p.ranks}", *map(_human, (p.adamw_bytes, p.extra_mean, max(p.extra_bytes)))]
        cells += [f"{p.ratio:.4f}", _human(p.state_bytes), _human(p.adamw_state_bytes)]
        cells += [f"{sum(p.flops) / p.ranks / 1e12:.3f}", f"{p.imbalance:.3f}", f"{p.matrices / p.ranks:.1f}"]
        lines.append([*cells, _human(p.transient_bytes)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def _human(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
