"""What the hooks read is what the model itself reports, and nothing is left behind."""

import copy
import pickle
from contextlib import nullcontext
from inspect import signature

import pytest
import torch
from conftest import make_model, make_rows
from transformers import AutoModel, AutoModelForPreTraining, set_seed
from transformers.models.modernbert.modeling_modernbert import ModernBertAttention

from hf_kd.objective.losses import attention_scores
from hf_kd.signals import Capture, Wanted
from hf_kd.signals.capture import (
    FAMILIES,
    FusedFamily,
    attention_family_of,
    columns_for,
    encoder_blocks,
    family_of,
    forward_columns,
    num_layers,
)


SPLIT = ["albert", "bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"]
# transformers 4.57 rotates the queries and keys of ModernBERT where they cannot be read.
READS_MODERNBERT = "position_embeddings" in signature(ModernBertAttention.forward).parameters
READABLE = [*SPLIT, "modernbert"] if READS_MODERNBERT else SPLIT
LAYERS = frozenset({1, 2, 3, 4})
BERT_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
DROPOUT = {
    "distilbert": {"dropout": 0.1, "attention_dropout": 0.1},
    "modernbert": {"mlp_dropout": 0.1, "attention_dropout": 0.1},
}


@pytest.fixture
def batch(collator):
    """A batch with padding, without labels."""
    batch = dict(collator(make_rows(5, seed=3)))
    assert batch["attention_mask"].min() == 0
    del batch["labels"]
    return batch


def inputs_for(model, batch):
    return columns_for(forward_columns(model), batch)


def read(model, wanted, inputs):
    """The signals of one forward, as a trainer reads them."""
    capture = Capture(model, wanted)
    with capture:
        outputs = model(**inputs, **capture.forward_kwargs)
    return capture.signals(outputs, inputs)


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def attention_probabilities(model, signals, layer):
    """The attention maps that follow from what was captured, padding and windows masked."""
    scores = attention_scores(signals.queries[layer], signals.keys[layer])
    if model.config.model_type == "mpnet":
        scores = scores + model.base_model.encoder.compute_position_bias(signals.attention_mask)
    can_see = signals.attention_mask.bool()[:, None, None, :]
    if layer in signals.attention_reach:
        position = torch.arange(scores.shape[-1])
        can_see = can_see & ((position[:, None] - position).abs() <= signals.attention_reach[layer])
    # Not -inf: padding further from the tokens than a window reaches sees nothing.
    return scores.masked_fill(~can_see, torch.finfo(scores.dtype).min).softmax(dim=-1)


def test_these_are_the_known_families():
    """A family that is added would stay without the tests below."""
    assert sorted(FAMILIES) == sorted([*SPLIT, "modernbert", "deberta", "deberta-v2"])
    assert [name for name, family in FAMILIES.items() if family.shares_blocks] == ["albert"]


@pytest.mark.parametrize("family", [*sorted(FAMILIES), "convbert"])
@torch.no_grad()
def test_hidden_states_are_those_of_the_model(family, batch):
    """A hook one block off, or before the block's last layer norm, would distil other states than were named."""
    model = make_model(family)
    inputs = inputs_for(model, batch)
    expected = model(**inputs, output_hidden_states=True).hidden_states
    hidden = read(model, Wanted(hidden=frozenset(range(5))), inputs).hidden
    assert sorted(hidden) == [0, 1, 2, 3, 4]
    for layer, states in hidden.items():
        assert torch.equal(states, expected[layer]), f"layer {layer}"
    assert model(**inputs).hidden_states is None


