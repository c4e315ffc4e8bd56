"""What each distillation signal is worth on a task: the same student, from the same start, under one setting after another.

accelerate launch recipes/glue_ablation.py --task_name mrpc --teacher_model_name_or_path runs/mrpc-teacher \
    --student_num_layers 3 --settings task logits hidden attention --seeds 1 2 3 --output_dir runs/mrpc-ablation

Every run is written to `results.json` when it is done, and a second call with the same output folder does only what is
missing there.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from glue_distill import ModelArguments, evaluate_teacher, load_task_teacher, load_tokenizers, make_student
from glue_setup import (
    DataArguments,
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
from hf_kd.results import describe_run, read_results, write_results


LOGITS = {"task_loss_weight": 0.1, "logit_loss_weight": 0.9}
SETTINGS: dict[str, dict[str, Any]] = {
    "task": {"task_loss_weight": 1.0, "logit_loss_weight": 0.0},
    "logits": LOGITS,
    "hidden": {**LOGITS, "hidden_loss_weight": 1.0},
    "attention": {**LOGITS, "attention_loss_weight": 1.0},
}


@dataclass
class AblationArguments:
    """Which settings to compare."""

    settings: list[str] = field(
        default_factory=lambda: list(SETTINGS), metadata={"help": f"Some of {', '.join(SETTINGS)}."}
    )
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "One run per setting and seed."})

    def __post_init__(self) -> None:
        if unknown := [name for name in self.settings if name not in SETTINGS]:
            raise ValueError(f"settings={unknown} are not known; choose from {', '.join(SETTINGS)}.")


def main() -> None:
    ablation, model_args, data_args, args = parse_args(
        (AblationArguments, ModelArguments, DataArguments, DistillationTrainingArguments),
        **{**training_defaults(), "eval_strategy": "no", "save_strategy": "no"},
        learning_rate=1e-4,
    )
    data, task = load_data(data_args, args.seed)
    teacher = load_task_teacher(model_args, task)
    tokenizer, _ = load_tokenizers(model_args)
    data = tokenize_data(data, task, tokenizer, data_args, args)

    path = Path(args.output_dir) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_results(path)["rows"] if path.is_file() else []
    if not rows:
        rows.append(evaluate_teacher(teacher, args, tokenizer, data, task, measured_splits(data, task)))
    done = {(row.get("setting"), row["seed"]) for row in rows}
    for seed in ablation.seeds:
        for setting in ablation.settings:
            if (setting, seed) not in done:
                run_args = dataclasses.replace(args, seed=seed, **SETTINGS[setting])
                rows.append(run(setting, run_args, model_args, teacher, tokenizer, data, task))
                write_results(path, rows)
                print(json.dumps(rows[-1]))


def run(
    setting: str,
    args: DistillationTrainingArguments,
    model_args: ModelArguments,
    teacher: PreTrainedModel,
    tokenizer: Any,
    data: DatasetDict,
    task: TextTask,
) -> dict[str, Any]:
    """Train and measure one student; its row of `results.json`."""
    set_seed(args.seed)
    is_baseline = args.logit_loss_weight == 0
    train_dataset = labeled(data["train"]) if is_baseline else data["train"]
    trainer = DistillationTrainer(
        model=make_student(model_args, teacher, task),
        args=args,
        teacher_model=teacher,
        train_dataset=train_dataset,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics_fn(task),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    num_labeled = len(labeled(train_dataset))
    return result_row(
        "baseline" if is_baseline else "student",
        task,
        args,
        trainer.model,
        evaluate_model(trainer, data, measured_splits(data, task)),
        setting=setting,
        hidden_size=trainer.model.config.hidden_size,
        learning_rate=args.learning_rate,
        steps=trainer.state.max_steps,
        labeled_rows=num_labeled,
        unlabeled_rows=len(train_dataset) - num_labeled,
        weights={term.name: term.weight for term in trainer.distillation_objective.terms},
        train_seconds=round(seconds, 1),
        commit=describe_run()["commit"],
    )


if __name__ == "__main__":
    main()
