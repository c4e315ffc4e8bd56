"""What a model said about one batch, and how many items the batch holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import ProblemType


# Columns of a batch that say what is right.
LABEL_COLUMNS = ("labels", "start_positions", "end_positions")
# Marks a batch whose one row belongs to another process: it is there for the model alone.
NO_OWN_ROWS = "no_own_rows"


@dataclass
class Signals:
    """The tensors of one forward that a loss can compare.

    Attributes:
        logits (`torch.Tensor`): Scores before the softmax, of shape `(batch, num_labels)`; `(batch, seq, num_labels)`
            or `(batch, seq, vocabulary)` for tokens, `(batch, 2, seq)` for the start and end of answers.
        attention_mask (`torch.Tensor` of shape `(batch, seq)`): 1 for tokens, 0 for padding.
        hidden (`dict[int, torch.Tensor]`): Layer to hidden states of shape `(batch, seq, hidden)`.
        queries (`dict[int, torch.Tensor]`): Layer to query vectors of shape `(batch, heads, seq, head_size)`.
        keys (`dict[int, torch.Tensor]`): Layer to key vectors of shape `(batch, heads, seq, head_size)`.
        values (`dict[int, torch.Tensor]`): Layer to value vectors of shape `(batch, heads, seq, head_size)`.
        attention_reach (`dict[int, int]`): Layer to the number of tokens that it looks to either side; layers that
            are not in it look everywhere.
    """

    logits: Tensor
    attention_mask: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    attention_reach: dict[int, int] = field(default_factory=dict)


class ItemCounts(NamedTuple):
    """Number of valid items that the loss terms are averaged over, each a scalar tensor.

    Attributes:
        examples: Rows of the batch.
        predictions: Softmaxes that teacher and student are compared by: one per row, per valid token, or two (start
            and end) per row.
        labels: Labels that are there: one per row, class of a row, token, or start and end.
        tokens: Positions that are not padding.
        token_pairs: Pairs of such positions in a row.
    """

    examples: Tensor
    predictions: Tensor
    labels: Tensor
    tokens: Tensor
    token_pairs: Tensor


def has_own_rows(inputs: Mapping[str, Any]) -> bool:
    """Whether the rows of a batch count, see `NO_OWN_ROWS`."""
    return NO_OWN_ROWS not in inputs


def attention_mask_of(inputs: Mapping[str, Any]) -> Tensor:
    """The attention mask of a batch; without one every position counts, as it does for the model."""
    if inputs.get("attention_mask") is not None:
        return inputs["attention_mask"]
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
    return torch.ones_like(tokens, dtype=torch.long)


def labels_of(inputs: Mapping[str, Any], problem: ProblemType) -> Tensor | None:
    """The labels of a batch as one tensor, -100 where there is none; `None` for a batch without labels.

    For question answering they are `start_positions` and `end_positions`, of shape `(batch, 2)`. Positions outside
    the sequence, which mark an answer that was cut off, become -100.
    """
    if problem != "question_answering":
        return inputs.get("labels")
    start, end = inputs.get("start_positions"), inputs.get("end_positions")
    if start is None or end is None:
        return None
    positions = torch.stack([start.flatten(), end.flatten()], dim=1)  # also from columns of shape (batch, 1)
    return positions.masked_fill((positions < 0) | (positions >= attention_mask_of(inputs).shape[1]), -100)


def predicted_tokens(problem: ProblemType, attention_mask: Tensor, labels: Tensor | None) -> Tensor:
    """The positions at which a token-level model is trained, as a boolean mask of shape `(batch, seq)`.

    Token classification: tokens with a label; in a row without any label, all tokens. Masked language modelling: the
    masked tokens, which only their labels tell.

    Raises:
        ValueError: If the labels are not one per token, or there are none for masked language modelling.
    """
    if problem == "masked_lm" and labels is None:
        raise ValueError(
            "a masked language model is distilled at the masked tokens, which `labels` mark, but the batch has none; "
            "use data_collator=DataCollatorForLanguageModeling(tokenizer)."
        )
    if labels is None:
        return attention_mask.bool()
    if labels.shape != attention_mask.shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit tokens of shape {tuple(attention_mask.shape)}; pad "
            "them with the tokens, for example with DataCollatorForTokenClassification(tokenizer)."
        )
    is_labeled = labels != -100
    if problem == "masked_lm":
        return is_labeled
    return torch.where(is_labeled.any(dim=1, keepdim=True), is_labeled, attention_mask.bool())


def count_items(inputs: Mapping[str, Any], problem: ProblemType = "single_label_classification") -> ItemCounts:
    """Count the valid items of a batch, before any clamping.

    Args:
        inputs (`Mapping[str, Any]`):
            A batch with `input_ids` of shape `(batch, seq)`, `attention_mask` and, if it has any, labels in which
            -100 marks a missing one, see [`labels_of`].
        problem (`str`, *optional*, defaults to `"single_label_classification"`): What the model solves.
    """
    mask, labels = attention_mask_of(inputs), labels_of(inputs, problem)
    lengths = mask.sum(dim=-1)  # (batch,)
    examples = lengths.new_full((), len(lengths))
    if problem == "masked_lm" and labels is None:
        predictions = lengths.new_zeros(())  # text for terms between layers
    elif problem in ("token_classification", "masked_lm"):
        predictions = predicted_tokens(problem, mask, labels).sum()
    else:
        predictions = 2 * examples if problem == "question_answering" else examples
    return ItemCounts(
        examples=examples,
        predictions=predictions,
        labels=lengths.new_zeros(()) if labels is None else (labels != -100).sum(),
        tokens=lengths.sum(),
        token_pairs=lengths.square().sum(),
    )
