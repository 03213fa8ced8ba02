"""Named Newton-Schulz schedules: one ``(a, b, c)`` per step of ``X <- aX + b(XX^T)X + c(XX^T)^2 X``.

Each schedule is an odd quintic ``p(s) = a s + b s^3 + c s^5`` applied to every singular value in turn. What they
differ in is how they trade steps against the spread that is left around 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Triple = tuple[float, float, float]
Coefficients = str | Sequence[float] | Sequence[Sequence[float]]

# Schedules whose single triple repeats for any number of steps.
_REPEATED: dict[str, Triple] = {
    # Jordan et al., "Muon" (2024), maximal slope at zero; equation (2) of "Muon is Scalable for LLM Training"
    # (arXiv 2502.16982). Does not converge: singular values end in about [0.68, 1.20].
    "moonlight": (3.4445, -4.7750, 2.0315),
    # The degree-5 Newton-Schulz (Pade) iteration, Higham, "Functions of Matrices" (2008), section 8.3. Converges to
    # exactly 1, slowly from small singular values: for reference work with many steps.
    "taylor": (15 / 8, -10 / 8, 3 / 8),
}

# Schedules that change from step to step.
_VARYING: dict[str, tuple[Triple, ...]] = {
    # You Jiacheng (2025), used by modded-nanogpt and dion: five optimized steps, a tighter band than "moonlight".
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Amsel et al., "The Polar Express" (arXiv 2505.16932), algorithm 1, before its safety factor: the minimax-optimal
    # composition for singular values in [1e-3, 1]. Further steps repeat the last triple, as the paper does.
    "polar_express": (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
}

# Polar Express, section 4.4: shrinking the argument of every step but the last by 1 % keeps singular values that
# rounding has pushed above 1 inside the region where the polynomial is bounded.
_POLAR_EXPRESS_SAFETY = 1.01

_LARGEST = 10.0

NAMES: tuple[str, ...] = (*_REPEATED, *_VARYING)


def _polar_express(steps: int) -> tuple[Triple, ...]:
    table = _VARYING["polar_express"]
    s = _POLAR_EXPRESS_SAFETY
    safe = [(a / s, b / s**3, c / s**5) for a, b, c in table[:-1]] + [table[-1]]
    return tuple(safe[min(k, len(safe) - 1)] for k in range(steps))


def schedule(coefficients: Coefficients, steps: int) -> tuple[Triple, ...]:
    """The triples of ``steps`` Newton-Schulz steps.

    Args:
        coefficients: a name from :data:`NAMES`, one ``(a, b, c)`` for every step, or one triple per step.
        steps: number of steps, 1 or more.

    Raises:
        ValueError: unknown name, a triple that is not three finite numbers, a schedule of another length, or one under
            which some singular value grows past any use (more than 10).
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"ns_steps must be an integer >= 1, got {steps!r}")
    if isinstance(coefficients, str):
        if coefficients in _REPEATED:
            return (_REPEATED[coefficients],) * steps
        if coefficients == "polar_express":
            return _polar_express(steps)
        if coefficients not in _VARYING:
            raise ValueError(f"unknown ns_coefficients {coefficients!r}; named schedules: {', '.join(NAMES)}")
        return _of_length(_VARYING[coefficients], steps, coefficients)
    rows = list(coefficients)
    if len(rows) == 3 and not any(isinstance(row, Sequence) for row in rows):
        return _bounded((_triple(rows),) * steps)
    return _bounded(_of_length(tuple(_triple(row) for row in rows), steps, "the given schedule"))


def _bounded(triples: tuple[Triple, ...]) -> tuple[Triple, ...]:
    """``triples``, if they keep singular values from [0, 1] bounded: one that diverges would wreck the weights."""
    for start in range(1, 201):
        s = start / 200
        for a, b, c in triples:
            s = a * s + b * s**3 + c * s**5
            if abs(s) > _LARGEST:
                raise ValueError(
                    f"ns_coefficients {triples[0]}, ... diverge: from {start / 200} to more than {_LARGEST}"
                )
    return triples


def _triple(row: object) -> Triple:
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != 3:
        raise ValueError(f"a Newton-Schulz step needs three coefficients (a, b, c), got {row!r}")
    a, b, c = (float(value) for value in row)
    if not all(map(math.isfinite, (a, b, c))):
        raise ValueError(f"Newton-Schulz coefficients must be finite, got {row!r}")
    return (a, b, c)


def _of_length(rows: tuple[Triple, ...], steps: int, name: str) -> tuple[Triple, ...]:
    if len(rows) != steps:
        raise ValueError(f"ns_coefficients {name!r} has {len(rows)} steps: ns_steps must be {len(rows)}, got {steps}")
    return rows
