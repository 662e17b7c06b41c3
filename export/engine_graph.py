"""The ONNX graph in two parts: what TensorRT can hold, and the label strings, which it cannot.

B reviews, T tokens, C labels. The plan's graph keeps `logits`, `probabilities` (B, C) and `score` (B, 1); the rest maps
`probabilities` to `label` (B, 1), strings. Both are cut from the same file, so together they are that file.
"""

import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT_TYPES = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
}
_DYNAMIC_INT8 = ("DynamicQuantizeLinear", "MatMulInteger")
_QUANTIZED_TYPES = {TensorProto.INT8: "int8", TensorProto.FLOAT8E4M3FN: "fp8"}


class GraphError(ValueError):
    """TensorRT cannot take this graph; the message says why and what to export."""


def split_labels(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Returns the graph for the plan and the graph from `probabilities` to `label`.

    Raises:
        GraphError: the graph does not end in the head that `export.graph.append_head` makes.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    gather = producers.get("label")
    arg_max = producers.get(gather.input[1]) if gather and gather.op_type == "Gather" else None
    if gather is None or arg_max is None or arg_max.op_type != "ArgMax":
        raise GraphError("the graph has no ArgMax and Gather in front of `label`: export it with python -m export.onnx")
    plan = onnx.ModelProto()
    plan.CopyFrom(model)
    names = next(tensor for tensor in model.graph.initializer if tensor.name == gather.input[0])
    for node in (gather, arg_max):
        plan.graph.node.remove(node)
    plan.graph.initializer.remove(names)
    plan.graph.output.remove(next(output for output in plan.graph.output if output.name == "label"))
    return plan, _label_graph(model, names)


def _label_graph(model: onnx.ModelProto, names: onnx.TensorProto) -> onnx.ModelProto:
    # Softmax keeps the order, so the largest probability is the largest logit.
    graph = helper.make_graph(
        [
            helper.make_node("ArgMax", ["probabilities"], ["label_id"], axis=1, keepdims=1),
            helper.make_node("Gather", [names.name, "label_id"], ["label"], axis=0),
        ],
        "labels",
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", names.dims[0]])],
        [helper.make_tensor_value_info("label", TensorProto.STRING, ["batch", 1])],
        [names],
    )
    labels = helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    onnx.checker.check_model(labels, full_check=True)
    return labels


def graph_precision(model: onnx.ModelProto) -> str:
    """Returns the precision that a strongly typed engine takes from the graph: that of most of its matrix weights.

    Raises:
        GraphError: there is none, or the graph quantises while it runs, which TensorRT does not do.
    """
    dynamic = sorted({node.op_type for node in model.graph.node} & set(_DYNAMIC_INT8))
    if dynamic:
        raise GraphError(
            f"the graph quantises while it runs ({', '.join(dynamic)}), which is for ONNX Runtime on CPUs; give the "
            "fp16 file, or one with explicit QuantizeLinear and DequantizeLinear"
        )
    quantised = _quantised_precision(model)
    if quantised:
        return quantised
    sizes: dict[str, int] = {}
    for tensor in model.graph.initializer:
        name = FLOAT_TYPES.get(tensor.data_type)
        if name and len(tensor.dims) == 2:
            sizes[name] = sizes.get(name, 0) + tensor.dims[0] * tensor.dims[1]
    if not sizes:
        raise GraphError("the graph has no matrix of fp32, fp16 or bf16 weights")
    return max(sizes, key=sizes.__getitem__)


def _quantised_precision(model: onnx.ModelProto) -> str:
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    types = {name: tensor.data_type for name, tensor in tensors.items()}
    zero_points = [
        tensors[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[2:]
    ]
    shifted = sum(bool(numpy_helper.to_array(zero_point).any()) for zero_point in zero_points)
    if shifted:
        raise GraphError(
            f"{shifted} activations have a zero point other than 0, which OpenVINO takes and TensorRT does not; give "
            "the fp16 file, or one quantised symmetrically"
        )
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and types.get(node.input[0]) in _QUANTIZED_TYPES:
            return _QUANTIZED_TYPES[types[node.input[0]]]
    return ""
