"""Text classification tasks: the nine of GLUE as one table, and the loading, tokenizing and scoring of their data."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from datasets import Dataset, DatasetDict
from scipy.stats import DegenerateDataWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.utils import logging

from .rows import READERS, Row, column_names, read_lines, read_rows, require_columns
from .soft_labels import SoftLabels, check_soft_labels, is_soft_label_column, read_soft_labels


logger = logging.get_logger(__name__)

UNLABELED = -100  # the label of a row without one; cross-entropy ignores it, a squared error has to be told

Label = tuple[str, Any]  # where it stands; what the file says

_NO_TEXT = re.compile("[\\0\ud800-\udfff]")  # what JSON and CSV let through, and tokenizers drop or refuse


@dataclass(frozen=True)
class TextTask:
    """
    What differs between one text classification task and another.

    Args:
        name (`str`): Short name; for GLUE the config name of `nyu-mll/glue`.
        text_columns (`tuple[str, ...]`): One column for single texts, two for pairs.
        label_names (`tuple[str, ...]`, *optional*): Names in index order; `None` for regression.
        metric_names (`tuple[str, ...]`): Keys of `METRICS`.
        main_metric (`str`): The metric that ranks models; `"combined_score"` is the mean of several `metric_names`.
        validation_splits (`tuple[str, ...]`, *optional*, defaults to `("validation",)`): Labelled splits kept out of
            training.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metric_names: tuple[str, ...]
    main_metric: str
    validation_splits: tuple[str, ...] = ("validation",)

    @property
    def is_regression(self) -> bool:
        return self.label_names is None

    @property
    def num_labels(self) -> int:
        return 1 if self.label_names is None else len(self.label_names)

    def logit_columns(self, id2label: Mapping[int, str]) -> list[int]:
        """Which logit of a model belongs to each class of the task, by name: a model may have another order.

        Raises:
            `ValueError`: If its classes are not those of the task. Names that say nothing (`LABEL_0`) are taken to be
                in the task's order.
        """
        names = [id2label[index] for index in range(len(id2label))]
        has_names = names != [f"LABEL_{index}" for index in range(len(names))]
        wanted = list(self.label_names) if self.label_names is not None and has_names else names[: self.num_labels]
        indices = {name.casefold(): index for index, name in enumerate(names)}
        if len(wanted) != self.num_labels or sorted(indices) != sorted(name.casefold() for name in wanted):
            raise ValueError(
                f"the model's classes are {names}, and those of task {self.name!r} are "
                f"{list(self.label_names or ['one score'])}; give the task that the model was trained on."
            )
        return [indices[name.casefold()] for name in wanted]


@dataclass(frozen=True, kw_only=True)
class GlueTask(TextTask):
    """
    A GLUE task, with how the official `glue_data` archive stores it.

    Args:
        folder (`str`): Subfolder with `train.tsv` and the `dev*.tsv` files.
        archive_text (`tuple[str, ...]`, *optional*): The files' names for the `text_columns`, where they differ.
        archive_label (`str`, *optional*, defaults to `"label"`): The files' name for `label`.
        archive_header (`tuple[str, ...]`, *optional*): Column names of files without a header line.
        has_broken_rows (`bool`, *optional*, defaults to `False`): Some rows are cut by a line break inside a text.
    """

    folder: str
    archive_text: tuple[str, ...] = ()
    archive_label: str = "label"
    archive_header: tuple[str, ...] = ()
    has_broken_rows: bool = False


_SENTENCE = ("sentence",)
_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_ACCURACY = (("accuracy",), "accuracy")
_ACCURACY_F1 = (("accuracy", "f1"), "combined_score")
_MATTHEWS = (("matthews_correlation",), "matthews_correlation")
_CORRELATIONS = (("pearson", "spearmanr"), "combined_score")

