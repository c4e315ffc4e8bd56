"""The process that trains one variant of `benchmark_training.py`, a turn at a time.

It is started by that script. Standard input brings JSON, one line each: first what to train, then commands, `turn` or
`stop`; standard output answers with lines of JSON. What the libraries print goes to standard error.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from benchmark_training_variants import LimitTrainer, NaiveTrainer, cast_linear_layers
from datasets import Dataset, Features, Value
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizerFast,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_kd import DistillationTrainer, DistillationTrainingArguments, cache_teacher_signals
from hf_kd.compat import length_grouping


SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Matrix products and attention, forward and backward, as torch's profiler names the operators that run them.
MATRIX_PRODUCTS = re.compile(r"^aten::(addmm|mm|bmm|baddbmm|linear|mkldnn_linear|\w*_attention\w*)$")


class Channel:
    """Lines of JSON from and to the process that started this one."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # a library that prints would write between them

    def receive(self) -> dict[str, Any]:
        """Wait, without using the processor, for the next line; a parent that is gone says stop."""
        line = sys.stdin.readline()
        return json.loads(line) if line else {"command": "stop"}

    def send(self, message: dict[str, Any]) -> None:
        print(json.dumps(message), file=self._answers, flush=True)


class Turns(TrainerCallback):
    """Trains the steps of a turn, answers with their times, and waits for the next.

    A step lasts from the end of the one before to its own: forward, backward, clipping, optimizer, and the loading of
    its batch.
    """

    def __init__(self, channel: Channel, collator: Collator, facts: dict[str, Any]):
        self.channel, self.collator, self.facts = channel, collator, facts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gc.collect()  # the teacher that a cache was checked against
        free_memory()
        forget_peak_memory()
        self.channel.send(self.facts)
        self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if len(self.ends) == self.num_steps:
            _synchronize()  # steps queue up on a GPU; those of a turn are done when it ends
        self.ends.append(time.perf_counter())
        if len(self.ends) <= self.num_steps:
            return
        seconds = np.diff(self.ends)[self.turn["warmup_steps"] :]
        answer = {"seconds": seconds.tolist(), "tokens_per_row": self.collator.mean_width(), **memory_mib()}
        if self.turn.get("profile"):
            self.profiler.stop()
            answer["matrix_product_share"] = matrix_product_share(self.profiler)
        free_memory()
        self.channel.send(answer)
        self._wait(control)

    def _wait(self, control: Any) -> None:
        self.turn = self.channel.receive()
        if self.turn["command"] == "stop":
            control.should_training_stop = True
        self.num_steps = sum(self.turn.get(name, 0) for name in ("warmup_steps", "steps"))
        self.collator.widths.clear()
        if self.turn.get("profile"):
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        _synchronize()
        self.ends = [time.perf_counter()]


class Collator(DataCollatorWithPadding):
    """Pads, and remembers how far."""

    def __init__(self, tokenizer: BertTokenizerFast, max_length: int | None):
        super().__init__(tokenizer, "max_length" if max_length else True, max_length)
        self.widths: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        self.widths.append(batch["input_ids"].shape[1])
        return batch

    def mean_width(self) -> float:
        """Tokens per row of the batches since the turn began, padding included."""
        return float(np.mean(self.widths))


def make_rows(spec: dict[str, Any]) -> Dataset:
    """Rows of random tokens and labels, the same ones for the same lengths."""
    rng = np.random.default_rng(0)
    counts = {int(length): count for length, count in spec["length_counts"].items()}
    lengths = rng.choice(list(counts), size=spec["num_rows"], p=np.array(list(counts.values())) / sum(counts.values()))
    first = len(SPECIAL_TOKENS)
    columns = {
        "input_ids": [rng.integers(first, spec["teacher"]["vocab_size"], size=length) for length in lengths],
        "token_type_ids": [np.zeros(length, dtype=np.int8) for length in lengths],
        "attention_mask": [np.ones(length, dtype=np.int8) for length in lengths],
        "labels": rng.integers(2, size=len(lengths)),
    }
    dtypes = {"input_ids": "int32", "token_type_ids": "int8", "attention_mask": "int8"}  # those of a tokenizer
    features = Features({**{name: [Value(dtype)] for name, dtype in dtypes.items()}, "labels": Value("int64")})
    return Dataset.from_dict(columns, features=features)


