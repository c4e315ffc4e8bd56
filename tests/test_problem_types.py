"""Every problem from end to end: the student learns what the teacher says, and all else is as with `Trainer`."""

import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import copy_of, make_model, make_rows, weights
from datasets import ClassLabel, Dataset, Features, Sequence
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_kd import DistillationTrainer, DistillationTrainingArguments, student_from_teacher
from hf_kd.results import read_results
from hf_kd.signals import problem_of
from hf_kd.signals.problem import PROBLEM_TYPES
from hf_kd.signals.teacher import load_teacher


ONLY_TASK = {"task_loss_weight": 1.0, "logit_loss_weight": 0.0}
ONLY_TEACHER = {"task_loss_weight": 0.0, "logit_loss_weight": 1.0}
LABEL_COLUMNS = ("labels", "start_positions", "end_positions")
PADDING = -1e4


def make_problem_rows(problem: str, num_rows: int = 512, seed: int = 0) -> list[dict]:
    """Rows whose labels are drawn at random: nothing can be learned from them."""
    rng, rows = random.Random(seed), []
    for row in make_rows(num_rows, seed, lengths=(3, 10)):
        length = len(row["input_ids"])
        del row["labels"]
        if problem == "question_answering":
            # One in eight has no answer within the text.
            start = rng.randrange(length) if rng.random() < 0.875 else 1000
            row |= {
                "start_positions": start,
                "end_positions": start if start == 1000 else rng.randrange(start, length),
            }
        elif problem == "token_classification":
            row["labels"] = [-100, *(rng.choice([0, 1, 2, -100]) for _ in range(length - 2)), -100]
        elif problem == "multi_label_classification":
            row["labels"] = [float(rng.random() < 0.5) for _ in range(3)]
        elif problem == "regression":
            row["labels"] = rng.uniform(-1.0, 1.0)
        elif problem == "single_label_classification":
            row["labels"] = rng.randrange(2)
        rows.append(row)
    return rows


def make_problem_dataset(problem: str, **kwargs) -> Dataset:
    return Dataset.from_list(make_problem_rows(problem, **kwargs))


def collator_for(problem: str, tokenizer):
    """The collator that the examples of transformers use for the problem."""
    if problem == "token_classification":
        return DataCollatorForTokenClassification(tokenizer)
    if problem == "masked_lm":
        return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    return DataCollatorWithPadding(tokenizer)


def head_of(model) -> nn.Module:
    """The layer whose weights decide how far the answers to different texts differ."""
    if hasattr(model, "cls"):
        return model.cls.predictions.transform.LayerNorm  # the layer after it is tied to the embeddings
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def without_labels(batch) -> dict[str, Tensor]:
    return {name: column for name, column in batch.items() if name not in LABEL_COLUMNS}


def answers(problem: str, model, batch) -> Tensor:
    """What the model says about each item of a batch, as rows of logits."""
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        outputs = model.eval()(**without_labels(batch))
    if problem == "question_answering":
        both = torch.cat([outputs.start_logits, outputs.end_logits])
        return both.masked_fill(~mask.repeat(2, 1), PADDING)
    if problem == "masked_lm":
        return outputs.logits[batch["labels"] != -100]
    return outputs.logits[mask] if problem == "token_classification" else outputs.logits


def make_teacher(problem: str, tokenizer):
    """A teacher whose answers differ from text to text, by about 3 logits, and lean to no class. It attends to all
    tokens alike, so that few steps are enough to learn from it."""
    teacher = make_model(problem=problem, seed=1, num_hidden_layers=2)
    for block in teacher.bert.encoder.layer:
        nn.init.zeros_(block.attention.self.query.weight)
    head = head_of(teacher)
    logits = answers(problem, teacher, held_out(problem, tokenizer))
    existing = logits > PADDING
    scale = 3.0 / logits[existing].std() if existing.logical_not().any() else 3.0 / logits.std(dim=0).mean()
    with torch.no_grad():
        if problem not in ("question_answering", "masked_lm"):
            head.bias.copy_((head.bias - logits.mean(dim=0)) * scale)
        head.weight.mul_(scale)
    return teacher


def make_student(problem: str, teacher):
    """A layer of the teacher under a head that says the same about every text."""
    student = student_from_teacher(teacher, num_layers=1)
    head = head_of(student)
    with torch.no_grad():
        head.weight.zero_(), head.bias.zero_()
    return student


