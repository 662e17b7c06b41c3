"""The graph that ONNX Runtime runs: model.onnx with operators of its own in place of what its fusions do not find.

Those fusions leave a product of int8 matrices apart from the bias added to it, and attention in a dozen steps, each of
which writes B x T x T numbers. Here a product adds its bias, and attention is one operator: 6 to 12 % less time on
CPUs without VNNI (CHANGELOG). model.onnx stays plain ONNX, which the other runtimes read; what is not found in it, as
in a file that is not int8, stays as it is. Attention's first product then runs in fp32, nearer to the checkpoint.

A layer that drops tokens needs attention's numbers one by one, and keeps its dozen steps for that; but where a batch is
so narrow that all tokens are kept, it has the one operator as well.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

_DOMAIN = "com.microsoft"
_MASK = "attention_mask"
_UNPADDED = "is_unpadded"
_KEEPS_ALL = "keeps_all_tokens"


def fused(model_file: Path) -> tuple[bytes, bool]:
    """Returns the graph of `model_file` for ONNX Runtime, serialised, and whether products in it are int8."""
    model = onnx.load(model_file)
    graph = _Graph(model.graph)
    num_int8 = _fuse_products(graph)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    _fuse_attention(graph, min_kept_tokens=json.loads(facts.get("min_kept_tokens", "0")))
    graph.close()
    del model.graph.value_info[:]  # shapes of tensors that may be gone
    model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return bytes(model.SerializeToString()), num_int8 > 0


class _OtherForm(LookupError):
    """A node is not where it was looked for, so that nothing is to be fused here."""


class _Graph:
    """Nodes by what they make and by what they read."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.makers: dict[str, NodeProto] = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._replaced: dict[str, NodeProto] = {}
        self._moved: set[str] = set()
        self._first: list[NodeProto] = []

    def nodes(self, op_type: str) -> list[NodeProto]:
        """Returns the nodes of one type."""
        return [node for node in self.graph.node if node.op_type == op_type]

    def maker(self, name: str, op_type: str) -> NodeProto:
        """Returns the node that makes `name`; raises _OtherForm if it is not of `op_type`."""
        node = self.makers.get(name)
        if node is None or node.op_type != op_type:
            raise _OtherForm(name)
        return node

    def reader(self, name: str, op_type: str) -> NodeProto:
        """Returns the one node that reads `name`; raises _OtherForm if there are others or it is not of `op_type`."""
        nodes = self.readers[name]
        if len(nodes) != 1 or nodes[0].op_type != op_type:
            raise _OtherForm(name)
        return nodes[0]

    def constant(self, name: str) -> npt.NDArray[Any]:
        """Returns the value of `name`; raises _OtherForm if it is none of the constants."""
        if name in self._constants:
            return numpy_helper.to_array(self._constants[name])
        node = self.makers.get(name)
        if node is not None and node.op_type == "Identity":  # constants of one value are written once
            return self.constant(node.input[0])
        return numpy_helper.to_array(self.maker(name, "Constant").attribute[0].t)

    def replace(self, node: NodeProto, by: NodeProto) -> None:
        """Has `by` in the place of `node`."""
        self._replaced[node.output[0]] = by

    def move(self, nodes: list[NodeProto]) -> list[NodeProto]:
        """Returns `nodes`, which from now on are in a branch alone."""
        self._moved.update(node.output[0] for node in nodes)
        return nodes

    def prepend(self, *nodes: NodeProto) -> None:
        """Has `nodes`, which read nothing but inputs and constants, before all others."""
        self._first.extend(nodes)

    def close(self) -> None:
        """Writes the replacements, and leaves out the nodes and constants that no output needs."""
        nodes = list(self._first)
        for node in self.graph.node:
            if node.output[0] in self._replaced:
                nodes.append(self._replaced[node.output[0]])
            elif node.output[0] not in self._moved:
                nodes.append(node)
        needed = {output.name for output in self.graph.output}
        kept = []
        for node in reversed(nodes):  # readers come after what they read
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(_inputs(node))
        constants = [tensor for tensor in self.graph.initializer if tensor.name in needed]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(kept[::-1])
        self.graph.initializer.extend(constants)


