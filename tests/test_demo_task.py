"""The generated sentiment task."""

import pytest
from datasets import concatenate_datasets

from hf_kd.demo_task import HELD_OUT, LABELED, generate_demo_task
from hf_kd.glue import UNLABELED


SMALL = {"num_labeled": 201, "num_unlabeled": 400, "num_validation": 300}


@pytest.fixture(scope="module")
def data():
    return generate_demo_task(seed=0, **SMALL)[0]


def words(vocabulary):
    return {*vocabulary.nouns, *vocabulary.adjectives[0], *vocabulary.adjectives[1]}


def words_of(dataset):
    return {word for sentence in dataset["sentence"] for word in sentence.replace(",", "").split()}


def test_sizes_labels_and_task(data):
    """An unbalanced validation set would make the majority class look like skill."""
    assert {name: split.num_rows for name, split in data.items()} == {
        "train": 201,
        "validation": 300,
        "unlabeled": 400,
    }
    assert sum(data["train"]["label"]) == 100
    assert sum(data["validation"]["label"]) == 150
    assert set(data["unlabeled"]["label"]) == {UNLABELED}
    assert concatenate_datasets([data["train"], data["unlabeled"]]).num_rows == 601
    assert generate_demo_task(**SMALL)[1].label_names == ("negative", "positive")


def test_the_seed_decides(data):
    """Numbers of two runs would not be comparable."""
    assert {name: split.to_dict() for name, split in generate_demo_task(seed=0, **SMALL)[0].items()} == {
        name: split.to_dict() for name, split in data.items()
    }
    assert generate_demo_task(seed=1, **SMALL)[0]["train"]["sentence"][:] != data["train"]["sentence"][:]
    # Written down once: another Python or platform has to give the same rows.
    assert data["train"][0] == {
        "sentence": "in the end while my hotel was truly great, my concert was far from clean .",
        "label": 0,
    }


def test_no_sentence_twice(data):
    """A validation sentence seen in training, or by the student without its label, would be memorised."""
    sentences = [sentence for split in data.values() for sentence in split["sentence"]]
    assert len(set(sentences)) == len(sentences) == 901


def test_held_out_words(data):
    """Validation would ask for words that the labels taught, and the teacher's knowledge would not matter."""
    assert not words(LABELED) & words(HELD_OUT)
    assert not words_of(data["train"]) & words(HELD_OUT)
    assert not words_of(data["validation"]) & words(LABELED)
    assert len(words_of(data["unlabeled"]) & words(HELD_OUT)) > 0.9 * len(words(HELD_OUT))


def test_negation_and_contrast_are_learnable_only_by_structure():
    """The presence of "not" or "but" would give the label away."""
    train = generate_demo_task(num_labeled=2000, num_unlabeled=2, num_validation=2)[0]["train"]
    for cue in (" not ", " but ", " although ", " less ", " far from "):
        labels = [
            label for sentence, label in zip(train["sentence"], train["label"], strict=True) if cue in f" {sentence}"
        ]
        assert 0.35 < sum(labels) / len(labels) < 0.65, cue


def test_rates_change_what_they_say():
    """A knob that nothing reads would leave the difficulty as it was."""
    plain = generate_demo_task(**SMALL, negation_rate=0.0, contrast_rate=0.0)[0]["train"]
    assert not words_of(plain) & {"not", "never", "hardly", "far", "anything", "but", "yet", "although", "while"}
    contrasts = generate_demo_task(**SMALL, negation_rate=0.0, contrast_rate=0.9)[0]["train"]
    assert sum("," in sentence for sentence in contrasts["sentence"]) > 0.85 * 201


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_labeled": 1}, "num_labeled=1; give a number from 2 to 20000"),
        ({"negation_rate": 1.5}, "negation_rate=1.5; give a share from 0 to 1.0"),
        ({"contrast_rate": 0.95}, "contrast_rate=0.95; give a share from 0 to 0.9"),
        ({"num_unlabeled": 10**9}, "num_unlabeled=1000000000; give a number from 2 to 20000"),
    ],
)
def test_bad_arguments(kwargs, message):
    """A size beyond what the templates can say would never return."""
    with pytest.raises(ValueError, match=message):
        generate_demo_task(**kwargs)
