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
from hf_muon.integrations.trainer import find_muon
from tests import tiny
from tests.distributed import loops, scenarios
from tests.distributed.record import Recorder, outcome

hf_muon.register()


class SequentialTrainer(Trainer):
    """Rows in order, so that any number of ranks sees the same global batches."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(out: Path, spec: dict) -> dict:
    """One scenario; returns what the tests look at."""
    args = TrainingArguments(**scenarios.arguments(str(out / "run"), spec))
    # After the arguments, because under ZeRO-3 they make from_pretrained cut the parameters as it makes them.
    model = scenarios.model(spec["model"], spec.get("dtype", "float32"), spec.get("pretrained"))
    if spec.get("native"):  # DeepSpeed's own Muon acts on this tag; the package must never set it
        for name, p in model.named_parameters():
            p.use_muon = p.ndim == 2 and "embed" not in name
    callbacks = [scenarios.Faults(model, spec["fault"])] if "fault" in spec else []
    callbacks += [hf_muon.SpectraCallback(model, spec["spectra"])] if "spectra" in spec else []
    trainer = SequentialTrainer(model=model, args=args, train_dataset=tiny.tokens(rows=400), callbacks=callbacks)
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
    return {
        "logs": [row for row in trainer.state.log_history if "loss" in row],
        "world_size": args.world_size,
        "overflows": getattr(trainer.model_wrapped, "skipped_steps", 0),  # DeepSpeed's count
        **outcome(trainer.model, muon, recorder[0] if recorder else None),
    }


def main(out: str, scenario_file: str) -> None:
    """Run the scenarios; an exception in one is its result."""
    rank = int(os.environ.get("RANK", "0"))
    for spec in json.loads(Path(scenario_file).read_text()):
        folder = Path(out) / spec["name"]
        folder.mkdir(parents=True, exist_ok=True)
        spec = {**spec, **spec.get("by_rank", {}).get(str(rank), {})}
        scenarios.prepare(spec)
        try:
            result = loops.run(spec) if "loop" in spec else train(folder, spec)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
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