def _inputs(node: NodeProto) -> Iterator[str]:
    """Yields what `node` reads, and what the nodes of its branches do."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _inputs(inner)


def _fuse_products(graph: _Graph) -> int:
    """Makes one node of a product of int8 matrices and the bias that is added to it, and returns how often.

    GELU reads its input twice, and ONNX Runtime takes that bias into it.
    """
    count = 0
    for product in graph.nodes("MatMul"):
        try:
            addition = graph.reader(product.output[0], "Add")
            graph.replace(addition, _product_with_bias(graph, product, addition))
        except _OtherForm:
            continue
        count += 1
    return count


def _product_with_bias(graph: _Graph, product: NodeProto, addition: NodeProto) -> NodeProto:
    (bias,) = [name for name in addition.input if name != product.output[0]]
    activations, weights = (graph.maker(name, "DequantizeLinear") for name in product.input)
    is_row = graph.constant(bias).ndim == 1 and graph.constant(weights.input[0]).ndim == 2
    if not is_row or graph.constant(weights.input[2]).any() or len(graph.readers[addition.output[0]]) > 1:
        raise _OtherForm(product.name)
    per_column = graph.constant(weights.input[1])
    if per_column.ndim and next((a.i for a in weights.attribute if a.name == "axis"), 1) not in (1, -1):
        raise _OtherForm(product.name)
    inputs = [name for pair in zip(activations.input, weights.input, strict=True) for name in pair]
    return helper.make_node(
        "MatMulIntegerToFloat", [*inputs, bias], list(addition.output), name=addition.name, domain=_DOMAIN
    )


def _fuse_attention(graph: _Graph, min_kept_tokens: int) -> None:
    """Makes one node of all that lies between query, key and value and the heads put together again."""
    for softmax in graph.nodes("Softmax"):
        try:
            last, attention, mask = _attention(graph, softmax)
            if len(graph.readers[softmax.output[0]]) > 1:  # the choice of tokens reads it too
                _drop_tokens_where_there_are_more(graph, last, attention, mask, min_kept_tokens)
                continue
        except _OtherForm:
            continue
        graph.replace(last, _with_or_without_mask(attention, softmax.name, mask))
    # Left out again where nothing reads them.
    graph.prepend(*_unpadded(graph.graph), *_keeps_all(graph.graph, min_kept_tokens))


def _attention(graph: _Graph, softmax: NodeProto) -> tuple[NodeProto, NodeProto, str]:
    """Returns the last node of the attention around `softmax`, what computes the same from query, key and value, and
    the mask, 1 for tokens."""
    masked = graph.maker(softmax.input[0], "Add")
    mask = _mask_behind(graph, masked.input[1])
    scores = graph.maker(masked.input[0], "MatMul")
    division = graph.maker(_before_quantising(graph, scores.input[0]), "Div")
    query, num_heads = _before_splitting(graph, division.input[0], [0, 2, 1, 3])
    key, _ = _before_splitting(graph, scores.input[1], [0, 2, 3, 1])
    weighing = [node for node in graph.readers[softmax.output[0]] if node.input[0] == softmax.output[0]]
    if [node.op_type for node in weighing] != ["MatMul"]:
        raise _OtherForm(softmax.name)
    value, _ = _before_splitting(graph, weighing[0].input[1], [0, 2, 1, 3])
    heads = graph.reader(weighing[0].output[0], "Transpose")
    together = graph.reader(heads.output[0], "Reshape")
    if list(heads.attribute[0].ints) != [0, 2, 1, 3]:
        raise _OtherForm(heads.name)
    attention = helper.make_node(
        "MultiHeadAttention",
        [query, key, value],
        list(together.output),
        name=softmax.name,
        domain=_DOMAIN,
        num_heads=num_heads,
        scale=1 / float(graph.constant(division.input[1])),
    )
    return together, attention, mask


def _mask_behind(graph: _Graph, row: str) -> str:
    """Returns what `export.quantized_graph` made `row` of; whatever else is added to scores has to stay."""
    depth = graph.maker(row, "Mul")
    sign = graph.maker(depth.input[0], "Sub")
    if graph.constant(sign.input[1]) != 1 or graph.constant(depth.input[1]) < 1e4:
        raise _OtherForm(row)
    column = graph.maker(sign.input[0], "Unsqueeze")
    return str(graph.maker(column.input[0], "Cast").input[0])


def _before_quantising(graph: _Graph, name: str) -> str:
    node = graph.makers.get(name)
    if node is None or node.op_type != "DequantizeLinear":
        return name
    return str(graph.maker(node.input[0], "QuantizeLinear").input[0])


def _before_splitting(graph: _Graph, name: str, order: list[int]) -> tuple[str, int]:
    """Returns the (B, T, features) that `name` has in heads, in `order` of (B, T, heads, features), and how many."""
    transposition = graph.maker(_before_quantising(graph, name), "Transpose")
    if list(transposition.attribute[0].ints) != order:
        raise _OtherForm(name)
    split = graph.maker(transposition.input[0], "Reshape")
    shape = graph.maker(split.input[1], "Concat")
    return _before_quantising(graph, split.input[0]), int(graph.constant(shape.input[2]).item())


def _unpadded(graph: GraphProto) -> list[NodeProto]:
    """Returns what says whether a batch has no padding; then what is kept has none: all keep as many."""
    graph.initializer.append(numpy_helper.from_array(np.array([0, 1], np.int64), "mask_dimensions"))
    least = helper.make_node("ReduceMin", [_MASK, "mask_dimensions"], ["least_of_mask"], keepdims=0)
    return [least, helper.make_node("Cast", ["least_of_mask"], [_UNPADDED], to=TensorProto.BOOL)]


def _with_or_without_mask(attention: NodeProto, name: str, mask: str) -> NodeProto:
    """Returns a choice between two of `attention`: its faster algorithm takes no mask, and most batches need none."""
    (out,) = attention.output
    without, with_mask = NodeProto(), NodeProto()
    for copy, suffix in ((without, "plain"), (with_mask, "masked")):
        copy.CopyFrom(attention)
        copy.output[0] = f"{out}_{suffix}"
        copy.name = f"{name}_{suffix}"
    with_mask.input.extend(["", f"{out}_mask"])  # no bias
    integers = helper.make_node("Cast", [mask], [f"{out}_mask"], to=TensorProto.INT32)
    return _choice(_UNPADDED, [out], name, [without], [integers, with_mask])


def _drop_tokens_where_there_are_more(
    graph: _Graph, last: NodeProto, attention: NodeProto, mask: str, minimum: int
) -> None:
    """Has the nodes that choose tokens in a branch for batches wider than `minimum`, and `attention` in the other.

    The names are those that export.token_dropping gives.
    """
    context = graph.reader(last.output[0], "GatherND")
    prefix = context.output[0].removesuffix("context")
    kept = [context, graph.maker(f"{prefix}hidden", "GatherND"), graph.maker(f"{prefix}mask", "Cast")]
    if minimum == 0:
        raise _OtherForm(context.name)
    outside = {*attention.input, kept[1].input[0], mask}
    dropping = [_copy(node) for node in graph.move(_needed_for(graph, kept, outside))]
    outputs = [node.output[0] for node in kept]
    for node in dropping:
        if node.output[0] in outputs:
            node.output[0] += "_of_many"
    dropping.sort(key=lambda node: node.output[0].endswith("_of_many"))  # they come last, in the order of `outputs`
    attention.output[0] = f"{prefix}context_of_few"
    keeping = [
        _with_or_without_mask(attention, attention.name, mask),
        helper.make_node("Identity", [kept[1].input[0]], [f"{prefix}hidden_of_few"]),
        helper.make_node("Identity", [mask], [f"{prefix}mask_of_few"]),
    ]
    graph.replace(context, _choice(_KEEPS_ALL, outputs, context.name, keeping, dropping))


def _copy(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy


def _needed_for(graph: _Graph, last: list[NodeProto], outside: set[str]) -> list[NodeProto]:
    """Returns `last` and the nodes that they alone need, in order, none that makes something `outside`."""
    found = {node.output[0] for node in last}
    for node in reversed(graph.graph.node):
        readers = {reader.output[0] for name in node.output for reader in graph.readers[name]}
        if readers and found >= readers and not outside.intersection(node.output):
            found.add(node.output[0])
    return [node for node in graph.graph.node if node.output[0] in found]


def _keeps_all(graph: GraphProto, minimum: int) -> list[NodeProto]:
    """Returns what says whether no row of a batch has more than `minimum` tokens."""
    graph.initializer.append(numpy_helper.from_array(np.array([minimum], np.int64), "kept_at_least"))
    width = helper.make_node("Shape", [_MASK], ["width_of_batch"], start=1, end=2)
    return [width, helper.make_node("LessOrEqual", ["width_of_batch", "kept_at_least"], [_KEEPS_ALL])]


def _choice(
    condition: str, outputs: list[str], name: str, then_nodes: list[NodeProto], else_nodes: list[NodeProto]
) -> NodeProto:
    """Returns a node that makes `outputs` of what the last of `then_nodes` or of `else_nodes` make."""
    branches = {}
    for branch, nodes in (("then_branch", then_nodes), ("else_branch", else_nodes)):
        results = [node.output[0] for node in nodes[-len(outputs) :]]
        types = [TensorProto.INT64 if output.endswith("_mask") else TensorProto.FLOAT for output in outputs]
        values = [helper.make_tensor_value_info(*result, None) for result in zip(results, types, strict=True)]
        branches[branch] = helper.make_graph(nodes, branch, [], values)
    return helper.make_node("If", [condition], outputs, name=name, **branches)
