"""A student and a teacher that read the same texts in tokens of their own."""

import json
import random

import pytest
import torch
from conftest import VOCAB, copy_of, make_model, weights
from datasets import Dataset
from test_bad_input import assert_refused
from test_recipes import NAMES, QUICK, glue_dir, run, save_model  # noqa: F401, a fixture
from test_trainer import Record
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, DataCollatorWithPadding, RobertaTokenizerFast, Trainer, TrainingArguments

from hf_kd import CustomTerm, DistillationCollator, DistillationObjective, DistillationTrainer
from hf_kd.results import read_results


OF_ROWS = {
    "hidden_loss_weight": 0.5,
    "hidden_loss_type": "pkd",
    "relation_loss_weight": 0.5,
    "relation_loss_type": "similarity",
}


@pytest.fixture(scope="module")
def teacher_tokenizer(tmp_path_factory):
    """A byte-level BPE tokenizer with RoBERTa's special tokens and one merge."""
    folder = tmp_path_factory.mktemp("teacher_tokenizer")
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet()), "Ġw"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nĠ w\n", encoding="utf-8")
    return RobertaTokenizerFast.from_pretrained(folder, model_max_length=64)


def make_teacher(teacher_tokenizer, seed=1, **changes):
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return make_model("roberta", seed, vocab_size=len(teacher_tokenizer), **special, **changes)


@pytest.fixture
def roberta(teacher_tokenizer):
    """A teacher of another family, vocabulary, depth, width and number of heads."""
    return make_teacher(teacher_tokenizer, hidden_size=24, num_attention_heads=2, num_hidden_layers=3)


@pytest.fixture
def collator(tokenizer, teacher_tokenizer):
    return DistillationCollator(tokenizer, teacher_tokenizer, ["sentence"])


@pytest.fixture
def rows(tokenizer):
    """Sixteen rows in the student's tokens, with their texts."""
    return make_texts(tokenizer)


def make_texts(tokenizer, columns=("sentence",), num_rows=16):
    rng = random.Random(0)
    rows = []
    for index in range(num_rows):
        texts = {name: " ".join(f"w{rng.randrange(59)}" for _ in range(rng.randint(1, 9))) for name in columns}
        rows.append({**tokenizer(*texts.values()), **texts, "labels": index % 2})
    return Dataset.from_list(rows)


def make_student(family="bert", **changes):
    return make_model(family, seed=2, num_hidden_layers=2, **changes)


def make_trainer(student, teacher, args, collator, rows, **kwargs):
    return DistillationTrainer(
        student, args, teacher_model=teacher, data_collator=collator, train_dataset=rows, **kwargs
    )


def test_vocabularies_are_of_different_sizes(tokenizer, teacher_tokenizer):
    """With tokenizers of one size, a mix-up of the two would go unnoticed below."""
    assert len(tokenizer) == len(VOCAB) == 64 and len(teacher_tokenizer) == 262
    assert teacher_tokenizer.tokenize(" w1 w23") == ["Ġw", "1", "Ġw", "2", "3"]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_student_moves_towards_a_teacher_of_other_tokens(
    family, roberta, collator, rows, teacher_tokenizer, make_args
):
    """Rows of student and teacher that are not of the same text would be learned just as well, and worth nothing."""
    student, seen = make_student(family), []
    roberta.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    args = make_args(max_steps=80, learning_rate=3e-3, task_loss_weight=0.0, temperature=1.0, **OF_ROWS)
    record = Record()
    trainer = make_trainer(copy_of(student), roberta, args, collator, rows, callbacks=[record])
    trainer.train()
    assert set(seen[0]) == {"input_ids", "attention_mask"} and seen[0]["input_ids"].max() >= 64
    assert {name: p.shape for name, p in trainer.distillation_objective.named_parameters()} == {
        f"projections.hidden_loss.maps.{layer}.{name}": shape
        for layer in (1, 2)
        for name, shape in (("weight", (24, 32)), ("bias", (24,)))
    }
    for name in ("logit_loss", "hidden_loss", "relation_loss"):
        found = [log[name] for log in record.logs if name in log]
        assert found[-1] < 0.7 * found[0], name
    with torch.no_grad():
        texts = teacher_tokenizer(rows["sentence"][:], padding=True, return_tensors="pt")
        expected = roberta(**texts).logits.softmax(-1)
        batch = collator.tokenizer(rows["sentence"][:], padding=True, return_tensors="pt")
        batch = {name: batch[name] for name in ("input_ids", "attention_mask")}  # one segment, as without them
        gap, before = (
            (m(**batch).logits.softmax(-1) - expected).abs().mean() for m in (trainer.model.eval(), student)
        )
    assert gap < 0.5 * before


