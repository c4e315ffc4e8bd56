"""Two tokenizers in one batch: the student's columns as ever, and beside them what the teacher would have read."""

import json
import logging
import pickle

import pytest
import torch
from conftest import make_model
from datasets import Dataset
from tokenizers.pre_tokenizers import ByteLevel
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, RobertaTokenizerFast

from hf_kd import DistillationCollator, DistillationTrainer


TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w2"]
OTHERS = ["w9", "w8 w7 w6", "w1", "w12 w13 w14 w15"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a byte-level BPE tokenizer with RoBERTa's special tokens and one merge."""
    folder = tmp_path_factory.mktemp("teacher_tokenizer")
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet()), "Ġw"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nĠ w\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def teacher_tokenizer(folder):
    tokenizer = RobertaTokenizerFast.from_pretrained(folder, model_max_length=40)
    assert tokenizer.tokenize("w1 w23") == ["w", "1", "Ġw", "2", "3"]
    return tokenizer


@pytest.fixture
def rows(tokenizer):
    """Tokenised for the student, with the texts kept."""
    return [
        {**tokenizer(a, b), "label": i % 2, "sentence1": a, "sentence2": b}
        for i, (a, b) in enumerate(zip(TEXTS, OTHERS, strict=True))
    ]


def own(rows, *text_columns):
    """The student's columns of the rows alone."""
    return [{name: value for name, value in row.items() if name not in text_columns} for row in rows]


def assert_same_batch(batch, expected):
    assert set(batch) == set(expected)
    for name in expected:
        assert batch[name].dtype == expected[name].dtype and torch.equal(batch[name], expected[name]), name


def by_teacher(teacher_tokenizer, *texts, **options):
    encoded = teacher_tokenizer(*texts, padding=True, return_tensors="pt", **options)
    return {f"teacher_{name}": tensor for name, tensor in encoded.items()}


@pytest.mark.parametrize("pad_to_multiple_of", [None, 8])
@pytest.mark.parametrize("text_columns", [("sentence1",), ("sentence1", "sentence2"), ("sentence2", "sentence1")])
def test_both_parts_are_what_each_tokenizer_makes_alone(
    tokenizer, teacher_tokenizer, rows, text_columns, pad_to_multiple_of
):
    """The student would train on other inputs than without a teacher, or the teacher read another text, or padding."""
    rows = own(rows, *({"sentence1", "sentence2"} - set(text_columns)))
    before = [dict(row) for row in rows]
    options = {"pad_to_multiple_of": pad_to_multiple_of}
    batch = DistillationCollator(tokenizer, teacher_tokenizer, text_columns, **options)(rows)
    texts = [[row[name] for row in rows] for name in text_columns]
    student_part = DataCollatorWithPadding(tokenizer, **options)(own(rows, *text_columns))
    assert set(student_part) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert_same_batch(batch, {**student_part, **by_teacher(teacher_tokenizer, *texts, **options)})
    assert not batch["teacher_attention_mask"].all()  # there is padding to get wrong
    assert rows == before  # a dataset in memory keeps its texts


def test_a_teacher_with_segments_gets_them(tokenizer, teacher_tokenizer, rows):
    """A BERT teacher was trained to tell the second text by its segment, whatever its student's tokenizer writes."""
    rows = [{**teacher_tokenizer(row["sentence1"]), **own([row], *tokenizer.model_input_names)[0]} for row in rows]
    batch = DistillationCollator(teacher_tokenizer, tokenizer, ["sentence1", "sentence2"])(rows)
    expected = by_teacher(tokenizer, TEXTS, OTHERS)
    assert expected["teacher_token_type_ids"].any() and "token_type_ids" not in batch
    assert_same_batch({name: batch[name] for name in expected}, expected)


@pytest.mark.parametrize(("max_length", "length"), [(7, 7), (None, 40)])
def test_long_texts_are_cut_to_what_the_teacher_takes(tokenizer, teacher_tokenizer, max_length, length):
    """A teacher indexes out of its positions in the middle of the training."""
    text = " ".join(["w1"] * 60)
    collator = DistillationCollator(tokenizer, teacher_tokenizer, max_length=max_length)
    batch = collator([{"input_ids": [2, 5, 3], "sentence": text}, {"input_ids": [2, 3], "sentence": "w1"}])
    assert batch["teacher_input_ids"].shape == (2, length)
    assert_same_batch(
        {name: batch[name] for name in batch if name.startswith("teacher_")},
        by_teacher(teacher_tokenizer, [text, "w1"], truncation=True, max_length=length),
    )


def test_rows_without_texts_are_padded_alone(tokenizer, teacher_tokenizer, rows):
    """An evaluation set without texts would be refused, though no teacher runs in evaluation."""
    rows = own(rows, "sentence1", "sentence2")
    batch = DistillationCollator(tokenizer, teacher_tokenizer, ["sentence1", "sentence2"])(rows)
    assert_same_batch(batch, DataCollatorWithPadding(tokenizer)(rows))


