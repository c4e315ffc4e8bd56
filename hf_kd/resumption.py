"""Remembers the steps at which a training was resumed."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class ResumeNotes(TrainerCallback, ExportableState):
    """Notes each step at which a training went on from a checkpoint; every later checkpoint carries the notes.

    To start from that of a training that had run to its end is no resumption, as no step was left.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.started_at: float | None = None  # of the training in this process, in seconds since the epoch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started_at = time.time()
        # Of the checkpoint; the Trainer hands it to this object only if it is told to.
        found = state.stateful_callbacks.get(type(self).__name__) or {}
        earlier = found.get("attributes", {}).get("steps", []) if isinstance(found, dict) else []
        self.steps = list(earlier) if state.global_step > 0 else []
        if 0 < state.global_step < state.max_steps:
            self.steps.append(state.global_step)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"steps": self.steps}}
