"""Variants of training texts: made by the stated rules, the same ones every time, and made once."""

import json
import os
import subprocess
import sys
from collections import Counter

import datasets
import pytest
import torch
from conftest import VOCAB, make_model
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from glue_setup import DataArguments, add_augmented, labeled, load_data, tokenize_data
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizerFast,
    TrainingArguments,
    set_seed,
)

from hf_kd import augmentation, masked_lm
from hf_kd.augmentation import augment
from hf_kd.glue import GLUE_TASKS
from hf_kd.masked_lm import MaskedLM


SINGLE = Features({"sentence": Value("string"), "label": Value("int64")})
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def numbered_texts(num_rows, length=10):
    """Texts in which every word says where it was: w12 is the third of the second text of ten words."""
    return [" ".join(f"w{row * length + i}" for i in range(length)) for row in range(num_rows)]


def single_texts(num_rows=40, length=10):
    return Dataset.from_dict({"sentence": numbered_texts(num_rows, length), "label": [1] * num_rows}, features=SINGLE)


def pairs(num_rows=40, label="float32"):
    texts = numbered_texts(2 * num_rows)
    columns = {"sentence1": texts[::2], "sentence2": texts[1::2], "label": [1] * num_rows}
    features = Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": Value(label)})
    return Dataset.from_dict(columns, features=features)


@pytest.fixture
def vary(tokenizer, tmp_path):
    """`augment` with a cache of the test's own."""

    def call(dataset, num_variants=3, text_columns=("sentence",), **changes):
        settings = {"tokenizer": tokenizer, "seed": 0, "cache_dir": tmp_path / "cache", "device": "cpu", **changes}
        return augment(dataset, text_columns, num_variants, **settings)

    return call


@pytest.fixture
def cache_files(tmp_path):
    return lambda: {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "hf_kd_augmented").iterdir()}


# Without a masked language model: Tang et al. 2019


def test_a_tenth_of_the_words_is_masked(vary):
    """Another rate, or masks that fall on the same places, would be another procedure under the paper's name."""
    variants = vary(single_texts(400, 20), 10, ngram_probability=0.0)
    masked = [[word == "[MASK]" for word in text.split()] for text in variants["sentence"]]
    # Those without any mask are dropped as duplicates, and so are a few that came out twice.
    expected = 0.1 / (1 - 0.9**20)
    assert sum(map(sum, masked)) / (20 * len(masked)) == pytest.approx(expected, rel=0.03)
    for position in range(20):
        assert sum(row[position] for row in masked) / len(masked) == pytest.approx(expected, rel=0.2)
    for row, text in zip(masked, variants["sentence"], strict=True):
        numbers = [None if is_masked else int(word[1:]) for is_masked, word in zip(row, text.split(), strict=True)]
        starts = {number - position for position, number in enumerate(numbers) if number is not None}
        assert len(starts) == 1 and next(iter(starts)) % 20 == 0  # the words of one text, each in its place


def test_a_quarter_becomes_ngrams_of_one_to_five_words(vary):
    """The n-gram rule would cut every text, or none, or only its beginning."""
    variants = vary(single_texts(2000), 1, mask_probability=0.0)["sentence"]
    assert len(variants) / 2000 == pytest.approx(0.25, rel=0.1)  # the others are as they were, and dropped
    sizes, starts = Counter(), Counter()
    for text in variants:
        numbers = [int(word[1:]) for word in text.split()]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        sizes[len(numbers)] += 1
        starts[numbers[0] % 10] += 1
    assert set(sizes) == {1, 2, 3, 4, 5} and min(sizes.values()) > 0.15 * len(variants)
    assert set(starts) == set(range(10))


def test_ngrams_are_taken_from_the_masked_text(vary):
    """The paper's order: short variants have masks as well."""
    variants = vary(single_texts(400), 5, ngram_probability=1.0, mask_probability=0.5)["sentence"]
    words = [word for text in variants for word in text.split()]
    assert max(len(text.split()) for text in variants) == 5
    assert 0.35 < words.count("[MASK]") / len(words) < 0.55


