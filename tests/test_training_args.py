"""Each training argument reaches the objective, is refused beside one, and can be written as a flag or in YAML."""

from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from conftest import make_dataset, make_model, weights
from test_bad_input import assert_refused
from test_trainer import train
from transformers import TrainingArguments

from hf_kd import (
    AttentionTerm,
    DistillationObjective,
    DistillationTrainingArguments,
    HiddenTerm,
    LogitTerm,
    RelationTerm,
    TaskTerm,
)
from hf_kd.command_line import parse_args
from hf_kd.objective.terms import AttentionLossType, HiddenLossType, LogitLossType, RelationLossType
from hf_kd.signals import Capture, Teacher, TeacherEnsemble


# All terms on, so that each of their fields has something to change.
ON = {"hidden_loss_weight": 0.7, "attention_loss_weight": 0.3, "relation_loss_weight": 0.2}
TERMS = {
    "task_loss": TaskTerm(0.5),
    "logit_loss": LogitTerm(0.5),
    "hidden_loss": HiddenTerm(0.7),
    "attention_loss": AttentionTerm(0.3),
    "relation_loss": RelationTerm(0.2),
}
# Field, value as arguments have it, term, the term's field.
FIELDS = [
    *((f"{name}_weight", 1.5, name, "weight") for name in TERMS),
    *(("logit_loss_type", kind, "logit_loss", "type") for kind in get_args(LogitLossType) if kind != "kl"),
    *(("hidden_loss_type", kind, "hidden_loss", "type") for kind in get_args(HiddenLossType) if kind != "mse"),
    *(("attention_loss_type", kind, "attention_loss", "type") for kind in get_args(AttentionLossType)[1:]),
    *(("relation_loss_type", kind, "relation_loss", "type") for kind in get_args(RelationLossType)[1:]),
    ("temperature", 5.0, "logit_loss", "temperature"),
    ("temperature_schedule", "linear:1:4", "logit_loss", "temperature_schedule"),
    ("teacher_weights", [3.0, 1.0], "logit_loss", "teacher_weights"),
    ("teacher_reduction", "logits", "logit_loss", "teacher_reduction"),
    ("head_reduction", "mean", "attention_loss", "head_reduction"),
    ("layer_mapping", "1:4,2:1", "hidden_loss", "layers"),
    ("layer_mapping", "1:4,2:1", "attention_loss", "layers"),
    ("relation_layer_mapping", "1:2", "relation_loss", "layers"),
    ("relation_heads", 8, "relation_loss", "relation_heads"),
    *((f"{name}_schedule", "linear:1:0", name, "schedule") for name in TERMS),
]
IDS = [f"{field}-{value}-{name}" for field, value, name, _ in FIELDS]
OWN_FIELDS = [
    f for f in fields(DistillationTrainingArguments) if f.name not in {f.name for f in fields(TrainingArguments)}
]


def test_every_argument_is_tested():
    """A new field would be read by nothing, and look like any other in a table of hyperparameters."""
    assert {f.name for f in OWN_FIELDS} - {field for field, *_ in FIELDS} == {
        # test_trainer.py, test_agreement.py, test_soft_labels.py, test_numerics.py
        *("teacher_dtype", "freeze_embeddings", "eval_teacher_agreement", "teacher_labels", "on_nonfinite")
    }
    values = {value for field, value, *_ in FIELDS if field.endswith("_type")}
    kinds = (LogitLossType, HiddenLossType, AttentionLossType, RelationLossType)
    assert {kind for kinds_of_term in kinds for kind in get_args(kinds_of_term)} - values <= {"kl", "mse", "minilm_v2"}


def test_every_argument_explains_itself():
    """`--help` and the class's documentation are all that a user reads."""
    for f in OWN_FIELDS:
        assert f.metadata["help"].endswith((".", ".)")), f.name
        assert f"{f.name}`" in DistillationTrainingArguments.__doc__ or f"{f.name} (" in (
            DistillationTrainingArguments.__doc__
        ), f.name


def test_the_defaults_are_those_of_the_terms(make_args):
    """A script and a command line would start from different losses."""
    assert make_args().objective().terms == [TaskTerm(), LogitTerm()]
    assert make_args(**ON).objective().terms == list(TERMS.values())


