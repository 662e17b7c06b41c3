"""Turns a quantised ONNX file back into a checkpoint, for whoever has the served model and not what it was made from.

    python -m export.checkpoint                              # the shipped model -> artefacts/shipped
    python -m export.checkpoint --onnx FILE --tokenizer FILE --output FOLDER

The weights are those that the int8 numbers stand for: the served model less the rounding of its activations, not the
one that was trained. The torch peers of `make bench-compare` run it, and training can start from it (`base.source`).
Reads graphs as export.onnx writes them. What was made passes the parity gate or is not kept; the last line on stdout is
one JSON object.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import NodeProto, numpy_helper
from tokenizers import Tokenizer
from transformers import DistilBertConfig, DistilBertTokenizerFast

from export import parity
from export.generated_reviews import generate
from export.repository import MODEL_FILE, REPOSITORY, TOKENIZER_FILE
from training.token_dropping import classifier_class

Array = npt.NDArray[np.float32]
NUM_REVIEWS = 64


class QuantizedGraph:
    """The constants of a graph by the names that the checkpoint has for them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self._nodes = list(model.graph.node)
        self._producers = {name: node for node in self._nodes for name in node.output}
        for node in self._nodes:  # optimum lets equal constants share one
            if node.op_type == "Identity" and node.input[0] in self._constants:
                self._constants[node.output[0]] = self._constants[node.input[0]]

    def weights(self) -> Iterator[tuple[str, Array]]:
        """Yields every parameter of DistilBertForSequenceClassification, fp32.

        The nodes name the layers, since constants may have names of their own.
        """
        for node in self._nodes:
            layer = "classifier" if node.output[0] == "logits" else ".".join(node.output[0].split("/")[1:-1])
            if node.op_type == "LayerNormalization":
                yield f"{layer}.weight", self._constants[node.input[1]]
                yield f"{layer}.bias", self._constants[node.input[2]]
            elif node.op_type in ("MatMul", "Gemm") and (weight := self._weight(node)) is not None:
                yield f"{layer}.weight", weight
                yield f"{layer}.bias", self._bias(node)
        for name in ("word_embeddings", "position_embeddings"):
            key = f"distilbert.embeddings.{name}.weight"
            scales = self._constants[f"scale_{key}_1"][:, None]
            yield key, self._constants[f"q_output_{key}_1"].astype(np.float32) * scales

    def head_dim(self) -> int:
        """Returns the width of an attention head, whose root divides the queries."""
        divisors = (n.input[1] for n in self._nodes if n.op_type == "Div" and n.output[0].find("/attention/") >= 0)
        node = self._producers.get(divisor := next(divisors))
        root = self._constants[divisor] if node is None else numpy_helper.to_array(node.attribute[0].t)
        return round(float(root) ** 2)

    def _weight(self, node: NodeProto) -> Array | None:
        """Returns the matrix (out, in) of `node`, None if it multiplies activations."""
        dequantize = self._producers.get(node.input[1])
        if dequantize is None or dequantize.input[0] not in self._constants:
            return None
        integers, scales, offsets = (self._constants[name].astype(np.float32) for name in dequantize.input)
        out_first = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        matrix = (integers if out_first else integers.T) - offsets[:, None]
        weight: Array = matrix * scales[:, None] * self._smoothing(node)
        return weight

    def _smoothing(self, node: NodeProto) -> Array:
        """Returns what NNCF's SmoothQuant multiplies the input of `node` by, (in,): it divided the weights by it."""
        quantize = self._producers[self._producers[node.input[0]].input[0]]
        smooth = self._producers.get(quantize.input[0])
        if smooth is None or smooth.op_type != "Mul" or not smooth.input[1].endswith("nncf_smooth_quant_scale"):
            return np.ones(1, np.float32)
        return self._constants[smooth.input[1]].astype(np.float32).reshape(-1)

    def _bias(self, node: NodeProto) -> Array:
        """Returns what is added to the product `node`."""
        if node.op_type == "Gemm":
            return self._constants[node.input[2]]
        added = next(n for n in self._nodes if n.op_type == "Add" and node.output[0] in n.input)
        return next(self._constants[name] for name in added.input if name in self._constants)


def restore(onnx_file: Path, tokenizer_file: Path, folder: Path) -> None:
    """Writes the checkpoint of `onnx_file` with its tokenizer into `folder`.

    Raises:
        ValueError: the file is cut short, or its graph not one that export.onnx writes in int8.
    """
    try:
        model = onnx.load(onnx_file)
    except DecodeError as error:
        raise ValueError(
            f"{onnx_file} is no whole ONNX file ({error}), expected int8 as export.onnx writes it"
        ) from error
    graph = QuantizedGraph(model)
    try:
        weights = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in graph.weights()}
        facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
        dropping = {name: facts[name] for name in ("kept_percent", "min_kept_tokens") if name in facts}
        config = _config(weights, graph.head_dim(), facts["labels"], dropping)
        classifier = classifier_class(config)(config)
        classifier.load_state_dict(weights, strict=True)
    except (KeyError, RuntimeError) as error:  # RuntimeError: torch's of a parameter, Python's of a `next` without one
        raise ValueError(f"{onnx_file} is no int8 DistilBERT as `python -m export.onnx` writes it: {error}") from error
    classifier.save_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    truncation = tokenizer.truncation or {}
    DistilBertTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=truncation.get("max_length"),
        truncation_side=truncation.get("direction", "right"),
    ).save_pretrained(folder)
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")  # with its truncation, which transformers drops


def _config(
    weights: dict[str, torch.Tensor], head_dim: int, labels: Sequence[str], dropping: dict[str, Any]
) -> DistilBertConfig:
    vocab_size, dim = weights["distilbert.embeddings.word_embeddings.weight"].shape
    layers = {name.split(".")[3] for name in weights if name.startswith("distilbert.transformer.layer.")}
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "dim": dim,
        "n_layers": len(layers),
        "n_heads": dim // head_dim,
        "hidden_dim": weights["distilbert.transformer.layer.0.ffn.lin1.weight"].shape[0],
        "max_position_embeddings": weights["distilbert.embeddings.position_embeddings.weight"].shape[0],
    }
    names = dict(enumerate(labels))
    ids = {label: index for index, label in names.items()}
    return DistilBertConfig(**sizes, id2label=names, label2id=ids, **dropping)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--onnx", type=Path, default=REPOSITORY / MODEL_FILE, help="int8 file (%(default)s)")
    parser.add_argument("--tokenizer", type=Path, default=REPOSITORY / TOKENIZER_FILE, help="its tokenizer.json")
    parser.add_argument("--output", type=Path, default=Path("artefacts/shipped"), help="new folder (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    if args.output.exists():
        print(f"export.checkpoint: {args.output} exists: remove it, or name another --output", file=sys.stderr)
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent, prefix="checkpoint-") as scratch:
        folder = Path(scratch) / "checkpoint"
        try:
            restore(args.onnx, args.tokenizer, folder)
        except (ValueError, OSError) as error:
            print(f"export.checkpoint: {error}", file=sys.stderr)
            return 2
        checks = parity.compare(folder, args.onnx, "int8", generate(NUM_REVIEWS, seed=0))
        print(parity.table(checks, "int8", NUM_REVIEWS), flush=True)
        passed = all(check.passed for check in checks)
        if passed:
            folder.rename(args.output)
    print(json.dumps({"checkpoint": str(args.output) if passed else None, "parity_passed": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
