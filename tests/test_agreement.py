"""Teacher agreement: what evaluation reports, beside a loop over single rows."""

import json

import numpy as np
import pytest
import torch
from conftest import copy_of, make_dataset, make_model, make_rows, weights
from datasets import Dataset
from test_bad_input import assert_refused
from test_distributed import ROOT, launch
from test_problem_types import make_problem_rows
from test_separate_tokenizers import make_teacher, make_texts, teacher_tokenizer  # noqa: F401, a fixture
from test_trainer import train
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from hf_kd import DistillationCollator, DistillationObjective, DistillationTrainer, LogitTerm, TaskTerm
from hf_kd.signals.problem import PROBLEM_TYPES


AGREEMENT = {"eval_teacher_agreement": True, "per_device_eval_batch_size": 5}


def make_eval_rows(problem, num_rows=13):
    """Rows of ragged lengths; thirteen are two batches of five and a last one of three."""
    rows = make_problem_rows(problem, num_rows)
    if problem == "masked_lm":
        for row in rows:
            row["labels"] = [token if index % 3 == 1 else -100 for index, token in enumerate(row["input_ids"])]
    if problem == "token_classification":
        rows[4]["labels"] = [-100] * len(rows[4]["labels"])  # not one label: all of its tokens count
    return rows


def evaluate(student, teachers, args, rows, tokenizer, **kwargs):
    labels = rows[0].get("labels")
    is_of_tokens = isinstance(labels, list) and isinstance(labels[0], int)
    collator = (DataCollatorForTokenClassification if is_of_tokens else DataCollatorWithPadding)(tokenizer)
    dataset = Dataset.from_list(rows)
    trainer = DistillationTrainer(
        copy_of(student), args, teacher_model=teachers, eval_dataset=dataset, data_collator=collator, **kwargs
    )
    return trainer, {name: value for name, value in trainer.evaluate().items() if "teacher" in name}


@torch.no_grad()
def predictions_of(model, row, problem):
    """Logits of each prediction of one row, alone and without padding, of shape `(predictions, classes)`."""
    inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "token_type_ids")}
    outputs = model(**inputs)
    if problem == "question_answering":
        return torch.cat([outputs.start_logits, outputs.end_logits]).double().numpy()
    logits = outputs.logits[0].double().numpy()
    if problem == "multi_label_classification":
        return np.stack([np.zeros_like(logits), logits], axis=1)
    if problem in ("token_classification", "masked_lm"):
        valid = np.array(row["labels"]) != -100
        return logits[valid if valid.any() else slice(None)]
    return logits[None]


def softmax(logits):
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def by_loop(student, teachers, rows, problem, shares=(1.0,)):
    """The metrics over all predictions of all rows, one by one."""
    equal, divergence, count = 0, 0.0, 0
    for row in rows:
        ours = predictions_of(student, row, problem)
        theirs = [predictions_of(teacher, row, problem) for teacher in teachers]
        if problem == "regression":
            divergence += ((ours - theirs[0]) ** 2).item()
            count += 1
            continue
        for index in range(len(ours)):
            q = softmax(ours[index])
            p = sum(share * softmax(logits[index]) for share, logits in zip(shares, theirs, strict=True))
            equal += p.argmax() == q.argmax()
            divergence += (p * np.log(p / q)).sum()
            count += 1
    if problem == "regression":
        return {"eval_teacher_mse": divergence / count}
    return {"eval_teacher_agreement": equal / count, "eval_teacher_kl": divergence / count}


