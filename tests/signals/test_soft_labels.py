"""Training on soft labels that a dataset brought along: no teacher model, and numbers from anybody."""

import pytest
import torch
import torch.nn.functional as F
from conftest import copy_of, make_dataset, make_model, weights
from datasets import ClassLabel, Dataset, Features, List, Value, load_dataset, load_from_disk
from transformers import DataCollatorWithPadding

from hf_kd import DistillationObjective, DistillationTrainer, HiddenTerm, LogitTerm
from hf_kd.signals import problem_of
from hf_kd.signals.cached_teacher import teachers_of_columns


NAMES = {"id2label": {0: "bad", 1: "good", 2: "so-so"}, "label2id": {"bad": 0, "good": 1, "so-so": 2}}
LABELS = ["bad", "good", "so-so"]
ROWS = 16


@pytest.fixture
def student():
    return make_model(seed=2, num_hidden_layers=2, **NAMES)


@pytest.fixture
def soft():
    """Probabilities of shape (rows, labels)."""
    return torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(5)).mul(2).softmax(-1)


def rows_with(num_labels=3, **columns):
    dataset = make_dataset(num_rows=ROWS, num_labels=num_labels)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def as_structs(values, names=LABELS):
    return [dict(zip(names, row, strict=True)) for row in values.tolist()]


def make_trainer(student, rows, args, collator, **kwargs):
    return DistillationTrainer(student, args, train_dataset=rows, data_collator=collator, **kwargs)


def loss_of(trainer):
    """Of the first rows as they stand, with its gradient."""
    rows = [trainer.train_dataset[index] for index in range(ROWS)]
    columns = set(trainer.student_columns) | trainer.teacher.columns
    batch = trainer.data_collator([{name: row[name] for name in row if name in columns} for row in rows])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return loss


def kl(student_logits, probs, temperature):
    """By hand: KL(softmax(log p / T) || softmax(s / T)) * T^2, mean over rows."""
    teacher = (probs.log() / temperature).softmax(-1)
    student = (student_logits / temperature).log_softmax(-1)
    return (teacher * (teacher.log() - student)).sum(-1).mean() * temperature**2


def student_logits(model, rows, tokenizer):
    names = ("input_ids", "attention_mask", "token_type_ids")
    batch = DataCollatorWithPadding(tokenizer)([{name: row[name] for name in names} for row in rows])
    return model(**batch).logits


# The loss


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("form", ["probs", "logits", "log-probabilities", "struct", "fixed size"])
def test_loss_is_the_divergence_from_the_column(student, soft, make_args, collator, tokenizer, form, temperature):
    """Probabilities taken for logits would be softened to nearly nothing, and train all the same."""
    columns = {
        "probs": {"teacher_probs": soft.tolist()},
        "logits": {"teacher_logits": (soft.log() + 3.0).tolist()},
        "log-probabilities": {"teacher_logits": soft.log().tolist()},
        "struct": {"teacher_probs": as_structs(soft)},
        "fixed size": {"teacher_probs": soft.tolist()},
    }
    rows = rows_with(**columns[form])
    if form == "fixed size":
        rows = rows.cast_column("teacher_probs", List(Value("float64"), length=3))
    labels = None if form == "struct" else LABELS
    args = make_args(task_loss_weight=0.0, logit_loss_weight=1.0, temperature=temperature, teacher_labels=labels)
    trainer = make_trainer(student, rows, args, collator)
    loss = loss_of(trainer)
    expected = kl(student_logits(student, rows, tokenizer), soft, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())
    assert student.classifier.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("names", [["so-so", "bad", "good"], ["Good", "SO-SO", "BAD"]])
@pytest.mark.parametrize("form", ["list", "struct"])
def test_labels_go_by_name(student, soft, make_args, collator, names, form):
    """An LLM's answer lists the labels in its prompt's order; taken by index, it would teach other classes."""
    order = [LABELS.index(name.lower()) for name in names]
    values, labels = soft[:, order], names if form == "list" else None
    column = values.tolist() if form == "list" else as_structs(values, names)
    losses = []
    for stored, given in ((soft.tolist(), LABELS), (column, labels)):
        args = make_args(teacher_labels=given)
        losses.append(loss_of(make_trainer(copy_of(student), rows_with(teacher_probs=stored), args, collator)))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0.0)


