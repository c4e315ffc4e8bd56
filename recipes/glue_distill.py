"""Distil a fine-tuned teacher into a smaller student on a GLUE task or on your own files.

accelerate launch recipes/glue_distill.py --task_name sst2 --teacher_model_name_or_path runs/sst2-teacher \
    --student_num_layers 3 --run_baseline --output_dir runs/sst2-student

A YAML file may come first:
`glue_distill.py recipes/configs/sst2.yaml --teacher_model_name_or_path ... --output_dir ...`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict
from glue_setup import (
    DataArguments,
    add_augmented,
    check_rows,
    check_run,
    checkpoint_to_resume,
    evaluate_model,
    label_config,
    labeled,
    leaves_no_empty_folder,
    load_data,
    measured_splits,
    open_hub_repository,
    result_row,
    save_predictions,
    tokenize_data,
    training_defaults,
)
from transformers import AutoConfig, DataCollatorWithPadding, PreTrainedModel, Trainer, set_seed
from transformers.utils import logging

from hf_kd import (
    DistillationCollator,
    DistillationObjective,
    DistillationTrainer,
    DistillationTrainingArguments,
    cache_teacher_signals,
    student_from_teacher,
)
from hf_kd.checkpoint import check_reads, load_pretrained, load_tokenizer
from hf_kd.command_line import parse_args, run_main
from hf_kd.deploy.hub import push_student
from hf_kd.deploy.model_card import card_problems_warn, write_model_card
from hf_kd.distributed import end_training
from hf_kd.glue import GLUE_TASKS, TextTask, compute_metrics_fn
from hf_kd.origin import identify
from hf_kd.record import describe_distillation, remove_deployment
from hf_kd.results import format_table, write_results
from hf_kd.signals import problem_of
from hf_kd.signals.teacher import (
    check_tokenizers,
    check_vocabulary,
    load_teacher,
    load_teacher_tokenizer,
    reorder_labels,
)
from hf_kd.soft_labels import is_soft_label_column


logger = logging.get_logger("hf_kd.recipes.glue_distill")


@dataclass
class ModelArguments:
    """The teacher, and how to make the student."""

    teacher_model_name_or_path: list[str] = field(
        metadata={"help": "Folder or Hub id of a fine-tuned teacher, or of several, which are averaged."}
    )
    teacher_revision: list[str] | None = field(
        default=None,
        metadata={
            "help": "The specific version of the teacher on the Hub (can be a branch name, tag name or commit id); of "
            "several teachers one for each. For private ones log in with `hf auth login`, or set HF_TOKEN."
        },
    )
    teacher_label_names: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the teacher's classes in its order, where its config says LABEL_0, LABEL_1."},
    )
    student_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a pretrained student with the teacher's vocabulary."}
    )
    student_revision: str | None = field(
        default=None,
        metadata={
            "help": "The specific version of the student on the Hub (can be a branch name, tag name or commit id)."
        },
    )
    student_num_layers: int | None = field(
        default=None, metadata={"help": "Copy so many teacher layers, evenly spread. Default: half of them."}
    )
    student_layers: list[int] | None = field(
        default=None, metadata={"help": "Copy these teacher layers, counted from 1, e.g. 2 4 6."}
    )
    student_hidden_size: int | None = field(default=None, metadata={"help": "A smaller width."})
    student_intermediate_size: int | None = field(default=None, metadata={"help": "A smaller feed-forward width."})
    student_num_attention_heads: int | None = field(
        default=None, metadata={"help": "Fewer heads, with a smaller width."}
    )
    student_init: Literal["importance", "random"] = field(
        default="importance",
        metadata={"help": "A narrower student starts from the teacher's most important weights, or at random."},
    )

    def __post_init__(self) -> None:
        flags = ("layers", "num_layers", "hidden_size", "intermediate_size", "num_attention_heads")
        is_set = [f"--student_{name}" for name in flags if getattr(self, f"student_{name}") is not None]
        if self.student_model_name_or_path is not None and is_set:
            raise ValueError(
                f"student_model_name_or_path={self.student_model_name_or_path!r} is a model with a shape of its own; "
                "drop "
                f"{', '.join(is_set)}, or that flag."
            )
        if self.teacher_revision is not None and len(self.teacher_revision) != len(self.teacher_model_name_or_path):
            raise ValueError(
                f"teacher_revision={self.teacher_revision} needs one for each teacher of "
                f"{self.teacher_model_name_or_path}; `main` is the default branch."
            )
        if self.student_revision is not None and self.student_model_name_or_path is None:
            raise ValueError(
                f"student_revision={self.student_revision!r} is of a model on the Hub, and the student is made from "
                "the teacher; give --student_model_name_or_path, or drop the flag."
            )

    def teachers(self) -> list[tuple[str, str | None]]:
        """Name and revision of each teacher."""
        revisions = self.teacher_revision or [None] * len(self.teacher_model_name_or_path)
        return list(zip(self.teacher_model_name_or_path, revisions, strict=True))


@dataclass
class DistillArguments(ModelArguments):
    """What this recipe does with them."""

    teacher_model_name_or_path: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folder or Hub id of a fine-tuned teacher, or of several, which are averaged. Without one, "
            "--train_file needs a column teacher_probs or teacher_logits, and the student is that of "
            "--student_model_name_or_path."
        },
    )
    separate_tokenizers: bool = field(
        default=False,
        metadata={
            "help": "Student and teacher read the texts with tokenizers of their own; only logits and what belongs to "
            "a whole row can be compared then."
        },
    )
    run_baseline: bool = field(
        default=False,
        metadata={"help": "Also train the same student without the teacher, for as many steps, and print both."},
    )
    export_onnx: bool = field(
        default=False,
        metadata={"help": "Also write the student as ONNX, float32 and int8, into `onnx` of the output folder."},
    )
    cache_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Folder for what the teacher says about the training rows: it runs over them once, and this and "
            "further runs on the same rows read the files."
        },
    )
    cache_dtype: Literal["float16", "bfloat16"] = field(
        default="float16",
        metadata={"help": "Of hidden states, queries, keys and values in --cache_teacher; logits are in float32."},
    )
    learning_rates: list[float] | None = field(
        default=None,
        metadata={"help": "Train student and baseline at each of these and keep the best on the validation split."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher_model_name_or_path:
            self._check_soft_labels_can_teach()
        if self.separate_tokenizers and self.student_model_name_or_path is None:
            raise ValueError(
                "separate_tokenizers is for a student with a tokenizer of its own; give one with "
                "--student_model_name_or_path, or drop the flag."
            )
        if self.cache_teacher is not None and self.separate_tokenizers:
            raise ValueError(
                f"cache_teacher={self.cache_teacher!r} keeps what the teacher says about the rows that the student "
                "reads, and with separate_tokenizers it reads others; drop --cache_teacher, and the teacher runs in "
                "the training."
            )

    def _check_soft_labels_can_teach(self) -> None:
        if self.student_model_name_or_path is None:
            raise ValueError(
                "there is no teacher to make a student of; give --teacher_model_name_or_path, or, with a column "
                "teacher_probs or teacher_logits in --train_file, --student_model_name_or_path."
            )
        for name in ("teacher_label_names", "separate_tokenizers", "cache_teacher"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} is about a teacher model; give --teacher_model_name_or_path, or "
                    "drop the flag. (--teacher_labels names the numbers of a column that is a list.)"
                )


def main() -> None:
    model_args, data_args, args = parse_args(
        (DistillArguments, DataArguments, DistillationTrainingArguments), **training_defaults(), learning_rate=1e-4
    )
    check_run(args)
    for learning_rate in model_args.learning_rates or []:
        check_run(dataclasses.replace(args, learning_rate=learning_rate))
    with leaves_no_empty_folder(args.output_dir):
        distil(model_args, data_args, args)


def distil(model_args: DistillArguments, data_args: DataArguments, args: DistillationTrainingArguments) -> None:
    if model_args.export_onnx:
        check_export_is_installed()
    if model_args.cache_teacher is not None:
        check_teacher_is_compared(model_args, args)
    repo_id = open_hub_repository(args)
    args = dataclasses.replace(args, push_to_hub=False)  # of all that is trained here, one student at the end
    data, task = load_data(data_args, args.seed, has_teacher=True)
    check_something_teaches(model_args, data_args, args, data["train"])
    check_rows(args, task, len(data["train"]))
    texts = data
    teachers = load_task_teachers(model_args, task)
    tokenizer, student_tokenizer = load_tokenizers(model_args, model_args.separate_tokenizers)
    objective = bind_objective(model_args, data_args, args, teachers, task, tokenizer, student_tokenizer)
    splits = measured_splits(data, task)
    # Before hours of training: a teacher that does not fit the data is found here.
    evaluated = DatasetDict({split: data[split] for split in splits})
    evaluated = tokenize_data(evaluated, task, tokenizer, data_args, args)
    rows = evaluate_teachers(teachers, args, tokenizer, evaluated, task)
    if model_args.separate_tokenizers and data_args.augment and data_args.augment_masked_lm is None:
        raise ValueError(
            "augment writes the mask token of one tokenizer into texts that two read; give --augment_masked_lm, which "
            "replaces words by words, or drop --augment."
        )
    data = add_augmented(data, task, tokenizer, data_args, args)
    collator: Any = DataCollatorWithPadding(tokenizer)
    if model_args.separate_tokenizers:
        collator = DistillationCollator(
            student_tokenizer, tokenizer, text_columns=task.text_columns, max_length=data_args.max_seq_length
        )
    reader = student_tokenizer if model_args.separate_tokenizers else tokenizer
    data = tokenize_data(data, task, reader, data_args, args, keep_texts=model_args.separate_tokenizers)
    run_teachers = teachers
    if model_args.cache_teacher is not None:
        data["train"] = cache_teachers(model_args, args, data["train"], teachers, objective, tokenizer)
        run_teachers = teachers if args.eval_teacher_agreement else []  # on the validation split
        if not run_teachers:
            for teacher in teachers:
                teacher.to("cpu")  # their evaluation moved them, and the student needs the room

    trainers: list[DistillationTrainer] = []

    def train(
        role: str, output_dir: Path, train_dataset: Dataset, **changes: Any
    ) -> tuple[DistillationTrainer, dict[str, Any]]:
        """Train from the same start at each learning rate; the best on the validation split, and its row."""
        best, best_score = None, float("-inf")
        learning_rates = model_args.learning_rates or [args.learning_rate]
        for learning_rate in learning_rates:
            folder = output_dir if len(learning_rates) == 1 else output_dir / f"learning_rate_{learning_rate:g}"
            run_args = dataclasses.replace(args, output_dir=str(folder), learning_rate=learning_rate, **changes)
            set_seed(args.seed)
            trainer = DistillationTrainer(
                model=make_student(model_args, teachers[0] if teachers else None, task),
                args=run_args,
                teacher_model=run_teachers,
                train_dataset=train_dataset,
                eval_dataset=data[task.validation_splits[0]],
                processing_class=student_tokenizer,
                data_collator=collator,
                compute_metrics=compute_metrics_fn(task),
            )
            trainers.append(trainer)
            trainer.train(resume_from_checkpoint=checkpoint_to_resume(args, folder))
            trainer.save_model()
            trainer.save_state()
            score = evaluate_model(trainer, data, task.validation_splits[:1])[task.validation_splits[0]][
                task.main_metric
            ]
            is_best = best is None or score > best_score
            loser = best if is_best else trainer
            if loser is not None:
                loser.teacher = None  # it may be a copy of its own
            if is_best:
                best, best_score = trainer, score
        if len(learning_rates) > 1:
            best.save_model(str(output_dir))
        save_predictions(args.output_dir, role, best, data, task, splits[0])
        num_labeled = len(labeled(train_dataset))
        row = result_row(
            role,
            task,
            best.args,
            best.model,
            evaluate_model(best, data, splits),
            learning_rate=best.args.learning_rate,
            learning_rates=learning_rates,
            steps=best.state.max_steps,
            labeled_rows=num_labeled,
            unlabeled_rows=len(train_dataset) - num_labeled,
            augment=data_args.augment if role == "student" else 0,
            weights={term.name: term.weight for term in best.distillation_objective.terms},
        )
        return best, row

    student_trainer, student_row = train("student", Path(args.output_dir), data["train"])
    rows.append(student_row)
    if model_args.run_baseline:
        # As many steps as the student, on the rows that it can use.
        changes = {"task_loss_weight": 1.0, "max_steps": student_row["steps"]}
        distilled = ("logit", "hidden", "attention", "relation")
        changes |= {f"{term}_loss_weight": 0.0 for term in distilled}
        changes |= {f"{term}_loss_schedule": None for term in ("task", *distilled)}
        _, row = train("baseline", Path(args.output_dir) / "baseline", labeled(data["train"]), **changes)
        rows.insert(-1, row)

    if student_trainer.is_world_process_zero():
        distillation: dict[str, Any] = {}  # stays empty where it cannot be described
        with card_problems_warn():
            found = describe_distillation(student_trainer)
            found["data"] |= describe_data(data_args, task, data, num_before=len(texts["train"]))
            distillation = json.loads(json.dumps(found))  # what JSON does not know must not cost the rows
        remove_deployment(args.output_dir)  # of a student that was trained here before
        # Once: after a kill between two writes nothing would tell that the second is missing.
        write_results(Path(args.output_dir) / "results.json", rows, distillation=distillation)
        print(format_table(rows))
        with card_problems_warn():
            write_model_card(args.output_dir, repo_id=repo_id)
    is_main_process = student_trainer.is_world_process_zero()
    end_training(*trainers)
    if model_args.export_onnx and is_main_process:  # the others are done
        export_student(args.output_dir, data_args, texts, task)
    if repo_id is not None and is_main_process:
        commit = push_student(args.output_dir, repo_id, token=args.hub_token, revision=args.hub_revision)
        print(f"The student is on the Hub: {commit.commit_url}")


def check_export_is_installed() -> None:
    """Hours before it is needed. Only those who export need the ONNX packages, so they are imported here."""
    from hf_kd.deploy.exporters import find_exporter

    find_exporter("auto")


def export_student(folder: str, data_args: DataArguments, data: DatasetDict, task: TextTask) -> None:
    """ONNX files beside the student's checkpoint, with the defaults of `export_onnx.py`."""
    from export_onnx import ExportArguments, export_and_measure

    from hf_kd.deploy.quantization import QuantizationError

    try:
        export_and_measure(ExportArguments(model_dir=folder, output_dir=folder), data_args, data, task)
    except QuantizationError as error:
        logger.warning(f"The student is trained and saved, and exported in float32 alone: {error}")


