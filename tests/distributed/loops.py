"""Training without the Trainer, and faults on one rank only, which a Trainer does not let happen."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

import hf_muon
from tests import tiny
from tests.distributed import scenarios
from tests.distributed.record import Recorder, outcome


def run(spec: dict) -> dict:
    """``spec["loop"]``: ``replicas`` (same batch everywhere, no DDP), ``fsdp2``, ``shard1`` or ``hsdp`` (2 x n)."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    model = scenarios.model(spec["model"], "float32")
    if spec["loop"] != "replicas":
        hsdp = spec["loop"] == "hsdp"
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicas", "shards")) if hsdp else None
        columns = {"shard_placement_fn": lambda p: Shard(p.ndim - 1)} if spec["loop"] == "shard1" else {}
        for layer in (*model.model.layers, model):
            fully_shard(layer, mesh=mesh, **columns)
    config = hf_muon.MuonConfig.from_optim_args(scenarios.optim_args(spec))
    muon = hf_muon.Muon(
        hf_muon.param_groups(model, config, lr=2e-3, weight_decay=0.1),
        process_group=dist.group.WORLD if spec["loop"] == "replicas" and ranks > 1 else None,
        exchange_bytes=config.exchange_bytes,
    )
    recorder = Recorder(muon)
    mine = slice(None) if spec["loop"] == "replicas" else slice(rank, None, ranks)
    logs = []
    for step in range(spec["steps"]):
        batch = tiny.tokens(rows=400)[step * scenarios.GLOBAL_BATCH : (step + 1) * scenarios.GLOBAL_BATCH][mine]
        ids = torch.tensor([row["input_ids"] for row in batch])
        model(input_ids=ids, labels=ids).loss.backward()
        if spec.get("fault") and step == spec["fault"]["step"] and rank == spec["fault"]["rank"]:
            _fault(model, spec["fault"]["kind"])
        muon.step()
        muon.zero_grad()
        logs.append(muon.metrics())
    return {"logs": logs, "world_size": ranks, **outcome(model, muon, recorder)}


def _fault(model: torch.nn.Module, kind: str) -> None:
    weight = model.get_submodule(scenarios.VICTIM).weight
    if kind == "missing":
        weight.grad = None
    elif kind == "nan":
        scenarios.local(weight.grad)[0, 0] = float("nan")
    else:
        weight.grad.add_(1.0)