def held_out(problem: str, tokenizer) -> dict[str, Tensor]:
    set_seed(0)  # DataCollatorForLanguageModeling masks at random
    return dict(collator_for(problem, tokenizer)(make_problem_rows(problem, 64, seed=99)))


def divergence(problem: str, student, teacher, batch) -> float:
    """How far the student's answers are from the teacher's; regression: mean squared error."""
    s, t = answers(problem, student, batch), answers(problem, teacher, batch)
    if problem == "regression":
        return (s - t).square().mean().item()
    if problem == "multi_label_classification":
        s, t = (torch.stack([torch.zeros_like(z), z], dim=-1) for z in (s, t))
    log_s, log_t = s.log_softmax(dim=-1), t.log_softmax(dim=-1)
    return (log_t.exp() * (log_t - log_s)).sum(dim=-1).mean().item()


def train(problem, student, teacher, args, tokenizer, data=None, trainer_class=DistillationTrainer, **kwargs):
    """Train a copy of the student."""
    if trainer_class is DistillationTrainer:
        kwargs["teacher_model"] = teacher
    trainer = trainer_class(
        copy_of(student),
        args,
        train_dataset=make_problem_dataset(problem) if data is None else data,
        data_collator=collator_for(problem, tokenizer),
        **kwargs,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_student_learns_the_answers_of_the_teacher(problem, tokenizer, make_args):
    """A loss over the wrong axis or tokens falls too; held-out texts show whether the answers came across. The same
    training without the teacher shows that they came from it."""
    teacher = make_teacher(problem, tokenizer)
    student, batch = make_student(problem, teacher), held_out(problem, tokenizer)
    before = divergence(problem, student, teacher, batch)
    steps = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 5e-3, "logging_steps": 60}
    after = {}
    for name, terms in {"distilled": ONLY_TEACHER, "trained on labels": ONLY_TASK}.items():
        trainer = train(problem, student, teacher, make_args(**steps, **terms), tokenizer)
        after[name] = divergence(problem, trainer.model, teacher, batch)
    assert after["distilled"] < 0.5 * before
    assert after["trained on labels"] > 0.9 * before


@pytest.mark.parametrize("problem", ["token_classification", "question_answering"])
def test_text_without_any_label_teaches(problem, tokenizer, make_args):
    """Distilling unlabelled text is what people want most, and the collators leave no label then, or -100."""
    teacher = make_teacher(problem, tokenizer)
    student, rows = make_student(problem, teacher), make_problem_rows(problem, 32)
    no_labels = [{name: value for name, value in row.items() if name not in LABEL_COLUMNS} for row in rows]
    if problem == "token_classification":
        unlabeled = [{**row, "labels": [-100] * len(row["input_ids"])} for row in no_labels]
    else:
        unlabeled = [{**row, "start_positions": -100, "end_positions": -100} for row in no_labels]
    results = []
    for data, terms in ((no_labels, ONLY_TEACHER), (unlabeled, ONLY_TEACHER), (unlabeled, {"logit_loss_weight": 1.0})):
        trainer = train(problem, student, teacher, make_args(**terms), tokenizer, Dataset.from_list(data))
        results.append(weights(trainer.model))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], weights(student))


class WeightsByStep(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))


@pytest.mark.parametrize(
    ("problem", "label_smoothing"),
    [
        *((problem, 0.0) for problem in PROBLEM_TYPES),
        *((problem, 0.1) for problem in ("single_label_classification", "token_classification", "masked_lm")),
    ],
)
def test_drop_in_for_trainer(problem, label_smoothing, tokenizer, make_args):
    """With the task term alone, any difference to `Trainer` in any step would be a change of somebody's baseline."""
    # Adam divides by the gradient's own size and so magnifies rounding; SGD keeps equal gradients equal.
    changes = {"label_smoothing_factor": label_smoothing, "optim": "sgd", "learning_rate": 0.05}
    student = make_model(problem=problem, seed=2, num_hidden_layers=2)
    records = []
    for trainer_class, args in (
        (Trainer, make_args(TrainingArguments, **changes)),
        (DistillationTrainer, make_args(**ONLY_TASK, **changes)),
    ):
        records.append(WeightsByStep())
        train(problem, student, None, args, tokenizer, trainer_class=trainer_class, callbacks=[records[-1]])
    assert len(records[0].weights) == len(records[1].weights) == 4
    for step, (reference, mine) in enumerate(zip(records[0].weights, records[1].weights, strict=True)):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6, msg=f"step {step}")


