"""Each loss term against its written definition, and the properties that make it safe to train on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

from hf_kd.objective import losses


LENGTHS = (5, 3, 1, 4)  # unequal, so that a mean over rows and a mean over tokens differ
BATCH, SEQ, CLASSES, HIDDEN, HEADS = len(LENGTHS), max(LENGTHS), 3, 4, 2
SHAPES = {"logits": (BATCH, CLASSES), "hidden": (BATCH, SEQ, HIDDEN), "attention": (BATCH, HEADS, SEQ, SEQ)}


# The definitions of the literature once more, as loops over Python floats (double precision).
def reference_softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(x) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def reference_kl(student: list[float], teacher: list[float]) -> float:
    p_student, p_teacher = reference_softmax(student), reference_softmax(teacher)
    return sum(t * math.log(t / s) for s, t in zip(p_student, p_teacher, strict=True))


def reference_logit_kl(student: list, teacher: list, tau: float) -> float:
    rows = [([x / tau for x in s], [x / tau for x in t]) for s, t in zip(student, teacher, strict=True)]
    return sum(tau**2 * reference_kl(s, t) for s, t in rows) / len(rows)


def reference_logit_soft_ce(student: list, teacher: list, tau: float) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p_student, p_teacher = reference_softmax([x / tau for x in s]), reference_softmax([x / tau for x in t])
        total -= tau**2 * sum(pt * math.log(ps) for ps, pt in zip(p_student, p_teacher, strict=True))
    return total / len(student)


def reference_logit_mse(student: list, teacher: list) -> float:
    errors = [(a - b) ** 2 for s, t in zip(student, teacher, strict=True) for a, b in zip(s, t, strict=True)]
    return sum(errors) / len(errors)


def reference_hidden_mse(student: list, teacher: list) -> float:
    errors = [
        (student[b][i][d] - teacher[b][i][d]) ** 2
        for b, length in enumerate(LENGTHS)
        for i in range(length)
        for d in range(HIDDEN)
    ]
    return sum(errors) / len(errors)


def reference_hidden_cosine(student: list, teacher: list) -> float:
    distances = []
    for b, length in enumerate(LENGTHS):
        for s, t in zip(student[b][:length], teacher[b][:length], strict=True):
            distances.append(1 - sum(x * y for x, y in zip(s, t, strict=True)) / (math.hypot(*s) * math.hypot(*t)))
    return sum(distances) / len(distances)


def reference_attention_mse(student: list, teacher: list) -> float:
    errors = [
        (student[b][h][i][j] - teacher[b][h][i][j]) ** 2
        for b, length in enumerate(LENGTHS)
        for h in range(HEADS)
        for i in range(length)
        for j in range(length)
    ]
    return sum(errors) / len(errors)


def reference_attention_kl(student: list, teacher: list) -> float:
    divergences = [
        reference_kl(student[b][h][i][:length], teacher[b][h][i][:length])
        for b, length in enumerate(LENGTHS)
        for h in range(HEADS)
        for i in range(length)
    ]
    return sum(divergences) / len(divergences)


@dataclass(frozen=True)
class Term:
    """A loss with what the tests need to know about it."""

    name: str
    kind: str  # key of SHAPES
    loss: Callable[..., Tensor]
    reference: Callable[[list, list], float]
    count_items: Callable[[Tensor], Tensor]  # mask -> what the sum is divided by
    is_distance: bool = True  # 0 for equal inputs

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor, **kwargs) -> Tensor:
        return self.loss(student, teacher, *([] if self.kind == "logits" else [mask]), **kwargs)


def count_rows(mask: Tensor) -> Tensor:
    return torch.tensor(len(mask))


def count_tokens(mask: Tensor) -> Tensor:
    return mask.sum()


def count_pairs(mask: Tensor) -> Tensor:
    return mask.sum(-1).square().sum()


def softened(name: str, reference: Callable, tau: float, **kwargs) -> Term:
    loss = partial(getattr(losses, name), temperature=tau)
    return Term(f"{name}-tau{tau:g}", "logits", loss, partial(reference, tau=tau), count_rows, **kwargs)


TERMS = [
    softened("logit_kl", reference_logit_kl, 1.0),
    softened("logit_kl", reference_logit_kl, 4.0),
    softened("logit_soft_ce", reference_logit_soft_ce, 1.0, is_distance=False),
    softened("logit_soft_ce", reference_logit_soft_ce, 4.0, is_distance=False),
    Term("logit_mse", "logits", losses.logit_mse, reference_logit_mse, count_rows),
    Term("hidden_mse", "hidden", losses.hidden_mse, reference_hidden_mse, count_tokens),
    Term("hidden_cosine", "hidden", losses.hidden_cosine, reference_hidden_cosine, count_tokens),
    Term("attention_mse", "attention", losses.attention_mse, reference_attention_mse, count_pairs),
    Term("attention_kl", "attention", losses.attention_kl, reference_attention_kl, count_tokens),
]
TOKEN_TERMS = [term for term in TERMS if term.kind != "logits"]


def each(terms: list[Term]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("term", terms, ids=lambda term: term.name)


def make_mask(lengths: tuple[int, ...] = LENGTHS, seq: int = SEQ) -> Tensor:
    return (torch.arange(seq)[None, :] < torch.tensor(lengths)[:, None]).long()


def make_pair(term: Term, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(SHAPES[term.kind], generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def gradient(loss: Tensor, tensor: Tensor) -> Tensor:
    return torch.autograd.grad(loss, tensor)[0]


@each([term for term in TERMS if term.is_distance])
def test_is_zero_for_equal_inputs(term):
    """A perfect student would still be pushed somewhere, and the logged value would have no floor to compare with."""
    student, _ = make_pair(term)
    loss = term(student, student.detach().clone(), make_mask())
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(loss, student), torch.zeros_like(student), atol=1e-6, rtol=0)


@each(TERMS)
def test_equals_its_definition(term):
    """A swapped direction, a missing factor or a mean over the wrong axis still trains, only to a worse student."""
    student, teacher = make_pair(term)
    loss = term(student, teacher, make_mask())
    assert loss.shape == ()
    assert loss.item() == pytest.approx(term.reference(student.tolist(), teacher.tolist()), rel=1e-5)


def test_soft_ce_has_the_gradient_of_kl():
    """The choice between the two would change the trained weights, not just the logged value."""
    gradients = []
    for loss in (losses.logit_kl, losses.logit_soft_ce):
        student, teacher = make_pair(TERMS[0])
        gradients.append(gradient(loss(student, teacher, temperature=2.0), student))
    torch.testing.assert_close(*gradients)


def test_attention_scores_are_those_of_the_softmax():
    """Scores on another scale than the model's own would match the wrong attention maps."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(BATCH, HEADS, SEQ, HIDDEN, generator=generator) for _ in range(3))
    scores = losses.attention_scores(query, key)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(scores.softmax(dim=-1) @ value, expected)
    assert losses.attention_scores(query.bfloat16(), key.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("noise", ["random", "inf", "nan"])
@each(TOKEN_TERMS)
def test_ignores_padding(term, noise):
    """Loss and gradient would follow the longest text of the batch, and one overflowing pad would end it in NaN."""
    student, teacher = make_pair(term)
    mask = make_mask()
    expected = term(student, teacher, mask)
    expected_gradient = gradient(expected, student)

    long_mask = make_mask(seq=2 * SEQ)
    is_token = long_mask.bool()
    is_token = is_token[..., None] if term.kind == "hidden" else (is_token[:, :, None] & is_token[:, None])[:, None]
    grow = (0, 0, 0, SEQ) if term.kind == "hidden" else (0, SEQ, 0, SEQ)

    def pad(tensor: Tensor, seed: int) -> Tensor:
        tensor = F.pad(tensor.detach(), grow)
        fill = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        fill = 100 * fill if noise == "random" else torch.full_like(fill, float(noise))
        return torch.where(is_token, tensor, fill)

    long_student, long_teacher = pad(student, 1).requires_grad_(), pad(teacher, 2)
    loss = term(long_student, long_teacher, long_mask)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    expected_gradient = F.pad(expected_gradient, grow)  # pads get none
    torch.testing.assert_close(gradient(loss, long_student), expected_gradient, atol=1e-6, rtol=1e-6)


@each(TERMS)
def test_teaches_the_student_only(term):
    """A teacher that is trained along meets the student half-way: the loss falls and nothing is learnt."""
    student, teacher = make_pair(term)
    teacher.requires_grad_()
    term(student, teacher, make_mask()).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each(TERMS)
def test_is_finite_at_extreme_values(term, dtype):
    """One confident teacher would turn every weight into NaN, hours into a run."""
    student, teacher = make_pair(term)
    student = (1e4 * student.detach().sign()).to(dtype).requires_grad_()
    teacher = (1e4 * teacher.sign()).to(dtype)
    loss = term(student, teacher, make_mask())
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


@each(TERMS)
def test_computes_in_float32(term):
    """A bf16 sum over a batch keeps 8 bits: small terms would be rounded away under mixed precision."""
    student, teacher = make_pair(term)
    student, teacher = student.detach().bfloat16().requires_grad_(), teacher.bfloat16()
    loss = term(student, teacher, make_mask())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, term(student.float(), teacher.float(), make_mask()), atol=0, rtol=0)
    assert gradient(loss, student).isfinite().all()


