"""Distil a classifier that gives a text any number of labels.

accelerate launch recipes/problem_types/multi_label.py --output_dir runs/emotions-student \
    --teacher_model_name_or_path SamLowe/roberta-base-go_emotions

Your own data: `--train_file train.jsonl --validation_file dev.jsonl`, in each line `{"text": ..., "labels": ["joy"]}`.
"""

from __future__ import annotations

from typing import Any

from problem_setup import (
    RecipeArguments,
    distil,
    load_data,
    load_models,
    preprocess,
    teacher_labels,
    training_defaults,
)
from sklearn.metrics import f1_score
from transformers import DataCollatorWithPadding, EvalPrediction

from hf_kd import DistillationTrainingArguments
from hf_kd.command_line import parse_args, run_main


def main() -> None:
    args, training_args = parse_args(
        (RecipeArguments, DistillationTrainingArguments),
        dataset_name=["google-research-datasets/go_emotions", "simplified"],
        **training_defaults(),
    )
    data = load_data(args, ["text", "labels"])
    teacher, _, tokenizer = models = load_models(args, "multi_label_classification")
    label_ids = teacher_labels(data, "labels", teacher)

    def tokenize(rows: dict[str, list]) -> Any:
        encoded = tokenizer(rows["text"], truncation=True, max_length=args.max_seq_length)
        chosen = map(label_ids, rows["labels"])
        encoded["labels"] = [[float(label in row) for label in range(teacher.config.num_labels)] for row in chosen]
        return encoded

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        labels, predictions = evaluated.label_ids == 1, evaluated.predictions > 0  # a probability above one half
        return {
            f"{average}_f1": f1_score(labels, predictions, average=average, zero_division=0.0)
            for average in ("micro", "macro")
        }

    data = preprocess(data, tokenize, training_args)
    collator = DataCollatorWithPadding(tokenizer)
    distil(models, data, training_args, collator, compute_metrics, main_metric="micro_f1")


if __name__ == "__main__":
    run_main(main)
