"""The objective: each term compares what it says, in its own layers, and costs nothing where it is off."""

import dataclasses
from functools import partial

import pytest
import torch
from conftest import make_model, make_rows
from test_bad_input import assert_refused
from torch import Tensor

from hf_kd.objective import (
    AttentionTerm,
    CustomTerm,
    DistillationObjective,
    HiddenTerm,
    LogitTerm,
    RelationTerm,
    TaskTerm,
    losses,
)
from hf_kd.signals import Capture, Signals, Teacher, TeacherEnsemble, Wanted, count_items, labels_of, problem_of


LABELS = ("labels", "start_positions", "end_positions")


def make_batch(num_rows=6, problem="single_label_classification", padding_side="right"):
    """Rows of ragged length, padded on one side, with the labels of a problem; the last one's are missing."""
    rows = make_rows(num_rows, seed=3)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    position = torch.arange(int(lengths.max()))
    if padding_side == "left":
        position = position.flip(0)
    mask = (position < lengths[:, None]).long()
    batch = {"attention_mask": mask}
    for name in ("input_ids", "token_type_ids"):
        values = torch.cat([torch.tensor(row[name]) for row in rows])
        batch[name] = torch.zeros_like(mask).masked_scatter(mask.bool(), values)
    if problem == "question_answering":
        return {**batch, "start_positions": lengths // 3, "end_positions": lengths - 1}
    labels = {
        "single_label_classification": torch.arange(num_rows) % 2,
        "multi_label_classification": (torch.arange(3 * num_rows).view(-1, 3) % 2).float(),
        "regression": torch.linspace(0, 5, num_rows),
        "token_classification": (batch["input_ids"] % 3).masked_fill(mask == 0, -100),
        "masked_lm": batch["input_ids"].masked_fill((batch["input_ids"] % 4 != 0) | (mask == 0), -100),
    }[problem]
    labels[-1] = -100
    return {**batch, "labels": labels}


def read(objective, student, teachers, batch):
    """Bind the objective; the signals of the student and of all teachers on a batch, and its labels."""
    problem = problem_of(student)
    objective.bind(student.config, [teacher.config for teacher in teachers], problem=problem)
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    capture = Capture(student, objective.student_wanted)
    with capture:
        outputs = student(**inputs, **capture.forward_kwargs)
    ensemble = TeacherEnsemble([Teacher(teacher, student.config) for teacher in teachers])
    ensemble.watch(objective.teacher_wanted)
    return capture.signals(outputs, inputs), ensemble(inputs), labels_of(batch, problem)


def rows_of(signals, rows):
    """The signals of some rows of the batch."""
    changes = {}
    for field in dataclasses.fields(signals):
        value = getattr(signals, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value[rows]
        elif field.name != "attention_reach":
            changes[field.name] = {layer: tensor[rows] for layer, tensor in value.items()}
    return dataclasses.replace(signals, **changes)


def vectors(signals, layer):
    return signals.queries[layer], signals.keys[layer], signals.values[layer]


def scores(signals, layer):
    return losses.attention_scores(signals.queries[layer], signals.keys[layer])


def same(value, expected):
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


# Each term by hand


def test_each_instance_compares_its_own_layers(student, teacher):
    """Several terms of a kind could share the layers, the type or the weight of the last one."""
    terms = [
        TaskTerm(0.3),
        LogitTerm(0.5, temperature=4.0),
        LogitTerm(0.1, type="mse", name="logits_themselves"),
        HiddenTerm(0.7, layers="0:0", name="embeddings"),
        HiddenTerm(0.2, type="cosine", layers=[(1, 1), (2, 4)], name="directions"),
        AttentionTerm(0.4, type="kl", layers="2:3"),
        AttentionTerm(0.6, layers="1:4", head_reduction="mean", name="mean_attention"),
        RelationTerm(0.9, type="similarity", layers="1:2", name="similar_rows"),
        RelationTerm(1.1, layers="2:4,1:2", relation_heads=8),
    ]
    objective = DistillationObjective(terms)
    s, (t,), labels = read(objective, student, [teacher], make_batch())
    values = objective(s, t, labels)
    mask = s.attention_mask
    expected = {
        "task_loss": losses.task_loss(s.logits, labels),
        "logit_loss": losses.logit_kl(s.logits, t.logits, temperature=4.0),
        "logits_themselves": losses.logit_mse(s.logits, t.logits),
        "embeddings": losses.hidden_mse(s.hidden[0], t.hidden[0], mask),
        "directions": (
            losses.hidden_cosine(s.hidden[1], t.hidden[1], mask) + losses.hidden_cosine(s.hidden[2], t.hidden[4], mask)
        )
        / 2,
        "attention_loss": losses.attention_kl(scores(s, 2), scores(t, 3), mask),
        "mean_attention": losses.attention_mse(scores(s, 1), scores(t, 4), mask, head_reduction="mean"),
        "similar_rows": losses.relation_similarity(s.hidden[1][:, 0], t.hidden[2][:, 0]),
        "relation_loss": (
            losses.relation_minilm_v2(vectors(s, 2), vectors(t, 4), mask, relation_heads=8)
            + losses.relation_minilm_v2(vectors(s, 1), vectors(t, 2), mask, relation_heads=8)
        )
        / 2,
    }
    assert list(values) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-6, atol=0, msg=name)
    total = sum(term.weight * expected[term.name] for term in terms)
    torch.testing.assert_close(objective.weighted_sum(values), total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["gram", "nst"])
@pytest.mark.parametrize(
    ("layers", "neighbours"),
    [
        ("0:0,1:2,2:4", [((0, 0), (1, 2)), ((1, 2), (2, 4))]),
        ("1:3,2:4", [((1, 3), (2, 4))]),
        ("last", [((2, 4), (2, 4))]),
    ],
)
def test_flows_run_from_each_layer_to_the_next(student, teacher, kind, layers, neighbours):
    """A flow between a layer and itself, or between student layers of other teacher layers, says something else."""
    objective = DistillationObjective([HiddenTerm(type=kind, layers=layers)])
    s, (t,), _ = read(objective, student, [teacher], make_batch())
    loss = getattr(losses, f"hidden_{kind}")
    expected = [
        loss((s.hidden[a], s.hidden[c]), (t.hidden[b], t.hidden[d]), s.attention_mask) for (a, b), (c, d) in neighbours
    ]
    same(objective(s, t)["hidden_loss"], torch.stack(expected).mean())


@pytest.mark.parametrize("kind", ["pkd", "similarity", "rkd", "pkt", "correlation", "crd"])
def test_rows_are_read_at_their_first_token(student, teacher, kind):
    """With padding on the left, column 0 is padding: every row would look like every other."""
    term = HiddenTerm(type="pkd", layers="last") if kind == "pkd" else RelationTerm(type=kind)
    objective = DistillationObjective([term])
    batch = make_batch(padding_side="left")
    s, (t,), _ = read(objective, student, [teacher], batch)
    first = batch["attention_mask"].argmax(dim=1)
    assert first.unique().numel() > 2
    rows = torch.arange(len(first))
    states = s.hidden[2][rows, first], t.hidden[4][rows, first]
    value = objective(s, t)[term.name]
    if kind == "pkd":
        x, y = (torch.nn.functional.normalize(x, dim=-1) for x in states)
        torch.testing.assert_close(value, (x - y).square().sum(dim=-1).mean())
    else:
        same(value, getattr(losses, f"relation_{kind}")(*states))


def test_relations_stay_within_local_attention():
    """A ModernBERT layer that sees its neighbours alone has no attention further away to compare."""
    generator = torch.Generator().manual_seed(0)

    def signals(layer, reach):
        q, k, v = ({layer: torch.randn(2, 4, 7, 8, generator=generator)} for _ in range(3))
        return Signals(
            torch.zeros(2, 2), torch.ones(2, 7), queries=q, keys=k, values=v, attention_reach={layer: reach}
        )

    config = make_model(num_hidden_layers=2).config
    s, t = signals(2, 3), signals(2, 1)
    for kind, options in (("minilm_v1", {}), ("minilm_v2", {"relation_heads": 4})):
        objective = DistillationObjective([RelationTerm(type=kind, **options)]).bind(config, config)
        loss = partial(getattr(losses, f"relation_{kind}"), vectors(s, 2), vectors(t, 2), s.attention_mask, **options)
        value = objective(s, t)["relation_loss"]
        same(value, loss(reach=1))
        assert value != loss(reach=3) and value != loss()


@pytest.mark.parametrize(
    ("term", "loss"),
    [
        (LogitTerm(type="js", options={"beta": 0.2}), partial(losses.logit_js, temperature=2.0, beta=0.2)),
        (
            LogitTerm(type="decoupled_kl", options={"target_weight": 0.5, "non_target_weight": 2.0}),
            partial(losses.logit_decoupled_kl, temperature=2.0, target_weight=0.5, non_target_weight=2.0),
        ),
        (RelationTerm(type="crd", options={"temperature": 0.5}), partial(losses.relation_crd, temperature=0.5)),
        (
            RelationTerm(type="rkd", options={"distance_weight": 2.0, "angle_weight": 0.0}),
            partial(losses.relation_rkd, distance_weight=2.0, angle_weight=0.0),
        ),
        (
            RelationTerm(options={"relation_weights": (0.0, 0.0, 1.0)}),
            partial(losses.relation_minilm_v2, relation_heads=2, relation_weights=(0.0, 0.0, 1.0)),
        ),
    ],
    ids=lambda value: getattr(value, "type", ""),
)
def test_options_reach_their_loss(term, loss):
    """An option that nothing reads looks like any other in a table of hyperparameters."""
    student, teacher = make_model(seed=2, num_hidden_layers=2, num_labels=4), make_model(seed=1, num_labels=4)
    objective = DistillationObjective([term])
    s, (t,), labels = read(objective, student, [teacher], make_batch())
    if isinstance(term, LogitTerm):
        arguments = [s.logits, t.logits]
        if term.type == "decoupled_kl":
            arguments.append(torch.where(labels == -100, t.logits.argmax(dim=-1), labels))
    elif term.type == "minilm_v2":
        arguments = [vectors(s, 2), vectors(t, 4), s.attention_mask]
    else:
        arguments = [s.hidden[2][:, 0], t.hidden[4][:, 0]]
    same(objective(s, t, labels)[term.name], loss(*arguments))
    plain = DistillationObjective([dataclasses.replace(term, options={})])
    plain.bind(student.config, teacher.config)
    assert plain(s, t, labels)[term.name] != loss(*arguments)


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (lambda: LogitTerm(type="js", options={"alpha": 1.0}), "it reads ['beta']"),
        (lambda: LogitTerm(options={"temperature": 3.0}), "it reads none"),
        (lambda: RelationTerm(type="crd", options={"tau": 1.0}), "it reads ['temperature']"),
        (lambda: RelationTerm(options={"relation_heads": 4}), "it reads ['relation_weights']"),
        (lambda: RelationTerm(type="similarity", options={"reach": 4}), "it reads none"),
    ],
)
def test_unknown_options_are_refused(make, known):
    """A misspelt option would leave the default in place; one of the objective's own would be given twice."""
    assert_refused(make, "which type=", "does not read", known)


