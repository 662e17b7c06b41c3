"""What a right answer is: a response that is well formed, and for some reviews the label that is known."""

import math
from collections.abc import Mapping, Sequence

from clients.prediction import Prediction

SUM_TOLERANCE = 1e-3
"""Probabilities may miss 1 by this: fp16 engines round each of them by up to 5e-4."""
SURE_SCORE = 0.9
"""A label is known for reviews that are answered with at least this score alone, at rest: company changes the score of
a dynamically quantised model a little, so that a review on the fence may tip without anything being wrong."""


class WrongAnswerError(ValueError):
    """The server answered, but not with what it should have; the message says what came."""


def check(predictions: Sequence[Prediction], labels: Sequence[str], known: Sequence[str | None]) -> None:
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
            raise WrongAnswerError(f"{prediction.label!r} came for a review known to be {expected!r}")


def _check_one(prediction: Prediction, labels: Sequence[str]) -> None:
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


def sure_labels(alone: Mapping[int, Prediction]) -> dict[int, str]:
    """Returns the labels that count as known, by index of the review, from answers given to each review alone."""
    return {index: prediction.label for index, prediction in alone.items() if prediction.score >= SURE_SCORE}