def test_texts_shorter_than_an_ngram(vary):
    """A text of one word, or of none, has no n-gram of five words; it must not stop the run."""
    rows = Dataset.from_dict({"sentence": ["w1", "", "  ", "w2 w3"], "label": [0, 1, 0, 1]}, features=SINGLE)
    assert set(vary(rows, 50)["sentence"]) == {"[MASK]", "w2", "w3", "w2 [MASK]", "[MASK] w3", "[MASK] [MASK]"}


def test_pairs_change_the_first_the_second_and_both(vary):
    """A student that sees one side changed alone would not meet what the other side needs."""
    rows = pairs(300)
    originals = set(rows["sentence1"]), set(rows["sentence2"])
    for num_variants in (1, 3):  # also one variant per row takes turns
        variants = vary(rows, num_variants, ("sentence1", "sentence2"), mask_probability=0.5)
        changed = Counter(
            (first not in originals[0], second not in originals[1])
            for first, second in zip(variants["sentence1"], variants["sentence2"], strict=True)
        )
        assert set(changed) == {(True, False), (False, True), (True, True)}
        assert min(changed.values()) > 0.3 * len(variants)


def test_a_fixed_text_is_left_as_it_is(vary):
    """White space in it would be rewritten, and the pair be no longer the one of the original."""
    rows = pairs(30).map(lambda row: {"sentence2": row["sentence2"].replace(" ", "  ")})
    variants = vary(rows, 3, ("sentence1", "sentence2"), mask_probability=1.0, ngram_probability=0.0)
    assert set(rows["sentence2"]) <= set(variants["sentence2"])


def test_nothing_comes_twice(vary):
    """Copies, of an original above all, would weigh some texts more than others."""
    rows = Dataset.from_dict({"sentence": ["w1 w2  w3", "w1 w2", "w3"] * 20, "label": [1] * 60}, features=SINGLE)
    texts = vary(rows, 20)["sentence"][:]
    assert len(texts) == len(set(texts)) > 5 and not {"w1 w2 w3", "w1 w2", "w3"} & set(texts)


@pytest.mark.parametrize(("label", "expected"), [("int64", -100), ("float32", -100.0)])
def test_the_teacher_alone_labels_them(vary, label, expected):
    """A copied label would teach what may no longer be true: half of a sentence has another sentiment."""
    rows = pairs(label=label).add_column("source", ["news"] * 40)
    variants = vary(rows, 3, ("sentence1", "sentence2"))
    assert set(variants["label"]) == {expected} and set(variants["source"]) == {"news"}
    assert variants.features == rows.features
    both = concatenate_datasets([rows, variants])
    assert both["label"][:41] == [1] * 40 + [expected]


def test_none_asked_for(vary, tmp_path):
    """0 must make none and write nothing, and no rows must have no variants."""
    assert vary(single_texts(), 0).features == SINGLE and len(vary(single_texts(), 0)) == 0
    assert len(vary(single_texts().select(range(0)))) == 0 and not (tmp_path / "cache").exists()
    unchanged = vary(single_texts(), mask_probability=0.0, ngram_probability=0.0)
    assert len(unchanged) == 0 and unchanged.features == SINGLE


# With a masked language model: TinyBERT


PIECES = [*VOCAB, "##s", ",", "cat"]
FAVOURITES = {f"w{number}" for number in range(20, 35)}


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(PIECES), encoding="utf-8")
    return BertTokenizerFast.from_pretrained(folder, model_max_length=80)


def save_masked_lm(folder, tokenizer, favourites=FAVOURITES, seed=0):
    """A model that always says one of the favourites, if it is not kept from a special token, a piece or a comma."""
    set_seed(seed)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=82, **TINY)).eval()
    bias = model.cls.predictions.bias.data
    bias[:5] = bias[tokenizer.convert_tokens_to_ids("##s")] = bias[tokenizer.convert_tokens_to_ids(",")] = 100.0
    for word in favourites:
        bias[tokenizer.convert_tokens_to_ids(word)] = 50.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path, bert_tokenizer):
    return save_masked_lm(tmp_path / "bert", bert_tokenizer)


