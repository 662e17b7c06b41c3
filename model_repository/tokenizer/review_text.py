"""Review text to tokens: the one file that training and the served tokenizer both import.

Shapes: B reviews, T tokens. Nothing here needs torch or transformers, so the server image stays small.

The steps are: `decode` (bytes from a client), `clean` (HTML tags out), `ReviewEncoder` (WordPiece, truncated).
Truncation is a fact of the model and lives in its `tokenizer.json`, direction included; padding is a decision
of the caller, so `encode` returns rows of their own length and `pad` makes a rectangle of them.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

MAX_REVIEW_BYTES = 256 << 10
"""Largest review accepted, in UTF-8 bytes. The longest of IMDb's 100,000 reviews has about 14,000. This much of letters
without a space costs the tokenizer 0.2 s of one core, of 99-letter words between full stops, the worst known, 0.7 s;
and everybody else waits for it meanwhile."""

# `<br />` makes up all but some 20 of the 101,890 tags in IMDb's training split; the others are <i>, <em>, <hr>.
# Named tags only: "<sigh>" or "I <3 it" are the reviewer's own words and stay.
_HTML_TAG = re.compile(
    r"</?(?:a|b|big|blockquote|br|center|cite|code|dd|div|dl|dt|em|font|h[1-6]|hr|i|img|li|ol|p|pre|q|s|small|span"
    r"|strike|strong|sub|sup|table|tbody|td|th|tr|tt|u|ul)(?:\s[^>]*)?/?>",
    re.IGNORECASE,
)


# What BERT's normaliser makes a space of; what it deletes (\x0b, \x85) joins two words instead.
_OTHER_SPACES = "\t\n\r\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG_CHARACTERS = 1 << 14
"""Beyond any of IMDb's reviews. From there on spaces of all kinds are looked for, which would cost others a third."""
_NOT_ONE_SPACE = re.compile(f"[{_OTHER_SPACES}][ {_OTHER_SPACES}]*| [ {_OTHER_SPACES}]+")


class ReviewError(ValueError):
    """A review that cannot be classified; the message says what came and what was expected."""


def decode(raw: bytes) -> str:
    """Returns the review in `raw` (UTF-8).

    Raises:
        ReviewError: more than `MAX_REVIEW_BYTES`, or not UTF-8 (an encoded lone surrogate is not UTF-8 either).
    """
    if len(raw) > MAX_REVIEW_BYTES:
        raise ReviewError(f"review has {len(raw):,} bytes; at most {MAX_REVIEW_BYTES:,} are accepted")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ReviewError(
            f"review is not valid UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; send UTF-8 text"
        ) from error


def clean(review: str) -> str:
    """Returns `review` with each HTML tag replaced by a space."""
    end = review.rfind(">") + 1  # behind it every "<a " would be looked at up to the end: quadratic in their number
    return _HTML_TAG.sub(" ", review[:end]) + review[end:]


class ReviewEncoder:
    """WordPiece encoder of whole reviews, read from a `tokenizer.json` that carries its truncation.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file sets no truncation, so the model's maximum length is unknown.
    """

    def __init__(self, tokenizer_file: str | Path) -> None:
        if not Path(tokenizer_file).is_file():  # of which the library tells neither the kind nor the name
            raise FileNotFoundError(f"{tokenizer_file}: no such file; training.train saves it with the checkpoint")
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        truncation = self._tokenizer.truncation
        if truncation is None:
            raise ValueError(
                f"{tokenizer_file} sets no truncation, expected max_length and direction: save the tokenizer through "
                "training.train, or call enable_truncation(max_length=...) before saving it"
            )
        self.max_length: int = truncation["max_length"]
        self._num_special_tokens: int = self._tokenizer.num_special_tokens_to_add(False)
        self._keeps_end = truncation["direction"] == "left"
        bert = (self._tokenizer.normalizer, BertNormalizer), (self._tokenizer.pre_tokenizer, BertPreTokenizer)
        self._spaces_end_words = all(isinstance(part, kind) for part, kind in bert)
        self._tokenizer.no_padding()

    def encode(self, reviews: Sequence[str]) -> list[list[int]]:
        """Returns B rows of input ids, [CLS] ... [SEP], each 2 to `max_length` tokens long, in one batched call."""
        texts = [clean(review) for review in reviews]
        parts = [self._part_in_window(text) for text in texts]
        rows = self._encode(parts)
        # A part that leaves room in the window has words without any token: then what was cut off counts too.
        for index, (row, part, text) in enumerate(zip(rows, parts, texts, strict=True)):
            if len(row) < self.max_length and len(part) < len(text):
                rows[index] = self._encode([text])[0]
        return rows

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]

    def _part_in_window(self, text: str) -> str:
        """Returns as many words of `text`, from the end that truncation keeps, as the window has tokens at most.

        A word is what stands between two spaces, and has one token at least unless it is control characters alone.
        BERT's normaliser and splitter never look across spaces, however many, so the part's tokens are the whole's.
        """
        if not self._spaces_end_words:
            return text
        if len(text) > _LONG_CHARACTERS:
            text = _NOT_ONE_SPACE.sub(" ", text)
        if text.count(" ") < self.max_length:
            return text
        if self._keeps_end:
            return " ".join(text.rsplit(" ", self.max_length)[1:])
        return " ".join(text.split(" ", self.max_length)[:-1])

    def is_empty(self, row: Sequence[int]) -> bool:
        """Says whether an encoded row holds special tokens only: an empty, blank or control-character review."""
        return len(row) <= self._num_special_tokens


def fixed_widths(multiple: int, max_length: int) -> list[int]:
    """Returns the widths that rows are padded to where widths must be few: multiples below `max_length`, and it."""
    return [*range(multiple, max_length, multiple), max_length]


def pad(rows: Sequence[Sequence[int]], width: int | None = None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns input_ids and attention_mask (B, T), int64; padding id 0 is BERT's [PAD].

    T is `width`, which no row may exceed, or the longest row's length.
    """
    lengths = [len(row) for row in rows]
    input_ids = np.zeros((len(rows), width or max(lengths)), dtype=np.int64)  # (B, T)
    attention_mask = np.zeros_like(input_ids)  # (B, T)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        input_ids[index, :length] = row
        attention_mask[index, :length] = 1
    return input_ids, attention_mask
