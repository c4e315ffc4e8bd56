"""int8: what is tried, in which order, and that each setting is in the file."""

import json
from dataclasses import replace

import numpy as np
import pytest
from deploy.conftest import FP32_FILE


onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import numpy_helper  # noqa: E402

from hf_kd.deploy.classifier import OnnxTextClassifier  # noqa: E402
from hf_kd.deploy.quantization import (  # noqa: E402
    OP_TYPES,
    Int8Settings,
    QuantizationError,
    quantizable_nodes,
    quantize,
    quantize_within,
)


DYNAMIC, STATIC = Int8Settings("dynamic"), Int8Settings("static", format="QDQ")


@pytest.fixture
def folder(copy_of_export):
    return copy_of_export("bert")


@pytest.fixture
def logits(exported, folder):
    """Logits of a file in the folder on 40 rows."""
    texts = exported("bert").checkpoint.texts()[:40]

    def compute(file):
        return OnnxTextClassifier.from_pretrained(folder, file.relative_to(folder)).logits(texts)

    return compute


@pytest.fixture
def calibration(exported, folder):
    """Model inputs of one row each, of different lengths."""
    checkpoint = exported("bert").checkpoint
    classifier = OnnxTextClassifier.from_pretrained(folder, FP32_FILE)
    batches = [classifier.pad(classifier.encode([text])) for text in checkpoint.texts(checkpoint.calibration)]
    assert len({batch["input_ids"].shape for batch in batches}) > 5
    return batches


@pytest.fixture
def quantized(folder, calibration):
    """`quantized(settings)`: the file, and its weights by name."""

    def make(settings, **arguments):
        file = folder / "onnx" / "int8.onnx"
        quantize(folder / FP32_FILE, file, settings, calibration, **arguments)
        return file, {tensor.name: tensor for tensor in onnx.load(str(file)).graph.initializer}

    return make


def int8_weights(tensors):
    """The int8 matrices and tables."""
    arrays = (numpy_helper.to_array(t) for t in tensors.values() if t.data_type == onnx.TensorProto.INT8)
    return [array for array in arrays if array.ndim == 2]


def operators(file):
    return [node.op_type for node in onnx.load(str(file)).graph.node]


# Each setting is in the file


@pytest.mark.parametrize(
    "settings",
    [
        DYNAMIC,
        Int8Settings("dynamic", per_channel=False),
        STATIC,
        Int8Settings("static", format="QOperator"),
    ],
    ids=Int8Settings.describe,
)
def test_file_answers_as_float32_nearly(exported, folder, quantized, logits, settings):
    """An option that crashes on rows of different lengths, or ruins the model, would be found by its first user."""
    file, tensors = quantized(settings)
    assert len(int8_weights(tensors)) >= 12  # 2 layers: query, key, value, output, up, down
    assert file.stat().st_size < (folder / FP32_FILE).stat().st_size
    difference = np.abs(logits(file) - logits(folder / FP32_FILE))
    assert 1e-5 < difference.max() < 1.0
    agrees = logits(file).argmax(axis=1) == logits(folder / FP32_FILE).argmax(axis=1)
    assert agrees.mean() > 0.95


@pytest.mark.parametrize(
    ("settings", "has", "has_not"),
    [
        (DYNAMIC, {"MatMulInteger", "DynamicQuantizeLinear"}, {"QLinearMatMul", "QuantizeLinear"}),
        (STATIC, {"QuantizeLinear", "DequantizeLinear"}, {"QLinearMatMul", "MatMulInteger"}),
        (Int8Settings("static", format="QOperator"), {"QLinearMatMul"}, {"MatMulInteger", "DynamicQuantizeLinear"}),
    ],
    ids=["dynamic", "QDQ", "QOperator"],
)
def test_method_and_format_are_in_the_file(quantized, settings, has, has_not):
    """The table would name a method that was not measured."""
    found = set(operators(quantized(settings)[0]))
    assert has <= found and has_not & found == set()


@pytest.mark.parametrize("settings", [DYNAMIC, STATIC], ids=Int8Settings.describe)
@pytest.mark.parametrize(("reduce_range", "largest"), [(False, 127), (True, 64)])
def test_reduced_range_keeps_to_7_bits(quantized, settings, reduce_range, largest):
    """On a CPU without VNNI the sums of 8-bit weights saturate: the file is right here and wrong there."""
    _, tensors = quantized(Int8Settings(settings.method, format=settings.format, reduce_range=reduce_range))
    values = [int(np.abs(array.astype(int)).max()) for array in int8_weights(tensors)]
    assert values and max(values) <= largest and max(values) >= largest - 1