@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_every_problem_agrees_with_a_loop(problem, make_args, tokenizer):
    """A mean of the batches' means, or padding taken for predictions, is off by a little and looks right."""
    student, teacher = make_model(problem=problem, seed=2), make_model(problem=problem, seed=1)
    with torch.no_grad():
        for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
            ours.lerp_(theirs, 0.75)  # near enough to agree now and then
    rows = make_eval_rows(problem)
    if problem == "single_label_classification":
        for model in (student, teacher):  # else each has one class for all rows
            logits = np.concatenate([predictions_of(model, row, problem) for row in rows])
            model.classifier.bias.data -= torch.tensor(logits.mean(axis=0), dtype=torch.float32)
    _, found = evaluate(student, teacher, make_args(**AGREEMENT), rows, tokenizer)
    expected = by_loop(student, [teacher], rows, problem)
    assert found == pytest.approx(expected, rel=1e-4)
    if problem != "regression":
        assert 0 < found["eval_teacher_agreement"] < 1


def test_several_teachers_answer_as_they_teach(make_args, tokenizer):
    """Compared with the first teacher alone, or a plain mean, a student of unequal teachers would seem to fail."""
    student, teachers = make_model(seed=2, num_labels=3), [make_model(seed=seed, num_labels=3) for seed in (1, 3)]
    rows = make_rows(13, num_labels=3)
    expected = by_loop(student, teachers, rows, "single_label_classification", (0.8, 0.2))
    for weight in (0.5, 0.0):  # also where no logits are learned from
        args = make_args(**AGREEMENT, teacher_weights=[4.0, 1.0], logit_loss_weight=weight, temperature=7.0)
        assert evaluate(student, teachers, args, rows, tokenizer)[1] == pytest.approx(expected, rel=1e-4)
    terms = [LogitTerm(1.0, type="mse", teacher=1), TaskTerm()]
    objective = DistillationObjective(terms)
    _, found = evaluate(student, teachers, make_args(**AGREEMENT), rows, tokenizer, objective=objective)
    alone = by_loop(student, teachers[1:], rows, "single_label_classification")
    assert found == pytest.approx(alone, rel=1e-4) and found != pytest.approx(expected, rel=1e-2)


def test_classes_are_matched_by_name(make_args, tokenizer):
    """By index, a student that is its teacher would disagree with it on everything."""
    student = make_model(seed=1)
    teacher = copy_of(student)
    student.config.id2label, student.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    teacher.config.id2label, teacher.config.label2id = {0: "yes", 1: "no"}, {"yes": 0, "no": 1}
    with torch.no_grad():
        teacher.classifier.weight.copy_(student.classifier.weight[[1, 0]])
        teacher.classifier.bias.copy_(student.classifier.bias[[1, 0]])
    _, found = evaluate(student, teacher, make_args(**AGREEMENT), make_rows(13), tokenizer)
    assert found == {"eval_teacher_agreement": 1.0, "eval_teacher_kl": pytest.approx(0.0, abs=1e-6)}


def test_logits_are_not_kept(make_args, tokenizer, student, teacher):
    """A vocabulary of logits for every token of a large set would fill the memory; the loss is as without."""
    trainer, found = evaluate(student, teacher, make_args(**AGREEMENT), make_rows(13), tokenizer)
    output = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation", prediction_loss_only=True)
    assert output.predictions is None and output.label_ids is None
    assert {name: value for name, value in output.metrics.items() if "teacher" in name} == found
    plain, _ = evaluate(student, teacher, make_args(per_device_eval_batch_size=5), make_rows(13), tokenizer)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_prediction_and_a_second_evaluation(make_args, tokenizer, student, teacher):
    """Sums that go on from one call to the next would mix two sets; predictions must be those of `Trainer`."""
    rows, others = make_rows(13), make_rows(7, seed=5)
    trainer, first = evaluate(student, teacher, make_args(**AGREEMENT), rows, tokenizer)
    output = trainer.predict(Dataset.from_list(others), metric_key_prefix="other")
    expected = by_loop(student, [teacher], others, "single_label_classification")
    for name, value in expected.items():
        assert output.metrics[name.replace("eval", "other")] == pytest.approx(value, rel=1e-4)
    assert output.predictions.shape == (7, 2)
    again = trainer.evaluate()
    assert {name: value for name, value in again.items() if "teacher" in name} == first


