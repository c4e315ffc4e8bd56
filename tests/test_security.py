"""What comes from others stays data: nothing of it runs, and nothing of it stands in a card or report but as text.
And what is ours stays here: no file that is written says whose machine it was."""

import ast
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import make_dataset, make_model
from datasets import Dataset
from huggingface_hub import ModelCard
from markdown import markdown
from test_distributed import ROOT
from test_recipes import NAMES, QUICK, run, save_model, write_rows
from transformers import AutoConfig, AutoTokenizer

from hf_kd import DistillationTrainer, cache_teacher_signals
from hf_kd.deploy import OnnxTextClassifier
from hf_kd.deploy.hub import check_student, published_files, push_student
from hf_kd.deploy.model_card import write_model_card
from hf_kd.deploy.report import write_report
from hf_kd.glue import load_glue, load_text_files
from hf_kd.masked_lm import load_masked_lm
from hf_kd.results import describe_command
from hf_kd.signals import Wanted
from hf_kd.signals.teacher import load_teacher, load_teacher_tokenizer


# Pickle


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


TORCH_NAMES = [
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "projection.bin"),
    *("pytorch_model.bin", "optimizer.bin", "model.pt", "consolidated.00.pth", "adapter_model.bin"),
]
PICKLE_NAMES = ["results.pkl", "tokenizer.pkl", "shard-00000-of-00001.pkl", "cache.pickle", "train.pkl", "old.bin"]
CODE_NAMES = ["hf_kd.py", "glue.py", "SST-2.py", "modeling_bert.py", "conftest.py", "sitecustomize.py", "setup.py"]


