"""Numbers that go wrong: what stops a run, what it says, and what is left as it was."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import make_dataset, make_model, weights
from datasets import Dataset
from transformers import TrainerCallback

from hf_kd import CustomTerm, DistillationObjective, DistillationTrainer, HiddenTerm, LogitTerm, RelationTerm, TaskTerm
from hf_kd.numerics import MAX_ZERO_STEPS


MARK = 59  # a word that no other row holds
NUM_ROWS = 24


class Record(TrainerCallback):
    """Weights after each step, and the logs."""

    def __init__(self):
        self.weights, self.logs = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def rows_with(marked):
    """Rows 0 to 23, of which those in `marked` hold the word."""
    rows = make_dataset(NUM_ROWS).to_list()
    for index, row in enumerate(rows):
        row["input_ids"] = [5 if token == MARK else token for token in row["input_ids"]]
        if index in marked:
            row["input_ids"][1] = MARK
    return Dataset.from_list(rows)


def bad_gradient(student, teacher, labels):
    """The root of 0: its gradient is infinite."""
    logits = student.logits.sum(dim=-1)
    return (logits - logits.detach()).sqrt().mean()


@pytest.fixture
def make_trainer(make_args, collator):
    def make(student=None, teacher=None, objective=None, rows=None, **changes):
        args = make_args(**{"per_device_train_batch_size": 4, "max_steps": 6, **changes})
        record = Record()
        student = make_model(seed=2, num_hidden_layers=2) if student is None else student
        teacher = make_model(seed=1) if teacher is None else teacher
        trainer = DistillationTrainer(
            student,
            args,
            teacher_model=teacher,
            objective=objective,
            train_dataset=make_dataset(NUM_ROWS) if rows is None else rows,
            data_collator=collator,
            callbacks=[record],
        )
        return trainer, record

    return make


def teacher_that_overflows():
    """Its answer to a row with the marked word is infinite."""
    teacher = make_model(seed=1)
    with torch.no_grad():
        teacher.bert.embeddings.word_embeddings.weight[MARK] = float("inf")
    return teacher


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_bad_term_stops_the_run_before_the_step(make_trainer, accumulated):
    """The Trainer would write NaN into every weight, and leave NaN out of the logs."""
    marked = 17
    batch = {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    trainer, record = make_trainer(
        teacher=teacher_that_overflows(), rows=rows_with([marked]), save_strategy="steps", save_steps=1, **batch
    )
    before = weights(trainer.model)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message = str(error.value)
    step = len(record.weights) + 1
    assert f"the loss is not finite in step {step}: logit_loss=nan; rows " in message
    found = message.partition("rows ")[2].partition(" of train_dataset")[0].split(", ")
    assert str(marked) in found and len(found) == 4 // accumulated
    assert torch.equal(weights(trainer.model), record.weights[-1] if record.weights else before)
    assert not os.path.isdir(os.path.join(trainer.args.output_dir, f"checkpoint-{step}"))


def test_a_bad_gradient_names_its_term_and_rows(make_trainer):
    """The loss is finite; one step later every weight is NaN."""
    objective = DistillationObjective([TaskTerm(1.0), LogitTerm(1.0), CustomTerm(bad_gradient, name="root")])
    trainer, _ = make_trainer(objective=objective)
    before = weights(trainer.model)
    with pytest.raises(FloatingPointError, match="the gradient is not finite in step 1: root; rows "):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


def test_a_bad_gradient_without_clipping(make_trainer):
    """Nobody computes its norm then."""
    objective = DistillationObjective([TaskTerm(1.0), CustomTerm(bad_gradient, name="root")])
    trainer, _ = make_trainer(objective=objective, max_grad_norm=0.0)
    with pytest.raises(FloatingPointError, match="the gradient is not finite in step 1: root"):
        trainer.train()


def test_a_bad_gradient_of_a_projection(make_trainer):
    """The Trainer clips and logs the student's gradient alone."""
    student = make_model(seed=2, num_hidden_layers=2, hidden_size=16)
    objective = DistillationObjective([TaskTerm(1.0), HiddenTerm(1.0)])
    trainer, _ = make_trainer(student=student, objective=objective)
    projection = next(trainer.distillation_objective.parameters())
    projection.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="the gradient is not finite in step 1"):
        trainer.train()


def test_bad_steps_are_left_out_and_counted(make_trainer):
    """A step that is left out must leave no trace: no decay, no momentum, no NaN in the moments."""
    changes = {"on_nonfinite": "skip", "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 6}
    trainer, record = make_trainer(teacher=teacher_that_overflows(), rows=rows_with([17]), **changes)
    before = weights(trainer.model)
    trainer.train()
    unchanged = [
        index
        for index, (old, new) in enumerate(zip([before, *record.weights], record.weights, strict=False))
        if torch.equal(old, new)
    ]
    assert len(unchanged) == 1 and all(torch.isfinite(x).all() for x in record.weights)
    counts = [log.get("skipped_steps", 0) for log in record.logs if "loss" in log]
    assert counts == [0] * unchanged[0] + [1] * (6 - unchanged[0])
    state = json.loads(Path(trainer.args.output_dir, "checkpoint-6", "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["NumericsWatch"]["attributes"]["skipped_steps"] == 1
    resumed, record = make_trainer(
        teacher=teacher_that_overflows(), rows=rows_with([17]), **{**changes, "max_steps": 8}
    )
    resumed.train(resume_from_checkpoint=os.path.join(trainer.args.output_dir, "checkpoint-6"))
    assert [log["skipped_steps"] for log in record.logs if "loss" in log][0] == 1


def test_a_term_that_compares_nothing_stops_the_run(make_trainer):
    """Relations between the rows of a batch of one row train nothing, at the price of a teacher."""
    objective = DistillationObjective([TaskTerm(1.0), RelationTerm(1.0, type="similarity")])
    changes = {"per_device_train_batch_size": 1, "max_steps": MAX_ZERO_STEPS + 10}
    trainer, record = make_trainer(objective=objective, **changes)
    with pytest.raises(RuntimeError, match=f"relation_loss is exactly 0 in the last {MAX_ZERO_STEPS} steps"):
        trainer.train()
    assert len(record.weights) == MAX_ZERO_STEPS - 1


def test_rows_without_labels_are_no_zeros(make_trainer):
    """Unlabelled text is what distillation is for: the task term of such a batch is 0, and rightly so."""
    rows = make_dataset(NUM_ROWS, unlabeled_share=1.0)
    trainer, record = make_trainer(rows=rows, max_steps=MAX_ZERO_STEPS + 2, learning_rate=1e-5)
    trainer.train()
    assert len(record.weights) == MAX_ZERO_STEPS + 2
    assert {log["task_loss"] for log in record.logs if "loss" in log} == {0.0}
