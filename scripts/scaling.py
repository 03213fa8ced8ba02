"""Power laws L = a * C^b through the losses of complete runs, and how much compute one needs to equal the other.

The paper fits both optimizers (Table 3: Muon 2.506 * C^-0.052, AdamW 2.608 * C^-0.054) and says that Muon needs about
52 % of AdamW's FLOPs. Two rules here:

* A point is the end of a schedule. The loss in the middle of one, where the learning rate is still high, is no point:
  of the same two published runs, such crossings say 0.62 and the last step 0.84 (``tests/test_scaling.py``).
* A ratio is given only where both curves were measured; elsewhere :class:`OutOfRange` says why not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95  # of every interval
Interval = tuple[float, float]


class OutOfRange(ValueError):
    """A ratio was asked for where one of the two curves was not measured."""


@dataclass(frozen=True)
class PowerLaw:
    """L = a * C^b, for C from ``low`` to ``high``."""

    a: float
    b: float
    low: float
    high: float

    def loss(self, compute: float) -> float:
        """Loss at a compute, in the unit of the fit."""
        return self.a * compute**self.b

    def compute(self, loss: float) -> float:
        """Compute at which the curve has this loss."""
        return (loss / self.a) ** (1 / self.b)


@dataclass(frozen=True)
class Fit:
    """A power law, how far the points are from it, and laws that the noise could have given as well."""

    law: PowerLaw
    residual_sd: float
    draws: tuple[PowerLaw, ...]

    def interval(self, name: str) -> Interval:
        """Of ``a`` or ``b``."""
        return interval([getattr(law, name) for law in self.draws])


def interval(values: Sequence[float]) -> Interval:
    """The central :data:`LEVEL` of draws."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def fit(points: Sequence[tuple[float, float]], *, draws: int = 4000, seed: int = 0) -> Fit:
    """Least squares in the logarithms of compute and loss, as for the paper's figure 3.

    The draws are a parametric bootstrap of the residuals in which their variance is drawn too, from its distribution
    with n - 2 degrees of freedom: with the variance held fixed, or residuals resampled, the intervals of five points
    cover the truth far less often than they say.

    Args:
        points: (compute, loss) at the ends of complete schedules.
        draws: number of laws to draw.
        seed: of the draws.

    Raises:
        ValueError: fewer than three different computes, or a value that is not positive and finite.
    """
    if len({compute for compute, _ in points}) < 3:
        raise ValueError(f"a fit with an interval needs three different computes or more, got {list(points)}")
    if not all(math.isfinite(x) and x > 0 for point in points for x in point):
        raise ValueError(f"compute and loss must be positive and finite, got {list(points)}")
    x, y = np.log(np.array(points, dtype=np.float64)).T
    design = np.stack([np.ones_like(x), x], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    best = inverse @ design.T @ y
    freedom = len(points) - 2
    rest = float(((y - design @ best) ** 2).sum())
    rng = np.random.default_rng(seed)
    sd = np.sqrt(rest / rng.chisquare(freedom, size=draws))
    noise = rng.standard_normal((draws, 2)) @ np.linalg.cholesky(inverse).T
    low, high = float(np.exp(x.min())), float(np.exp(x.max()))
    laws = tuple(PowerLaw(math.exp(log_a), float(b), low, high) for log_a, b in best + sd[:, None] * noise)
    return Fit(PowerLaw(math.exp(best[0]), float(best[1]), low, high), math.sqrt(rest / freedom), laws)


def flop_ratio(ours: PowerLaw, reference: PowerLaw, compute: float) -> float:
    """Compute at which ``ours`` has the loss that ``reference`` has at ``compute``, over ``compute``; any range."""
    return ours.compute(reference.loss(compute)) / compute


def measured_ratio(ours: Fit, reference: Fit, compute: float) -> tuple[float, Interval]:
    """:func:`flop_ratio` and its interval, where both curves were measured.

    Raises:
        OutOfRange: ``compute`` is outside the reference's range, or ours would need a compute outside its own.
    """
    slack = 1e-9  # of the logarithm that made the range
    for name, law, value in (
        ("the reference", reference.law, compute),
        ("this curve", ours.law, ours.law.compute(reference.law.loss(compute))),
    ):
        if not law.low * (1 - slack) <= value <= law.high * (1 + slack):
            measured = f"{law.low:.3g} to {law.high:.3g}"
            raise OutOfRange(f"not reported: {name} was measured from {measured}, not at {value:.3g}")
    # Reversed: both fits may come from one seed, and with the same noise in both curves their errors would cancel.
    ratios = [flop_ratio(a, b, compute) for a, b in zip(ours.draws, reversed(reference.draws), strict=True)]
    return flop_ratio(ours.law, reference.law, compute), interval(ratios)


def final_points(rows: Sequence[dict[str, Any]], *, unit: float) -> list[tuple[float, float]]:
    """(compute / unit, mean final loss over seeds) of every model of one arm; compute is 6 N D.

    Raises:
        ValueError: a run did not reach the end of its schedule.
    """
    losses: dict[float, list[float]] = {}
    for row in rows:
        measured = row["curve"][-1][0]
        if not row["steps"] == row["scheduled_steps"] == measured:
            raise ValueError(
                f"{row['model']}/{row['arm']} ended at step {row['steps']} (last held-out loss at {measured}) of a "
                f"schedule of {row['scheduled_steps']}: only complete schedules can be compared"
            )
        losses.setdefault(6 * row["parameters"] * row["tokens"] / unit, []).append(row["eval_loss"])
    return [(compute, sum(values) / len(values)) for compute, values in sorted(losses.items())]