def describe_data(data_args: DataArguments, task: TextTask, data: DatasetDict, num_before: int) -> dict[str, Any]:
    """What the trainer cannot know about its rows; `num_before` is how many there were before the augmentation."""
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    files |= {"unlabeled": data_args.unlabeled_file}
    found: dict[str, Any] = {
        "task": task.name,
        "text_columns": list(task.text_columns),
        "max_length": data_args.max_seq_length,
        "evaluation_rows": {split: len(rows) for split, rows in data.items() if split != "train"},
        "files": {split: Path(path).name for split, path in files.items() if path is not None},
    }
    if data_args.task_name in GLUE_TASKS:
        found |= {"dataset": "nyu-mll/glue", "dataset_config": data_args.task_name, "language": "en"}
    elif data_args.task_name == "demo":
        found |= {"is_generated": True, "language": "en"}
    if data_args.max_train_samples is not None:
        found["max_train_rows"] = data_args.max_train_samples
    if data_args.max_eval_samples is not None:
        found["max_evaluation_rows"] = data_args.max_eval_samples
    if data_args.augment:
        found["augmented_rows"] = len(data["train"]) - num_before
        found["augment"] = {"variants": data_args.augment}
        if data_args.augment_masked_lm is not None:
            found["augment"]["masked_lm"] = identify(
                AutoConfig.from_pretrained(data_args.augment_masked_lm, trust_remote_code=False)
            )
    return found


