"""A narrower student keeps what the teacher's weights say is important, and computes the same if nothing is lost."""

from operator import attrgetter

import pytest
import torch
from conftest import make_model, make_rows
from transformers import set_seed

from hf_kd import student_from_teacher
from hf_kd.signals.capture import FAMILIES, SplitFamily, columns_for, encoder_blocks, family_of, forward_columns


SPLIT = sorted(name for name, family in FAMILIES.items() if isinstance(family, SplitFamily))
FAMILY = pytest.mark.parametrize("family", SPLIT)
PROBLEM = pytest.mark.parametrize(
    "problem", ["single_label_classification", "token_classification", "question_answering", "masked_lm"]
)
NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


@torch.no_grad()
def outputs_of(model, collator):
    batch = collator(make_rows(5, seed=3))
    del batch["labels"]
    outputs = model(**columns_for(forward_columns(model), batch))
    return outputs.logits if "logits" in outputs else outputs.start_logits


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(actual, expected):
    """Names of the tensors that differ."""
    assert sorted(actual) == sorted(expected)
    return [name for name in expected if not torch.equal(actual[name], expected[name])]


def layers_of(block, model):
    """The query, key, value and output projections and both feed-forward layers of a block."""
    family = family_of(model.config)
    paths = [family.query, family.key, family.value, family.attention_output]
    return [attrgetter(path)(block) for path in [*paths, family.feed_forward_in, family.feed_forward_out]]


