"""What every training script does around ``trainer.train()``: resume, held-out loss before and after, saving."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import transformers
from huggingface_hub import snapshot_download, upload_folder
from transformers import Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_muon.run import settle

# In a checkpoint beside the model: what only a resumed run needs.
RESUME_FILES = ("optimizer", "scheduler", "scaler", "rng_state")
# What the Trainer, too, leaves out of a push.
NOT_PUSHED = ["_*", "checkpoint-*"]


@dataclass(frozen=True)
class HeldOutLosses:
    """Of the model before training, and of the one that is saved."""

    before: float
    after: float
    step: int
    """After which the saved model stood."""


def progress_bars(args: Any) -> None:
    """``disable_tqdm`` silences all bars, of data and weights too; otherwise one process of a machine draws them."""
    if args.disable_tqdm or args.local_process_index:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def model_source(name: str, subfolder: str | None, revision: str) -> str:
    """A folder or hub name of which every loader reads ``subfolder``, such as ``Moonlight_hf_step_42000``.

    transformers' loaders know subfolders, TRL's do not: of a hub repository the one folder is downloaded.

    Raises:
        ValueError: the repository or folder has no such subfolder.
    """
    if not subfolder:
        return name
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=f"{subfolder}/*"))
    if not (folder / subfolder / "config.json").is_file():
        raise ValueError(
            f"{name} has no model in a subfolder {subfolder!r}: set model_subfolder to one with config.json"
        )
    return str(folder / subfolder)


def train_and_report(trainer: Trainer) -> None:
    """Train to the end, resuming by itself; held-out loss before and after; save model, card, metrics and state.

    With ``push_to_hub`` all of that is uploaded at the end, also by a run that finds itself trained to its end.
    """
    args = trainer.args
    say = trainer.accelerator.print
    checkpoint = find_checkpoint(args)
    finished = checkpoint is not None and is_finished(checkpoint, args)
    if finished:
        say(f"{args.output_dir} is trained to its end; name another output_dir to train anew")
        trainer.state = _copy_results(checkpoint, args)
    else:
        say(f"resuming from {checkpoint}" if checkpoint else f"starting in {args.output_dir}")
        # Inside train(), for DeepSpeed's and FSDP's engines exist only there. A resumed run has it in its history.
        args.eval_on_start = trainer.eval_dataset is not None and checkpoint is None
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(_internal_call=True)  # as no call of the user: pushing comes when all is written
        trainer.save_metrics("train", {**result.metrics, "train_global_steps": trainer.state.global_step})
        if trainer.eval_dataset is not None and trainer.state.global_step not in _eval_losses(trainer.state):
            trainer.evaluate()
        trainer.save_state()
    if losses := held_out_losses(trainer.state, args):
        trainer.save_metrics("eval", {"eval_loss_before": losses.before, "eval_loss": losses.after})
        say(f"held-out loss: {losses.before:.4f} before training, {losses.after:.4f} after {losses.step} steps")
    # A finished run has its card; options that it is started with again may not be those that it was trained with.
    if not finished or not (Path(args.output_dir) / "README.md").is_file():
        trainer.create_model_card()
    say(f"saved to {args.output_dir}")
    if args.push_to_hub:
        _push(trainer, finished)
        say(f"pushed to {args.hub_model_id or Path(args.output_dir).name}")
    # No rank may take the process group down while another still talks to it.
    trainer.accelerator.wait_for_everyone()
    trainer.end()  # closes trackers and the process group
    settle()


def _push(trainer: Trainer, finished: bool) -> None:
    if not finished:
        trainer.push_to_hub()
    elif trainer.is_world_process_zero():
        # The Trainer would first save the model that it holds, which is untrained here.
        args = trainer.args
        upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=args.output_dir,
            token=args.hub_token,
            revision=args.hub_revision,
            ignore_patterns=NOT_PUSHED,
        )


def find_checkpoint(args: Any) -> str | None:
    """The checkpoint that the user named, else the last complete one in ``output_dir``, else None.

    Raises:
        ValueError: the checkpoint that the user named does not exist.
    """
    asked = args.resume_from_checkpoint
    if asked and str(asked).lower() != "true":
        if not Path(asked).is_dir():
            raise ValueError(f"resume_from_checkpoint={asked!r} is not a folder; leave it out to resume by itself")
        return asked
    # One process looks (and may move a broken folder aside) before the others do.
    with args.main_process_first(desc="looking for a checkpoint"):
        return last_complete_checkpoint(args.output_dir)


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint that was written to its end.

    The Trainer writes ``trainer_state.json`` last: a folder without it is what a killed process left, and resuming from
    it would fail. It gets another name, which a push leaves out; nothing is deleted.
    """
    while Path(output_dir).is_dir():
        newest = get_last_checkpoint(output_dir)
        if newest is None or _state_of(newest) is not None:
            return newest
        folder = Path(newest)
        shutil.rmtree(folder.with_name(f"_incomplete-{folder.name}"), ignore_errors=True)
        folder.rename(folder.with_name(f"_incomplete-{folder.name}"))
    return None


def is_finished(checkpoint: str, args: Any) -> bool:
    """Whether nothing is left to train: the Trainer would still take one more step (seen in transformers 5.23)."""
    state = _state_of(checkpoint)
    if state is None:
        return False
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.global_step >= state.max_steps and state.num_train_epochs >= math.ceil(args.num_train_epochs)


def _state_of(folder: str) -> TrainerState | None:
    try:
        return TrainerState.load_from_json(str(Path(folder) / "trainer_state.json"))
    except (OSError, ValueError):
        return None


def _copy_results(checkpoint: str, args: Any) -> TrainerState:
    """Put a finished run's model and state into ``output_dir``, where a kill after the last checkpoint left none."""
    last, saved = _state_of(checkpoint), _state_of(args.output_dir)
    if saved is not None and saved.global_step == last.global_step:
        return saved
    if args.should_save:
        source = last.best_model_checkpoint if args.load_best_model_at_end else None
        for file in Path(source or checkpoint).iterdir():
            if file.is_file() and not file.name.startswith(RESUME_FILES):
                shutil.copy2(file, args.output_dir)
    return last


def held_out_losses(state: TrainerState, args: Any) -> HeldOutLosses | None:
    """None without an evaluation. With ``load_best_model_at_end`` the saved model is not that of the last step."""
    losses = _eval_losses(state)
    if not losses:
        return None
    best = state.best_global_step if args.load_best_model_at_end else None
    step = best if best in losses else max(losses)
    return HeldOutLosses(losses.get(0, math.nan), losses[step], step)


def _eval_losses(state: TrainerState) -> dict[int, float]:
    return {int(row["step"]): row["eval_loss"] for row in state.log_history if "eval_loss" in row}
