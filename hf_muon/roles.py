"""Which parameters of a model are embeddings, and which are heads. Found by what modules are and where they sit.

The paper trains both with AdamW. HuggingFace models say most of it themselves: ``get_input_embeddings``,
``get_output_embeddings``, and the split of a task model into its base model and the rest. All of it is asked of
every nested model too, because the outer model of a composite often cannot answer for its parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

MATRIX_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Pixels have one to three channels and waveforms one or two, features have more: such a layer reads the raw input.
RAW_CHANNELS = 3
# The name that HuggingFace gives the output embedding, also in models whose get_output_embeddings() does not know it.
LM_HEAD = "lm_head"
# Only asked of models that have no base model inside to tell a head from the rest (T5, Blip2, ...).
_TASK_CLASS = re.compile(r"For[A-Z]|LMHead|WithHead")

Roles = dict[int, str]


def embeddings(model: nn.Module) -> Roles:
    """``id(parameter) -> reason`` of every input embedding, whatever its name; ties are found by identity."""
    found: Roles = {}
    for module in model.modules():
        kind = type(module).__name__
        if is_embedding(module):
            _mark(found, module, f"table of {kind}", recurse=False)
        elif is_convolution(module) and peek(module, "in_channels") <= RAW_CHANNELS:
            _mark(found, module, "convolution over raw input channels", recurse=False)
        inputs = _ask(module, "get_input_embeddings")
        # Some vision models answer with half of themselves; what holds layers is not an embedding.
        if inputs is not None and inputs is not module and not is_body(inputs):
            _mark(found, inputs, f"input embedding of {kind}")
        for linear in _patch_linears(module):
            _mark(found, linear, "Linear over patches of raw input")
    return found


def heads(model: nn.Module) -> Roles:
    """``id(parameter) -> reason`` of every output embedding and task head.

    A head is what a task model adds behind its base model: the children registered after the last body, a body being
    the base model or any child with layers of its own (a decoder, a second model). Projections between two bodies are
    hidden matrices and no heads. Inside an added body without a base of its own (the decoder of a masked
    autoencoder), the same rule is applied again.
    """
    found: Roles = {}
    for module in model.modules():
        kind = type(module).__name__
        outputs = _ask(module, "get_output_embeddings")
        if outputs is not None:
            _mark(found, outputs, f"output embedding of {kind}")
        for head in (*_added_heads(module), getattr(module, LM_HEAD, None)):
            if isinstance(head, nn.Module):
                _mark(found, head, f"head of {kind}")
    for linear in _vocabulary_heads(model):
        _mark(found, linear, "one output for every row of an embedding")
    return found


def peek(place: Any, name: str) -> Any:
    """An attribute, or ``None`` where there is none or asking is refused (configs whose layers differ refuse)."""
    try:
        return getattr(place, name, None)
    except Exception:
        return None


def is_embedding(module: nn.Module) -> bool:
    """An embedding table by type, or by the two sizes every embedding module has."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return True
    return hasattr(module, "num_embeddings") and hasattr(module, "embedding_dim") and hasattr(module, "weight")


def is_convolution(module: nn.Module) -> bool:
    """Any convolution with the attributes of ``nn.Conv*``."""
    return isinstance(module, nn.modules.conv._ConvNd)


def is_model(module: nn.Module) -> bool:
    """A HuggingFace model, by the class attribute that they all have."""
    return isinstance(getattr(type(module), "base_model_prefix", None), str)


def is_body(module: nn.Module) -> bool:
    """Whether the module holds hidden layers: another model, a recurrent layer, or a stack of blocks."""
    return any(is_model(m) or isinstance(m, nn.RNNBase) or _is_stack(m) for m in module.modules())


def _is_stack(module: nn.Module) -> bool:
    """Two or more blocks in a row; a row of bare Linears (the MLP of a box head, one head per codebook) is none."""
    blocks = [c for c in module.children() if next(c.children(), None) is not None and _has_matrix(c)]
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and len(blocks) > 1


def _has_matrix(module: nn.Module) -> bool:
    return any(p.ndim > 1 for p in module.parameters())


def _ask(module: nn.Module, method: str) -> nn.Module | None:
    """The module that a model names as its embedding; many models raise instead, which means the same as none."""
    # Looked up on the type: wrappers (PEFT) forward attributes of the wrapped model, which is asked itself.
    if not is_model(module) or not hasattr(type(module), method):
        return None
    try:
        answer = getattr(module, method)()
    except Exception:  # whatever foreign code raises here means "no answer"
        return None
    return answer if isinstance(answer, nn.Module) else None


def _added_heads(module: nn.Module) -> Iterator[nn.Module]:
    """What a task model adds behind its bodies."""
    if not is_model(module):
        return
    base = module._modules.get(peek(module, "base_model_prefix") or "")
    if base is None:
        inner = [m for m in module.modules() if m is not module and _ask(m, "get_output_embeddings") is not None]
        if inner or not _TASK_CLASS.search(type(module).__name__):
            return
    yield from _trailing(module, base, peek(peek(module, "config"), "num_labels"))


def _trailing(module: nn.Module, base: nn.Module | None, labels: int | None) -> Iterator[nn.Module]:
    """Children after the last body, the same within bodies that are no models, and whatever counts the labels."""
    children = [c for c in module.children() if _has_matrix(c)]
    bodies = [i for i, c in enumerate(children) if c is base or is_body(c)]
    for i, child in enumerate(children):
        if not bodies or i > bodies[-1]:
            if bodies:
                yield child
        elif i in bodies and child is not base and not is_model(child) and not isinstance(child, nn.ModuleList):
            yield from _trailing(child, None, labels)
        elif isinstance(child, MATRIX_MODULES) and labels is not None and child.weight.shape[0] == labels:
            yield child


def _patch_linears(module: nn.Module) -> Iterator[nn.Module]:
    """Linears that flatten image patches, in what a vision model holds before its layers."""
    patch = peek(peek(module, "config"), "patch_size")
    if not is_model(module) or not isinstance(patch, int):
        return
    sizes = {channels * frames * patch**2 for channels in (1, RAW_CHANNELS) for frames in (1, 2)}
    for child in module.children():
        if is_body(child):
            return
        yield from (m for m in child.modules() if isinstance(m, nn.Linear) and m.in_features in sizes)


def _vocabulary_heads(model: nn.Module) -> Iterator[nn.Module]:
    """Linears outside repeated layers with one output per row of a vocabulary."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if any(is_model(m) for m in model.modules()):
        # These name their heads, up to codebooks of images and sound; short tables (positions, types) count nothing.
        sizes = {m.num_embeddings for m in tables if m.num_embeddings > 4 * m.embedding_dim}
    else:
        sizes = {max((m.num_embeddings for m in tables), default=0)}
    for name, module in model.named_modules():
        repeated = any(part.isdigit() for part in name.split(".")[:-1])
        if isinstance(module, nn.Linear) and not repeated and module.out_features in sizes:
            yield module


def _mark(found: Roles, module: nn.Module, reason: str, recurse: bool = True) -> None:
    for parameter in module.parameters(recurse=recurse):
        found.setdefault(id(parameter), reason)
