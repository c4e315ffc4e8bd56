"""The rules that a distillation run keeps (design: drop-in, invariant, frozen teacher, projections, one gradient
path)."""

import gc
import os
import weakref
from dataclasses import dataclass

import pytest
import torch
from conftest import copy_of, make_dataset, make_model, weights
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_kd import (
    AttentionTerm,
    DistillationObjective,
    DistillationTrainer,
    DistillationTrainingArguments,
    HiddenTerm,
    LogitTerm,
    TaskTerm,
)
from hf_kd.objective import losses


ALL_TERMS = {"hidden_loss_weight": 0.7, "attention_loss_weight": 0.3}
# Adam divides by the gradient's own size and so magnifies rounding; SGD keeps equal gradients equal.
SGD = {"optim": "sgd", "learning_rate": 0.05}


class Record(TrainerCallback):
    """Keeps the weights after every step, and the logs."""

    def __init__(self):
        self.weights, self.logs = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def train(student, teacher, args, collator, dataset=None, **kwargs):
    """Train a copy of the student; the trainer and the record of the run."""
    record = Record()
    trainer = DistillationTrainer(
        copy_of(student),
        args,
        teacher_model=teacher,
        train_dataset=make_dataset() if dataset is None else dataset,
        data_collator=collator,
        callbacks=[record],
        **kwargs,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer, record


@pytest.mark.parametrize("changes", [{}, {"label_smoothing_factor": 0.1}, {"weight_decay": 0.1, "max_grad_norm": 0.1}])
@pytest.mark.parametrize("num_labels", [2, 1])
def test_drop_in_for_trainer(student, collator, make_args, changes, num_labels):
    """With the task term alone, any difference to `Trainer` in any step would be a change of somebody's baseline."""
    if num_labels == 1 and "label_smoothing_factor" in changes:
        pytest.skip("label smoothing is for classes")
    student, data = make_model(num_hidden_layers=2, num_labels=num_labels), make_dataset(num_labels=num_labels)
    record = Record()
    args = make_args(TrainingArguments, **changes)
    Trainer(copy_of(student), args, train_dataset=data, data_collator=collator, callbacks=[record]).train()

    args = make_args(task_loss_weight=1.0, logit_loss_weight=0.0, **changes)
    _, ours = train(student, None, args, collator, data)

    assert len(ours.weights) == len(record.weights) == 4
    for step, (mine, reference) in enumerate(zip(ours.weights, record.weights, strict=True)):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-7, msg=f"step {step}")
    assert [log["loss"] for log in ours.logs[:4]] == pytest.approx([log["loss"] for log in record.logs[:4]], abs=1e-4)


