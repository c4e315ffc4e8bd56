"""What a model said about one batch, and how many items the batch holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass
class Signals:
    """The tensors of one forward that a loss can compare.

    Attributes:
        logits (`torch.Tensor` of shape `(batch, num_labels)`): Scores before the softmax.
        attention_mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.
        hidden (`dict[int, torch.Tensor]`): Layer to hidden states of shape `(batch, seq, hidden)`.
        queries (`dict[int, torch.Tensor]`): Layer to query vectors of shape `(batch, heads, seq, head_size)`.
        keys (`dict[int, torch.Tensor]`): Layer to key vectors of shape `(batch, heads, seq, head_size)`.
    """

    logits: Tensor
    attention_mask: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)


class ItemCounts(NamedTuple):
    """Number of valid items that the loss terms are averaged over, each a scalar tensor."""

    examples: Tensor
    labeled_examples: Tensor
    tokens: Tensor
    token_pairs: Tensor


def attention_mask_of(inputs: Mapping[str, Any]) -> Tensor:
    """The attention mask of a batch; without one every position counts, as it does for the model."""
    if inputs.get("attention_mask") is not None:
        return inputs["attention_mask"]
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
    return torch.ones_like(tokens, dtype=torch.long)


def count_items(inputs: Mapping[str, Any]) -> ItemCounts:
    """Count the valid items of a batch, before any clamping.

    Args:
        inputs (`Mapping[str, Any]`):
            A batch with `input_ids` of shape `(batch, seq)`, `attention_mask` and, if it has any, `labels` of shape
            `(batch,)` in which -100 marks a row without a label.
    """
    lengths = attention_mask_of(inputs).sum(dim=-1)  # (batch,)
    labels = inputs.get("labels")
    return ItemCounts(
        examples=lengths.new_full((), len(lengths)),
        labeled_examples=lengths.new_zeros(()) if labels is None else (labels != -100).sum(),
        tokens=lengths.sum(),
        token_pairs=lengths.square().sum(),
    )