def test_labels_named_in_the_features(student, soft, make_args, collator, tmp_path):
    """Whoever gets the rows does not know the order of the list: it has to come with them, whatever way they took."""
    names = ["so-so", "bad", "good"]
    values = soft[:, [LABELS.index(name) for name in names]]
    rows = rows_with(teacher_probs=values.tolist(), teacher_labels=values.argmax(-1).tolist())
    rows = rows.cast_column("teacher_labels", ClassLabel(names=names))
    rows.save_to_disk(str(tmp_path / "rows"))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    read = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path))
    in_order = rows_with(teacher_probs=soft.tolist())
    expected = loss_of(make_trainer(copy_of(student), in_order, make_args(teacher_labels=LABELS), collator))
    for found in (rows, load_from_disk(str(tmp_path / "rows")), read, rows.map(lambda row: {"is_new": True})):
        args = make_args(remove_unused_columns=False, max_steps=1)
        trainer = make_trainer(copy_of(student), found, args, collator)
        torch.testing.assert_close(loss_of(trainer), expected, rtol=1e-6, atol=0.0)
        trainer.train()  # the column is of no model
    flagged = make_trainer(student, rows, make_args(teacher_labels=LABELS), collator)
    assert list(flagged.teacher.config.id2label.values()) == LABELS


def test_labels_of_several_teachers_in_the_features(student, soft):
    """People were shown the answers in one order, and an LLM in another."""
    columns = {"teacher_0_probs": soft.tolist(), "teacher_1_probs": soft.tolist()}
    rows = rows_with(**columns, teacher_0_labels=[0] * ROWS, teacher_1_labels=[0] * ROWS)
    for index, names in enumerate([LABELS, LABELS[::-1]]):
        rows = rows.cast_column(f"teacher_{index}_labels", ClassLabel(names=names))
    teachers = teachers_of_columns(rows, student.config, problem_of(student))
    assert [list(teacher.config.id2label.values()) for teacher in teachers] == [LABELS, LABELS[::-1]]


def test_a_probability_of_zero(student, make_args, collator):
    """Its logarithm would make the loss of whoever votes unanimously infinite."""
    rows = rows_with(teacher_probs=[[1.0, 0.0, 0.0]] * ROWS)
    args = make_args(teacher_labels=LABELS, task_loss_weight=0.0, logit_loss_weight=1.0, temperature=1.0)
    trainer = make_trainer(student, rows, args, collator)
    loss = loss_of(trainer)
    plain = make_trainer(copy_of(student), rows, make_args(task_loss_weight=0.0, teacher_labels=LABELS), collator)
    signals = plain.teacher(plain.data_collator([rows[0]]))
    assert torch.isfinite(loss)
    assert signals.logits.softmax(-1)[0].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=3e-6)


def test_multi_label(make_args, collator, tokenizer):
    """Of several labels that can be right the probabilities do not add up to 1, and each is a yes or no of its own."""
    student = make_model(seed=2, problem="multi_label_classification", **NAMES)
    probs = torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(5)) * 0.9 + 0.05
    rows = rows_with(teacher_probs=as_structs(probs)).remove_columns("labels")
    args = make_args(task_loss_weight=0.0, logit_loss_weight=1.0, temperature=1.0)
    loss = loss_of(make_trainer(student, rows, args, collator))
    logits = student_logits(student, rows, tokenizer)
    entropy = F.binary_cross_entropy(probs, probs)
    expected = F.binary_cross_entropy_with_logits(logits, probs) - entropy
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["scalar", "list", "struct"])
def test_regression(make_args, collator, tokenizer, form):
    """A value has no label, and need not be in a list."""
    student = make_model(seed=2, problem="regression")
    values = torch.linspace(0, 5, ROWS)
    forms = {
        "scalar": values.tolist(),
        "list": values[:, None].tolist(),
        "struct": [{"score": value} for value in values.tolist()],
    }
    rows = rows_with(num_labels=1, teacher_logits=forms[form])
    args = make_args(task_loss_weight=0.0, logit_loss_weight=1.0)
    loss = loss_of(make_trainer(student, rows, args, collator))
    expected = F.mse_loss(student_logits(student, rows, tokenizer)[:, 0], values)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_several_teachers(student, soft, make_args, collator, tokenizer):
    """Several people's answers are averaged; the eleventh must not come before the second."""
    shifted = soft.roll(1, dims=0)
    rows = rows_with(teacher_0_probs=soft.tolist(), teacher_1_probs=as_structs(shifted))
    args = make_args(
        task_loss_weight=0.0, logit_loss_weight=1.0, temperature=1.0, teacher_labels=LABELS, teacher_weights=[3.0, 1.0]
    )
    loss = loss_of(make_trainer(student, rows, args, collator))
    expected = kl(student_logits(student, rows, tokenizer), 0.75 * soft + 0.25 * shifted, 1.0)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    many = rows_with(**{f"teacher_{index}_probs": soft.tolist() for index in range(12)})
    teachers = teachers_of_columns(many, student.config, problem_of(student), LABELS)
    assert [teacher.prefix for teacher in teachers] == [f"teacher_{index}_" for index in range(12)]