def plant(folder, marker):
    """Everything that a careless reader would run, beside what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TORCH_NAMES:
        torch.save({"weight": Bomb(marker)}, folder / name)
    for name in PICKLE_NAMES:
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    (folder / "legacy.bin").write_bytes(pickle.dumps({"weight": Bomb(marker)}))
    np.save(folder / "logits.npy", np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    np.savez(folder / "logits.npz", logits=np.array([Bomb(marker)], dtype=object))
    pyarrow.parquet.write_table(extension_table(marker), folder / "beside.parquet")
    for name in CODE_NAMES:
        (folder / name).write_text(f"open({str(marker)!r}, 'w')\n")
    return folder


def extension_table(marker):
    """A column of a type whose description is a pickle, which pyarrow ran on reading until version 14."""
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Bomb(marker)),
    }
    fields = [pyarrow.field("text", pyarrow.string(), metadata=metadata), pyarrow.field("label", pyarrow.string())]
    return pyarrow.table([["w1 w2", "w3"], ["a", "b"]], schema=pyarrow.schema(fields))


@pytest.fixture
def marker(tmp_path):
    """What no test may leave behind."""
    marker = tmp_path / "it-ran"
    yield marker
    assert not marker.exists()


def goes_off(action, marker):
    action()
    ran = marker.exists()
    marker.unlink(missing_ok=True)
    return ran


def test_the_bombs_work(tmp_path):
    """A bomb that is a dud would let every test below pass."""
    marker, folder = tmp_path / "it-ran", tmp_path / "planted"
    plant(folder, marker)
    for name in TORCH_NAMES:
        assert goes_off(lambda name=name: torch.load(folder / name, weights_only=False), marker), name
    for name in (*PICKLE_NAMES, "legacy.bin"):
        assert goes_off(lambda name=name: pickle.loads((folder / name).read_bytes()), marker), name
    assert goes_off(lambda: np.load(folder / "logits.npy", allow_pickle=True), marker)
    assert goes_off(lambda: np.load(folder / "logits.npz", allow_pickle=True)["logits"], marker)
    for name in CODE_NAMES:
        assert goes_off(lambda name=name: exec((folder / name).read_text()), marker), name
    table = pyarrow.parquet.read_schema(folder / "beside.parquet")
    assert goes_off(lambda: pickle.loads(table.field("text").metadata[b"ARROW:extension:metadata"]), marker)


def save_planted(folder, tokenizer, marker, **kwargs):
    save_model(folder, tokenizer, **{"seed": 1, **NAMES, **kwargs})
    return plant(folder, marker)


def test_a_model_folder_full_of_bombs(tmp_path, tokenizer, marker):
    """A teacher from a stranger would run code of theirs with the rights of whoever trains."""
    folder = save_planted(tmp_path / "teacher", tokenizer, marker)
    assert load_teacher(folder).config.id2label == NAMES["id2label"]
    assert load_teacher_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
    check_student(folder)
    planted = {*TORCH_NAMES, *PICKLE_NAMES, *CODE_NAMES, "legacy.bin", "logits.npy", "logits.npz", "beside.parquet"}
    assert not planted & set(published_files(folder))
    write_model_card(folder)
    masked = save_model(tmp_path / "mlm", tokenizer, problem="masked_lm")
    load_masked_lm(str(plant(masked, marker)))


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "in parts", "legacy"])
def test_a_model_with_pickled_weights_alone(tmp_path, tokenizer, marker, weights):
    """Without safetensors a loader falls back on pickle, unless it is told not to."""
    folder = save_planted(tmp_path / "model", tokenizer, marker)
    keys = list(make_model().state_dict())
    (folder / "model.safetensors").unlink()
    if weights == "in parts":
        (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "pytorch_model-00001-of-00001.bin")}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif weights == "legacy":
        (folder / "legacy.bin").replace(folder / "pytorch_model.bin")
    for load in (load_teacher, check_student):
        with pytest.raises(ValueError, match="cannot be loaded from safetensors"):
            load(folder)
    with pytest.raises(ValueError, match="cannot be loaded .*from safetensors"):
        load_masked_lm(str(folder))


def test_a_bomb_under_the_name_of_safetensors(tmp_path, tokenizer, marker):
    """The name says safetensors, and a loader that looks at the content would take it for a pickle."""
    folder = save_planted(tmp_path / "model", tokenizer, marker)
    for name in ("pytorch_model.bin", "legacy.bin"):
        (folder / name).replace(folder / "model.safetensors")
        with pytest.raises(ValueError, match="safetensors"):
            load_teacher(folder)


def test_an_export_full_of_bombs(written, tmp_path, marker):
    """Whoever runs a downloaded int8 model would run what lies beside it."""
    folder = tmp_path / "student"
    shutil.copytree(written[0], folder, ignore=shutil.ignore_patterns("checkpoint-*", "cache"))
    plant(plant(folder, marker) / "onnx", marker)
    assert OnnxTextClassifier.from_pretrained(folder)("w1 w2")[0]["label"] in ("negative", "positive")
    check_student(folder)
    for name in ("pytorch_model.bin", "legacy.bin"):
        (folder / "onnx" / name).replace(folder / "onnx" / "model.onnx")
        with pytest.raises(Exception, match="INVALID_PROTOBUF|Protobuf parsing failed"):
            OnnxTextClassifier.from_pretrained(folder, "model.onnx")
    for name in ("tokenizer.json", "config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
        with pytest.raises(Exception):  # noqa: B017  (tokenizers raises plain exceptions)
            OnnxTextClassifier.from_pretrained(folder)
        (folder / name).write_bytes(before)


def make_cache(folder):
    rows = make_dataset(8)
    return cache_teacher_signals(rows, make_model(seed=1), Wanted(hidden=frozenset({1})), folder, device="cpu")


def test_a_cache_full_of_bombs(tmp_path, marker):
    """A cache that colleagues share would run what one of them put there, in everybody's training."""
    folder = tmp_path / "cache"
    before = make_cache(folder)[:]
    plant(folder, marker)
    assert make_cache(folder)[:] == before
    (shard,) = folder.glob("*.arrow")
    whole = shard.read_bytes()
    for bomb in (pickle.dumps(Bomb(marker)), (folder / "model.pt").read_bytes()):
        shard.write_bytes(bomb)
        assert make_cache(folder)[:] == before and shard.read_bytes() == whole  # made again
        for name in (shard.with_suffix(".json").name, "cache.json"):
            text = (folder / name).read_bytes()
            (folder / name).write_bytes(bomb)
            if name == "cache.json":
                with pytest.raises(ValueError, match="cache.json cannot be read"):
                    make_cache(folder)
            else:
                assert make_cache(folder)[:] == before
            (folder / name).write_bytes(text)


