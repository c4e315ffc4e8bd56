"""A training that was stopped goes on from its last checkpoint as if nothing had happened."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .compat import rotate_checkpoints


# Where files are written before they get their names; transformers does not take its folders for checkpoints.
STAGING_NAME = "incomplete"
# What transformers loads weights from; names such as model_v1.safetensors are somebody's own.
_WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class ResumableTrainer(Trainer):
    """A [`~transformers.Trainer`] whose checkpoints are complete or absent, and whose resumed runs log and train what
    the run would have that was not stopped.

    Where it departs from `Trainer`: a checkpoint is written beside its place and moved there as a whole, and so is
    each file of the model in `save_model`; `training_args.bin`, a pickle with the paths and the token of who trained,
    is not written; batches grouped by length are drawn anew from the seed in every epoch, not from what dropout left
    of the random numbers, which differs between processes and is unknown to a run that is resumed; the means of the
    next log include the steps before the checkpoint; a run that was complete trains no further step.
    """

    # Set by Trainer.__init__
    args: Any
    state: Any
    accelerator: Any
    _globalstep_last_logged: int

    def __init__(self, *args: Any, **kwargs: Any):
        self._staging: str | None = None  # while a checkpoint is saved
        # What the next log is the mean of: the Trainer's own sum, and the sums and steps of each term
        self._loss_sum: Tensor | None = None
        self._resumed_loss: Tensor | None = None
        self._term_sums: dict[str, Tensor] = {}
        self._steps_in_sums: dict[str, set[int]] = {}
        super().__init__(*args, **kwargs)
        self.resume_notes = ResumeNotes()
        self.add_callback(self.resume_notes)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        given = resume_from_checkpoint if not isinstance(resume_from_checkpoint, bool) else None
        self.resume_notes.run_dir = None if given is None else str(Path(given).absolute().parent)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_callback_state(self) -> None:
        """May make the callbacks anew, as `restore_callback_states_from_checkpoint` asks."""
        super()._load_callback_state()
        run_dir = self.resume_notes.run_dir
        self.resume_notes = next(x for x in self.callback_handler.callbacks if isinstance(x, ResumeNotes))
        self.resume_notes.run_dir = run_dir

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Steps after the last log of an earlier attempt are not part of this one.
        self._term_sums, self._steps_in_sums, self._loss_sum, self._resumed_loss = {}, {}, None, None
        return super()._inner_training_loop(*args, **kwargs)

    # Complete or absent

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else self._staging

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging, checkpoint = os.path.join(run_dir, STAGING_NAME), os.path.join(run_dir, name)
        if self.accelerator.is_local_main_process:  # a machine may have a disk of its own
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed while it saved
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = checkpoint  # super() saw it in the staging folder
            if self.args.should_save:
                # By best_global_step alone: transformers 5 drops what it does not find where the run was before.
                self._write_state(os.path.join(staging, name), best_model_checkpoint=None)
            self.accelerator.wait_for_everyone()  # the others have written their parts
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_of_the_disk(error):
                raise
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            raise OSError(
                f"the checkpoint of step {self.state.global_step} could not be written into {run_dir}: {error}. The "
                "ones before it are as they were; make room, or keep fewer (save_total_limit=2), and go on with "
                "resume_from_checkpoint=True."
            ) from error
        finally:
            self._staging = None
        if self.accelerator.is_main_process:
            self._move(staging, name, checkpoint)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:
            with contextlib.suppress(FileNotFoundError):  # of a disk that all machines see
                self._move(staging, name, checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)
        if self.args.should_save:
            rotate_checkpoints(self, run_dir)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            best = self.state.best_model_checkpoint
            self._write_state(self.args.output_dir, None if best is None else os.path.basename(best))

    def _write_state(self, folder: str, best_model_checkpoint: str | None) -> None:
        """As the Trainer, but for the path of the best checkpoint: the folder may move, and it can name its user."""
        state = copy.copy(self.state)
        state.best_model_checkpoint = best_model_checkpoint
        state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))

    def _move(self, staging: str, name: str, checkpoint: str) -> None:
        written, replaced = os.path.join(staging, name), os.path.join(staging, "replaced")
        if not os.path.isdir(written):
            return
        if os.path.isdir(checkpoint):  # of a run before the one that is resumed
            os.rename(checkpoint, replaced)
        os.rename(written, checkpoint)
        shutil.rmtree(staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else once it has its place
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if self._staging is not None:
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                os.remove(os.path.join(output_dir, TRAINING_ARGS_NAME))
            return
        staging = Path(output_dir, STAGING_NAME)
        try:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed while it saved
            super()._save(str(staging), state_dict)
            if self.args.should_save:
                (staging / TRAINING_ARGS_NAME).unlink()
                _move_files(staging, Path(output_dir))
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_of_the_disk(error):
                raise
            raise OSError(
                f"the model could not be written into {output_dir}: {error}. Files that were there are whole, old or "
                "new; make room, and save it again."
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)

    # The same data

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return SeededPerEpoch(sampler, seed)
        return sampler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if 0 < self.state.max_steps <= self.state.global_step:  # complete in the middle of an epoch, and resumed
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    # The same logs

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        # The Trainer leaves a loss that is NaN out of its sum.
        if self._resumed_loss is not None and loss.isfinite():
            loss, self._resumed_loss = loss + self._resumed_loss.to(loss.device), None
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._resumed_loss is not None and self.state.global_step >= self.state.max_steps:  # no step was left
            tr_loss += self._resumed_loss.to(tr_loss.device)
            self._resumed_loss = None
        self._loss_sum = tr_loss  # transformers 4.57 has no other place for it
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        found = {"processes": self.args.world_size, **self.running_state()}
        self._running_state_file(output_dir).write_text(json.dumps(found), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not self._running_state_file(checkpoint).is_file():
            return
        found = json.loads(self._running_state_file(checkpoint).read_text(encoding="utf-8"))
        if found["processes"] == self.args.world_size:  # else it is a share of other processes
            self.load_running_state(found)

    def _running_state_file(self, checkpoint: str) -> Path:
        """Of this process, beside its random state."""
        return Path(checkpoint, f"running_state_{self.args.process_index}.json")

    def running_state(self) -> dict[str, Any]:
        """What this process adds up until the next log, as JSON has it."""
        return {
            "last_logged_step": self._globalstep_last_logged,
            "loss": 0.0 if self._loss_sum is None else self._loss_sum.item(),
            "terms": {name: value.item() for name, value in self._term_sums.items()},
            "steps": {name: sorted(steps) for name, steps in self._steps_in_sums.items()},
        }

    def load_running_state(self, found: dict[str, Any]) -> None:
        """Go on from what [`~ResumableTrainer.running_state`] gave."""
        self._globalstep_last_logged = found["last_logged_step"]
        self._resumed_loss = torch.tensor(found["loss"])
        self._term_sums = {name: torch.tensor(x, device=self.args.device) for name, x in found["terms"].items()}
        self._steps_in_sums = {name: set(steps) for name, steps in found["steps"].items()}


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether it could not write; torch says so in a RuntimeError of its file format."""
    return not isinstance(error, RuntimeError) or "inline_container" in str(error)


