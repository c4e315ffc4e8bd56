"""The training arguments of a distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from .objective.objective import DistillationObjective
from .objective.terms import (
    AttentionLossType,
    AttentionTerm,
    HeadReduction,
    HiddenLossType,
    HiddenTerm,
    LogitLossType,
    LogitTerm,
    RelationLossType,
    RelationTerm,
    TaskTerm,
    TeacherReduction,
)


# Fields that describe the terms; an objective replaces them all.
_WEIGHTS = tuple(f"{term}_loss_weight" for term in ("task", "logit", "hidden", "attention", "relation"))
_TERM_FIELDS = (
    *_WEIGHTS,
    *("temperature", "logit_loss_type", "hidden_loss_type", "attention_loss_type", "relation_loss_type"),
    *("layer_mapping", "relation_layer_mapping", "relation_heads", "head_reduction"),
    *("task_loss_schedule", "logit_loss_schedule", "hidden_loss_schedule", "attention_loss_schedule"),
    *("relation_loss_schedule", "temperature_schedule", "teacher_weights", "teacher_reduction"),
    "label_smoothing_factor",
)


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with the weights and forms of the distillation terms.

    The loss is `task_loss_weight * task_loss + logit_loss_weight * logit_loss + ...`: weights multiply terms as given
    and are never normalised. For several terms of a kind, give the trainer a [`DistillationObjective`].

    One default differs from `TrainingArguments`: gradient checkpointing, where it is on, runs with
    `use_reentrant=False`, because the reentrant kind drops the gradient of what is captured inside a block.

    `hub_strategy="checkpoint"` and `"all_checkpoints"` are refused: they publish optimizer states.

    Args:
        task_loss_weight (`float`, *optional*, defaults to 0.5): Weight of the loss against the labels.
        logit_loss_weight (`float`, *optional*, defaults to 0.5): Weight of the loss against the teacher's logits.
        hidden_loss_weight (`float`, *optional*, defaults to 0.0): Weight of the loss against the teacher's hidden
            states.
        attention_loss_weight (`float`, *optional*, defaults to 0.0): Weight of the loss against the teacher's
            attention.
        relation_loss_weight (`float`, *optional*, defaults to 0.0): Weight of the loss against relations within the
            teacher.
        temperature (`float`, *optional*, defaults to 2.0): Softening of the logits, in every type but `"mse"`.
        logit_loss_type (`str`, *optional*):
            `"kl"`, `"soft_ce"`, `"reverse_kl"`, `"js"`, `"mse"`, `"dist"`, `"standardized_kl"` or `"decoupled_kl"`; by
            default `"kl"`, and `"mse"` for regression.
        hidden_loss_type (`str`, *optional*, defaults to `"mse"`):
            `"mse"`, `"cosine"`, `"pkd"`, `"gram"` or `"nst"`.
        attention_loss_type (`str`, *optional*, defaults to `"mse"`):
            `"mse"` (scores), `"kl"` or `"cosine"` (distributions).
        head_reduction (`str`, *optional*): `"mean"` compares the attention's mean over heads.
        relation_loss_type (`str`, *optional*, defaults to `"minilm_v2"`):
            `"minilm_v2"`, `"minilm_v1"`, `"similarity"`, `"rkd"`, `"pkt"`, `"correlation"` or `"crd"`.
        relation_heads (`int`, *optional*): Relation heads of `"minilm_v2"`; by default as many as divide both
            widths and have 16 dimensions of the teacher or more.
        layer_mapping (`str`, *optional*, defaults to `"uniform"`): Which student layer learns from which teacher
            layer, for hidden states and attention.
        relation_layer_mapping (`str`, *optional*, defaults to `"last"`): The same for relations.
        task_loss_schedule (`str`, *optional*): Factor of `task_loss_weight` over training: `"constant"`,
            `"linear:1:0"`, `"cosine:1:0"` or `"window:0:0.5"`.
        logit_loss_schedule (`str`, *optional*): The same for `logit_loss_weight`.
        hidden_loss_schedule (`str`, *optional*): The same for `hidden_loss_weight`.
        attention_loss_schedule (`str`, *optional*): The same for `attention_loss_weight`.
        relation_loss_schedule (`str`, *optional*): The same for `relation_loss_weight`.
        temperature_schedule (`str`, *optional*): Factor of the temperature, likewise.
        teacher_weights (`list[float]`, *optional*): Shares of several teachers; all alike by default.
        teacher_reduction (`str`, *optional*, defaults to `"probabilities"`): Mean of several teachers over softened
            `"probabilities"` or over `"logits"`.
        teacher_dtype (`str`, *optional*): Dtype the teacher runs in; by default the one it is loaded in, under the
            run's autocast.
        teacher_labels (`list[str]`, *optional*): Names of the classes of `teacher_logits` and `teacher_probs` in their
            order, where these columns of the dataset are lists that do not come from [`cache_teacher_signals`]. A
            `ClassLabel` column `teacher_labels` in the dataset says it as well.
        freeze_embeddings (`bool`, *optional*, defaults to `False`): Whether the student's embeddings keep the weights
            they start with: a third of a small student's step on a CPU goes into that table.
        on_nonfinite (`str`, *optional*, defaults to `"error"`): What to do with a step whose loss or gradient is NaN
            or infinite: `"error"` stops the training, `"skip"` leaves weights and optimizer as they are and counts
            the step in the log.
        eval_teacher_agreement (`bool`, *optional*, defaults to `False`): Whether evaluation and prediction also run
            the teacher, and report `eval_teacher_agreement` and `eval_teacher_kl`, or for regression
            `eval_teacher_mse`; see [`TeacherAgreement`].

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
    relation_loss_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the loss against relations in the teacher, >= 0. 0 switches the term off."},
    )

    # Forms of the terms
    temperature: float = field(
        default=2.0, metadata={"help": "Softening of both distributions in every logit loss but 'mse', > 0."}
    )
    logit_loss_type: LogitLossType | None = field(
        default=None,
        metadata={
            "help": "Logit loss: 'kl', 'soft_ce', 'reverse_kl', 'js', 'mse', 'dist', 'standardized_kl' or "
            "'decoupled_kl'. Default: 'kl' for classes, 'mse' for regression."
        },
    )
    hidden_loss_type: HiddenLossType = field(
        default="mse", metadata={"help": "Hidden state loss: 'mse', 'cosine', 'pkd', 'gram' or 'nst'."}
    )
    attention_loss_type: AttentionLossType = field(
        default="mse",
        metadata={
            "help": "Attention loss: 'mse' between scores before the softmax, 'kl' or 'cosine' between distributions."
        },
    )
    head_reduction: HeadReduction | None = field(
        default=None,
        metadata={"help": "'mean' compares the attention's mean over heads, whose numbers may differ."},
    )
    relation_loss_type: RelationLossType = field(
        default="minilm_v2",
        metadata={
            "help": "Relation loss: 'minilm_v2' or 'minilm_v1' between the tokens of a row; 'similarity', 'rkd', "
            "'pkt', 'correlation' or 'crd' between the rows of a batch."
        },
    )
    relation_heads: int | None = field(
        default=None,
        metadata={
            "help": "Relation heads of 'minilm_v2', a common divisor of both widths. Default: as many as have 16 "
            "dimensions of the teacher or more."
        },
    )
    layer_mapping: str = field(
        default="uniform",
        metadata={
            "help": "Which student layer learns from which teacher layer, for hidden states and attention: 'uniform', "
            "'last', 'first', or pairs such as '1:4,2:8'. 0 is the embeddings (hidden states only)."
        },
    )
    relation_layer_mapping: str = field(
        default="last",
        metadata={"help": "The same for relations; MiniLM compares one layer, the last of the student."},
    )

    # Schedules
    task_loss_schedule: str | None = field(
        default=None,
        metadata={
            "help": "Factor of task_loss_weight over training: 'constant', 'linear:1:0' and 'cosine:1:0' (from, to), "
            "or 'window:0:0.5' (on between two shares of the steps). Default: constant."
        },
    )
    logit_loss_schedule: str | None = field(
        default=None, metadata={"help": "Factor of logit_loss_weight over training, as task_loss_schedule."}
    )
    hidden_loss_schedule: str | None = field(
        default=None, metadata={"help": "Factor of hidden_loss_weight over training, as task_loss_schedule."}
    )
    attention_loss_schedule: str | None = field(
        default=None, metadata={"help": "Factor of attention_loss_weight over training, as task_loss_schedule."}
    )
    relation_loss_schedule: str | None = field(
        default=None, metadata={"help": "Factor of relation_loss_weight over training, as task_loss_schedule."}
    )
    temperature_schedule: str | None = field(
        default=None, metadata={"help": "Factor of temperature over training, > 0, e.g. 'linear:1:0.5'."}
    )

    # The teachers
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "Shares of several teachers, each > 0. Default: all alike."}
    )
    teacher_reduction: TeacherReduction = field(
        default="probabilities",
        metadata={"help": "Mean of several teachers over their softened 'probabilities' or their 'logits'."},
    )
    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={"help": "Dtype the teacher runs in. Default: the one it is loaded in, under the run's autocast."},
    )

    teacher_labels: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the classes of the columns teacher_logits and teacher_probs, in their order, where "
            "these are lists of numbers from elsewhere."
        },
    )

    # The student
    freeze_embeddings: bool = field(
        default=False,
        metadata={
            "help": "Train the student's blocks and head alone. Steps get faster; for students that start from the "
            "teacher's embeddings, or others that are trained."
        },
    )

    on_nonfinite: Literal["error", "skip"] = field(
        default="error",
        metadata={
            "help": "A step whose loss or gradient is NaN or infinite: 'error' stops the training, 'skip' leaves "
            "weights and optimizer as they are, and counts such steps in the log."
        },
    )

    # Evaluation
    eval_teacher_agreement: bool = field(
        default=False,
        metadata={
            "help": "Also run the teacher in evaluation and prediction, and report the share of predictions in which "
            "the student agrees with it and the mean KL divergence in nats (regression: the mean squared difference)."
        },
    )

    def __post_init__(self) -> None:
        # The default on transformers 4.57 is the reentrant kind, on 5.x this one.
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs: Any = {"use_reentrant": False}
        super().__post_init__()
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy={self.hub_strategy.value!r} would publish optimizer states and projections; use "
                "'every_save' (the student at each save) or 'end', and resume from the checkpoints in output_dir."
            )
        for name in _WEIGHTS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be a finite number >= 0; 0 switches the term off.")
        if self.eval_teacher_agreement and getattr(self, "use_legacy_prediction_loop", False):  # transformers 4.57
            raise ValueError(
                "eval_teacher_agreement=True needs the evaluation loop that use_legacy_prediction_loop=True replaces, "
                "so there would be no agreement; drop one of the two."
            )
        if self.teacher_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"teacher_dtype={self.teacher_dtype!r} must be one of 'float32', 'bfloat16', 'float16'.")
        if self.on_nonfinite not in ("error", "skip"):
            raise ValueError(f"on_nonfinite={self.on_nonfinite!r} must be 'error' or 'skip'.")
        self.objective()  # the terms check the rest
        for term in ("task", "logit", "hidden", "attention", "relation"):
            schedule = getattr(self, f"{term}_loss_schedule")
            if schedule is not None and getattr(self, f"{term}_loss_weight") == 0:
                raise ValueError(
                    f"{term}_loss_schedule={schedule!r} multiplies {term}_loss_weight, which is 0; set "
                    f"{term}_loss_weight=1, or drop the schedule."
                )

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device = super().device
        # Of several processes on a CPU it is cpu:0, where torch.load finds no place for an optimizer's state.
        return torch.device("cpu") if device.type == "cpu" else device

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
        is_set = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name in _TERM_FIELDS and getattr(self, f.name) != f.default
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
                TaskTerm(
                    self.task_loss_weight,
                    label_smoothing=self.label_smoothing_factor,
                    schedule=self.task_loss_schedule,
                ),
                LogitTerm(
                    self.logit_loss_weight,
                    type=self.logit_loss_type,
                    temperature=self.temperature,
                    teacher_weights=self.teacher_weights,
                    teacher_reduction=self.teacher_reduction,
                    schedule=self.logit_loss_schedule,
                    temperature_schedule=self.temperature_schedule,
                ),
                HiddenTerm(
                    self.hidden_loss_weight,
                    type=self.hidden_loss_type,
                    layers=self.layer_mapping,
                    schedule=self.hidden_loss_schedule,
                ),
                AttentionTerm(
                    self.attention_loss_weight,
                    type=self.attention_loss_type,
                    layers=self.layer_mapping,
                    head_reduction=self.head_reduction,
                    schedule=self.attention_loss_schedule,
                ),
                RelationTerm(
                    self.relation_loss_weight,
                    type=self.relation_loss_type,
                    layers=self.relation_layer_mapping,
                    relation_heads=self.relation_heads,
                    schedule=self.relation_loss_schedule,
                ),
            ]
        )
