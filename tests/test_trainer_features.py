"""What `Trainer` can do, `DistillationTrainer` does alike: each feature beside a `Trainer` with the task term alone,
and with a teacher where it could be in the way."""

import os
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import copy_of, make_dataset, make_model, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import Record
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_kd import DistillationTrainer, LogitTerm
from hf_kd.compat import length_grouping


ONLY_TASK = {"task_loss_weight": 1.0, "logit_loss_weight": 0.0}
# The student is narrower than its teacher, so that there are projections too.
DISTILLED = {"hidden_loss_weight": 0.7, "relation_loss_weight": 0.2}


class Events(TrainerCallback):
    """Notes each event with the step at which it comes."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda args, state, control, **kwargs: self.events.append((name, state.global_step, sorted(kwargs)))


@pytest.fixture
def student():
    return make_model(seed=2, num_hidden_layers=2, hidden_size=16)


@pytest.fixture
def make_both(make_args, collator, student, tmp_path):
    """A `Trainer` and a `DistillationTrainer` with the task term alone, with equal students, arguments and data."""

    def make_both(trainer_classes=(Trainer, DistillationTrainer), model=student, callbacks=list, **changes):
        settings = {
            "train_dataset": make_dataset(),
            "eval_dataset": make_dataset(13, seed=3),
            "data_collator": collator,
        }
        for name in (*settings, "compute_metrics", "optimizers", "optimizer_cls_and_kwargs", "compute_loss_func"):
            if name in changes:
                settings[name] = changes.pop(name)
        made = []
        for trainer_class in trainer_classes:
            is_ours = issubclass(trainer_class, DistillationTrainer)
            folder = str(tmp_path / ("ours" if is_ours else "theirs"))
            kind = {**ONLY_TASK} if is_ours else {"cls": TrainingArguments}
            args = make_args(**{**kind, "output_dir": folder, **changes})
            record = Record()
            given = {name: value() if name == "optimizers" else value for name, value in settings.items()}
            trainer = trainer_class(copy_of(model), args, callbacks=[record, *callbacks()], **given)
            made.append((trainer, record))
        return made

    return make_both


def assert_same_training(both):
    """The same weights after each step, and the same logs but for the value of the term and times."""
    (_, theirs), (_, ours) = both
    assert len(theirs.weights) == len(ours.weights) > 0
    for mine, reference in zip(ours.weights, theirs.weights, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6)
    for log, reference in zip(ours.logs, theirs.logs, strict=True):
        assert set(log) - {"task_loss"} == set(reference)
        for name in reference:
            if "runtime" not in name and "per_second" not in name and name != "total_flos":
                assert log[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-4), name


def train_both(both, **kwargs):
    for trainer, _ in both:
        set_seed(42)  # samplers and noise draw from it, and Trainer sets it in __init__ alone
        trainer.train(**kwargs)
    assert_same_training(both)


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": None, "weight_decay": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"torch_empty_cache_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"label_names": ["labels"]},
        {"label_smoothing_factor": 0.2, "eval_strategy": "steps", "eval_steps": 2},
        {"remove_unused_columns": False},
        {"lr_scheduler_type": "cosine_with_restarts", "warmup_steps": 2, "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 7, "max_steps": -1, "num_train_epochs": 1},
        {"logging_strategy": "epoch", "eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
        {"include_num_input_tokens_seen": True},
    ],
    ids=lambda changes: "-".join(changes)[:40],
)
def test_arguments_do_what_they_do_in_trainer(make_both, changes):
    """An argument that our own step passes over would be set, logged in the card, and change nothing."""
    both = make_both(**changes)
    train_both(both)
    is_checkpointed = changes.get("gradient_checkpointing", False)
    assert [trainer.model.is_gradient_checkpointing for trainer, _ in both] == [is_checkpointed] * 2


class Seen(NamedTuple):
    """What a run with a teacher showed: the weights after each step, and in each batch what the teacher's embeddings
    made of it and how long its rows are."""

    trainer: DistillationTrainer
    weights: list
    embedded: list
    lengths: list


@pytest.fixture
def distill(make_args, collator, student):
    """Train with a teacher and projections, which must not be where arguments of the student's training reach."""

    def distill(num_rows=24, **changes):
        teacher, record, embedded, lengths = make_model(seed=1), Record(), [], []
        teacher.bert.embeddings.register_forward_hook(lambda module, inputs, output: embedded.append(output))
        teacher.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["attention_mask"].sum(dim=1)), with_kwargs=True
        )
        trainer = DistillationTrainer(
            copy_of(student),
            make_args(**DISTILLED, **changes),
            teacher_model=teacher,
            train_dataset=make_dataset(num_rows),
            data_collator=collator,
            callbacks=[record],
        )
        before = [p.detach().clone() for p in trainer.distillation_objective.parameters()]
        trainer.train()
        after = list(trainer.distillation_objective.parameters())
        assert before != [] and not any(torch.equal(p, old) for p, old in zip(after, before, strict=True))
        assert not torch.equal(weights(trainer.model), weights(student))
        assert not teacher.training and all(not p.requires_grad for p in teacher.parameters())
        return Seen(trainer, record.weights, embedded, lengths)

    return distill


