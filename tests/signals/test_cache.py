"""The teacher runs once: what is read from disk trains as what it says now, and is made again if it is not whole."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
from collections import namedtuple

import numpy as np
import pyarrow
import pytest
import torch
from accelerate import PartialState
from conftest import copy_of, make_dataset, make_model
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk
from hub_client import ClientError, HubClient, load_rows, push_rows
from hub_server import HubServer, User
from test_problem_types import collator_for, make_problem_dataset
from torch.utils.data import SequentialSampler

from hf_kd import DistillationTrainer
from hf_kd.compat import length_grouping
from hf_kd.signals import Wanted, cache, shards
from hf_kd.signals.cache import cache_teacher_signals
from hf_kd.signals.cached_teacher import CachedTeacher, PartlyCachedTeacher
from hf_kd.signals.columns import SignalSource
from hf_kd.signals.token_rows import estimate_cache


WANTED = Wanted(hidden=frozenset({0, 2, 4}), attention=frozenset({2, 4}), values=frozenset({4}))
# Every kind of term between layers, besides the logits.
ALL_TERMS = {"hidden_loss_weight": 1.0, "attention_loss_weight": 0.5, "relation_loss_weight": 0.5}
# Of a loss, relative: half a unit in the last place of a vector's numbers is 2^-11 or 2^-8 of each, and a sum of
# squares is off by twice that at most.
TOLERANCE = {"float16": 2**-10, "bfloat16": 2**-7}


class Forwards:
    """Counts how often a model runs."""

    def __init__(self, model):
        self.number = 0
        model.register_forward_pre_hook(self.add)

    def add(self, *args):
        self.number += 1


def train(make_args, rows, tokenizer, teacher=None, *, problem="single_label_classification", **changes):
    """The trainer, and the loss of every step with its terms."""
    trainer = DistillationTrainer(
        make_model(seed=2, num_hidden_layers=2, problem=problem),
        make_args(optim="sgd", learning_rate=1e-4, **changes),
        teacher_model=teacher,
        train_dataset=rows,
        data_collator=collator_for(problem, tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    names = [log for log in trainer.state.log_history if "loss" in log]
    return trainer, [{name: value for name, value in log.items() if name.endswith("loss")} for log in names]


def assert_same_losses(found, expected, tolerance):
    assert len(found) == len(expected) > 0
    for log, wanted in zip(found, expected, strict=True):
        assert log == pytest.approx(wanted, rel=tolerance, abs=1e-6)


def columns_of(rows):
    """The cached columns as numbers, exactly."""
    names = [name for name in rows.column_names if name.startswith("teacher_")]
    return rows.select_columns(names).to_dict()


def files(folder):
    return sorted(folder.glob("shard-*.arrow"))


def start(target, *args):
    """A process that begins as a copy of this one, as a data loader's workers do: nothing is imported anew."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "_MIN_SHARD_ROWS", 8)


@pytest.mark.parametrize(
    "problem",
    [
        "single_label_classification",
        "multi_label_classification",
        "regression",
        "token_classification",
        "question_answering",
    ],
)
def test_online_cached_and_both_give_the_same_loss(tmp_path, make_args, tokenizer, problem):
    """Vectors put at other tokens, layers mixed up or heads split differently train, to another loss."""
    teacher = make_model(seed=1, problem=problem)
    rows = make_problem_dataset(problem, num_rows=24)
    changes = {"problem": problem, "max_steps": 3, **ALL_TERMS}
    _, online = train(make_args, rows, tokenizer, teacher, **changes)
    terms = {"task_loss", "logit_loss", "hidden_loss", "attention_loss", "relation_loss"}
    assert set(online[0]) == {"loss", *terms}
    for dtype, tolerance in TOLERANCE.items():
        all_rows = cache_teacher_signals(rows, teacher, WANTED, tmp_path / dtype, dtype=dtype, batch_size=5)
        trainer, cached = train(make_args, all_rows, tokenizer, **changes)
        assert type(trainer.teacher) is CachedTeacher
        assert_same_losses(cached, online, tolerance)
    logits = cache_teacher_signals(rows, teacher, Wanted(), tmp_path / "logits")
    trainer, both = train(make_args, logits, tokenizer, teacher, **changes)
    assert type(trainer.teacher) is PartlyCachedTeacher
    assert_same_losses(both, online, TOLERANCE["float16"])