@pytest.mark.parametrize("family", READABLE)
@torch.no_grad()
def test_recomputed_attention_is_that_of_the_model(family, batch):
    """Swapped heads, a wrong scale or window or a neighbouring block would train the student towards noise."""
    model = make_model(family)
    inputs = inputs_for(model, batch)
    signals = read(model, Wanted(attention=LAYERS), inputs)
    model = make_model(family, attn_implementation="eager")
    expected = model(**inputs, output_attentions=True).attentions
    assert sorted(signals.queries) == sorted(signals.keys) == [1, 2, 3, 4]
    is_token = batch["attention_mask"].bool()  # where windows hold padding alone, the kernels differ
    for layer in LAYERS:
        probabilities = attention_probabilities(model, signals, layer).transpose(1, 2)[is_token]
        torch.testing.assert_close(probabilities, expected[layer - 1].transpose(1, 2)[is_token], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", READABLE)
@torch.no_grad()
def test_values_are_those_that_attention_mixes(family, batch):
    """Values of another head or block, or before their bias, would be compared in every relation."""
    model = make_model(family)
    inputs = inputs_for(model, batch)
    signals = read(model, Wanted(attention=LAYERS, values=LAYERS), inputs)
    mixed = []
    known = family_of(model.config)
    for block in encoder_blocks(model)[: 1 if family == "albert" else None]:
        path = "attn.Wo" if isinstance(known, FusedFamily) else known.attention_output
        block.get_submodule(path).register_forward_pre_hook(lambda module, args: mixed.append(args[0]))
    model(**inputs)
    assert sorted(signals.values) == [1, 2, 3, 4]
    for layer in LAYERS:
        assert signals.values[layer].shape == signals.queries[layer].shape == (5, 4, batch["input_ids"].shape[1], 8)
        context = (attention_probabilities(model, signals, layer) @ signals.values[layer]).transpose(1, 2).flatten(2)
        is_token = batch["attention_mask"].bool()
        torch.testing.assert_close(context[is_token], mixed[layer - 1][is_token], atol=1e-5, rtol=0)


@pytest.mark.parametrize("with_autocast", [False, True])
@pytest.mark.parametrize("family", READABLE)
@torch.no_grad()
def test_capture_leaves_the_forward_as_it_is(family, with_autocast, batch):
    """Asking for maps would switch the model to slow eager attention, or change what it computes."""
    model = make_model(family, **DROPOUT.get(family, BERT_DROPOUT)).train()
    attention, config = model.config._attn_implementation, model.config.to_dict()
    # transformers has eager attention alone for MPNet, and 4.57 for ELECTRA.
    assert attention == "sdpa" or family in ("electra", "mpnet")
    inputs = inputs_for(model, batch)
    capture = Capture(model, Wanted(hidden=frozenset({0, 2}), attention=frozenset({4}), values=frozenset({3})))
    assert capture.forward_kwargs == {}
    with torch.autocast("cpu", torch.bfloat16) if with_autocast else nullcontext():
        set_seed(0)
        expected = model(**inputs).logits
        set_seed(0)
        with capture:
            outputs = model(**inputs)
    assert torch.equal(outputs.logits, expected)
    assert model.config._attn_implementation == attention
    assert model.config.to_dict() == config
    signals = capture.signals(outputs, inputs)
    assert torch.equal(signals.logits, expected)
    assert torch.equal(signals.attention_mask, batch["attention_mask"])
    assert (sorted(signals.hidden), sorted(signals.queries), sorted(signals.keys)) == ([0, 2], [4], [4])
    assert sorted(signals.values) == [3]
    dtype = torch.bfloat16 if with_autocast else torch.float32
    assert {signals.queries[4].dtype, signals.keys[4].dtype, signals.values[3].dtype} == {dtype}


@pytest.mark.skipif(not READS_MODERNBERT, reason="needs ModernBERT of transformers 5")
@pytest.mark.parametrize("local_attention", [2, 5, 8])
@torch.no_grad()
def test_the_reach_is_that_of_the_window(local_attention, batch):
    """One token more or less to either side would compare scores that the model never uses, or miss some it does."""
    model = make_model("modernbert", local_attention=local_attention, attn_implementation="eager")
    signals = read(model, Wanted(attention=LAYERS), inputs_for(model, batch))
    assert signals.attention_reach == {2: local_attention // 2, 3: local_attention // 2}
    maps = model(**inputs_for(model, batch), output_attentions=True).attentions
    row = int(batch["attention_mask"].sum(dim=1).argmax())
    length = int(batch["attention_mask"][row].sum())
    for layer, attention in enumerate(maps, start=1):
        reach = signals.attention_reach.get(layer, length)
        seen = attention[row].amax(dim=0).nonzero()  # (pairs, 2)
        assert (seen[:, 0] - seen[:, 1]).abs().max() == min(reach, length - 1)
    assert read(model, Wanted(values=frozenset({1, 3})), inputs_for(model, batch)).attention_reach == {
        3: local_attention // 2
    }


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"num_hidden_groups": 2}, {"inner_group_num": 2}], ids=str)
def test_layers_that_share_a_block_are_told_apart(changes, batch):
    """ALBERT runs one block again and again: every layer would be read as the last, or as the first."""
    model = make_model("albert", attn_implementation="eager", **changes)
    layers = range(1, num_layers(model.config) + 1)
    blocks = encoder_blocks(model)
    assert len(blocks) == len(layers) == 4 * changes.get("inner_group_num", 1)
    assert len(set(blocks)) == (1 if not changes else 2)
    assert len({id(p) for p in blocks.parameters()}) == 16 * len(set(blocks))
    outputs = []
    for block in set(blocks):
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    maps = model(**batch, output_attentions=True).attentions
    expected = [output[0] if isinstance(output, tuple) else output for output in outputs]
    signals = read(model, Wanted(hidden=frozenset(layers), attention=frozenset(layers)), batch)
    for layer in layers:
        assert torch.equal(signals.hidden[layer], expected[layer - 1]), f"layer {layer}"
        probabilities = attention_probabilities(model, signals, layer)
        torch.testing.assert_close(probabilities, maps[layer - 1], atol=1e-5, rtol=0)
    some = read(model, Wanted(hidden=frozenset({0, 3}), values=frozenset({2})), batch)
    assert torch.equal(some.hidden[3], signals.hidden[3])
    again = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(some.hidden[0], again[0])