def _move_files(source: Path, target: Path) -> None:
    """Each file as a whole, the weights last; weights that were there and are not replaced would be loaded too."""
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.suffix == ".safetensors"):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).replace(target / path)
    for path in target.iterdir():
        if _WEIGHTS_NAME.fullmatch(path.name) and path.relative_to(target) not in files:
            path.unlink()


class SeededPerEpoch(Sampler):
    """
    Batches grouped by length in an order that follows from seed and epoch alone.

    Args:
        sampler ([`~transformers.trainer_pt_utils.LengthGroupedSampler`]): Its generator is set here.
        seed (`int`): The run's.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


def sampler_of(dataloader: Any) -> Any:
    """The sampler of rows below the batch samplers that accelerate wraps around each other, if there is one."""
    found: Any = getattr(dataloader, "batch_sampler", None)
    while hasattr(found, "batch_sampler"):
        found = found.batch_sampler
    return getattr(found, "sampler", None)


class ResumeNotes(TrainerCallback, ExportableState):
    """Notes each step at which a training went on from a checkpoint; every later checkpoint carries the notes.

    To start from that of a training that had run to its end is no resumption, as no step was left.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.run_dir: str | None = None  # that of the checkpoint, where it is not output_dir
        self.started_at: float | None = None  # of the training in this process, in seconds since the epoch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started_at = time.time()
        # A checkpoint of the Trainer's own, or of an earlier version, knows nothing of this object.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        best = os.path.join(self.run_dir or args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if state.best_global_step and os.path.isdir(best):
            state.best_model_checkpoint = best
        # Of the checkpoint; the Trainer hands it to this object only if it is told to.
        found = state.stateful_callbacks.get(type(self).__name__) or {}
        earlier = found.get("attributes", {}).get("steps", []) if isinstance(found, dict) else []
        self.steps = list(earlier) if state.global_step > 0 else []
        if 0 < state.global_step < state.max_steps:
            self.steps.append(state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Resumed within an epoch, transformers does not reach the sampler of several processes.
        sampler = sampler_of(kwargs.get("train_dataloader"))
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(int(state.epoch or 0))

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"steps": self.steps}}
