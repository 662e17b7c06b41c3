"""The served model without a server: what model_repository/ ships, through the engine that the service runs it with.

B reviews, T tokens. Peers use it as their "same engine", the comparison as its ceiling. This file is the only one here
that knows which engine that is.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from model_repository.tokenizer.review_text import ReviewEncoder, pad

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
CLASSIFIER_CONFIG = REPOSITORY / "classifier" / "config.pbtxt"
OUTPUTS = ("label", "score")

Infer = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], tuple[list[str], list[float]]]
"""input_ids and attention_mask (B, T) in; B labels and their probabilities out. One thread at a time may call it."""


def open_engine(num_threads: int) -> Infer:
    """Returns the shipped model.onnx, ready to run on `num_threads` threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(REPOSITORY / "classifier" / "1" / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )

    def infer(
        input_ids: npt.NDArray[np.int64], attention_mask: npt.NDArray[np.int64]
    ) -> tuple[list[str], list[float]]:
        labels, scores = session.run(OUTPUTS, {"input_ids": input_ids, "attention_mask": attention_mask})
        return [str(label) for label in labels[:, 0]], [float(score) for score in scores[:, 0]]

    return infer


def open_encoder() -> ReviewEncoder:
    """Returns the shipped tokenizer."""
    return ReviewEncoder(REPOSITORY / "tokenizer" / "1" / "tokenizer.json")


def infer_rows(infer: Infer, rows: Sequence[Sequence[int]]) -> tuple[list[str], list[float]]:
    """Returns labels and scores of `rows` of token ids, run as one rectangle."""
    return infer(*pad(rows))


def served_layout(config_file: Path = CLASSIFIER_CONFIG) -> tuple[int, int]:
    """Returns (instances, threads of each) that the service is configured with.

    Raises:
        ValueError: the configuration does not say.
    """
    text = config_file.read_text(encoding="utf-8")
    count = re.search(r"^\s*count: (\d+)", text, re.MULTILINE)
    threads = re.search(r'key: "(?:intra_op_)?num_threads"\s*value: \{ string_value: "(\d+)"', text)
    if not count or not threads:
        raise ValueError(f"{config_file}: expected `count: N` and a parameter num_threads")
    return int(count[1]), int(threads[1])