@pytest.mark.parametrize(("per_channel", "is_one_scale"), [(True, False), (False, True)])
def test_scales_per_channel(quantized, per_channel, is_one_scale):
    """One outlier would set the scale of a whole matrix, though the report says per-channel."""
    _, tensors = quantized(Int8Settings("dynamic", per_channel=per_channel))
    words = "word_embeddings"
    sizes = [int(np.prod(t.dims)) for name, t in tensors.items() if name.endswith("_scale") and words not in name]
    assert sizes and (max(sizes) == 1) == is_one_scale


@pytest.mark.parametrize("settings", [DYNAMIC, STATIC], ids=Int8Settings.describe)
def test_nodes_in_float32_are_float32_in_the_file(folder, quantized, settings):
    """A sensitive product that is quantised all the same keeps the drop, and the report hides it."""
    nodes = {node.name: node for node in onnx.load(str(folder / FP32_FILE)).graph.node}
    quantizable = quantizable_nodes(folder / FP32_FILE)
    # The last of each kind of operator, and all of the others.
    kept = {nodes[name].op_type: name for name in quantizable}
    assert {"MatMul", "Gather"} <= set(kept)
    file, tensors = quantized(replace(settings, nodes_in_fp32=tuple(kept.values())))
    floats = {name for name, tensor in tensors.items() if tensor.data_type == onnx.TensorProto.FLOAT}
    weights = [name for name in floats if len(tensors[name].dims) == 2]
    assert len(weights) == len(kept)
    # Read by a float32 operator; ONNX Runtime makes a MatMul and an Add of a Gemm.
    readers = {node.op_type for node in onnx.load(str(file)).graph.node if set(node.input) & set(weights)}
    assert {"MatMul", "Gather"} <= readers <= {"MatMul", "Gather", "Gemm"}
    assert len(quantizable) - len(kept) > 10


@pytest.mark.parametrize("settings", [DYNAMIC, STATIC], ids=Int8Settings.describe)
def test_each_node_can_be_quantised_alone(folder, quantized, logits, settings):
    """A node whose name the quantiser does not find counts as harmless, and is never left in float32."""
    expected = logits(folder / FP32_FILE)
    files = ((name, quantized(settings, only=[name])[0]) for name in quantizable_nodes(folder / FP32_FILE))
    assert [name for name, file in files if np.array_equal(logits(file), expected)] == []


def test_quantizable_nodes_are_those_with_weights(folder):
    """Of a product of two activations there is nothing to leave in float32: it would be tried for nothing."""
    model = onnx.load(str(folder / FP32_FILE))
    found = quantizable_nodes(folder / FP32_FILE)
    assert len(found) == len(set(found)) and all(found)
    nodes = {node.name: node for node in model.graph.node}
    assert {nodes[name].op_type for name in found} <= set(OP_TYPES)
    products = [node.name for node in model.graph.node if node.op_type == "MatMul"]
    assert set(products) - set(found)  # attention scores


# What is tried


@pytest.fixture
def try_until(folder, logits, calibration):
    """Quantise for real, with a metric that is 1.0 for float32 and from int8 file number `success`, else 0."""

    def run(success, first=DYNAMIC, has_calibration=True):
        scored = []

        def score(file):
            scored.append(file)
            return 1.0 if len(scored) == 1 or len(scored) - 1 >= success else 0.0

        output = folder / "onnx" / "tried.onnx"
        batches = calibration if has_calibration else ()
        return output, lambda: quantize_within(
            folder / FP32_FILE, output, first, score, logits, 0.005, metric_name="accuracy", calibration=batches
        )

    return run


ORDER = [
    "dynamic, per-channel",
    "dynamic, per-channel, reduced range",
    "dynamic, per-channel, 1 nodes in fp32",
    "dynamic, per-channel, 2 nodes in fp32",
    "dynamic, per-channel, 4 nodes in fp32",
]
LAST = "static, per-channel, QDQ"


def settings_of(attempts):
    return [attempt["settings"] for attempt in attempts]