@pytest.mark.parametrize(("field", "value", "name", "of_term"), FIELDS, ids=IDS)
def test_each_argument_reaches_its_term_and_no_other(make_args, field, value, name, of_term):
    """Written to the wrong term, a value would be found in the run's arguments and do something else."""
    expected = {**TERMS, name: replace(TERMS[name], **{of_term: value})}
    if field == "layer_mapping":
        expected |= {name: replace(TERMS[name], layers=value) for name in ("hidden_loss", "attention_loss")}
    assert make_args(**{**ON, field: value}).objective().terms == list(expected.values())


@pytest.fixture(scope="module")
def signals():
    """What a student and two teachers of four classes say about a batch, for every kind of term."""
    student = make_model(seed=2, num_hidden_layers=2, num_labels=4)
    teachers = [make_model(seed=seed, num_labels=4) for seed in (1, 3)]
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(5, 64, (5, 9), generator=generator)}
    batch["attention_mask"] = (torch.arange(9) < torch.tensor([9, 4, 7, 3, 8])[:, None]).long()
    everything = [HiddenTerm(layers="0:0,1:1,2:2", teacher=0), RelationTerm(layers="1:1,2:2", teacher=0)]
    everything += [
        HiddenTerm(layers="1:3,2:4", teacher=0, name="h"),
        RelationTerm(layers="1:3,2:4", teacher=0, name="r"),
    ]
    objective = DistillationObjective(everything)
    objective.bind(student.config, [teacher.config for teacher in teachers])
    capture = Capture(student, objective.student_wanted)
    ensemble = TeacherEnsemble([Teacher(teacher, student.config) for teacher in teachers])
    ensemble.watch(objective.teacher_wanted)
    with capture, torch.no_grad():
        outputs = student(**batch)
    labels = torch.tensor([0, 3, 1, 2, 3])
    return student.config, capture.signals(outputs, batch), ensemble(batch), labels


@torch.no_grad()
def values_of(terms, signals, progress=0.5):
    config, student, teachers, labels = signals
    objective = DistillationObjective([replace(t, teacher=0) if hasattr(t, "layers") else t for t in terms])
    teacher_config = make_model(num_labels=4).config
    objective.bind(config, [teacher_config, teacher_config])
    values = objective(student, teachers, labels, progress=progress)
    return {name: value.item() for name, value in values.items()}, objective.weighted_sum(values, progress).item()


@pytest.mark.parametrize(("field", "value", "name", "of_term"), FIELDS, ids=IDS)
def test_each_argument_changes_the_loss_it_names(make_args, signals, field, value, name, of_term):
    """A field that the term holds and nothing reads is a bug all the same."""
    before, loss_before = values_of(TERMS.values(), signals)
    terms = {term.name: term for term in make_args(**{**ON, field: value}).objective().terms}
    after, loss_after = values_of(terms.values(), signals)
    assert loss_after != pytest.approx(loss_before, rel=1e-4)
    changed = {key for key in before if after[key] != pytest.approx(before[key], rel=1e-5)}
    if of_term in ("weight", "schedule"):
        assert changed == set()
    else:
        assert changed == ({"hidden_loss", "attention_loss"} if field == "layer_mapping" else {name})


