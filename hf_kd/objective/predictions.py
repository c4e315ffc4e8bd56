"""Brings the logits of every problem type into rows of classes, which the logit losses compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..signals import Signals
from ..signals.batch import predicted_tokens
from ..signals.problem import SEQUENCE_PROBLEMS, ProblemType
from .losses._common import LOWEST
from .terms import LogitLossType, TeacherReduction


_BINARY: tuple[LogitLossType, ...] = ("kl", "soft_ce", "reverse_kl", "js", "mse")
_OVER_CLASSES: tuple[LogitLossType, ...] = (*_BINARY, "dist", "standardized_kl", "decoupled_kl")
# Standardised logits of two classes are their sign alone; over the positions of a text, neither "the same class in
# another row", which dist compares, has a meaning.
LOGIT_LOSSES: dict[ProblemType, tuple[LogitLossType, ...]] = {
    "single_label_classification": _OVER_CLASSES,
    "multi_label_classification": _BINARY,
    "regression": ("mse",),
    "token_classification": _OVER_CLASSES,
    "question_answering": (*_BINARY, "standardized_kl", "decoupled_kl"),
    "masked_lm": _OVER_CLASSES,
}
# These compare logits; all others compare probabilities, whose mean over several teachers is well defined.
_COMPARE_LOGITS = ("mse", "standardized_kl")


@dataclass
class PredictionRows:
    """What student and teachers say about the same items.

    Attributes:
        student (`torch.Tensor` of shape `(items, classes)`): The student's logits.
        teachers (`list[torch.Tensor]`): Those of each teacher, of the same shape.
        labels (`torch.Tensor` of shape `(items,)`, *optional*): The class of each item, or -100.
        class_mask (`torch.Tensor` of shape `(items, classes)`, *optional*): Which classes exist in a row.
    """

    student: Tensor
    teachers: list[Tensor]
    labels: Tensor | None = None
    class_mask: Tensor | None = None


def check_logits_shape(problem: ProblemType, logits: Tensor) -> None:
    """Raise a `ValueError` if logits of this shape are no answer to the problem."""
    expected = 2 if problem in SEQUENCE_PROBLEMS else 3
    if logits.dim() != expected:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not fit {problem}, which needs {expected} dimensions; let the "
            "name of a model class of your own end in ForSequenceClassification, ForTokenClassification, "
            "ForQuestionAnswering or ForMaskedLM, and bind the objective with problem=problem_of(student) (from "
            "hf_kd.signals)."
        )


def prediction_rows(
    problem: ProblemType,
    student: Signals,
    teachers: Sequence[Signals],
    labels: Tensor | None,
    loss_type: LogitLossType | None = None,
) -> PredictionRows:
    """The logits as rows of classes between which a softmax chooses.

    | problem | rows | classes |
    |---|---|---|
    | single label, regression | examples | labels; the value |
    | multi-label | examples and labels | no, yes: the sigmoid of z is the softmax of (0, z) |
    | token classification, masked language modelling | valid tokens | labels; vocabulary |
    | question answering | start and end of each example | positions that are not padding |

    Args:
        problem (`str`): What the models solve.
        student ([`Signals`]): Read from the student.
        teachers (sequence of [`Signals`]): Read from the teachers.
        labels (`torch.Tensor`, *optional*): See [`~hf_kd.signals.batch.labels_of`].
        loss_type (`str`, *optional*): `"mse"` compares the logits of multi-label models as they are.
    """
    all_logits = [student.logits, *(teacher.logits for teacher in teachers)]
    class_mask = None
    if problem == "multi_label_classification":
        labels = None  # not one class for each row
        if loss_type != "mse":
            all_logits = [torch.stack([torch.zeros_like(z), z], dim=-1).flatten(0, 1) for z in all_logits]
    elif problem in ("token_classification", "masked_lm"):
        is_valid = predicted_tokens(problem, student.attention_mask, labels)
        all_logits = [logits[is_valid] for logits in all_logits]
        labels = None if labels is None else labels[is_valid]
    elif problem == "question_answering":
        class_mask = student.attention_mask.bool().repeat_interleave(2, dim=0)  # (2 * batch, seq)
        all_logits = [logits.flatten(0, 1) for logits in all_logits]
        labels = None if labels is None else labels.flatten()
    return PredictionRows(all_logits[0], all_logits[1:], labels, class_mask)


def combine_teachers(
    logits: Sequence[Tensor],
    weights: Sequence[float] | None,
    *,
    temperature: float,
    reduction: TeacherReduction,
    loss_type: LogitLossType,
    class_mask: Tensor | None = None,
) -> Tensor:
    r"""The logits of one teacher that answers as several do on average.

    The mean is that of the softened probabilities (Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2):
    the result $z$ has $\mathrm{softmax}(z / \tau) = \sum_k w_k\, \mathrm{softmax}(z_k / \tau)$. With
    `reduction="logits"`, and for losses that compare logits, it is the mean of the logits.

    Args:
        logits (sequence of `torch.Tensor` of shape `(items, classes)`): Those of each teacher.
        weights (sequence of `float`, *optional*): One per teacher, divided by their sum; by default all alike.
        temperature (`float`): Softening in the loss that follows.
        reduction (`str`): `"probabilities"` or `"logits"`.
        loss_type (`str`): The loss that follows.
        class_mask (`torch.Tensor` of shape `(items, classes)`, *optional*): Which classes exist in a row.

    Returns:
        `torch.Tensor` of shape `(items, classes)`, in float32; the lowest number for classes that do not exist.
    """
    stacked = torch.stack([z.float() for z in logits])  # (teachers, items, classes)
    if class_mask is not None:
        stacked = stacked.masked_fill(~class_mask, LOWEST)
    if len(logits) == 1:
        return stacked[0]
    share = torch.tensor(weights or [1.0] * len(logits), device=stacked.device)
    share = (share / share.sum())[:, None, None]
    if reduction == "logits" or loss_type in _COMPARE_LOGITS:
        combined = (share * stacked).sum(dim=0)
    else:
        combined = temperature * ((stacked / temperature).log_softmax(dim=-1) + share.log()).logsumexp(dim=0)
    return combined.clamp(min=LOWEST)  # a score that does not exist stays a number
