"""The matrices of a checkpoint in safetensors files, one at a time: never the model, nor a whole stack of experts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..config import MuonConfig
from ..logical import LogicalMatrix, logical_matrices
from ..matrices import MatrixLayout
from ..routing import route
from .models import on_meta

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


class StoredModel:
    """A model in a folder with ``config.json`` and ``model*.safetensors``, in the hub's layout or in transformers' own.

    The model is built on the meta device for routing alone. The hub's files hold experts one by one and transformers
    fuses them as it loads: its own table says which tensor becomes which part, and the parts are read where they are.

    Args:
        folder: the checkpoint.
        config: routing options: ``include`` and ``exclude`` for what the router does not know.
        architecture: as in :func:`hf_muon.integrations.models.on_meta`.

    Raises:
        ValueError: no such files; a matrix of the model that they lack, or hold in another shape, quantized, or in a
            layout that only loading the whole model converts; a model that cannot be routed.
    """

    def __init__(self, folder: str | Path, config: MuonConfig | None = None, architecture: str | None = None) -> None:
        self.folder = Path(folder)
        model: Any = on_meta(str(self.folder.resolve()), architecture)
        self.routes = [found for found in route(model, config) if found.layout is not None]
        stored = _headers(self.folder)
        targets, self.ignored = _targets(model, stored)
        self._whole: dict[str, StoredTensor] = {}
        self._parts: dict[str, list[list[StoredTensor]]] = {}
        for found in self.routes:
            assert found.layout is not None
            sources = next((targets[n] for n in (found.name, *found.tied) if n in targets), None)
            if sources is None:
                raise ValueError(f"{self.folder} holds no weights for {found.name}")
            if isinstance(sources, StoredTensor):
                if sources.shape != found.layout.shape:
                    raise _mismatch(found.name, found.layout, [sources])
                self._whole[found.name] = sources
            else:
                self._parts[found.name] = _checked_parts(found.name, found.layout, *sources)

    def matrices(self, *, experts: int = 0, seed: int = 0) -> Iterator[LogicalMatrix]:
        """What can be read: :func:`hf_muon.logical.logical_matrices`."""
        return logical_matrices(self.routes, experts=experts, seed=seed)

    def read(self, matrix: LogicalMatrix) -> Tensor:
        """One matrix as it is stored (perhaps transposed), in its dtype.

        Raises:
            ValueError: it is not stored as plain floating numbers.
        """
        whole = self._whole.get(matrix.parameter)
        found = whole or self._parts[matrix.parameter][matrix.number][matrix.expert or 0]
        if found.dtype not in _FLOATS:
            raise ValueError(f"{found.name} in {found.file} is {found.dtype}, quantized: dequantize and save it first")
        # Opened anew for every matrix, because what an open file has mapped counts as this process's memory.
        with safe_open(found.file, framework="pt") as file:
            stored = file.get_slice(found.name)
            if whole is None:
                return stored[:]
            return matrix.of_rows(stored[(*matrix.index, slice(matrix.start, matrix.stop))])


def _headers(folder: Path) -> dict[str, StoredTensor]:
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                part = file.get_slice(name)
                found[name] = StoredTensor(name, path, tuple(part.get_shape()), part.get_dtype())
    if not found:
        raise ValueError(f"{folder} has no model*.safetensors: {_remedy(folder)}")
    return found


def _remedy(folder: Path) -> str:
    if (folder / "adapter_model.safetensors").is_file():
        return "it is an adapter; merge it into its base model and save that"
    if any(folder.glob("pytorch_model_fsdp*")) or any(folder.glob("global_step*")):
        return "it holds an engine's shards; python -m hf_muon consolidate makes a model of a Muon run's"
    if any(folder.glob("pytorch_model*.bin")):
        return "load it with transformers and save it again, which writes safetensors"
    return "name a folder that a model was saved in"


Sources = tuple[WeightConverter, dict[str, list[StoredTensor]]]


def _targets(model: Any, stored: dict[str, StoredTensor]) -> tuple[dict[str, StoredTensor | Sources], list[str]]:
    """Parameter -> the tensor that it is, or the converter and the tensors that it is made of; and what is left over.

    As ``convert_and_load_state_dict_in_model`` of transformers 5.23 decides it.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    targets: dict[str, Any] = {}
    ignored = []
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            ignored.append(key)
        elif pattern is None:
            targets[name] = stored[key]
        else:
            _, parts = targets.setdefault(name, (by_pattern[pattern], defaultdict(list)))
            parts[pattern].append(stored[key])
    return targets, ignored


def _checked_parts(
    name: str, layout: MatrixLayout, converter: WeightConverter, parts: dict[str, list[StoredTensor]]
) -> list[list[StoredTensor]]:
    """By piece and expert. Stacking and joining are what leaves every part a matrix of its own."""
    simple = [type(operation) for operation in converter.operations]
    ordered = [parts.get(pattern, []) for pattern in converter.source_patterns]
    stacks = simple in ([MergeModulelist], [MergeModulelist, Concatenate])
    sizes = layout.sizes or layout.shape[1:2]
    if not stacks or layout.batch != 1 or layout.dim != 0 or layout.blocks != 1 or len(sizes) != len(ordered):
        raise ValueError(
            f"{name} is stored as {re.sub(r'[0-9]+', '*', ordered[0][0].name)}, which only loading converts: load the "
            "model with transformers and save it with save_pretrained(save_original_format=False)"
        )
    for size, tensors in zip(sizes, ordered, strict=True):
        if len(tensors) != layout.shape[0] or any(t.shape != (size, layout.shape[2]) for t in tensors):
            raise _mismatch(name, layout, tensors)
    return ordered


def _mismatch(name: str, layout: MatrixLayout, stored: list[StoredTensor]) -> ValueError:
    return ValueError(
        f"{name} has shape {list(layout.shape)} in the model of this config.json, and its files hold {len(stored)} "
        f"tensors, of shapes {sorted({s.shape for s in stored})}"
    )
