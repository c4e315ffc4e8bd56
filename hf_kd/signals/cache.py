"""Runs a teacher over a dataset once, and keeps what it said as columns on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import __version__
from ..compat import hardware_defaults
from ..origin import identify
from .batch import LABEL_COLUMNS, Signals
from .capture import Wanted, forward_columns
from .columns import STORED_AS, SignalSource, column_prefix, is_signal_column, signals_of_columns, vector_columns
from .problem import SEQUENCE_PROBLEMS, problem_of
from .shards import ShardFolder
from .teacher import AUTOCAST_DTYPES, DTYPES, Teacher
from .token_rows import INPUTS, CacheEstimate, TokenRows, in_bytes, size_of_cache


logger = logging.get_logger(__name__)

Dtype = Literal["float16", "bfloat16"]
MixedPrecision = Literal["no", "bf16", "fp16"]
# A shard is in memory while it is made, and made anew where a build was killed. It holds enough rows for batches of
# about one length, and few enough that several processes share the work evenly. Where the long rows are together, it
# may have eight times the bytes: Arrow counts the numbers of a file's rows in 32 bits.
_SHARD_BYTES = 128 * 2**20
_MIN_SHARD_ROWS, _MAX_SHARD_ROWS = 4096, 16_384
_NUM_SHARDS = 64
# Fields of a teacher's config that do not say what it answers. A forward with labels sets the problem, which the
# fingerprint has besides.
_OF_NO_ANSWER = ("_name_or_path", "transformers_version", "problem_type")


def cache_teacher_signals(
    dataset: Any,
    teacher: PreTrainedModel | Sequence[PreTrainedModel],
    wanted: Wanted | Sequence[Wanted],
    output_dir: str | os.PathLike,
    *,
    batch_size: int = 32,
    dtype: Dtype = "float16",
    mixed_precision: MixedPrecision = "no",
    teacher_dtype: str | None = None,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
) -> Any:
    """Run a teacher over every row once, and give the rows back with what it said as further columns.

    A [`DistillationTrainer`] that trains on these rows needs no teacher, and any number of epochs, seeds and students
    read the same files. They are memory mapped, so that memory does not grow with the rows. The result is a dataset
    like any other: it can be shuffled, split, concatenated with rows of the same teacher, and pushed to the Hub.

    ```python
    rows = cache_teacher_signals(rows, teacher, objective.teacher_wanted, "teacher_cache")
    trainer = DistillationTrainer(model=student, args=args, train_dataset=rows, processing_class=tokenizer)
    ```

    Under `accelerate launch` each process makes shards of its own; `output_dir` is a folder that all of them see. Call
    it again after a kill: shards that are complete are kept, and those that are torn or were altered are made again.

    | column | type | holds |
    |---|---|---|
    | `teacher_logits` | list of float32 | one number per label, in the teacher's order |
    | `teacher_hidden_6`, `teacher_queries_6`, `teacher_keys_6`, `teacher_values_6` | list of float16 | the vectors \
