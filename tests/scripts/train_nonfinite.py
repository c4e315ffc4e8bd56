"""Trains tiny students whose numbers go wrong in the rows of the last of its processes, and writes what each process
saw; the last training ends with the error."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate.state import PartialState
from conftest import VOCAB, make_model, weights
from test_numerics import bad_gradient, rows_with, teacher_that_overflows
from transformers import BertTokenizerFast, DataCollatorWithPadding

from hf_kd import CustomTerm, DistillationObjective, DistillationTrainer, DistillationTrainingArguments
from hf_kd import HiddenTerm, LogitTerm, TaskTerm
from hf_kd.numerics import MAX_ZERO_STEPS
from hf_kd.resumption import sampler_of


BAD_STEP = 2
output, processes = Path(sys.argv[1]), int(sys.argv[2])
state = PartialState(cpu=True, timeout=timedelta(seconds=60))  # so long one waits for another
assert state.num_processes == processes
is_last = state.process_index == processes - 1
if state.is_main_process:
    (output / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
state.wait_for_everyone()
tokenizer = BertTokenizerFast(vocab_file=str(output / "vocab.txt"), model_max_length=80)
running = []


def is_bad_now():
    return is_last and running[-1].state.global_step + 1 == BAD_STEP


def value_alone(student, teacher, labels):
    """Infinite in one step of one process, with a gradient that is finite."""
    return student.logits.square().mean() + (float("inf") if is_bad_now() else 0.0)


def root(student, teacher, labels):
    """Finite, with a gradient that is not in one step of one process."""
    return bad_gradient(student, teacher, labels) if is_bad_now() else student.logits.square().mean()


def zero_in_the_last(student, teacher, labels):
    return student.logits.square().mean() * (0.0 if is_last else 1.0)


def zero(student, teacher, labels):
    return 0.0 * student.logits.square().mean()


def make_trainer(term=None, teacher=None, **changes):
    terms = [TaskTerm(1.0), LogitTerm(1.0), HiddenTerm(1.0)]
    args = DistillationTrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        per_device_train_batch_size=8 // processes,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **{"max_steps": 6, "learning_rate": 0.01, **changes},
    )
    return DistillationTrainer(
        make_model(seed=2, num_hidden_layers=2, hidden_size=16),
        args,
        teacher_model=make_model(seed=1) if teacher is None else teacher,
        objective=DistillationObjective([*terms, *([] if term is None else [CustomTerm(term)])]),
        train_dataset=rows_with([]),
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def with_a_bad_row(**changes):
    """Its row is one of the last process's in the bad step."""
    trainer = make_trainer(teacher=teacher_that_overflows(), **changes)
    row = list(sampler_of(trainer.get_train_dataloader()))[8 * BAD_STEP - 2]
    trainer.train_dataset = rows_with([row])
    return trainer, row


def run(trainer):
    """What a process ends with, or what it is told."""
    running.append(trainer)
    found = {"error": None}
    try:
        trainer.train()
    except (FloatingPointError, ValueError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return found | {
        "steps": trainer.state.global_step,
        "weights": weights(trainer.model).tolist(),
        "projections": weights(trainer.distillation_objective).tolist(),
        "skipped": [log.get("skipped_steps", 0) for log in logs],
        "is_finite": bool(torch.isfinite(weights(trainer.model)).all()),
    }


trainer, row = with_a_bad_row(on_nonfinite="skip")
results = {"row": row, "a row, left out": run(trainer)}
if processes > 1:
    for term in (value_alone, root):
        results[f"{term.__name__}, left out"] = run(make_trainer(term, on_nonfinite="skip"))
        results[term.__name__] = run(make_trainer(term))
    few = {"learning_rate": 1e-5}
    results["zero_in_the_last"] = run(make_trainer(zero_in_the_last, max_steps=2 * MAX_ZERO_STEPS + 2, **few))
    results["zero"] = run(make_trainer(zero, max_steps=MAX_ZERO_STEPS + 5, **few))
(output / f"found_{state.process_index}.json").write_text(json.dumps(results), encoding="utf-8")
with_a_bad_row(max_grad_norm=0.0)[0].train()
