"""Small checkpoints that were really trained, and what `export_onnx` makes of them; each is made once per run."""

import importlib.util
import random
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCAB, make_model
from datasets import Dataset
from transformers import BertTokenizerFast, PreTrainedModel

from hf_kd.glue import GlueMetric, TextTask


BACKEND = "optimum" if importlib.util.find_spec("optimum") else "transformers"
FP32_FILE, INT8_FILE, REPORT_FILE = "onnx/model.onnx", "onnx/model_quantized.onnx", "onnx/export_report.json"

# One half of the words means positive, the other negative.
GOOD_WORDS, BAD_WORDS = [f"w{i}" for i in range(29)], [f"w{i}" for i in range(29, 58)]
CLASSES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
PAIR_CLASSES = {"id2label": {0: "worse", 1: "better"}, "label2id": {"worse": 0, "better": 1}}
# Of each kind: the task, and what its model's config says.
KINDS: dict[str, tuple[TextTask, dict[str, Any]]] = {
    "single": (TextTask("invented", ("text",), ("negative", "positive"), ("accuracy",), "accuracy"), CLASSES),
    "pair": (
        TextTask("invented", ("first", "second"), ("worse", "better"), ("accuracy", "f1"), "combined_score"),
        PAIR_CLASSES,
    ),
    "regression": (
        TextTask("invented", ("text",), None, ("pearson", "spearmanr"), "combined_score"),
        {"num_labels": 1, "problem_type": "regression"},
    ),
}
# Of each shared export: family, kind and arguments of `export_onnx`. An export takes 10 s with transformers' exporter,
# so options that do not touch each other share one.
EXPORTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "single", {}),
    "distilbert": ("distilbert", "single", {}),
    "roberta": ("roberta", "single", {}),
    "electra": ("electra", "single", {"quantization": "static"}),
    "modernbert": ("modernbert", "single", {}),
    "pair": ("bert", "pair", {"quantization": "static", "quantization_format": "QOperator"}),
    "regression": ("bert", "regression", {"opset": 19, "max_length": 16, "optimize": False}),
}


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with its tokenizer in a folder, and rows that it has not seen."""

    folder: Path
    task: TextTask
    validation: Dataset
    calibration: Dataset

    def texts(self, rows=None) -> list[Any]:
        columns = [(self.validation if rows is None else rows)[column][:] for column in self.task.text_columns]
        return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))

    def score(self, logits: np.ndarray) -> float:
        """The main metric of logits of the validation rows."""
        predictions = logits[:, 0] if self.task.is_regression else logits.argmax(axis=-1)
        scores = GlueMetric(self.task).compute(predictions=predictions, references=self.validation["label"][:])
        return scores[self.task.main_metric]

    def with_labels_reversed(self) -> "Checkpoint":
        """The same rows, in a data set that counts the classes from the other end."""
        last = self.task.num_labels - 1
        labels = [last - label for label in self.validation["label"]]
        validation = self.validation.remove_columns("label").add_column("label", labels)
        return replace(self, task=replace(self.task, label_names=self.task.label_names[::-1]), validation=validation)

    def arguments(self) -> dict[str, Any]:
        """What `export_onnx` is told about the data."""
        return {"task": self.task, "validation": self.validation, "calibration": self.calibration}


@dataclass(frozen=True)
class Export:
    checkpoint: Checkpoint
    folder: Path
    report: dict[str, Any]


def sentence(rng: random.Random, share_of_good: float) -> tuple[str, float]:
    """3 to 20 words, and how many of them are good."""
    words = [rng.choice(GOOD_WORDS if rng.random() < share_of_good else BAD_WORDS) for _ in range(rng.randint(3, 20))]
    return " ".join(words), sum(word in GOOD_WORDS for word in words) / len(words)


def generate_rows(kind: str, num_rows: int, seed: int) -> Dataset:
    """Rows whose label follows from the share of good words: over half, the share, or over the second text's."""
    rng, rows = random.Random(seed), []
    while len(rows) < num_rows:
        text, good = sentence(rng, rng.random())
        if kind == "regression":
            rows.append({"text": text, "label": 5.0 * good})
        elif kind == "single" and abs(good - 0.5) > 0.1:
            rows.append({"text": text, "label": int(good > 0.5)})
        elif kind == "pair":
            second, other = sentence(rng, 1.0 - good)
            if abs(good - other) > 0.2:
                rows.append({"first": text, "second": second, "label": int(good > other)})
    return Dataset.from_list(rows)


def save_tokenizer(folder: Path, family: str = "bert", **settings: Any) -> BertTokenizerFast:
    """The words of the root conftest, with the columns that the family's own tokenizer writes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    if family not in ("bert", "electra"):
        names.remove("token_type_ids")
    tokenizer = BertTokenizerFast.from_pretrained(folder, model_max_length=80, model_input_names=names, **settings)
    (folder / "vocab.txt").unlink()
    tokenizer.save_pretrained(folder)
    return tokenizer


def fit(model: PreTrainedModel, tokenizer: BertTokenizerFast, rows: Dataset, task: TextTask, num_epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for epoch in range(num_epochs):
        for batch in rows.shuffle(seed=epoch).iter(batch_size=32):
            inputs = tokenizer(*(batch[column] for column in task.text_columns), padding=True, return_tensors="pt")
            model(**inputs, labels=torch.tensor(batch["label"])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


def torch_logits(model: PreTrainedModel, tokenizer: BertTokenizerFast, texts: list[Any]) -> np.ndarray:
    """What the model answers in torch, one row at a time."""
    logits = []
    with torch.inference_mode():
        for text in texts:
            columns = text if isinstance(text, tuple) else (text,)
            logits.append(model(**tokenizer(*columns, return_tensors="pt")).logits[0].numpy())
    return np.stack(logits)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """`trained(family, kind)`: a checkpoint that does its task."""

    @cache
    def make(family: str, kind: str) -> Checkpoint:
        folder = tmp_path_factory.mktemp("checkpoint")
        task, config = KINDS[kind]
        # A window narrower than the rows: an export that loses it answers differently.
        shape = {"local_attention": 8} if family == "modernbert" else {}
        model = make_model(family, num_hidden_layers=2, **shape, **config)
        tokenizer = save_tokenizer(folder, family)
        validation, calibration = generate_rows(kind, 200, seed=2), generate_rows(kind, 100, seed=3)
        checkpoint = Checkpoint(folder, task, validation, calibration)
        fit(model, tokenizer, generate_rows(kind, 800, seed=1), task, num_epochs=8 if kind == "pair" else 4)
        assert checkpoint.score(torch_logits(model, tokenizer, checkpoint.texts())) > 0.9
        model.save_pretrained(folder)
        return checkpoint

    return make


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    """`exported(name)`: one of `EXPORTS`, not to be written into."""
    from hf_kd.deploy.onnx import export_onnx

    @cache
    def make(name: str) -> Export:
        family, kind, arguments = EXPORTS[name]
        checkpoint = trained(family, kind)
        if name == "electra":
            checkpoint = checkpoint.with_labels_reversed()
        folder = tmp_path_factory.mktemp("exports") / name
        report = export_onnx(checkpoint.folder, folder, **checkpoint.arguments(), **arguments)
        return Export(checkpoint, folder, report)

    return make


@pytest.fixture
def copy_of_export(exported, tmp_path):
    """`copy_of_export(name)`: the same folder, to be changed."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(exported(name).folder, tmp_path / f"copy-of-{name}"))

    return make