def test_plain_training_arguments_get_the_defaults(student, teacher, collator, make_args):
    """A `Trainer` script keeps its own TrainingArguments: every one of their values must survive."""
    plain = make_args(TrainingArguments, learning_rate=3e-4, warmup_steps=2, seed=7)
    trainer, record = train(student, teacher, plain, collator)
    assert isinstance(trainer.args, DistillationTrainingArguments)
    assert (trainer.args.learning_rate, trainer.args.warmup_steps, trainer.args.seed) == (3e-4, 2, 7)
    assert not isinstance(plain, DistillationTrainingArguments)
    assert {"task_loss", "logit_loss"} <= set(record.logs[0])


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_padding_changes_nothing(family, tokenizer, make_args):
    """A term that counts padding would weigh a batch by its longest row."""
    student, teacher = make_model(family, 2, num_hidden_layers=2, hidden_size=16), make_model(family, 1)
    results = []
    for multiple in (1, 40):
        collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
        args = make_args(attention_loss_type="kl", **ALL_TERMS, **SGD)
        trainer, record = train(student, teacher, args, collator, make_dataset(unlabeled_share=0.3))
        results.append((weights(trainer.model), [log["attention_loss"] for log in record.logs[:4]]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)


@pytest.mark.parametrize("num_rows", [32, 27], ids=["even", "last batch incomplete"])
def test_accumulation_changes_nothing(student, teacher, collator, make_args, num_rows):
    """Means of ragged micro-batches are not the mean of the batch; #47688 even multiplies them by the steps."""
    data = make_dataset(num_rows, unlabeled_share=0.4)
    results = []
    for batch_size, steps in ((8, 1), (4, 2), (2, 4)):
        args = make_args(per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps, **ALL_TERMS, **SGD)
        trainer, record = train(student, teacher, args, collator, data)
        results.append((weights(trainer.model), record.logs[:4]))
    for result, logs in results[1:]:
        torch.testing.assert_close(result, results[0][0], rtol=0, atol=1e-6)
        for log, reference in zip(logs, results[0][1], strict=True):
            for name in ("task_loss", "logit_loss", "hidden_loss", "attention_loss", "grad_norm"):
                assert log[name] == pytest.approx(reference[name], rel=1e-3), name


def test_unlabeled_rows_lose_the_task_term_alone(student, teacher, collator, make_args):
    """A row of -100 must not be learned as a class or a value, nor thin out the other rows' task loss."""
    data = make_dataset(8, unlabeled_share=0.5)
    labeled = data.filter(lambda row: row["labels"] != -100)
    assert 0 < len(labeled) < len(data)
    only_task = {"task_loss_weight": 1.0, "logit_loss_weight": 0.0, "max_steps": 1, **SGD}
    mixed, mixed_record = train(student, teacher, make_args(**only_task), collator, data)
    alone, alone_record = train(student, teacher, make_args(**only_task), collator, labeled)
    torch.testing.assert_close(weights(mixed.model), weights(alone.model), rtol=0, atol=1e-6)
    assert mixed_record.logs[0]["task_loss"] == pytest.approx(alone_record.logs[0]["task_loss"], rel=1e-5)


@pytest.mark.parametrize("num_labels", [2, 1])
def test_text_without_any_label_still_teaches(collator, make_args, num_labels):
    """A batch with nothing labelled must give a task loss of 0, not NaN, and move the student by the teacher alone."""
    student, teacher = (
        make_model(seed=2, num_hidden_layers=2, num_labels=num_labels),
        make_model(seed=1, num_labels=num_labels),
    )
    data = make_dataset(unlabeled_share=1.0, num_labels=num_labels)
    with_task, record = train(student, teacher, make_args(), collator, data)
    assert record.logs[0]["task_loss"] == 0.0
    without_task, _ = train(student, teacher, make_args(task_loss_weight=0.0), collator, data)
    assert torch.equal(weights(with_task.model), weights(without_task.model))
    assert not torch.equal(weights(with_task.model), weights(student))


def test_regression_distils_the_value(collator, make_args):
    """A softmax over one logit is always 1: STS-B students would silently learn from labels alone."""
    student, teacher = make_model(seed=2, num_hidden_layers=2, num_labels=1), make_model(seed=1, num_labels=1)
    args = make_args(task_loss_weight=0.0, logit_loss_weight=1.0, max_steps=60, learning_rate=3e-3, logging_steps=20)
    _, record = train(student, teacher, args, collator, make_dataset(16, num_labels=1))
    losses = [log["logit_loss"] for log in record.logs if "logit_loss" in log]
    assert 0 < losses[-1] < losses[0] / 2


def test_student_approaches_teacher_under_each_term(teacher, collator, make_args):
    """A term whose gradient is cut or reversed would be logged all the same."""
    student = make_model(seed=2, num_hidden_layers=2, hidden_size=16)
    off = dict.fromkeys(("task_loss_weight", "logit_loss_weight", "hidden_loss_weight", "attention_loss_weight"), 0.0)
    for name in ("logit_loss", "hidden_loss", "attention_loss"):
        args = make_args(max_steps=60, learning_rate=3e-3, logging_steps=20, **{**off, f"{name}_weight": 1.0})
        _, record = train(student, teacher, args, collator, make_dataset(16))
        losses = [log[name] for log in record.logs if name in log]
        assert losses[-1] < 0.7 * losses[0], name


def test_teacher_is_untouched_and_saved_nowhere(student, teacher, collator, make_args):
    """A teacher in train mode, in the optimizer or in the checkpoint is the commonest defect of such trainers."""
    before = weights(teacher)
    trainer, _ = train(student, teacher, make_args(save_strategy="steps", save_steps=2, **ALL_TERMS), collator)
    assert torch.equal(weights(teacher), before)
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in teacher.parameters()}
    checkpoint = os.path.join(trainer.args.output_dir, "checkpoint-2")
    assert set(load_file(os.path.join(checkpoint, "model.safetensors"))) == set(student.state_dict())


