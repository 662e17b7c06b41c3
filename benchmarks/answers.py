"""What a right answer is: a response that is well formed, and for some reviews the label that is known.

Known labels are those of this checkout's model, run here without the server: so a server that swaps answers or labels,
or that serves another model, is found out.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.peers import shipped_engine
from export.repository import MODEL_FILE, REPOSITORY, manifest_path

if TYPE_CHECKING:  # the package imports every client, and the comparison imports this file where engines are timed
    from clients.prediction import Prediction

SUM_TOLERANCE = 1e-3
"""Probabilities may miss 1 by this: fp16 engines round each of them by up to 5e-4."""
SURE_SCORE = 0.9
"""A label is known for reviews that get at least this score alone: company in a batch, or another precision, changes a
score a little, so that a review on the fence may tip without anything being wrong."""
KNOWN_SHARE = 0.25
"""Share of the texts that are run here to know their labels."""


class WrongAnswerError(ValueError):
    """The server answered, but not with what it should have; the message says what came."""


def check(predictions: "Sequence[Prediction]", labels: Sequence[str], known: Sequence[str | None]) -> None:
    """Checks the answer to one request.

    Args:
        predictions: what came.
        labels: the model's labels in the order of the probabilities.
        known: for each review sent its right label, or None where nothing is known.

    Raises:
        WrongAnswerError: another number of predictions, an unknown label, probabilities that are none or do not belong
            to the label and its score, or another label than the known one.
    """
    if len(predictions) != len(known):
        raise WrongAnswerError(f"{len(predictions)} predictions came for {len(known)} reviews")
    for prediction, expected in zip(predictions, known, strict=True):
        _check_one(prediction, labels)
        if expected is not None and prediction.label != expected:
            raise WrongAnswerError(
                f"{prediction.label!r} came, expected {expected!r} as the model of this checkout says: does the server "
                "serve that model?"
            )


def _check_one(prediction: "Prediction", labels: Sequence[str]) -> None:
    probabilities = prediction.probabilities
    if prediction.label not in labels:
        raise WrongAnswerError(f"label {prediction.label!r} came, expected one of {list(labels)}")
    if len(probabilities) != len(labels) or not all(0 <= value <= 1 for value in probabilities):
        raise WrongAnswerError(f"probabilities {probabilities} came, expected {len(labels)} from 0 to 1")
    if not math.isclose(sum(probabilities), 1, abs_tol=SUM_TOLERANCE):
        raise WrongAnswerError(f"probabilities {probabilities} add up to {sum(probabilities)}, expected 1")
    own = probabilities[list(labels).index(prediction.label)]
    if not math.isclose(own, prediction.score, abs_tol=SUM_TOLERANCE) or own < max(probabilities):
        raise WrongAnswerError(f"{prediction} came: score or label do not belong to the probabilities")


def model_labels() -> list[str]:
    """Returns the labels of this checkout's model, in the order of its probabilities.

    Raises:
        FileNotFoundError: this checkout has no model.
    """
    labels: list[str] = json.loads(_existing(manifest_path(REPOSITORY)).read_text(encoding="utf-8"))["labels"]
    return labels


def known_labels(reviews: Sequence[str], seed: int) -> dict[str, str]:
    """Returns the sure labels among a share of `reviews`, drawn with `seed`: each review alone, through this checkout's
    model, in this process. It takes some 20 to 100 ms a review.

    Raises:
        FileNotFoundError: this checkout has no model.
    """
    _existing(REPOSITORY / MODEL_FILE)
    num_known = max(1, round(KNOWN_SHARE * len(reviews)))
    drawn = [reviews[index] for index in np.random.default_rng(seed).choice(len(reviews), num_known, replace=False)]
    infer = shipped_engine.open_engine(len(os.sched_getaffinity(0)))  # 0 would be every core, whatever taskset allows
    known = {}
    for review, row in zip(drawn, shipped_engine.open_encoder().encode(drawn), strict=True):
        (label,), (score,) = infer([row])
        if score >= SURE_SCORE:
            known[review] = label
    return known


def _existing(file: Path) -> Path:
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file, and known answers come from it: `make export` makes it")
    return file


def write_known(path: Path, known: Mapping[str, str]) -> None:
    """Writes labels by review."""
    path.write_text(json.dumps(dict(known)), encoding="utf-8")


def read_known(path: Path) -> dict[str, str]:
    """Returns what `write_known` wrote."""
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return known