@each(TERMS)
def test_parts_of_a_batch_add_up(term):
    """Gradient accumulation and a second process would weigh short texts more than one large batch does."""
    student, teacher = make_pair(term)
    mask = make_mask()
    num_items = term.count_items(mask)
    whole = term(student, teacher, mask)
    parts = [
        term(student[rows], teacher[rows], mask[rows], num_items=num_items) for rows in (slice(2), slice(2, None))
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(gradient(sum(parts), student), gradient(whole, student))


@pytest.mark.parametrize("num_items", [None, torch.tensor(0)], ids=["counted", "num_items=0"])
@each(TERMS)
def test_nothing_valid_gives_zero(term, num_items):
    """An empty shard of a distributed batch would give 0 / 0, and the all-reduce would carry the NaN to every rank."""
    student, teacher = make_pair(term)
    rows = 0 if term.kind == "logits" else BATCH  # every row of logits is valid: nothing valid is no row
    student, teacher = student.detach()[:rows].requires_grad_(), teacher[:rows]
    loss = term(student, teacher, torch.zeros(rows, SEQ), num_items=num_items)
    assert loss == 0.0
    assert torch.equal(gradient(loss, student), torch.zeros_like(student))


@pytest.mark.parametrize("dim", [0, 1, -1])
@each(TERMS)
def test_refuses_shapes_that_differ(term, dim):
    """A student axis of size 1 would broadcast against the teacher's and train on unrelated pairs."""
    student, teacher = make_pair(term)
    student = student.narrow(dim, 0, 1)
    message = rf"shapes \({', '.join(map(str, student.shape))}\) and \({', '.join(map(str, teacher.shape))}\) differ"
    with pytest.raises(ValueError, match=message):
        term(student, teacher, make_mask())


@pytest.mark.parametrize("loss", [losses.logit_kl, losses.logit_soft_ce])
def test_refuses_a_softmax_over_one_logit(loss):
    """Regression would be distilled with loss 0 and gradient 0: a run that looks converged at its first step."""
    with pytest.raises(ValueError, match=r"\(4, 1\) have one class.*logit_loss_type='mse'"):
        loss(torch.randn(4, 1), torch.randn(4, 1))


def test_mse_distils_one_logit():
    """The refusal above would leave regression without any logit term."""
    loss = losses.logit_mse(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]]))
    assert loss.item() == pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