def word_rows(num_rows):
    """Texts of three single pieces between what stays: unknown words, a comma, a word of two pieces."""
    texts = [f"x{row} w1 , w2s w3 w99 w4" for row in range(num_rows)]
    return Dataset.from_dict({"sentence": texts, "label": [1] * num_rows}, features=SINGLE)


def test_words_are_replaced_by_what_the_model_predicts(vary, bert):
    """Variants would hold special tokens or halves of words, or copies of the word, or pieces glued to punctuation."""
    variants = vary(word_rows(400), 5, masked_lm=bert)
    replaced = Counter()
    for text in variants["sentence"]:
        words = text.split()
        assert words[2:4] == [",", "w2s"] and words[5] == "w99" and words[0][0] == "x"
        for position, original in ((1, "w1"), (4, "w3"), (6, "w4")):
            assert words[position] in {original} | FAVOURITES
            replaced[position] += words[position] != original
    for position in (1, 4, 6):  # 0.4, but for the unchanged texts that are dropped
        assert replaced[position] / len(variants) == pytest.approx(0.4 / (1 - 0.6**3), rel=0.05)
    assert {word for text in variants["sentence"] for word in text.split()} >= FAVOURITES


def test_the_word_itself_is_no_candidate(bert):
    """It is mostly the most probable one: the rate of replacement would be far lower than it says."""
    model = MaskedLM(str(bert), num_candidates=15, device="cpu")
    found = model.candidates({"w20 w1", "W21", "ẃ22"})
    assert set(found["w20 w1"][1]) == FAVOURITES
    assert FAVOURITES - set(found["w20 w1"][0]) == {"w20"} and len(found["w20 w1"][0]) == 15
    # The model reads lower case without accents.
    assert FAVOURITES - set(found["W21"][0]) == {"w21"} and FAVOURITES - set(found["ẃ22"][0]) == {"w22"}


def test_candidates_are_the_most_probable_in_the_place(tmp_path, bert_tokenizer):
    """A model asked about another place, or that sees the word, would propose what does not fit."""
    set_seed(3)
    model = BertForMaskedLM(BertConfig(vocab_size=len(PIECES), max_position_embeddings=82, **TINY)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8.0)
    model.save_pretrained(tmp_path / "random")
    bert_tokenizer.save_pretrained(tmp_path / "random")
    texts = {"w1 w2s w3 cat": {0: 1, 2: 4, 3: 5}, "w7": {0: 1}, "": {}}
    found = MaskedLM(str(tmp_path / "random"), 4, "cpu").candidates(set(texts))
    for text, places in texts.items():
        assert list(found[text]) == list(places)
        for position, index in places.items():
            inputs = bert_tokenizer(text, return_tensors="pt")
            inputs["input_ids"][0, index] = bert_tokenizer.mask_token_id
            with torch.no_grad():
                ranked = model(**inputs).logits[0, index].argsort(descending=True)
            words = bert_tokenizer.convert_ids_to_tokens(ranked)
            best = [word for word in words if word.isalnum() and word != text.split()[position]][:4]
            assert found[text][position] == sorted(best, key=bert_tokenizer.convert_tokens_to_ids)


def test_the_batch_changes_nothing(tmp_path, vary, bert, monkeypatch):
    """Rows that depend on what is computed beside them could not be made again on another machine."""
    rows = concatenate_datasets([word_rows(30), single_texts(5, 3)])
    first = vary(rows, masked_lm=bert).to_list()
    monkeypatch.setattr(masked_lm, "_LOGITS_PER_BATCH", 1)
    monkeypatch.setattr(augmentation, "_ROWS_PER_BATCH", 7)
    assert vary(rows, masked_lm=bert, cache_dir=tmp_path / "other").to_list() == first