def randomize(model, seed=0):
    """Biases and gains other than the 0 and 1 that a new model has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def attend(x, block, model):
    """Attention before the residual connection, from its formula: `x` is `(seq, hidden)`."""
    query, key, value, output = layers_of(block, model)[:4]
    q, k, v = (p(x).unflatten(1, (model.config.num_attention_heads, -1)).transpose(0, 1) for p in (query, key, value))
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (heads, seq, seq)
    return output((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


@FAMILY
def test_dropping_silent_neurons_changes_nothing(family, collator):
    """Other neurons than the important ones would be kept, or one's bias go to another."""
    teacher = randomize(make_model(family, seed=1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in {id(block): block for block in encoder_blocks(teacher)}.values():
            silent = torch.randperm(64, generator=generator)[:40]  # not the same ones in every block
            layers_of(block, teacher)[5].weight[:, silent] = 0.0
    student = student_from_teacher(teacher, intermediate_size=24)
    assert layers_of(encoder_blocks(student)[3], student)[4].weight.shape == (24, 32)
    torch.testing.assert_close(outputs_of(student, collator), outputs_of(teacher, collator), rtol=1e-5, atol=1e-6)


@FAMILY
def test_a_narrower_feed_forward_alone_leaves_the_rest(family):
    """Attention and embeddings would be changed without need."""
    teacher = randomize(make_model(family, seed=1))
    student = student_from_teacher(teacher, intermediate_size=24)
    family = family_of(teacher.config)
    paths = (f".{family.feed_forward_in}.", f".{family.feed_forward_out}.")
    expected = {name: p for name, p in state_of(teacher).items() if not any(path in name for path in paths)}
    assert changed({name: p for name, p in student.state_dict().items() if name in expected}, expected) == []


def silence(teacher, seed=0):
    """Make half of the hidden dimensions unread, or of gain 0; returns the others."""
    kept = torch.randperm(32, generator=torch.Generator().manual_seed(seed))[:16].sort().values
    silent = torch.tensor([dim for dim in range(32) if dim not in kept.tolist()])
    with torch.no_grad():
        for block in encoder_blocks(teacher):
            query, key, value, _, feed_forward, _ = layers_of(block, teacher)
            for layer in (query, key, value, feed_forward):
                layer.weight[:, silent[:8]] = 0.0
            for name, parameter in block.named_parameters():
                if name.endswith("weight") and parameter.dim() == 1:
                    parameter[silent[8:]] = 0.0
    return kept


@FAMILY
@pytest.mark.parametrize("num_heads", [4, 2])
def test_attention_that_fits_stays_the_same(family, num_heads):
    """Heads would lose their size to `sqrt` of the head size, be exchanged, or their biases get lost.

    The teacher's heads have two of four silent (only their values' biases are heard), or queries, keys and values of
    rank 4 in heads of 8.
    """
    teacher = randomize(make_model(family, seed=1))
    kept = silence(teacher)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for block in {id(block): block for block in encoder_blocks(teacher)}.values():
            query, key, value, output = layers_of(block, teacher)[:4]
            if num_heads == 2:
                for head in torch.randperm(4, generator=generator)[:2].tolist() if family != "mpnet" else (0, 2):
                    value.weight[8 * head : 8 * head + 8] = 0.0
            else:
                for head in range(4):
                    mix = torch.randn(4, 4, generator=generator)
                    rows, others = slice(8 * head, 8 * head + 4), slice(8 * head + 4, 8 * head + 8)
                    for layer in (query, value):
                        layer.weight[others] = mix @ layer.weight[rows]
                        layer.bias[others] = mix @ layer.bias[rows]
    student = student_from_teacher(teacher, hidden_size=16, num_attention_heads=num_heads)
    x = torch.randn(7, 16, generator=generator)
    wide = torch.zeros(7, 32)
    # Half of the terms are gone from each sum: the weights make up for the others' scale.
    wide[:, kept] = x * 2**0.5
    with torch.no_grad():
        for block, teacher_block in zip(encoder_blocks(student), encoder_blocks(teacher), strict=True):
            expected = attend(wide, teacher_block, teacher)[:, kept]
            torch.testing.assert_close(attend(x, block, student), expected, rtol=1e-3, atol=1e-4)
            assert expected.std(0).mean() > 0.05


@PROBLEM
@FAMILY
def test_all_parts_agree_on_the_hidden_dimensions(family, problem):
    """A head, an embedding or a LayerNorm with dimensions of its own would read what others wrote elsewhere."""
    teacher = randomize(make_model(family, seed=1, problem=problem))
    kept = silence(teacher)
    student = student_from_teacher(teacher, hidden_size=16, num_attention_heads=2).state_dict()
    inside = {f".{getattr(family_of(teacher.config), path)}." for path in ("query", "key", "value")}
    inside.add(f".{family_of(teacher.config).attention_output}.")
    for name, tensor in teacher.state_dict().items():
        if any(part in name for part in inside) or "relative_attention_bias" in name:
            continue
        for axis, size in enumerate(student[name].shape):
            if size < tensor.shape[axis]:
                assert (size, tensor.shape[axis]) == (16, 32)
                tensor = tensor.index_select(axis, kept) * (2**0.5 if axis == 1 else 1.0)
        torch.testing.assert_close(student[name], tensor, msg=name)


SAME_SIZES = {
    "vocab_size": 32,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "type_vocab_size": 32,
    "num_labels": 32,
}


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "mpnet"])
@pytest.mark.parametrize("problem", ["single_label_classification", "masked_lm"])
def test_axes_of_the_same_size_are_told_apart(family, problem):
    """Tokens, positions or labels would be dropped where there are as many as hidden dimensions."""
    sizes = dict(SAME_SIZES)
    if family == "distilbert":
        sizes["hidden_dim"] = sizes.pop("intermediate_size")
        del sizes["type_vocab_size"]
    teacher = randomize(make_model(family, seed=1, problem=problem, **sizes))
    kept = silence(teacher)
    student = student_from_teacher(teacher, hidden_size=16, num_attention_heads=2)
    fresh = student_from_teacher(teacher, hidden_size=16, num_attention_heads=2, init="random")
    assert {name: p.shape for name, p in student.state_dict().items()} == {
        name: p.shape for name, p in fresh.state_dict().items()
    }
    words = teacher.get_input_embeddings().weight
    if words.shape[1] == 32 and family != "electra":  # its embeddings are projected
        words = words[:, kept] * 2**0.5
    torch.testing.assert_close(student.get_input_embeddings().weight, words)
    if problem == "masked_lm":
        head = student.get_output_embeddings()
        assert head.weight is student.get_input_embeddings().weight
        torch.testing.assert_close(head.bias, teacher.get_output_embeddings().bias)


