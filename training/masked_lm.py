"""Masked language modelling of reviews: which tokens are hidden, and a loss computed where they are.

Shapes: B reviews, T tokens, H hidden units, M masked tokens of the batch, V tokens in the vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForLanguageModeling, DistilBertForMaskedLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import MaskedLMOutput

from model_repository.tokenizer.review_text import pad

NOT_MASKED = -100
"""Label of a token that is not to be predicted: what PyTorch's cross-entropy ignores."""


class MaskedPositionsLM(DistilBertForMaskedLM):
    """A DistilBertForMaskedLM that computes the vocabulary's logits where a token is masked, and nowhere else.

    The loss is the same; but V is 30,522, and B x T x V logits would cost several times what the small encoder does.
    """

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> MaskedLMOutput:
        """Returns the mean loss of the masked tokens, 0 where none is.

        Args:
            input_ids: (B, T) int64, masked.
            attention_mask: (B, T) int64, 0 for padding.
            labels: (B, T) int64, the token that was masked, or `NOT_MASKED`.
        """
        masked = labels != NOT_MASKED  # (B, T)
        hidden = self.distilbert(input_ids=input_ids, attention_mask=attention_mask)[0][masked]  # (M, H)
        logits = self.vocab_projector(self.vocab_layer_norm(self.activation(self.vocab_transform(hidden))))  # (M, V)
        # Not reduction="mean", which is not a number for a batch in which chance masks no token.
        loss: Any = cross_entropy(logits.float(), labels[masked], reduction="sum") / masked.sum().clamp(min=1)
        return MaskedLMOutput(loss=loss)


def plain(model: MaskedPositionsLM) -> DistilBertForMaskedLM:
    """Returns transformers' own class with the same weights: what is saved names a class that everybody has."""
    copy = DistilBertForMaskedLM(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


class _Vocabulary:
    """What the rule asks of a tokenizer, at hand: a fast tokenizer counts its tokens anew each time, 20 ms a batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.mask_token = tokenizer.mask_token
        self._mask_id = tokenizer.mask_token_id
        self._size = len(tokenizer)

    def __len__(self) -> int:
        return self._size

    def convert_tokens_to_ids(self, token: str) -> int:
        if token != self.mask_token:
            raise KeyError(token)
        return int(self._mask_id)


class Masker:
    """Makes batches of token rows: padded, and masked anew each time, so that every epoch hides other tokens.

    The rule is BERT's (transformers' DataCollatorForLanguageModeling): of the chosen tokens 80 % become [MASK], 10 % a
    random token, 10 % stay. Special tokens are never chosen. Without a seed it draws from torch's global one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, masked_fraction: float, seed: int | None = None) -> None:
        vocabulary: Any = _Vocabulary(tokenizer)
        self._rule = DataCollatorForLanguageModeling(vocabulary, mlm_probability=masked_fraction)
        if seed is not None:
            self._rule.generator = torch.Generator().manual_seed(seed)
        self._special_ids = torch.tensor(tokenizer.all_special_ids)

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns input_ids, attention_mask and labels (B, T), int64; rows that bring labels keep their own masks."""
        input_ids, attention_mask = map(torch.from_numpy, pad([row["input_ids"] for row in features]))
        if "labels" in features[0]:
            labels = torch.from_numpy(pad([row["labels"] for row in features])[0])
            labels = labels.masked_fill(attention_mask == 0, NOT_MASKED)
        else:
            # Told which tokens are special, the rule need not look each one up in Python.
            special = torch.isin(input_ids, self._special_ids)
            input_ids, labels = self._rule.torch_mask_tokens(input_ids, special_tokens_mask=special)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def mask_once(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """Returns `rows` of token ids as features masked for good, so that losses at different times compare."""
        batch = self([{"input_ids": row} for row in rows])
        return [
            {name: batch[name][index, : len(row)].numpy() for name in ("input_ids", "labels")}
            for index, row in enumerate(rows)
        ]