def test_teacher_may_be_a_path(student, teacher, collator, make_args, tmp_path):
    """A teacher loaded from a folder teaches exactly as the model in memory."""
    teacher.save_pretrained(tmp_path / "teacher")
    by_path, _ = train(student, str(tmp_path / "teacher"), make_args(), collator)
    by_model, _ = train(student, teacher, make_args(), collator)
    assert torch.equal(weights(by_path.model), weights(by_model.model))


def test_teacher_runs_in_its_own_dtype(student, teacher, collator, make_args):
    """teacher_dtype must change the teacher and leave the student in float32."""
    trainer, record = train(student, copy_of(teacher), make_args(teacher_dtype="bfloat16"), collator)
    assert {p.dtype for p in trainer.teacher.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    _, reference = train(student, teacher, make_args(), collator)
    assert record.logs[0]["logit_loss"] == pytest.approx(reference.logs[0]["logit_loss"], rel=0.2)
    assert record.logs[0]["logit_loss"] != reference.logs[0]["logit_loss"]


@pytest.mark.parametrize(
    ("attention_loss_type", "module", "name"),
    [("mse", losses.slices, "_squared_error"), ("kl", losses, "attention_scores")],
)
def test_losses_are_float32_under_bf16(
    student, teacher, collator, make_args, monkeypatch, attention_loss_type, module, name
):
    """Under autocast, scores recomputed from q and k and the projection would be rounded to bfloat16."""
    seen, original = set(), getattr(module, name)

    def spy(*args):
        made = original(*args)
        results = [made[0], *made[1]] if isinstance(made, tuple) else [made]
        seen.update(tensor.dtype for tensor in results)
        assert not torch.is_autocast_enabled("cpu")
        return made

    monkeypatch.setattr(module, name, spy)
    changes = {"bf16": True, "max_steps": 1, "attention_loss_type": attention_loss_type, **ALL_TERMS}
    train(student, teacher, make_args(**changes), collator)
    assert seen == {torch.float32}


def test_each_model_reads_its_own_columns(teacher, collator, make_args):
    """A DistilBERT student makes `Trainer` drop token_type_ids, and its BERT teacher then reads pairs as one
    segment."""
    seen = []
    handle = teacher.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    train(
        make_model("distilbert", 2, num_hidden_layers=2),
        teacher,
        make_args(max_steps=1),
        collator,
        make_dataset(pairs=True),
    )
    handle.remove()
    assert seen[0]["token_type_ids"].sum() > 0
    assert "labels" not in seen[0]


def test_prediction_without_labels(teacher, make_args, collator):
    """Then the Trainer calls the model itself, and DistilBERT knows no token_type_ids, kept for its teacher."""
    student = make_model("distilbert", 2, num_hidden_layers=2)
    trainer = DistillationTrainer(student, make_args(), teacher_model=teacher, data_collator=collator)
    predictions = trainer.predict(make_dataset(10, pairs=True).remove_columns("labels")).predictions
    assert predictions.shape == (10, 2)


def test_model_init_gives_the_student_that_is_read(teacher, make_args, collator):
    """`train` calls model_init again: hooks on the first student would record nothing of the second."""

    def model_init():
        model = make_model(seed=2, num_hidden_layers=2)
        set_seed(42)  # the seed of the run, which shuffles the data
        return model

    args, data = make_args(**ALL_TERMS), make_dataset()
    trainer = DistillationTrainer(
        args=args, model_init=model_init, teacher_model=teacher, train_dataset=data, data_collator=collator
    )
    trainer.train()
    reference, _ = train(model_init(), teacher, args, collator, data)
    assert torch.equal(weights(trainer.model), weights(reference.model))


def test_evaluation_is_that_of_trainer(student, teacher, collator, make_args):
    """In evaluation a running teacher would cost time, and captured states handed to compute_metrics the memory."""
    student.config.output_hidden_states = True
    shapes, calls = [], []
    handle = teacher.register_forward_hook(lambda *args: calls.append(1))

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"rows": len(prediction.predictions)}

    data = make_dataset(num_rows=10)
    trainer = DistillationTrainer(
        student, make_args(**ALL_TERMS), teacher_model=teacher, data_collator=collator, compute_metrics=compute_metrics
    )
    metrics = trainer.evaluate(data)
    handle.remove()
    reference = Trainer(copy_of(student), make_args(TrainingArguments), data_collator=collator).evaluate(data)
    assert shapes == [(10, 2)] and calls == []
    assert metrics["eval_loss"] == pytest.approx(reference["eval_loss"], abs=1e-6)


