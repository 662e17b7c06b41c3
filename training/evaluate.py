"""Scores a checkpoint, an ONNX file or a running server on labelled reviews, or on examples of your own.

    python -m training.evaluate --model-path artefacts/smoke --examples "Amazing movie!" "Terrible film."
    python -m training.evaluate --model-path artefacts/reference --data stanfordnlp/imdb
    python -m training.evaluate --model-path model_repository/classifier/1/model.onnx --data test.parquet
    python -m training.evaluate --model-path grpc://127.0.0.1:8001 --data test.parquet --output-json out.json

All three go through one interface, so their figures compare. `--data` takes a hub data set, a parquet or CSV file, or
a folder, of which the split named by --split is scored. The last line on stdout is one JSON object.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clients.address import Address
from clients.errors import SentimentError
from training import data
from training.command_line import positive
from training.config import Data
from training.metrics import classification_metrics
from training.provenance import utc_now
from training.scorers import (
    CheckpointScorer,
    NoClassifierError,
    OnnxFileError,
    OnnxScorer,
    Scorer,
    ServerLabelsError,
    ServerScorer,
    TokenizerNotFoundError,
)


class ModelPathError(ValueError):
    """The model path names nothing that can be scored."""


class LabelsError(ValueError):
    """The labels that were given are not as many as the model has."""


_REFUSALS = (LabelsError, ModelPathError, NoClassifierError, OnnxFileError, ServerLabelsError, TokenizerNotFoundError)


def open_scorer(model_path: str, labels: list[str] | None = None) -> Scorer:
    """Returns the scorer for a checkpoint folder, a `.onnx` file, or a server's http:// or grpc:// URL.

    `labels` are the data's names by id, which a server does not tell: without them it is to have negative and positive.

    Raises:
        LabelsError: there are more or fewer `labels` than the model has, which a server tells with its first answer.
        ModelPathError: none of the three, or a URL without a port.
        NoClassifierError, OnnxFileError, TokenizerNotFoundError: a model that cannot be scored.
    """
    if model_path.startswith(("http://", "grpc://")):
        try:
            Address.parse(model_path)
        except ValueError as error:
            raise ModelPathError(f"--model-path {error}") from error
        return ServerScorer(model_path, labels or Data(source="").labels, data_labels=labels is not None)
    path = Path(model_path)
    if path.suffix == ".onnx" and path.is_file():
        scorer: Scorer = OnnxScorer(path)
    elif (path / "model.safetensors").is_file():
        scorer = CheckpointScorer(path)
    else:
        raise ModelPathError(
            f"--model-path {model_path}: expected a folder with model.safetensors, a .onnx file, or a URL such as "
            "grpc://127.0.0.1:8001; a small checkpoint comes from: make train"
        )
    if labels is not None and len(labels) != len(scorer.labels):
        raise LabelsError(f"--labels {' '.join(labels)}: expected a name for each label of the model: {scorer.labels}")
    return scorer


def score(scorer: Scorer, reviews: Sequence[str], labels: Sequence[int]) -> dict[str, Any]:
    """Returns `training.metrics` of the scorer over labelled reviews."""
    probabilities = scorer.probabilities(list(reviews))  # (N, C)
    # 1e-12: a probability that rounds to 0 would make the loss infinite.
    return classification_metrics(np.log(np.maximum(probabilities, 1e-12)), np.asarray(labels))


def _labelled(args: argparse.Namespace, labels: list[str]) -> tuple[list[str], list[int], str | None]:
    """Returns reviews, the ids of their `labels`, and the split that they are; a single file is none."""
    columns = {"text_column": args.text_column, "label_column": args.label_column}
    is_file = Path(args.data).is_file()
    name = "train" if is_file else args.split
    split = data.load(Data(source=args.data, labels=labels, **columns), [name])[name]
    if args.limit is not None and args.limit < len(split):
        split = split.shuffle(seed=0).select(range(args.limit))
    return split["text"][:], split["label"][:], None if is_file else name


def _print_examples(scorer: Scorer, examples: Sequence[str]) -> list[dict[str, Any]]:
    answers = []
    for review, row in zip(examples, scorer.probabilities(examples), strict=True):
        answer = {"label": scorer.labels[int(row.argmax())], "score": float(row.max()), "review": review}
        print(f"{answer['label']:<9} {answer['score']:.4f}  {review}")
        answers.append(answer)
    return answers


def _print_metrics(metrics: dict[str, Any], labels: Sequence[str]) -> None:
    for name in ("accuracy", "precision", "recall", "f1", "loss"):
        print(f"{name:<10} {metrics[name]:.4f}")
    width = max(map(len, labels)) + 2
    print("confusion (rows: true, columns: predicted)")
    print(" " * width + "".join(f"{label:>{width}}" for label in labels))
    for label, row in zip(labels, metrics["confusion"], strict=True):
        print(f"{label:>{width}}" + "".join(f"{count:>{width}}" for count in row))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, help="checkpoint folder, .onnx file, or http:// or grpc:// URL")
    parser.add_argument("--examples", nargs="+", metavar="REVIEW", help="reviews to label")
    parser.add_argument("--data", help="labelled reviews: hub data set, parquet or CSV file, or folder")
    parser.add_argument("--split", default="test", help="of a data set or folder (%(default)s); one file has none")
    parser.add_argument("--text-column", default="text", help="column of the reviews (%(default)s)")
    parser.add_argument("--label-column", default="label", help="column of labels, names or ids (%(default)s)")
    parser.add_argument(
        "--labels",
        nargs="+",
        help="the data's label names in the order of the model's ids (default: the model's own; a server does not tell "
        "them and is taken to have negative positive: it is an error if it answers otherwise)",
    )
    parser.add_argument("--limit", type=positive, help="score this many reviews, drawn with a fixed seed")
    parser.add_argument("--output-json", type=Path, help="write the result here too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.examples and not args.data:
        parser.error("nothing to score: give --examples or --data")
    if args.labels and len(set(args.labels)) < max(2, len(args.labels)):
        parser.error(f"--labels {' '.join(args.labels)}: expected at least two names, each once")
    result: dict[str, Any] = {"model_path": args.model_path, "date": utc_now()}
    try:
        if args.output_json:  # before minutes of scoring
            args.output_json.parent.mkdir(parents=True, exist_ok=True)
        scorer = open_scorer(args.model_path, args.labels)
        if args.examples:
            result["examples"] = _print_examples(scorer, args.examples)
        if args.data:
            reviews, labels, result["split"] = _labelled(args, args.labels or scorer.labels)
            started = time.monotonic()
            result["data"] = args.data
            result["metrics"] = score(scorer, reviews, labels)
            result["wall_time_s"] = round(time.monotonic() - started, 1)
            _print_metrics(result["metrics"], scorer.labels)
        print(json.dumps(result))
        if args.output_json:
            args.output_json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except (*_REFUSALS, data.DataError, SentimentError, OSError) as error:
        print(f"training.evaluate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
