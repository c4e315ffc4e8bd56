"""The terms that are on, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..signals import ItemCounts, LayerPair, Signals, Wanted, layer_pairs
from ..signals.capture import family_of
from ..signals.layers import LayerMapping
from . import losses
from .projection import Projection


LogitLossType = Literal["kl", "soft_ce", "mse"]
HiddenLossType = Literal["mse", "cosine"]
AttentionLossType = Literal["mse", "kl"]


def _check_term(term: Any, loss_types: Any = None) -> None:
    if not (math.isfinite(term.weight) and term.weight >= 0):
        raise ValueError(f"{term.name}_weight={term.weight} must be a finite number >= 0; 0 switches the term off.")
    if loss_types is not None and term.type is not None and term.type not in get_args(loss_types):
        raise ValueError(
            f"{term.name}_type={term.type!r} must be one of {', '.join(map(repr, get_args(loss_types)))}."
        )


@dataclass(frozen=True)
class TaskTerm:
    """The loss against the labels; rows without a label (-100) are left out.

    Args:
        weight (`float`, *optional*, defaults to 0.5): Factor of the term in the sum.
        label_smoothing (`float`, *optional*, defaults to 0.0): Share of probability spread over all classes.
        name (`str`, *optional*, defaults to `"task_loss"`): Key of the term in the result and the logs.
    """

    weight: float = 0.5
    label_smoothing: float = 0.0
    name: str = "task_loss"

    def __post_init__(self) -> None:
        _check_term(self)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"{self.name}: label_smoothing={self.label_smoothing} must be between 0 and 1.")


@dataclass(frozen=True)
class LogitTerm:
    """The loss against the teacher's logits.

    Args:
        weight (`float`, *optional*, defaults to 0.5): Factor of the term in the sum.
        type (`str`, *optional*):
            `"kl"`, `"soft_ce"` or `"mse"`, see `losses.py`. By default `"kl"` for classes and `"mse"` for regression.
        temperature (`float`, *optional*, defaults to 2.0): Softening of `"kl"` and `"soft_ce"`, > 0.
        name (`str`, *optional*, defaults to `"logit_loss"`): Key of the term in the result and the logs.
    """

    weight: float = 0.5
    type: LogitLossType | None = None
    temperature: float = 2.0
    name: str = "logit_loss"

    def __post_init__(self) -> None:
        _check_term(self, LogitLossType)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"{self.name}: temperature={self.temperature} must be a finite number > 0, usually 1 to 8."
            )


@dataclass(frozen=True)
class HiddenTerm:
    """The loss against the teacher's hidden states, mean over the layer pairs.

    Args:
        weight (`float`, *optional*, defaults to 1.0): Factor of the term in the sum.
        type (`str`, *optional*, defaults to `"mse"`): `"mse"` or `"cosine"`, see `losses.py`.
        layers (`str` or list of pairs, *optional*, defaults to `"uniform"`): The layer map, see [`layer_pairs`].
        name (`str`, *optional*, defaults to `"hidden_loss"`): Key of the term in the result and the logs.
    """

    weight: float = 1.0
    type: HiddenLossType = "mse"
    layers: LayerMapping = "uniform"
    name: str = "hidden_loss"

    def __post_init__(self) -> None:
        _check_term(self, HiddenLossType)


@dataclass(frozen=True)
class AttentionTerm:
    """The loss against the teacher's attention, mean over the layer pairs.

    Args:
        weight (`float`, *optional*, defaults to 1.0): Factor of the term in the sum.
        type (`str`, *optional*, defaults to `"mse"`):
            `"mse"` between the scores before the softmax, or `"kl"` between the distributions after it, see
            `losses.py`.
        layers (`str` or list of pairs, *optional*, defaults to `"uniform"`): The layer map, see [`layer_pairs`].
        name (`str`, *optional*, defaults to `"attention_loss"`): Key of the term in the result and the logs.
    """

    weight: float = 1.0
    type: AttentionLossType = "mse"
    layers: LayerMapping = "uniform"
    name: str = "attention_loss"

    def __post_init__(self) -> None:
        _check_term(self, AttentionLossType)


Term = TaskTerm | LogitTerm | HiddenTerm | AttentionTerm


class DistillationObjective(nn.Module):
    """A weighted sum of loss terms between a student, its teacher and the labels.

    It knows neither trainer nor models, only their configs and the signals read from them. Terms of weight 0 are
    dropped: nothing is captured, projected or computed for them.

    ```python
    terms = [TaskTerm(0.5), LogitTerm(0.5, temperature=4.0), HiddenTerm(1.0, layers="1:4,2:8")]
    objective = DistillationObjective(terms).bind(student.config, teacher.config)
    values = objective(student_signals, teacher_signals, labels)  # {"task_loss": ..., "logit_loss": ..., ...}
    loss = objective.weighted_sum(values)
    ```

    Its parameters are the projections of hidden states between different widths, made by `bind`. They belong in the
    optimizer.

    Args:
        terms (sequence of [`TaskTerm`], [`LogitTerm`], [`HiddenTerm`], [`AttentionTerm`]):
            The terms; several of a kind need different names.

    Raises:
        ValueError: If no term has a weight above 0, or two have one name.
    """

    def __init__(self, terms: Sequence[Term]):
        super().__init__()
        self.terms: list[Term] = [term for term in terms if term.weight > 0]
        if not self.terms:
            raise ValueError(
                "every loss weight is 0, so there is nothing to train on; set for example logit_loss_weight=0.5."
            )
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(
                f"loss terms share a name: {names}; give each a name of its own, e.g. "
                "HiddenTerm(name='hidden_loss_top')."
            )
        self.pairs: dict[str, list[LayerPair]] = {}
        self.projections = nn.ModuleDict()
        self._is_bound = False

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with the teacher."""
        return any(not isinstance(term, TaskTerm) for term in self.terms)

    @property
    def uses_logits(self) -> bool:
        """Whether any term depends on the student's logits, and so on all of its layers."""
        return any(isinstance(term, TaskTerm | LogitTerm) for term in self.terms)

    @property
    def has_projections(self) -> bool:
        """Whether there are parameters to train: hidden states are compared between different widths."""
        return any(True for _ in self.parameters())

    @property
    def student_wanted(self) -> Wanted:
        """The intermediate signals to read from the student."""
        return self._wanted("student")

    @property
    def teacher_wanted(self) -> Wanted:
        """The intermediate signals to read from the teacher."""
        return self._wanted("teacher")

    def bind(self, student_config: Any, teacher_config: Any = None) -> DistillationObjective:
        """Settle what depends on the two models: layer pairs, projections, the form of the logit loss.

        Args:
            student_config ([`~transformers.PretrainedConfig`]): The student's config.
            teacher_config ([`~transformers.PretrainedConfig`], *optional*): The teacher's; none is needed for the task
                term alone.

        Returns:
            [`DistillationObjective`]: Itself.

        Raises:
            ValueError: If the models cannot be compared by a term that is on.
        """
        if self.needs_teacher and teacher_config is None:
            on = ", ".join(term.name for term in self.terms if not isinstance(term, TaskTerm))
            raise ValueError(
                f"the terms {on} compare with a teacher, but there is none; pass teacher_model=..., a model or a path."
            )
        self._is_regression = is_regression(student_config)
        for term in self.terms:
            if isinstance(term, LogitTerm):
                self._check_logits(term, student_config, teacher_config)
            elif isinstance(term, HiddenTerm | AttentionTerm):
                depths = student_config.num_hidden_layers, teacher_config.num_hidden_layers
                first_layer = 1 if isinstance(term, AttentionTerm) else 0
                self.pairs[term.name] = layer_pairs(term.layers, *depths, first_layer=first_layer)
                if isinstance(term, AttentionTerm):
                    self._check_attention(term, student_config, teacher_config)
                else:
                    self._project(term, student_config.hidden_size, teacher_config.hidden_size)
        self._is_bound = True
        return self

    def forward(
        self,
        student: Signals,
        teacher: Signals | None = None,
        labels: Tensor | None = None,
        num_items: ItemCounts | None = None,
        task_loss: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the terms that are on.

        Args:
            student ([`Signals`]): Read from the student.
            teacher ([`Signals`], *optional*): Read from the teacher, logits in the student's label order.
            labels (`torch.Tensor` of shape `(batch,)`, *optional*): -100 marks a row without a label.
            num_items ([`ItemCounts`], *optional*): What to divide by, when the batch is a part of the optimisation
                step.
            task_loss (`torch.Tensor`, *optional*): The task term, where the caller has its own.

        Returns:
            `dict[str, torch.Tensor]`: Name to unweighted scalar, in the order of the terms.

        Raises:
            ValueError: If a term lacks its signal.
        """
        if not self._is_bound:
            raise ValueError(
                "the objective does not know its models yet; call objective.bind(student.config, teacher.config) "
                "first."
            )
        if student.logits.dim() != 2:
            raise ValueError(
                f"the student's logits have shape {tuple(student.logits.shape)}, but (batch, num_labels) is needed: "
                "sequence classification and one-value regression can be distilled."
            )
        self._require_signals("student", student, self.student_wanted)
        if teacher is not None:
            self._require_signals("teacher", teacher, self.teacher_wanted)
        # Scores from q and k, and projections, would otherwise be rounded to bfloat16 by the training step's autocast.
        with torch.autocast(student.logits.device.type, enabled=False):
            return {
                term.name: task_loss
                if isinstance(term, TaskTerm) and task_loss is not None
                else self._compute(term, student, teacher, labels, num_items)
                for term in self.terms
            }

    def weighted_sum(self, terms: dict[str, Tensor]) -> Tensor:
        """The loss to train on: each term times its weight, as given."""
        return torch.stack([term.weight * terms[term.name] for term in self.terms]).sum()

    def _compute(
        self,
        term: Term,
        student: Signals,
        teacher: Signals | None,
        labels: Tensor | None,
        num_items: ItemCounts | None,
    ) -> Tensor:
        if isinstance(term, TaskTerm):
            return self._task_loss(term, student, labels, num_items)
        if teacher is None:
            raise ValueError(
                f"{term.name} has weight {term.weight}, but there are no teacher signals to compare with."
            )
        if isinstance(term, LogitTerm):
            items = num_items and num_items.examples
            loss_type = term.type or ("mse" if self._is_regression else "kl")
            if loss_type == "mse":
                return losses.logit_mse(student.logits, teacher.logits, num_items=items)
            logit_loss = losses.logit_kl if loss_type == "kl" else losses.logit_soft_ce
            return logit_loss(student.logits, teacher.logits, temperature=term.temperature, num_items=items)

        pairs, mask = self.pairs[term.name], student.attention_mask
        if isinstance(term, HiddenTerm):
            hidden_loss = losses.hidden_mse if term.type == "mse" else losses.hidden_cosine
            items, projection = num_items and num_items.tokens, self.projections[term.name]
            values = [
                hidden_loss(projection(student.hidden[s], s), teacher.hidden[t], mask, num_items=items)
                for s, t in pairs
            ]
        else:
            is_mse = term.type == "mse"
            attention_loss = losses.attention_mse if is_mse else losses.attention_kl
            items = num_items and (num_items.token_pairs if is_mse else num_items.tokens)
            values = [
                attention_loss(_scores(student, s), _scores(teacher, t), mask, num_items=items) for s, t in pairs
            ]
        return torch.stack(values).mean()

    def _task_loss(
        self, term: TaskTerm, student: Signals, labels: Tensor | None, num_items: ItemCounts | None
    ) -> Tensor:
        if labels is None:
            raise ValueError(
                f"{term.name} has weight {term.weight}, but the batch has no labels; add a `labels` column (-100 "
                "marks a row without a label), or set task_loss_weight=0."
            )
        if labels.is_floating_point() and not self._is_regression:
            raise ValueError(
                f"the labels are {labels.dtype} for {student.logits.shape[-1]} classes; give class indices as "
                "integers, or set num_labels=1 for regression."
            )
        return losses.task_loss(
            student.logits,
            labels,
            is_regression=self._is_regression,
            label_smoothing=term.label_smoothing,
            num_items=num_items and num_items.labeled_examples,
        )

    def _project(self, term: HiddenTerm, student_width: int, teacher_width: int) -> None:
        """Make the term's projection, unless it is there already: an optimizer may hold it."""
        projection = Projection(student_width, teacher_width, [pair.student for pair in self.pairs[term.name]])
        there = self.projections[term.name] if term.name in self.projections else None
        if there is None or [p.shape for p in there.parameters()] != [p.shape for p in projection.parameters()]:
            self.projections[term.name] = projection

    @staticmethod
    def _require_signals(side: str, signals: Signals, wanted: Wanted) -> None:
        hidden, attention = wanted.hidden - signals.hidden.keys(), wanted.attention - signals.queries.keys()
        if hidden or attention:
            how = (
                "teacher.watch(objective.teacher_wanted)"
                if side == "teacher"
                else "Capture(student, objective.student_wanted)"
            )
            raise ValueError(
                f"the {side} signals lack hidden states of layers {sorted(hidden)} and attention of layers "
                f"{sorted(attention)}, which the terms compare; read them with {how}."
            )

    def _wanted(self, side: Literal["student", "teacher"]) -> Wanted:
        def layers(kind: type) -> frozenset[int]:
            on = [term for term in self.terms if isinstance(term, kind)]
            return frozenset(getattr(pair, side) for term in on for pair in self.pairs[term.name])

        return Wanted(hidden=layers(HiddenTerm), attention=layers(AttentionTerm))

    def _check_logits(self, term: LogitTerm, student_config: Any, teacher_config: Any) -> None:
        if student_config.num_labels != teacher_config.num_labels:
            raise ValueError(
                f"{term.name}: the student has {student_config.num_labels} labels and the teacher "
                f"{teacher_config.num_labels}; load the student with num_labels={teacher_config.num_labels}."
            )
        is_regression(teacher_config)  # raises if the teacher solves another problem, such as multi-label
        if self._is_regression and term.type not in (None, "mse"):
            raise ValueError(
                f"{term.name}_type={term.type!r} compares softmaxes, but the models have one logit, whose softmax is "
                "always 1: the loss would be 0 and teach nothing. Set logit_loss_type='mse'."
            )

    def _check_attention(self, term: AttentionTerm, student_config: Any, teacher_config: Any) -> None:
        family_of(student_config), family_of(teacher_config)
        heads = student_config.num_attention_heads, teacher_config.num_attention_heads
        if heads[0] != heads[1]:
            raise ValueError(
                f"{term.name}: the student has {heads[0]} attention heads and the teacher {heads[1]}, which cannot be "
                f"compared head by head; make a student with num_attention_heads={heads[1]}, or set "
                "attention_loss_weight=0."
            )


def is_regression(config: Any) -> bool:
    """Whether a sequence classification model predicts one value.

    Raises:
        ValueError: If it solves a problem that hf_kd does not distil.
    """
    expected = "regression" if config.num_labels == 1 else "single_label_classification"
    if config.problem_type not in (None, expected):
        raise ValueError(
            f"problem_type={config.problem_type!r} with num_labels={config.num_labels} cannot be distilled; one label "
            "per row (num_labels >= 2) and one-value regression (num_labels=1) can."
        )
    return config.num_labels == 1


def _scores(signals: Signals, layer: int) -> Tensor:
    return losses.attention_scores(signals.queries[layer], signals.keys[layer])
