"""The served model without a server: what model_repository/ ships, through the engine that the service runs it with.

Peers use it as their "same engine", the comparison as its ceiling. This file is the only one here
that knows which engine that is.
"""

from collections.abc import Callable, Sequence

from export.repository import MODEL_FILE, REPOSITORY, TOKENIZER_FILE
from model_repository.classifier.engine import Engine
from model_repository.classifier.length_groups import width_of
from model_repository.tokenizer.review_text import ReviewEncoder, pad

OUTPUTS = ("label", "score")

Infer = Callable[[Sequence[Sequence[int]]], tuple[list[str], list[float]]]
"""Token ids of B reviews in, which run as one rectangle; their labels and probabilities out. One thread at a time may
call it."""


def open_engine(num_threads: int) -> Infer:
    """Returns the shipped model.onnx, ready to run on `num_threads` threads.

    Widths are those of the service: peers too would pay for many more new shapes without that.
    """
    engine = Engine(REPOSITORY / MODEL_FILE, num_threads)

    def infer(rows: Sequence[Sequence[int]]) -> tuple[list[str], list[float]]:
        input_ids, attention_mask = pad(rows, width_of(max(map(len, rows)), engine.max_tokens, engine.padding_step))
        labels, scores = engine.run(OUTPUTS, {"input_ids": input_ids, "attention_mask": attention_mask})
        return [str(label) for label in labels[:, 0]], [float(score) for score in scores[:, 0]]

    return infer


def open_encoder() -> ReviewEncoder:
    """Returns the shipped tokenizer."""
    return ReviewEncoder(REPOSITORY / TOKENIZER_FILE)
