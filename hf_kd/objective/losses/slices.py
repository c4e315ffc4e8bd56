"""Sums over pairs of tokens, a few examples at a time: no map from tokens to tokens outlives its slice.

Autograd would keep every map of a batch for the backward, and read each from memory in a dozen passes. Here the
gradient of a slice is made while its maps are in the cache, as Liger Kernel (https://arxiv.org/abs/2410.10989, section
3.2) does for the cross-entropy of large vocabularies. The results are those of the plain formulas but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import LOWEST


# Numbers of one map of a slice: what the cache of a CPU core holds a few of; on a GPU, enough to fill it.
_CPU_NUMBERS, _GPU_NUMBERS = 2**18, 2**26

# What a slice gives: its sum and, if asked for, the gradient of each of the student's tensors.
_Slice = Callable[[list[Tensor], list[Tensor], bool], tuple[Tensor, list[Tensor]]]


def sum_of_divergences(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    r"""$\sum KL(P^T \| P^S)$ over valid queries and heads, $P = \mathrm{softmax}(x x^\top / \sqrt d)$ over valid keys.

    Args:
        student (`torch.Tensor` of shape `(batch, heads, seq, head_size)`): Vectors in float32, finite in the padding.
        teacher (`torch.Tensor` of shape `(batch, heads, seq, teacher_head_size)`): Vectors in float32, likewise.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.

    Returns:
        `torch.Tensor`: Scalar, in nats.
    """
    return _SumOfSlices.apply(_divergence, student.shape[1] * student.shape[2] ** 2, 1, student, teacher, ~mask.bool())


def sum_of_squared_errors(query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> Tensor:
    r"""$\sum (A^S - A^T)^2$ over all pairs of tokens and heads, $A = q k^\top / \sqrt d$.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, seq, head_size)`): The student's, in float32, zeros in the
            padding, which then adds nothing.
        key (`torch.Tensor` of shape `(batch, heads, seq, head_size)`): The student's, likewise.
        teacher_query (`torch.Tensor` of shape `(batch, heads, seq, teacher_head_size)`): The teacher's, likewise.
        teacher_key (`torch.Tensor` of shape `(batch, heads, seq, teacher_head_size)`): The teacher's, likewise.

    Returns:
        `torch.Tensor`: Scalar, in squared score units.
    """
    numbers = query.shape[1] * query.shape[2] ** 2
    return _SumOfSlices.apply(_squared_error, numbers, 2, query, key, teacher_query, teacher_key)


class _SumOfSlices(torch.autograd.Function):
    """The sum of a function over slices of examples, with the gradient of the first `num_student` tensors."""

    @staticmethod
    def forward(ctx: Any, function: _Slice, numbers_per_example: int, num_student: int, *tensors: Tensor) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad)
        first = tensors[0]
        numbers = _CPU_NUMBERS if first.device.type == "cpu" else _GPU_NUMBERS
        examples = max(numbers // max(numbers_per_example, 1), 1)
        total = first.new_zeros(())
        gradients = [torch.empty_like(x) for x in tensors[:num_student]] if needs_gradient else []
        for start in range(0, len(first), examples):
            pieces = [x[start : start + examples] for x in tensors]
            value, found = function(pieces[:num_student], pieces[num_student:], needs_gradient)
            total += value
            for gradient, of_slice in zip(gradients, found, strict=True):
                gradient[start : start + examples] = of_slice
        ctx.save_for_backward(*gradients)
        ctx.num_constants = len(tensors) - num_student
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *(outputs[0] * x for x in ctx.saved_tensors), *[None] * ctx.num_constants)


def _divergence(student: list[Tensor], constants: list[Tensor], needs_gradient: bool) -> tuple[Tensor, list[Tensor]]:
    (x,), (y, is_padding) = student, constants
    scale = x.shape[-1] ** -0.5
    scores, teacher_scores = (x * scale) @ x.mT, (y * y.shape[-1] ** -0.5) @ y.mT  # (batch, heads, seq, seq)
    for s in (scores, teacher_scores):
        s.masked_fill_(is_padding[:, None, None], LOWEST)
    normalizer, teacher_normalizer = (s.logsumexp(dim=-1, keepdim=True) for s in (scores, teacher_scores))
    difference = teacher_scores - scores
    probabilities = teacher_scores.sub_(teacher_normalizer).exp_()
    # sum P^T (log P^T - log P^S), where the normalisers leave the sum because P^T adds up to 1
    divergence = difference.mul_(probabilities).sum(dim=-1, keepdim=True) - teacher_normalizer + normalizer
    total = divergence.masked_fill_(is_padding[:, None, :, None], 0.0).sum()
    if not needs_gradient:
        return total, []
    gradient = scores.sub_(normalizer).exp_().sub_(probabilities)  # of the scores: P^S - P^T
    gradient.masked_fill_(is_padding[:, None, :, None], 0.0)
    return total, [(gradient @ x + gradient.mT @ x) * scale]


def _squared_error(
    student: list[Tensor], constants: list[Tensor], needs_gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    (query, key), (teacher_query, teacher_key) = student, constants
    scale = query.shape[-1] ** -0.5
    error = (query * scale) @ key.mT  # (batch, heads, seq, seq)
    error -= (teacher_query * teacher_query.shape[-1] ** -0.5) @ teacher_key.mT
    flat = error.flatten()
    total = flat.dot(flat)
    if not needs_gradient:
        return total, []
    return total, [(error @ key) * (2 * scale), (error.mT @ query) * (2 * scale)]
