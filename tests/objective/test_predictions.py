"""What each problem compares, against its definition in plain loops and against the models' own losses."""

import math

import pytest
import torch
from conftest import make_model, make_rows
from objective.loss_terms import Row, divergence, dot, mean, row_decoupled_kl, row_js, row_kl, row_reverse_kl, softmax
from torch import Tensor

from hf_kd.objective import DistillationObjective, LogitTerm, TaskTerm
from hf_kd.objective.predictions import LOGIT_LOSSES, check_logits_shape, combine_teachers
from hf_kd.signals import ItemCounts, Signals, count_items, labels_of
from hf_kd.signals.problem import PROBLEM_TYPES, SEQUENCE_PROBLEMS


LENGTHS = (6, 3, 8, 5)  # unequal, so that a mean over rows and a mean over tokens differ
BATCH, SEQ = len(LENGTHS), max(LENGTHS)
NUM_CLASSES = {"single_label_classification": 3, "multi_label_classification": 3, "regression": 1}
NUM_CLASSES |= {"token_classification": 3, "masked_lm": 11}
TAU = 3.0
# The second row of the tokens has no label, and special tokens have none; one start and end is outside the sequence.
TOKEN_LABELS = [[-100, 0, 2, 1, 1, -100], [-100] * 3, [-100, 1, -100, 1, 0, 0, 2, -100], [-100, 2, 2, 0, -100]]
MASKED_LABELS = [[-100, 7, -100, -100, 9, -100], [-100] * 3, [-100, 5, 8, -100, -100, -100, 6, -100], [-100] * 5]
LABELS = {
    "single_label_classification": torch.tensor([0, 2, -100, 1]),
    "multi_label_classification": torch.tensor([[0.0, 1, 1], [1, 0, -100], [-100, -100, -100], [1, 1, 0]]),
    "regression": torch.tensor([0.5, -100.0, 3.25, 1.0]),
    "question_answering": torch.tensor([[1, 4], [0, 0], [SEQ, SEQ], [2, 3]]),
}


def padded(rows: list[list[int]], value: int, seq: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (seq - len(row))] for row in rows])


def make_batch(problem: str, seq: int = SEQ) -> dict[str, Tensor]:
    """What the model is given, without `input_ids` of any meaning."""
    mask = padded([[1] * length for length in LENGTHS], 0, seq)
    batch = {"input_ids": mask.clone(), "attention_mask": mask}
    if problem == "question_answering":
        starts, ends = LABELS[problem].masked_fill(LABELS[problem] == SEQ, seq).unbind(dim=1)
        return {**batch, "start_positions": starts, "end_positions": ends}
    tokens = {"token_classification": TOKEN_LABELS, "masked_lm": MASKED_LABELS}
    labels = padded(tokens[problem], -100, seq) if problem in tokens else LABELS[problem].clone()
    return {**batch, "labels": labels}


def make_logits(problem: str, seed: int, seq: int = SEQ) -> Tensor:
    """The same for any padding, but for the noise at the padding."""
    if problem in ("token_classification", "masked_lm"):
        shape, axis = (BATCH, SEQ, NUM_CLASSES[problem]), 1
    elif problem == "question_answering":
        shape, axis = (BATCH, 2, SEQ), 2
    else:
        return 2.0 * torch.randn((BATCH, NUM_CLASSES[problem]), generator=torch.Generator().manual_seed(seed))
    logits = 2.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    noise = 20.0 * torch.randn(
        shape[:axis] + (seq,) + shape[axis + 1 :], generator=torch.Generator().manual_seed(1000 * seed + seq)
    )
    for row, length in enumerate(LENGTHS):
        noise[row].narrow(axis - 1, 0, length).copy_(logits[row].narrow(axis - 1, 0, length))
    return noise


def make_objective(problem: str, *terms) -> DistillationObjective:
    changes = {"num_labels": 3} if problem == "single_label_classification" else {}
    config = make_model(problem=problem, **changes).config
    return DistillationObjective(terms).bind(config, config, problem=problem)


