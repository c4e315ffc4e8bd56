"""Model cards: whole ones against golden files (UPDATE_GOLDEN=1 writes them), and every snippet of every card run."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
from functools import cache
from html import unescape
from pathlib import Path
from typing import get_args

import pytest
import transformers
from conftest import make_dataset, make_model
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from test_recipes import NAMES, QUICK, run, save_model, write_rows
from transformers import AutoModelForSequenceClassification, BertTokenizerFast, DataCollatorWithPadding

from hf_kd import (
    AttentionTerm,
    CustomTerm,
    DistillationObjective,
    DistillationTrainer,
    DistillationTrainingArguments,
    HiddenTerm,
    LogitTerm,
    RelationTerm,
    TaskTerm,
    cache_teacher_signals,
    student_from_teacher,
)
from hf_kd.compat import length_grouping
from hf_kd.deploy import card_text
from hf_kd.deploy.model_card import MARKER, StudentCard, write_model_card
from hf_kd.deploy.references import PAPERS
from hf_kd.objective.terms import AttentionLossType, HiddenLossType, LogitLossType, RelationLossType
from hf_kd.results import read_results, write_results
from hf_kd.signals import Wanted


GOLDEN = Path(__file__).parent / "golden"
MODEL_CARDS = Path(__file__).parents[2] / "model_cards"
COMMIT = "3f" * 20
HAS_OPTIMUM = importlib.util.find_spec("optimum") is not None
RUN = {"versions": {"python": "3.11.0", "hf-kd": "0.1.0", "transformers": "5.0.0"}, "hardware": "8 x a CPU"}


def assert_golden(name, text):
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def rewrite(folder, **changes):
    """The card again, with other sections of results.json."""
    path = folder / "results.json"
    write_results(path, **{**read_results(path), "run": RUN, **changes})
    return write_model_card(folder).read_text(encoding="utf-8")


def fixed_metrics(rows):
    """What differs between machines and versions: the figures of a training."""
    values = {("teacher", 0): 0.9, ("teacher", 1): 0.88, ("baseline", None): 0.8, ("student", None): 0.85}
    found = [values[row["role"], row.get("teacher")] for row in rows]
    return [
        {**row, "metrics": {"validation": {"loss": 0.5, "accuracy": value}}}
        for row, value in zip(rows, found, strict=True)
    ]


def section(text, heading):
    return text.partition(f"## {heading}\n")[2].partition("\n## ")[0]


# A whole run: two teachers, unlabelled and augmented rows, schedules, two interruptions


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, tokenizer):
    """What `glue_distill.py` leaves after it was interrupted twice; not to be written into."""
    tmp_path = tmp_path_factory.mktemp("run")
    repository = tmp_path / "hub" / "models--acme--bert-sst2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    on_hub = save_model(repository / "snapshots" / COMMIT, tokenizer, seed=1, **NAMES)
    (on_hub / "README.md").write_text("---\nlicense: mit\nlanguage: en\nbase_model: acme/bert\n---\n# It\n")
    local = save_model(tmp_path / "second-teacher", tokenizer, seed=3, **NAMES)
    (local / "README.md").write_text("---\nlicense: mit\n---\n# It\n")
    for split, seed in (("train", 0), ("dev", 1)):
        write_rows(tmp_path / "glue" / "SST-2" / f"{split}.tsv", ["sentence", "label"], seed=seed)
    unlabeled = write_rows(tmp_path / "unlabeled.csv", ["text"], labels=())
    output = tmp_path / "sst2-student"
    quick = [*QUICK, *("--max_steps", 6, "--save_strategy", "steps", "--save_steps", 2, "--save_total_limit", 9)]
    off = {"group_by_length": "false", "train_sampling_strategy": "random"}
    (grouping,) = length_grouping()
    flags = [
        *("--task_name", "sst2", "--glue_dir", tmp_path / "glue", "--unlabeled_file", unlabeled, "--augment", 1),
        *("--teacher_model_name_or_path", "acme/bert-sst2", local, "--teacher_weights", 2, 1, "--run_baseline"),
        *("--temperature", 4, "--temperature_schedule", "cosine:1:0.5", "--logit_loss_schedule", "linear:1:0.5"),
        *("--label_smoothing_factor", 0.1, "--weight_decay", 0.01, "--gradient_accumulation_steps", 2, "--seed", 7),
        *(f"--{grouping}", off[grouping], "--resume_from_checkpoint", "true", "--output_dir", output, *quick),
    ]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "hub"), raising=False)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        for step in (3, 5):
            with monkeypatch.context() as killing:
                killing.setattr(DistillationTrainer, "training_step", killed_at(step))
                with pytest.raises(KeyboardInterrupt):
                    run(monkeypatch, "glue_distill", *flags)
            assert not (output / "README.md").exists()
        run(monkeypatch, "glue_distill", *flags)
    return output


def killed_at(step):
    train = DistillationTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    return training_step


@pytest.fixture
def folder(run_folder, tmp_path):
    """A copy, to be changed."""
    return Path(shutil.copytree(run_folder, tmp_path / run_folder.name))


def test_card_of_an_interrupted_run(run_folder, folder):
    """Any sentence of a card could be wrong of such a run, and nobody would measure it again."""
    results = read_results(run_folder / "results.json")
    assert str(run_folder.parent) not in (run_folder / "README.md").read_text()
    assert str(run_folder.parent) not in (run_folder / "results.json").read_text()
    assert [row["role"] for row in results["rows"]] == ["teacher", "teacher", "baseline", "student"]
    augmented = results["distillation"]["data"]["augmented_rows"]
    assert results["distillation"]["data"]["unlabeled_rows"] == 24 + augmented > 24
    assert_golden("interrupted.md", rewrite(folder, rows=fixed_metrics(results["rows"])))


def bench(variant, role, runtime, precision, p50, accuracy):
    cells = [
        {"threads": 1, "batch_size": size, "length": length, "p50_ms": p50 * length / 128, "p95_ms": 2 * p50}
        for size in (1, 8)
        for length in (16, 128)
    ]
    facts = {"variant": variant, "role": role, "runtime": runtime, "precision": precision, "cpu": "AMD EPYC"}
    metrics = {"metrics": {"validation": {"accuracy": accuracy}}, "latency": cells}
    return {**facts, **metrics, "main_metric": {"split": "validation", "name": "accuracy"}}


BENCHMARK = [
    bench("teacher torch fp32", "teacher", "torch", "fp32", 40.0, 0.9),
    bench("student torch fp32", "student", "torch", "fp32", 20.0, 0.85),
    bench("student ONNX fp32", "student", "onnxruntime", "fp32", 10.0, 0.85),
    bench("student ONNX int8", "student", "onnxruntime", "int8", 4.0, 0.845),
]
EXPORT = {
    **{"backend": "optimum (optimum-onnx 0.1.0)", "opset": 18, "max_length": 80, "graph": "rewritten for CPUs"},
    "parity": {"rows": 24, "max_difference": 1.2e-6, "tolerance": 1e-4},
    "quantization": {
        **{"method": "dynamic", "per_channel": True, "reduce_range": False},
        "metric": {"name": "accuracy", "fp32": 0.85, "int8": 0.845, "drop": 0.005, "max_drop": 0.01},
    },
    "cpu": {"model": "AMD EPYC", "architecture": "x86_64", "flags": ["avx512_vnni"], "cores": 2},
}
COMPARISON = {
    **{"task": "sst2", "metric": "accuracy", "rows": 24, "difference": 0.05, "low": 0.012, "high": 0.09},
    **{"confidence": 0.95, "p_value": 0.012, "num_resamples": 2000},
}


def published(folder, **changes):
    """As after export, benchmark, and a merge of three seeds' rows."""
    (folder / "onnx").mkdir()
    for name, size in (("model.onnx", 69_600_000), ("model_quantized.onnx", 17_500_000)):
        with (folder / "onnx" / name).open("wb") as file:
            file.truncate(size)
    (folder / "pareto.png").write_bytes(b"")
    rows = fixed_metrics(read_results(folder / "results.json")["rows"])
    others = []
    for seed, better in ((8, 0.01), (9, -0.01)):
        for row in rows[2:4]:
            accuracy = row["metrics"]["validation"]["accuracy"] + better
            others.append({**row, "seed": seed, "metrics": {"validation": {"loss": 0.5, "accuracy": accuracy}}})
    rows = [*rows[:2], *others, *rows[2:]]
    rows.append({**rows[-1], "role": "int8", "metrics": {"validation": {"accuracy": 0.845}}})
    changes = {"rows": rows, "comparisons": [COMPARISON], "benchmark": BENCHMARK, "export": EXPORT, **changes}
    return rewrite(folder, **changes)


