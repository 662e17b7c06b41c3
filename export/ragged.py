"""Compares the ragged graph with the padded one in ONNX Runtime: same logits? how much less work?

    python -m export.ragged --checkpoint artefacts/reference
    python -m export.ragged --checkpoint artefacts/reference --num-batches 50 --onnx artefacts/ragged.onnx

Batches of 1 to 16 generated reviews of IMDb's lengths, mixed, run through both graphs in turn, in fp32 on the CPU. The
padded graph gets them padded to the next of a few fixed widths. Exit status 1 when a
logit differs by more than 1e-5. The last line on stdout is one JSON object.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from tqdm import tqdm

from export import graph, ragged_graph
from export.checkpoint_folder import CheckpointError, read_labels
from export.generated_reviews import generate
from model_repository.tokenizer.review_text import ReviewEncoder, fixed_widths, pad
from training.command_line import positive

Feed = dict[str, npt.NDArray[Any]]
MAX_BATCH = 16
MAX_DIFFERENCE = 1e-5
WIDTH_STEP = 64
"""Tokens between the fixed widths of the padded graph. The native configurations have one width since (CHANGELOG)."""


def padded_feed(rows: Sequence[list[int]], widths: Sequence[int]) -> Feed:
    """Returns the inputs of the padded graph for `rows`, as wide as the smallest of `widths` that holds all."""
    longest = max(len(row) for row in rows)
    input_ids, attention_mask = pad(rows, min(width for width in widths if width >= longest))
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def ragged_feed(rows: Sequence[list[int]]) -> Feed:
    """Returns the inputs of the ragged graph for `rows`: one flat row, and how long each review is."""
    input_ids = np.concatenate([np.array(row, dtype=np.int64) for row in rows])
    item_shape = np.array([[len(row)] for row in rows], dtype=np.int32)
    return {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids), "item_shape": item_shape}


def batches(rows: Sequence[list[int]], num_batches: int, seed: int) -> Iterator[list[list[int]]]:
    """Yields batches of 1 to `MAX_BATCH` of `rows`, drawn with replacement; every fourth review is cut short."""
    rng = np.random.default_rng(seed)
    for _ in range(num_batches):
        chosen = [rows[index] for index in rng.integers(len(rows), size=rng.integers(1, MAX_BATCH + 1))]
        yield [row if rng.random() < 0.75 else row[: rng.integers(2, len(row) + 1)] for row in chosen]


def session(model_file: Path, num_threads: int) -> onnxruntime.InferenceSession:
    """Opens `model_file` in ONNX Runtime on the CPU; `num_threads` 0 takes every core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    return onnxruntime.InferenceSession(str(model_file), options, providers=["CPUExecutionProvider"])


def compare(padded_file: Path, ragged_file: Path, rows: Sequence[list[int]], num_batches: int, seed: int) -> Feed:
    """Runs `num_batches` mixed batches of `rows` through both graphs in turn.

    Returns:
        By name, one number a batch: `difference` (largest of a logit), `real_tokens`, `padded_tokens`,
        `ragged_seconds`, `padded_seconds`.
    """
    padded, ragged = session(padded_file, 0), session(ragged_file, 0)
    widths = fixed_widths(WIDTH_STEP, max(len(row) for row in rows))
    found: dict[str, list[float]] = {}
    for batch in tqdm(batches(rows, num_batches, seed), total=num_batches, unit="batch", disable=None):
        feeds = padded_feed(batch, widths), ragged_feed(batch)
        start_s = time.perf_counter()
        (expected,) = padded.run(["logits"], feeds[0])
        middle_s = time.perf_counter()
        (logits,) = ragged.run(["logits"], feeds[1])
        end_s = time.perf_counter()
        numbers = {
            "difference": float(np.abs(logits - expected).max()),
            "real_tokens": feeds[1]["input_ids"].size,
            "padded_tokens": feeds[0]["input_ids"].size,
            "padded_seconds": middle_s - start_s,
            "ragged_seconds": end_s - middle_s,
        }
        for name, number in numbers.items():
            found.setdefault(name, []).append(number)
    return {name: np.array(numbers) for name, numbers in found.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.ragged", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="Hugging Face checkpoint folder")
    parser.add_argument("--onnx", type=Path, help="keep the ragged graph here; without it, it is thrown away")
    parser.add_argument("--num-batches", type=positive, default=1000, help="mixed batches (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of reviews and batches (%(default)s)")
    return parser


def _build_and_compare(args: argparse.Namespace) -> Feed:
    labels = read_labels(args.checkpoint)
    rows = ReviewEncoder(args.checkpoint / "tokenizer.json").encode(generate(256, args.seed))
    with tempfile.TemporaryDirectory(prefix="ragged-") as scratch:
        folder = Path(scratch)
        ragged_file = ragged_graph.build(args.checkpoint, args.onnx or folder / "ragged.onnx", labels)
        padded_file = graph.build(args.checkpoint, ["fp32"], folder, labels)["fp32"]
        return compare(padded_file, ragged_file, rows, args.num_batches, args.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        found = _build_and_compare(args)
    except CheckpointError as error:
        print(f"export.ragged: {error}", file=sys.stderr)
        return 2
    summary = {
        "batches": args.num_batches,
        "max_logit_difference": float(found["difference"].max()),
        "padded_tokens_per_real_token": float(found["padded_tokens"].sum() / found["real_tokens"].sum()),
        "ragged_time_over_padded": float(found["ragged_seconds"].sum() / found["padded_seconds"].sum()),
    }
    is_same = summary["max_logit_difference"] <= MAX_DIFFERENCE
    print(f"{args.num_batches} batches of 1 to {MAX_BATCH} reviews, {found['real_tokens'].sum():,.0f} tokens")
    verdict = "ok" if is_same else "BROKEN"
    print(f"  max |difference of logits|         {summary['max_logit_difference']:.1e} <= {MAX_DIFFERENCE:g} {verdict}")
    print(f"  padded tokens over real ones       {summary['padded_tokens_per_real_token']:.2f}")
    print(f"  time, ragged over padded           {summary['ragged_time_over_padded']:.2f}")
    print(json.dumps(summary))
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