def check_something_teaches(
    model_args: DistillArguments, data_args: DataArguments, args: DistillationTrainingArguments, rows: Dataset
) -> None:
    """Whether the rows say what the student is to learn, where no teacher does."""
    columns = [name for name in rows.column_names if is_soft_label_column(name)]
    if not columns and not model_args.teacher_model_name_or_path:
        raise ValueError(
            "nothing teaches the student; give --teacher_model_name_or_path, or a --train_file with a column "
            "teacher_probs or teacher_logits: one number per label."
        )
    if not columns:
        return
    if data_args.augment > 0:
        raise ValueError(
            f"augment={data_args.augment} makes rows that are not in {columns}; drop --augment, or leave the column "
            "out for a teacher model to label all rows."
        )
    has_labels = len(labeled(rows, "label")) > 0
    if not has_labels and (args.task_loss_weight > 0 or model_args.run_baseline):
        raise ValueError(
            f"no training row has a label, so that {columns} alone teach; set --task_loss_weight 0 "
            "--logit_loss_weight 1, without --run_baseline, which learns from labels."
        )


def check_teacher_is_compared(model_args: DistillArguments, args: DistillationTrainingArguments) -> None:
    """Before a teacher runs over all rows for nothing."""
    if not args.objective().needs_teacher:
        raise ValueError(
            f"cache_teacher={model_args.cache_teacher!r} keeps what the teacher says, and no term compares with it; "
            "set --logit_loss_weight 0.5, for example, or drop --cache_teacher."
        )


