"""The graph of a classifier that drops tokens: what `training.token_dropping` does, put into optimum's graph.

optimum exports the layers as they are. After the attention of a layer that drops tokens, the rows of its answer are
taken that received most attention, and the layers behind it get these and a mask of their own.
"""

from collections.abc import Mapping

import onnx
from onnx import NodeProto, compose, parser

_PREFIX = "dropping"

# What a review has at first. B reviews of T tokens or less.
_LENGTHS = """
lengths (int64[B, T] attention_mask) => (int64[1] width, int64[B, 1] num_tokens)
{
    width = Shape <start = 1, end = 2> (attention_mask)
    axis = Constant <value_ints = [1]> ()
    num_tokens = ReduceSum <keepdims = 1> (attention_mask, axis)
}
"""
# Of one layer: Q tokens reach it, K are kept after its attention. Shares are rounded up as numbers with a fraction,
# less half a percent, since OpenVINO's division of integers rounds to the nearest.
_DROPPING = """
dropping (
    int64[1] width, int64[B, 1] num_tokens, int64[B, Q] mask, float[B, H, Q, Q] weights, float[B, Q, D] context,
    float[B, Q, D] hidden
) => (float[B, K, D] kept_context, float[B, K, D] kept_hidden, int64[B, K] kept_mask, bool[B, K] is_padding)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    heads_and_queries = Constant <value_ints = [1, 2]> ()
    last_axis = Constant <value_ints = [-1]> ()
    share = Constant <value_floats = [SHARE]> ()
    minimum = Constant <value_floats = [MINIMUM]> ()
    half_percent = Constant <value_floats = [0.005]> ()
    more_than_any = Constant <value_float = 10000.0> ()

    width_number = Cast <to = 1> (width)
    width_share = Mul(width_number, share)
    width_below = Sub(width_share, half_percent)
    width_above = Ceil(width_below)
    width_least = Min(width_number, minimum)
    width_kept = Max(width_above, width_least)
    count = Cast <to = 7> (width_kept)
    tokens_number = Cast <to = 1> (num_tokens)
    tokens_share = Mul(tokens_number, share)
    tokens_below = Sub(tokens_share, half_percent)
    tokens_above = Ceil(tokens_below)
    tokens_least = Min(tokens_number, minimum)
    num_kept = Max(tokens_above, tokens_least)

    is_token = Cast <to = 1> (mask)
    queries = Unsqueeze(is_token, heads_and_queries)
    received_heads = MatMul(queries, weights)
    received = ReduceMean <keepdims = 0> (received_heads, heads_and_queries)
    num_places = Shape <start = 1, end = 2> (mask)
    end = Squeeze(num_places)
    places = Range(zero, end, one)
    is_first = Equal(places, zero)
    first = Cast <to = 1> (is_first)
    bonus = Mul(first, more_than_any)
    scores = Add(received, bonus)
    most, order = TopK <axis = 1, largest = 1, sorted = 1> (scores, count)
    rows = Unsqueeze(order, last_axis)
    kept_context = GatherND <batch_dims = 1> (context, rows)
    kept_hidden = GatherND <batch_dims = 1> (hidden, rows)

    num_ranks = Squeeze(count)
    ranks = Range(zero, num_ranks, one)
    ranks_number = Cast <to = 1> (ranks)
    is_kept = Less(ranks_number, num_kept)
    kept_mask = Cast <to = 7> (is_kept)
    is_padding = Equal(kept_mask, zero)
}
"""


def drop_tokens(model: onnx.ModelProto, kept_after: Mapping[int, int], min_kept_tokens: int) -> onnx.ModelProto:
    """Returns `model` (changed in place), fp32, that keeps `kept_after` percent of a review's tokens after a layer.

    A review keeps at least `min_kept_tokens`, all if it has no more.

    Raises:
        ValueError: the graph has no such layer, or is not built and named as optimum does.
    """
    if not kept_after:
        return model
    makers = {name: node for node in model.graph.node for name in node.output}
    mask = "attention_mask"
    try:
        layers = {layer.context: layer for layer in (_Layer(number, makers) for number in kept_after)}
        # One for all layers: with one for each, those behind would go on with a mask of all tokens.
        (is_padding,) = (n.output[0] for n in model.graph.node if n.op_type == "Equal" and mask in n.input)
    except KeyError as error:
        raise ValueError(f"the graph has no tensor {error}, expected one that optimum exported") from error
    nodes = _named(_LENGTHS, f"{_PREFIX}_lengths", {"attention_mask": mask})
    lengths = {name: f"{_PREFIX}_lengths_{name}" for name in ("width", "num_tokens")}
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        nodes.append(node)
        layer = layers.get(node.output[0])
        if layer is None:
            continue
        prefix = f"{_PREFIX}_{layer.number}"
        share, minimum = kept_after[layer.number] / 100, float(min_kept_tokens)
        text = _DROPPING.replace("SHARE", str(share)).replace("MINIMUM", str(minimum))
        nodes.extend(_named(text, prefix, {**lengths, "mask": mask, **layer.inputs()}))
        mask = f"{prefix}_kept_mask"
        renamed |= {layer.context: f"{prefix}_kept_context", is_padding: f"{prefix}_is_padding"}
        layer.residual.input[layer.place] = f"{prefix}_kept_hidden"
    del model.graph.node[:], model.graph.value_info[:]  # shapes that no longer hold
    model.graph.node.extend(nodes)
    return model


class _Layer:
    """The tensors of a layer between its attention and what is added to that."""

    def __init__(self, number: int, makers: Mapping[str, NodeProto]) -> None:
        self.number = number
        of_layer = f"/distilbert/transformer/layer.{number}"
        self.weights = makers[f"{of_layer}/attention/Softmax_output_0"].output[0]  # (B, H, Q, Q)
        self.residual = makers[f"{of_layer}/Add_output_0"]
        (self.place,) = (place for place, name in enumerate(self.residual.input) if not name.startswith(f"{of_layer}/"))
        self.hidden = self.residual.input[self.place]  # (B, Q, D)
        self.context = makers[f"{of_layer}/attention/out_lin/MatMul_output_0"].input[0]  # (B, Q, D)

    def inputs(self) -> dict[str, str]:
        """Returns their names by those that they have in `_DROPPING`."""
        return {"weights": self.weights, "context": self.context, "hidden": self.hidden}


def choosing(model: onnx.ModelProto) -> list[str]:
    """Returns the names of the nodes that choose tokens, from query times key on.

    They compare numbers, of which many are close, so these should not be rounded before or between.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    names = []
    for node in model.graph.node:
        if node.name.startswith(_PREFIX) and node.op_type != "GatherND":
            names.append(node.name)
        if node.name.startswith(_PREFIX) and node.name.endswith("received_heads"):
            selection = makers[makers[node.input[1]].input[0]]  # of the scores that are no padding's
            names.extend([selection.name, makers[selection.input[2]].name])
    return names


def _named(text: str, prefix: str, inputs: Mapping[str, str]) -> list[NodeProto]:
    """Returns the nodes of the graph in `text`, their names with `prefix`, which read `inputs`."""
    graph = compose.add_prefix_graph(parser.parse_graph(text), f"{prefix}_")
    renamed = {f"{prefix}_{name}": value for name, value in inputs.items()}
    for node in graph.node:
        node.name = node.output[0]
        node.input[:] = [renamed.get(name, name) for name in node.input]
    return list(graph.node)