SGD = {"optim": "sgd", "learning_rate": 0.05}


@pytest.mark.parametrize(
    ("changes", "name"), [({"optim": "adafactor", "learning_rate": 0.01}, "Adafactor"), (SGD, "SGD")]
)
def test_optimizers_with_a_teacher(distill, changes, name):
    """The projections would be left to another optimizer than the student, or to none."""
    trainer = distill(**changes).trainer
    assert type(trainer.optimizer.optimizer).__name__ == name
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in (*trainer.model.parameters(), *trainer.distillation_objective.parameters())} <= held


def test_noise_is_the_students_alone(distill):
    """A teacher that reads noisy embeddings teaches noise."""
    plain, noisy = distill(), distill(neftune_noise_alpha=5.0)
    assert len(plain.embedded) == 4
    assert all(map(torch.equal, noisy.embedded, plain.embedded))
    assert not any(map(torch.equal, noisy.weights, plain.weights))


def test_grouping_by_length_with_a_teacher(distill):
    """The rows would come in any order, and a long one pad its whole batch."""
    grouped, plain = (distill(96, max_steps=12, **length_grouping(is_on)).lengths for is_on in (True, False))
    assert torch.equal(torch.cat(grouped).sort().values, torch.cat(plain).sort().values)
    padding = [sum((x.max() - x).sum() for x in lengths) for lengths in (grouped, plain)]
    assert padding[0] < padding[1] / 2