@pytest.mark.parametrize("width", [32, 16])
def test_arguments_train_as_the_objective_they_describe(teacher, collator, make_args, width):
    """Two ways to the same terms would be two sets of results."""
    student = make_model(seed=2, num_hidden_layers=2, hidden_size=width)
    changes = {
        "task_loss_weight": 0.2,
        "task_loss_schedule": "linear:1:0.5",
        "logit_loss_weight": 0.9,
        "logit_loss_type": "js",
        "logit_loss_schedule": "window:0.25:1",
        "temperature": 3.0,
        "temperature_schedule": "cosine:2:1",
        "hidden_loss_weight": 0.7,
        "hidden_loss_type": "gram",
        "hidden_loss_schedule": "window:0:0.75",
        "attention_loss_weight": 0.3,
        "attention_loss_type": "cosine",
        "attention_loss_schedule": "cosine:1:0",
        "head_reduction": "mean",
        "layer_mapping": "1:1,2:3",
        "relation_loss_weight": 0.4,
        "relation_loss_type": "minilm_v2",
        "relation_loss_schedule": "linear:0:1",
        "relation_heads": 4,
        "relation_layer_mapping": "2:2",
    }
    terms = [
        TaskTerm(0.2, schedule="linear:1:0.5"),
        LogitTerm(0.9, "js", 3.0, schedule="window:0.25:1", temperature_schedule="cosine:2:1"),
        HiddenTerm(0.7, "gram", "1:1,2:3", schedule="window:0:0.75"),
        AttentionTerm(0.3, "cosine", [(1, 1), (2, 3)], "mean", schedule="cosine:1:0"),
        RelationTerm(0.4, layers="2:2", relation_heads=4, schedule="linear:0:1"),
    ]
    by_args, ours = train(student, teacher, make_args(**changes), collator)
    by_objective, theirs = train(student, teacher, make_args(), collator, objective=DistillationObjective(terms))
    assert torch.equal(weights(by_args.model), weights(by_objective.model))
    state, other = (t.distillation_objective.state_dict() for t in (by_args, by_objective))
    assert set(state) == set(other) and all(torch.equal(state[name], other[name]) for name in state)
    for log, expected in zip(ours.logs[:4], theirs.logs[:4], strict=True):
        names = [name for name in log if "loss" in name]
        assert [log[name] for name in names] == [expected.get(name) for name in names]


@pytest.mark.parametrize(
    ("field", "value"), sorted({f[0]: f[1] for f in FIELDS}.items()), ids=lambda value: str(value)
)
def test_an_objective_alone_describes_the_terms(make_args, field, value):
    """The field would be read by nothing, and stand in every table of the run."""
    weight = field.replace("_schedule", "_weight")
    args = make_args(
        **{field: value}, **({weight: 1.0} if weight != field and weight.endswith("_loss_weight") else {})
    )
    assert_refused(
        args.check_objective_alone_describes_the_terms,
        f"{field}={value!r}",
        "but the terms are those of objective=...; set them there, or drop",
    )


def test_a_schedule_of_a_term_that_is_off(make_args):
    """Whoever copies TinyBERT's two stages and forgets a weight would train without the first."""
    assert_refused(
        lambda: make_args(hidden_loss_schedule="window:0:0.5"),
        "hidden_loss_weight, which is 0",
        "hidden_loss_weight=1",
    )


def test_what_no_objective_says_stays_with_the_arguments(make_args):
    """The teacher's dtype, and everything of TrainingArguments, would be refused beside an objective."""
    make_args(teacher_dtype="bfloat16", learning_rate=3e-4, seed=7).check_objective_alone_describes_the_terms()


# As flags and in YAML

WRITTEN = {
    "task_loss_weight": ("1", 1.0),
    "logit_loss_weight": ("1e-1", 0.1),
    "hidden_loss_weight": ("0.25", 0.25),
    "attention_loss_weight": ("2", 2.0),
    "relation_loss_weight": ("3", 3.0),
    "temperature": ("4", 4.0),
    "logit_loss_type": ("decoupled_kl", "decoupled_kl"),
    "hidden_loss_type": ("nst", "nst"),
    "attention_loss_type": ("cosine", "cosine"),
    "head_reduction": ("mean", "mean"),
    "relation_loss_type": ("minilm_v2", "minilm_v2"),
    "relation_heads": ("16", 16),
    "layer_mapping": ("1:4,2:8", "1:4,2:8"),
    "relation_layer_mapping": ("2:7", "2:7"),
    "task_loss_schedule": ("linear:1:0", "linear:1:0"),
    "logit_loss_schedule": ("window:0.5:1", "window:0.5:1"),
    "hidden_loss_schedule": ("window:0:0.5", "window:0:0.5"),
    "attention_loss_schedule": ("cosine:0:1", "cosine:0:1"),
    "relation_loss_schedule": ("constant", "constant"),
    "temperature_schedule": ("linear:1:0.5", "linear:1:0.5"),
    "teacher_weights": ("2 1", [2.0, 1.0]),
    "teacher_reduction": ("logits", "logits"),
    "teacher_dtype": ("bfloat16", "bfloat16"),
    "eval_teacher_agreement": ("true", True),
    "freeze_embeddings": ("true", True),
    "teacher_labels": ("bad good", ["bad", "good"]),
    "on_nonfinite": ("skip", "skip"),
}
COMMON = ["--report_to", "none", "--use_cpu", "true"]


