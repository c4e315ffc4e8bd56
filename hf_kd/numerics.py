"""Numbers that go wrong in training: they stop it, with the term, the step and the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import compress, islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .objective import TaskTerm
from .resumption import sampler_of
from .signals import count_items
from .signals.batch import attention_mask_of, has_own_rows


if TYPE_CHECKING:
    from .trainer import DistillationTrainer


logger = logging.get_logger(__name__)
# So many steps in a row may a term be exactly 0: no rounding does that, something is compared with itself.
MAX_ZERO_STEPS = 50
_MAX_NAMED = 20  # rows in an error


@dataclass
class _Part:
    """A micro-batch of a step."""

    inputs: dict[str, Any]
    num_items: Any
    terms: dict[str, Tensor]
    has_labels: Tensor


class NumericsWatch(TrainerCallback):
    """
    Looks at the terms and the gradient of every step before the optimizer uses them.

    A term, or a gradient, that is NaN or infinite raises a `FloatingPointError`, or with `args.on_nonfinite == "skip"`
    leaves weights and optimizer as they are in this step; how many were left out is in every log. A term that is
    exactly 0 in 50 steps in a row, though there was something to compare, raises a `ValueError`.

    Under fp16 gradients that overflow are the gradient scaler's to handle, and are not looked at.

    Args:
        trainer ([`DistillationTrainer`]): It calls [`~NumericsWatch.add`] for each part of a step.
    """

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer
        self.skipped_steps = 0
        self.zero_steps: dict[str, int] = {}
        self.gradient_norm: Tensor | float | None = None  # of the model, as the Trainer clips it
        self._parts: list[_Part] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.skipped_steps, self.zero_steps, self.gradient_norm, self._parts = 0, {}, None, []

    def add(self, terms: dict[str, Tensor], inputs: dict[str, Any], num_items: Any) -> None:
        """Keep the terms of a part of the step, on the device, and what an error would have to look at again.

        Args:
            terms (`dict[str, Tensor]`): Name to the term's unweighted value.
            inputs (`dict[str, Any]`): The batch they were computed from.
            num_items: What the terms were divided by.
        """
        has_labels = count_items(inputs, self.trainer.problem).labels > 0
        values = {name: value.detach() for name, value in terms.items()}
        self._parts.append(_Part(inputs, num_items, values, has_labels))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parts, self._parts = self._parts, []
        norms = [] if self.trainer.accelerator.scaler is not None else self._gradient_norms()
        self.gradient_norm = None
        # One wait for the device for all of them; the Trainer has waited already to see whether the loss is NaN.
        flat = [value for part in parts for value in part.terms.values()]
        flat += [part.has_labels for part in parts] + norms
        values = iter(torch.stack([x.float() for x in flat]).tolist())
        terms = [dict(zip(part.terms, values, strict=False)) for part in parts]
        has_labels = list(islice(values, len(parts)))
        has_finite_gradient = all(map(math.isfinite, values))
        if not (has_finite_gradient and all(math.isfinite(x) for part in terms for x in part.values())):
            self._not_finite(parts, terms, has_finite_gradient)
            return
        for part in parts:
            self.trainer.record(part.terms)
        own = [has_own_rows(part.inputs) for part in parts]
        self._count_zeros(list(compress(zip(terms, has_labels, strict=True), own)))

    # Not finite

    def _gradient_norms(self) -> list[Tensor]:
        """Of the model and of the projections, which the Trainer does not know."""
        trainer = self.trainer
        norms: list[Any] = [self.gradient_norm]
        if self.gradient_norm is None:  # nothing was clipped
            norms = [nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])]
        projections = [p.grad for p in trainer.distillation_objective.parameters() if p.grad is not None]
        if projections:
            norms.append(nn.utils.get_total_norm(projections))
        # Of sharded gradients it is sharded too.
        whole = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms)
        return [torch.as_tensor(norm, device=trainer.args.device) for norm in whole]

    def _not_finite(self, parts: list[_Part], terms: list[dict[str, float]], has_finite_gradient: bool) -> None:
        trainer = self.trainer
        step = trainer.state.global_step + 1
        bad = {index: [name for name, x in part.items() if not math.isfinite(x)] for index, part in enumerate(terms)}
        if any(bad.values()):
            named = [f"{name}={terms[index][name]}" for index, names in bad.items() for name in names]
            what = "the loss"
        else:
            bad = {index: self._terms_with_bad_gradients(part) for index, part in enumerate(parts)}
            named = [name for names in bad.values() for name in names]
            what = "the gradient"
        found = [index for index, names in bad.items() if names] or list(bad)
        message = (
            f"{what} is not finite in step {step}: {', '.join(dict.fromkeys(named)) or 'in no term of this process'}; "
            f"rows {self._row_numbers(found, parts)}."
        )
        is_scaled = (
            trainer.accelerator.scaler is not None
        )  # the scaler leaves the step out by itself, on all processes
        # The gradient is that of all processes, a loss of one: the others would make the step.
        is_known_to_all = is_scaled or not has_finite_gradient or trainer.args.world_size == 1
        if trainer.args.on_nonfinite == "skip" and is_known_to_all:
            self.skipped_steps += 1
            logger.warning(f"{message} The step is left out, {self.skipped_steps} so far.")
            if not is_scaled:
                trainer.model.zero_grad()
                trainer.distillation_objective.zero_grad()
            return
        more = "" if trainer.args.on_nonfinite == "skip" else ", or set on_nonfinite='skip' to leave such steps out"
        raise FloatingPointError(
            f"{message} No checkpoint holds anything of it. Look at these rows, lower learning_rate or the term's "
            f"weight{more}."
        )

    def _terms_with_bad_gradients(self, part: _Part) -> list[str]:
        """Compute it again, the gradient of each term alone."""
        trainer = self.trainer
        if trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return []  # that would take all processes
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        parameters += list(trainer.distillation_objective.parameters())
        names = []
        for name, value in trainer.terms_of(trainer.model, part.inputs, part.num_items).items():
            if not value.requires_grad:
                continue
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            if not all(x.isfinite().all() for x in gradients if x is not None):
                names.append(name)
        return names

    def _row_numbers(self, found: list[int], parts: list[_Part]) -> str:
        """Of these parts of this process's step, in the order of the dataset."""
        trainer = self.trainer
        dataloader = trainer.callback_handler.train_dataloader
        sampler = sampler_of(dataloader)
        if not has_length(dataloader) or not hasattr(sampler, "set_epoch"):
            return "unknown, as they are streamed"
        epoch = trainer.state.epoch or 0.0
        num_done = round((epoch - int(epoch)) * len(dataloader))  # parts of this epoch
        before = sampler.epoch
        sampler.set_epoch(int(epoch))  # read ahead, it may be at the next one
        batches = list(islice(iter(dataloader.batch_sampler), num_done, num_done + len(parts)))
        sampler.set_epoch(before)
        # A last batch may have been filled with rows of the epoch's start.
        sizes = [len(attention_mask_of(part.inputs)) for part in parts]
        rows = [row for index in found for row in batches[index][: sizes[index]]]
        more = f" and {len(rows) - _MAX_NAMED} more" if len(rows) > _MAX_NAMED else ""
        return f"{', '.join(map(str, rows[:_MAX_NAMED]))}{more} of train_dataset"

    # Exactly 0

    def _count_zeros(self, parts: list[tuple[dict[str, float], float]]) -> None:
        of_labels = {term.name for term in self.trainer.distillation_objective.terms if isinstance(term, TaskTerm)}
        for name in {name for terms, _ in parts for name in terms}:
            values = [terms[name] for terms, has_labels in parts if has_labels or name not in of_labels]
            if not values:
                continue
            self.zero_steps[name] = 0 if any(values) else self.zero_steps.get(name, 0) + 1
            if self.zero_steps[name] >= MAX_ZERO_STEPS:
                raise ValueError(
                    f"{name} is exactly 0 in the last {MAX_ZERO_STEPS} steps, up to step "
                    f"{self.trainer.state.global_step + 1}: it trains nothing. "
                    "Is there one row per process where rows are compared (raise per_device_train_batch_size), or is "
                    f"the student its teacher's copy? Else leave the term out: {name}_weight=0."
                )
