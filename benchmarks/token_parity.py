"""Are the served tokenizer's ids those of the checkpoint's Hugging Face tokenizer? Every text of a folder is compared.

    python -m benchmarks.token_parity --checkpoint artefacts/reference --data FOLDER      # its *.parquet, column `text`

Exit status 1 and the first difference where one is found. The last line on stdout is one JSON object. It needs the
environment of `make test`, for transformers.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import pandas
from tqdm import tqdm

from benchmarks.texts import ManPage
from export.repository import REPOSITORY, TOKENIZER_FILE
from model_repository.tokenizer.review_text import ReviewEncoder, clean

BATCH = 256


def differences(reviews: Sequence[str], served: ReviewEncoder, checkpoint: Path) -> Iterator[tuple[int, str]]:
    """Yields the index of each review whose ids differ, and what differs; reviews are cleaned for both alike."""
    from transformers import DistilBertTokenizerFast  # takes seconds

    reference = DistilBertTokenizerFast.from_pretrained(checkpoint)
    for start in tqdm(range(0, len(reviews), BATCH), desc="tokens", unit="batch", disable=None):
        batch = list(reviews[start : start + BATCH])
        expected = reference([clean(review) for review in batch], truncation=True, max_length=served.max_length)
        for index, (ours, theirs) in enumerate(zip(served.encode(batch), expected["input_ids"], strict=True)):
            if ours != theirs:
                yield start + index, first_difference(ours, theirs)


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Returns where two unequal lists of ids differ first, and the ids there; past the end of a list it is `none`."""
    pairs = enumerate(zip_longest(ours, theirs, fillvalue="none"))
    position, (served, expected) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
    counts = f"{len(ours)} ids served, {len(theirs)} expected"
    return f"id {served} served, {expected} expected at position {position} ({counts})"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.token_parity", description=__doc__, formatter_class=ManPage
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("artefacts/reference"), help="whose tokenizer to trust")
    parser.add_argument("--data", type=Path, required=True, help="folder of *.parquet files with a column `text`")
    options = parser.parse_args(argv)
    files = sorted(options.data.glob("*.parquet"))
    if not files:
        parser.error(f"{options.data} holds no *.parquet file")
    served = ReviewEncoder(REPOSITORY / TOKENIZER_FILE)
    compared, different = {}, 0
    for file in files:
        reviews = [str(text) for text in pandas.read_parquet(file, columns=["text"])["text"]]
        found = list(differences(reviews, served, options.checkpoint))
        compared[file.stem] = len(reviews)
        different += len(found)
        for index, what in found[:1]:
            print(f"{file.name}, row {index}: {what}", file=sys.stderr)
    print(json.dumps({"compared": compared, "different": different}))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
