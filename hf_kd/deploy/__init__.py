"""After training: ONNX export, int8, a classifier without torch, benchmarks, reports, model cards and the Hub."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .classifier import OnnxTextClassifier
    from .hub import push_student
    from .model_card import write_model_card
    from .onnx import export_onnx

__all__ = ["OnnxTextClassifier", "export_onnx", "push_student", "write_model_card"]

# For errors: what brings onnx and onnxruntime along.
INSTALL = "pip install 'hf-kd[optimum]' (with transformers 4.57) or pip install 'hf-kd[onnx]' (with transformers 5)"

# Where they are in an exported folder, as transformers.js expects them.
FP32_FILE, INT8_FILE = "onnx/model.onnx", "onnx/model_quantized.onnx"

_MODULES = {
    "OnnxTextClassifier": "classifier",
    "export_onnx": "onnx",
    "push_student": "hub",
    "write_model_card": "model_card",
}


# Names are imported when first used: who classifies needs no exporter, and no torch.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
