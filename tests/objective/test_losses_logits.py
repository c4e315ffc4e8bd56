"""What single losses between logits promise beyond the properties of all."""

import pytest
import torch
import torch.nn.functional as F
from objective.loss_terms import BATCH, CLASSES, SHAPES, TARGETS, gradient
from torch import Tensor

from hf_kd.objective import losses


pytestmark = pytest.mark.one_leg


TARGET = torch.tensor(TARGETS)


def decoupled(student: Tensor, teacher: Tensor, **kwargs) -> Tensor:
    return losses.logit_decoupled_kl(student, teacher, TARGET, **kwargs)


DIVERGENCES = [
    losses.logit_kl,
    losses.logit_soft_ce,
    losses.logit_reverse_kl,
    losses.logit_js,
    losses.logit_standardized_kl,
    decoupled,
]
SOFTMAXES = [*DIVERGENCES, losses.logit_dist]


def each(functions: list) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("loss", functions, ids=lambda function: function.__name__)


def make_pair(kind: str = "logits", scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(SHAPES[kind], generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


@each(SOFTMAXES)
def test_refuses_a_softmax_over_one_logit(loss):
    """Regression would be distilled with loss 0 and gradient 0: a run that looks converged at its first step."""
    with pytest.raises(ValueError, match=r"\(4, 1\) have one class.*logit_loss_type='mse'"):
        loss(torch.randn(4, 1), torch.randn(4, 1))


def test_mse_distils_one_logit():
    """The refusal above would leave regression without any logit term."""
    loss = losses.logit_mse(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]]))
    assert loss.item() == pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
@each(SOFTMAXES)
def test_refuses_a_temperature_that_is_not_positive(loss, temperature):
    """0 gives NaN; a negative temperature turns the teacher's ranking around without a word."""
    with pytest.raises(ValueError, match=f"temperature={temperature} must be > 0"):
        loss(torch.randn(4, 3), torch.randn(4, 3), temperature=temperature)


@each(SOFTMAXES)
def test_gradient_size_does_not_depend_on_the_temperature(loss):
    """Without tau^2 a warmer teacher is a weaker one: at tau=8 the term would all but vanish beside the task's."""
    # Standardized logits are not small; they are once the temperature is high.
    scale = 8.0 if loss is losses.logit_standardized_kl else 1.0
    norms = []
    for temperature in (1.0, 2.0, 4.0, 8.0):
        student, teacher = make_pair(scale=0.1)
        norms.append(gradient(loss(student, teacher, temperature=scale * temperature), student).norm().item())
    assert norms == pytest.approx([norms[0]] * 4, rel=0.1)


def test_soft_ce_has_the_gradient_of_kl():
    """The choice between the two would change the trained weights, not just the logged value."""
    gradients = []
    for loss in (losses.logit_kl, losses.logit_soft_ce):
        student, teacher = make_pair()
        gradients.append(gradient(loss(student, teacher, temperature=2.0), student))
    torch.testing.assert_close(*gradients)


def test_kl_is_the_one_of_torch():
    """The reduction of `F.kl_div` that is a mean over examples is `batchmean`; `mean` is too small by the classes."""
    student, teacher = make_pair()
    expected = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(losses.logit_kl(student, teacher), expected)
    torch.testing.assert_close(losses.logit_reverse_kl(teacher, student.detach()), expected)


@each([*DIVERGENCES, losses.logit_mse])
def test_a_class_mask_of_ones_changes_nothing(loss):
    """Question answering without padding would be trained on another loss than with it."""
    student, teacher = make_pair()
    masked = loss(student, teacher, class_mask=torch.ones(BATCH, CLASSES, dtype=torch.bool))
    torch.testing.assert_close(masked, loss(student, teacher), atol=0, rtol=1e-6)


@each([*DIVERGENCES, losses.logit_mse])
def test_a_class_mask_may_have_holes(loss):
    """The question, before the context in the same sequence, would have to be the answer's place too."""
    student, teacher = make_pair("positions")
    rows = [0, 3, 0, 3]  # the longest
    student, teacher = student.detach()[rows], teacher[rows]
    class_mask = torch.tensor([1, 0, 1, 1, 0]).bool().repeat(BATCH, 1)
    arguments = {"target": torch.full((BATCH,), 2)} if loss is decoupled else {}
    loss = losses.logit_decoupled_kl if loss is decoupled else loss
    expected = loss(student[:, [0, 2, 3]], teacher[:, [0, 2, 3]], **{k: v - 1 for k, v in arguments.items()})
    student[:, 1], teacher[:, 4] = float("inf"), float("nan")
    torch.testing.assert_close(loss(student, teacher, class_mask=class_mask, **arguments), expected)


