"""Models without weights, for looking at shapes."""

from __future__ import annotations

import os

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
    cls = getattr(transformers, name, None) if name else None
    if architecture and cls is None:
        raise ValueError(f"transformers {transformers.__version__} has no class {architecture!r}")
    with torch.device("meta"):
        if cls is not None:
            return cls._from_config(config)
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
