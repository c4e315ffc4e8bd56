"""The training arguments of a distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments

from .objective.objective import (
    AttentionLossType,
    AttentionTerm,
    DistillationObjective,
    HiddenLossType,
    HiddenTerm,
    LogitLossType,
    LogitTerm,
    TaskTerm,
)


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with the weights and forms of the distillation terms.

    The loss is `task_loss_weight * task_loss + logit_loss_weight * logit_loss + ...`: weights multiply terms as given
    and are never normalised. For several terms of a kind, give the trainer a [`DistillationObjective`].

    One default differs from `TrainingArguments`: gradient checkpointing, where it is on, runs with
    `use_reentrant=False`, because the reentrant kind drops the gradient of what is captured inside a block.

    Args:
        task_loss_weight (`float`, *optional*, defaults to 0.5): Weight of the loss against the labels.
        logit_loss_weight (`float`, *optional*, defaults to 0.5): Weight of the loss against the teacher's logits.
        hidden_loss_weight (`float`, *optional*, defaults to 0.0): Weight of the loss against the teacher's hidden
            states.
        attention_loss_weight (`float`, *optional*, defaults to 0.0): Weight of the loss against the teacher's
            attention.
        temperature (`float`, *optional*, defaults to 2.0): Softening of the logits in `"kl"` and `"soft_ce"`.
        logit_loss_type (`str`, *optional*): `"kl"`, `"soft_ce"` or `"mse"`; by default `"kl"`, and `"mse"` for
            regression.
        hidden_loss_type (`str`, *optional*, defaults to `"mse"`): `"mse"` or `"cosine"`.
        attention_loss_type (`str`, *optional*, defaults to `"mse"`): `"mse"` (scores) or `"kl"` (distributions).
        layer_mapping (`str`, *optional*, defaults to `"uniform"`): Which student layer learns from which teacher
            layer.
        teacher_dtype (`str`, *optional*): Dtype the teacher runs in; by default the one it is loaded in, under the
            run's autocast.

    Raises:
        ValueError: If a value is out of its range.
    """

    # Weights of the terms
    task_loss_weight: float = field(
        default=0.5, metadata={"help": "Weight of the loss against the labels, >= 0. 0 switches the term off."}
    )
    logit_loss_weight: float = field(
        default=0.5,
        metadata={"help": "Weight of the loss against the teacher's logits, >= 0. 0 switches the term off."},
    )
    hidden_loss_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the loss against the teacher's hidden states, >= 0. 0 switches the term off."},
    )
    attention_loss_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the loss against the teacher's attention, >= 0. 0 switches the term off."},
    )

    # Forms of the terms
    temperature: float = field(
        default=2.0, metadata={"help": "Softening of both distributions in the logit loss 'kl' and 'soft_ce', > 0."}
    )
    logit_loss_type: LogitLossType | None = field(
        default=None,
        metadata={"help": "Logit loss: 'kl', 'soft_ce' or 'mse'. Default: 'kl' for classes, 'mse' for regression."},
    )
    hidden_loss_type: HiddenLossType = field(default="mse", metadata={"help": "Hidden state loss: 'mse' or 'cosine'."})
    attention_loss_type: AttentionLossType = field(
        default="mse",
        metadata={"help": "Attention loss: 'mse' between scores before the softmax, or 'kl' between distributions."},
    )
    layer_mapping: str = field(
        default="uniform",
        metadata={
            "help": "Which student layer learns from which teacher layer, for hidden states and attention: 'uniform', "
            "'last', 'first', or pairs such as '1:4,2:8'. 0 is the embeddings (hidden states only)."
        },
    )

    # The teacher
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={"help": "Dtype the teacher runs in. Default: the one it is loaded in, under the run's autocast."},
    )

    def __post_init__(self) -> None:
        # The default on transformers 4.57 is the reentrant kind, on 5.x this one.
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs: Any = {"use_reentrant": False}
        super().__post_init__()
        for name in ("task_loss_weight", "logit_loss_weight", "hidden_loss_weight", "attention_loss_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be a finite number >= 0; 0 switches the term off.")
        if self.teacher_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"teacher_dtype={self.teacher_dtype!r} must be one of 'float32', 'bfloat16', 'float16'.")
        self.objective()  # the terms check the rest

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments | None) -> DistillationTrainingArguments:
        """The same arguments with the defaults of the distillation, so that a `Trainer` script keeps its own."""
        if isinstance(args, cls):
            return args
        if args is None:
            return cls(output_dir="trainer_output")
        known = {f.name for f in fields(cls) if f.init}
        ours = cls(**{f.name: getattr(args, f.name) for f in fields(args) if f.name in known})
        # A script's own fields stay readable as trainer.args.name.
        for f in fields(args):
            if f.name not in known:
                setattr(ours, f.name, getattr(args, f.name))
        return ours

    def check_objective_alone_describes_the_terms(self) -> None:
        """Raise a `ValueError` if fields that an objective replaces are set: nothing would read them."""
        own = (
            *("task_loss_weight", "logit_loss_weight", "hidden_loss_weight", "attention_loss_weight"),
            *("temperature", "logit_loss_type", "hidden_loss_type", "attention_loss_type", "layer_mapping"),
        )
        is_set = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name in own and getattr(self, f.name) != f.default
        ]
        if is_set:
            raise ValueError(
                f"the arguments set {', '.join(is_set)}, but the terms are those of objective=...; set them there, or "
                "drop objective."
            )

    def objective(self) -> DistillationObjective:
        """The objective that these arguments describe, not bound to models yet."""
        return DistillationObjective(
            [
                TaskTerm(self.task_loss_weight, label_smoothing=self.label_smoothing_factor),
                LogitTerm(self.logit_loss_weight, type=self.logit_loss_type, temperature=self.temperature),
                HiddenTerm(self.hidden_loss_weight, type=self.hidden_loss_type, layers=self.layer_mapping),
                AttentionTerm(self.attention_loss_weight, type=self.attention_loss_type, layers=self.layer_mapping),
            ]
        )