@pytest.mark.parametrize("family", ["albert", "roberta", "distilbert", "modernbert"])
def test_other_families(tmp_path, make_args, tokenizer, family):
    """Each names its layers, heads and inputs differently, and is described by a config of its own class."""
    changes = {"pad_token_id": 0} if family == "roberta" else {}
    teacher = make_model(family, seed=1, **changes)
    rows = make_dataset(24)
    terms = {"hidden_loss_weight": 1.0}
    wanted = Wanted(hidden=frozenset({0, 2, 4}))
    if family != "modernbert":
        terms, wanted = ALL_TERMS, WANTED
    _, online = train(make_args, rows, tokenizer, teacher, **terms)
    rows = cache_teacher_signals(rows, teacher, wanted, tmp_path / "cache", batch_size=5)
    trainer, cached = train(make_args, rows, tokenizer, **terms)
    assert type(trainer.teacher.config) is type(teacher.config)
    assert_same_losses(cached, online, TOLERANCE["float16"])


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_loss_type": "pkd", "hidden_loss_weight": 1.0},
        {"gradient_accumulation_steps": 2, "max_steps": 5, **ALL_TERMS},
        {"remove_unused_columns": False, **ALL_TERMS},
        {**length_grouping(), **ALL_TERMS},
        {"dataloader_num_workers": 1, **ALL_TERMS},
    ],
    ids=["pkd", "accumulation", "all columns", "grouped by length", "workers"],
)
def test_ways_to_train(tmp_path, make_args, tokenizer, teacher, changes):
    """Rows in another order than the columns, or a batch counted twice, would not show in one step's loss: several
    epochs, shuffled, with rows that have no label."""
    rows = make_dataset(24, unlabeled_share=0.3)
    changes = {"max_steps": 7, **changes}
    _, online = train(make_args, rows, tokenizer, teacher, **changes)
    rows = cache_teacher_signals(rows, teacher, WANTED, tmp_path / "cache")
    _, cached = train(make_args, rows, tokenizer, **changes)
    assert_same_losses(cached, online, TOLERANCE["float16"])


def test_grouping_by_length_reads_no_signals(tmp_path, make_args, tokenizer, teacher, monkeypatch):
    """The sampler asks every row for its length: with the vectors in them it would read the whole cache first."""
    rows = cache_teacher_signals(make_dataset(24), teacher, WANTED, tmp_path / "cache")
    trainer = DistillationTrainer(
        make_model(seed=2, num_hidden_layers=2),
        make_args(**length_grouping(), **ALL_TERMS),
        train_dataset=rows,
        data_collator=collator_for("single_label_classification", tokenizer),
        processing_class=tokenizer,
    )
    read = []
    original = Dataset._getitem
    monkeypatch.setattr(
        Dataset,
        "_getitem",
        lambda self, key, **kwargs: read.append(self.column_names) or original(self, key, **kwargs),
    )
    sampler = trainer._get_train_sampler(rows)
    assert type(sampler.sampler).__name__ == "LengthGroupedSampler"
    assert sampler.sampler.lengths == [len(row) for row in rows.select_columns(["input_ids"]).to_dict()["input_ids"]]
    assert all(names == ["input_ids"] for names in read)


def test_rows_as_they_come(tmp_path, teacher):
    """Shuffled and selected rows are not in the order of their file, padded ones have positions that are no tokens,
    and some tokenizers write no mask: each row keeps its own vectors."""
    rows = make_dataset(24)
    expected = columns_of(cache_teacher_signals(rows, teacher, WANTED, tmp_path / "plain"))

    order = [5, 3, 17, 3]
    found = columns_of(cache_teacher_signals(rows.select(order), teacher, WANTED, tmp_path / "selected"))
    for name, values in expected.items():
        for row, index in zip(found[name], order, strict=True):
            assert row == pytest.approx(values[index], abs=5e-2)

    def padded(row, is_left):
        more = 30 - len(row["input_ids"])
        return {
            name: [0] * more + row[name] if is_left else row[name] + [0] * more
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }

    right = rows.map(lambda row: padded(row, is_left=False))
    found = columns_of(cache_teacher_signals(right, teacher, WANTED, tmp_path / "right"))
    assert [len(row) for row in found["teacher_hidden_2"]] == [len(row) for row in expected["teacher_hidden_2"]]
    assert np.concatenate(found["teacher_hidden_4"]) == pytest.approx(
        np.concatenate(expected["teacher_hidden_4"]), abs=5e-2
    )
    left = rows.map(lambda row: padded(row, is_left=True))  # at other positions: other vectors, as many
    found = columns_of(cache_teacher_signals(left, teacher, WANTED, tmp_path / "left"))
    assert [len(row) for row in found["teacher_keys_2"]] == [len(row) for row in expected["teacher_keys_2"]]

    without = rows.remove_columns("attention_mask")
    assert columns_of(cache_teacher_signals(without, teacher, WANTED, tmp_path / "no mask")) == expected
    formatted = rows.with_format("torch")
    assert columns_of(cache_teacher_signals(formatted, teacher, WANTED, tmp_path / "formatted")) == expected