# Columns and label order are those of the Hub dataset, so that index 0 means the same to a teacher trained on it.
_TASKS = (
    GlueTask(
        *("cola", _SENTENCE, ("unacceptable", "acceptable"), *_MATTHEWS),
        folder="CoLA",
        archive_header=("source", "label", "mark", "sentence"),
    ),
    GlueTask("sst2", _SENTENCE, ("negative", "positive"), *_ACCURACY, folder="SST-2"),
    GlueTask(
        *("mrpc", _PAIR, ("not_equivalent", "equivalent"), *_ACCURACY_F1),
        folder="MRPC",
        archive_text=("#1 String", "#2 String"),
        archive_label="Quality",
    ),
    GlueTask("stsb", _PAIR, None, *_CORRELATIONS, folder="STS-B", archive_label="score"),
    GlueTask(
        *("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), *_ACCURACY_F1),
        folder="QQP",
        archive_label="is_duplicate",
        has_broken_rows=True,
    ),
    GlueTask(
        *("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), *_ACCURACY),
        validation_splits=("validation_matched", "validation_mismatched"),
        folder="MNLI",
        archive_text=_PAIR,
        archive_label="gold_label",
    ),
    GlueTask("qnli", ("question", "sentence"), _ENTAILMENT, *_ACCURACY, folder="QNLI"),
    GlueTask("rte", _PAIR, _ENTAILMENT, *_ACCURACY, folder="RTE"),
    GlueTask("wnli", _PAIR, ("not_entailment", "entailment"), *_ACCURACY, folder="WNLI"),
)
GLUE_TASKS: dict[str, GlueTask] = {task.name: task for task in _TASKS}


# GLUE: from the Hub, or from the official archive


def load_glue(
    task_name: str,
    glue_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    splits: Sequence[str] | None = None,
) -> DatasetDict:
    """
    Load a GLUE task with the task's text columns and `label`: an index into `label_names`, or a float for regression.

    Args:
        task_name (`str`): A key of `GLUE_TASKS`.
        glue_dir (`str` or `Path`, *optional*): Folder of the official archive (`CoLA/train.tsv`, ...). Without it the
            data comes from `nyu-mll/glue` on the Hub.
        cache_dir (`str` or `Path`, *optional*): Where the Hub's files are kept.
        splits (`Sequence[str]`, *optional*): Defaults to `train` and the task's `validation_splits`; name the latter
            alone to evaluate without a training file.

    Raises:
        `ValueError`: For an unknown task or split, and for archive files that are missing, empty or malformed. The
            archive's own broken QQP rows are dropped with a warning, as the Hub's version of the data drops them.
    """
    if task_name not in GLUE_TASKS:
        raise ValueError(f"`{task_name}` is not a GLUE task; use one of {', '.join(GLUE_TASKS)}.")
    task = GLUE_TASKS[task_name]
    known_splits = ("train", *task.validation_splits)
    splits = known_splits if splits is None else tuple(splits)
    if not splits or not set(splits) <= set(known_splits):
        raise ValueError(f"splits={list(splits)} for {task_name}; use any of {list(known_splits)}.")
    if glue_dir is not None:
        return DatasetDict({split: _read_archive_file(task, Path(glue_dir), split) for split in splits})
    try:
        hub_data = datasets.load_dataset("nyu-mll/glue", task_name, cache_dir=cache_dir and str(cache_dir))
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}. Offline, give the folder of the official GLUE files as `glue_dir`."
        ) from error
    features = _features(task)
    return DatasetDict({split: hub_data[split].select_columns(list(features)).cast(features) for split in splits})


def _read_archive_file(task: GlueTask, glue_dir: Path, split: str) -> Dataset:
    path = glue_dir / task.folder / f"{split.replace('validation', 'dev')}.tsv"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist. `glue_dir` is the folder that holds {task.folder}/; for evaluation without "
            f"training data use `splits={list(task.validation_splits)}`."
        )
    rows = read_rows(path, {".tsv": partial(_read_archive_rows, task=task)})
    archive_columns = zip(task.text_columns, task.archive_text or task.text_columns, strict=True)
    texts = {column: [row[archive_column] for _, row in rows] for column, archive_column in archive_columns}
    labels = [(where, row[task.archive_label]) for where, row in rows]
    _require_labels(labels)
    return _dataset(task, texts, _label_values(task, labels, may_be_indices=True))