@each([*DIVERGENCES, losses.logit_mse])
def test_refuses_a_class_mask_of_another_shape(loss):
    """One mask for all rows would broadcast, and every row have the classes of the first."""
    with pytest.raises(ValueError, match=r"class mask has shape \(3,\), but the logits have \(4, 3\)"):
        loss(torch.randn(4, 3), torch.randn(4, 3), class_mask=torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, 2.0])
def test_js_refuses_a_share_outside_of_zero_and_one(beta):
    """At 0 and 1 the mixture is one of the two: loss and gradient 0, and nothing is learnt."""
    with pytest.raises(ValueError, match=f"beta={beta} must be between 0 and 1"):
        losses.logit_js(torch.randn(4, 3), torch.randn(4, 3), beta=beta)


def test_js_lies_between_the_two_directions():
    """With beta swapped, the setting of the paper would give the opposite behaviour."""
    student, teacher = make_pair()
    forward = losses.logit_js(student, teacher, beta=1e-3) / 1e-3
    assert forward.item() == pytest.approx(losses.logit_kl(student, teacher).item(), rel=0.02)
    reverse = losses.logit_js(student, teacher, beta=1 - 1e-3) / 1e-3
    assert reverse.item() == pytest.approx(losses.logit_reverse_kl(student, teacher).item(), rel=0.02)


def test_js_is_symmetric_and_bounded_by_ln_2():
    """Two disjoint distributions have the divergence ln 2, the value that every text gives."""
    student, teacher = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    torch.testing.assert_close(losses.logit_js(student, teacher), torch.tensor(2.0).log())
    torch.testing.assert_close(losses.logit_js(teacher, student), torch.tensor(2.0).log())


def test_decoupled_kl_is_kl_with_the_weights_of_kl():
    """The parts would not be those of the paper: equation 6 says what their sum is."""
    student, teacher = make_pair()
    p_target = teacher.softmax(dim=-1)[torch.arange(BATCH), TARGET]
    rows = [
        losses.logit_decoupled_kl(
            student[[b]], teacher[[b]], TARGET[[b]], target_weight=1.0, non_target_weight=1.0 - p_target[b].item()
        )
        for b in range(BATCH)
    ]
    torch.testing.assert_close(torch.stack(rows).mean(), losses.logit_kl(student, teacher))


@pytest.mark.parametrize("part", ["target_weight", "non_target_weight"])
def test_decoupled_kl_weighs_each_part(part):
    """A weight that both parts shared, or none, would make the term a rescaled `kl`."""
    student, teacher = make_pair()
    off = {"target_weight": 0.0, "non_target_weight": 0.0}
    one, three = (decoupled(student, teacher, **{**off, part: weight}) for weight in (1.0, 3.0))
    assert one > 0
    torch.testing.assert_close(three, 3 * one)


def test_decoupled_kl_leaves_unlabelled_rows_out():
    """-100 would be the class 100 from the end, or count in the mean."""
    student, teacher = make_pair()
    target = torch.tensor([2, -100, 0, -100])
    loss = losses.logit_decoupled_kl(student, teacher, target)
    expected = losses.logit_decoupled_kl(student[[0, 2]], teacher[[0, 2]], target[[0, 2]])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, student), gradient(expected, student))
    nothing = losses.logit_decoupled_kl(student, teacher, torch.full((BATCH,), -100))
    assert nothing == 0.0
    assert torch.equal(gradient(nothing, student), torch.zeros_like(student))


def test_decoupled_kl_refuses_targets_that_do_not_fit():
    """One target for all rows would broadcast."""
    with pytest.raises(ValueError, match=r"targets of shape \(1,\) do not fit logits of shape \(4, 3\)"):
        losses.logit_decoupled_kl(torch.randn(4, 3), torch.randn(4, 3), torch.tensor([1]))


def test_standardized_kl_sees_neither_scale_nor_offset():
    """The student would be pulled to the teacher's confidence, which this form exists to leave out."""
    student, teacher = make_pair()
    loss = losses.logit_standardized_kl(student, teacher)
    torch.testing.assert_close(losses.logit_standardized_kl(5 * student + 3, 0.5 * teacher - 7), loss)
    assert losses.logit_standardized_kl(3 * teacher + 1, teacher).item() == pytest.approx(0.0, abs=1e-6)


def test_dist_sees_neither_scale_nor_offset_of_probabilities():
    """A distance in place of a correlation would punish a student of another confidence."""
    teacher = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    student = 0.5 * teacher + 0.5 / 3
    assert losses.logit_dist(student.log(), teacher.log()).item() == pytest.approx(0.0, abs=1e-6)


def test_dist_of_one_row_is_its_first_part():
    """The second part needs rows to compare: its 0 / 0 would be NaN, or 1 for nothing."""
    student, teacher = make_pair()
    p, q = student[:1].softmax(-1), teacher[:1].softmax(-1)
    expected = 1 - torch.corrcoef(torch.cat([p, q]))[0, 1]
    torch.testing.assert_close(losses.logit_dist(student[:1], teacher[:1]), expected)