def test_card_of_a_published_student(folder):
    """Figures of another seed, file, or runtime would stand for this student's."""
    write_model_card(folder, repo_id="acme/tiny-sst2", language=["en"])
    assert_golden("published.md", published(folder))


# Use as a library


def train_in_library(tmp_path, tokenizer, name, teachers, evaluates=False, **kwargs):
    student = kwargs.pop("student", None) or student_from_teacher(teachers[0], num_layers=2)
    options = {"output_dir": str(tmp_path / name), "use_cpu": True, "max_steps": 2, "learning_rate": 1e-3}
    options |= {"per_device_train_batch_size": 8, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    options |= kwargs.pop("args", {})
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teachers,
        args=DistillationTrainingArguments(**options),
        train_dataset=kwargs.pop("rows", None) or make_dataset(unlabeled_share=kwargs.pop("unlabeled_share", 0.0)),
        eval_dataset=kwargs.pop("eval_dataset", None) or make_dataset(num_rows=8),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda evaluation: {"accuracy": 0.75},
        **kwargs,
    )
    trainer.train()
    trainer.save_model()
    if evaluates:
        trainer.evaluate()
    trainer.create_model_card()
    return trainer


def without_loss(text):
    """Its digits differ between versions."""
    return re.sub(r"(?<=loss )[0-9.]+", "0.5", text)


