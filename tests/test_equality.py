"""An optimisation step is what its rows say: on one process, on two, and in accumulated micro-batches, for every form
of every term."""

import random
from collections.abc import Callable
from typing import NamedTuple, get_args

import pytest
import torch
from conftest import make_model, make_rows
from datasets import Dataset
from safetensors.torch import load_file
from test_distributed import SCRIPT, launch
from test_problem_types import make_problem_rows
from test_trainer import Record
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, ProgressCallback

from hf_kd import (
    AttentionTerm,
    DistillationObjective,
    DistillationTrainer,
    DistillationTrainingArguments,
    HiddenTerm,
    LogitTerm,
    RelationTerm,
    TaskTerm,
)
from hf_kd.objective import losses
from hf_kd.objective.predictions import LOGIT_LOSSES
from hf_kd.objective.terms import AttentionLossType, HiddenLossType, RelationLossType
from hf_kd.signals import Capture, labels_of
from hf_kd.signals.problem import PROBLEM_TYPES


pytestmark = pytest.mark.one_leg


STEPS = 20
SINGLE_LABEL = "single_label_classification"
# Adam divides by the gradient's own size, so that rounding decides the steps of weights whose gradient is nearly 0.
# SGD keeps equal gradients equal: after 20 steps the weights, of size 1, differ by a few 1e-7.
SGD = {"optim": "sgd", "learning_rate": 0.02}
# With an epsilon well above the rounding of a gradient (1e-8) Adam keeps them equal too.
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-3, "weight_decay": 0.1}


class Run(NamedTuple):
    """A training that is to be the same however its steps are divided. Each term is logged under its own name at each
    step, which tells whose value differs; the weights sum up what their gradients did."""

    terms: list
    problem: str = SINGLE_LABEL
    num_rows: int = 48
    arguments: dict = SGD
    compute_loss_func: Callable | None = None


def every_type(term_class, loss_types):
    return [term_class(1.0, type=t, name=f"{term_class.__name__}_{t}") for t in loss_types]


def compares_rows(term):
    """Whether the term is about the rows of a batch together. A new type that is not named here is about each row or
    token by itself, or the tests fail."""
    return getattr(term, "type", None) in ("dist", "similarity", "rkd", "pkt", "correlation", "crd")


def own_loss(outputs, labels, num_items_in_batch):
    """What a script may give as `compute_loss_func`: a sum over the labels at hand, divided by those of the step."""
    total = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum", label_smoothing=0.3)
    return total / num_items_in_batch


def of_problem(problem):
    """The task term and the logit terms that it has."""
    return [TaskTerm(1.0), *every_type(LogitTerm, LOGIT_LOSSES[problem])]


HIDDEN = every_type(HiddenTerm, get_args(HiddenLossType))
ATTENTION = [
    *every_type(AttentionTerm, get_args(AttentionLossType)),
    AttentionTerm(1.0, head_reduction="mean", name="AttentionTerm_mean"),
]
RELATIONS = every_type(RelationTerm, get_args(RelationLossType))
SMOOTHED = TaskTerm(1.0, label_smoothing=0.1, name="smoothed_task_loss")
ALL_TERMS = [*of_problem(SINGLE_LABEL), SMOOTHED, *HIDDEN, *ATTENTION, *RELATIONS]
OF_ROWS = [term for term in ALL_TERMS if not compares_rows(term)]
BETWEEN_ROWS = Run([term for term in ALL_TERMS if compares_rows(term)])
# Steps of 16, 16 and 5 rows: in the last, the second process has none of its own.
INCOMPLETE = 37
RUNS = {
    "every term": Run(OF_ROWS, num_rows=INCOMPLETE),
    "AdamW": Run([TaskTerm(1.0), LogitTerm(1.0), HiddenTerm(1.0), AttentionTerm(1.0)], arguments=ADAM),
    "own loss": Run([TaskTerm(1.0), LogitTerm(1.0)], num_rows=INCOMPLETE, compute_loss_func=own_loss),
    **{
        problem: Run([term for term in of_problem(problem) if not compares_rows(term)], problem)
        for problem in PROBLEM_TYPES
        if problem != SINGLE_LABEL
    },
}