def bind_objective(
    model_args: DistillArguments,
    data_args: DataArguments,
    args: DistillationTrainingArguments,
    teachers: list[PreTrainedModel],
    task: TextTask,
    tokenizer: Any,
    student_tokenizer: Any,
) -> DistillationObjective:
    """What is compared of these teachers and a student, whose layers decide that; models that do not fit each other or
    the texts are found before one of them runs."""
    student = make_student(model_args, teachers[0] if teachers else None, task)
    check_reads(student, "the student", student_tokenizer, data_args.max_seq_length)
    for teacher, path in zip(teachers, model_args.teacher_model_name_or_path, strict=True):
        check_reads(teacher, f"teacher {path}", tokenizer, data_args.max_seq_length)
    objective = args.objective()
    if teachers:
        shares_tokens = not model_args.separate_tokenizers
        if shares_tokens:
            check_vocabulary(student.config, teachers[0].config)
        configs = [teacher.config for teacher in teachers]
        objective.bind(student.config, configs, problem=problem_of(student), shares_tokens=shares_tokens)
    return objective


def cache_teachers(
    model_args: DistillArguments,
    args: DistillationTrainingArguments,
    rows: Dataset,
    teachers: list[PreTrainedModel],
    objective: DistillationObjective,
    tokenizer: Any,
) -> Dataset:
    """The training rows with what the objective compares of each teacher: read from the disk, if it is there."""
    launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return cache_teacher_signals(
        rows,
        teachers,
        objective.teacher_wanted,
        model_args.cache_teacher,
        batch_size=args.per_device_eval_batch_size,
        dtype=model_args.cache_dtype,
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else launched_with,
        teacher_dtype=args.teacher_dtype,
        tokenizer=tokenizer,
        device=args.device,
    )


