"""What the GLUE recipes share: the arguments about data, reading the data, evaluating a model."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict, concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_kd.augmentation import augment
from hf_kd.compat import hardware_defaults, length_grouping
from hf_kd.demo_task import generate_demo_task
from hf_kd.deploy.hub import open_repository
from hf_kd.files import write_whole
from hf_kd.glue import (
    GLUE_TASKS,
    UNLABELED,
    TextTask,
    load_glue,
    load_text_files,
    load_unlabeled_file,
    tokenize,
)


@dataclass
class DataArguments:
    """Which data to train and evaluate on; names are those of `run_glue.py` where it has them."""

    task_name: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(GLUE_TASKS)}, or `demo`, a task that is generated from a seed."},
    )
    glue_dir: str | None = field(
        default=None,
        metadata={"help": "Folder in the official glue_data layout (SST-2/train.tsv ...) in place of the Hub."},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Your own CSV, TSV, JSON or Parquet file to train on."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Your own CSV, TSV, JSON or Parquet file to evaluate on."}
    )
    unlabeled_file: str | None = field(
        default=None,
        metadata={"help": "CSV, TSV, JSON, Parquet or TXT file with texts alone, from which the teacher teaches."},
    )
    text_columns: list[str] | None = field(
        default=None,
        metadata={"help": "The one or two text columns of your own files. Default: guessed where it is clear."},
    )
    label_column: str | None = field(
        default=None, metadata={"help": "The label column of your own files. Default: label."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per example, > 2; longer texts are cut."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first so many rows after a shuffle."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many rows."})
    augment: int = field(
        default=0,
        metadata={"help": "Up to so many variants of each labelled training row, which the teacher labels; 0: none."},
    )
    augment_masked_lm: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a masked language model, which replaces words in the variants. Default: "
            "words are masked, and n-grams sampled."
        },
    )

    def __post_init__(self) -> None:
        has_files = self.train_file is not None or self.validation_file is not None
        if (self.task_name is None) != has_files:
            raise ValueError(
                f"task_name={self.task_name!r}, train_file={self.train_file!r}, "
                f"validation_file={self.validation_file!r}: give --task_name, "
                "or --train_file and --validation_file."
            )
        if has_files and (self.train_file is None or self.validation_file is None):
            raise ValueError("your own data needs both files: --train_file train.csv --validation_file dev.csv.")
        if self.task_name is not None and self.task_name not in (*GLUE_TASKS, "demo"):
            raise ValueError(f"task_name={self.task_name!r} must be one of {', '.join(GLUE_TASKS)}, demo.")
        lowest_values = {"max_seq_length": 3, "max_train_samples": 1, "max_eval_samples": 1, "augment": 0}
        for name, lowest in lowest_values.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name}={value} must be at least {lowest}.")
        if self.augment_masked_lm is not None and self.augment == 0:
            raise ValueError(
                f"augment_masked_lm={self.augment_masked_lm!r} has nothing to do with augment=0; say how many "
                "variants to make, for example --augment 20."
            )


def training_defaults() -> dict[str, Any]:
    """Where the recipes' training arguments differ from `TrainingArguments`."""
    return {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 128,
        "num_train_epochs": 3,
        "logging_steps": 50,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "report_to": "none",
        **hardware_defaults(),
        **length_grouping(),
    }


def check_run(args: TrainingArguments) -> None:
    """What `TrainingArguments` lets pass, and would fail or train nothing hours later."""
    lowest = {
        "learning_rate": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "adam_epsilon": 0.0,
        "seed": 0,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
    }
    for name, value in lowest.items():
        given = getattr(args, name)
        if not (math.isfinite(given) and given >= value):
            raise ValueError(f"{name}={given} must be a finite number of {value} or more.")
    if args.seed >= 2**32:
        raise ValueError(f"seed={args.seed} must be below 2**32.")
    if args.max_steps <= 0 and not (math.isfinite(args.num_train_epochs) and args.num_train_epochs > 0):
        raise ValueError(
            f"num_train_epochs={args.num_train_epochs} and max_steps={args.max_steps} train nothing; set "
            "--num_train_epochs 3, for example."
        )
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16=True needs a GPU, and the run is on the CPU; drop --fp16, or use --bf16 true.")
    _check_output_dir(Path(args.output_dir).absolute())
    checkpoint_to_resume(args, args.output_dir)


