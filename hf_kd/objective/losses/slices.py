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

from ._common import LOWEST, padding_of, zeros_in_padding


# Numbers of one map of a slice: what the cache of a CPU core holds a few of; on a GPU, enough to fill it.
_CPU_NUMBERS, _GPU_NUMBERS = 2**19, 2**26

# What a slice gives, of the student's tensors, the constants and the padding, if there is any: its sum and, if asked
# for, the gradient of each of the student's tensors.
_Slice = Callable[[list[Tensor], list[Tensor], Tensor | None, bool], tuple[Tensor, list[Tensor]]]


def sum_of_divergences(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    r"""$\sum KL(P^T \| P^S)$ over valid queries and heads, $P = \mathrm{softmax}(x x^\top / \sqrt d)$ over valid keys.

    Args:
        student (`torch.Tensor` of shape `(batch, heads, seq, head_size)`): The student's vectors.
        teacher (`torch.Tensor` of shape `(batch, heads, seq, teacher_head_size)`): The teacher's vectors.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.

    Returns:
        `torch.Tensor`: Scalar in float32, in nats.
    """
    return _SumOfSlices.apply(_divergence, 1, mask, student, teacher)


def sum_of_squared_errors(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    r"""$\sum (A^S - A^T)^2$ over all pairs of valid tokens and heads, $A = q k^\top / \sqrt d$.

    Args:
        student (tuple of two `torch.Tensor` of shape `(batch, heads, seq, head_size)`): Queries and keys of the
            student.
        teacher (tuple of two `torch.Tensor` of shape `(batch, heads, seq, teacher_head_size)`): The teacher's.
        mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.

    Returns:
        `torch.Tensor`: Scalar in float32, in squared score units.
    """
    return _SumOfSlices.apply(_squared_error, 2, mask, *student, *teacher)


class _SumOfSlices(torch.autograd.Function):
    """The sum of a function over slices of examples, with the gradient of the first `num_student` tensors.

    The function is given float32 and zeros in the padding: inf there would reach every gradient through the product.
    """

    @staticmethod
    def forward(ctx: Any, function: _Slice, num_student: int, mask: Tensor, *tensors: Tensor) -> Tensor:
        with torch.autocast(mask.device.type, enabled=False):
            return _SumOfSlices._sum(ctx, function, num_student, mask, *tensors)

    @staticmethod
    def _sum(ctx: Any, function: _Slice, num_student: int, mask: Tensor, *tensors: Tensor) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad)
        batch, heads, seq, _ = tensors[0].shape
        numbers = _CPU_NUMBERS if mask.device.type == "cpu" else _GPU_NUMBERS
        examples = max(numbers // max(heads * seq**2, 1), 1)
        total = torch.zeros((), dtype=torch.float32, device=mask.device)
        gradients = [torch.empty_like(x, dtype=torch.float32) for x in tensors[:num_student] if needs_gradient]
        for start in range(0, batch if seq else 0, examples):
            part = slice(start, start + examples)
            is_padding = padding_of(mask[part])
            pieces = [zeros_in_padding(x[part], is_padding).contiguous() for x in tensors]
            value, found = function(pieces[:num_student], pieces[num_student:], is_padding, needs_gradient)
            total += value
            for gradient, of_slice in zip(gradients, found, strict=True):
                gradient[part] = of_slice
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x.dtype for x in tensors[:num_student]]
        ctx.num_constants = len(tensors) - num_student
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [(outputs[0] * x).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (None, None, None, *gradients, *[None] * ctx.num_constants)


def _divergence(
    student: list[Tensor], constants: list[Tensor], is_padding: Tensor | None, needs_gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    # Padded queries add nothing: as vectors of zeros they have the same distribution on both sides.
    (x,), (y,) = student, constants
    scale = x.shape[-1] ** -0.5
    scores, teacher_scores = (x * scale) @ x.mT, (y * y.shape[-1] ** -0.5) @ y.mT  # (batch, heads, seq, seq)
    if is_padding is not None:
        # Added, and not filled in: ten times as fast on a CPU.
        lowest = torch.zeros_like(is_padding, dtype=x.dtype).masked_fill_(is_padding, LOWEST)[:, None, None]
        scores, teacher_scores = scores.add_(lowest), teacher_scores.add_(lowest)
    # sum P^T (log P^T - log P^S), where the normalizers leave the sum because P^T adds up to 1; three maps at a time
    teacher_probabilities, teacher_normalizer = _softmax(teacher_scores)
    difference = teacher_scores.sub_(scores).mul_(teacher_probabilities).sum(dim=-1)
    del teacher_scores
    probabilities, normalizer = _softmax(scores)
    del scores
    total = (difference - teacher_normalizer + normalizer).sum()
    if not needs_gradient:
        return total, []
    gradient = probabilities.sub_(teacher_probabilities)  # of the scores
    return total, [((gradient + gradient.mT) @ x) * scale]


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The distributions, and the logarithms of their normalizers: by the largest entry, not by another pass of exp."""
    probabilities = scores.softmax(dim=-1)
    return probabilities, scores.amax(dim=-1) - probabilities.amax(dim=-1).log()


def _squared_error(
    student: list[Tensor], constants: list[Tensor], is_padding: Tensor | None, needs_gradient: bool
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