# Training


@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize("form", ["list", "struct", "stream"])
def test_training_learns_the_column(student, soft, make_args, collator, form, remove_unused_columns):
    """The column would be removed as one that no model reads, or be handed to the student's forward."""
    hard = F.one_hot(soft.argmax(-1), 3).float() * 0.9 + 0.1 / 3
    rows = rows_with(teacher_probs=hard.tolist() if form != "struct" else as_structs(hard))
    rows = rows.remove_columns("labels")
    if form == "stream":
        rows = rows.to_iterable_dataset()
    args = make_args(
        task_loss_weight=0.0,
        logit_loss_weight=1.0,
        teacher_labels=None if form == "struct" else LABELS,
        remove_unused_columns=remove_unused_columns,
        max_steps=20,
        learning_rate=5e-3,
        eval_strategy="steps",
        eval_steps=10,
    )
    evaluation = make_dataset(num_rows=8, num_labels=3, seed=9)  # without the column
    trainer = make_trainer(student, rows, args, collator, eval_dataset=evaluation)
    before = weights(student)
    trainer.train()
    losses = [entry["logit_loss"] for entry in trainer.state.log_history if "logit_loss" in entry]
    assert losses[-1] < 0.5 * losses[0] and not weights(student).equal(before)
    assert "eval_loss" in trainer.evaluate()


def test_agreement_on_rows_that_carry_them(student, soft, make_args, collator):
    """The share of equal predictions would be of labels in another order."""
    rows = rows_with(teacher_probs=as_structs(soft[:, [2, 0, 1]], ["so-so", "bad", "good"]))
    args = make_args(eval_teacher_agreement=True)
    trainer = make_trainer(student, rows, args, collator, eval_dataset=rows)
    predicted = torch.tensor(trainer.predict(rows).predictions).argmax(-1)
    agreement = (predicted == soft.argmax(-1)).float().mean().item()
    assert trainer.evaluate()["eval_teacher_agreement"] == pytest.approx(agreement)
    in_order, upper = as_structs(soft), as_structs(soft[:, [1, 2, 0]], ["GOOD", "SO-SO", "BAD"])
    for others in (in_order, upper):  # evaluation rows from another file
        found = trainer.evaluate(rows_with(teacher_probs=others))
        assert found["eval_teacher_agreement"] == pytest.approx(agreement)


def test_answers_of_the_column_and_states_of_a_model(student, soft, make_args, collator):
    """An LLM's probabilities and an encoder's hidden states together; the encoder's own answers stay unread."""
    teacher = make_model(seed=1, **NAMES)
    rows = rows_with(teacher_probs=as_structs(soft))
    args = make_args(hidden_loss_weight=1.0)
    mixed = make_trainer(student, rows, args, collator, teacher_model=teacher)
    batch = mixed.data_collator([rows[index] for index in range(ROWS)])
    signals = mixed.teacher(batch)
    torch.testing.assert_close(signals.logits.softmax(-1), soft)
    bare = rows.remove_columns("teacher_probs")
    online = make_trainer(copy_of(student), bare, args, collator, teacher_model=teacher)
    for layer, states in online.teacher(batch).hidden.items():
        assert signals.hidden[layer].equal(states)