def test_logged_terms_are_means_over_the_window(student, teacher, collator, make_args):
    """Logging the last micro-batch, or a sum, makes curves that depend on logging_steps."""
    _, each = train(student, teacher, make_args(**ALL_TERMS), collator)
    _, window = train(student, teacher, make_args(logging_steps=4, **ALL_TERMS), collator)
    for name in ("task_loss", "logit_loss", "hidden_loss", "attention_loss"):
        mean = sum(log[name] for log in each.logs[:4]) / 4
        assert window.logs[0][name] == pytest.approx(mean, rel=1e-5)
    log = each.logs[0]
    total = 0.5 * log["task_loss"] + 0.5 * log["logit_loss"] + 0.7 * log["hidden_loss"] + 0.3 * log["attention_loss"]
    assert log["loss"] == pytest.approx(total, abs=1e-3)


def test_saved_student_is_a_plain_checkpoint(teacher, collator, make_args, tmp_path):
    """Whoever loads the student needs transformers alone, and gets the trained weights without projections."""
    student = make_model(seed=2, num_hidden_layers=2, hidden_size=16)
    trainer, _ = train(student, teacher, make_args(**ALL_TERMS), collator)
    trainer.save_model(tmp_path / "saved")
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(weights(loaded), weights(trainer.model))


