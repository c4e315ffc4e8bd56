"""Numbers that go wrong: what stops a run, what it says, and what is left as it was."""

import math
import os
import shutil

import pytest
import torch
from conftest import make_dataset, make_model, weights
from datasets import Dataset
from test_trainer import Record
from transformers import TrainerCallback

from hf_kd import CustomTerm, DistillationObjective, DistillationTrainer, HiddenTerm, LogitTerm, RelationTerm, TaskTerm
from hf_kd.compat import length_grouping
from hf_kd.numerics import MAX_ZERO_STEPS


MARK = 59  # a word that no other row holds
NUM_ROWS = 24


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
    """Its answer to a row with the marked word is not a number, though all of its weights are."""
    teacher = make_model(seed=1)
    with torch.no_grad():
        embedding = teacher.bert.embeddings.word_embeddings.weight[MARK]
        embedding[:] = torch.finfo(embedding.dtype).max * (-1.0) ** torch.arange(len(embedding))
    return teacher


class Seen(TrainerCallback):
    """The rows of the parts of each step, by their texts."""

    def __init__(self, rows):
        self.texts = [tuple(row["input_ids"]) for row in rows]
        self.parts = []
        self.steps = []

    def part(self, inputs):
        pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        texts = [tuple(ids[mask.bool()].tolist()) for ids, mask in pairs]
        self.parts.append([self.texts.index(text) for text in texts])

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append(self.parts)
        self.parts = []


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("batch_size", "accumulated"), [(4, 1), (5, 1), (2, 2)])
def test_a_bad_term_stops_the_run_before_the_step(make_trainer, batch_size, accumulated, grouped):
    """The Trainer would write NaN into every weight, and leave NaN out of the logs. The loader reads ahead: at the end
    of an epoch the order of the next one is known, and its rows would be named."""
    batch = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
    epochs = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-5, **length_grouping(grouped), **batch}
    clean = rows_with([])
    seen = Seen(clean.to_list())
    trainer, _ = make_trainer(rows=clean, **epochs)
    trainer.add_callback(seen)
    original = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: (
        seen.part(inputs),
        original(model, inputs, *args, **kwargs),
    )[1]
    trainer.train()
    num_steps = len(seen.steps)
    for step in (1, 2, num_steps // 2, num_steps // 2 + 1, num_steps):
        expected = next(part for part in seen.steps[step - 1])
        marked = expected[0]
        saving = {"save_strategy": "steps", "save_steps": 1}
        trainer, record = make_trainer(rows=rows_with([]), **epochs, **saving)
        calls = []
        inner = trainer.teacher.__class__.__call__

        def infinite(self, inputs, calls=calls, inner=inner, step=step):
            calls.append(1)
            signals = inner(self, inputs)
            if len(calls) == (step - 1) * accumulated + 1:
                signals.logits = signals.logits * float("inf")
            return signals

        trainer.teacher.__class__ = type("Overflowing", (trainer.teacher.__class__,), {"__call__": infinite})
        with pytest.raises(FloatingPointError) as error:
            trainer.train()
        message = str(error.value)
        assert f"the loss is not finite in step {step}: logit_loss=nan; rows " in message
        found = message.partition("rows ")[2].partition(" of train_dataset")[0].split(", ")
        assert list(map(int, found)) == expected and marked in expected
        assert len(record.weights) == step - 1
        assert not os.path.isdir(os.path.join(trainer.args.output_dir, f"checkpoint-{step}"))
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)


def test_a_bad_term_leaves_the_weights_as_they_were(make_trainer):
    """What is saved after the error must be the student of the step before."""
    trainer, record = make_trainer(teacher=teacher_that_overflows(), rows=rows_with([17]))
    before = weights(trainer.model)
    with pytest.raises(FloatingPointError, match="logit_loss=nan"):
        trainer.train()
    assert torch.equal(weights(trainer.model), record.weights[-1] if record.weights else before)


def test_rows_of_a_stream_have_no_numbers(make_trainer):
    """The error itself must not fail."""
    rows = rows_with(range(NUM_ROWS)).to_iterable_dataset()
    trainer, _ = make_trainer(teacher=teacher_that_overflows(), rows=rows)
    with pytest.raises(FloatingPointError, match="rows unknown, as their order cannot be read again"):
        trainer.train()


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


