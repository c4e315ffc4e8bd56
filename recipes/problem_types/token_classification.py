"""Distil a tagger, such as one for named entities.

accelerate launch recipes/problem_types/token_classification.py --teacher_model_name_or_path dslim/bert-base-NER \
    --output_dir runs/ner-student

Your own data: `--train_file train.jsonl --validation_file dev.jsonl`, in each line
`{"tokens": ["Ada", "wrote"], "ner_tags": ["B-PER", "O"]}`. From a row with `"ner_tags": []` the teacher alone teaches.
"""

from __future__ import annotations

from itertools import pairwise
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
from sklearn.metrics import accuracy_score, f1_score
from transformers import DataCollatorForTokenClassification, EvalPrediction

from hf_kd import DistillationTrainingArguments
from hf_kd.command_line import parse_args, run_main


def main() -> None:
    args, training_args = parse_args(
        (RecipeArguments, DistillationTrainingArguments), dataset_name=["lhoestq/conll2003"], **training_defaults()
    )
    data = load_data(args, ["tokens", "ner_tags"])
    teacher, _, tokenizer = models = load_models(args, "token_classification")
    label_ids = teacher_labels(data, "ner_tags", teacher)

    def tokenize(rows: dict[str, list]) -> Any:
        encoded = tokenizer(rows["tokens"], is_split_into_words=True, truncation=True, max_length=args.max_seq_length)
        encoded["labels"] = []
        for index, tags in enumerate(map(label_ids, rows["ner_tags"])):
            words = encoded.word_ids(index)
            # A word has its label on its first piece; [CLS], [SEP] and the other pieces have none.
            labels = [
                tags[word] if tags and word is not None and word != before else -100
                for before, word in pairwise([None, *words])
            ]
            encoded["labels"].append(labels)
        return encoded

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        is_labeled = evaluated.label_ids != -100
        labels, predictions = evaluated.label_ids[is_labeled], evaluated.predictions.argmax(axis=-1)[is_labeled]
        # Most words are outside of any entity, which is easily said of all.
        inside = [index for index, name in teacher.config.id2label.items() if name != "O"]
        f1 = f1_score(labels, predictions, labels=inside, average="micro", zero_division=0.0)
        return {"accuracy": accuracy_score(labels, predictions), "word_f1": f1}

    data = preprocess(data, tokenize, training_args)
    collator = DataCollatorForTokenClassification(tokenizer)
    distil(models, data, training_args, collator, compute_metrics, main_metric="word_f1")


if __name__ == "__main__":
    run_main(main)