def test_texts_longer_than_the_model_reads(vary, bert):
    """They are common in QNLI; the first 80 tokens are varied, and the rest is kept, a word that is cut as well."""
    text = " ".join("w2s" if number == 77 else f"w{number % 19}" for number in range(200))
    rows = Dataset.from_dict({"sentence": [text], "label": [1]}, features=SINGLE)
    for variant in vary(rows, 5, masked_lm=bert, replace_probability=1.0)["sentence"]:
        assert variant.split()[77:] == text.split()[77:] and not set(variant.split()[:77]) - FAVOURITES


def test_pairs_with_a_masked_lm(vary, bert):
    """The texts of a pair would get each other's candidates."""
    rows = Dataset.from_dict(
        {"sentence1": ["w1 w2"] * 3, "sentence2": ["w3", "w4 w5 w6", ""], "label": [0, 1, 0]},
        features=Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": Value("int64")}),
    )
    variants = vary(rows, 9, ("sentence1", "sentence2"), masked_lm=bert, replace_probability=1.0)
    lengths = {(len(row["sentence1"].split()), len(row["sentence2"].split())) for row in variants}
    assert lengths == {(2, 1), (2, 3), (2, 0)}
    assert {row["sentence1"] == "w1 w2" for row in variants} == {True, False}


def test_byte_level_vocabulary(tmp_path):
    """RoBERTa marks where words begin, BERT where they go on: taken for the other, words would be glued together."""
    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    texts = ["the film was really good", "this hotel was good , really", "the film was Good"]
    trained.train_from_iterator(texts * 9, 400, 2, False, special)
    trained.save_model(str(tmp_path))
    tokenizer = RobertaTokenizerFast.from_pretrained(tmp_path)
    set_seed(0)
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=82, **TINY)
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = MaskedLM(str(tmp_path), 3, "cpu")
    assert {"film", "was", "really", "good", "Good", "hotel"} <= set(model.words.values())
    text = "good film , unheard was good é"
    found = model.candidates({text})[text]
    assert {0, 1, 4, 5} >= set(found) >= {1, 4, 5}
    for choices in found.values():
        assert len(set(choices)) == 3 and all(len(tokenizer.tokenize(f" {word}")) == 1 for word in choices)
    every_word = MaskedLM(str(tmp_path), 1000, "cpu")
    assert set(every_word.words.values()) - set(every_word.candidates({text})[text][5]) == {"good", "Good"}
    # Its positions begin at 2, and this tokenizer knows no limit.
    text = "the " + "film " * 200
    assert max(every_word.candidates({text})[text]) == 77


# The cache


def test_the_same_again_is_read_from_disk(vary, bert, cache_files, monkeypatch):
    """Hours on a masked language model would be spent at every start of the recipe."""
    first = vary(word_rows(20), masked_lm=bert).to_list()
    files = cache_files()
    assert len(files) == 1

    def fail(self, texts):
        raise AssertionError("computed again")

    monkeypatch.setattr(MaskedLM, "candidates", fail)
    assert vary(word_rows(20), masked_lm=bert).to_list() == first and cache_files() == files


