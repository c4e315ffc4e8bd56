"""Several teachers: whose answers are averaged, whose layers are read, and what stays as it was."""

import pytest
import torch
from conftest import copy_of, make_dataset, make_model, make_rows, weights
from test_bad_input import assert_refused
from test_recipes import NAMES, QUICK, glue_dir, run, save_model  # noqa: F401, a fixture
from test_trainer import train

from hf_kd import (
    AttentionTerm,
    DistillationObjective,
    DistillationTrainer,
    HiddenTerm,
    LogitTerm,
    RelationTerm,
    TaskTerm,
)
from hf_kd.objective.predictions import combine_teachers
from hf_kd.results import read_results
from hf_kd.signals import Signals, Teacher, TeacherEnsemble


@pytest.fixture
def other():
    """A second teacher, of another depth, width and family."""
    return make_model("roberta", seed=5, num_hidden_layers=3, hidden_size=24, num_attention_heads=2)


def named(model, names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def logit_losses(record):
    return [log["logit_loss"] for log in record.logs if "logit_loss" in log]


# The mean of their answers

KINDS = ["kl", "soft_ce", "reverse_kl", "js", "mse", "dist", "decoupled_kl"]


@pytest.mark.parametrize("reduction", ["probabilities", "logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_copies_teach_as_one(student, teacher, collator, make_args, kind, reduction):
    """Sums in place of means, or a mean that is softened twice, would change with the number of teachers alone."""
    args = make_args(logit_loss_type=kind, temperature=3.0, optim="sgd", learning_rate=0.05, max_steps=2)
    one, one_record = train(student, teacher, args, collator)
    args = make_args(
        logit_loss_type=kind,
        temperature=3.0,
        optim="sgd",
        learning_rate=0.05,
        max_steps=2,
        teacher_weights=[3.0, 1.0],
        teacher_reduction=reduction,
    )
    two, record = train(student, [teacher, copy_of(teacher)], args, collator)
    assert isinstance(two.teacher, TeacherEnsemble)
    assert logit_losses(record) == pytest.approx(logit_losses(one_record), rel=1e-4)
    torch.testing.assert_close(weights(two.model), weights(one.model), rtol=0, atol=1e-5)


def test_the_mean_of_probabilities_and_that_of_logits():
    """Two teachers that are sure of different classes: on average both are likely, and not a third one."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(4, 5, generator=generator) * 3 for _ in range(3)]
    common = {"temperature": 2.0, "loss_type": "kl"}
    for given, share in (([1.0, 3.0, 4.0], [0.125, 0.375, 0.5]), (None, [1 / 3] * 3)):
        mean = combine_teachers(logits, given, reduction="probabilities", **common)
        expected = sum(w * (z / 2.0).softmax(-1) for w, z in zip(share, logits, strict=True))
        torch.testing.assert_close((mean / 2.0).softmax(-1), expected)
        mean = combine_teachers(logits, given, reduction="logits", **common)
        torch.testing.assert_close(mean, sum(w * z for w, z in zip(share, logits, strict=True)))
    # These compare logits, which the logarithm of a probability is not.
    for kind in ("mse", "standardized_kl"):
        mean = combine_teachers(logits, None, temperature=2.0, loss_type=kind, reduction="probabilities")
        torch.testing.assert_close(mean, sum(logits) / 3)
    assert torch.equal(combine_teachers(logits[:1], None, reduction="probabilities", **common), logits[0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_positions_that_do_not_exist_take_no_part_in_the_mean(temperature):
    """A teacher that scores the padding would be given less of the say on what is there."""
    logits = [torch.tensor([[1.0, 2.0, 50.0]]), torch.tensor([[3.0, 0.0, -50.0]])]
    exists = torch.tensor([[True, True, False]])
    common = {"temperature": temperature, "loss_type": "kl", "reduction": "probabilities"}
    mean = combine_teachers(logits, None, class_mask=exists, **common)[:, :2]
    expected = combine_teachers([z[:, :2] for z in logits], None, **common)
    torch.testing.assert_close((mean / temperature).softmax(-1), (expected / temperature).softmax(-1))


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression", "token_classification"])
def test_every_problem_averages_its_own_answers(problem):
    """Sigmoids of independent classes, or values, averaged as if one class had to be right."""
    student, one, two = (make_model(seed=i, problem=problem, num_hidden_layers=2) for i in range(3))
    objective = DistillationObjective([LogitTerm(temperature=2.0, teacher_weights=[1.0, 3.0])])
    objective.bind(student.config, [one.config, two.config], problem=problem)
    shape = (3, 5, 3) if problem == "token_classification" else (3, 1 if problem == "regression" else 3)
    generator = torch.Generator().manual_seed(0)
    s, a, b = (torch.randn(shape, generator=generator) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    value = objective(*[Signals(s, mask), [Signals(a, mask), Signals(b, mask)]])["logit_loss"]
    if problem == "regression":
        expected = (s - (a + 3 * b) / 4).square().mean()
    elif problem == "multi_label_classification":
        p, q = (0.25 * (a / 2).sigmoid() + 0.75 * (b / 2).sigmoid()), (s / 2).sigmoid()
        expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    else:
        p, q = (0.25 * (a / 2).softmax(-1) + 0.75 * (b / 2).softmax(-1)), (s / 2).softmax(-1)
        expected = 4 * (p * (p / q).log()).sum(-1)[mask.bool()].mean()
    torch.testing.assert_close(value, expected)


def test_a_weight_moves_the_mean_to_its_teacher(student, teacher, other, collator, make_args):
    """Weights that are read in another order give the say to the other teacher."""
    values = {}
    for share in (1e-6, 1.0, 1e6):
        args = make_args(max_steps=1, teacher_weights=[share, 1.0])
        _, record = train(student, [teacher, other], args, collator)
        values[share] = record.logs[0]["logit_loss"]
    for model, share in ((teacher, 1e6), (other, 1e-6)):
        _, record = train(student, model, make_args(max_steps=1), collator)
        assert values[share] == pytest.approx(record.logs[0]["logit_loss"], rel=1e-3)
    assert values[1.0] != pytest.approx(values[1e6], rel=1e-2) and values[1.0] != pytest.approx(values[1e-6], rel=1e-2)


def test_one_teacher_of_several_for_the_logits(student, teacher, other, collator, make_args):
    """`teacher=1` would be read by layers alone."""
    _, record = train(
        student,
        [teacher, other],
        make_args(),
        collator,
        objective=DistillationObjective([TaskTerm(), LogitTerm(teacher=1)]),
    )
    _, expected = train(student, other, make_args(), collator)
    assert logit_losses(record) == logit_losses(expected)


@pytest.mark.parametrize("reduction", ["probabilities", "logits"])
def test_each_teacher_has_its_own_order_of_labels(collator, make_args, reduction):
    """Aligned once, for the first, the second would teach "contradiction" where it means "entailment"."""
    names = ["entailment", "neutral", "contradiction"]
    student = named(make_model(seed=2, num_hidden_layers=2, num_labels=3), names)
    first, second = (named(make_model(seed=seed, num_labels=3), names) for seed in (1, 3))
    data, args = make_dataset(num_labels=3), make_args(teacher_reduction=reduction, teacher_weights=[1.0, 2.0])
    in_order, expected = train(student, [first, second], args, collator, data)

    def turned(model, order):
        model = named(copy_of(model), [names[index] for index in order])
        with torch.no_grad():
            model.classifier.weight.copy_(model.classifier.weight[order])
            model.classifier.bias.copy_(model.classifier.bias[order])
        return model

    teachers = [turned(first, [2, 0, 1]), turned(second, [1, 0, 2])]
    by_name, record = train(student, teachers, args, collator, data)
    torch.testing.assert_close(weights(by_name.model), weights(in_order.model), rtol=0, atol=1e-6)
    assert logit_losses(record) == pytest.approx(logit_losses(expected), rel=1e-5)
    second.config.id2label = {0: "entailment", 1: "neutral", 2: "other"}
    assert_refused(
        lambda: train(student, [first, second], args, collator, data), "labels of student and teacher do not fit"
    )


# Their layers


def test_a_term_on_layers_must_name_its_teacher(student, teacher, other, collator, make_args):
    """The first teacher would be taken without a word."""
    assert_refused(
        lambda: train(student, [teacher, other], make_args(hidden_loss_weight=1.0), collator),
        "hidden_loss compares with one teacher, but there are 2; say which",
        "HiddenTerm(teacher=0) in objective=DistillationObjective([...])",
    )


def test_each_term_reads_its_own_teacher(student, teacher, other, collator, make_args):
    """Projections of the first teacher's width, or layers of its depth, would fit the second by chance alone."""
    shared = {"layers": "2:3"}
    objective = DistillationObjective(
        [
            LogitTerm(),
            HiddenTerm(teacher=1, **shared),
            HiddenTerm(teacher=0, layers="1:4", name="first"),
            AttentionTerm(teacher=0),
            RelationTerm(teacher=1, relation_heads=4),
        ]
    )
    trainer, record = train(student, [teacher, other], make_args(), collator, objective=objective)
    assert {name: p.shape for name, p in objective.named_parameters()} == {
        "projections.hidden_loss.maps.2.weight": (24, 32),
        "projections.hidden_loss.maps.2.bias": (24,),
    }
    first, second = (reader.capture.wanted for reader in trainer.teacher.teachers)
    assert (first.hidden, first.attention, first.values) == ({4}, {2, 4}, set())
    assert (second.hidden, second.attention, second.values) == ({3}, {3}, {3})
    # The same terms, each alone with its teacher.
    for term, model in ((AttentionTerm(), teacher), (RelationTerm(relation_heads=4), other)):
        alone = DistillationObjective([term])
        _, expected = train(student, model, make_args(max_steps=1), collator, objective=alone)
        assert record.logs[0][term.name] == pytest.approx(expected.logs[0][term.name], rel=1e-6)


def test_a_teacher_that_is_the_other_one(student, teacher, other, collator, make_args):
    """Two teachers in the other order, with the other indices, are the same run."""
    results = []
    for models, index in (([teacher, other], 1), ([other, teacher], 0)):
        objective = DistillationObjective([LogitTerm(), RelationTerm(teacher=index)])
        trainer, _ = train(student, models, make_args(), collator, objective=objective)
        results.append(weights(trainer.model))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


# What they leave as it was


def test_teachers_stay_bit_for_bit(student, teacher, other, collator, make_args, tmp_path):
    """The second teacher would be in train mode, in the optimizer or in the checkpoint."""
    teachers = [teacher, other.train()]
    before = [copy_of(model).state_dict() for model in teachers]
    objective = DistillationObjective([TaskTerm(), LogitTerm(), HiddenTerm(teacher=1, layers="last")])
    args = make_args(save_strategy="steps", save_steps=4, weight_decay=0.1)
    trainer, _ = train(student, teachers, args, collator, objective=objective)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for model, state in zip(teachers, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert not optimized & {id(p) for p in model.parameters()}


def test_no_teacher_runs_in_evaluation(student, teacher, other, collator, make_args):
    """Each would cost its time again at every evaluation."""
    calls = []
    for model in (teacher, other):
        model.register_forward_hook(lambda *args: calls.append(1))
    trainer = DistillationTrainer(student, make_args(), teacher_model=[teacher, other], data_collator=collator)
    assert trainer.evaluate(make_dataset(10))["eval_loss"] > 0 and calls == []


def test_every_column_that_a_teacher_reads_is_kept(collator, make_args):
    """A DistilBERT student and a RoBERTa teacher make `Trainer` drop the segments that the second, a BERT, reads."""
    seen = []
    teachers = [make_model("distilbert", 1), make_model(seed=3)]
    for model in teachers:
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    student = make_model("distilbert", 2, num_hidden_layers=2)
    data = make_dataset(pairs=True).add_column("note", ["nobody reads this"] * 24)
    trainer, _ = train(student, teachers, make_args(max_steps=1), collator, data)
    assert [set(kwargs) for kwargs in seen] == [
        {"input_ids", "attention_mask"},
        {"input_ids", "attention_mask", "token_type_ids"},
    ]
    assert seen[1]["token_type_ids"].sum() > 0
    columns = trainer._remove_unused_columns(data).column_names
    assert set(columns) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_teachers_may_be_paths(student, teacher, other, collator, tokenizer, make_args, tmp_path):
    """A folder teaches exactly as the model in memory, whichever place it has."""
    for name, model in (("first", teacher), ("second", other)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    by_model, _ = train(student, [teacher, other], make_args(), collator)
    for paths in ([str(tmp_path / "first"), tmp_path / "second"], (teacher, tmp_path / "second")):
        by_path, _ = train(student, paths, make_args(), collator, processing_class=tokenizer)
        assert torch.equal(weights(by_path.model), weights(by_model.model))


def test_a_list_of_one_is_one_teacher(student, teacher, collator, make_args):
    """A list from a command line would ask every term on layers for an index."""
    trainer, _ = train(student, [teacher], make_args(hidden_loss_weight=1.0), collator)
    by_model, _ = train(student, teacher, make_args(hidden_loss_weight=1.0), collator)
    assert isinstance(trainer.teacher, Teacher)
    assert torch.equal(weights(trainer.model), weights(by_model.model))


# What is refused


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"teacher_weights": [1.0]}, ["teacher_weights=[1.0], but the number of teachers is 2"]),
        ({"teacher_weights": [1.0, 2.0, 3.0]}, ["the number of teachers is 2; give one weight for each"]),
        ({"teacher_weights": [1.0, 0.0]}, ["must be finite numbers > 0", "leave a teacher out"]),
        ({"teacher_weights": [1.0, float("nan")]}, ["must be finite numbers > 0"]),
        ({"teacher_reduction": "votes"}, ["teacher_reduction='votes' must be 'probabilities' or 'logits'"]),
    ],
)
def test_shares_that_do_not_fit(student, teacher, other, collator, make_args, changes, fragments):
    """A teacher without a share would run in every step for nothing."""
    assert_refused(lambda: train(student, [teacher, other], make_args(**changes), collator), *fragments)


def test_no_teacher_in_the_list(student, collator, make_args):
    """An empty list, as from a pattern that matches no folder, would end in an IndexError."""
    assert_refused(lambda: train(student, [], make_args(), collator), "the terms logit_loss compare with a teacher")


def test_a_share_for_the_one_teacher_of_a_term():
    """Nothing would read it."""
    assert_refused(lambda: LogitTerm(teacher=0, teacher_weights=[1.0, 2.0]), "teacher=0 is one teacher", "drop one")


def test_the_second_teacher_is_checked_like_the_first(student, teacher, collator, make_args):
    """Another vocabulary, other labels or shared layers would be found in the first alone."""
    for second, fragment in (
        (make_model(vocab_size=50), "has a vocabulary of 64 tokens, the teacher (bert) one of 50"),
        (make_model(num_labels=3), "the labels of student and teacher do not fit"),
        (make_model(num_labels=1), "solves regression, the student"),
    ):
        assert_refused(lambda second=second: train(student, [teacher, second], make_args(), collator), fragment)
    trainer_kwargs = {"teacher_model": [teacher, student], "data_collator": collator}
    assert_refused(lambda: DistillationTrainer(student, make_args(), **trainer_kwargs), "model share parameters")


def test_a_student_approaches_the_mean(student, teacher, collator, make_args):
    """The gradient of the averaged loss must reach the student."""
    teachers = [teacher, make_model(seed=7)]
    args = make_args(max_steps=60, learning_rate=3e-3, logging_steps=20, task_loss_weight=0.0, temperature=1.0)
    trainer, record = train(student, teachers, args, collator, make_dataset(16))
    batch = collator(make_rows(16))
    batch.pop("labels")
    with torch.no_grad():
        mean = sum(model(**batch).logits.softmax(-1) for model in teachers) / 2
        gap, before = ((m(**batch).logits.softmax(-1) - mean).abs().mean() for m in (trainer.model.eval(), student))
    assert gap < 0.5 * before
    assert logit_losses(record)[-1] < 0.7 * logit_losses(record)[0]


# The recipe


def test_the_recipe_takes_several_teachers(tmp_path, monkeypatch, tokenizer, glue_dir):  # noqa: F811
    """Each is measured by itself; a single row would be compared with a student of all of them."""
    names = {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}
    first = save_model(tmp_path / "a", tokenizer, seed=1, **NAMES)
    second = save_model(tmp_path / "b", tokenizer, seed=3, num_hidden_layers=3, **names)
    flags = ["--task_name", "sst2", "--glue_dir", glue_dir, "--teacher_model_name_or_path", first, second]
    flags += ["--teacher_weights", 2, 1, "--teacher_reduction", "logits", "--output_dir", tmp_path / "out"]
    run(monkeypatch, "glue_distill", *flags, *QUICK)
    *teachers, student = read_results(tmp_path / "out" / "results.json")["rows"]
    assert [(row["role"], row["teacher"], row["layers"]) for row in teachers] == [("teacher", 0, 4), ("teacher", 1, 3)]
    assert (student["role"], student["layers"]) == ("student", 2) and "teacher" not in student