def test_left_padded_rows_train(tmp_path, make_args, tokenizer, teacher):
    """Vectors of left-padded rows belong at the end of the row."""
    rows = make_dataset(24).map(
        lambda row: {
            name: [0] * (20 - len(row[name])) + row[name] for name in ("input_ids", "attention_mask", "token_type_ids")
        }
    )
    _, online = train(make_args, rows, tokenizer, teacher, **ALL_TERMS)
    rows = cache_teacher_signals(rows, teacher, WANTED, tmp_path / "cache")
    _, cached = train(make_args, rows, tokenizer, **ALL_TERMS)
    assert_same_losses(cached, online, TOLERANCE["float16"])


def test_several_teachers(tmp_path, make_args, tokenizer):
    """Columns of one teacher must not be read as the other's."""
    teachers = [make_model(seed=1), make_model(seed=3, num_hidden_layers=3, hidden_size=16)]
    rows = make_dataset(24)
    _, online = train(make_args, rows, tokenizer, teachers, teacher_weights=[0.8, 0.2])
    cached_rows = cache_teacher_signals(rows, teachers, Wanted(), tmp_path / "cache")
    _, cached = train(make_args, cached_rows, tokenizer, teacher_weights=[0.8, 0.2])
    assert_same_losses(cached, online, 1e-5)
    _, both = train(make_args, cached_rows, tokenizer, teachers, teacher_weights=[0.8, 0.2])
    assert_same_losses(both, online, 1e-5)
    with pytest.raises(ValueError, match="layers of 1 teachers, and there are 2"):
        cache_teacher_signals(rows, teachers, [Wanted()], tmp_path / "other")


def test_evaluation(tmp_path, make_args, tokenizer, teacher):
    """Evaluating compares with the teacher on rows of their own: without it, what is read must be there."""
    collator = collator_for("single_label_classification", tokenizer)
    rows, others = make_dataset(16), make_dataset(20, seed=5)
    cached = cache_teacher_signals(rows, teacher, Wanted(), tmp_path / "train")
    cached_others = cache_teacher_signals(others, teacher, Wanted(), tmp_path / "evaluation")

    def trainer(train_dataset, eval_dataset, teacher=None, **changes):
        return DistillationTrainer(
            make_model(seed=2, num_hidden_layers=2),
            make_args(**changes),
            teacher_model=teacher,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collator,
            processing_class=tokenizer,
        )

    online = trainer(rows, others, teacher, eval_teacher_agreement=True).evaluate()
    names = ("eval_loss", "eval_teacher_agreement", "eval_teacher_kl")
    expected = pytest.approx({name: online[name] for name in names}, rel=1e-4)
    for found in (
        trainer(cached, cached_others, eval_teacher_agreement=True).evaluate(),
        trainer(cached, others, teacher, eval_teacher_agreement=True).evaluate(),  # it runs where columns are missing
    ):
        assert {name: found[name] for name in names} == expected
    assert trainer(cached, others).evaluate()["eval_loss"] == pytest.approx(online["eval_loss"])
    with pytest.raises(ValueError, match="evaluation rows, which carry no signals"):
        trainer(cached, others, eval_teacher_agreement=True)


def test_again_reads_and_runs_nothing(tmp_path, teacher, small_shards, monkeypatch):
    """A cache that is made anew in each run saves nothing."""
    forwards = Forwards(teacher)
    rows = make_dataset(24)
    made = columns_of(cache_teacher_signals(rows, teacher, WANTED, tmp_path / "cache", batch_size=4))
    assert forwards.number == 6 and len(files(tmp_path / "cache")) == 3
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(0))  # nothing is written
    assert columns_of(cache_teacher_signals(rows, teacher, WANTED, tmp_path / "cache", batch_size=8)) == made
    assert forwards.number == 6