# What is wrong with them


def good(**changes):
    """Probabilities of all rows; a change is of the row of its number."""
    values = [[0.2, 0.3, 0.5] for _ in range(ROWS)]
    for row, value in changes.items():
        values[int(row.removeprefix("row"))] = value
    return values


def structs(rows):
    return [None if row is None else dict(zip(LABELS, row, strict=True)) for row in rows]


BAD = {
    "unnamed": (
        {"teacher_probs": good()},
        None,
        r"nothing says which label.*teacher_labels=\['bad', 'good', 'so-so'\]",
    ),
    "too few names": ({"teacher_probs": good()}, ["bad", "good"], r"labels \['bad', 'good'\], and .*id2label="),
    "other names": ({"teacher_probs": good()}, ["bad", "good", "ok"], r"rename the labels in teacher_labels"),
    "a name twice": ({"teacher_probs": good()}, ["bad", "bad", "good"], r"labels \['bad', 'bad', 'good'\]"),
    "other fields": (
        {"teacher_probs": [{"neg": 0.5, "pos": 0.5}] * ROWS},
        None,
        r"labels \['neg', 'pos'\].*id2label=\{0: 'neg', 1: 'pos'\}.*in the struct",
    ),
    "too short": (
        {"teacher_probs": good(row7=[0.5, 0.5])},
        LABELS,
        r"teacher_probs, row 7: 2 numbers, and the student has 3 labels",
    ),
    "no row": ({"teacher_probs": good(row3=None)}, LABELS, r"teacher_probs, row 3: 0 numbers"),
    "none": ({"teacher_probs": good(row3=[0.5, None, 0.5])}, LABELS, r"row 3: \[0.5, nan, 0.5\] has a number"),
    "nan": ({"teacher_logits": good(row4=[0.5, float("nan"), 1.0])}, LABELS, r"logits, row 4: .*correct or remove"),
    "infinite": ({"teacher_logits": good(row4=[0.5, float("-inf"), 1.0])}, LABELS, r"row 4: .*not finite"),
    "no struct": ({"teacher_probs": structs(good(row5=None))}, None, r"row 5: \[nan, nan, nan\] has a number"),
    "none in a struct": ({"teacher_probs": structs(good(row5=[None, 0.5, 0.5]))}, None, r"row 5: \[nan, 0.5, 0.5\]"),
    "negative": ({"teacher_probs": good(row6=[-0.1, 0.6, 0.5])}, LABELS, r"row 6: .*no probabilities.*teacher_logits"),
    "above one": ({"teacher_probs": good(row6=[3.0, 0.0, 1.0])}, LABELS, r"row 6: .*divide counts by their sum"),
    "sum": ({"teacher_probs": good(row9=[0.2, 0.3, 0.4])}, LABELS, r"row 9: \[0.2, 0.3, 0.4\] do not add up"),
    "texts": ({"teacher_probs": ["[0.2, 0.8]"] * ROWS}, LABELS, r"type Value\('string'\).*json.loads"),
    "nested": ({"teacher_probs": [[[0.2, 0.8]]] * ROWS}, LABELS, r"a list of numbers, or a struct"),
    "both": ({"teacher_probs": good(), "teacher_logits": good()}, LABELS, r"not both"),
    "a gap": ({"teacher_0_probs": good(), "teacher_2_probs": good()}, LABELS, r"without a gap; rename them"),
    "one and several": ({"teacher_probs": good(), "teacher_0_probs": good()}, LABELS, r"rename them"),
}


@pytest.mark.parametrize("columns,labels,message", BAD.values(), ids=BAD)
def test_bad_columns_end_before_training(student, make_args, collator, columns, labels, message):
    """A wrong row among 60,000 would move the student a little, and nobody would know."""
    with pytest.raises(ValueError, match=message):
        make_trainer(student, rows_with(**columns), make_args(teacher_labels=labels), collator)


def test_rounded_probabilities_are_fine(student, make_args, collator):
    """Two digits are what an LLM writes, and they add up to 0.99 or 1.01; a subtraction may end below 0."""
    rounded = {"row1": [0.34, 0.34, 0.33], "row2": [0.33, 0.33, 0.33], "row3": [0.5, 0.5, -1e-9]}
    rows = rows_with(teacher_probs=good(**rounded))
    assert make_trainer(student, rows, make_args(teacher_labels=LABELS), collator).teacher is not None


