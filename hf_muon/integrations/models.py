"""Models without weights, for looking at shapes."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from torch import nn


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
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
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
