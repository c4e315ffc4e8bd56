"""`glue_distill.py` on files that carry soft labels, with and without a teacher model."""

import json
import random
import re
import shlex

import numpy as np
import pytest
from test_distributed import ROOT
from test_glue import write_rows
from test_recipes import NAMES, QUICK, run, save_model, sentence
from transformers import AutoModelForSequenceClassification

from hf_kd.results import read_results


LABELS = ("negative", "positive")


def make_rows(num_rows=24, seed=0, form="object", labeled=True, is_text=False):
    """Rows with an LLM's probabilities of two labels."""
    rng = random.Random(seed)
    rows = []
    for index in range(num_rows):
        share = rng.random()
        numbers = dict(zip(LABELS, (1 - share, share), strict=True))
        cell = numbers if form == "object" else list(numbers.values())
        rows.append({"text": sentence(rng), "teacher_probs": json.dumps(cell) if is_text else cell})
        if labeled:
            rows[-1]["label"] = LABELS[index % 2]
    return rows


@pytest.fixture
def student_dir(tmp_path, tokenizer):
    return save_model(tmp_path / "small-bert", tokenizer, seed=2, num_hidden_layers=2)


@pytest.fixture
def dev(tmp_path):
    rows = [{name: row[name] for name in ("text", "label")} for row in make_rows(seed=1)]
    return write_rows(tmp_path / "dev.csv", rows)


def distil(monkeypatch, tmp_path, train, dev, *flags):
    data = ["--train_file", train, "--validation_file", dev]
    run(monkeypatch, "glue_distill", *data, "--output_dir", tmp_path / "out", *QUICK, *flags)
    return read_results(tmp_path / "out" / "results.json")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("form", ["object", "list"])
