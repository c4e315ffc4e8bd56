"""What single losses between relations promise beyond the properties of all."""

import math
import re

import pytest
import torch
from objective.loss_terms import HIDDEN, SEQ, gradient, make_mask

from hf_kd.objective import losses


pytestmark = pytest.mark.one_leg


def make_vectors(heads: int, size: int, batch: int = 2, seq: int = SEQ) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(heads)
    return tuple(torch.randn(batch, heads, seq, size, generator=generator) for _ in range(3))


def make_texts(batch: int, hidden: int = HIDDEN, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, hidden, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("relation_heads", "side", "fix"),
    [(48, "student's width 320", "16 or 32"), (10, "teacher's width 768", "4 or 8"), (0, "student", "1 or 2")],
)
def test_v2_names_common_divisors(relation_heads, side, fix):
    """The user would try number after number: 48, the paper's for BERT-base, fits few small students."""
    student, teacher = make_vectors(5, 64, seq=2), make_vectors(12, 64, seq=2)
    message = f"`relation_heads={relation_heads}` does not divide the {side}"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        losses.relation_minilm_v2(student, teacher, make_mask((2, 2), seq=2), relation_heads=relation_heads)
    assert str(error.value).endswith(f"use a common divisor of 768 and 320 such as {fix}.")


def test_v2_with_the_models_own_heads_is_the_attention_of_a_head_to_itself():
    """Heads would be cut across each other: each relation of half of one head and half of the next."""
    student, teacher, mask = make_vectors(2, 4), make_vectors(2, 6), make_mask((5, 3))
    loss = losses.relation_minilm_v2(student, teacher, mask, relation_heads=2)
    scores = [[losses.attention_scores(x, x) for x in side] for side in (student, teacher)]
    expected = sum(losses.attention_kl(s, t, mask) for s, t in zip(*scores, strict=True))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("relation_weights", [(0.0, 0.0, 0.0), (1.0, -1.0, 1.0)])
def test_v2_refuses_weights_that_teach_nothing_or_the_opposite(relation_weights):
    """A negative weight drives the student away from the teacher; only zeros are a term that does nothing."""
    vectors = make_vectors(2, 4)
    with pytest.raises(ValueError, match=re.escape(f"relation_weights={relation_weights} must be >= 0")):
        losses.relation_minilm_v2(
            vectors, vectors, make_mask((5, 3)), relation_heads=2, relation_weights=relation_weights
        )


def test_v1_names_v2_for_other_head_counts():
    """The user would believe that no relation loss fits the pair of models."""
    with pytest.raises(ValueError, match="2 attention heads and the teacher 3.*use minilm_v2"):
        losses.relation_minilm_v1(make_vectors(2, 4), make_vectors(3, 4), make_mask((5, 3)))


def test_relations_keep_to_the_reach():
    """In a layer with local attention, v1 would teach attention that the layer cannot pay."""
    student, teacher, mask = make_vectors(2, 4), make_vectors(2, 6), make_mask((5, 3))
    scores = [[losses.attention_scores(q, k), losses.attention_scores(v, v)] for q, k, v in (student, teacher)]
    expected = sum(losses.attention_kl(s, t, mask, reach=1) for s, t in zip(*scores, strict=True))
    torch.testing.assert_close(losses.relation_minilm_v1(student, teacher, mask, reach=1), expected)
    local = losses.relation_minilm_v2(student, teacher, mask, relation_heads=2, reach=1)
    assert local != losses.relation_minilm_v2(student, teacher, mask, relation_heads=2)


TEXT_LOSSES = [
    losses.relation_similarity,
    losses.relation_rkd,
    losses.relation_pkt,
    losses.relation_correlation,
    losses.relation_crd,
]
each_loss = pytest.mark.parametrize("loss", TEXT_LOSSES, ids=lambda loss: loss.__name__)


@each_loss
def test_does_not_see_a_common_scale_or_rotation(loss):
    """The student would have to copy coordinates, which these losses are made to leave free."""
    student, teacher = make_texts(5), make_texts(5, seed=1)
    rotation = torch.linalg.qr(make_texts(HIDDEN, seed=2)).Q
    expected = loss(student, teacher)
    torch.testing.assert_close(loss(3 * student, 0.5 * teacher), expected)
    torch.testing.assert_close(loss(student @ rotation, teacher @ rotation), expected)
    if loss is not losses.relation_crd:  # which compares the student with the teacher directly
        torch.testing.assert_close(loss(student @ rotation, teacher), expected)