@pytest.mark.parametrize("family", READABLE)
@torch.no_grad()
def test_two_models_are_read_side_by_side(family, batch):
    """A teacher and a student of one family would be given each other's vectors, and agree perfectly."""
    models = [make_model(family, seed=1), make_model(family, seed=2, num_hidden_layers=2)]
    wanted = Wanted(hidden=frozenset({0, 1}), attention=frozenset({1, 2}), values=frozenset({2}))
    inputs = inputs_for(models[0], batch)
    expected = [read(model, wanted, inputs) for model in models]
    captures = [Capture(model, wanted) for model in models]
    with captures[0], captures[1]:
        outputs = [model(**inputs) for model in models]
    for capture, output, signals in zip(captures, outputs, expected, strict=True):
        actual = capture.signals(output, inputs)
        for kind in ("hidden", "queries", "keys", "values"):
            assert sorted(getattr(actual, kind)) == sorted(getattr(signals, kind))
            for layer, tensor in getattr(signals, kind).items():
                assert torch.equal(getattr(actual, kind)[layer], tensor), f"{kind} of layer {layer}"


@torch.no_grad()
def test_nothing_is_recorded_outside_the_block(collator):
    """A forward before or after the one that is meant (an evaluation, say) would replace its tensors."""
    model = make_model()
    batches = [dict(collator(make_rows(3, seed=seed))) for seed in range(3)]
    expected = model(**batches[1], output_hidden_states=True).hidden_states[2]
    capture = Capture(model, Wanted(hidden=frozenset({2}), attention=frozenset({1}), values=frozenset({3})))
    model(**batches[0])
    with capture:
        outputs = model(**batches[1])
    model(**batches[2])
    assert torch.equal(capture.signals(outputs, batches[1]).hidden[2], expected)
    model(**batches[2])
    nothing = r"hidden states of layers \[\], attention of \[\] and values of \[\], but \[2\], \[1\] and \[3\] are"
    with pytest.raises(ValueError, match=nothing):
        capture.signals(outputs, batches[1])