def test_a_cache_whose_types_are_pickles(tmp_path, marker):
    """A shard with a note that fits it is read as it is: only the reader of Arrow stands between it and the run."""
    from hf_kd.signals.shards import file_hash

    folder = tmp_path / "cache"
    make_cache(folder)
    (shard,) = folder.glob("*.arrow")
    table = pyarrow.ipc.open_stream(shard.read_bytes()).read_all()  # not memory mapped: the file is about to change
    bomb = extension_table(marker).schema.field("text").metadata
    fields = [field.with_metadata(bomb) for field in table.schema]
    table = pyarrow.table(table.columns, schema=pyarrow.schema(fields, metadata=table.schema.metadata))
    with pyarrow.OSFile(str(shard), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    note = json.loads(shard.with_suffix(".json").read_text())
    note |= {"hash": file_hash(shard), "bytes": shard.stat().st_size}
    shard.with_suffix(".json").write_text(json.dumps(note))
    Dataset.from_file(str(shard))[:]
    make_cache(folder)[:]


def test_files_of_rows_full_of_bombs(tmp_path, marker):
    """A data set is what people download from anywhere."""
    for split in ("train", "dev"):
        write_rows(plant(tmp_path / "glue" / "SST-2", marker) / f"{split}.tsv", ["sentence", "label"])
    assert len(load_glue("sst2", plant(tmp_path / "glue", marker))["train"]) == 24
    folder = plant(tmp_path / "rows", marker)
    dev = write_rows(folder / "dev.csv", ["text", "label"])
    for name in ("train.pkl", "logits.npy", "model.pt", "SST-2.py"):
        with pytest.raises(ValueError, match="the name has to end in .csv"):
            load_text_files(folder / name, dev)
    for suffix in (".csv", ".tsv", ".json", ".jsonl", ".parquet"):
        for bomb in ("train.pkl", "logits.npy", "model.pt"):
            disguised = folder / f"{bomb}{suffix}"
            disguised.write_bytes((folder / bomb).read_bytes())
            with pytest.raises(ValueError, match=re.escape(disguised.name)):
                load_text_files(disguised, dev)
    dev = write_rows(folder / "dev.csv", ["text", "label"], labels=("a", "b"))
    data, _ = load_text_files(folder / "beside.parquet", dev)
    assert data["train"]["text"][:] == ["w1 w2", "w3"]


def test_a_recipe_among_bombs(tmp_path, monkeypatch, tokenizer, marker):
    """Each reader may be careful, and the recipe between them not."""
    glue = tmp_path / "glue"
    for split in ("train", "dev"):
        write_rows(plant(glue / "SST-2", marker) / f"{split}.tsv", ["sentence", "label"])
    teacher = save_planted(tmp_path / "teacher", tokenizer, marker)
    student = save_planted(tmp_path / "student", tokenizer, marker, num_hidden_layers=1)
    flags = ["--task_name", "sst2", "--glue_dir", glue, "--teacher_model_name_or_path", teacher]
    flags += ["--student_model_name_or_path", student, "--cache_teacher", tmp_path / "cache", *QUICK]
    flags += ["--save_strategy", "steps", "--save_steps", 2, "--max_steps", 2, "--output_dir", tmp_path / "out"]
    monkeypatch.chdir(plant(tmp_path / "here", marker))
    plant(tmp_path / "out", marker)
    run(monkeypatch, "glue_distill", *flags)
    plant(tmp_path / "cache", marker)
    run(monkeypatch, "glue_distill", *flags)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    (student / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        run(monkeypatch, "glue_distill", *flags)


@pytest.mark.parametrize("planted", ["beside", "optimizer.pt", "scheduler.pt", "rng_state.pth", "weights"])
def test_a_checkpoint_to_resume_full_of_bombs(planted, make_args, tmp_path, collator, marker, monkeypatch):
    """Checkpoints are copied between machines and people; whoever goes on from one would run what is in it."""

    def train(max_steps, resume=None):
        args = make_args(max_steps=max_steps, save_strategy="steps", save_steps=2)
        trainer = DistillationTrainer(
            make_model(num_hidden_layers=1),
            args,
            teacher_model=make_model(seed=1),
            train_dataset=make_dataset(16),
            data_collator=collator,
        )
        trainer.train(resume_from_checkpoint=resume)

    train(2)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    own = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    plant(checkpoint, marker)
    (checkpoint / "scaler.pt").unlink()  # is of float16 on a GPU
    for name, content in own.items():
        if name != planted:
            (checkpoint / name).write_bytes(content)
    if planted == "beside":
        return train(4, str(checkpoint))
    if planted == "weights":
        (checkpoint / "model.safetensors").unlink()
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError)):
        train(4, str(checkpoint))


