"""Compares an exported model with the one it was exported from, on texts of many lengths."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..signals.capture import columns_for, forward_columns
from .classifier import OnnxTextClassifier, TextInput


MAX_ROWS = 128
# One row, few, and batches whose rows are padded by very different amounts.
_BATCH_SIZES = (1, 1, 2, 3, 8, 16, 32)


class ParityError(ValueError):
    """The exported file does not answer as the model does."""


def check_parity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    classifier: OnnxTextClassifier,
    texts: Sequence[TextInput],
    tolerance: float = 1e-4,
) -> dict[str, Any]:
    """
    Run the same texts through both, tokenizer included.

    Args:
        model (`PreTrainedModel`): In evaluation mode and float32.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer in transformers.
        classifier ([`OnnxTextClassifier`]): The exported file.
        texts (sequence of `str` or `tuple[str, str]`): Up to 128 of them are compared, evenly spread over the lengths.
        tolerance (`float`, *optional*, defaults to 1e-4): Largest allowed absolute difference of a logit.

    Returns:
        `dict`: `rows`, `batches` (`"batch size x length"` of each), `max_difference` and `tolerance`.

    Raises:
        [`ParityError`]: At the first batch whose token ids, logits or predictions differ, saying which and by how
            much.
    """
    columns, max_difference = forward_columns(model), 0.0
    shapes = []
    batches = _batches(texts, [len(encoding.ids) for encoding in classifier.encode(texts)])
    for rows in batches:
        inputs = classifier.pad(classifier.encode([texts[i] for i in rows]))
        batch_size, length = inputs["input_ids"].shape
        where = f"texts {rows}, as a batch of {batch_size} x {length} tokens"
        expected_inputs = _tokenize(tokenizer, [texts[i] for i in rows], classifier.max_length)
        if not np.array_equal(inputs["input_ids"], expected_inputs["input_ids"].numpy()):
            raise ParityError(f"{where}: tokenizer.json gives other token ids than the model's own tokenizer.")
        with torch.inference_mode():
            expected = model(**columns_for(columns, expected_inputs)).logits.numpy()
        try:
            found = classifier.run(inputs)
        except Exception as error:  # onnxruntime raises its own kinds, without a common base
            raise ParityError(f"{where}: the exported file does not run: {error}") from error
        difference = float(np.abs(found - expected).max())
        if not difference <= tolerance:  # also true of NaN
            row = int(np.abs(found - expected).max(axis=-1).argmax())
            raise ParityError(
                f"{where}: row {rows[row]} has the logits {expected[row].tolist()} in torch and {found[row].tolist()} "
                f"in ONNX Runtime; they differ by {difference:.2g}, and {tolerance:g} is allowed. Try "
                "optimize=False, the other backend, or another opset."
            )
        if not np.array_equal(found.argmax(axis=-1), expected.argmax(axis=-1)):
            raise ParityError(f"{where}: torch and ONNX Runtime predict different classes.")
        max_difference = max(max_difference, difference)
        shapes.append(f"{batch_size} x {length}")
    return {
        "rows": sum(map(len, batches)),
        "batches": shapes,
        "max_difference": max_difference,
        "tolerance": tolerance,
    }


def spread_over_lengths(lengths: Sequence[int], count: int) -> list[int]:
    """Indices of up to `count` rows from the shortest to the longest, in equal steps of rank."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ranks = np.linspace(0, len(order) - 1, num=min(count, len(order))).round().astype(int)
    return [order[rank] for rank in ranks]


def _batches(texts: Sequence[TextInput], lengths: Sequence[int]) -> list[list[int]]:
    """Groups of row numbers; short and long rows alternate, so that a batch holds both."""
    rows = spread_over_lengths(lengths, MAX_ROWS)
    rows[1::2] = rows[1::2][::-1]
    batches: list[list[int]] = []
    start = 0
    while start < len(rows):
        size = _BATCH_SIZES[min(len(batches), len(_BATCH_SIZES) - 1)]
        batches.append(rows[start : start + size])
        start += size
    return batches


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[TextInput], max_length: int
) -> dict[str, torch.Tensor]:
    columns = [list(column) for column in zip(*texts, strict=True)] if isinstance(texts[0], tuple) else [list(texts)]
    return dict(tokenizer(*columns, padding=True, truncation=True, max_length=max_length, return_tensors="pt"))
