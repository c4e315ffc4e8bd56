"""Measures teacher and student in torch and ONNX Runtime, each variant in a process of its own.

In one process an ONNX Runtime session that waits makes torch calls up to 50 times slower, because its threads spin.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..cpu import available_cores, computes_in_bf16, cpu_facts
from . import FP32_FILE, INT8_FILE
from .classifier import TWO_LABELS, length_limit, text_or_pair


if TYPE_CHECKING:
    from ..glue import TextTask
    from .classifier import TextInput

logger = logging.getLogger(__name__)  # that of transformers would import torch

PRECISIONS = {"torch": ("fp32", "bf16"), "onnxruntime": ("fp32", "int8")}
ONNX_FILES = {"fp32": FP32_FILE, "int8": INT8_FILE}
MIN_CPU_SHARE = 0.9  # below it the machine was busy with something else


@dataclass
class Variant:
    """
    One way to run one model.

    Args:
        name (`str`): What tables and pictures call it.
        role (`str`): `"teacher"` or `"student"`.
        runtime (`str`): `"torch"` or `"onnxruntime"`.
        precision (`str`): `"fp32"` or `"bf16"` in torch, `"fp32"` or `"int8"` in ONNX Runtime.
        path (`str`): Folder with `config.json`, the tokenizer's files, and the weights.
        file_name (`str`, *optional*): The ONNX file in the folder, by default `onnx/model.onnx`, and for int8
            `onnx/model_quantized.onnx`.
    """

    name: str
    role: Literal["teacher", "student"]
    runtime: Literal["torch", "onnxruntime"]
    precision: Literal["fp32", "bf16", "int8"]
    path: str
    file_name: str | None = None

    def __post_init__(self) -> None:
        self.path = str(self.path)
        if self.runtime == "onnxruntime" and self.file_name is None:
            self.file_name = ONNX_FILES.get(self.precision)

    def weight_files(self) -> list[Path]:
        """The ONNX file, or every `.safetensors` file of the checkpoint."""
        if self.file_name is not None:
            return [Path(self.path, self.file_name)]
        return sorted(Path(self.path).glob("*.safetensors"))


def default_variants(
    teacher_dir: str | os.PathLike | None, student_dir: str | os.PathLike, export_dir: str | os.PathLike
) -> list[Variant]:
    """The teacher in torch, the student in torch, and the student's ONNX files.

    Args:
        teacher_dir (`str`, *optional*): The teacher's checkpoint; without it nothing is compared with a teacher.
        student_dir (`str`): The student's checkpoint. bf16 is measured where the CPU computes in it.
        export_dir (`str`): What `export_onnx` wrote. int8 is measured where it is there.
    """
    variants = []
    if teacher_dir is not None:
        variants.append(Variant("teacher torch fp32", "teacher", "torch", "fp32", str(teacher_dir)))
    variants.append(Variant("student torch fp32", "student", "torch", "fp32", str(student_dir)))
    if computes_in_bf16():
        variants.append(Variant("student torch bf16", "student", "torch", "bf16", str(student_dir)))
    variants.append(Variant("student ONNX fp32", "student", "onnxruntime", "fp32", str(export_dir)))
    if Path(export_dir, ONNX_FILES["int8"]).is_file():
        variants.append(Variant("student ONNX int8", "student", "onnxruntime", "int8", str(export_dir)))
    return variants


def benchmark(
    variants: Sequence[Variant],
    texts: Sequence[TextInput] | None = None,
    labels: Sequence[float] | None = None,
    task: TextTask | None = None,
    *,
    split: str = "validation",
    lengths: Sequence[int] = (16, 64, 128),
    batch_sizes: Sequence[int] = (1, 8, 32),
    threads: Sequence[int] | None = None,
    max_length: int = 128,
    rounds: int = 2,
    seconds: float = 0.5,
) -> list[dict[str, Any]]:
    """
    Measure variants: latency of the model, latency and throughput from text to label, memory, and the task's metric.

    Each variant runs in a process of its own for each thread count. All of them run once before any runs again, so
    that a machine that warms up or slows down does so for all.

    Args:
        variants (sequence of [`Variant`]): What to measure, named differently.
        texts (sequence of `str`, `tuple[str, str]` or `dict`, *optional*): Texts or pairs of texts of the task.
            Without them the models' inputs are random and nothing is measured from text to label.
        labels (sequence of `int` or `float`, *optional*): Of each text its class index or score.
        task ([`~hf_kd.glue.TextTask`], *optional*): Names the metrics; needs `texts` and `labels`.
        split (`str`, *optional*, defaults to `"validation"`): Where the texts come from.
        lengths (sequence of `int`, *optional*, defaults to `(16, 64, 128)`): Inputs in tokens, without padding.
        batch_sizes (sequence of `int`, *optional*, defaults to `(1, 8, 32)`): Inputs per call.
        threads (sequence of `int`, *optional*): Threads of the runtime and the tokenizer; by default one, and as many
            as there are cores for this process.
        max_length (`int`, *optional*, defaults to 128): Where texts are cut, in tokens.
        rounds (`int`, *optional*, defaults to 2): Processes for each variant and thread count; figures are the median
            over them.
        seconds (`float`, *optional*, defaults to 0.5): Shortest time for each figure.

    Returns:
        `list[dict]`: For each variant, in the order given:
            - `variant`, `role`, `runtime`, `precision`, and `task`, the name or `None`;
            - `cpu`: the processor's name;
            - `parameters`: their number, which an ONNX file takes from the torch variant of its role before it;
              `None` without one;
            - `size_bytes`: of the weights on disk; `memory_mb`: the process's peak in 10^6 bytes, or `None` where the
              system does not tell;
            - `cpu_share`: for how much of the time the processes of one thread had a core, or `None` without such;
              below 0.9 other programs were running, and slowed down long calls more than short ones;
            - `metrics` (split to metric to value) and `main_metric` (split and name), as the rows of
              [`~hf_kd.results.write_results`] have them; `None` without a task;
            - `latency`: per `threads`, `batch_size` and `length` the `p50_ms`, `p95_ms` and `rows_per_second` of the
              model alone, the number of timed `runs`, and `p50_ms_rounds`, which shows the spread over the rounds;
            - `end_to_end`: per `threads` for single texts and for batches of 32 sorted by length `p50_ms` and `p95_ms`
              (`None` for batches), `rows_per_second` and `mean_tokens`.

    Raises:
        ValueError: For anything that cannot be measured, before the first process starts.
        RuntimeError: If a process fails, with the end of what it said.
    """
    threads = list(dict.fromkeys(threads if threads is not None else (1, available_cores())))
    numbers = {"lengths": lengths, "batch_sizes": batch_sizes, "threads": threads, "max_length": [max_length]}
    _check_numbers({**numbers, "rounds": [rounds]}, seconds)
    _check_variants(variants, max(*lengths, max_length))
    _check_task(variants, texts, labels, task)
    shared = {
        "lengths": list(lengths),
        "batch_sizes": list(batch_sizes),
        "max_length": max_length,
        "seconds": seconds,
        "texts": None if texts is None else [text_or_pair(text) for text in texts],
    }
    workers: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    metrics = {}
    with tempfile.TemporaryDirectory() as folder:
        logits_file = Path(folder, "logits.npy")
        plan = list(itertools.product(range(rounds), threads, variants))
        for number, (round_, count, variant) in enumerate(plan, start=1):
            logger.info(f"{number} of {len(plan)}: {variant.name}, threads={count}, round {round_ + 1} of {rounds}")
            spec = {"variant": asdict(variant), "threads": count, "logits_file": None, **shared}
            if task is None or labels is None or round_ > 0 or count != threads[-1]:
                workers[variant.name].append(_run_worker(spec, Path(folder)))
            else:
                spec["logits_file"] = str(logits_file)
                workers[variant.name].append(_run_worker(spec, Path(folder)))
                metrics[variant.name] = {split: _score(variant, task, np.load(logits_file), labels)}
    main_metric = None if task is None else {"split": split, "name": task.main_metric}
    rows = [
        {
            **{"variant": variant.name, "role": variant.role, "runtime": variant.runtime},
            **{"precision": variant.precision, "task": task and task.name, "cpu": cpu_facts()["model"]},
            "parameters": workers[variant.name][0]["parameters"],
            "size_bytes": sum(file.stat().st_size for file in variant.weight_files()),
            "memory_mb": _median(worker["memory_mb"] for worker in workers[variant.name]),
            "cpu_share": _median(worker["cpu_share"] for worker in workers[variant.name]),
            "metrics": metrics.get(variant.name),
            "main_metric": main_metric,
            "latency": _over_rounds(worker["latency"] for worker in workers[variant.name]),
            "end_to_end": _over_rounds(worker["end_to_end"] for worker in workers[variant.name]),
        }
        for variant in variants
    ]
    counted: dict[str, int | None] = {}
    for row in rows:
        if row["cpu_share"] is not None and row["cpu_share"] < MIN_CPU_SHARE:
            logger.warning(f"{row['variant']} had a core for {row['cpu_share']:.0%} of the time; stop other programs.")
        counted[row["role"]] = row["parameters"] = row["parameters"] or counted.get(row["role"])
    return rows


def find_latency(row: dict[str, Any], threads: int, batch_size: int, length: int) -> dict[str, Any] | None:
    """The cell of `row["latency"]` for these, or `None`."""
    wanted = (threads, batch_size, length)
    cells = row["latency"]
    return next((cell for cell in cells if (cell["threads"], cell["batch_size"], cell["length"]) == wanted), None)


def speedup(
    rows: Sequence[dict[str, Any]],
    variant: str,
    base: str | None = None,
    *,
    threads: int = 1,
    batch_size: int = 1,
    length: int = 128,
) -> float | None:
    """How many times faster a variant is than another of the same run.

    Args:
        rows (sequence of `dict`): What one call of [`benchmark`] returned; figures of two runs do not compare.
        variant (`str`): The variant's name.
        base (`str`, *optional*): The other's name, by default the first teacher's.
        threads, batch_size, length (`int`, *optional*): Which latency; by default one row of 128 tokens, one thread.

    Returns:
        `float` or `None`: The ratio of their p50; `None` without a teacher, or if this latency was not measured.
    """
    by_name = {row["variant"]: row for row in rows}
    if base is None:
        base = next((row["variant"] for row in rows if row["role"] == "teacher"), None)
        if base is None:
            return None
    for name in (variant, base):
        if name not in by_name:
            raise ValueError(f"{name!r} was not measured; choose one of {list(by_name)}.")
    slow, fast = (find_latency(by_name[name], threads, batch_size, length) for name in (base, variant))
    return slow["p50_ms"] / fast["p50_ms"] if slow and fast else None


# Checks, before the first process starts


def _check_numbers(numbers: dict[str, Sequence[int]], seconds: float) -> None:
    for name, values in numbers.items():
        if not values or not all(isinstance(value, int) and value > 0 for value in values):
            raise ValueError(f"{name}={list(values)}, but positive whole numbers are needed, at least one.")
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds={seconds}, but a positive time is needed, such as 0.5.")


def _check_variants(variants: Sequence[Variant], longest: int) -> None:
    names = [variant.name for variant in variants]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"the variants are named {names}, but at least one is needed, and different names.")
    for variant in variants:
        if variant.role not in ("teacher", "student"):
            raise ValueError(f"{variant.name}: role={variant.role!r}, but 'teacher' or 'student' is needed.")
        if variant.runtime not in PRECISIONS:
            raise ValueError(f"{variant.name}: runtime={variant.runtime!r}, but one of {list(PRECISIONS)} is needed.")
        if variant.precision not in PRECISIONS[variant.runtime]:
            raise ValueError(
                f"{variant.name}: precision={variant.precision!r}, but {variant.runtime} is measured in "
                f"{' or '.join(PRECISIONS[variant.runtime])}."
            )
        weights = variant.weight_files() or [Path(variant.path, "model.safetensors")]
        for file in (Path(variant.path, "config.json"), Path(variant.path, "tokenizer.json"), *weights):
            if not file.is_file():
                raise ValueError(
                    f"{variant.name}: {file} is missing; save model and tokenizer with `save_pretrained`, and the "
                    "ONNX files beside them with `export_onnx`."
                )
        limit = length_limit(_read_json(variant, "config.json"), _read_json(variant, "tokenizer_config.json"))
        if longest > limit:
            raise ValueError(
                f"{variant.name} takes up to {limit} tokens, but inputs of {longest} are asked for; lower `lengths` "
                "and `max_length`."
            )


def _check_task(
    variants: Sequence[Variant],
    texts: Sequence[TextInput] | None,
    labels: Sequence[float] | None,
    task: TextTask | None,
) -> None:
    if texts is not None and len(texts) == 0:
        raise ValueError("texts=[] is empty; give texts of the task, or None to measure with random inputs.")
    given = {"texts": texts, "labels": labels, "task": task}
    missing = [name for name, value in given.items() if value is None]
    if missing and (task is not None or labels is not None):
        raise ValueError(f"metrics need texts, labels and the task, but {' and '.join(missing)} are None; give all.")
    if texts is None or labels is None or task is None:
        return
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} texts have {len(labels)} labels, but each text needs one.")
    from ..glue import UNLABELED

    if UNLABELED in list(labels):
        raise ValueError(f"a label is {UNLABELED}, which marks a row without one; give labelled rows alone.")
    for variant in variants:
        try:
            task.logit_columns(_id2label(variant))
        except ValueError as error:
            raise ValueError(f"{variant.name}: {error}") from error


def _id2label(variant: Variant) -> dict[int, str]:
    id2label = _read_json(variant, "config.json").get("id2label", TWO_LABELS)
    return {int(index): name for index, name in id2label.items()}


def _read_json(variant: Variant, name: str) -> dict[str, Any]:
    path = Path(variant.path, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# The processes and what becomes of their figures


def _run_worker(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    spec_file, result_file = folder / "spec.json", folder / "result.json"
    spec_file.write_text(json.dumps(spec), encoding="utf-8")
    threads = str(spec["threads"])
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), threads),
        "TOKENIZERS_PARALLELISM": "false" if spec["threads"] == 1 else "true",
    }
    worker = subprocess.run(
        [sys.executable, "-m", f"{__package__}.benchmark_worker", str(spec_file), str(result_file)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if worker.returncode != 0:
        raise RuntimeError(
            f"measuring {spec['variant']['name']} with threads={threads} ended with code {worker.returncode}:\n"
            f"{worker.stderr[-2000:]}"
        )
    return json.loads(result_file.read_text(encoding="utf-8"))


def _score(variant: Variant, task: TextTask, logits: np.ndarray, labels: Sequence[float]) -> dict[str, float]:
    from ..glue import score_logits

    return score_logits(task, logits, labels, _id2label(variant))


def _over_rounds(tables: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One cell for each threads, batch size and length: the median of each figure, and the sum of the timed calls."""
    cells: dict[tuple, list[dict[str, Any]]] = {}
    for cell in itertools.chain.from_iterable(tables):
        cells.setdefault((cell["threads"], cell["batch_size"], cell.get("length")), []).append(cell)
    merged = []
    for same in cells.values():
        row: dict[str, Any] = {name: same[0][name] for name in ("threads", "batch_size", "length") if name in same[0]}
        row |= {name: _median(cell[name] for cell in same) for name in same[0] if name not in row}
        if "runs" in row:
            row["runs"] = sum(cell["runs"] for cell in same)
            row["p50_ms_rounds"] = [cell["p50_ms"] for cell in same]
        merged.append(row)
    return merged


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
