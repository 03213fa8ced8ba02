"""DeepSpeed ZeRO-1 and ZeRO-2, and its BF16_Optimizer.

The optimizer's group holds one flat tensor: this rank's partition of the master weights. The parameters themselves are
views into the replicated flat buffer of low-precision weights, and so their addresses say where each of them starts in
it, also under ``round_robin_gradients``, which reorders them, and with alignment gaps between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..exchange.layout import flat_placements, span_on
from .storage import LayoutError, Storage


def recognise(params: Sequence[Tensor], names: list[str], whole: Mapping[str, Any]) -> Storage | None:
    """See :func:`hf_muon.engines.recognise`; None if this is not ZeRO's layout."""
    if len(params) != 1 or params[0].ndim != 1 or params[0] is whole.get(names[0]):
        return None
    found = {i: whole[name] for i, name in enumerate(names) if name in whole and hasattr(whole[name], "_dp_group")}
    if not found:
        return None
    flat = params[0]
    trained = {i: p for i, p in found.items() if p.requires_grad and p.numel()}
    lost = [n for i, n in enumerate(names) if i not in found]
    if lost:
        raise LayoutError(f"{lost[0]} is in a group that DeepSpeed has flattened, but is no parameter of the model now")
    experts = [names[i] for i, p in trained.items() if getattr(p, "allreduce", True) is False]
    if experts:
        raise LayoutError(
            f"{experts[0]} belongs to DeepSpeed's own expert parallelism, which is not served: use transformers' fused "
            "experts, whose parameters are data-parallel like all others"
        )
    first = next(iter(trained.values()))
    group = first._dp_group
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    start = min(p.data_ptr() for p in trained.values())
    offsets = [(p.data_ptr() - start) // p.element_size() for p in trained.values()]
    try:
        placements = flat_placements(offsets, [p.numel() for p in trained.values()], flat.numel(), ranks)
    except ValueError as error:
        name = names[next(iter(trained))]
        raise LayoutError(f"DeepSpeed's flat buffer does not hold {name} and the others: {error}") from None
    spans = [span_on(x, rank, 0) for x in placements]
    slices = [
        (offset + a - rank * flat.numel(), offset + b - rank * flat.numel()) if b > a else (0, 0)
        for offset, (a, b) in zip(offsets, spans, strict=True)
    ]
    problem = _check_values(flat, [names[i] for i in trained], list(trained.values()), spans, slices)
    return Storage(
        engine="zero",
        members=tuple(trained),
        holders=(flat,),
        placements=tuple(placements),
        flat=lambda tensors: [None if tensors[0] is None else tensors[0][a:b] for a, b in slices],
        device=first.device,
        offsets=tuple(a for a, _ in slices),
        problem=problem,
        rank=rank,
        ranks=ranks,
        group=group,
    )


def _check_values(
    flat: Tensor,
    names: list[str],
    params: list[Tensor],
    spans: list[tuple[int, int]],
    slices: list[tuple[int, int]],
) -> str:
    """That the master weights are those of the parameters that should lie there: the layout is inferred, not given."""
    for name, p, (a, b), (begin, end) in zip(names, params, spans, slices, strict=True):
        ours = flat.detach()[begin:end].to(device=p.device, dtype=p.dtype)
        if not torch.equal(ours.nan_to_num(), p.detach().reshape(-1)[a:b].nan_to_num()):
            return (
                f"the weights of {name} are not where DeepSpeed's flat buffer should hold them. Either this DeepSpeed "
                "lays parameters out in an unknown way, or weights were changed after deepspeed.initialize, where its "
                "master weights would overwrite them; nothing has been changed"
            )
    return ""
