"""Exports a checkpoint to ONNX, checks each file against it, and installs one into the model repository.

    python -m export.onnx --checkpoint artefacts/reference
    python -m export.onnx --checkpoint artefacts/smoke --precision fp32 --no-install
    python -m export.onnx --checkpoint artefacts/reference --data test.parquet     # parity on real reviews

Reads a DistilBERT sequence-classification checkpoint with its tokenizer.json. Writes <checkpoint>/onnx/<precision>/
model.onnx, each one file, and export.json with what was checked. When every file passes the parity gate
(export/parity.py), the one named by --install goes into model_repository with the tokenizer and manifest.json, all or
nothing; a broken one installs nothing and the exit status is 1. The last line on stdout is one JSON object.
"""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from export import graph, parity
from export.checkpoint_folder import CheckpointError, read_labels
from export.repository import MODEL_FILE, REPOSITORY, TOKENIZER_FILE, install
from model_repository.tokenizer.review_text import ReviewEncoder
from training.command_line import positive
from training.provenance import git_revision, sha256_file, utc_now, versions

_PACKAGES = (
    "torch",
    "transformers",
    "optimum",
    "optimum-onnx",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "tokenizers",
)


def _source(checkpoint: Path) -> dict[str, Any]:
    """Returns what identifies the checkpoint: its name, its weights' sha256 and, where there is one, its manifest."""
    manifest = checkpoint / "manifest.json"
    return {
        "name": checkpoint.resolve().name,
        "model_sha256": sha256_file(checkpoint / "model.safetensors"),
        "manifest": json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else None,
    }


def describe(checkpoint: Path, labels: list[str], parity_results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts that every file exported from `checkpoint` shares."""
    return {
        "labels": labels,
        "max_length": ReviewEncoder(checkpoint / "tokenizer.json").max_length,
        "opset": graph.OPSET,
        "ir_version": graph.IR_VERSION,
        "parity": dict(parity_results),
        "source_checkpoint": _source(checkpoint),
        "versions": versions(*_PACKAGES),
        "git_revision": git_revision(),
        "date": utc_now(),
    }


def _check(checkpoint: Path, files: Mapping[str, Path], reviews: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns what was measured of each file, and the precisions that broke the gate."""
    results, broken = {}, []
    for precision, path in files.items():
        checks = parity.compare(checkpoint, path, precision, reviews)
        print(parity.table(checks, precision, len(reviews)), flush=True)
        results[precision] = {check.name: {"measured": check.measured, "limit": check.limit} for check in checks}
        if not all(check.passed for check in checks):
            broken.append(precision)
    return results, broken


def run(args: argparse.Namespace) -> int:
    """Exports, checks and installs as `args` say; returns the exit status."""
    labels = read_labels(args.checkpoint)
    output = args.output_dir or args.checkpoint / "onnx"
    # All reviews before anything is built or an earlier file is replaced.
    column = {"text_column": args.text_column}
    calibration = parity.read_reviews(
        args.calibration_data, graph.NUM_CALIBRATION_REVIEWS, args.seed, "train", **column
    )
    reviews = parity.read_reviews(args.data, args.num_reviews, args.seed, leave_out=calibration, **column)
    print(f"exporting {', '.join(args.precision)} to {output} ...", flush=True)
    files = graph.build(args.checkpoint, args.precision, output, labels, calibration)
    results, broken = _check(args.checkpoint, files, reviews)
    manifest = describe(args.checkpoint, labels, results)
    (output / "export.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    installed = None
    if broken:
        remedy = ""
        if broken == ["int8"]:  # a model of few, small layers is rounded too much in 8 bits
            remedy = (
                f"; it can be served in fp32: make export CHECKPOINT={args.checkpoint} "
                'EXPORT_ARGS="--precision fp32 --install fp32"'
            )
        print(f"parity is BROKEN in {', '.join(broken)}: nothing was installed{remedy}", file=sys.stderr)
    elif not args.no_install:
        sources = {MODEL_FILE: files[args.install], TOKENIZER_FILE: args.checkpoint / "tokenizer.json"}
        install(sources, {**manifest, "precision": args.install}, args.repository)
        installed = args.install
        print(f"installed {installed} into {args.repository}: make serve")
    sizes = {precision: path.stat().st_size for precision, path in files.items()}
    print(json.dumps({"bytes": sizes, "parity_passed": not broken, "installed": installed}))
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.onnx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder, as training.train writes it")
    parser.add_argument("--output-dir", type=Path, help="where the ONNX files go (default: <checkpoint>/onnx)")
    parser.add_argument(
        "--precision", nargs="+", choices=graph.PRECISIONS, default=list(graph.PRECISIONS), help="which to export (all)"
    )
    parser.add_argument("--install", choices=graph.PRECISIONS, default="int8", help="which to install (%(default)s)")
    parser.add_argument("--no-install", action="store_true", help="leave the model repository alone")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="model repository (%(default)s)")
    parser.add_argument(
        "--calibration-data", help="int8's ranges from the training reviews here instead of generated ones"
    )
    parser.add_argument("--data", help="parity on reviews from here (file, folder, hub) instead of generated ones")
    parser.add_argument("--text-column", default="text", help="column of the reviews in both (%(default)s)")
    parser.add_argument("--num-reviews", type=positive, default=200, help="reviews in the parity gate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of those reviews and int8's calibration (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.no_install and args.install not in args.precision:
        parser.error(
            f"--install {args.install} is not among --precision {' '.join(args.precision)}; or give --no-install"
        )
    transformers_logging.set_verbosity_error()
    logging.getLogger("optimum").setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)  # the quantiser recommends a pre-processing that optimum's export is
    warnings.filterwarnings("ignore")  # tracer remarks on constants, which the parity gate settles
    try:
        return run(args)
    except (CheckpointError, parity.ReviewsError) as error:
        print(f"export.onnx: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
