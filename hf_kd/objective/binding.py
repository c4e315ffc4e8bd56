"""Fits terms to models: which teacher and layers each compares, or why it cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..signals import LayerPair, layer_pairs
from ..signals.capture import attention_family_of, num_layers
from ..signals.layers import LayerMapping
from ..signals.problem import SEQUENCE_PROBLEMS, ProblemType, has_classes, sequence_problem
from .predictions import LOGIT_LOSSES
from .terms import AttentionTerm, CustomTerm, HiddenTerm, LogitTerm, RelationTerm, TaskTerm, Term


@dataclass
class Binding:
    """What a sequence of terms compares, for one student and its teachers.

    Attributes:
        problem (`str`): What the models solve.
        num_teachers (`int`): How many there are.
        teacher_of (`dict[str, int | None]`): Term to the index of its teacher; `None` for all of them, or none.
        hidden_pairs (`dict[str, list[LayerPair]]`): Term to the layers whose hidden states it compares.
        attention_pairs (`dict[str, list[LayerPair]]`): Term to the layers whose queries, keys and values it compares.
        relation_heads (`dict[str, int]`): Term of type `"minilm_v2"` to its number of relation heads.
    """

    problem: ProblemType
    num_teachers: int
    teacher_of: dict[str, int | None] = field(default_factory=dict)
    hidden_pairs: dict[str, list[LayerPair]] = field(default_factory=dict)
    attention_pairs: dict[str, list[LayerPair]] = field(default_factory=dict)
    relation_heads: dict[str, int] = field(default_factory=dict)


def bind_terms(
    terms: Sequence[Term],
    student_config: Any,
    teacher_configs: Sequence[Any],
    problem: ProblemType | None = None,
    shares_tokens: bool = True,
) -> Binding:
    """Arguments and errors are those of [`DistillationObjective.bind`]; `teacher_configs` may be empty."""
    compared = [term.name for term in terms if not isinstance(term, TaskTerm)]
    if compared and not teacher_configs:
        raise ValueError(
            f"the terms {', '.join(compared)} compare with a teacher, but there is none; pass teacher_model=..., a "
            "model or a path."
        )
    binding = Binding(problem or sequence_problem(student_config), len(teacher_configs))
    for term in terms:
        if isinstance(term, TaskTerm):
            _check_task(term, binding.problem)
        elif isinstance(term, LogitTerm):
            index = _teacher_index(term, binding.num_teachers)
            binding.teacher_of[term.name] = index
            read = teacher_configs if index is None else [teacher_configs[index]]
            _check_logits(term, binding.problem, student_config, read, shares_tokens)
        else:
            index = _teacher_index(term, binding.num_teachers)
            binding.teacher_of[term.name] = index
            if not shares_tokens:
                _check_compares_rows(term)
            _bind_layers(binding, term, student_config, teacher_configs[index or 0])
    return binding


def _bind_layers(
    binding: Binding,
    term: HiddenTerm | AttentionTerm | RelationTerm | CustomTerm,
    student_config: Any,
    teacher_config: Any,
) -> None:
    depths = num_layers(student_config), num_layers(teacher_config)
    hidden: LayerMapping | None
    attention: LayerMapping | None
    if isinstance(term, CustomTerm):
        hidden, attention = term.hidden_layers, term.attention_layers
    elif isinstance(term, HiddenTerm) or (isinstance(term, RelationTerm) and not term.compares_tokens):
        hidden, attention = term.layers, None
    else:
        hidden, attention = None, term.layers
    if hidden is not None:
        binding.hidden_pairs[term.name] = layer_pairs(hidden, *depths)
    if attention is not None:
        binding.attention_pairs[term.name] = layer_pairs(attention, *depths, first_layer=1)
        attention_family_of(student_config), attention_family_of(teacher_config)  # raise if it cannot be read
        if isinstance(term, AttentionTerm | RelationTerm):
            _check_heads(term, student_config, teacher_config)
    if isinstance(term, RelationTerm) and term.type == "minilm_v2":
        binding.relation_heads[term.name] = _relation_heads(term, student_config, teacher_config)


def _teacher_index(term: Any, num_teachers: int) -> int | None:
    """Which teacher a term compares with; `None` for all of them."""
    if isinstance(term, LogitTerm) and len(term.teacher_weights or [None] * num_teachers) != num_teachers:
        raise ValueError(
            f"{term.name}: teacher_weights={list(term.teacher_weights or ())}, but the number of teachers is "
            f"{num_teachers}; give one weight for each."
        )
    if term.teacher is None:
        if isinstance(term, LogitTerm):
            return None
        if num_teachers > 1:
            raise ValueError(
                f"{term.name} compares with one teacher, but there are {num_teachers}; say which, e.g. "
                f"{type(term).__name__}(teacher=0) in objective=DistillationObjective([...])."
            )
        return 0
    if not 0 <= term.teacher < num_teachers:
        raise ValueError(
            f"{term.name}: teacher={term.teacher}, but the teachers are counted from 0 to {num_teachers - 1}."
        )
    return term.teacher


def _check_task(term: TaskTerm, problem: ProblemType) -> None:
    # The Trainer leaves question answering unsmoothed, whose classes are positions, padding among them.
    if term.label_smoothing and problem in ("regression", "multi_label_classification", "question_answering"):
        raise ValueError(
            f"{term.name}: label_smoothing={term.label_smoothing} spreads probability over the classes of a label, "
            f"which {problem} does not have; set label_smoothing_factor=0."
        )


def _check_logits(
    term: LogitTerm, problem: ProblemType, student_config: Any, teacher_configs: Sequence[Any], shares_tokens: bool
) -> None:
    for config in teacher_configs:
        if problem in SEQUENCE_PROBLEMS and sequence_problem(config) != problem:
            raise ValueError(
                f"{term.name}: the student solves {problem} with {student_config.num_labels} labels, the teacher "
                f"{sequence_problem(config)} with {config.num_labels}; load the student with "
                f"num_labels={config.num_labels} and problem_type={sequence_problem(config)!r}."
            )
        if has_classes(problem) and student_config.num_labels != config.num_labels:
            raise ValueError(
                f"{term.name}: the student has {student_config.num_labels} labels and the teacher "
                f"{config.num_labels}; load the student with num_labels={config.num_labels}."
            )
    allowed = LOGIT_LOSSES[problem]
    if term.type is not None and term.type not in allowed:
        why = (
            "compares softmaxes, but the models have one logit, whose softmax is always 1: the loss would be 0 and "
            "teach nothing. Set logit_loss_type='mse'."
            if problem == "regression"
            else f"is not defined for {problem}; use one of {', '.join(map(repr, allowed))}."
        )
        raise ValueError(f"{term.name}_type={term.type!r} {why}")
    if term.type == "standardized_kl" and has_classes(problem) and student_config.num_labels == 2:
        raise ValueError(
            f"{term.name}_type='standardized_kl' with 2 labels: two standardised logits are -1 and 1 whatever they "
            "were, so the term would train nothing; use 'kl'."
        )
    if not shares_tokens and problem not in SEQUENCE_PROBLEMS:
        raise ValueError(
            f"{term.name}: student and teacher have tokenizers of their own, but {problem} has logits for each token; "
            "take a student with the teacher's tokenizer."
        )


def _check_compares_rows(term: HiddenTerm | AttentionTerm | RelationTerm | CustomTerm) -> None:
    """Tokens of two tokenizers cannot be paired."""
    compares_tokens = (
        (isinstance(term, HiddenTerm) and term.type != "pkd")
        or isinstance(term, AttentionTerm)
        or (isinstance(term, RelationTerm) and term.compares_tokens)
    )
    if compares_tokens and not isinstance(term, CustomTerm):
        raise ValueError(
            f"{term.name} of type {term.type!r} compares token by token, but student and teacher have tokenizers of "
            "their own; use hidden_loss_type='pkd' or relation_loss_type='similarity', 'rkd', 'pkt', 'correlation' or "
            "'crd', which compare rows."
        )


def _check_heads(term: AttentionTerm | RelationTerm, student_config: Any, teacher_config: Any) -> None:
    heads = student_config.num_attention_heads, teacher_config.num_attention_heads
    goes_by_head = term.head_reduction is None if isinstance(term, AttentionTerm) else term.type == "minilm_v1"
    if goes_by_head and heads[0] != heads[1]:
        mean = "head_reduction='mean', " if isinstance(term, AttentionTerm) else ""
        raise ValueError(
            f"{term.name}: the student has {heads[0]} attention heads and the teacher {heads[1]}, which cannot be "
            "compared head by head; use relation_loss_weight=1 with relation_loss_type='minilm_v2', which needs no "
            f"equal heads, {mean}or a student with num_attention_heads={heads[1]}."
        )


def _relation_heads(term: RelationTerm, student_config: Any, teacher_config: Any) -> int:
    """By default of 16 dimensions of the teacher or a few more: MiniLMv2 takes 48 for BERT-base
    (https://arxiv.org/abs/2012.15828)."""
    widths = student_config.hidden_size, teacher_config.hidden_size
    divisors = [n for n in range(1, widths[1] + 1) if math.gcd(*widths) % n == 0]
    default = max(n for n in divisors if n == 1 or n <= widths[1] // 16)
    relation_heads = term.relation_heads or default
    if relation_heads not in divisors:
        raise ValueError(
            f"{term.name}: relation_heads={relation_heads} does not divide both widths, {widths[0]} of the student "
            f"and {widths[1]} of the teacher; use a common divisor such as {default}."
        )
    return relation_heads
