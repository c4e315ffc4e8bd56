"""The GLUE table, the readers of task data, tokenizing and metrics."""

import csv
import json
import math
import multiprocessing
import warnings
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from scipy import stats
from sklearn import metrics
from transformers import BertTokenizerFast, EvalPrediction

from hf_kd import glue
from hf_kd.glue import (
    GLUE_TASKS,
    UNLABELED,
    GlueMetric,
    TextTask,
    compute_metrics_fn,
    load_glue,
    load_text_files,
    load_unlabeled_file,
    tokenize,
)


pytestmark = pytest.mark.one_leg


SINGLE = TextTask("custom", ("text",), ("bad", "good"), ("accuracy", "f1_macro"), "accuracy")
PAIR = TextTask("custom", ("sentence1", "sentence2"), ("no", "yes"), ("accuracy", "f1_macro"), "accuracy")
SCORES = TextTask("custom", ("sentence1", "sentence2"), None, ("pearson", "spearmanr"), "combined_score")

# For every task: the header of its official files, two rows, and the two rows as they must be loaded.
MNLI_HEADER = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
)
OFFICIAL_FILES = {
    "cola": (
        None,
        ["src1\t1\t\tA cat sleeps .", "src1\t0\t*\tCat a sleeps ."],
        [("A cat sleeps .", 1), ("Cat a sleeps .", 0)],
    ),
    "sst2": (
        "sentence\tlabel",
        ["a warm tale \t1", 'a " cold tale \t0'],
        [("a warm tale ", 1), ('a " cold tale ', 0)],
    ),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ['1\t10\t11\tHe said " yes .\tHe agreed .', "0\t12\t13\tIt rained .\tIt snowed ."],
        [('He said " yes .', "He agreed .", 1), ("It rained .", "It snowed .", 0)],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ["0\tg\tf\t2012\t1\ta\tb\tA dog runs.\tA dog is running.\t4.750", "1\tg\tf\t2012\t2\ta\tb\tOne.\tTwo.\t0"],
        [("A dog runs.", "A dog is running.", 4.75), ("One.", "Two.", 0.0)],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["7\t1\t2\tHow old is it?\tWhat is its age?\t1", "8\t3\t4\tWhy?\tWhen?\t0"],
        [("How old is it?", "What is its age?", 1), ("Why?", "When?", 0)],
    ),
    "mnli": (
        "\t".join([*MNLI_HEADER.split(), "sentence1", "sentence2", "label1", "gold_label"]),
        [
            "0\t1\t1e\tg\t(\t(\t(\t(\tIt is late.\tTime passed.\tneutral\tentailment",
            "1\t2\t2c\tg\t\t\t\t\tA.\tB.\tx\tcontradiction",
        ],
        [("It is late.", "Time passed.", 0), ("A.", "B.", 2)],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        ["0\tWho came?\tAnn came.\tentailment", "1\tWho left?\tIt is hot.\tnot_entailment"],
        [("Who came?", "Ann came.", 0), ("Who left?", "It is hot.", 1)],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\tAnn came home.\tAnn came.\tentailment", "1\tIt is hot.\tIt is cold.\tnot_entailment"],
        [("Ann came home.", "Ann came.", 0), ("It is hot.", "It is cold.", 1)],
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\tThe cup fell. It broke.\tThe cup broke.\t1", "1\tThe cup fell. It broke.\tThe floor broke.\t0"],
        [("The cup fell. It broke.", "The cup broke.", 1), ("The cup fell. It broke.", "The floor broke.", 0)],
    ),
}  # fmt: skip
FOLDERS = dict(
    cola="CoLA", sst2="SST-2", mrpc="MRPC", stsb="STS-B", qqp="QQP", mnli="MNLI", qnli="QNLI", rte="RTE", wnli="WNLI"
)
DEV_FILES = {name: ["dev.tsv"] for name in FOLDERS} | {"mnli": ["dev_matched.tsv", "dev_mismatched.tsv"]}


def write_archive(folder: Path, name: str, rows: list[str] | None = None, header: str | None = None) -> Path:
    official_header, official_rows, _ = OFFICIAL_FILES[name]
    lines = [line for line in (header or official_header, *(rows or official_rows)) if line is not None]
    task_folder = folder / FOLDERS[name]
    task_folder.mkdir()
    for file_name in ("train.tsv", *DEV_FILES[name]):
        # The official MRPC dev file starts with a byte order mark.
        encoding = "utf-8-sig" if (name, file_name) == ("mrpc", "dev.tsv") else "utf-8"
        (task_folder / file_name).write_text("\n".join(lines) + "\n", encoding=encoding)
    return folder