# Code beside a model


def trap(folder, marker, model_type):
    """A model folder that asks to run its code wherever transformers lets a model ask."""
    # A file for each: what was imported once is not run again.
    for name, base in (
        ("Config", "BertConfig"),
        ("Model", "BertForSequenceClassification"),
        ("Tok", "BertTokenizerFast"),
    ):
        (folder / f"evil_{name}.py").write_text(
            f"open({str(marker)!r}, 'w')\nfrom transformers import {base}\nclass {name}({base}):\n    pass\n"
        )
    heads = ("", "ForSequenceClassification", "ForMaskedLM")
    models = {f"AutoModel{head}": "evil_Model.Model" for head in heads}
    tokenizer = {"auto_map": {"AutoTokenizer": [None, "evil_Tok.Tok"]}, "tokenizer_class": "Tok"}
    for name, more in (
        ("config.json", {"model_type": model_type, "auto_map": {"AutoConfig": "evil_Config.Config", **models}}),
        ("tokenizer_config.json", tokenizer),
    ):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, **more}))
    return folder


@pytest.fixture
def trapped(tmp_path, tokenizer, monkeypatch):
    """Folders with code; and somebody who answers yes to all that is asked."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    def make(model_type, marker):
        name = f"model-{model_type}-{marker.name}"
        return trap(save_model(tmp_path / name, tokenizer, seed=1, **NAMES), marker, model_type)

    return make


def test_the_traps_work(trapped, tmp_path):
    """A trap that does not close would let the next test pass."""
    marker = tmp_path / "closed"
    for model_type in ("bert", "evil"):
        folder = trapped(model_type, marker)
        for auto_class in (AutoConfig, AutoTokenizer):
            assert goes_off(lambda c=auto_class, f=folder: c.from_pretrained(f, trust_remote_code=True), marker)


@pytest.mark.parametrize("model_type", ["bert", "evil"])
def test_code_beside_a_model_is_not_run(trapped, tmp_path, monkeypatch, tokenizer, marker, model_type):
    """transformers asks on the terminal whether to run it, and a `yes |` before a long command answers."""
    folder = trapped(model_type, marker)
    data = write_rows(tmp_path / "rows.csv", ["text", "label"], labels=("negative", "positive"))
    plain_teacher = save_model(tmp_path / "plain", tokenizer, seed=1, **NAMES)
    flags = ["--train_file", data, "--validation_file", data, "--output_dir", tmp_path / "out", *QUICK]
    flags += ["--max_steps", 1]

    def distil(teacher, *more):
        run(monkeypatch, "glue_distill", *flags, "--teacher_model_name_or_path", teacher, *more)

    loads = {
        "teacher": lambda: load_teacher(folder),
        "tokenizer": lambda: load_teacher_tokenizer(folder),
        "masked_lm": lambda: load_masked_lm(str(folder)),
        "student": lambda: check_student(folder),
        "card": lambda: write_model_card(folder),
        "glue_finetune": lambda: run(monkeypatch, "glue_finetune", *flags, "--model_name_or_path", folder),
        "glue_distill, teacher": lambda: distil(folder),
        "glue_distill, student": lambda: distil(plain_teacher, "--student_model_name_or_path", folder),
    }
    ran = []
    for name, load in loads.items():
        try:
            load()
        except (ValueError, OSError):
            pass  # refused
        ran += [name] if marker.exists() else []
        marker.unlink(missing_ok=True)
    assert ran == []


# Cards and reports

TRICKS = {
    "jinja": "{{7*7}}{% for x in range(9) %}x{% endfor %}{# #}",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "entity": "&lt;script&gt;alert(1)&lt;/script&gt;",
    "link": "[a](javascript:alert(1)) ](javascript:alert(1)) ![i](https://evil.example/p.png)",
    "reference": "[a][b]\n\n[b]: https://evil.example",
    "address": "https://evil.example www.evil.example <https://evil.example> me@evil.example",
    "front matter": "x\n---\ninjected: true\n---\n",
    "yaml": "x: !!python/object/apply:os.system ['id']\n- &a [*a]\ninjected: true",
    "table": "a | b |\n| c | d || e \\| f",
    "code": "`a` ``b`` ```\n```\n~~~\n    code",
    "blocks": "x\n\n# Heading\n\n- item\n1. item\n> quote\n***\n===\n---",
    "emphasis": "*a* **b** _c_ __d__ ~~e~~ a_b_c $x^2$ $\\frac{$",
    "path": "../../x/..\\..\\y",
    "quotes": "\"'); import os; os.system('id') #\n\\",
    "comment": "<!-- --><!-- This card was generated by hf_kd -->",
    "unseen": "a\u202eb\u200bc\x00d\x1b[31m\ud800\u2028e",
    "long": "a" * 5000,
}


def fill(value, trick):
    """The same results with every string that names something replaced, in keys too."""
    if isinstance(value, dict):
        return {
            trick if key in GIVEN_KEYS else key: found if key in KEPT else fill(found, trick)
            for key, found in value.items()
        }
    if isinstance(value, list):
        return [fill(found, trick) for found in value]
    return trick if isinstance(value, str) else value


MEASURED = {"metrics": {"dev": {"score": 0.5}}, "main_metric": {"split": "dev", "name": "score"}}
CELL = {"threads": 1, "batch_size": 1, "length": 16, "p50_ms": 2.0, "p95_ms": 3.0, "rows_per_second": 5.0}
HONEST = {
    "rows": [
        {"role": "student", "task": "custom", "seed": 1, "parameters": 1000, "learning_rates": [0.1, 0.2], **MEASURED}
    ],
    "comparisons": [
        {
            **{"task": "custom", "metric": "score", "difference": 0.5, "low": 0.25, "high": 0.75, "rows": 9},
            **{"confidence": 0.95, "p_value": 0.5},
        }
    ],
    "benchmark": [
        {
            **{"variant": "student", "role": "student", "runtime": "onnxruntime", "precision": "fp32", "cpu": "CPU"},
            **{"task": "custom", "parameters": 1000, "size_bytes": 1000, "memory_mb": 5.0, "latency": [CELL]},
            **{"end_to_end": [], **MEASURED},
        }
    ],
    "export": {
        **{"backend": "optimum", "opset": 18, "graph": "rewritten", "max_length": 16},
        "parity": {"rows": 8, "max_difference": 1e-6},
        "quantization": {
            **{"method": "dynamic", "nodes_in_fp32": ["/a/b"], "attempts": [], "reduce_range": True},
            "metric": {"name": "score", "fp32": 0.5, "int8": 0.5, "drop": 0.0, "max_drop": 0.005},
        },
        "cpu": {"model": "CPU", "architecture": "x86_64", "flags": ["avx2"], "cores": 2},
    },
    "distillation": {
        "problem": "single_label_classification",
        "teachers": [
            {
                **{"name": "org/teacher", "is_hub_id": True, "revision": "abc", "license": "mit", "layers": 4},
                **{"architecture": "BertForSequenceClassification", "parameters": 2000, "hidden_size": 32},
            },
            {"column": "teacher_probs"},
        ],
        "student": {
            **{"parameters": 1000, "layers": 2},
            "start": {"kind": "checkpoint", "name": "org/start", "is_hub_id": True, "base_model": "org/base"},
        },
        "terms": [
            {
                **{"name": "logit_loss", "kind": "logit", "type": "kl", "weight": 1.0, "temperature": 2.0},
                **{"options": {"top_k": "value"}, "head_reduction": "mean"},
            }
        ],
        "data": {
            **{"task": "custom", "text_columns": ["text"], "dataset": "org/data", "dataset_name": "Data"},
            **{"files": {"train": "train.csv", "validation": "dev.csv", "unlabeled": "more.csv"}, "rows": 24},
            **{"labeled_rows": 12, "unlabeled_rows": 12, "augmented_rows": 3, "language": "en", "max_length": 16},
            **{"augment": {"variants": 1, "masked_lm": {"name": "org/mlm", "is_hub_id": True}}},
            **{"evaluation_rows": {"dev": 9}},
        },
        "training": {
            **{"steps": 4, "planned_steps": 4, "batch_size": 8, "processes": 2, "precision": "bf16", "seed": 1},
            **{"learning_rate": 0.1, "optimizer": "AdamW", "distributed": "MULTI_CPU"},
            **{"arguments": {"lr_scheduler_type": "linear"}},
        },
    },
    "run": {"command": "python a.py", "versions": {"python": "3.11"}, "hardware": "CPU", "commit": "abc"},
    "card": {
        **{"repo_id": "me/student", "model_name": "Student", "license": "mit", "language": "en", "tags": ["tag"]},
        **{"datasets": ["org/data"], "dataset_name": "Data", "dataset_config": "plain", "base_model": "org/base"},
    },
}
# Words that the code branches on, and no person gives.
KEPT = {"role", "kind", "runtime", "problem", "precision"}
GIVEN_KEYS = {"dev", "score", "python", "lr_scheduler_type", "top_k"}


class Structure(HTMLParser):
    """Tags in their order, and where they lead."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.places, self.comments = [], set(), []
        self.feed(markdown(text, extensions=["tables", "fenced_code"]))

    def handle_starttag(self, tag, attrs):
        # What cannot stand as code, or as a link, is plain text.
        self.tags += [tag] if tag not in ("code", "a") else []
        self.places |= {value for name, value in attrs if name in ("href", "src")}
        assert not {name for name, _ in attrs} - {"href", "src", "alt", "class", "style"}, attrs

    def handle_comment(self, data):
        self.comments.append(data)