def term_value(term, problem: str, seq: int = SEQ, with_labels: bool = True, rows: slice = slice(None), counts=None):
    """The term between the logits of seeds 1 (student) and 2 (teacher), on some of the rows."""
    batch = {name: column[rows] for name, column in make_batch(problem, seq).items()}
    if not with_labels:
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    student, teacher = (Signals(make_logits(problem, seed, seq)[rows], batch["attention_mask"]) for seed in (1, 2))
    objective = make_objective(problem, term)
    return objective(student, teacher, labels_of(batch, problem), counts)[term.name]


def compared_rows(problem: str, loss_type: str = "kl", with_labels: bool = True) -> list[tuple[Row, Row]]:
    """The pairs of rows that a problem compares, student and teacher, one by one."""
    student, teacher = (make_logits(problem, seed).tolist() for seed in (1, 2))
    pairs = []
    for b in range(BATCH):
        if problem == "multi_label_classification" and loss_type != "mse":
            pairs += [([0.0, s], [0.0, t]) for s, t in zip(student[b], teacher[b], strict=True)]
        elif problem == "question_answering":
            pairs += [(student[b][end][: LENGTHS[b]], teacher[b][end][: LENGTHS[b]]) for end in (0, 1)]
        elif problem in ("token_classification", "masked_lm"):
            labels = {"token_classification": TOKEN_LABELS, "masked_lm": MASKED_LABELS}[problem][b]
            is_unlabeled_row = problem == "token_classification" and all(label == -100 for label in labels)
            for i, label in enumerate(labels):
                if label != -100 or is_unlabeled_row or not with_labels:
                    pairs.append((student[b][i], teacher[b][i]))
        else:
            pairs.append((student[b], teacher[b]))
    return pairs


REFERENCES = {
    "kl": lambda s, t: row_kl(s, t, TAU),
    "reverse_kl": lambda s, t: row_reverse_kl(s, t, TAU),
    "js": lambda s, t: row_js(s, t, TAU),
    "mse": lambda s, t: mean([(a - b) ** 2 for a, b in zip(s, t, strict=True)]),
}


@pytest.mark.parametrize(
    ("problem", "loss_type"),
    [(problem, kind) for problem in PROBLEM_TYPES for kind in REFERENCES if kind in LOGIT_LOSSES[problem]],
)
def test_compares_what_the_problem_says(problem, loss_type):
    """Padding, special tokens or a mean per row would enter the loss of every run, and it would fall all the same."""
    found = term_value(LogitTerm(1.0, type=loss_type, temperature=TAU), problem)
    expected = mean([REFERENCES[loss_type](s, t) for s, t in compared_rows(problem, loss_type)])
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_multi_label_is_the_binary_divergence_between_sigmoids():
    """A softmax over classes that do not exclude each other would teach that they do."""

    def sigmoid(z: float) -> float:
        return 1.0 / (1.0 + math.exp(-z / TAU))

    problem = "multi_label_classification"
    student, teacher = (make_logits(problem, seed).flatten().tolist() for seed in (1, 2))
    pairs = [(sigmoid(s), sigmoid(t)) for s, t in zip(student, teacher, strict=True)]
    expected = TAU**2 * mean([divergence([q, 1 - q], [p, 1 - p]) for p, q in pairs])
    assert term_value(LogitTerm(1.0, temperature=TAU), problem).item() == pytest.approx(expected, rel=1e-5)


def test_question_answering_is_the_mean_of_start_and_end():
    """One softmax over both, or one of them alone, would not be what the model answers with."""
    problem = "question_answering"
    student, teacher = (make_logits(problem, seed).tolist() for seed in (1, 2))
    start, end = (
        mean([row_kl(student[b][k][:n], teacher[b][k][:n], TAU) for b, n in enumerate(LENGTHS)]) for k in (0, 1)
    )
    found = term_value(LogitTerm(1.0, temperature=TAU), problem)
    assert found.item() == pytest.approx((start + end) / 2, rel=1e-5)


