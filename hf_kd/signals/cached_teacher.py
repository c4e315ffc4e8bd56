"""Teachers whose signals are columns of the dataset: cached ones, and soft labels from anywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..soft_labels import check_soft_labels
from .batch import Signals, attention_mask_of
from .capture import Wanted, attention_reach
from .columns import SignalSource, column_prefix, signals_of_columns, sorted_labels, vector_columns
from .problem import SEQUENCE_PROBLEMS, ProblemType, has_classes
from .teacher import Teacher, TeacherEnsemble, label_order


# A probability of 0 has no logarithm, and was rounded down to it, or is of a label that an LLM left out of its answer.
_SMALLEST_PROBABILITY = 1e-6


class CachedTeacher:
    """A teacher that has said what it has to say: its signals are columns of the batch.

    Args:
        source ([`SignalSource`]): What describes them.
        of_rows (set of `str`): Which of `"logits"` and `"probs"` there is.
        available ([`Wanted`]): The layers that there are.
        student_config ([`~transformers.PretrainedConfig`]): The student's config, in whose label order the logits are
            given.
        prefix (`str`, *optional*, defaults to `"teacher_"`): How the columns begin.

    Attributes:
        logits_column (`str`): The column of its answers.

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
        order = label_order(student_config, self.config) if has_classes(source.problem) else None
        self._label_order = None if order is None else torch.tensor(order)
        self.logits_column = f"{prefix}{'logits' if 'logits' in of_rows else 'probs'}"
        self._wanted = Wanted()

    @property
    def is_model(self) -> bool:
        """Whether a model is known to have said this, and not people, or whoever wrote the file."""
        return bool(self.source.weights)

    @property
    def columns(self) -> set[str]:
        """Names of the columns of a batch that it reads."""
        return {self.logits_column, *vector_columns(self._wanted, self.prefix)}

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
        return self.logits_column in inputs

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
        self._check_widths(inputs)
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
            logits=self._read_logits(inputs[self.logits_column]),
            attention_mask=mask,
            hidden=vectors["hidden"],
            attention_reach=attention_reach(self.config, self._wanted),
            **by_head,
        )

    def _check_widths(self, inputs: Mapping[str, Any]) -> None:
        """Rows that were all cut to one half since would look like rows of vectors twice as wide."""
        widths = {name: self.config.hidden_size for name in vector_columns(self._wanted, self.prefix)}
        if self.source.problem not in SEQUENCE_PROBLEMS:
            widths[self.logits_column] = 2 if self.source.problem == "question_answering" else self.config.num_labels
        for name, width in widths.items():
            if inputs[name].shape[-1] != width:
                raise ValueError(
                    f"{name} has {inputs[name].shape[-1]} numbers per token, and the teacher's are {width}; the rows "
                    "were tokenized anew since the teacher read them. Tokenize first, then cache."
                )

    def _read_logits(self, stored: Tensor) -> Tensor:
        logits = stored.float()
        if self.logits_column.endswith("probs"):
            if self.source.problem == "multi_label_classification":
                logits = torch.logit(logits, eps=_SMALLEST_PROBABILITY)
            else:
                logits = logits.clamp(min=_SMALLEST_PROBABILITY).log()
        if self.source.problem == "question_answering":
            return logits.transpose(1, 2)  # (batch, 2, seq)
        if self._label_order is not None:
            self._label_order = self._label_order.to(logits.device)
            logits = logits[..., self._label_order]
        return logits


