"""ONNX graphs of a checkpoint in each precision, all with the same inputs, outputs and head.

B reviews, T tokens, C labels. Inputs `input_ids`, `attention_mask` int64 (B, T); outputs `logits`, `probabilities`
float32 (B, C), `score` float32 (B, 1), `label` string (B, 1).

optimum exports the encoder; its last layer is cut down to the token that is read. NNCF quantises it, since optimum's
quantiser either takes activation ranges from each batch or, static, loses 3 % of the labels. The head (softmax, score,
label) is appended here: optimum's export ends at the logits, and the head must stay in fp32 and be the same, once, in
every precision.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from optimum.exporters.onnx import onnx_export_from_model
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from export.first_token import keep_first_token
from export.generated_reviews import generate
from export.quantized_graph import rewrite
from export.token_dropping import choosing, drop_tokens
from model_repository.tokenizer.review_text import ReviewEncoder, pad
from training.token_dropping import kept_after, kept_percent, min_kept_tokens

Tokens = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
NUM_CALIBRATION_REVIEWS = 128
PRECISIONS = ("fp32", "fp16", "int8")
OPSET = 18
"""The lowest that optimum recommends; every ONNX Runtime from 1.14 on reads it, so the containers' 1.24 to 1.28."""
IR_VERSION = 8
"""The intermediate representation that came with opset 18."""

_AXES = {"batch_size": "batch", "sequence_length": "sequence"}


def export_encoder(checkpoint: Path, folder: Path) -> Path:
    """Writes `folder`/model.onnx, fp32 up to the logits, and returns its path."""
    # eager: the SDPA form of attention adds NaN guards and ops that older fusion patterns do not know. `main_export` of
    # the same package cannot choose it.
    model = DistilBertForSequenceClassification.from_pretrained(checkpoint, attn_implementation="eager").eval()
    onnx_export_from_model(
        model,
        output=folder,
        task="text-classification",
        opset=OPSET,
        device="cpu",
        do_validation=False,  # export.parity checks more, on realistic lengths
        no_post_process=True,
    )
    path = folder / "model.onnx"
    graph = drop_tokens(onnx.load(path), kept_after(kept_percent(model.config)), min_kept_tokens(model.config))
    for value in [*graph.graph.input, *graph.graph.output]:
        for dimension in value.type.tensor_type.shape.dim:
            dimension.dim_param = _AXES.get(dimension.dim_param, dimension.dim_param)
    onnx.save(graph, path)
    return path


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the graph in half precision with fp32 logits; softmax, layer norm and the choice of tokens stay in fp32.

    The mask constant, fp32's lowest number, becomes -1e4: as -inf it would turn a fully masked row into NaN.
    """
    keep = [*DEFAULT_OP_BLOCK_LIST, "Softmax", "LayerNormalization"]
    half = OnnxModel(
        convert_float_to_float16(
            model, keep_io_types=True, op_block_list=keep, node_block_list=choosing(model), max_finite_val=1e4
        )
    )
    half.topological_sort()  # the conversion appends its casts at the end
    half.remove_cascaded_cast_nodes()  # by which it rounds what goes from one node in fp32 to another
    return half.model


def to_int8(model: onnx.ModelProto, calibration: Sequence[Tokens]) -> onnx.ModelProto:
    """Returns the graph with int8 weights and activations between Quantize and Dequantize nodes.

    The activations' ranges come from `calibration` and are constants of the graph, so a review's answer does not depend
    on its neighbours, as it would if each batch took its own range. NNCF evens out the activations (SmoothQuant) and
    corrects the biases; the embedding tables, more than half of a small model, are int8 too.
    """
    batches = [{"input_ids": input_ids, "attention_mask": attention_mask} for input_ids, attention_mask in calibration]
    return nncf.quantize(
        model,
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
        ignored_scope=nncf.IgnoredScope(names=choosing(model)),
    )


def metadata(checkpoint: Path) -> dict[str, str]:
    """Returns what travels in a file about its inputs, JSON by name.

    `vocab_size` and `max_tokens` are the rows of the tables that ids and their positions look up, since not every
    runtime refuses what lies beyond; `kept_percent` and `min_kept_tokens` say where and how many tokens are dropped.
    """
    config = DistilBertConfig.from_pretrained(checkpoint)
    facts = {
        "vocab_size": config.vocab_size,
        "max_tokens": config.max_position_embeddings,
        "kept_percent": kept_percent(config),
        "min_kept_tokens": min_kept_tokens(config),
    }
    return {name: json.dumps(fact) for name, fact in facts.items()}


def append_head(model: onnx.ModelProto, labels: Sequence[str], facts: Mapping[str, str]) -> onnx.ModelProto:
    """Adds `probabilities`, `score` and `label` behind `logits`; label names and `facts` become metadata."""
    graph = model.graph
    encoded: list[Any] = [label.encode() for label in labels]
    names = helper.make_tensor("label_names", TensorProto.STRING, [len(labels)], encoded)
    graph.initializer.extend([names, helper.make_tensor("label_axis", TensorProto.INT64, [1], [1])])
    graph.node.extend(
        [
            helper.make_node("Softmax", ["logits"], ["probabilities"], name="head_softmax", axis=-1),
            helper.make_node("ReduceMax", ["probabilities", "label_axis"], ["score"], name="head_score", keepdims=1),
            helper.make_node("ArgMax", ["logits"], ["label_id"], name="head_argmax", axis=1, keepdims=1),
            helper.make_node("Gather", ["label_names", "label_id"], ["label"], name="head_label", axis=0),
        ]
    )
    del graph.output[:]
    for name, kind, width in (
        ("logits", TensorProto.FLOAT, len(labels)),
        ("probabilities", TensorProto.FLOAT, len(labels)),
        ("score", TensorProto.FLOAT, 1),
        ("label", TensorProto.STRING, 1),
    ):
        graph.output.append(helper.make_tensor_value_info(name, kind, ["batch", width]))
    del model.metadata_props[:]
    helper.set_model_props(model, {"labels": json.dumps(list(labels)), **facts})
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model, full_check=True)
    return model


def build(
    checkpoint: Path,
    precisions: Sequence[str],
    output: Path,
    labels: Sequence[str],
    calibration_reviews: Sequence[str] | None = None,
) -> dict[str, Path]:
    """Writes `output`/<precision>/model.onnx for each precision, one file each, and returns the paths.

    `calibration_reviews` set the ranges of int8's activations; without them, generated ones do.
    """
    paths = {}
    reviews = generate(NUM_CALIBRATION_REVIEWS, seed=1) if calibration_reviews is None else calibration_reviews
    facts = metadata(checkpoint)
    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        encoder = export_encoder(checkpoint, Path(scratch))
        for precision in precisions:
            model = onnx.load(encoder)
            if precision == "int8":
                rows = ReviewEncoder(checkpoint / "tokenizer.json").encode(reviews)
                quantised = to_int8(model, [pad([row]) for row in rows])  # each by itself: padding is no text
                model = rewrite(keep_first_token(quantised))
            else:
                model = keep_first_token(model)
                model = to_fp16(model) if precision == "fp16" else model
            folder = output / precision
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            paths[precision] = folder / "model.onnx"
            onnx.save(append_head(model, labels, facts), paths[precision])
    return paths
