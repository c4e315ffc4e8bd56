"""Turns a float32 ONNX file into an int8 one that still does its task."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)


Batch = dict[str, np.ndarray]

# Products with weights, and the embedding tables. Of two activations (attention scores) the product stays float32.
OP_TYPES = ("MatMul", "Gemm", "Gather")


class QuantizationError(ValueError):
    """No int8 file kept the metric; `report` holds what was tried."""

    def __init__(self, message: str, report: dict[str, Any]):
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Int8Settings:
    """
    How a float32 file becomes an int8 one.

    Args:
        method (`str`): `dynamic`, which finds the range of each activation while running, or `static`, which takes it
            from calibration rows.
        per_channel (`bool`, *optional*, defaults to `True`): A scale for each output of a weight matrix, not one for
            all.
        reduce_range (`bool`, *optional*, defaults to `False`): Weights of 7 bits, for CPUs whose int8 sums saturate.
        format (`str`, *optional*): `QDQ` (quantise and dequantise nodes around float operators) or `QOperator`
            (integer operators); dynamic quantisation has the latter alone.
        nodes_in_fp32 (`tuple[str, ...]`, *optional*): Nodes that keep float32 weights.
    """

    method: Literal["dynamic", "static"]
    per_channel: bool = True
    reduce_range: bool = False
    format: Literal["QDQ", "QOperator"] = "QOperator"
    nodes_in_fp32: tuple[str, ...] = ()

    def describe(self) -> str:
        """A few words, for tables and errors."""
        words = [self.method, "per-channel" if self.per_channel else "per-tensor"]
        words += ["reduced range"] if self.reduce_range else []
        words += [self.format] if self.method == "static" else []
        words += [f"{len(self.nodes_in_fp32)} nodes in fp32"] if self.nodes_in_fp32 else []
        return ", ".join(words)


def quantize(
    model_file: Path,
    output_file: Path,
    settings: Int8Settings,
    calibration: Sequence[Batch] = (),
    only: Sequence[str] | None = None,
) -> None:
    """
    Write the int8 file.

    Args:
        model_file (`Path`): The float32 file.
        output_file (`Path`): Where to write.
        settings ([`Int8Settings`]): How.
        calibration (sequence of `dict`): Model inputs, each `(batch, sequence)`, for static quantisation.
        only (sequence of `str`, *optional*): Quantise these nodes alone.
    """
    common = {
        "op_types_to_quantize": list(OP_TYPES),
        "per_channel": settings.per_channel,
        "reduce_range": settings.reduce_range,
        "weight_type": QuantType.QInt8,
        "nodes_to_quantize": _with_split_gemms(only) if only is not None else None,
        "nodes_to_exclude": _with_split_gemms(settings.nodes_in_fp32),
    }
    options = {"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT}
    with _without_advice():
        if settings.method == "dynamic":
            quantize_dynamic(model_file, output_file, **common, extra_options=options)
            return
        quantize_static(
            model_file,
            output_file,
            _Batches(calibration),
            quant_format=QuantFormat[settings.format],
            activation_type=QuantType.QUInt8,
            **common,
            extra_options=options,
        )


def quantize_within(
    model_file: Path,
    output_file: Path,
    first: Int8Settings,
    score: Callable[[Path], float] | None,
    logits: Callable[[Path], np.ndarray],
    max_metric_drop: float,
    metric_name: str | None = None,
    calibration: Sequence[Batch] = (),
) -> dict[str, Any]:
    """
    Quantise, and where the metric drops too far, quantise more carefully: scales per channel and a reduced range,
    then the most sensitive nodes left in float32, then static ranges.

    Args:
        model_file (`Path`): The float32 file.
        output_file (`Path`): Where to write the int8 file.
        first ([`Int8Settings`]): What to try first.
        score (`Callable`, *optional*): The metric of a file on the validation set, larger is better. Without it the
            first file is kept unmeasured.
        logits (`Callable`): Logits of a file on a few rows, which tell how much each node alone disturbs them.
        max_metric_drop (`float`): Largest allowed difference to the float32 file's metric.
        metric_name (`str`, *optional*): For the report.
        calibration (sequence of `dict`): Model inputs for static ranges; without them these are not tried.

    Returns:
        `dict`: The settings, the `metric` (`name`, `fp32`, `int8`, `drop`, `max_drop`; `None` if not measured), and
        all `attempts`.

    Raises:
        [`QuantizationError`]: If nothing keeps the metric; no int8 file is left then.
    """
    if score is None:
        quantize(model_file, output_file, first, calibration)
        return {**_as_json(first), "metric": None, "attempts": []}
    reference = score(model_file)
    attempts: list[dict[str, Any]] = []
    for settings in _more_and_more_careful(model_file, first, logits, calibration):
        quantize(model_file, output_file, settings, calibration)
        found = score(output_file)
        drop = reference - found
        attempts.append({"settings": settings.describe(), "metric": found, "drop": drop})
        if drop <= max_metric_drop:
            metric = {
                "name": metric_name,
                "fp32": reference,
                "int8": found,
                "drop": drop,
                "max_drop": max_metric_drop,
            }
            return {**_as_json(settings), "metric": metric, "attempts": attempts}
    output_file.unlink(missing_ok=True)
    tried = "; ".join(f"{attempt['settings']}: {attempt['metric']:.4f}" for attempt in attempts)
    hint = "" if calibration else " Static ranges were not tried; give `calibration` rows."
    raise QuantizationError(
        f"no int8 file keeps {metric_name} within {max_metric_drop:g} of float32's {reference:.4f}: {tried}. The "
        f"float32 file is kept. Allow a larger `max_metric_drop`, or use the float32 file.{hint}",
        {**_as_json(first), "metric": None, "attempts": attempts, "failed": True},
    )


def _as_json(settings: Int8Settings) -> dict[str, Any]:
    return {**asdict(settings), "nodes_in_fp32": list(settings.nodes_in_fp32)}


def quantizable_nodes(model_file: Path) -> list[str]:
    """Names of the nodes that have weights to quantise."""
    graph = onnx.load(str(model_file)).graph
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    return [
        node.name for node in graph.node if node.op_type in OP_TYPES and any(name in weights for name in node.input)
    ]


def _more_and_more_careful(
    model_file: Path, first: Int8Settings, logits: Callable[[Path], np.ndarray], calibration: Sequence[Batch]
) -> Iterator[Int8Settings]:
    """What to try, one after the other; a later one costs more speed or time."""
    careful = replace(first, per_channel=True)
    yield first
    for settings in (careful, replace(careful, reduce_range=True)):
        if settings != first:
            yield settings
    nodes = _by_sensitivity(model_file, careful, logits, calibration)
    count = 1
    while count <= len(nodes) // 2:
        yield replace(careful, nodes_in_fp32=tuple(nodes[:count]))
        count *= 2
    if first.method == "dynamic" and calibration:
        yield replace(careful, method="static", format="QDQ")


def _by_sensitivity(
    model_file: Path, settings: Int8Settings, logits: Callable[[Path], np.ndarray], calibration: Sequence[Batch]
) -> list[str]:
    """Nodes by how far quantising each alone moves the logits, the farthest first."""
    expected = logits(model_file)
    errors = {}
    with tempfile.TemporaryDirectory(dir=model_file.parent) as folder:
        for name in quantizable_nodes(model_file):
            file = Path(folder) / "one_node.onnx"
            quantize(model_file, file, settings, calibration, only=[name])
            errors[name] = float(np.square(logits(file) - expected).mean())
    return sorted(errors, key=lambda name: -errors[name])


def _with_split_gemms(names: Sequence[str]) -> list[str]:
    """Dynamic quantisation first makes a MatMul, with a name of its own, and an Add of each Gemm."""
    return [*names, *(f"{name}_MatMul" for name in names)]


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """ONNX Runtime advises a shape inference beforehand, by the root logger; graphs without branches need none."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    logging.getLogger().addFilter(is_wanted)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(is_wanted)


class _Batches(CalibrationDataReader):
    """Hands out model inputs one batch at a time, as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Sequence[Batch]):
        self._batches = iter(batches)

    def get_next(self) -> Batch | None:
        return next(self._batches, None)
