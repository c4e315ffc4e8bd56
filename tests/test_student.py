"""A student starts as an exact copy of the chosen blocks, or as fresh weights of the wanted shape."""

import copy

import pytest
import torch
from conftest import make_model, make_rows
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, set_seed

from hf_kd import student_from_teacher
from hf_kd.signals import uniform_layers
from hf_kd.signals.capture import FAMILIES, columns_for, encoder_blocks, forward_columns


FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))
# With tests of their own: ALBERT has one block for all layers, and ModernBERT's first block has no norm.
COPIED = pytest.mark.parametrize("family", sorted({*FAMILIES} - {"albert", "modernbert"}))

RECORDS_LAYER_TYPES = hasattr(AutoConfig.for_model("modernbert"), "layer_types")


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


@COPIED
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
    student = student_from_teacher(teacher, layers=[1, 4])
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


@COPIED
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
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        return student_from_teacher(teacher, num_layers=2, **shape, init="random")

    student = make(seed=5)
    sizes = {size for p in encoder_blocks(student).parameters() for size in p.shape}
    assert sizes == ({16, 24, 48} if family in ("deberta", "modernbert") else {16, 24})  # 48: three layers in one
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
    student = student_from_teacher(teacher, num_layers=2, intermediate_size=24, init="random")
    shapes = {tuple(p.shape) for p in encoder_blocks(student).parameters()}
    assert shapes == {(32, 32), (24, 32), (32, 24), (32,), (24,)}


@FAMILY
def test_a_saved_student_is_loaded_by_transformers(family, tmp_path, collator):
    """The checkpoint would need hf_kd to be read, or be read with some weights left random."""
    teacher = make_teacher(family)
    student = student_from_teacher(teacher, layers=[1, 4])
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


@COPIED
def test_a_model_without_a_head_can_be_reduced(family):
    """Its blocks have no prefix: none would match, and the student would take the first ones."""
    teacher = AutoModel.from_config(make_teacher(family).config)
    student = student_from_teacher(teacher, layers=[2, 4])
    for block, layer in zip(encoder_blocks(student), [2, 4], strict=True):
        assert_same_state(block.state_dict(), encoder_blocks(teacher)[layer - 1].state_dict())


def test_fewer_layers_of_albert_run_its_block_fewer_times(collator):
    """The block's number in its group would be taken for a layer, and another than the first would leave no block."""
    teacher = make_teacher("albert")
    student = student_from_teacher(teacher, layers=[2, 4])
    assert_same_state(student.state_dict(), teacher.state_dict())
    assert student.config.num_hidden_layers == len(encoder_blocks(student)) == 2
    teacher.config.num_hidden_layers = 2  # read at every forward
    assert torch.equal(logits_of(student, collator), logits_of(teacher, collator))


@pytest.mark.parametrize("changes", [{"num_hidden_groups": 2}, {"inner_group_num": 2}], ids=str)
def test_albert_of_several_blocks_keeps_its_layers(changes, collator):
    """The layers would be dealt out to other blocks than those that ran them in the teacher."""
    teacher = make_teacher("albert", **changes)
    assert torch.equal(logits_of(student_from_teacher(teacher), collator), logits_of(teacher, collator))
    with pytest.raises(ValueError, match=r"layers=\[2, 4\] cannot be taken .* keep all of its layers"):
        student_from_teacher(teacher, num_layers=2)


def attention_reach(model):
    """The tokens to either side that each layer of a ModernBERT attends to; -1 or `None` for all."""
    windows = [getattr(block.attn, "sliding_window", None) for block in encoder_blocks(model)]
    return windows if RECORDS_LAYER_TYPES else [block.attn.local_attention for block in encoder_blocks(model)]


@pytest.mark.parametrize("layers", [[1, 2, 3], [1, 4], [1, 2], [4]], ids=str)
def test_modernbert_layers_keep_their_reach(layers, tmp_path, collator):
    """A layer trained on near tokens would attend to all of them, or the other way round."""
    teacher = make_teacher("modernbert")
    before = teacher.config.to_dict()
    student = student_from_teacher(teacher, layers=layers)
    expected = [attention_reach(teacher)[layer - 1] for layer in layers]
    assert attention_reach(student) == expected
    for block, layer in list(zip(encoder_blocks(student), layers, strict=True))[1:]:
        assert_same_state(block.state_dict(), encoder_blocks(teacher)[layer - 1].state_dict())
    assert teacher.config.to_dict() == before
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert attention_reach(loaded) == expected
    assert torch.equal(logits_of(loaded, collator), logits_of(student, collator))


@pytest.mark.skipif(not RECORDS_LAYER_TYPES, reason="transformers 4.57 knows only a period")
def test_modernbert_layers_of_any_reach():
    """Uniform layers begin with a near one, and a period cannot say so."""
    teacher = make_teacher("modernbert")
    reach = attention_reach(teacher)
    assert attention_reach(student_from_teacher(teacher, num_layers=2)) == [reach[1], reach[3]] == [reach[1], None]


@pytest.mark.skipif(RECORDS_LAYER_TYPES, reason="transformers 5 lists the reach of each layer")
@pytest.mark.parametrize("layers", [[2, 4], [2]], ids=str)
def test_modernbert_layers_that_no_period_describes(layers):
    """The student would have other attention than its layers were trained with."""
    with pytest.raises(ValueError, match="cannot express.* use layers=.*or install 'transformers>=5'"):
        student_from_teacher(make_teacher("modernbert"), layers=layers)


def test_modernbert_block_that_becomes_the_first_keeps_its_norm(collator):
    """The first block has none, so that the gains of the chosen one's would be lost."""
    teacher = make_teacher("modernbert")
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "attn_norm" in name:
                parameter.copy_(torch.linspace(0.2, 2.0, 32))
            if "embeddings.norm" in name:
                parameter.fill_(3.0)
    student = student_from_teacher(teacher, layers=[4])
    expected = copy.deepcopy(student)
    encoder_blocks(expected)[0].load_state_dict(
        {name: p for name, p in encoder_blocks(teacher)[3].state_dict().items() if "attn_norm" not in name}
    )
    without = logits_of(expected, collator)
    encoder_blocks(expected)[0].attn_norm = copy.deepcopy(encoder_blocks(teacher)[3].attn_norm)
    torch.testing.assert_close(logits_of(student, collator), logits_of(expected, collator), rtol=1e-3, atol=1e-3)
    assert (without - logits_of(expected, collator)).abs().max() > 0.1


def test_modernbert_norm_with_a_bias_cannot_be_folded():
    """The bias would be dropped without a word."""
    teacher = make_teacher("modernbert", norm_bias=True)
    assert student_from_teacher(teacher, layers=[1, 4]).config.num_hidden_layers == 2
    with pytest.raises(ValueError, match="norm_bias=True.* give layers that begin with 1"):
        student_from_teacher(teacher, layers=[4])