def read_fields(args):
    return {f.name: getattr(args, f.name) for f in OWN_FIELDS}


def test_every_argument_is_a_flag(tmp_path):
    """An argument that only Python can set is missing from every recipe."""
    assert set(WRITTEN) == {f.name for f in OWN_FIELDS}
    flags = [word for name, (text, _) in WRITTEN.items() for word in (f"--{name}", *text.split())]
    (args,) = parse_args((DistillationTrainingArguments,), [*flags, "--output_dir", str(tmp_path), *COMMON])
    found, expected = read_fields(args), {name: value for name, (_, value) in WRITTEN.items()}
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in expected.items()}


def test_every_argument_is_a_line_of_yaml(tmp_path):
    """YAML has types of its own: 1:30 is a number of minutes to it, and a list is no string."""
    lines = [
        f"{name}: {text}"
        for name, (text, _) in WRITTEN.items()
        if name not in ("teacher_weights", "teacher_labels", "relation_layer_mapping")
    ]
    lines += ["relation_layer_mapping: 2:7", "teacher_labels: [bad, good]"]
    config = tmp_path / "config.yaml"
    config.write_text("\n".join([*lines, "teacher_weights: [2, 1]", f"output_dir: {tmp_path}"]), encoding="utf-8")
    (args,) = parse_args((DistillationTrainingArguments,), [str(config), *COMMON])
    assert read_fields(args) == {name: value for name, (_, value) in WRITTEN.items()}


@pytest.mark.parametrize("empty", ["null", ""])
def test_unset_arguments_keep_their_defaults(tmp_path, empty):
    """`None` as a default of a choice or a list must not become the text "None", nor be refused as no choice."""
    names = [f.name for f in OWN_FIELDS if f.default is None]
    assert {"logit_loss_type", "head_reduction", "relation_heads", "teacher_weights", "teacher_dtype"} < set(names)
    config = tmp_path / "config.yaml"
    config.write_text("".join(f"{name}: {empty}\n" for name in names), encoding="utf-8")
    for argv in ([str(config)], []):
        (args,) = parse_args((DistillationTrainingArguments,), [*argv, "--output_dir", str(tmp_path), *COMMON])
        assert read_fields(args) == {f.name: f.default for f in OWN_FIELDS}


@pytest.mark.parametrize(
    "name", ["logit_loss_type", "hidden_loss_type", "attention_loss_type", "relation_loss_type", "head_reduction"]
)
def test_an_unknown_choice_is_refused_with_those_there_are(tmp_path, name):
    """A misspelt loss would be found after the data were prepared."""
    with pytest.raises(ValueError, match=rf"--{name}/.*invalid choice: 'nothing' \(choose from"):
        parse_args((DistillationTrainingArguments,), [f"--{name}", "nothing", "--output_dir", str(tmp_path), *COMMON])


def test_every_type_can_be_written_as_a_flag(tmp_path):
    """The choices of the flags are made from the Literal; one that is missing there is missing from every recipe."""
    for field, value, *_ in FIELDS:
        if field.endswith("_type"):
            argv = [f"--{field}", value, "--output_dir", str(tmp_path), *COMMON]
            assert getattr(parse_args((DistillationTrainingArguments,), argv)[0], field) == value


def test_plain_arguments_keep_every_value_of_theirs(tmp_path):
    """Only the distillation's own fields get defaults."""
    plain = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, label_smoothing_factor=0.1)
    args = DistillationTrainingArguments.from_training_arguments(plain)
    assert read_fields(args) == {f.name: f.default for f in OWN_FIELDS}
    assert args.objective().terms == [TaskTerm(label_smoothing=0.1), LogitTerm()]
    assert DistillationTrainingArguments.from_training_arguments(args) is args


def test_data_are_shuffled_alike_with_and_without_terms(student, teacher, collator, make_args):
    """Terms that draw from the run's random numbers would make any two settings differ in the data too."""
    firsts = []
    for changes in ({}, {**ON, "relation_loss_type": "crd"}):
        seen = []
        handle = teacher.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
        )
        train(student, teacher, make_args(max_steps=3, **changes), collator, make_dataset())
        handle.remove()
        firsts.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*firsts, strict=True))
