"""Each loss term against its written definition, and the properties that make it safe to train on."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from objective.loss_terms import (
    ADDITIVE_TERMS,
    BATCH,
    BATCH_TERMS,
    PADDED_TERMS,
    SEQ,
    TERMS,
    each,
    gradient,
    make_mask,
    make_pair,
)
from torch import Tensor

from hf_kd.objective import losses


pytestmark = pytest.mark.one_leg


def test_every_loss_is_tested():
    """A new loss would be trained on without any of the properties below."""
    tested = {name for name in losses.__all__ if any(term.name.startswith(name) for term in TERMS)}
    assert set(losses.__all__) - tested == {"attention_scores", "first_token", "task_loss"}  # have tests of their own


@pytest.mark.parametrize("name", losses.__all__)
def test_every_loss_explains_itself(name):
    """An argument without a word on its meaning would be used with the wrong count or the wrong shape."""
    doc = inspect.getdoc(getattr(losses, name))
    assert doc.split("\n\n")[0].endswith(".")
    if "rguments and errors are those of" in doc or "rguments, result and errors are those of" in doc:
        return
    assert [p for p in inspect.signature(getattr(losses, name)).parameters if f"\n    {p} (" not in doc] == []


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


@pytest.mark.parametrize("noise", ["random", "inf", "nan"])
@each(PADDED_TERMS)
def test_ignores_padding(term, noise):
    """Loss and gradient would follow the longest text of the batch, and one overflowing pad would end it in NaN."""
    student, teacher = make_pair(term)
    mask = make_mask()
    expected = term(student, teacher, mask)
    expected_gradient = gradient(expected, student)

    long_mask = make_mask(seq=2 * SEQ)
    is_token = term.spread(long_mask.bool())

    def pad(tensor: Tensor, seed: int) -> Tensor:
        tensor = F.pad(tensor.detach(), term.longer)
        fill = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        fill = 100 * fill if noise == "random" else torch.full_like(fill, float(noise))
        return torch.where(is_token, tensor, fill)

    long_student, long_teacher = pad(student, 1).requires_grad_(), pad(teacher, 2)
    loss = term(long_student, long_teacher, long_mask)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    expected_gradient = F.pad(expected_gradient, term.longer)  # pads get none
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


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@each(TERMS)
def test_is_finite_for_constant_inputs(term, side):
    """A new head of zeros has no direction, no variance and no distances: dividing by them would give NaN at once."""
    student, teacher = make_pair(term)
    student = student.detach() if side == "teacher" else torch.zeros_like(student)
    teacher = teacher if side == "student" else torch.zeros_like(teacher)
    loss = term(student.requires_grad_(), teacher, make_mask())
    assert loss.isfinite()
    assert gradient(loss, student).abs().max() < 1e6


@each(TERMS)
def test_computes_in_float32(term):
    """A bf16 sum over a batch keeps 8 bits: small terms would be rounded away under mixed precision."""
    student, teacher = make_pair(term)
    student, teacher = student.detach().bfloat16().requires_grad_(), teacher.bfloat16()
    loss = term(student, teacher, make_mask())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, term(student.float(), teacher.float(), make_mask()), atol=0, rtol=0)
    assert gradient(loss, student).isfinite().all()


@each(ADDITIVE_TERMS)
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


@each(TERMS)
def test_divides_by_a_share_of_an_item(term):
    """The count of a step over its number of processes may be 1/2: rounded up to 1, it would halve the gradient."""
    student, teacher = make_pair(term)
    half, one = (term(student, teacher, make_mask(), num_items=torch.tensor(n)) for n in (0.5, 1.0))
    torch.testing.assert_close(half, 2 * one)


@each(BATCH_TERMS)
def test_parts_of_a_step_weigh_by_their_rows(term):
    """The smaller last batch of an epoch would count as much as a full one."""
    student, teacher = make_pair(term)
    mask = make_mask()
    step = term(student[:3], teacher[:3], mask[:3], num_items=torch.tensor(12))
    torch.testing.assert_close(step, term(student[:3], teacher[:3], mask[:3]) * 3 / 12)


@each([term for term in TERMS if term.kind == "texts"])
def test_one_text_has_no_relations(term):
    """A last batch of one text would divide by the number of its pairs: NaN in the last step of an epoch."""
    student, teacher = make_pair(term)
    student = student.detach()[:1].requires_grad_()
    loss = term(student, teacher[:1], make_mask()[:1])
    torch.testing.assert_close(loss, torch.tensor(0.0))
    torch.testing.assert_close(gradient(loss, student), torch.zeros_like(student))


@pytest.mark.parametrize("num_items", [None, torch.tensor(0)], ids=["counted", "num_items=0"])
@each(TERMS)
def test_nothing_valid_gives_zero(term, num_items):
    """An empty shard of a distributed batch would give 0 / 0, and the all-reduce would carry the NaN to every rank."""
    student, teacher = make_pair(term)
    rows = BATCH if term.has_padding else 0  # without a mask every row is valid: nothing valid is no row
    student, teacher = student.detach()[:rows].requires_grad_(), teacher[:rows]
    loss = term(student, teacher, torch.zeros(rows, SEQ), num_items=num_items)
    assert loss == 0.0
    assert torch.equal(gradient(loss, student), torch.zeros_like(student))


@each(TERMS)
def test_no_rows_give_zero(term):
    """A shard without a row, not even of padding, would take a mean over nothing."""
    student, teacher = make_pair(term)
    student = student.detach()[:0].requires_grad_()
    loss = term(student, teacher[:0], make_mask()[:0])
    assert loss == 0.0
    assert gradient(loss, student).shape == student.shape


@pytest.mark.parametrize(
    ("term", "axis"),
    [
        pytest.param(term, axis, id=f"{term.name}-{axis}")
        for term in TERMS
        for axis in (range(len(term.shape)) if term.same_axes is None else term.same_axes)
        if not (term.kind == "attention" and axis == 2)  # the last axis stands for both
    ],
)
def test_refuses_shapes_that_differ(term, axis):
    """A student axis of size 1 would broadcast against the teacher's and train on unrelated pairs."""
    student, teacher = make_pair(term)
    student, teacher = student.detach().narrow(axis, 0, 1), torch.zeros(term.shape)
    shapes = [tuple((x[:, 0] if term.is_stacked else x).shape) for x in (student, teacher)]
    message = r"shapes \({}\) and \({}\) differ".format(*(", ".join(map(str, shape)) for shape in shapes))
    if term.kind == "vectors" and axis == 2:
        message = "1 attention heads and the teacher 2"
    with pytest.raises(ValueError, match=message):
        term(student, teacher, make_mask())


@each(PADDED_TERMS)
def test_refuses_a_mask_of_another_length(term):
    """A mask of the texts before padding would broadcast, or count the wrong tokens."""
    student, teacher = make_pair(term)
    with pytest.raises(ValueError, match=r"mask has shape \(4, 7\)"):
        term(student, teacher, make_mask(seq=7))