@pytest.mark.parametrize("family", READABLE)
def test_nothing_is_left_behind(family, batch):
    """Hooks that stay would keep every later forward's tensors, double with every step, and go into no pickle."""
    model = make_model(family)
    inputs, before = inputs_for(model, batch), set(vars(model.config))
    capture = Capture(model, Wanted(hidden=frozenset({0, 1, 4}), attention=frozenset({2}), values=frozenset({3})))
    assert count_hooks(model) == 0
    with capture:
        assert count_hooks(model) > 0
        outputs = model(**inputs)
    assert count_hooks(model) == 0
    with pytest.raises(RuntimeError, match="out of memory"), capture:
        model(**inputs)
        raise RuntimeError("out of memory")
    assert count_hooks(model) == 0
    assert set(vars(model.config)) == before
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(**inputs).logits, outputs.logits)


def test_a_failed_forward_leaves_nothing_for_the_next(batch):
    """After an error that the caller handles, tensors of the failed batch would be compared with those of the next."""
    model = make_model()
    capture = Capture(model, Wanted(hidden=frozenset({2})))
    with pytest.raises(RuntimeError, match="out of memory"), capture:
        model(**batch)
        raise RuntimeError("out of memory")
    with pytest.raises(ValueError, match=r"recorded hidden states of layers \[\]"):
        capture.signals(None, batch)


def vector_weights(model, layer):
    """The weights that make queries, keys and values, or the one that makes them all."""
    family, block = family_of(model.config), encoder_blocks(model)[layer - 1]
    fused = isinstance(family, FusedFamily)
    paths = [family.query_key_value] if fused else [family.query, family.key, family.value]
    return [block.get_submodule(path).weight for path in paths]


def loss_of(signals):
    """A number that depends on all that was captured."""
    kinds = [signals.hidden, signals.queries, signals.keys, signals.values]
    return sum(tensor.square().sum() for kind in kinds for tensor in kind.values())


