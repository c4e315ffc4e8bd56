"""Runs a teacher over a dataset once, and keeps what it said as columns on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .batch import Signals
from .capture import Wanted
from .columns import STORED_AS, SignalSource, column_prefix, is_signal_column, vector_columns
from .problem import SEQUENCE_PROBLEMS, problem_of
from .shards import ShardFolder
from .teacher import DTYPES, Teacher


logger = logging.get_logger(__name__)

Dtype = Literal["float16", "bfloat16"]
MixedPrecision = Literal["no", "bf16", "fp16"]
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# A shard is in memory while it is made, and made anew where a build was killed.
_SHARD_BYTES = 128 * 2**20
_MAX_SHARD_ROWS = 16_384


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
            f"{self.total_bytes / 1e9:.2f} GB: {self.rows:,} rows with {self.tokens:,} tokens, "
            f"{self.bytes_per_token:,} bytes per token and {self.bytes_per_row:,} per row"
        )


def cache_teacher_signals(
    dataset: Any,
    teacher: PreTrainedModel | Sequence[PreTrainedModel],
    wanted: Wanted | Sequence[Wanted],
    output_dir: str | os.PathLike,
    *,
    batch_size: int = 32,
    dtype: Dtype = "float16",
    mixed_precision: MixedPrecision = "no",
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
    | `teacher_logits` | list of float32 | one number per label, in the teacher's order; for a model with an answer per \
token, in `dtype`, those of all tokens one after another |
    | `teacher_hidden_6`, `teacher_queries_6`, `teacher_keys_6`, `teacher_values_6` | list of float16, or of uint16 for \
the bits of bfloat16 | the vectors of all tokens of the row, one after another, without padding |
    | `teacher_signals` | class label | one name: what [`SignalSource`] describes |
    | `length` | int32 | tokens of the row |

    Of several teachers the names begin with `teacher_0_`, `teacher_1_`.

    Args:
        dataset (`datasets.Dataset`): Tokenized rows: `input_ids`, and `attention_mask` and `token_type_ids` where the
            tokenizer writes them; other columns stay as they are.
        teacher ([`~transformers.PreTrainedModel`] or sequence of them): Frozen and put in eval mode.
        wanted ([`Wanted`] or sequence of them): The layers to keep besides the logits, of each teacher its own;
            `objective.teacher_wanted` of a bound [`DistillationObjective`].
        output_dir (`str` or `Path`): Folder of the cache.
        batch_size (`int`, *optional*, defaults to 32): Rows per forward; they are sorted by length within a shard.
        dtype (`str`, *optional*, defaults to `"float16"`): `"float16"` or `"bfloat16"`, of what belongs to a token.
            What the rounding costs is logged, and in `cache.json`: about 2e-4 of a vector's length for float16, and
            2e-3 for bfloat16, which holds any size of number.
        mixed_precision (`str`, *optional*, defaults to `"no"`): `"bf16"` or `"fp16"`: the autocast the teacher runs
            in, as in the training.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): What made the rows, for the fingerprint.
        device (`torch.device`, *optional*): Where the teacher runs; by default where accelerate puts this process.

    Returns:
        `datasets.Dataset`: The rows in their order, with the columns above.

    Raises:
        ValueError: If the rows are not tokenized or have such columns, the folder holds the signals of other rows or
            another teacher or is too small, or the teacher gives numbers that are not finite or too large for
            float16.
    """
    import datasets

    _check_rows(dataset)
    if dtype not in STORED_AS:
        raise ValueError(f"dtype={dtype!r} must be one of 'float16', 'bfloat16'.")
    several = isinstance(teacher, list | tuple)
    models: list[Any] = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
    all_wanted = [wanted] * len(models) if isinstance(wanted, Wanted) else list(wanted)
    state = PartialState()
    if dataset._indices is not None:  # of a shuffle or a selection, which columns cannot be put beside
        dataset = dataset.flatten_indices()
    rows = _Rows(dataset)
    jobs = [
        _Job(
            rows,
            Teacher(model, model.config, device=torch.device(device) if device is not None else state.device),
            of_model,
            Path(output_dir, f"teacher_{index}") if several and len(models) > 1 else Path(output_dir),
            column_prefix(index if several and len(models) > 1 else None),
            dtype=dtype,
            mixed_precision=mixed_precision,
            tokenizer=tokenizer,
        )
        for index, (model, of_model) in enumerate(zip(models, all_wanted, strict=True))
    ]
    if state.is_main_process:
        _check_space(jobs, Path(output_dir))
    for job in jobs:
        job.open(state)
    for job in jobs:
        job.run(batch_size, state)
    columns = [job.load() for job in jobs]
    if "length" not in dataset.column_names:
        columns.append(datasets.Dataset.from_dict({"length": rows.lengths.astype(np.int32)}))
    return datasets.concatenate_datasets([dataset, *columns], axis=1)


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
    return _estimate(_Rows(dataset), teacher_config, wanted, has_token_logits)