def truncate(shard, note):
    shard.write_bytes(shard.read_bytes()[:-100])


def alter(shard, note):
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def tear_note(shard, note):
    note.write_text(note.read_text()[:20])


def lose(shard, note):
    shard.unlink()


def lose_note(shard, note):
    note.unlink()


@pytest.mark.parametrize("damage", [truncate, alter, tear_note, lose, lose_note])
def test_what_is_not_whole_is_made_again(tmp_path, teacher, small_shards, damage):
    """A disk that was full or a killed copy leaves files that can be read, with other numbers in them."""
    rows = make_dataset(24)
    folder = tmp_path / "cache"
    made = columns_of(cache_teacher_signals(rows, teacher, WANTED, folder))
    forwards = Forwards(teacher)
    shard = files(folder)[1]
    before = shard.read_bytes()
    damage(shard, shard.with_suffix(".json"))
    assert columns_of(cache_teacher_signals(rows, teacher, WANTED, folder)) == made
    assert forwards.number == 1 and shard.read_bytes() == before


def test_another_folder_for_other_signals(tmp_path, teacher, tokenizer):
    """Signals of another teacher or of other rows have the same shapes, and would train a wrong student."""
    rows, folder = make_dataset(12), tmp_path / "cache"
    cache_teacher_signals(rows, teacher, WANTED, folder)
    renamed = make_model(seed=1, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    for what, args, changes in (
        ("teacher weights", (rows, make_model(seed=9), WANTED), {}),
        ("teacher config, id2label", (rows, renamed, WANTED), {}),
        ("rows", (make_dataset(12, seed=3), teacher, WANTED), {}),
        ("dtype", (rows, teacher, WANTED), {"dtype": "bfloat16"}),
        ("mixed precision", (rows, teacher, WANTED), {"mixed_precision": "bf16"}),
        ("teacher dtype", (rows, teacher, WANTED), {"teacher_dtype": "bfloat16"}),
        ("tokenizer", (rows, teacher, WANTED), {"tokenizer": tokenizer}),
    ):
        with pytest.raises(ValueError, match=rf"something else \({what}: .* there, .* now\)\. Give another folder"):
            cache_teacher_signals(*args, folder, **changes)
    more = Wanted(hidden=frozenset({1, 2}), values=frozenset({4}))
    with pytest.raises(ValueError, match=r"something else \(wanted signals: teacher_hidden_1 not there\)\. Give"):
        cache_teacher_signals(rows, teacher, more, folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds thesis.tex and no cache.json"):
        cache_teacher_signals(rows, teacher, WANTED, tmp_path / "full")


def test_fewer_layers_than_there_are(tmp_path, teacher, small_shards):
    """A term that is switched off must not cost another run of the teacher, or another file for the other terms."""
    rows, folder = make_dataset(24), tmp_path / "cache"
    made = columns_of(cache_teacher_signals(rows, teacher, WANTED, folder))
    files(folder)[1].unlink()
    fewer = Wanted(hidden=frozenset({2}), values=frozenset({4}))
    found = columns_of(cache_teacher_signals(rows, teacher, fewer, folder))
    assert found == {
        name: made[name] for name in ("teacher_logits", "teacher_hidden_2", "teacher_values_4", "teacher_signals")
    }
    forwards = Forwards(teacher)
    assert columns_of(cache_teacher_signals(rows, teacher, WANTED, folder)) == made
    assert forwards.number == 0


def test_a_teacher_that_was_moved_is_the_same_one(tmp_path, teacher, small_shards, monkeypatch):
    """Shards that name their teacher differently cannot be read together: one that was made after the folder got
    another name, or after the Hub could not be asked, would make hours of the others worthless."""
    rows, folder = make_dataset(24), tmp_path / "cache"
    teacher.save_pretrained(tmp_path / "first")
    loaded = type(teacher).from_pretrained(tmp_path / "first")
    made = cache_teacher_signals(rows, loaded, Wanted(), folder)
    expected, source = columns_of(made), made.features["teacher_signals"]
    files(folder)[1].with_suffix(".json").unlink()
    (tmp_path / "first").rename(tmp_path / "second")
    moved = type(teacher).from_pretrained(tmp_path / "second")
    monkeypatch.setattr(cache, "identify", lambda config: pytest.fail("this is decided"))
    for _ in range(2):  # what is written at the end is read by the next
        found = cache_teacher_signals(rows, moved, Wanted(), folder)
        assert columns_of(found) == expected and found.features["teacher_signals"] == source
    assert json.loads(source.names[0])["origin"] == {"name": "first"}


def test_a_teacher_that_was_evaluated_is_the_same_one(tmp_path, teacher):
    """transformers sets the config's problem_type in the first forward with labels: the cache would be refused."""
    rows, folder = make_dataset(12), tmp_path / "cache"
    made = columns_of(cache_teacher_signals(rows, teacher, Wanted(), folder))
    teacher(input_ids=torch.tensor([[2, 5, 3]]), labels=torch.tensor([1]))
    assert teacher.config.problem_type == "single_label_classification"
    assert columns_of(cache_teacher_signals(rows, teacher, Wanted(), folder)) == made
    teacher.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"\(problem: single_label_classification there, multi_label_classification"):
        cache_teacher_signals(rows, teacher, Wanted(), folder)


def test_long_rows_together(tmp_path, teacher, small_shards, monkeypatch):
    """Rows that were sorted by length have the long ones in one shard: a limit for rows of the mean length would let
    it grow until its memory, or Arrow's 32 bits, end."""
    monkeypatch.setattr(cache, "_SHARD_BYTES", 2**15)
    rows = concatenate_datasets([make_dataset(200, lengths=(3, 3)), make_dataset(8, lengths=(76, 76))])
    cache_teacher_signals(rows, teacher, WANTED, tmp_path / "cache")
    assert max(path.stat().st_size for path in files(tmp_path / "cache")) < 8 * 2**15 + 12_000
    with pytest.raises(pyarrow.ArrowInvalid):
        cache._as_lists(np.zeros(4), np.array([0, 2**32 + 4]))


def test_another_teacher_than_the_columns_are_of(tmp_path, make_args, tokenizer, teacher):
    """Logits of one teacher beside hidden states of another."""
    rows = cache_teacher_signals(make_dataset(12), teacher, Wanted(), tmp_path / "cache")
    with pytest.raises(ValueError, match="made by a teacher of other weights"):
        train(make_args, rows, tokenizer, make_model(seed=9))


@pytest.mark.parametrize("name", ["autocast", "copy"])
def test_precision_of_the_teacher(tmp_path, make_args, tokenizer, teacher, name):
    """A training in bfloat16 runs its teacher so; the cache holds what that teacher says, and not what it says in
    float32, which is as near as no other test would see."""
    rows = make_dataset(24, lengths=(8, 8))
    batch = {name: torch.tensor(rows[name][:]) for name in ("input_ids", "attention_mask", "token_type_ids")}
    plain = cache_teacher_signals(rows, teacher, Wanted(), tmp_path / "plain", batch_size=24)
    of_cache, of_training = {"teacher_dtype": "bfloat16"}, {"teacher_dtype": "bfloat16"}
    reference = copy_of(teacher).to(torch.bfloat16)
    if name == "autocast":
        of_cache, of_training, reference = {"mixed_precision": "bf16"}, {"bf16": True}, teacher
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "autocast"):
        expected = reference(**batch).logits.float()
    dtypes = []
    teacher.register_forward_pre_hook(lambda model, _: dtypes.append(model.bert.pooler.dense.weight.dtype))
    found = cache_teacher_signals(rows, teacher, Wanted(), tmp_path / name, batch_size=24, **of_cache)
    assert dtypes == [torch.bfloat16]  # cast once, and not anew in each batch
    assert found["teacher_logits"][:] == expected.tolist()
    assert found["teacher_logits"][:] != plain["teacher_logits"][:]
    assert teacher.dtype == torch.float32
    trainer, _ = train(make_args, found, tokenizer, max_steps=1, **of_training)
    assert trainer.teacher.source.weights == cache.Teacher(teacher, teacher.config).weights


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_teacher_ends_where_it_was(tmp_path, teacher):
    """Its memory is the student's from then on; also where it stopped with an error."""
    rows = make_dataset(12)
    cache_teacher_signals(rows, teacher, Wanted(), tmp_path / "cache", device="cuda")
    assert teacher.device.type == "cpu"
    with pytest.raises(ValueError, match="hidden_1 not there"):
        cache_teacher_signals(rows, teacher, Wanted(hidden=frozenset({1})), tmp_path / "cache", device="cuda")
    assert teacher.device.type == "cpu"


