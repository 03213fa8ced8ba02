"""What accelerate has started, as far as it decides whether and how Muon can train."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState

from ..optimizer import Muon


def refuse_unsupported(args: Any = None) -> None:
    """Fail before an engine takes the parameters, not after.

    Args:
        args: ``TrainingArguments``, which name an engine before it has started.

    Raises:
        RuntimeError: DeepSpeed would train with an optimizer of its own; FSDP version 1; Megatron-LM.
    """
    kind = _active()
    config = _deepspeed_config(args)
    if config is not None and "optimizer" in config:
        native = str(config["optimizer"].get("type", "")).lower() == "muon"
        why = (
            "DeepSpeed's own Muon has no RMS matching and clips the orthogonalized update"
            if native
            else "DeepSpeed would train with that one and never ask for optim"
        )
        name = config["optimizer"].get("type")
        raise RuntimeError(
            f"optim='muon' and an \"optimizer\" section ({name}) in the DeepSpeed config: {why}. "
            "Remedy: remove that section; learning rate, betas, eps and weight decay come from TrainingArguments"
        )
    if config is not None:
        _refuse_deepspeed_modes(config)
    zero = (config or {}).get("zero_optimization", {})
    if zero.get("elastic_checkpoint") or (config or {}).get("checkpoint", {}).get("load_universal"):
        raise RuntimeError(
            "optim='muon' with DeepSpeed's elastic or universal checkpoints, which keep only Adam's moments. Remedy: "
            "turn them off; python -m hf_muon consolidate makes a checkpoint for any engine and number of ranks"
        )
    if (kind == "FSDP" or _wants_fsdp(args)) and _fsdp_version(args) == 1:
        raise RuntimeError(
            "optim='muon' and FSDP version 1, which flattens parameters so that no matrix is left: set fsdp_version: 2 "
            "in the accelerate config's fsdp_config (or fsdp_config={'version': 2} in TrainingArguments)"
        )
    if kind == "MEGATRON_LM":
        raise RuntimeError("optim='muon' serves DDP, DeepSpeed ZeRO and FSDP2, and Megatron-LM is active")


def _refuse_deepspeed_modes(config: dict[str, Any]) -> None:
    """Modes of DeepSpeed in which a step would be another one, or half of one."""
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    for name, active, remedy in (
        ("zero_optimization.stage 0", zero.get("stage", 0) == 0, "use ZeRO-1, or DDP without DeepSpeed"),
        ("tensor_parallel.autotp_size", config.get("tensor_parallel", {}).get("autotp_size", 0) > 1, "set it to 1"),
        (
            "offload_optimizer.ratio below 1",
            offload.get("ratio", 1.0) != 1.0,
            "set it to 1: DeepSpeed would train a part of the parameters with AdamW",
        ),
        (
            "bf16.check_grad_overflow: false",
            config.get("bf16", {}).get("check_grad_overflow", True) is False,
            "leave it out: an infinity in one parameter group would not stop the others",
        ),
    ):
        if active:
            raise RuntimeError(f"optim='muon' with {name} in the DeepSpeed config. Remedy: {remedy}")


def with_client_optimizer(original: Any) -> Any:
    """Wrap accelerate's ``map_pytorch_optim_to_deepspeed``, which makes DeepSpeedCPUAdam of any optimizer."""

    @functools.wraps(original)
    def map_pytorch_optim_to_deepspeed(optimizer: Any) -> Any:
        if isinstance(optimizer, Muon):
            keep_client_optimizer()
            return optimizer
        return original(optimizer)

    return map_pytorch_optim_to_deepspeed


def keep_client_optimizer() -> None:
    """Under DeepSpeed's CPU offload, accelerate would replace any optimizer by DeepSpeedCPUAdam without a word."""
    config = _deepspeed_config(None)
    if config is not None:
        config["zero_force_ds_cpu_optimizer"] = False


def replicas() -> Any:
    """The process group over which DDP replicates the model; None under any other engine, or for one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or not _active().startswith("MULTI_"):
        return None
    return dist.group.WORLD


def _active() -> str:
    """The name of accelerate's distributed type; empty if it has not started."""
    return str(AcceleratorState._shared_state.get("distributed_type", "")).rpartition(".")[2]


def _deepspeed_config(args: Any) -> dict[str, Any] | None:
    """The DeepSpeed config in force: that of TrainingArguments, or of the accelerate config."""
    own = getattr(getattr(args, "hf_deepspeed_config", None), "config", None)
    if own is not None:
        return own
    plugin: Any = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        return plugin.deepspeed_config
    plugin = AcceleratorState._shared_state.get("deepspeed_plugins") if _active() == "DEEPSPEED" else None
    if isinstance(plugin, dict):
        plugin = next((p for p in plugin.values() if p.selected), None)
    return getattr(plugin, "deepspeed_config", None)


def _wants_fsdp(args: Any) -> bool:
    return bool(getattr(args, "fsdp", None)) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def _fsdp_version(args: Any) -> int:
    plugin = AcceleratorState._shared_state.get("fsdp_plugin")
    if plugin is not None:
        return int(plugin.fsdp_version)
    given = (getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version")
    return int(given or os.environ.get("FSDP_VERSION", "1"))
