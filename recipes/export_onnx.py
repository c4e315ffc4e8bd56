"""Export a fine-tuned model to ONNX, check it against torch, quantise it to int8, and measure both beside the teacher.

python recipes/export_onnx.py --model_dir runs/sst2-student --output_dir runs/sst2-onnx --task_name sst2 \
    --benchmark --teacher_model_name_or_path runs/sst2-teacher

`--output_dir` may be the model's own folder, which then also holds `onnx/`. A YAML file may come first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from glue_setup import DataArguments, load_data, measured_splits

from hf_kd.command_line import parse_args, run_main
from hf_kd.deploy.benchmark import benchmark, default_variants
from hf_kd.deploy.model_card import card_problems_warn, write_model_card
from hf_kd.deploy.onnx import export_onnx
from hf_kd.deploy.quantization import QuantizationError
from hf_kd.deploy.report import format_benchmark, require_matplotlib, write_report
from hf_kd.glue import TextTask
from hf_kd.results import read_results, write_results


@dataclass
class ExportArguments:
    """What to export, and how."""

    model_dir: str = field(metadata={"help": "Folder or Hub id of a fine-tuned model with its tokenizer."})
    output_dir: str = field(metadata={"help": "A new folder, an earlier export, or the model's own folder."})
    backend: str = field(
        default="auto", metadata={"help": "auto, optimum (optimum-onnx) or transformers (the exporter of version 5)."}
    )
    quantization: str = field(default="dynamic", metadata={"help": "dynamic, static or none."})
    quantization_format: str = field(default="QDQ", metadata={"help": "QDQ or QOperator, for static quantisation."})
    max_metric_drop: float = field(
        default=0.005, metadata={"help": "How far int8 may fall below float32 on the validation set, 0 or more."}
    )
    opset: int | None = field(default=None, metadata={"help": "Version of the ONNX operators."})
    optimize: bool = field(
        default=True, metadata={"help": "Rewrite the graph for CPUs; `--no_optimize` leaves it as exported."}
    )
    benchmark: bool = field(default=False, metadata={"help": "Measure torch and ONNX Runtime, and write a report."})
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher, for --benchmark: ratios are against it."}
    )
    benchmark_lengths: list[int] = field(
        default_factory=lambda: [16, 64, 128], metadata={"help": "Lengths in tokens to measure."}
    )
    benchmark_threads: list[int] | None = field(
        default=None, metadata={"help": "Thread counts to measure. Default: one, and all cores."}
    )
    benchmark_rounds: int = field(default=2, metadata={"help": "Processes of each variant, in turns, at least 1."})
    benchmark_seconds: float = field(default=0.5, metadata={"help": "Seconds per measured cell and process, > 0."})

    def __post_init__(self) -> None:
        if self.quantization not in ("dynamic", "static", "none"):
            raise ValueError(f"--quantization {self.quantization}: give dynamic, static or none.")
        if self.benchmark_rounds < 1 or not self.benchmark_seconds > 0:
            raise ValueError(
                f"--benchmark_rounds {self.benchmark_rounds} must be at least 1, and --benchmark_seconds "
                f"{self.benchmark_seconds} above 0."
            )
        if self.teacher_model_name_or_path is not None and not self.benchmark:
            raise ValueError("--teacher_model_name_or_path is for the comparison; add --benchmark.")
        if self.benchmark:
            require_matplotlib()
            for name in ("model_dir", "teacher_model_name_or_path"):
                path = getattr(self, name)
                if path is not None and not Path(path).is_dir():
                    raise ValueError(f"--benchmark measures local folders, but {name}={path!r} is none; download it.")


def main() -> None:
    export_args, data_args = parse_args((ExportArguments, DataArguments))
    data, task = load_data(data_args, seed=0)
    export_and_measure(export_args, data_args, data, task)


def export_and_measure(
    export_args: ExportArguments, data_args: DataArguments, data: DatasetDict, task: TextTask
) -> None:
    """Export, write what was found to the folder's results.json, and with `--benchmark` the report."""
    results_file = Path(export_args.output_dir) / "results.json"
    training = training_results(Path(export_args.model_dir) / "results.json")
    try:
        report = export(export_args, data_args, data, task)
    except QuantizationError as error:
        write_results(results_file, **training, export={"quantization": error.report})
        write_card(results_file.parent, training)
        raise
    print_export(report)
    print(f"The files are in {results_file.parent / 'onnx'}.")
    if not export_args.benchmark:
        write_results(results_file, **training, export=report)
        for name in ("report.md", "pareto.png"):  # of an earlier export, whose files are gone
            results_file.with_name(name).unlink(missing_ok=True)
        write_card(results_file.parent, training)
        return
    write_results(results_file, **training, export=report)  # a benchmark that breaks off leaves the export
    write_card(results_file.parent, training)
    print(
        "Measuring each variant in processes of its own, which takes minutes (less with fewer --benchmark_rounds, "
        "--benchmark_seconds or --benchmark_lengths).",
        flush=True,
    )
    rows = measure(export_args, data_args, data, task)
    write_results(results_file, **training, export=report, benchmark=rows)
    print(format_benchmark(rows))
    print(f"The report is {write_report(results_file)}.")
    write_card(results_file.parent, training)