def test_each_teacher_reads_its_own_text(roberta, collator, rows, teacher_tokenizer, make_args):
    """Two columns of texts in the other order, or the texts of another batch, give other answers."""
    seen = []
    roberta.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    read = []

    def keep(student, teacher, labels):
        read.append(student.logits)
        return student.logits.square().mean()

    pairs = make_texts(collator.tokenizer, ("question", "answer"))
    of_pairs = DistillationCollator(collator.tokenizer, teacher_tokenizer, ["question", "answer"])
    objective = DistillationObjective([CustomTerm(keep, hidden_layers="last")])
    trainer = make_trainer(make_student(), roberta, make_args(max_steps=2), of_pairs, pairs, objective=objective)
    student_saw = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: student_saw.append(kwargs["input_ids"]), with_kwargs=True
    )
    trainer.train()
    texts = {tuple(row["input_ids"]): (row["question"], row["answer"]) for row in pairs}
    for ids, teacher_ids in zip(student_saw, seen, strict=True):
        batch = [texts[tuple(row[row != 0].tolist())] for row in ids]
        expected = teacher_tokenizer(*map(list, zip(*batch, strict=True)), padding=True, return_tensors="pt")
        assert torch.equal(teacher_ids, expected["input_ids"])


def test_several_teachers_of_one_tokenizer(roberta, collator, rows, make_args):
    """Each would look for columns of its own name."""
    args = make_args(optim="sgd", learning_rate=0.05)
    one = make_trainer(make_student(), roberta, args, collator, rows)
    two = make_trainer(make_student(), [roberta, copy_of(roberta)], args, collator, rows)
    for trainer in (one, two):
        trainer.train()
    torch.testing.assert_close(weights(two.model), weights(one.model), rtol=0, atol=1e-5)


def test_accumulation_counts_the_students_rows(roberta, collator, rows, make_args):
    """Counted in the teacher's columns too, a term would be divided by twice its rows."""
    results = []
    for batch_size, steps in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps}
        args = make_args(optim="sgd", learning_rate=0.05, **sizes, hidden_loss_weight=1.0, hidden_loss_type="pkd")
        trainer = make_trainer(make_student(), roberta, args, collator, rows)
        trainer.train()
        results.append(weights(trainer.model))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


# Columns


@pytest.mark.parametrize("columns", [("sentence",), ("question", "answer")])
def test_texts_survive_the_removal_of_columns(roberta, tokenizer, teacher_tokenizer, make_args, columns):
    """`Trainer` drops what the student's forward does not name: the teacher would have nothing to read."""
    rows = make_texts(tokenizer, columns).add_column("note", ["nobody reads this"] * 16)
    collator = DistillationCollator(tokenizer, teacher_tokenizer, columns)
    trainer = make_trainer(make_student(), roberta, make_args(max_steps=1), collator, rows)
    kept = set(trainer._remove_unused_columns(rows).column_names)
    assert kept == {"input_ids", "attention_mask", "token_type_ids", "labels", *columns}
    assert set(next(iter(trainer.get_train_dataloader()))) == {
        *("input_ids", "attention_mask", "token_type_ids", "labels"),
        *("teacher_input_ids", "teacher_attention_mask"),
    }
    trainer.train()


def test_a_batch_without_the_teachers_columns(roberta, collator, rows, make_args):
    """The teacher would be given the student's tokens, or nothing."""
    trainer = make_trainer(make_student(), roberta, make_args(), collator, rows.remove_columns("sentence"))
    before = weights(trainer.model)
    assert_refused(
        trainer.train,
        "the teacher reads the column teacher_input_ids, but the batch has ['attention_mask', 'input_ids'",
        "DistillationCollator(tokenizer, teacher_tokenizer, text_columns=[...])",
        "keep the text columns in the dataset",
    )
    assert trainer.state.global_step == 0 and torch.equal(weights(trainer.model), before)


@pytest.mark.parametrize("has_texts", [True, False])
def test_evaluation_is_that_of_trainer(roberta, collator, rows, make_args, has_texts):
    """The teacher's columns would reach the student, or the teacher run for nothing; texts may be gone there."""
    calls = []
    roberta.register_forward_hook(lambda *args: calls.append(1))
    data = rows if has_texts else rows.remove_columns("sentence")
    student = make_student()
    trainer = make_trainer(student, roberta, make_args(**OF_ROWS), collator, rows)
    metrics, predictions = trainer.evaluate(data), trainer.predict(data).predictions
    assert calls == []
    plain = Trainer(
        copy_of(student), make_args(TrainingArguments), data_collator=DataCollatorWithPadding(collator.tokenizer)
    )
    expected = plain.predict(rows.remove_columns("sentence"))
    assert metrics["eval_loss"] == pytest.approx(expected.metrics["test_loss"], abs=1e-6)
    assert predictions == pytest.approx(expected.predictions, abs=1e-6)


def test_evaluation_during_training(roberta, collator, rows, make_args):
    """The switch between the two kinds of batch happens in every run."""
    args = make_args(eval_strategy="steps", eval_steps=2, **OF_ROWS)
    record = Record()
    trainer = make_trainer(
        make_student("modernbert"), roberta, args, collator, rows, eval_dataset=rows, callbacks=[record]
    )
    trainer.train()
    assert len([log for log in record.logs if "eval_loss" in log]) == 2