def _read_archive_rows(path: Path, task: GlueTask) -> Iterator[Row]:
    header, broken_lines = list(task.archive_header), []
    # The archive is unquoted: every tab separates. Only "\n" ends a row, because texts may hold other line breaks.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            values = line.rstrip("\r\n").split("\t")
            if not header:
                header = values
                require_columns(path, header, (*(task.archive_text or task.text_columns), task.archive_label))
            elif len(values) == len(header):
                yield f"{path}, line {number}", dict(zip(header, values, strict=True))
            elif task.has_broken_rows:
                broken_lines.append(number)
            elif values != [""]:
                raise ValueError(
                    f"{path}, line {number}: {len(values)} tab-separated columns, but {len(header)} are needed "
                    f"({', '.join(header)}). Restore the official file, or remove the line."
                )
    if broken_lines:
        logger.warning(f"{path}: dropped {len(broken_lines)} broken rows, the first at line {broken_lines[0]}.")


# Data of the user's own


def load_text_files(
    train_file: str | Path,
    validation_file: str | Path,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
) -> tuple[DatasetDict, TextTask]:
    """
    Load `.csv`, `.tsv` (both with a header line), `.json`, `.jsonl` or `.parquet` files, and describe them as a task.

    Training rows without a label are kept with the label `UNLABELED`: a teacher can still teach on them. Soft labels
    (`teacher_probs`, `teacher_logits`, see [`~hf_kd.soft_labels.read_soft_labels`]) are kept too, and a training file
    with them needs no label column.

    Args:
        train_file (`str` or `Path`): Rows to train on.
        validation_file (`str` or `Path`): Rows to evaluate on, all of them labelled with classes that training has.
        text_columns (`Sequence[str]`, *optional*): One or two columns. Defaults to `sentence1` and `sentence2` if the
            file has both, else to every column but the label if those are one or two.
        label_column (`str`, *optional*, defaults to `"label"`): Column of the label.
        label_names (`Sequence[str]`, *optional*): Class names in index order; labels in the files are these names, or
            indices into them. Defaults to the sorted labels of the soft labels where these have names, else of the
            training file, else of the validation file. Without it, numbers that are not whole, or that JSON or Parquet
            types as floats, make the task a regression.

    Returns:
        `tuple[DatasetDict, TextTask]`: The splits `train` and `validation`, as [`load_glue`] gives them; the task.

    Raises:
        `ValueError`: For a file that does not say exactly one thing, naming the row and the fix.
    """
    label_column = label_column or "label"
    train_file, validation_file = Path(train_file), Path(validation_file)
    train_rows, validation_rows = read_rows(train_file), read_rows(validation_file)
    columns = column_names(train_rows)
    soft, validation_soft = read_soft_labels(train_rows), read_soft_labels(validation_rows)
    if not soft:
        require_columns(train_file, columns, [label_column], fix="name it with `--label_column`")
    text_columns = _choose_text_columns(train_file, columns, text_columns, label_column)
    require_columns(validation_file, column_names(validation_rows), [*text_columns, label_column])

    train_labels = [(where, row.get(label_column)) for where, row in train_rows]
    validation_labels = [(where, row.get(label_column)) for where, row in validation_rows]
    _require_one_label(train_labels + validation_labels)
    _require_labels(validation_labels)
    given_labels = [(where, label) for where, label in train_labels if _class_name(label)]
    may_be_indices = label_names is not None
    if label_names is None:
        label_names = _infer_label_names(given_labels or validation_labels)
        soft_names = next((labels.names for labels in soft.values() if labels.names is not None), None)
        if label_names is not None and soft_names is not None and not _are_same_labels(label_names, soft_names):
            label_names = _sorted_names(soft_names)  # labelled rows may be few, and of some classes alone
    if label_names is None:
        task = TextTask("custom", text_columns, None, *_CORRELATIONS)
    else:
        task = TextTask("custom", text_columns, tuple(label_names), ("accuracy", "f1_macro"), "accuracy")
    classes = set(_label_values(task, given_labels, may_be_indices))
    if len(classes) < 2 and not soft:
        raise ValueError(
            f"{train_file}: `{label_column}` has {len(classes)} different values in {len(train_rows)} rows, but two "
            "are needed to learn from; add rows of the other classes."
        )
    if len(given_labels) < len(train_rows):
        logger.warning(f"{train_file}: {len(train_rows) - len(given_labels)} of {len(train_rows)} rows have no label.")
    _check_soft_labels(task, train_rows, soft)
    _check_soft_labels(task, validation_rows, validation_soft)
    data = DatasetDict(
        train=_dataset(task, _text_values(task, train_rows), _label_values(task, train_labels, may_be_indices), soft),
        validation=_dataset(
            task,
            _text_values(task, validation_rows),
            _label_values(task, validation_labels, may_be_indices),
            validation_soft,
        ),
    )
    return data, task


