"""A teacher's signals as columns of a dataset: their names, what describes them, and how they become a batch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from .batch import attention_mask_of
from .capture import Wanted
from .problem import ProblemType


# teacher_logits and teacher_hidden_6 of the only teacher, teacher_0_logits and teacher_1_logits of two.
_COLUMN = re.compile(r"(teacher_(?:\d+_)?)(?:(logits|probs|signals)|(hidden|queries|keys|values)_(\d+))")
_VECTORS = ("hidden", "queries", "keys", "values")
# Arrow has no bfloat16: its bits are stored.
STORED_AS = {"float16": np.dtype("float16"), "bfloat16": np.dtype("uint16")}


@dataclass(frozen=True)
class SignalSource:
    """What the column `teacher_signals` says about the columns beside it.

    The column holds one class in every row, whose name is this as JSON: features travel with a dataset wherever it
    goes, and rows of two sources cannot be concatenated by mistake.

    Attributes:
        config (`dict`): The teacher's config, without paths.
        problem (`str`): What the teacher solves.
        weights (`str`): Hash of the teacher's weights; empty if no model is behind the columns.
        architecture (`str`): Name of the teacher's class.
        parameters (`int`): Number of the teacher's parameters.
        origin (`dict`): Name, commit and licence of the teacher's checkpoint, see [`~hf_kd.origin.identify`].
    """

    config: dict[str, Any]
    problem: ProblemType
    weights: str = ""
    architecture: str = ""
    parameters: int = 0
    origin: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SignalSource:
        """
        Raises:
            ValueError: If another version of hf_kd wrote it.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"the column teacher_signals does not describe a teacher as this version of hf_kd does ({error}); "
                "make the columns again with cache_teacher_signals."
            ) from None

    def read_config(self) -> Any:
        """The teacher's config, of its own class where transformers knows it."""
        values = {name: value for name, value in self.config.items() if name != "model_type"}
        try:
            return AutoConfig.for_model(self.config["model_type"], **values)
        except ValueError:
            config = PretrainedConfig(**values)
            config.model_type = self.config["model_type"]
            return config


def column_prefix(teacher: int | None = None) -> str:
    """How the columns of a teacher begin; `None` for the only one."""
    return "teacher_" if teacher is None else f"teacher_{teacher}_"


def is_signal_column(name: str) -> bool:
    """Whether a column holds signals of a teacher, or their description."""
    return _COLUMN.fullmatch(name) is not None


def vector_columns(wanted: Wanted, prefix: str) -> list[str]:
    """Names of the columns of these signals, which hold a vector of each token."""
    layers = (wanted.hidden, wanted.attention, wanted.attention, wanted.values)
    return [
        f"{prefix}{kind}_{layer}" for kind, of_kind in zip(_VECTORS, layers, strict=True) for layer in sorted(of_kind)
    ]


def signals_of_columns(names: Sequence[str]) -> dict[str, tuple[set[str], Wanted]]:
    """Prefix to what there is of the teacher: its `logits`, `probs` and `signals`, and the layers."""
    found: dict[str, tuple[set[str], dict[str, set[int]]]] = {}
    for name in names:
        match = _COLUMN.fullmatch(name)
        if match is not None:
            prefix, whole, kind, layer = match.groups()
            of_rows, of_tokens = found.setdefault(prefix, (set(), {kind: set() for kind in _VECTORS}))
            if whole is not None:
                of_rows.add(whole)
            else:
                of_tokens[kind].add(int(layer))
    return {
        prefix: (
            of_rows,
            Wanted(
                hidden=frozenset(of_tokens["hidden"]),
                attention=frozenset(of_tokens["queries"] & of_tokens["keys"]),
                values=frozenset(of_tokens["values"]),
            ),
        )
        for prefix, (of_rows, of_tokens) in sorted(found.items(), key=lambda item: (len(item[0]), item[0]))
    }


def with_fast_format(dataset: Any) -> Any:
    """The same `datasets.Dataset`, whose rows hold views into the columns of vectors in place of lists of numbers.

    A dataset that was given a format or a transform keeps it: [`SignalsCollator`] reads any, and copies then.

    Raises:
        ValueError: If teachers' columns are of several dtypes.
    """
    features = getattr(dataset, "features", None) or {}
    names = [name for name, feature in features.items() if _is_stored_vectors(name, feature)]
    if not names or getattr(dataset, "format", {"type": ""})["type"] is not None:
        return dataset
    # The formatter would otherwise turn every float into float32, and every integer into int64.
    dtypes = {features[name].feature.dtype for name in names}
    if len(dtypes) > 1:
        raise ValueError(f"columns of teachers are of the dtypes {sorted(dtypes)}; cache them all with one dtype.")
    return dataset.with_format("numpy", columns=names, output_all_columns=True, dtype=np.dtype(dtypes.pop()))


def _is_stored_vectors(name: str, feature: Any) -> bool:
    dtype = getattr(getattr(feature, "feature", None), "dtype", None)
    return is_signal_column(name) and dtype in {str(stored) for stored in STORED_AS.values()}


def has_signal_columns(dataset: Any) -> bool:
    """Whether rows carry signals of a teacher."""
    return any(map(is_signal_column, getattr(dataset, "column_names", None) or ()))


