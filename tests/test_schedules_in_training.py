"""Schedules in a training run: the loss of every step by hand, stages that follow each other, a run that was cut."""

import os

import pytest
import torch
from conftest import copy_of, make_dataset, make_model, weights
from test_bad_input import assert_refused
from test_trainer import Record, train
from transformers import TrainerCallback

from hf_kd import (
    CustomTerm,
    DistillationObjective,
    DistillationTrainer,
    HiddenTerm,
    LogitTerm,
    RelationTerm,
    Schedule,
    TaskTerm,
)
from hf_kd.objective import losses
from hf_kd.signals import Capture, Teacher, Wanted


NARROW = {"hidden_size": 16, "num_attention_heads": 2}
# TinyBERT: first the layers, then the predictions.
STAGES = {
    "hidden_loss_weight": 1.0,
    "hidden_loss_schedule": "window:0:0.5",
    "attention_loss_weight": 0.5,
    "attention_loss_schedule": "window:0:0.5",
    "task_loss_schedule": "window:0.5:1",
    "logit_loss_schedule": "window:0.5:1",
}
SGD = {"optim": "sgd", "learning_rate": 0.05}


@pytest.fixture
def narrow_student():
    return make_model(seed=2, num_hidden_layers=2, hidden_size=16)


class Steps(DistillationTrainer):
    """Keeps of every step the student before it, the batch, and the loss."""

    def __init__(self, *args, **kwargs):
        self.steps = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        before, batch = copy_of(model), dict(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.steps.append((before, batch, loss.item()))
        return loss


class Gradients(TrainerCallback):
    """Keeps whether the gradients of some parameters were there, and not 0, at every step."""

    def __init__(self, parameters):
        self.parameters, self.found = list(parameters), []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        assert all(p.grad is not None for p in self.parameters)
        self.found.append(any(p.grad.any().item() for p in self.parameters))


# The loss of every step


def test_every_step_has_the_weights_of_its_time(student, teacher, collator, make_args):
    """A schedule that counts from 1, or to the last step instead of the end, is off by a step in every step."""
    args = make_args(
        max_steps=8,
        task_loss_weight=0.4,
        task_loss_schedule="linear:2:0.5",
        logit_loss_weight=0.6,
        logit_loss_schedule="cosine:0:1",
        temperature=3.0,
        temperature_schedule="linear:1:0.5",
        hidden_loss_weight=0.7,
        hidden_loss_schedule="window:0.25:0.75",
        layer_mapping="last",
    )
    trainer = Steps(student, args, teacher_model=teacher, train_dataset=make_dataset(), data_collator=collator)
    trainer.train()
    assert len(trainer.steps) == 8
    reader, wanted = Teacher(teacher, student.config), Wanted(frozenset({2}))
    reader.watch(Wanted(frozenset({4})))
    for step, (before, batch, loss) in enumerate(trainer.steps):
        share = step / 8
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        capture = Capture(before, wanted)
        with capture, torch.no_grad():
            outputs = before(**inputs)
        s, t = capture.signals(outputs, inputs), reader(inputs)
        expected = 0.4 * (2.0 - 1.5 * share) * losses.task_loss(s.logits, batch["labels"])
        factor = 0.5 - 0.5 * torch.cos(torch.tensor(share * torch.pi))
        temperature = 3.0 * (1.0 - 0.5 * share)
        expected += 0.6 * factor * losses.logit_kl(s.logits, t.logits, temperature=temperature)
        if 2 <= step < 6:
            expected += 0.7 * losses.hidden_mse(s.hidden[2], t.hidden[4], s.attention_mask)
        assert loss == pytest.approx(expected.item(), rel=1e-5), step


def test_accumulation_does_not_run_ahead(narrow_student, teacher, collator, make_args):
    """Progress counts optimisation steps: counted in micro-batches, a window would close at half of its steps."""
    results = []
    for batch_size, accumulated in ((8, 1), (2, 4)):
        steps = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
        args = make_args(max_steps=6, logging_steps=2, **steps, **STAGES, **SGD)
        trainer, record = train(narrow_student, teacher, args, collator, make_dataset(27, unlabeled_share=0.4))
        results.append((weights(trainer.model), weights(trainer.distillation_objective), record.logs))
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=0, atol=1e-6)
    for log, expected in zip(results[1][2], results[0][2], strict=True):
        assert set(log) == set(expected)
        for name in {"task_loss", "logit_loss", "hidden_loss", "attention_loss"} & set(log):
            assert log[name] == pytest.approx(expected[name], rel=1e-3), name


# What is off