def test_emptied_cache_and_accumulation_with_a_teacher(distill):
    """What is emptied or added up in the middle of a step must not be missing from it."""
    plain = distill(**SGD)
    parts = distill(**SGD, torch_empty_cache_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    for found, expected in zip(parts.weights, plain.weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_callbacks_get_the_same_events_in_the_same_order(make_both):
    """A callback that stops, saves or reports at an event of its own would do so at another time, or never."""
    events = []
    both = make_both(callbacks=lambda: [events.append(Events()) or events[-1]], **EVERY_STEP)
    train_both(both)
    for trainer, _ in both:
        trainer.predict(make_dataset(5))
    theirs, ours = (e.events for e in events)
    assert ours == theirs
    assert {"on_step_end", "on_pre_optimizer_step", "on_evaluate", "on_save", "on_predict", "on_log"} <= {
        e[0] for e in ours
    }


def test_early_stopping_and_the_best_model(make_both):
    """Loaded into a student that is not the one that is saved, the best weights would be lost."""
    both = make_both(
        compute_metrics=accuracy,
        callbacks=lambda: [EarlyStoppingCallback(early_stopping_patience=2)],
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        save_total_limit=1,
        max_steps=12,
        learning_rate=1e-2,
        **EVERY_STEP,
    )
    train_both(both)
    (theirs, _), (ours, _) = both
    assert ours.state.global_step == theirs.state.global_step < 12
    names = [os.path.basename(trainer.state.best_model_checkpoint) for trainer, _ in both]
    assert names[0] == names[1] and ours.state.best_metric == theirs.state.best_metric
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=0, atol=1e-6)
    assert sorted(os.listdir(ours.args.output_dir)) == sorted(os.listdir(theirs.args.output_dir))


def test_the_best_student_of_a_distillation(make_args, collator, student, teacher):
    """With projections in the checkpoint too, the best student must still be the one that is evaluated and saved."""
    trainer = DistillationTrainer(
        student,
        make_args(
            load_best_model_at_end=True, save_total_limit=1, max_steps=8, learning_rate=1e-2, **EVERY_STEP, **DISTILLED
        ),
        teacher_model=teacher,
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(13, seed=3),
        data_collator=collator,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert trainer.state.best_metric < trainer.state.log_history[-2]["eval_loss"] + 1e-9
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)
    assert torch.equal(weights(BertForSequenceClassification.from_pretrained(best)), weights(trainer.model))


def smoothed(outputs, labels, num_items_in_batch=None):
    total = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum", label_smoothing=0.3)
    return total / num_items_in_batch


@pytest.mark.parametrize("accumulation", [1, 3])
def test_compute_loss_func(make_both, accumulation):
    """The script's own loss, scaled once more or once less, would train at another learning rate."""
    train_both(
        make_both(
            compute_loss_func=smoothed,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulation,
            eval_strategy="steps",
            eval_steps=2,
        )
    )


# Optimizers


def test_optimizer_by_class(make_both):
    """The class that the script names would be read by nobody, and AdamW train."""
    both = make_both(optimizer_cls_and_kwargs=(torch.optim.RMSprop, {"lr": 1e-3, "alpha": 0.9}))
    train_both(both)
    assert isinstance(both[1][0].optimizer.optimizer, torch.optim.RMSprop)


def test_optimizer_of_a_subclass(make_both):
    """A script that overrides create_optimizer, as its documentation says, would train with AdamW."""

    class Slow:
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.SGD(
                [
                    {"params": self.model.bert.parameters(), "lr": 0.01},
                    {"params": self.model.classifier.parameters(), "lr": 0.1},
                ]
            )
            return self.optimizer

    classes = type("Theirs", (Slow, Trainer), {}), type("Ours", (Slow, DistillationTrainer), {})
    both = make_both(trainer_classes=classes)
    train_both(both)
    assert [len(trainer.optimizer.param_groups) for trainer, _ in both] == [2, 2]


def test_optimizer_and_schedule_as_objects(make_args, collator, student):
    """Given by the script, they hold the parameters of its model: the trainer must not make others."""
    found = []
    for trainer_class, kind in ((Trainer, {"cls": TrainingArguments}), (DistillationTrainer, ONLY_TASK)):
        model = copy_of(student)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
        record = Record()
        trainer = trainer_class(
            model,
            make_args(**kind),
            train_dataset=make_dataset(),
            data_collator=collator,
            callbacks=[record],
            optimizers=(optimizer, schedule),
        )
        trainer.train()
        found.append((trainer, record))
    assert_same_training(found)
    assert found[1][0].optimizer.optimizer is optimizer and optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


# Checkpoints


@pytest.mark.parametrize("changes", [{}, {"ignore_data_skip": True}], ids=["skips data", "ignore_data_skip"])
def test_resume_from_the_last_checkpoint(make_both, changes):
    """`resume_from_checkpoint=True` finds the last of output_dir; the rows that follow are those of `Trainer`."""
    train_both(make_both(max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1, **changes))
    both = make_both(max_steps=7, save_strategy="steps", save_steps=2, **changes)
    train_both(both, resume_from_checkpoint=True)
    assert [len(record.weights) for _, record in both] == [3, 3]


def test_save_total_limit(make_both):
    """Checkpoints would fill the disk, or the last ones be those that are deleted."""
    both = make_both(max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2)
    train_both(both)
    left = [sorted(name for name in os.listdir(trainer.args.output_dir)) for trainer, _ in both]
    assert left[0] == left[1] == ["checkpoint-3", "checkpoint-4"]


class Small(BertForSequenceClassification):
    """A student whose device holds four rows."""

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None):
        if self.training and len(input_ids) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(input_ids, attention_mask, token_type_ids, labels=labels)


@pytest.fixture
def small_student(student):
    small = Small(student.config)
    small.load_state_dict(student.state_dict())
    return small


def test_auto_find_batch_size(make_both, small_student):
    """The attempt that failed must not count: the size found and the rows are those of `Trainer`."""
    both = make_both(model=small_student, auto_find_batch_size=True, per_device_train_batch_size=5)
    train_both(both)
    (theirs, _), (ours, _) = both
    assert ours._train_batch_size == theirs._train_batch_size == 4


