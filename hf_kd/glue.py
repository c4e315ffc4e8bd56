"""Text classification tasks: the nine of GLUE as one table, and the loading, tokenizing and scoring of their data."""

import csv
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


logger = logging.get_logger(__name__)

UNLABELED = -100  # the label of a row without one; cross-entropy ignores it, a squared error has to be told


@dataclass(frozen=True)
class ArchiveFiles:
    """
    How the official `glue_data` archive stores a task.

    Args:
        folder (`str`): Subfolder with `train.tsv` and the `dev*.tsv` files.
        text_columns (`tuple[str, ...]`): The files' columns that become the task's text columns, in that order.
        label_column (`str`, *optional*, defaults to `"label"`): The files' column that becomes `label`.
        header (`tuple[str, ...]`, *optional*): Column names of files without a header line.
        has_label_names (`bool`, *optional*, defaults to `False`): Labels are written as names rather than as indices.
        has_broken_rows (`bool`, *optional*, defaults to `False`): Some rows are cut by a line break inside a text.
    """

    folder: str
    text_columns: tuple[str, ...]
    label_column: str = "label"
    header: tuple[str, ...] | None = None
    has_label_names: bool = False
    has_broken_rows: bool = False


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
        archive (`ArchiveFiles`, *optional*): The task's files in the official `glue_data` archive.
    """

    name: str
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metric_names: tuple[str, ...]
    main_metric: str
    validation_splits: tuple[str, ...] = ("validation",)
    archive: ArchiveFiles | None = None

    @property
    def is_regression(self) -> bool:
        return self.label_names is None

    @property
    def num_labels(self) -> int:
        return 1 if self.label_names is None else len(self.label_names)


_SENTENCE = ("sentence",)
_PAIR = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")
_ENTAILMENT = ("entailment", "not_entailment")
_ACCURACY = (("accuracy",), "accuracy")
_ACCURACY_F1 = (("accuracy", "f1"), "combined_score")
_MATTHEWS = (("matthews_correlation",), "matthews_correlation")
_CORRELATIONS = (("pearson", "spearmanr"), "combined_score")

# Columns and label order are those of the Hub dataset, so that index 0 means the same to a teacher trained on it.
GLUE_TASKS: dict[str, TextTask] = {
    "cola": TextTask(
        *("cola", _SENTENCE, ("unacceptable", "acceptable"), *_MATTHEWS),
        archive=ArchiveFiles("CoLA", _SENTENCE, header=("source", "label", "mark", "sentence")),
    ),
    "sst2": TextTask(
        *("sst2", _SENTENCE, ("negative", "positive"), *_ACCURACY),
        archive=ArchiveFiles("SST-2", _SENTENCE),
    ),
    "mrpc": TextTask(
        *("mrpc", _PAIR, ("not_equivalent", "equivalent"), *_ACCURACY_F1),
        archive=ArchiveFiles("MRPC", ("#1 String", "#2 String"), "Quality"),
    ),
    "stsb": TextTask(
        *("stsb", _PAIR, None, *_CORRELATIONS),
        archive=ArchiveFiles("STS-B", _PAIR, "score"),
    ),
    "qqp": TextTask(
        *("qqp", _QUESTIONS, ("not_duplicate", "duplicate"), *_ACCURACY_F1),
        archive=ArchiveFiles("QQP", _QUESTIONS, "is_duplicate", has_broken_rows=True),
    ),
    "mnli": TextTask(
        *("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), *_ACCURACY),
        validation_splits=("validation_matched", "validation_mismatched"),
        archive=ArchiveFiles("MNLI", _PAIR, "gold_label", has_label_names=True),
    ),
    "qnli": TextTask(
        *("qnli", ("question", "sentence"), _ENTAILMENT, *_ACCURACY),
        archive=ArchiveFiles("QNLI", ("question", "sentence"), has_label_names=True),
    ),
    "rte": TextTask(
        *("rte", _PAIR, _ENTAILMENT, *_ACCURACY),
        archive=ArchiveFiles("RTE", _PAIR, has_label_names=True),
    ),
    "wnli": TextTask(
        *("wnli", _PAIR, ("not_entailment", "entailment"), *_ACCURACY),
        archive=ArchiveFiles("WNLI", _PAIR),
    ),
}


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
        raise ConnectionError(f"{error}. Offline, give the folder of the official GLUE files as `glue_dir`.") from error
    features = _features(task)
    return DatasetDict({split: hub_data[split].select_columns(list(features)).cast(features) for split in splits})


def _read_archive_file(task: TextTask, glue_dir: Path, split: str) -> Dataset:
    files = task.archive
    path = glue_dir / files.folder / f"{split.replace('validation', 'dev')}.tsv"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist. `glue_dir` is the folder that holds {files.folder}/; for evaluation without "
            f"training data use `splits={list(task.validation_splits)}`."
        )
    label_keys = task.label_names if files.has_label_names else [str(index) for index in range(task.num_labels)]
    label_ids = {key: index for index, key in enumerate(label_keys)}
    columns, labels, broken_lines = [[] for _ in task.text_columns], [], []
    header = files.header
    # The archive is unquoted: a line is a row and every tab separates. Only "\n" ends a line, texts may hold "\r".
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line_number, line in enumerate(_decoded(file, path), start=1):
            values = line.rstrip("\r\n").split("\t")
            if header is None:
                header = tuple(values)
                _require_columns(path, header, (*files.text_columns, files.label_column))
                continue
            if values == [""]:
                continue
            where = f"{path}, line {line_number}"
            if len(values) != len(header):
                if files.has_broken_rows:
                    broken_lines.append(line_number)
                    continue
                raise ValueError(
                    f"{where}: {len(values)} tab-separated columns, but needs {len(header)} ({', '.join(header)}). "
                    "Restore the official file, or remove the line."
                )
            row = dict(zip(header, values, strict=True))
            label = row[files.label_column]
            if task.is_regression:
                labels.append(_finite_score(label, where))
            elif label in label_ids:
                labels.append(label_ids[label])
            else:
                raise ValueError(
                    f"{where}: `{files.label_column}` is {label!r}, but needs one of {list(label_ids)}. The public test "
                    "files carry no labels; restore the official train/dev file, or correct the line."
                )
            for column, name in zip(columns, files.text_columns, strict=True):
                column.append(row[name])
    if not labels:
        raise ValueError(f"{path} has no rows; restore the official file.")
    if broken_lines:
        logger.warning(f"{path}: dropped {len(broken_lines)} broken rows, the first at line {broken_lines[0]}.")
    return _dataset(task, columns, labels)


# Data of the user's own


def load_text_files(
    train_file: str | Path,
    validation_file: str | Path,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
) -> tuple[DatasetDict, TextTask]:
    """
    Load labelled `.csv`, `.tsv` (both with a header line), `.json` or `.jsonl` files, and describe them as a task.

    Training rows without a label are kept with the label `UNLABELED`: a teacher can still teach on them.

    Args:
        train_file (`str` or `Path`): Rows to train on.
        validation_file (`str` or `Path`): Rows to evaluate on; every one has a label, and each occurs in training.
        text_columns (`Sequence[str]`, *optional*): One or two columns. Defaults to `sentence1` and `sentence2` if the
            file has both, else to every column but the label if those are one or two.
        label_column (`str`, *optional*, defaults to `"label"`): Column of the label.
        label_names (`Sequence[str]`, *optional*): Class names in index order; labels in the files are these names or
            indices into them. Defaults to the sorted labels of the training file. Without it, labels with a decimal
            fraction, or typed as floats in JSON, make the task a regression.

    Returns:
        `tuple[DatasetDict, TextTask]`: The splits `train` and `validation`, as [`load_glue`] gives them; the task.

    Raises:
        `ValueError`: For a file that cannot be read exactly as it stands, naming the row and the fix.
    """
    label_column = label_column or "label"
    train_file, validation_file = Path(train_file), Path(validation_file)
    train_columns, train_rows = _read_rows(train_file)
    columns, validation_rows = _read_rows(validation_file)
    _require_columns(train_file, train_columns, (label_column,), flag="--label_column")
    text_columns = _choose_text_columns(train_file, train_columns, text_columns, label_column)
    _require_columns(validation_file, columns, (*text_columns, label_column))

    train_labels = [(where, row.get(label_column)) for where, row in train_rows]
    validation_labels = [(where, row.get(label_column)) for where, row in validation_rows]
    given = [(where, label) for where, label in train_labels if not _is_missing(label)]
    if not given:
        raise ValueError(f"{train_file}: no row has a `{label_column}`; some are needed to know the classes.")
    for where, label in validation_labels:
        if _is_missing(label):
            raise ValueError(f"{where}: `{label_column}` is empty; label the row, or remove it from validation.")
    if label_names is None:
        label_names = _infer_label_names(given)
    elif len(set(label_names)) < max(2, len(label_names)):
        raise ValueError(f"label_names={list(label_names)}; give two or more different names.")

    is_regression = label_names is None
    task = TextTask(
        name="custom",
        text_columns=text_columns,
        label_names=None if is_regression else tuple(label_names),
        metric_names=("pearson", "spearmanr") if is_regression else ("accuracy", "f1_macro"),
        main_metric="combined_score" if is_regression else "accuracy",
    )
    if not is_regression and len(classes := {_label_value(task, *label) for label in given}) < 2:
        raise ValueError(
            f"{train_file}: every `{label_column}` is {task.label_names[classes.pop()]!r}; two or more classes are needed."
        )
    if len(given) < len(train_rows):
        logger.warning(f"{train_file}: {len(train_rows) - len(given)} of {len(train_rows)} rows have no label.")
    data = DatasetDict(
        train=_dataset_from_rows(task, train_rows, train_labels),
        validation=_dataset_from_rows(task, validation_rows, validation_labels),
    )
    return data, task


def load_unlabeled_file(path: str | Path, task: TextTask) -> Dataset:
    """
    Load texts to distil on: `.csv`, `.tsv`, `.json` or `.jsonl`, or for single texts `.txt` with one text per line.

    Args:
        path (`str` or `Path`): The file. Labels in it are not read.
        task (`TextTask`): Its text columns are needed; for single texts a sole column may have any name.

    Returns:
        `Dataset`: `task.text_columns` and `label`, which is `UNLABELED` in every row.
    """
    path = Path(path)
    columns, rows = _read_rows(path, _READERS | {".txt": _read_lines})
    others = [column for column in columns if column != "label"]
    if len(task.text_columns) == len(others) == 1:
        rows = [(where, {task.text_columns[0]: row.get(others[0])}) for where, row in rows]
    else:
        _require_columns(path, columns, task.text_columns)
    return _dataset_from_rows(task, rows, [(where, None) for where, _ in rows])


Row = tuple[str, dict[str, Any]]  # where it stands ("file, line 3") for error messages, and its values by column


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # strict: a stray quote is an error, where the default would swallow the rows up to the next one.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: a column name occurs twice in the header {header}; rename one.")
            for values in reader:
                where = f"{path}, line {reader.line_num}"
                if values and len(values) != len(header):
                    raise ValueError(
                        f"{where}: {len(values)} columns, but the header has {len(header)} ({', '.join(header)}). Quote "
                        f"texts that contain {delimiter!r}, or save as .jsonl."
                    )
                if values:
                    yield where, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: {error}. Enclose texts with quotes in them in quotes and double the "
                "inner ones, or save as .jsonl."
            ) from None


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, delimiter="\t")


def _read_json(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    is_list = text.lstrip().startswith("[")
    try:
        where = str(path)
        items = enumerate(json.loads(text) if is_list else text.split("\n"), start=1)
        for number, item in items:
            where = f"{path}, {'item' if is_list else 'line'} {number}"
            if not is_list and not item.strip():
                continue
            row = item if is_list else json.loads(item)
            if not isinstance(row, dict):
                raise ValueError(f"{where}: found {row!r:.60}, but needs an object of column names and values.")
            yield where, row
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {error}. Write one object per line, or one list of objects.") from None


def _read_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", {"text": line.strip()}


_READERS = {".csv": _read_csv, ".tsv": _read_tsv, ".json": _read_json, ".jsonl": _read_json}