# What is refused


@pytest.mark.parametrize(
    "changes",
    [
        *({"hidden_loss_weight": 1.0, "hidden_loss_type": kind} for kind in ("mse", "cosine", "gram", "nst")),
        {"attention_loss_weight": 1.0},
        *({"relation_loss_weight": 1.0, "relation_loss_type": kind} for kind in ("minilm_v2", "minilm_v1")),
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_terms_between_tokens(tokenizer, teacher_tokenizer, collator, rows, make_args, changes):
    """Two texts of equal length in tokens would be compared token by token, one with another."""
    teacher = make_teacher(teacher_tokenizer)
    assert_refused(
        lambda: make_trainer(make_student(), teacher, make_args(**changes), collator, rows),
        "compares token by token, but student and teacher have tokenizers of their own",
        "hidden_loss_type='pkd'",
    )


def test_a_plain_collator(roberta, tokenizer, rows, make_args):
    """The teacher would read the student's ids as tokens of its own."""
    assert_refused(
        lambda: make_trainer(make_student(), roberta, make_args(), DataCollatorWithPadding(tokenizer), rows),
        "the student (bert) has a vocabulary of 64 tokens, the teacher (roberta) one of 262",
        "DistillationCollator(tokenizer, teacher_tokenizer, text_columns=[...])",
    )


def test_a_collator_with_another_tokenizer_than_the_teachers(
    roberta, tokenizer, teacher_tokenizer, collator, rows, make_args, tmp_path
):
    """The two tokenizers swapped, or that of another teacher: it would read other words, and answer for those."""
    roberta.save_pretrained(tmp_path / "teacher")
    teacher_tokenizer.save_pretrained(tmp_path / "teacher")
    assert_refused(
        lambda: make_trainer(
            make_student(), tmp_path / "teacher", make_args(), DistillationCollator(tokenizer, tokenizer), rows
        ),
        "the collator's teacher_tokenizer and the tokenizer saved with the teacher give different ids to",
        "DistillationCollator(tokenizer, AutoTokenizer.from_pretrained(teacher))",
    )
    trainer = make_trainer(
        make_student(), tmp_path / "teacher", make_args(max_steps=1), collator, rows, processing_class=tokenizer
    )
    trainer.train()


# The recipe


def test_the_recipe(tmp_path, monkeypatch, tokenizer, teacher_tokenizer, roberta, glue_dir):  # noqa: F811
    """The student would be saved with the teacher's tokenizer, or be evaluated on its tokens."""
    roberta.config.id2label, roberta.config.label2id = NAMES["id2label"], NAMES["label2id"]
    roberta.save_pretrained(tmp_path / "teacher")
    teacher_tokenizer.save_pretrained(tmp_path / "teacher")
    student = save_model(tmp_path / "base", tokenizer, seed=2, num_hidden_layers=2)
    flags = ["--task_name", "sst2", "--glue_dir", glue_dir, "--teacher_model_name_or_path", tmp_path / "teacher"]
    flags += ["--student_model_name_or_path", student, "--output_dir", tmp_path / "out", *QUICK]
    flags += ["--hidden_loss_weight", 1, "--hidden_loss_type", "pkd", "--relation_loss_weight", 1]
    flags += ["--relation_loss_type", "similarity", "--run_baseline"]
    run(monkeypatch, "glue_distill", *flags, "--separate_tokenizers")
    rows = read_results(tmp_path / "out" / "results.json")["rows"]
    assert [row["role"] for row in rows] == ["teacher", "baseline", "student"]
    assert rows[2]["weights"] == {"task_loss": 0.5, "logit_loss": 0.5, "hidden_loss": 1.0, "relation_loss": 1.0}
    for folder in (tmp_path / "out", tmp_path / "out" / "baseline"):
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


def test_the_recipe_without_the_flag(tmp_path, monkeypatch, tokenizer, teacher_tokenizer, roberta, glue_dir):  # noqa: F811
    """Two tokenizers without a word on them are a mistake, found before any data are read."""
    roberta.config.id2label, roberta.config.label2id = NAMES["id2label"], NAMES["label2id"]
    roberta.save_pretrained(tmp_path / "teacher")
    teacher_tokenizer.save_pretrained(tmp_path / "teacher")
    student = save_model(tmp_path / "base", tokenizer, seed=2, num_hidden_layers=2)
    flags = ["--task_name", "sst2", "--glue_dir", glue_dir, "--teacher_model_name_or_path", tmp_path / "teacher"]
    flags += ["--output_dir", tmp_path / "out", *QUICK]
    assert_refused(
        lambda: run(monkeypatch, "glue_distill", *flags, "--student_model_name_or_path", student),
        "student and teacher give different ids to",
    )
    assert_refused(
        lambda: run(monkeypatch, "glue_distill", *flags, "--separate_tokenizers"),
        "separate_tokenizers is for a student with a tokenizer of its own",
        "--student_model_name_or_path",
    )