def mean_prediction(evaluated) -> dict[str, float]:
    """A metric of everything that `compute_metrics` is given, padding and missing labels included."""
    predictions, labels = (x if isinstance(x, tuple) else (x,) for x in (evaluated.predictions, evaluated.label_ids))
    return {
        **{f"prediction_{i}": float(np.mean(x)) for i, x in enumerate(predictions)},
        **{f"label_{i}": float(np.mean(x)) for i, x in enumerate(labels)},
    }


@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_evaluation_is_that_of_trainer(problem, tokenizer, make_args):
    """Scores are compared between students and baselines, which other trainers measured."""
    model, data = make_model(problem=problem), make_problem_dataset(problem, num_rows=20)
    found = []
    for trainer_class, teacher in (
        (Trainer, {}),
        (DistillationTrainer, {"teacher_model": make_model(problem=problem)}),
    ):
        trainer = trainer_class(
            copy_of(model),
            make_args(TrainingArguments if trainer_class is Trainer else DistillationTrainingArguments),
            eval_dataset=data,
            data_collator=collator_for(problem, tokenizer),
            compute_metrics=mean_prediction,
            **teacher,
        )
        set_seed(3)
        metrics = trainer.evaluate()
        set_seed(3)
        output = trainer.predict(data)
        assert output.metrics["test_loss"] == pytest.approx(metrics["eval_loss"])
        found.append((metrics, output))
    (reference, expected), (metrics, output) = found
    scores = [name for name in reference if not name.endswith(("_runtime", "_per_second", "_time", "epoch"))]
    num_columns = 2 if problem == "question_answering" else 1
    assert len(scores) == 1 + 2 * num_columns
    assert {name: metrics[name] for name in scores} == {name: reference[name] for name in scores}
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (expected[0], output[0])), strict=True):
        np.testing.assert_array_equal(one, other)


def test_tags_in_another_order_are_aligned(tokenizer, make_args):
    """The student would learn PER where the teacher says LOC, token by token, with a loss that falls as usual."""
    problem, names = "token_classification", ["O", "PER", "LOC"]
    teacher = make_teacher(problem, tokenizer)
    teacher.config.id2label = dict(enumerate(names))
    student = make_student(problem, teacher)
    reordered, order = copy_of(teacher), [2, 0, 1]
    reordered.config.id2label = {index: names[old] for index, old in enumerate(order)}
    with torch.no_grad():
        for parameter in reordered.classifier.parameters():
            parameter.copy_(parameter[order])
    results = [train(problem, student, t, make_args(**ONLY_TEACHER), tokenizer) for t in (teacher, reordered)]
    torch.testing.assert_close(*[weights(trainer.model) for trainer in results], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("problem", "other"), [("token_classification", "masked_lm"), ("regression", "question_answering")]
)
def test_refuses_a_teacher_of_another_problem(problem, other, make_args):
    """Logits of one shape by chance would be compared."""
    with pytest.raises(ValueError, match=f"solves {other}.* {problem}; load both with the same Auto class"):
        DistillationTrainer(make_model(problem=problem), make_args(), teacher_model=make_model(problem=other))


# The recipes