def test_a_term_that_is_off_is_not_computed_and_the_teacher_rests(student, teacher, collator, make_args):
    """The teacher's forward is most of the cost of a step: it would run for nothing but the labels."""
    calls, forwards = [], []
    handle = teacher.register_forward_hook(lambda *args: forwards.append(trainer.state.global_step))

    def gap(student, teacher, labels):
        calls.append(trainer.state.global_step)
        return (student.logits - teacher.logits).square().mean()

    terms = [
        TaskTerm(1.0),
        CustomTerm(gap, schedule="window:0.25:0.5"),
        RelationTerm(0.5, schedule=Schedule("window", 0.375, 0.625)),
    ]
    record = Record()
    trainer = DistillationTrainer(
        student,
        make_args(max_steps=8),
        teacher_model=teacher,
        objective=DistillationObjective(terms),
        train_dataset=make_dataset(),
        data_collator=collator,
        callbacks=[record],
    )
    trainer.train()
    handle.remove()
    assert calls == [2, 3] and forwards == [2, 3, 4]
    logged = [[name for name in log if name in ("task_loss", "gap", "relation_loss")] for log in record.logs[:8]]
    assert logged == [
        *[["task_loss"]] * 2,
        ["task_loss", "gap"],
        ["task_loss", "gap", "relation_loss"],
        ["task_loss", "relation_loss"],
        *[["task_loss"]] * 3,
    ]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_logged_term_is_the_mean_over_the_steps_it_was_on(student, teacher, collator, make_args, accumulated):
    """Divided by all steps, a term would seem to fall as its window closes in the middle of a log."""
    changes = {
        "max_steps": 8,
        "hidden_loss_weight": 1.0,
        "hidden_loss_schedule": "window:0:0.375",
        "gradient_accumulation_steps": accumulated,
        "per_device_train_batch_size": 4,
    }
    _, each = train(student, teacher, make_args(**changes), collator)
    _, window = train(student, teacher, make_args(logging_steps=4, **changes), collator)
    for name, steps in (("hidden_loss", 3), ("task_loss", 4), ("logit_loss", 4)):
        mean = sum(log[name] for log in each.logs[:steps]) / steps
        assert window.logs[0][name] == pytest.approx(mean, rel=1e-6), name
    assert "hidden_loss" not in each.logs[3] and "hidden_loss" not in window.logs[1]
    mean = sum(log["logit_loss"] for log in each.logs[4:8]) / 4
    assert window.logs[1]["logit_loss"] == pytest.approx(mean, rel=1e-6)


# Stages


@pytest.mark.parametrize("changes", [{}, NARROW | {"num_attention_heads": 4}], ids=["same width", "narrower"])
def test_two_stages(teacher, collator, make_args, changes):
    """In the first stage the head would learn from random layers, or in the second the layers would not go on."""
    student = make_model(seed=2, num_hidden_layers=2, **changes)
    args = make_args(max_steps=8, weight_decay=0.0, **STAGES)
    record = Record()
    trainer = DistillationTrainer(
        student, args, teacher_model=teacher, train_dataset=make_dataset(), data_collator=collator, callbacks=[record]
    )
    projections = list(trainer.distillation_objective.parameters())
    assert bool(projections) == bool(changes)
    head = [p for name, p in student.named_parameters() if name.startswith(("classifier.", "bert.pooler."))]
    watched = [Gradients(head), Gradients(student.bert.encoder.layer[0].parameters()), Gradients(projections)]
    for callback in watched:
        trainer.add_callback(callback)
    before = [p.detach().clone() for p in head]
    trainer.train()
    assert watched[0].found == [False] * 4 + [True] * 4
    assert watched[1].found == [True] * 8
    assert watched[2].found == [bool(changes)] * 4 + [False] * 4
    assert not any(torch.equal(p, q) for p, q in zip(head, before, strict=True))
    names = [{name for name in log if name.endswith("_loss")} for log in record.logs[:8]]
    assert names == [{"hidden_loss", "attention_loss"}] * 4 + [{"task_loss", "logit_loss"}] * 4


