"""Learning-rate stages and batch ramps counted in tokens, as the paper counts them, and translated to steps.

A :class:`Schedule` is a row of stages and a batch ramp. Optimizer step ``n`` (from 0) has the rate of the tokens seen
before it; the ramp says how many sequences it takes. A run may start anywhere in it (:class:`Run`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise

SHAPES = ("linear", "cosine", "constant")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_TOKENS = re.compile(r"^(\d+(?:\.\d+)?)([KMBT]?)(?: tokens)?$")
_NUMBER = r"[0-9.]+(?:[eE][+-]?[0-9]+)?"
_STAGE = re.compile(
    rf"^(?P<shape>[a-z]+) (?P<start>{_NUMBER})(?: to (?P<end>{_NUMBER}))? "
    r"(?:over (?P<steps>\d+) steps|over (?P<tokens>\S+) tokens|until (?P<until>\S+?)(?: tokens)?)$"
)
_RAMP = re.compile(r"^(?P<sequences>\d+)(?: from (?P<tokens>\S+?)(?: tokens)?)?$")


def parse_tokens(text: str | int) -> int:
    """``"5.2T"``, ``"33B tokens"`` or ``4096`` as a number of tokens; decimal prefixes.

    Raises:
        ValueError: anything else, or a fraction of a token.
    """
    found = _TOKENS.match(str(text).strip())
    tokens = Decimal(found[1]) * _UNITS[found[2]] if found else Decimal("0.5")
    if tokens != int(tokens):
        raise ValueError(f"{text!r} is no number of tokens: write 4096, 200B or 5.2T")
    return int(tokens)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One piece of a learning-rate schedule. Exactly one of ``tokens``, ``steps`` and ``until`` says where it ends."""

    start: float
    """Rate at its beginning."""
    end: float
    """Rate at its end."""
    shape: str = "linear"
    """``linear``, ``cosine`` (half a period) or ``constant``."""
    tokens: int | None = None
    """Its length in tokens."""
    steps: int | None = None
    """Its length in optimizer steps, whatever their batch."""
    until: int | None = None
    """Tokens from the start of the schedule at which it ends."""

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        if self.shape == "constant" and self.start != self.end:
            raise ValueError(f"a constant stage has one rate, got {self.start} to {self.end}")
        lengths = [x for x in (self.tokens, self.steps, self.until) if x is not None]
        if len(lengths) != 1 or lengths[0] < 1:
            raise ValueError(f"a stage ends by one positive number of tokens, steps or until, got {self}")
        if not all(0 <= rate < math.inf for rate in (self.start, self.end)):
            raise ValueError(f"rates must be finite and not negative, got {self.start} to {self.end}")

    @classmethod
    def parse(cls, text: str) -> Stage:
        """From ``"linear 0 to 4.2e-4 over 2000 steps"``, ``"cosine 4.2e-4 to 4.2e-5 until 5.2T"`` and the like.

        Raises:
            ValueError: another form, or a stage that cannot be.
        """
        found = _STAGE.match(" ".join(str(text).split()))
        if not found:
            raise ValueError(
                f"{text!r} is no stage: write 'linear 0 to 4.2e-4 over 2000 steps', 'cosine 4.2e-4 to 4.2e-5 until "
                "5.2T' or 'constant 1e-4 over 3B tokens'"
            )
        return cls(
            shape=found["shape"],
            start=float(found["start"]),
            end=float(found["end"] or found["start"]),
            steps=int(found["steps"]) if found["steps"] else None,
            tokens=parse_tokens(found["tokens"]) if found["tokens"] else None,
            until=parse_tokens(found["until"]) if found["until"] else None,
        )

    def rate(self, progress: float) -> float:
        """The rate at ``progress`` in [0, 1] of its length."""
        weight = (1 - math.cos(math.pi * progress)) / 2 if self.shape == "cosine" else progress
        return self.start + (self.end - self.start) * weight