ROOT = Path(__file__).parent.parent
RECIPES = {  # problem -> recipe, names of the labels, metrics
    "token_classification": ("token_classification", ["O", "B-PER", "I-PER"], {"accuracy", "word_f1"}),
    "question_answering": ("question_answering", None, {"start_accuracy", "end_accuracy", "exact_position"}),
    "masked_lm": ("masked_lm", None, {"accuracy"}),
    "multi_label_classification": ("multi_label", ["joy", "anger", "fear"], {"micro_f1", "macro_f1"}),
}
QUICK = ["--max_steps", "3", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--save_strategy", "no"]
QUICK += ["--disable_tqdm", "true", "--use_cpu", "true", "--bf16", "false", "--max_seq_length", "24"]


def make_line(problem: str, rng: random.Random) -> dict:
    """A line of a user's own file."""
    words = [f"w{rng.randrange(59)}" for _ in range(rng.randint(4, 40 if problem == "question_answering" else 12))]
    text = " ".join(words)
    if problem == "token_classification":
        return {"tokens": words, "ner_tags": [rng.choice(["O", "B-PER", "I-PER"]) for _ in words]}
    if problem == "multi_label_classification":
        return {"text": text, "labels": rng.sample(["fear", "anger", "joy"], rng.randint(0, 3))}
    if problem == "question_answering":
        start = rng.randrange(len(words))
        answer = " ".join(words[start : start + rng.randint(1, 3)])
        found = {"text": [answer], "answer_start": [len(" ".join([*words[:start], ""]))]}
        is_there = rng.random() < 0.8
        return {
            "question": " w1 w2?",
            "context": text,
            "answers": found if is_there else {"text": [], "answer_start": []},
        }
    return {"text": text}


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def recipe_run(tmp_path, tokenizer, monkeypatch):
    """Runs the recipe of a problem in this process, as the command line would."""
    monkeypatch.syspath_prepend(ROOT / "recipes" / "problem_types")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(problem, *flags, lines=None, labels=None, replace_distil=None):
        rng, (name, names, _) = random.Random(0), RECIPES[problem]
        changes = {"num_labels": len(names), "id2label": dict(enumerate(names))} if names else {}
        if names:
            changes["label2id"] = {label: index for index, label in enumerate(names)}
        make_model(problem=problem, seed=1, **changes).save_pretrained(tmp_path / "teacher")
        tokenizer.save_pretrained(tmp_path / "teacher")
        for split in ("train", "validation"):
            write_lines(tmp_path / f"{split}.jsonl", lines or [make_line(problem, rng) for _ in range(24)])
        argv = [f"recipes/problem_types/{name}.py", "--teacher_model_name_or_path", tmp_path / "teacher"]
        argv += ["--train_file", tmp_path / "train.jsonl", "--validation_file", tmp_path / "validation.jsonl"]
        monkeypatch.setattr(sys, "argv", [*map(str, argv), "--output_dir", str(tmp_path / "out"), *QUICK, *flags])
        recipe = importlib.import_module(name)
        if replace_distil is not None:
            monkeypatch.setattr(recipe, "distil", replace_distil)
        recipe.main()
        return tmp_path / "out"

    return run


@pytest.mark.parametrize("problem", RECIPES)
def test_recipe(problem, recipe_run, capsys):
    """A recipe that no longer runs is found by the first person who needs it."""
    folder = recipe_run(problem, "--doc_stride=4") if problem == "question_answering" else recipe_run(problem)
    teacher, student = read_results(folder / "results.json")["rows"]
    assert (teacher["role"], student["role"]) == ("teacher", "student")
    assert (
        set(student["metrics"]["validation"])
        == {"loss"} | RECIPES[problem][2]
        == set(teacher["metrics"]["validation"])
    )
    assert f"| {problem} | student distilled | {student['main_metric']['name']} |" in capsys.readouterr().out
    loaded = load_teacher(folder)
    assert problem_of(loaded) == problem and loaded.config.num_hidden_layers == 2 == student["layers"]
    assert AutoTokenizer.from_pretrained(folder).get_vocab()


@pytest.mark.parametrize("problem", RECIPES)
def test_recipe_measures_teacher_and_student_alike(problem, recipe_run):
    """A student of all layers that learns nothing is its teacher: other masks or labels would compare apples and
    pears."""
    stride = ["--doc_stride=4"] if problem == "question_answering" else []
    folder = recipe_run(problem, "--student_num_layers=4", "--learning_rate=0.0", *stride)
    teacher, student = read_results(folder / "results.json")["rows"]
    assert student["metrics"]["validation"] == pytest.approx(teacher["metrics"]["validation"], rel=1e-5)


def read_rows(recipe_run, problem, lines, *flags):
    """The rows that a recipe makes of the lines of a file."""
    found = {}
    recipe_run(
        problem,
        *flags,
        lines=lines,
        replace_distil=lambda models, data, *args, **kwargs: found.update(rows=list(data["train"])),
    )
    return found["rows"]


def test_recipe_labels_the_first_piece_of_a_word(recipe_run, tokenizer):
    """Shifted labels are learned as well as the right ones; those of unknown rows would be learned as a class."""
    lines = [
        {"tokens": ["w1", "w2-w3", "w4"], "ner_tags": ["O", "I-PER", "B-PER"]},
        {"tokens": ["w1", "w2"], "ner_tags": []},
    ]
    first, second = read_rows(recipe_run, "token_classification", lines)
    assert tokenizer.convert_ids_to_tokens(first["input_ids"]) == ["[CLS]", "w1", "w2", "[UNK]", "w3", "w4", "[SEP]"]
    assert first["labels"] == [-100, 0, 2, -100, -100, 1, -100]
    assert second["labels"] == [-100] * 4


def test_recipe_finds_the_answer_in_the_parts_of_a_text(recipe_run, tokenizer):
    """One position off, or an answer outside of its part, teaches to answer wrong."""
    words = [f"w{index}" for index in range(40)]
    line = {"question": "w50?", "context": " ".join(words)}
    start = line["context"].index("w20")
    answered = line | {"answers": {"text": ["w20 w21"], "answer_start": [start]}}
    unanswered = line | {"answers": {"text": [], "answer_start": []}}
    rows = read_rows(recipe_run, "question_answering", [answered, unanswered], "--doc_stride=4")
    said = []
    for row in rows:
        tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert len(tokens) <= 24 and tokens[:4] == ["[CLS]", "w50", "[UNK]", "[SEP]"]
        said.append(tokens[row["start_positions"] : row["end_positions"] + 1])
        assert (said[-1] == ["[CLS]"]) != ({"w20", "w21"} <= set(tokens) and len(said) <= len(rows) / 2)
    assert said.count(["w20", "w21"]) == 1 and said.count(["[CLS]"]) == len(rows) - 1


def test_recipe_joins_texts_for_masking(recipe_run):
    """Short texts padded to full length, or long ones cut, waste most of what is read."""
    lines = [{"text": " ".join(["w1"] * 17)}, {"text": "  "}, {"text": " ".join(["w2"] * 11)}]
    rows = read_rows(recipe_run, "masked_lm", lines)
    assert [row["input_ids"] for row in rows] == [[2, *[6] * 17, 3, 2, *[7] * 4], [*[7] * 7, 3]]
    assert all(row["attention_mask"] == [1] * len(row["input_ids"]) for row in rows)


def test_recipe_reads_labels_by_the_names_of_the_teacher(recipe_run):
    """Taken by its own order, the data's "fear" would be the teacher's "joy"."""
    lines = [{"text": "w1", "labels": ["fear", "joy"]}, {"text": "w2", "labels": []}]
    rows = read_rows(recipe_run, "multi_label_classification", lines)
    assert [row["labels"] for row in rows] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="has the labels \\['hope'\\], the teacher \\['joy', 'anger', 'fear'\\]"):
        read_rows(recipe_run, "multi_label_classification", [{"text": "w1", "labels": ["hope"]}])


