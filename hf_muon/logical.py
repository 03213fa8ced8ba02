"""Every logical matrix of a model by itself: what it is called, which group it is in, where its elements lie.

Routing says what a parameter is and :class:`~hf_muon.matrices.MatrixLayout` how it is cut; this lists the matrices one
by one, so that one expert's gate can be read without the other experts.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor

from .analysis.groups import group_of, layer_of, piece_names
from .matrices import Slab
from .routes import Route


@dataclass(frozen=True)
class LogicalMatrix:
    """One matrix in one parameter."""

    parameter: str
    """Name of the parameter that holds it, as transformers calls it."""
    expert: int | None
    """Which of the parameter's stacked matrices; None where there is one."""
    piece: str
    """Which part of a fused weight: ``gate``, ``up``, ``q``, ...; empty for a whole one."""
    group: str
    """One of :data:`hf_muon.analysis.groups.GROUPS`, or another kind."""
    layer: int | None
    """The first number in the name."""
    rows: int
    """A: outputs."""
    columns: int
    """B: inputs."""
    index: tuple[int, ...]
    """Indices into the parameter's leading dimensions, one for each that counts matrices."""
    start: int
    """The first row of the dimension behind those that has elements of it."""
    stop: int
    """One behind the last such row."""
    number: int
    """Which piece of the weight it is, from 0."""
    slab: Slab
    """What these rows hold, and among it this matrix: its piece of that number, or the only one."""

    @property
    def module(self) -> str:
        """Where it is in its layer, for people: ``self_attn.q_proj``, ``mlp.experts.3.gate``."""
        parts = [part for part in self.parameter.split(".") if part != "weight"]
        if self.layer is not None:
            parts = parts[parts.index(str(self.layer)) + 1 :]
        return ".".join(
            [*parts, *([] if self.expert is None else [str(self.expert)]), *([self.piece] * bool(self.piece))]
        )

    def of(self, parameter: Tensor) -> Tensor:
        """The matrix in a tensor of the parameter's shape, as it is stored (perhaps transposed)."""
        return self.of_rows(parameter[self.index][self.start : self.stop])

    def of_rows(self, rows: Tensor) -> Tensor:
        """The same from ``parameter[index][start:stop]`` alone."""
        layout = self.slab.layout
        pieces = layout.pieces(rows.reshape(layout.shape))
        which = self.number if len(pieces) > 1 else 0
        return layout.to_matrices(pieces[which], which)[0]


def logical_matrices(routes: Iterable[Route], *, experts: int = 0, seed: int = 0) -> Iterator[LogicalMatrix]:
    """What Muon would train, matrix by matrix, in the model's order.

    Args:
        routes: of a model on any device, the meta device too; routed without ``per_head``.
        experts: matrices to take of a parameter that stacks one per expert, at random but the same for all parameters
            of a layer and for every model of that many experts; 0 for all. The paper takes 3 of 64.
        seed: of that choice.
    """
    for found in routes:
        if found.layout is None:
            continue
        layout, stacked = found.layout, found.layout.count > 1
        slabs = layout.slabs()
        each, matrices = len(slabs) // layout.count, layout.matrices()
        names = piece_names(found.name, len(matrices), layout.blocks)
        lead, width = layout.shape[: layout.batch], prod(layout.shape[layout.batch + 1 :])
        chosen = range(layout.count)
        if found.kind == "experts" and 0 < experts < layout.count:
            draw = random.Random(f"{seed} {layer_of(found.name)}")
            chosen = sorted(draw.sample(chosen, experts))  # type: ignore[assignment]
        for expert in chosen:
            for number, (name, (_, rows, columns)) in enumerate(zip(names, matrices, strict=True)):
                slab = slabs[expert * each + (number if each > 1 else 0)]
                first, last = slab.start // width, slab.stop // width
                height = layout.shape[layout.batch]
                place, index = first // height, list[int]()
                for size in reversed(lead):
                    index.insert(0, place % size)
                    place //= size
                offset = first // height * height
                yield LogicalMatrix(
                    parameter=found.name,
                    expert=expert if stacked else None,
                    piece=name,
                    group=group_of(found.kind, found.name, name),
                    layer=layer_of(found.name),
                    rows=rows,
                    columns=columns,
                    index=tuple(index),
                    start=first - offset,
                    stop=last - offset,
                    number=number,
                    slab=slab,
                )
