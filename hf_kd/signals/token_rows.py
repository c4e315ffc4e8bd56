"""The tokens of a dataset as numbers without Python lists, and what the signals of a teacher take beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .capture import Wanted
from .columns import vector_columns


# What a teacher reads of a row.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class CacheEstimate:
    """What a cache takes on disk.

    Attributes:
        rows (`int`): Rows of the dataset.
        tokens (`int`): Their tokens.
        bytes_per_token (`int`): Of the vectors of a token.
        bytes_per_row (`int`): Of the logits, and of what says where a row's vectors begin.
    """

    rows: int
    tokens: int
    bytes_per_token: int
    bytes_per_row: int

    @property
    def total_bytes(self) -> int:
        return self.tokens * self.bytes_per_token + self.rows * self.bytes_per_row

    def __str__(self) -> str:
        return (
            f"{in_bytes(self.total_bytes)}: {self.rows:,} rows with {self.tokens:,} tokens, "
            f"{self.bytes_per_token:,} bytes per token and {self.bytes_per_row:,} per row"
        )


def in_bytes(num_bytes: float) -> str:
    """A number of bytes as it is read."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def estimate_cache(
    dataset: Any, teacher_config: Any, wanted: Wanted, *, has_token_logits: bool = False
) -> CacheEstimate:
    """What [`cache_teacher_signals`] would write.

    Args:
        dataset (`datasets.Dataset`): Tokenized rows.
        teacher_config ([`~transformers.PretrainedConfig`]): The teacher's config.
        wanted ([`Wanted`]): The layers.
        has_token_logits (`bool`, *optional*, defaults to `False`): Whether there are logits for each token.
    """
    return size_of_cache(TokenRows(dataset), teacher_config, wanted, has_token_logits)


def size_of_cache(rows: TokenRows, config: Any, wanted: Wanted, has_token_logits: bool) -> CacheEstimate:
    num_vectors = len(vector_columns(wanted, ""))
    num_logits = getattr(config, "num_labels", 2)
    width = getattr(config, "hidden_size", 0)
    offsets = 4 * (num_vectors + 1)
    return CacheEstimate(
        rows=len(rows),
        tokens=int(rows.num_tokens.sum()),
        bytes_per_token=2 * (num_vectors * width + (num_logits if has_token_logits else 0)),
        bytes_per_row=offsets + 8 + (0 if has_token_logits else 4 * num_logits),
    )


class TokenRows:
    """The columns of a dataset that a teacher reads, as numbers without Python lists.

    Attributes:
        lengths (`numpy.ndarray` of shape `(rows,)`): Positions of each row, with padding.
        num_tokens (`numpy.ndarray` of shape `(rows,)`): Those that the attention mask counts.
        hash (`str`): Of everything the teacher reads.
    """

    def __init__(self, dataset: Any):
        self.names = [name for name in INPUTS if name in dataset.column_names]
        self._dataset = dataset.select_columns(self.names).with_format("arrow")
        lengths, num_tokens = [], []
        for columns in self._pieces():
            tokens, ends = columns["input_ids"]
            mask, mask_ends = columns.get("attention_mask", (np.ones_like(tokens), ends))
            sums = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
            lengths.append(np.diff(ends))
            num_tokens.append(sums[mask_ends[1:]] - sums[mask_ends[:-1]])
        self.lengths, self.num_tokens = np.concatenate(lengths), np.concatenate(num_tokens)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def hash(self) -> str:  # an estimate does not need it
        digest = hashlib.sha256()
        for columns in self._pieces():
            for name, (values, ends) in columns.items():
                digest.update(name.encode())
                digest.update(values.astype(np.int32).tobytes())
                digest.update(ends.tobytes())
        return digest.hexdigest()[:32]

    def _pieces(self) -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]]]:
        return (self.read(start, start + 10_000) for start in range(0, len(self._dataset), 10_000))

    def read(self, start: int, stop: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Column to its values one after another, and where each row begins and ends among them."""
        table = self._dataset[start:stop]
        return {name: _flat(table[name]) for name in self.names}


def _flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(column).to_numpy()
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return pyarrow.compute.list_flatten(column).to_numpy(), ends
