"""Labels unlabelled reviews with what checkpoints make of them: class probabilities, averaged over the checkpoints.

    python -m training.soft_labels --model-path artefacts/teacher-1 artefacts/teacher-2 --data FOLDER
    python -m training.soft_labels --model-path artefacts/teacher-1 --data reviews.csv --out artefacts/soft/mine.parquet

A model trained on such soft labels (data.soft_labels of training.train) learns what its teachers know of reviews that
nobody labelled: knowledge distillation (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"), or, with
teachers of its own size as here, self-training. --data takes one parquet or CSV file, or a folder, of which
unsupervised.* is read and nothing else.

Writes a parquet file with columns `text` and `probabilities` (one a class, in the order of the checkpoints' id2label,
whose names are in the file's metadata), and beside it a .manifest.json with hashes of teachers and reviews. The last
line on stdout is one JSON object.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets

from model_repository.tokenizer.review_text import clean
from training import data, runs
from training.command_line import positive
from training.provenance import sha256_file, sha256_texts
from training.scorers import CheckpointScorer, NoClassifierError, Probabilities, Scorer, TokenizerNotFoundError

_FEATURES = Features({"text": Value("string"), "label": List(Value("float32"))})


class TeacherError(ValueError):
    """The checkpoints cannot label together; the message says which one differs, or is none."""


_REFUSALS = (TeacherError, NoClassifierError, TokenizerNotFoundError, data.DataError, runs.RunExistsError)


def mean_probabilities(teachers: Sequence[Scorer], reviews: Sequence[str]) -> Probabilities:
    """Returns the teachers' mean class probabilities (N, C) of N reviews."""
    return np.mean([teacher.probabilities(reviews) for teacher in teachers], axis=0)


def write(path: Path, reviews: Sequence[str], probabilities: Probabilities, labels: Sequence[str]) -> None:
    """Writes reviews with their class probabilities (N, C), stored as float32, and the C labels' names."""
    columns = {
        "text": pa.array(reviews, pa.string()),
        "probabilities": pa.array(list(probabilities.astype(np.float32)), pa.list_(pa.float32())),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata({"labels": json.dumps(list(labels))}), path)


def read(path: Path, labels: Sequence[str]) -> Dataset:
    """Returns columns `text` (str) and `label` (C class probabilities, float32, in the order of `labels`).

    Raises:
        training.data.DataError: no such file, other columns or labels, or rows without text or without a distribution
            over the labels.
    """
    if not path.is_file():
        raise data.DataError(f"data.soft_labels={path}: no such file; python -m training.soft_labels writes one")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise data.DataError(f"data.soft_labels={path}: not a parquet file ({error})") from error
    if not {"text", "probabilities"} <= set(table.column_names):
        raise data.DataError(
            f"data.soft_labels={path}: columns are {table.column_names}, expected text and probabilities: make the "
            "file with python -m training.soft_labels"
        )
    named = json.loads((table.schema.metadata or {}).get(b"labels", "null"))
    if named is not None and named != list(labels):
        raise data.DataError(f"data.soft_labels={path}: labels are {named}, expected data.labels, {list(labels)}")
    reviews, probabilities = table["text"].to_pylist(), table["probabilities"].to_pylist()
    empty = [index for index, text in enumerate(reviews) if not isinstance(text, str) or not clean(text).strip()]
    if empty:
        raise data.DataError(f"data.soft_labels={path}: rows {empty[:10]} have no text, expected a review in each")
    for index, row in enumerate(probabilities):
        if not _is_distribution(row, len(labels)):
            raise data.DataError(
                f"data.soft_labels={path}: row {index} has probabilities {row}, expected {len(labels)} with sum 1"
            )
    return Dataset.from_dict({"text": reviews, "label": probabilities}, features=_FEATURES)


def _is_distribution(row: Any, num_classes: int) -> bool:
    """Says whether `row`, whatever the file holds there, is a list of `num_classes` probabilities."""
    if not isinstance(row, list) or len(row) != num_classes:
        return False
    return all(isinstance(value, int | float) and value >= 0 for value in row) and abs(sum(row) - 1) <= 1e-3


