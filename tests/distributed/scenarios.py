"""What the distributed tests train: engines, models and precisions by name."""

import os

import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from tests import tiny

GLOBAL_BATCH = 12
VICTIM = "model.layers.1.mlp.down_proj"
"""The Linear that faults happen to."""


def model(kind: str, dtype: str, pretrained: str | None = None):
    """A seeded model: ``qwen2`` (tied), ``untied``, ``wide`` (large matrices), ``moe`` (fused), ``lora``, ``frozen``.

    ``pretrained`` is a folder to go through, as models for ZeRO-3 do.
    """
    if pretrained:
        return transformers.AutoModelForCausalLM.from_pretrained(pretrained, dtype=getattr(torch, dtype))
    torch.manual_seed(0)
    if kind == "moe":
        from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

        config = Qwen2MoeConfig(
            vocab_size=264, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
            shared_expert_intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
            num_experts_per_tok=2, max_position_embeddings=128, router_aux_loss_coef=0.0,
        )  # fmt: skip
        made = Qwen2MoeForCausalLM(config)
    elif kind == "wide":
        made = tiny.qwen2(num_hidden_layers=1, intermediate_size=256)
    else:
        made = tiny.qwen2(tie_word_embeddings=kind != "untied")
    if kind == "frozen":
        made.model.layers[0].requires_grad_(False)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        made = get_peft_model(made, LoraConfig(r=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return made.to(getattr(torch, dtype))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


SPOILED = {"nan": float("nan"), "large": 1e3}


class _Spoiled(torch.autograd.Function):
    """The identity, whose gradient has something else in its first element."""

    @staticmethod
    def forward(ctx, weight, value):
        ctx.value = value
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[0, 0] = ctx.value
        return grad, None


class Faults(transformers.TrainerCallback):
    """On one rank, in one step, the ``VICTIM`` is not used, or its gradient is spoiled; or its weights change before.

    Args:
        model: what is trained.
        fault: ``kind`` (``unused``, ``nan``, ``large``, ``changed``), ``rank``, ``step``.
    """

    def __init__(self, model, fault: dict):
        self.fault, self.now = fault, False
        self.layer = model.get_submodule(VICTIM)
        original = self.layer.forward

        def forward(x):
            if self.now and fault["kind"] == "unused":
                return x.new_zeros(*x.shape[:-1], self.layer.out_features)
            if self.now and fault["kind"] in SPOILED:
                return torch.nn.functional.linear(x, _Spoiled.apply(self.layer.weight, SPOILED[fault["kind"]]))
            return original(x)

        self.layer.forward = forward

    def on_train_begin(self, *args, **kwargs):
        if self.fault["kind"] == "changed" and int(os.environ["RANK"]) == self.fault["rank"]:
            weight = self.layer.weight
            getattr(weight, "ds_tensor", weight).data.flatten()[:1].add_(1.0)

    def on_step_begin(self, args, state, control, **kwargs):
        rank = int(os.environ.get("RANK", "0"))
        self.now = rank == self.fault["rank"] and state.global_step == self.fault["step"]


def deepspeed_config(spec: dict) -> dict | None:
    """The ``deepspeed=`` dictionary of a scenario."""
    stages = {"zero1": 1, "zero2": 2, "zero3": 3, "bf16_optimizer": 1}
    if spec["engine"] not in stages:
        return None
    config = {
        "zero_optimization": {"stage": stages[spec["engine"]], **spec.get("zero", {})},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bool(spec.get("bf16"))},
        "fp16": {"enabled": bool(spec.get("fp16")), "initial_scale_power": spec.get("scale_power", 16)},
    }
    if spec["engine"] == "bf16_optimizer":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return {**config, **spec.get("deepspeed", {})}


def optim_args(spec: dict) -> str:
    """Muon's options, in float32 unless the scenario says otherwise."""
    options = {"ns_dtype": spec.get("ns_dtype", "float32"), **spec.get("options", {})}
    return ",".join(f"{k}={v}" for k, v in options.items())


def arguments(out: str, spec: dict) -> dict:
    """Keywords for TrainingArguments."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    accumulate = spec.get("accumulate", 1)
    muon = {"optim": "muon", "optim_args": optim_args(spec)}
    deepspeed = deepspeed_config(spec)
    options = dict(
        output_dir=out,
        **(muon if spec.get("optim", "muon") == "muon" else {"optim": spec["optim"]}),
        learning_rate=2e-3,
        weight_decay=0.1,
        max_steps=spec.get("steps", 20),
        per_device_train_batch_size=GLOBAL_BATCH // ranks // accumulate,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=spec.get("max_grad_norm", 1.0),
        logging_steps=1,
        save_strategy="steps" if spec.get("save_steps") else "no",
        save_steps=spec.get("save_steps", 500),
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        bf16=bool(spec.get("bf16")),
        fp16=bool(spec.get("fp16")),
        **({"deepspeed": deepspeed} if deepspeed else {"use_cpu": True}),
        **({"ddp_backend": "gloo"} if ranks > 1 and not deepspeed else {}),
        **({"fsdp": True, "fsdp_config": fsdp_config(spec)} if spec["engine"] == "fsdp2" else {}),
    )
    return {**options, **spec.get("arguments", {})}


def fsdp_config(spec: dict) -> dict:
    """FSDP2 as ``recipes/accelerate_configs/fsdp2.yaml`` has it."""
    return {
        "version": 2,
        "reshard_after_forward": True,
        "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer", "Qwen2MoeDecoderLayer"][spec["model"] == "moe"],
        "state_dict_type": "FULL_STATE_DICT",
        **spec.get("fsdp", {}),
    }


_init = AcceleratorState.__init__
_prepare_backend = PartialState._prepare_backend


def prepare(spec: dict) -> None:
    """Make accelerate take CPU ranks for what it otherwise takes GPUs for.

    On a CPU it silently trains with DDP where FSDP is asked for, and takes every rank for the only one under DeepSpeed.
    """

    def init(self, *args, fsdp_plugin=None, **kwargs):
        fresh = not AcceleratorState._shared_state
        _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fresh and fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    def gloo(self, *args, **kwargs):
        return "gloo", DistributedType.MULTI_CPU

    # Neither library takes half precision for a CPU's, which computes it all the same.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    if deepspeed_config(spec):
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        CPU_Accelerator.is_fp16_supported = lambda self: True
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    PartialState._prepare_backend = gloo if many and deepspeed_config(spec) else _prepare_backend
    AcceleratorState.__init__ = init if spec["engine"] == "fsdp2" else _init
    for key in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(key, None)
