"""FSDP2: DTensors cut over their first dimension, on a 1-D mesh or on the last dimension of a 2-D one (HSDP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..exchange.layout import even_placement, span_on
from .storage import LayoutError, Storage


def recognise(params: Sequence[Tensor], names: list[str], whole: Mapping[str, Tensor]) -> Storage | None:
    """See :func:`hf_muon.engines.recognise`; None if these are no DTensors."""
    found = [p for p in params if isinstance(p, DTensor)]
    if not found:
        return None
    if not len(found) == len(params) == len(names):
        odd = next((n for n, p in zip(names, params, strict=False) if not isinstance(p, DTensor)), names[0])
        raise LayoutError(f"{odd} is no DTensor among DTensors: FSDP2 must shard all parameters that are trained")
    mesh, kinds = found[0].device_mesh, found[0].placements
    for name, p in zip(names, found, strict=True):
        _check_placements(name, p)
        if p.device_mesh != mesh or p.placements != kinds:
            raise LayoutError(f"{name} is sharded over another mesh than {names[0]}: one mesh for all is served")
    # Replicas of a 2-D mesh hold equal shards and gradients; each repeats the work of the other rather than wait for it
    # over the slower network that such a mesh is made for.
    dimension = mesh.ndim - 1
    rank, ranks = mesh.get_local_rank(dimension), mesh.size(dimension)
    problem = ""
    placements = tuple(even_placement(p.numel(), ranks, prod(p.shape[1:])) for p in found)
    for name, p, placement in zip(names, found, placements, strict=True):
        start, stop = span_on(placement, rank, p.numel())
        if (here := p.to_local().numel()) != stop - start:
            problem = f"{name}: rank {rank} of {ranks} holds {here} elements, not {stop - start}"
    device = torch.device("cpu")
    if mesh.device_type != "cpu":  # shards may be offloaded, and are computed on the device all the same
        device = torch.device(mesh.device_type, torch.accelerator.current_device_index())
    return Storage(
        engine="fsdp2",
        members=tuple(range(len(names))),
        holders=tuple(found),
        placements=placements,
        flat=_flat,
        device=device,
        problem=problem,
        rank=rank,
        ranks=ranks,
        group=mesh.get_group(dimension),
    )


def _flat(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [t.to_local().reshape(-1) if isinstance(t, DTensor) else None for t in tensors]


def _check_placements(name: str, p: DTensor) -> None:
    *outer, inner = p.placements
    # Subclasses of Shard stride: tensor parallelism inside of FSDP.
    if type(inner) is not Shard or inner.dim != 0 or len(outer) > 1 or any(type(x) is not Replicate for x in outer):
        raise LayoutError(
            f"{name} is a DTensor with placements {p.placements}: only FSDP2's sharding of the first dimension (also "
            "with replicas, HSDP) is served. Remedy: no tensor parallelism, and FSDP2's default shard placement"
        )
    if not p.to_local().is_contiguous():
        raise LayoutError(f"the local part of {name} is not contiguous, which FSDP2's never are")
