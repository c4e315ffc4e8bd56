"""Distil to a budget: search for the smallest student that keeps enough of its teacher and answers soon enough.

python recipes/glue_search.py --task_name sst2 --teacher_model_name_or_path runs/sst2-teacher --num_train_epochs 1 \
    --target_retention 0.97 --max_latency_ms 2 --max_seq_length 64 --output_dir runs/sst2-search

Optuna draws depth, learning rate, temperature, and which terms are on with which weight. Every student is trained once
and measured as two ONNX files, float32 and int8: the metric, and the latency (p50 of the model on one row and thread,
taken once for each shape). The same command goes on after a kill and repeats the student it was at; with other targets
it chooses anew among those that are there. It leaves `results.json`, `pareto.png`, and the YAML of its choice, for
`glue_distill.py chosen.yaml --teacher_model_name_or_path ... --output_dir ...`.

GLUE has no labelled test set: one half of the validation split chooses, and the other half reports. Rows of the
training set tell little about what a student keeps of a teacher that learned them by heart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from glue_distill import ModelArguments, load_task_teachers, load_tokenizers, make_student
from glue_setup import DataArguments, add_augmented, labeled, load_data, tokenize_data, training_defaults
from search_choice import Point, choose, draw_search, format_points, write_config
from search_space import PRECISIONS, TERMS, SearchArguments, Space, changed_arguments
from search_study import FREE_FLAGS, describe_trials, open_study, points_of, run_trials
from transformers import DataCollatorWithPadding, PreTrainedModel, set_seed

from hf_kd import DistillationTrainer, DistillationTrainingArguments
from hf_kd.command_line import parse_args, run_main
from hf_kd.cpu import cpu_facts
from hf_kd.deploy import OnnxTextClassifier, export_onnx
from hf_kd.deploy.benchmark import MIN_CPU_SHARE, ONNX_FILES, Variant, benchmark, find_latency
from hf_kd.deploy.exporters import find_exporter
from hf_kd.deploy.report import require_matplotlib
from hf_kd.glue import UNLABELED, TextTask, score_logits
from hf_kd.results import write_results


ANY_DROP = 2.0  # of a metric from -1 to 1: what int8 costs is for the search to weigh
FILE_FLAGS = ("glue_dir", "train_file", "validation_file", "unlabeled_file")  # their rows are compared


def main() -> None:
    defaults = training_defaults()
    search, model_args, data_args, args = parse_args(
        (SearchArguments, ModelArguments, DataArguments, DistillationTrainingArguments),
        **{**defaults, "eval_strategy": "no", "save_strategy": "no"},
        task_loss_weight=0.1,
    )
    require_matplotlib()
    find_exporter("auto")
    check_flags(search, model_args, data_args, args)
    data, task = load_data(data_args, args.seed, has_teacher=True)
    data, rows = split_rows(search, data, task, args.seed)
    (teacher,) = load_task_teachers(model_args, task)
    space = Space(search, model_args, args, teacher, task)
    tokenizer, student_tokenizer = load_tokenizers(model_args)
    train = add_augmented(DatasetDict(train=data["train"]), task, tokenizer, data_args, args)
    train = tokenize_data(train, task, tokenizer, data_args, args)["train"]
    fixed = changed_arguments(model_args, data_args, args, defaults)

    output_dir = Path(args.output_dir)
    students = output_dir / "students"
    with open_study(output_dir, describe_search(search, fixed, data, teacher)) as study:
        ruler = Ruler(search, data_args, data, task, study)

        def train_student(arguments: dict[str, Any], folder: Path) -> dict[str, Point] | None:
            """Train, save, export and measure a student; `None` if it diverged."""
            run_args, student_args = space.apply(arguments)
            set_seed(args.seed)
            trainer = DistillationTrainer(
                model=make_student(student_args, teacher, task),
                args=dataclasses.replace(run_args, output_dir=str(folder)),
                teacher_model=teacher,
                train_dataset=train,
                processing_class=student_tokenizer,
                data_collator=DataCollatorWithPadding(tokenizer),
            )
            trainer.train()
            if not all(parameter.isfinite().all() for parameter in trainer.model.parameters()):
                return None
            trainer.save_model()
            return ruler.measure(folder, "student", trainer.model.config, PRECISIONS)

        if "teacher" not in study.user_attrs:
            folder = students / "teacher"  # deleted with the students that others beat
            teacher.save_pretrained(folder)
            student_tokenizer.save_pretrained(folder)
            measured = ruler.measure(folder, "teacher", teacher.config, ("fp32",))["fp32"]
            study.set_user_attr("teacher", {**measured, "reported": ruler.score(folder, "fp32", "report")})
        measured = study.user_attrs["teacher"]
        print(f"teacher: {100 * measured['metric']:.2f} in {measured['latency_ms']:.2f} ms", flush=True)
        if search.target_retention is not None and measured["metric"] <= 0:
            raise ValueError(
                f"the teacher's {task.main_metric} is {measured['metric']:.3f}, of which no share can be kept; drop "
                "--target_retention, or take another teacher."
            )
        run_trials(study, space, search, args.seed, students, train_student)
        report_choice(output_dir, study, space, ruler, rows, fixed, model_args.teacher_model_name_or_path)


def report_choice(
    output_dir: Path,
    study: optuna.Study,
    space: Space,
    ruler: Ruler,
    rows: dict[str, str],
    fixed: dict[str, Any],
    teachers: list[str],
) -> None:
    """Choose a student, measure it on the rows that had no say in it, and write all of it down."""
    search, task, teacher = space.search, ruler.task, study.user_attrs["teacher"]
    points = points_of(study, space)
    if not points:
        raise ValueError("no student came to a good end; lower --search_learning_rate or --search_weights.")
    chosen, message = choose(
        points, teacher["metric"], search.target_retention, search.max_latency_ms, task.main_metric
    )
    folder = output_dir / "students" / str(chosen["student"])
    chosen = {**chosen, "reported": ruler.score(folder, chosen["precision"], "report")}
    message += (
        f" That is on {rows['chosen_on']}. On {rows['reported_on']} its {task.main_metric} is "
        f"{100 * chosen['reported']:.2f}, the teacher's {100 * teacher['reported']:.2f}."
    )
    latencies = study.user_attrs["latencies"]
    if busy := [name for name, cell in latencies.items() if cell["cpu_share"] < MIN_CPU_SHARE]:
        message += (
            f" {len(busy)} of {len(latencies)} latencies are too high, because other programs had the core; search "
            "again in a new folder, on an idle core."
        )
    found = {
        "task": task.name,
        "metric": task.main_metric,
        "rows": rows,
        "flags": dataclasses.asdict(search),
        "seed": space.args.seed,
        "cpu": cpu_facts()["model"],
        "teacher": teacher,
        "chosen": chosen,
        "message": message,
        "trials": describe_trials(study),
        "latencies": latencies,
    }
    write_results(output_dir / "results.json", [], search=found)
    write_config(output_dir / "chosen.yaml", {**fixed, **chosen["arguments"], "export_onnx": True}, found)
    draw_search(output_dir / "pareto.png", points, found)
    print(format_points(points, found))
    print(f"{message}\nIt is {folder}. To train it again, with a model card:")
    print(
        f"accelerate launch recipes/glue_distill.py {output_dir / 'chosen.yaml'} --teacher_model_name_or_path "
        f"{' '.join(teachers)} --output_dir STUDENT"
    )


# Before the first student


def check_flags(
    search: SearchArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: DistillationTrainingArguments,
) -> None:
    """Refuse what the search decides itself, and what it cannot do."""
    if len(model_args.teacher_model_name_or_path) > 1:
        raise ValueError(
            f"teacher_model_name_or_path={model_args.teacher_model_name_or_path}: the search compares with one "
            "teacher; give one."
        )
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub would publish every student that is tried; drop it, and publish the chosen one: "
            "glue_distill.py chosen.yaml --push_to_hub --teacher_model_name_or_path ... --output_dir ..."
        )
    shape = {"student_num_layers": "search_num_layers", "student_hidden_size": "search_hidden_sizes"}
    defaults = {f.name: f.default for part in (args, model_args) for f in dataclasses.fields(part)}
    instead = {**shape, "learning_rate": "search_learning_rate", "temperature": "search_temperature"}
    instead |= {"student_layers": "search_num_layers", "student_model_name_or_path": "search_num_layers"}
    instead |= {f"{TERMS[term]}_loss_weight": "search_weights" for term in search.search_terms}
    for name, flag in instead.items():
        value = getattr(args if hasattr(args, name) else model_args, name)
        if value != defaults[name]:
            raise ValueError(f"{name}={value!r} is what is searched; say what to try with --{flag}.")
    if args.task_loss_weight <= 0:
        raise ValueError(
            "task_loss_weight=0 leaves nothing to train on where all searched terms are off; keep it above 0."
        )
    if args.world_size > 1:
        raise ValueError(f"the search trains in one process, and there are {args.world_size}; start it with `python`.")
    search.latency_length = search.latency_length or data_args.max_seq_length
    if not 3 <= search.latency_length <= data_args.max_seq_length:
        raise ValueError(
            f"latency_length={search.latency_length} must be between 3 and max_seq_length={data_args.max_seq_length}."
        )


def split_rows(
    search: SearchArguments, data: DatasetDict, task: TextTask, seed: int
) -> tuple[DatasetDict, dict[str, str]]:
    """The rows to train on, to choose on (`search`) and to report (`report`), and a description of the latter two."""
    name = task.validation_splits[0]
    train, validation, test = data["train"], data[name], data.get("test")
    split = search.search_split or ("half" if test is None else "validation")
    reported = f"the {'test' if test is not None else name} split"
    report = validation if test is None else test
    if split == "half":
        if test is not None:
            raise ValueError("search_split='half': this data has a test split to report on; drop the flag.")
        halves = split_off(validation, 0.5, seed)
        chosen = f"one half of the {name} split"
        reported, chooses, report = f"the other half of the {name} split", *halves
    elif split == "holdout":
        chooses, rest = split_off(labeled(train, "label"), search.search_holdout, seed)
        train = concatenate_datasets([rest, train.filter(lambda row: row["label"] == UNLABELED)])
        chosen = f"{search.search_holdout:.0%} of the labelled training rows, held out"
    else:
        chooses, chosen = validation, f"the {name} split"
        reported = reported if test is not None else "the same rows, which the choice flatters,"
    described = {"chosen_on": f"{chosen} ({len(chooses)} rows)", "reported_on": f"{reported} ({len(report)} rows)"}
    return DatasetDict(train=train, search=chooses, report=report), described


def split_off(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """A share of the rows, and the others."""
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        raise ValueError(f"{share:g} of {len(rows)} rows leaves one part without any; give more rows.")
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(sorted(order[:count])), rows.select(sorted(order[count:]))


def describe_search(
    search: SearchArguments, fixed: dict[str, Any], data: DatasetDict, teacher: PreTrainedModel
) -> dict[str, Any]:
    """What the trials of a study have in common, without which they do not compare."""
    flags = {name: value for name, value in dataclasses.asdict(search).items() if name not in FREE_FLAGS}
    weights = hashlib.sha256()
    for tensor in teacher.state_dict().values():
        weights.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    rows = {name: hashlib.sha256(json.dumps(part.to_dict()).encode()) for name, part in data.items()}
    return {
        **flags,
        **{name: value for name, value in fixed.items() if name not in FILE_FLAGS},
        **{f"rows to {name} on": digest.hexdigest()[:12] for name, digest in rows.items()},
        "teacher's weights": weights.hexdigest()[:12],
        "cpu": cpu_facts()["model"],
    }


# Measuring


class Ruler:
    """Metric, latency and size of ONNX files, each measured in the same way."""

    def __init__(
        self, search: SearchArguments, data_args: DataArguments, data: DatasetDict, task: TextTask, study: optuna.Study
    ):
        self.search, self.data, self.task, self.study = search, data, task, study
        self.max_length = data_args.max_seq_length

    def measure(self, folder: Path, role: str, config: Any, precisions: tuple[str, ...]) -> dict[str, Point]:
        """Export the checkpoint in a folder and measure its files, by precision."""
        export_onnx(
            folder,
            folder,
            quantization="dynamic" if "int8" in precisions else None,
            task=self.task,
            validation=self.data["search"],
            max_metric_drop=ANY_DROP,
            max_length=self.max_length,
        )
        shape = f"{role}: {config.num_hidden_layers} layers of width {config.hidden_size}"
        variants = [Variant(f"{shape}, {name}", role, "onnxruntime", name, folder) for name in precisions]
        return {
            variant.precision: {
                "metric": self.score(folder, variant.precision, "search"),
                "latency_ms": self.latency(variant),
                "size_bytes": variant.weight_files()[0].stat().st_size,
            }
            for variant in variants
        }

    def score(self, folder: Path, precision: str, split: str) -> float:
        """The task's main metric of an ONNX file."""
        rows = self.data[split]
        columns = [rows[column][:] for column in self.task.text_columns]
        texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        model = OnnxTextClassifier.from_pretrained(folder, ONNX_FILES[precision], max_length=self.max_length)
        return score_logits(self.task, model.logits(texts), rows["label"][:], model.id2label)[self.task.main_metric]

    def latency(self, variant: Variant) -> float:
        """p50 in ms of one row on one thread, measured once for each shape and precision: weights do not matter."""
        known = self.study.user_attrs.get("latencies", {})
        if variant.name not in known:
            search = self.search
            sizes = {"lengths": [search.latency_length], "batch_sizes": [1], "threads": [1]}
            rounds = {"rounds": search.benchmark_rounds, "seconds": search.benchmark_seconds}
            (row,) = benchmark([variant], **sizes, **rounds, max_length=self.max_length)
            cell = find_latency(row, 1, 1, search.latency_length)
            # Whatever else runs can only add to it.
            cell |= {"p50_ms": min(cell["p50_ms_rounds"]), "cpu_share": row["cpu_share"]}
            known = {**known, variant.name: cell}
            self.study.set_user_attr("latencies", known)
        return known[variant.name]["p50_ms"]


if __name__ == "__main__":
    run_main(main)