def test_disk_that_is_too_small(tmp_path, teacher, monkeypatch):
    """It would be full after hours."""
    forwards = Forwards(teacher)
    rows = make_dataset(24)
    estimate = estimate_cache(rows, teacher.config, WANTED)
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(estimate.total_bytes))
    with pytest.raises(ValueError, match=r"caching needs 0\.\d\d MB in .* where 0\.\d\d MB are free"):
        cache_teacher_signals(rows, teacher, WANTED, tmp_path / "not there" / "cache")
    assert forwards.number == 0 and not (tmp_path / "not there").exists()


def test_the_estimate_is_what_is_written(tmp_path, teacher):
    """Nobody can plan with a number that is off; files have a header of some kilobytes besides."""
    for problem, wanted in (("single_label_classification", WANTED), ("token_classification", Wanted())):
        rows = make_dataset(600)
        model = make_model(seed=1, problem=problem)
        is_of_tokens = problem == "token_classification"
        estimate = estimate_cache(rows, model.config, wanted, has_token_logits=is_of_tokens)
        assert estimate.tokens == sum(map(len, rows["input_ids"]))
        cache_teacher_signals(rows, model, wanted, tmp_path / problem)
        written = sum(path.stat().st_size for path in files(tmp_path / problem))
        assert 0 <= written - estimate.total_bytes < 12_000