def make_uneven_rows(problem, num_rows):
    """Rows of 5 to 16 tokens; a third of those that can be without a label are."""
    rng = random.Random(7)
    if problem == SINGLE_LABEL:
        return make_rows(num_rows, num_labels=3, unlabeled_share=0.3)
    rows = make_problem_rows(problem, num_rows)
    for row in rows:
        is_unlabeled = rng.random() < 0.3
        if problem == "masked_lm":  # the collator would mask other tokens in each process
            masked = [not is_unlabeled and rng.random() < 0.3 for _ in row["input_ids"]]
            row["labels"] = [x if m else -100 for x, m in zip(row["input_ids"], masked, strict=True)]
            row["input_ids"] = [4 if m else x for x, m in zip(row["input_ids"], masked, strict=True)]
        elif problem == "multi_label_classification":
            row["labels"] = [-100.0 if rng.random() < 0.3 else x for x in row["labels"]]
        elif is_unlabeled and problem == "regression":
            row["labels"] = -100.0
        elif is_unlabeled and problem == "token_classification":
            row["labels"] = [-100] * len(row["labels"])
    return rows


def models_of(run):
    changes = {"num_labels": 3} if run.problem == SINGLE_LABEL else {}
    student = make_model(seed=2, problem=run.problem, num_hidden_layers=2, hidden_size=16, **changes)
    return student, make_model(seed=1, problem=run.problem, num_hidden_layers=2, **changes)


def collator_of(run, tokenizer):
    if run.problem in ("token_classification", "masked_lm"):
        return DataCollatorForTokenClassification(tokenizer)
    # See test_answers_compete_with_padding_as_in_transformers.
    width = 16 if run.problem == "question_answering" else None
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=width)


def make_trainer(run, tokenizer, output, batch_size, accumulation=1):
    args = DistillationTrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        **run.arguments,
    )
    student, teacher = models_of(run)
    record = Record()
    trainer = DistillationTrainer(
        student,
        args,
        teacher_model=teacher,
        objective=DistillationObjective(run.terms),
        train_dataset=Dataset.from_list(make_uneven_rows(run.problem, run.num_rows)),
        data_collator=collator_of(run, tokenizer),
        callbacks=[record],
        compute_loss_func=run.compute_loss_func,
    )
    trainer.remove_callback(ProgressCallback)
    return trainer, record