def assert_same_structure(text, honest):
    found, expected = Structure(text), Structure(honest)
    assert found.tags == expected.tags
    assert found.comments == expected.comments and found.places <= expected.places
    outside_code = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->", "", text, flags=re.DOTALL)
    assert not re.search(r"https?://|www\.\w", outside_code, re.IGNORECASE)
    assert "49" not in text and "{{" not in outside_code and "{%" not in outside_code
    assert all(char.isprintable() or char == "\n" for char in text)


def body(card):
    return card.partition("\n---\n")[2]


def make_student(folder, results, label="negative"):
    folder.mkdir()
    config = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {"0": label, "1": "positive"}}))
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"0" * 1000)
    (folder / "results.json").write_text(json.dumps(results))
    return write_model_card(folder).read_text(encoding="utf-8")


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", TRICKS)
def test_names_are_inert_in_a_card(tmp_path, name):
    """A label or a folder called so would be script, link or metadata on the page of whoever publishes the student."""
    trick = TRICKS[name]
    honest = make_student(tmp_path / "student", fill(HONEST, "name"))
    card = make_student(tmp_path / "other", fill(HONEST, trick), label=trick)
    assert_same_structure(body(card), body(honest))
    expected, found = (ModelCard(text).data.to_dict() for text in (honest, card))
    assert set(found) <= set(expected)
    (result,) = found["model-index"][0]["results"]
    assert set(result) == {"task", "dataset", "metrics"} and len(result["metrics"]) == 1
    for snippet in re.findall(r"```python\n(.*?)\n```", card, flags=re.DOTALL):
        calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
        called = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
        assert called <= {"pipeline", "print", "classify", "tokenizer", "model", "str"}
    assert write_model_card(tmp_path / "other").read_text(encoding="utf-8") == card  # it is still known as generated
    names = ["README.md", "config.json", "onnx/model.onnx", "results.json"]
    assert files_below(tmp_path) == [f"{folder}/{name}" for folder in ("other", "student") for name in names]


