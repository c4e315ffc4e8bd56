"""Teachers whose signals are columns of the dataset: cached ones, and soft labels from anywhere."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch import Signals, attention_mask_of
from .capture import Wanted, attention_reach
from .columns import SignalSource, column_prefix, signals_of_columns, vector_columns
from .problem import SEQUENCE_PROBLEMS, ProblemType, sequence_problem
from .teacher import Teacher, TeacherEnsemble, label_order, weights_hash


_SUM_TOLERANCE = 1e-2  # of probabilities, which may have been rounded to two digits


class CachedTeacher:
    """A teacher that has said what it has to say: its signals are columns of the batch.

    Args:
        source ([`SignalSource`]): What describes them.
        of_rows (set of `str`): Which of `"logits"` and `"probs"` there is.
        available ([`Wanted`]): The layers that there are.
        student_config ([`~transformers.PretrainedConfig`]): The student's config, in whose label order the logits are
            given.
        prefix (`str`, *optional*, defaults to `"teacher_"`): How the columns begin.

    Raises:
        ValueError: If the labels of student and teacher do not fit.
    """

    reads_own_tokens = False

    def __init__(
        self,
        source: SignalSource,
        of_rows: set[str],
        available: Wanted,
        student_config: Any,
        prefix: str = "teacher_",
    ):
        self.source, self.available, self.prefix = source, available, prefix
        self.config = source.read_config()
        if source.problem in (*SEQUENCE_PROBLEMS, "token_classification"):
            order = label_order(student_config, self.config)
            self._label_order = None if order is None else torch.tensor(order)
        else:
            self._label_order = None
        self._logits = f"{prefix}{'logits' if 'logits' in of_rows else 'probs'}"
        self._wanted = Wanted()

    @property
    def columns(self) -> set[str]:
        """Names of the columns of a batch that it reads."""
        return {self._logits, *vector_columns(self._wanted, self.prefix)}

    def lacks(self, wanted: Wanted) -> Wanted:
        """What is wanted and not there."""
        return Wanted(
            hidden=wanted.hidden - self.available.hidden,
            attention=wanted.attention - self.available.attention,
            values=wanted.values - self.available.values,
        )

    def watch(self, wanted: Wanted) -> None:
        """Read these intermediate signals besides the logits from now on.

        Raises:
            ValueError: If they are not among the columns.
        """
        lacking = self.lacks(wanted)
        if lacking != Wanted():
            raise ValueError(
                f"the terms compare hidden states of layers {sorted(wanted.hidden)}, attention of layers "
                f"{sorted(wanted.attention)} and values of layers {sorted(wanted.values)}, but the dataset has no "
                f"columns {vector_columns(lacking, self.prefix)}; cache them "
                "(cache_teacher_signals(rows, teacher, objective.teacher_wanted, folder)), pass teacher_model= to run "
                "the teacher for them, or set the weights of these terms to 0."
            )
        self._wanted = wanted

    def is_in(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a batch carries its columns."""
        return self._logits in inputs

    def __call__(self, inputs: Mapping[str, Any]) -> Signals:
        """Read a batch, as [`SignalsCollator`] makes it.

        Raises:
            ValueError: If its rows have no columns of the teacher.
        """
        missing = sorted(self.columns - set(inputs))
        if missing:
            raise ValueError(
                f"the batch has no columns {missing}, and no teacher runs; cache the signals of these rows too "
                "(cache_teacher_signals), or pass teacher_model= for rows without them."
            )
        mask = attention_mask_of(inputs)
        vectors = {
            kind: {layer: inputs[f"{self.prefix}{kind}_{layer}"] for layer in layers}
            for kind, layers in (
                ("hidden", self._wanted.hidden),
                ("queries", self._wanted.attention),
                ("keys", self._wanted.attention),
                ("values", self._wanted.values),
            )
        }
        heads = getattr(self.config, "num_attention_heads", 1)
        by_head = {
            kind: {layer: x.unflatten(-1, (heads, -1)).transpose(1, 2) for layer, x in of_kind.items()}
            for kind, of_kind in vectors.items()
            if kind != "hidden"
        }
        return Signals(
            logits=self._read_logits(inputs[self._logits]),
            attention_mask=mask,
            hidden=vectors["hidden"],
            attention_reach=attention_reach(self.config, self._wanted),
            **by_head,
        )

    def _read_logits(self, stored: Tensor) -> Tensor:
        logits = stored.float()
        if self._logits.endswith("probs"):
            tiny = torch.finfo(torch.float32).tiny
            is_multi_label = self.source.problem == "multi_label_classification"
            logits = torch.logit(logits, eps=1e-6) if is_multi_label else logits.clamp(min=tiny).log()
        if self.source.problem == "question_answering":
            return logits.transpose(1, 2)  # (batch, 2, seq)
        if self._label_order is not None:
            self._label_order = self._label_order.to(logits.device)
            logits = logits[..., self._label_order]
        return logits