def test_card_of_the_shortest_script(tmp_path, tokenizer):
    """Who only trains and saves would get a card of guesses, or of the recipe's words."""
    train_in_library(tmp_path, tokenizer, "minimal", [make_model(seed=1, **NAMES)])
    assert_golden("minimal.md", rewrite(tmp_path / "minimal"))


def gap(student, teacher, labels):
    return (student.logits.amax(-1) - teacher.logits.amax(-1)).square().mean()


def test_card_of_an_objective(tmp_path, tokenizer):
    """Terms of a user's own, windows and layers of one of several teachers would be told as the defaults."""
    wide = make_model("roberta", seed=3, hidden_size=48, num_hidden_layers=6, **NAMES)
    objective = DistillationObjective(
        [
            TaskTerm(0.5),
            LogitTerm(0.9, type="decoupled_kl", temperature=3.0, options={"non_target_weight": 4.0}, teacher=1),
            HiddenTerm(1.0, layers="0:0,2:6", teacher=1, schedule="window:0:0.5"),
            AttentionTerm(1.5, type="kl", teacher=0, head_reduction="mean", schedule="window:0:0.5"),
            RelationTerm(1.0, type="similarity", teacher=0, layers="last"),
            CustomTerm(gap, weight=0.1, hidden_layers="last", teacher=0),
        ]
    )
    teachers = [make_model(seed=1, **NAMES), wide]
    student = student_from_teacher(teachers[0], num_layers=2, hidden_size=16, intermediate_size=32)
    options = {"objective": objective, "student": student, "unlabeled_share": 0.5, "evaluates": True}
    train_in_library(tmp_path, tokenizer, "objective", teachers, **options)
    folder = tmp_path / "objective"
    rows = [{**row, "metrics": {"eval": {"loss": 0.5, "accuracy": 0.75}}} for row in read_rows(folder)]
    assert_golden("objective.md", rewrite(folder, rows=rows))


def test_card_of_soft_labels(tmp_path, tokenizer):
    """A model would be named that nobody ran, or a teacher be thanked that nobody knows."""
    probs = [{"negative": 0.25, "positive": 0.75}] * 24
    rows = make_dataset(unlabeled_share=0.5).add_column("teacher_probs", probs)
    make_model(seed=2, num_hidden_layers=2, **NAMES).save_pretrained(tmp_path / "small-bert")
    (tmp_path / "small-bert" / "README.md").write_text("---\nlicense: mit\nbase_model: acme/small-bert\n---\n# It\n")
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small-bert")
    args = {"eval_teacher_agreement": True}
    evaluated = make_dataset(num_rows=8).add_column("teacher_probs", probs[:8])
    options = {"student": student, "rows": rows, "args": args, "eval_dataset": evaluated, "evaluates": True}
    train_in_library(tmp_path, tokenizer, "out", None, **options)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    text = card.text
    column = "the soft labels in the column `teacher_probs` of the training data"
    assert f"for text classification, distilled from {column} with hf_kd." in text
    assert f"- Teacher: {column}; who or what gave them is not recorded, nor their licence\n" in text
    assert "It started from the checkpoint that its config names, `small-bert`." in text
    assert "the predictions with the soft labels | temperature 2 |" in text
    assert "13 rows without a label, taught by the soft labels" in text
    limits = section(text, "Limits and biases")
    assert "Soft labels are the only ones of 54% of the training rows" in limits
    assert "Agrees with the soft labels in" in limits
    assert "Licence: not stated, as that of the soft labels it was made from is not known." in text
    assert "the teacher" not in text.lower() and "teaches" not in text
    found = card.data.to_dict()
    assert (found["base_model"], found["base_model_relation"]) == ("acme/small-bert", "finetune")
    assert "license" not in found and found["tags"] == ["distillation", "hf_kd", "loss:kl"]


def test_card_of_a_cached_teacher(tmp_path, tokenizer):
    """Where its signals were read from changes nothing of who taught, and how."""
    make_model(seed=1, **NAMES).save_pretrained(tmp_path / "sst2-teacher")
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sst2-teacher")
    rows = cache_teacher_signals(make_dataset(), teacher, Wanted(hidden=frozenset({2, 4})), tmp_path / "cache")
    args = {"hidden_loss_weight": 1.0}
    cards = []
    for name, teachers, options in (("online", [teacher], {}), ("cached", None, {"rows": rows})):
        student = student_from_teacher(teacher, num_layers=2)
        train_in_library(tmp_path, tokenizer, name, teachers, student=student, args=args, **options)
        cards.append(rewrite(tmp_path / name).replace(name, "out"))
    assert "Teacher: `sst2-teacher`, `BertForSequenceClassification`, 4 layers, width 32" in cards[1]
    assert "It started as a copy of layers 2 and 4 of the 4 of the teacher" in cards[1]
    assert cards[0] == cards[1]