def test_the_same_rows_on_another_disk(vary, tmp_path):
    """The seed says which rows: without it a published result could not be made again."""
    rows = pairs(50)
    columns = ("sentence1", "sentence2")
    first = vary(rows, 5, columns)
    assert vary(rows, 5, columns, cache_dir=tmp_path / "other").to_list() == first.to_list()
    other = vary(rows, 5, columns, seed=1)
    assert other.to_list() != first.to_list()
    shared = {str(row) for row in other} & {str(row) for row in first}
    assert len(shared) < 0.2 * len(first)
    assert vary(single_texts(2, 6), 4)["sentence"][:] == [
        *("w2 w3 w4", "w2 w3 w4 w5", "w4"),
        *("w6 w7 [MASK] w9 [MASK] w11", "w6 w7 w8 [MASK] w10 w11"),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"num_variants": 4},
        {"seed": 1},
        {"mask_probability": 0.2},
        {"ngram_probability": 0.5},
        {"mask": "[UNK]"},
        {"rows": ["w1 w2", "w3 w4 w6"]},
        {"rows": ["w3 w4 w5", "w1 w2"]},
        {"masked_lm": "bert"},
    ],
    ids=str,
)
def test_whatever_changes_the_rows_makes_a_new_file(vary, tmp_path, tokenizer, bert, cache_files, change):
    """A cache that overlooks one setting returns the rows of another, and the results file names the wrong one."""
    change = dict(change)

    def rows(texts=("w1 w2", "w3 w4 w5")):
        return Dataset.from_dict({"sentence": list(texts), "label": [1, 0]}, features=SINGLE)

    vary(rows())
    if "masked_lm" in change:
        change["masked_lm"] = bert
    if "mask" in change:
        change["tokenizer"] = BertTokenizerFast(vocab_file=None, tokenizer_object=tokenizer.backend_tokenizer)
        change["tokenizer"].mask_token = change.pop("mask")
    vary(rows(change.pop("rows", ("w1 w2", "w3 w4 w5"))), **change)
    assert len(cache_files()) == 2


def test_what_changes_a_masked_lm_makes_a_new_file(vary, tmp_path, bert, bert_tokenizer, cache_files):
    """A folder that holds another model than yesterday would give yesterday's rows."""
    rows = word_rows(5)
    vary(rows, masked_lm=bert)
    for count, change in enumerate(({"num_candidates": 3}, {"replace_probability": 0.2}, {"seed": 1}), start=2):
        vary(rows, masked_lm=bert, **change)
        assert len(cache_files()) == count
    save_masked_lm(bert, bert_tokenizer, seed=1)
    vary(rows, masked_lm=bert)
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    vary(rows, masked_lm=bert)
    BertTokenizerFast.from_pretrained(bert, do_lower_case=False).save_pretrained(bert)
    vary(rows, masked_lm=bert)
    assert len(cache_files()) == 7
    # What it is not: where the folder is, and what the other procedure would do.
    bert.rename(tmp_path / "moved")
    vary(rows, masked_lm=tmp_path / "moved", mask_probability=0.7)
    assert len(cache_files()) == 7


SCRIPT = """
import hashlib, os, pathlib, signal, sys, time
from datasets import Dataset
from hf_kd import augmentation

class Tokenizer:
    mask_token = "[MASK]"

folder, mask_or_sample = pathlib.Path(sys.argv[1]), augmentation._mask_or_sample
texts = [" ".join(f"w{row * 10 + i}" for i in range(10)) for row in range(4000)]
rows = Dataset.from_dict({"sentence": texts, "label": [1] * len(texts)})
calls = 0

def die_in_the_middle(*args):
    global calls
    calls += 1
    if calls == 9000:
        os.kill(os.getpid(), signal.SIGKILL)
    return mask_or_sample(*args)

def run(number):
    (folder / f"ready{number}").touch()
    while number and not (folder / f"ready{3 - number}").exists():
        time.sleep(0.001)
    augmentation._mask_or_sample = mask_or_sample if number else die_in_the_middle
    found = augmentation.augment(rows, ["sentence"], 3, tokenizer=Tokenizer, seed=0, cache_dir=folder / "cache")
    digest = hashlib.sha256(repr(found.to_list()).encode()).hexdigest()
    (folder / f"found{number}").write_text(f"{len(found)} {digest}")

def fork(number):
    child = os.fork()
    if child == 0:
        run(number)
        os._exit(0)
    return child

status = os.waitpid(fork(0), 0)[1]
print(os.WTERMSIG(status), *sorted(path.suffix for path in (folder / "cache" / "hf_kd_augmented").iterdir()))
statuses = [os.waitpid(child, 0)[1] for child in [fork(1), fork(2)]]
print(*statuses)
"""


