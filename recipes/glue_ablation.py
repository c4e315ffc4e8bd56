"""What each distillation signal is worth on a task: the same student, from the same start, under several settings.

accelerate launch recipes/glue_ablation.py --task_name mrpc --teacher_model_name_or_path runs/mrpc-teacher \
    --student_num_layers 3 --settings task logits hidden attention minilm_v2 --output_dir runs/mrpc-ablation

Every run is written to `results.json` when it is done, and another call with the same output folder adds what is
missing there: other settings, other seeds, more text (`--unlabeled_file`, `--augment`) or more epochs. `--step_cost`
measures instead what a training step costs with each form of each term.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
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
from hf_kd.command_line import parse_args
from hf_kd.glue import TextTask, compute_metrics_fn
from hf_kd.objective.terms import AttentionLossType, HiddenLossType, RelationLossType
from hf_kd.results import describe_run, read_results, write_results


LOGITS = {"task_loss_weight": 0.1, "logit_loss_weight": 0.9}
SETTINGS: dict[str, dict[str, Any]] = {
    "task": {"task_loss_weight": 1.0, "logit_loss_weight": 0.0},
    "logits": LOGITS,
    "hidden": {**LOGITS, "hidden_loss_weight": 1.0},
    "attention": {**LOGITS, "attention_loss_weight": 1.0},
    "minilm_v2": {**LOGITS, "relation_loss_weight": 1.0},
    "hidden+attention": {**LOGITS, "hidden_loss_weight": 1.0, "attention_loss_weight": 1.0},
    # TinyBERT's order: the layers first, then the predictions.
    "two stages": {
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
    step_cost_rounds: int = field(default=15, metadata={"help": "Steps of each form, in turns, > 1."})

    def __post_init__(self) -> None:
        if unknown := [name for name in self.settings if name not in SETTINGS]:
            raise ValueError(f"settings={unknown} are not known; choose from {', '.join(SETTINGS)}.")
        if self.step_cost_rounds < 2:
            raise ValueError(f"step_cost_rounds={self.step_cost_rounds} must be at least 2; the first one warms up.")


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
    done = {run_key(row) for row in rows if row["role"] != "teacher"}
    for seed in ablation.seeds:
        for setting in ablation.settings:
            is_baseline = setting == "task"
            # What has no label teaches nothing without a teacher.
            train_dataset = labeled(data["train"]) if is_baseline else data["train"]
            trainer = make_trainer(train_dataset, seed, SETTINGS[setting])
            num_labeled = len(labeled(train_dataset))
            described = {
                "setting": setting,
                "epochs": args.num_train_epochs,
                "labeled_rows": num_labeled,
                "unlabeled_rows": len(train_dataset) - num_labeled,
                "augment": 0 if is_baseline else data_args.augment,
            }
            if run_key({"seed": seed, **described}) in done:
                continue
            start = time.perf_counter()
            trainer.train()
            described["train_seconds"] = round(time.perf_counter() - start, 1)
            metrics = evaluate_model(trainer, data, splits)
            rows.append(make_row(trainer, task, metrics, is_baseline, described))
            write_results(path, rows, **costs)
            print(json.dumps(rows[-1]))


def run_key(row: dict[str, Any]) -> tuple:
    """What tells the runs of one results file apart."""
    return tuple(row[name] for name in ("seed", "setting", "epochs", "labeled_rows", "unlabeled_rows", "augment"))


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
        learning_rate=trainer.args.learning_rate,
        steps=trainer.state.max_steps,
        weights={term.name: term.weight for term in trainer.distillation_objective.terms},
        commit=describe_run()["commit"],
        **described,
    )


def measure_step_cost(make_trainer: Any, ablation: AblationArguments) -> list[dict[str, Any]]:
    """Median seconds of a training step (forward of both models, backward, optimiser) with each form, in turns on the
    same batches, and their ratio to logits alone."""
    forms = {**{name: SETTINGS[name] for name in ablation.settings}, **FORMS, "logits": LOGITS}
    steps = {name: Stepper(make_trainer(changes)) for name, changes in forms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ablation.step_cost_rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return [
        {
            "form": name,
            "seconds": round(median, 4),
            "ratio": round(median / medians["logits"], 3),
            "min": round(min(seconds[name][1:]), 4),
            "max": round(max(seconds[name][1:]), 4),
        }
        for name, median in medians.items()
    ]


class Stepper:
    """Runs one training step after another on a trainer's own batches."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer
        self.model = trainer.accelerator.prepare_model(trainer.model)
        trainer.create_optimizer()
        self.batches = iter(trainer.get_train_dataloader())

    def __call__(self) -> None:
        batches, num_items = self.trainer.get_batch_samples(self.batches, 1, self.trainer.args.device)
        self.trainer.training_step(self.model, batches[0], num_items)
        self.trainer.optimizer.step()
        self.model.zero_grad()


if __name__ == "__main__":
    main()
