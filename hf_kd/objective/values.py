"""Computes the value of a term from the signals of student and teachers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..signals import ItemCounts, Signals
from ..signals.problem import SEQUENCE_PROBLEMS, ProblemType
from . import losses
from .binding import Binding
from .predictions import combine_teachers, prediction_rows
from .schedules import read_temperature_schedule
from .terms import AttentionTerm, HiddenTerm, LogitTerm, RelationTerm, TaskTerm, Term


# What each form is averaged over, as a field of `ItemCounts`.
_HIDDEN_ITEMS = {"mse": "tokens", "cosine": "tokens", "pkd": "examples", "gram": "examples", "nst": "token_pairs"}
_ATTENTION_ITEMS = {"mse": "token_pairs", "kl": "tokens", "cosine": "tokens"}


def compute_term(
    term: Term,
    binding: Binding,
    projections: nn.ModuleDict,
    student: Signals,
    teachers: list[Signals],
    labels: Tensor | None,
    num_items: ItemCounts | None,
    progress: float,
) -> Tensor:
    """The unweighted value of one term; arguments and errors are those of [`DistillationObjective.forward`].

    Args:
        term ([`TaskTerm`] or another): The term.
        binding ([`Binding`]): What it compares.
        projections (`torch.nn.ModuleDict`): Term to the [`Projection`] of the student's hidden states.

    Returns:
        `torch.Tensor`: Scalar.
    """
    if isinstance(term, TaskTerm):
        return _task_loss(term, binding.problem, student, labels, num_items)
    if len(teachers) != binding.num_teachers:
        raise ValueError(
            f"{term.name} has weight {term.weight}, but there are no teacher signals to compare with."
            if not teachers
            else f"{term.name}: there are signals of {len(teachers)} teachers, but the objective is bound to "
            f"{binding.num_teachers}."
        )
    if isinstance(term, LogitTerm):
        return _logit_loss(term, binding.problem, student, teachers, labels, num_items, progress)
    teacher = teachers[binding.teacher_of[term.name] or 0]
    if isinstance(term, HiddenTerm):
        return _hidden_loss(term, binding, projections, student, teacher, num_items)
    if isinstance(term, AttentionTerm):
        return _attention_loss(term, binding, student, teacher, num_items)
    if isinstance(term, RelationTerm):
        return _relation_loss(term, binding, projections, student, teacher, num_items)
    value = term.function(student, teacher, labels)
    return value if num_items is None else value * len(student.attention_mask) / num_items.examples


def _task_loss(
    term: TaskTerm, problem: ProblemType, student: Signals, labels: Tensor | None, num_items: ItemCounts | None
) -> Tensor:
    if labels is None:
        names = "`start_positions` and `end_positions`" if problem == "question_answering" else "`labels`"
        raise ValueError(
            f"{term.name} has weight {term.weight}, but the batch has no labels; add {names} (-100 marks what has "
            "no label), or set task_loss_weight=0."
        )
    if labels.is_floating_point() and problem not in ("regression", "multi_label_classification"):
        raise ValueError(
            f"the labels are {labels.dtype} for {problem} with {student.logits.shape[-1]} classes; give class "
            "indices as integers, or load both models with problem_type='multi_label_classification' (one 0 or 1 "
            "for each class), or with num_labels=1 for regression."
        )
    logits = student.logits
    if problem not in SEQUENCE_PROBLEMS:
        rows = prediction_rows(problem, student, [], labels)
        logits, labels = rows.student, rows.labels
    return losses.task_loss(
        logits,
        labels,  # type: ignore[arg-type]
        is_regression=problem == "regression",
        is_multi_label=problem == "multi_label_classification",
        label_smoothing=term.label_smoothing,
        num_items=num_items and num_items.labels,
    )


def _logit_loss(
    term: LogitTerm,
    problem: ProblemType,
    student: Signals,
    teachers: list[Signals],
    labels: Tensor | None,
    num_items: ItemCounts | None,
    progress: float,
) -> Tensor:
    loss_type = term.type or ("mse" if problem == "regression" else "kl")
    chosen = teachers if term.teacher is None else [teachers[term.teacher]]
    rows = prediction_rows(problem, student, chosen, labels, loss_type)
    temperature = term.temperature * read_temperature_schedule(term.temperature_schedule)(progress)
    teacher = combine_teachers(
        rows.teachers,
        term.teacher_weights,
        temperature=temperature,
        reduction=term.teacher_reduction,
        loss_type=loss_type,
        class_mask=rows.class_mask,
    )
    arguments: dict[str, Any] = {**term.options, "num_items": num_items and num_items.predictions}
    if problem == "multi_label_classification" and loss_type != "mse" and num_items is not None:
        arguments["num_items"] = num_items.predictions * student.logits.shape[-1]
    if loss_type != "mse":
        arguments["temperature"] = temperature
    if rows.class_mask is not None:
        arguments["class_mask"] = rows.class_mask
    if loss_type == "decoupled_kl":
        likeliest = teacher.argmax(dim=-1)
        known = likeliest if rows.labels is None else rows.labels
        arguments["target"] = torch.where(known == -100, likeliest, known)
    return getattr(losses, f"logit_{loss_type}")(rows.student, teacher, **arguments)


def _hidden_loss(
    term: HiddenTerm,
    binding: Binding,
    projections: nn.ModuleDict,
    student: Signals,
    teacher: Signals,
    num_items: ItemCounts | None,
) -> Tensor:
    pairs, mask = binding.hidden_pairs[term.name], student.attention_mask
    loss = getattr(losses, f"hidden_{term.type}")
    items = num_items and getattr(num_items, _HIDDEN_ITEMS[term.type])
    if term.type == "pkd":
        # The first tokens alone: the rows may have different lengths for student and teacher.
        is_there = mask.any(dim=1, keepdim=True)
        values = [
            loss(
                _first(projections, term, student, s)[:, None],
                _first_token(teacher, t)[:, None],
                is_there,
                num_items=items,
            )
            for s, t in pairs
        ]
    elif term.type in ("gram", "nst"):
        neighbours = list(zip(pairs, pairs[1:], strict=False)) or [(pairs[0], pairs[0])]
        values = [
            loss(
                tuple(_projected(projections, term, student.hidden[pair.student], pair.student) for pair in both),
                tuple(teacher.hidden[pair.teacher] for pair in both),
                mask,
                num_items=items,
            )
            for both in neighbours
        ]
    else:
        values = [
            loss(_projected(projections, term, student.hidden[s], s), teacher.hidden[t], mask, num_items=items)
            for s, t in pairs
        ]
    return torch.stack(values).mean()


def _attention_loss(
    term: AttentionTerm, binding: Binding, student: Signals, teacher: Signals, num_items: ItemCounts | None
) -> Tensor:
    loss = getattr(losses, f"attention_{term.type}")
    values = []
    for s, t in binding.attention_pairs[term.name]:
        reach = _reach(student, s, teacher, t)
        if term.type == "mse" and term.head_reduction is None and reach is None:
            vectors = (student.queries[s], student.keys[s]), (teacher.queries[t], teacher.keys[t])
            num_pairs = num_items and num_items.token_pairs
            values.append(losses.attention_vectors_mse(*vectors, student.attention_mask, num_items=num_pairs))
            continue
        name = "tokens" if reach is not None else _ATTENTION_ITEMS[term.type]
        value = loss(
            losses.attention_scores(student.queries[s], student.keys[s]),
            losses.attention_scores(teacher.queries[t], teacher.keys[t]),
            student.attention_mask,
            head_reduction=term.head_reduction,
            reach=reach,
            num_items=num_items and getattr(num_items, name),
        )
        values.append(value)
    return torch.stack(values).mean()


def _relation_loss(
    term: RelationTerm,
    binding: Binding,
    projections: nn.ModuleDict,
    student: Signals,
    teacher: Signals,
    num_items: ItemCounts | None,
) -> Tensor:
    options = dict(term.options)
    loss = getattr(losses, f"relation_{term.type}")
    if not term.compares_tokens:
        options["num_items"] = num_items and num_items.examples
        values = [
            loss(_first(projections, term, student, s), _first_token(teacher, t), **options)
            for s, t in binding.hidden_pairs[term.name]
        ]
        return torch.stack(values).mean()
    options["num_items"] = num_items and num_items.tokens
    if term.type == "minilm_v2":
        options["relation_heads"] = binding.relation_heads[term.name]
    values = [
        loss(
            _vectors(student, s),
            _vectors(teacher, t),
            student.attention_mask,
            reach=_reach(student, s, teacher, t),
            **options,
        )
        for s, t in binding.attention_pairs[term.name]
    ]
    return torch.stack(values).mean()


def _projected(projections: nn.ModuleDict, term: HiddenTerm | RelationTerm, hidden: Tensor, layer: int) -> Tensor:
    return projections[term.name](hidden, layer) if term.name in projections else hidden


def _first(projections: nn.ModuleDict, term: HiddenTerm | RelationTerm, student: Signals, layer: int) -> Tensor:
    return _projected(projections, term, _first_token(student, layer), layer)


def _first_token(signals: Signals, layer: int) -> Tensor:
    return losses.first_token(signals.hidden[layer], signals.attention_mask)


def _reach(student: Signals, student_layer: int, teacher: Signals, teacher_layer: int) -> int | None:
    """Where one of two layers looks at its neighbours alone, only these can be compared."""
    reaches = student.attention_reach.get(student_layer), teacher.attention_reach.get(teacher_layer)
    return min((reach for reach in reaches if reach is not None), default=None)


def _vectors(signals: Signals, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    return signals.queries[layer], signals.keys[layer], signals.values[layer]
