"""Trains a student under the launcher, trains it again from the checkpoint of its middle, and writes what both ended
with.

accelerate has FSDP and DeepSpeed for GPUs alone: for these it is told that the processes of a CPU have one each.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from conftest import VOCAB, make_dataset, make_model
from safetensors.torch import load_file
from transformers import BertTokenizerFast, DataCollatorWithPadding

from hf_kd import DistillationTrainer, DistillationTrainingArguments, load_teacher, student_from_teacher
from hf_kd.compat import whole_weights
from hf_kd.distributed import end_training


def use_cpu_device(state):
    state.device = torch.device("cpu")


is_sharded = sys.argv[2] == "sharded"
if is_sharded:
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_XPU)
    PartialState.set_device = use_cpu_device

output = Path(sys.argv[1])
state = PartialState(cpu=not is_sharded)
if state.is_main_process:
    (output / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
    make_model(seed=1).save_pretrained(output / "teacher")
state.wait_for_everyone()
tokenizer = BertTokenizerFast(vocab_file=str(output / "vocab.txt"), model_max_length=80)


def make_args(name, **changes):
    return DistillationTrainingArguments(
        output_dir=str(output / name),
        use_cpu=not is_sharded,
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # what Adam makes of gradients that are 0 but for rounding is nothing to compare
        hidden_loss_weight=1.0,
        attention_loss_weight=1.0,
        eval_teacher_agreement=True,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        logging_steps=1,
        report_to=[],
        **changes,
    )


def train(name, resume=None):
    args = make_args(name)
    # Loaded after the arguments, from when on ZeRO-3 gives each process a share of what transformers loads.
    trainer = DistillationTrainer(
        student_from_teacher(load_teacher(output / "teacher"), num_layers=2),
        args,
        teacher_model=str(output / "teacher"),
        train_dataset=make_dataset(48),
        eval_dataset=make_dataset(10),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(output / name / "final")
    if state.is_main_process:
        weights = load_file(output / name / "final" / "model.safetensors")
        logs = [
            {key: x for key, x in log.items() if not key.endswith(("_runtime", "_per_second"))}
            for log in trainer.state.log_history[:-1]
        ]
        result = {
            "weights": {key: weight.tolist() for key, weight in weights.items()},
            "logs": logs,
            "world_size": args.world_size,
            "student_class": type(trainer.model_wrapped).__name__,
            "teacher_class": type(trainer.teacher.model).__name__,
            "teacher_numbers": sum(getattr(p, "_local_tensor", p).numel() for p in trainer.teacher.model.parameters()),
        }
        (output / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    return trainer


def refusal(teacher=None, student=None, **changes):
    """What is said of a trainer that cannot train, or `None`."""
    args = make_args("refused", **changes)
    with whole_weights():
        models = [make_model(seed=2, num_hidden_layers=2, **(student or {})), make_model(seed=1)]
    try:
        DistillationTrainer(
            models[0],
            args,
            teacher_model=teacher or models[1],
            train_dataset=make_dataset(8),
            eval_dataset=make_dataset(8),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
    except ValueError as error:
        return str(error)


train("whole")
refusals = {
    "projections": refusal(student={"hidden_size": 16}),
    "skip": refusal(on_nonfinite="skip"),
    "teacher in shares": refusal(teacher=make_model(seed=1)),
}
(output / "refusals.json").write_text(json.dumps(refusals), encoding="utf-8")
end_training(train("resumed", str(output / "whole" / "checkpoint-3")))