def values(dataset: Dataset) -> list[tuple]:
    return [tuple(row.values()) for row in dataset]


@pytest.mark.parametrize("name", list(OFFICIAL_FILES))
def test_official_archive(tmp_path, name):
    """A swapped column or label order would train and score a task that is not GLUE, at a plausible accuracy."""
    task = GLUE_TASKS[name]
    data = load_glue(name, write_archive(tmp_path, name))
    assert list(data) == ["train", *task.validation_splits]
    for split in data.values():
        assert split.column_names == [*task.text_columns, "label"]
        assert values(split) == OFFICIAL_FILES[name][2]


def test_table_is_that_of_the_hub():
    """A label order other than the Hub's would flip the classes of every teacher fine-tuned on the Hub's data."""
    expected = {
        "cola": (["sentence"], ["unacceptable", "acceptable"]),
        "sst2": (["sentence"], ["negative", "positive"]),
        "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
        "stsb": (["sentence1", "sentence2"], None),
        "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
        "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
        "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
        "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
        "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"]),
    }
    table = {
        name: (list(task.text_columns), task.label_names and list(task.label_names))
        for name, task in GLUE_TASKS.items()
    }
    assert table == expected
    assert {name: task.num_labels for name, task in GLUE_TASKS.items() if task.num_labels != 2} == {
        "stsb": 1,
        "mnli": 3,
    }
    assert [name for name, task in GLUE_TASKS.items() if task.is_regression] == ["stsb"]


def test_hub_data_has_the_columns_of_the_archive(monkeypatch):
    """The Hub's `idx` and `ClassLabel` would stop the concatenation with unlabelled rows, after the download."""
    names = list(GLUE_TASKS["rte"].label_names)
    features = {"sentence1": Value("string"), "sentence2": Value("string"), "label": ClassLabel(names=names)}
    rows = {"sentence1": ["A."], "sentence2": ["B."], "label": [1], "idx": [0]}
    split = Dataset.from_dict(rows, features=Features({**features, "idx": Value("int32")}))
    hub_data = DatasetDict(train=split, validation=split, test=split)
    monkeypatch.setattr(glue.datasets, "load_dataset", lambda *args, **kwargs: hub_data)
    data = load_glue("rte")
    assert list(data) == ["train", "validation"]
    assert data["train"].features == Features({**features, "label": Value("int64")})
    assert values(data["validation"]) == [("A.", "B.", 1)]


def test_evaluation_needs_no_training_file(tmp_path):
    """Evaluating a finished student would require a training file that nobody reads."""
    write_archive(tmp_path, "mnli")
    (tmp_path / "MNLI" / "train.tsv").unlink()
    assert list(load_glue("mnli", tmp_path, splits=["validation_mismatched"])) == ["validation_mismatched"]
    with pytest.raises(ValueError, match=r"train.tsv does not exist.*splits=\['validation_matched'"):
        load_glue("mnli", tmp_path)


def test_only_line_feeds_and_tabs_separate(tmp_path):
    """A reader with quoting or universal line ends would merge or cut rows, and shift labels to other texts."""
    rows = ['0\t"Open\tClosed"\tentailment', "1\tOne\rline\u2028more\tB.\tnot_entailment", ""]
    data = load_glue("rte", write_archive(tmp_path, "rte", rows))
    assert values(data["train"]) == [('"Open', 'Closed"', 0), ("One\rline\u2028more", "B.", 1)]


def test_broken_rows_of_qqp_are_dropped(tmp_path):
    """The official QQP file has rows cut in two; stopping there would make the archive unusable."""
    rows = ["7\t1\t2\tHow\tWhat?\t1", "8\t3\t4\tcut here", " and here\tWhen?\t0", "9\t5\t6\tWho?\tWhose?\t0"]
    data = load_glue("qqp", write_archive(tmp_path, "qqp", rows))
    assert values(data["train"]) == [("How", "What?", 1), ("Who?", "Whose?", 0)]