@pytest.mark.parametrize("problem", ["single_label_classification", "masked_lm"])
@FAMILY
def test_a_narrow_student_is_a_model_like_any_other(family, problem, tmp_path, collator):
    """No run could be repeated, the teacher would change, or saved weights not fit the saved config."""
    teacher = randomize(make_model(family, seed=1, problem=problem)).train()
    before, config = state_of(teacher), teacher.config.to_dict()
    set_seed(5)
    student = student_from_teacher(teacher, num_layers=2, **NARROW)
    set_seed(6)
    assert changed(student_from_teacher(teacher, num_layers=2, **NARROW).state_dict(), state_of(student)) == []
    assert changed(teacher.state_dict(), before) == []
    assert teacher.config.to_dict() == config
    assert (teacher.training, student.training) == (True, False)
    teacher_memory = {p.data_ptr() for p in teacher.state_dict(keep_vars=True).values()}
    assert [name for name, p in student.named_parameters() if p.data_ptr() in teacher_memory] == []
    shape = (student.config.hidden_size, student.config.num_attention_heads, student.config.num_hidden_layers)
    assert shape == (16, 2, 2)
    student.save_pretrained(tmp_path)
    loaded, info = type(teacher).from_pretrained(tmp_path, output_loading_info=True)
    assert (list(info["missing_keys"]), list(info["unexpected_keys"])) == ([], [])
    assert changed(loaded.state_dict(), student.state_dict()) == []
    logits = outputs_of(student, collator)
    torch.testing.assert_close(outputs_of(loaded, collator), logits)
    assert logits.shape == outputs_of(teacher, collator).shape


def test_mpnet_keeps_the_same_heads_in_every_block():
    """Its bias for the distance of two tokens, one column for each head, is shared by all blocks."""
    teacher = randomize(make_model("mpnet", seed=1))
    with torch.no_grad():
        for number, block in enumerate(encoder_blocks(teacher)):
            value = layers_of(block, teacher)[2]
            value.weight[8:16] *= 10.0
            value.weight[24:32] *= 10.0
            value.weight[0:8] *= 11.0 if number == 0 else 0.1  # alone the first block would keep head 0
    student = student_from_teacher(teacher, hidden_size=16, num_attention_heads=2)
    bias = "encoder.relative_attention_bias.weight"
    assert torch.equal(student.base_model.state_dict()[bias], teacher.base_model.state_dict()[bias][:, [1, 3]])


def test_a_half_precision_teacher_gives_a_float32_student():
    """bfloat16 has no singular value decomposition, and would round the student's weights."""
    teacher = make_model("bert", seed=1).to(torch.bfloat16)
    student = student_from_teacher(teacher, **NARROW)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


def test_electra_without_a_projection_narrows_its_embeddings():
    """Embeddings of the teacher's width would need a projection to the blocks that the teacher does not have."""
    teacher = make_model("electra", seed=1, embedding_size=32)
    for init in ("importance", "random"):
        student = student_from_teacher(teacher, **NARROW, init=init)
        assert student.get_input_embeddings().weight.shape == (64, 16)


LARGER_HEADS = {"hidden_size": 24, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("family", "changes", "shape", "message"),
    [
        ("bert", {}, {"init": "svd"}, "init='svd' is not known; use 'importance' or 'random'"),
        (
            "bert",
            {},
            {"num_attention_heads": 2},
            "heads of 16, and the teacher's have 8.* num_attention_heads=4 or more",
        ),
        ("bert", {}, LARGER_HEADS, "heads of 12, .* num_attention_heads=3 or more, .* or init='random'"),
        ("modernbert", {}, NARROW, "layers of model type 'modernbert' is not known.* init='random'"),
        ("deberta-v2", {}, NARROW, "layers of model type 'deberta-v2' is not known.* init='random'"),
        ("electra", {"embedding_size": 16}, NARROW, "embeddings_project.*; use another hidden_size or init='random'"),
    ],
    ids=str,
)
def test_what_cannot_be_shrunk_is_refused(family, changes, shape, message):
    """Part of the student would be random, or belong to something else."""
    with pytest.raises(ValueError, match=message):
        student_from_teacher(make_model(family, **changes), layers=[1], **shape)
