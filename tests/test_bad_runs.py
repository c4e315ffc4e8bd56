"""Bad input of every kind through the recipes: one error that says what to do, no step, nothing on disk changed."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, make_model, weights
from safetensors.torch import load_file, save_file
from test_bad_input import files_in
from test_distributed import ROOT
from test_recipes import NAMES, QUICK, save_model, write_rows
from transformers import AutoModelForSequenceClassification, BertTokenizerFast, Trainer

from hf_kd.command_line import run_main
from hf_kd.results import read_results


pytestmark = pytest.mark.one_leg


HEADER = "text,label\n"
ROWS = "w1 w2,negative\nw3 w4,positive\nw5 w6,negative\nw7 w8,positive\n"
FINETUNE, DISTILL, EXPORT = "glue_finetune", "glue_distill", "export_onnx"
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="good where there is a GPU")


@pytest.fixture(scope="module")
def template(tmp_path_factory, tokenizer):
    """A teacher, an encoder, two files of rows and a student that was trained before; each test gets a copy."""
    folder = tmp_path_factory.mktemp("template")
    save_model(folder / "teacher", tokenizer, seed=1, **NAMES)
    save_model(folder / "encoder", tokenizer, seed=2, num_hidden_layers=2)
    save_model(folder / "trained", tokenizer, seed=3, num_hidden_layers=2, **NAMES)
    for name, seed in (("train", 0), ("dev", 1)):
        write_rows(folder / f"{name}.csv", ["text", "label"], labels=("negative", "positive"), seed=seed)
    return folder


class Inputs:
    """The inputs of a run in a folder, which a case spoils."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __truediv__(self, name):
        return self.folder / name

    def write(self, name, content):
        """A file with this text or these bytes; its path."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def train(self, content, name="train.csv"):
        return {"train_file": self.write(name, content)}

    def dev(self, content, name="dev.csv"):
        return {"validation_file": self.write(name, content)}

    def yaml(self, content):
        return {"config": self.write("run.yaml", content)}

    def change_config(self, model, **changes):
        path = self.folder / model / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
        return {}

    def change_weights(self, model, change):
        """Let a function change the tensors of a checkpoint."""
        path = self.folder / model / "model.safetensors"
        tensors = load_file(path)
        save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, path, {"format": "pt"})
        return {}

    def change_bytes(self, model, change):
        path = self.folder / model / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
        return {}

    def remove_tokenizer(self, model):
        for file in (self.folder / model).iterdir():
            if "token" in file.name or file.name == "vocab.txt":
                file.unlink()
        return {}

    def new_tokenizer(self, model, vocab, **kwargs):
        """Give a model a tokenizer of other words."""
        folder = self.folder / "vocabulary"
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
        self.remove_tokenizer(model)
        BertTokenizerFast(str(folder / "vocab.txt"), **{"model_max_length": 80, **kwargs}).save_pretrained(
            self.folder / model
        )
        shutil.rmtree(folder)
        return {}


@pytest.fixture
def inputs(tmp_path, template):
    shutil.copytree(template, tmp_path / "run")
    return Inputs(tmp_path / "run")


def command(recipe, inputs, changes):
    """The arguments of a small run that works, with the changes of a case; `None` takes one away."""
    data = {"train_file": inputs / "train.csv", "validation_file": inputs / "dev.csv"}
    flags = {
        FINETUNE: {**data, "model_name_or_path": inputs / "encoder", "output_dir": inputs / "out"},
        DISTILL: {**data, "teacher_model_name_or_path": inputs / "teacher", "output_dir": inputs / "out"},
        EXPORT: {**data, "model_dir": inputs / "teacher", "output_dir": inputs / "onnx", "max_seq_length": 32},
    }[recipe]
    if recipe != EXPORT:
        flags |= {name.removeprefix("--"): value for name, value in zip(QUICK[::2], QUICK[1::2], strict=True)}
    flags |= changes
    words = [flags.pop("config", None)]
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return [str(word) for word in words if word is not None]


def run(monkeypatch, recipe, words):
    """The recipe as the command line runs it, in this process."""
    monkeypatch.setattr(sys, "argv", [f"recipes/{recipe}.py", *words])
    run_main(import_module(recipe).main)


@pytest.fixture
def steps(monkeypatch):
    """The steps that were begun, the first of which ends the run."""
    begun = []

    def no_step(*args, **kwargs):
        begun.append(len(begun))
        raise AssertionError("a step was begun")

    monkeypatch.setattr(Trainer, "training_step", no_step)
    return begun


def case(recipe, name, spoil, *fragments, marks=()):
    return pytest.param(recipe, spoil, fragments, id=name, marks=marks)


def change_head(tensors, value):
    tensors["classifier.weight"][0, 3] = value
    return tensors


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def labelled(*labels):
    return HEADER + "".join(f"w1 w2,{label}\n" for label in labels)


def soft(cell):
    """Rows whose second one has this cell of soft labels."""
    good = {"text": "w1", "label": "negative", "teacher_probs": {"negative": 0.75, "positive": 0.25}}
    return jsonl(good, {**good, "label": "positive", "teacher_probs": cell})


FLAGS = [
    case(DISTILL, "unknown flag", lambda i: {"xyzzy": 1}, "'--xyzzy 1' is no argument", "--help"),
    case(DISTILL, "misspelt flag", lambda i: {"temperatur": 3}, "--temperatur", "did you mean 'temperature'?"),
    case(DISTILL, "abbreviated flag", lambda i: {"logit_loss": 1}, "--logit_loss", "did you mean 'logit_loss_"),
    case(DISTILL, "flag with one dash", lambda i: {"config": "-seed=3"}, "-seed=3", "did you mean 'seed'?"),
    case(FINETUNE, "no model", lambda i: {"model_name_or_path": None}, "required: --model_name_or_path", "--help"),
    case(DISTILL, "no value", lambda i: {"temperature": []}, "--temperature: expected one argument"),
    case(DISTILL, "word for a number", lambda i: {"max_steps": "many"}, "--max_steps", "invalid int value: 'many'"),
    case(DISTILL, "word for a boolean", lambda i: {"run_baseline": "maybe"}, "--run_baseline", "maybe"),
    case(DISTILL, "unknown choice", lambda i: {"student_init": "best"}, "--student_init", "invalid choice: 'best'"),
    case(FINETUNE, "unknown role", lambda i: {"role": "student"}, "--role: invalid choice: 'student'"),
    case(DISTILL, "learning rate NaN", lambda i: {"learning_rate": "nan"}, "learning_rate=nan must be a finite"),
    case(
        FINETUNE, "learning rate < 0", lambda i: {"learning_rate": "-0.1"}, "learning_rate=-0.1 must be", "0.0 or more"
    ),
    case(DISTILL, "one of the rates infinite", lambda i: {"learning_rates": ["1e-4", "inf"]}, "learning_rate=inf"),
    case(DISTILL, "weight decay NaN", lambda i: {"weight_decay": "nan"}, "weight_decay=nan must be a finite"),
    case(DISTILL, "gradient norm < 0", lambda i: {"max_grad_norm": -1}, "max_grad_norm=-1.0 must be"),
    case(
        FINETUNE, "batch of 0", lambda i: {"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be"
    ),
    case(FINETUNE, "batch of -1", lambda i: {"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1 must"),
    case(DISTILL, "no accumulation", lambda i: {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
    case(DISTILL, "seed < 0", lambda i: {"seed": -1}, "seed=-1 must be"),
    case(DISTILL, "seed too large", lambda i: {"seed": 2**32}, "seed=4294967296 must be below 2**32"),
    case(FINETUNE, "no epochs", lambda i: {"max_steps": None, "num_train_epochs": 0}, "train nothing", "_epochs 3"),
    case(DISTILL, "temperature 0", lambda i: {"temperature": 0}, "temperature=0.0 must be a finite number > 0"),
    case(DISTILL, "no weight", lambda i: {"task_loss_weight": 0, "logit_loss_weight": 0}, "every loss weight is 0"),
    case(
        DISTILL, "schedule", lambda i: {"logit_loss_schedule": "linear:1"}, "'linear:1' cannot be read", "'linear:1:0'"
    ),
    case(
        DISTILL,
        "best model of what is not saved",
        lambda i: {"load_best_model_at_end": "true", "eval_strategy": "epoch"},
        "load_best_model_at_end",
        "strategy",
    ),
    case(
        DISTILL,
        "best model by an unknown metric",
        lambda i: {
            "load_best_model_at_end": "true",
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "metric_for_best_model": "eval_acuracy",
        },
        "metric_for_best_model='eval_acuracy' is no metric of custom; use one of loss, accuracy",
    ),
    case(DISTILL, "two student depths", lambda i: {"student_layers": [1, 2], "student_num_layers": 3}, "contradict"),
    case(DISTILL, "student too deep", lambda i: {"student_num_layers": 9}, "num_layers=9 must be between 1 and"),
    case(DISTILL, "student too wide", lambda i: {"student_hidden_size": 64}, "hidden_size=64 must be between 1 and"),
    case(
        DISTILL,
        "layer map out of range",
        lambda i: {"hidden_loss_weight": 1, "layer_mapping": "1:9"},
        "layer_mapping='1:9' names teacher layer 9",
        "0 to 4",
    ),
    case(DISTILL, "no teacher", lambda i: {"teacher_model_name_or_path": None}, "no teacher", "--teacher_model_name"),
    case(DISTILL, "texts too short", lambda i: {"max_seq_length": 2}, "max_seq_length=2 must be at least 3"),
    case(FINETUNE, "texts too long", lambda i: {"max_seq_length": 81}, "max_seq_length=81", "80 tokens"),
    case(EXPORT, "unknown quantisation", lambda i: {"quantization": "int4"}, "--quantization int4", "static or none"),
    case(EXPORT, "unknown back end", lambda i: {"backend": "tvm"}, "'tvm'"),
    case(EXPORT, "drop < 0", lambda i: {"max_metric_drop": -1}, "max_metric_drop=-1.0"),
]

YAML = [
    case(DISTILL, "YAML missing", lambda i: {"config": i / "no.yaml"}, "no.yaml cannot be read: ", "No such file"),
    case(DISTILL, "YAML is a folder", lambda i: {"config": (i / "a.yaml").mkdir() or i / "a.yaml"}, "Is a directory"),
    case(DISTILL, "YAML broken", lambda i: i.yaml("seed: [1\nrun_baseline: true\n"), "cannot be read", "line 2"),
    case(DISTILL, "YAML with a key twice", lambda i: i.yaml("seed: 1\nseed: 2\n"), "seed is set twice; keep one line"),
    case(
        DISTILL,
        "YAML that runs code",
        lambda i: i.yaml("output_dir: !!python/object/apply:os.mkdir [ran]\n"),
        "python/object/apply:os.mkdir is not needed; write the value alone",
    ),
    case(
        DISTILL, "YAML with a type", lambda i: i.yaml("seed: !!int ''\n"), "int is not needed; write the value alone"
    ),
    case(DISTILL, "YAML misspelt", lambda i: i.yaml("temprature: 2\n"), "'temprature'", "did you mean 'temperature'?"),
    case(DISTILL, "YAML list for a number", lambda i: i.yaml("seed: [1, 2]\n"), "sets seed to [1, 2]", "one value"),
    case(DISTILL, "YAML word for a number", lambda i: i.yaml("temperature: warm\n"), "invalid float value: 'warm'"),
    case(DISTILL, "YAML mapping for a number", lambda i: i.yaml("seed: {a: 1}\n"), "sets seed to {'a': 1}"),
    case(
        DISTILL,
        "YAML mapping for a word",
        lambda i: i.yaml("layer_mapping: {1: 4}\n"),
        "sets layer_mapping to {1: 4}",
        "one value",
    ),
    case(
        DISTILL,
        "YAML list in a list",
        lambda i: i.yaml("student_layers: [[1, 2]]\n"),
        "student_layers to [[1, 2]]",
        "list of values",
    ),
    case(
        DISTILL,
        "YAML null in a list",
        lambda i: i.yaml("learning_rates: [1e-4, ~]\n"),
        "learning_rates to [0.0001, None]",
        "list",
    ),
    case(DISTILL, "YAML nested deep", lambda i: i.yaml("seed: " + "[" * 9000 + "\n"), "cannot be read", "too deeply"),
    case(DISTILL, "YAML not UTF-8", lambda i: i.yaml(b"output_dir: caf\xe9\n"), "cannot be read", "utf-8"),
    case(DISTILL, "YAML with NUL bytes", lambda i: i.yaml(b"seed: 1\x00\n"), "cannot be read", "special characters"),
]

FILES = [
    case(FINETUNE, "file missing", lambda i: {"train_file": i / "no.csv"}, "no.csv does not exist; check the path"),
    case(FINETUNE, "folder for a file", lambda i: {"train_file": (i / "a.csv").mkdir() or i / "a.csv"}, "is a folder"),
    case(FINETUNE, "file empty", lambda i: i.train(""), "train.csv has no rows"),
    case(FINETUNE, "header alone", lambda i: i.train(HEADER), "train.csv has no rows", "below a header line"),
    case(FINETUNE, "latin-1", lambda i: i.train(b"text,label\ncaf\xe9,a\n"), "train.csv is not UTF-8", "iconv"),
    case(FINETUNE, "UTF-16", lambda i: i.train((HEADER + ROWS).encode("utf-16")), "train.csv is not UTF-8"),
    case(FINETUNE, "NUL bytes", lambda i: i.train(HEADER + "w1\0w2,negative\nw1,positive\n"), "line 2", "NUL"),
    case(FINETUNE, "ragged row", lambda i: i.train(HEADER + "a,b,c\n"), "line 2: 3 columns, but the header has 2"),
    case(FINETUNE, "quote left open", lambda i: i.train(HEADER + ROWS + 'a"b,"c\n'), "train.csv, line 6"),
    case(FINETUNE, "wrong extension", lambda i: i.train(HEADER + ROWS, "train.xlsx"), "the name has to end in .csv"),
    case(FINETUNE, "Parquet named CSV", lambda i: i.train(b"PAR1\x15\x04\xff\xfePAR1"), "train.csv is not UTF-8"),
    case(
        FINETUNE,
        "JSON lines half written",
        lambda i: i.train(jsonl({"text": "a", "label": "x"}) + '{"text": "b", "la', "train.jsonl"),
        "train.jsonl, line 2",
        "one object per line",
    ),
    case(FINETUNE, "JSON of numbers", lambda i: i.train("[1, 2]", "train.json"), "item 1: 1, but an object"),
    case(FINETUNE, "JSON nested deep", lambda i: i.train("[" * 90000, "train.json"), "train.json", "nested"),
    case(FINETUNE, "Parquet cut off", lambda i: i.train(b"PAR1\x15\x04", "train.parquet"), "train.parquet: ", "anew"),
    case(DISTILL, "dev file missing", lambda i: {"validation_file": i / "no.csv"}, "no.csv does not exist"),
    case(DISTILL, "unlabelled file missing", lambda i: {"unlabeled_file": i / "no.txt"}, "no.txt does not exist"),
    case(DISTILL, "unlabelled file empty", lambda i: {"unlabeled_file": i.write("u.txt", "\n")}, "u.txt has no rows"),
    case(
        DISTILL, "unlabelled file latin-1", lambda i: {"unlabeled_file": i.write("u.txt", b"caf\xe9\n")}, "not UTF-8"
    ),
    case(EXPORT, "rows to measure missing", lambda i: {"validation_file": i / "no.csv"}, "no.csv does not exist"),
]

COLUMNS = [
    case(
        FINETUNE, "no label column", lambda i: i.train("text,class\nw1,a\n"), "['label'] is needed", "--label_column"
    ),
    case(FINETUNE, "no text column", lambda i: i.train("label\na\nb\n"), "one text or a pair is needed"),
    case(FINETUNE, "three text columns", lambda i: i.train("a,b,c,label\nw,w,w,x\n"), "one or two", "--text_columns"),
    case(
        FINETUNE,
        "text columns missing",
        lambda i: {"text_columns": ["sentence1", "sentence2"]},
        "['sentence1', 'sentence2'] is needed",
        "--text_columns",
    ),
    case(FINETUNE, "text column twice", lambda i: {"text_columns": ["text", "text"]}, "one text or a pair"),
    case(FINETUNE, "label as text", lambda i: {"text_columns": ["label"]}, "['label'] is needed"),
    case(FINETUNE, "dev has other columns", lambda i: i.dev("sentence,label\nw,negative\n"), "dev.csv", "['text']"),
    case(FINETUNE, "a column name twice", lambda i: i.train("text,text,label\nw,w,a\n"), "occurs twice"),
    case(
        DISTILL,
        "unlabelled has other columns",
        lambda i: {"unlabeled_file": i.write("u.csv", "a,b\nw,w\n")},
        "['text']",
    ),
]

LABELS = [
    case(FINETUNE, "label that training lacks", lambda i: i.dev(labelled("neutral")), "dev.csv, line 2", "'neutral'"),
    case(FINETUNE, "one class", lambda i: i.train(labelled("a", "a")), "1 different values in 2 rows", "two"),
    case(FINETUNE, "dev without a label", lambda i: i.dev(labelled("negative", "")), "dev.csv, line 3: the label is"),
    case(FINETUNE, "no label at all", lambda i: i.train(labelled("", "")), "train.csv", "0 different values"),
    case(
        FINETUNE,
        "label NaN",
        lambda i: i.dev('{"text": "w1", "label": NaN}\n', "dev.jsonl"),
        "dev.jsonl, line 1: the label is empty",
    ),
    case(FINETUNE, "score infinite", lambda i: i.train(labelled("0.5", "inf")), "line 3: the score is 'inf'"),
    case(FINETUNE, "scores and words", lambda i: {**i.train(labelled("0.5", "1.5")), **i.dev(labelled("x"))}, "'x'"),
    case(
        FINETUNE,
        "list of labels",
        lambda i: i.train(jsonl({"text": "w", "label": ["a", "b"]}), "train.jsonl"),
        "train.jsonl, line 1",
        "one label per row",
    ),
    case(
        DISTILL,
        "labels that the teacher lacks",
        lambda i: {**i.train(labelled("spam", "ham")), **i.dev(labelled("spam"))},
        "['ham', 'spam']",
        "['negative', 'positive']",
        "--teacher_label_names ham spam",
    ),
    case(
        DISTILL,
        "scores for a classifier",
        lambda i: {**i.train(labelled("0.25", "0.5")), **i.dev(labelled("0.5"))},
        "make it regression",
        "solves single_label_classification with 2 labels",
    ),
    case(
        DISTILL,
        "more classes than the teacher's",
        lambda i: i.train(labelled("negative", "positive", "neutral")),
        "['negative', 'neutral', 'positive']",
    ),
    case(DISTILL, "too few label names", lambda i: {"teacher_label_names": ["negative"]}, "['negative']"),
    case(DISTILL, "probabilities > 1", lambda i: i.train(soft({"negative": 7, "positive": 3}), "t.jsonl"), "line 2"),
    case(
        DISTILL, "a probability NaN", lambda i: i.train(soft({"negative": 1, "positive": None}), "t.jsonl"), "line 2"
    ),
    case(DISTILL, "no probability", lambda i: i.train(soft(None), "t.jsonl"), "t.jsonl, line 2", "is empty"),
]

TEXTS = [
    case(FINETUNE, "text empty", lambda i: i.train(HEADER + "w1,a\n,b\n"), "line 3: `text` is ''", "fill it"),
    case(FINETUNE, "text of spaces", lambda i: i.train(HEADER + "w1,a\n \t,b\n"), "line 3: `text` is ' \\t'"),
    case(
        FINETUNE,
        "text null",
        lambda i: i.train(jsonl({"text": "w", "label": "a"}, {"text": None, "label": "b"}), "train.jsonl"),
        "train.jsonl, line 2: `text` is None",
    ),
    case(
        FINETUNE,
        "text a number",
        lambda i: i.train(jsonl({"text": 5, "label": "negative"}, {"text": "w", "label": "positive"}), "train.jsonl"),
        "train.jsonl, line 1: `text` is 5",
    ),
    case(FINETUNE, "dev text empty", lambda i: i.dev(HEADER + ",negative\n"), "dev.csv, line 2: `text` is ''"),
    case(
        FINETUNE,
        "half a surrogate pair",
        lambda i: i.train(
            '{"text": "w1 \\ud83d", "label": "negative"}\n{"text": "w2", "label": "positive"}\n', "train.jsonl"
        ),
        "train.jsonl, line 1",
        "surrogate",
    ),
]

MODELS = [
    case(DISTILL, "teacher missing", lambda i: {"teacher_model_name_or_path": i / "no"}, "is not a model folder"),
    case(FINETUNE, "encoder missing", lambda i: {"model_name_or_path": i / "no"}, "no' is not a model folder"),
    case(EXPORT, "model missing", lambda i: {"model_dir": i / "no"}, "no' is not a model folder"),
    case(
        DISTILL, "student missing", lambda i: {"student_model_name_or_path": i / "no"}, "student_model_name_or_path="
    ),
    case(DISTILL, "no config", lambda i: (i / "teacher/config.json").unlink() or {}, "is not a model folder"),
    case(
        FINETUNE, "encoder without config", lambda i: (i / "encoder/config.json").unlink() or {}, "not a model folder"
    ),
    case(FINETUNE, "config not JSON", lambda i: i.write("encoder/config.json", "{") and {}, "not a model folder"),
    case(DISTILL, "teacher's config a list", lambda i: i.write("teacher/config.json", "[1]") and {}, "not a model"),
    case(DISTILL, "unknown model type", lambda i: i.change_config("teacher", model_type="gpt9"), "gpt9"),
    case(DISTILL, "weights missing", lambda i: (i / "teacher/model.safetensors").unlink() or {}, "safetensors"),
    case(FINETUNE, "encoder half written", lambda i: i.change_bytes("encoder", lambda b: b[:-999]), "is damaged"),
    case(DISTILL, "teacher half written", lambda i: i.change_bytes("teacher", lambda b: b[:-999]), "is damaged"),
    case(
        DISTILL, "header altered", lambda i: i.change_bytes("teacher", lambda b: b[:9] + b"X" + b[10:]), "is damaged"
    ),
    case(DISTILL, "weights empty", lambda i: i.change_bytes("teacher", lambda b: b""), "is damaged"),
    case(
        DISTILL,
        "NaN in the teacher",
        lambda i: i.change_weights("teacher", lambda t: change_head(t, torch.nan)),
        "1 of the 64 numbers of classifier.weight are NaN or infinite",
        "before its training diverged",
    ),
    case(
        DISTILL,
        "infinity in the student",
        lambda i: {
            "student_model_name_or_path": i / "trained",
            **i.change_weights("trained", lambda t: change_head(t, torch.inf)),
        },
        "student_model_name_or_path=",
        "numbers of classifier.weight are NaN or infinite",
    ),
    case(
        FINETUNE,
        "NaN in the encoder",
        lambda i: i.change_weights("encoder", lambda t: change_head(t, torch.nan)),
        "model_name_or_path=",
        "numbers of classifier.weight are NaN or infinite",
    ),
    case(
        EXPORT,
        "NaN in what is exported",
        lambda i: i.change_weights("teacher", lambda t: change_head(t, torch.nan)),
        "model_dir=",
        "numbers of classifier.weight are NaN or infinite",
    ),
    case(
        FINETUNE,
        "pickle alone",
        lambda i: (i / "encoder/model.safetensors").rename(i / "encoder/pytorch_model.bin") and {},
        "cannot be loaded from safetensors",
    ),
    case(
        DISTILL,
        "weights of another family",
        lambda i: i.change_config(
            "teacher", model_type="distilbert", architectures=["DistilBertForSequenceClassification"]
        ),
        "teacher_model=",
    ),
    case(
        FINETUNE,
        "encoder of another family",
        lambda i: i.change_config("encoder", model_type="electra"),
        "lacks the weights",
        "would be random",
    ),
    case(
        FINETUNE,
        "a layer missing",
        lambda i: i.change_config("encoder", num_hidden_layers=3),
        "lacks the weights ['bert.encoder.layer.2.",
    ),
    case(
        DISTILL,
        "teacher with a head of another task",
        lambda i: i.change_config("teacher", architectures=["BertForQuestionAnswering"]),
        "lacks the weights ['qa_outputs.bias', 'qa_outputs.weight']",
    ),
    case(DISTILL, "no head", lambda i: i.change_config("teacher", architectures=["BertModel"]), "no task head"),
    case(
        DISTILL,
        "teacher with another number of labels",
        lambda i: i.change_config(
            "teacher", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2}
        ),
        "other shapes than its config and 3 labels need",
        "'classifier.weight': (3, 32)",
    ),
    case(
        DISTILL,
        "student with another number of labels",
        lambda i: {
            "student_model_name_or_path": i / "trained",
            **i.change_weights("trained", lambda t: {**t, "classifier.weight": torch.zeros(3, 32)}),
        },
        "student_model_name_or_path=",
        "{'classifier.weight': (2, 32)}",
    ),
    case(
        DISTILL,
        "teacher of integers",
        lambda i: i.change_weights("teacher", lambda t: {name: (v * 9).to(torch.int8) for name, v in t.items()}),
        "is stored as I8",
        "float32",
    ),
    case(
        FINETUNE,
        "encoder of integers",
        lambda i: i.change_weights("encoder", lambda t: {name: (v * 9).to(torch.int8) for name, v in t.items()}),
        "is stored as I8",
    ),
    case(
        DISTILL,
        "other widths than the config's",
        lambda i: i.change_config("teacher", hidden_size=64),
        "'bert.embeddings.LayerNorm.bias': (64,)",
    ),
    case(
        DISTILL,
        "layers of two teachers",
        lambda i: {
            "attention_loss_weight": 1,
            "teacher_model_name_or_path": [i / "teacher", i / "trained"],
        },
        "attention_loss compares with one teacher, but there are 2",
    ),
    case(
        DISTILL,
        "student of another vocabulary size",
        lambda i: {
            "student_model_name_or_path": make_model(vocab_size=70, num_hidden_layers=2, **NAMES).save_pretrained(
                i / "trained"
            )
            or i / "trained"
        },
        "a vocabulary of 70 tokens",
    ),
]

TOKENIZERS = [
    case(
        FINETUNE,
        "no tokenizer",
        lambda i: i.remove_tokenizer("encoder"),
        "encoder' holds no tokenizer; save it there",
    ),
    case(
        DISTILL,
        "teacher without tokenizer",
        lambda i: i.remove_tokenizer("teacher"),
        "holds no tokenizer; save it there",
    ),
    case(
        FINETUNE,
        "tokenizer half written",
        lambda i: i.write("encoder/tokenizer.json", '{"ver') and {},
        "no tokenizer that",
    ),
    case(
        FINETUNE,
        "tokenizer larger than the embeddings",
        lambda i: i.new_tokenizer("encoder", [*VOCAB, "w59", "w60"]),
        "gives 'w60' the id 65",
        "embeddings for 64 tokens (0 to 63)",
    ),
    case(
        DISTILL,
        "teacher's tokenizer larger than the embeddings",
        lambda i: i.new_tokenizer("teacher", [*VOCAB, "w59", "w60"]),
        "gives 'w60' the id 65",
    ),
    case(
        DISTILL,
        "student's tokenizer of other words",
        lambda i: {
            "student_model_name_or_path": i / "trained",
            **i.new_tokenizer("trained", [*VOCAB[:5], "w1", "w0", *VOCAB[7:]]),
        },
        "different ids to 2 tokens",
    ),
    case(
        FINETUNE,
        "tokenizer that knows no length",
        lambda i: {"max_seq_length": 100, **i.new_tokenizer("encoder", VOCAB, model_max_length=10**30)},
        "max_seq_length=100",
        "--max_seq_length 80 or less",
    ),
]

DEVICES = [
    case(DISTILL, "fp16 on the CPU", lambda i: {"bf16": None, "fp16": "true"}, "fp16=True needs a GPU", "--bf16 true"),
    case(DISTILL, "fp16 and bf16", lambda i: {"bf16": "true", "fp16": "true"}, "fp16", "bf16"),
    case(DISTILL, "unknown optimizer", lambda i: {"optim": "sgdd"}, "--optim: invalid choice: 'sgdd'"),
    case(DISTILL, "unknown scheduler", lambda i: {"lr_scheduler_type": "cosin"}, "invalid choice: 'cosin'"),
    case(
        DISTILL,
        "fewer rows than a batch",
        lambda i: {"per_device_train_batch_size": 25, "dataloader_drop_last": "true"},
        "24 training rows fill no batch of 25",
        "--per_device_train_batch_size 24 or less",
    ),
    case(
        DISTILL, "output folder is a file", lambda i: {"output_dir": i / "train.csv"}, "output_dir=", "Not a directory"
    ),
    case(FINETUNE, "output folder in a file", lambda i: {"output_dir": i / "train.csv/out"}, "output_dir=", "another"),
    case(FINETUNE, "output folder not writable", lambda i: {"output_dir": "/proc/hf_kd"}, "output_dir='/proc/hf_kd'"),
    case(
        DISTILL,
        "resumed from what is no checkpoint",
        lambda i: {"output_dir": i.folder, "resume_from_checkpoint": i / "trained"},
        "trained' holds no trainer_state.json",
        "checkpoint-N",
    ),
    case(
        FINETUNE,
        "resumed from elsewhere",
        lambda i: {"resume_from_checkpoint": i / "trained"},
        "not a checkpoint below",
    ),
    case(DISTILL, "TF32 on the CPU", lambda i: {"tf32": "true"}, "tf32", marks=WITHOUT_GPU),
    case(DISTILL, "bf16 on a GPU", lambda i: {"bf16": "true", "use_cpu": "false"}, "bf16", marks=WITHOUT_GPU),
]

CASES = [*FLAGS, *YAML, *FILES, *COLUMNS, *LABELS, *TEXTS, *MODELS, *TOKENIZERS, *DEVICES]


@pytest.mark.parametrize(("recipe", "spoil", "fragments"), CASES)
def test_bad_input_is_refused(recipe, spoil, fragments, inputs, steps, monkeypatch, capsys):
    """It would train on something else than was meant, die after an hour, or end in a traceback of our own lines."""
    words = command(recipe, inputs, spoil(inputs))
    before = everything_in(inputs.folder)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, recipe, words)
    output = capsys.readouterr().err
    last = output.splitlines()[-1]
    assert end.value.code == 2 and last.startswith("error: "), output
    assert [fragment for fragment in fragments if fragment not in last] == [], last
    assert "Traceback" not in output
    assert steps == []
    assert everything_in(inputs.folder) == before


@pytest.mark.parametrize("recipe", [FINETUNE, DISTILL])
def test_a_step_would_be_seen(recipe, inputs, steps, monkeypatch):
    """The test above would pass where every run trains before it is refused."""
    with pytest.raises(AssertionError, match="a step was begun"):
        run(monkeypatch, recipe, command(recipe, inputs, {}))
    assert steps == [0]


def everything_in(folder):
    """Files with their bytes, and empty folders too."""
    return files_in(folder) | {str(path): None for path in folder.rglob("*") if path.is_dir()}


@pytest.mark.parametrize("recipe", [FINETUNE, DISTILL])
def test_a_student_that_was_there_stays(recipe, inputs, monkeypatch):
    """A run that is refused would have cost the student of the run before."""
    words = command(recipe, inputs, {"output_dir": inputs / "trained", **inputs.train(labelled("a", "a"))})
    before = everything_in(inputs.folder)
    with pytest.raises(SystemExit):
        run(monkeypatch, recipe, words)
    assert everything_in(inputs.folder) == before


# Input that is unusual, and good


def with_bom(inputs):
    return inputs.train(("\ufeff" + HEADER + ROWS).encode())


def with_long_texts(inputs):
    return inputs.train(HEADER + "".join(f"{'w1 ' * 40_000},{label}\n" for label in ("negative", "positive")))


def with_unicode(inputs):
    texts = (
        "😀 \u2764\ufe0f\u200d🔥",
        "\u0645\u0631\u062d\u0628\u0627 \u202ew1",
        "\u4f60\u597d",
        "e\u0301\u0301\u0301 \ufffd",
    )
    return inputs.train(
        HEADER + "".join(f"{text},{'negative' if i % 2 else 'positive'}\n" for i, text in enumerate(texts))
    )


def with_float16(inputs):
    for model in ("teacher", "encoder"):
        inputs.change_weights(model, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
        inputs.change_config(model, dtype="float16")
    return {}


def good(recipe, name, change):
    return pytest.param(recipe, change, id=name)


@pytest.mark.parametrize(
    ("recipe", "change"),
    [
        good(FINETUNE, "BOM", with_bom),
        good(DISTILL, "long", with_long_texts),
        good(DISTILL, "unicode", with_unicode),
        good(FINETUNE, "encoder in float16", with_float16),
        good(DISTILL, "teacher in float16", with_float16),
        good(FINETUNE, "CRLF", lambda i: i.train((HEADER + ROWS).replace("\n", "\r\n"))),
        good(DISTILL, "fewer than dev", lambda i: i.train(labelled("negative", "positive"))),
        good(FINETUNE, "one batch", lambda i: {"per_device_train_batch_size": 25}),
        good(DISTILL, "full batch", lambda i: {"per_device_train_batch_size": 24, "dataloader_drop_last": "true"}),
        good(FINETUNE, "YAML", lambda i: i.yaml(b"\xef\xbb\xbfseed: 1\n")),
        good(DISTILL, "folder", lambda i: {"output_dir": i / "new/\u00fc 😀/out"}),
    ],
)
def test_unusual_input_is_good(recipe, change, inputs, monkeypatch):
    """A check that is too strict would refuse data and checkpoints that people have."""
    changes = {"max_steps": 1, **change(inputs)}
    run(monkeypatch, recipe, command(recipe, inputs, changes))
    folder = changes.get("output_dir", inputs / "out")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.dtype == torch.float32 and torch.isfinite(weights(model)).all()
    assert read_results(folder / "results.json")["rows"][-1]["steps"] == 1


# As a process


def test_exit_code_and_last_line(inputs):
    """A script that starts runs would go on after one that was refused, or have to find the reason in a traceback."""
    words = command(FINETUNE, inputs, {"train_file": inputs / "no.csv"})
    found = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / f"{FINETUNE}.py"), *words], capture_output=True, text=True
    )
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith(f"error: {inputs / 'no.csv'} does not exist; check the path")
    assert "Traceback" not in found.stderr and found.stdout == ""


def test_a_bug_keeps_its_traceback():
    """`int("x")` in our own lines would be reported as if the user had given something wrong."""

    def bug():
        int("x")

    def refusal():
        raise ValueError("the input is wrong")

    with pytest.raises(ValueError, match="invalid literal"):
        run_main(bug)
    with pytest.raises(SystemExit, match="2"):
        run_main(refusal)
    with pytest.raises(json.JSONDecodeError):  # raised by a library
        run_main(lambda: json.loads("{"))