class PartlyCachedTeacher:
    """A teacher of which some signals are columns; it runs for the others, and for batches without columns.

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
    def runs(self) -> bool:
        """Whether it says more than the columns, in a training whose rows all have them."""
        return self._lacking != Wanted()

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
            These are read once and checked; of an `IterableDataset` the first 10,000 rows are.
        student_config ([`~transformers.PretrainedConfig`]): The student's config.
        problem (`str`): What the student solves.
        teacher_labels (sequence of `str`, *optional*): The labels of lists that came from elsewhere, in their order;
            by default the names of a `datasets.ClassLabel` column `teacher_labels`, if there is one.

    Raises:
        ValueError: If the columns do not fit the student, or hold what are no logits or probabilities.
    """
    features = getattr(dataset, "features", None) or {}
    found = signals_of_columns(list(features))
    expected = [column_prefix()] if column_prefix() in found else [column_prefix(index) for index in range(len(found))]
    if set(found) != set(expected):
        raise ValueError(
            f"the dataset has columns of the teachers {sorted(found)}, but one is {column_prefix()!r}, and of several "
            f"the names go on from {column_prefix(0)!r} without a gap; rename them."
        )
    teachers = []
    for prefix in expected:
        of_rows, available = found[prefix]
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
            # Of what a dataset says about itself, only its features come through Parquet, the Hub and `map`.
            names = teacher_labels or getattr(features.get(f"{prefix}labels"), "names", None)
            source = _source_of_soft_labels(dataset, column, student_config, problem, names)
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
        raise ValueError(
            f"{column} are probabilities, but the student predicts a value; rename the column to "
            f"{column.removesuffix('probs')}logits if it holds values."
        )
    names = _label_names(dataset.features[column], column, student_config, problem, teacher_labels)
    num_labels = len(names) if names else 1
    first_row = 0
    for batch in _checked_batches(dataset, column):

        def where(row: int, first_row: int = first_row) -> str:
            return f"{column}, row {first_row + row}"

        values = _as_matrix(batch[column], num_labels, where)
        check_soft_labels(values, where, is_probs=is_probs, sums_to_one=problem != "multi_label_classification")
        first_row += len(values)
    config = copy.deepcopy(student_config)
    if names:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
    config._name_or_path = ""
    return SignalSource(config={**config.to_dict(), "model_type": student_config.model_type}, problem=problem)


def _label_names(
    feature: Any, column: str, student_config: Any, problem: ProblemType, teacher_labels: Sequence[str] | None
) -> list[str]:
    """The labels of the column's numbers in their order; none for a value, which has no label."""
    is_struct = isinstance(feature, Mapping)
    numbers = list(feature.values()) if is_struct else [getattr(feature, "feature", feature)]
    dtypes = [str(getattr(number, "dtype", type(number).__name__)) for number in numbers]
    if not numbers or not all(dtype.startswith(("float", "int", "uint")) for dtype in dtypes):
        raise ValueError(
            f"{column} is of the type {feature}, but a list of numbers, or a struct of label to number, is needed; "
            "parse what is text, for example with json.loads in dataset.map."
        )
    if problem == "regression":
        return []
    wanted = [str(student_config.id2label[index]) for index in range(student_config.num_labels)]
    if not is_struct and teacher_labels is None:
        raise ValueError(
            f"{column} is a list of numbers, and nothing says which label each is of; pass teacher_labels={wanted} in "
            "the order of the list, or store a struct of label to number, or a datasets.ClassLabel column "
            f"{column.removesuffix('logits').removesuffix('probs')}labels with these names."
        )
    names = [str(name) for name in (sorted_labels(feature) if is_struct else teacher_labels or ())]
    if sorted(name.casefold() for name in names) != sorted(name.casefold() for name in wanted):
        label2id = {name: index for index, name in enumerate(names)}
        raise ValueError(
            f"{column} is of the labels {names}, and the student's are {wanted}; load the student with "
            f"from_pretrained(..., id2label={dict(enumerate(names))}, label2id={label2id}), or rename the labels in "
            f"{'the struct' if is_struct else 'teacher_labels'}."
        )
    return names


def _checked_batches(dataset: Any, column: str) -> Iterator[Any]:
    """Arrow tables of all rows, or of the first ones of a stream, which may have no end."""
    batches = dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
    return iter(batches) if hasattr(dataset, "__len__") else islice(batches, 1)


def _as_matrix(column: Any, num_labels: int, where: Callable[[int], str]) -> np.ndarray:
    """Numbers of shape `(rows, labels)` in float64, NaN where one is missing."""
    import pyarrow
    import pyarrow.compute

    if isinstance(column, pyarrow.ChunkedArray):
        column = pyarrow.concat_arrays(column.chunks)
    if hasattr(column.type, "value_type"):
        lengths = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(column), 0).to_numpy()
        values = _as_floats(column.flatten())
    else:
        fields = column.flatten() if pyarrow.types.is_struct(column.type) else [column]
        values = np.stack([_as_floats(field) for field in fields], axis=1)
        lengths = np.full(len(column), len(fields))
    for row in np.flatnonzero(lengths != num_labels)[:1]:
        raise ValueError(
            f"{where(row)}: {lengths[row]} numbers, and the student has {num_labels} labels; give the row one number "
            "per label."
        )
    return values.reshape(-1, num_labels)


def _as_floats(column: Any) -> np.ndarray:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)