def test_the_head_stays_bit_for_bit_in_the_first_stage(student, teacher, collator, make_args):
    """A gradient of 0 must leave the weights alone, not only be small."""
    stage = {"hidden_loss_weight": 1.0, "task_loss_schedule": "window:0.5:1", "logit_loss_schedule": "window:0.5:1"}
    snapshots = []

    class Snapshot(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            snapshots.append(model.classifier.weight.detach().clone())

    trainer = DistillationTrainer(
        student,
        make_args(max_steps=4, **stage),
        teacher_model=teacher,
        train_dataset=make_dataset(),
        data_collator=collator,
        callbacks=[Snapshot()],
    )
    before = student.classifier.weight.detach().clone()
    trainer.train()
    moved = [not torch.equal(after, before) for after in snapshots]
    assert moved == [False, False, True, True]


def test_both_stages_learn(teacher, collator, make_args):
    """A stage whose terms are on, but whose gradient is not, would be logged all the same."""
    student = make_model(seed=2, num_hidden_layers=2, **NARROW)
    off = {"attention_loss_weight": 0.0, "attention_loss_schedule": None}
    stages = {**STAGES, **off, "task_loss_weight": 0.0, "task_loss_schedule": None}
    args = make_args(max_steps=80, learning_rate=5e-3, logging_steps=10, **stages)
    _, record = train(student, teacher, args, collator, make_dataset(16))
    for name, num_logs in (("hidden_loss", 4), ("logit_loss", 4)):
        found = [log[name] for log in record.logs if name in log]
        assert len(found) == num_logs and found[-1] < 0.7 * found[0], name


def test_a_gap_between_the_stages_is_refused(make_args):
    """A hundred steps of a long run would train nothing."""
    assert_refused(
        lambda: make_args(**{**STAGES, "task_loss_schedule": None, "task_loss_weight": 0.0, "max_steps": 8}
                          | {"logit_loss_schedule": "window:0.6:1"}),
        "every term is off at 0.5 of the training",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"task_loss_schedule": "linear:1"}, ["schedule 'linear:1' cannot be read", "'linear:1:0'"]),
        ({"hidden_loss_schedule": "step:0:1"}, ["schedule 'step:0:1' cannot be read"]),
        ({"relation_loss_schedule": "window:0.5:0.2"}, ["0 <= start < end <= 1"]),
        ({"temperature_schedule": "linear:1:0"}, ["temperature_schedule='linear:1:0' reaches 0"]),
        ({"temperature_schedule": "window:0:0.5"}, ["would make the temperature 0"]),
    ],
)
def test_schedules_are_checked_with_the_arguments(make_args, changes, fragments):
    """Also where their term is off: found when the flags are read, not when the models are loaded."""
    assert_refused(lambda: make_args(**changes), *fragments)


# A run that was cut

RUNS = {
    "in a window": {"hidden_loss_weight": 1.0, "hidden_loss_schedule": "window:0.25:0.75"},
    "between two stages": STAGES,
    "in a straight line": {
        "logit_loss_schedule": "linear:1:0",
        "task_loss_schedule": "cosine:0:1",
        "temperature_schedule": "linear:2:0.5",
        "relation_loss_weight": 1.0,
        "relation_loss_type": "crd",
        "relation_loss_schedule": "linear:0:2",
    },
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("width", [32, 16])
def test_a_resumed_run_ends_where_the_whole_one_does(teacher, collator, make_args, name, width):
    """A schedule that starts anew after an interruption trains the first stage twice, and the second too short."""
    student = make_model(seed=2, num_hidden_layers=2, hidden_size=width)
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8, **RUNS[name]}
    args = make_args(**saving)
    whole, _ = train(student, teacher, args, collator)
    for step in (3, 6):
        checkpoint = os.path.join(args.output_dir, f"checkpoint-{step}")
        assert os.path.isfile(os.path.join(checkpoint, "projection.safetensors")) == (width == 16)
        changes = {**saving, "save_strategy": "no", "resume_from_checkpoint": checkpoint}
        resumed, record = train(student, teacher, make_args(**changes), collator)
        assert len(record.weights) == 8 - step
        assert torch.equal(weights(resumed.model), weights(whole.model)), step
        ours, theirs = (t.distillation_objective.state_dict() for t in (resumed, whole))
        assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours), step


def test_a_second_training_starts_its_schedules_anew(student, teacher, collator, make_args):
    """At the end of the first, a term of a closed window would stay off for ever."""
    args = make_args(hidden_loss_weight=1.0, hidden_loss_schedule="window:0:0.5")
    trainer, record = train(student, teacher, args, collator)
    trainer.train()
    logged = ["hidden_loss" in log for log in record.logs if "loss" in log]
    assert logged == [True, True, False, False] * 2


def test_an_objective_may_hold_two_windows_of_one_kind(student, teacher, collator, make_args):
    """Lower layers first and upper ones after: two terms of a kind with windows of their own."""
    objective = DistillationObjective(
        [
            HiddenTerm(layers="0:0", schedule="window:0:0.5", name="bottom"),
            HiddenTerm(layers="last", schedule="window:0.5:1", name="top"),
            LogitTerm(schedule="linear:0:1"),
        ]
    )
    _, record = train(student, teacher, make_args(), collator, objective=objective)
    names = [sorted({"bottom", "top", "logit_loss"} & set(log)) for log in record.logs[:4]]
    assert names == [["bottom"], ["bottom", "logit_loss"], ["logit_loss", "top"], ["logit_loss", "top"]]
