"""`glue_distill.py --cache_teacher`: the same student, from a teacher that ran once."""

import json
import logging

import pytest
from conftest import make_model
from test_distributed import ROOT, launch
from test_recipes import NAMES, QUICK, glue_dir, run, save_model, teacher_dir, write_rows  # noqa: F401
from transformers import BertForSequenceClassification

from hf_kd.compat import length_grouping
from hf_kd.results import read_results


@pytest.fixture
def flags(tmp_path, glue_dir, teacher_dir):  # noqa: F811
    """SST-2 with unlabelled rows, and terms between all kinds of signals."""
    unlabeled = write_rows(tmp_path / "unlabeled.csv", ["text"], labels=(), num_rows=6)
    flags = ["--task_name", "sst2", "--glue_dir", glue_dir, "--teacher_model_name_or_path", teacher_dir]
    flags += ["--unlabeled_file", unlabeled, "--hidden_loss_weight", "1", "--attention_loss_weight", "0.5"]
    return [*flags, "--relation_loss_weight", "0.5", *QUICK]


def losses(folder):
    """Of each logged step, the loss and its terms."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        {name: x for name, x in log.items() if name.endswith("loss") and name != "train_loss"}
        for log in history
        if "loss" in log
    ]


def assert_same_run(found, expected, processes=1):
    for log, wanted in zip(losses(found), losses(expected), strict=True):
        assert log == pytest.approx(wanted, rel=2**-10)  # of float16
    rows, wanted_rows = (read_results(folder / "results.json")["rows"] for folder in (found, expected))
    assert [row["role"] for row in rows] == [row["role"] for row in wanted_rows]
    for row, wanted in zip(rows, wanted_rows, strict=True):
        for split, metrics in wanted["metrics"].items():
            # The evaluation loss of several processes is no mean over the rows: transformers averages it otherwise.
            names = metrics.keys() - ({"loss"} if processes > 1 else set())
            for name in names:
                assert row["metrics"][split][name] == pytest.approx(metrics[name], rel=1e-3)
        assert row.get("unlabeled_rows") == wanted.get("unlabeled_rows")


@pytest.fixture
def forwards(monkeypatch):
    """The rows that a model of the teacher's four layers is run on, once for each forward."""
    seen = []
    original = BertForSequenceClassification.forward

    def forward(self, *args, **kwargs):
        if self.config.num_hidden_layers == 4:
            seen.append(len(kwargs["input_ids"]))
        return original(self, *args, **kwargs)

    # The signature stays: it says which columns the model reads.
    forward.__wrapped__ = original
    monkeypatch.setattr(BertForSequenceClassification, "forward", forward)
    return seen


def test_same_student_from_a_cached_teacher(tmp_path, monkeypatch, flags, forwards, caplog):
    """With rows in another order, or another row's signals, the metrics would still look like metrics."""
    logging.getLogger("hf_kd").addHandler(caplog.handler)
    short = ["--max_steps", "2", "--learning_rates"]
    flags += ["--run_baseline", "true"]
    run(monkeypatch, "glue_distill", *flags, *short, "1e-3", "--output_dir", tmp_path / "online")
    assert sum(forwards) == 24 + 2 * 4  # the validation split, and two steps
    forwards.clear()
    cached = ["--cache_teacher", tmp_path / "cache", "--output_dir"]
    run(monkeypatch, "glue_distill", *flags, *short, "1e-3", "1e-4", *cached, tmp_path / "two rates")
    assert sum(forwards) == 24 + 30  # the validation split, and each training row once
    assert "30 rows with" in caplog.text and "bytes per token" in caplog.text
    forwards.clear()
    caplog.clear()
    run(monkeypatch, "glue_distill", *flags, *short, "1e-3", *cached, tmp_path / "again")
    assert sum(forwards) == 24
    assert "holds the teacher's signals" in caplog.text and "caching takes" not in caplog.text
    assert_same_run(tmp_path / "again", tmp_path / "online")
    assert losses(tmp_path / "again") == losses(tmp_path / "two rates" / "learning_rate_0.001")
    # Not rounded: the baseline reads no signals.
    assert losses(tmp_path / "again" / "baseline") == losses(tmp_path / "online" / "baseline")


