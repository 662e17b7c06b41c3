"""Seeded reviews of realistic length for checks that must run without IMDb: own sentences, IMDb's token counts.

The lengths follow the quantiles of WordPiece token counts measured on IMDb's 25,000 training reviews, HTML tags
removed, [CLS] and [SEP] included (mean 297.6). The sentences are this project's own.
"""

from collections.abc import Sequence

import numpy as np

LENGTH_QUANTILES = (
    (0.0, 12), (0.01, 55), (0.05, 83), (0.10, 117), (0.25, 161), (0.50, 222), (0.75, 361), (0.90, 584), (0.95, 763),
    (0.99, 1145), (1.0, 3047),
)  # fmt: skip
"""(share of the reviews, tokens): lengths between two quantiles are drawn evenly."""

_SUBJECTS = (
    "the plot",
    "the acting",
    "every scene",
    "the ending",
    "the music",
    "the lead",
    "this film",
    "the dialogue",
)
_VERBS = ("felt", "seemed", "was", "turned out", "remained", "became")
_GOOD = ("wonderful", "moving", "brilliant", "charming", "gripping", "superb", "warm", "funny", "a small masterpiece")
_BAD = ("dreadful", "boring", "clumsy", "tedious", "lifeless", "stupid", "painful", "flat", "a complete waste of time")
_NEUTRAL = ("long", "loud", "familiar", "slow at first", "what I expected", "set in Vienna", "about two brothers")
_TAILS = (
    "from the first minute to the last", "although my friends disagreed", "and I have seen it twice", "for 90 minutes",
    "when the train finally arrives", "in my opinion", "as in the book", "which nobody had told me", "to be honest",
)  # fmt: skip


def _sentence(rng: np.random.Generator, mood: tuple[str, ...]) -> str:
    words = mood if rng.random() < 0.6 else _NEUTRAL
    parts = [rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(words)]
    if rng.random() < 0.7:
        parts.append(rng.choice(_TAILS))
    return " ".join(parts).capitalize() + rng.choice([".", "!", ".<br /><br />"], p=[0.8, 0.1, 0.1])


def generate(
    num_reviews: int, seed: int, quantiles: Sequence[tuple[float, int]] = LENGTH_QUANTILES, *, evenly: bool = False
) -> list[str]:
    """Returns `num_reviews` reviews, positive, negative and mixed in turn; the same seed gives the same reviews.

    `quantiles` are pairs of (share of the reviews, tokens), as in `LENGTH_QUANTILES`; a review ends with the sentence
    that reaches its length. `evenly` draws one from each slice of the distribution, so that few reviews follow it too.
    """
    rng = np.random.default_rng(seed)
    shares, tokens = zip(*quantiles, strict=True)
    drawn = rng.random(num_reviews)
    if evenly:
        drawn = (rng.permutation(num_reviews) + drawn) / num_reviews
    reviews = []
    for index, length in enumerate(np.interp(drawn, shares, tokens)):
        mood = (_GOOD, _BAD, _GOOD + _BAD)[index % 3]
        sentences: list[str] = []
        num_words = 0
        while not sentences or num_words < length / 1.2:  # 1.2 tokens a word, full stops and tags counted
            sentences.append(_sentence(rng, mood))
            num_words += len(sentences[-1].split())
        reviews.append(" ".join(sentences))
    return reviews