def test_numbers_that_cannot_be_stored(tmp_path, teacher):
    """float16 would store infinity, and the training would end in NaN hours later; and nothing stays switched off."""
    rows = make_dataset(12)
    with torch.no_grad():
        teacher.bert.encoder.layer[3].attention.self.query.weight.mul_(1e6)
    wanted = Wanted(attention=frozenset({4}))
    with pytest.raises(ValueError, match="teacher_queries_4 has numbers up to .* use dtype='bfloat16'"):
        cache_teacher_signals(rows, teacher, wanted, tmp_path / "float16")
    assert not torch.is_inference_mode_enabled()
    cache_teacher_signals(rows, teacher, wanted, tmp_path / "bfloat16", dtype="bfloat16")
    with torch.no_grad():
        teacher.classifier.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="the teacher gives teacher_logits that are not finite"):
        cache_teacher_signals(rows, teacher, Wanted(), tmp_path / "nan")


def test_what_cannot_be_cached(tmp_path, teacher):
    """Each would train on something else than was asked for."""
    rows = make_dataset(4)
    with pytest.raises(ValueError, match="other tokens in every epoch"):
        cache_teacher_signals(rows, make_model(problem="masked_lm"), Wanted(), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"tokenized rows, with a column input_ids, but was given Dataset with \['te"):
        cache_teacher_signals(Dataset.from_dict({"text": ["a"]}), teacher, Wanted(), tmp_path / "cache")
    with pytest.raises(ValueError, match="no rows, so that there is nothing to cache"):
        cache_teacher_signals(rows.select([]), teacher, Wanted(), tmp_path / "cache")
    with pytest.raises(ValueError, match="columns \\['teacher_logits'\\] already"):
        cache_teacher_signals(rows.add_column("teacher_logits", [[0.0]] * 4), teacher, Wanted(), tmp_path / "cache")
    with pytest.raises(ValueError, match="the teacher reads the columns \\['position_ids'\\]"):
        cache_teacher_signals(rows.add_column("position_ids", [[0]] * 4), teacher, Wanted(), tmp_path / "cache")
    with pytest.raises(ValueError, match="dtype='float32' must be one of 'float16', 'bfloat16'"):
        cache_teacher_signals(rows, teacher, Wanted(), tmp_path / "cache", dtype="float32")
    with pytest.raises(ValueError, match="mixed_precision='bfloat16' must be one of 'no', 'bf16', 'fp16'"):
        cache_teacher_signals(rows, teacher, Wanted(), tmp_path / "cache", mixed_precision="bfloat16")
    with pytest.raises(ValueError, match="teacher_dtype='bf16' must be one of 'float32', 'bfloat16', 'float16', or"):
        cache_teacher_signals(rows, teacher, Wanted(), tmp_path / "cache", teacher_dtype="bf16")
    for size in (0, -1):  # no batch would run, and whatever was in memory be written
        with pytest.raises(ValueError, match=f"batch_size={size} must be at least 1"):
            cache_teacher_signals(rows, teacher, Wanted(), tmp_path / "cache", batch_size=size)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dataset_like_any_other(tmp_path, make_args, tokenizer, teacher, dtype):
    """It goes to the Hub as Parquet and comes back: bits of vectors, and what describes them, must survive."""
    rows = cache_teacher_signals(make_dataset(24), teacher, WANTED, tmp_path / "cache", dtype=dtype)
    _, expected = train(make_args, rows, tokenizer, **ALL_TERMS)
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    rows.save_to_disk(str(tmp_path / "rows"))
    read = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path))
    for found in (read, load_from_disk(str(tmp_path / "rows")), rows.map(lambda row: {"is_new": True})):
        assert found.features["teacher_signals"] == rows.features["teacher_signals"]
        assert train(make_args, found, tokenizer, **ALL_TERMS)[1] == expected
    # The card of a pushed dataset names the features in YAML.
    card = rows.info.features._to_yaml_list()
    assert type(rows.features)._from_yaml_list(json.loads(json.dumps(card))) == rows.features


