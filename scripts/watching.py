"""Options of every training script that say what of a run is watched beside its loss (docs/stability.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import hf_muon


@dataclass(kw_only=True)
class WatchArguments:
    """Nothing of it is on by default, and nothing changes what is trained."""

    attention_logits_steps: int | None = field(
        default=None, metadata={"help": "Log the largest attention logits every so many optimizer steps."}
    )
    output_rms_steps: int | None = field(
        default=None, metadata={"help": "Log the RMS of hidden layers' outputs every so many optimizer steps."}
    )
    detect_spikes: bool = field(
        default=False, metadata={"help": "Warn when the loss or the gradient norm jumps: step, layer and batch."}
    )

    def watchers(self) -> list[Any]:
        """Callbacks for a Trainer.

        Raises:
            ValueError: a number of steps below 1.
        """
        found: list[Any] = []
        if self.attention_logits_steps is not None:
            found.append(hf_muon.AttentionLogitsCallback(self.attention_logits_steps))
        if self.output_rms_steps is not None:
            found.append(hf_muon.OutputRMSCallback(self.output_rms_steps))
        if self.detect_spikes:
            found.append(hf_muon.SpikeCallback())
        return found
