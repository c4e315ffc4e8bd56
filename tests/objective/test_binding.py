"""Terms fitted to configs: the layers and the teacher of each, or why the models cannot be compared."""

import pytest
from conftest import PROBLEM_CHANGES, make_model
from test_bad_input import assert_refused

from hf_kd.objective import AttentionTerm, CustomTerm, HiddenTerm, LogitTerm, RelationTerm, TaskTerm
from hf_kd.objective.binding import bind_terms
from hf_kd.objective.predictions import LOGIT_LOSSES
from hf_kd.signals.problem import PROBLEM_TYPES, SEQUENCE_PROBLEMS


def make_config(family="bert", **changes):
    return make_model(family, **changes).config


@pytest.fixture
def configs(student, teacher):
    return student.config, [teacher.config]


def test_each_term_gets_its_layers(configs):
    """Counted from another end, or in blocks where states are meant, every layer learns from its neighbour."""
    terms = [
        HiddenTerm(layers="0:0,2:4"),
        HiddenTerm(layers="uniform", name="uniform"),
        AttentionTerm(layers="first"),
        RelationTerm(),
        RelationTerm(type="pkt", layers="1:3", name="rows"),
        CustomTerm(print, hidden_layers="0:1", attention_layers="2:2"),
        LogitTerm(),
        TaskTerm(),
    ]
    binding = bind_terms(terms, *configs)
    assert binding.hidden_pairs == {
        "hidden_loss": [(0, 0), (2, 4)],
        "uniform": [(1, 2), (2, 4)],
        "rows": [(1, 3)],
        "print": [(0, 1)],
    }
    assert binding.attention_pairs == {
        "attention_loss": [(1, 1), (2, 2)],
        "relation_loss": [(2, 4)],
        "print": [(2, 2)],
    }
    assert binding.teacher_of == {
        **dict.fromkeys(["hidden_loss", "uniform", "attention_loss", "relation_loss", "rows", "print"], 0),
        "logit_loss": None,
    }
    assert (binding.problem, binding.num_teachers) == ("single_label_classification", 1)


def test_blocks_that_run_as_several_layers_are_counted():
    """The last layer of an ALBERT with two blocks per group would be taken for the middle one."""
    student, teacher = make_config(num_hidden_layers=2), make_config("albert", num_hidden_layers=3, inner_group_num=2)
    binding = bind_terms([HiddenTerm(layers="last"), RelationTerm()], student, [teacher])
    assert binding.hidden_pairs["hidden_loss"] == [(2, 6)] and binding.attention_pairs["relation_loss"] == [(2, 6)]


# Relation heads


@pytest.mark.parametrize(
    ("student_width", "teacher_width", "relation_heads"),
    [(768, 768, 48), (384, 768, 48), (320, 768, 32), (312, 768, 24), (192, 384, 24), (32, 32, 2), (30, 77, 1)],
)
def test_relation_heads_divide_both_widths(student, teacher, student_width, teacher_width, relation_heads):
    """Heads of another size on either side have no relation to each other; fewer heads say less."""
    student.config.hidden_size, teacher.config.hidden_size = student_width, teacher_width
    binding = bind_terms([RelationTerm()], student.config, [teacher.config])
    assert binding.relation_heads == {"relation_loss": relation_heads}


def test_relation_heads_that_divide_one_width_alone(student, teacher):
    """They would stop the first step with a shape that says nothing."""
    student.config.hidden_size, teacher.config.hidden_size = 320, 768
    assert_refused(
        lambda: bind_terms([RelationTerm(relation_heads=48)], student.config, [teacher.config]),
        "relation_loss: relation_heads=48 does not divide both widths, 320 of the student and 768 of the teacher",
        "use a common divisor such as 32",
    )
    binding = bind_terms([RelationTerm(relation_heads=16)], student.config, [teacher.config])
    assert binding.relation_heads == {"relation_loss": 16}


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"relation_heads": 4, "type": "minilm_v1"}, ["relation_heads=4 is read by type='minilm_v2' alone"]),
        ({"relation_heads": 0}, ["relation_heads=0 must be at least 1"]),
        ({"type": "minilm"}, ["relation_loss_type='minilm' must be one of 'minilm_v2', 'minilm_v1', 'similarity'"]),
    ],
)
def test_relation_terms_that_cannot_be(changes, fragments):
    """A value that nothing reads, or a type that does not exist, is found where it is written."""
    assert_refused(lambda: RelationTerm(**changes), "relation_loss", *fragments)


