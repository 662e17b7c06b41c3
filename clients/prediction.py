"""The answer to one review."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """What the server says about one review.

    Attributes:
        label: the more probable label, as the model names it (`negative` or `positive`).
        score: probability of `label`, 0 to 1.
        probabilities: probability of each label, negative first; they add up to 1.
    """

    label: str
    score: float
    probabilities: tuple[float, ...]