def read_rows(folder):
    return read_results(folder / "results.json")["rows"]


def test_arguments_of_create_model_card(tmp_path, tokenizer):
    """`trainer.push_to_hub(license=...)` of a script made for `Trainer` would lose what it says."""
    trainer = train_in_library(tmp_path, tokenizer, "out", [make_model(seed=1, **NAMES)], evaluates=True)
    trainer.create_model_card(
        language="de",
        license="mit",
        tags="reviews",
        model_name="Small one",
        finetuned_from="acme/bert",
        tasks=["text-classification"],
        dataset_tags=["acme/reviews"],
        dataset=["Acme's reviews"],
        dataset_args="clean",
    )
    write_model_card(tmp_path / "out")  # what was given stays
    card = ModelCard.load(tmp_path / "out" / "README.md")
    found = card.data.to_dict()
    expected = {"language": "de", "license": "mit", "base_model": "acme/bert", "datasets": ["acme/reviews"]}
    assert {name: found[name] for name in expected} == expected
    assert found["tags"] == ["distillation", "hf_kd", "reviews", "loss:kl"]
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name, result.dataset_config) == (
        *("acme/reviews", "Acme's reviews", "clean"),
    )
    assert "\n# Small one\n" in card.text


def test_only_the_main_process_writes(tmp_path, tokenizer, monkeypatch):
    """Two processes would write one file at a time."""
    trainer = train_in_library(tmp_path, tokenizer, "out", [make_model(seed=1, **NAMES)])
    (tmp_path / "out" / "README.md").unlink()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_card_problem_warns(tmp_path, tokenizer, monkeypatch):
    """Hours of training would end in a traceback about its README."""
    warnings = []
    monkeypatch.setattr("hf_kd.deploy.model_card.logger.warning", warnings.append)
    (tmp_path / "out" / "results.json").mkdir(parents=True)
    train_in_library(tmp_path, tokenizer, "out", [make_model(seed=1, **NAMES)])
    assert len(warnings) == 1 and "the model card could not be written" in warnings[0]
    assert (tmp_path / "out" / "model.safetensors").is_file()


# The file


def test_an_edited_card_stays(folder):
    """A person's work would be gone after the next export."""
    path = folder / "README.md"
    for text, stays in (
        ("# Mine", True),
        ("---\nlicense: mit\n---\n# Mine", True),
        ("# Mine\n\nIt was made like this one:\n\n" + path.read_text(), True),
        ("---\nlicense: mit\n---\n# Mine\n\n" + MARKER + " -->", True),
        (path.read_text() + "\nMore.", False),
        ("<!-- This model card has been generated automatically according to the information the Trainer\n-->", False),
    ):
        path.write_text(text)
        write_model_card(folder)
        assert (path.read_text() == text) == stays
    assert MARKER in path.read_text() and not (folder / "README.md.tmp").exists()


def test_a_folder_without_a_run(tmp_path, tokenizer):
    """A checkpoint of unknown origin would be called distilled."""
    with pytest.raises(ValueError, match="neither config.json nor results.json"):
        write_model_card(tmp_path)
    save_model(tmp_path / "other", tokenizer, **NAMES)
    card = ModelCard.load(write_model_card(tmp_path / "other"))
    assert card.data.tags == ["hf_kd"] and "distil" not in card.text.partition("# other")[2].replace(
        "distilled with", ""
    )
    assert "How it was made" not in card.text


@pytest.mark.parametrize("name", ["interrupted", "published", "minimal", "objective"])
def test_metadata_survive_the_way_there_and_back(name):
    """The Hub would refuse the block, or read other figures out of it."""
    path = GOLDEN / f"{name}.md"
    card = ModelCard.load(path)
    assert str(card).rstrip() == path.read_text(encoding="utf-8").rstrip()
    found = card.data.to_dict()
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-classification"
    if "model-index" in found:
        _, results = model_index_to_eval_results(found["model-index"])
        assert results == card.data.eval_results and results[0].metric_type == "accuracy"
    assert ("base_model" in found) == ("base_model_relation" in found)


# What is inherited


def edited(folder, change):
    results = read_results(folder / "results.json")
    change(results["distillation"])
    write_results(folder / "results.json", **results)
    return ModelCard.load(write_model_card(folder)).data.to_dict()