# Heads


@pytest.mark.parametrize("term", [AttentionTerm(), AttentionTerm(type="kl"), RelationTerm(type="minilm_v1")])
def test_heads_are_compared_one_by_one(student, teacher, term):
    """Some heads would have no partner; the user learns what compares any number of heads."""
    student.config.num_attention_heads = 2
    assert_refused(
        lambda: bind_terms([term], student.config, [teacher.config]),
        f"{term.name}: the student has 2 attention heads and the teacher 4",
        "relation_loss_type='minilm_v2'",
        "needs no equal heads, head_reduction='mean', or" if isinstance(term, AttentionTerm) else "no equal heads, or",
        "num_attention_heads=4",
    )


@pytest.mark.parametrize("term", [AttentionTerm(head_reduction="mean"), RelationTerm(), RelationTerm(type="rkd")])
def test_heads_of_any_number(student, teacher, term):
    """The term that is recommended for them would be refused as well."""
    student.config.num_attention_heads = 2
    assert bind_terms([term], student.config, [teacher.config]).num_teachers == 1


@pytest.mark.parametrize("term", [AttentionTerm(), RelationTerm(), CustomTerm(print, attention_layers="last")])
def test_attention_that_cannot_be_read(student, term):
    """Found at the first step, hours after the data were prepared."""
    assert_refused(
        lambda: bind_terms([term], student.config, [make_config("deberta-v2")]),
        "model type 'deberta-v2' cannot be read",
        "relation_loss_type='similarity'",
    )
    assert bind_terms([RelationTerm(type="similarity"), HiddenTerm()], student.config, [make_config("deberta-v2")])


# Teachers


@pytest.mark.parametrize("term", [HiddenTerm(), AttentionTerm(), RelationTerm(), CustomTerm(print)])
def test_a_term_on_layers_names_its_teacher(student, teacher, term):
    """Layers of several teachers have no mean: the first would be taken without a word."""
    configs = [teacher.config, teacher.config]
    assert_refused(
        lambda: bind_terms([term], student.config, configs),
        f"{term.name} compares with one teacher, but there are 2; say which",
        f"{type(term).__name__}(teacher=0)",
    )


def test_teachers_are_counted_from_0(student, teacher):
    """Layer pairs are those of the teacher that is named, and an index beyond the last is no other teacher."""
    configs = [teacher.config, make_config(num_hidden_layers=6)]
    terms = [HiddenTerm(teacher=1), AttentionTerm(teacher=0), LogitTerm(teacher=1)]
    binding = bind_terms(terms, student.config, configs)
    assert binding.teacher_of == {"hidden_loss": 1, "attention_loss": 0, "logit_loss": 1}
    assert binding.hidden_pairs["hidden_loss"] == [(1, 3), (2, 6)]
    assert binding.attention_pairs["attention_loss"] == [(1, 2), (2, 4)]
    for index in (2, -1):
        for term in (HiddenTerm(teacher=index), LogitTerm(teacher=index)):
            assert_refused(
                lambda term=term: bind_terms([term], student.config, configs),
                f"{term.name}: teacher={index}, but the teachers are counted from 0 to 1",
            )


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0]])
def test_teacher_weights_of_another_number(student, teacher, weights):
    """A teacher without a share, or a share without a teacher, is a slip."""
    assert_refused(
        lambda: bind_terms([LogitTerm(teacher_weights=weights)], student.config, [teacher.config] * 2),
        f"logit_loss: teacher_weights={weights}, but the number of teachers is 2; give one weight for each",
    )


def test_logits_are_checked_against_the_teachers_they_learn_from(student, teacher):
    """A teacher of hidden states alone may have any head; one of logits may not."""
    other = make_config(num_labels=3)
    terms = [LogitTerm(teacher=0), HiddenTerm(teacher=1)]
    assert bind_terms(terms, student.config, [teacher.config, other]).num_teachers == 2
    for term in (LogitTerm(), LogitTerm(teacher=1)):
        assert_refused(
            lambda term=term: bind_terms([term], student.config, [teacher.config, other]),
            "logit_loss: the student has 2 labels and the teacher 3",
            "num_labels=3",
        )


