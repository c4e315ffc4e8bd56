"""Graphs rewritten for CPUs: what is left out of them, and which are left alone."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hf_kd.deploy.graph import optimize_for_cpu


FP32_FILE = "onnx/model.onnx"
BERT_SHAPED = ["bert", "distilbert", "roberta", "electra"]


def padded_inputs(model):
    """Rows of 9 and 4 tokens."""
    mask = np.arange(9) < np.array([[9], [4]])
    values = {"input_ids": np.where(mask, 7, 0), "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}
    return {value.name: values[value.name].astype(np.int64) for value in model.graph.input}


def run(model, names=None):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(names, padded_inputs(model))


@pytest.mark.parametrize("name", BERT_SHAPED)
def test_last_layer_computes_the_first_token_alone(exported, name):
    """A rewrite that no longer matches would cost speed, and no answer would tell."""
    model = onnx.load(exported(name).folder / FP32_FILE)
    activations = [node.output[0] for node in model.graph.node if node.op_type in ("Erf", "Gelu")]
    model.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in activations)
    tokens = [values.shape[1] for values in run(model, activations) if values.ndim == 3]
    assert tokens == [9, 1]
    assert exported(name).report["graph"] == "rewritten for CPUs"


@pytest.mark.parametrize("name", BERT_SHAPED)
def test_no_layer_norm_is_fused_to_the_slow_kernel(exported, name, tmp_path):
    """ONNX Runtime's fusion of residual and normalisation is slower than both together."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    file = exported(name).folder / FP32_FILE
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    found = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert "LayerNormalization" in found and "SkipLayerNormalization" not in found
    # Whether it would have been fused depends on the rest of the graph; that it cannot be does not.
    nodes = onnx.load(file).graph.node
    producers = {output: node.op_type for node in nodes for output in node.output}
    above = {producers.get(node.input[0]) for node in nodes if node.op_type == "LayerNormalization"}
    assert "Sum" in above and "Add" not in above


@pytest.mark.parametrize(
    ("op_type", "operand", "reason"),
    [
        # One number for all positions of a head changes no softmax: comparing logits would not find it out.
        ("Add", np.full((4, 1, 1), 0.5, np.float32), "adds more than a mask to the scores"),
        ("Mul", np.float32(0.5), "the logits differ by"),
    ],
    ids=["learned bias", "another scale"],
)
def test_other_attentions_are_left_alone(copy_of_export, op_type, operand, reason):
    """Written as BERT's, an attention with biases of its own would answer wrongly where no sample looked."""
    file = copy_of_export("bert") / FP32_FILE
    model = onnx.load(file)
    model.graph.initializer.append(numpy_helper.from_array(operand, "operand"))
    index, softmax = next((i, node) for i, node in enumerate(model.graph.node) if node.op_type == "Softmax")
    changed = helper.make_node(op_type, [softmax.input[0], "operand"], ["changed"], name="changed")
    softmax.input[0] = "changed"
    model.graph.node.insert(index, changed)
    onnx.save(model, file)
    before = file.read_bytes()
    assert reason in optimize_for_cpu(file, padded_inputs(model), max_length=80)
    assert file.read_bytes() == before


def test_a_window_is_found_on_long_rows(copy_of_export):
    """The sample is shorter than a local window: the graph would be rewritten, and long texts be answered wrongly."""
    file = copy_of_export("bert") / FP32_FILE
    model = onnx.load(file)
    index, softmax = next((i, node) for i, node in enumerate(model.graph.node) if node.op_type == "Softmax")
    constants = {"at_1": 1, "from_0": 0, "by_1": 1, "axis_0": [0], "axis_1": [1], "width": 30, "low": np.float32(-1e9)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
    steps = [
        ("Shape", ["input_ids"], "sizes", {}),
        ("Gather", ["sizes", "at_1"], "length", {}),
        ("Range", ["from_0", "length", "by_1"], "steps", {}),
        ("Unsqueeze", ["steps", "axis_0"], "columns", {}),
        ("Unsqueeze", ["steps", "axis_1"], "rows", {}),
        ("Sub", ["rows", "columns"], "offsets", {}),
        ("Abs", ["offsets"], "distances", {}),
        ("Greater", ["distances", "width"], "is_far", {}),
        ("Cast", ["is_far"], "far", {"to": TensorProto.FLOAT}),
        ("Mul", ["far", "low"], "window", {}),
        ("Add", [softmax.input[0], "window"], "windowed", {}),
    ]
    for offset, (op_type, inputs, output, attributes) in enumerate(steps):
        node = helper.make_node(op_type, inputs, [output], name=f"window_{offset}", **attributes)
        model.graph.node.insert(index + offset, node)
    softmax.input[0] = "windowed"
    onnx.save(model, file)
    assert optimize_for_cpu(file, padded_inputs(model), max_length=9) is None  # as the sample alone would have it
    onnx.save(model, file)
    assert "the logits differ by" in optimize_for_cpu(file, padded_inputs(model), max_length=80)


@pytest.mark.parametrize("name", BERT_SHAPED)
def test_rewritten_files_use_standard_operators_alone(exported, name):
    """transformers.js and other runtimes have no operators of ONNX Runtime's own."""
    model = onnx.load(exported(name).folder / FP32_FILE)
    assert {node.domain for node in model.graph.node} == {""}


def test_a_graph_of_another_shape_is_left_alone(exported):
    """ModernBERT turns its queries and keys: written as BERT's attention it would forget where words stand."""
    report = exported("modernbert").report
    assert report["graph"].startswith("as exported: ") and "no linear layers for query" in report["graph"]
    assert report["parity"]["max_difference"] < 1e-4
