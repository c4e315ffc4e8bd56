"""What distilling costs beside plain fine-tuning: step time, throughput and memory of every way, measured in one run.

python recipes/benchmark_training.py --output_dir runs/training --lengths 16 32 64 128 sst2 --batch_sizes 16 32
python recipes/benchmark_training.py --output_dir runs/training-bert --teacher_layers 12 --student_layers 6 \
    --hidden_size 768 --intermediate_size 3072 --max_length 512 --lengths 128 512 --dtypes bfloat16
python recipes/benchmark_training.py --output_dir runs/training-memory --lengths sst2 --dtypes float32 \
    --batch_sizes 32 --variants finetune cached_logits --memory_rows 67000 1000000
python recipes/benchmark_training.py --only_table runs/training/results.json

Each variant is a process of its own that trains with the real `Trainer`; all of them train some steps before any
trains again, one at a time, so that a machine that slows down does so for all. Weights and tokens are random: what a
step costs does not depend on them. Runs on a GPU where there is one.

A name may carry modifiers: `cached_logits+grouped+frozen` groups batches by length and freezes the embeddings,
`naive+padded` pads every batch to `--max_length`.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_training_variants import (
    GROUPED,
    MODIFIERS,
    REFERENCES,
    VARIANTS,
    Variant,
    length_counts,
    read_variant,
)
from results_table import format_training

from hf_kd.command_line import parse_args, run_main
from hf_kd.compat import hardware_defaults
from hf_kd.cpu import available_cores
from hf_kd.results import read_results, write_results


@dataclass
class BenchmarkArguments:
    """What is measured, and how."""

    output_dir: Path = field(default=Path("runs/training"), metadata={"help": "Folder of results.json."})
    variants: list[str] = field(
        default_factory=lambda: [*VARIANTS, "naive+padded"],
        metadata={"help": f"Some of {', '.join(VARIANTS)}, with modifiers +{', +'.join(MODIFIERS)}."},
    )
    frozen_embeddings: bool = field(
        default=False, metadata={"help": "Also measure the variants, but for the naive ones, with frozen embeddings."}
    )
    grouped: bool = field(
        default=True,
        metadata={"help": f"Where lengths differ, also measure {', '.join(GROUPED)} grouped by length."},
    )
    lengths: list[str] = field(
        default_factory=lambda: ["16", "32", "64", "128", "sst2"],
        metadata={"help": "Tokens of every row, or 'sst2', the lengths of its training set."},
    )
    batch_sizes: list[int] = field(default_factory=lambda: [16, 32], metadata={"help": "Rows per step."})
    dtypes: list[str] = field(
        default_factory=lambda: ["float32", "bfloat16"],
        metadata={"help": "'bfloat16' is the Trainer's bf16 autocast."},
    )
    max_length: int = field(default=128, metadata={"help": "What +padded pads to."})
    # The shapes of teacher and student
    teacher_layers: int = field(default=6, metadata={"help": "Layers of the teacher."})
    student_layers: int = field(default=3, metadata={"help": "Layers of the student."})
    hidden_size: int = field(default=384, metadata={"help": "Width of both."})
    intermediate_size: int = field(default=1536, metadata={"help": "Width of the feed-forward of both."})
    heads: int = field(default=12, metadata={"help": "Attention heads of both."})
    vocab_size: int = field(default=30522, metadata={"help": "Tokens of both."})
    # How it is measured
    steps: int = field(
        default=10,
        metadata={"help": "Steps of a turn that are measured; where lengths differ, whole groups of sorted batches."},
    )
    warmup_steps: int = field(default=2, metadata={"help": "Steps before them that are not."})
    rounds: int = field(default=5, metadata={"help": "Turns of each variant."})
    threads: int | None = field(default=None, metadata={"help": "Threads of a process. Default: the cores there are."})
    num_rows: int = field(default=6400, metadata={"help": "Generated rows; cached variants cache as many."})
    profile_steps: int | None = field(
        default=None,
        metadata={"help": "Steps in which the share of matrix products is measured. Default: 3 on a GPU, else none."},
    )
    memory_rows: list[int] = field(
        default_factory=list,
        metadata={"help": "Also measure the memory of finetune and cached_logits with as many rows on disk."},
    )
    memory_steps: int = field(
        default=2000, metadata={"help": "Steps of that, each of which reads rows from all over the file."}
    )
    only_table: list[Path] = field(default_factory=list, metadata={"help": "Print the table of these results alone."})

    def __post_init__(self) -> None:
        self.variants = list(dict.fromkeys(read_variant(name).name for name in self.variants))
        for length in self.lengths:
            if max(length_counts(length)) > self.max_length:
                raise ValueError(f"--lengths {length} needs --max_length {max(length_counts(length))} or more.")
        if unknown := set(self.dtypes) - {"float32", "bfloat16"}:
            raise ValueError(f"--dtypes {' '.join(sorted(unknown))} must be float32 or bfloat16.")
        if self.num_rows < 4 * max(self.batch_sizes):
            raise ValueError(
                f"--num_rows {self.num_rows} must be at least {4 * max(self.batch_sizes)}, four batches of "
                f"--batch_sizes {max(self.batch_sizes)}."
            )


def variants_for(args: BenchmarkArguments, length: str) -> list[Variant]:
    """Those asked for, without those that would be the same thing twice at this length."""
    variants, counts = [read_variant(name) for name in args.variants], length_counts(length)
    if args.grouped:
        variants += [replace(variant, grouped=True) for variant in variants if variant.base in GROUPED]
    if args.frozen_embeddings:
        variants += [replace(variant, frozen=True) for variant in variants if variant.trainer != "naive"]
    elif args.grouped:  # the whole of it
        variants += [replace(variant, frozen=True) for variant in variants if variant.cached and variant.grouped]
    if len(counts) == 1:
        variants = [variant for variant in variants if not variant.grouped]
    if list(counts) == [args.max_length]:
        variants = [replace(variant, padded=False) for variant in variants]
    return list({variant.name: variant for variant in variants}.values())


def steps_per_turn(args: BenchmarkArguments, length: str, batch_size: int) -> int:
    """Where lengths differ, whole groups: the Trainer sorts so many batches at a time, the longest first, so that a
    part of a group says nothing."""
    if len(length_counts(length)) == 1:
        return args.steps
    group = max(1, min(args.num_rows // (4 * batch_size), 50))
    return -(-args.steps // group) * group


def make_spec(args: BenchmarkArguments, length: str, batch_size: int, dtype: str, folder: str) -> dict[str, Any]:
    """What a process is told, but for its variant."""
    shape = {
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_attention_heads": args.heads,
        "vocab_size": args.vocab_size,
    }
    return {
        "teacher": {**shape, "num_hidden_layers": args.teacher_layers},
        "student": {**shape, "num_hidden_layers": args.student_layers},
        "length_counts": length_counts(length),
        "max_length": args.max_length,
        "num_rows": args.num_rows,
        "batch_size": batch_size,
        "dtype": dtype,
        "threads": args.threads or available_cores(),
        "use_cpu": hardware_defaults()["use_cpu"],
        "folder": folder,
    }


class Worker:
    """A process that trains a variant; within the block of a `with`, ready for turns."""

    def __init__(self, spec: dict[str, Any], variant: Variant):
        self.name = variant.name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(spec["threads"]))
        environment = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("benchmark_training_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.facts: dict[str, Any] = {}
        self._tell({**spec, "variant": asdict(variant)})

    def __enter__(self) -> Worker:
        try:
            self.facts = self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def turn(self, **options: Any) -> dict[str, Any]:
        """Train `steps` after `warmup_steps`."""
        self._tell({"command": "turn", **options})
        return self._answer()

    def _tell(self, message: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # the answer that fails to come says why
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        answer = self._process.stdout.readline()
        if not answer:
            self._log.seek(0)
            raise RuntimeError(f"{self.name} ended with code {self._process.wait()}:\n{self._log.read()[-3000:]}")
        return json.loads(answer)

    def __exit__(self, *_: Any) -> None:
        self._process.kill()  # it has nothing to save
        self._process.wait()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()


def build_caches(spec: dict[str, Any], variants: list[Variant]) -> list[dict[str, Any]]:
    """Build what these variants read, in processes that end: what building takes is not memory of training."""
    rows = []
    for base in dict.fromkeys(variant.base for variant in variants if variant.cached):
        with Worker({**spec, "builds_cache": True}, VARIANTS[base]) as worker:
            rows.append({"variant": base, **worker.facts})
    return rows


def measure(args: BenchmarkArguments, spec: dict[str, Any], length: str) -> list[dict[str, Any]]:
    """One row for each variant, all measured in turns."""
    batch_size = spec["batch_size"]
    steps = steps_per_turn(args, length, batch_size)
    profile_steps = args.profile_steps if args.profile_steps is not None else 0 if spec["use_cpu"] else 3
    turns: dict[str, list[dict[str, Any]]] = {}
    rows = []
    with ExitStack() as stack:
        workers = [Worker(spec, variant) for variant in variants_for(args, length)]  # they get ready side by side
        for worker in workers:
            stack.push(worker)
        for worker in workers:
            worker.__enter__()
        for worker in workers:
            worker.turn(steps=args.warmup_steps, warmup_steps=0)  # the first steps of a process take far longer
        for number in range(args.rounds):
            # To and fro, so that a machine that slows down or speeds up does so for all.
            for worker in workers if number % 2 == 0 else reversed(workers):
                turn = worker.turn(steps=steps, warmup_steps=args.warmup_steps)
                turns.setdefault(worker.name, []).append(turn)
        for worker in workers:
            rows.append({"variant": worker.name, **summarize(turns[worker.name], batch_size), **worker.facts})
            if profile_steps:
                found = worker.turn(steps=profile_steps, warmup_steps=0, profile=True)
                rows[-1]["share_outside_matrix_products"] = 1 - found["matrix_product_share"]
    for row in rows:
        row["step_ratio"], row["throughput_ratio"] = ratios(row, rows)
    return rows


def summarize(turns: list[dict[str, Any]], batch_size: int) -> dict[str, Any]:
    """Milliseconds of a step over all turns, rows per second as the median of the turns, and the memory."""
    seconds = [turn["seconds"] for turn in turns]
    p25, p50, p75 = np.percentile(np.concatenate(seconds), [25, 50, 75])
    rounds = [
        {"p50_ms": 1000 * statistics.median(turn), "rows_per_second": batch_size / statistics.fmean(turn)}
        for turn in seconds
    ]
    return {
        **{"p25_ms": 1000 * float(p25), "p50_ms": 1000 * float(p50), "p75_ms": 1000 * float(p75)},
        "rows_per_second": statistics.median(turn["rows_per_second"] for turn in rounds),
        "tokens_per_row": statistics.fmean(turn["tokens_per_row"] for turn in turns),
        "peak_memory_mib": max((turn["peak_memory_mib"] for turn in turns if "peak_memory_mib" in turn), default=None),
        "steps": sum(map(len, seconds)),
        "rounds": rounds,
    }


def ratios(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Of step time and throughput to each reference, as medians of the ratios within a round.

    The median step of batches grouped by length is no step of the same rows, so it is compared with nothing.
    """
    pairs = {
        other["variant"]: list(zip(row["rounds"], other["rounds"], strict=True))
        for other in rows
        if other["variant"] in REFERENCES
    }
    step, throughput = (
        {name: statistics.median(own[figure] / other[figure] for own, other in pair) for name, pair in pairs.items()}
        for figure in ("p50_ms", "rows_per_second")
    )
    return ({} if read_variant(row["variant"]).grouped else step), throughput