def test_tokens_without_any_label_are_all_compared():
    """A text without labels has no -100 that could tell which tokens count: it would teach nothing, or fail."""
    found = term_value(LogitTerm(1.0, temperature=TAU), "token_classification", with_labels=False)
    pairs = compared_rows("token_classification", with_labels=False)
    assert len(pairs) == sum(LENGTHS)
    assert found.item() == pytest.approx(mean([row_kl(s, t, TAU) for s, t in pairs]), rel=1e-5)


@pytest.mark.parametrize("problem", [problem for problem in PROBLEM_TYPES if problem != "question_answering"])
def test_task_term_ignores_padding(problem):
    """The labels of padding are -100; what the logits say there must not matter."""
    assert term_value(TaskTerm(1.0), problem, SEQ + 7) == term_value(TaskTerm(1.0), problem, SEQ)


@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_padding_changes_nothing(problem):
    """A batch would weigh by its longest row, or a start be learned at the padding."""
    for loss_type in LOGIT_LOSSES[problem]:
        term = LogitTerm(1.0, type=loss_type)
        short, long = (term_value(term, problem, seq).item() for seq in (SEQ, SEQ + 7))
        assert long == pytest.approx(short, rel=1e-6), loss_type


def test_decoupled_kl_without_labels_asks_for_a_position_that_exists():
    """The teacher's logits at the padding mean nothing; the likeliest of them would be learned as the answer."""
    problem = "question_answering"
    term = LogitTerm(1.0, type="decoupled_kl", temperature=TAU)
    found = term_value(term, problem, SEQ + 7, with_labels=False)
    values = [row_decoupled_kl(s, t, t.index(max(t)), TAU) for s, t in compared_rows(problem)]
    assert found.item() == pytest.approx(mean(values), rel=1e-5)


@pytest.mark.parametrize("problem", PROBLEM_TYPES)
@pytest.mark.parametrize("parts", [(1, 1, 2), (3, 1)], ids=str)
def test_parts_of_a_step_add_up(problem, parts):
    """Micro-batches with few valid tokens would weigh as much as those with many."""
    batch, rows, end = make_batch(problem), [], 0
    for size in parts:
        rows.append(slice(end, end + size))
        end += size
    counted = [count_items({name: column[part] for name, column in batch.items()}, problem) for part in rows]
    counts = ItemCounts(*torch.tensor(counted).sum(dim=0))
    assert counts == count_items(batch, problem)
    # dist relates the rows of a batch to each other, so its parts are other relations.
    types = [kind for kind in LOGIT_LOSSES[problem] if kind != "dist"]
    for term in (TaskTerm(1.0), *(LogitTerm(1.0, type=kind) for kind in types)):
        values = [term_value(term, problem, rows=part, counts=counts) for part in rows]
        torch.testing.assert_close(sum(values), term_value(term, problem), msg=str(term))


@pytest.mark.parametrize("problem", ["token_classification", "masked_lm"])
def test_rows_without_anything_to_compare_add_nothing(problem):
    """A masked batch by chance has no mask: NaN would end the training."""
    unmasked = slice(1, 2) if problem == "masked_lm" else slice(0, 0)
    for loss_type in LOGIT_LOSSES[problem]:
        value = term_value(LogitTerm(1.0, type=loss_type), problem, rows=unmasked)
        assert value == 0.0, loss_type


# The task term against the models' own losses