@pytest.mark.parametrize("batch", [1, 2, 3])
@each_loss
def test_equal_texts_do_not_divide_by_zero(loss, batch):
    """Duplicates are common in a batch: their distance 0 has a square root without a gradient, and no direction."""
    student = make_texts(1).repeat(batch, 1).requires_grad_()
    loss_value = loss(student, make_texts(batch, seed=1))
    assert loss_value.isfinite()
    assert gradient(loss_value, student).abs().max() < 1e3


@pytest.mark.parametrize("loss", [losses.relation_rkd, losses.relation_pkt], ids=lambda loss: loss.__name__)
def test_two_texts_have_one_distance_and_one_neighbour(loss):
    """A batch of two would teach a distance relative to itself: a constant, with rounding for a gradient."""
    student = make_texts(2).requires_grad_()
    value = loss(student, make_texts(2, seed=1))
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(gradient(value, student), torch.zeros_like(student), atol=1e-6, rtol=0)


def test_rkd_of_a_triangle():
    """The formula on paper: sides 3, 4, 5 (mean 4) beside an equilateral triangle, angles by their cosines."""
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, math.sqrt(3.0)]])
    distances = (0.25**2 / 2 + 0.25**2 / 2) / 3  # 3/4, 4/4, 5/4 against 1
    angles = sum((x - 0.5) ** 2 / 2 for x in (0.0, 0.6, 0.8)) / 3  # cosines against 1/2
    assert losses.relation_rkd(student, teacher).item() == pytest.approx(distances + 2 * angles)
    only_distances = losses.relation_rkd(student, teacher, distance_weight=3.0, angle_weight=0.0)
    assert only_distances.item() == pytest.approx(3 * distances)
    only_angles = losses.relation_rkd(student, teacher, distance_weight=0.0, angle_weight=1.0)
    assert only_angles.item() == pytest.approx(angles)


def test_rkd_counts_no_angle_of_a_text_with_itself():
    """A duplicate has no direction; the angle from one line to the same line would come out wrong, and be taught."""
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, math.sqrt(3.0)]])
    angles = losses.relation_rkd(student, teacher, distance_weight=0.0, angle_weight=1.0)
    assert angles.item() == pytest.approx(0.5**2 / 2)  # cosines 0, 0 and 1 against 1/2


def test_pkt_is_finite_for_opposite_texts():
    """Their kernel is 0, the logarithm of it infinite: one pair of texts would end the run."""
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = losses.relation_pkt(student, make_texts(3))
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


def test_correlation_approximates_the_gaussian():
    """Another series would still be 0 for equal inputs: a kernel in name only."""
    loss = losses.relation_correlation(torch.eye(2), torch.ones(2, 2))
    difference = math.sqrt(2 * loss.item())  # of two of the four kernels: orthogonal texts, equal texts
    assert difference == pytest.approx(1 - math.exp(-0.4 * 2), abs=0.05)


def test_crd_of_perfect_vectors_is_the_floor_of_its_temperature():
    """Without normalisation or temperature the floor is another, and so is the gradient."""
    texts = 7 * torch.eye(4)
    for temperature in (0.25, 1.0):
        floor = losses.relation_crd(texts, texts, temperature=temperature)
        assert floor.item() == pytest.approx(math.log(1 + 3 * math.exp(-1 / temperature)), rel=1e-5)


def test_crd_tells_a_text_from_the_others():
    """A mean over texts that are not matched would reward students that are all alike."""
    teacher = make_texts(6)
    assert losses.relation_crd(teacher, teacher) < losses.relation_crd(teacher.roll(1, 0), teacher)


@pytest.mark.parametrize("temperature", [0.0, -0.1])
def test_crd_refuses_a_temperature_that_is_not_positive(temperature):
    """A negative temperature would push a text away from itself."""
    with pytest.raises(ValueError, match=f"temperature={temperature} must be > 0"):
        losses.relation_crd(make_texts(4), make_texts(4), temperature=temperature)


@each_loss
def test_refuses_states_of_all_tokens(loss):
    """(batch, seq, hidden) would be taken for texts, or multiply in another axis."""
    with pytest.raises(ValueError, match=r"one vector per text"):
        loss(torch.randn(4, 5, 3), torch.randn(4, 5, 3))
