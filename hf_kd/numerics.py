"""Numbers that go wrong in training: they stop it, with the term, the step and the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import compress, islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .objective import TaskTerm
from .resumption import sampler_of
from .signals.batch import attention_mask_of, has_own_rows


if TYPE_CHECKING:
    from .trainer import DistillationTrainer


logger = logging.get_logger(__name__)
# So many steps in a row may a term be exactly 0: something is compared with itself.
MAX_ZERO_STEPS = 50
_MAX_NAMED = 20  # rows in an error


@dataclass
class _Part:
    """A micro-batch of a step."""

    inputs: dict[str, Any]
    num_items: Any
    terms: dict[str, Tensor]


class NumericsWatch(TrainerCallback):
    """
    Looks at the terms and the gradient of every step before the optimizer uses them.

    A term, or a gradient, that is NaN or infinite raises a `FloatingPointError`, or with `args.on_nonfinite == "skip"`
    leaves weights and optimizer as they are in this step; how many were left out is in every log. A term of the
    teacher that is exactly 0 in 50 steps in a row raises a `ValueError`; that of the labels rounds to 0 where all are
    learned.

    Several processes do the same in the same step, in the same words, whichever of them has the rows: the gradient is
    that of all, and they ask each other only where it is not finite. For terms that are 0 they do so every 50 steps,
    and stop if a term was 0 in all of these on all processes.

    Under fp16 gradients that overflow are the gradient scaler's to handle, and are not looked at.

    Args:
        trainer ([`DistillationTrainer`]): It calls [`~NumericsWatch.add`] for each part of a step.
    """

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer
        self.skipped_steps = 0
        self.zero_steps: dict[str, int] = {}  # in a row; -1 where the other processes have to be told of their end
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
        self._parts.append(_Part(inputs, num_items, {name: value.detach() for name, value in terms.items()}))
        if self.trainer.args.world_size > 1 or self.trainer.accelerator.scaler is not None:
            self._mark_gradient(terms)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parts, self._parts = self._parts, []
        norms = [] if self.trainer.accelerator.scaler is not None else self._gradient_norms()
        self.gradient_norm = None
        # One wait for the device for all of them; the Trainer has waited already to see whether the loss is NaN.
        flat = [value for part in parts for value in part.terms.values()] + norms
        values = iter(torch.stack([x.float() for x in flat]).tolist())
        terms = [dict(zip(part.terms, values, strict=False)) for part in parts]
        has_finite_gradient = all(map(math.isfinite, values))
        is_finite = has_finite_gradient and all(math.isfinite(x) for part in terms for x in part.values())
        if self.trainer.accelerator.scaler is not None and self.trainer.args.world_size > 1:
            # The scaler leaves the step out on all processes, and each must note it.
            own = torch.tensor(float(is_finite), device=self.trainer.args.device)
            is_finite = self.trainer.accelerator.reduce(own, reduction="mean").item() == 1.0
        if not is_finite:
            self._not_finite(parts, terms, has_finite_gradient)
            return
        for part in parts:
            self.trainer.record(part.terms)
        self._count_zeros(list(compress(terms, [has_own_rows(part.inputs) for part in parts])))

    # Not finite

    def _gradient_norms(self) -> list[Tensor]:
        """Of the model and of the projections, which the Trainer does not know."""
        trainer = self.trainer
        if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # It has made the step, and calls a norm that is not finite -1: look at what the step made of the weights.
            shares = [getattr(p, "ds_tensor", p).detach() for p in trainer.model.parameters()]
            return [nn.utils.get_total_norm(shares).to(trainer.args.device)]
        norms: list[Any] = [self.gradient_norm]
        if self.gradient_norm is None:  # nothing was clipped
            norms = [nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])]
        projections = [p.grad for p in trainer.distillation_objective.parameters() if p.grad is not None]
        if projections:
            norms.append(nn.utils.get_total_norm(projections))
        # Of sharded gradients it is sharded too.
        whole = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms)
        return [torch.as_tensor(norm, device=trainer.args.device) for norm in whole]

    @staticmethod
    def _mark_gradient(terms: dict[str, Tensor]) -> None:
        """A term that is not finite can have a gradient that is: other processes, and the scaler, would make the step,
        and wait for this process in the next. NaN in its gradient is NaN in that of all."""
        nothing = 0.0 * torch.stack([value.detach().float() for value in terms.values()]).sum()  # or NaN
        for value in terms.values():
            if value.requires_grad:
                value.register_hook(lambda gradient: gradient + nothing.to(gradient.dtype))

    def _not_finite(self, parts: list[_Part], terms: list[dict[str, float]], has_finite_gradient: bool) -> None:
        trainer = self.trainer
        is_scaled = trainer.accelerator.scaler is not None  # which leaves the step out by itself, on all processes
        # Each process of DeepSpeed sees its share of the weights.
        is_known_to_all = trainer.args.world_size == 1 or (
            (is_scaled or not has_finite_gradient)
            and trainer.accelerator.distributed_type != DistributedType.DEEPSPEED
        )
        of_all: Any = gather_object if is_known_to_all else list
        bad = [[name for name, x in part.items() if not math.isfinite(x)] for part in terms]
        if any(of_all([any(bad)])):
            named = [f"{name}={terms[index][name]}" for index, names in enumerate(bad) for name in names]
            what = "the loss"
        else:
            bad = [self._terms_with_bad_gradients(part) for part in parts]
            named = [name for names in bad for name in names]
            what = "the gradient"
        found = [index for index, names in enumerate(bad) if names] or list(range(len(parts)))
        findings = of_all([(named, self._row_numbers(found, parts))])
        findings = [finding for finding in findings if finding[0]] or findings
        named = list(dict.fromkeys(name for names, _ in findings for name in names))
        message = (
            f"{what} is not finite in step {trainer.state.global_step + 1}: {', '.join(named) or 'term unknown'}; "
            f"rows {_describe([rows for _, rows in findings])}."
        )
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
        sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if trainer.accelerator.distributed_type in sharded or trainer.accelerator.scaler is not None:
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

    def _row_numbers(self, found: list[int], parts: list[_Part]) -> list[int] | None:
        """Of these parts of this process's step, in the order of the dataset; `None` where that is not known."""
        trainer = self.trainer
        dataloader = trainer.callback_handler.train_dataloader
        sampler = sampler_of(dataloader)
        if not has_length(dataloader) or not hasattr(sampler, "set_epoch"):
            return None
        epoch = trainer.state.epoch or 0.0
        num_done = round((epoch - int(epoch)) * len(dataloader))  # parts of this epoch
        before = sampler.epoch
        sampler.set_epoch(int(epoch))  # read ahead, it may be at the next one
        batches = list(islice(iter(dataloader.batch_sampler), num_done, num_done + len(parts)))
        sampler.set_epoch(before)
        # A last batch may have been filled with rows of the epoch's start.
        sizes = [len(attention_mask_of(part.inputs)) for part in parts]
        return [row for index in found for row in batches[index][: sizes[index]]]

    # Exactly 0

    def _count_zeros(self, parts: list[dict[str, float]]) -> None:
        """Add a step to the zeros in a row of each term."""
        trainer = self.trainer
        names = [term.name for term in trainer.distillation_objective.terms if not isinstance(term, TaskTerm)]
        for name in names:
            values = [terms[name] for terms in parts if name in terms]
            count = self.zero_steps.get(name, 0)
            if values and count >= 0:
                self.zero_steps[name] = -1 if any(values) else count + 1
        step = trainer.state.global_step + 1
        if trainer.args.world_size > 1 and step % MAX_ZERO_STEPS:
            return
        counts = gather_object([[self.zero_steps.get(name, 0) for name in names]])
        for name, of_processes in zip(names, zip(*counts, strict=True), strict=True):
            if min(of_processes) < 0:
                self.zero_steps[name] = 0
            elif max(of_processes) >= MAX_ZERO_STEPS:
                raise ValueError(
                    f"{name} is exactly 0 in the last {MAX_ZERO_STEPS} steps, up to step {step}: it trains nothing. "
                    "Is there one row per process where rows are compared (raise per_device_train_batch_size), or is "
                    f"the student its teacher's copy? Else leave the term out: {name}_weight=0."
                )


def _describe(rows_of_processes: list[list[int] | None]) -> str:
    if None in rows_of_processes:
        return "unknown, as their order cannot be read again"
    rows = [row for rows in rows_of_processes for row in rows or ()]
    more = f" and {len(rows) - _MAX_NAMED} more" if len(rows) > _MAX_NAMED else ""
    return f"{', '.join(map(str, rows[:_MAX_NAMED]))}{more} of train_dataset"
