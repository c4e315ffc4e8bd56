"""What results.json and the card say of a training, and where they have it from."""

import json
import os
import socket

import pytest
import torch
from conftest import MODEL_CLASSES, copy_of, make_dataset, make_model, make_rows
from datasets import Dataset
from test_trainer import train
from transformers import TrainerCallback

from hf_kd import (
    AttentionTerm,
    CustomTerm,
    DistillationObjective,
    DistillationTrainer,
    HiddenTerm,
    LogitTerm,
    RelationTerm,
    Schedule,
    TaskTerm,
    cache_teacher_signals,
    student_from_teacher,
)
from hf_kd.origin import identify
from hf_kd.record import describe_distillation, record_distillation, remove_deployment
from hf_kd.results import read_results, write_results
from hf_kd.signals import Wanted


class KillAt(TrainerCallback):
    """The process ends after this many steps, as with Ctrl-C."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def make_trainer(student, teacher, args, collator, dataset=None, **kwargs):
    dataset = make_dataset() if dataset is None else dataset
    options = {"model": student, "teacher_model": teacher, "args": args, "data_collator": collator}
    return DistillationTrainer(**options, train_dataset=dataset, **kwargs)


def run_until(step, args, collator, checkpoint=None):
    """A process of its own, as far as the trainer can tell."""
    teacher = make_model(seed=1)
    callbacks = [KillAt(step)] if step is not None else []
    trainer = make_trainer(make_model(seed=2), teacher, args, collator, callbacks=callbacks)
    if step is None:
        trainer.train(resume_from_checkpoint=checkpoint)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


# Resuming


def test_every_resumption_is_noted(make_args, collator, tmp_path):
    """The last process alone would tell of one interruption, where there were three."""
    args = make_args(save_strategy="steps", save_steps=2, max_steps=8)
    found = describe_distillation(run_until(3, args, collator))["training"]
    assert (found["steps"], found["planned_steps"], found["resumed_at_steps"]) == (3, 8, [])
    checkpoint = tmp_path / "out" / "checkpoint-2"
    run_until(3, args, collator, checkpoint)  # killed again, before anything was saved
    run_until(5, args, collator, checkpoint)
    trainer = run_until(None, args, collator, tmp_path / "out" / "checkpoint-4")
    found = describe_distillation(trainer)["training"]
    assert (found["steps"], found["planned_steps"], found["resumed_at_steps"]) == (8, 8, [2, 4])


def test_a_second_training_of_the_same_trainer_was_not_resumed(make_args, collator, tmp_path):
    """A fresh start would carry the interruptions of the run before."""
    args = make_args(save_strategy="steps", save_steps=2)
    run_until(3, args, collator)
    trainer = run_until(None, args, collator, tmp_path / "out" / "checkpoint-2")
    assert describe_distillation(trainer)["training"]["resumed_at_steps"] == [2]
    trainer.train()
    assert describe_distillation(trainer)["training"]["resumed_at_steps"] == []


def test_notes_survive_when_callbacks_are_restored(make_args, collator, tmp_path):
    """transformers then makes the callback anew from the checkpoint, and the object from before would be asked."""
    args = make_args(save_strategy="steps", save_steps=2, restore_callback_states_from_checkpoint=True)
    run_until(3, args, collator)
    trainer = run_until(None, args, collator, tmp_path / "out" / "checkpoint-2")
    assert describe_distillation(trainer)["training"]["resumed_at_steps"] == [2]


def test_a_finished_training_was_not_interrupted(make_args, collator, tmp_path):
    """Starting a script again after its end would make a run of one piece an interrupted one."""
    args = make_args(save_strategy="steps", save_steps=3, max_steps=3)  # an epoch
    checkpoint = tmp_path / "out" / "checkpoint-3"
    first = describe_distillation(run_until(None, args, collator))["training"]
    again = describe_distillation(run_until(None, args, collator, checkpoint))["training"]
    assert (again["resumed_at_steps"], again["steps"], again["epochs"]) == ([], 3, 1.0)
    assert {**again, "optimizer": first["optimizer"]} == first
    args = make_args(save_strategy="no", max_steps=5)  # it goes on after all
    found = describe_distillation(run_until(None, args, collator, checkpoint))["training"]
    assert (found["resumed_at_steps"], found["steps"], found["epochs"]) == ([3], 5, 1.67)


# Teachers


def test_a_teacher_that_is_only_compared_with(make_args, collator, tmp_path):
    """A student of labels alone would be published as a distilled one."""
    make_model(seed=1).save_pretrained(tmp_path / "teacher")
    teacher = MODEL_CLASSES["single_label_classification"].from_pretrained(tmp_path / "teacher")
    student = student_from_teacher(teacher, num_layers=2)
    args = make_args(logit_loss_weight=0.0, task_loss_weight=1.0, eval_teacher_agreement=True, max_steps=1)
    options = {"eval_dataset": make_dataset(num_rows=8), "compute_metrics": accuracy}
    trainer = make_trainer(student, teacher, args, collator, **options)
    trainer.train()
    trainer.evaluate()
    record_distillation(trainer)
    results = read_results(tmp_path / "out" / "results.json")
    found = results["distillation"]
    assert found["teachers"] == [] and [model["name"] for model in found["agreement_teachers"]] == ["teacher"]
    assert results["rows"][0]["role"] == "baseline"
    start = found["student"]["start"]
    assert (start["kind"], start["name"], start["layers"]) == ("teacher", "teacher", [2, 4]) and "teacher" not in start


def trained_teacher(tmp_path):
    """From a folder, as a run has it."""
    make_model(seed=1).save_pretrained(tmp_path / "runs" / "teacher")
    return MODEL_CLASSES["single_label_classification"].from_pretrained(tmp_path / "runs" / "teacher")


@pytest.mark.parametrize("number", [1, 2])
def test_a_cached_teacher_is_the_teacher_it_is(make_args, collator, tmp_path, number):
    """The card of a run that read its teacher from disk would call it a column of numbers."""
    teachers = [trained_teacher(tmp_path), make_model("roberta", seed=3, hidden_size=48)][:number]
    rows = cache_teacher_signals(make_dataset(), teachers, Wanted(hidden=frozenset({2, 4})), tmp_path / "cache")
    students = [student_from_teacher(teachers[0], num_layers=2) for _ in range(3)]
    args = make_args()
    online = describe_distillation(make_trainer(students[0], teachers, args, collator))
    cached = describe_distillation(make_trainer(students[1], None, args, collator, rows))
    both = describe_distillation(make_trainer(students[2], teachers, args, collator, rows))
    for found in (cached, both):
        assert found["teachers"] == online["teachers"] and found["student"] == online["student"]
    assert cached["teachers"][0]["name"] == "teacher" and cached["student"]["start"]["teacher"] == 0
    assert "column" not in json.dumps(cached["teachers"])


def test_a_cached_teachers_folder_is_not_looked_for_here(make_args, collator, tmp_path, monkeypatch):
    """Another model in the working folder, of the same name, would lend its licence."""
    rows = cache_teacher_signals(make_dataset(), trained_teacher(tmp_path), Wanted(), tmp_path / "cache")
    (tmp_path / "here" / "teacher").mkdir(parents=True)
    (tmp_path / "here" / "teacher" / "README.md").write_text("---\nlicense: mit\n---\n# It\n")
    monkeypatch.chdir(tmp_path / "here")
    (found,) = describe_distillation(make_trainer(make_model(seed=2), None, make_args(), collator, rows))["teachers"]
    assert found["name"] == "teacher" and "license" not in found


def with_soft_labels(**columns):
    rows = make_dataset()
    for name in columns or ("teacher_probs",):
        rows = rows.add_column(name, [{"LABEL_0": 0.25, "LABEL_1": 0.75}] * len(rows))
    return rows


def test_soft_labels_are_no_model(make_args, collator, tmp_path):
    """The student's own config stands in for the teacher's, and would be published as its teacher."""
    student = make_model(seed=2)
    trainer = make_trainer(student, None, make_args(), collator, with_soft_labels())
    found = describe_distillation(trainer)
    assert found["teachers"] == [{"column": "teacher_probs"}]
    assert found["student"]["start"] == {"kind": "unknown"}
    # A student that was made of another model, which has no name either.
    made = student_from_teacher(make_model(seed=1), num_layers=2)
    found = describe_distillation(make_trainer(made, None, make_args(), collator, with_soft_labels()))
    assert found["student"]["start"]["layers"] == [2, 4] and "teacher" not in found["student"]["start"]
    # The one it was made of is cached beside them.
    teachers = [make_model(seed=3), make_model(seed=1)]
    rows = cache_teacher_signals(make_dataset(), teachers, Wanted(), tmp_path / "cache")
    rows = rows.remove_columns(["teacher_0_logits", "teacher_0_signals"])
    rows = rows.add_column("teacher_0_probs", with_soft_labels()["teacher_probs"][:])
    made = student_from_teacher(teachers[1], num_layers=2)
    found = describe_distillation(make_trainer(made, None, make_args(), collator, rows))
    assert found["teachers"][0] == {"column": "teacher_0_probs"} and found["teachers"][1]["layers"] == 4
    assert found["student"]["start"]["teacher"] == 1
    columns = {"teacher_0_probs": 0, "teacher_1_probs": 1}
    trainer = make_trainer(make_model(seed=2), None, make_args(), collator, with_soft_labels(**columns))
    assert describe_distillation(trainer)["teachers"] == [{"column": name} for name in columns]


def test_soft_labels_beside_a_model(make_args, collator, tmp_path):
    """The model would be given the credit for answers that nobody asked it for."""
    teacher, rows = trained_teacher(tmp_path), with_soft_labels()
    student = student_from_teacher(teacher, num_layers=2)
    found = describe_distillation(make_trainer(student, teacher, make_args(), collator, rows))
    assert found["teachers"] == [{"column": "teacher_probs"}]
    start = found["student"]["start"]
    assert (start["name"], start["layers"]) == ("teacher", [2, 4]) and "teacher" not in start
    student = student_from_teacher(teacher, num_layers=2)
    args = make_args(hidden_loss_weight=1.0)
    found = describe_distillation(make_trainer(student, teacher, args, collator, rows))
    (described,) = found["teachers"]
    assert (described["name"], described["column"], described["layers"]) == ("teacher", "teacher_probs", 4)
    assert found["student"]["start"]["teacher"] == 0


# Terms


def gap(student, teacher, labels):
    return (student.logits.amax(-1) - teacher.logits.amax(-1)).square().mean()


def test_terms_say_what_is_on_and_nothing_of_defaults(make_args, collator):
    """A card would name a temperature that no loss reads, or leave out the window that a term was on in."""
    terms = [
        TaskTerm(0.5, label_smoothing=0.1, schedule="constant"),
        LogitTerm(0.9, type="js", temperature=4.0, options={"beta": 0.25}, teacher_weights=[2.0, 1.0]),
        LogitTerm(0.3, type="mse", teacher=1, name="second"),
        HiddenTerm(1.0, layers="1:2,2:4", teacher=1, schedule=Schedule("window", 0.0, 0.5)),
        AttentionTerm(0.0, teacher=0),
        AttentionTerm(1.5, type="kl", teacher=0, layers="last", head_reduction="mean", name="maps"),
        RelationTerm(1.0, teacher=1, relation_heads=4, schedule="linear:1:0"),
        CustomTerm(gap, weight=0.1, hidden_layers="last", teacher=0),
    ]
    wide = make_model("roberta", seed=3, hidden_size=48)
    objective = DistillationObjective(terms)
    student = make_model(seed=2, num_hidden_layers=2)
    trainer = make_trainer(student, [make_model(seed=1), wide], make_args(), collator, objective=objective)
    found = {term.pop("name"): term for term in describe_distillation(trainer)["terms"]}
    assert found == {
        "task_loss": {"kind": "task", "weight": 0.5, "label_smoothing": 0.1},
        "logit_loss": {
            **{"kind": "logit", "weight": 0.9, "type": "js", "temperature": 4.0, "options": {"beta": 0.25}},
            **{"teacher_weights": [2.0, 1.0], "teacher_reduction": "probabilities"},
        },
        "second": {"kind": "logit", "weight": 0.3, "type": "mse", "teacher": 1},
        "hidden_loss": {
            **{"kind": "hidden", "weight": 1.0, "type": "mse", "teacher": 1, "hidden_layers": [[1, 2], [2, 4]]},
            **{"schedule": "window:0:0.5", "is_projected": True},
        },
        "maps": {
            **{"kind": "attention", "weight": 1.5, "type": "kl", "teacher": 0, "attention_layers": [[2, 4]]},
            "head_reduction": "mean",
        },
        "relation_loss": {
            **{"kind": "relation", "weight": 1.0, "type": "minilm_v2", "teacher": 1, "attention_layers": [[2, 4]]},
            **{"relation_heads": 4, "schedule": "linear:1:0"},
        },
        "gap": {"kind": "custom", "weight": 0.1, "teacher": 0, "hidden_layers": [[2, 4]]},
    }
    json.dumps(found)


@pytest.mark.parametrize(("problem", "kind"), [("regression", "mse"), ("multi_label_classification", "kl")])
def test_the_form_that_the_problem_chose(make_args, collator, problem, kind):
    """The default form is not KL where there is one logit."""
    teacher, student = (make_model(seed=seed, problem=problem) for seed in (1, 2))
    found = describe_distillation(make_trainer(student, teacher, make_args(), collator))
    logit = found["terms"][1]
    assert (found["problem"], logit["type"], "temperature" in logit) == (problem, kind, kind == "kl")


# Data


def labels_as(dataset, **columns):
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in dataset]
    return Dataset.from_list(
        [{**row, **{name: make(i, row) for name, make in columns.items()}} for i, row in enumerate(rows)]
    )


@pytest.mark.parametrize(
    ("problem", "columns"),
    [
        ("single_label_classification", {"label": lambda i, row: -100 if i % 3 else 1}),
        ("regression", {"labels": lambda i, row: -100.0 if i % 3 else 2.5}),
        ("multi_label_classification", {"labels": lambda i, row: [-100.0] * 3 if i % 3 else [1.0, -100.0, 0.0]}),
        ("token_classification", {"labels": lambda i, row: [-100 if i % 3 else 1] * len(row["input_ids"])}),
        (
            "question_answering",
            {name: lambda i, row: -100 if i % 3 else 1 for name in ("start_positions", "end_positions")},
        ),
    ],
    ids=["single", "regression", "multi", "tokens", "answers"],
)
def test_rows_with_a_label_of_their_own(make_args, collator, problem, columns):
    """Rows that only the teacher labels would be sold as labelled data."""
    dataset = labels_as(make_rows(num_rows=24), **columns)
    models = [make_model(seed=seed, problem=problem) for seed in (1, 2)]
    expected = {"rows": 24, "labeled_rows": 8, "unlabeled_rows": 16}
    for rows in (dataset, list(dataset)):
        assert describe_distillation(make_trainer(*models, make_args(), collator, rows))["data"] == expected


def test_rows_that_cannot_be_counted(make_args, collator):
    """A guess would be printed as a fact."""
    teacher, student = (make_model(seed=seed, problem="masked_lm") for seed in (1, 2))
    unlabeled = make_dataset().remove_columns("labels")
    found = describe_distillation(make_trainer(student, teacher, make_args(), collator, unlabeled))
    assert found["data"] == {"rows": 24}  # the collator makes the labels
    stream = make_dataset().to_iterable_dataset()
    assert describe_distillation(make_trainer(student, teacher, make_args(), collator, stream))["data"] == {}
    teacher, student = make_model(seed=1), make_model(seed=2)
    args = make_args(task_loss_weight=0.0)
    found = describe_distillation(make_trainer(student, teacher, args, collator, unlabeled))
    assert found["data"] == {"rows": 24, "labeled_rows": 0, "unlabeled_rows": 24}


# The student's start


def start_of(student, teacher, make_args, collator):
    return describe_distillation(make_trainer(student, teacher, make_args(), collator))["student"]["start"]


def test_where_the_first_weights_come_from(make_args, collator, tmp_path):
    """A student of fresh weights would claim its teacher's, or one of another checkpoint be called a copy."""
    teacher = make_model(seed=1)
    common = {"kind": "teacher", "of_layers": 4, "teacher": 0}
    copied = student_from_teacher(teacher, layers=[1, 4])
    assert start_of(copied, teacher, make_args, collator) == {
        **{**common, "init": "copied", "layers": [1, 4], "narrowed": {}},
    }
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    narrow = student_from_teacher(teacher, num_layers=2, **shape)
    sizes = {"hidden_size": [32, 16], "intermediate_size": [64, 32], "num_attention_heads": [4, 2]}
    expected = {**common, "init": "importance", "layers": [2, 4], "narrowed": sizes}
    assert start_of(narrow, teacher, make_args, collator) == expected
    fresh = student_from_teacher(teacher, num_layers=2, hidden_size=16, init="random")
    expected = {**common, "init": "random", "narrowed": {"hidden_size": [32, 16]}}
    assert start_of(fresh, teacher, make_args, collator) == expected

    make_model(seed=2).save_pretrained(tmp_path / "small-bert")
    loaded = MODEL_CLASSES["single_label_classification"].from_pretrained(tmp_path / "small-bert")
    assert start_of(loaded, teacher, make_args, collator) == {"kind": "checkpoint", "name": "small-bert"}
    assert start_of(make_model(seed=2), teacher, make_args, collator) == {"kind": "unknown"}
    # A copy of the teacher's config bears its name.
    teacher.config._name_or_path = str(tmp_path / "teacher")
    same_config = type(teacher)(copy_of(teacher.config))
    assert start_of(same_config, teacher, make_args, collator) == {"kind": "unknown"}


