"""Columns that hold a teacher's signals: their names, and how rows of them become a batch."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import make_dataset
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import DataCollatorWithPadding

from hf_kd.signals import Wanted
from hf_kd.signals.columns import (
    SignalsCollator,
    SignalSource,
    TokenLengths,
    is_signal_column,
    signals_of_columns,
    vector_columns,
    with_fast_format,
)


WIDTH = 4


@pytest.fixture(params=["float16", "uint16"])
def stored(request):
    return request.param


@pytest.fixture
def rows(stored):
    """Rows with a vector of each token, and the vectors."""
    dataset = make_dataset(6)
    lengths = [len(row) for row in dataset["input_ids"]]
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=length * WIDTH).astype("float16").view(stored) for length in lengths]
    features = Features({"teacher_hidden_2": List(Value(stored)), "teacher_logits": List(Value("float32"))})
    columns = {"teacher_hidden_2": vectors, "teacher_logits": rng.normal(size=(6, 2)).astype("float32")}
    return concatenate_datasets([dataset, Dataset.from_dict(columns, features=features)], axis=1), vectors


def items(dataset):
    """As a `DataLoader` asks for them."""
    return dataset.__getitems__(list(range(len(dataset))))


def test_names():
    """A text column that is called like a signal would be taken for one, and an eleventh teacher for the second."""
    wanted = Wanted(hidden=frozenset({0, 12}), attention=frozenset({3}), values=frozenset({5}))
    names = ["teacher_hidden_0", "teacher_hidden_12", "teacher_queries_3", "teacher_keys_3", "teacher_values_5"]
    assert vector_columns(wanted, "teacher_") == names
    assert signals_of_columns([*names, "labels", "teacher_logits"]) == {"teacher_": ({"logits"}, wanted)}
    for name in ("teacher_input_ids", "teacher_text", "teacher_hidden", "my_teacher_logits", "teacher_logits_2"):
        assert not is_signal_column(name)
    # Queries without keys are nothing to compare attention with.
    assert signals_of_columns(["teacher_1_queries_3"])["teacher_1_"] == (set(), Wanted())
    several = [f"teacher_{index}_logits" for index in range(11)]
    assert list(signals_of_columns(several)) == [f"teacher_{index}_" for index in range(11)]


def test_rows_are_views(rows, stored):
    """Lists of Python numbers would make the collator slower than the student."""
    dataset, vectors = rows
    fast = items(with_fast_format(dataset))
    assert all(np.array_equal(row["teacher_hidden_2"], x) for row, x in zip(fast, vectors, strict=True))
    assert {row["teacher_hidden_2"].dtype for row in fast} == {np.dtype(stored)}
    assert all(not row["teacher_hidden_2"].flags.owndata for row in fast)
    assert all(isinstance(row["input_ids"], list) for row in fast)  # what every collator takes
    assert with_fast_format(make_dataset(3)).format["type"] is None


@pytest.mark.parametrize("is_left", [False, True])
def test_vectors_stand_at_their_tokens(rows, stored, tokenizer, is_left):
    """Exactly those that were stored, at the tokens they are of, and zeros at padding, on whichever side."""
    dataset, vectors = rows
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left" if is_left else "right"
    batch = SignalsCollator(DataCollatorWithPadding(tokenizer))(items(with_fast_format(dataset)))
    found = batch["teacher_hidden_2"]
    assert found.dtype == (torch.bfloat16 if stored == "uint16" else torch.float16)
    assert found.shape == (*batch["input_ids"].shape, WIDTH)
    for states, mask, expected in zip(found, batch["attention_mask"].bool(), vectors, strict=True):
        assert np.array_equal(states[mask].view(torch.int16).numpy().view(stored).reshape(-1), expected)
        assert not states[~mask].any()
    assert batch["teacher_logits"].dtype == torch.float32 and batch["teacher_logits"].shape == (6, 2)


def test_gaps_in_the_mask(rows, stored):
    """Tokens that the mask leaves out in the middle of a row have no vectors."""
    dataset, vectors = rows
    row = items(with_fast_format(dataset))[0]
    length = len(row["input_ids"])
    mask = torch.tensor([[1, 0] + [1] * (length - 1)])
    collator = SignalsCollator(lambda rows: {"input_ids": torch.ones_like(mask), "attention_mask": mask})
    states = collator([row])["teacher_hidden_2"][0]
    assert not states[1].any()
    assert np.array_equal(states[mask[0].bool()].view(torch.int16).numpy().view(stored).reshape(-1), vectors[0])


@pytest.mark.parametrize("name", [None, "numpy", "torch"])
def test_any_format_gives_the_same_batch(rows, tokenizer, name):
    """A format of the user's own makes other numbers of the columns: float32 of float16, and int64 of bits."""
    dataset, _ = rows
    collator = SignalsCollator(DataCollatorWithPadding(tokenizer))
    expected = collator(items(with_fast_format(dataset)))
    formatted = with_fast_format(dataset.with_format(name))
    assert formatted.format["type"] == (name or "numpy")
    found = collator(items(formatted))
    for column, values in expected.items():
        assert torch.equal(found[column], values), column
    assert torch.equal(collator(items(dataset))["teacher_hidden_2"], expected["teacher_hidden_2"])