def test_guessed_answers_are_never_padding():
    """decoupled_kl takes the teacher's likeliest position where there is no label; a model also scores the padding."""
    student, teacher = (make_model(seed=i, problem="question_answering", num_hidden_layers=2) for i in (2, 1))
    objective = DistillationObjective([LogitTerm(type="decoupled_kl")])
    s, (t,), _ = read(objective, student, [teacher], make_batch(problem="question_answering"))
    value = objective(s, t)["logit_loss"]
    padding = (t.attention_mask == 0)[:, None]
    same(objective(s, dataclasses.replace(t, logits=t.logits.masked_fill(padding, 1e4)))["logit_loss"], value)


# What a term costs


@pytest.mark.parametrize(
    ("term", "student_wanted", "teacher_wanted"),
    [
        (TaskTerm(), Wanted(), Wanted()),
        (LogitTerm(), Wanted(), Wanted()),
        (HiddenTerm(layers="0:0,2:3"), Wanted(frozenset({0, 2})), Wanted(frozenset({0, 3}))),
        (
            AttentionTerm(layers="1:4"),
            Wanted(attention=frozenset({1})),
            Wanted(attention=frozenset({4})),
        ),
        (RelationTerm(type="similarity"), Wanted(frozenset({2})), Wanted(frozenset({4}))),
        (
            RelationTerm(type="minilm_v2"),
            Wanted(attention=frozenset({2}), values=frozenset({2})),
            Wanted(attention=frozenset({4}), values=frozenset({4})),
        ),
        (
            CustomTerm(print, hidden_layers="1:2", attention_layers="2:3"),
            Wanted(frozenset({1}), frozenset({2}), frozenset({2})),
            Wanted(frozenset({2}), frozenset({3}), frozenset({3})),
        ),
        (CustomTerm(print), Wanted(), Wanted()),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_only_what_is_compared_is_read(student, teacher, term, student_wanted, teacher_wanted):
    """Every signal is memory for a whole batch, kept until the backward."""
    objective = DistillationObjective([term]).bind(student.config, teacher.config)
    assert (objective.student_wanted, objective.teacher_wanted) == (student_wanted, teacher_wanted)


def test_values_are_read_for_relations_alone(student, teacher):
    """An attention term beside a relation term would make every one of its layers keep values too."""
    objective = DistillationObjective([AttentionTerm(layers="uniform"), RelationTerm()])
    objective.bind(student.config, teacher.config)
    assert objective.student_wanted == Wanted(attention=frozenset({1, 2}), values=frozenset({2}))
    assert objective.teacher_wanted == Wanted(attention=frozenset({2, 4}), values=frozenset({4}))


def test_terms_of_weight_0_are_not_there():
    """Layers that no loss reads would be captured and projected, and models refused for a term that is off."""
    student, teacher = make_model(seed=2, num_hidden_layers=6, hidden_size=16, num_attention_heads=2), make_model()
    off = [HiddenTerm(0.0), AttentionTerm(0.0), RelationTerm(0.0, type="minilm_v1"), CustomTerm(print, 0.0)]
    objective = DistillationObjective([LogitTerm(), *off])
    s, (t,), _ = read(objective, student, [teacher], make_batch())
    assert objective.student_wanted == objective.teacher_wanted == Wanted()
    assert list(objective.parameters()) == [] and not objective.has_projections
    assert list(objective(s, t)) == ["logit_loss"]


# Widths and heads

NARROW = {"hidden_size": 16, "num_attention_heads": 2}


@pytest.mark.parametrize("kind", ["mse", "cosine", "pkd", "gram", "crd"])
def test_vectors_are_projected_to_the_teachers_width(teacher, kind):
    """Without a projection they cannot be compared; without its gradient they are compared through noise."""
    student = make_model(seed=2, num_hidden_layers=2, **NARROW)
    term = RelationTerm(type="crd", layers="uniform") if kind == "crd" else HiddenTerm(type=kind)
    objective = DistillationObjective([term])
    s, (t,), _ = read(objective, student, [teacher], make_batch())
    maps = objective.projections[term.name].maps
    assert {layer: (m.in_features, m.out_features) for layer, m in maps.items()} == {"1": (16, 32), "2": (16, 32)}
    objective.weighted_sum(objective(s, t)).backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert student.bert.encoder.layer[0].output.dense.weight.grad.any()


@pytest.mark.parametrize("kind", ["nst", "similarity", "rkd", "pkt", "correlation", "minilm_v2"])
def test_relations_need_no_projection(teacher, kind):
    """A projection that is not needed lets the student's own relations be anything."""
    student = make_model(seed=2, num_hidden_layers=2, **NARROW)
    term = HiddenTerm(type="nst") if kind == "nst" else RelationTerm(type=kind)
    objective = DistillationObjective([term])
    s, (t,), _ = read(objective, student, [teacher], make_batch())
    assert not objective.has_projections
    objective.weighted_sum(objective(s, t)).backward()
    assert student.bert.encoder.layer[0].attention.self.key.weight.grad.any()


def test_projections_stay_where_an_optimizer_holds_them(teacher):
    """Binding again would leave the optimizer with weights that nothing reads."""
    student = make_model(seed=2, num_hidden_layers=2, **NARROW)
    objective = DistillationObjective([HiddenTerm()]).bind(student.config, teacher.config)
    held = list(objective.parameters())
    objective.bind(student.config, teacher.config)
    assert all(mine is theirs for mine, theirs in zip(objective.parameters(), held, strict=True))
    objective.bind(teacher.config, teacher.config)
    assert not objective.has_projections


def test_minilm_v2_trains_a_student_of_other_widths_and_heads(teacher):
    """What MiniLMv2 is for; a reshape of the wrong axes would still give some loss that falls no further."""
    student = make_model(seed=2, num_hidden_layers=2, hidden_size=24, num_attention_heads=3, intermediate_size=48)
    objective = DistillationObjective([RelationTerm()])
    batch = make_batch()
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    found = []
    for _ in range(30):
        s, (t,), _ = read(objective, student, [teacher], batch)
        loss = objective.weighted_sum(objective(s, t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert objective.binding.relation_heads == {"relation_loss": 2}
    assert not objective.has_projections
    assert found[-1] < 0.5 * found[0]


# A term of one's own


def confidence_gap(student, teacher, labels):
    return (student.logits.softmax(-1).amax(-1) - teacher.logits.softmax(-1).amax(-1)).square().mean()


class FirstStates:
    """A small object with a call, which reads hidden states, queries and labels."""

    def __call__(self, student, teacher, labels):
        gap = (student.hidden[2][:, 0] - teacher.hidden[4][:, 0]).square().mean(dim=-1)
        products = (student.queries[1] * teacher.values[3]).sum(dim=(1, 2, 3))
        return (gap * labels.clamp(min=0) + products).mean()


def test_a_term_is_a_function_or_an_object_with_a_call(student, teacher):
    """Users extend the objective without a class of ours; what their function asks for must be there."""
    terms = [
        CustomTerm(confidence_gap, 0.5),
        CustomTerm(FirstStates(), 2.0, hidden_layers="2:4", attention_layers="1:3"),
        CustomTerm(confidence_gap, 1.0, name="again"),
    ]
    objective = DistillationObjective(terms)
    s, (t,), labels = read(objective, student, [teacher], make_batch())
    values = objective(s, t, labels)
    assert list(values) == ["confidence_gap", "custom_loss", "again"]
    same(values["confidence_gap"], confidence_gap(s, t, labels))
    same(values["custom_loss"], FirstStates()(s, t, labels))
    total = 0.5 * values["confidence_gap"] + 2.0 * values["custom_loss"] + values["again"]
    torch.testing.assert_close(objective.weighted_sum(values), total)


# Parts of an optimisation step

ADDITIVE = [
    *(LogitTerm(type=kind) for kind in (None, "soft_ce", "reverse_kl", "js", "mse", "standardized_kl")),
    LogitTerm(type="decoupled_kl"),
    *(HiddenTerm(type=kind) for kind in ("mse", "cosine", "pkd", "gram", "nst")),
    *(AttentionTerm(type=kind) for kind in ("mse", "kl", "cosine")),
    AttentionTerm(head_reduction="mean"),
    *(RelationTerm(type=kind) for kind in ("minilm_v1", "minilm_v2")),
    CustomTerm(confidence_gap),
    TaskTerm(),
]
OF_PROBLEMS = {
    "single_label_classification": ADDITIVE,
    "multi_label_classification": [TaskTerm(), LogitTerm(), LogitTerm(type="mse"), HiddenTerm()],
    "regression": [TaskTerm(), LogitTerm()],
    "token_classification": [TaskTerm(), LogitTerm(), LogitTerm(type="decoupled_kl"), HiddenTerm()],
    "question_answering": [TaskTerm(), LogitTerm(), LogitTerm(type="decoupled_kl"), AttentionTerm()],
    "masked_lm": [TaskTerm(), LogitTerm(), RelationTerm()],
}


@pytest.mark.parametrize(
    ("problem", "term"),
    [(problem, term) for problem, terms in OF_PROBLEMS.items() for term in terms],
    ids=lambda value: getattr(value, "name", value) + str(getattr(value, "type", "")),
)
@torch.no_grad()
def test_parts_of_a_step_add_up_to_the_whole(problem, term):
    """Divided by the wrong count, the loss would depend on gradient accumulation and the number of processes."""
    changes = {"num_labels": 4} if problem == "single_label_classification" else {}
    student, teacher = (make_model(seed=i, num_hidden_layers=2, problem=problem, **changes) for i in (2, 1))
    batch = make_batch(problem=problem)
    objective = DistillationObjective([term])
    s, (t,), labels = read(objective, student, [teacher], batch)
    whole = objective(s, t, labels)[term.name]
    items, total = count_items(batch, problem), torch.tensor(0.0)
    torch.testing.assert_close(objective(s, t, labels, items)[term.name], whole)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts = rows_of(s, rows), rows_of(t, rows), labels[rows]
        total += objective(*parts, num_items=items)[term.name]
    torch.testing.assert_close(total, whole)


@pytest.mark.parametrize("kind", ["similarity", "rkd", "pkt", "correlation", "crd"])
@torch.no_grad()
def test_relations_of_parts_count_by_their_rows(student, teacher, kind):
    """They do not add up to the whole, but an odd part must not count like a full one."""
    objective = DistillationObjective([RelationTerm(type=kind)])
    batch = make_batch()
    s, (t,), _ = read(objective, student, [teacher], batch)
    items = count_items(batch)
    parts = [(rows_of(s, rows), rows_of(t, rows)) for rows in (slice(0, 4), slice(4, 6))]
    counted = sum(objective(*part, num_items=items)["relation_loss"] for part in parts)
    alone = [objective(*part)["relation_loss"] for part in parts]
    torch.testing.assert_close(counted, (4 * alone[0] + 2 * alone[1]) / 6)


# Schedules


def test_terms_follow_their_schedules(teacher):
    """A term outside its window would cost its computation, and a factor could scale another term."""
    calls = []

    def counted(student, teacher, labels):
        calls.append(1)
        return student.logits.sum()

    student = make_model(seed=2, num_hidden_layers=2, **NARROW)
    terms = [
        TaskTerm(2.0, schedule="linear:1:0"),
        CustomTerm(counted, 3.0, schedule="window:0.25:0.5"),
        HiddenTerm(5.0, schedule="window:0.5:1"),
        LogitTerm(7.0, schedule="cosine:0:1", temperature=2.0, temperature_schedule="linear:2:1"),
    ]
    objective = DistillationObjective(terms)
    s, (t,), labels = read(objective, student, [teacher], make_batch())
    expected = {
        0.0: {"task_loss": 2.0},
        0.25: {"task_loss": 1.5, "counted": 3.0, "logit_loss": 7.0 * 0.5 * (1 - 0.5**0.5)},
        0.5: {"task_loss": 1.0, "hidden_loss": 5.0, "logit_loss": 3.5},
        1.0: {"hidden_loss": 5.0, "logit_loss": 7.0},
    }
    for progress, on in expected.items():
        calls.clear()
        values = objective(s, t, labels, progress=progress)
        assert (
            list(values)
            == [term.name for term in terms if term.name in on]
            == [term.name for term in objective.terms_on(progress)]
        )
        assert len(calls) == ("counted" in on)
        total = sum(weight * values[name] for name, weight in on.items())
        torch.testing.assert_close(objective.weighted_sum(values, progress), total)
        assert objective.compares_with_teacher(progress) == (set(on) != {"task_loss"})
        assert objective.uses_logits(progress)
        if "logit_loss" in on:
            temperature = 2.0 * (2.0 - progress)
            same(values["logit_loss"], losses.logit_kl(s.logits, t.logits, temperature=temperature))


@pytest.mark.parametrize(
    "term", [HiddenTerm(schedule="window:0:0.5"), RelationTerm(type="crd", schedule="linear:1:0")]
)
def test_projections_of_a_term_that_is_off_get_a_gradient_of_0(teacher, term):
    """DDP waits for a gradient of every parameter; without one the run stops, or hangs, at the end of a window."""
    student = make_model(seed=2, num_hidden_layers=2, **NARROW)
    objective = DistillationObjective([term, LogitTerm()])
    s, (t,), labels = read(objective, student, [teacher], make_batch())
    values = objective(s, t, labels, progress=1.0)
    assert list(values) == ["logit_loss"]
    same(values["logit_loss"], losses.logit_kl(s.logits, t.logits, temperature=2.0))
    objective.weighted_sum(values, 1.0).backward()
    assert [p.grad.any().item() for p in objective.parameters()] == [False] * len(list(objective.parameters()))


@pytest.mark.parametrize(
    ("schedules", "time"),
    [
        (["window:0:0.4", "window:0.5:1"], "0.4"),
        (["window:0.1:1", "window:0.5:1"], "0"),
        (["window:0:0.5", "window:0.25:0.75"], "0.75"),
        (["linear:0:1", "cosine:0:1"], "0"),
        (["linear:0:1", "window:0.5:1"], "0"),
    ],
)
def test_a_time_at_which_every_term_is_off_is_refused(schedules, time):
    """Its steps would train nothing, or the run would stop there."""
    terms = [HiddenTerm(schedule=schedules[0]), LogitTerm(schedule=schedules[1]), TaskTerm(0.0)]
    assert_refused(
        lambda: DistillationObjective(terms), f"every term is off at {time} of the training", "'window:0.5:1'"
    )


@pytest.mark.parametrize(
    "schedules",
    [
        ["window:0:0.5", "window:0.5:1"],
        ["window:0.5:1", "window:0:0.6"],
        ["linear:0:1", "window:0:0.1"],
        ["linear:0:1", None],
        ["cosine:1:0", "window:0.9:1"],
        ["linear:1:0", "linear:1:0"],
    ],
)
def test_schedules_without_a_gap_are_taken(schedules):
    """An end that no step is at, or a rise beside a term that is on, is no gap."""
    terms = [HiddenTerm(schedule=schedules[0]), LogitTerm(schedule=schedules[1])]
    objective = DistillationObjective(terms)
    assert all(objective.terms_on(step / 1000) for step in range(1000))


# Signals that do not fit


def test_signals_of_another_number_of_teachers(student, teacher):
    """The second teacher's share would be given to the first, or a term be compared with nothing."""
    objective = DistillationObjective([LogitTerm()])
    s, (t,), _ = read(objective, student, [teacher], make_batch())
    assert_refused(lambda: objective(s), "logit_loss has weight 0.5, but there are no teacher signals")
    assert_refused(lambda: objective(s, [t, t]), "logit_loss: there are signals of 2 teachers", "is bound to 1")
    objective.bind(student.config, [teacher.config, teacher.config])
    assert_refused(lambda: objective(s, t), "logit_loss: there are signals of 1 teachers", "is bound to 2")


def test_the_second_teacher_was_not_read(student, teacher):
    """The error would be a KeyError of a number, or name the wrong side."""
    objective = DistillationObjective([HiddenTerm(teacher=1, layers="2:3"), LogitTerm()])
    s, (t0, t1), _ = read(objective, student, [teacher, make_model()], make_batch())
    assert set(t0.hidden) == set() and set(t1.hidden) == {3}
    assert objective(s, [t0, t1])["hidden_loss"] > 0
    assert_refused(lambda: objective(s, [t1, t0]), "the teacher signals lack hidden states of layers [3]")


def test_values_were_not_read(student, teacher):
    """A relation term reads more than an attention term, which a loop with its own capture may not know."""
    objective = DistillationObjective([RelationTerm()])
    s, (t,), _ = read(objective, student, [teacher], make_batch())
    lacking = dataclasses.replace(s, values={})
    assert_refused(
        lambda: objective(lacking, t),
        "student signals lack hidden states of layers [], attention of layers [] and values of layers [2]",
        "Capture(student, objective.student_wanted)",
    )


def test_objective_was_not_bound():
    """Whoever forgets it reads what to call."""
    signals = Signals(torch.zeros(1, 2), torch.ones(1, 3))
    assert_refused(lambda: DistillationObjective([TaskTerm()])(signals), "objective.bind(student.config")


# What would be off without a word


def test_schedules_need_to_know_where_the_training_is(student, teacher):
    """A loop of one's own that does not say would stay at the first step's weights for ever."""
    objective = DistillationObjective([LogitTerm(schedule="linear:1:0.5"), TaskTerm()])
    assert_refused(lambda: objective.weighted_sum({}), "the terms have schedules", "pass progress=step / num_steps")
    assert_refused(lambda: objective.terms_on(), "pass progress=step / num_steps")
    cooling = DistillationObjective([LogitTerm(temperature_schedule="linear:1:0.5")])
    assert_refused(lambda: cooling.uses_logits(), "pass progress=step / num_steps")


def test_a_window_between_two_steps():
    """Four steps are at 0, 1/4, 1/2 and 3/4 of the training: a window between them would never open."""
    objective = DistillationObjective([TaskTerm(), LogitTerm(schedule="window:0.3:0.45")])
    assert_refused(lambda: objective.check_every_term_has_a_step(4), "logit_loss", "none of the 4 steps", "widen")
    objective.check_every_term_has_a_step(5)


@pytest.mark.parametrize("name", ["loss", "epoch", "hidden.top", "keys", "hidden loss"])
def test_names_that_are_taken(name):
    """The log would show another value as the loss, or torch stop at a name it cannot use."""
    assert_refused(lambda: HiddenTerm(name=name), f"name={name!r}", "name='my_loss'")


def test_squared_error_has_no_temperature():
    """A schedule that nothing reads would stand in the run's arguments."""
    assert_refused(
        lambda: LogitTerm(type="mse", temperature_schedule="linear:1:0.5"), "type='mse' has no temperature", "drop it"
    )
