"""The routing of a model as a report: what Muon trains, what AdamW trains, and why."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod

from .layouts import shape_of
from .routes import Route


@dataclass(frozen=True)
class Row:
    """All parameters of one algorithm, kind and reason."""

    algorithm: str
    kind: str
    reason: str
    tensors: int
    numel: int
    matrices: int
    example: str


@dataclass(frozen=True, repr=False)
class Report:
    """What :func:`hf_muon.explain` found; ``str()`` is the whole table."""

    routes: tuple[Route, ...]

    @property
    def rows(self) -> list[Row]:
        """One row per algorithm, kind and reason, Muon first, the largest first."""
        groups: dict[tuple[str, str, str], list[Route]] = defaultdict(list)
        for found in self.routes:
            groups[found.algorithm, found.kind, found.reason].append(found)
        rows = [
            Row(*key, len(m), sum(map(_numel, m)), sum(r.layout.total() for r in m if r.layout), m[0].name)
            for key, m in groups.items()
        ]
        return sorted(rows, key=lambda row: (row.algorithm == "adamw", -row.numel))

    def numel(self, algorithm: str | None = None) -> int:
        """Parameters of ``muon``, of ``adamw``, or all."""
        return sum(_numel(r) for r in self.routes if algorithm in (None, r.algorithm))

    def summary(self) -> str:
        """One line."""
        total = self.numel()
        parts = []
        for algorithm, name in (("muon", "Muon"), ("adamw", "AdamW")):
            members = [r for r in self.routes if r.algorithm == algorithm]
            count = sum(r.layout.total() for r in members if r.layout)
            matrices = f" as {count:,} matrices" if count else ""
            share = self.numel(algorithm) / max(total, 1)
            parts.append(f"{name} {share:.1%} ({self.numel(algorithm):,} in {len(members):,} tensors{matrices})")
        return f"{total:,} trainable parameters: " + ", ".join(parts)

    def cells(self) -> list[tuple[str, ...]]:
        """The table's words, its head first."""
        head: tuple[str, ...] = ("algorithm", "kind", "tensors", "parameters", "matrices", "reason", "for example")
        return [head] + [
            (
                r.algorithm,
                r.kind,
                f"{r.tensors:,}",
                f"{r.numel:,}",
                f"{r.matrices:,}" if r.matrices else "-",
                r.reason,
                r.example,
            )
            for r in self.rows
        ]

    def table(self) -> str:
        """Aligned text, one line per row."""
        lines = self.cells()
        widths = [max(len(word) for word in column) for column in zip(*lines, strict=True)]
        numbers = (2, 3, 4)

        def aligned(line: tuple[str, ...]) -> str:
            cells = (
                c.rjust(w) if i in numbers else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            return "  ".join(cells).rstrip()

        return "\n".join(map(aligned, lines))

    def __repr__(self) -> str:
        # In a notebook the table has just been printed.
        return f"<Report: {self.summary()}>"

    def __str__(self) -> str:
        return f"{self.table()}\n{self.summary()}"


def _numel(found: Route) -> int:
    return prod(shape_of(found.parameter))
