"""Distil a masked language model on plain text, as a start for students of any task.

accelerate launch recipes/problem_types/masked_lm.py --teacher_model_name_or_path google-bert/bert-base-uncased \
    --output_dir runs/mlm-student

Your own data: `--train_file train.jsonl --validation_file dev.jsonl`, in each line `{"text": ...}`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

from problem_setup import RecipeArguments, distil, load_data, load_models, preprocess, training_defaults
from transformers import DataCollatorForLanguageModeling, EvalPrediction

from hf_kd import DistillationTrainingArguments
from hf_kd.command_line import parse_args, run_main


@dataclass
class MaskArguments(RecipeArguments):
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are masked."})


def main() -> None:
    args, training_args = parse_args(
        (MaskArguments, DistillationTrainingArguments),
        dataset_name=["Salesforce/wikitext", "wikitext-2-raw-v1"],
        **training_defaults(),
    )
    data = load_data(args, ["text"])
    models = load_models(args, "masked_lm")
    tokenizer = models.tokenizer

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        """Texts one after the other, cut into rows of one length."""
        encoded = tokenizer([text for text in rows["text"] if text.strip()])
        joined = {name: list(chain(*columns)) for name, columns in encoded.items()}
        starts = range(0, len(joined["input_ids"]), args.max_seq_length)
        return {name: [column[i : i + args.max_seq_length] for i in starts] for name, column in joined.items()}

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        is_masked = evaluated.label_ids != -100
        return {"accuracy": (evaluated.predictions == evaluated.label_ids)[is_masked].mean()}

    data = preprocess(data, tokenize, training_args)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=args.mlm_probability)
    # The scores of a whole vocabulary for every token would fill the memory.
    kwargs = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(dim=-1)}
    distil(models, data, training_args, collator, compute_metrics, main_metric="accuracy", **kwargs)


if __name__ == "__main__":
    run_main(main)