def load_task_teachers(model_args: ModelArguments, task: TextTask) -> list[PreTrainedModel]:
    """The teachers, their classes in the task's order."""
    teachers = [load_teacher(path, revision) for path, revision in model_args.teachers()]
    for path, teacher in zip(model_args.teacher_model_name_or_path, teachers, strict=True):
        problem = "regression" if task.is_regression else "single_label_classification"
        if problem_of(teacher) != problem:
            raise ValueError(
                f"the labels of {task.name} make it {problem}, and teacher {path} solves {problem_of(teacher)} with "
                f"{teacher.config.num_labels} labels; take a teacher of this task, or correct the label column."
            )
        if model_args.teacher_label_names is not None:
            teacher.config.id2label = dict(enumerate(model_args.teacher_label_names))
        if task.label_names is not None:
            names = [str(name) for name in teacher.config.id2label.values()]
            if sorted(name.casefold() for name in names) != sorted(name.casefold() for name in task.label_names):
                raise ValueError(
                    f"the labels of {task.name} are {list(task.label_names)}, those of teacher {path} {names}; take a "
                    "teacher of this task, or if it is one under other names, say which is which with "
                    f"--teacher_label_names {' '.join(task.label_names)} (in the teacher's order)."
                )
            reorder_labels(teacher, task.label_names)
    return teachers