def test_pushed_and_loaded_by_its_name(tmp_path, make_args, tokenizer, teacher):
    """Somebody else would train on other numbers than the cache holds, or need a teacher after all. The card has to
    say the same features of all splits, and names them in public: a path in them would be too."""
    teacher.save_pretrained(tmp_path / "teacher")
    loaded = type(teacher).from_pretrained(tmp_path / "teacher")
    rows = cache_teacher_signals(make_dataset(24), loaded, WANTED, tmp_path / "cache")
    _, expected = train(make_args, rows, tokenizer, max_steps=1, **ALL_TERMS)
    token = f"hf_{'m' * 34}"
    with HubServer({token: User("me")}) as server, HubClient(server.endpoint, tmp_path / "home") as client:
        client(push_rows, rows, "me/rows", num_shards=2, private=True, login=token)
        client(push_rows, rows.select(range(8)), "me/rows", split="validation", login=token)
        with pytest.raises(ClientError, match="DatasetNotFoundError"):
            client(load_rows, "me/rows")  # before it is in the client's cache
        found = client(load_rows, "me/rows", login=token)
    assert server.unknown == server.tokens_on_cdn == []
    pushed = server.repos["datasets/me/rows"].files()
    assert sorted(pushed) == [
        *("README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"),
        "data/validation-00000-of-00001.parquet",
    ]
    assert not any(os.fsencode(tmp_path) in content for content in pushed.values())
    assert found.features == rows.features and columns_of(found) == columns_of(rows)
    trainer, losses = train(make_args, found, tokenizer, max_steps=1, **ALL_TERMS)
    assert type(trainer.teacher) is CachedTeacher and losses == expected


def test_no_path_of_the_machine(tmp_path, teacher):
    """Pushed with the dataset, a path tells the user's name."""
    teacher.save_pretrained(tmp_path / "someone" / "best-teacher")
    loaded = type(teacher).from_pretrained(tmp_path / "someone" / "best-teacher")
    (tmp_path / "someone").rename(tmp_path / "moved")
    rows = cache_teacher_signals(make_dataset(12), loaded, Wanted(), tmp_path / "cache")
    source = SignalSource.from_json(rows.features["teacher_signals"].names[0])
    assert source.config["_name_or_path"] == "best-teacher"
    assert (source.architecture, source.parameters) == (type(teacher).__name__, teacher.num_parameters())
    for path in (tmp_path / "cache").iterdir():
        assert os.fsencode(tmp_path) not in path.read_bytes()
    loaded.config._name_or_path = "org/name"
    assert cache._portable_config(loaded.config)["_name_or_path"] == "org/name"


def be_killed_at(number):
    """Kill this process where it has written that many shards, and not yet renamed the last one."""
    written = []
    original = shards.file_hash

    def file_hash(path):
        written.append(path)
        if len(written) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path)

    shards.file_hash = file_hash


def make_and_be_killed(rows, teacher, folder):
    torch.set_num_threads(1)
    be_killed_at(4)
    cache_teacher_signals(rows, teacher, WANTED, folder, batch_size=8)


