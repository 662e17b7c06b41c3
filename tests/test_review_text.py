"""Review text: decoding, cleaning and encoding, the part that training and the server share."""

import time
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

from model_repository.tokenizer import review_text
from model_repository.tokenizer.review_text import MAX_REVIEW_BYTES, ReviewEncoder, ReviewError, clean, decode, pad

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "good", "bad", "film", "##s", "!", "<", ">", "/"]
WHOLE_TAGS = st.sampled_from(["<br />", "<BR>", "</i>", "<a href='x'>", '<h2 class="a b">', "<hr/>"])


def write_tokenizer(path: Path, max_length: int | None, direction: str = "left") -> Path:
    tokenizer = Tokenizer(WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    if max_length is not None:
        tokenizer.enable_truncation(max_length, direction=direction)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ReviewEncoder:
    return ReviewEncoder(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", max_length=8))


@pytest.mark.parametrize(
    ("review", "expected"),
    [
        pytest.param("fine.<br /><br />Really", "fine.  Really", id="line breaks"),
        pytest.param("an <i>odd</i> <B>one</B>", "an  odd   one ", id="inline tags in either case"),
        pytest.param('<a href="x > y">z', '  y">z', id="attribute up to the first >"),
        pytest.param("I <3 it, 2 < 3 and 4 > 3", "I <3 it, 2 < 3 and 4 > 3", id="no tags"),
        pytest.param("<sigh> what a film", "<sigh> what a film", id="the reviewer's own aside"),
        pytest.param("<br", "<br", id="unclosed"),
        pytest.param("", "", id="empty"),
    ],
)
def test_clean_removes_tags_only(review: str, expected: str) -> None:
    assert clean(review) == expected


@given(st.lists(st.tuples(WHOLE_TAGS, st.text(st.characters(exclude_characters="<>"), max_size=5))))
def test_clean_puts_a_space_for_each_tag_and_keeps_the_rest(parts: list[tuple[str, str]]) -> None:
    assert clean("".join(tag + text for tag, text in parts)) == "".join(" " + text for _, text in parts)


def test_cleaning_takes_time_by_length_whatever_the_text() -> None:
    """A hundred times the time of a harmless text of the same length is allowed; it was ten thousand times."""
    times_s = []
    for text in ("a film" * 10_000, "<a b " * 12_000):
        start_s = time.perf_counter()
        clean(text)
        times_s.append(time.perf_counter() - start_s)
    assert times_s[1] < 100 * max(times_s[0], 1e-4)


@given(st.text(alphabet=st.characters(exclude_characters="<")))
def test_clean_leaves_text_without_tags_alone(review: str) -> None:
    assert clean(review) == review


@given(st.text())
def test_decode_gives_back_what_was_encoded(review: str) -> None:
    assert decode(review.encode()) == review


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        pytest.param(b"abc\xff", "byte 0xff at offset 3", id="stray byte"),
        pytest.param("\ud800".encode("utf-8", "surrogatepass"), "byte 0xed at offset 0", id="lone surrogate"),
        pytest.param("é".encode()[:1], "not valid UTF-8", id="cut character"),
        pytest.param(b"a" * (MAX_REVIEW_BYTES + 1), "262,145 bytes; at most 262,144", id="too long"),
    ],
)
def test_decode_refuses_what_is_no_review(raw: bytes, message: str) -> None:
    with pytest.raises(ReviewError, match=message):
        decode(raw)


def test_longest_review_allowed_is_decoded() -> None:
    assert len(decode(b"a" * MAX_REVIEW_BYTES)) == MAX_REVIEW_BYTES


@pytest.mark.parametrize("review", ["", "   ", "\n\t", "\x00\x01\x7f", "<br /><br />", "\u200b\ufeff"])
def test_review_without_content_is_empty(encoder: ReviewEncoder, review: str) -> None:
    (row,) = encoder.encode([review])
    assert row == [2, 3]  # [CLS] [SEP]
    assert encoder.is_empty(row)


def test_control_characters_are_dropped(encoder: ReviewEncoder) -> None:
    assert encoder.encode(["go\x00od\x07 film"]) == encoder.encode(["good film"])
    assert not encoder.is_empty(encoder.encode(["good"])[0])


@pytest.mark.parametrize(("direction", "kept"), [("left", "c b a b c good"), ("right", "a a a a b c")])
def test_truncation_side_is_the_files(tmp_path: Path, direction: str, kept: str) -> None:
    encoder = ReviewEncoder(write_tokenizer(tmp_path / "tokenizer.json", 8, direction))
    (row,) = encoder.encode(["a a a a b c b a b c good"])
    assert [WORDS[index] for index in row] == ["[CLS]", *kept.split(), "[SEP]"]
    assert encoder.max_length == len(row) == 8


@pytest.fixture(scope="module", params=["left", "right"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ReviewEncoder, Tokenizer]:
    """The encoder and the library's tokenizer, which reads every text to its end."""
    file = write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", 8, request.param)
    return ReviewEncoder(file), Tokenizer.from_file(str(file))


@given(st.text(st.sampled_from(" \t\n\r\x00\x1c\x85\xa0\u2028\u3000ab!\u0301\u4e2d[SEP]<br>"), max_size=60))
def test_leaving_out_what_truncation_drops_changes_no_token(both: tuple[ReviewEncoder, Tokenizer], review: str) -> None:
    encoder, tokenizer = both
    with mock.patch.object(review_text, "_LONG_CHARACTERS", 0):  # as a review of many thousands of characters
        assert encoder.encode([review]) == [tokenizer.encode(clean(review)).ids]
    assert encoder.encode([review]) == [tokenizer.encode(clean(review)).ids]


@pytest.mark.parametrize("text", ["a good film ", "a\tgood\r\nfilm\n", "a\u00a0good\u3000film\u2028"])
def test_only_the_part_that_fits_the_window_is_tokenized(
    both: tuple[ReviewEncoder, Tokenizer], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    encoder, seen = both[0], []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda texts: seen.extend(texts) or encode(texts))
    assert len(encoder.encode([text * 10_000])[0]) == encoder.max_length
    assert len(" ".join(seen)) < 100


def test_file_without_truncation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sets no truncation"):
        ReviewEncoder(write_tokenizer(tmp_path / "tokenizer.json", max_length=None))


@given(reviews=st.lists(st.text(), min_size=1, max_size=8))
def test_neighbours_do_not_change_a_reviews_tokens(encoder: ReviewEncoder, reviews: list[str]) -> None:
    together = encoder.encode(reviews)
    assert together == [encoder.encode([review])[0] for review in reviews]
    assert all(2 <= len(row) <= encoder.max_length for row in together)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=6))
def test_pad_keeps_every_row_under_its_mask(rows: list[list[int]]) -> None:
    input_ids, attention_mask = pad(rows)
    assert input_ids.shape == attention_mask.shape == (len(rows), max(map(len, rows)))
    for row, ids, mask in zip(rows, input_ids, attention_mask, strict=True):
        assert ids[mask == 1].tolist() == row
        assert mask.tolist() == [1] * len(row) + [0] * (len(ids) - len(row))
        assert not ids[mask == 0].any()
