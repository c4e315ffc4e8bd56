"""Batches for a student and a teacher with tokenizers of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import LARGE_INTEGER

from .teacher import OWN_PREFIX


@dataclass
class DistillationCollator:
    """A data collator that also writes each row's text in the teacher's tokens, in columns with the prefix `teacher_`.

    Needed where student and teacher read different tokens, such as a ModernBERT student of a RoBERTa teacher. Rows
    hold the student's tokens and, beside them, the text they were made from:

    ```python
    rows = rows.map(lambda row: tokenizer(row["sentence"], truncation=True), batched=True)  # keeps "sentence"
    collator = DistillationCollator(tokenizer, teacher_tokenizer, text_columns=["sentence"])
    trainer = DistillationTrainer(student, args, teacher_model=teacher, data_collator=collator, train_dataset=rows)
    ```

    The tokens of a row do not fit together one by one, so only losses that compare whole rows can be used.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The student's, which pads its columns.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The teacher's.
        text_columns (`str` or sequence of `str`, *optional*, defaults to `("sentence",)`):
            The column of the text, or the two of a pair, in the order the teacher was trained with. They are in the
            rows and not in the batch.
        max_length (`int`, *optional*):
            Longest input of the teacher in tokens, special tokens included; longer texts are truncated. By default
            what the teacher's tokenizer takes (`model_max_length`).
        pad_to_multiple_of (`int`, *optional*): Pad the columns of both to a multiple of this.

    Raises:
        ValueError: If one is no tokenizer, there are not one or two text columns, or the lengths do not fit.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    text_columns: Sequence[str] = ("sentence",)
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokenizer", "teacher_tokenizer"):
            if not isinstance(getattr(self, name), PreTrainedTokenizerBase):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be a tokenizer; load it with "
                    "AutoTokenizer.from_pretrained(...)."
                )
        columns = [self.text_columns] if isinstance(self.text_columns, str) else list(self.text_columns)
        if len(columns) not in (1, 2) or len(set(columns)) < len(columns):
            raise ValueError(
                f"text_columns={columns} must name the column of a text, or the two of a pair; write for example "
                "text_columns=['sentence1', 'sentence2']."
            )
        self.text_columns = tuple(columns)
        self._check_lengths()
        self._pad = DataCollatorWithPadding(self.tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            features (sequence of `Mapping[str, Any]`): Rows, each with the student's columns and the text columns.

        Returns:
            `dict[str, Any]`: The student's columns as [`~transformers.DataCollatorWithPadding`] pads them, and
            `teacher_input_ids`, `teacher_attention_mask` and, if the teacher's tokenizer writes segments,
            `teacher_token_type_ids`, each a `torch.Tensor` of shape `(batch, teacher_seq)`. Without the teacher's
            columns if no row has a text, as an evaluation set may: no teacher runs there.

        Raises:
            ValueError: If a row lacks one of the text columns that others have, or its text is no string.
        """
        rows = [{name: row[name] for name in row if name not in self.text_columns} for row in features]
        batch = self._pad(rows)
        if any(name in row for row in features for name in self.text_columns):
            encoded = self.teacher_tokenizer(
                *([_text(row, name) for row in features] for name in self.text_columns),
                padding="longest",
                truncation=True,
                max_length=self.max_length,
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_attention_mask=True,
                return_tensors="pt",
            )
            batch.update({f"{OWN_PREFIX}{name}": tensor for name, tensor in encoded.items()})
        return batch

    def _check_lengths(self) -> None:
        limit = self.teacher_tokenizer.model_max_length
        if self.max_length is None:
            if limit > LARGE_INTEGER:  # what transformers writes for "not known"
                raise ValueError(
                    "the teacher's tokenizer does not say how many tokens its model takes, so a long text would fail "
                    "in the middle of the training; pass max_length, e.g. max_length=512."
                )
            self.max_length = limit
        special_tokens = self.teacher_tokenizer.num_special_tokens_to_add(pair=len(self.text_columns) == 2)
        if not special_tokens < self.max_length <= limit:
            raise ValueError(
                f"max_length={self.max_length}; the teacher's tokenizer takes from {special_tokens + 1} (with "
                f"{special_tokens} special tokens) to {limit} tokens."
            )
        if self.pad_to_multiple_of is not None and self.max_length % self.pad_to_multiple_of:
            raise ValueError(
                f"max_length={self.max_length} is no multiple of pad_to_multiple_of={self.pad_to_multiple_of}, to "
                f"which a truncated text is padded; pass for example "
                f"max_length={max(self.max_length // self.pad_to_multiple_of, 1) * self.pad_to_multiple_of}."
            )


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise ValueError(
            f"a row has the columns {sorted(row)}, but its text for the teacher is in {column!r}, which is not there; "
            "keep the column in the dataset, or name the right ones with DistillationCollator(text_columns=[...])."
        )
    if not isinstance(row[column], str):
        raise ValueError(
            f"the column {column!r} holds {row[column]!r}, but a text for the teacher is needed; fill it, or remove "
            "the row."
        )
    return row[column]