@pytest.mark.one_leg
@pytest.mark.distributed
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_two_processes_after_one_that_was_killed(tmp_path):
    """Half a cache would be half of the data for every later run; the second process would read the first one's."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    # The killed one leaves what it had written by then, under a name that nobody reads.
    assert result.stdout.splitlines() == ["9 ", "0 0"], result.stderr[-3000:]
    assert not (tmp_path / "found0").exists()
    first, second = ((tmp_path / f"found{number}").read_text() for number in (1, 2))
    assert first == second and int(first.split()[0]) > 8000
    assert len(list((tmp_path / "cache" / "hf_kd_augmented").glob("*.arrow"))) == 1


def test_an_error_leaves_nothing(vary, cache_files, monkeypatch):
    """The next run would take what was there when the disk was full, or the memory."""
    monkeypatch.setattr(augmentation, "_ROWS_PER_BATCH", 10)
    mask_or_sample = augmentation._mask_or_sample

    def fail(mask_token, mask_probability, ngram_probability, text, rng):
        if text.startswith("w350 "):
            raise MemoryError("in row 35")
        return mask_or_sample(mask_token, mask_probability, ngram_probability, text, rng)

    with monkeypatch.context() as patch, pytest.raises(MemoryError, match="in row 35"):
        patch.setattr(augmentation, "_mask_or_sample", fail)
        vary(single_texts())
    assert cache_files() == {}
    assert len(vary(single_texts())) > 60


# Errors


def refused(action, *fragments):
    with pytest.raises(ValueError) as error:
        action()
    assert [fragment for fragment in fragments if fragment not in str(error.value)] == [], str(error.value)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"num_variants": -1}, ["num_variants=-1 must be at least 0", "0 makes none"]),
        ({"num_candidates": 0}, ["num_candidates=0 must be at least 1"]),
        ({"mask_probability": 1.5}, ["mask_probability=1.5 must be between 0 and 1"]),
        ({"ngram_probability": -0.1}, ["ngram_probability=-0.1 must be between 0 and 1"]),
        ({"replace_probability": float("nan")}, ["replace_probability=nan must be between 0 and 1"]),
        ({"text_columns": ("text",)}, ["['sentence', 'label']", "'text' is needed", "text_columns"]),
        ({"text_columns": ()}, ["text_columns=[]", "name one or two columns"]),
        ({"text_columns": ("label",)}, ["column 'label' is Value", "texts are needed"]),
        ({"label_column": "labels"}, ["'labels' is needed", "label_column", "before tokenizing"]),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_meant(vary, tmp_path, changes, fragments):
    """The run would stop after the models are loaded, or go on with other rows than were asked for."""
    refused(lambda: vary(single_texts(), **changes), *fragments)
    assert not (tmp_path / "cache").exists()


def test_labels_without_room_for_none(vary):
    """-100 in a `ClassLabel` fails while the rows are written, as an error about an index."""
    rows = single_texts().cast_column("label", ClassLabel(names=["no", "yes"]))
    refused(lambda: vary(rows), "'label' is ClassLabel", "no room for -100", "cast_column('label', Value('int64'))")


def test_tokenizer_without_a_mask_token(vary, tmp_path, tokenizer):
    """`None` would be joined into the texts, or stop the run in the middle."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    other = BertTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    other.mask_token = None
    refused(lambda: vary(single_texts(), tokenizer=other), "has no mask token", "tokenizer.mask_token", "masked_lm")