def bad_at_the_third(student, teacher, labels):
    """A gradient that is infinite in one step."""
    bad_at_the_third.calls += 1
    return bad_gradient(student, teacher, labels) if bad_at_the_third.calls == 3 else student.logits.square().mean()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("width", [32, 16])
def test_bad_steps_are_left_out_and_counted(make_trainer, kind, width):
    """A step that is left out must leave no trace: no decay, no momentum, no NaN in moments, projections or logs."""
    bad_at_the_third.calls = 0
    terms = [TaskTerm(1.0), LogitTerm(1.0), HiddenTerm(1.0)]
    terms += [CustomTerm(bad_at_the_third, name="root")] if kind == "gradient" else []
    changes = {"on_nonfinite": "skip", "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 5}
    data = {"teacher": teacher_that_overflows(), "rows": rows_with([17])} if kind == "loss" else {}

    def make(**more):
        student = make_model(seed=2, num_hidden_layers=2, hidden_size=width)
        return make_trainer(student=student, objective=DistillationObjective(terms), **data, **{**changes, **more})

    trainer, record = make()
    before = weights(trainer.model)
    trainer.train()
    pairs = zip([before, *record.weights], record.weights, strict=False)
    (unchanged,) = (index for index, (old, new) in enumerate(pairs) if torch.equal(old, new))
    assert all(torch.isfinite(x).all() for x in record.weights)
    assert all(p.isfinite().all() for p in trainer.distillation_objective.parameters())
    logs = [log for log in record.logs if "loss" in log]
    assert [log.get("skipped_steps", 0) for log in logs] == [0] * unchanged + [1] * (6 - unchanged)
    assert all(math.isfinite(log["hidden_loss"]) for log in logs if "hidden_loss" in log)
    assert sum("hidden_loss" in log for log in logs) == 5
    resumed, record = make(max_steps=8)
    resumed.train(resume_from_checkpoint=os.path.join(trainer.args.output_dir, "checkpoint-5"))
    counts = [log.get("skipped_steps", 0) for log in record.logs if "loss" in log]
    assert counts[0] == (unchanged < 6) and counts[-1] >= counts[0]


def test_a_term_that_compares_nothing_stops_the_run(make_trainer):
    """Relations between the rows of a batch of one row train nothing, at the price of a teacher."""
    objective = DistillationObjective([TaskTerm(1.0), RelationTerm(1.0, type="similarity")])
    changes = {"per_device_train_batch_size": 1, "max_steps": MAX_ZERO_STEPS + 10}
    trainer, record = make_trainer(objective=objective, **changes)
    with pytest.raises(ValueError, match=f"relation_loss is exactly 0 in the last {MAX_ZERO_STEPS} steps"):
        trainer.train()
    assert len(record.weights) == MAX_ZERO_STEPS - 1
    # Counted on from a checkpoint.
    trainer, record = make_trainer(objective=objective, **changes, save_strategy="steps", save_steps=25)
    with pytest.raises(ValueError, match="relation_loss"):
        trainer.train()
    trainer, record = make_trainer(objective=objective, **changes)
    with pytest.raises(ValueError, match=f"up to step {MAX_ZERO_STEPS}:"):
        trainer.train(resume_from_checkpoint=os.path.join(trainer.args.output_dir, "checkpoint-25"))
    assert len(record.weights) == MAX_ZERO_STEPS - 26


def test_zeros_with_a_step_between_are_none(make_trainer):
    """A term may be 0 now and then."""

    def seldom(student, teacher, labels):
        seldom.calls += 1
        return student.logits.square().mean() * (1.0 if seldom.calls % 30 == 0 else 0.0)

    seldom.calls = 0
    objective = DistillationObjective([TaskTerm(1.0), CustomTerm(seldom, name="seldom")])
    trainer, record = make_trainer(objective=objective, max_steps=MAX_ZERO_STEPS + 10)
    trainer.train()
    assert len(record.weights) == MAX_ZERO_STEPS + 10


def test_rows_without_labels_are_no_zeros(make_trainer):
    """Unlabelled text is what distillation is for: the task term of such a batch is 0, and rightly so."""
    rows = make_dataset(NUM_ROWS, unlabeled_share=1.0)
    trainer, record = make_trainer(rows=rows, max_steps=MAX_ZERO_STEPS + 2, learning_rate=1e-5)
    trainer.train()
    assert len(record.weights) == MAX_ZERO_STEPS + 2
    assert {log["task_loss"] for log in record.logs if "loss" in log} == {0.0}
