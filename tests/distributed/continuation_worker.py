"""Ranks of one run on a schedule in tokens: ``continuation_worker CORPUS OUT ENGINE``; each leaves OUT/RANK.pt."""

import json
import os
import sys
from pathlib import Path

import torch

from tests.distributed import scenarios
from tests.distributed.record import whole
from tests.test_continuation import prepare


def main(corpus: Path, out: Path, engine: str) -> None:
    """Train, and gather the whole weights on rank 0."""
    # Without a threshold DeepSpeed would leave every weight of so small a model whole on each rank.
    spec = {"engine": engine, "model": "moe", "zero": {"stage3_param_persistence_threshold": 0}}
    spec["fsdp"] = {"transformer_layer_cls_to_wrap": "DeepseekV3DecoderLayer"}
    scenarios.prepare(spec)
    options = json.loads((out / "options.json").read_text())
    config = scenarios.deepspeed_config(spec)
    if config:
        file = out / "deepspeed.json"
        file.write_text(json.dumps(config))
        options |= {"deepspeed": file, "use_cpu": False}
    elif engine == "fsdp2":
        file = out / "fsdp.json"
        file.write_text(json.dumps(scenarios.fsdp_config(spec)))
        options |= {"fsdp_config": file, "ddp_backend": "gloo"}
    elif int(os.environ["WORLD_SIZE"]) > 1:
        options |= {"ddp_backend": "gloo"}
    trainer = prepare(corpus, out / "run", *(["--fsdp"] if engine == "fsdp2" else []), **options)
    trainer.train()
    trainer.create_model_card()
    weights = {name: whole(p) for name, p in trainer.model.named_parameters()}
    buffers = {name: b.clone() for name, b in trainer.model.named_buffers() if "bias" in name}
    logs = [row for row in trainer.state.log_history if "loss" in row]
    kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
    torch.save({"weights": weights, "buffers": buffers, "logs": logs, "kind": kind}, out / f"{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # a rank that leaves while another still talks to it aborts that one in gloo's destructor


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
