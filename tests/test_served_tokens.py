"""The same tokens through both doors: the encoder that training imports, and the served tokenizer."""

import random
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from serving import Server
from tritonclient.utils import InferenceServerException

from model_repository.tokenizer.review_text import ReviewEncoder

BATCH = 64
PIECES = (
    ["film", "wonderful", "dull", "ending", "two hours", "don't", "naïve", "STRASSE", "I <3 it", "3/10", "..."],
    ["<br />", "<BR/>", "</i>", "<b class='x'>", "<", ">", "<br", "<sigh>", "&amp;"],
    [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u200b", "\ufeff"],
    ["\x00", "\x01", "\x1c", "\x7f", "\x85", "\u2028", "\ufffd", "\u202e"],
    ["é", "e\u0301", "ß", "İ", "中文", "한국", "😀", "👩‍👩‍👧", "𝔣𝔦𝔩𝔪", "ﬁ"],
)


def generate_texts(count: int, seed: int) -> list[str]:
    """Returns texts made of words, tags, blanks, control characters and any other character there is."""
    rng = random.Random(seed)

    def piece() -> str:
        if rng.random() < 0.2:
            code = rng.choice((rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))
            return chr(code)  # surrogates are left out: no UTF-8 can carry them
        return rng.choice(rng.choice(PIECES))

    return ["".join(piece() for _ in range(rng.choice((1, 2, 5, 20, 200)))) for _ in range(count)]


def served_rows(client: tritonclient.grpc.InferenceServerClient, reviews: list[str]) -> list[list[int]]:
    tensor = tritonclient.grpc.InferInput("text", [len(reviews), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([review.encode() for review in reviews], dtype=np.object_).reshape(-1, 1))
    result = client.infer("tokenizer", [tensor])
    input_ids, attention_mask = result.as_numpy("input_ids"), result.as_numpy("attention_mask")
    return [row[mask == 1].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]


def test_a_thousand_generated_texts_get_the_same_tokens(server: Server, tiny_checkpoint: Path) -> None:
    encoder = ReviewEncoder(tiny_checkpoint / "tokenizer.json")
    texts = generate_texts(1000, seed=11)
    expected = dict(zip(texts, encoder.encode(texts), strict=True))
    empty = [text for text, row in expected.items() if encoder.is_empty(row)]
    reviews = [text for text in expected if text not in set(empty)]
    assert len(reviews) > 800
    assert empty
    assert any(len(row) == encoder.max_length for row in expected.values())
    with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.ports['grpc']}") as client:
        for start in range(0, len(reviews), BATCH):
            batch = reviews[start : start + BATCH]
            assert served_rows(client, batch) == [expected[review] for review in batch]
        for text in empty:
            with pytest.raises(InferenceServerException, match="review is empty"):
                served_rows(client, [text])