def model_batch(problem: str, model) -> dict[str, Tensor]:
    """Ragged rows with labels of every kind that the models of transformers accept."""
    rows = make_rows(4, seed=3)
    seq = max(len(row["input_ids"]) for row in rows)
    batch = {
        name: padded([row[name] for row in rows], 0, seq) for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    if problem == "question_answering":
        positions = torch.tensor([[1, 2], [0, 0], [seq, seq + 3], [2, 4]])
        return {**batch, "start_positions": positions[:, 0], "end_positions": positions[:, 1]}
    generator = torch.Generator().manual_seed(0)
    if problem == "regression":
        return {**batch, "labels": torch.rand(4, generator=generator)}
    if problem == "multi_label_classification":
        return {**batch, "labels": torch.randint(0, 2, (4, 3), generator=generator).float()}
    if problem == "single_label_classification":
        return {**batch, "labels": torch.tensor([0, 1, -100, 1])}
    classes = model.config.vocab_size if problem == "masked_lm" else model.config.num_labels
    labels = torch.randint(0, classes, batch["input_ids"].shape, generator=generator)
    is_hidden = torch.rand(labels.shape, generator=generator) < (0.8 if problem == "masked_lm" else 0.3)
    return {**batch, "labels": labels.masked_fill(is_hidden | (batch["attention_mask"] == 0), -100)}


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_task_term_is_the_loss_of_the_model(problem, family):
    """Somebody's baseline would change by the name of the trainer alone."""
    model = make_model(family, problem=problem)
    batch = model_batch(problem, model)
    batch.pop("token_type_ids" if family == "roberta" else "", None)
    outputs = model(**batch)
    logits = (
        torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
        if problem == "question_answering"
        else outputs.logits
    )
    student = Signals(logits, batch["attention_mask"])
    found = make_objective(problem, TaskTerm(1.0))(student, labels=labels_of(batch, problem))["task_loss"]
    torch.testing.assert_close(found, outputs.loss, rtol=1e-6, atol=1e-6)
    head = list(model.parameters())[-1]
    gradients = [torch.autograd.grad(loss, head, retain_graph=True)[0] for loss in (found, outputs.loss)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_an_answer_outside_the_sequence_has_no_task_term():
    """All of a batch cut off is NaN in the models of transformers; only one end of an answer counts by itself."""
    problem = "question_answering"
    logits, mask = make_logits(problem, 1), make_batch(problem)["attention_mask"]
    objective = make_objective(problem, TaskTerm(1.0))

    def loss(positions: list[list[int]]) -> float:
        batch = {"attention_mask": mask, "input_ids": mask}
        batch |= {"start_positions": torch.tensor(positions)[:, 0], "end_positions": torch.tensor(positions)[:, 1]}
        return objective(Signals(logits, mask), labels=labels_of(batch, problem))["task_loss"].item()

    assert loss([[SEQ, SEQ]] * 4) == loss([[-100, -100]] * 4) == 0.0
    assert loss([[2, SEQ], *[[-100, SEQ]] * 3]) == pytest.approx(
        -math.log(softmax(logits[0, 0].tolist())[2]), rel=1e-5
    )


# What is refused


ALL_TYPES = LOGIT_LOSSES["single_label_classification"]
REFUSED = [(problem, kind) for problem in PROBLEM_TYPES for kind in ALL_TYPES if kind not in LOGIT_LOSSES[problem]]


@pytest.mark.parametrize(("problem", "loss_type"), REFUSED)
def test_refuses_what_has_no_meaning(problem, loss_type):
    """A loss that is always 0, or relates positions of different texts, trains without a sign that it is wrong."""
    with pytest.raises(ValueError) as error:
        make_objective(problem, LogitTerm(1.0, type=loss_type))
    allowed = LOGIT_LOSSES[problem]
    assert f"logit_loss_type='{loss_type}'" in str(error.value)
    assert all(repr(kind) in str(error.value) for kind in allowed)


def test_refused_and_allowed_are_what_the_definitions_say():
    """A form that is allowed by mistake would not be missed."""
    assert LOGIT_LOSSES["regression"] == ("mse",)
    assert {kind for problem, kind in REFUSED if problem == "multi_label_classification"} == {
        "dist",
        "standardized_kl",
        "decoupled_kl",
    }
    assert [kind for problem, kind in REFUSED if problem == "question_answering"] == ["dist"]
    assert not [problem for problem, _ in REFUSED if problem in ("token_classification", "masked_lm")]


@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_refuses_logits_of_another_problem(problem):
    """Token logits taken for those of rows would be matched with the wrong labels, or fail deep in a loss."""
    other = "token_classification" if problem in SEQUENCE_PROBLEMS else "regression"
    check_logits_shape(problem, make_logits(problem, 1))
    with pytest.raises(ValueError, match=f"do not fit {problem}.*ForTokenClassification"):
        check_logits_shape(problem, make_logits(other, 1))


def test_refuses_token_labels_that_are_not_padded_with_the_tokens():
    """DataCollatorWithPadding leaves labels as long as they were; a broadcast would label the wrong tokens."""
    signals = Signals(make_logits("token_classification", 1), make_batch("token_classification")["attention_mask"])
    with pytest.raises(ValueError, match=r"\(4, 5\) do not fit tokens of shape \(4, 8\).*ForTokenClassification"):
        make_objective("token_classification", TaskTerm(1.0))(signals, labels=torch.zeros(4, 5, dtype=torch.long))


# Several teachers


def several(num_teachers: int = 3) -> list[Tensor]:
    return [3.0 * torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(num_teachers)]


@pytest.mark.parametrize("weights", [None, [0.7, 0.1, 0.2], [7.0, 1.0, 2.0]])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_teachers_are_averaged_by_their_probabilities(weights, temperature):
    """The mean of logits is not that of what they answer, and weights of any sum must not scale it."""
    logits = several()
    found = combine_teachers(logits, weights, temperature=temperature, reduction="probabilities", loss_type="kl")
    total = sum(weights or [1.0] * 3)
    shares = [weight / total for weight in weights or [1.0] * 3]
    for row in range(4):
        answers = [softmax(z[row].tolist(), temperature) for z in logits]
        expected = [dot(shares, list(column)) for column in zip(*answers, strict=True)]
        assert softmax(found[row].tolist(), temperature) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("reduction", "loss_type"), [("logits", "kl"), ("probabilities", "mse"), ("probabilities", "standardized_kl")]
)
def test_teachers_are_averaged_by_their_logits_where_logits_are_compared(reduction, loss_type):
    """The logarithm of a mean of probabilities lacks what a loss between logits compares: their size."""
    logits = several()
    found = combine_teachers(logits, [2.0, 1.0, 1.0], temperature=4.0, reduction=reduction, loss_type=loss_type)
    torch.testing.assert_close(found, 0.5 * logits[0] + 0.25 * logits[1] + 0.25 * logits[2])


@pytest.mark.parametrize("num_teachers", [1, 3])
@pytest.mark.parametrize("reduction", ["probabilities", "logits"])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_positions_that_do_not_exist_are_no_answer(num_teachers, reduction, temperature):
    """A teacher whose padding scores highest would keep next to no share of the mean at the real positions."""
    logits, mask = several(num_teachers), torch.arange(5) < torch.tensor([[5], [3], [2], [4]])
    expected = torch.empty(4, 5)
    for row, length in enumerate([5, 3, 2, 4]):
        real = [z[row : row + 1, :length] for z in logits]
        expected[row] = -1.0
        arguments = {"temperature": temperature, "reduction": reduction, "loss_type": "kl"}
        expected[row, :length] = combine_teachers(real, None, **arguments)
    noisy = [torch.where(mask, z, 1e4) for z in logits]
    found = combine_teachers(noisy, None, class_mask=mask, **arguments)
    torch.testing.assert_close(found[mask], expected[mask])
    assert (found[~mask] < found.masked_fill(~mask, torch.inf).min()).all() and found.isfinite().all()


def test_one_teacher_of_low_precision_is_compared_in_float32():
    """The next operation on a bfloat16 teacher would round its probabilities."""
    (logits,) = several(1)
    found = combine_teachers([logits.bfloat16()], None, temperature=2.0, reduction="probabilities", loss_type="kl")
    assert found.dtype == torch.float32 and torch.equal(found, logits.bfloat16().float())