def repeat_on_disk(rows: Dataset, num_rows: int, path: Path) -> Dataset:
    """Write the rows over and over into one file, and map it into memory; a cache of so many is in several files."""
    table = rows.with_format("arrow")[:].combine_chunks()
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        for start in range(0, num_rows, len(table)):
            writer.write_table(table.slice(0, num_rows - start))
    repeated = Dataset.from_file(str(path))
    repeated.info.features = rows.features
    repeated.set_format(**rows.format)
    return repeated


def make_model(shape: dict[str, int], spec: dict[str, Any]) -> PreTrainedModel:
    """A BERT with random weights, the same ones for the same shape."""
    set_seed(0)
    attention = "eager" if spec["variant"]["trainer"] == "naive" else "sdpa"
    return AutoModelForSequenceClassification.from_config(make_config(shape, spec), attn_implementation=attention)


def make_config(shape: dict[str, int], spec: dict[str, Any]) -> BertConfig:
    return BertConfig(**shape, max_position_embeddings=max(512, spec["max_length"]))


def make_tokenizer(vocab_size: int) -> BertTokenizerFast:
    """A tokenizer of invented words, which pads."""
    with tempfile.TemporaryDirectory() as folder:
        words = (f"word{index}" for index in range(vocab_size - len(SPECIAL_TOKENS)))
        Path(folder, "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *words]), encoding="utf-8")
        return BertTokenizerFast.from_pretrained(folder)


def make_arguments(spec: dict[str, Any]) -> DistillationTrainingArguments:
    """The same for every variant, but for terms, and for the order of the rows where they are grouped by length."""
    return DistillationTrainingArguments(
        output_dir=spec["folder"],
        per_device_train_batch_size=spec["batch_size"],
        dataloader_drop_last=True,
        max_steps=10**6,  # the last command ends it
        optim="adamw_torch_fused",
        bf16=spec["dtype"] == "bfloat16",
        use_cpu=spec["use_cpu"],
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **length_grouping(spec["variant"]["grouped"]),
        freeze_embeddings=spec["variant"]["frozen"],
        **spec["variant"]["terms"],
    )


def cache_rows(rows: Dataset, teacher: PreTrainedModel, args: Any, spec: dict[str, Any]) -> Dataset:
    """The rows with what the terms read of the teacher, which runs for what is not there yet."""
    objective = args.objective().bind(make_config(spec["student"], spec), teacher.config)
    return cache_teacher_signals(
        rows,
        teacher,
        objective.teacher_wanted,
        cache_folder(spec),
        batch_size=spec["batch_size"],
        mixed_precision="bf16" if args.bf16 else "no",
        device=args.device,
    )


def cache_folder(spec: dict[str, Any]) -> Path:
    return Path(spec["folder"], f"cache-{spec['variant']['base']}")


def measure_cache(spec: dict[str, Any]) -> dict[str, Any]:
    """Build the cache of a variant: how fast, beside the teacher's forward, and how large."""
    args, rows = make_arguments(spec), make_rows(spec)
    teacher = make_model(spec["teacher"], spec).to(args.device).eval()
    # On both sides of the building, so that a machine that slows down does not decide.
    forward = [teacher_rows_per_second(rows, teacher, args, spec)]
    start = time.perf_counter()
    cached = cache_rows(rows, teacher, args, spec)
    seconds = time.perf_counter() - start
    forward.append(teacher_rows_per_second(rows, teacher, args, spec))
    num_bytes = sum(path.stat().st_size for path in cache_folder(spec).glob("*.arrow"))
    return {
        "signals": sorted(set(cached.column_names) - set(rows.column_names)),
        "rows_per_second": len(rows) / seconds,
        "teacher_forward_rows_per_second": float(np.mean(forward)),
        "bytes_per_token": num_bytes / sum(map(len, rows["input_ids"])),
    }


def teacher_rows_per_second(rows: Dataset, teacher: PreTrainedModel, args: Any, spec: dict[str, Any]) -> float:
    """The speed of the bare forward in batches sorted by length, made beforehand: every fourth of them, from the
    third."""
    ids = sorted((torch.tensor(row) for row in rows["input_ids"]), key=len, reverse=True)
    batches = [ids[start : start + spec["batch_size"]] for start in range(0, len(ids), spec["batch_size"])][2::4]
    if args.bf16:
        cast_linear_layers(teacher := copy.deepcopy(teacher))
    padded = [nn.utils.rnn.pad_sequence(batch, batch_first=True).to(args.device) for batch in batches]
    with torch.inference_mode(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
        teacher(padded[0], attention_mask=padded[0].ne(0))  # warm-up
        _synchronize()
        start = time.perf_counter()
        for batch in padded:
            teacher(batch, attention_mask=batch.ne(0))
        _synchronize()
    return sum(map(len, batches)) / (time.perf_counter() - start)


def make_trainer(spec: dict[str, Any], channel: Channel) -> Trainer:
    """The variant's trainer, which trains by turns."""
    variant, args, rows = spec["variant"], make_arguments(spec), make_rows(spec)
    student = make_model(spec["student"], spec)
    if variant["frozen"] and variant["trainer"] != "distil":
        student.base_model.embeddings.requires_grad_(False)
    if variant["cached"]:
        rows = cache_rows(rows, make_model(spec["teacher"], spec), args, spec)
    if spec.get("rows_on_disk"):
        rows = repeat_on_disk(rows, spec["rows_on_disk"], Path(tempfile.mkdtemp(dir=spec["folder"]), "rows.arrow"))
    padded_to = spec["max_length"] if variant["padded"] else None
    collator = Collator(make_tokenizer(student.config.vocab_size), padded_to)
    runs_teacher = variant["trainer"] != "finetune" and not variant["cached"]
    teacher = {"teacher_model": make_model(spec["teacher"], spec)} if runs_teacher else {}
    make = {"finetune": Trainer, "limit": LimitTrainer, "distil": DistillationTrainer, "naive": NaiveTrainer}
    trainer = make[variant["trainer"]](student, args, train_dataset=rows, data_collator=collator, **teacher)
    objective = getattr(trainer, "distillation_objective", None)
    facts = {
        "attention": student.config._attn_implementation,
        "terms": [term.name for term in objective.terms] if objective is not None else [],
        "runs_teacher": runs_teacher,
        "parameters": student.num_parameters(),
        "trained_parameters": student.num_parameters(only_trainable=True),
        "device": args.device.type,
        "threads": torch.get_num_threads(),
    }
    trainer.add_callback(Turns(channel, collator, facts))
    return trainer


# What the process uses


def memory_mib() -> dict[str, float]:
    """The most memory since training began (on a GPU what torch allocated there), and what is resident now: memory of
    its own, and pages of files such as libraries and cached rows."""
    path = Path("/proc/self/status")
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB", path.read_text(), re.MULTILINE)) if path.exists() else {}
    names = {"VmHWM": "peak_memory_mib", "RssAnon": "anonymous_mib", "RssFile": "file_mib", "VmRSS": "resident_mib"}
    found = {name: int(kib[key]) / 1024 for key, name in names.items() if key in kib}
    if torch.cuda.is_initialized():
        found["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def forget_peak_memory() -> None:
    """The peak counts from here, without what making the models took."""
    if (path := Path("/proc/self/clear_refs")).exists():  # proc(5): 5 resets VmHWM
        path.write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def free_memory() -> None:
    """Give back what is free, so that many processes that wait fit side by side."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def matrix_product_share(profiler: Any) -> float:
    """Share of matrix products and attention kernels in the time of all kernels; on a CPU, of all operators."""
    name = "self_device_time_total" if torch.cuda.is_initialized() else "self_cpu_time_total"
    # Operators alone: the profiler lists the kernels they launched a second time, as events of the device.
    events = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    times = {event.key: getattr(event, name) for event in events if event.key.startswith("aten::")}
    return sum(time for key, time in times.items() if MATRIX_PRODUCTS.match(key)) / sum(times.values())


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def main() -> None:
    """Build a cache, or train until told to stop."""
    channel = Channel()
    spec = channel.receive()
    torch.set_num_threads(spec["threads"])
    if spec.get("builds_cache"):
        channel.send(measure_cache(spec))
    else:
        make_trainer(spec, channel).train()


if __name__ == "__main__":
    main()
