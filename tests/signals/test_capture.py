"""What the hooks read is what the model itself reports, and nothing is left behind."""

import pytest
import torch
from conftest import make_model, make_rows

from hf_kd.objective.losses import attention_scores
from hf_kd.signals import Capture, Wanted
from hf_kd.signals.capture import FAMILIES, columns_for, encoder_blocks, forward_columns


KNOWN = ["bert", "roberta", "xlm-roberta", "electra", "distilbert"]
QUERY = {family: "attention.q_lin" if family == "distilbert" else "attention.self.query" for family in KNOWN}


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


def test_these_are_the_known_families():
    """A family that is added would stay without the tests below."""
    assert sorted(FAMILIES) == sorted(KNOWN)


@pytest.mark.parametrize("family", KNOWN)
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


@pytest.mark.parametrize("family", KNOWN)
@torch.no_grad()
def test_recomputed_scores_are_those_of_the_model(family, batch):
    """Swapped heads, a wrong scale or a neighbouring block would give scores that train the student towards noise."""
    model = make_model(family)
    model.set_attn_implementation("eager")
    inputs = inputs_for(model, batch)
    expected = model(**inputs, output_attentions=True).attentions
    signals = read(model, Wanted(attention=frozenset({1, 2, 3, 4})), inputs)
    is_pad_key = ~batch["attention_mask"].bool()[:, None, None, :]
    assert sorted(signals.queries) == sorted(signals.keys) == [1, 2, 3, 4]
    for layer in (1, 2, 3, 4):
        scores = attention_scores(signals.queries[layer], signals.keys[layer])
        probabilities = scores.masked_fill(is_pad_key, -torch.inf).softmax(dim=-1)
        torch.testing.assert_close(probabilities, expected[layer - 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", KNOWN)
@torch.no_grad()
def test_capture_leaves_the_forward_as_it_is(family, batch):
    """Asking for maps would switch the model to slow eager attention, or change what it computes."""
    model = make_model(family)
    attention = model.config._attn_implementation  # transformers 4.57 has eager attention alone for ELECTRA
    assert attention == "sdpa" or family == "electra"
    inputs = inputs_for(model, batch)
    expected = model(**inputs).logits
    capture = Capture(model, Wanted(hidden=frozenset({0, 2}), attention=frozenset({4})))
    assert capture.forward_kwargs == {}
    with capture:
        outputs = model(**inputs)
    assert torch.equal(outputs.logits, expected)
    assert model.config._attn_implementation == attention
    signals = capture.signals(outputs, inputs)
    assert torch.equal(signals.logits, expected)
    assert torch.equal(signals.attention_mask, batch["attention_mask"])
    assert (sorted(signals.hidden), sorted(signals.queries), sorted(signals.keys)) == ([0, 2], [4], [4])


@pytest.mark.parametrize("family", ["albert", "deberta-v2", "modernbert"])
@torch.no_grad()
def test_other_families_give_hidden_states(family, batch):
    """A family outside the table would lose hidden-state distillation, or be read at other layers."""
    model = make_model(family)
    inputs = inputs_for(model, batch)
    expected = model(**inputs, output_hidden_states=True).hidden_states
    hidden = read(model, Wanted(hidden=frozenset({0, 2, 4})), inputs).hidden
    assert sorted(hidden) == [0, 2, 4]
    for layer, states in hidden.items():
        assert torch.equal(states, expected[layer]), f"layer {layer}"
    assert model(**inputs).hidden_states is None


@torch.no_grad()
def test_nothing_is_recorded_outside_the_block(collator):
    """A forward before or after the one that is meant (an evaluation, say) would replace its tensors."""
    model = make_model()
    batches = [dict(collator(make_rows(3, seed=seed))) for seed in range(3)]
    expected = model(**batches[1], output_hidden_states=True).hidden_states[2]
    capture = Capture(model, Wanted(hidden=frozenset({2}), attention=frozenset({1})))
    model(**batches[0])
    with capture:
        outputs = model(**batches[1])
    model(**batches[2])
    assert torch.equal(capture.signals(outputs, batches[1]).hidden[2], expected)
    model(**batches[2])
    with pytest.raises(
        ValueError, match=r"recorded hidden states of layers \[\] and attention of \[\], but \[2\] and \[1\]"
    ):
        capture.signals(outputs, batches[1])


def test_hooks_are_gone_afterwards(batch):
    """Hooks that stay would keep every later forward's tensors, or double with every step."""
    model = make_model()
    capture = Capture(model, Wanted(hidden=frozenset({0, 1}), attention=frozenset({2})))
    assert count_hooks(model) == 0
    with capture:
        assert count_hooks(model) == 4
    assert count_hooks(model) == 0
    with pytest.raises(RuntimeError, match="out of memory"), capture:
        model(**batch)
        raise RuntimeError("out of memory")
    assert count_hooks(model) == 0


def test_a_failed_forward_leaves_nothing_for_the_next(batch):
    """After an error that the caller handles, tensors of the failed batch would be compared with those of the next."""
    model = make_model()
    capture = Capture(model, Wanted(hidden=frozenset({2})))
    with pytest.raises(RuntimeError, match="out of memory"), capture:
        model(**batch)
        raise RuntimeError("out of memory")
    with pytest.raises(ValueError, match=r"recorded hidden states of layers \[\]"):
        capture.signals(None, batch)


@pytest.mark.parametrize("family", KNOWN)
def test_the_gradient_flows_through_what_is_captured(family, batch):
    """Captured copies without a graph would give a loss that falls by nothing but chance."""
    model = make_model(family)
    inputs = inputs_for(model, batch)
    query = encoder_blocks(model)[1].get_submodule(QUERY[family]).weight
    (expected,) = torch.autograd.grad(
        model(**inputs, output_hidden_states=True).hidden_states[2].square().sum(), query
    )
    assert expected.abs().max() > 0
    signals = read(model, Wanted(hidden=frozenset({2}), attention=frozenset({2})), inputs)
    (actual,) = torch.autograd.grad(signals.hidden[2].square().sum(), query, retain_graph=True)
    assert torch.equal(actual, expected)
    (through_scores,) = torch.autograd.grad(
        attention_scores(signals.queries[2], signals.keys[2]).square().sum(), query
    )
    assert through_scores.abs().max() > 0


def test_the_second_forward_of_gradient_checkpointing_is_not_recorded(batch):
    """The forward that checkpointing repeats in the backward would be kept in memory until the next step."""
    model = make_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    capture = Capture(model, Wanted(hidden=frozenset({2}), attention=frozenset({1})))
    with capture:
        outputs = model(**batch)
    signals = capture.signals(outputs, batch)
    (signals.hidden[2].square().sum() + signals.queries[1].square().sum() + outputs.logits.sum()).backward()
    with pytest.raises(ValueError, match=r"recorded hidden states of layers \[\] and attention of \[\]"):
        capture.signals(outputs, batch)


def test_each_model_names_its_own_columns(batch):
    """token_type_ids would be passed to a DistilBERT, which has none, or kept from the BERT that reads them."""
    assert {"input_ids", "attention_mask", "token_type_ids", "labels"} <= forward_columns(make_model("bert"))
    columns = forward_columns(make_model("distilbert"))
    assert {"input_ids", "attention_mask", "labels"} <= columns
    assert "token_type_ids" not in columns
    assert sorted(columns_for(columns, batch)) == ["attention_mask", "input_ids"]
    assert sorted(columns_for(None, batch)) == ["attention_mask", "input_ids", "token_type_ids"]