class PartlyCachedTeacher:
    """A teacher of which some signals are columns; it runs for the others, and for rows without columns.

    Args:
        cached ([`CachedTeacher`]): Reads the columns.
        teacher ([`Teacher`]): Runs.

    Raises:
        ValueError: If the columns were made by another teacher.
    """

    def __init__(self, cached: CachedTeacher, teacher: Teacher):
        if cached.source.weights and cached.source.weights != teacher.weights:
            raise ValueError(
                f"the columns {cached.prefix}... were made by a teacher of other weights (hash "
                f"{cached.source.weights}) than teacher_model has ({teacher.weights}); cache the signals of this "
                "teacher, or pass the one they are of."
            )
        if teacher.reads_own_tokens and cached.available != Wanted():
            raise ValueError(
                "the teacher reads tokens of its own, so that cached vectors of tokens fit nothing; cache its logits "
                "alone: wanted=Wanted()."
            )
        self.cached, self.teacher = cached, teacher
        self.model, self.reads_own_tokens = teacher.model, teacher.reads_own_tokens
        self._lacking = Wanted()

    @property
    def config(self) -> Any:
        return self.teacher.config

    @property
    def columns(self) -> set[str]:
        """Names of the columns of a batch that it reads."""
        return self.cached.columns | self.teacher.columns

    def watch(self, wanted: Wanted) -> None:
        """Read these intermediate signals besides the logits from now on."""
        self._wanted, self._lacking = wanted, self.cached.lacks(wanted)
        self.cached.watch(
            Wanted(
                hidden=wanted.hidden - self._lacking.hidden,
                attention=wanted.attention - self._lacking.attention,
                values=wanted.values - self._lacking.values,
            )
        )
        self.teacher.watch(wanted)

    def __call__(self, inputs: Mapping[str, Any]) -> Signals:
        """Read a batch, and run the teacher if that is not enough."""
        if not self.cached.is_in(inputs):
            return self._run(inputs, self._wanted)
        signals = self.cached(inputs)
        if self._lacking != Wanted():
            now = self._run(inputs, self._lacking)
            signals.hidden = {**now.hidden, **signals.hidden}
            signals.queries = {**now.queries, **signals.queries}
            signals.keys = {**now.keys, **signals.keys}
            signals.values = {**now.values, **signals.values}
            signals.attention_reach = {**now.attention_reach, **signals.attention_reach}
        return signals

    def _run(self, inputs: Mapping[str, Any], wanted: Wanted) -> Signals:
        if self.teacher.capture.wanted != wanted:
            self.teacher.watch(wanted)
        return self.teacher(inputs)


AnyTeacher = Teacher | CachedTeacher | PartlyCachedTeacher


def teachers_of_columns(
    dataset: Any,
    student_config: Any,
    problem: ProblemType,
    teacher_labels: Sequence[str] | None = None,
) -> list[CachedTeacher]:
    """The teachers whose signals a dataset carries, in their order; none for a dataset without such columns.

    Args:
        dataset (`datasets.Dataset`): Rows, see [`cache_teacher_signals`] for the columns; `teacher_logits` and
            `teacher_probs` may come from anywhere: a list of one number per label, or a struct of label to number.
        student_config ([`~transformers.PretrainedConfig`]): The student's config.
        problem (`str`): What the student solves.
        teacher_labels (sequence of `str`, *optional*): The labels of lists that came from elsewhere, in their order.

    Raises:
        ValueError: If the columns do not fit the student, or hold what are no logits or probabilities.
    """
    features = getattr(dataset, "features", None) or {}
    found = signals_of_columns(list(features))
    expected = [column_prefix()] if column_prefix() in found else [column_prefix(index) for index in range(len(found))]
    if list(found) != expected:
        raise ValueError(
            f"the dataset has columns of the teachers {sorted(found)}, but one is {column_prefix()!r}, and of several "
            f"the names go on from {column_prefix(0)!r} without a gap; rename them."
        )
    teachers = []
    for prefix, (of_rows, available) in found.items():
        if len(of_rows & {"logits", "probs"}) != 1:
            raise ValueError(
                f"the dataset has columns {prefix}..., of which one has to be {prefix}logits or {prefix}probs, and "
                f"not both; it has {sorted(f'{prefix}{name}' for name in of_rows)}."
            )
        if "signals" in of_rows:
            source = SignalSource.from_json(features[f"{prefix}signals"].names[0])
        elif available != Wanted():
            raise ValueError(
                f"the dataset has vectors of a teacher, but no column {prefix}signals that says what they are; make "
                "them with cache_teacher_signals, and keep all of its columns."
            )
        else:
            column = f"{prefix}{'logits' if 'logits' in of_rows else 'probs'}"
            source = _source_of_soft_labels(dataset, column, student_config, problem, teacher_labels)
        if source.problem != problem:
            raise ValueError(
                f"the columns {prefix}... are of a teacher that solves {source.problem}, and the student solves "
                f"{problem}; take a student of the same kind, with the teacher's num_labels and problem_type."
            )
        teachers.append(CachedTeacher(source, of_rows, available, student_config, prefix))
    return teachers


