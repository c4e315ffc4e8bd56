"""The process in which [`~hf_kd.deploy.benchmark.benchmark`] measures one variant.

python -m hf_kd.deploy.benchmark_worker SPEC.json RESULT.json

A process that serves ONNX Runtime imports no torch, whose threads and memory would be measured along.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .classifier import OnnxTextClassifier


_MIN_CALLS = 10  # of each latency, however slow
_SINGLE_TEXTS = 200  # classified one by one
_BATCHED_TEXTS = 1024  # classified in batches
_BATCH_SIZE = 32  # of those batches


class _TorchTextClassifier(OnnxTextClassifier):
    """The same steps with the model in torch: only the runtime differs."""

    dtype = "float32"

    def _load(self, model_file: Path, num_threads: int) -> list[str]:
        import torch
        from transformers import AutoTokenizer

        from ..checkpoint import load_finetuned

        torch.set_num_threads(num_threads)
        self.torch = torch
        folder = model_file.parent
        self.model = load_finetuned(folder, argument="path", dtype=getattr(torch, self.dtype)).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        columns = ("attention_mask", *tokenizer.model_input_names)
        return [name for name in inspect.signature(self.model.forward).parameters if name in columns]

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        with self.torch.inference_mode():
            tensors = {name: self.torch.from_numpy(array) for name, array in batch.items()}
            return self.model(**tensors).logits.float().numpy()


class _Bf16TextClassifier(_TorchTextClassifier):
    dtype = "bfloat16"


_TORCH = {"fp32": _TorchTextClassifier, "bf16": _Bf16TextClassifier}


def _measure(spec: dict[str, Any]) -> dict[str, Any]:
    """What one process finds out: its figures, and facts about itself."""
    variant, threads = spec["variant"], spec["threads"]
    options = {"num_threads": threads, "max_length": spec["max_length"]}
    model: OnnxTextClassifier
    if variant["runtime"] == "torch":
        # The file tells where the checkpoint is; its weights may be several files.
        in_torch = _TORCH[variant["precision"]].from_pretrained(variant["path"], "config.json", **options)
        parameters, used_threads = in_torch.model.num_parameters(), in_torch.torch.get_num_threads()
        model = in_torch
    else:
        model = OnnxTextClassifier.from_pretrained(variant["path"], variant["file_name"], **options)
        parameters, used_threads = None, model.session.get_session_options().intra_op_num_threads
    texts = spec["texts"] and [text if isinstance(text, str) else tuple(text) for text in spec["texts"]]
    start, cpu_start = time.perf_counter(), time.process_time()
    latency = _measure_latency(model, texts, spec)
    cpu_share = (time.process_time() - cpu_start) / (time.perf_counter() - start)
    result = {
        "latency": latency,
        "end_to_end": _measure_end_to_end(model, texts, spec) if texts else [],
        # Several threads wait for each other also on an idle machine.
        "cpu_share": cpu_share if threads == 1 else None,
        "memory_mb": _peak_memory_mb(),
        "parameters": parameters,
        "process": {"pid": os.getpid(), "threads": used_threads, "imports_torch": "torch" in sys.modules},
    }
    if spec["logits_file"] is not None:
        np.save(spec["logits_file"], model.logits(texts, _BATCH_SIZE))
    return result


def _measure_latency(model: OnnxTextClassifier, texts: list[Any] | None, spec: dict[str, Any]) -> list[dict[str, Any]]:
    if texts is None:
        ids = np.random.default_rng(0).integers(model.config["vocab_size"], size=4096)
    else:
        ids = np.concatenate([encoding.ids for encoding in model.encode(texts[:_BATCHED_TEXTS])])
    cells = []
    for batch_size, length in itertools.product(spec["batch_sizes"], spec["lengths"]):
        values = {"input_ids": np.resize(ids, (batch_size, length)), "attention_mask": 1, "token_type_ids": 0}
        batch = {name: np.full((batch_size, length), values[name], dtype=np.int64) for name in model.input_names}
        call = partial(model.run, batch)
        _time_calls(call, spec["seconds"] / 5, 2)  # warm-up
        times = _time_calls(call, spec["seconds"], _MIN_CALLS)
        cells.append(
            {
                **{"threads": spec["threads"], "batch_size": batch_size, "length": length},
                **_percentiles(times),
                "rows_per_second": batch_size * len(times) / sum(times),
                "runs": len(times),
            }
        )
    return cells


def _measure_end_to_end(model: OnnxTextClassifier, texts: list[Any], spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Single texts in calls of their own, and all texts in one call, which sorts them into batches."""
    # Every n-th, from all over the data: it may be sorted.
    single, batched = (texts[:: math.ceil(len(texts) / limit)] for limit in (_SINGLE_TEXTS, _BATCHED_TEXTS))
    one_by_one = itertools.cycle([[text] for text in single])
    model(single[:_BATCH_SIZE], batch_size=_BATCH_SIZE)  # warm-up
    single_times = _time_calls(lambda: model(next(one_by_one)), spec["seconds"], len(single))
    batched_times = _time_calls(lambda: model(batched, batch_size=_BATCH_SIZE), spec["seconds"], 1)
    return [
        {
            **{"threads": spec["threads"], "batch_size": 1},
            **_percentiles(single_times),
            "rows_per_second": len(single_times) / sum(single_times),
            "mean_tokens": statistics.fmean(len(encoding.ids) for encoding in model.encode(single)),
        },
        {
            **{"threads": spec["threads"], "batch_size": _BATCH_SIZE, "p50_ms": None, "p95_ms": None},
            "rows_per_second": len(batched) * len(batched_times) / sum(batched_times),
            "mean_tokens": statistics.fmean(len(encoding.ids) for encoding in model.encode(batched)),
        },
    ]


def _time_calls(call: Callable[[], Any], seconds: float, min_calls: int) -> list[float]:
    """Seconds of each call: at least `min_calls` of them, and `seconds` in all."""
    times: list[float] = []
    total = 0.0
    while len(times) < min_calls or total < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        total += times[-1]
    return times


def _percentiles(times: list[float]) -> dict[str, float]:
    p50, p95 = np.percentile(times, [50, 95])
    return {"p50_ms": 1000 * float(p50), "p95_ms": 1000 * float(p95)}


def _peak_memory_mb() -> float | None:
    """The most memory that this process held, in 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss`: on Linux a process starts with that of its parent, which has torch loaded.
        peak = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return int(peak[1]) * 1024 / 1e6 if peak else None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return None


def main() -> None:
    """Read what to measure, write what was measured."""
    spec_file, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps(_measure(json.loads(spec_file.read_text(encoding="utf-8")))), encoding="utf-8")


if __name__ == "__main__":
    main()