def test_licence_is_that_of_all_or_none(folder):
    """A student of a licence that its second teacher forbids."""
    assert edited(folder, lambda made: None)["license"] == "mit"
    assert "license" not in edited(folder, lambda made: made["teachers"][1].update(license="cc-by-nc-4.0"))
    assert "Licence: not stated" in (folder / "README.md").read_text()
    assert "license" not in edited(folder, lambda made: made["teachers"][1].pop("license"))

    def other_start(made):
        made["teachers"][1]["license"] = "mit"
        made["student"]["start"] = {"kind": "checkpoint", "name": "acme/tiny", "is_hub_id": True}

    assert "license" not in edited(folder, other_start)
    assert edited(folder, lambda made: made["student"]["start"].update(license="mit"))["license"] == "mit"


def test_base_model_is_where_the_weights_came_from(folder):
    """The Hub's tree of models would show a parent that the student has no weight of."""
    assert edited(folder, lambda made: None)["base_model"] == "acme/bert-sst2"

    def from_folder(made):
        made["teachers"][0] = {**made["teachers"][0], "is_hub_id": False, "base_model": "acme/bert"}

    assert edited(folder, from_folder)["base_model"] == "acme/bert"
    assert "base_model" not in edited(folder, lambda made: made["teachers"][0].update(base_model="/home/me/bert"))
    start = {"kind": "checkpoint", "name": "acme/tiny", "is_hub_id": True}
    assert edited(folder, lambda made: made["student"].update(start=start))["base_model"] == "acme/tiny"
    edited(folder, lambda made: made["teachers"][0].update(is_hub_id=True))
    for start in (
        {"kind": "unknown"},
        {"kind": "teacher", "teacher": 0, "init": "random", "of_layers": 4, "narrowed": {"hidden_size": [32, 16]}},
    ):
        found = edited(folder, lambda made, start=start: made["student"].update(start=start))
        assert "base_model" not in found and "base_model_relation" not in found


# Hostile names

HOSTILE = [
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "`x` | y\n---\n# z",
    "![a](http://b) [c](javascript:d)",
    '"""); import os #',
    "**bold** _it_ ~~x~~ $y$",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_words_and_nothing_else(folder, name):
    """The label of a data set, or the name of a folder, would run in the browser of whoever reads the card."""
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": name, "1": "good"}
    (folder / "config.json").write_text(json.dumps(config))

    def rename(made):
        made["teachers"][1]["name"] = made["data"]["files"]["unlabeled"] = made["terms"][1]["name"] = name
        made["teachers"][1]["license"] = name

    edited(folder, rename)
    measured = {"metrics": {name: {"accuracy": 0.5, name: 0.1}}, "main_metric": {"split": name, "name": name}}
    rows = [{**row, **measured, "task": name} for row in read_rows(folder)]
    text = rewrite(folder, rows=rows, card={"model_name": name, "repo_id": "acme/x"})
    card = ModelCard(text)
    assert card.data.to_dict()["model-index"][0]["name"] == name  # YAML keeps it, as a string
    body = card.text
    for piece in ("<script", "{{", "{%", "\n---\n", "\n# z", "](http://b", "](javascript", "**bold", "~~x", "$y$"):
        assert piece not in body
    assert unescape(body).count(" ".join(name.split())[:10]) >= 4
    # As many cells in each line of a table as in its header.
    for block in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_plain_text_reads_as_it_was_written():
    """Every dash as an entity would make a card that nobody can edit."""
    assert card_text.plain("a combined_score of 3.5 (x-y): 2") == "a combined_score of 3.5 (x-y): 2"
    assert card_text.plain("- 1. x") == "&#45; 1&#46; x"
    assert card_text.plain("_x_") == "&#95;x&#95;"
    assert card_text.code("a b") == "`a b`" and "`" not in card_text.code("a`b")


# What a card says of itself


def test_int8_on_cpus_without_vnni(folder):
    """Who runs it on an older CPU would get other answers than the card's."""
    text = section(published(folder), "Limits and biases")
    assert "made and measured on a CPU with such instructions" in text
    export = {**EXPORT, "cpu": {**EXPORT["cpu"], "flags": ["avx2"]}}
    assert "on a CPU without such instructions" in section(rewrite(folder, export=export), "Limits and biases")
    export["quantization"] = {**EXPORT["quantization"], "reduce_range": True, "metric": None}
    text = section(rewrite(folder, export=export), "Limits and biases")
    assert "weights of 7 bits" in text and "quality of the int8 file was not measured" in text


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.09, "more than"), (-0.01, 0.11, "do not tell"), (-0.09, -0.01, "more than")],
)
def test_whether_the_difference_is_real(folder, low, high, verdict):
    """A difference within the interval would be sold as a gain."""
    difference = (low + high) / 2
    text = rewrite(folder, comparisons=[{**COMPARISON, "low": low, "high": high, "difference": difference}])
    (sentence,) = re.findall(r"Against the same student.*", text)
    assert f"{100 * difference:+.2f} points" in sentence and verdict in sentence
    assert "no test was run of whether that is chance" in rewrite(folder, comparisons=[])