def _check_output_dir(folder: Path) -> None:
    """Whether it can be written to, or made; nothing is made yet."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir={str(folder)!r} is no folder that can be written to: {error.strerror}: {str(there)!r}; give "
            "another --output_dir."
        ) from error


def check_rows(args: TrainingArguments, task: TextTask, num_rows: int) -> None:
    """Whether the training rows make a step, and the best checkpoint is chosen by a metric that there is."""
    batch_size = args.per_device_train_batch_size * max(args.world_size, 1)
    if num_rows == 0 or (args.dataloader_drop_last and num_rows < batch_size):
        raise ValueError(
            f"{num_rows} training rows fill no batch of {batch_size}, and dataloader_drop_last="
            f"{args.dataloader_drop_last}, so that no step would be made; set --per_device_train_batch_size "
            f"{max(num_rows // max(args.world_size, 1), 1)} or less, or drop --dataloader_drop_last."
        )
    names = ("loss", *task.metric_names, *(["combined_score"] if len(task.metric_names) > 1 else []))
    names = (*names, "teacher_agreement", "teacher_kl", "teacher_mse")
    asked = args.metric_for_best_model
    if asked is not None and asked.removeprefix("eval_") not in names:
        raise ValueError(
            f"metric_for_best_model={asked!r} is no metric of {task.name}; use one of {', '.join(names[:-3])}."
        )


@contextlib.contextmanager
def leaves_no_empty_folder(folder: str | Path) -> Iterator[None]:
    """A `Trainer` makes its output folder before it looks at the rest of its arguments."""
    folder = Path(folder).absolute()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except Exception:
        with contextlib.suppress(OSError):  # it holds something by now
            for path in missing:
                path.rmdir()
        raise


def load_data(args: DataArguments, seed: int, has_teacher: bool = False) -> tuple[DatasetDict, TextTask]:
    """The task's splits with text columns and `label`; unlabelled rows (-100) are part of `train`.

    A split `test` is what a task is measured on, if it has one; learning rates are chosen on the validation split.
    With a teacher, `add_augmented` comes next.
    """
    if args.augment > 0 and not has_teacher:
        raise ValueError(
            f"augment={args.augment} makes rows without a label, and there is no teacher here to label them; drop "
            "--augment, or give it to glue_distill.py."
        )
    if args.task_name == "demo":
        data, task = generate_demo_task(num_validation=1400)
        data["test"] = data["validation"].select(range(400, 1400))
        data["validation"] = data["validation"].select(range(400))
    elif args.task_name is not None:
        data, task = load_glue(args.task_name, args.glue_dir), GLUE_TASKS[args.task_name]
    else:
        data, task = load_text_files(args.train_file, args.validation_file, args.text_columns, args.label_column)
    if args.max_train_samples is not None:
        data["train"] = data["train"].shuffle(seed=seed).select(range(min(args.max_train_samples, len(data["train"]))))
    for split in set(data) - {"train", "unlabeled"}:
        if args.max_eval_samples is not None:
            data[split] = data[split].select(range(min(args.max_eval_samples, len(data[split]))))
    pools = [data.pop("unlabeled")] if "unlabeled" in data else []
    pools += [load_unlabeled_file(args.unlabeled_file, task)] if args.unlabeled_file else []
    for pool in pools:
        if set(pool.column_names) != set(data["train"].column_names):
            raise ValueError(
                f"the unlabelled rows have the columns {pool.column_names}, and the training rows "
                f"{data['train'].column_names}; give both files the same soft labels, or none."
            )
    data["train"] = concatenate_datasets([data["train"], *(pool.cast(data["train"].features) for pool in pools)])
    return data, task


def add_augmented(
    data: DatasetDict,
    task: TextTask,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    training_args: TrainingArguments,
) -> DatasetDict:
    """`data` with the variants of `--augment` after the training rows; made on the first process, for all."""
    if args.augment == 0:
        return data
    rows = labeled(data["train"], "label")
    with training_args.main_process_first(desc="augmenting"):
        variants = augment(
            rows,
            task.text_columns,
            args.augment,
            tokenizer=tokenizer,
            seed=training_args.seed,
            masked_lm=args.augment_masked_lm,
            device=training_args.device,
        )
    if training_args.process_index == 0:
        print(f"--augment {args.augment}: {len(variants)} variants of {len(rows)} labelled training rows.")
    return DatasetDict({**data, "train": concatenate_datasets([data["train"], variants])})


def open_hub_repository(args: TrainingArguments) -> str | None:
    """Hours before it is needed, the repository of `--push_to_hub`: on the main process, which is the one that
    pushes."""
    if not args.push_to_hub or args.process_index > 0:
        return None
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    return open_repository(name, private=args.hub_private_repo, token=args.hub_token)


def checkpoint_to_resume(args: TrainingArguments, folder: str | Path) -> str | None:
    """The checkpoint that the run in `folder`, the output folder or one below it, goes on from.

    `--resume_from_checkpoint true` means the newest of each run's own folder, if there is one; a path means that one,
    for the run that it belongs to.
    """
    asked, folder = args.resume_from_checkpoint, Path(folder).resolve()
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() == "true":
        return get_last_checkpoint(str(folder)) if folder.is_dir() else None
    checkpoint = Path(asked).resolve()
    if not checkpoint.is_dir() or not checkpoint.is_relative_to(Path(args.output_dir).resolve()):
        raise ValueError(
            f"resume_from_checkpoint={asked!r} is not a checkpoint below output_dir={args.output_dir!r}; give one, or "
            "`--resume_from_checkpoint true` for the newest."
        )
    if not (checkpoint / "trainer_state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint={asked!r} holds no trainer_state.json, so it is no checkpoint of a training; "
            "give a folder checkpoint-N, or `--resume_from_checkpoint true` for the newest."
        )
    return str(checkpoint) if checkpoint.parent == folder else None


def tokenize_data(
    data: DatasetDict,
    task: TextTask,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    training_args: TrainingArguments,
    keep_texts: bool = False,
) -> DatasetDict:
    """Tokenize on the first process while the others wait for its cache."""
    with training_args.main_process_first(desc="tokenizing"):
        return tokenize(data, task, tokenizer, args.max_seq_length, keep_texts)


def labeled(dataset: Any, column: str = "labels") -> Any:
    """The rows that have a label."""
    is_labeled = np.flatnonzero(np.asarray(dataset.with_format("numpy")[column]) != UNLABELED)
    return dataset if len(is_labeled) == len(dataset) else dataset.select(is_labeled)


def measured_splits(data: DatasetDict, task: TextTask) -> tuple[str, ...]:
    """The splits a model is measured on, the one that ranks models first."""
    return ("test",) if "test" in data else task.validation_splits


def evaluate_model(trainer: Trainer, data: DatasetDict, splits: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Metrics by split, without the prefix and the timings that `Trainer.evaluate` adds."""
    metrics = {}
    for split in splits:
        with _reads_all_rows(trainer.args):
            found = trainer.evaluate(data[split], metric_key_prefix=split)
        timings = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time")
        metrics[split] = {
            name.removeprefix(f"{split}_"): value
            for name, value in found.items()
            if name.startswith(f"{split}_") and not name.endswith(timings)
        }
    return metrics