def load_unlabeled_file(path: str | Path, task: TextTask) -> Dataset:
    """
    Load texts to distil on from `.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`, or for single texts `.txt` with a text
    per line.

    Args:
        path (`str` or `Path`): The file. A `label` column in it is not read; soft labels are.
        task (`TextTask`): Names the needed columns; for single texts a sole column may have any name.

    Returns:
        `Dataset`: `task.text_columns`, soft labels where the file has them, and `label`, which is `UNLABELED` in every
        row.
    """
    path = Path(path)
    rows = read_rows(path, READERS | {".txt": read_lines})
    soft = read_soft_labels(rows)
    _check_soft_labels(task, rows, soft)
    columns = [column for column in column_names(rows) if column != "label" and not is_soft_label_column(column)]
    if len(columns) == len(task.text_columns) == 1:
        rows = [(where, {task.text_columns[0]: row.get(columns[0])}) for where, row in rows]
    else:
        require_columns(path, columns, task.text_columns)
    return _dataset(task, _text_values(task, rows), [UNLABELED] * len(rows), soft)


def _choose_text_columns(
    path: Path, columns: list[str], text_columns: Sequence[str] | None, label_column: str
) -> tuple[str, ...]:
    others = [column for column in columns if column != label_column and not is_soft_label_column(column)]
    if text_columns is None:
        text_columns = _PAIR if set(_PAIR) <= set(others) else others
    require_columns(path, others, text_columns, fix="name one or two of them with `--text_columns`")
    if len(text_columns) not in (1, 2) or len(set(text_columns)) < len(text_columns):
        raise ValueError(
            f"{path}: the text columns are {list(text_columns)}, but one text or a pair is needed; name one or two of "
            f"{others} with `--text_columns`."
        )
    return tuple(text_columns)


def _infer_label_names(labels: list[Label]) -> list[str] | None:
    names = {_class_name(label) for _, label in labels}
    numbers = [number for name in names if (number := _as_float(name)) is not None]
    are_numbers = len(numbers) == len(names)
    if are_numbers and any(isinstance(label, float) for _, label in labels):
        return None
    if are_numbers and not all(number.is_integer() for number in numbers):
        return None
    return _sorted_names(names)


def _sorted_names(names: Iterable[str]) -> list[str]:
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def _are_same_labels(names: Sequence[str], others: Sequence[str]) -> bool:
    return sorted(name.casefold() for name in names) == sorted(name.casefold() for name in others)


def _check_soft_labels(task: TextTask, rows: list[Row], soft: Mapping[str, SoftLabels]) -> None:
    """What the trainer checks too, which knows nothing of files and lines."""
    for column, labels in soft.items():

        def where(row: int, column: str = column) -> str:
            return f"{rows[row][0]}: `{column}`"

        if labels.names is not None and task.label_names and not _are_same_labels(labels.names, task.label_names):
            raise ValueError(
                f"{where(0)} is of the labels {list(labels.names)}, and those of the task are "
                f"{list(task.label_names)}; give both the same names."
            )
        if labels.values.shape[1] != task.num_labels:
            raise ValueError(
                f"{where(0)} has {labels.values.shape[1]} numbers, but the labels are "
                f"{list(task.label_names or ['one score'])}; give one number for each."
            )
        check_soft_labels(labels.values, where, is_probs=column.endswith("probs"))