def times(folder):
    """When each file of a finished shard was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*") if path.suffix != ".tmp"}


def test_killed_and_started_again(tmp_path, teacher, small_shards):
    """What was made before a kill is kept, what was being made is not read, and no file is left behind."""
    rows, folder = make_dataset(40), tmp_path / "cache"
    process = start(make_and_be_killed, rows, teacher, folder)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*.json")}
    (leftover,) = folder.glob("shard-*.tmp")
    assert len(kept) == 3
    os.utime(leftover, (0, 0))

    forwards = Forwards(teacher)
    found = cache_teacher_signals(rows, teacher, WANTED, folder, batch_size=8)
    assert forwards.number == 2 and not list(folder.glob("*.tmp"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = cache_teacher_signals(rows, teacher, WANTED, tmp_path / "whole", batch_size=8)
    assert columns_of(found) == columns_of(whole)


def make_as_rank(rank, port, rows, teacher, folder, killed):
    """One of two processes, which finds another licence than the other."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()}, ACCELERATE_USE_CPU="true")
    PartialState._reset_state()
    cache.identify = lambda config: {"license": f"of rank {rank}"}
    if rank == killed:
        be_killed_at(2)
    forwards = Forwards(teacher)
    found = cache_teacher_signals(rows, teacher, WANTED, folder, batch_size=8, device="cpu")
    names = found.features["teacher_signals"].names
    (folder / f"rank_{rank}").write_text(json.dumps([forwards.number, names, columns_of(found)]))
    torch.distributed.destroy_process_group()


def make_in_two(rows, teacher, folder, killed=None):
    """The exit codes of both, of which one may be killed at its second shard."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(make_as_rank, rank, port, rows, teacher, folder, killed) for rank in range(2)]
    for process in processes:
        process.join(60)
        process.kill()
    return [process.exitcode for process in processes]


def assert_same_shards(found, expected):
    assert [path.name for path in found] == [path.name for path in expected]
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in expected]


@pytest.mark.distributed
def test_two_processes_make_what_one_does(tmp_path, teacher, small_shards, monkeypatch):
    """Each process makes shards of its own: rows of one must not end beside the columns of another's, and both name
    one teacher. Training on it in two processes is a recipe's test."""
    rows = make_dataset(36)
    monkeypatch.setattr(cache, "identify", lambda config: {"license": "of rank 0"})
    expected = cache_teacher_signals(rows, teacher, WANTED, tmp_path / "one", batch_size=8)
    assert make_in_two(rows, teacher, tmp_path / "two") == [0, 0]
    assert len(files(tmp_path / "one")) == 5
    assert_same_shards(files(tmp_path / "two"), files(tmp_path / "one"))
    for rank, made in enumerate([3, 2]):
        found = json.loads((tmp_path / "two" / f"rank_{rank}").read_text())
        assert found == [made, expected.features["teacher_signals"].names, columns_of(expected)]


@pytest.mark.distributed
def test_one_of_two_processes_is_killed(tmp_path, teacher, small_shards, monkeypatch):
    """The other would wait for it as long as a machine is paid for; and what both had finished is kept, whoever goes
    on: as many processes as before, or one."""
    rows = make_dataset(36)
    monkeypatch.setattr(cache, "identify", lambda config: {"license": "of rank 0"})
    expected = cache_teacher_signals(rows, teacher, WANTED, tmp_path / "undisturbed", batch_size=8)
    assert make_in_two(rows, teacher, tmp_path / "two", killed=1) == [1, -signal.SIGKILL]
    kept = times(tmp_path / "two")
    assert sorted(kept) == [f"shard-0000{index}-of-00005.{kind}" for index in range(3) for kind in ("arrow", "json")]
    shutil.copytree(tmp_path / "two", tmp_path / "one")

    assert make_in_two(rows, teacher, tmp_path / "two") == [0, 0]
    for rank in range(2):
        made, _, columns = json.loads((tmp_path / "two" / f"rank_{rank}").read_text())
        assert made == 1 and columns == columns_of(expected)
    forwards = Forwards(teacher)
    alone = cache_teacher_signals(rows, teacher, WANTED, tmp_path / "one", batch_size=8)
    assert forwards.number == 2 and columns_of(alone) == columns_of(expected)
    for name in ("two", "one"):
        assert_same_shards(files(tmp_path / name), files(tmp_path / "undisturbed"))
        assert kept.items() <= times(tmp_path / name).items()


def test_sequential_reading_keeps_the_order(tmp_path, make_args, tokenizer, teacher):
    """Prediction reads the rows as they are: in another order, answers belong to other rows."""
    rows = cache_teacher_signals(make_dataset(12), teacher, Wanted(), tmp_path / "cache")
    trainer, _ = train(make_args, rows, tokenizer)
    assert isinstance(trainer._get_eval_sampler(rows), SequentialSampler)
    assert trainer.predict(rows).label_ids.tolist() == rows["labels"][:]