def test_agreement_augmentation_and_several_teachers(tmp_path, monkeypatch, tokenizer, flags, forwards):
    """Evaluation asks the teachers themselves; the variants of rows are labelled by them too."""
    other = save_model(tmp_path / "other", tokenizer, seed=3, **NAMES)
    start = flags.index("--teacher_model_name_or_path")
    flags[start + 2 : start + 2] = [other]
    flags += ["--eval_teacher_agreement", "true", "--augment", "2", "--attention_loss_weight", "0"]
    flags += ["--hidden_loss_weight", "0", "--relation_loss_weight", "0"]
    run(monkeypatch, "glue_distill", *flags, "--output_dir", tmp_path / "online")
    cached = ["--cache_teacher", tmp_path / "cache", "--cache_dtype", "bfloat16", "--output_dir", tmp_path / "cached"]
    run(monkeypatch, "glue_distill", *flags, *cached)
    assert_same_run(tmp_path / "cached", tmp_path / "online")
    student = read_results(tmp_path / "cached" / "results.json")["rows"][-1]
    assert "teacher_agreement" in student["metrics"]["validation"] and student["unlabeled_rows"] > 6
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["teacher_0", "teacher_1"]


@pytest.mark.parametrize("precision", [["--bf16", "true"], ["--teacher_dtype", "bfloat16"]])
def test_precision_of_the_training(tmp_path, monkeypatch, flags, precision):
    """The cache is of the teacher as the training would run it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which the training changes
    cached = ["--cache_teacher", tmp_path / "cache", "--output_dir", tmp_path / "out"]
    run(monkeypatch, "glue_distill", *flags, *cached, *precision, "--max_steps", "1")
    fingerprint = json.loads((tmp_path / "cache" / "cache.json").read_text())["fingerprint"]
    is_autocast = precision[0] == "--bf16"
    expected = ("bf16", None) if is_autocast else ("no", "bfloat16")
    assert (fingerprint["mixed precision"], fingerprint["teacher dtype"]) == expected


@pytest.mark.one_leg
@pytest.mark.distributed
def test_two_processes(tmp_path, monkeypatch, flags):
    """Each writes shards of its own, and both read all of them."""
    ((name, value),) = length_grouping(False).items()
    flags += [f"--{name}", str(value)]  # groups of one process are not those of two
    alone = ["--per_device_train_batch_size", "4", "--output_dir", tmp_path / "one"]
    run(monkeypatch, "glue_distill", *flags, *alone)
    two = ["--per_device_train_batch_size", "2", "--cache_teacher", tmp_path / "cache", "--output_dir"]
    script = ROOT / "tests" / "scripts" / "distill_in_small_shards.py"
    launch(script, *flags, *two, tmp_path / "two", processes=2)
    assert_same_run(tmp_path / "two", tmp_path / "one", processes=2)
    names = sorted(path.name for path in (tmp_path / "cache").glob("shard-?.*"))
    assert names == ["shard-0.rank-0", "shard-1.rank-1", "shard-2.rank-0", "shard-3.rank-1"]


def test_what_cannot_be_cached(tmp_path, monkeypatch, tokenizer, flags):
    """Each is found before a teacher runs for hours."""
    cached = ["--cache_teacher", tmp_path / "cache", "--output_dir", tmp_path / "out"]
    student = save_model(tmp_path / "student", tokenizer, seed=2, **NAMES)
    separate = ["--separate_tokenizers", "true", "--student_model_name_or_path", student]
    with pytest.raises(ValueError, match="with separate_tokenizers it reads others; drop --cache_teacher"):
        run(monkeypatch, "glue_distill", *flags, *cached, *separate)
    weights = ["--hidden_loss_weight", "0", "--attention_loss_weight", "0", "--relation_loss_weight", "0"]
    with pytest.raises(ValueError, match="no term compares with it; set --logit_loss_weight 0.5"):
        run(monkeypatch, "glue_distill", *flags, *cached, *weights, "--logit_loss_weight", "0")
    assert not (tmp_path / "cache").exists()
    assert make_model(seed=1).config.num_hidden_layers == 4  # what `forwards` tells the teacher by