def _text_values(task: TextTask, rows: list[Row]) -> dict[str, list[str]]:
    for where, row in rows:
        for column in task.text_columns:
            text = row.get(column)
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}: `{column}` is {text!r}, but a text is needed; fill it, or remove the row.")
            if wrong := _NO_TEXT.search(text):
                what = "a NUL byte" if wrong[0] == "\0" else "half a surrogate pair"
                raise ValueError(
                    f"{where}: `{column}` holds {what} ({wrong[0]!r} at {wrong.start()}), which no text does; write "
                    "the file anew as UTF-8, or remove the row."
                )
    return {column: [row[column] for _, row in rows] for column in task.text_columns}


def _as_float(name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None


def _class_name(label: Any) -> str:
    """`1`, `"1"` and `"1.0"` are one class: whole numbers with a gap come out of a spreadsheet as `"1.0"`."""
    name = "" if label is None or label != label else str(label).strip()
    number = _as_float(name)
    return str(int(number)) if number is not None and number.is_integer() else name


def _label_values(task: TextTask, labels: list[Label], may_be_indices: bool) -> list[int | float]:
    """Indices into `label_names`, or scores; `UNLABELED` where the label is missing."""
    names = task.label_names or ()
    label_ids = {_class_name(name): index for index, name in enumerate(names)}
    # Names that are numbers themselves, as in ratings from 1 to 5, leave no room for indices.
    if may_be_indices and not any(_as_float(name) is not None for name in names):
        label_ids |= {str(index): index for index in range(len(names))}
    values: list[int | float] = []
    for where, label in labels:
        name = _class_name(label)
        if not name:
            values.append(UNLABELED)
        elif task.is_regression:
            score = _as_float(name)
            if score is None or not math.isfinite(score):
                raise ValueError(f"{where}: the score is {label!r}, but a finite number is needed; correct the row.")
            values.append(score)
        elif name in label_ids:
            values.append(label_ids[name])
        else:
            raise ValueError(
                f"{where}: the label is {label!r}, but one of {list(names)} is needed; correct the row (files of a "
                "public test set carry no labels)."
            )
    return values


def _require_one_label(labels: list[Label]) -> None:
    for where, label in labels:
        if isinstance(label, list | dict):
            raise ValueError(
                f"{where}: the label is {label!r:.80}, but one word or number is needed; keep one label per row."
            )


def _require_labels(labels: list[Label]) -> None:
    for where, label in labels:
        if not _class_name(label):
            raise ValueError(f"{where}: the label is empty; label the row, or remove it.")


def _features(task: TextTask) -> datasets.Features:
    # Plain integers: the `ClassLabel` of the Hub's data refuses UNLABELED, and cannot be concatenated with these.
    texts = {column: datasets.Value("string") for column in task.text_columns}
    return datasets.Features({**texts, "label": datasets.Value("float32" if task.is_regression else "int64")})


def _dataset(
    task: TextTask,
    texts: dict[str, list[str]],
    labels: Sequence[int | float],
    soft: Mapping[str, SoftLabels] | None = None,
) -> Dataset:
    columns = {name: values.as_column() for name, values in (soft or {}).items()}
    features = {**_features(task), **{name: feature for name, (_, feature) in columns.items()}}
    # Not `Dataset.from_generator`: its cache is keyed by the path, so an edited file would load as it was before.
    return Dataset.from_dict(
        {**texts, "label": labels, **{name: rows for name, (rows, _) in columns.items()}},
        features=datasets.Features(features),
    )


# From texts to model inputs, and from logits to metrics


def tokenize(
    data: Dataset | DatasetDict,
    task: TextTask,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    keep_texts: bool = False,
) -> Dataset | DatasetDict:
    """
    Turn the text columns into model inputs, truncated and not padded, and rename `label` to `labels`.

    Args:
        data (`Dataset` or `DatasetDict`): With `task.text_columns` and `label`; other columns are kept.
        task (`TextTask`): Names the text columns.
        tokenizer (`PreTrainedTokenizerBase`): Segment ids are written if they are among its `model_input_names`.
        max_seq_length (`int`): Longest input in tokens, special tokens included.
        keep_texts (`bool`, *optional*, defaults to `False`):
            Whether the text columns stay, for a teacher with a tokenizer of its own.

    Returns:
        `Dataset` or `DatasetDict`: `input_ids`, `attention_mask`, `token_type_ids` and `labels`.
    """
    special_tokens = tokenizer.num_special_tokens_to_add(pair=len(task.text_columns) == 2)
    if not special_tokens < max_seq_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_seq_length={max_seq_length}; the tokenizer takes from {special_tokens + 1} (with {special_tokens} "
            f"special tokens) to {tokenizer.model_max_length} tokens."
        )

    def encode(batch: dict[str, list[str]]) -> dict[str, list]:
        inputs = tokenizer(
            *(batch[column] for column in task.text_columns),
            truncation=True,
            max_length=max_seq_length,
            return_attention_mask=True,
            return_token_type_ids="token_type_ids" in tokenizer.model_input_names,
        )
        return dict(inputs)

    removed = [] if keep_texts else list(task.text_columns)
    encoded = data.map(encode, batched=True, remove_columns=removed, desc=f"Tokenizing {task.name}")
    return encoded.rename_column("label", "labels")


def _correlation(correlate: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(references: np.ndarray, predictions: np.ndarray) -> float:
        if len(references) < 2 or np.ptp(references) == 0 or np.ptp(predictions) == 0:
            return 0.0  # undefined; a model that answers the same to everything knows nothing
        return correlate(references, predictions).statistic

    return score


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": lambda references, predictions: f1_score(references, predictions, zero_division=0.0),
    "f1_macro": lambda references, predictions: f1_score(references, predictions, average="macro", zero_division=0.0),
    "matthews_correlation": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
}


class GlueMetric(evaluate.Metric):
    """
    The metrics of a task, from scikit-learn and scipy: `evaluate.load("glue", ...)` needs the Hub, also when offline.

    `compute(predictions=..., references=...)` returns the task's `metric_names`, and `combined_score` if there are
    several.

    Args:
        task (`TextTask`): Names the metrics.
    """

    def __init__(self, task: TextTask):
        self.task = task
        # In memory: concurrent runs share nothing. Metrics here are computed by one process, on gathered predictions.
        super().__init__(config_name=task.name, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("float64" if self.task.is_regression else "int64")
        return evaluate.MetricInfo(
            description=f"Metrics of {self.task.name}: {', '.join(self.task.metric_names)}.",
            citation="",
            inputs_description="predictions and references: class indices, or scores for regression.",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        # Not `format="numpy"` in `_info`: it rounds scores to float32.
        y_pred, y_true = np.asarray(predictions), np.asarray(references)
        if unlabeled := references.count(UNLABELED):
            raise ValueError(
                f"{unlabeled} of {len(references)} references are {UNLABELED}; evaluate on labelled rows."
            )
        with warnings.catch_warnings():
            # A model that predicts one class, or nearly one score, is a result and not a defect of the data.
            warnings.simplefilter("ignore", DegenerateDataWarning)
            warnings.filterwarnings("ignore", message="A single label was found")
            scores = {name: float(METRICS[name](y_true, y_pred)) for name in self.task.metric_names}
        if len(scores) > 1:
            scores["combined_score"] = float(np.mean(list(scores.values())))
        return scores


def score_logits(
    task: TextTask, logits: np.ndarray, labels: Sequence[float] | np.ndarray, id2label: Mapping[int, str]
) -> dict[str, float]:
    """Metrics of a model's logits `(rows, classes)`, whose classes `id2label` names in its own order."""
    predictions = logits[:, task.logit_columns(id2label)]
    return compute_metrics_fn(task)(EvalPrediction(predictions=predictions, label_ids=np.asarray(labels)))


def compute_metrics_fn(task: TextTask) -> Callable[[EvalPrediction], dict[str, float]]:
    """The `compute_metrics` of a `Trainer` for this task; of a tuple of model outputs the first is the logits."""
    metric = GlueMetric(task)

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        logits = evaluation.predictions[0] if isinstance(evaluation.predictions, tuple) else evaluation.predictions
        predictions = logits.reshape(len(logits)) if task.is_regression else logits.argmax(axis=-1)
        return metric.compute(predictions=predictions, references=evaluation.label_ids)

    return compute_metrics