def _estimate(rows: _Rows, config: Any, wanted: Wanted, has_token_logits: bool) -> CacheEstimate:
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


class _Rows:
    """The columns of a dataset that a teacher reads, as numbers without Python lists."""

    def __init__(self, dataset: Any):
        self.names = [name for name in _INPUTS if name in dataset.column_names]
        self._dataset = dataset.select_columns(self.names).with_format("arrow")
        lengths, num_tokens = [], []
        for batch in self._dataset.iter(batch_size=10_000):
            values, ends = _flat(batch["attention_mask" if "attention_mask" in self.names else "input_ids"])
            lengths.append(np.diff(ends))
            counted = values if "attention_mask" in self.names else np.ones_like(values)
            sums = np.concatenate([[0], np.cumsum(counted, dtype=np.int64)])
            num_tokens.append(sums[ends[1:]] - sums[ends[:-1]])
        self.lengths = np.concatenate(lengths or [np.zeros(0, np.int64)])
        self.num_tokens = np.concatenate(num_tokens or [np.zeros(0, np.int64)])

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, start: int, stop: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Column to its values one after another, and where each row begins and ends among them."""
        table = self._dataset[start:stop]
        return {name: _flat(table[name]) for name in self.names}

    def digest(self) -> str:
        """A hash of everything the teacher reads."""
        digest = hashlib.sha256()
        for start in range(0, len(self), 50_000):
            for name, (values, ends) in self.read(start, start + 50_000).items():
                digest.update(name.encode())
                digest.update(np.ascontiguousarray(values, dtype=np.int32))
                digest.update(np.ascontiguousarray(ends, dtype=np.int64))
        return digest.hexdigest()[:32]


def _flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    column = column.combine_chunks()
    column = column.chunk(0) if hasattr(column, "chunks") else column
    offsets = column.offsets.to_numpy()
    return column.values.to_numpy()[offsets[0] : offsets[-1]], offsets.astype(np.int64) - offsets[0]


class _Job:
    """The cache of one teacher."""

    def __init__(
        self,
        rows: _Rows,
        teacher: Teacher,
        wanted: Wanted,
        folder: Path,
        prefix: str,
        *,
        dtype: Dtype,
        mixed_precision: MixedPrecision,
        tokenizer: Any,
    ):
        self.rows, self.teacher, self.wanted, self.prefix, self.dtype = rows, teacher, wanted, prefix, dtype
        self.autocast_dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
        self.problem = problem_of(teacher.model)
        if self.problem == "masked_lm":
            raise ValueError(
                "a masked language model is asked about other tokens in every epoch, so that there is nothing to keep; "
                "run the teacher in the training: teacher_model=..."
            )
        self.has_token_logits = self.problem not in SEQUENCE_PROBLEMS
        teacher.watch(wanted)
        config = {**teacher.config.to_dict(), "model_type": teacher.config.model_type}
        path = str(teacher.config._name_or_path)
        config["_name_or_path"] = os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else path
        self.source = SignalSource(
            config=json.loads(json.dumps(config, default=str)),
            problem=self.problem,
            dtype=dtype,
            weights=teacher.weights,
            architecture=type(teacher.model).__name__,
            parameters=teacher.model.num_parameters(),
        )
        self.estimate = _estimate(rows, teacher.config, wanted, self.has_token_logits)
        per_row = max(self.estimate.total_bytes // max(len(rows), 1), 1)
        self.rows_per_shard = int(min(max(_SHARD_BYTES // per_row, 64), _MAX_SHARD_ROWS))
        self.shards = ShardFolder(folder, num_shards=-(-len(rows) // self.rows_per_shard))
        self.fingerprint = {
            "teacher weights": teacher.weights,
            "tokenizer": _tokenizer_hash(tokenizer),
            "rows": {"number": len(rows), "hash": rows.digest(), "longest": int(rows.lengths.max(initial=0))},
            "wanted signals": vector_columns(wanted, prefix),
            "dtype": dtype,
            "mixed precision": mixed_precision,
            "rows per shard": self.rows_per_shard,
            "hf_kd": metadata.version("hf_kd"),
            "transformers": metadata.version("transformers"),
        }

    def open(self, state: PartialState) -> None:
        """Write what the folder holds, or check that it holds that; on all processes."""
        if state.is_main_process:
            self.shards.open(self.fingerprint)
        state.wait_for_everyone()
        self.shards.check(self.fingerprint)

    def run(self, batch_size: int, state: PartialState) -> None:
        """Make the shards of this process that are not there yet."""
        own = range(state.process_index, self.shards.num_shards, state.num_processes)
        missing = [index for index in own if not self.shards.is_complete(index)]
        for index in logging.tqdm(missing, desc="teacher", disable=not (missing and state.is_main_process)):
            table, rounding = self._make(index, batch_size)
            self.shards.write(index, table, self._features(), {"rounding": rounding})
        state.wait_for_everyone()
        if state.is_main_process:
            self._report()

    def load(self) -> Any:
        """The columns, memory mapped."""
        return self.shards.load(self._features())

    def _features(self) -> Any:
        import datasets

        stored = datasets.Value(str(STORED_AS[self.dtype]))
        logits = stored if self.has_token_logits else datasets.Value("float32")
        features = {f"{self.prefix}logits": datasets.List(logits)}
        features |= {name: datasets.List(stored) for name in vector_columns(self.wanted, self.prefix)}
        features[f"{self.prefix}signals"] = datasets.ClassLabel(names=[self.source.to_json()])
        return datasets.Features(features)

    def _make(self, index: int, batch_size: int) -> tuple[Any, dict[str, float]]:
        """The table of a shard, and what rounding costs in it: column to relative root mean square error."""
        import pyarrow

        start = index * self.rows_per_shard
        inputs = self.rows.read(start, start + self.rows_per_shard)
        num_tokens = self.rows.num_tokens[start : start + self.rows_per_shard]
        num_rows = len(num_tokens)
        logits = np.empty((num_rows, getattr(self.teacher.config, "num_labels", 0)), dtype=np.float32)
        vectors: dict[str, np.ndarray] = {}
        ends = np.concatenate([[0], np.cumsum(num_tokens)])
        rounding: dict[str, float] = {}
        for chosen, signals in self._batches(inputs, batch_size):
            named = self._named_vectors(signals)
            if self.has_token_logits:
                is_spans = self.problem == "question_answering"
                named[f"{self.prefix}logits"] = signals.logits.transpose(1, 2) if is_spans else signals.logits
            else:
                self._check_finite(signals.logits, "logits")
                logits[chosen] = signals.logits.float().cpu().numpy()
            mask = signals.attention_mask.cpu().numpy().astype(bool)
            for name, tensor in named.items():
                is_first = name not in rounding
                stored = tensor.to(DTYPES[self.dtype])
                self._check_finite(stored, name, tensor)
                if is_first:
                    exact = tensor.float()
                    rounding[name] = float((stored.float() - exact).norm() / exact.norm().clamp(min=1e-30))
                    vectors[name] = np.empty((ends[-1], tensor.shape[-1]), dtype=STORED_AS[self.dtype])
                array = stored.cpu().view(torch.int16).numpy().view(STORED_AS[self.dtype])
                for row, values, is_token in zip(chosen, array, mask, strict=True):
                    vectors[name][ends[row] : ends[row + 1]] = values[is_token]

        def as_lists(array: np.ndarray, row_ends: np.ndarray) -> Any:
            flat = pyarrow.array(array.reshape(-1))
            return pyarrow.ListArray.from_arrays(pyarrow.array(row_ends.astype(np.int32)), flat)

        columns = {}
        for name in self._features():
            if name in vectors:
                columns[name] = as_lists(vectors[name], ends * vectors[name].shape[1])
            elif name == f"{self.prefix}logits":
                columns[name] = as_lists(logits, np.arange(num_rows + 1) * logits.shape[1])
            else:
                columns[name] = pyarrow.array(np.zeros(num_rows, dtype=np.int64))
        return pyarrow.table(columns), rounding

    def _batches(
        self, inputs: dict[str, tuple[np.ndarray, np.ndarray]], batch_size: int
    ) -> Iterator[tuple[np.ndarray, Signals]]:
        """Rows of a shard by their index in it, longest first, and what the teacher says about them."""
        pads = {"input_ids": getattr(self.teacher.config, "pad_token_id", None) or 0}
        _, starts = inputs["input_ids"]
        lengths = np.diff(starts)
        order = np.argsort(-lengths, kind="stable")
        device = self.teacher.model.device
        autocast = torch.autocast(device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = {}
            for name in {*inputs, "attention_mask"}:
                padded = np.full((len(chosen), lengths[chosen].max()), pads.get(name, 0), dtype=np.int64)
                for index, row in enumerate(chosen):
                    piece = slice(starts[row], starts[row + 1])
                    padded[index, : lengths[row]] = inputs[name][0][piece] if name in inputs else 1
                batch[name] = torch.from_numpy(padded).to(device)
            with torch.inference_mode(), autocast:
                yield chosen, self.teacher(batch)

    def _named_vectors(self, signals: Signals) -> dict[str, Tensor]:
        """Column to vectors of shape `(batch, seq, width)`."""
        found = {f"{self.prefix}hidden_{layer}": x for layer, x in signals.hidden.items()}
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
        raise ValueError(f"the teacher's {name} are not finite; look at its weights, or run it in float32.")

    def _report(self) -> None:
        notes = self.shards.notes()
        costs: dict[str, float] = {}
        for note in notes:
            for name, value in note.get("rounding", {}).items():
                costs[name] = max(costs.get(name, 0.0), value)
        size = sum(note["bytes"] for note in notes)
        self.shards.describe(self.fingerprint, {"bytes": size, "relative_rounding_error": costs})
        worst = f"; {self.dtype} costs {max(costs.values()):.1e} of a vector's length" if costs else ""
        logger.warning(f"{self.shards.folder} holds the teacher's signals: {size / 1e9:.2f} GB{worst}.")


def _check_rows(dataset: Any) -> None:
    names = getattr(dataset, "column_names", None) or []
    if "input_ids" not in names or not hasattr(dataset, "flatten_indices"):
        raise ValueError(
            f"cache_teacher_signals needs a datasets.Dataset of tokenized rows, with a column input_ids, but was given "
            f"{type(dataset).__name__} with {names}; tokenize it first: "
            "dataset.map(lambda rows: tokenizer(rows['sentence'], truncation=True), batched=True)."
        )
    there = sorted(name for name in names if is_signal_column(name))
    if there:
        raise ValueError(f"the rows have the columns {there} already; drop them with dataset.remove_columns.")


def _check_space(jobs: list[_Job], output_dir: Path) -> None:
    """Before the teacher runs for hours."""
    needed = sum(max(job.estimate.total_bytes - job.shards.bytes_on_disk(), 0) for job in jobs)
    for job in jobs:
        logger.warning(f"{job.shards.folder}: caching takes {job.estimate}.")
    there = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > 0.98 * free:
        raise ValueError(
            f"caching needs {needed / 1e9:.2f} GB in {output_dir}, where {free / 1e9:.2f} GB are free; take another "
            "folder, cache fewer layers (logits take a few bytes per row), or run the teacher in the training."
        )


def _tokenizer_hash(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:32]
