"""A checkpoint small enough to make in seconds, tokenizer included. Its answers mean nothing, but differ."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import DistilBertConfig, DistilBertForSequenceClassification, DistilBertTokenizerFast

MAX_LENGTH = 64
"""Tokens; the model has exactly as many positions, so a token too many is an error and not a silent difference."""

REVIEWS = (
    "A wonderful, warm film; the cast is superb and the ending moved me to tears.",
    "Dull, endless and badly acted. I want my two hours back.",
    "The plot creaks, but the camera loves every face it finds, and so did I!",
    "I laughed twice: at the poster, and when the lights came on again.",
    "Not great, not terrible - a quiet story told by people who know when to stop.",
)
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-<>/&éüß中文한😀"
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_checkpoint(folder: Path, num_layers: int = 2) -> Path:
    """Writes a random DistilBERT classifier with its tokenizer into `folder`; always the same one."""
    words = {word for review in REVIEWS for word in review.lower().replace(",", "").split() if word.isalpha()}
    tokens = [*_SPECIAL_TOKENS, *_CHARACTERS, *(f"##{character}" for character in _CHARACTERS), *sorted(words)]
    vocabulary = list(dict.fromkeys(tokens))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = DistilBertTokenizerFast(
        vocab_file=str(folder / "vocab.txt"), model_max_length=MAX_LENGTH, truncation_side="left"
    )
    tokenizer.save_pretrained(folder)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.enable_truncation(MAX_LENGTH, direction="left")
    fast.save(str(folder / "tokenizer.json"))
    torch.manual_seed(7)
    config = DistilBertConfig(
        vocab_size=len(vocabulary),
        dim=32,
        n_layers=num_layers,
        n_heads=2,
        hidden_dim=64,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.3,  # wide, so that the answers to different reviews are far apart
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    model = DistilBertForSequenceClassification(config).eval()
    rows = [torch.tensor([encoding.ids]) for encoding in fast.encode_batch(list(REVIEWS))]
    with torch.no_grad():  # centred, so that both labels occur
        model.classifier.bias -= torch.cat([model(input_ids=row).logits for row in rows]).mean(dim=0)
    model.save_pretrained(folder)
    return folder