def test_auto_find_batch_size_with_a_teacher(make_args, collator, student, small_student, teacher):
    """What an attempt computed before it failed would be in the first line of the log."""
    found, size = [], 5
    for model in (small_student, student):
        record = Record()
        trainer = DistillationTrainer(
            copy_of(model),
            make_args(per_device_train_batch_size=size, auto_find_batch_size=size == 5, **DISTILLED),
            teacher_model=teacher,
            train_dataset=make_dataset(),
            data_collator=collator,
            callbacks=[record],
        )
        set_seed(42)
        trainer.train()
        size = trainer._train_batch_size
        found.append(record)
    logs = [[log for log in record.logs if "loss" in log] for record in found]
    for log, expected in zip(*logs, strict=True):
        assert log == pytest.approx(expected, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(found[0].weights[-1], found[1].weights[-1], rtol=0, atol=1e-6)


# Evaluation


def test_prediction_and_evaluation_of_other_datasets(make_both):
    """Rows of other columns, without labels or with some missing: what a test set looks like."""
    others = {
        "more columns": make_dataset(9, seed=4).add_column("idx", list(range(9))).add_column("text", ["a text"] * 9),
        "fewer columns": make_dataset(9, seed=5).remove_columns("token_type_ids"),
        "pairs": make_dataset(9, seed=6, pairs=True),
        "unlabelled": make_dataset(9, seed=7).remove_columns("labels"),
        "partly labelled": make_dataset(9, seed=8, unlabeled_share=0.5),
    }
    (theirs, _), (ours, _) = make_both()
    for name, dataset in others.items():
        expected, found = theirs.predict(dataset), ours.predict(dataset)
        np.testing.assert_allclose(found.predictions, expected.predictions, atol=1e-6, err_msg=name)
        assert (found.label_ids is None) == (expected.label_ids is None) == (name == "unlabelled")
        scores, reference = (
            ours.evaluate(dataset, metric_key_prefix="x"),
            theirs.evaluate(dataset, metric_key_prefix="x"),
        )
        assert set(scores) == set(reference), name
        if "x_loss" in reference:
            assert scores["x_loss"] == pytest.approx(reference["x_loss"], rel=1e-5), name


def test_several_evaluation_sets_and_what_metrics_see(make_both):
    """Metrics of each set under its name, with the inputs and losses that compute_metrics asked for."""
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.inputs.copy(), np.array(prediction.losses)))
        return {"rows": len(prediction.predictions)}

    both = make_both(
        eval_dataset={"first": make_dataset(9, seed=4), "second": make_dataset(5, seed=5)},
        compute_metrics=compute_metrics,
        include_for_metrics=["inputs", "loss"],
        eval_strategy="steps",
        eval_steps=2,
    )
    train_both(both)
    half = len(seen) // 2
    assert half == 4
    for (inputs, losses), (expected_inputs, expected_losses) in zip(seen[half:], seen[:half], strict=True):
        np.testing.assert_array_equal(inputs, expected_inputs)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    names = {name for log in both[1][1].logs for name in log}
    assert {"eval_first_loss", "eval_first_rows", "eval_second_loss", "eval_second_rows"} <= names


# Data


class Stream(torch.utils.data.IterableDataset):
    """Rows that come one by one, and whose number nobody knows."""

    def __iter__(self):
        return iter(make_dataset().to_list())


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_streams(make_both, kind):
    """Without a length there is no last step to look ahead to; 24 rows in batches of 10 end an epoch in its midst."""
    stream = Stream() if kind == "torch" else make_dataset().to_iterable_dataset(num_shards=3).shuffle(seed=1)
    train_both(make_both(train_dataset=stream, per_device_train_batch_size=10))


