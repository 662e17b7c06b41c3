"""A quantised graph, written so that runtimes find its int8 parts. What it computes stays the same.

NNCF's Quantize and Dequantize nodes say which products are int8, and each runtime finds them by patterns of its own.
ONNX Runtime 1.32 misses half of them as they come: it dequantises the whole embedding table for every batch and runs
query, key and value in fp32. Where the CPU lacks VNNI, it multiplies 8-bit activations with a sign at a sixth of the
speed of those without. OpenVINO runs either form equally fast. Figures: CHANGELOG.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

MASKED = -1e9
"""Added to the scores of padding, whose weights are then 0 exactly, as with fp32's lowest number: exp(-104) is 0."""


def rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns `model` (changed in place) with the four rules below applied, and without what nothing uses any more."""
    _gather_before_dequantizing(model.graph)
    _unsign_activations(model.graph)
    _give_each_product_its_own(model.graph)
    _mask_once(model.graph)
    _drop_unused(model.graph)
    del model.graph.value_info[:]  # shapes of tensors that may be gone
    return model


def _constants(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def _replace(graph: onnx.GraphProto, nodes: list[NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)


def _gather_before_dequantizing(graph: onnx.GraphProto) -> None:
    """Looks the rows of an embedding table up in int8 and dequantises those, not the table."""
    constants = _constants(graph)
    tables = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in constants
        # One scale a row, no offset: then a row's value is its integers times its scale.
        and _is_row_wise(node, constants)
    }
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in tables:
            nodes.extend(_lookup(tables[node.input[0]], node))
        else:
            nodes.append(node)
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "last_axis"))
    _replace(graph, nodes)


def _is_row_wise(node: NodeProto, constants: dict[str, TensorProto]) -> bool:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    scales, offsets = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
    return axis == 0 and scales.ndim == 1 and not offsets.any()


def _lookup(dequantize: NodeProto, gather: NodeProto) -> Iterator[NodeProto]:
    rows, scales, (ids, out) = dequantize.input[0], dequantize.input[1], (gather.input[1], gather.output[0])
    yield helper.make_node("Gather", [rows, ids], [f"{out}_int8"], name=f"{out}_int8", axis=0)
    yield helper.make_node("Cast", [f"{out}_int8"], [f"{out}_fp32"], name=f"{out}_fp32", to=TensorProto.FLOAT)
    yield helper.make_node("Gather", [scales, ids], [f"{out}_scale"], name=f"{out}_scale", axis=0)
    yield helper.make_node("Unsqueeze", [f"{out}_scale", "last_axis"], [f"{out}_scales"], name=f"{out}_scales")
    yield helper.make_node("Mul", [f"{out}_fp32", f"{out}_scales"], [out], name=out)


def _unsign_activations(graph: onnx.GraphProto) -> None:
    """Moves the activations' 256 steps from -128..127 to 0..255; their values stay."""
    constants = _constants(graph)
    for node in graph.node:
        is_activation = node.op_type == "QuantizeLinear" or (
            node.op_type == "DequantizeLinear" and node.input[0] not in constants
        )
        if is_activation and constants[node.input[2]].data_type == TensorProto.INT8:
            unsigned = f"{node.input[2]}_uint8"
            if unsigned not in constants:
                offset = numpy_helper.to_array(constants[node.input[2]]).astype(np.int32) + 128
                constants[unsigned] = numpy_helper.from_array(offset.astype(np.uint8), unsigned)
                graph.initializer.append(constants[unsigned])
            node.input[2] = unsigned


def _give_each_product_its_own(graph: onnx.GraphProto) -> None:
    """Repeats a Dequantize node for each product that reads it: ONNX Runtime fuses only what has one reader."""
    readers: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
    for node in graph.node:
        for place, name in enumerate(node.input):
            readers[name].append((node, place))
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "DequantizeLinear":
            continue
        for number, (reader, place) in enumerate(readers[node.output[0]][1:], start=2):
            own = f"{node.output[0]}_{number}"
            nodes.append(helper.make_node("DequantizeLinear", list(node.input), [own], name=own))
            nodes[-1].attribute.extend(node.attribute)
            reader.input[place] = own
    _replace(graph, nodes)


def _mask_once(graph: onnx.GraphProto) -> None:
    """Adds a row made of the mask to every layer's scores, which each compared and selected one by one.

    There is one mask for all layers, or where tokens are dropped another from there on.
    """
    producers = {name: node for node in graph.node for name in node.output}
    made: set[str] = set()
    nodes: list[NodeProto] = []
    for node in graph.node:
        mask = _selecting_mask(node, producers)
        if mask is None:
            nodes.append(node)
            continue
        if not made:
            _add_mask_constants(graph)
        if mask not in made:
            nodes.extend(_mask_row(mask))
            made.add(mask)
        scores, row = node.input[2], f"{mask}_row"
        nodes.append(helper.make_node("Add", [scores, row], list(node.output), name=f"{node.name}_add"))
    _replace(graph, nodes)


def _selecting_mask(node: NodeProto, producers: dict[str, NodeProto]) -> str | None:
    """Returns the mask (B, T), 1 for tokens, by which `node` selects scores, if it does."""
    for op_type in ("Where", "Expand", "Reshape"):
        if node.op_type != op_type or node.input[0] not in producers:
            return None
        node = producers[node.input[0]]
    return node.input[0] if node.op_type == "Equal" else None


def _add_mask_constants(graph: onnx.GraphProto) -> None:
    for name, value in (("mask_axes", np.array([1, 2], np.int64)), ("mask_one", np.float32(1))):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    graph.initializer.append(numpy_helper.from_array(np.asarray(np.float32(-MASKED)), "mask_depth"))


def _mask_row(mask: str) -> Iterator[NodeProto]:
    """Yields what makes a row (B, 1, 1, T) of `mask` (B, T): 0 for tokens, `MASKED` for padding."""
    number, sign, row = f"{mask}_fp32", f"{mask}_sign", f"{mask}_row"
    yield helper.make_node("Cast", [mask], [number], name=number, to=TensorProto.FLOAT)
    yield helper.make_node("Unsqueeze", [number, "mask_axes"], [f"{number}_4d"], name=f"{number}_4d")
    yield helper.make_node("Sub", [f"{number}_4d", "mask_one"], [sign], name=sign)
    yield helper.make_node("Mul", [sign, "mask_depth"], [row], name=row)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Removes nodes and constants that no output needs."""
    uses = Counter(name for node in graph.node for name in node.input) + Counter(o.name for o in graph.output)
    kept: list[NodeProto] = []
    for node in reversed(graph.node):  # readers come after what they read
        if any(uses[name] for name in node.output):
            kept.append(node)
        else:
            uses.subtract(node.input)
    _replace(graph, kept[::-1])
    constants = [tensor for tensor in graph.initializer if uses[tensor.name]]
    del graph.initializer[:]
    graph.initializer.extend(constants)