@dataclass(frozen=True, kw_only=True)
class BatchRamp:
    """Sequences per optimizer step, by tokens seen."""

    sequence_length: int
    """Tokens of a sequence."""
    entries: tuple[tuple[int, int], ...]
    """(tokens seen, sequences per step from then on), the first at 0 tokens."""
    segments: tuple[tuple[int, int, int], ...] = field(init=False, repr=False)
    """(first step, tokens before it, sequences): an entry takes effect with the first step that starts after it."""

    def __post_init__(self) -> None:
        starts = [tokens for tokens, _ in self.entries]
        if self.sequence_length < 1 or not starts or starts[0] or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"a ramp starts at 0 tokens and its entries rise, got {self.entries}")
        if any(sequences < 1 for _, sequences in self.entries):
            raise ValueError(f"every step takes at least one sequence, got {self.entries}")
        segments = [(0, 0, self.entries[0][1])]
        for threshold, sequences in self.entries[1:]:
            step, tokens, before = segments[-1]
            count = -((tokens - threshold) // (before * self.sequence_length))
            segments.append((step + count, tokens + count * before * self.sequence_length, sequences))
        object.__setattr__(self, "segments", tuple(segments))

    @classmethod
    def parse(cls, texts: Iterable[str | int], sequence_length: int) -> BatchRamp:
        """From ``["2048", "4096 from 200B"]``.

        Raises:
            ValueError: another form, or a ramp that cannot be.
        """
        entries = []
        for text in texts:
            found = _RAMP.match(" ".join(str(text).split()))
            if not found:
                raise ValueError(f"{text!r} is no entry of a batch ramp: write '2048' or '4096 from 200B'")
            entries.append((parse_tokens(found["tokens"] or 0), int(found["sequences"])))
        return cls(sequence_length=sequence_length, entries=tuple(entries))

    def sequences(self, step: int) -> int:
        """Sequences of optimizer step ``step``, from 0."""
        return next(count for first, _, count in reversed(self.segments) if first <= step)

    def tokens_before(self, step: int) -> int:
        """Tokens seen before optimizer step ``step``, from 0."""
        first, tokens, count = next(s for s in reversed(self.segments) if s[0] <= step)
        return tokens + (step - first) * count * self.sequence_length

    def steps_until(self, tokens: int) -> int:
        """The first step before which at least ``tokens`` have been seen: so many steps see them."""
        first, before, count = next(s for s in reversed(self.segments) if s[1] <= tokens)
        return first - ((before - tokens) // (count * self.sequence_length))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Stages one behind the other, over a batch ramp."""

    stages: tuple[Stage, ...]
    """In order."""
    ramp: BatchRamp
    """What a step costs in tokens."""
    bounds: tuple[int, ...] = field(init=False, repr=False)
    """Tokens at the start of every stage, and at the end of the last."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a schedule has at least one stage")
        bounds = [0]
        for stage in self.stages:
            here, end = bounds[-1], stage.until
            if stage.tokens is not None:
                end = here + stage.tokens
            elif stage.steps is not None:
                end = self.ramp.tokens_before(self.ramp.steps_until(here) + stage.steps)
            if end is None or end <= here:
                raise ValueError(f"{stage} ends at {end:,} tokens, and begins at {here:,}")
            bounds.append(end)
        object.__setattr__(self, "bounds", tuple(bounds))

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        return self.ramp.steps_until(self.bounds[-1])

    @property
    def peak(self) -> float:
        """The highest rate of all stages."""
        return max(max(stage.start, stage.end) for stage in self.stages)

    def stage_at(self, tokens: int) -> int:
        """Index of the stage in force after ``tokens``; behind the end, the last."""
        return max(0, min(sum(bound <= tokens for bound in self.bounds) - 1, len(self.stages) - 1))

    def rate(self, tokens: int) -> float:
        """The learning rate after ``tokens``; behind the end, what the last stage ended with."""
        index = self.stage_at(tokens)
        start, end = self.bounds[index : index + 2]
        return self.stages[index].rate(min(1.0, (tokens - start) / (end - start)))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A schedule entered at one of its steps, with the rate warmed up anew if it is asked for."""

    schedule: Schedule
    """The whole."""
    start_step: int = 0
    """The schedule's step with which this run begins."""
    rewarm_steps: int = 0
    """Steps over which the rate is multiplied by a line from 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.start_step < self.schedule.steps:
            raise ValueError(f"the schedule has {self.schedule.steps:,} steps: it has no step {self.start_step:,}")
        if self.rewarm_steps < 0:
            raise ValueError(f"rewarm_steps must not be negative, got {self.rewarm_steps}")

    @property
    def steps(self) -> int:
        """Optimizer steps to the end of the schedule."""
        return self.schedule.steps - self.start_step

    def rate(self, step: int) -> float:
        """The learning rate of this run's step ``step``, from 0."""
        warm = min(1.0, step / self.rewarm_steps) if self.rewarm_steps else 1.0
        return warm * self.schedule.rate(self.tokens(step))

    def tokens(self, step: int) -> int:
        """The schedule's tokens before this run's step ``step``."""
        return self.schedule.ramp.tokens_before(self.start_step + step)

    def batch(self, step: int) -> int:
        """Sequences of this run's step ``step``."""
        return self.schedule.ramp.sequences(self.start_step + step)

    def sequences_before(self, step: int) -> int:
        """Sequences that this run has used before its step ``step``."""
        return (self.tokens(step) - self.tokens(0)) // self.schedule.ramp.sequence_length


MOONLIGHT_STAGES = (
    "linear 0 to 4.2e-4 over 2000 steps",
    "cosine 4.2e-4 to 4.2e-5 until 5.2T",
    "linear 4.2e-5 to 1e-4 over 100 steps",
    "linear 1e-4 to 0 until 5.7T",
)
"""Section 3.3 of the paper: warm-up, cosine, and the two pieces of the cooldown."""
MOONLIGHT_RAMP = ("2048", "4096 from 200B")
"""Section 3.3; sequences of 8,192 tokens. It acts with step 11,921, which the note on the checkpoints calls 12K."""


def moonlight() -> Schedule:
    """Moonlight's pretraining, 5.7T tokens (section 3.3 of "Muon is Scalable for LLM Training")."""
    ramp = BatchRamp.parse(MOONLIGHT_RAMP, 8192)
    return Schedule(stages=tuple(Stage.parse(text) for text in MOONLIGHT_STAGES), ramp=ramp)
