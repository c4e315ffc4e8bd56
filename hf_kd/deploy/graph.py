"""Rewrites the graph of an exported encoder so that ONNX Runtime computes less on a CPU.

It knows graphs and no model classes: what has BERT's shape is rewritten, anything else stays as it is. The answers
stay the same, up to the order of a few sums:

1. The last layer computes the first token alone, the one that the classifier reads; its keys and values stay whole.
2. Each attention becomes the fewest operators, with one additive mask for all layers and no arithmetic on shapes.
3. The `Add` of a residual before a `LayerNormalization` becomes a `Sum`, the same for two inputs. ONNX Runtime (1.31)
   would fuse the former to `SkipLayerNormalization`, whose CPU kernel is slower than the two operators.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel

from .exporters import write_single_file


# They treat every token by itself, so that taking the first one commutes with them.
_PER_TOKEN = {
    *("Add", "Sum", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Tanh", "Relu", "Sigmoid", "Gelu", "MatMul"),
    *("LayerNormalization", "Cast", "Identity"),
}
_TOLERANCE = 1e-4  # of a logit; the export compares with torch afterwards


class _UnknownGraphError(Exception):
    """Not the graph of a BERT-style classifier."""


def optimize_for_cpu(path: Path, sample: Mapping[str, np.ndarray], max_length: int) -> str | None:
    """
    Rewrite a float32 file in place.

    Args:
        path (`Path`): The file.
        sample (`dict`): The model's inputs `(batch, sequence)`, with padding; the rewritten graph has to give the
            same logits on them, and on rows of `max_length` made of the same tokens.
        max_length (`int`): The longest input; up to 512 tokens are compared, all that BERT's positions allow.

    Returns:
        `str`, *optional*: Why the graph stayed as it is; `None` if it was rewritten.
    """
    session = _session(path)
    sample = {node.name: sample[node.name] for node in session.get_inputs()}
    # A window that attention looks through shows on long rows alone.
    long = {name: np.resize(values, (2, min(max_length, 512))) for name, values in sample.items()}
    long["attention_mask"] = np.ones_like(long["input_ids"])
    long["attention_mask"][1, long["attention_mask"].shape[1] // 2 :] = 0
    try:
        rewritten = _rewrite(_folded(path), sample)
        new_session = _session(rewritten)
        pairs = [(session.run(None, inputs)[0], new_session.run(None, inputs)[0]) for inputs in (sample, long)]
    except _UnknownGraphError as error:
        return str(error)
    except Exception as error:  # onnxruntime raises kinds of its own, without a common base
        return f"{type(error).__name__}: {error}"
    difference = max(float(np.abs(expected - found).max()) for expected, found in pairs)
    if not difference <= _TOLERANCE:
        return f"rewritten as BERT's attention, the logits differ by {difference:.1g}"
    write_single_file(rewritten, path)
    return None


def _rewrite(model: onnx.ModelProto, sample: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    graph = _Graph(model)
    attentions = [_Attention(graph, node) for node in graph.editor.nodes() if node.op_type == "Softmax"]
    if not attentions:
        raise _UnknownGraphError("it has no attention")
    mask = _additive_mask(graph)
    for attention, heads in zip(attentions, _count_heads(model, attentions, sample), strict=True):
        _simplify(graph, attention, heads, mask)
    _keep_first_token(graph, attentions[-1])
    for node in graph.editor.nodes():
        above = graph.producers.get(node.input[0]) if node.op_type == "LayerNormalization" else None
        if above is not None and above.op_type == "Add":
            above.op_type = "Sum"
    return _pruned(graph)


class _Graph:
    """A model with the producer and the consumers of each value at hand."""

    def __init__(self, model: onnx.ModelProto):
        self.editor = ONNXModel(model)
        self.producers: dict[str, NodeProto] = self.editor.output_name_to_node()
        self.consumers: dict[str, list[NodeProto]] = self.editor.input_name_to_nodes()
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {output.name for output in model.graph.output}
        self.names = {node.name for node in model.graph.node} | self.producers.keys() | self.weights.keys()

    def new_name(self, kind: str) -> str:
        name = next(name for i in itertools.count() if (name := f"rewritten_{kind}_{i}") not in self.names)
        self.names.add(name)
        return name

    def constant(self, value: Any, dtype: type) -> str:
        name = self.new_name("constant")
        self.editor.add_initializer(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Append an operator; the name of its output."""
        name = self.new_name(op_type)
        self.editor.add_node(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def consumer(self, name: str) -> NodeProto:
        """The only operator that reads a value."""
        found = self.consumers.get(name, [])
        if len(found) != 1 or name in self.outputs:
            raise _UnknownGraphError(f"{name} is read {len(found)} times, and once is expected")
        return found[0]

    def above(self, node: NodeProto) -> Iterator[str]:
        """The inputs that are no weights."""
        return (name for name in node.input if name not in self.weights)

    def is_linear(self, node: NodeProto | None) -> bool:
        """Whether it multiplies by a weight matrix."""
        return node is not None and node.op_type == "MatMul" and node.input[1] in self.weights

    def linear(self, name: str) -> tuple[str, NodeProto] | None:
        """The linear layer (its output and its `MatMul`) of which a value is a reshape, a transpose or a multiple."""
        node = self.producers.get(name)
        if node is None or node.op_type not in ("MatMul", "Add", "Reshape", "Transpose", "Mul", "Div"):
            return None
        if node.op_type == "MatMul":
            return (name, node) if self.is_linear(node) else None
        if node.op_type == "Add":
            product = self.producers.get(next(self.above(node), ""))
            return (name, product) if product is not None and self.is_linear(product) else None
        return next((found for above in self.above(node) if (found := self.linear(above)) is not None), None)


class _Attention:
    """The operators around a softmax: the linear layers of query, key and value before, and the one after."""

    def __init__(self, graph: _Graph, softmax: NodeProto):
        self.softmax = softmax
        scores, context = _scores(graph, softmax.input[0]), _context(graph, softmax.output[0])
        if scores is None or context is None:
            raise _UnknownGraphError(f"{softmax.name} has no products of an attention around it")
        found = [graph.linear(name) for name in (*scores.input, context.input[1])]
        if None in found:
            raise _UnknownGraphError(f"{softmax.name} has no linear layers for query, key and value above it")
        (self.query, self.query_product), (self.key, _), (self.value, _) = (pair for pair in found if pair is not None)
        self.output_product = graph.consumer(context.output[0])
        while self.output_product.op_type in ("Where", "Transpose", "Reshape"):
            self.output_product = graph.consumer(self.output_product.output[0])
        if not graph.is_linear(self.output_product):
            raise _UnknownGraphError(f"{softmax.name} has no linear layer after it")
        self.width = graph.weights[self.query_product.input[1]].dims[1]


def _scores(graph: _Graph, name: str) -> NodeProto | None:
    """The product of queries and keys, above its mask and scale."""
    node = graph.producers.get(name)
    if node is None or node.op_type not in ("MatMul", "Add", "Mul", "Div", "Where"):
        return None
    if node.op_type == "MatMul":
        return None if graph.is_linear(node) else node
    for above in graph.above(node):
        if (found := _scores(graph, above)) is not None:
            if any(_is_learned(graph, other) for other in node.input if other != above):
                raise _UnknownGraphError(f"{node.name} adds more than a mask to the scores")
            return found
    return None


def _is_learned(graph: _Graph, name: str) -> bool:
    """Whether a value comes from a table of weights, as the biases of relative positions do; a mask does not."""
    seen: set[str] = set()
    queue = [name]
    while queue:
        name = queue.pop()
        weight = graph.weights.get(name)
        if weight is not None and weight.data_type == TensorProto.FLOAT and np.prod(weight.dims) > 1:
            return True
        if name in graph.producers and name not in seen:
            seen.add(name)
            queue += graph.producers[name].input
    return False


def _context(graph: _Graph, name: str) -> NodeProto | None:
    """The product of probabilities and values; a `Where` between them zeroes rows that see nothing."""
    for node in graph.consumers.get(name, []):
        if node.op_type == "MatMul" and node.input[0] == name:
            return node
        if node.op_type == "Where" and (found := _context(graph, node.output[0])) is not None:
            return found
    return None


def _count_heads(
    model: onnx.ModelProto, attentions: Sequence[_Attention], sample: Mapping[str, np.ndarray]
) -> list[int]:
    """Read off the shape of the probabilities, `(batch, heads, sequence, sequence)`."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    names = [attention.softmax.output[0] for attention in attentions]
    probe.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    shapes = [probabilities.shape for probabilities in _session(probe).run(names, dict(sample))]
    for shape, attention in zip(shapes, attentions, strict=True):
        if len(shape) != 4 or attention.width % shape[1]:
            raise _UnknownGraphError(f"{attention.softmax.name} has the shape {shape}, not that of heads")
    return [shape[1] for shape in shapes]


def _additive_mask(graph: _Graph) -> str:
    """0 where a token may be seen and the lowest number elsewhere, `(batch, 1, 1, sequence)`."""
    mask = graph.add("Cast", "attention_mask", to=TensorProto.FLOAT)
    mask = graph.add("Sub", graph.constant(1, np.float32), mask)
    mask = graph.add("Mul", mask, graph.constant(np.finfo(np.float32).min, np.float32))
    return graph.add("Unsqueeze", mask, graph.constant([1, 2], np.int64))


def _simplify(graph: _Graph, attention: _Attention, heads: int, mask: str) -> None:
    """Rewrite 2: `softmax(query / sqrt(d) @ key + mask) @ value`."""
    head_width = attention.width // heads
    split = graph.constant([0, 0, heads, head_width], np.int64)

    def to_heads(name: str, perm: list[int]) -> str:
        return graph.add("Transpose", graph.add("Reshape", name, split), perm=perm)

    query = graph.add("Mul", to_heads(attention.query, [0, 2, 1, 3]), graph.constant(head_width**-0.5, np.float32))
    scores = graph.add("MatMul", query, to_heads(attention.key, [0, 2, 3, 1]))
    probabilities = graph.add("Softmax", graph.add("Add", scores, mask), axis=-1)
    context = graph.add("MatMul", probabilities, to_heads(attention.value, [0, 2, 1, 3]))
    context = graph.add("Transpose", context, perm=[0, 2, 1, 3])
    attention.output_product.input[0] = graph.add("Reshape", context, graph.constant([0, 0, -1], np.int64))


def _keep_first_token(graph: _Graph, attention: _Attention) -> None:
    """Rewrite 1: from the queries of the last attention to the classifier's `Gather`, one token."""
    after: dict[str, NodeProto] = {}  # what depends on the attention, by the name of its output
    queue = [attention.output_product]
    while queue:
        node = queue.pop()
        if node.op_type == "Gather":
            _check_takes_first_token(graph, node)
            continue
        is_product_of_tokens = node.op_type == "MatMul" and not graph.is_linear(node)
        if node.op_type not in _PER_TOKEN or is_product_of_tokens or node.output[0] in graph.outputs:
            raise _UnknownGraphError(f"{node.op_type} stands between the last attention and the classifier")
        if node.output[0] not in after:
            after[node.output[0]] = node
            queue += graph.consumers.get(node.output[0], [])

    first, end = graph.constant([0], np.int64), graph.constant([1], np.int64)
    narrowed: dict[str, str] = {}

    def narrow(node: NodeProto, index: int) -> None:
        """Let a node read the first token of its input: the queries, and the residual stream."""
        name = node.input[index]
        if name not in narrowed:
            narrowed[name] = graph.add("Slice", name, first, end, end)
        node.input[index] = narrowed[name]

    for node in after.values():
        if node is not attention.output_product:
            for index, name in enumerate(node.input):
                if name and name not in graph.weights and name not in after:
                    narrow(node, index)
    narrow(attention.query_product, 0)


def _check_takes_first_token(graph: _Graph, node: NodeProto) -> None:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    index = graph.weights.get(node.input[1])
    if axis != 1 or index is None or numpy_helper.to_array(index).tolist() != 0:
        raise _UnknownGraphError("the classifier does not read the first token alone")


def _pruned(graph: _Graph) -> onnx.ModelProto:
    """The model in order, without what nothing reads any more."""
    graph.editor.topological_sort()
    model = graph.editor.model
    del model.graph.value_info[:]  # shapes from before
    names = ([value.name for value in values] for values in (model.graph.input, model.graph.output))
    pruned = onnx.utils.Extractor(model).extract_model(*names)
    used = {node.domain or "ai.onnx" for node in pruned.graph.node}
    opsets = [opset for opset in pruned.opset_import if (opset.domain or "ai.onnx") in used]
    del pruned.opset_import[:]
    pruned.opset_import.extend(opsets)
    onnx.checker.check_model(pruned)
    return pruned


def _folded(path: Path) -> onnx.ModelProto:
    """The model after ONNX Runtime's basic optimisations: constants folded, duplicates and no-ops removed."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / "folded.onnx"
        options = _options()
        options.optimized_model_filepath = str(file)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(str(file))


def _session(model: Path | onnx.ModelProto) -> onnxruntime.InferenceSession:
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, _options(), providers=["CPUExecutionProvider"])


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return options
