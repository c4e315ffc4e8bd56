"""Says what a trainer knows about how its student was made, as plain data for `results.json` and the model card."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sized
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainingArguments
from transformers.utils import logging

from .objective.schedules import Schedule, read_schedule
from .objective.terms import AttentionTerm, CustomTerm, HiddenTerm, LogitTerm, RelationTerm, TaskTerm, Term
from .origin import identify
from .results import read_results, write_results
from .resumption import ResumeNotes
from .student import START_ATTRIBUTE


if TYPE_CHECKING:
    from .trainer import DistillationTrainer


logger = logging.get_logger(__name__)

_KINDS: dict[type, str] = {
    TaskTerm: "task",
    LogitTerm: "logit",
    HiddenTerm: "hidden",
    AttentionTerm: "attention",
    RelationTerm: "relation",
    CustomTerm: "custom",
}
# The arguments that decide what is learned. All others say where and how often to log, save and push, and hold paths,
# tokens and host names.
_ARGUMENTS = (
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "optim"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "data_seed"),
    *("group_by_length", "train_sampling_strategy", "dataloader_drop_last", "gradient_checkpointing"),
    *("neftune_noise_alpha", "load_best_model_at_end", "metric_for_best_model", "full_determinism", "torch_compile"),
    *("teacher_dtype",),
)
_TIMINGS = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads")


def describe_distillation(trainer: DistillationTrainer) -> dict[str, Any]:
    """
    What the trainer knows about how its student was made.

    Nothing in it belongs to the user's machine: a model from a folder goes by the folder's name.

    Args:
        trainer ([`DistillationTrainer`]): During or after the training.

    Returns:
        `dict`: Ready for JSON. `problem`; `teachers` that a term compares with, or else `agreement_teachers`, if the
        evaluation alone does (of soft labels from elsewhere their `column`); `student` (shape, and where its first
        weights come from); `terms` (kind, form, weight, layers, and settings that differ from the defaults); `data`
        (rows with a label of their own and without, where the data set is sized); `training` (steps, batch size,
        precision, steps at which it was resumed, arguments that differ from the defaults); `evaluation` (split to
        metrics of the final weights, as far as the trainer has measured them).
    """
    described = [_describe_teacher(teacher) for teacher in _loaded_teachers(trainer)]
    taught = trainer.distillation_objective.needs_teacher
    return _plain(
        {
            "problem": trainer.problem,
            "teachers": described if taught else [],
            "agreement_teachers": None if taught else described or None,
            "student": _describe_student(trainer),
            "terms": [_describe_term(trainer, term) for term in trainer.distillation_objective.terms],
            "data": _describe_data(trainer),
            "training": _describe_training(trainer),
            "evaluation": _last_evaluation(trainer),
        }
    )


def record_distillation(trainer: DistillationTrainer) -> None:
    """
    Bring the `distillation` section of `results.json` in the trainer's output folder up to date.

    Rows of a recipe stay; without any, one is made of the trainer's last evaluation. What an earlier training left
    in the folder goes, as its student does. Of a trainer that has not trained, the evaluation alone is taken over
    into the history that is there: its student is the one that was trained then.

    Args:
        trainer ([`DistillationTrainer`]): On the main process.
    """
    path = Path(trainer.args.output_dir, "results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    started_at = _resume_notes(trainer).started_at
    is_of_this_training = path.is_file() and path.stat().st_mtime >= (started_at or 0.0)
    results = read_results(path) if is_of_this_training else {}
    if not is_of_this_training and started_at is not None:
        remove_deployment(path.parent, before=started_at)
    found, earlier = describe_distillation(trainer), results.get("distillation", {})
    if earlier and trainer.state.global_step == 0:
        found = _with_new_evaluation(earlier, found)
    else:
        found["data"] |= earlier.get("data", {})  # a recipe knows more
    rows = [row for row in results.get("rows", []) if not row.get("is_last_evaluation")]
    rows = rows or _evaluation_row(trainer, found)
    kept = {name: section for name, section in results.items() if name != "rows"}
    write_results(path, rows, **{**kept, "distillation": found})


def remove_deployment(folder: str | os.PathLike, *, before: float | None = None) -> None:
    """
    Delete what was made of an earlier student of the folder: its ONNX files, their report, and the benchmark's.

    Args:
        folder (`str` or `Path`): The output folder of a training.
        before (`float`, *optional*):
            Only files that were last written before then, in seconds since the epoch; all of them by default.
    """
    folder = Path(folder)
    made = [folder / "onnx/export_report.json", folder / "report.md", folder / "pareto.png"]
    for path in (*folder.glob("onnx/*.onnx"), *folder.glob("onnx/*.onnx_data"), *made):
        if path.is_file() and (before is None or path.stat().st_mtime < before):
            path.unlink()


def _with_new_evaluation(earlier: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The history as it is, with what has been measured since then."""
    evaluation = found.get("evaluation", {})
    sizes = {
        split: number for split, number in found["data"].get("evaluation_rows", {}).items() if split in evaluation
    }
    if not evaluation:
        return earlier
    data = earlier.get("data", {})
    return {
        **earlier,
        "evaluation": {**earlier.get("evaluation", {}), **evaluation},
        "data": {**data, "evaluation_rows": {**data.get("evaluation_rows", {}), **sizes}},
    }