def test_a_teacher_below_chance_is_no_measure(folder):
    """Such a card would boast of keeping 185 % of its teacher."""
    rows = [{**row, "task": "wnli"} for row in fixed_metrics(read_rows(folder))]
    values = [0.2, 0.3, 0.5, 0.4]
    below = [{**row, "metrics": {"validation": {"accuracy": value}}} for row, value in zip(rows, values, strict=True)]

    def retained(text):
        return [line.split(" | ")[6] for line in text.splitlines() if line.startswith("| wnli |")]

    text = rewrite(folder, rows=below)
    assert retained(text) == ["", "", ""]
    assert '"retained" is the share of the teachers\' mean. It is left empty, as that mean is below chance.\n' in text
    text = rewrite(folder, rows=below[1:])
    assert retained(text) == ["", "", ""]
    assert '"retained" is the share of the teacher\'s. It is left empty, as the teacher is below chance.\n' in text
    # Another encoder may learn the task, and another task's metric may be below one half.
    text = rewrite(folder, rows=rows)
    assert retained(text) == ["100.0%", "89.9%", "95.5%"] and "below chance" not in text
    text = rewrite(folder, rows=[{**row, "task": "cola"} for row in below])
    assert "| 160.0% |" in text and "below chance" not in text


def test_a_training_that_stopped_early(folder):
    """A card of half a training would read as that of a whole one."""
    edited(folder, lambda made: made["training"].update(steps=4))
    text = (folder / "README.md").read_text()
    assert "- 4 of 6 planned steps" in text and "did not run to its planned end" in text


def test_learning_rates_that_were_chosen_on_the_reported_rows(folder):
    """The best of several would be taken for a measurement on fresh rows."""
    rows = [{**row, "learning_rates": [1e-4, 1e-3]} for row in read_rows(folder)]
    text = rewrite(folder, rows=rows)
    assert "chosen on the validation rows from 0.0001 and 0.001" in text and "which flatters it" in text


def test_the_best_step_was_chosen_on_the_reported_rows(folder):
    """As with learning rates, the best of several would be taken for a measurement on fresh rows."""
    edited(folder, lambda made: made["training"].update(best_step=4))
    text = (folder / "README.md").read_text()
    assert "- The step was chosen on the rows that it is measured on, which flatters it" in text
    rows = [{**row, "learning_rates": [1e-4, 1e-3]} for row in read_rows(folder)]
    assert "- The learning rate and step were chosen on the rows" in rewrite(folder, rows=rows)


def test_a_student_of_labels_alone(folder):
    """Teachers would be given the credit for what they took no part in."""

    def without_teachers(made):
        compared = made["teachers"][:1]
        made.update(teachers=[], agreement_teachers=compared, terms=made["terms"][:1])
        identity = {name: compared[0][name] for name in ("name", "is_hub_id", "revision", "license")}
        made["student"]["start"] = {**made["student"]["start"], **identity}
        del made["student"]["start"]["teacher"]

    metadata = edited(folder, without_teachers)
    metrics = {"validation": {"accuracy": 0.8, "teacher_agreement": 0.9}}
    rows = [{**row, "metrics": metrics} for row in read_rows(folder) if row["role"] == "baseline"]
    text = rewrite(folder, rows=rows)
    assert "distillation" not in metadata["tags"] and metadata["base_model"] == "acme/bert-sst2"
    assert "trained with hf_kd on labels alone" in text and "distilled from" not in text
    assert "teaches" not in text and "teach\n" not in text and "answers" not in section(text, "Limits and biases")
    name = "[acme/bert-sst2](https://huggingface.co/acme/bert-sst2)"
    assert f"It started as a copy of layers 2 and 4 of the 4 of {name}, with" in text
    assert f"Agrees with {name}, which did not teach it, in 90.0 % of predictions on `validation`" in text


def test_a_student_of_hidden_states_alone(folder):
    """It never saw an answer of its teachers, labelled or not."""
    terms = [{"name": "hidden_loss", "kind": "hidden", "type": "mse", "weight": 1.0, "teacher": 0}]
    edited(folder, lambda made: made.update(terms=terms))
    text = section((folder / "README.md").read_text(), "Limits and biases")
    assert "It learned from the teachers' hidden states, errors and biases included" in text and "answers" not in text


