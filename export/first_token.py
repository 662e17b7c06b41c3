"""The last layer, for the one token that is read: the classifier looks at [CLS] alone, so no other needs an answer.

Keys and values still come from every token. The query, the way out of attention and the feed-forward products, 10 of
the layer's 12 equal parts, come from [CLS] alone. The logits stay what they were. Names are those of optimum's graphs.
"""

import re
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

FIRST = "first_token"
_LAYER = re.compile(r"^/distilbert/transformer/layer\.(\d+)/")


def keep_first_token(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns `model` (changed in place), fp32 or quantised, with its last layer cut down.

    Raises:
        ValueError: the graph does not read the first token alone, or is not named as optimum names it.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    layer = f"/distilbert/transformer/layer.{_last_layer(graph)}"
    try:
        residual = producers[f"{layer}/Add_output_0"]
        query = producers[f"{layer}/attention/q_lin/MatMul_output_0"]
    except KeyError as error:
        raise ValueError(f"the graph has no tensor {error}, expected one that optimum exported") from error
    _check_first_token_is_read(graph, f"{layer}/output_layer_norm/")
    hidden = next(name for name in residual.input if not name.startswith(f"{layer}/"))  # (B, T, dim)
    own = list(_first(hidden))
    query.input[0] = _repeat(query.input[0], hidden, producers, own)
    residual.input[list(residual.input).index(hidden)] = FIRST  # (B, 1, dim)
    for name, value in ((f"{FIRST}_{part}", number) for part, number in (("start", 0), ("end", 1), ("axis", 1))):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    place = next(index for index, node in enumerate(graph.node) if hidden in node.output) + 1
    nodes = [*graph.node[:place], *own, *graph.node[place:]]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]  # shapes that no longer hold
    return model


def _last_layer(graph: onnx.GraphProto) -> int:
    found = [int(match[1]) for node in graph.node for name in node.output if (match := _LAYER.match(name))]
    if not found:
        raise ValueError("the graph has no transformer layers, expected one that optimum exported")
    return max(found)


def _check_first_token_is_read(graph: onnx.GraphProto, norm: str) -> None:
    readers = [node for node in graph.node if any(name.startswith(norm) for name in node.input)]
    ends = [node for node in readers if not any(name.startswith(norm) for name in node.output)]
    if [node.op_type for node in ends] != ["Gather"] or next(a.i for a in ends[0].attribute if a.name == "axis") != 1:
        raise ValueError(f"the last layer is read by {[node.op_type for node in ends]}, expected one Gather of a token")


def _first(hidden: str) -> Iterator[NodeProto]:
    bounds = [f"{FIRST}_start", f"{FIRST}_end", f"{FIRST}_axis"]
    yield helper.make_node("Slice", [hidden, *bounds], [FIRST], name=FIRST)


def _repeat(name: str, hidden: str, producers: dict[str, NodeProto], own: list[NodeProto]) -> str:
    """Appends to `own` what makes tensor `name` out of `hidden`, for the first token; returns that tensor's name.

    It is nothing in fp32, and smoothing, Quantize and Dequantize in a quantised graph.
    """
    if name == hidden:
        return FIRST
    node = NodeProto()
    node.CopyFrom(producers[name])
    node.input[0] = _repeat(node.input[0], hidden, producers, own)
    node.name = node.output[0] = f"{FIRST}_{node.op_type}"
    own.append(node)
    return node.output[0]