@pytest.mark.parametrize(
    ("name", "rows", "header", "message"),
    [
        ("rte", ["0\tA.\tentailment"], None, r"line 2: 3 tab-separated columns, but 4 are needed \(index, sentence1"),
        ("cola", ["src\t1\tA."], None, "line 1: 3 tab-separated columns, but 4 are needed"),
        ("rte", ["0\tA.\tB.\tmaybe"], None, r"line 2: the label is 'maybe', but one of \['entailment', 'not_ent"),
        ("mrpc", ["2\t1\t2\tA.\tB."], None, "line 2: the label is '2', but one of"),
        ("rte", ["0\tA.\tB.\t"], None, "line 2: the label is empty"),
        ("stsb", ["0\tg\tf\t1\t1\ta\tb\tA.\tB.\tinf"], None, "line 2: the score is 'inf', but a finite number"),
        ("stsb", ["0\tg\tf\t1\t1\ta\tb\tA.\tB.\thigh"], None, "line 2: the score is 'high', but a finite number"),
        ("rte", ["0\tA.\tB."], "index\tsentence1\tsentence2", r"but \['label'\] is needed"),
        ("rte", [""], None, "has no rows"),
    ],
)
def test_bad_archive_files(tmp_path, name, rows, header, message):
    """A row that is skipped or guessed would change the official set, and no number would be comparable."""
    with pytest.raises(ValueError, match=message):
        load_glue(name, write_archive(tmp_path, name, rows, header))