def test_off_runs_no_teacher(make_args, tokenizer, student, teacher):
    """Evaluation would cost several times what it did; switched on, each batch is read once."""
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer, found = evaluate(student, teacher, make_args(per_device_eval_batch_size=5), make_rows(13), tokenizer)
    assert (found, len(calls)) == ({}, 0)
    evaluate(student, teacher, make_args(**AGREEMENT), make_rows(13), tokenizer)
    assert len(calls) == 3


def test_a_student_of_labels_alone_trains_as_before(make_args, collator, student, teacher):
    """The baseline is to be watched, not taught: a teacher that is loaded to compare with must not train it."""
    changes = {"task_loss_weight": 1.0, "logit_loss_weight": 0.0, "eval_strategy": "steps", "eval_steps": 2}
    runs = [
        train(student, teacher, make_args(**changes, **more), collator, eval_dataset=make_dataset(13))
        for more in ({}, AGREEMENT)
    ]
    assert torch.equal(*(weights(trainer.model) for trainer, _ in runs))
    logged = [log["eval_teacher_kl"] for log in runs[1][1].logs if "eval_teacher_kl" in log]
    assert len(logged) == 2 and logged[0] != logged[1]
    assert not any("eval_teacher_kl" in log for log in runs[0][1].logs)


def test_the_best_checkpoint_by_agreement(make_args, collator, student, teacher):
    """`metric_for_best_model` is read before our evaluation is done, if the metric comes too late."""
    args = make_args(
        **AGREEMENT,
        **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6},
        **{"load_best_model_at_end": True, "metric_for_best_model": "teacher_kl", "greater_is_better": False},
    )
    trainer, record = train(student, teacher, args, collator, eval_dataset=make_dataset(13))
    logged = [log["eval_teacher_kl"] for log in record.logs if "eval_teacher_kl" in log]
    assert trainer.state.best_metric == min(logged) and len(set(logged)) == 3


def test_a_teacher_with_a_tokenizer_of_its_own(make_args, tokenizer, teacher_tokenizer):  # noqa: F811
    """It reads the columns of its own tokens in evaluation too, or it would read the student's as its own."""
    collator = DistillationCollator(tokenizer, teacher_tokenizer, ["sentence"])
    rows, student, teacher = make_texts(tokenizer, num_rows=13), make_model(seed=2), make_teacher(teacher_tokenizer)
    trainer = DistillationTrainer(
        student, make_args(**AGREEMENT), teacher_model=teacher, eval_dataset=rows, data_collator=collator
    )
    found = trainer.evaluate()
    equal = 0
    for row in rows:
        with torch.no_grad():
            theirs = teacher(**teacher_tokenizer(row["sentence"], return_tensors="pt")).logits
            ours = student(**tokenizer(row["sentence"], return_tensors="pt")).logits
        equal += bool(ours.argmax() == theirs.argmax())
    assert found["eval_teacher_agreement"] == pytest.approx(equal / 13)


@pytest.mark.one_leg
@pytest.mark.distributed
def test_two_processes_count_each_row_once(tmp_path):
    """The last batch is filled up with rows from the start: counted twice, they move every metric."""
    launch(ROOT / "tests" / "scripts" / "evaluate_tiny.py", 13, 3, tmp_path, processes=2)
    found = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    problem = "token_classification"
    student, teacher = make_model(seed=2, problem=problem, num_hidden_layers=2), make_model(seed=1, problem=problem)
    expected = by_loop(student, [teacher], make_problem_rows(problem, 13), problem)
    assert found[0] == found[1] == {"world_size": 2, "metrics": pytest.approx(expected, rel=1e-4)}


def test_without_a_teacher(make_args, collator, student):
    """The metric would be missing from the logs, and found to be missing when the training is over."""
    args = make_args(**AGREEMENT, task_loss_weight=1.0, logit_loss_weight=0.0)
    assert_refused(
        lambda: DistillationTrainer(student, args, data_collator=collator),
        "eval_teacher_agreement",
        "there is none",
        "pass teacher_model=",
    )
