"""Terms between the student's and the teacher's attention maps."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import LOWEST, comparable, denominator, require, require_mask, shape
from .slices import sum_of_squared_errors


HeadReduction = Literal["mean"]


def attention_scores(query: Tensor, key: Tensor) -> Tensor:
    r"""Pre-softmax attention scores $A = q k^T / \sqrt{d_{head}}$ of shape `(batch, heads, seq, seq)`, in float32.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, seq, head_size)`): Query vectors.
        key (`torch.Tensor` of shape `(batch, heads, seq, head_size)`): Key vectors.
    """
    return query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5


def attention_vectors_mse(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor, *, num_items: Tensor | None = None
) -> Tensor:
    """[`attention_mse`] of the scores of these vectors, in a fraction of the memory: no map of scores is kept.

    Args:
        student (tuple of two `torch.Tensor` of shape `(batch, heads, seq, head_size)`): Queries and keys of the
            student.
        teacher (tuple of two `torch.Tensor` of shape `(batch, heads, seq, teacher_head_size)`): The teacher's.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.
        num_items (`torch.Tensor`, *optional*): Number of (query, key) pairs to divide by.

    Returns:
        `torch.Tensor`: Scalar, in squared score units.

    Raises:
        ValueError: If batch, heads or length differ, or the mask does not fit.
    """
    query, teacher_query = student[0], teacher[0]
    require(
        query.shape[1] == teacher_query.shape[1],
        f"the student has {query.shape[1]} attention heads and the teacher {teacher_query.shape[1]}, which cannot be "
        "compared one by one; use relation_loss_type='minilm_v2'.",
    )
    require(
        query.shape[:3] == teacher_query.shape[:3],
        f"student and teacher cannot be compared: shapes {shape(query)} and {shape(teacher_query)} differ in batch or "
        "length.",
    )
    require_mask(mask, query)
    count = query.shape[1] * denominator(mask.sum(dim=1).square().sum(), num_items)
    return sum_of_squared_errors(student, teacher, mask) / count


def attention_mse(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    head_reduction: HeadReduction | None = None,
    reach: int | None = None,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""Squared error between pre-softmax attention scores, mean over heads and over valid (query, key) pairs.

    TinyBERT (Jiao et al. 2020, https://arxiv.org/abs/1909.10351, equation 7), whose code counted the padding in the
    mean; here $\sum_b m_{bi} m_{bj} (A^S - A^T)^2 / (H \sum_b n_b^2)$.

    Args:
        student (`torch.Tensor` of shape `(batch, heads, seq, seq)`): The student's scores, see [`attention_scores`].
        teacher (`torch.Tensor` of shape `(batch, heads, seq, seq)`): The teacher's scores.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding, which is on one side of the tokens.
        head_reduction (`str`, *optional*):
            `"mean"` compares the mean over heads (of the scores here, of the distributions in the other terms), so
            that the head counts may differ. By default heads are compared one by one.
        reach (`int`, *optional*):
            Number of tokens that a layer with local attention looks to either side; pairs further apart do not exist.
            The error is then a mean over the keys in a query's reach first and over queries after, because the pairs
            of a whole optimisation step are counted without regard to single layers.
        num_items (`torch.Tensor`, *optional*):
            Number of (query, key) pairs to divide by; with `reach`, number of queries, that is tokens.

    Returns:
        `torch.Tensor`: Scalar, in squared score units.

    Raises:
        ValueError: If the shapes differ, which includes different head counts without a `head_reduction`, the mask
            does not fit, or `reach` is not positive.
    """
    student, teacher = _comparable_heads(student, teacher, mask, head_reduction)
    is_pair = _pairs(mask, reach)
    if head_reduction == "mean":
        student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
    error = (student - teacher).masked_fill(~is_pair, 0.0).square().mean(dim=1)  # (batch, seq, seq)
    if reach is None:
        return error.sum() / denominator(is_pair.sum(), num_items)
    keys = is_pair[:, 0].sum(dim=-1).clamp_min(1)
    return (error.sum(dim=-1) / keys).sum() / denominator(mask.sum(), num_items)


def attention_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    head_reduction: HeadReduction | None = None,
    reach: int | None = None,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""Divergence of attention: mean over valid queries and heads of $KL(P^T \| P^S)$, $P$ the softmax over valid
    keys.

    MiniLM (Wang et al. 2020, https://arxiv.org/abs/2002.10957, equation 5). Arguments and errors are those of
    [`attention_mse`], but `num_items` always counts queries, that is tokens.

    Returns:
        `torch.Tensor`: Scalar, in nats.
    """
    log_student, log_teacher, is_pair = _log_attention_pair(student, teacher, mask, head_reduction, reach)
    divergence = log_teacher.exp() * (log_teacher - log_student)
    return divergence.masked_fill(~is_pair, 0.0).mean(dim=1).sum() / denominator(mask.sum(), num_items)


def attention_cosine(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    head_reduction: HeadReduction | None = None,
    reach: int | None = None,
    num_items: Tensor | None = None,
) -> Tensor:
    r"""Mean over valid queries and heads of $1 - \cos(P^S, P^T)$, $P$ the softmax over valid keys.

    Looks at where most of the attention goes; unlike [`attention_kl`] it hardly sees the keys with little of it.
    Arguments and errors are those of [`attention_mse`], but `num_items` always counts queries, that is tokens.

    Returns:
        `torch.Tensor`: Scalar between 0 and 1.
    """
    log_student, log_teacher, _ = _log_attention_pair(student, teacher, mask, head_reduction, reach)
    distance = 1.0 - F.cosine_similarity(log_student.exp(), log_teacher.exp(), dim=-1)  # (batch, heads, seq)
    distance = distance.masked_fill(~mask.bool()[:, None], 0.0)
    return distance.mean(dim=1).sum() / denominator(mask.sum(), num_items)


def _log_attention_pair(
    student: Tensor, teacher: Tensor, mask: Tensor, head_reduction: HeadReduction | None, reach: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of both distributions, and the pairs that exist. Rows of padded queries are finite, whatever they
    hold, and have no gradient."""
    student, teacher = _comparable_heads(student, teacher, mask, head_reduction)
    is_pair = _pairs(mask, reach)
    log_student, log_teacher = (x.masked_fill(~is_pair, LOWEST).log_softmax(dim=-1) for x in (student, teacher))
    if head_reduction == "mean":
        log_student, log_teacher = (
            x.logsumexp(dim=1, keepdim=True) - math.log(x.shape[1]) for x in (log_student, log_teacher)
        )
    return log_student, log_teacher, is_pair


def _pairs(mask: Tensor, reach: int | None) -> Tensor:
    """Which (query, key) pairs exist, of shape `(batch, 1, seq, seq)`."""
    mask = mask.bool()
    is_pair = mask[:, None, :, None] & mask[:, None, None, :]
    if reach is None:
        return is_pair
    require(reach >= 1, f"reach={reach} must be at least 1: a query that sees itself alone has nothing to learn.")
    position = torch.arange(mask.shape[1], device=mask.device)
    return is_pair & ((position[:, None] - position).abs() <= reach)


def _comparable_heads(
    student: Tensor, teacher: Tensor, mask: Tensor, head_reduction: HeadReduction | None
) -> tuple[Tensor, Tensor]:
    require(head_reduction in (None, "mean"), f"head_reduction={head_reduction!r} must be 'mean' or None.")
    same_but_heads = (
        student.dim() == teacher.dim() == 4
        and student.shape[0] == teacher.shape[0]
        and student.shape[2:] == teacher.shape[2:]
    )
    if not same_but_heads or student.shape[1] == teacher.shape[1]:
        return comparable(student, teacher, mask)
    require(
        head_reduction == "mean",
        f"student and teacher cannot be compared head by head: shapes {shape(student)} and {shape(teacher)} differ in "
        "their number of heads. Use relation_loss, which needs no equal head counts, or compare the mean over heads "
        "with head_reduction='mean'.",
    )
    require_mask(mask, student)
    return student.float(), teacher.detach().float()
