"""The checkpoint's tokenizer: the base's own, or one made from the reviews, saved with its truncation inside."""

import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from transformers import DistilBertTokenizerFast

from model_repository.tokenizer.review_text import ReviewEncoder, clean
from training.config import BaseWeights, Tokens
from training.weights import load_tokenizer

_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _vocabulary(reviews: Iterable[str]) -> list[str]:
    words = {word for review in reviews for word in re.findall(r"\w+|[^\w\s]", clean(review).lower())}
    characters = {character for word in words for character in word}
    return [*_SPECIAL_TOKENS, *sorted(words | characters), *sorted(f"##{character}" for character in characters)]


def build(base: BaseWeights, tokens: Tokens, reviews: Iterable[str], folder: Path) -> DistilBertTokenizerFast:
    """Returns the run's tokenizer; for `random` base weights its vocabulary is every word of `reviews`."""
    if base.source == "random":
        vocabulary = folder / "vocab.txt"
        vocabulary.write_text("\n".join(_vocabulary(reviews)) + "\n", encoding="utf-8")
        return DistilBertTokenizerFast(
            vocab_file=str(vocabulary), model_max_length=tokens.max_length, truncation_side=tokens.truncation_side
        )
    backend = load_tokenizer(base).backend_tokenizer
    # DistilBERT's class, whatever the base's: BERT's would hand out token_type_ids, which DistilBERT refuses.
    return DistilBertTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokens.max_length,
        truncation_side=tokens.truncation_side,
        **_normalisation(backend),
    )


def _normalisation(backend: Tokenizer) -> dict[str, bool | None]:
    """Returns the base's own: without them the class makes every base lower case."""
    normalizer = backend.normalizer
    if not isinstance(normalizer, BertNormalizer):
        return {}
    return {
        "do_lower_case": normalizer.lowercase,
        "strip_accents": normalizer.strip_accents,
        "tokenize_chinese_chars": normalizer.handle_chinese_chars,
    }


def save(tokenizer: DistilBertTokenizerFast, folder: Path, tokens: Tokens) -> ReviewEncoder:
    """Writes the tokenizer's files into `folder` and returns the encoder that training and the server share."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    fast = Tokenizer.from_file(str(path))
    fast.no_padding()
    fast.enable_truncation(max_length=tokens.max_length, direction=tokens.truncation_side)
    fast.save(str(path))
    return ReviewEncoder(path)
