"""The served model without a server: what model_repository/ ships, through the engine that the service runs it with.

B reviews, T tokens. Peers use it as their "same engine", the comparison as its ceiling. This file is the only one here
that knows which engine that is.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model_repository.classifier.engine import Engine
from model_repository.tokenizer.review_text import ReviewEncoder, pad

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
OUTPUTS = ("label", "score")

Infer = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], tuple[list[str], list[float]]]
"""input_ids and attention_mask (B, T) in; B labels and their probabilities out. One thread at a time may call it."""


def open_engine(num_threads: int) -> Infer:
    """Returns the shipped model.onnx, ready to run on `num_threads` threads."""
    engine = Engine(REPOSITORY / "classifier" / "1" / "model.onnx", num_threads)

    def infer(input_ids: npt.NDArray[np.int64], attention_mask: npt.NDArray[np.int64]) -> tuple[list[str], list[float]]:
        labels, scores = engine.run(OUTPUTS, {"input_ids": input_ids, "attention_mask": attention_mask})
        return [str(label) for label in labels[:, 0]], [float(score) for score in scores[:, 0]]

    return infer


def open_encoder() -> ReviewEncoder:
    """Returns the shipped tokenizer."""
    return ReviewEncoder(REPOSITORY / "tokenizer" / "1" / "tokenizer.json")


def infer_rows(infer: Infer, rows: Sequence[Sequence[int]]) -> tuple[list[str], list[float]]:
    """Returns labels and scores of `rows` of token ids, run as one rectangle."""
    return infer(*pad(rows))
