"""The loss against the labels is the one that the models of transformers compute."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from objective.loss_terms import BATCH, CLASSES, gradient
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

from hf_kd.objective import losses


pytestmark = pytest.mark.one_leg


LABELS = torch.tensor([2, -100, 0, 1])
IS_LABELED = LABELS != -100
VALUES = torch.tensor([0.5, -100.0, -1.5, 4.0])
MULTI_LABELS = torch.tensor([[1.0, 0.0, 1.0], [-100.0, -100.0, -100.0], [0.0, -100.0, 1.0], [0.0, 0.0, 0.0]])


def make_logits(num_labels: int) -> Tensor:
    return torch.randn(BATCH, num_labels, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_is_the_cross_entropy_of_labelled_rows(label_smoothing):
    """Counting unlabelled rows in the mean would shrink the task term by the share of unlabelled text."""
    logits = make_logits(CLASSES)
    loss = losses.task_loss(logits, LABELS, label_smoothing=label_smoothing)
    expected = F.cross_entropy(logits[IS_LABELED], LABELS[IS_LABELED], label_smoothing=label_smoothing)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def test_is_the_squared_error_of_labelled_rows():
    """A value of -100 taken for a rating would drown every other row; and (batch, 1) - (batch,) is (batch, batch)."""
    logits = make_logits(1)
    loss = losses.task_loss(logits, VALUES, is_regression=True)
    expected = F.mse_loss(logits[IS_LABELED, 0], VALUES[IS_LABELED])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def test_is_the_binary_cross_entropy_of_labelled_classes():
    """A class that nobody annotated would be learnt as a no, or its -100 as a target 100 times too far."""
    logits = make_logits(CLASSES)
    loss = losses.task_loss(logits, MULTI_LABELS, is_multi_label=True)
    is_labeled = MULTI_LABELS != -100
    expected = F.binary_cross_entropy_with_logits(logits[is_labeled], MULTI_LABELS[is_labeled])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def test_is_exactly_the_loss_of_transformers():
    """A run with the task term alone would not be the run of `Trainer`, against the drop-in promise."""
    logits, labels, multi_labels = make_logits(CLASSES), torch.tensor([2, 1, 0, 1]), MULTI_LABELS.clamp_min(0.0)
    value = make_logits(1)
    pairs = [
        (losses.task_loss(logits, labels), torch.nn.CrossEntropyLoss()(logits, labels)),
        (
            losses.task_loss(logits, multi_labels, is_multi_label=True),
            torch.nn.BCEWithLogitsLoss()(logits, multi_labels),
        ),
        (losses.task_loss(value, VALUES + 100, is_regression=True), torch.nn.MSELoss()(value[:, 0], VALUES + 100)),
    ]
    for loss, expected in pairs:
        torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)


def test_smooths_labels_as_the_trainer_does():
    """`label_smoothing_factor` would mean one thing in `Trainer` and another here, against the drop-in promise."""
    logits = make_logits(CLASSES)
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, LABELS)
    torch.testing.assert_close(losses.task_loss(logits, LABELS, label_smoothing=0.1), expected)


@pytest.mark.parametrize("form", ["classification", "regression", "multi_label"])
class TestTaskLoss:
    """The properties of the other terms, for the one that compares with labels instead of a teacher."""

    def make(self, form: str) -> tuple[Tensor, Tensor, Callable[..., Tensor]]:
        labels = {"classification": LABELS, "regression": VALUES, "multi_label": MULTI_LABELS}[form]
        logits = make_logits(1 if form == "regression" else CLASSES)
        return logits, labels, partial(losses.task_loss, **({} if labels is LABELS else {f"is_{form}": True}))

    def test_parts_of_a_batch_add_up(self, form):
        """A half with fewer labels would weigh as much as the other."""
        logits, labels, loss = self.make(form)
        num_items = (labels != -100).sum()
        parts = [loss(logits[rows], labels[rows], num_items=num_items) for rows in (slice(2), slice(2, None))]
        torch.testing.assert_close(sum(parts), loss(logits, labels))

    @pytest.mark.parametrize("num_items", [None, torch.tensor(0)], ids=["counted", "num_items=0"])
    def test_nothing_labelled_gives_zero(self, form, num_items):
        """A batch of unlabelled text, the common case with augmentation, would give NaN."""
        logits, labels, loss = self.make(form)
        value = loss(logits, torch.full_like(labels, -100), num_items=num_items)
        assert value == 0.0
        assert torch.equal(gradient(value, logits), torch.zeros_like(logits))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_finite_at_extreme_logits(self, form, dtype):
        """Half precision without an upcast overflows in the exponential or the square."""
        logits, labels, loss = self.make(form)
        logits = (1e4 * logits.detach().sign()).to(dtype).requires_grad_()
        value = loss(logits, labels)
        assert value.isfinite() and value.dtype == torch.float32
        assert gradient(value, logits).isfinite().all()

    def test_refuses_labels_that_do_not_fit(self, form):
        """Labels of one row too few would be matched with the wrong rows, or broadcast."""
        logits, labels, loss = self.make(form)
        with pytest.raises(ValueError, match=rf"labels of shape \(3.*\({BATCH}, .*one label per row"):
            loss(logits, labels[:3])


def test_refuses_regression_on_several_logits():
    """The labels would broadcast over the logits, and each would learn the same value."""
    with pytest.raises(ValueError, match=r"one logit.*\(4, 3\)"):
        losses.task_loss(make_logits(CLASSES), VALUES, is_regression=True)


def test_refuses_class_indices_for_multi_label():
    """Indices would broadcast to one target per class and row: 2 as a target, for every class."""
    with pytest.raises(ValueError, match=r"\(4,\) do not fit.*\(4, 3\); give one label per row and class"):
        losses.task_loss(make_logits(CLASSES), LABELS, is_multi_label=True)


def test_refuses_to_smooth_multi_labels():
    """The setting would be read and do nothing."""
    with pytest.raises(ValueError, match="label_smoothing=0.1.*set it to 0"):
        losses.task_loss(make_logits(CLASSES), MULTI_LABELS, is_multi_label=True, label_smoothing=0.1)


def test_refuses_two_forms_at_once():
    """One of the two would win without a word."""
    with pytest.raises(ValueError, match="exclude each other"):
        losses.task_loss(make_logits(1), VALUES, is_regression=True, is_multi_label=True)