def test_a_text_that_is_missing_is_an_error_with_its_column(tokenizer, teacher_tokenizer, rows):
    """The teacher would read one text of a pair, or the word None."""
    collator = DistillationCollator(tokenizer, teacher_tokenizer, ["sentence1", "sentence2"])
    with pytest.raises(ValueError, match="but its text for the teacher is in 'sentence2', .* keep the column"):
        collator(own(rows, "sentence2"))
    with pytest.raises(ValueError, match="its text for the teacher is in 'sentence1', which is not there"):
        collator([rows[0], *own(rows[1:], "sentence1", "sentence2")])
    for text in (None, 3.5, ["w1", "w2"]):
        with pytest.raises(ValueError, match="the column 'sentence2' holds .*, but a text for the teacher is needed"):
            collator([*rows[:3], {**rows[3], "sentence2": text}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_tokenizer": None}, "teacher_tokenizer=None must be a tokenizer; load it with AutoTokenizer"),
        ({"tokenizer": "roberta-base"}, "tokenizer='roberta-base' must be a tokenizer"),
        ({"text_columns": []}, r"text_columns=\[\] must name the column of a text, or the two of a pair"),
        ({"text_columns": ["a", "b", "c"]}, "must name the column of a text"),
        ({"text_columns": ["a", "a"]}, "must name the column of a text"),
        ({"max_length": 41}, r"max_length=41; the teacher's tokenizer takes from 3 \(with 2 special tokens\) to 40"),
        ({"max_length": 4, "text_columns": ["a", "b"]}, "max_length=4; the teacher's tokenizer takes from 5"),
        ({"pad_to_multiple_of": 16}, "max_length=40 is no multiple of pad_to_multiple_of=16, .* max_length=32"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tokenizer, teacher_tokenizer, changes, message):
    """The first batch would fail in a worker, or the first long text after an hour."""
    with pytest.raises(ValueError, match=message):
        DistillationCollator(**{"tokenizer": tokenizer, "teacher_tokenizer": teacher_tokenizer, **changes})


def test_a_tokenizer_without_a_limit_needs_one(tokenizer, folder):
    """Texts would not be truncated at all: 1e30 tokens is how transformers writes that it does not know."""
    unlimited = RobertaTokenizerFast.from_pretrained(folder)
    with pytest.raises(ValueError, match="does not say how many tokens its model takes, .* pass max_length"):
        DistillationCollator(tokenizer, unlimited)
    assert DistillationCollator(tokenizer, unlimited, max_length=512).max_length == 512


def test_one_text_column_may_be_written_as_a_string(tokenizer, teacher_tokenizer, rows):
    """The letters of its name would be taken for columns, and the rows for rows without texts."""
    collator = DistillationCollator(tokenizer, teacher_tokenizer, "sentence1")
    assert collator.text_columns == ("sentence1",)
    assert "teacher_input_ids" in collator(own(rows, "sentence2"))


def test_dataloader_workers_make_the_same_batches(tokenizer, teacher_tokenizer, rows):
    """It would work until dataloader_num_workers is set."""
    collator = DistillationCollator(tokenizer, teacher_tokenizer, ["sentence1", "sentence2"])
    expected = collator(rows)
    assert_same_batch(pickle.loads(pickle.dumps(collator))(rows), expected)
    (batch,) = DataLoader(Dataset.from_list(rows), batch_size=4, collate_fn=collator, num_workers=1)
    assert_same_batch(batch, expected)


def test_nothing_is_warned_about(tokenizer, teacher_tokenizer, rows, caplog):
    """Each worker would repeat that a fast tokenizer had better not pad."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        DistillationCollator(tokenizer, teacher_tokenizer, ["sentence1", "sentence2"])(rows)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []


def test_a_modernbert_student_learns_from_a_roberta_teacher(tokenizer, teacher_tokenizer, rows, make_args):
    """The Trainer would drop the texts, or the teacher read the student's tokens: its logits are those it gives to
    the texts."""
    student = make_model("modernbert", seed=2)
    teacher = make_model("roberta", seed=1, vocab_size=len(teacher_tokenizer), pad_token_id=1)
    collator = DistillationCollator(tokenizer, teacher_tokenizer, ["sentence1", "sentence2"])
    with torch.no_grad():
        texts = teacher_tokenizer(TEXTS, OTHERS, padding=True, return_tensors="pt")
        teacher_logits = teacher(**texts).logits
        inputs = tokenizer(TEXTS, OTHERS, padding=True, return_tensors="pt", return_token_type_ids=False)
        student_logits = student(**inputs).logits
    trainer = DistillationTrainer(
        model=student,
        args=make_args(max_steps=1, logit_loss_type="mse"),
        teacher_model=teacher,
        train_dataset=Dataset.from_list(rows),
        data_collator=collator,
        processing_class=tokenizer,
    )
    trainer.train()
    expected = (student_logits - teacher_logits).square().mean().item()
    assert trainer.state.log_history[0]["logit_loss"] == pytest.approx(expected, rel=1e-5)
