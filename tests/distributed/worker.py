"""Ranks of Trainer runs, one after the other in one set of processes: ``worker OUT SCENARIOS.json``.

Started by torch.distributed.run, or as a single process. Every rank leaves OUT/NAME/rankR.pt for each scenario.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import Trainer, TrainingArguments

import hf_muon
from hf_muon.exchange.layout import span_on
from hf_muon.integrations.trainer import find_muon
from hf_muon.units import Unit
from tests import tiny
from tests.distributed import scenarios

hf_muon.register()


class SequentialTrainer(Trainer):
    """Rows in order, so that any number of ranks sees the same global batches."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def slices(unit: Unit, tensors) -> dict[str, tuple[int, torch.Tensor]]:
    """name -> (first element, elements stored here); ``tensors`` by index of the parameter."""
    storage = unit.storage
    items = tensors.items() if isinstance(tensors, dict) else enumerate(tensors)
    return {
        unit.names[i]: (span_on(storage.placements[i], storage.rank, 0)[0], t.detach().clone().cpu()) for i, t in items
    }


class Recorder:
    """Every gradient slice that reaches the optimizer, in order."""

    def __init__(self, muon):
        self.steps, self.muon = [], muon
        for method in ("_step_muon", "_step_adamw"):
            self._wrap(method)

    def _wrap(self, method):
        original = getattr(self.muon, method)

        def wrapped(unit, *more):
            self.steps.append({"lr": unit.group["lr"], "unit": unit.key, "grads": slices(unit, unit.grads)})
            original(unit, *more)

        setattr(self.muon, method, wrapped)


def train(out: Path, spec: dict) -> dict:
    """One scenario; returns what the tests look at."""
    model = scenarios.model(spec["model"], spec.get("dtype", "float32"))
    args = TrainingArguments(**scenarios.arguments(str(out / "run"), spec))
    trainer = SequentialTrainer(model=model, args=args, train_dataset=tiny.tokens(rows=400))
    recorder = []
    if spec.get("record"):
        create = trainer.create_optimizer

        def recording(*a, **k):
            optimizer = create(*a, **k)
            if not recorder:
                recorder.append(Recorder(find_muon(optimizer)))
            return optimizer

        trainer.create_optimizer = recording
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    muon = find_muon(trainer.optimizer)
    result = {
        "logs": [row for row in trainer.state.log_history if "loss" in row],
        "world_size": args.world_size,
        "steps": recorder[0].steps if recorder else [],
        "weights": {},
        "momentum": {},
        "engine": "",
    }
    if muon is None:  # plain AdamW, for comparison
        result["full"] = {n: p.detach().float().clone() for n, p in trainer.model.named_parameters()}
        return result
    for unit in muon._units.values():
        storage = unit.storage
        result["engine"] = storage.engine
        result["weights"].update(slices(unit, unit.weights()))
        if unit.exchange is not None:
            result["momentum"].update(slices(unit, muon._momenta(unit)))
    result["orthogonalized"] = muon.telemetry.orthogonalized
    result["skipped"] = muon.telemetry.skipped_steps
    return result


def main(out: str, scenario_file: str) -> None:
    """Run the scenarios; an exception in one is its result."""
    rank = int(os.environ.get("RANK", "0"))
    for spec in json.loads(Path(scenario_file).read_text()):
        folder = Path(out) / spec["name"]
        folder.mkdir(parents=True, exist_ok=True)
        scenarios.prepare(spec)
        try:
            result = train(folder, spec)
        except Exception as error:
            if not spec.get("fails"):
                traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        torch.save(result, folder / f"rank{rank}.pt")
        for state in (AcceleratorState, GradientState):
            state._reset_state()
        PartialState._shared_state.clear()
    if torch.distributed.is_initialized():
        # A rank that leaves while another still talks to it aborts that one in gloo's destructor.
        torch.distributed.barrier()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