def test_bad_requests(tmp_path):
    """A typing error would surface as a Hub error, or as a KeyError after the data is loaded."""
    with pytest.raises(ValueError, match="`sst-2` is not a GLUE task; use one of cola, sst2"):
        load_glue("sst-2", tmp_path)
    with pytest.raises(
        ValueError, match=r"splits=\['validation'\] for mnli; use any of \['train', 'validation_matched'"
    ):
        load_glue("mnli", tmp_path, splits=["validation"])


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        lines = [json.dumps(row) for row in rows]
        path.write_text("[" + ",".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def load_rows(
    tmp_path: Path, train: list[dict], validation: list[dict] | None = None, suffix: str = ".jsonl", **kwargs
):
    train_file = write_rows(tmp_path / f"train{suffix}", train)
    return load_text_files(train_file, write_rows(tmp_path / f"dev{suffix}", validation or train), **kwargs)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_formats_agree(tmp_path, suffix):
    """A text with separators, quotes or line breaks would change with the format that it is stored in."""
    texts = ['comma, "quote"\tand tab', "two\nlines", "naïve ☂", "null"]
    rows = [{"text": text, "label": label} for text, label in zip(texts, ["b", "c", "a", "b"], strict=True)]
    data, task = load_rows(tmp_path, rows, suffix=suffix)
    assert task == TextTask("custom", ("text",), ("a", "b", "c"), ("accuracy", "f1_macro"), "accuracy")
    assert values(data["train"]) == list(zip(texts, [1, 2, 0, 1], strict=True))


@pytest.mark.parametrize(
    ("suffix", "labels", "names", "loaded"),
    [
        (".csv", ["no", "yes"], ("no", "yes"), [0, 1]),
        (".csv", ["10", "9"], ("9", "10"), [1, 0]),
        (".csv", ["1.0", "0.0", ""], ("0", "1"), [1, 0, UNLABELED]),
        (".csv", ["1", "0.5", ""], None, [1.0, 0.5, UNLABELED]),
        (".json", [2, 5], ("2", "5"), [0, 1]),
        (".json", [True, False], ("False", "True"), [1, 0]),
        (".json", [1.0, 3.0], None, [1.0, 3.0]),
        (".json", ["a", "b", None, math.nan], ("a", "b"), [0, 1, UNLABELED, UNLABELED]),
    ],
)
def test_labels(tmp_path, suffix, labels, names, loaded):
    """Classes read as scores, or a gap read as a class, would train the wrong task without a word."""
    rows = [{"text": f"text {index}", "label": label} for index, label in enumerate(labels)]
    data, task = load_rows(tmp_path, rows, rows[:2], suffix=suffix)
    assert task.label_names == names
    assert data["train"]["label"][:] == loaded
    assert data["train"].features["label"] == Value("float32" if names is None else "int64")


def test_given_label_names_fix_the_order(tmp_path):
    """Sorted names would disagree with the index order of a teacher trained elsewhere."""
    rows = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    assert load_rows(tmp_path, rows, label_names=["yes", "no"])[0]["train"]["label"][:] == [0, 1]
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    data, task = load_rows(tmp_path, rows, label_names=["yes", "no"])
    assert (data["train"]["label"][:], task.label_names) == ([0, 1], ("yes", "no"))


@pytest.mark.parametrize(
    ("columns", "kwargs", "expected"),
    [
        (["id", "sentence2", "sentence1", "label"], {}, ("sentence1", "sentence2")),
        (["question", "label", "answer"], {}, ("question", "answer")),
        (["id", "body", "label"], {"text_columns": ["body"]}, ("body",)),
        (["text", "target"], {"label_column": "target"}, ("text",)),
    ],
)
def test_text_columns(tmp_path, columns, kwargs, expected):
    """An id taken for a text, or a pair in the wrong order, would train at a plausible accuracy."""
    rows = [{column: f"{column} {index}" for column in columns} for index in range(2)]
    data, task = load_rows(tmp_path, rows, **kwargs)
    assert task.text_columns == expected
    assert values(data["train"])[0][:-1] == tuple(f"{column} 0" for column in expected)


GOOD = "text,label\nfine,1\npoor,0\n"


@pytest.mark.parametrize(
    ("train", "dev", "message"),
    [
        ("", GOOD, r"train.csv has no rows"),
        ("text,label\n", GOOD, r"train.csv has no rows"),
        ("text,text,label\na,b,1\n", GOOD, r"occurs twice in the header \['text', 'text', 'label'\]; rename one"),
        ("text,label\na,b,1\n", GOOD, r"line 2: 3 columns, but the header has 2 \(text, label\). Quote"),
        (
            'text,label\n"open,1\nb,0\n',
            GOOD,
            r"line 3: unexpected end of data. Put texts that contain quotes in quotes",
        ),
        (
            "text,target\na,1\nb,0\n",
            GOOD,
            r"columns \['text', 'target'\], but \['label'\] is needed; .*`--label_column`",
        ),
        ("id,title,body,label\n1,a,b,0\n", GOOD, r"text columns are \['id', 'title', 'body'\].*`--text_columns`"),
        ("text,label\na,1\n ,0\n", GOOD, r"line 3: `text` is ' ', but a text is needed"),
        ("text,label\na,1\nb,1\n", GOOD, r"`label` has 1 different values in 2 rows, but two are needed"),
        ("text,label\na,\nb,\n", GOOD, r"`label` has 0 different values in 2 rows"),
        ("text,label\na,0.5\nb,nan\n", GOOD, r"line 3: the score is 'nan', but a finite number is needed"),
        (GOOD, "text,label\na,2\n", r"dev.csv, line 2: the label is '2', but one of \['0', '1'\] is needed"),
        ("text,label\na,1\nb,2\n", GOOD, r"dev.csv, line 3: the label is '0', but one of \['1', '2'\] is needed"),
        ("text,label\na,no\nb,yes\n", GOOD, r"dev.csv, line 2: the label is '1', but one of \['no', 'yes'\]"),
        (GOOD, "text,label\na,\n", r"dev.csv, line 2: the label is empty"),
        (GOOD, "body,label\na,1\n", r"dev.csv has the columns \['body', 'label'\], but \['text'\] is needed"),
    ],
)
def test_bad_csv_files(tmp_path, train, dev, message):
    """A row that is skipped, shifted or guessed would be trained on without a word."""
    for name, content in (("train", train), ("dev", dev)):
        (tmp_path / f"{name}.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_text_files(tmp_path / "train.csv", tmp_path / "dev.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a", "label": 1}\n{"text": \n',
            r"a.jsonl, line 2: Expecting value.*one object per line",
        ),
        ("a.json", b"[1, 2]", r"a.json, item 1: 1, but an object of column names and values is needed"),
        (
            "a.json",
            b'[{"text": 5, "label": 1}, {"text": "b", "label": 0}]',
            r"item 1: `text` is 5, but a text is needed",
        ),
        ("a.json", b'[{"label": 1}, {"text": "b", "label": 0}]', r"item 1: `text` is None, but a text is needed"),
        ("a.json", b'[{"text": "a", "label": ["x"]}]', r"the label is \['x'\], but one word or number is needed"),
        ("a.csv", "text,label\nna\xefve,1\n".encode("latin1"), r"a.csv is not UTF-8 .*iconv"),
        ("a.xlsx", b"", r"a.xlsx: the name has to end in .csv, .tsv, .json, .jsonl, .parquet"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    """A parser's own exception names neither the file nor the way out."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text_files(tmp_path / name, tmp_path / name)


def test_missing_file(tmp_path):
    """A path that is relative to another folder is the common mistake: the message says which folder this is."""
    with pytest.raises(ValueError, match="none.csv does not exist; check the path"):
        load_text_files(tmp_path / "none.csv", tmp_path / "none.csv")


def test_unlabeled_files(tmp_path):
    """A label column that is read, or texts that are dropped, would leak or lose what the student learns from."""
    (tmp_path / "a.txt").write_text("first text\n\n second text\n", encoding="utf-8")
    write_rows(tmp_path / "a.csv", [{"body": "first text"}, {"body": "second text"}])
    write_rows(tmp_path / "a.jsonl", [{"text": f"{n} text", "label": 1, "id": 3} for n in ("first", "second")])
    for name in ("a.txt", "a.csv", "a.jsonl"):
        expected = [("first text", UNLABELED), ("second text", UNLABELED)]
        assert values(load_unlabeled_file(tmp_path / name, SINGLE)) == expected
    pairs = write_rows(tmp_path / "pairs.csv", [{"sentence2": "b", "sentence1": "a"}])
    assert values(load_unlabeled_file(pairs, SCORES)) == [("a", "b", float(UNLABELED))]


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (PAIR, [{"sentence1": "a"}], r"\['sentence1'\], but \['sentence2'\] is needed"),
        (SINGLE, [{"title": "a", "body": "b"}], r"\['title', 'body'\], but \['text'\] is needed"),
        (SINGLE, [{"text": "a"}, {"text": ""}], r"line 2: `text` is '', but a text is needed"),
    ],
)
def test_bad_unlabeled_files(tmp_path, task, rows, message):
    """Distilling on the wrong column, or on half of each pair, lowers the student and raises nothing."""
    with pytest.raises(ValueError, match=message):
        load_unlabeled_file(write_rows(tmp_path / "a.jsonl", rows), task)


@pytest.fixture
def tokenizer(tmp_path):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a good bad film book".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")
    return BertTokenizerFast.from_pretrained(tmp_path, model_max_length=16)


def test_tokenize_pairs(tokenizer):
    """Without segment ids a teacher reads a pair as one text; a label of another type trains another loss."""
    rows = {"sentence1": ["good film", "a"], "sentence2": ["bad book a a a a", "a"], "label": [0.5, UNLABELED]}
    data = DatasetDict(train=Dataset.from_dict(rows, features=glue._features(SCORES)))
    encoded = tokenize(data, SCORES, tokenizer, 8)["train"]
    assert encoded.features["labels"] == Value("float32")
    assert encoded.to_dict() == {
        "labels": [0.5, -100.0],
        "input_ids": [[2, 6, 8, 3, 7, 9, 5, 3], [2, 5, 3, 5, 3]],
        "token_type_ids": [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1]],
        "attention_mask": [[1] * 8, [1] * 5],
    }


def test_tokenize_without_segments(tokenizer):
    """A DistilBERT-style forward would be handed an argument that it does not take."""
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    data = Dataset.from_dict({"text": ["good film"], "label": [1], "weight": [0.5]})
    encoded = tokenize(data, SINGLE, tokenizer, 8)
    assert sorted(encoded.column_names) == ["attention_mask", "input_ids", "labels", "weight"]


@pytest.mark.parametrize("max_seq_length", [2, 17])
def test_tokenize_length_range(tokenizer, max_seq_length):
    """Longer than the position table fails inside the model; shorter than the special tokens trains on no text."""
    data = Dataset.from_dict({"text": ["good"], "label": [1]})
    with pytest.raises(
        ValueError, match=f"max_seq_length={max_seq_length}; the tokenizer takes from 3 .* to 16 tokens"
    ):
        tokenize(data, SINGLE, tokenizer, max_seq_length)


def test_metrics_of_every_task():
    """A metric under GLUE's name that is not GLUE's makes every table wrong."""
    rng = np.random.default_rng(0)
    for task in GLUE_TASKS.values():
        if task.is_regression:
            references = rng.uniform(0, 5, 50)
            predictions = references + rng.normal(0, 1, 50)
        else:
            references, predictions = rng.integers(0, task.num_labels, (2, 50))
        available = {
            "accuracy": lambda y, p: metrics.accuracy_score(y, p),
            "f1": lambda y, p: metrics.f1_score(y, p),
            "matthews_correlation": lambda y, p: metrics.matthews_corrcoef(y, p),
            "pearson": lambda y, p: stats.pearsonr(y, p)[0],
            "spearmanr": lambda y, p: stats.spearmanr(y, p)[0],
        }
        expected = {name: available[name](references, predictions) for name in task.metric_names}
        if len(expected) == 2:
            expected["combined_score"] = sum(expected.values()) / 2
        scores = GlueMetric(task).compute(predictions=predictions, references=references)
        assert scores == expected
        assert task.main_metric in scores


def test_metrics_by_hand():
    """sklearn called with swapped or wrongly averaged arguments would still agree with itself."""
    references, predictions = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]  # TP 2, FN 1, FP 1, TN 2
    scores = GlueMetric(GLUE_TASKS["mrpc"]).compute(predictions=predictions, references=references)
    assert scores == pytest.approx({"accuracy": 4 / 6, "f1": 2 / 3, "combined_score": 2 / 3})
    assert GlueMetric(GLUE_TASKS["cola"]).compute(predictions=predictions, references=references) == pytest.approx(
        {"matthews_correlation": (2 * 2 - 1 * 1) / 9}
    )
    scores = GlueMetric(PAIR).compute(predictions=[0, 0, 0, 0], references=[0, 0, 0, 1])
    assert scores["f1_macro"] == pytest.approx((6 / 7 + 0) / 2)


@pytest.mark.parametrize("name", list(GLUE_TASKS))
def test_constant_predictions(name):
    """NaN from a collapsed student would win every "best model" comparison, or break the results file."""
    references = [1, 0, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = GlueMetric(GLUE_TASKS[name])
        collapsed = metric.compute(predictions=[0, 0, 0, 0], references=references)
        assert all(math.isfinite(score) for score in metric.compute(predictions=[1], references=[1]).values())
    expected = {"accuracy": 0.25, "f1": 0.0, "matthews_correlation": 0.0, "pearson": 0.0, "spearmanr": 0.0}
    assert {key: value for key, value in collapsed.items() if key != "combined_score"} == {
        key: expected[key] for key in GLUE_TASKS[name].metric_names
    }


def test_unlabeled_references():
    """Rows without a label would count as errors and lower the score."""
    with pytest.raises(ValueError, match="1 of 2 references are -100"):
        GlueMetric(SINGLE).compute(predictions=[0, 1], references=[0, UNLABELED])


def test_compute_metrics_fn():
    """Extra model outputs, or a `(rows, 1)` score, would be compared as if they were predictions."""
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]], dtype=np.float32)
    labels = np.array([0, 1, 1])
    compute = compute_metrics_fn(GLUE_TASKS["sst2"])
    for predictions in (logits, (logits, np.zeros((3, 7, 4)))):
        assert compute(EvalPrediction(predictions=predictions, label_ids=labels)) == {"accuracy": 2 / 3}
    scores = np.array([[1.0], [2.0], [4.0]], dtype=np.float32)
    labels = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    result = compute_metrics_fn(GLUE_TASKS["stsb"])(EvalPrediction(predictions=scores, label_ids=labels))
    assert result["spearmanr"] == pytest.approx(1.0)
    assert result["pearson"] == pytest.approx(stats.pearsonr([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])[0])


def _score_repeatedly(label: int) -> None:
    metric = GlueMetric(GLUE_TASKS["sst2"])
    for _ in range(50):
        assert metric.compute(predictions=[label] * 9, references=[1] * 9) == {"accuracy": label}


def test_two_processes_score_at_once():
    """evaluate's cache files are locked: two runs on one machine would wait for, or read, each other's rows."""
    # A fork, because a fresh interpreter spends most of the suite's time on importing transformers.
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=_score_repeatedly, args=(label,)) for label in (0, 1)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(timeout=60)
    assert [run.exitcode for run in runs] == [0, 0]
    assert not list(Path(GlueMetric(GLUE_TASKS["sst2"]).data_dir).glob("*.arrow*"))


# Soft labels


SOFT = [("fine", "good", [0.1, 0.9]), ("poor", "bad", [0.8, 0.2]), ("so so", "good", [0.45, 0.55])]


def soft_rows(form: str, suffix: str) -> list[dict]:
    is_text = suffix in (".csv", ".tsv")
    rows = []
    for text, label, (bad, good) in SOFT:
        named = {"good": good, "bad": bad} if text == "poor" else {"bad": bad, "good": good}  # in any order
        if form == "columns":
            rows.append({"text": text, "label": label, "teacher_probs.bad": bad, "teacher_probs.good": good})
        else:
            cell = named if form == "object" else [bad, good]
            rows.append({"text": text, "label": label, "teacher_probs": json.dumps(cell) if is_text else cell})
    return rows


@pytest.mark.parametrize("form", ["list", "object", "columns"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_soft_labels_of_every_format(tmp_path, suffix, form, tokenizer):
    """Taken for a text they would be read by the student; by position, an object's numbers would change places."""
    data, task = load_rows(tmp_path, soft_rows(form, suffix), suffix=suffix)
    assert (task.text_columns, task.label_names) == (("text",), ("bad", "good"))
    assert data["train"]["label"][:] == [1, 0, 1]
    names = ["bad", "good"]
    encoded = tokenize(data, task, tokenizer, max_seq_length=8)
    for rows in (data["train"], encoded["train"]):
        stored = rows["teacher_probs"][:]
        assert rows.features["teacher_probs"] == (
            List(Value("float32")) if form == "list" else {name: Value("float32") for name in names}
        )
        numbers = [row if form == "list" else [row[name] for name in names] for row in stored]
        np.testing.assert_allclose(numbers, [probs for _, _, probs in SOFT], rtol=1e-6)


def test_several_kinds_of_soft_labels(tmp_path):
    """One teacher's column would be lost beside another's, or a logit be refused as a probability."""
    rows = [{**row, "teacher_0_logits": [-3.0, 4.0]} for row in soft_rows("list", ".jsonl")]
    rows = [{"teacher_1_probs": row.pop("teacher_probs"), **row} for row in rows]
    data, task = load_rows(tmp_path, rows)
    assert set(data["train"].column_names) == {"text", "label", "teacher_0_logits", "teacher_1_probs"}
    scores = [{"text": f"text {index}", "label": index + 0.5, "teacher_logits": index / 2} for index in range(3)]
    data, task = load_rows(tmp_path, scores)
    assert task.is_regression and data["train"]["teacher_logits"][:] == [[0.0], [0.5], [1.0]]


@pytest.mark.parametrize(
    ("form", "labels", "names", "loaded"),
    [
        ("object", None, ("bad", "good"), [UNLABELED] * 3),
        ("list", None, ("bad", "good"), [UNLABELED] * 3),
        ("columns", ["good", "", ""], ("bad", "good"), [1, UNLABELED, UNLABELED]),
        ("object", ["Good", "", "Bad"], ("Bad", "Good"), [1, UNLABELED, 0]),
    ],
)
def test_rows_without_labels_of_their_own(tmp_path, form, labels, names, loaded):
    """Who has an LLM's probabilities alone could not train at all, or would have classes in another order."""
    rows = [{**row, "label": label} for row, label in zip(soft_rows(form, ".csv"), labels or [""] * 3, strict=True)]
    if labels is None:
        rows = [{name: value for name, value in row.items() if name != "label"} for row in rows]
    dev = [{"text": "fine", "label": names[1]}, {"text": "poor", "label": names[0]}]
    data, task = load_rows(tmp_path, rows, dev, suffix=".csv")
    assert (task.label_names, data["train"]["label"][:]) == (names, loaded)
    assert data["validation"]["label"][:] == [1, 0]


def test_names_of_the_soft_labels_are_all_classes(tmp_path):
    """A validation file that lacks a class would leave it out of the student."""
    probs = {"c": 0.2, "a": 0.5, "b": 0.3}
    rows = [{"text": "x", "teacher_probs": probs}, {"text": "y", "teacher_probs": probs}]
    data, task = load_rows(tmp_path, rows, [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
    assert task.label_names == ("a", "b", "c") and data["validation"]["label"][:] == [0, 1]
    with pytest.raises(ValueError, match=r"dev.jsonl, line 1: the label is 1, but one of \['a', 'b', 'c'\]"):
        load_rows(tmp_path, rows, [{"text": "x", "label": 1}])


TWO = {"text": "x", "label": "bad", "teacher_probs": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_probs": None}, r"train.jsonl, line 2: `teacher_probs` is empty.*fill it"),
        ({"teacher_probs": "0.5 0.5"}, r"line 2: `teacher_probs` is '0.5 0.5', but one number per label.*json.dumps"),
        ({"teacher_probs": [0.5, "half"]}, r"line 2: `teacher_probs` has 'half' among its numbers; correct"),
        ({"teacher_probs": [0.5, None]}, r"line 2: `teacher_probs` has None among its numbers"),
        ({"teacher_probs": [0.5, 0.25, 0.25]}, r"line 2: `teacher_probs` has 3 numbers, and 2 in the first row"),
        ({"teacher_probs": {"bad": 0.5, "good": 0.5}}, r"line 2: .*in the first row it has no label names"),
        ({"teacher_probs": [math.nan, 0.5]}, r"line 2: `teacher_probs`: \[nan, 0.5\] has a number that is missing"),
        ({"teacher_probs": [-0.5, 1.5]}, r"line 2: `teacher_probs`: \[-0.5, 1.5\] are no probabilities"),
        ({"teacher_probs": [0.5, 0.25]}, r"line 2: `teacher_probs`: \[0.5, 0.25\] do not add up to 1; divide"),
        ({"teacher_probs.bad": 1}, r"columns 'teacher_probs' and 'teacher_probs.bad'; keep the one"),
    ],
)
def test_bad_soft_labels(tmp_path, change, message):
    """The row would be counted in a shuffled dataset, where nobody finds it again."""
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path, [TWO, {**TWO, "label": "good", **change}], [TWO])


def test_soft_labels_of_other_labels(tmp_path):
    """A third class, or another task's file, would fail long after the tokenizing."""
    rows = [{**TWO, "teacher_probs": [0.5, 0.25, 0.25]}, {**TWO, "label": "good", "teacher_probs": [0.2, 0.4, 0.4]}]
    with pytest.raises(ValueError, match=r"train.jsonl, line 1: `teacher_probs` has 3 numbers, but the labels are"):
        load_rows(tmp_path, rows)
    named = [{**TWO, "teacher_probs": {"bad": 0.5, "good": 0.5}}, {**TWO, "teacher_probs": {"bad": 0.5, "ok": 0.5}}]
    with pytest.raises(ValueError, match=r"line 2: .*give every row the same labels"):
        load_rows(tmp_path, named)
    with pytest.raises(ValueError, match=r"dev.jsonl, line 1: .*labels \['bad', 'ok'\], and those of the task"):
        load_rows(tmp_path, named[:1], named[1:])


def test_unlabeled_soft_labels(tmp_path):
    """They are what teaches on such rows, and were left out with every other column."""
    path = write_rows(tmp_path / "a.csv", [{"anything": "x", "teacher_probs": "[0.25, 0.75]", "label": "bad"}])
    rows = load_unlabeled_file(path, SINGLE)
    assert rows[0] == {"text": "x", "label": UNLABELED, "teacher_probs": [0.25, 0.75]}


def test_parquet_of_datasets(tmp_path):
    """Its class labels are numbers with their names beside them, which sorted as numbers would lose the names."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "no"])})
    rows = {"text": ["a", "b", "c", "d"], "label": [0, 1, None, -1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    Dataset.from_dict({"text": ["a"], "label": [1]}, features=features).to_parquet(tmp_path / "dev.parquet")
    data, task = load_text_files(tmp_path / "train.parquet", tmp_path / "dev.parquet")
    assert task.label_names == ("no", "yes")
    assert (data["train"]["label"][:], data["validation"]["label"][:]) == ([1, 0, UNLABELED, UNLABELED], [0])
    (tmp_path / "broken.parquet").write_bytes(b"text")
    with pytest.raises(ValueError, match="broken.parquet: .*Write it anew"):
        load_text_files(tmp_path / "broken.parquet", tmp_path / "dev.parquet")
    train = write_rows(tmp_path / "train.csv", [{"text": "a", "label": label} for label in "ab"])
    with pytest.raises(ValueError, match="dev.parquet, row 1: the label is 'no', but one of"):
        load_text_files(train, tmp_path / "dev.parquet")
