"""Writes a model as one ONNX file, with Optimum or with the exporter of transformers 5."""

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from . import INSTALL


try:
    import onnx
    import onnxruntime  # noqa: F401  (what the modules beside this one import plainly)
except ImportError as error:
    raise ImportError(f"{error}. ONNX export needs onnx and onnxruntime: {INSTALL}.") from error

Exporter = Callable[[PreTrainedModel, Mapping[str, torch.Tensor], Path, int | None], None]

MAX_BYTES = 2**31 - 1  # of one ONNX file: it is one protobuf message
# What each exporter writes on the pinned versions; below them attention has no operator.
OPSETS = {"optimum": range(14, 24), "transformers": range(17, 26)}


def find_exporter(backend: str) -> tuple[str, Exporter]:
    """
    The export function of a backend, and its name with the version.

    Args:
        backend (`str`): `optimum`, `transformers`, or `auto` for the first of them that is installed.

    Raises:
        `ValueError`: For another name.
        `ImportError`: If it is not installed, with the line that installs it.
    """
    if backend not in ("auto", *_BACKENDS):
        raise ValueError(f"backend={backend!r} must be auto, {' or '.join(_BACKENDS)}.")
    errors = []
    for name in _BACKENDS if backend == "auto" else (backend,):
        modules, package, extra, needed, export = _BACKENDS[name]
        try:
            for module in modules:
                importlib.import_module(module)
        except ImportError as error:
            errors.append(f"the backend `{name}` needs pip install 'hf-kd[{extra}]' {needed} ({error})")
            continue
        return f"{name} ({package} {importlib.metadata.version(package)})", export
    raise ImportError("not installed: " + "; or ".join(errors) + ".")


def write_single_file(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph with its weights inside the file.

    Raises:
        `ValueError`: If they are too large for one file.
    """
    if model.ByteSize() > MAX_BYTES:
        raise ValueError(
            f"the model has {model.ByteSize() / 1e9:.1f} GB, but one ONNX file holds 2.1 GB; export a smaller student."
        )
    onnx.save_model(model, str(path), save_as_external_data=False)


def export_with_optimum(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], path: Path, opset: int | None
) -> None:
    """Optimum knows the inputs of each model type by itself."""
    from optimum.exporters.onnx import onnx_export_from_model

    with TemporaryDirectory(dir=path.parent) as folder:
        onnx_export_from_model(
            model,
            folder,
            opset=opset,
            task="text-classification",
            do_validation=False,  # ours compares real rows of several shapes
            no_post_process=True,
        )
        _finish(Path(folder) / "model.onnx", inputs, path)


def export_with_transformers(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], path: Path, opset: int | None
) -> None:
    """The exporter of transformers 5 traces the inputs that it is given."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    config = OnnxConfig(dynamic=True, opset_version=opset)
    with TemporaryDirectory(dir=path.parent) as folder, _quiet():
        OnnxExporter().export(model, dict(inputs), config=config).save_pretrained(folder)
        _finish(Path(folder) / "model.onnx", inputs, path)


# Modules to import, package that has the version, extra of hf-kd, what of transformers goes with it, function.
_BACKENDS: dict[str, tuple[tuple[str, ...], str, str, str, Exporter]] = {
    "optimum": (("optimum.exporters.onnx",), "optimum-onnx", "optimum", "'transformers<4.58'", export_with_optimum),
    "transformers": (
        ("transformers.exporters.exporter_onnx", "onnxscript"),
        "transformers",
        "onnx",
        "'transformers>=5'",
        export_with_transformers,
    ),
}


def _finish(traced: Path, inputs: Mapping[str, torch.Tensor], path: Path) -> None:
    """Merge the weights into the file, and give inputs, outputs and dimensions the names that runtimes look for."""
    model = onnx.load(str(traced))
    found, outputs = {value.name for value in model.graph.input}, [value.name for value in model.graph.output]
    if not {"input_ids", "attention_mask"} <= found <= set(inputs) or outputs[0] != "logits":
        raise ValueError(
            f"the exporter wrote the inputs {sorted(found)} and outputs {outputs}, but {list(inputs)} and logits are "
            "needed; try the other backend (backend='optimum' or 'transformers')."
        )
    del model.graph.output[1:]
    for value in model.graph.input:
        for dimension, name in zip(value.type.tensor_type.shape.dim, ("batch_size", "sequence_length"), strict=True):
            dimension.dim_param = name
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch_size"
    # Sizes in between carry the exporter's own symbols, which the new names would contradict.
    del model.graph.value_info[:]
    _forget_where_it_was_made(model)
    write_single_file(model, path)


def _forget_where_it_was_made(model: onnx.ModelProto) -> None:
    """The lines of code that each node was traced from, with the paths of this machine."""
    graph = model.graph
    nodes = [*graph.node, *(node for function in model.functions for node in function.node)]
    values = [*graph.input, *graph.output, *graph.initializer]
    for part in (model, graph, *model.functions, *nodes, *values):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress of torch's exporter, printed line by line, out of the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def opset_of(path: str | os.PathLike) -> int:
    """The version of the standard operators that a file uses."""
    model = onnx.load(str(path), load_external_data=False)
    return next(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx"))
