"""Distil a model that finds the answer to a question in a text.

accelerate launch recipes/problem_types/question_answering.py --output_dir runs/squad-student \
    --teacher_model_name_or_path deepset/roberta-base-squad2

Your own data: `--train_file train.jsonl --validation_file dev.jsonl`, each line as in SQuAD:
`{"question": ..., "context": ..., "answers": {"text": ["1815"], "answer_start": [22]}}`, both empty for no answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from problem_setup import RecipeArguments, distil, load_data, load_models, preprocess, training_defaults
from transformers import DataCollatorWithPadding, EvalPrediction

from hf_kd import DistillationTrainingArguments
from hf_kd.command_line import parse_args, run_main


@dataclass
class AnswerArguments(RecipeArguments):
    doc_stride: int = field(
        default=128, metadata={"help": "Long texts are split into parts that share so many tokens."}
    )


def main() -> None:
    args, training_args = parse_args(
        (AnswerArguments, DistillationTrainingArguments),
        dataset_name=["rajpurkar/squad"],
        max_seq_length=384,
        **training_defaults(),
    )
    data = load_data(args, ["question", "context", "answers"])
    models = load_models(args, "question_answering")
    tokenizer = models.tokenizer

    def tokenize(rows: dict[str, list]) -> Any:
        encoded = tokenizer(
            [question.strip() for question in rows["question"]],
            rows["context"],
            truncation="only_second",
            max_length=args.max_seq_length,
            stride=args.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        parts = list(zip(encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping"), strict=True))
        encoded["start_positions"], encoded["end_positions"] = [], []
        for index, (row, offsets) in enumerate(parts):
            position = answer_position(rows["answers"][row], offsets, encoded.sequence_ids(index))
            # A part without the answer is answered with [CLS].
            start, end = position or [encoded["input_ids"][index].index(tokenizer.cls_token_id)] * 2
            encoded["start_positions"].append(start)
            encoded["end_positions"].append(end)
        return encoded

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        pairs = zip(evaluated.predictions, evaluated.label_ids, strict=True)
        start, end = (logits.argmax(axis=-1) == positions for logits, positions in pairs)
        return {"start_accuracy": start.mean(), "end_accuracy": end.mean(), "exact_position": (start & end).mean()}

    data = preprocess(data, tokenize, training_args)
    collator = DataCollatorWithPadding(tokenizer)
    distil(models, data, training_args, collator, compute_metrics, main_metric="exact_position")


def answer_position(answers: dict[str, list], offsets: list, sequence_ids: list) -> tuple[int, int] | None:
    """The first and last token of the first answer, or `None` if they are not both in this part of the text."""
    if not answers["text"]:
        return None
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    context = [(token, *offsets[token]) for token, sequence in enumerate(sequence_ids) if sequence == 1]
    first = [token for token, begin, stop in context if begin <= start < stop]
    last = [token for token, begin, stop in context if begin < end <= stop]
    return (first[0], last[0]) if first and last else None


if __name__ == "__main__":
    run_main(main)
