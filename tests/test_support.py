"""The README's tables of what works with what, made by trying every form of each term, problem and family."""

import os
import re
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
import transformers
from conftest import VOCAB, make_model
from packaging.version import Version

from hf_kd.objective import AttentionTerm, DistillationObjective, HiddenTerm, LogitTerm, RelationTerm, TaskTerm
from hf_kd.objective.terms import AttentionLossType, HiddenLossType, LogitLossType, RelationLossType
from hf_kd.signals import Capture, Teacher, labels_of
from hf_kd.signals.capture import columns_for, forward_columns
from hf_kd.signals.problem import PROBLEM_TYPES


README = Path(__file__).parents[1] / "README.md"
FORMS = {
    "`task_loss`": TaskTerm(1.0),
    **{f"`logit_loss` {kind}": LogitTerm(1.0, type=kind) for kind in get_args(LogitLossType)},
    **{f"`hidden_loss` {kind}": HiddenTerm(1.0, type=kind) for kind in get_args(HiddenLossType)},
    **{f"`attention_loss` {kind}": AttentionTerm(1.0, type=kind) for kind in get_args(AttentionLossType)},
    **{f"`relation_loss` {kind}": RelationTerm(1.0, type=kind) for kind in get_args(RelationLossType)},
}
FAMILIES = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert", "mpnet", "modernbert"]
FAMILIES += ["deberta-v2"]
IS_TRANSFORMERS_5 = Version(transformers.__version__) >= Version("5")
# Cells of the second table that the version decides.
NEEDS_TRANSFORMERS_5 = {("modernbert", form) for form in FORMS if "attention" in form or "minilm" in form}


def make_batch(problem):
    """Four rows of ragged length with the labels of a problem."""
    lengths, seq = (9, 4, 12, 7), 12
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(seq) < torch.tensor(lengths)[:, None]).long()
    batch = {
        "input_ids": torch.randint(5, len(VOCAB), (4, seq), generator=generator) * mask,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(mask),
    }
    if problem == "question_answering":
        return {**batch, "start_positions": torch.tensor([1, 0, 5, 2]), "end_positions": torch.tensor([3, 1, 8, 6])}
    labels = {
        "single_label_classification": torch.tensor([0, 1, 1, 0]),
        "multi_label_classification": torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]),
        "regression": torch.tensor([0.5, 2.0, 1.0, 4.0]),
        "token_classification": (batch["input_ids"] % 2).masked_fill(mask == 0, -100),
        "masked_lm": batch["input_ids"].masked_fill((batch["input_ids"] % 3 != 0) | (mask == 0), -100),
    }
    return {**batch, "labels": labels[problem]}


@cache
def models(problem, family):
    # Two classes are too few for standardised logits.
    labels = {"num_labels": 3} if problem == "single_label_classification" else {}
    student = make_model(family, seed=2, problem=problem, num_hidden_layers=2, **labels)
    return student, make_model(family, seed=1, problem=problem, **labels)


def try_cell(form, problem, family):
    """Whether a student learns from this cell: a finite loss above 0, and a gradient; or else a ValueError."""
    student, teacher_model = models(problem, family)
    batch = make_batch(problem)
    objective = DistillationObjective([FORMS[form]])
    try:
        objective.bind(student.config, teacher_model.config, problem=problem)
        capture = Capture(student, objective.student_wanted)
        teacher = Teacher(teacher_model, student.config)
        teacher.watch(objective.teacher_wanted)
    except ValueError as error:
        assert re.search(r"\b(use|set|take|load)\b", str(error), re.IGNORECASE), f"no fix in: {error}"
        return False
    inputs = columns_for(forward_columns(student), batch)
    labels = labels_of(batch, problem)
    for name in ("labels", "start_positions", "end_positions"):
        inputs.pop(name, None)
    student.zero_grad()
    with capture:
        outputs = student(**inputs, **capture.forward_kwargs)
    values = objective(capture.signals(outputs, inputs), teacher(batch), labels)
    loss = objective.weighted_sum(values)
    loss.backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert torch.isfinite(loss) and loss > 0, f"{form}, {problem}, {family}: loss {loss}"
    assert all(torch.isfinite(g).all() for g in gradients) and any(g.any() for g in gradients)
    return True


def by_problem(form, problem):
    return try_cell(form, problem, "bert")


def table(rows):
    """As Markdown; forms of one term whose cells are equal share a line."""
    head = ["", *next(iter(rows.values()))]
    merged = {}
    for form, cells in rows.items():
        term, _, kind = form.partition(" ")
        merged.setdefault((term, *cells.values()), []).append(kind)
    lines = [[f"{term} {', '.join(kinds)}".strip(), *cells] for (term, *cells), kinds in merged.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def make_tables():
    """Both tables as Markdown, with what this version of transformers cannot do taken from what is known of it."""
    problems = {
        form: {problem.replace("_", " "): "yes" if by_problem(form, problem) else "-" for problem in PROBLEM_TYPES}
        for form in FORMS
    }
    families = {}
    for form in FORMS:
        cells = {}
        for family in FAMILIES:
            works = try_cell(form, "single_label_classification", family)
            if (family, form) in NEEDS_TRANSFORMERS_5:
                assert works == IS_TRANSFORMERS_5
                cells[family] = "transformers 5"
            else:
                cells[family] = "yes" if works else "-"
        families[form] = cells
    return f"{table(problems)}\n\n{table(families)}"


def test_readme_has_the_tables():
    """A reader would choose a term by a table that was true once.

    `UPDATE_README=1 pytest tests/test_support.py` writes it anew.
    """
    text = README.read_text(encoding="utf-8")
    start, end = "<!-- support: begin -->\n", "\n<!-- support: end -->"
    before, rest = text.split(start)
    found, after = rest.split(end)
    expected = make_tables()
    if os.environ.get("UPDATE_README"):
        README.write_text(f"{before}{start}{expected}{end}{after}", encoding="utf-8")
    else:
        assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell_works_if_its_problem_and_its_family_do(family):
    """Two tables stand for all combinations: one that works for BERT and for classification might fail for both."""
    in_family = {form: try_cell(form, "single_label_classification", family) for form in FORMS}
    for problem in PROBLEM_TYPES:
        for form in FORMS:
            is_logit = "logit" in form  # whose forms depend on the problem alone
            expected = by_problem(form, problem) and (is_logit or in_family[form])
            assert try_cell(form, problem, family) == expected, (form, problem)