def test_no_masked_lm(vary, tmp_path, tokenizer, bert):
    """A head that is not in the checkpoint is random: it would write noise into every text without a word."""
    rows = single_texts()
    refused(lambda: vary(rows, masked_lm=tmp_path / "none"), "none' cannot be loaded as a masked language model")
    make_model().save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    refused(lambda: vary(rows, masked_lm=tmp_path / "classifier"), "lacks the weights", "cls.predictions", "random")
    (bert / "model.safetensors").rename(bert / "weights")
    refused(lambda: vary(rows, masked_lm=bert), "cannot be loaded as a masked language model from safetensors")
    (bert / "weights").rename(bert / "model.safetensors")
    for name in ("tokenizer.json", "vocab.txt"):
        (bert / name).unlink(missing_ok=True)
    refused(lambda: vary(rows, masked_lm=bert), "holds no tokenizer", "tokenizer.save_pretrained(folder)")


def test_masked_lm_with_another_models_tokenizer(vary, bert, bert_tokenizer):
    """Indices beyond the embeddings are an error of the device, without a word about the tokenizer."""
    bert_tokenizer.save_pretrained(bert)
    vocabulary = json.loads((bert / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] |= {f"new{number}": len(PIECES) + number for number in range(5)}
    (bert / "tokenizer.json").write_text(json.dumps(vocabulary))
    (bert / "vocab.txt").unlink(missing_ok=True)
    refused(lambda: vary(single_texts(), masked_lm=bert), f"{len(PIECES)} embeddings", f"{len(PIECES) + 5} tokens")


# In the recipes


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_recipe_adds_variants_of_the_labelled_rows(tmp_path, tokenizer, own_cache, capsys):
    """Unlabelled text would be multiplied as well, or the baseline be trained on rows that it has no label for."""
    data_args = DataArguments(task_name="demo", max_train_samples=30, augment=4, max_seq_length=32)
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, bf16=False)
    data, task = load_data(data_args, seed=0, has_teacher=True)
    more = add_augmented(data, task, tokenizer, data_args, args)
    num_rows, num_more = len(data["train"]), len(more["train"])
    assert num_rows == 3030 and 3050 < num_more <= 3150
    assert more["train"].select(range(num_rows)).to_list() == data["train"].to_list()
    assert set(more["train"]["label"][num_rows:]) == {-100} and more["validation"] is data["validation"]
    labelled_words = {word for text in data["train"]["sentence"][:30] for word in text.split()} | {"[MASK]"}
    assert {word for text in more["train"]["sentence"][num_rows:] for word in text.split()} <= labelled_words
    assert f"--augment 4: {num_more - num_rows} variants of 30 labelled" in capsys.readouterr().out
    encoded = tokenize_data(more, task, tokenizer, data_args, args)
    assert len(encoded["train"]) == num_more and len(labeled(encoded["train"])) == 30


def test_recipe_passes_the_masked_lm(tmp_path, tokenizer, bert, own_cache):
    """A flag that nothing reads: the variants would be masked ones."""
    data_args = DataArguments(task_name="demo", augment=3, augment_masked_lm=str(bert))
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, bf16=False)
    rows = datasets.DatasetDict(train=word_rows(10))
    train = add_augmented(rows, GLUE_TASKS["sst2"], tokenizer, data_args, args)["train"]
    assert len(train) > 20 and not any("[MASK]" in text for text in train["sentence"])
    assert FAVOURITES & {word for text in train["sentence"][10:] for word in text.split()}


def test_recipe_without_augmentation_changes_nothing(tmp_path, tokenizer, own_cache):
    """The default must cost nothing, not even a copy."""
    data_args = DataArguments(task_name="demo", max_train_samples=30)
    data, task = load_data(data_args, seed=0)
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, bf16=False)
    assert add_augmented(data, task, tokenizer, data_args, args) is data and not (tmp_path / "cache").exists()


def test_recipe_refuses_what_has_no_meaning():
    """Without a teacher, rows without a label teach nothing: the flag would be ignored without a word."""
    refused(lambda: DataArguments(task_name="demo", augment=-1), "augment=-1 must be at least 0")
    refused(lambda: DataArguments(task_name="demo", augment_masked_lm="bert"), "augment=0", "--augment 20")
    refused(lambda: load_data(DataArguments(task_name="demo", augment=5), 0), "augment=5", "glue_distill.py")