def test_recipe_reads_numbers_by_the_names_of_the_data(recipe_run, monkeypatch):
    """Data from the Hub comes as numbers with names of their own order."""
    monkeypatch.syspath_prepend(ROOT / "recipes" / "problem_types")
    setup = importlib.import_module("problem_setup")
    model = make_model(
        problem="token_classification", id2label={0: "O", 1: "B", 2: "I"}, label2id={"O": 0, "B": 1, "I": 2}
    )
    tags = Dataset.from_dict({"tags": [[0, 1, 2]]})
    assert setup.teacher_labels({"train": tags}, "tags", model)([0, 1, 2]) == [0, 1, 2]
    named = tags.cast(Features({"tags": Sequence(ClassLabel(names=["B", "I", "O"]))}))
    assert setup.teacher_labels({"train": named}, "tags", model)([0, 1, 2]) == [1, 2, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lines": [{"words": ["w1"]}]}, r"lacks the columns \['ner_tags', 'tokens'\]"),
        ({"flags": ["--validation_file="]}, "needs both files"),
    ],
)
def test_recipe_says_what_is_wrong_with_the_files(change, message, recipe_run):
    """A KeyError from a map over rows tells nobody which file to change."""
    with pytest.raises(ValueError, match=message):
        recipe_run("token_classification", *change.get("flags", []), lines=change.get("lines"))


def test_recipe_refuses_a_teacher_of_another_problem(recipe_run, tmp_path, tokenizer):
    """Found before the data is prepared, and not by a shape that does not fit."""
    other = tmp_path / "other"
    make_model(problem="masked_lm").save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="BertForMaskedLM for masked_lm; this needs token_classification"):
        recipe_run("token_classification", "--teacher_model_name_or_path", str(other))