@pytest.mark.parametrize("loss", [losses.logit_kl, losses.logit_soft_ce])
def test_refuses_a_temperature_that_is_not_positive(loss, temperature):
    """0 gives NaN; a negative temperature turns the teacher's ranking around without a word."""
    with pytest.raises(ValueError, match=f"temperature={temperature} must be > 0"):
        loss(torch.randn(4, 3), torch.randn(4, 3), temperature=temperature)


@pytest.mark.parametrize("loss", [losses.logit_kl, losses.logit_soft_ce])
def test_gradient_size_does_not_depend_on_the_temperature(loss):
    """Without tau^2 a warmer teacher is a weaker one: at tau=8 the term would all but vanish beside the task's."""
    norms = []
    for temperature in (1.0, 2.0, 4.0, 8.0):
        student, teacher = make_pair(TERMS[0], scale=0.1)
        norms.append(gradient(loss(student, teacher, temperature=temperature), student).norm().item())
    assert norms == pytest.approx([norms[0]] * 4, rel=0.1)


LABELS = torch.tensor([2, -100, 0, 1])
IS_LABELED = LABELS != -100
VALUES = torch.tensor([0.5, -100.0, -1.5, 4.0])


def make_logits(num_labels: int) -> Tensor:
    return torch.randn(BATCH, num_labels, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_task_loss_is_the_cross_entropy_of_labelled_rows(label_smoothing):
    """Counting unlabelled rows in the mean would shrink the task term by the share of unlabelled text."""
    logits = make_logits(CLASSES)
    loss = losses.task_loss(logits, LABELS, label_smoothing=label_smoothing)
    expected = F.cross_entropy(logits[IS_LABELED], LABELS[IS_LABELED], label_smoothing=label_smoothing)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def test_task_loss_is_the_squared_error_of_labelled_rows():
    """A value of -100 taken for a rating would drown every other row; and (batch, 1) - (batch,) is (batch, batch)."""
    logits = make_logits(1)
    loss = losses.task_loss(logits, VALUES, is_regression=True)
    expected = F.mse_loss(logits[IS_LABELED, 0], VALUES[IS_LABELED])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def test_task_loss_smooths_labels_as_the_trainer_does():
    """`label_smoothing_factor` would mean one thing in `Trainer` and another here, against the drop-in promise."""
    logits = make_logits(CLASSES)
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, LABELS)
    torch.testing.assert_close(losses.task_loss(logits, LABELS, label_smoothing=0.1), expected)


