"""What TensorBoard shows of a distillation, read back from its files."""

import pytest
from conftest import make_dataset, make_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import Record

from hf_kd import DistillationObjective, DistillationTrainer, LogitTerm, TaskTerm


ALL_TERMS = {"hidden_loss_weight": 0.7, "attention_loss_weight": 0.3, "relation_loss_weight": 0.2}
TERMS = ["task_loss", "logit_loss", "hidden_loss", "attention_loss", "relation_loss"]


@pytest.fixture
def run(tmp_path, make_args, collator, student, teacher):
    """Train for six steps; the record of the logs, and what TensorBoard has: tag to {step: value}."""

    def run(objective=None, **changes):
        args = make_args(report_to=["tensorboard"], max_steps=6, logging_steps=2, **changes)
        record = Record()
        trainer = DistillationTrainer(
            student,
            args,
            teacher_model=teacher,
            objective=objective,
            train_dataset=make_dataset(),
            eval_dataset=make_dataset(13, seed=3),
            data_collator=collator,
            compute_metrics=lambda found: {"highest": float(found.predictions.max())},
            callbacks=[record],
        )
        trainer.train()
        (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
        events = EventAccumulator(str(folder)).Reload()
        curves = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        return record.logs, curves

    return run


def test_a_curve_for_every_term(run):
    """The loss alone would not tell which of five terms does not fall."""
    logs, curves = run(**ALL_TERMS)
    for name in ("loss", *TERMS):
        logged = [log[name] for log in logs if name in log]
        assert list(curves[f"train/{name}"]) == [2, 4, 6]
        assert list(curves[f"train/{name}"].values()) == pytest.approx(logged), name
    weights = [0.5, 0.5, 0.7, 0.3, 0.2]
    for step, loss in curves["train/loss"].items():
        terms = [weight * curves[f"train/{name}"][step] for weight, name in zip(weights, TERMS, strict=True)]
        assert loss == pytest.approx(sum(terms), rel=1e-3)  # 4.57 rounds the loss to four digits
    assert not [tag for tag in curves if tag.endswith(("_weight", "temperature"))]


def test_a_curve_for_every_metric_of_an_evaluation(run):
    """Teacher agreement in the last line of the log alone would not show that it stopped rising."""
    _, curves = run(eval_strategy="steps", eval_steps=3, eval_teacher_agreement=True)
    for name in ("loss", "highest", "teacher_agreement", "teacher_kl"):
        assert list(curves[f"eval/{name}"]) == [3, 6], name
    assert curves["eval/teacher_kl"][3] != curves["eval/teacher_kl"][6]


def test_what_schedules_do(run):
    """A term that shrinks because its weight does looks like one that is learned."""
    logs, curves = run(
        **ALL_TERMS,
        logit_loss_schedule="linear:1:0",
        hidden_loss_schedule="window:0:0.5",
        temperature=4.0,
        temperature_schedule="linear:1:0.25",
    )
    # At the last of the steps that a line of the log is about: the second, fourth and sixth, counted from 0.
    expected = {
        "logit_loss_weight": [0.5 * (1 - step / 6) for step in (1, 3, 5)],
        "hidden_loss_weight": [0.7, 0.0, 0.0],
        "temperature": [4.0 * (1 - 0.75 * step / 6) for step in (1, 3, 5)],
    }
    for name, values in expected.items():
        assert list(curves[f"train/{name}"].values()) == pytest.approx(values), name
        assert [log[name] for log in logs if name in log] == pytest.approx(values)
    scheduled = {tag for tag in curves if tag.endswith(("_weight", "temperature"))}
    assert scheduled == {f"train/{name}" for name in expected}


def test_terms_of_names_of_their_own(run):
    """Two temperatures under one name would write over each other."""
    terms = [
        TaskTerm(schedule="cosine:1:0"),
        LogitTerm(name="soft", temperature=2.0, temperature_schedule="linear:1:2"),
        LogitTerm(name="hard", temperature=1.0, temperature_schedule="linear:2:1"),
    ]
    _, curves = run(objective=DistillationObjective(terms))
    assert {tag for tag in curves if tag.endswith(("_weight", "temperature"))} == {
        *("train/task_loss_weight", "train/soft_temperature", "train/hard_temperature"),
    }
    assert {"train/soft", "train/hard", "train/task_loss"} <= set(curves)
    assert list(curves["train/hard_temperature"].values()) == pytest.approx([2 - step / 6 for step in (1, 3, 5)])


def test_a_model_of_constant_terms_logs_what_it_did(make_args, collator, teacher):
    """New keys in every line would change dashboards and tests of those who schedule nothing."""
    record = Record()
    trainer = DistillationTrainer(
        make_model(seed=2),
        make_args(max_steps=1),
        teacher_model=teacher,
        train_dataset=make_dataset(),
        data_collator=collator,
        callbacks=[record],
    )
    trainer.train()
    assert set(record.logs[0]) == {"loss", "grad_norm", "learning_rate", "epoch", "task_loss", "logit_loss"}
