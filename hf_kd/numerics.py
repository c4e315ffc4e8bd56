"""Numbers that go wrong in training: they stop it, with the term, the step and the rows."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .objective import TaskTerm
from .resumption import sampler_of
from .signals import count_items
from .signals.batch import has_own_rows


if TYPE_CHECKING:
    from .trainer import DistillationTrainer


logger = logging.get_logger(__name__)
# So many steps in a row may a term be exactly 0: no rounding does that, something is compared with itself.
MAX_ZERO_STEPS = 50
_MAX_NAMED = 20  # rows and weights in an error


class NumericsWatch(TrainerCallback, ExportableState):
    """
    Looks at the terms and the gradient of every step before the optimizer uses them.

    A term, or a gradient, that is NaN or infinite raises a `FloatingPointError`, or with `args.on_nonfinite == "skip"`
    leaves weights and optimizer as they are in this step; how many were left out is in every log, and in the
    checkpoints. A term that is exactly 0 in 50 steps in a row, though there was something to
    compare, raises a `RuntimeError`.

    Under fp16 gradients that overflow are the gradient scaler's to handle, and are not looked at.

    Args:
        trainer ([`DistillationTrainer`]): It calls [`~NumericsWatch.add`] for each part of a step.
    """

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer
        self.skipped_steps = 0
        self.zero_steps: dict[str, int] = {}
        self.gradient_norm: Tensor | float | None = None  # of the model, as the Trainer clips it
        self._parts: list[tuple[dict[str, Tensor], Tensor]] = []
        self._inputs: list[tuple[dict[str, Any], Any]] = []

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"skipped_steps": self.skipped_steps, "zero_steps": self.zero_steps}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = state.stateful_callbacks.get(type(self).__name__) or {}
        earlier = found.get("attributes", {}) if isinstance(found, dict) and state.global_step > 0 else {}
        self.skipped_steps = earlier.get("skipped_steps", 0)
        self.zero_steps = dict(earlier.get("zero_steps", {}))
        self._parts, self._inputs, self.gradient_norm = [], [], None

    def add(self, terms: dict[str, Tensor], inputs: dict[str, Any], num_items: Any) -> None:
        """Keep the terms of a part of the step, on the device, and what an error would have to look at again.

        Args:
            terms (`dict[str, Tensor]`): Name to the term's unweighted value.
            inputs (`dict[str, Any]`): The batch they were computed from.
            num_items: What the terms were divided by.
        """
        if not has_own_rows(inputs):
            return
        has_labels = count_items(inputs, self.trainer.problem).labels > 0
        self._parts.append(({name: value.detach() for name, value in terms.items()}, has_labels))
        self._inputs.append((inputs, num_items))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parts, inputs = self._parts, self._inputs
        self._parts, self._inputs = [], []
        norms = [] if self.trainer.accelerator.scaler is not None else self._gradient_norms()
        self.gradient_norm = None
        # One wait for the device for all of them; the Trainer has waited already to see whether the loss is NaN.
        flat = [value for part, _ in parts for value in part.values()]
        flat += [has_labels for _, has_labels in parts] + norms
        values = iter(torch.stack([x.float() for x in flat]).tolist() if flat else [])
        terms = [dict(zip(part, values, strict=False)) for part, _ in parts]
        has_labels = list(islice(values, len(parts)))
        has_finite_gradient = all(map(math.isfinite, values))
        if has_finite_gradient and all(math.isfinite(x) for part in terms for x in part.values()):
            self._count_zeros(list(zip(terms, has_labels, strict=True)), state.global_step + 1)
        else:
            self._not_finite(terms, inputs, has_finite_gradient)

    # Not finite

    def _gradient_norms(self) -> list[Tensor]:
        """Of the model and of the projections, which the Trainer does not know."""
        trainer = self.trainer
        norm = self.gradient_norm
        if norm is None:  # nothing was clipped
            norm = nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
        norms = [torch.as_tensor(norm, device=trainer.args.device)]
        projections = [p.grad for p in trainer.distillation_objective.parameters() if p.grad is not None]
        return [*norms, nn.utils.get_total_norm(projections)] if projections else norms

    def _not_finite(
        self, terms: list[dict[str, float]], inputs: list[tuple[dict[str, Any], Any]], has_finite_gradient: bool
    ) -> None:
        trainer = self.trainer
        step = trainer.state.global_step + 1
        bad = [index for index, part in enumerate(terms) if not all(map(math.isfinite, part.values()))]
        found = {name: x for index in bad for name, x in terms[index].items() if not math.isfinite(x)}
        what = "the loss" if found else "the gradient"
        if not found:  # look at all parts again, a term at a time
            for index, (batch, num_items) in enumerate(inputs):
                names = self._terms_with_bad_gradients(batch, num_items)
                found |= dict.fromkeys(names, math.nan)
                bad += [index] if names else []
        named = ", ".join(f"{name}={x}" if what == "the loss" else name for name, x in found.items())
        message = (
            f"{what} is not finite in step {step}: {named or 'in no term of this process'}; rows "
            f"{self._row_numbers(bad or list(range(len(inputs))), len(inputs))}."
        )
        # The gradient is that of all processes, a loss of one: the others would make the step.
        is_known_to_all = not has_finite_gradient or trainer.args.world_size == 1
        if trainer.args.on_nonfinite == "skip" and is_known_to_all:
            self.skipped_steps += 1
            logger.warning(f"{message} The step is left out, {self.skipped_steps} so far.")
            if trainer.accelerator.scaler is None:  # it leaves the step out by itself
                trainer.model.zero_grad()
                trainer.distillation_objective.zero_grad()
            return
        raise FloatingPointError(
            f"{message} Weights and checkpoints are those of the step before. Look at these rows, lower learning_rate "
            "or the term's weight, or set on_nonfinite='skip' to leave such steps out."
        )

    def _terms_with_bad_gradients(self, inputs: dict[str, Any], num_items: Any) -> list[str]:
        """Compute the step's part again, the gradient of each term alone."""
        trainer = self.trainer
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        parameters += list(trainer.distillation_objective.parameters())
        names = []
        for name, value in trainer.terms_of(trainer.model, inputs, num_items).items():
            if not value.requires_grad:
                continue
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            if not all(x.isfinite().all() for x in gradients if x is not None):
                names.append(name)
        return names

    def _row_numbers(self, parts: list[int], num_parts: int) -> str:
        """Of this process's parts of the step, in the order of the dataset."""
        trainer = self.trainer
        dataloader = trainer.callback_handler.train_dataloader
        batch_sampler = getattr(dataloader, "batch_sampler", None)
        if batch_sampler is None or sampler_of(dataloader) is None:
            return "unknown, as they are streamed"
        per_step = trainer.args.gradient_accumulation_steps
        step = trainer.state.global_step % math.ceil(len(dataloader) / per_step)
        batches = list(islice(iter(batch_sampler), step * per_step, step * per_step + num_parts))
        rows = [row for part in parts for row in batches[part]]
        more = f" and {len(rows) - _MAX_NAMED} more" if len(rows) > _MAX_NAMED else ""
        return f"{', '.join(map(str, rows[:_MAX_NAMED]))}{more} of train_dataset"

    # Exactly 0

    def _count_zeros(self, parts: list[tuple[dict[str, float], float]], step: int) -> None:
        of_labels = {term.name for term in self.trainer.distillation_objective.terms if isinstance(term, TaskTerm)}
        for name in {name for terms, _ in parts for name in terms}:
            values = [terms[name] for terms, has_labels in parts if has_labels or name not in of_labels]
            if not values:
                continue
            self.zero_steps[name] = 0 if any(values) else self.zero_steps.get(name, 0) + 1
            if self.zero_steps[name] >= MAX_ZERO_STEPS:
                raise RuntimeError(
                    f"{name} is exactly 0 in the last {MAX_ZERO_STEPS} steps, up to step {step}: it trains nothing. "
                    "Is there one row per process where rows are compared (raise per_device_train_batch_size), or is "
                    f"the student its teacher's copy? Else leave the term out: {name}_weight=0."
                )
