"""Soft labels that rows carry in place of a teacher: how files write them, and what is wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


# teacher_probs, teacher_1_logits; teacher_probs.positive where each label has a column of its own.
_COLUMN = re.compile(r"(teacher_(?:\d+_)?(?:logits|probs))(?:\.(.+))?")
_SUM_TOLERANCE = 0.02  # of probabilities that were rounded to two digits


@dataclass(frozen=True)
class SoftLabels:
    """A column of them.

    Attributes:
        names (`tuple[str, ...]`, *optional*): The labels, where the file says them.
        values (`np.ndarray` of shape `(rows, labels)`): One number per label.
    """

    names: tuple[str, ...] | None
    values: np.ndarray

    def as_column(self) -> tuple[list[Any], Any]:
        """Rows and feature for a `datasets.Dataset`: structs of label to number, or lists."""
        import datasets

        number = datasets.Value("float32")
        rows = self.values.tolist()
        if self.names is None:
            return rows, datasets.List(number)
        return [dict(zip(self.names, row, strict=True)) for row in rows], {name: number for name in self.names}


def is_soft_label_column(name: str) -> bool:
    """Whether a column of a file holds soft labels, of all labels or of one."""
    return _COLUMN.fullmatch(name) is not None


def read_soft_labels(rows: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, SoftLabels]:
    """
    Read `teacher_probs`, `teacher_logits` and the like.

    A cell is a list of numbers, an object of label to number, or one number; in CSV and TSV it is that as JSON. Or
    each label has a column: `teacher_probs.positive`, `teacher_probs.negative`.

    Args:
        rows (sequence of `tuple[str, dict]`): Where each stands, and its cells.

    Returns:
        `dict[str, SoftLabels]`: By column; empty if no row has such a column.

    Raises:
        `ValueError`: If a row lacks numbers that others have, or has them of other labels, naming the row and the fix.
    """
    columns = dict.fromkeys(column for _, row in rows for column in row if is_soft_label_column(column))
    found: dict[str, list[str]] = {}
    for column in columns:
        base, label = _COLUMN.fullmatch(column).groups()  # type: ignore[union-attr]
        found.setdefault(base, []).extend([] if label is None else [label])
        if found[base] and base in columns:
            raise ValueError(
                f"{rows[0][0]}: there are columns {base!r} and {f'{base}.{found[base][0]}'!r}; keep the one or the "
                "others."
            )
    return {base: _read_column(rows, base, labels) for base, labels in found.items()}


def _read_column(rows: Sequence[tuple[str, dict[str, Any]]], column: str, labels: list[str]) -> SoftLabels:
    names: tuple[str, ...] | None = None
    values: list[list[float]] = []
    for index, (where, row) in enumerate(rows):
        where = f"{where}: `{column}`"
        if labels:
            cell: Any = {label: row.get(f"{column}.{label}") for label in labels}
        else:
            cell = _parse(row.get(column), where)
        if index == 0:
            names = tuple(map(str, cell)) if isinstance(cell, dict) else None
        if isinstance(cell, dict) != (names is not None) or (names is not None and set(cell) != set(names)):
            raise ValueError(
                f"{where} is {cell!r:.80}, and in the first row it has {list(names) if names else 'no label names'}; "
                "give every row the same labels, with 0 for a probability that there is none of."
            )
        numbers = [cell[name] for name in names] if names is not None else cell
        values.append([_as_number(number, where) for number in numbers])
        if len(values[-1]) != len(values[0]):
            raise ValueError(
                f"{where} has {len(values[-1])} numbers, and {len(values[0])} in the first row; give each row one per "
                "label."
            )
    return SoftLabels(names, np.array(values, dtype=np.float64))


def _parse(cell: Any, where: str) -> Any:
    if cell is None or cell == "":
        raise ValueError(
            f"{where} is empty, and no teacher runs for single rows; fill it, or move the row to a file without the "
            "column."
        )
    try:
        parsed = json.loads(cell) if isinstance(cell, str) else cell
    except json.JSONDecodeError:
        parsed = None
    if isinstance(parsed, int | float) and not isinstance(parsed, bool):
        return [parsed]
    if not isinstance(parsed, list | dict) or not parsed:
        raise ValueError(
            f"{where} is {cell!r:.80}, but one number per label is needed, as JSON: "
            'write [0.1, 0.9], or {"negative": 0.1, "positive": 0.9} with json.dumps.'
        )
    return parsed


def _as_number(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} has {value!r} among its numbers; correct the row.") from None


def check_soft_labels(
    values: np.ndarray, where: Callable[[int], str], *, is_probs: bool, sums_to_one: bool = True
) -> None:
    """
    Args:
        values (`np.ndarray` of shape `(rows, labels)`): One number per label; NaN where one is missing.
        where (callable): From a row's number to what names it in a message.
        is_probs (`bool`): Whether they are probabilities, and not logits.
        sums_to_one (`bool`, *optional*, defaults to `True`): Whether one label of a row is right, and not any number.

    Raises:
        `ValueError`: If they are not finite, or no probabilities, naming the row and the fix.
    """

    def refuse(is_wrong: Any, why: str) -> None:
        for row in np.flatnonzero(is_wrong)[:1]:
            raise ValueError(f"{where(row)}: {[float(f'{value:.6g}') for value in values[row]]} {why}")

    refuse(~np.isfinite(values).all(axis=1), "has a number that is missing or not finite; correct or remove the row.")
    if is_probs:
        refuse(
            ((values < -1e-3) | (values > 1 + 1e-3)).any(axis=1),
            "are no probabilities, which lie between 0 and 1; divide counts by their sum, and name logits or "
            "log-probabilities teacher_logits.",
        )
    if is_probs and sums_to_one:
        refuse(
            np.abs(values.sum(axis=1) - 1) > _SUM_TOLERANCE,
            "do not add up to 1; divide each row by its sum, or load the student with "
            "problem_type='multi_label_classification' if several labels of a row can be right.",
        )