def append(splits: data.Splits, soft: Dataset) -> Dataset:
    """Returns the training reviews with `soft` ones behind them, every label a distribution: a class id is one-hot.

    Soft reviews whose text the validation or test split holds too are left out, so that these stay unseen. IMDb's
    unsupervised reviews repeat 266 texts of its test reviews.
    """
    held_out = {*splits.validation["text"], *splits.test["text"]}
    unseen = [index for index, text in enumerate(soft["text"]) if text not in held_out]
    one_hot = np.eye(splits.train.features["label"].num_classes, dtype=np.float32)  # (C, C)
    labels = [one_hot[label] for label in splits.train["label"]]
    hard = Dataset.from_dict({"text": splits.train["text"][:], "label": labels}, features=_FEATURES)
    return concatenate_datasets([hard, soft.select(unseen)])


def _open_teachers(folders: Sequence[Path], batch_size: int) -> list[CheckpointScorer]:
    for folder in folders:
        if not (folder / "model.safetensors").is_file():
            raise TeacherError(f"--model-path {folder}: no model.safetensors there; training.train writes checkpoints")
    teachers = [CheckpointScorer(folder, batch_size) for folder in folders]
    for folder, teacher in zip(folders, teachers, strict=True):
        if teacher.labels != teachers[0].labels:
            raise TeacherError(
                f"--model-path {folder} has labels {teacher.labels}, {folders[0]} has {teachers[0].labels}: "
                "probabilities of different labels have no mean"
            )
    return teachers


def _reviews(args: argparse.Namespace) -> list[str]:
    reviews = data.load_unlabelled(args.data, ("unsupervised",), args.text_column)
    if args.limit is not None and args.limit < len(reviews):
        drawn = np.random.default_rng(0).permutation(len(reviews))[: args.limit]
        reviews = [reviews[index] for index in drawn]
    return reviews


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Labels and writes as the command line says; returns the manifest."""
    started = time.monotonic()
    if args.out.exists() and not args.overwrite:
        raise runs.RunExistsError(f"{args.out} is there already: pass --overwrite to replace it, or another --out")
    teachers = _open_teachers(args.model_path, args.batch_size)
    reviews = _reviews(args)
    labels = teachers[0].labels
    print(f"{len(reviews):,} reviews, {len(teachers)} checkpoints, labels {', '.join(labels)}", flush=True)
    probabilities = mean_probabilities(teachers, reviews)  # (N, C)
    write(args.out, reviews, probabilities, labels)
    shares = np.bincount(probabilities.argmax(axis=1), minlength=len(labels)) / len(reviews)
    manifest = {
        "teachers": [
            {"name": folder.name, "model_sha256": sha256_file(folder / "model.safetensors")}
            for folder in args.model_path
        ],
        "data": {
            "source": runs.name_of(args.data),
            "num_reviews": len(reviews),
            "sha256": sha256_texts((text, -1) for text in reviews),
        },
        "labels": labels,
        "most_probable": dict(zip(labels, shares.round(4).tolist(), strict=True)),
        "mean_confidence": round(float(probabilities.max(axis=1).mean()), 4),
        "sha256": sha256_file(args.out),
        **runs.provenance("cuda" if torch.cuda.is_available() else "cpu"),
        "wall_time_s": round(time.monotonic() - started, 1),
    }
    runs.write_json(args.out.with_suffix(".manifest.json"), manifest)
    return manifest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.soft_labels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", nargs="+", type=Path, required=True, metavar="FOLDER", help="checkpoints")
    parser.add_argument("--data", required=True, help="parquet or CSV file, or folder with unsupervised.*")
    parser.add_argument("--text-column", default="text", help="column of the reviews (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("artefacts/soft/reviews.parquet"), help="file to write (%(default)s)"
    )
    batch_size = 256 if torch.cuda.is_available() else 32
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=batch_size,
        help="reviews scored at a time (%(default)s; 256 on a GPU, else 32)",
    )
    parser.add_argument("--limit", type=positive, help="label this many reviews, drawn with a fixed seed")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        manifest = run(args)
    except (*_REFUSALS, OSError) as error:
        print(f"training.soft_labels: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"soft_labels": str(args.out), **manifest["data"], "most_probable": manifest["most_probable"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