def test_there_is_no_teacher(student):
    """The task term alone needs none; every other would be compared with nothing."""
    assert bind_terms([TaskTerm()], student.config, []).num_teachers == 0
    assert_refused(
        lambda: bind_terms([TaskTerm(), LogitTerm(), RelationTerm()], student.config, []),
        "the terms logit_loss, relation_loss compare with a teacher, but there is none",
    )


# Problems


@pytest.mark.parametrize(
    "kind", ["kl", "soft_ce", "reverse_kl", "js", "mse", "dist", "standardized_kl", "decoupled_kl"]
)
@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_logit_losses_where_they_mean_something(problem, kind):
    """One logit has no softmax, two logits no standard deviation: such a loss is constant, and teaches nothing."""
    config = make_config(**{"num_labels": 3, **PROBLEM_CHANGES.get(problem, {})})
    if kind in LOGIT_LOSSES[problem]:
        assert bind_terms([LogitTerm(type=kind)], config, [config], problem).problem == problem
        return
    fragments = ["logit_loss_type='mse'"] if problem == "regression" else [f"not defined for {problem}", "'mse'"]
    assert_refused(
        lambda: bind_terms([LogitTerm(type=kind)], config, [config], problem), f"logit_loss_type={kind!r}", *fragments
    )


@pytest.mark.parametrize("problem", ["single_label_classification", "token_classification"])
def test_two_standardised_logits_say_nothing(problem):
    """They are -1 and 1 whatever the models say: the loss would be a constant, with a gradient of 0."""
    config = make_config(num_labels=2)
    assert_refused(
        lambda: bind_terms([LogitTerm(type="standardized_kl")], config, [config], problem),
        "logit_loss_type='standardized_kl' with 2 labels",
        "use 'kl'",
    )


def test_the_default_logit_loss_fits_every_problem():
    """A user who sets nothing must not be refused."""
    for problem in PROBLEM_TYPES:
        config = make_config(**PROBLEM_CHANGES.get(problem, {}))
        assert bind_terms([LogitTerm()], config, [config], problem).problem == problem


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "question_answering"])
def test_label_smoothing_is_for_classes(problem):
    """It would be read by nothing, and stand in every table of the run."""
    config = make_config(**PROBLEM_CHANGES.get(problem, {}))
    assert_refused(
        lambda: bind_terms([TaskTerm(label_smoothing=0.1)], config, [], problem),
        f"label_smoothing=0.1 spreads probability over the classes of a label, which {problem} does not have",
        "label_smoothing_factor=0",
    )


# Tokenizers of their own

COMPARE_ROWS = [
    LogitTerm(),
    HiddenTerm(type="pkd"),
    *(RelationTerm(type=kind) for kind in ("similarity", "rkd", "pkt", "correlation", "crd")),
    CustomTerm(print, hidden_layers="last"),
    TaskTerm(),
]
COMPARE_TOKENS = [
    *(HiddenTerm(type=kind) for kind in ("mse", "cosine", "gram", "nst")),
    *(AttentionTerm(type=kind) for kind in ("mse", "kl", "cosine")),
    AttentionTerm(head_reduction="mean"),
    *(RelationTerm(type=kind) for kind in ("minilm_v1", "minilm_v2")),
]


@pytest.mark.parametrize("term", COMPARE_ROWS, ids=lambda term: f"{term.name}-{getattr(term, 'type', '')}")
def test_rows_fit_whatever_their_tokens_are(configs, term):
    """What separate tokenizers can do would be refused."""
    assert bind_terms([term], *configs, shares_tokens=False).num_teachers == 1


@pytest.mark.parametrize("term", COMPARE_TOKENS, ids=lambda term: f"{term.name}-{term.type}")
def test_tokens_of_two_tokenizers_are_not_paired(configs, term):
    """The student's third token would learn from whatever the teacher reads third."""
    assert_refused(
        lambda: bind_terms([term], *configs, shares_tokens=False),
        f"{term.name} of type {term.type!r} compares token by token",
        "hidden_loss_type='pkd'",
        "'similarity'",
    )


@pytest.mark.parametrize("problem", [problem for problem in PROBLEM_TYPES if problem not in SEQUENCE_PROBLEMS])
def test_logits_of_tokens_of_two_tokenizers(configs, problem):
    """The answers are for tokens, too."""
    assert_refused(
        lambda: bind_terms([LogitTerm()], *configs, problem, shares_tokens=False),
        f"logit_loss: student and teacher have tokenizers of their own, but {problem} has logits for each token",
    )