def measure_memory(args: BenchmarkArguments, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """What is resident after the same steps with few and many rows on disk: repeated rows, so that no teacher has to
    run for a million of them."""
    spec = {**spec, "num_rows": 1000, "folder": str(Path(spec["folder"], "memory"))}
    variants = [VARIANTS["finetune"], VARIANTS["cached_logits"]]
    rows = []
    for num_rows in args.memory_rows:
        if not rows:
            Path(spec["folder"]).mkdir()
            build_caches(spec, variants)
        for variant in variants:
            with Worker({**spec, "rows_on_disk": num_rows}, variant) as worker:
                turn = worker.turn(steps=args.memory_steps, warmup_steps=0)
            sizes = {key: value for key, value in turn.items() if key.endswith("_mib")}
            rows.append({"variant": variant.name, "rows": num_rows, **sizes})
    return rows


def main() -> None:
    (args,) = parse_args((BenchmarkArguments,))
    if args.only_table:
        read = [read_results(path) for path in args.only_table]
        sections = ("training_benchmark", "caches", "memory")
        print(format_training({name: [row for results in read for row in results[name]] for name in sections}))
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "weights": "random",
        "arguments": {},
        "training_benchmark": [],
        "caches": [],
        "memory": [],
    }
    results["arguments"] = {
        name: value for name, value in asdict(args).items() if name not in ("output_dir", "only_table")
    }
    results["arguments"]["threads"] = args.threads or available_cores()
    for dtype, length, batch_size in itertools.product(args.dtypes, args.lengths, args.batch_sizes):
        if dtype == "bfloat16" and not hardware_defaults()["bf16"]:
            print(f"bfloat16, length {length}, batch {batch_size}: left out, this hardware does not compute in it")
            continue
        # Caches of one configuration are of no use to the next, and large.
        with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
            spec = make_spec(args, length, batch_size, dtype, folder)
            measured = {
                "caches": build_caches(spec, variants_for(args, length)),
                "training_benchmark": measure(args, spec, length),
                "memory": measure_memory(args, spec),
            }
        for section, rows in measured.items():
            results[section] += [{"length": length, "batch_size": batch_size, "dtype": dtype, **row} for row in rows]
        write_results(args.output_dir / "results.json", [], **results)
        print(f"{dtype}, length {length}, batch {batch_size}: measured", flush=True)
    print("\nRandom weights: the figures say nothing about quality.\n")
    print(format_training(results))


if __name__ == "__main__":
    run_main(main)
