"""Review texts for load tests: generated ones by default, real ones on request.

    python -m benchmarks.texts                                     # token quantiles of the generated reviews
    python -m benchmarks.texts --data train.parquet                # ... and of real ones

Generated reviews follow the token counts of IMDb's training reviews (`LENGTH_QUANTILES` in
export/generated_reviews.py states the quantiles); short ones have at most 32 tokens. The server never sees the lengths
asked for, only those its tokenizer finds: this command measures them with the served tokenizer, untruncated.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.profiles import TextKind
from export.generated_reviews import LENGTH_QUANTILES, generate
from export.repository import REPOSITORY, TOKENIZER_FILE
from model_repository.tokenizer.review_text import clean

MAX_SHORT_TOKENS = 32
_SHORT_QUANTILES = ((0.0, 5), (1.0, 10))
"""Asked for, in tokens; whole sentences overshoot it, up to `MAX_SHORT_TOKENS`."""

DEFAULT_COUNT = 512
DEFAULT_SEED = 1
_READERS = (".parquet", ".csv")
STRATA = 16
"""Consecutive reviews that hold one of each sixteenth by length: what a slow system gets through in a window is then as
long, on average, as what a fast one does."""


@dataclass(frozen=True)
class TextSource:
    """Which reviews are sent: the same source gives the same ones."""

    data: Path | None = None
    """File of real reviews; None for generated ones."""
    reviews: int = DEFAULT_COUNT
    seed: int = DEFAULT_SEED


class TextError(ValueError):
    """The texts cannot be used; the message says what came and what was expected."""


def make(kind: TextKind, count: int = DEFAULT_COUNT, seed: int = DEFAULT_SEED, data: Path | None = None) -> list[str]:
    """Returns `count` reviews; the same arguments give the same reviews.

    Args:
        kind: `imdb` for IMDb's lengths, `short` for at most 32 tokens.
        count: how many.
        seed: of the generated reviews, or of the draw from `data`.
        data: parquet or CSV file with a column `text`, of which `imdb` draws reviews instead of generating them.

    Raises:
        TextError: `count` below 1, or `data` has no such column or too few reviews, or is another kind of file.
    """
    if count < 1:
        raise TextError(f"{count} reviews came, expected at least 1: raise --reviews")
    if kind == "short":
        return generate(count, seed, _SHORT_QUANTILES)
    if data is None:
        return generate(count, seed, evenly=True)
    return _draw(_read(data), count, seed, data)


def _read(path: Path) -> list[str]:
    import pandas  # takes a second, and only real reviews need it

    if path.suffix not in _READERS or not path.is_file():
        raise TextError(f"{path}: expected an existing .parquet or .csv file with a column `text`")
    try:
        if path.suffix == ".parquet":
            column = pandas.read_parquet(path, columns=["text"])["text"]
        else:
            column = pandas.read_csv(path, usecols=["text"])["text"]
    except (ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
        raise TextError(f"{path}: no column `text` could be read ({error}); rename the column of reviews") from error
    return [str(text) for text in column.dropna() if str(text).strip()]


def _draw(reviews: list[str], count: int, seed: int, path: Path) -> list[str]:
    if len(reviews) < count:
        raise TextError(f"{path}: {len(reviews)} reviews, expected at least {count}: lower --reviews")
    chosen = np.random.default_rng(seed).choice(len(reviews), size=count, replace=False)
    return [reviews[index] for index in chosen]


def mixed_order(lengths: Sequence[int], seed: int) -> list[int]:
    """Returns a shuffled order of the texts of `lengths` in which all of them come, and short and long ones evenly."""
    rng = np.random.default_rng(seed)
    strata = np.array_split(np.argsort(lengths, kind="stable"), STRATA)
    columns = [rng.permutation(stratum).tolist() for stratum in strata]
    order: list[int] = []
    for place in range(max(map(len, columns))):
        block = [column[place] for column in columns if place < len(column)]
        order.extend(rng.permutation(block).tolist())
    return order


def token_counts(reviews: Sequence[str], tokenizer_file: Path = REPOSITORY / TOKENIZER_FILE) -> list[int]:
    """Returns the tokens of each review, [CLS] and [SEP] included, nothing cut off."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [len(encoding.ids) for encoding in tokenizer.encode_batch_fast([clean(review) for review in reviews])]


def _quantile_table(lengths: Sequence[int]) -> str:
    lines = ["share  IMDb  these"]
    for share, tokens in LENGTH_QUANTILES:
        lines.append(f"{share:5.0%} {tokens:5d} {np.quantile(lengths, share):6.0f}")
    return "\n".join([*lines, f" mean   298 {np.mean(lengths):6.0f}"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose texts, the same ones for every command that has them."""
    parser.add_argument("--data", type=Path, help="parquet or CSV file of real reviews, column `text`, to draw from")
    parser.add_argument("--reviews", type=int, default=DEFAULT_COUNT, help="different reviews to send in turn")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="seed of texts, arrivals and known answers")


class ManPage(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a module's docstring and shows defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the token quantiles of a set of texts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.texts", description=__doc__, formatter_class=ManPage)
    add_arguments(parser)
    parser.add_argument("--kind", choices=["imdb", "short"], default="imdb", help="which texts")
    options = parser.parse_args(argv)
    try:
        reviews = make(options.kind, options.reviews, options.seed, options.data)
    except TextError as error:
        print(f"benchmarks.texts: error: {error}", file=sys.stderr)
        return 1
    print(_quantile_table(token_counts(reviews)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