def test_projection_is_trained_clipped_and_resumed(teacher, collator, make_args):
    """A projection outside the optimizer stays random, with AdamW's own weight decay it drifts, unsaved it
    restarts."""
    student = make_model(seed=2, num_hidden_layers=2, hidden_size=16)
    changes = {
        "hidden_loss_weight": 1.0,
        "weight_decay": 0.3,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 5,
    }
    args = make_args(**changes)
    whole, _ = train(student, teacher, args, collator)
    projection = list(whole.distillation_objective.parameters())
    group = next(g for g in whole.optimizer.param_groups if any(p is projection[0] for p in g["params"]))
    assert len(group["params"]) == len(projection) == 4
    assert (group["lr"], group["weight_decay"]) == (args.learning_rate, 0.3)

    saved = load_file(os.path.join(args.output_dir, "checkpoint-2", "projection.safetensors"))
    last = whole.distillation_objective.state_dict()
    assert set(saved) == set(last) and all(not torch.equal(saved[name], last[name]) for name in last)
    resumed, _ = train(
        student,
        teacher,
        make_args(resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-2"), **changes),
        collator,
    )
    for name, value in resumed.distillation_objective.state_dict().items():
        torch.testing.assert_close(value, last[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=1e-6)


def test_projection_gradient_is_clipped(teacher, collator, make_args):
    """max_grad_norm is applied to the model's parameters alone unless the trainer sees to it."""
    norms = []

    class Norm(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            parameters = trainer.distillation_objective.parameters()
            norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())

    student = make_model(seed=2, num_hidden_layers=2, hidden_size=16)
    args = make_args(hidden_loss_weight=100.0, max_grad_norm=0.01)
    trainer = DistillationTrainer(
        student, args, teacher_model=teacher, train_dataset=make_dataset(), data_collator=collator, callbacks=[Norm()]
    )
    trainer.train()
    assert len(norms) == 4 and max(norms) <= 0.01 + 1e-6


def test_sdpa_and_eager_give_the_same_terms(teacher, collator, make_args):
    """Attention maps do not exist under SDPA; scores recomputed from q and k must not depend on the kernel."""
    logs = []
    for implementation in ("sdpa", "eager"):
        student, other = make_model(seed=2, num_hidden_layers=2), copy_of(teacher)
        student.set_attn_implementation(implementation)
        other.set_attn_implementation(implementation)
        _, record = train(student, other, make_args(**ALL_TERMS), collator)
        logs.append(record.logs)
    for sdpa, eager in zip(logs[0][:4], logs[1][:4], strict=True):
        assert sdpa["attention_loss"] == pytest.approx(eager["attention_loss"], rel=1e-4)
        assert sdpa["hidden_loss"] == pytest.approx(eager["hidden_loss"], rel=1e-4)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}])
def test_gradient_checkpointing_changes_nothing(student, teacher, collator, make_args, kwargs):
    """The reentrant kind, the default of 4.57, drops the gradient of q and k; hooks that run again record twice."""
    for weight in ({"attention_loss_weight": 1.0, "task_loss_weight": 0.0, "logit_loss_weight": 0.0}, ALL_TERMS):
        plain, plain_record = train(student, teacher, make_args(**weight), collator)
        args = make_args(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs, **weight)
        checkpointed, record = train(student, teacher, args, collator)
        torch.testing.assert_close(weights(checkpointed.model), weights(plain.model), rtol=0, atol=1e-6)
        assert record.logs[0]["loss"] == pytest.approx(plain_record.logs[0]["loss"], rel=1e-5)
    assert not torch.equal(weights(plain.model), weights(student))