@pytest.mark.parametrize("name", [name for name in TRICKS if name not in ("path", "unseen", "long")])
def test_folders_with_such_names(tmp_path, name):
    """The folder's name is the card's title, and where it says to load the student from."""
    folder = tmp_path / TRICKS[name].replace("/", "\\")
    results = {name: section for name, section in HONEST.items() if name != "card"}
    honest, card = make_student(tmp_path / "student", results), make_student(folder, results)
    assert_same_structure(body(card), body(honest))
    assert ModelCard(card).data.model_name == folder.name
    assert json.dumps(folder.name) in card


@pytest.mark.parametrize("name", TRICKS)
def test_names_are_inert_in_a_report(tmp_path, name):
    """A report is what people paste into an issue or a pull request, where it is rendered."""
    pytest.importorskip("matplotlib")
    texts = []
    for folder, trick in (("honest", "name"), ("hostile", TRICKS[name])):
        (tmp_path / folder).mkdir()
        results = fill(HONEST, trick)
        if name != "emphasis":  # what would be a formula in the picture, which takes half a second
            results["benchmark"][0] |= {"metrics": None, "main_metric": None}
        (tmp_path / folder / "results.json").write_text(json.dumps(results))
        texts.append(write_report(tmp_path / folder / "results.json").read_text(encoding="utf-8"))
    assert_same_structure(texts[1], texts[0])
    assert {path.name for path in (tmp_path / "hostile").iterdir()} <= {"results.json", "report.md", "pareto.png"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["honest", "hostile"]


@pytest.mark.parametrize("repo_id", ["../../x", "a/../b", "a/b/c", "me/<script>", "me/x\ny", "me/{{7*7}}", "/etc/x"])
def test_repositories_with_such_names(tmp_path, tokenizer, repo_id):
    """A name that is a path would be one of a file, or of another repository, at the other end."""
    folder = save_model(tmp_path / "student", tokenizer, num_hidden_layers=1)
    before = files_below(tmp_path)
    with pytest.raises(ValueError, match="[Rr]epo id"):
        push_student(folder, repo_id, token="hf_" + "x" * 30)
    assert files_below(tmp_path) == before


# What is ours

TOKEN = "hf_" + "SecretTokenOfAlice" * 2
HOST, USER, HOME = "host-of-alice", "user-alice", "home-of-alice"
STARTS = """
import os, platform, socket
socket.gethostname = platform.node = lambda: {host!r}
uname = os.uname()
os.uname = lambda: os.uname_result((uname[0], {host!r}, *uname[2:]))
"""
ASKS = "import os, platform, socket; print(socket.gethostname(), platform.node(), os.uname().nodename)"
# Names of machines that stand in files for other reasons, as short ones do by chance.
COMMON_HOSTS = {"localhost", "ubuntu", "debian", "fedora", "docker", "python"}


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer):
    """The output of whole runs, in which each file is a place where the user's name could stand; and the words that
    must not."""
    pytest.importorskip("onnxruntime")
    home = tmp_path_factory.mktemp("machine") / HOME
    start = home / "start"
    start.mkdir(parents=True)
    (start / "sitecustomize.py").write_text(STARTS.format(host=HOST))
    teacher = save_model(home / "teacher", tokenizer, seed=1, **NAMES)
    labels = ("negative", "positive")
    train = write_rows(home / "data" / "train|`<b>{{7*7}}.csv", ["text", "label"], labels=labels)
    dev = write_rows(home / "data" / "dev.csv", ["text", "label"], labels=labels, seed=1)
    output = home / "out"
    flags = ["--train_file", train, "--validation_file", dev, f"--teacher_model_name_or_path={teacher}"]
    flags += ["--cache_teacher", output / "cache", "--export_onnx", "--hub_token", TOKEN]
    flags += [*QUICK, "--save_strategy", "steps", "--eval_strategy", "steps", "--save_steps", 2, "--eval_steps", 2]
    flags += ["--load_best_model_at_end", "true", "--max_steps", 2, "--output_dir", output]
    flags += ["--student_num_layers", 1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "HF_"))}
    environment |= {"HOME": str(home), "USER": USER, "LOGNAME": USER, "HOSTNAME": HOST, "HF_TOKEN": TOKEN}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(start), *sys.path]),
    }
    options = {"env": environment, "cwd": home, "capture_output": True, "text": True}
    command = [sys.executable, ROOT / "recipes" / "glue_distill.py", *map(str, flags)]
    for words in ([sys.executable, "-c", ASKS], command):
        done = subprocess.run(words, **options)
        assert done.returncode == 0, done.stderr
        assert "sitecustomize" not in done.stderr  # python says what failed there, and goes on with the real name
        assert words is command or done.stdout.split() == [HOST] * 3
    words = [TOKEN, HOST, USER, HOME, str(ROOT), sys.prefix, str(Path.home())]
    real_host = socket.gethostname()
    if len(real_host) > 5 and real_host.partition(".")[0] not in COMMON_HOSTS:
        words.append(real_host)
    return output, [word for word in words if len(word) > 1]