@contextlib.contextmanager
def _reads_all_rows(args: TrainingArguments, **changes: Any) -> Iterator[None]:
    """Evaluation drops the last batch, where it is not full, if the training does."""
    changes["dataloader_drop_last"] = False
    as_trained = {name: getattr(args, name) for name in changes}
    vars(args).update(changes)
    try:
        yield
    finally:
        vars(args).update(as_trained)


def save_predictions(
    folder: str | Path, role: str, trainer: Trainer, data: DatasetDict, task: TextTask, split: str
) -> None:
    """Write what a model says about the rows of a split into `predictions.json`, for [`paired_bootstrap`].

    The file holds `task`, `split`, `labels` in the order of the data, and in `predictions` a list by role: class
    indices, or scores for regression. The student's run begins it anew.
    """
    # Grouped by length, the rows come in another order each time, and evaluation follows the training's argument.
    with _reads_all_rows(trainer.args, **length_grouping(False)):
        output = trainer.predict(data[split])  # by all processes together
    if not trainer.is_world_process_zero():
        return
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    predictions = logits.reshape(len(logits)) if task.is_regression else logits.argmax(axis=-1)
    path = Path(folder) / "predictions.json"
    is_new = role == "student" or not path.is_file()
    found = {"predictions": {}} if is_new else json.loads(path.read_text(encoding="utf-8"))
    found = {"task": task.name, "split": split, "labels": output.label_ids.tolist(), **found}
    found["predictions"][role] = predictions.tolist()
    write_whole(path, json.dumps(found) + "\n")


def label_config(task: TextTask) -> dict[str, Any]:
    """The label arguments of `from_pretrained` for a task."""
    if task.label_names is None:
        return {"num_labels": 1}
    return {
        "num_labels": task.num_labels,
        "id2label": dict(enumerate(task.label_names)),
        "label2id": {name: index for index, name in enumerate(task.label_names)},
    }


def result_row(
    role: str,
    task: TextTask,
    args: TrainingArguments,
    model: PreTrainedModel,
    metrics: dict[str, dict[str, float]],
    **more: Any,
) -> dict[str, Any]:
    """One row of `results.json`."""
    return {
        "role": role,
        "task": task.name,
        "seed": args.seed,
        "metrics": metrics,
        "main_metric": {"split": next(iter(metrics)), "name": task.main_metric},
        "parameters": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        **more,
    }