def test_the_start_of_a_student_is_no_part_of_its_config(tmp_path):
    """config.json would carry it, with the teacher's path, to everybody who loads the student."""
    teacher = make_model(seed=1)
    teacher.config._name_or_path = str(tmp_path / "teacher")
    student_from_teacher(teacher, num_layers=2).save_pretrained(tmp_path / "student")
    text = (tmp_path / "student" / "config.json").read_text()
    assert str(tmp_path) not in text and "start" not in json.loads(text)


# Names


def test_nothing_of_the_users_machine(make_args, collator, tmp_path, tokenizer):
    """A path, a token or a host name would be published with the card."""
    teacher_dir = tmp_path / "private" / "sst2-teacher"
    make_model(seed=1).save_pretrained(teacher_dir)
    tokenizer.save_pretrained(teacher_dir)
    (teacher_dir / "README.md").write_text("---\nlicense: mit\nbase_model: acme/bert\n---\n# It\n")
    student = student_from_teacher(MODEL_CLASSES["single_label_classification"].from_pretrained(teacher_dir))
    args = make_args(hub_token="hf_" + "a" * 34, run_name=socket.gethostname(), max_steps=1)
    trainer = make_trainer(student, str(teacher_dir), args, collator, processing_class=tokenizer)
    trainer.train()
    found = describe_distillation(trainer)
    text = json.dumps(found)
    for secret in (str(tmp_path), "private", "hf_aaa", socket.gethostname(), os.sep + "tmp"):
        assert secret not in text
    assert found["teachers"] == [
        {
            **{"name": "sst2-teacher", "license": "mit", "base_model": "acme/bert", "layers": 4, "hidden_size": 32},
            **{"architecture": "BertForSequenceClassification", "model_type": "bert", "num_attention_heads": 4},
            "parameters": student.num_parameters(),
        }
    ]
    assert found["student"]["start"]["teacher"] == 0


