"""What the loss terms share: the checks before the arithmetic, and the divisions that may meet a zero."""

import torch
from torch import Tensor


# Stands for a score that does not exist. Not -inf: a softmax over such scores alone is finite, and drops out later.
LOWEST = torch.finfo(torch.float32).min


def require(condition: bool, message: str) -> None:
    """Raise a `ValueError` with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape as it should be read in a message."""
    return tuple(tensor.shape)


def comparable(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Both in float32, the teacher as a constant, after a check that shapes and mask fit."""
    require(
        student.shape == teacher.shape,
        f"student and teacher cannot be compared: shapes {shape(student)} and {shape(teacher)} differ.",
    )
    if mask is not None:
        require_mask(mask, student)
    return student.float(), teacher.detach().float()


def require_mask(mask: Tensor, tensor: Tensor) -> None:
    """Raise unless the mask fits `(batch, seq, ...)`, or `(batch, heads, seq, ...)` of four dimensions."""
    batch, seq = tensor.shape[0], tensor.shape[2 if tensor.dim() == 4 else 1]
    require(
        mask.shape == (batch, seq),
        f"the mask has shape {shape(mask)}, but tensors of shape {shape(tensor)} need {(batch, seq)}.",
    )


def padding_of(mask: Tensor) -> Tensor | None:
    """Where the padding is, of shape `(batch, seq)`; `None` if there is none, which a CPU sees for free."""
    is_padding = ~mask.bool()
    return is_padding if mask.device.type != "cpu" or is_padding.any() else None


def zeros_in_padding(tensor: Tensor, is_padding: Tensor | None) -> Tensor:
    """A tensor of shape `(batch, seq, ...)`, or `(batch, heads, seq, ...)` of four dimensions, in float32, with zeros
    in the padding, which may hold anything, also inf."""
    tensor = tensor.float()
    if is_padding is None:
        return tensor
    return tensor.masked_fill(is_padding[:, None, :, None] if tensor.dim() == 4 else is_padding[..., None], 0.0)


def denominator(count: Tensor | int, num_items: Tensor | None) -> Tensor:
    """What to divide by: `num_items` where it is given, else the count."""
    # A count divided by the number of processes may lie between 0 and 1: only 0 itself is replaced.
    count = torch.as_tensor(count if num_items is None else num_items)
    return count.masked_fill(count == 0, 1)


def unit(vectors: Tensor) -> Tensor:
    """The vectors (last axis) at length 1; a zero vector stays, with a gradient of ordinary size."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.masked_fill(length == 0, 1.0)