def train(run, tokenizer, output, batch_size, accumulation=1):
    """Train as the run says; the trainer, and by name what was trained and the values of each term."""
    trainer, record = make_trainer(run, tokenizer, output, batch_size, accumulation)
    trainer.train()
    trained = {**dict(trainer.model.named_parameters()), **dict(trainer.distillation_objective.named_parameters())}
    values = {
        term.name: torch.tensor([log[term.name] for log in record.logs if term.name in log]) for term in run.terms
    }
    assert [len(value) for value in values.values()] == [STEPS] * len(run.terms)
    return trainer, {name: x.detach().clone() for name, x in {**trained, **values}.items()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """All runs on two processes of 8 rows each, from one launch: what each process ended with."""
    output = tmp_path_factory.mktemp("two_processes")
    launch(SCRIPT.with_name("train_equal.py"), output)
    return {name: [load_file(output / f"{name}_{rank}.safetensors") for rank in (0, 1)] for name in (*RUNS, "between")}


@pytest.fixture(scope="module")
def one_process(tokenizer, tmp_path_factory):
    """What a run on one process with whole batches of 16 rows ends with."""
    found = {}

    def one_process(name):
        if name not in found:
            _, found[name] = train(RUNS[name], tokenizer, tmp_path_factory.mktemp("one_process"), 16)
        return found[name]

    return one_process


def assert_same(found, expected):
    """Names the terms whose values differ before the weights."""
    assert set(found) == set(expected)
    differ = {}
    for name, value in expected.items():
        # Values of a term that is nearly learned are differences of large numbers.
        is_term = value.dim() == 1 and len(value) == STEPS and "." not in name
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if is_term else {"rtol": 0, "atol": 2e-6}
        if not torch.allclose(found[name], value, **tolerance):
            differ[name] = (found[name] - value).abs().max().item()
    assert not differ


@pytest.mark.parametrize("name", RUNS)
def test_accumulation_changes_nothing(one_process, name, tokenizer, tmp_path):
    """A mean per micro-batch is not the mean of the step where lengths and labels are ragged."""
    _, accumulated = train(RUNS[name], tokenizer, tmp_path, 4, accumulation=4)
    assert_same(accumulated, one_process(name))


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_change_nothing(one_process, two_processes, name):
    """The student would depend on the hardware that it was trained on."""
    for rank in two_processes[name]:
        assert_same(rank, one_process(name))
    # Synchronised, not only close: the copies of the two must never drift apart.
    assert all(torch.equal(x, two_processes[name][1][key]) for key, x in two_processes[name][0].items())


@pytest.mark.distributed
def test_between_rows_two_processes_are_two_micro_batches(two_processes, tokenizer, tmp_path):
    """The loss of these types depends on how the step is divided: it must be in the way that their docstrings say."""
    _, micro_batches = train(BETWEEN_ROWS, tokenizer, tmp_path, 8, accumulation=2)
    for rank in two_processes["between"]:
        assert_same(rank, micro_batches)


@pytest.mark.distributed
@pytest.mark.parametrize("term", BETWEEN_ROWS.terms, ids=lambda term: term.name)
def test_a_process_compares_its_own_rows(two_processes, term, tokenizer, tmp_path):
    """Were rows of the other process compared too, every process would need its states, and the value would be that of
    16 rows."""
    trainer, _ = make_trainer(BETWEEN_ROWS, tokenizer, tmp_path, 16)
    rows = next(iter(trainer.get_train_dataloader()))

    def value(rows):
        inputs = {name: x for name, x in rows.items() if name != "labels"}
        with torch.no_grad(), trainer.capture:
            outputs = trainer.model(**inputs)
        student = trainer.capture.signals(outputs, inputs)
        return trainer.distillation_objective(student, trainer.teacher(inputs))[term.name].item()

    halves = [value({name: x[part] for name, x in rows.items()}) for part in (slice(8), slice(8, None))]
    first_step = two_processes["between"][0][term.name][0].item()
    assert first_step == pytest.approx(sum(halves) / 2, rel=1e-4, abs=1e-7)
    assert first_step != pytest.approx(value(rows), rel=1e-3)


@pytest.mark.parametrize("term", BETWEEN_ROWS.terms, ids=lambda term: term.name)
def test_types_between_rows_say_what_they_see(term):
    """Whoever moves from one GPU to eight gets another loss, and would look for the reason elsewhere."""
    loss = getattr(losses, f"{'logit' if isinstance(term, LogitTerm) else 'relation'}_{term.type}")
    assert "the rows that one process has in one micro-batch" in " ".join(loss.__doc__.split())


def test_answers_compete_with_padding_as_in_transformers(tokenizer, tmp_path):
    """The one exception: the models' own loss chooses among all positions of the batch, padding too, and the task term
    is that loss. Rows padded to one width are trained on alike however they are divided."""
    run = Run([TaskTerm(1.0)], "question_answering")
    batch = DataCollatorWithPadding(tokenizer)(make_uneven_rows(run.problem, 16))
    wider = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=32)(make_uneven_rows(run.problem, 16))
    student, _ = models_of(run)
    objective = DistillationObjective(run.terms).bind(student.config, problem=run.problem)
    capture, found = Capture(student, objective.student_wanted), []
    for inputs in (batch, wider):
        with torch.no_grad(), capture:
            outputs = student(**inputs)
        labels = labels_of(inputs, run.problem)
        value = objective(capture.signals(outputs, inputs), labels=labels)["task_loss"].item()
        assert value == pytest.approx(outputs.loss.item(), rel=1e-6)
        found.append(value)
    assert found[0] < found[1] - 0.1