of all tokens of the row, one after another, without padding; in bfloat16 as its bits, in uint16 |
    | `teacher_signals` | class label | one name: what [`SignalSource`] describes |
    | `length` | int32 | tokens of the row |

    Of several teachers the names begin with `teacher_0_`, `teacher_1_`. The logits of a model with an answer per token
    are stored like the vectors.

    Args:
        dataset (`datasets.Dataset`): Tokenized rows: `input_ids`, and `attention_mask` and `token_type_ids` where the
            tokenizer writes them; other columns stay as they are.
        teacher ([`~transformers.PreTrainedModel`] or sequence of them): Frozen and put in eval mode; it ends on the
            device it was on.
        wanted ([`Wanted`] or sequence of them): The layers to keep besides the logits, of each teacher its own;
            `objective.teacher_wanted` of a bound [`DistillationObjective`].
        output_dir (`str` or `Path`): Folder of the cache. One that holds more layers is read as it is.
        batch_size (`int`, *optional*, defaults to 32): Rows per forward; they are sorted by length within a shard.
        dtype (`str`, *optional*, defaults to `"float16"`): `"float16"` or `"bfloat16"`, of what belongs to a token.
            What the rounding costs is logged, and in `cache.json`: about 2e-4 of a vector's length for float16, and
            2e-3 for bfloat16, which holds any size of number.
        mixed_precision (`str`, *optional*, defaults to `"no"`): `"bf16"` or `"fp16"`: the autocast the teacher runs
            in, as in the training.
        teacher_dtype (`str`, *optional*): As `teacher_dtype` of [`DistillationTrainingArguments`]: a copy of the
            teacher in `"bfloat16"`, for example, runs without autocast.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): What made the rows, for the fingerprint.
        device (`torch.device`, *optional*): Where the teacher runs; by default where accelerate puts this process.

    Returns:
        `datasets.Dataset`: The rows in their order, with the columns above.

    Raises:
        ValueError: If the rows are not tokenized or have such columns, the folder holds the signals of other rows or
            another teacher, its disk is too small, or the teacher gives numbers that are not finite or too large for
            float16.
    """
    import datasets

    if dtype not in STORED_AS:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(map(repr, STORED_AS))}.")
    if mixed_precision not in ("no", *AUTOCAST_DTYPES):
        names = ", ".join(map(repr, ("no", *AUTOCAST_DTYPES)))
        raise ValueError(f"mixed_precision={mixed_precision!r} must be one of {names}.")
    if teacher_dtype not in (None, *DTYPES):
        raise ValueError(f"teacher_dtype={teacher_dtype!r} must be one of {', '.join(map(repr, DTYPES))}, or None.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1: rows that the teacher reads at a time.")
    models: list[Any] = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
    all_wanted = [wanted] * len(models) if isinstance(wanted, Wanted) else list(wanted)
    if len(all_wanted) != len(models):
        raise ValueError(f"wanted names the layers of {len(all_wanted)} teachers, and there are {len(models)}.")
    _check_rows(dataset, models)
    # Unless it is told, it does not connect processes that have no accelerator, and each would make all shards.
    state = PartialState(cpu=hardware_defaults()["use_cpu"])
    if dataset._indices is not None:  # of a shuffle or a selection, which columns cannot be put beside
        dataset = dataset.flatten_indices()
    rows = TokenRows(dataset)
    devices = [model.device for model in models]
    try:
        jobs = [
            _Job(
                rows,
                Teacher(
                    model,
                    model.config,
                    teacher_dtype,
                    state.device if device is None else torch.device(device),
                    autocast_dtype=AUTOCAST_DTYPES.get(mixed_precision),
                ),
                of_model,
                Path(output_dir, f"teacher_{index}") if len(models) > 1 else Path(output_dir),
                column_prefix(index if len(models) > 1 else None),
                dtype=dtype,
                mixed_precision=mixed_precision,
                teacher_dtype=teacher_dtype,
                tokenizer=tokenizer,
            )
            for index, (model, of_model) in enumerate(zip(models, all_wanted, strict=True))
        ]
        if state.is_main_process:
            for job in jobs:
                job.plan()
                job.shards.remove_leftovers()
            _check_space(jobs, Path(output_dir))
            for job in jobs:
                job.shards.open(job.description)
        state.wait_for_everyone()
        for job in jobs:
            job.follow(job.shards.description())
        for job in jobs:
            job.run(batch_size, state)
    finally:  # the student is about to need the room
        for model, before in zip(models, devices, strict=True):
            if getattr(model, "hf_device_map", None) is None:
                model.to(before)
    columns = [job.load() for job in jobs]
    if "length" not in dataset.column_names:
        columns.append(datasets.Dataset.from_dict({"length": rows.lengths.astype(np.int32)}))
    return datasets.concatenate_datasets([dataset, *columns], axis=1)


class _Job:
    """The cache of one teacher."""

    description: dict[str, Any]
    source: SignalSource
    estimate: CacheEstimate

    def __init__(
        self,
        rows: TokenRows,
        teacher: Teacher,
        wanted: Wanted,
        folder: Path,
        prefix: str,
        *,
        dtype: Dtype,
        mixed_precision: MixedPrecision,
        teacher_dtype: str | None,
        tokenizer: Any,
    ):
        self.rows, self.teacher, self.wanted, self.prefix, self.dtype = rows, teacher, wanted, prefix, dtype
        self.problem = problem_of(teacher.model)
        if self.problem == "masked_lm":
            raise ValueError(
                "a masked language model is asked about other tokens in every epoch, so that there is nothing to "
                "keep; run the teacher in the training: teacher_model=..."
            )
        self.has_token_logits = self.problem not in SEQUENCE_PROBLEMS
        teacher.watch(wanted)
        self.config = _portable_config(teacher.config)
        self.shards = ShardFolder(folder)
        self.fingerprint = {
            "teacher weights": teacher.weights,
            "problem": self.problem,
            "tokenizer": _tokenizer_hash(tokenizer),
            "rows": {"number": len(rows), "hash": rows.hash, "longest": int(rows.lengths.max())},
            "dtype": dtype,
            "mixed precision": mixed_precision,
            "teacher dtype": teacher_dtype,
            "hf_kd": __version__,
            "transformers": metadata.version("transformers"),
        }

    def plan(self) -> None:
        """Decide what the folder holds, if it does not say so; on one process, whose word all others take."""
        self.follow(self._describe() if self.shards.is_new() else self.shards.description())

    def follow(self, description: dict[str, Any]) -> None:
        """Make and read what a folder says that it holds.

        Raises:
            ValueError: If that is not what was asked for, with what differs.
        """
        if different := self._differences(description):
            raise ValueError(
                f"{self.shards.folder} holds signals that were made from something else ({'; '.join(different)}). "
                "Give another folder, or delete this one."
            )
        self.description = description
        self.source = SignalSource.from_json(json.dumps(description["source"]))
        _, held = signals_of_columns(description["columns"])[self.prefix]
        self.teacher.watch(held)
        self.estimate = size_of_cache(self.rows, self.teacher.config, held, self.has_token_logits)
        self.rows_per_shard = description["rows_per_shard"]
        self.shards.num_shards = -(-len(self.rows) // self.rows_per_shard)

    def _describe(self) -> dict[str, Any]:
        model = self.teacher.model
        source = SignalSource(
            config=self.config,
            problem=self.problem,
            weights=self.teacher.weights,
            architecture=type(model).__name__,
            parameters=model.num_parameters(),
            origin=identify(self.teacher.config),
        )
        estimate = size_of_cache(self.rows, self.teacher.config, self.wanted, self.has_token_logits)
        mean = estimate.total_bytes // len(self.rows)
        longest = int(self.rows.num_tokens.max()) * estimate.bytes_per_token + estimate.bytes_per_row
        enough = min(max(len(self.rows) // _NUM_SHARDS, _MIN_SHARD_ROWS), _MAX_SHARD_ROWS)
        return {
            "fingerprint": self.fingerprint,
            "columns": self._columns(),
            "rows_per_shard": max(min(_SHARD_BYTES // mean, 8 * _SHARD_BYTES // longest, enough), 1),
            "source": json.loads(source.to_json()),
        }

    def _columns(self) -> list[str]:
        return [f"{self.prefix}logits", *vector_columns(self.wanted, self.prefix), f"{self.prefix}signals"]

    def _differences(self, description: dict[str, Any]) -> list[str]:
        there = {**description["fingerprint"], **_answering_fields(description["source"]["config"])}
        now = {**self.fingerprint, **_answering_fields(self.config)}
        different = [
            f"{name}: {there.get(name)} there, {now.get(name)} now"
            for name in {**now, **there}
            if there.get(name) != now.get(name)
        ]
        missing = [name for name in self._columns() if name not in description["columns"]]
        return different + ([f"wanted signals: {', '.join(missing)} not there"] if missing else [])

    def run(self, batch_size: int, state: PartialState) -> None:
        """Make the shards that are not there yet, each process its own."""
        num_rounds = -(-self.shards.num_shards // state.num_processes)
        for turn in logging.tqdm(range(num_rounds), desc="teacher", disable=not state.is_main_process):
            index = turn * state.num_processes + state.process_index
            if index < self.shards.num_shards and not self.shards.is_complete(index):
                table, rounding = self._make(index, batch_size)
                self.shards.write(index, table, self._features(), {"rounding": rounding})
            # In each round: after a restart one process may have hours to do that others would wait at the end, and
            # a process group gives up after minutes.
            state.wait_for_everyone()
        if state.is_main_process:
            self._report()

    def load(self) -> Any:
        """The columns that were asked for, memory mapped."""
        return self.shards.load().select_columns(self._columns())

    def _features(self) -> Any:
        import datasets

        stored = datasets.List(datasets.Value(str(STORED_AS[self.dtype])))
        features = dict.fromkeys(self.description["columns"], stored)
        if not self.has_token_logits:
            features[f"{self.prefix}logits"] = datasets.List(datasets.Value("float32"))
        features[f"{self.prefix}signals"] = datasets.ClassLabel(names=[self.source.to_json()])
        return datasets.Features(features)

    def _make(self, index: int, batch_size: int) -> tuple[Any, dict[str, float]]:
        """The table of a shard, and what rounding costs in it: column to relative root mean square error."""
        import pyarrow

        start = index * self.rows_per_shard
        inputs = self.rows.read(start, start + self.rows_per_shard)
        num_tokens = self.rows.num_tokens[start : start + self.rows_per_shard]
        ends = np.concatenate([[0], np.cumsum(num_tokens)])
        row_logits = np.empty((len(num_tokens), getattr(self.teacher.config, "num_labels", 0)), dtype=np.float32)
        vectors: dict[str, np.ndarray] = {}
        rounding: dict[str, float] = {}
        for chosen, signals in self._batches(inputs, batch_size):
            if not self.has_token_logits:
                self._check_finite(signals.logits, f"{self.prefix}logits")
                row_logits[chosen] = signals.logits.float().cpu().numpy()
            mask = signals.attention_mask.bool()
            batch_ends = np.concatenate([[0], np.cumsum(num_tokens[chosen])])
            for name, tensor in self._named_vectors(signals).items():
                exact = tensor[mask]  # (tokens of the batch, width)
                stored = exact.to(DTYPES[self.dtype])
                self._check_finite(stored, name, exact)
                if name not in vectors:
                    error = (stored.float() - exact.float()).norm() / exact.float().norm().clamp(min=1e-30)
                    rounding[name] = float(error)
                    vectors[name] = np.empty((ends[-1], exact.shape[1]), dtype=STORED_AS[self.dtype])
                array = stored.cpu().view(torch.int16).numpy().view(STORED_AS[self.dtype])
                for position, row in enumerate(chosen):
                    piece = array[batch_ends[position] : batch_ends[position + 1]]
                    vectors[name][ends[row] : ends[row + 1]] = piece

        columns = {name: _as_lists(array, ends * array.shape[1]) for name, array in vectors.items()}
        if not self.has_token_logits:
            row_ends = np.arange(len(row_logits) + 1) * row_logits.shape[1]
            columns[f"{self.prefix}logits"] = _as_lists(row_logits, row_ends)
        columns[f"{self.prefix}signals"] = pyarrow.array(np.zeros(len(num_tokens), dtype=np.int64))
        return pyarrow.table({name: columns[name] for name in self._features()}), rounding

    def _batches(
        self, inputs: dict[str, tuple[np.ndarray, np.ndarray]], batch_size: int
    ) -> Iterator[tuple[np.ndarray, Signals]]:
        """Rows of a shard by their index in it, longest first, and what the teacher says about them."""
        pads = {"input_ids": getattr(self.teacher.config, "pad_token_id", None) or 0}
        _, starts = inputs["input_ids"]
        lengths = np.diff(starts)
        order = np.argsort(-lengths, kind="stable")
        device = self.teacher.model.device
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = {}
            for name in {*inputs, "attention_mask"}:
                padded = np.full((len(chosen), lengths[chosen].max()), pads.get(name, 0), dtype=np.int64)
                for index, row in enumerate(chosen):
                    piece = slice(starts[row], starts[row + 1])
                    padded[index, : lengths[row]] = inputs[name][0][piece] if name in inputs else 1
                batch[name] = torch.from_numpy(padded).to(device)
            with torch.inference_mode():
                signals = self.teacher(batch)
            yield chosen, signals  # outside the block, which would go on in the code that reads this

    def _named_vectors(self, signals: Signals) -> dict[str, Tensor]:
        """Column to what is of each token, of shape `(batch, seq, width)`."""
        found = {f"{self.prefix}hidden_{layer}": x for layer, x in signals.hidden.items()}
        if self.has_token_logits:
            is_spans = self.problem == "question_answering"  # (batch, 2, seq)
            found[f"{self.prefix}logits"] = signals.logits.transpose(1, 2) if is_spans else signals.logits
        for kind in ("queries", "keys", "values"):
            for layer, x in getattr(signals, kind).items():
                found[f"{self.prefix}{kind}_{layer}"] = x.transpose(1, 2).flatten(2)
        return found

    def _check_finite(self, stored: Tensor, name: str, exact: Tensor | None = None) -> None:
        if bool(torch.isfinite(stored).all()):
            return
        if exact is not None and bool(torch.isfinite(exact).all()):
            raise ValueError(
                f"{name} has numbers up to {float(exact.abs().max()):.3g}, and float16 ends at 65504; use "
                "dtype='bfloat16'."
            )
        raise ValueError(
            f"the teacher gives {name} that are not finite; look at its weights, or run it in float32 "
            "(mixed_precision='no')."
        )

    def _report(self) -> None:
        notes = self.shards.notes()
        size = sum(note["bytes"] for note in notes)
        costs = {name: max(note["rounding"][name] for note in notes) for name in notes[0]["rounding"]}
        description = {**self.description, "bytes": size, "relative_rounding_error": costs}
        if description != self.description:  # a finished cache may be on a disk that is read-only
            self.shards.describe(description)
        worst = f"; {self.dtype} costs up to {max(costs.values()):.1e} of a vector's length" if costs else ""
        logger.warning(f"{self.shards.folder} holds the teacher's signals: {in_bytes(size)}{worst}.")


def _portable_config(config: Any) -> dict[str, Any]:
    """A config as JSON knows it, without the paths of this machine."""
    values = json.loads(json.dumps({**config.to_dict(), "model_type": config.model_type}, default=str))
    name = str(config._name_or_path or "")
    # A Hub id has one slash at most, and is relative; what it named may be gone by now.
    is_path = os.path.isdir(name) or os.path.isabs(name) or name.startswith(".") or name.count("/") > 1
    return {**values, "_name_or_path": os.path.basename(os.path.abspath(name)) if is_path else name}


def _answering_fields(config: dict[str, Any]) -> dict[str, Any]:
    """What decides what a model says, and how its classes are called."""
    return {f"teacher config, {name}": value for name, value in config.items() if name not in _OF_NO_ANSWER}


def _check_rows(dataset: Any, models: Sequence[Any]) -> None:
    names = getattr(dataset, "column_names", None) or []
    if "input_ids" not in names or not hasattr(dataset, "flatten_indices"):
        raise ValueError(
            "cache_teacher_signals needs a datasets.Dataset of tokenized rows, with a column input_ids, but was "
            f"given {type(dataset).__name__} with {names}; tokenize it first: "
            "dataset.map(lambda rows: tokenizer(rows['sentence'], truncation=True), batched=True)."
        )
    if len(dataset) == 0:
        raise ValueError("the dataset has no rows, so that there is nothing to cache; look at what filtered it.")
    there = sorted(name for name in names if is_signal_column(name))
    if there:
        raise ValueError(f"the rows have the columns {there} already; drop them with dataset.remove_columns({there}).")
    read = set().union(*(forward_columns(model) or () for model in models))
    unread = sorted(read & set(names) - {*INPUTS, *LABEL_COLUMNS})
    if unread:
        raise ValueError(
            f"the teacher reads the columns {unread} of the rows, and cache_teacher_signals gives it "
            f"{', '.join(INPUTS)} alone; drop them with dataset.remove_columns({unread}), or run the teacher in the "
            "training."
        )


def _as_lists(array: np.ndarray, row_ends: np.ndarray) -> Any:
    """An Arrow column of one list per row.

    Raises:
        pyarrow.ArrowInvalid: If there are more numbers than 32 bits count.
    """
    import pyarrow

    return pyarrow.ListArray.from_arrays(pyarrow.array(row_ends, pyarrow.int32()), pyarrow.array(array.reshape(-1)))


def _check_space(jobs: list[_Job], output_dir: Path) -> None:
    """Before the teacher runs for hours."""
    needed = sum(max(job.estimate.total_bytes - job.shards.bytes_on_disk(), 0) for job in jobs)
    for job in jobs:
        if not job.shards.is_noted():
            logger.warning(f"{job.shards.folder}: caching takes {job.estimate}.")
    there = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > 0.98 * free:
        raise ValueError(
            f"caching needs {in_bytes(needed)} in {output_dir}, where {in_bytes(free)} are free; take another "
            "folder, cache fewer layers (logits take a few bytes per row), or run the teacher in the training."
        )


def _tokenizer_hash(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:32]
