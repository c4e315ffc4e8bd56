"""From a fine-tuned checkpoint to a folder with checked ONNX files, float32 and int8."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..checkpoint import has_tokenizer, load_finetuned
from ..cpu import cpu_facts, needs_reduced_range
from ..glue import UNLABELED, TextTask, score_logits
from ..signals.capture import columns_for, forward_columns
from . import FP32_FILE, INT8_FILE
from .classifier import OnnxTextClassifier, TextInput, length_limit
from .exporters import OPSETS, find_exporter, opset_of
from .graph import optimize_for_cpu
from .parity import check_parity, spread_over_lengths
from .quantization import Int8Settings, QuantizationError, quantize_within
from .staging import is_staging, staged


logger = logging.get_logger(__name__)

Rows = Sequence[Mapping[str, Any]]  # a `datasets.Dataset`, or a list of dictionaries

REPORT_FILE = "onnx/export_report.json"
MAX_CALIBRATION_ROWS = 4096  # are read and tokenized, for NUM_CALIBRATION_ROWS of different lengths
NUM_CALIBRATION_ROWS = 256
NUM_SENSITIVITY_ROWS = 64

# For the comparison with torch where nobody gave rows of the task.
_TEXTS = (
    "Yes.",
    "The film was better than I had expected.",
    "It rained all day, so we stayed in and read; nobody minded, and in the evening the sky cleared after all.",
    "Prices rose by 3.5 % in May (2.9 % a year before), and economists at two banks said they would rise further.",
    " ".join(["This is one of those long reviews that say the same thing again and again."] * 8),
)


def export_onnx(
    model_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    backend: Literal["auto", "optimum", "transformers"] = "auto",
    quantization: Literal["dynamic", "static"] | None = "dynamic",
    *,
    task: TextTask | None = None,
    validation: Rows | None = None,
    calibration: Rows | None = None,
    max_metric_drop: float = 0.005,
    quantization_format: Literal["QDQ", "QOperator"] = "QDQ",
    opset: int | None = None,
    optimize: bool = True,
    max_length: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    """
    Export a fine-tuned sequence classification model to ONNX, compare it with torch, and quantise it to int8.

    The folder holds `onnx/model.onnx`, `onnx/model_quantized.onnx` (each one file, weights inside), the config and
    the tokenizer: what `ORTModelForSequenceClassification`, [`OnnxTextClassifier`], ONNX Runtime and transformers.js
    load. It appears complete or not at all. `output_dir` may be `model_dir`: then `onnx/` is added to the checkpoint.

    Args:
        model_dir (`str` or `Path`): Folder (or Hub id) of the model and its tokenizer.
        output_dir (`str` or `Path`): A new or empty folder, an earlier export, or `model_dir`.
        backend (`str`, *optional*, defaults to `"auto"`): `optimum` (optimum-onnx), `transformers` (the exporter of
            transformers 5), or `auto` for the first that is installed. The folder is the same.
        quantization (`str`, *optional*, defaults to `"dynamic"`): `dynamic` finds the range of each activation while
            running; `static` takes it from `calibration` rows; `None` writes float32 alone.
        task ([`~hf_kd.glue.TextTask`], *optional*): Names the text columns and the metric of the rows.
        validation (`Dataset` or sequence of `dict`, *optional*): Rows with the task's text columns and `label`. They
            are compared with torch, and the int8 file has to keep the metric on them. Without them built-in texts
            are compared, and the int8 file's quality is not known, with a warning.
        calibration (`Dataset` or sequence of `dict`, *optional*): Rows of the training data, for static ranges; up to
            256 of different lengths are taken.
        max_metric_drop (`float`, *optional*, defaults to 0.005): How far the main metric may drop from float32 to
            int8, in the metric's own unit. Beyond it, see [`~hf_kd.deploy.quantization.quantize_within`].
        quantization_format (`str`, *optional*, defaults to `"QDQ"`): `QDQ` or `QOperator`, for static quantisation.
        opset (`int`, *optional*): Version of the ONNX operators; defaults to the backend's choice.
        optimize (`bool`, *optional*, defaults to `True`): Rewrite the graph for CPUs, see [`~hf_kd.deploy.graph`]: the
            same answers in standard operators, sooner. Graphs that do not have BERT's shape stay as they are.
        max_length (`int`, *optional*): Longest input in tokens of the rows, as in training; defaults to what the
            model takes.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`str`, *optional*): For a private Hub id; by default that of HF_TOKEN, or of `hf auth login`.

    Returns:
        `dict`: What was done and found, also written to `onnx/export_report.json`: `backend`, `opset`,
        `graph`, `inputs`, `max_length`, `parity`, `quantization` and `cpu`.

    Raises:
        `ValueError`: For arguments, a model or rows that cannot work.
        `ImportError`: If no backend is installed, with the line that installs one.
        [`~hf_kd.deploy.parity.ParityError`]: If the file does not answer as the model does.
        [`~hf_kd.deploy.quantization.QuantizationError`]: If no int8 file keeps the metric. The float32 file is kept.
        `OSError`: If the folder cannot be written; nothing of it is left then.
    """
    _check_arguments(quantization, max_metric_drop, task, validation, calibration)
    calibration_texts = _texts(calibration, task, MAX_CALIBRATION_ROWS)
    data = _Data(task, _texts(validation, task), _labels(validation, task), calibration_texts)
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    in_place = output_dir.resolve() == model_dir.resolve()
    _check_output_dir(output_dir, in_place)
    backend_name, export = find_exporter(backend)
    _check_opset(opset, backend_name.split()[0])
    model, tokenizer = _load(model_dir, revision, token)
    limit = length_limit(model.config.to_dict(), {"model_max_length": tokenizer.model_max_length})
    if max_length is not None and max_length > limit:
        raise ValueError(f"max_length={max_length}; this model takes up to {limit} tokens.")
    if task is not None:
        task.logit_columns(model.config.id2label)  # an error if it has other classes
    failure = None
    with staged(output_dir) as staging:
        model.config.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if in_place:  # what is compared has to be what stays
            for file in staging.iterdir():
                if (model_dir / file.name).is_file():
                    shutil.copy(model_dir / file.name, file)
        (staging / "onnx").mkdir()
        sample = _sample_inputs(model, tokenizer)
        export(model, sample, staging / FP32_FILE, opset)
        found_opset = _check_opset(opset, backend_name.split()[0], found=opset_of(staging / FP32_FILE))
        arrays = {name: tensor.numpy() for name, tensor in sample.items()}
        reason = optimize_for_cpu(staging / FP32_FILE, arrays, limit) if optimize else "optimize=False"
        fp32 = OnnxTextClassifier.from_pretrained(staging, FP32_FILE, max_length=max_length)
        report: dict[str, Any] = {
            "backend": backend_name,
            "opset": found_opset,
            "graph": "rewritten for CPUs" if reason is None else f"as exported: {reason}",
            "inputs": fp32.input_names,
            "max_length": fp32.max_length,
            "parity": check_parity(model, tokenizer, fp32, data.texts or _TEXTS),
            "quantization": None,
            "cpu": cpu_facts(),
        }
        if quantization is not None:
            first = Int8Settings(
                quantization,
                reduce_range=needs_reduced_range(),
                format=quantization_format if quantization == "static" else "QOperator",
            )
            try:
                report["quantization"] = _quantize(staging, fp32, data, first, max_metric_drop)
            except QuantizationError as error:
                failure, report["quantization"] = error, error.report
        (staging / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if failure is not None:
        raise failure
    return report


@dataclass(frozen=True)
class _Data:
    """The caller's rows, checked."""

    task: TextTask | None
    texts: list[TextInput]
    labels: np.ndarray
    calibration_texts: list[TextInput]