def export(args: ExportArguments, data_args: DataArguments, data: DatasetDict, task: TextTask) -> dict[str, Any]:
    """The metric is compared on the split that models are chosen on, static ranges come from the training rows."""
    return export_onnx(
        args.model_dir,
        args.output_dir,
        args.backend,
        None if args.quantization == "none" else args.quantization,
        task=task,
        validation=data[task.validation_splits[0]],
        calibration=data["train"],
        max_metric_drop=args.max_metric_drop,
        quantization_format=args.quantization_format,
        opset=args.opset,
        optimize=args.optimize,
        max_length=data_args.max_seq_length,
    )


def measure(
    args: ExportArguments, data_args: DataArguments, data: DatasetDict, task: TextTask
) -> list[dict[str, Any]]:
    """Every variant on the rows that models are reported on."""
    split = measured_splits(data, task)[0]
    rows = data[split]
    columns = [rows[column][:] for column in task.text_columns]
    return benchmark(
        default_variants(args.teacher_model_name_or_path, args.model_dir, args.output_dir),
        columns[0] if len(columns) == 1 else list(zip(*columns, strict=True)),
        rows["label"][:],
        task,
        split=split,
        lengths=args.benchmark_lengths,
        threads=args.benchmark_threads,
        max_length=data_args.max_seq_length,
        rounds=args.benchmark_rounds,
        seconds=args.benchmark_seconds,
    )


def training_results(path: Path) -> dict[str, Any]:
    """What training wrote beside the model: its rows, how it went, and its own command and commit."""
    if not path.is_file():
        return {"rows": []}
    found = read_results(path)
    kept = {name: found[name] for name in ("distillation", "comparisons", "card") if name in found}
    return {"rows": found["rows"], "training_run": found.get("training_run", found["run"]), **kept}


def write_card(folder: Path, training: dict[str, Any]) -> None:
    """The model card anew, with the ONNX files, where this is a student whose training is known."""
    if "distillation" in training:
        with card_problems_warn():
            write_model_card(folder)


def print_export(report: dict[str, Any]) -> None:
    """Parity and the price of int8, in a line each."""
    parity, int8 = report["parity"], report["quantization"]
    print(f"float32: logits within {parity['max_difference']:.1e} of torch's on {parity['rows']} rows")
    if int8 is not None and int8["metric"] is not None:
        metric, last = int8["metric"], int8["attempts"][-1]
        print(f"int8 ({last['settings']}): {metric['name']} {metric['fp32']:.4f} -> {metric['int8']:.4f}")


if __name__ == "__main__":
    run_main(main)
