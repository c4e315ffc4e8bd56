"""Terms between the student's and the teacher's hidden states."""

import torch
from torch import Tensor

from ._common import comparable, denominator, padding_of, require, require_mask, shape, unit, zeros_in_padding


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, num_items: Tensor | None = None) -> Tensor:
    r"""Squared error between hidden states: $\sum_{bl} m_{bl} \|h^S_{bl} - h^T_{bl}\|^2 / (d \sum_{bl} m_{bl})$.

    TinyBERT (Jiao et al. 2020, https://arxiv.org/abs/1909.10351, equation 8), on valid positions only.

    Args:
        student (`torch.Tensor` of shape `(batch, seq, hidden)`): The student's states, projected to the teacher's
            width.
        teacher (`torch.Tensor` of shape `(batch, seq, hidden)`): The teacher's states.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.
        num_items (`torch.Tensor`, *optional*): Number of tokens to divide by.

    Returns:
        `torch.Tensor`: Scalar, in squared activation units.

    Raises:
        ValueError: If the shapes differ or the mask does not fit.
    """
    student, teacher = comparable(student, teacher, mask)
    # Norms take one pass over memory forward and one backward, and the squares of all numbers twice as many.
    norms = torch.linalg.vector_norm(_tokens(student - teacher, mask), dim=-1)  # (batch, seq)
    return norms.square().sum() / student.shape[-1] / denominator(mask.sum(), num_items)


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor, *, num_items: Tensor | None = None) -> Tensor:
    r"""Mean over valid tokens of $1 - \cos(h^S, h^T)$.

    DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108, section 2). Arguments and errors are those of
    [`hidden_mse`].

    Returns:
        `torch.Tensor`: Scalar between 0 and 2.
    """
    student, teacher = comparable(student, teacher, mask)
    cosine = (unit(_tokens(student, mask)) * unit(_tokens(teacher, mask))).sum(dim=-1)  # (batch, seq)
    return (1.0 - cosine).masked_fill(~mask.bool(), 0.0).sum() / denominator(mask.sum(), num_items)


def hidden_pkd(student: Tensor, teacher: Tensor, mask: Tensor, *, num_items: Tensor | None = None) -> Tensor:
    r"""Squared distance of normalised [CLS] states: $\| h^S / \|h^S\| - h^T / \|h^T\| \|^2$, mean over examples.

    Patient knowledge distillation (Sun et al. 2019, https://arxiv.org/abs/1908.09355, section 3.2). [CLS] is taken to
    be the first valid token, see [`first_token`]; an example without one takes no part.

    Args:
        student (`torch.Tensor` of shape `(batch, seq, hidden)`): The student's states, projected to the teacher's
            width.
        teacher (`torch.Tensor` of shape `(batch, seq, hidden)`): The teacher's states.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.
        num_items (`torch.Tensor`, *optional*): Number of examples to divide by.

    Returns:
        `torch.Tensor`: Scalar between 0 and 4.

    Raises:
        ValueError: If the shapes differ or the mask does not fit.
    """
    student, teacher = comparable(student, teacher, mask)
    error = unit(first_token(student, mask)) - unit(first_token(teacher, mask))
    return error.square().sum() / denominator(mask.any(dim=1).sum(), num_items)


def hidden_gram(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    mask: Tensor,
    *,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""Squared error between the flows from one layer to another: $G = X_1^\top X_2 / n_b$, mean over its $d \times d$
    entries and over examples.

    $X$ holds the states of the $n_b$ valid tokens of an example in its rows, so $G$ says which features of the two
    layers go together (FSP, Yim et al. 2017, "A Gift from Knowledge Distillation", CVPR, section 3). An example
    without a valid token takes no part.

    Args:
        student (pair of `torch.Tensor` of shape `(batch, seq, hidden)`):
            The student's states in two layers, projected to the teacher's width.
        teacher (pair of `torch.Tensor` of shape `(batch, seq, hidden)`): The teacher's states in two layers.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.
        num_items (`torch.Tensor`, *optional*): Number of examples to divide by.

    Returns:
        `torch.Tensor`: Scalar, in activation units to the fourth power.

    Raises:
        ValueError: If the shapes differ or the mask does not fit.
    """
    pairs = [comparable(s, t, mask) for s, t in zip(student, teacher, strict=True)]
    length = mask.bool().sum(dim=1).clamp_min(1)[:, None, None]
    flow_student, flow_teacher = (
        _tokens(first, mask).transpose(1, 2) @ _tokens(second, mask) / length
        for first, second in zip(*pairs, strict=True)
    )  # (batch, hidden, hidden)
    error = (flow_student - flow_teacher).square().mean(dim=(1, 2))
    return error.sum() / denominator(mask.any(dim=1).sum(), num_items)


def hidden_nst(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    mask: Tensor,
    *,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""Squared error between similarities of tokens in two layers, $X_1 X_2^\top / d$, mean over valid pairs.

    Each side is divided by its own $d$, so the widths may differ (after NST with a polynomial kernel, Huang & Wang
    2017, https://arxiv.org/abs/1707.01219).

    Args:
        student (pair of `torch.Tensor` of shape `(batch, seq, student_hidden)`): The student's states in two layers.
        teacher (pair of `torch.Tensor` of shape `(batch, seq, teacher_hidden)`): The teacher's states in two layers.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.
        num_items (`torch.Tensor`, *optional*): Number of (query, key) pairs to divide by.

    Returns:
        `torch.Tensor`: Scalar, in activation units to the fourth power.

    Raises:
        ValueError: If the batches or lengths differ, or the mask does not fit.
    """
    for s, t in zip(student, teacher, strict=True):
        require(
            s.dim() == t.dim() == 3 and s.shape[:2] == t.shape[:2],
            f"student and teacher cannot be compared: shapes {shape(s)} and {shape(t)} differ in batch or length; "
            "give both as (batch, seq, hidden).",
        )
        require_mask(mask, s)
    similarity_student, similarity_teacher = (
        _tokens(first, mask) @ _tokens(second, mask).transpose(1, 2) / first.shape[-1]
        for first, second in (student, [x.detach() for x in teacher])
    )  # (batch, seq, seq), 0 outside of valid pairs
    error = (similarity_student - similarity_teacher).square()
    return error.sum() / denominator(mask.bool().sum(dim=1).square().sum(), num_items)


def first_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The state of each row's first valid token, the [CLS] of a BERT-style encoder, also where padding is on the left.

    Args:
        hidden (`torch.Tensor` of shape `(batch, seq, hidden)`): Hidden states.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.

    Returns:
        `torch.Tensor` of shape `(batch, hidden)`: The states; zeros for a row without a valid token.

    Raises:
        ValueError: If the mask does not fit.
    """
    require_mask(mask, hidden)
    first = mask.long().argmax(dim=1)  # the first of the largest
    states = hidden[torch.arange(len(hidden), device=hidden.device), first]
    return states.masked_fill(~mask.bool().any(dim=1, keepdim=True), 0.0)


def _tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """The states in float32, zeros in the padding: inf there would reach every gradient through the product."""
    return zeros_in_padding(hidden, padding_of(mask))
