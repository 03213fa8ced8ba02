"""Models without weights, for looking at shapes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn


def on_meta(source: str, architecture: str | None = None, *, trust_remote_code: bool = False) -> nn.Module:
    """A model on the meta device from a ``config.json``, a directory holding one, or a hub id.

    Args:
        source: path or hub id.
        architecture: class name in transformers; default: the config's ``architectures``, else a causal LM.
        trust_remote_code: passed on to transformers; false unless the user asks.

    Raises:
        ValueError: transformers has no such class, or none for this config.
        OSError: there is no such config.
    """
    is_path = source.endswith(".json") or source.startswith((".", os.sep))
    if is_path and not os.path.exists(source):
        raise OSError(f"no such config file or directory: {source}")
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except OSError as error:
        if os.path.exists(source):
            raise
        raise OSError(f"{source} is no folder here, and as a hub name it cannot be read: {error}") from error
    name = architecture or next(iter(getattr(config, "architectures", None) or []), None)
    # A remote checkpoint may name a class that only its own code defines; transformers' native one serves then.
    cls: Any = getattr(transformers, name, None) if name else None
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if architecture and not is_model:
        raise ValueError(f"transformers {transformers.__version__} has no class {architecture!r} that is a model")
    if architecture and not isinstance(config, cls.config_class):
        raise ValueError(f"{architecture} is built from a {cls.config_class.__name__}, not a {type(config).__name__}")
    with torch.device("meta"):
        if is_model:
            return cls._from_config(config)
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def stored_names(folder: Path, pattern: str = "model*.safetensors") -> dict[str, Path]:
    """Tensor name -> file, of the safetensors files in a folder."""
    names: dict[str, Path] = {}
    for file in sorted(folder.glob(pattern)):
        with safe_open(file, framework="pt") as opened:
            names.update(dict.fromkeys(opened.keys(), file))
    return names


def trained_weights(folder: str, names: list[str]) -> dict[str, Tensor]:
    """Weights by parameter name, from a checkpoint's model files.

    Args:
        folder: with ``model*.safetensors`` or ``adapter_model.safetensors``.
        names: of parameters, as the model in training calls them.

    Raises:
        ValueError: a name that neither the files nor the model built from them has.
    """
    path = Path(folder)
    stored = {**stored_names(path), **stored_names(path, "adapter_model.safetensors")}
    out: dict[str, Tensor] = {}
    for name in names:
        key = name if name in stored else _adapter_key(name)
        if key in stored:
            with safe_open(stored[key], framework="pt") as opened:
                out[name] = opened.get_tensor(key)
    lost = [name for name in names if name not in out]
    if lost and (path / "config.json").is_file():
        # Fused experts and the like: the files have the hub's layout, and the model's class knows how to read it.
        config = transformers.AutoConfig.from_pretrained(folder)
        cls = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
        found = dict(cls.from_pretrained(folder, dtype="auto").named_parameters())
        out.update({name: found[name].detach() for name in lost if name in found})
    lost = [name for name in names if name not in out]
    if lost:
        raise ValueError(f"{folder} holds no weights for {len(lost)} trained parameters, e.g. {lost[:3]}")
    return out


def _adapter_key(name: str) -> str:
    """What PEFT's files call a parameter: the adapter's name is left out."""
    name = re.sub(r"\.modules_to_save\.[^.]+", "", name)
    return re.sub(r"\.(lora_\w+)\.[^.]+(?=\.|$)", r".\1", name)


def write_model(folder: str, weights: Mapping[str, Tensor]) -> None:
    """Save the model of ``folder/config.json`` with these weights beside it, in the hub's layout.

    Raises:
        ValueError: the model has more than these: frozen weights, or buffers that are part of it.
    """
    model: Any = on_meta(folder)
    found = model.load_state_dict(dict(weights), strict=False, assign=True)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    lost = [name for name in found.missing_keys if name not in tied]
    if lost or found.unexpected_keys:
        raise ValueError(
            f"{folder} holds no model, and its optimizer state lacks {lost[:3]} (or has too much: "
            f"{found.unexpected_keys[:3]}). Remedy: save with stage3_gather_16bit_weights_on_model_save: true (ZeRO-3) "
            "or fsdp_state_dict_type: FULL_STATE_DICT"
        )
    model.tie_weights()
    model.save_pretrained(folder)