def _evaluation_row(trainer: DistillationTrainer, distillation: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of `results.json`, if a metric was computed that can be given in points of 100."""
    best = (trainer.args.metric_for_best_model or "").removeprefix("eval_")
    student, training = distillation["student"], distillation["training"]
    for split, metrics in distillation.get("evaluation", {}).items():
        own = [name for name in metrics if name not in ("loss", "epoch") and not name.startswith("teacher_")]
        names = [name for name in own if -1 <= metrics[name] <= 1]
        if names:
            row = {
                "role": "student" if distillation["teachers"] else "baseline",
                "task": distillation["problem"],
                "seed": training["seed"],
                "metrics": distillation["evaluation"],
                "main_metric": {"split": split, "name": best if best in names else names[0]},
                "parameters": student["parameters"],
                "layers": student.get("layers"),
                "steps": training["steps"],
                "is_last_evaluation": True,
            }
            return [row]
    return []


def describe_model(model: Any) -> dict[str, Any]:
    """Name, shape, and what the model's own card says about its origin; unknown facts are left out."""
    return {**identify(model.config), **_describe_shape(model.config, type(model).__name__, model.num_parameters())}


def _describe_shape(config: Any, architecture: str, parameters: int) -> dict[str, Any]:
    return {
        "architecture": architecture,
        "model_type": config.model_type,
        "parameters": parameters,
        "layers": getattr(config, "num_hidden_layers", None),
        **{name: getattr(config, name, None) for name in _SIZES[::2]},
    }


def _describe_teacher(teacher: Any) -> dict[str, Any]:
    """As [`describe_model`], of a teacher that runs or is cached; `column`, if its answers are soft labels of which
    nobody says who gave them."""
    model, cached = getattr(teacher, "model", None), getattr(teacher, "cached", teacher)
    column = None if getattr(cached, "is_model", True) else cached.logits_column
    if column is not None and (model is None or not teacher.runs):
        return {"column": column}
    if model is not None:
        return {**describe_model(model), "column": column}
    source = teacher.source
    return {
        **_identify_teacher(teacher),
        **_describe_shape(teacher.config, source.architecture, source.parameters),
    }


def _identify_teacher(teacher: Any) -> dict[str, Any]:
    """As [`identify`], which a cached teacher was asked when it ran."""
    model = getattr(teacher, "model", None)
    return identify(model.config) if model is not None else teacher.source.origin


def _loaded_teachers(trainer: DistillationTrainer) -> list[Any]:
    """Those that teach, or with `eval_teacher_agreement` are only compared with."""
    return [] if trainer.teacher is None else list(getattr(trainer.teacher, "teachers", [trainer.teacher]))


def _describe_student(trainer: DistillationTrainer) -> dict[str, Any]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    described = describe_model(model)
    shape = {name: value for name, value in described.items() if name in ("architecture", "model_type", "parameters")}
    shape |= {"layers": described["layers"], "hidden_size": described["hidden_size"]}
    has_tokenizer = hasattr(trainer.processing_class, "save_pretrained")
    teachers = _loaded_teachers(trainer)
    separate = any(teacher.reads_own_tokens for teacher in teachers) or None
    start = _describe_start(model, teachers)
    if "teacher" in start:
        source = teachers[start["teacher"]]
        # Compared with in the evaluation alone, or all that teaches are soft labels from elsewhere.
        if not trainer.distillation_objective.needs_teacher or "architecture" not in _describe_teacher(source):
            del start["teacher"]
            start |= _identify_teacher(source)
    return {**shape, "start": start, "has_tokenizer": has_tokenizer, "separate_tokenizers": separate}


def _describe_start(student: Any, teachers: list[Any]) -> dict[str, Any]:
    """Where its weights before training come from."""
    made = getattr(student, START_ATTRIBUTE, None)
    if made is not None:
        path = made["teacher"]
        found: dict[str, Any] = {"kind": "teacher", **{name: made[name] for name in made if name != "teacher"}}
        index = next((index for index, teacher in enumerate(teachers) if _is_of(teacher, path)), None)
        if index is not None:
            return {**found, "teacher": index}
        return {**found, "name": os.path.basename(os.path.abspath(path)) if path else None}
    path = student.config._name_or_path
    if not path or any(_is_of(teacher, path) for teacher in teachers):
        # A copy of the teacher's config names the teacher, whatever the weights are.
        return {"kind": "unknown"}
    return {"kind": "checkpoint", **identify(student.config)}


def _is_of(teacher: Any, path: str) -> bool:
    """Whether a teacher was loaded from there; of a cached one the last part of its folder is known."""
    if getattr(teacher, "model", None) is not None:
        return path == teacher.model.config._name_or_path
    name = teacher.config._name_or_path
    return teacher.is_model and name in (path, os.path.basename(os.path.abspath(path)) if path else "")


# Terms


def _describe_term(trainer: DistillationTrainer, term: Term) -> dict[str, Any]:
    objective = trainer.distillation_objective
    binding: Any = objective.binding
    described: dict[str, Any] = {"name": term.name, "kind": _KINDS[type(term)], "weight": term.weight}
    if isinstance(term, LogitTerm):
        described["type"] = term.type or ("mse" if trainer.problem == "regression" else "kl")
        if described["type"] != "mse":
            described["temperature"] = term.temperature
            described["temperature_schedule"] = _schedule(term.temperature_schedule)
        if binding.num_teachers > 1 and term.teacher is None:
            described |= {"teacher_weights": term.teacher_weights, "teacher_reduction": term.teacher_reduction}
    elif not isinstance(term, TaskTerm | CustomTerm):
        described["type"] = term.type
    if isinstance(term, TaskTerm):
        described["label_smoothing"] = term.label_smoothing or None
    elif binding.num_teachers > 1:
        described["teacher"] = binding.teacher_of[term.name]
    described["hidden_layers"] = binding.hidden_pairs.get(term.name)
    described["attention_layers"] = binding.attention_pairs.get(term.name)
    described["relation_heads"] = binding.relation_heads.get(term.name)
    described["head_reduction"] = getattr(term, "head_reduction", None)
    described["options"] = dict(getattr(term, "options", {})) or None
    described["schedule"] = _schedule(term.schedule)
    if term.name in objective.projections and any(True for _ in objective.projections[term.name].parameters()):
        described["is_projected"] = True
    return described


def _schedule(schedule: str | Schedule | None) -> str | None:
    """As flags write it; `None` for a constant one."""
    read = read_schedule(schedule)
    return None if read.kind == "constant" else f"{read.kind}:{read.start:g}:{read.end:g}"


# Data


def _describe_data(trainer: DistillationTrainer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(trainer.train_dataset, Sized):
        found["rows"] = len(trainer.train_dataset)
        labeled = _count_labeled(trainer)
        if labeled is not None:
            found |= {"labeled_rows": labeled, "unlabeled_rows": found["rows"] - labeled}
    evaluated = trainer.eval_dataset
    evaluated = evaluated if isinstance(evaluated, Mapping) else {"": evaluated}
    sizes = {f"eval_{name}".rstrip("_"): len(rows) for name, rows in evaluated.items() if isinstance(rows, Sized)}
    return {**found, "evaluation_rows": sizes or None}


def _count_labeled(trainer: DistillationTrainer) -> int | None:
    """Training rows with a label, wherever that can be told without running the data set's own code."""
    dataset, names = trainer.train_dataset, ("labels", "label", "start_positions")
    if hasattr(dataset, "select_columns"):  # a datasets.Dataset, without importing it
        name = next((name for name in names if name in dataset.column_names), None)
        batches: Iterable[Any] = [] if name is None else _batches(dataset, name)
    elif isinstance(dataset, list | tuple) and dataset and isinstance(dataset[0], Mapping):
        name = next((name for name in names if name in dataset[0]), None)
        batches = [[row.get(name, -100) for row in dataset]]
    else:
        return None
    if name is None:
        # A collator may have made labels, as that of masked language modelling does.
        has_task = any(isinstance(term, TaskTerm) for term in trainer.distillation_objective.terms)
        return None if has_task or trainer.problem == "masked_lm" else 0
    return sum(_num_labeled(batch) for batch in batches)


def _batches(dataset: Any, column: str) -> Iterable[Any]:
    for batch in dataset.select_columns([column]).with_format("numpy").iter(batch_size=10_000):
        yield batch[column]


def _num_labeled(labels: Any) -> int:
    if isinstance(labels, np.ndarray) and labels.dtype != object:
        return int((labels != -100).reshape(len(labels), -1).any(axis=1).sum())
    return sum(bool(np.any(np.asarray(label) != -100)) for label in labels)


# Training


def _describe_training(trainer: DistillationTrainer) -> dict[str, Any]:
    args, state = trainer.args, trainer.state
    mixed = trainer.accelerator.mixed_precision
    weights = str(trainer.model.dtype).removeprefix("torch.")
    is_split = getattr(trainer.accelerator, "split_batches", False)
    processes = args.world_size
    batch_size = trainer._train_batch_size * args.gradient_accumulation_steps * (1 if is_split else processes)
    distributed = getattr(trainer.accelerator.distributed_type, "value", "NO")
    return {
        "steps": state.global_step,
        "planned_steps": state.max_steps,
        "epochs": round(state.epoch, 2) if state.epoch is not None else None,
        "best_step": _best_step(trainer),
        "resumed_at_steps": _resume_notes(trainer).steps,
        "batch_size": batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": processes,
        "distributed": None if distributed == "NO" else distributed,
        "precision": weights if mixed in (None, "no") else mixed,
        "seed": args.seed,
        **_optimizer(trainer),
        "arguments": _arguments(args),
    }


def _resume_notes(trainer: DistillationTrainer) -> ResumeNotes:
    return next((c for c in trainer.callback_handler.callbacks if isinstance(c, ResumeNotes)), ResumeNotes())


def _best_step(trainer: DistillationTrainer) -> int | None:
    """The step whose weights were put back at the end."""
    state = trainer.state
    if not trainer.args.load_best_model_at_end or not state.best_model_checkpoint:
        return None
    match = re.search(r"checkpoint-(\d+)$", state.best_model_checkpoint)
    return int(match[1]) if match else None


def _optimizer(trainer: DistillationTrainer) -> dict[str, Any]:
    """Read from the optimizer itself, which may not be the one that the arguments describe."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    groups = getattr(optimizer, "param_groups", [])
    rates = sorted({float(group.get("initial_lr", group["lr"])) for group in groups})
    name = type(optimizer).__name__ if optimizer is not None else None
    return {"optimizer": name, "learning_rate": rates[0] if len(rates) == 1 else rates or trainer.args.learning_rate}


def _arguments(args: TrainingArguments) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(args)}
    given = {name: _plain(getattr(args, name)) for name in _ARGUMENTS if name in defaults}
    found = {name: value for name, value in given.items() if value != _plain(defaults[name])}
    if not args.load_best_model_at_end:
        found.pop("metric_for_best_model", None)
    # What is off here is off by default, under whatever name (None, False); 0.0 is a value, and equals False.
    return {name: value for name, value in found.items() if value or (value is not False and value == 0)}


# Evaluation


def _last_evaluation(trainer: DistillationTrainer) -> dict[str, dict[str, float]] | None:
    """Split to metrics of the weights that the model has now; an evaluation in mid-training was of others."""
    step = _best_step(trainer) or trainer.state.global_step
    found: dict[str, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        splits = [name.removesuffix("_runtime") for name in entry if name.endswith("_runtime")]
        for split in splits:
            if entry.get("step") == step and split != "train":
                found[split] = {
                    name.removeprefix(f"{split}_"): value
                    for name, value in entry.items()
                    if name.startswith(f"{split}_") and not name.endswith(_TIMINGS)
                }
    return found or None


def _plain(value: Any) -> Any:
    """As JSON has it, without what is not known."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