def test_what_is_said_only_where_it_is_so(folder):
    """Sentences that hold for one problem, or one size of data, would stand in the card of another."""
    error = "one standard error of its accuracy"
    assert error in (folder / "README.md").read_text()
    edited(folder, lambda made: made.update(problem="token_classification"))
    assert error not in (folder / "README.md").read_text()
    for limit, is_said in ((24, True), (25, False)):
        edited(folder, lambda made, limit=limit: made["data"].update(max_train_rows=limit))
        assert ("drawn at random" in (folder / "README.md").read_text()) == is_said
    edited(folder, lambda made: made["data"].pop("max_length"))
    text = published(folder)
    assert "not part of training" not in text and "checked on texts of up to 80 tokens" in text
    for precision, words in (
        ("float32", "- float32, seed"),
        ("bf16", "- Mixed precision, bf16, seed"),
        ("bfloat16", "- Weights and computation in bfloat16, seed"),
    ):
        edited(folder, lambda made, precision=precision: made["training"].update(precision=precision))
        assert words in (folder / "README.md").read_text()


def test_files_of_an_earlier_student(folder):
    """The card would show the picture of the student before, and vouch for its ONNX file."""
    published(folder)
    report = folder / "onnx" / "export_report.json"
    report.write_text(json.dumps(EXPORT))
    results = read_results(folder / "results.json")
    del results["export"], results["benchmark"]
    write_results(folder / "results.json", **results)
    text = write_model_card(folder).read_text()
    assert "## ONNX files" in text and "pareto.png" not in text  # exported after it was saved
    os.utime(report, (1, 1))
    text = write_model_card(folder).read_text()
    assert not any(
        words in text for words in ("## ONNX files", "ONNX Runtime", "logits are within", "transformers.js")
    )


def test_no_command_line(folder):
    """It would bear the folders of the user's machine."""
    run_facts = {**RUN, "command": "python train.py --train_file ../../home/me/data.csv"}
    path = folder / "results.json"
    write_results(path, **{**read_results(path), "run": run_facts, "training_run": run_facts})
    text = write_model_card(folder).read_text()
    assert "train.py" not in text and "home/me" not in text


@pytest.mark.parametrize(
    ("kind", "forms"),
    [
        ("logit", LogitLossType),
        ("hidden", HiddenLossType),
        ("attention", AttentionLossType),
        ("relation", RelationLossType),
    ],
)
def test_every_form_has_its_paper(kind, forms):
    """The card of a new form would credit nobody."""
    missing = {form for form in get_args(forms) if f"{kind}:{form}" not in PAPERS}
    assert missing == ({"cosine"} if kind == "attention" else set())  # that one is of no paper


# Pictures


@pytest.mark.parametrize("path", sorted(MODEL_CARDS.glob("*.md")), ids=lambda path: path.stem)
def test_every_picture_of_a_card_is_there(path):
    """A reader of the repository would see a broken image; every clone bears the weight of those that are there."""
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"!\[[^]]*\]\((.*?)\)", text):
        assert name == f"{path.stem}.png"
        picture = (path.parent / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 60_000


# Snippets


def snippets(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def model_id_of(snippet):
    return re.search(r"""(?:['"][\w-]+['"], |from_pretrained\(\s*)("(?:[^"\\]|\\.)*")""", snippet)[1]


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """`stand_in(card)`: a tiny student of the card's architecture and labels, with ONNX files if the card has any."""

    @cache
    def make(architecture, labels, kind, has_onnx):
        model_class = getattr(transformers, architecture)
        problem = {
            "ForTokenClassification": "token_classification",
            "ForQuestionAnswering": "question_answering",
            "ForMaskedLM": "masked_lm",
        }.get(re.search(r"For\w+", architecture)[0], kind)
        names = dict(enumerate(labels))
        named = {"id2label": names, "label2id": {name: index for index, name in names.items()}} if labels else {}
        family = model_class.config_class.model_type
        folder = tmp_path_factory.mktemp("stand-in") / "student"
        model = make_model(family, problem=problem, num_hidden_layers=2, **named)
        assert type(model) is model_class
        model.save_pretrained(folder)
        save_words(folder, family)
        if has_onnx:
            from hf_kd.deploy.onnx import export_onnx

            export_onnx(folder, folder)
        return folder

    def find(text):
        kind = "single_label_classification"
        kind = "multi_label_classification" if "Labels, any number of them" in text else kind
        kind = "regression" if "It answers with one number." in text else kind
        names = re.search(r"Labels(?:, any number of them at once)?: (.*?)\.\n", text)
        labels = [unescape(name.strip("`")) for name in names[1].split(", ")] if names else []
        if labels and (more := re.fullmatch(r"(.*)` and (\d+) more", labels[-1])):
            labels = [*labels[:-1], more[1], *(f"label {index}" for index in range(int(more[2])))]
        architecture = re.search(r"\n# .*\n\n`(\w+)`", text)[1]
        return make(architecture, tuple(labels), kind, "## ONNX files" in text), labels

    return find


def save_words(folder, family):
    from conftest import VOCAB

    (folder / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if family in ("bert", "electra") else [])]
    tokenizer = BertTokenizerFast.from_pretrained(folder, model_max_length=80, model_input_names=names)
    tokenizer.save_pretrained(folder)


def run_snippet(snippet, folder):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet.replace(model_id_of(snippet), json.dumps(str(folder))), "card", "exec"), {})
    return printed.getvalue()


