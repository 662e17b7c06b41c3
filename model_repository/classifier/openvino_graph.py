"""The graph that OpenVINO runs: model.onnx with attention's first product in floating point.

model.onnx has it in int8, for which OpenVINO prepares query and key in six steps a layer, outside of what it makes of
the rest of attention; in floating point the product is a part of that. On CPUs with AMX a run takes 6 to 14 % less
time, and with bf16 up to 26 % (CHANGELOG). What is not found stays as it is.
"""

from typing import Any

import numpy as np
from openvino import Model, Node, Output, opset13

_DEQUANTISING = ("Multiply", "Subtract", "Convert", "Convert")
"""From the number back to the rounding: scale, zero point, to a number, to an integer. Each once, as whatever else
multiplies is no part of it."""
_HEADS_BEFORE_TOKENS = (0, 2, 1, 3)
_TRANSPOSED = (0, 2, 3, 1)
"""Orders of (B, T, heads, features): those of the query, and those of the key that the query is multiplied by."""


def unquantised_attention(model: Model) -> int:
    """Has query and key of `model` multiplied as they are, not rounded to int8, and returns in how many layers."""
    count = 0
    for softmax in model.get_ordered_ops():
        if softmax.get_type_name() == "Softmax":
            count += _unquantise(softmax)
    if count:
        model.validate_nodes_and_infer_types()
    return count


def _unquantise(softmax: Node) -> bool:
    addition = _maker(softmax, 0)
    scores = _maker(addition, 0)
    if (addition.get_type_name(), scores.get_type_name()) != ("Add", "MatMul"):
        return False
    query, transposition = scores.input_value(0), _maker(scores, 1)
    if not _is_transposed(transposition):
        return False
    split = _maker(transposition, 0)
    exact_query, exact_key = _before_rounding(query), _before_rounding(split.input_value(0))
    if split.get_type_name() != "Reshape" or query == exact_query or split.input_value(0) == exact_key:
        return False
    key = opset13.reshape(exact_key, split.input_value(1), special_zero=True)
    key = opset13.transpose(key, np.array(_HEADS_BEFORE_TOKENS))  # what the operator of all attention takes
    product = opset13.matmul(exact_query, key, transpose_a=False, transpose_b=True)
    addition.input(0).replace_source_output(product.output(0))
    return True


def _maker(node: Node, place: int) -> Node:
    return node.input_value(place).get_node() if node.get_input_size() > place else node


def _is_transposed(node: Node) -> bool:
    if node.get_type_name() != "Transpose":
        return False
    order: Any = _maker(node, 1)
    return order.get_type_name() == "Constant" and tuple(order.data.tolist()) == _TRANSPOSED


def _before_rounding(value: Output) -> Output:
    """Returns what `value` was before it was rounded to int8 and made a number again, or `value` if it was not."""
    source = value
    for operator in _DEQUANTISING:
        if source.get_node().get_type_name() == operator:
            source = source.get_node().input_value(0)
    return source.get_node().input_value(0) if source.get_node().get_type_name() == "FakeQuantize" else value