def load_tokenizers(model_args: ModelArguments, separate: bool = False) -> tuple[Any, Any]:
    """The tokenizer that reads the data, and the one that is saved with the student; their tokens are the same, but
    where they are separate.

    The teacher's reads: a DistilBERT student's own one writes no segments, which a BERT teacher was trained with.
    """
    if not model_args.teacher_model_name_or_path:  # soft labels teach
        tokenizer = load_student_tokenizer(model_args)
        return tokenizer, tokenizer
    (teacher_path, teacher_revision), *others = model_args.teachers()
    teacher_tokenizer = load_teacher_tokenizer(teacher_path, teacher_revision)
    tokenizer = teacher_tokenizer
    if model_args.student_model_name_or_path is not None:
        tokenizer = load_student_tokenizer(model_args)
    if tokenizer is None or (separate and teacher_tokenizer is None):
        raise ValueError(f"{teacher_path} holds no tokenizer; save it there with tokenizer.save_pretrained(folder).")
    if not separate:
        check_tokenizers(tokenizer, teacher_tokenizer)
    for other in others:
        check_tokenizers(teacher_tokenizer or tokenizer, load_teacher_tokenizer(*other))
    return teacher_tokenizer or tokenizer, tokenizer


def load_student_tokenizer(model_args: ModelArguments) -> Any:
    """The tokenizer of a pretrained student."""
    path, revision = model_args.student_model_name_or_path, model_args.student_revision
    return load_tokenizer(path, "student_model_name_or_path", revision=revision)


def make_student(model_args: ModelArguments, teacher: PreTrainedModel | None, task: TextTask) -> PreTrainedModel:
    """A fresh student, the same one after the same `set_seed`; without a teacher that of its own name."""
    if teacher is None or model_args.student_model_name_or_path is not None:
        path, revision = model_args.student_model_name_or_path, model_args.student_revision
        return load_pretrained(path, "student_model_name_or_path", revision=revision, **label_config(task))
    num_layers = model_args.student_num_layers
    if num_layers is None and model_args.student_layers is None:
        num_layers = max(1, teacher.config.num_hidden_layers // 2)
    return student_from_teacher(
        teacher,
        layers=model_args.student_layers,
        num_layers=num_layers,
        hidden_size=model_args.student_hidden_size,
        intermediate_size=model_args.student_intermediate_size,
        num_attention_heads=model_args.student_num_attention_heads,
        init=model_args.student_init,
    )


def evaluate_teachers(
    teachers: list[PreTrainedModel],
    args: DistillationTrainingArguments,
    tokenizer: Any,
    data: DatasetDict,
    task: TextTask,
) -> list[dict[str, Any]]:
    """A row of each teacher, measured as the student is."""
    rows = []
    for index, teacher in enumerate(teachers):
        trainer = Trainer(
            model=teacher,
            args=dataclasses.replace(args, eval_strategy="no", load_best_model_at_end=False),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=compute_metrics_fn(task),
        )
        metrics = evaluate_model(trainer, data, tuple(data))
        # It comes trained: the seed of the run that measures it says nothing about it.
        more = {"teacher": index} if len(teachers) > 1 else {}
        rows.append(result_row("teacher", task, args, teacher, metrics, seed=None, **more))
    return rows


if __name__ == "__main__":
    run_main(main)
