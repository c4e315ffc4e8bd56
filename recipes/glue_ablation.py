"""What each distillation signal is worth on a task: the same student, from the same start, under several settings.

accelerate launch recipes/glue_ablation.py --task_name mrpc --teacher_model_name_or_path runs/mrpc-teacher \
    --student_num_layers 3 --settings task logits hidden attention minilm_v2 --output_dir runs/mrpc-ablation

Every run is written to `results.json` when it is done, and another call with the same output folder adds what is
missing there: other settings, other seeds, more text (`--unlabeled_file`, `--augment`) or more epochs. `--step_cost`
measures instead what a training step costs with each form of each term.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from datasets import Dataset, DatasetDict
from glue_distill import ModelArguments, evaluate_teachers, load_task_teachers, load_tokenizers, make_student
from glue_setup import (
    DataArguments,
    add_augmented,
    evaluate_model,
    labeled,
    load_data,
    measured_splits,
    result_row,
    tokenize_data,
    training_defaults,
)
from transformers import DataCollatorWithPadding, PreTrainedModel, set_seed

from hf_kd import DistillationTrainer, DistillationTrainingArguments
from hf_kd.command_line import parse_args, run_main
from hf_kd.glue import TextTask, compute_metrics_fn
from hf_kd.objective.terms import AttentionLossType, HiddenLossType, RelationLossType
from hf_kd.results import describe_run, read_results, write_results


# Every setting says what is on; flags say how.
OFF: dict[str, Any] = {f"{term}_loss_weight": 0.0 for term in ("hidden", "attention", "relation")}
OFF |= {f"{term}_loss_schedule": None for term in ("task", "logit", "hidden", "attention", "relation")}
LOGITS = {**OFF, "task_loss_weight": 0.1, "logit_loss_weight": 0.9}
SETTINGS: dict[str, dict[str, Any]] = {
    "task": {**OFF, "task_loss_weight": 1.0, "logit_loss_weight": 0.0},
    "logits": LOGITS,
    "hidden": {**LOGITS, "hidden_loss_weight": 1.0},
    "attention": {**LOGITS, "attention_loss_weight": 1.0},
    "minilm_v2": {**LOGITS, "relation_loss_weight": 1.0},
    "hidden+attention": {**LOGITS, "hidden_loss_weight": 1.0, "attention_loss_weight": 1.0},
    # TinyBERT's order: the layers first, then the predictions.
    "two_stages": {
        **LOGITS,
        **{"hidden_loss_weight": 1.0, "attention_loss_weight": 1.0},
        **{"hidden_loss_schedule": "window:0:0.5", "attention_loss_schedule": "window:0:0.5"},
        **{"task_loss_schedule": "window:0.5:1", "logit_loss_schedule": "window:0.5:1"},
    },
}
# Every form of every intermediate term, on top of logits.
FORMS = {
    f"{term} {loss_type}": {**LOGITS, f"{term}_loss_weight": 1.0, f"{term}_loss_type": loss_type}
    for term, types in (("hidden", HiddenLossType), ("attention", AttentionLossType), ("relation", RelationLossType))
    for loss_type in get_args(types)
}


@dataclass
class AblationArguments:
    """Which settings to compare."""

    settings: list[str] = field(
        default_factory=lambda: list(SETTINGS), metadata={"help": f"Some of {', '.join(SETTINGS)}."}
    )
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "One run per setting and seed."})
    step_cost: bool = field(
        default=False, metadata={"help": "Measure the time of a step with each form of each term, and train nothing."}
    )
    step_cost_rounds: int = field(default=15, metadata={"help": "Steps of each form, in turns, > 3."})

    def __post_init__(self) -> None:
        if unknown := [name for name in self.settings if name not in SETTINGS]:
            raise ValueError(f"settings={unknown} are not known; choose from {', '.join(SETTINGS)}.")
        if self.step_cost_rounds < 4:
            raise ValueError(f"step_cost_rounds={self.step_cost_rounds} must be at least 4; the first one warms up.")


def main() -> None:
    ablation, model_args, data_args, args = parse_args(
        (AblationArguments, ModelArguments, DataArguments, DistillationTrainingArguments),
        **{**training_defaults(), "eval_strategy": "no", "save_strategy": "no"},
        learning_rate=1e-4,
    )
    data, task = load_data(data_args, args.seed, has_teacher=True)
    teachers = load_task_teachers(model_args, task)
    tokenizer, _ = load_tokenizers(model_args)
    data = add_augmented(data, task, tokenizer, data_args, args)
    data = tokenize_data(data, task, tokenizer, data_args, args)
    collator = DataCollatorWithPadding(tokenizer)
    splits = measured_splits(data, task)

    def make_trainer(train_dataset: Dataset, seed: int, changes: dict[str, Any]) -> DistillationTrainer:
        set_seed(seed)
        return DistillationTrainer(
            model=make_student(model_args, teachers[0], task),
            args=dataclasses.replace(args, seed=seed, **changes),
            teacher_model=teachers,
            train_dataset=train_dataset,
            data_collator=collator,
            compute_metrics=compute_metrics_fn(task),
        )

    path = Path(args.output_dir) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = read_results(path) if path.is_file() else {"rows": []}
    rows, costs = results["rows"], {key: value for key, value in results.items() if key == "step_cost"}
    if ablation.step_cost:
        costs["step_cost"] = measure_step_cost(lambda form: make_trainer(data["train"], args.seed, form), ablation)
        write_results(path, rows, **costs)
        print(json.dumps(costs, indent=2))
        return
    if not rows:
        measured = DatasetDict({split: data[split] for split in splits})
        rows = evaluate_teachers(teachers, args, tokenizer, measured, task)
    check_same_student(rows, task, make_student(model_args, teachers[0], task), path)
    done = {run_key(row) for row in rows if row["role"] != "teacher"}
    for seed in ablation.seeds:
        for setting in ablation.settings:
            is_baseline = setting == "task"
            # What has no label teaches nothing without a teacher.
            train_dataset = labeled(data["train"]) if is_baseline else data["train"]
            num_labeled = len(labeled(train_dataset))
            described = {
                "setting": setting,
                "seed": seed,
                "epochs": args.num_train_epochs,
                "learning_rate": args.learning_rate,
                "max_steps": args.max_steps,
                "batch_size": args.per_device_train_batch_size,
                "labeled_rows": num_labeled,
                "unlabeled_rows": len(train_dataset) - num_labeled,
                "augment": 0 if is_baseline else data_args.augment,
                "augment_masked_lm": None if is_baseline else data_args.augment_masked_lm,
            }
            if run_key(described) in done:
                print(f"{setting}, seed {seed}: already in {path}")
                continue
            trainer = make_trainer(train_dataset, seed, SETTINGS[setting])
            start = time.perf_counter()
            trainer.train()
            described["train_seconds"] = round(time.perf_counter() - start, 1)
            metrics = evaluate_model(trainer, data, splits)
            rows.append(make_row(trainer, task, metrics, is_baseline, described))
            if args.process_index == 0:
                write_results(path, rows, **costs)
                print(json.dumps(rows[-1]))


def run_key(row: dict[str, Any]) -> tuple:
    """What tells the runs of one results file, which are of one student, apart."""
    names = ("setting", "seed", "epochs", "learning_rate", "labeled_rows", "unlabeled_rows", "augment")
    return (
        *(row[name] for name in names),
        *(row.get(name) for name in ("max_steps", "batch_size", "augment_masked_lm")),
    )


def check_same_student(rows: list[dict[str, Any]], task: TextTask, student: PreTrainedModel, path: Path) -> None:
    """One file compares settings of one student on one task."""
    shape = {"task": task.name, "parameters": student.num_parameters(), "layers": student.config.num_hidden_layers}
    for row in rows:
        other = {name: row[name] for name in shape} if row["role"] != "teacher" else {"task": row["task"]}
        if any(shape[name] != value for name, value in other.items()):
            raise ValueError(f"{path} holds runs of {other}, but these are of {shape}; give another --output_dir.")


def make_row(
    trainer: DistillationTrainer,
    task: TextTask,
    metrics: dict[str, dict[str, float]],
    is_baseline: bool,
    described: dict[str, Any],
) -> dict[str, Any]:
    """One run as a row of `results.json`."""
    model: PreTrainedModel = trainer.model
    return result_row(
        "baseline" if is_baseline else "student",
        task,
        trainer.args,
        model,
        metrics,
        hidden_size=model.config.hidden_size,
        steps=trainer.state.max_steps,
        weights={term.name: term.weight for term in trainer.distillation_objective.terms},
        commit=describe_run()["commit"],
        **described,
    )


def measure_step_cost(
    make_trainer: Callable[[dict[str, Any]], DistillationTrainer], ablation: AblationArguments
) -> list[dict[str, Any]]:
    """Median seconds of a training step (forward of both models, backward, optimiser) with each form, in turns on the
    same batches, and their ratio to logits alone."""
    # A schedule has no one cost.
    settings = {name: SETTINGS[name] for name in ablation.settings if SETTINGS[name]["task_loss_schedule"] is None}
    forms = {"logits": LOGITS, **settings, **FORMS}
    steppers = {name: Stepper(make_trainer(changes)) for name, changes in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    batches = steppers["logits"].trainer.get_train_dataloader()
    for batch in itertools.islice(itertools.cycle(batches), ablation.step_cost_rounds):
        for name, step in random.sample(list(steppers.items()), len(steppers)):  # a slow moment hits no form alone
            start = time.perf_counter()
            step(batch)
            seconds[name].append(time.perf_counter() - start)
    # Batches differ in length: each step is compared with that of logits on the same one; the first warms up.
    ratios = {
        name: [time / other for time, other in zip(times[1:], seconds["logits"][1:], strict=True)]
        for name, times in seconds.items()
    }
    return [
        {
            "form": name,
            "ratio": round(statistics.median(ratios[name]), 3),
            "min": round(min(ratios[name]), 3),
            "max": round(max(ratios[name]), 3),
            "seconds": round(statistics.median(seconds[name][1:]), 4),
        }
        for name in forms
    ]


class Stepper:
    """Runs training steps of one trainer."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer
        self.model = trainer.accelerator.prepare_model(trainer.model)
        trainer.create_optimizer()

    def __call__(self, batch: dict[str, Any]) -> None:
        trainer = self.trainer
        batches, num_items = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
        trainer.training_step(self.model, batches[0], num_items)
        trainer.optimizer.step()
        self.model.zero_grad()
        trainer.distillation_objective.zero_grad()


if __name__ == "__main__":
    run_main(main)