def _check_arguments(
    quantization: str | None,
    max_metric_drop: float,
    task: TextTask | None,
    validation: Rows | None,
    calibration: Rows | None,
) -> None:
    if quantization not in ("dynamic", "static", None):
        raise ValueError(f"quantization={quantization!r} must be 'dynamic', 'static' or None.")
    if not max_metric_drop >= 0:
        raise ValueError(f"max_metric_drop={max_metric_drop} must be 0 or more; 0.005 is half a point of accuracy.")
    if quantization == "static" and calibration is None:
        raise ValueError(
            "quantization='static' takes the range of each activation from data; give rows of the training data as "
            "`calibration`, or use quantization='dynamic'."
        )
    for name, rows in (("validation", validation), ("calibration", calibration)):
        if rows is not None and task is None:
            raise ValueError(f"`{name}` rows need their `task`, which names the text columns and the metric.")
        if rows is not None and not len(rows):
            raise ValueError(f"`{name}` has no rows; give one or more, or None.")


def _check_opset(opset: int | None, backend: str, found: int | None = None) -> int | None:
    """Before the export, whether the backend can write it; after, whether it did."""
    known = OPSETS[backend]
    if opset is not None and opset not in known:
        raise ValueError(
            f"opset={opset}; the backend `{backend}` writes {known[0]} to {known[-1]}, or its own choice with None."
        )
    if None not in (opset, found) and opset != found:
        raise ValueError(f"opset={opset}, but the backend `{backend}` wrote {found}; use opset={found}, or None.")
    return found