def test_rows_are_numbered_as_they_stand(student, make_args, collator):
    """In a selection or after 10,000 rows, the number would be that of another row."""
    many = Dataset.from_dict({"teacher_probs": [*([[0.2, 0.3, 0.5]] * 12_000), [0.2, 0.3, 0.1]]})
    problem = problem_of(student)
    with pytest.raises(ValueError, match="row 12000"):
        teachers_of_columns(many, student.config, problem, LABELS)
    with pytest.raises(ValueError, match="row 1:"):
        teachers_of_columns(many.select([5, 12_000]), student.config, problem, LABELS)


def test_a_bad_row_of_a_stream(student, make_args, collator):
    """A stream is not read to its end before training, and Trainer would filter the NaN out of its log."""
    many = [{**row, "teacher_probs": [0.2, 0.3, 0.5]} for row in make_dataset(num_rows=8, num_labels=3)]
    bad = {**many[0], "teacher_probs": [0.2, float("nan"), 0.5]}
    features = Features({**rows_with(teacher_probs=good()).features})
    rows = Dataset.from_list([*many * 1250, bad], features=features).select(range(10_000 - 8, 10_001))
    stream = Dataset.from_list([*many * 1250, bad], features=features).to_iterable_dataset()
    trainer = make_trainer(student, stream, make_args(teacher_labels=LABELS), collator)  # its first rows are fine
    with pytest.raises(ValueError, match="teacher_probs has a number that is missing"):
        trainer.teacher(trainer.data_collator([rows[8]]))
    with pytest.raises(ValueError, match="row 0:"):
        make_trainer(student, rows.select([8]).to_iterable_dataset(), make_args(teacher_labels=LABELS), collator)


@pytest.mark.parametrize("weight", ["hidden_loss_weight", "attention_loss_weight", "relation_loss_weight"])
def test_soft_labels_have_no_layers(student, soft, make_args, collator, weight):
    """The student's own config stands in for the teacher's, and layers of it would be looked for in the first step."""
    args = make_args(**{weight: 1.0})
    with pytest.raises(ValueError, match="pass teacher_model= to run the teacher for them, or set the weights"):
        make_trainer(student, rows_with(teacher_probs=as_structs(soft)), args, collator)


@pytest.mark.parametrize("problem", ["regression", "token_classification"])
def test_problems_without_probabilities_of_a_row(problem, make_args, collator):
    """Probabilities would be learned as values, or one answer as that of every token."""
    rows = rows_with(teacher_probs=good())
    with pytest.raises(ValueError, match="rename the column to teacher_logits|cache_teacher_signals"):
        make_trainer(make_model(problem=problem), rows, make_args(teacher_labels=LABELS), collator)


def test_a_student_with_unnamed_labels(soft, make_args, collator):
    """LABEL_0 says nothing of which number it is; the message has the line that does."""
    with pytest.raises(ValueError, match=r"LABEL_0.*id2label=\{0: 'bad', 1: .*, label2id=\{'bad': 0"):
        make_trainer(make_model(num_labels=3), rows_with(teacher_probs=as_structs(soft)), make_args(), collator)


def test_other_terms_of_the_logits(student, soft, make_args, collator):
    """A term for one of several teachers has to find its column."""
    rows = rows_with(teacher_0_probs=as_structs(soft), teacher_1_probs=as_structs(soft.roll(1, 0)))
    objective = DistillationObjective([LogitTerm(1.0, teacher=1, temperature=1.0)])
    loss = loss_of(make_trainer(student, rows, make_args(), collator, objective=objective))
    single = rows_with(teacher_probs=as_structs(soft.roll(1, 0)))
    args = make_args(task_loss_weight=0.0, logit_loss_weight=1.0, temperature=1.0)
    torch.testing.assert_close(loss, loss_of(make_trainer(copy_of(student), single, args, collator)))
    with pytest.raises(ValueError, match="no columns"):
        objective = DistillationObjective([HiddenTerm(1.0, teacher=1)])
        make_trainer(student, rows, make_args(), collator, objective=objective)
