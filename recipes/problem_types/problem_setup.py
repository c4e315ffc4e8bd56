"""What the recipes of this folder share: the arguments, reading the data, distilling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import DatasetDict, load_dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_kd import DistillationTrainer, DistillationTrainingArguments, student_from_teacher
from hf_kd.compat import hardware_defaults, length_grouping
from hf_kd.distributed import end_training
from hf_kd.results import format_table, write_results
from hf_kd.signals import ProblemType, problem_of
from hf_kd.signals.teacher import load_teacher, load_teacher_tokenizer


@dataclass
class RecipeArguments:
    """The teacher, the student, and the data."""

    teacher_model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a fine-tuned teacher."})
    student_num_layers: int | None = field(
        default=None, metadata={"help": "Copy so many teacher layers, evenly spread. Default: half of them."}
    )
    dataset_name: list[str] = field(
        default_factory=list, metadata={"help": "Hub id, and after it the configuration, if there are several."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Your own JSON-lines file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "Your own JSON-lines file to evaluate on."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut, or split where that is usual."})

    def __post_init__(self) -> None:
        if bool(self.train_file) != bool(self.validation_file):
            raise ValueError(
                f"train_file={self.train_file!r} and validation_file={self.validation_file!r}: your own data needs "
                "both files, --train_file train.jsonl --validation_file dev.jsonl."
            )


def training_defaults() -> dict[str, Any]:
    """Where the training arguments differ from `TrainingArguments`."""
    return {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-4,
        "logging_steps": 50,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "report_to": "none",
        **hardware_defaults(),
        **length_grouping(),
    }


def load_data(args: RecipeArguments, columns: Sequence[str]) -> DatasetDict:
    """The splits `train` and `validation`, with these columns among theirs.

    Raises:
        ValueError: If a split or a column is missing.
    """
    if args.train_file:
        files = {"train": args.train_file, "validation": args.validation_file}
        data = load_dataset("json", data_files=files)
    else:
        data = load_dataset(*args.dataset_name)
    for split in ("train", "validation"):
        missing = sorted(set(columns) - set(data[split].column_names if split in data else ()))
        if missing:
            raise ValueError(
                f"the split {split!r} of {args.train_file or args.dataset_name} lacks the columns {missing}; give "
                f"--train_file and --validation_file with {', '.join(columns)} in each line."
            )
    return DatasetDict({split: data[split] for split in ("train", "validation")})


class Models(NamedTuple):
    """A teacher, a student made of its layers, and their tokenizer."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_models(args: RecipeArguments, problem: ProblemType) -> Models:
    """Load the teacher and make its student.

    Raises:
        ValueError: If the teacher solves another problem, or has no tokenizer.
    """
    path = args.teacher_model_name_or_path
    teacher, tokenizer = load_teacher(path), load_teacher_tokenizer(path)
    if problem_of(teacher) != problem:
        raise ValueError(f"{path} is a {type(teacher).__name__} for {problem_of(teacher)}; this needs {problem}.")
    if tokenizer is None:
        raise ValueError(f"{path} holds no tokenizer; save it there with tokenizer.save_pretrained(folder).")
    num_layers = args.student_num_layers or max(1, teacher.config.num_hidden_layers // 2)
    return Models(teacher, student_from_teacher(teacher, num_layers=num_layers), tokenizer)


def teacher_labels(data: DatasetDict, column: str, teacher: PreTrainedModel) -> Callable[[list], list[int]]:
    """Turns the labels of a row into the teacher's: names by name, in whatever order the data numbers them.

    Raises:
        ValueError: If the teacher does not know a name.
    """
    feature = data["train"].features[column]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    known = {name: index for index, name in teacher.config.id2label.items()}

    def convert(labels: list) -> list[int]:
        labels = [label if names is None or isinstance(label, str) else names[label] for label in labels]
        unknown = sorted({label for label in labels if isinstance(label, str) and label not in known})
        if unknown:
            raise ValueError(
                f"the data has the labels {unknown}, the teacher {list(known)}; take a teacher that was fine-tuned on "
                "these labels, or name them alike in id2label and label2id of its config.json."
            )
        return [known.get(label, label) for label in labels]

    return convert


def preprocess(data: DatasetDict, function: Callable, training_args: DistillationTrainingArguments) -> DatasetDict:
    """Apply a function to batches of rows, on the first process while the others wait for its cache."""
    with training_args.main_process_first(desc="tokenizing"):
        return data.map(function, batched=True, remove_columns=data["train"].column_names, desc="tokenizing")


def distil(
    models: Models,
    data: DatasetDict,
    args: DistillationTrainingArguments,
    data_collator: Any,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
    main_metric: str,
    **kwargs: Any,
) -> None:
    """Train and save the student, and print it beside its teacher, both as measured on the validation split."""
    kwargs |= {"args": args, "data_collator": data_collator, "compute_metrics": compute_metrics}
    kwargs |= {"eval_dataset": data["validation"], "processing_class": models.tokenizer}
    # Before hours of training: a teacher that does not fit the data is found here.
    rows = [result_row("teacher", Trainer(model=models.teacher, **kwargs), main_metric)]
    set_seed(args.seed)
    trainer = DistillationTrainer(
        model=models.student, teacher_model=models.teacher, train_dataset=data["train"], **kwargs
    )
    trainer.train(resume_from_checkpoint=find_checkpoint(args))
    trainer.save_model()
    objective = trainer.distillation_objective
    more = {"steps": trainer.state.max_steps, "weights": {term.name: term.weight for term in objective.terms}}
    role = "student" if objective.needs_teacher else "baseline"
    rows.append(result_row(role, trainer, main_metric, seed=args.seed, **more))
    if trainer.is_world_process_zero():
        write_results(Path(args.output_dir) / "results.json", rows)
        print(format_table(rows))
    trainer.create_model_card()
    end_training(trainer)


def find_checkpoint(args: DistillationTrainingArguments) -> str | None:
    """The checkpoint to go on from; `--resume_from_checkpoint true` means the newest of the output folder."""
    asked = args.resume_from_checkpoint
    if asked is None or asked.lower() in ("true", "false"):
        is_asked = asked is not None and asked.lower() == "true" and Path(args.output_dir).is_dir()
        return get_last_checkpoint(args.output_dir) if is_asked else None
    return asked


def result_row(role: str, trainer: Trainer, main_metric: str, seed: int | None = None, **more: Any) -> dict[str, Any]:
    """One row of `results.json`, measured now."""
    set_seed(trainer.args.seed)  # where masks are drawn at random, every model is asked about the same ones
    timings = ("_runtime", "_samples_per_second", "_steps_per_second", "_model_preparation_time", "epoch")
    found = {name: value for name, value in trainer.evaluate().items() if not name.endswith(timings)}
    return {
        "role": role,
        "task": problem_of(trainer.model),
        "seed": seed,
        "metrics": {"validation": {name.removeprefix("eval_"): value for name, value in found.items()}},
        "main_metric": {"split": "validation", "name": main_metric},
        "parameters": trainer.model.num_parameters(),
        "layers": trainer.model.config.num_hidden_layers,
        **more,
    }
