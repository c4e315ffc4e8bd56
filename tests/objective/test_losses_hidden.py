"""What single losses between hidden states promise beyond the properties of all."""

import pytest
import torch
import torch.nn.functional as F
from objective.loss_terms import BATCH, HIDDEN, LENGTHS, SEQ, gradient, make_mask

from hf_kd.objective import losses


pytestmark = pytest.mark.one_leg


def make_states(count: int, hidden: int = HIDDEN) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, SEQ, hidden, generator=generator) for _ in range(count)]


def test_cosine_is_the_embedding_loss_of_torch():
    """DistilBERT's numbers are those of `CosineEmbeddingLoss`: another mean would need another weight."""
    student, teacher = make_states(2)
    is_token = make_mask().bool()
    expected = F.cosine_embedding_loss(student[is_token], teacher[is_token], torch.ones(sum(LENGTHS)))
    torch.testing.assert_close(losses.hidden_cosine(student, teacher, make_mask()), expected)


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.bool])
def test_first_token_is_the_first_valid_one(dtype):
    """With padding on the left, position 0 is a pad in every text but the longest."""
    (hidden,) = make_states(1)
    right = make_mask().to(dtype)
    assert torch.equal(losses.first_token(hidden, right), hidden[:, 0])
    left = right.flip(1)
    expected = torch.stack([hidden[b, SEQ - length] for b, length in enumerate(LENGTHS)])
    assert torch.equal(losses.first_token(hidden, left), expected)


def test_first_token_of_nothing_is_zero():
    """The pad at position 0 would be compared, and a NaN in it would reach the gradient."""
    (hidden,) = make_states(1)
    hidden[2] = float("nan")
    mask = make_mask()
    mask[2] = 0
    hidden.requires_grad_()
    states = losses.first_token(hidden, mask)
    assert torch.equal(states[2], torch.zeros(HIDDEN))
    assert torch.equal(gradient(states.sum(), hidden)[2], torch.zeros(SEQ, HIDDEN))


@pytest.mark.parametrize("name", ["hidden_pkd", "hidden_gram"])
def test_an_example_without_tokens_takes_no_part(name):
    """An empty text would count in the mean and shrink the term."""
    student, teacher = (x.clone() for x in make_states(2))
    if name == "hidden_gram":
        student, teacher = (student, 2 * student), (teacher, 3 * teacher)
    mask = make_mask()
    mask[2] = 0
    rows = [0, 1, 3]

    def cut(side):
        return tuple(x[rows] for x in side) if isinstance(side, tuple) else side[rows]

    loss = getattr(losses, name)
    torch.testing.assert_close(loss(student, teacher, mask), loss(cut(student), cut(teacher), mask[rows]))


@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "hidden_pkd", "hidden_gram", "hidden_nst"])
def test_the_side_of_the_padding_does_not_matter(name):
    """A tokenizer that pads on the left would train on the pads."""
    student, teacher = make_states(2)
    left_student, left_teacher = (torch.full_like(x, float("nan")) for x in (student, teacher))
    for b, length in enumerate(LENGTHS):
        left_student[b, SEQ - length :], left_teacher[b, SEQ - length :] = student[b, :length], teacher[b, :length]
    right, left = (student, teacher), (left_student, left_teacher)
    if name in ("hidden_gram", "hidden_nst"):
        right, left = ([(x, 2 * x) for x in pair] for pair in (right, left))
    loss = getattr(losses, name)
    torch.testing.assert_close(loss(*left, make_mask().flip(1)), loss(*right, make_mask()))


@pytest.mark.parametrize("name", ["hidden_gram", "hidden_nst"])
def test_layers_come_in_pairs(name):
    """A third layer would be dropped without a word."""
    student, teacher, other = make_states(3)
    with pytest.raises(ValueError):
        getattr(losses, name)((student, teacher, other), (student, teacher), make_mask())