def without_signals(dataset: Any, *, keep_logits: bool = False) -> Any:
    """The rows without the columns of a teacher, or without those of tokens."""
    if not has_signal_columns(dataset):
        return dataset
    kept = ("logits", "probs") if keep_logits else ()
    return dataset.remove_columns(
        [n for n in dataset.column_names if is_signal_column(n) and not (kept and n.endswith(kept))]
    )


class TokenLengths:
    """Stands for a dataset where a sampler only asks how long its rows are.

    `Trainer` would read every row for that, cached columns included: it removes the column `length` before it looks
    for it.
    """

    def __init__(self, dataset: Any, name: str = "input_ids"):
        self._dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, range]:
        return {self.name: range(self._lengths[index])}

    @cached_property
    def _lengths(self) -> np.ndarray:  # not read unless asked for
        import pyarrow.compute

        batches = self._dataset.select_columns([self.name]).with_format("arrow").iter(batch_size=10_000)
        return np.concatenate([pyarrow.compute.list_value_length(batch[self.name]).to_numpy() for batch in batches])


class SignalsCollator:
    """Makes a batch of rows that carry signals of a teacher: another collator of the rest, and tensors of these.

    Args:
        collator (callable): Pads the other columns.
        has_token_logits (`bool`, *optional*, defaults to `False`): Whether logits are of tokens, and not of rows.

    Raises:
        ValueError: If a row has not as many vectors as tokens, or rows have vectors of different widths.
    """

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]], *, has_token_logits: bool = False
    ):
        self.collator, self.has_token_logits = collator, has_token_logits

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.collator, name)  # what a trainer asks a collator, such as its text columns

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            features (sequence of `Mapping[str, Any]`): Rows, all with the same columns.

        Returns:
            `dict[str, Any]`: What the collator made, and `teacher_logits` of shape `(batch, num_labels)`, in float32,
            or `(batch, seq, num_labels)`, and `teacher_hidden_6` and the like, of shape `(batch, seq, width)`, in the
            dtype they were stored in.
        """
        names = [name for name in features[0] if is_signal_column(name)]
        batch = dict(self.collator([{k: row[k] for k in row if not is_signal_column(k)} for row in features]))
        if not names:
            return batch
        mask = attention_mask_of(batch).numpy().astype(bool)
        for name in names:
            if not name.endswith("_signals"):
                values = [row[name] for row in features]
                is_of_rows = name.endswith(("logits", "probs")) and not self.has_token_logits
                batch[name] = _of_rows(name, values) if is_of_rows else _of_tokens(name, values, mask)
        return batch


def sorted_labels(struct: Mapping[str, Any]) -> list[str]:
    """The order in which a struct's numbers become a tensor: one for all datasets, whatever the order of theirs."""
    return sorted(struct, key=str.casefold)


def _of_rows(name: str, values: list[Any]) -> Tensor:
    _require_all(name, values)
    rows = [
        [row[label] for label in sorted_labels(row)] if isinstance(row, Mapping) else np.atleast_1d(row)
        for row in values
    ]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{name} holds {sorted({len(row) for row in rows})} numbers; give each row one per label.")
    array = np.asarray(rows, dtype=np.float32)
    if not np.isfinite(array).all():  # of a stream or an evaluation, whose rows nobody has read before
        raise ValueError(
            f"{name} has a number that is missing or not finite in this batch; correct or remove the row."
        )
    return torch.from_numpy(array)


def _require_all(name: str, values: list[Any]) -> None:
    """Rows that were concatenated with others have nulls in the columns that they lack."""
    if any(value is None for value in values):
        raise ValueError(
            f"{name} is empty in a row of this batch; cache the signals of all rows (cache_teacher_signals), or train "
            "on those that have them."
        )


def _of_tokens(name: str, values: list[Any], mask: np.ndarray) -> Tensor:
    """Vectors of each token where the mask is 1, zeros elsewhere; one copy of each row."""
    _require_all(name, values)
    rows = [np.asarray(value) for value in values]  # views, unless another format made lists of them
    if rows[0].dtype not in STORED_AS.values():
        stored = STORED_AS["bfloat16" if np.issubdtype(rows[0].dtype, np.integer) else "float16"]
        rows = [row.astype(stored) for row in rows]
    num_tokens = mask.sum(axis=1)
    width = rows[0].size // max(num_tokens[0], 1)
    padded = np.zeros((*mask.shape, width), dtype=rows[0].dtype)
    for index, (row, tokens) in enumerate(zip(rows, num_tokens, strict=True)):
        if row.size != tokens * width:
            raise ValueError(
                f"{name} holds {row.size} numbers for a row of {tokens} tokens, where another has {width} for each; "
                "the rows were tokenized anew since the teacher read them. Tokenize first, then cache."
            )
        start = mask[index].argmax()
        if mask[index, start : start + tokens].all():
            padded[index, start : start + tokens] = row.reshape(tokens, width)
        else:
            padded[index, mask[index]] = row.reshape(tokens, width)
    tensor = torch.from_numpy(padded)
    return tensor.view(torch.bfloat16) if padded.dtype == STORED_AS["bfloat16"] else tensor
