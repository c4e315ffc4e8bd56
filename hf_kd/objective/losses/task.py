"""The loss against the labels."""

import torch.nn.functional as F
from torch import Tensor

from ._common import denominator, require, shape


def task_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    is_regression: bool = False,
    is_multi_label: bool = False,
    label_smoothing: float = 0.0,
    num_items: Tensor | None = None,
) -> Tensor:
    """Cross-entropy, binary cross-entropy or squared error, where there is a label.

    The value is that of the losses which the models of transformers compute themselves: `CrossEntropyLoss` for
    classes, `BCEWithLogitsLoss` for multi-label classification (mean over rows and classes) and `MSELoss` for
    regression. Those of question answering choose among all positions of the batch, padding too, so that the value
    depends on the width that rows are padded to; pad to one width where it should not.

    Args:
        logits (`torch.Tensor` of shape `(items, classes)`): The student's logits; one class for regression.
        labels (`torch.Tensor` of shape `(items,)`, or `(items, classes)` for multi-label classification):
            Class indices, values, or 0 and 1 for each class; `-100` marks a missing label.
        is_regression (`bool`, *optional*, defaults to `False`): Whether the single logit is a value.
        is_multi_label (`bool`, *optional*, defaults to `False`): Whether each class is a yes-or-no question.
        label_smoothing (`float`, *optional*, defaults to 0.0): Share of probability spread over all classes.
        num_items (`torch.Tensor`, *optional*): Number of labels that are not `-100` to divide by.

    Returns:
        `torch.Tensor`: Scalar, in nats (classification) or squared label units (regression).

    Raises:
        ValueError: If the labels do not fit the logits, a regression has several logits, labels are to be smoothed for
            a multi-label classification, or it is to be a regression as well.
    """
    require(
        not (is_regression and is_multi_label),
        "is_regression=True and is_multi_label=True exclude each other; choose the one that the labels are for.",
    )
    require(
        labels.shape == (logits.shape if is_multi_label else logits.shape[:1]),
        f"labels of shape {shape(labels)} do not fit logits of shape {shape(logits)}; give one label per "
        f"{'row and class' if is_multi_label else 'row'}.",
    )
    is_labeled = labels != -100
    if is_multi_label:
        require(
            label_smoothing == 0.0,
            f"label_smoothing={label_smoothing} spreads a probability over classes that exclude each other, which "
            "those of a multi-label classification do not; set it to 0.",
        )
        error = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
        total = error.masked_fill(~is_labeled, 0.0).sum()
    elif is_regression:
        require(logits.shape[-1] == 1, f"a regression needs one logit, but the logits have shape {shape(logits)}.")
        error = logits.float().squeeze(-1) - labels.float()
        total = error.square().masked_fill(~is_labeled, 0.0).sum()
    else:
        total = F.cross_entropy(logits.float(), labels.long(), reduction="sum", label_smoothing=label_smoothing)
    return total / denominator(is_labeled.sum(), num_items)