@pytest.mark.parametrize("success", [1, 2, 4])
def test_stops_at_the_first_that_holds(try_until, success):
    """Every further step costs speed; one that was needed and is not recorded cannot be repeated."""
    output, run = try_until(success)
    report = run()
    assert settings_of(report["attempts"]) == ORDER[:success]
    assert [attempt["drop"] for attempt in report["attempts"]] == [1.0] * (success - 1) + [0.0]
    assert report["metric"] == {"name": "accuracy", "fp32": 1.0, "int8": 1.0, "drop": 0.0, "max_drop": 0.005}
    assert report["reduce_range"] == (success == 2)
    assert len(report["nodes_in_fp32"]) == {1: 0, 2: 0, 4: 2}[success]
    assert set(report["nodes_in_fp32"]) <= set(quantizable_nodes(output.with_name("model.onnx")))
    assert json.loads(json.dumps(report))["method"] == "dynamic"


def test_everything_is_tried_before_it_fails(try_until):
    """Who gives up early ships float32; who does not give up ships a bad file."""
    output, run = try_until(success=99)
    with pytest.raises(QuantizationError) as error:
        run()
    tried = settings_of(error.value.report["attempts"])
    assert tried[: len(ORDER)] == ORDER and tried[-1] == LAST and len(set(tried)) == len(tried)
    assert all(f"{settings}: 0.0000" in str(error.value) for settings in tried)
    assert "no int8 file keeps accuracy within 0.005 of float32's 1.0000" in str(error.value)
    assert "calibration" not in str(error.value)
    assert error.value.report["failed"] and error.value.report["metric"] is None
    assert not output.exists()


def test_without_calibration_rows_the_error_asks_for_them(try_until):
    """Static ranges are the last hope, and need nothing but rows."""
    _, run = try_until(success=99, has_calibration=False)
    with pytest.raises(QuantizationError, match="Static ranges were not tried; give `calibration` rows") as error:
        run()
    assert LAST not in settings_of(error.value.report["attempts"])


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (
            Int8Settings("dynamic", per_channel=False),
            ["dynamic, per-tensor", "dynamic, per-channel", "dynamic, per-channel, reduced range"],
        ),
        (
            Int8Settings("dynamic", reduce_range=True),
            ["dynamic, per-channel, reduced range", "dynamic, per-channel, reduced range, 1 nodes in fp32"],
        ),
        (
            STATIC,
            ["static, per-channel, QDQ", "static, per-channel, reduced range, QDQ"],
        ),
    ],
    ids=lambda value: value.describe() if isinstance(value, Int8Settings) else "",
)
def test_nothing_is_tried_twice(try_until, first, expected):
    """What the CPU's facts or the user chose comes first; from there on only what is more careful."""
    _, run = try_until(len(expected), first)
    assert settings_of(run()["attempts"]) == expected


def test_most_sensitive_node_comes_first(folder, try_until):
    """Left in float32 in the file's order, harmless products would lose their speed and the drop would stay."""
    model = onnx.load(str(folder / FP32_FILE))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type != "Gather"]  # the words are 64, too
    used = [(node.name, tensors[name]) for node in layers for name in node.input if name in tensors]
    up, down = [(name, tensor) for name, tensor in used if sorted(tensor.dims) == [32, 64]][:2]
    bias = next(tensor for _, tensor in used if list(tensor.dims) == [64])
    # A neuron that is always 0, and what it is multiplied with: nothing changes in float32, but in int8 the range is
    # that of the outliers, and the other weights round to 0.
    for tensor, value in ((up[1], 0.0), (bias, 0.0), (down[1], 40.0)):
        values = numpy_helper.to_array(tensor).copy()
        values[tuple(0 if size == 64 else slice(None) for size in values.shape)] = value
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save_model(model, str(folder / FP32_FILE))
    _, run = try_until(success=3)
    assert run()["nodes_in_fp32"] == [down[0]]


def test_unmeasured_file_is_recorded_as_such(folder, logits):
    """Without rows there is no figure; one in the report would have been made up."""
    output = folder / "onnx" / "tried.onnx"
    report = quantize_within(folder / FP32_FILE, output, DYNAMIC, None, logits, 0.005)
    assert report["metric"] is None and report["attempts"] == [] and output.is_file()
