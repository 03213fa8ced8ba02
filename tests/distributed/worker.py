"""One rank of a Trainer run; started by torch.distributed.run or as a single process."""

import os
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import hf_muon
from tests import tiny

hf_muon.register()


class SequentialTrainer(Trainer):
    """Rows in order, so that any number of ranks sees the same global batches."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main(out: str, steps: int, rows: int, resume: bool) -> None:
    """Train ``steps`` steps of ``rows`` rows per rank; leave weights and logs of every rank in ``out``."""
    args = TrainingArguments(
        output_dir=f"{out}/run",
        optim="muon",
        optim_args="ns_dtype=float32",
        learning_rate=2e-3,
        weight_decay=0.1,
        max_steps=steps,
        per_device_train_batch_size=rows,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        disable_tqdm=True,
    )
    trainer = SequentialTrainer(model=tiny.qwen2(), args=args, train_dataset=tiny.tokens(rows=120))
    trainer.train(resume_from_checkpoint=resume or None)
    rank = args.process_index
    torch.save(
        {
            "weights": {n: p.detach() for n, p in trainer.model.named_parameters()},
            "momentum": [s["momentum_buffer"] for s in trainer.optimizer.optimizer.state.values() if len(s) == 1],
            "update_rms": [x["muon/update_rms"] for x in trainer.state.log_history if "loss" in x],
            "world_size": args.world_size,
            "distributed": str(args.parallel_mode),
        },
        Path(out) / f"rank{rank}.pt",
    )
    if torch.distributed.is_initialized():
        # A rank that leaves while another still talks to it aborts that one in gloo's destructor.
        torch.distributed.barrier()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "resume")