def join_teachers(cached: list[CachedTeacher], run: list[Teacher]) -> AnyTeacher | TeacherEnsemble | None:
    """The teacher, or all of them as one: from columns, run, or both.

    Raises:
        ValueError: If there are columns and models of different numbers of teachers, or of different ones.
    """
    if cached and run and len(cached) != len(run):
        raise ValueError(
            f"the dataset has columns of {len(cached)} teachers, and teacher_model names {len(run)}; give one model "
            "for each, in the order of the columns, or none."
        )
    teachers: list[AnyTeacher] = [PartlyCachedTeacher(*both) for both in zip(cached, run, strict=False)]
    teachers = teachers or list(cached) or list(run)
    return None if not teachers else teachers[0] if len(teachers) == 1 else TeacherEnsemble(teachers)


def _source_of_soft_labels(
    dataset: Any, column: str, student_config: Any, problem: ProblemType, teacher_labels: Sequence[str] | None
) -> SignalSource:
    """Columns that came from anywhere are read once before training: what is wrong in row 60,000 is found there."""
    if problem not in SEQUENCE_PROBLEMS:
        raise ValueError(
            f"{column} holds one answer per row, but the student solves {problem}, with one per token; cache the "
            "teacher's signals with cache_teacher_signals."
        )
    is_probs = column.endswith("probs")
    if is_probs and problem == "regression":
        raise ValueError(f"{column} are probabilities, but the student predicts a value; name it teacher_logits.")
    feature = dataset.features[column]
    names = list(feature) if isinstance(feature, Mapping) else teacher_labels
    if names is None and problem != "regression":
        raise ValueError(
            f"{column} is a list of numbers, and nothing says which label each is of; pass teacher_labels="
            f"{[str(student_config.id2label[i]) for i in range(student_config.num_labels)]} in their order, or store "
            "a struct of label to number."
        )
    num_labels = 1 if names is None else len(names)
    first_row = 0
    for batch in dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        values = _as_matrix(batch[column], column, num_labels, first_row)
        _check_numbers(values, column, is_probs, problem, first_row)
        first_row += len(values)
    config = copy.deepcopy(student_config)
    if names is not None:
        config.id2label = {index: str(name) for index, name in enumerate(names)}
        config.label2id = {str(name): index for index, name in enumerate(names)}
    config._name_or_path = ""
    found = {**config.to_dict(), "model_type": student_config.model_type}
    return SignalSource(config=found, problem=sequence_problem(config))


def _as_matrix(column: Any, name: str, num_labels: int, first_row: int) -> np.ndarray:
    column = column.combine_chunks()
    if hasattr(column, "chunks"):
        column = column.chunk(0)
    if str(column.type).startswith("struct"):
        columns = [column.field(index).to_numpy(zero_copy_only=False) for index in range(column.type.num_fields)]
        return np.stack([np.asarray(values, dtype=np.float64) for values in columns], axis=1)
    rows = [np.atleast_1d(np.nan if row is None else row) for row in column.to_pylist()]
    lengths = np.array([len(row) for row in rows])
    wrong = np.flatnonzero(lengths != num_labels)
    if len(wrong):
        raise ValueError(
            f"{name}, row {first_row + wrong[0]}: {lengths[wrong[0]]} numbers, but there are {num_labels} labels; give "
            "one number per label."
        )
    return np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=np.float64)


def _check_numbers(values: np.ndarray, name: str, is_probs: bool, problem: ProblemType, first_row: int) -> None:
    def refuse(rows: np.ndarray, why: str) -> None:
        if len(rows):
            row = rows[0]
            raise ValueError(f"{name}, row {first_row + row}: {values[row].tolist()} {why}")

    refuse(np.flatnonzero(~np.isfinite(values).all(axis=1)), "has a number missing or not finite; correct the row.")
    if not is_probs:
        return
    outside = np.flatnonzero(((values < 0) | (values > 1)).any(axis=1))
    refuse(outside, "are no probabilities, which lie between 0 and 1; name the column teacher_logits if it is logits.")
    if problem != "multi_label_classification":
        sums = np.abs(values.sum(axis=1) - 1)
        refuse(np.flatnonzero(sums > _SUM_TOLERANCE), "do not add up to 1; divide each row by its sum.")