def test_streams_with_a_teacher(make_args, collator, teacher):
    """The teacher's columns must stay, and accumulated steps be those of the same rows in memory."""

    class InOrder(DistillationTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    found = []
    for dataset, accumulation in ((make_dataset().to_iterable_dataset(), 2), (make_dataset(), 1)):
        record = Record()
        changes = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
        trainer = (InOrder if accumulation == 1 else DistillationTrainer)(
            make_model("distilbert", seed=2, num_hidden_layers=2, hidden_size=16),
            make_args(optim="sgd", learning_rate=0.05, hidden_loss_weight=0.7, **changes),
            teacher_model=teacher,
            train_dataset=dataset,
            data_collator=collator,
            callbacks=[record],
        )
        trainer.train()
        found.append(record)
    for streamed, expected in zip(*[record.weights for record in found], strict=True):
        torch.testing.assert_close(streamed, expected, rtol=0, atol=1e-6)


def test_grouping_by_length(make_both):
    """Every row once in an epoch, beside rows of its length. The order is that of ResumableTrainer."""
    both = make_both(train_dataset=make_dataset(400), **length_grouping())
    lengths = [[batch["attention_mask"].sum(dim=1) for batch in trainer.get_train_dataloader()] for trainer, _ in both]
    theirs, ours = (torch.cat(of_batches).sort().values for of_batches in lengths)
    assert torch.equal(ours, theirs)
    # A row among random ones is padded by 4 tokens on average.
    assert all(sum((x.max() - x).sum() for x in of_batches) < 400 for of_batches in lengths)


class Tokenizing:
    """A collator that reads texts, as `remove_unused_columns=False` is for."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, rows):
        batch = self.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def test_collators_of_texts(make_both, tokenizer):
    """The column that the collator reads, and no model does, would be dropped before it."""
    rows = make_dataset().map(
        lambda row: {"text": " ".join(tokenizer.convert_ids_to_tokens(row["input_ids"])[1:-1])},
        remove_columns=["input_ids", "token_type_ids", "attention_mask"],
    )
    train_both(make_both(train_dataset=rows, data_collator=Tokenizing(tokenizer), remove_unused_columns=False))


# Search


def test_search_over_weights_and_temperature(make_args, collator, teacher):
    """Were the terms those of the first trial, every trial would be trained alike and the search choose at random."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    data, eval_data = make_dataset(), make_dataset(13, seed=3)
    trained = []

    class Note(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            (term,) = (term for term in trainer.distillation_objective.terms if isinstance(term, LogitTerm))
            trained.append((term.temperature, term.weight, args.learning_rate, weights(trainer.model)))

    def model_init():
        return make_model(seed=2, num_hidden_layers=2, hidden_size=16)

    def make_trainer(**changes):
        return DistillationTrainer(
            args=make_args(**{**DISTILLED, **changes}),
            model_init=model_init,
            teacher_model=teacher,
            train_dataset=data,
            eval_dataset=eval_data,
            data_collator=collator,
        )

    trainer = make_trainer()
    trainer.add_callback(Note())
    best = trainer.hyperparameter_search(
        lambda trial: {
            "temperature": trial.suggest_float("temperature", 1.0, 8.0),
            "logit_loss_weight": trial.suggest_float("logit_loss_weight", 0.1, 2.0),
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        },
        backend="optuna",
        n_trials=3,
        sampler=optuna.samplers.RandomSampler(seed=0),
        compute_objective=lambda metrics: metrics["eval_loss"],
        direction="minimize",
    )
    assert len({(temperature, weight) for temperature, weight, *_ in trained}) == 3
    assert best.hyperparameters["temperature"] in [temperature for temperature, *_ in trained]
    chosen = [w for t, *_, w in trained if t == best.hyperparameters["temperature"]]
    alone = make_trainer(**best.hyperparameters)
    alone.train()
    assert torch.equal(chosen[0], weights(alone.model))
    assert alone.evaluate()["eval_loss"] == pytest.approx(best.objective, rel=1e-6)


# Reports


def test_tensorboard_shows_what_it_does_for_trainer(make_both):
    """Curves under other names or at other steps would not lie over those of the runs before."""
    both = make_both(report_to=["tensorboard"], eval_strategy="steps", eval_steps=2)
    train_both(both)
    curves = []
    for trainer, _ in both:
        (folder,) = {root for root, _, names in os.walk(trainer.args.output_dir) for n in names if "events.out" in n}
        events = EventAccumulator(folder).Reload()
        curves.append({tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    assert curves[1].pop("train/task_loss") == [1, 2, 3, 4]
    assert curves[1] == curves[0]


def test_mlflow_shows_what_it_does_for_trainer(make_both, tmp_path, monkeypatch):
    """A value that is no number, or an argument that is none of theirs, stops some back ends in the first step."""
    monkeypatch.delenv("DISABLE_MLFLOW_INTEGRATION", raising=False)
    mlflow = pytest.importorskip("mlflow", reason="install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    both = make_both(report_to=["mlflow"], eval_strategy="steps", eval_steps=2)
    train_both(both)
    ours, theirs = mlflow.search_runs(output_format="list", search_all_experiments=True)
    assert set(ours.data.metrics) - {"task_loss"} == set(theirs.data.metrics)
    assert ours.data.params["task_loss_weight"] == "1.0" and "task_loss_weight" not in theirs.data.params