def test_an_llms_probabilities(tmp_path, monkeypatch, student_dir, dev, suffix, form):
    """Who has no teacher model but its answers would have to invent one."""
    train = write_rows(tmp_path / f"train{suffix}", make_rows(form=form, is_text=suffix == ".csv"))
    flags = ["--student_model_name_or_path", student_dir, "--run_baseline"]
    flags += ["--teacher_labels", *LABELS] if form == "list" else []
    results = distil(monkeypatch, tmp_path, train, dev, *flags)
    baseline, student = results["rows"]
    assert [row["role"] for row in results["rows"]] == ["baseline", "student"]
    assert student["weights"] == {"task_loss": 0.5, "logit_loss": 0.5} and baseline["weights"] == {"task_loss": 1.0}
    assert results["distillation"]["teachers"] == [{"column": "teacher_probs"}]
    assert results["distillation"]["student"]["start"] == {"kind": "checkpoint", "name": "small-bert"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "distilled from the soft labels in the column `teacher_probs` of the training data" in card
    assert "the teacher" not in card and "The teacher" not in card and "retained" in card
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == NAMES["id2label"]


def test_rows_without_labels(tmp_path, monkeypatch, student_dir, dev):
    """The usual case: an LLM has answered, and nobody has labelled."""
    train = write_rows(tmp_path / "train.jsonl", make_rows(labeled=False))
    flags = ["--student_model_name_or_path", student_dir, "--max_train_samples", 16]
    with pytest.raises(ValueError, match="no training row has a label.*--task_loss_weight 0"):
        distil(monkeypatch, tmp_path, train, dev, *flags)
    more = write_rows(tmp_path / "more.jsonl", make_rows(num_rows=8, seed=3, labeled=False))
    flags += ["--task_loss_weight", 0, "--logit_loss_weight", 1, "--unlabeled_file", more]
    results = distil(monkeypatch, tmp_path, train, dev, *flags)
    (student,) = results["rows"]
    assert (student["role"], student["labeled_rows"], student["unlabeled_rows"]) == ("student", 0, 24)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "24 rows without a label from `more.jsonl`, taught by the soft labels" in card
    assert "Soft labels are the only ones of 100% of the training rows" in card


def test_answers_of_the_file_and_states_of_a_teacher(tmp_path, monkeypatch, tokenizer, dev):
    """An LLM has no hidden states that fit, and an encoder beside it has."""
    teacher = save_model(tmp_path / "teacher", tokenizer, seed=1, **NAMES)
    train = write_rows(tmp_path / "train.jsonl", make_rows())
    flags = ["--teacher_model_name_or_path", teacher, "--student_num_layers", 2]
    results = distil(monkeypatch, tmp_path, train, dev, *flags, "--hidden_loss_weight", 1)
    assert [row["role"] for row in results["rows"]] == ["teacher", "student"]
    (described,) = results["distillation"]["teachers"]
    assert (described["name"], described["column"]) == ("teacher", "teacher_probs")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "its predictions replaced by those in the column `teacher_probs`" in card
    results = distil(monkeypatch, tmp_path, train, dev, *flags)  # the model is not asked for anything
    assert results["distillation"]["teachers"] == [{"column": "teacher_probs"}]
    start = results["distillation"]["student"]["start"]
    assert (start["name"], start["layers"]) == ("teacher", [2, 4]) and "teacher" not in start


def test_the_readmes_example(tmp_path, monkeypatch, student_dir):
    """Who copies it would be the first to run it."""
    section = (
        (ROOT / "README.md").read_text().partition("### Soft labels without a teacher\n")[2].partition("\n### ")[0]
    )
    row = json.loads(re.search(r"rows such as `(.*)`:", section)[1])
    rows = [{**row, **more} for more in make_rows(labeled=False)]
    assert row["teacher_probs"].keys() == rows[0]["teacher_probs"].keys()
    write_rows(tmp_path / "answers.jsonl", rows)
    write_rows(tmp_path / "dev.jsonl", [{"text": row["text"], "label": row["label"]} for row in make_rows(seed=1)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    name = "google/bert_uncased_L-4_H-256_A-4"
    script, command = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("python", "bash"))
    quick = '"runs/student", max_steps=2, use_cpu=True, report_to=[], '
    script = script.replace(name, str(student_dir)).replace('"runs/student", ', quick)
    found = {}
    exec(script, found)
    entries = found["trainer"].state.log_history
    assert found["trainer"].state.global_step == 2 and np.isfinite(entries[-1]["train_loss"])
    launcher, launch, recipe, *flags = shlex.split(command.replace("\\\n", " ").replace(name, str(student_dir)))
    assert [launcher, launch, recipe] == ["accelerate", "launch", "recipes/glue_distill.py"]
    run(monkeypatch, "glue_distill", *flags, *QUICK)
    assert AutoModelForSequenceClassification.from_pretrained("runs/student").config.id2label == NAMES["id2label"]


@pytest.mark.parametrize(
    ("has_soft_labels", "flags", "message"),
    [
        (False, ["--student_model_name_or_path", "S"], "give --teacher_model_name_or_path, or a --train_file with a"),
        (True, [], "no teacher to make a student of; give --teacher_model_name_or_path, or, with a column"),
        (True, ["--student_model_name_or_path", "S", "--augment", 1], r"not in \['teacher_probs'\]; drop --augment"),
        (True, ["--student_model_name_or_path", "S", "--unlabeled_file", "U"], "give both files the same soft labels"),
        (
            True,
            ["--student_model_name_or_path", "S", "--separate_tokenizers"],
            "separate_tokenizers=True is about a teacher model",
        ),
        (
            True,
            ["--student_model_name_or_path", "S", "--teacher_label_names", "a", "b"],
            "is about a teacher model.*--teacher_labels names the numbers",
        ),
        (
            True,
            ["--student_model_name_or_path", "S", "--hidden_loss_weight", "1"],
            "pass teacher_model= to run the teacher for them, or set the weights",
        ),
    ],
)
def test_what_cannot_teach(tmp_path, monkeypatch, student_dir, dev, has_soft_labels, flags, message):
    """A student of labels alone would be trained under the name of a distilled one."""
    rows = make_rows()
    if not has_soft_labels:
        rows = [{name: row[name] for name in ("text", "label")} for row in rows]
    train = write_rows(tmp_path / "train.jsonl", rows)
    unlabeled = write_rows(tmp_path / "unlabeled.csv", [{"text": "w1 w2"}])
    flags = [{"S": student_dir, "U": unlabeled}.get(flag, flag) for flag in flags]
    with pytest.raises(ValueError, match=message):
        distil(monkeypatch, tmp_path, train, dev, *flags)
    assert not (tmp_path / "out" / "model.safetensors").exists()