def test_no_file_says_whose_machine_it_was(written):
    """Whoever publishes a student, or sends its folder to a colleague, would send along a token or their name."""
    output, words = written
    names = files_below(output)
    expected = {"README.md", "results.json", "model.safetensors", "onnx/model_quantized.onnx", "cache/cache.json"}
    assert expected <= set(names) and "checkpoint-2/trainer_state.json" in names
    found = []
    for name in names:
        content = (output / name).read_bytes()
        for word in words:
            codes = (word.encode(), word.encode("utf-16-le"))
            found += [(name, word) for code in codes if code in content or code in name.encode()]
    assert found == []


def test_pickles_are_not_written_beside_the_student(written):
    """The Trainer's arguments are a pickle that nothing reads, with every path and the token in it."""
    output, _ = written
    resumed_from = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    pickled = {name for name in files_below(output) if re.search(r"\.(bin|pt|pth|pkl|npy)$", name)}
    assert {Path(name).name for name in pickled} <= resumed_from
    assert {Path(name).parent.name for name in pickled} <= {"checkpoint-2"}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/home/alice/my runs/x", "'x'"),
        ("--output_dir=/home/alice/x", "--output_dir=x"),
        ("~/x/y", "y"),
        ("~alice/x", "x"),
        ("../alice/x", "x"),
        ("file:///home/alice/x", "file:x"),
        ("[/home/alice/x,/home/alice/y]", "'[x,y]'"),
        ('{"path": "/home/alice/x"}', '\'{"path": "x"}\''),
        ("key=value=/home/alice/x", "key=value=x"),
        ("org/model", "org/model"),
        ("linear:1:0.5", "linear:1:0.5"),
        ("--hub_token=not-like-the-others", "--hub_token=hf_***"),
    ],
)
def test_a_command_is_noted_without_its_paths(word, expected):
    """Every way to write a path says the user's name, and the command is in each results file and report."""
    assert describe_command(["recipes/a.py", word]) == f"python recipes/a.py {expected}".replace("'x'", "x")


