"""Which outputs of a weight does a forward use together? Watched, not read from code.

Every product with a parameter labels its result's columns with the parameter's rows. Labels follow views, copies and
elementwise functions; the first operation that does more with a labelled tensor (a product, a norm, a reshuffle)
ties together all rows that it reads. Rows that nothing ties together are used apart: that is
what "fused" means. Works on the meta device, so on models of any size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default: 1, aten.addmm.default: 2, aten.bmm.default: 1, aten._grouped_mm.default: 1}
_COPIES = {aten.clone.default, aten._to_copy.default, aten._unsafe_view.default}
_NORMS = {aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default}
# What a forward asks of data that meta tensors do not have: any answer will do, most ask whether a mask is full.
_ANSWERS = {
    aten._local_scalar_dense.default: lambda t: (
        1.0 if t.is_floating_point() else bool(1) if t.dtype is torch.bool else 1
    ),
    aten.nonzero.default: lambda t: torch.zeros((1, t.ndim), dtype=torch.long, device="meta"),
}


class ColumnTrace(TorchDispatchMode):
    """Ties rows of the ``watched`` parameters (name -> parameter) that a forward under this mode uses together."""

    def __init__(self, watched: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._reads: dict[str, dict[bytes, np.ndarray]] = {n: {} for n in watched}
        self._names = list(watched)
        self._weights = {_key(p): i for i, p in enumerate(watched.values())}
        self._labels: dict[Any, tuple[Tensor, int]] = {}
        self._alive: list[Tensor] = [*watched.values()]  # a freed storage's address would be given to another tensor

    def components(self, name: str) -> list[np.ndarray]:
        """Rows (offsets of their first element in the parameter) by what is used together; none if never read."""
        merged: list[np.ndarray] = []
        for rows in self._reads[name].values():
            apart = []
            for other in merged:
                if np.intersect1d(rows, other, assume_unique=True).size:
                    rows = np.union1d(rows, other)
                else:
                    apart.append(other)
            merged = [*apart, rows]
        return merged

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ANSWERS and args[0].is_meta:
            return _ANSWERS[func](args[0])
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in _flat(args) if isinstance(t, Tensor)]
        labelled = [t for t in tensors if _key(t) in self._labels]
        results = [t for t in _flat((out,)) if isinstance(t, Tensor)]
        # Factories take a shape and read nothing; what is copied into a cache is not used yet.
        idle = func is aten.copy_.default or "new_" in func.__name__ or "_like" in func.__name__
        if not idle and labelled and results and not all(any(_key(o) == _key(t) for t in tensors) for o in results):
            for tensor in [] if self._follow(func, args, results[0], labelled) else labelled:
                self._tie(tensor)
        if func is aten._to_copy.default and _key(args[0]) in self._weights and out.stride() == args[0].stride():
            self._weights[_key(out)] = self._weights[_key(args[0])]  # a router computes in float32
            self._alive.append(out)
        if func in _PRODUCTS and isinstance(args[_PRODUCTS[func]], Tensor):
            self._label_product(args[_PRODUCTS[func]], out)
        elif func is aten.convolution.default and _key(args[1]) in self._weights and not args[6]:
            self._label(out, self._weights[_key(args[1])], self._offsets(args[1].flatten(1)[:, 0]), dim=1)
        return out

    def _follow(self, func: Any, args: Any, out: Tensor, labelled: list[Tensor]) -> bool:
        """Label ``out`` like its one labelled source, where every column of it comes from one column of the source."""
        source = labelled[0]
        if func is aten.index.Tensor:
            rows_only = source.ndim == 2 and len(args[1]) == 1  # tokens of an expert: all alike in their columns
            if source.is_meta and not rows_only:
                return True  # what is picked is data that a meta tensor does not have: neither tied nor followed
            moved = self._view(source)[0].expand(out.shape) if source.is_meta else func(self._view(source), args[1])
        elif func in _NORMS or func is aten.convolution.default and source is args[0] and args[-1] == out.shape[1]:
            # depthwise: channel by channel
            channel = self._view(source).amax(dim=tuple(d for d in range(source.ndim) if d != 1))
            moved = channel.view([1, -1] + [1] * (out.ndim - 2)).expand(out.shape)
        elif func is aten.constant_pad_nd.default:
            moved = func(self._view(source), args[1], -1)
        elif func in _COPIES or torch.Tag.pointwise in func.tags and out.shape == source.shape:
            moved = self._view(source).reshape(out.shape)
            for other in labelled[1:]:  # column by column: the result follows one of them, the others end here
                self._tie(other)
        else:
            return False
        self._put(out, moved, self._labels[_key(source)][1])
        return True

    def _tie(self, tensor: Tensor) -> None:
        rows = torch.unique(self._view(tensor)).numpy()
        rows = rows[rows >= 0]
        if len(rows):
            self._reads[self._names[self._labels[_key(tensor)][1]]][rows.tobytes()] = rows

    def _label_product(self, weight: Tensor, out: Tensor) -> None:
        """``weight`` is [..., in, out], a view of a parameter; out[..., j] gets the offset of weight[..., 0, j]."""
        index = self._weights.get(_key(weight))
        if index is not None:
            self._label(out, index, self._offsets(weight.select(-2, 0)), dim=out.ndim - 1)

    def _offsets(self, view: Tensor) -> Tensor:
        steps = [torch.arange(n) * s for n, s in zip(view.shape, view.stride(), strict=False)]
        offsets = torch.full((1,) * view.ndim, view.storage_offset())
        for d, step in enumerate(steps):
            offsets = offsets + step.view([-1 if i == d else 1 for i in range(view.ndim)])
        return offsets

    def _label(self, out: Tensor, index: int, offsets: Tensor, dim: int) -> None:
        shape = [1] * out.ndim
        shape[dim] = offsets.shape[-1]
        if offsets.ndim > 1 and out.ndim == offsets.ndim + 1:
            shape[0] = offsets.shape[0]
        elif offsets.ndim > 1:
            offsets = offsets[0]  # grouped product: which expert a token meets is data, all are cut alike
        self._put(out, offsets.view(shape).expand(out.shape), index)

    def _put(self, out: Tensor, labels: Tensor, index: int) -> None:
        size = out.untyped_storage().nbytes() // out.element_size()
        flat = torch.full((size,), -1, dtype=torch.long)
        flat.as_strided(out.shape, out.stride(), out.storage_offset()).copy_(labels)
        self._labels[_key(out)] = (flat, index)
        self._alive.append(out)

    def _view(self, tensor: Tensor) -> Tensor:
        flat = self._labels[_key(tensor)][0]
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _flat(values: Any) -> list[Any]:
    out: list[Any] = []
    for v in values:
        out.extend(_flat(v)) if isinstance(v, (list, tuple)) else out.append(v)
    return out
