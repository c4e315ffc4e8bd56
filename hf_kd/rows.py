"""Reads rows from CSV, TSV, JSON, Parquet and text files, each with where it stands for the message of an error."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


Row = tuple[str, dict[str, Any]]  # where it stands ("train.csv, line 3"), for error messages; its values by column


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
                        f"{where}: {len(values)} columns, but the header has {len(header)} ({', '.join(header)}). "
                        f"Quote texts that contain {delimiter!r}, or save as .jsonl."
                    )
                if values:
                    yield where, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {reader.line_num}: {error}. Put texts that contain quotes in quotes and double the "
                "inner ones, or save as .jsonl."
            ) from None


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, delimiter="\t")


def _read_json(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    is_list = text.lstrip().startswith("[")
    where = str(path)
    try:
        for number, item in enumerate(json.loads(text) if is_list else text.split("\n"), start=1):
            where = f"{path}, {'item' if is_list else 'line'} {number}"
            if not is_list and not item.strip():
                continue
            row = item if is_list else json.loads(item)
            if not isinstance(row, dict):
                raise ValueError(f"{where}: {row!r:.60}, but an object of column names and values is needed.")
            yield where, row
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {error}. Write one object per line, or one list of objects.") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply; write one object of texts and a label per line.") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet
    from datasets import ClassLabel, Features

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"{path}: {error}. Write it anew, e.g. with DataFrame.to_parquet or Dataset.to_parquet."
        ) from None
    features = Features.from_arrow_schema(table.schema)
    classes = {name: feature for name, feature in features.items() if isinstance(feature, ClassLabel)}
    for number, row in enumerate(table.to_pylist(), start=1):
        for name, feature in classes.items():  # `datasets` writes an index, with its name in the schema
            is_there = row[name] is not None and row[name] >= 0
            row[name] = feature.int2str(row[name]) if is_there else None
        yield f"{path}, row {number}", row


def read_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", {"text": line.strip()}


READERS: dict[str, Callable[[Path], Iterator[Row]]]
READERS = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}


def read_rows(path: Path, readers: dict[str, Callable[[Path], Iterator[Row]]] = READERS) -> list[Row]:
    """
    Read a whole file with the reader of its suffix.

    Raises:
        `ValueError`: If it is missing, of another kind, not UTF-8, empty or malformed, naming the row and the fix.
    """
    if path.suffix not in readers:
        raise ValueError(f"{path}: the name has to end in {', '.join(readers)}, which says how to read it.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the file in it.")
    if not path.is_file():
        raise ValueError(f"{path} does not exist; check the path (the working folder is {Path.cwd()}).")
    try:
        rows = list(readers[path.suffix](path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it, e.g. with `iconv -f latin1 -t utf-8`.") from None
    if not rows:
        raise ValueError(f"{path} has no rows; give it one or more (below a header line in .csv and .tsv).")
    return rows


def column_names(rows: list[Row]) -> list[str]:
    """The columns that any row has."""
    return list(dict.fromkeys(column for _, row in rows for column in row))  # JSON may leave out what is empty


def require_columns(
    path: Path, columns: Sequence[str], needed: Sequence[str], fix: str = "rename its columns"
) -> None:
    """Raise a `ValueError` that names the missing columns, and the fix."""
    if missing := [column for column in needed if column not in columns]:
        raise ValueError(f"{path} has the columns {list(columns)}, but {missing} is needed; {fix}.")
