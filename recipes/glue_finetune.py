"""Fine-tune an encoder on a GLUE task or on your own files: a teacher, or a baseline.

accelerate launch recipes/glue_finetune.py --task_name sst2 --model_name_or_path google-bert/bert-base-uncased
--output_dir runs/sst2-teacher

A YAML file with arguments may come first: `glue_finetune.py recipes/configs/demo_teacher.yaml --output_dir ...`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from glue_setup import (
    DataArguments,
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
    tokenize_data,
    training_defaults,
)
from transformers import DataCollatorWithPadding, TrainingArguments, set_seed

from hf_kd.checkpoint import check_reads, load_pretrained, load_tokenizer
from hf_kd.command_line import parse_args, run_main
from hf_kd.deploy.hub import push_files
from hf_kd.deploy.model_card import card_problems_warn
from hf_kd.distributed import end_training
from hf_kd.glue import GLUE_TASKS, compute_metrics_fn
from hf_kd.results import format_table, write_results
from hf_kd.resumption import ResumableTrainer


@dataclass
class ModelArguments:
    """What to fine-tune."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a pretrained encoder."})
    role: Literal["teacher", "baseline"] = field(
        default="teacher", metadata={"help": "Its role in results.json: teacher or baseline."}
    )


def main() -> None:
    model_args, data_args, args = parse_args(
        (ModelArguments, DataArguments, TrainingArguments), **training_defaults(), learning_rate=5e-5
    )
    check_run(args)
    with leaves_no_empty_folder(args.output_dir):
        finetune(model_args, data_args, args)


def finetune(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    repo_id = open_hub_repository(args)
    args = dataclasses.replace(args, push_to_hub=False)  # the Trainer sends all that it finds in its folder
    set_seed(args.seed)

    data, task = load_data(data_args, args.seed)
    check_rows(args, task, len(labeled(data["train"], "label")))
    path, argument = model_args.model_name_or_path, "model_name_or_path"
    model = load_pretrained(path, argument, **label_config(task))
    tokenizer = load_tokenizer(path, argument)
    check_reads(model, argument, tokenizer, data_args.max_seq_length)
    data = tokenize_data(data, task, tokenizer, data_args, args)
    data["train"] = labeled(data["train"])

    trainer = ResumableTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data[task.validation_splits[0]],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics_fn(task),
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args, args.output_dir))
    trainer.save_model()
    trainer.save_state()

    metrics = evaluate_model(trainer, data, measured_splits(data, task))
    # The cards of its students take licence, language and base model from this one.
    facts: dict[str, Any] = {}
    if data_args.task_name in GLUE_TASKS:
        name = data_args.task_name
        facts = {
            "language": "en",
            "dataset_tags": "nyu-mll/glue",
            "dataset": f"GLUE {name.upper()}",
            "dataset_args": name,
        }
    if repo_id is not None:
        facts["model_name"] = repo_id.split("/")[-1]
    with card_problems_warn():  # before the results, which say that all of it is there
        trainer.create_model_card(**facts)
    if trainer.is_world_process_zero():
        row = result_row(
            model_args.role,
            task,
            args,
            model,
            metrics,
            learning_rate=args.learning_rate,
            steps=trainer.state.max_steps,
            labeled_rows=len(data["train"]),
        )
        write_results(Path(args.output_dir) / "results.json", [row])
        print(format_table([row]))
    is_main_process = trainer.is_world_process_zero()
    end_training(trainer)
    if repo_id is not None and is_main_process:
        commit = push_files(
            args.output_dir, repo_id, token=args.hub_token, revision=args.hub_revision, commit_message="Fine-tuned"
        )
        print(f"The model is on the Hub: {commit.commit_url}")


if __name__ == "__main__":
    run_main(main)