def test_a_transform_is_kept(rows):
    """What a user computes for each batch must still be computed."""
    dataset, _ = rows
    changed = with_fast_format(dataset.with_transform(lambda batch: {"labels": [7] * len(batch["labels"])}))
    assert [row["labels"] for row in items(changed)] == [7] * 6


def test_token_logits_are_vectors(rows, tokenizer):
    """For a model with an answer per token, a row of logits is as long as its text."""
    dataset, vectors = rows
    dataset = dataset.remove_columns("teacher_logits").rename_column("teacher_hidden_2", "teacher_logits")
    collator = SignalsCollator(DataCollatorWithPadding(tokenizer), has_token_logits=True)
    batch = collator(items(with_fast_format(dataset)))
    assert batch["teacher_logits"].shape == (*batch["input_ids"].shape, WIDTH)


def test_other_tokens_than_the_teacher_read(rows, tokenizer):
    """Vectors of a text that was cut anew would stand at other tokens."""
    dataset, _ = rows
    cut = [{**row, "input_ids": row["input_ids"][:4], "attention_mask": row["attention_mask"][:4]} for row in dataset]
    for row in cut:
        del row["token_type_ids"]
    with pytest.raises(ValueError, match="teacher_hidden_2 holds .* Tokenize first, then cache"):
        SignalsCollator(DataCollatorWithPadding(tokenizer))(cut)
    uneven = [{"input_ids": [2, 3], "teacher_logits": [0.0] * n} for n in (2, 3)]
    with pytest.raises(ValueError, match=r"teacher_logits holds \[2, 3\] numbers"):
        SignalsCollator(DataCollatorWithPadding(tokenizer))(uneven)


def test_two_dtypes(rows):
    """One formatter reads all columns: of two dtypes it would change the numbers of one."""
    dataset, vectors = rows
    other = "float16" if dataset.features["teacher_hidden_2"].feature.dtype == "uint16" else "uint16"
    more = dataset.add_column("teacher_hidden_4", [x.view(other) for x in vectors], feature=List(Value(other)))
    with pytest.raises(ValueError, match=r"dtypes \['float16', 'uint16'\]; cache them all with one dtype"):
        with_fast_format(more)


def test_lengths(rows):
    """A sampler that groups by length asks for rows and looks how long they are."""
    dataset, _ = rows
    order = [4, 1, 1, 0]
    lengths = TokenLengths(dataset.select(order))
    assert [len(row["input_ids"]) for row in lengths] == [len(dataset[index]["input_ids"]) for index in order]
    assert len(lengths) == 4


def test_collator_of_a_worker(tokenizer):
    """Workers get a copy; a trainer asks the collator for its text columns."""
    collator = SignalsCollator(DataCollatorWithPadding(tokenizer))
    assert pickle.loads(pickle.dumps(collator)).tokenizer.get_vocab() == tokenizer.get_vocab()
    assert not hasattr(collator, "text_columns")


def test_description_of_another_version():
    """A description with other fields would be read as what it is not."""
    source = SignalSource(config={"model_type": "bert"}, problem="regression", weights="abc")
    assert SignalSource.from_json(source.to_json()) == source
    for text in ('{"config": {}, "problem": "regression", "new": 1}', "teacher", "[]"):
        with pytest.raises(ValueError, match="make the columns again with cache_teacher_signals"):
            SignalSource.from_json(text)
    config = SignalSource(config={"model_type": "mine", "num_labels": 3}, problem="regression").read_config()
    assert (config.model_type, config.num_labels) == ("mine", 3)