# The packages that are pinned

FOUND = {"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": ["CVE-1"], "description": ""}
UNKNOWN = {"name": "b", "skip_reason": "Dependency not found on PyPI and could not be audited: b (1.0)"}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([{"name": "a", "version": "1.0", "vulns": []}], 0, "no known vulnerabilities"),
        ([{"name": "a", "version": "1.0", "vulns": [FOUND]}], 1, "a 1.0: PYSEC-1, fixed in 1.1"),
        ([{"name": "a", "version": "1.0", "vulns": [FOUND]}, UNKNOWN], 1, "SKIPPED"),
        ([UNKNOWN], 0, "SKIPPED pip-audit, whose data cannot be reached: nothing is known of 1 of 1 packages (b"),
        (None, 0, "SKIPPED pip-audit, whose data cannot be reached: ConnectionError"),
    ],
    ids=["clean", "finding", "finding and a gap", "mirror without the data", "offline"],
)
def test_the_audit_tells_a_finding_from_no_answer(tmp_path, packages, code, said):
    """pip-audit ends with 1 for both, and with 0 where a mirror knows nothing of any package."""
    tool = tmp_path / "pip-audit"
    write = "" if packages is None else f"echo '{json.dumps({'dependencies': packages})}' > \"$last\""
    tool.write_text(f'#!/bin/sh\nfor last; do :; done\n{write}\necho "ConnectionError: no" >&2\nexit 1\n')
    tool.chmod(0o755)
    command = [sys.executable, "-S", ROOT / ".ci" / "audit.py", tool, "pins.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, said in done.stdout) == (code, True), done