def test_training_step_does_not_wait_for_the_device(student, teacher, collator, make_args, monkeypatch):
    """`.item()` or a transfer in every step stalls an accelerator, which no test on a CPU would notice."""
    calls = []
    args = make_args(**ALL_TERMS)
    trainer = DistillationTrainer(
        student, args, teacher_model=teacher, train_dataset=make_dataset(), data_collator=collator
    )
    inputs = collator([{k: row[k] for k in row} for row in make_dataset(8).to_list()])
    batches, counts = trainer.get_batch_samples(iter([inputs]), 1, args.device)
    student.train()
    for name in ("item", "tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        spy = lambda self, *a, _name=name, _original=original, **k: (calls.append(_name), _original(self, *a, **k))[1]  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, spy)
    monkeypatch.setattr(trainer.accelerator, "unwrap_model", lambda *a, **k: calls.append("unwrap_model"))
    loss = trainer.compute_loss(student, batches[0], num_items_in_batch=counts)
    monkeypatch.undo()
    assert loss.requires_grad and calls == []


@pytest.mark.parametrize("width", [32, 16])
def test_what_was_read_is_freed_with_the_step(teacher, collator, make_args, width):
    """Kept until the next step, or until the garbage collector comes by, the layers of both models take twice the
    room, and where one batch fitted the second does not."""
    student = make_model(seed=2, num_hidden_layers=2, hidden_size=width)
    args = make_args(relation_loss_weight=0.5, **ALL_TERMS)
    trainer = DistillationTrainer(
        student, args, teacher_model=teacher, train_dataset=make_dataset(), data_collator=collator
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    read = []

    def watch(capture):
        original = capture.signals

        def signals(*inputs):
            found = original(*inputs)
            kinds = (found.hidden, found.queries, found.keys, found.values)
            assert all(kinds)
            tensors = [found.logits, *(tensor for kind in kinds for tensor in kind.values())]
            read.extend(map(weakref.ref, tensors))
            read.extend(weakref.ref(tensor._base) for tensor in tensors if tensor._base is not None)
            return found

        capture.signals = signals

    watch(trainer.capture)
    watch(trainer.teacher.capture)
    alive = []
    add = trainer.numerics.add
    trainer.numerics.add = lambda *parts: (alive.extend(ref() is not None for ref in read), add(*parts))
    batches, counts = trainer.get_batch_samples(iter([collator(make_dataset(8).to_list())]), 1, args.device)
    gc.collect()
    gc.disable()
    try:
        loss = trainer.training_step(trainer.model, batches[0], counts)
        left = [ref() for ref in read if ref() is not None]
    finally:
        gc.enable()
    assert loss.isfinite() and len(alive) >= 20 and sum(alive) >= 10  # those of the teacher are free already
    assert left == []


def test_compute_loss_func_replaces_the_task_loss(student, teacher, collator, make_args):
    """`compute_loss_func` is the Trainer's own way to another task loss, and must keep working with a teacher."""

    def half(outputs, labels, num_items_in_batch=None):
        return 0.5 * torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    trainer, record = train(student, teacher, make_args(max_steps=1), collator, compute_loss_func=half)
    _, reference = train(student, teacher, make_args(max_steps=1), collator)
    assert record.logs[0]["task_loss"] == pytest.approx(0.5 * reference.logs[0]["task_loss"], rel=1e-5)
    plain = Trainer(trainer.model, make_args(TrainingArguments), data_collator=collator, compute_loss_func=half)
    data = make_dataset(10)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(plain.evaluate(data)["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "term", "factor"),
    [
        ({"task_loss_weight": 1.5}, "loss", None),
        ({"logit_loss_weight": 1.5}, "loss", None),
        ({"hidden_loss_weight": 1.5}, "loss", None),
        ({"attention_loss_weight": 1.5}, "loss", None),
        ({"temperature": 5.0}, "logit_loss", None),
        ({"logit_loss_type": "soft_ce"}, "logit_loss", None),
        ({"logit_loss_type": "mse"}, "logit_loss", None),
        ({"hidden_loss_type": "cosine"}, "hidden_loss", None),
        ({"attention_loss_type": "kl"}, "attention_loss", None),
        ({"layer_mapping": "first"}, "hidden_loss", None),
        ({"layer_mapping": "last"}, "attention_loss", None),
        ({"layer_mapping": "1:4,2:1"}, "attention_loss", None),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_each_argument_changes_what_it_says(student, teacher, collator, make_args, changes, term, factor):
    """A field that nothing reads looks like any other in a table of hyperparameters."""
    _, reference = train(student, teacher, make_args(max_steps=1, **ALL_TERMS), collator)
    _, record = train(student, teacher, make_args(**{"max_steps": 1, **ALL_TERMS, **changes}), collator)
    ours, before = record.logs[0], reference.logs[0]
    assert ours[term] != pytest.approx(before[term], rel=1e-3)
    unchanged = {"task_loss", "logit_loss", "hidden_loss", "attention_loss"} - {term}
    if term != "loss":
        unchanged -= {"hidden_loss", "attention_loss"} if "layer_mapping" in changes else set()
    for name in unchanged:
        assert ours[name] == pytest.approx(before[name], rel=1e-5), name


def test_own_training_arguments_stay_readable(student, teacher, collator, make_args):
    """A script whose arguments have fields of their own would fail at the first line that reads one."""

    @dataclass
    class ScriptArguments(TrainingArguments):
        flavour: str = "plain"

    trainer, _ = train(student, teacher, make_args(ScriptArguments, flavour="vanilla", max_steps=1), collator)
    assert trainer.args.flavour == "vanilla" and trainer.args.temperature == 2.0


def test_intermediate_terms_alone_reach_every_parameter(student, teacher, collator, make_args):
    """DDP waits for a gradient of each parameter, and no term but those on logits gives the head one."""
    weights_off = {"task_loss_weight": 0.0, "logit_loss_weight": 0.0, "hidden_loss_weight": 1.0}
    args = make_args(layer_mapping="1:2", **weights_off)
    trainer = DistillationTrainer(
        student, args, teacher_model=teacher, train_dataset=make_dataset(), data_collator=collator
    )
    batches, counts = trainer.get_batch_samples(iter([collator(make_dataset(8).to_list())]), 1, args.device)
    trainer.compute_loss(student.train(), batches[0], num_items_in_batch=counts).backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


def test_objective_of_several_instances(student, teacher, collator, make_args):
    """Several terms of a kind are trained and logged under their own names, with their own layers."""
    objective = DistillationObjective(
        [
            TaskTerm(0.1),
            LogitTerm(1.0, temperature=4.0),
            HiddenTerm(1.0, layers="0:0", name="hidden_loss_embeddings"),
            HiddenTerm(0.5, type="cosine", layers="last", name="hidden_loss_top"),
            AttentionTerm(1.0, type="kl", layers=[(2, 3)]),
        ]
    )
    trainer, record = train(student, teacher, make_args(), collator, objective=objective)
    names = ["task_loss", "logit_loss", "hidden_loss_embeddings", "hidden_loss_top", "attention_loss"]
    assert [name for name in record.logs[0] if name in names] == names
    assert trainer.capture.wanted.hidden == {0, 2} and trainer.teacher.capture.wanted.attention == {3}


def test_objective_does_the_same_without_the_trainer(student, teacher, collator, make_args):
    """A project with its own loop uses the same steps and must get the same loss."""
    from hf_kd.signals import Capture, Teacher

    args = make_args(max_steps=1, per_device_train_batch_size=24, **ALL_TERMS)
    _, record = train(student, teacher, args, collator)
    objective = args.objective().bind(student.config, teacher.config)
    reader = Teacher(teacher, student.config)
    reader.watch(objective.teacher_wanted)
    capture = Capture(student, objective.student_wanted)
    batch = collator(make_dataset().to_list())
    labels = batch.pop("labels")
    with capture:
        outputs = student.train()(**batch)
    loss = objective.weighted_sum(objective(capture.signals(outputs, batch), reader(batch), labels))
    assert loss.item() == pytest.approx(record.logs[0]["loss"], abs=1e-3)


# What a review found


def test_compute_loss_func_is_left_alone_where_no_task_term_is_on(student, teacher, collator, make_args):
    """Unlabelled batches would crash in a function that needs labels, though nothing weighs what it returns."""

    def fail(outputs, labels, num_items_in_batch=None):
        raise AssertionError("called")

    args = make_args(max_steps=1, task_loss_weight=0.0, logit_loss_weight=1.0)
    trainer, _ = train(student, teacher, args, collator, compute_loss_func=fail)
    assert trainer.state.global_step == 1


def test_a_window_without_a_step_is_refused_before_training(student, teacher, collator, make_args):
    """The run would end as if the term had been weighed."""
    args = make_args(max_steps=4, logit_loss_schedule="window:0.3:0.45")
    with pytest.raises(ValueError, match="logit_loss: schedule='window:0.3:0.45' is on at none of the 4 steps"):
        train(student, teacher, args, collator)


def test_a_second_student_gets_projections_of_its_own(teacher, make_args, collator):
    """A fresh student of a given objective would be compared through what the first one learned."""
    objective = DistillationObjective([HiddenTerm(1.0)])
    trainer = DistillationTrainer(
        args=make_args(max_steps=1),
        model_init=lambda: make_model(seed=2, num_hidden_layers=2, hidden_size=16),
        teacher_model=teacher,
        objective=objective,
        train_dataset=make_dataset(),
        data_collator=collator,
    )
    trainer.train()
    learned = [p.detach().clone() for p in objective.parameters()]
    trainer.call_model_init()
    assert len(learned) == len(list(objective.parameters())) == 4
    assert not any(torch.equal(p, old) for p, old in zip(objective.parameters(), learned, strict=True))


def test_masked_language_model_learns_layers_from_plain_text(collator, make_args):
    """MiniLM's own use: text without masks or labels, where no term reads the logits."""
    student = make_model(seed=2, num_hidden_layers=2, problem="masked_lm")
    args = make_args(max_steps=2, task_loss_weight=0.0, logit_loss_weight=0.0, relation_loss_weight=1.0)
    data = make_dataset().remove_columns("labels")
    trainer, _ = train(student, make_model(seed=1, problem="masked_lm"), args, collator, data)
    assert not torch.equal(weights(trainer.model), weights(student))


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_frozen_embeddings_stay_and_the_rest_learns(family, collator, make_args):
    """A table that moved a little would cost what freezing saves, and nothing would tell."""
    student, teacher = make_model(family, seed=2, num_hidden_layers=2), make_model(family, seed=1)
    trained, _ = train(student, teacher, make_args(freeze_embeddings=True, hidden_loss_weight=0.7), collator)
    before, after = student.state_dict(), trained.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("embeddings." in name for name in moved)
    assert {name for name in before if "embeddings." not in name and name.endswith("weight")} <= moved
    free, _ = train(student, teacher, make_args(hidden_loss_weight=0.7), collator)
    assert any("embeddings." in n for n, x in free.model.state_dict().items() if not torch.equal(before[n], x))


@pytest.mark.parametrize("bf16", [True, False])
def test_teacher_runs_in_the_precision_of_the_run(student, teacher, collator, make_args, bf16):
    """A teacher outside the run's autocast would take twice the time, and say other numbers than its cache."""
    batch = dict(collator(make_dataset(4).to_list()))
    batch.pop("labels")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        expected = teacher(**batch).logits
    trainer, _ = train(student, teacher, make_args(bf16=bf16, max_steps=1), collator)
    found = trainer.teacher(batch).logits
    assert found.dtype == (torch.bfloat16 if bf16 else torch.float32) and torch.equal(found, expected)


def test_compiled_models_give_the_same_loss(student, teacher, collator, make_args):
    """Compiled code that left out the teacher, or trained on something else, would be fast and wrong."""
    torch.compiler.reset()
    args = {"logit_loss_weight": 0.9, "task_loss_weight": 0.1, "max_steps": 2, **SGD}
    _, expected = train(student, teacher, make_args(**args), collator)
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer, found = train(student, teacher, make_args(**args, **compiled), collator)
    assert trainer.teacher._run is not trainer.teacher.model
    torch.testing.assert_close(found.weights[-1], expected.weights[-1])
    assert [log["logit_loss"] for log in found.logs if "loss" in log] == pytest.approx(
        [log["logit_loss"] for log in expected.logs if "loss" in log], abs=1e-4
    )


@pytest.mark.parametrize("term", ["hidden", "attention", "relation"])
def test_compiling_what_is_read_by_hooks_is_refused(student, teacher, collator, make_args, term):
    """Compiled code runs without hooks: the terms would fail, or compare what an earlier batch left."""
    args = make_args(torch_compile=True, torch_compile_backend="eager", **{f"{term}_loss_weight": 1.0})
    with pytest.raises(ValueError, match=r"torch_compile runs the forward without the hooks"):
        train(student, teacher, args, collator)


def test_teacher_runs_before_the_student(student, teacher, make_args, collator):
    """After it, what the teacher computes would add to the memory that the student keeps for its backward."""
    order, models = [], {"student": copy_of(student), "teacher": copy_of(teacher)}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    trainer = DistillationTrainer(
        models["student"],
        make_args(max_steps=2),
        teacher_model=models["teacher"],
        train_dataset=make_dataset(),
        data_collator=collator,
    )
    trainer.train()
    assert order == ["teacher", "student"] * 2
