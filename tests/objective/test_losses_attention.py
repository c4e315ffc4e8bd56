"""What single losses between attention maps promise beyond the properties of all."""

import pytest
import torch
import torch.nn.functional as F
from objective.loss_terms import BATCH, HEADS, HIDDEN, LENGTHS, SEQ, make_mask

from hf_kd.objective import losses


pytestmark = pytest.mark.one_leg


ATTENTION_LOSSES = [losses.attention_mse, losses.attention_kl, losses.attention_cosine]
each_loss = pytest.mark.parametrize("loss", ATTENTION_LOSSES, ids=lambda loss: loss.__name__)


def make_scores(count: int = 2, heads: int = HEADS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, heads, SEQ, SEQ, generator=generator) for _ in range(count)]


def test_scores_are_those_of_the_softmax():
    """Scores on another scale than the model's own would match the wrong attention maps."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(BATCH, HEADS, SEQ, HIDDEN, generator=generator) for _ in range(3))
    scores = losses.attention_scores(query, key)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(scores.softmax(dim=-1) @ value, expected)
    assert losses.attention_scores(query.bfloat16(), key.bfloat16()).dtype == torch.float32


@each_loss
def test_different_head_counts_name_the_ways_out(loss):
    """The user would meet a broadcast error, or cut heads off, where two settings help."""
    (student, _), (teacher, _) = make_scores(), make_scores(heads=3)
    with pytest.raises(ValueError, match=r"\(4, 2, 5, 5\) and \(4, 3, 5, 5\).*relation_loss.*head_reduction='mean'"):
        loss(student, teacher, make_mask())


@each_loss
def test_the_mean_over_equal_heads_is_the_head(loss):
    """The mean would be of another quantity than the heads: a sum, or scores in place of distributions."""
    student, teacher = (x[:, :1] for x in make_scores())
    reduced = loss(student.repeat(1, 2, 1, 1), teacher.repeat(1, 3, 1, 1), make_mask(), head_reduction="mean")
    torch.testing.assert_close(reduced, loss(student, teacher, make_mask()))


@each_loss
def test_refuses_an_unknown_reduction(loss):
    """A misspelt name would compare head by head."""
    with pytest.raises(ValueError, match="head_reduction='max' must be 'mean' or None"):
        loss(*make_scores(), make_mask(), head_reduction="max")


@pytest.mark.parametrize("loss", ATTENTION_LOSSES[1:], ids=lambda loss: loss.__name__)
def test_a_reach_over_the_whole_text_is_no_limit(loss):
    """A layer with a wide window would be compared by another formula than one without."""
    student, teacher = make_scores()
    expected = loss(student, teacher, make_mask())
    torch.testing.assert_close(loss(student, teacher, make_mask(), reach=SEQ - 1), expected, atol=0, rtol=0)
    assert loss(student, teacher, make_mask(), reach=1) != expected


def test_mse_in_reach_weighs_queries_alike():
    """`num_items` counts tokens then: divided by the pairs of the whole text, the term would shrink with length."""
    student, teacher = make_scores()
    loss = losses.attention_mse(student, teacher, make_mask(), reach=SEQ - 1)
    error = (student - teacher).square().mean(dim=1)
    by_query = [error[b, i, :length].mean() for b, length in enumerate(LENGTHS) for i in range(length)]
    torch.testing.assert_close(loss, torch.stack(by_query).mean())


@each_loss
def test_what_is_out_of_reach_does_not_exist(loss):
    """Scores that the layer never computes, and may hold anything, would be taught."""
    student, teacher = make_scores()
    expected = loss(student, teacher, make_mask(), reach=2)
    student[:, :, 0, 3], teacher[:, :, 3, 0] = float("nan"), float("inf")
    torch.testing.assert_close(loss(student, teacher, make_mask(), reach=2), expected, atol=0, rtol=0)


@each_loss
def test_reach_is_the_same_with_padding_on_the_left(loss):
    """The distance of two tokens would be counted from the pads."""
    student, teacher = make_scores()
    length = 3
    right = [x[:1] for x in (student, teacher)]
    left = [F.pad(x[:, :, :length, :length], (2, 0, 2, 0), value=float("nan")) for x in right]
    expected = loss(*right, make_mask((length,)), reach=1)
    torch.testing.assert_close(loss(*left, make_mask((length,)).flip(1), reach=1), expected)


@each_loss
def test_refuses_a_reach_that_is_not_positive(loss):
    """A query that sees only itself has the attention 1: loss 0, gradient 0."""
    with pytest.raises(ValueError, match="reach=0 must be at least 1"):
        loss(*make_scores(), make_mask(), reach=0)