def test_a_broken_card_says_nothing(tmp_path):
    """A teacher's README that is no YAML would end the training of its student."""
    make_model().config.save_pretrained(tmp_path)
    config = make_model().config
    config._name_or_path = str(tmp_path)
    for text in ("---\nlicense: [\n---\n", "---\n- a\n---\n", "# none", "---\nlicense: 3\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert identify(config) == {"name": tmp_path.name}
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert identify(config) == {"name": tmp_path.name}


def cached(path, commits, main=None):
    """The Hub's cache of `acme/bert`, with a card for each commit."""
    repository = path / "models--acme--bert"
    for commit in commits:
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "README.md").write_text("---\nlicense: mit\n---\n# It\n")
    if main is not None:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(main)


@pytest.mark.parametrize(
    ("commits", "main", "is_clear"),
    [("a", "a", True), ("a", None, False), ("a", "b", False), ("ab", "a", False)],
    ids=["main", "a revision alone", "another main", "two"],
)
def test_a_commit_is_named_only_where_it_is_clear(tmp_path, monkeypatch, commits, main, is_clear):
    """The card would name a commit, and take over a licence, of files that were never loaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, [commit * 40 for commit in commits], main and main * 40)
    config = make_model().config
    config._name_or_path, config._commit_hash = "acme/bert", None
    known = {"revision": "a" * 40, "license": "mit"} if is_clear else {}
    assert identify(config) == {"name": "acme/bert", "is_hub_id": True, **known}


# The training


def test_training_facts(make_args, collator):
    """The batch of one device would be given as that of the run, and the defaults as choices."""
    args = make_args(gradient_accumulation_steps=3, weight_decay=0.01, seed=7, lr_scheduler_type="cosine", max_steps=2)
    trainer, _ = train(make_model(seed=2), make_model(seed=1), args, collator)
    found = describe_distillation(trainer)["training"]
    assert found == {
        **{"steps": 2, "planned_steps": 2, "epochs": 2.0, "resumed_at_steps": [], "batch_size": 24, "processes": 1},
        **{"gradient_accumulation_steps": 3, "precision": "float32", "seed": 7, "optimizer": "AdamW"},
        **{"learning_rate": 0.001, "arguments": {"lr_scheduler_type": "cosine", "weight_decay": 0.01}},
    }


def test_zero_is_a_choice(make_args, collator):
    """A training without clipping would read as one with the default."""
    trainer = make_trainer(make_model(seed=2), make_model(seed=1), make_args(max_grad_norm=0.0), collator)
    arguments = describe_distillation(trainer)["training"]["arguments"]
    assert arguments == {"lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def test_weights_in_bfloat16_are_named(make_args, collator):
    """Half the digits would be published as float32."""
    student = make_model(seed=2).to(torch.bfloat16)
    trainer = make_trainer(student, make_model(seed=1), make_args(), collator)
    assert describe_distillation(trainer)["training"]["precision"] == "bfloat16"


def test_an_optimizer_of_the_users_own(make_args, collator):
    """The arguments describe another one, which never ran."""
    student = make_model(seed=2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.25)
    args = make_args(learning_rate=1e-3, max_steps=1, lr_scheduler_type="linear")
    trainer = make_trainer(student, make_model(seed=1), args, collator, optimizers=(optimizer, None))
    trainer.train()
    found = describe_distillation(trainer)["training"]
    assert (found["optimizer"], found["learning_rate"]) == ("SGD", 0.25)


# Evaluations


class EvaluateAt(KillAt):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = state.global_step == self.step


def accuracy(evaluation):
    return {"accuracy": float((evaluation.predictions.argmax(-1) == evaluation.label_ids).mean())}


def test_only_the_final_weights_are_reported(make_args, collator):
    """The metric of an earlier step would stand in the card of the last one."""
    options = {"eval_dataset": make_dataset(num_rows=8), "compute_metrics": accuracy, "callbacks": [EvaluateAt(3)]}
    trainer = make_trainer(make_model(seed=2), make_model(seed=1), make_args(), collator, **options)
    trainer.train()
    assert any(log["step"] == 3 and "eval_accuracy" in log for log in trainer.state.log_history)
    found = describe_distillation(trainer)
    assert "evaluation" not in found and found["data"]["evaluation_rows"] == {"eval": 8}
    metrics = trainer.evaluate()
    found = describe_distillation(trainer)["evaluation"]
    assert found == {"eval": {"loss": metrics["eval_loss"], "accuracy": metrics["eval_accuracy"]}}


def test_the_best_weights_were_put_back(make_args, collator):
    """They are not those of the last step, and neither is their metric."""
    args = make_args(
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2},
        **{"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.5},
    )
    options = {"eval_dataset": make_dataset(num_rows=8), "compute_metrics": accuracy}
    trainer = make_trainer(make_model(seed=2), make_model(seed=1), args, collator, **options)
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = min(losses, key=losses.get)
    found = describe_distillation(trainer)
    assert best < 2 and found["training"]["best_step"] == best
    assert found["evaluation"]["eval"]["loss"] == losses[best]
    assert found["training"]["arguments"]["load_best_model_at_end"] is True


def test_results_of_the_folder(make_args, collator, tmp_path):
    """Rows of a recipe would be lost, or those of an earlier training be kept for a student that is gone."""
    path = tmp_path / "out" / "results.json"
    path.parent.mkdir()
    row = {"role": "student", "task": "sst2", "seed": 1, "metrics": {"validation": {"accuracy": 0.5}}}
    write_results(path, [row], export={"backend": "optimum"})
    os.utime(path, (1, 1))
    trainer = make_trainer(
        *(make_model(seed=2), make_model(seed=1), make_args(max_steps=1), collator),
        **{"eval_dataset": make_dataset(num_rows=8), "compute_metrics": accuracy},
    )
    trainer.train()
    record_distillation(trainer)
    found = read_results(path)
    assert found["rows"] == [] and "export" not in found and found["distillation"]["training"]["steps"] == 1

    metrics = trainer.evaluate()
    for _ in range(2):  # its own row is made anew
        record_distillation(trainer)
        (made,) = read_results(path)["rows"]
        assert made["metrics"]["eval"]["accuracy"] == metrics["eval_accuracy"]
        assert made["main_metric"] == {"split": "eval", "name": "accuracy"} and made["role"] == "student"

    write_results(path, [row], distillation={"data": {"task": "sst2"}}, comparisons=[])
    record_distillation(trainer)
    found = read_results(path)
    assert found["rows"] == [row] and found["comparisons"] == []
    assert found["distillation"]["data"]["task"] == "sst2" and found["distillation"]["data"]["rows"] == 24


def trained(make_args, collator, **changes):
    options = {"eval_dataset": make_dataset(num_rows=8), "compute_metrics": accuracy}
    args = make_args(max_steps=1, **changes)
    trainer = make_trainer(make_model(seed=2), make_model(seed=1), args, collator, **options)
    trainer.train()
    trainer.save_model()
    record_distillation(trainer)
    return trainer


def test_a_trainer_that_has_not_trained_keeps_the_history(make_args, collator, tmp_path):
    """To evaluate a student once more and push it would publish it as one of 0 steps."""
    trained(make_args, collator, seed=7)
    path = tmp_path / "out" / "results.json"
    before = read_results(path)
    assert before["rows"] == [] and "evaluation" not in before["distillation"]
    student = MODEL_CLASSES["single_label_classification"].from_pretrained(tmp_path / "out")
    options = {"eval_dataset": make_dataset(num_rows=6), "compute_metrics": accuracy}
    trainer = make_trainer(student, make_model(seed=1), make_args(), collator, **options)
    record_distillation(trainer)
    assert read_results(path) == before
    metrics = trainer.evaluate()
    for _ in range(2):
        record_distillation(trainer)
        after = read_results(path)
        (row,) = after["rows"]
        assert row["metrics"]["eval"]["accuracy"] == metrics["eval_accuracy"]
        assert (row["seed"], row["steps"]) == (7, 1)
        assert after["distillation"].pop("evaluation") == row["metrics"]
        assert after["distillation"]["data"].pop("evaluation_rows") == {"eval": 6}
    del before["distillation"]["data"]["evaluation_rows"]
    assert after["distillation"] == before["distillation"] and after["run"] == before["run"]


def deployed(folder):
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    names = ("onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/export_report.json", "report.md", "pareto.png")
    for path in (folder / name for name in names):
        path.write_bytes(b"{}")
    return [folder / name for name in names]


def test_an_earlier_students_files_go_with_it(make_args, collator, tmp_path):
    """The ONNX file of the student before would be published beside the weights of this one."""
    folder = tmp_path / "out"
    files = deployed(folder)
    (folder / "notes.md").write_text("mine")
    for path in files:
        os.utime(path, (1, 1))
    trainer = trained(make_args, collator)
    assert not any(path.exists() for path in files) and (folder / "notes.md").exists()
    (folder / "results.json").unlink()
    deployed(folder)  # of this training, without a results.json
    record_distillation(trainer)
    assert all(path.exists() for path in files)
    remove_deployment(folder)
    assert not any(path.exists() for path in files) and (folder / "model.safetensors").exists()
    remove_deployment(tmp_path / "nothing")