@pytest.mark.parametrize("is_regression", [False, True], ids=["classification", "regression"])
class TestTaskLoss:
    """The properties of the other terms, for the one that compares with labels instead of a teacher."""

    def make(self, is_regression: bool) -> tuple[Tensor, Tensor, Callable[..., Tensor]]:
        logits, labels = (make_logits(1), VALUES) if is_regression else (make_logits(CLASSES), LABELS)
        return logits, labels, partial(losses.task_loss, is_regression=is_regression)

    def test_parts_of_a_batch_add_up(self, is_regression):
        """A half with fewer labelled rows would weigh as much as the other."""
        logits, labels, loss = self.make(is_regression)
        parts = [loss(logits[rows], labels[rows], num_items=IS_LABELED.sum()) for rows in (slice(2), slice(2, None))]
        torch.testing.assert_close(sum(parts), loss(logits, labels))

    @pytest.mark.parametrize("num_items", [None, torch.tensor(0)], ids=["counted", "num_items=0"])
    def test_nothing_labelled_gives_zero(self, is_regression, num_items):
        """A batch of unlabelled text, the common case with augmentation, would give NaN."""
        logits, labels, loss = self.make(is_regression)
        value = loss(logits, torch.full_like(labels, -100), num_items=num_items)
        assert value == 0.0
        assert torch.equal(gradient(value, logits), torch.zeros_like(logits))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_finite_at_extreme_logits(self, is_regression, dtype):
        """Half precision without an upcast overflows in the exponential or the square."""
        logits, labels, loss = self.make(is_regression)
        logits = (1e4 * logits.detach().sign()).to(dtype).requires_grad_()
        value = loss(logits, labels)
        assert value.isfinite() and value.dtype == torch.float32
        assert gradient(value, logits).isfinite().all()


def test_task_loss_refuses_regression_on_several_logits():
    """The labels would broadcast over the logits, and each would learn the same value."""
    with pytest.raises(ValueError, match=r"one logit.*\(4, 3\)"):
        losses.task_loss(make_logits(CLASSES), VALUES, is_regression=True)