def _check_output_dir(output_dir: Path, in_place: bool) -> None:
    """Refuse to replace files of another kind, or of another model."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir={str(output_dir)!r} is a file; give a folder.")
    is_earlier_export = (output_dir / REPORT_FILE).is_file()
    if in_place and (output_dir / "onnx").exists() and not is_earlier_export:
        raise ValueError(
            f"{str(output_dir / 'onnx')!r} holds files of another export; move them away, or give another output_dir."
        )
    holds_a_model = any(output_dir.glob("*.safetensors")) or any(output_dir.glob("*.bin"))
    if in_place or not output_dir.is_dir() or (is_earlier_export and not holds_a_model):
        return
    if any(not is_staging(path, output_dir) for path in output_dir.iterdir()):
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds other files; give a new folder, an earlier export, or the model's "
            "own folder."
        )


def _load(
    model_dir: Path, revision: str | None, token: str | bool | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in float32 and tokenizer of a sequence classification checkpoint."""
    model = load_finetuned(model_dir, argument="model_dir", dtype=torch.float32, revision=revision, token=token).eval()
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise ValueError(
            f"model_dir={str(model_dir)!r} is a {type(model).__name__}; give a model for sequence classification."
        )
    tokenizer = None
    if has_tokenizer(model_dir):
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_dir), revision=revision or "main", token=token, trust_remote_code=False
        )
    if tokenizer is None or not tokenizer.is_fast:
        raise ValueError(
            f"model_dir={str(model_dir)!r} holds no tokenizer that can be saved as tokenizer.json; save the one it "
            "was trained with: AutoTokenizer.from_pretrained(...).save_pretrained(model_dir)."
        )
    return model, tokenizer


def _sample_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Two pairs, one padded, for exporters that trace; of the tokenizer's columns, those that the model reads."""
    inputs = tokenizer([_TEXTS[1], _TEXTS[0]], [_TEXTS[2], _TEXTS[0]], padding=True, return_tensors="pt")
    return columns_for(forward_columns(model), inputs)


def _texts(rows: Rows | None, task: TextTask | None, limit: int | None = None) -> list[TextInput]:
    """The text or pair of each row; with a limit, of about so many from all over the rows."""
    if rows is None or task is None:
        return []
    first = rows[0]
    if missing := [column for column in task.text_columns if column not in first]:
        raise ValueError(f"the rows have the columns {list(first)}, but {missing} of task {task.name!r} are needed.")
    columns = task.text_columns
    step = max(1, len(rows) // limit) if limit is not None else 1
    chosen = (rows[index] for index in range(0, len(rows), step))
    return [tuple(row[column] for column in columns) if len(columns) == 2 else row[columns[0]] for row in chosen]


def _labels(rows: Rows | None, task: TextTask | None) -> np.ndarray:
    """The label of each row, `UNLABELED` where there is none."""
    if rows is None or task is None:
        return np.empty(0)
    if "label" not in rows[0]:
        raise ValueError(f"the validation rows have the columns {list(rows[0])}, but `label` is needed.")
    labels = np.asarray([row["label"] for row in rows])
    if not np.issubdtype(labels.dtype, np.number):
        raise ValueError(f"a validation label is {rows[0]['label']!r}; give class indices, or scores for regression.")
    known = labels[labels != UNLABELED]
    if not len(known):
        raise ValueError("`validation` has no row with a label; give labelled rows, or None.")
    if not task.is_regression and not 0 <= known.min() <= known.max() < task.num_labels:
        raise ValueError(
            f"validation labels go from {known.min()} to {known.max()}, but task {task.name!r} has {task.num_labels} "
            f"classes: {list(task.label_names or ())}."
        )
    return labels


def _quantize(
    folder: Path, fp32: OnnxTextClassifier, data: _Data, first: Int8Settings, max_metric_drop: float
) -> dict[str, Any]:
    """Put the rows into the terms of [`quantize_within`]: a metric, logits of a few rows, inputs to calibrate on."""

    def logits(file: Path, texts: Sequence[TextInput]) -> np.ndarray:
        name = str(file.relative_to(folder))
        return OnnxTextClassifier.from_pretrained(folder, name, max_length=fp32.max_length).logits(texts)

    score, task = None, data.task
    if task is None or not data.texts:
        logger.warning("the int8 file is written unmeasured; give `validation` rows and their `task`.")
    else:
        labeled = [index for index, label in enumerate(data.labels) if label != UNLABELED]

        def score(file: Path) -> float:
            found = logits(file, [data.texts[index] for index in labeled])
            return score_logits(task, found, data.labels[labeled], fp32.id2label)[task.main_metric]

    few = _spread(fp32, data.calibration_texts or data.texts or _TEXTS, NUM_SENSITIVITY_ROWS)
    calibration_texts = _spread(fp32, data.calibration_texts, NUM_CALIBRATION_ROWS)
    return quantize_within(
        folder / FP32_FILE,
        folder / INT8_FILE,
        first,
        score=score,
        logits=lambda file: logits(file, few),
        max_metric_drop=max_metric_drop,
        metric_name=task.main_metric if task is not None else None,
        # One row at a time: the activations of padding would widen the ranges.
        calibration=[fp32.pad(fp32.encode([text])) for text in calibration_texts],
    )


def _spread(classifier: OnnxTextClassifier, texts: Sequence[TextInput], count: int) -> list[TextInput]:
    """Up to `count` texts from the shortest to the longest, of some thousand from all over."""
    texts = texts[:: max(1, len(texts) // MAX_CALIBRATION_ROWS)]
    lengths = [len(encoding.ids) for encoding in classifier.encode(texts)]
    return [texts[i] for i in spread_over_lengths(lengths, count)]
