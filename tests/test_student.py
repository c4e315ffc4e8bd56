"""A student starts as an exact copy of the chosen blocks, or as fresh weights of the wanted shape."""

import pytest
import torch
from conftest import make_model, make_rows
from transformers import AutoModel, AutoModelForSequenceClassification, set_seed

from hf_kd import student_from_teacher
from hf_kd.signals import uniform_layers
from hf_kd.signals.capture import FAMILIES, columns_for, encoder_blocks, forward_columns


FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))


def make_teacher(family, **changes):
    """Four blocks of random weights, with label names of their own."""
    return make_model(family, seed=1, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}, **changes)


@torch.no_grad()
def logits_of(model, collator):
    batch = collator(make_rows(5, seed=3))
    del batch["labels"]
    return model(**columns_for(forward_columns(model), batch)).logits


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(actual, expected):
    assert sorted(actual) == sorted(expected)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def outside_blocks(model):
    """Embeddings, pooler and head."""
    in_blocks = {id(p) for p in encoder_blocks(model).parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in in_blocks}


@FAMILY
@pytest.mark.parametrize("layers", [[2, 4], [1], [1, 2, 3, 4]])
def test_chosen_blocks_are_copied(family, layers):
    """A student from the neighbouring blocks, or from random ones, trains too and only ends up worse."""
    teacher = make_teacher(family)
    student = student_from_teacher(teacher, layers=layers)
    assert type(student) is type(teacher)
    assert student.config.num_hidden_layers == len(encoder_blocks(student)) == len(layers)
    for block, layer in zip(encoder_blocks(student), layers, strict=True):
        assert_same_state(block.state_dict(), encoder_blocks(teacher)[layer - 1].state_dict())
    assert_same_state(outside_blocks(student), outside_blocks(teacher))


@FAMILY
def test_student_and_teacher_share_nothing(family):
    """Training the student would change the teacher that it learns from."""
    teacher = make_teacher(family).train()
    before, config = state_of(teacher), teacher.config.to_dict()
    student = student_from_teacher(teacher, layers=[2, 4])
    teacher_memory = {tensor.data_ptr() for tensor in teacher.state_dict(keep_vars=True).values()}
    assert [name for name, p in student.named_parameters() if p.data_ptr() in teacher_memory] == []
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(7.0)
    assert_same_state(teacher.state_dict(), before)
    assert teacher.config.to_dict() == config
    assert len(encoder_blocks(teacher)) == 4
    assert teacher.training is True
    assert student.training is False


@FAMILY
def test_a_number_of_layers_takes_those_that_the_uniform_map_pairs(family):
    """Block k would start from another teacher layer than the one that layer_mapping="uniform" compares it with."""
    teacher = make_teacher(family)
    for num_layers in (1, 2, 3, 4):
        expected = student_from_teacher(teacher, layers=uniform_layers(num_layers, 4))
        assert_same_state(student_from_teacher(teacher, num_layers=num_layers).state_dict(), expected.state_dict())


@FAMILY
def test_all_layers_give_the_teacher_again(family, collator):
    """A weight that is not copied (a head, a position table) would cost accuracy and nothing else."""
    teacher = make_teacher(family)
    expected = logits_of(teacher, collator)
    assert expected.std() > 0.01
    assert torch.equal(logits_of(student_from_teacher(teacher), collator), expected)
    assert torch.equal(logits_of(student_from_teacher(teacher, num_layers=4, hidden_size=32), collator), expected)


@FAMILY
def test_a_smaller_shape_gets_fresh_weights(family, collator):
    """The shape would not be the one asked for, or no run could be repeated from its seed."""
    teacher = make_teacher(family)

    def make(seed):
        set_seed(seed)
        return student_from_teacher(teacher, num_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2)

    student = make(seed=5)
    shapes = {tuple(p.shape) for p in encoder_blocks(student).parameters()}
    assert shapes == {(16, 16), (24, 16), (16, 24), (16,), (24,)}
    assert len(encoder_blocks(student)) == 2
    assert student.config.num_attention_heads == 2
    assert student.config.id2label == {0: "no", 1: "yes"}
    assert logits_of(student, collator).shape == (5, 2)
    assert_same_state(make(seed=5).state_dict(), student.state_dict())
    other = make(seed=6).state_dict()
    assert not any(torch.equal(p, other[name]) for name, p in student.named_parameters() if p.dim() > 1)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_narrower_feed_forward_alone_is_a_new_shape(family):
    """DistilBERT calls this width `hidden_dim`: under the other name it would be stored and never used."""
    teacher = make_teacher(family)
    student = student_from_teacher(teacher, num_layers=2, intermediate_size=24)
    shapes = {tuple(p.shape) for p in encoder_blocks(student).parameters()}
    assert shapes == {(32, 32), (24, 32), (32, 24), (32,), (24,)}


@FAMILY
def test_a_saved_student_is_loaded_by_transformers(family, tmp_path, collator):
    """The checkpoint would need hf_kd to be read, or be read with some weights left random."""
    teacher = make_teacher(family)
    student = student_from_teacher(teacher, layers=[2, 4])
    student.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(teacher)
    assert (list(info["missing_keys"]), list(info["unexpected_keys"])) == ([], [])
    assert torch.equal(logits_of(loaded, collator), logits_of(student, collator))
    assert loaded.config.id2label == {0: "no", 1: "yes"}
    assert loaded.config.num_hidden_layers == 2


def test_a_half_precision_teacher_gives_a_float32_student():
    """The student's own weights would be trained in bfloat16, where small updates are rounded away."""
    teacher = make_teacher("bert").to(torch.bfloat16)
    student = student_from_teacher(teacher, layers=[2, 4])
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    expected = {name: p.float() for name, p in outside_blocks(teacher).items()}
    assert_same_state(outside_blocks(student), expected)
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


@FAMILY
def test_a_model_without_a_head_can_be_reduced(family):
    """Its blocks have no prefix: none would match, and the student would take the first ones."""
    teacher = AutoModel.from_config(make_teacher(family).config)
    student = student_from_teacher(teacher, layers=[2, 4])
    for block, layer in zip(encoder_blocks(student), [2, 4], strict=True):
        assert_same_state(block.state_dict(), encoder_blocks(teacher)[layer - 1].state_dict())