@pytest.mark.parametrize("family", READABLE)
def test_the_gradient_flows_through_what_is_captured(family, batch):
    """Captured copies without a graph would give a loss that falls by nothing but chance."""
    model = make_model(family)
    inputs, weights = inputs_for(model, batch), vector_weights(model, 2)
    wanted = Wanted(hidden=frozenset({2}), attention=frozenset({2}), values=frozenset({2}))
    expected = torch.autograd.grad(model(**inputs, output_hidden_states=True).hidden_states[2].square().sum(), weights)
    signals = read(model, wanted, inputs)
    actual = torch.autograd.grad(signals.hidden[2].square().sum(), weights, retain_graph=True)
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(actual, expected, strict=True))
    third = -(-len(weights[0]) // (3 if len(weights) == 1 else 1))
    for index, vectors in enumerate((signals.queries[2], signals.keys[2], signals.values[2])):
        gradient = torch.autograd.grad(vectors.square().sum(), weights, retain_graph=True, allow_unused=True)
        own = gradient[index] if len(weights) == 3 else gradient[0][index * third : (index + 1) * third]
        assert own.abs().max() > 0


# transformers checkpoints neither of the two others.
CHECKPOINTED = [family for family in READABLE if family not in ("albert", "mpnet")]


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(family, batch):
    """The forward repeated in the backward would miss what a hook computed, or be recorded as the next batch."""
    wanted = Wanted(hidden=frozenset({0, 2, 4}), attention=frozenset({1, 3}), values=frozenset({2}))
    gradients = []
    for is_checkpointed in (False, True):
        model = make_model(family).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = inputs_for(model, batch)
        capture = Capture(model, wanted)
        with capture:
            outputs = model(**inputs)
        (loss_of(capture.signals(outputs, inputs)) + outputs.logits.sum()).backward()
        with pytest.raises(ValueError, match=r"recorded hidden states of layers \[\], attention of \[\]"):
            capture.signals(outputs, inputs)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert sorted(gradients[0]) == sorted(gradients[1])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


@pytest.mark.parametrize("kind", ["hidden", "attention", "values"])
@pytest.mark.parametrize("family", CHECKPOINTED)
def test_reentrant_checkpointing_is_refused_where_it_cuts_the_gradient(family, kind, batch):
    """The loss would be logged and train nothing."""
    model = make_model(family).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    inputs = inputs_for(model, batch)
    try:
        signals = read(model, Wanted(**{kind: frozenset({2})}), inputs)
    except ValueError as error:
        assert "of layer 2 carry no gradient" in str(error)
        assert "set gradient_checkpointing_kwargs={'use_reentrant': False}" in str(error)
    else:  # transformers 5 checkpoints inside the block, so that what the block returns keeps its graph
        assert kind == "hidden"
        assert signals.hidden[2].requires_grad
    model.eval()
    with torch.no_grad():
        assert not loss_of(read(model, Wanted(**{kind: frozenset({2})}), inputs)).requires_grad


@pytest.mark.parametrize("kind", ["attention", "values"])
@pytest.mark.parametrize("family", ["deberta", "deberta-v2", "convbert", "modernbert"])
def test_families_without_readable_vectors_are_refused(family, kind):
    """Content scores alone, or vectors that are not there, would be distilled in place of the model's attention."""
    model = make_model(family)
    if family in READABLE:
        assert attention_family_of(model.config) is FAMILIES[family]
        return
    reason = {"convbert": "not known", "modernbert": "'transformers>=5'"}.get(family, "disentangled")
    with pytest.raises(ValueError) as error:
        Capture(model, Wanted(**{kind: frozenset({1})}))
    for part in (f"model type '{family}'", reason, "bert, camembert", "attention_loss_weight=0", "similarity"):
        assert part in str(error.value)


def test_copying_layers_of_an_unknown_family_is_refused():
    """The layers would not be found, or those of another part of the model copied."""
    with pytest.raises(ValueError, match="layers of model type 'convbert' are not known; copying .* albert, bert"):
        family_of(make_model("convbert").config)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_every_problem_has_logits(family, batch):
    """Start and end scores of answers would be lost, or put where classes are expected."""
    size = batch["input_ids"].shape
    shapes = {"token_classification": (*size, 3), "masked_lm": (*size, 64), "multi_label_classification": (5, 3)}
    for problem, shape in shapes.items():
        model = make_model(family, problem=problem)
        inputs = inputs_for(model, batch)
        logits = read(model, Wanted(), inputs).logits
        assert logits.shape == shape
        assert torch.equal(logits, model(**inputs).logits)
    model = make_model(family, problem="question_answering")
    inputs = inputs_for(model, batch)
    outputs, logits = model(**inputs), read(model, Wanted(hidden=frozenset({4})), inputs).logits
    assert logits.shape == (5, 2, size[1])
    assert torch.equal(logits[:, 0], outputs.start_logits)
    assert torch.equal(logits[:, 1], outputs.end_logits)


@torch.no_grad()
def test_a_model_without_logits_is_refused(batch):
    """Its hidden states, or the logits of another task, would pass for the scores of the task."""
    config = make_model().config
    for make, names in (
        (AutoModel, "'last_hidden_state', 'pooler_output'"),
        (AutoModelForPreTraining, "'prediction_logits', 'seq_relationship_logits'"),
    ):
        model = make.from_config(config)
        with pytest.raises(ValueError, match=f"{names}.*AutoModelForSequenceClassification"):
            read(model, Wanted(), inputs_for(model, batch))


def test_each_model_names_its_own_columns(batch):
    """token_type_ids would be passed to a DistilBERT, which has none, or kept from the BERT that reads them."""
    assert {"input_ids", "attention_mask", "token_type_ids", "labels"} <= forward_columns(make_model("bert"))
    columns = forward_columns(make_model("distilbert"))
    assert {"input_ids", "attention_mask", "labels"} <= columns
    assert "token_type_ids" not in columns
    assert sorted(columns_for(columns, batch)) == ["attention_mask", "input_ids"]
    assert sorted(columns_for(None, batch)) == ["attention_mask", "input_ids", "token_type_ids"]