def check_snippets(text, folder, labels):
    """Run all of Python, and look whether the files are there that transformers.js would ask for."""
    ids = {model_id_of(snippet) for language in ("python", "js") for snippet in snippets(text, language)}
    assert len(ids) == 1
    python = snippets(text, "python")
    assert python
    for snippet in python:
        if "optimum" in snippet and not HAS_OPTIMUM:
            continue
        printed = run_snippet(snippet, folder)
        assert printed.strip() and (not labels or any(label in printed for label in labels))
    for snippet in snippets(text, "js"):
        dtype = re.search(r"dtype: '(\w+)'", snippet)[1]
        file = {"fp32": "model.onnx", "q8": "model_quantized.onnx"}[dtype]
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", f"onnx/{file}"):
            assert (folder / name).is_file()
        assert f"| `onnx/{file}` |" in text
        assert snippet.count("(") == snippet.count(")") and snippet.count("{") == snippet.count("}")


@pytest.mark.parametrize("path", sorted([*GOLDEN.glob("*.md"), *MODEL_CARDS.glob("*.md")]), ids=lambda path: path.stem)
def test_every_snippet_of_every_card(path, stand_in):
    """A line that does not run is the first thing that a reader tries."""
    text = path.read_text(encoding="utf-8")
    if "```python" in text:  # not model_cards/README.md, which lists them
        check_snippets(text, *stand_in(text))


PROBLEMS = ["multi_label_classification", "regression", "token_classification", "question_answering", "masked_lm"]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_snippets_of_other_problems(tmp_path, problem, stand_in):
    """The card of a tagger would show the pipeline of a classifier."""
    folder = tmp_path / "student"
    model = make_model(problem=problem)
    model.save_pretrained(folder)
    save_words(folder, "bert")
    if problem in ("multi_label_classification", "regression"):
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.onnx").write_bytes(b"")
    made = {"problem": problem, "data": {}, "student": {"architecture": type(model).__name__, "model_type": "bert"}}
    write_results(folder / "results.json", [], distillation=made)
    text = write_model_card(folder).read_text()
    tag = ModelCard(text).data.pipeline_tag
    tags = {"token_classification": "token-classification", "question_answering": "question-answering"}
    assert tag == {**tags, "masked_lm": "fill-mask"}.get(problem, "text-classification")
    check_snippets(text, *stand_in(text))


def test_snippets_of_pairs(folder, stand_in):
    """Two texts as one would be classified, and wrongly."""
    published(folder)
    edited(folder, lambda made: made["data"].update(text_columns=["sentence1", "sentence2"]))
    text = (folder / "README.md").read_text()
    assert '"text_pair"' in text and "text_pair:" in snippets(text, "js")[0]
    check_snippets(text, *stand_in(text))


def test_a_student_without_tokenizer(folder):
    """Its snippet would fail, whatever the reader does."""
    for path in folder.glob("*"):
        if "token" in path.name or path.name == "vocab.txt":
            path.unlink()
    text = write_model_card(folder).read_text()
    assert "No tokenizer is published with it" in text
    (snippet,) = snippets(text, "python")
    assert run_snippet(snippet, folder).strip() == "2"


# The card after an export


def test_export_renders_the_card_anew(folder, monkeypatch):
    """The card would go on without the ONNX files, or the results without how the student was made."""
    data = folder.parent / "glue"
    for split, seed in (("train", 0), ("dev", 1)):
        write_rows(data / "SST-2" / f"{split}.tsv", ["sentence", "label"], seed=seed)
    before = rewrite(folder, comparisons=[COMPARISON])
    flags = ["--model_dir", folder, "--output_dir", folder, "--task_name", "sst2", "--glue_dir", data]
    run(monkeypatch, "export_onnx", *flags, "--max_seq_length", 32, "--max_metric_drop", 1)
    after = (folder / "README.md").read_text()
    assert "## ONNX files" in after and "## ONNX files" not in before
    assert section(after, "How it was made") == section(before, "How it was made")
    results = read_results(folder / "results.json")
    assert results["comparisons"] == [COMPARISON] and results["training_run"] == RUN
    assert section(after, "Versions and hardware") == section(before, "Versions and hardware")
    assert f"{(folder / 'onnx' / 'model.onnx').stat().st_size / 1e6:.1f}" in section(after, "ONNX files")
    check_snippets(after, folder, ["negative", "positive"])


def test_the_dataclass_reads_what_the_folder_holds(folder):
    """A file of the training would be counted as the student's."""
    card = StudentCard.read(folder, {}, read_results(folder / "results.json"))
    assert card.title == "sst2-student" and card.has_tokenizer and card.row["role"] == "student"
    assert "model.safetensors" in card.sizes and not any("checkpoint" in name for name in card.sizes)
