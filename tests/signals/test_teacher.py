"""The teacher: its classes in the student's order, its weights as they were, its dtype as asked."""

import pytest
import torch
from conftest import copy_of, make_dataset, make_model, make_rows, weights

from hf_kd import DistillationTrainer
from hf_kd.signals import Teacher, Wanted
from hf_kd.signals.capture import FAMILIES, columns_for, forward_columns
from hf_kd.signals.teacher import load_teacher, reorder_labels


def make_labeled(names, family="bert", seed=0, **changes):
    id2label = dict(enumerate(names))
    return make_model(
        family, seed=seed, id2label=id2label, label2id={name: i for i, name in id2label.items()}, **changes
    )


@pytest.fixture
def batch(collator):
    batch = dict(collator(make_rows(6, seed=5)))
    del batch["labels"]
    return batch


@pytest.mark.parametrize(
    ("student_names", "teacher_names", "order"),
    [
        (["entailment", "neutral", "contradiction"], ["contradiction", "entailment", "neutral"], [1, 2, 0]),
        (["entailment", "neutral", "contradiction"], ["CONTRADICTION", "Neutral", "Entailment"], [2, 1, 0]),
        (["entailment", "neutral", "contradiction"], ["ENTAILMENT", "NEUTRAL", "CONTRADICTION"], [0, 1, 2]),
        (["a", "b"], ["b", "a"], [1, 0]),
    ],
)
@torch.no_grad()
def test_classes_are_aligned_by_name(batch, student_names, teacher_names, order):
    """The student would learn "contradiction" where the teacher says "entailment", with a loss that falls as usual."""
    student, model = make_labeled(student_names), make_labeled(teacher_names, seed=1)
    expected = model(**batch).logits[:, order]
    assert torch.equal(Teacher(model, student.config)(batch).logits, expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_reordered_labels_keep_their_predictions(batch, family):
    """A head in another order than the names of the config would answer every class with the name of another."""
    model = make_labeled(["contradiction", "entailment", "neutral"], family)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_()  # a fresh head has biases of 0, in any order
    inputs = columns_for(forward_columns(model), batch)
    before, before_state = model(**inputs).logits, copy_of(model).state_dict()
    reorder_labels(model, ["entailment", "neutral", "contradiction"])
    assert model.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert model.config.label2id == {"entailment": 0, "neutral": 1, "contradiction": 2}
    torch.testing.assert_close(model(**inputs).logits, before[:, [1, 2, 0]], atol=1e-6, rtol=0)
    head = [name for name, module in model.named_modules() if getattr(module, "out_features", None) == 3][-1]
    for name, tensor in model.state_dict().items():
        is_head = name in (f"{head}.weight", f"{head}.bias")
        assert torch.equal(tensor, before_state[name][[1, 2, 0]] if is_head else before_state[name]), name


def test_labels_in_order_stay_as_they_are():
    """A second call, or one for a model that is in order, would shuffle the head once more."""
    model = make_labeled(["a", "b", "c"])
    before = weights(model)
    reorder_labels(model, ["a", "b", "c"])
    assert torch.equal(weights(model), before)


def test_training_leaves_the_teacher_untouched(make_args, collator):
    """A teacher with dropout, a gradient or a place in the optimizer would drift while the student follows it."""
    teacher = make_model(seed=1, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    before = copy_of(teacher).state_dict()
    args = make_args(
        max_steps=3, learning_rate=0.1, weight_decay=0.1, hidden_loss_weight=1.0, attention_loss_weight=1.0
    )
    student = make_model(seed=2, num_hidden_layers=2)
    trainer = DistillationTrainer(
        student, args, train_dataset=make_dataset(), data_collator=collator, teacher_model=teacher
    )
    trainer.train()
    assert trainer.state.global_step == 3
    after = teacher.state_dict()
    assert sorted(after) == sorted(before)
    assert [name for name in before if not torch.equal(after[name], before[name])] == []
    assert [name for name, module in teacher.named_modules() if module.training] == []
    assert [name for name, p in teacher.named_parameters() if p.requires_grad or p.grad is not None] == []
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in student.parameters()}


def test_teacher_signals_carry_no_graph(teacher, student, batch):
    """The backward would run through a teacher whose gradients someone switched on: memory, for nothing."""
    frozen = Teacher(teacher, student.config)
    frozen.watch(Wanted(hidden=frozenset({4}), attention=frozenset({4})))
    teacher.requires_grad_(True)
    signals = frozen(batch)
    for tensor in (signals.logits, signals.hidden[4], signals.queries[4], signals.keys[4]):
        assert tensor.requires_grad is False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_that_is_asked_for_is_the_one_it_runs_in(teacher, student, batch, dtype):
    """teacher_dtype would be a name that nothing reads, or round the caller's own model for whatever comes after."""
    before = weights(teacher)
    reader = Teacher(teacher, student.config, dtype=dtype)
    assert {p.dtype for p in reader.model.parameters()} == {getattr(torch, dtype)}
    assert reader(batch).logits.dtype == getattr(torch, dtype)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32} and torch.equal(weights(teacher), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_teacher_keeps_its_dtype(tmp_path, teacher, dtype):
    """transformers 4.57 and 5 load a half-precision checkpoint differently unless told."""
    teacher.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    assert load_teacher(tmp_path).dtype == getattr(torch, dtype)


def test_training_arguments_set_the_dtype(make_args, teacher, student, collator):
    """The trainer would drop teacher_dtype on its way from the arguments to the teacher."""
    args = make_args(teacher_dtype="bfloat16")
    data = make_dataset()
    trainer = DistillationTrainer(student, args, train_dataset=data, data_collator=collator, teacher_model=teacher)
    assert {p.dtype for p in trainer.teacher.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_an_explicit_dtype_wins_over_the_autocast_of_the_run(teacher, student, batch):
    """teacher_dtype="float32" in a bf16 run would still give logits rounded to 8 bits."""
    expected = teacher(**batch).logits.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = Teacher(teacher, student.config)(batch).logits
        exact = Teacher(teacher, student.config, dtype="float32")(batch).logits
    assert rounded.dtype == torch.bfloat16
    assert exact.dtype == torch.float32
    assert torch.equal(exact, expected)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_teacher_is_loaded_from_its_folder(tmp_path, family):
    """Another class or other weights than were saved would teach."""
    model = make_labeled(["no", "yes"], family, seed=1)
    model.save_pretrained(tmp_path)
    loaded = load_teacher(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(weights(loaded), weights(model))
    assert loaded.config.id2label == {0: "no", 1: "yes"}
    assert loaded.training is False


def test_a_folder_teaches_like_the_model_in_it(make_args, tmp_path, teacher, collator, tokenizer):
    """The path and the object would be prepared in two ways, of which one is tested."""
    folder = tmp_path / "teacher"
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    results = []
    for teacher_model in (teacher, str(folder), folder):
        student = make_model(seed=2, num_hidden_layers=2)
        trainer = DistillationTrainer(
            student,
            make_args(max_steps=2),
            train_dataset=make_dataset(),
            data_collator=collator,
            processing_class=tokenizer,
            teacher_model=teacher_model,
        )
        trainer.train()
        results.append(weights(student))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], weights(make_model(seed=2, num_hidden_layers=2)))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("problem", ["single_label_classification", "masked_lm"])
@torch.no_grad()
def test_weights_cast_once_give_what_autocast_gives(batch, family, problem):
    """A masked language model's decoder shares its weights with the embeddings: cast too, they would round the
    inputs, and the teacher would be another one than without the shortcut."""
    model = make_model(family, problem=problem)
    before = weights(model)
    wanted = Wanted(hidden=frozenset({1, 4}), attention=frozenset({4}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        signals = []
        for autocast_dtype in (None, torch.bfloat16):
            teacher = Teacher(model, model.config, autocast_dtype=autocast_dtype)
            teacher.watch(wanted)
            signals.append(teacher(batch))
    expected, found = signals
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.hidden[1], expected.hidden[1]) and torch.equal(found.queries[4], expected.queries[4])
    cast = [m for m in teacher.model.modules() if type(m) is torch.nn.Linear and m.weight.dtype == torch.bfloat16]
    assert len(cast) >= 4 * 6  # every block's products, or nothing was saved
    assert torch.equal(weights(model), before) and model.dtype == torch.float32  # the caller's


@torch.no_grad()
def test_weights_hash_tells_models_apart(tmp_path):
    """A cache of one teacher would be read as that of another."""
    model, other = make_model(seed=1), make_model(seed=2)
    teacher = Teacher(model, model.config)
    assert teacher.weights == Teacher(make_model(seed=1), model.config).weights != Teacher(other, model.config).weights
    assert Teacher(model, model.config, dtype="bfloat16").weights == teacher.weights
    assert Teacher(model, model.config, autocast_dtype=torch.bfloat16).weights == teacher.weights
    model.classifier.bias[0] += 1e-6
    assert Teacher(model, model.config).weights != teacher.weights
