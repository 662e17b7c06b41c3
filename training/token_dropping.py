"""DistilBERT that drops tokens on its way: what few tokens attend to is not computed in the layers after.

After a layer's attention a review goes on with [CLS] and the tokens that received most attention in it, summed over
heads and queries, as in PoWER-BERT (Goyal et al. 2020, "PoWER-BERT: Accelerating BERT Inference via Progressive
Word-vector Elimination"). How many is a share of all the review's own tokens, so that an answer does not depend on the
padding beside it, but not fewer than a minimum: a short text has little time to gain, and each of its words counts. The
choice itself is not learnt; the layers learn to live with it when they are trained so.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DistilBertConfig, DistilBertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.distilbert.modeling_distilbert import MultiHeadSelfAttention

_Count = TypeVar("_Count", int, torch.Tensor)


def kept_percent(config: DistilBertConfig) -> list[int]:
    """Returns what share of all a review's tokens is kept after the attention of layer 1, 2 and so on, in percent.

    Layers that are not named keep what reaches them, so none: all tokens, everywhere.

    Raises:
        ValueError: shares that no model can have, or for layers that this one has not.
    """
    percent = list(getattr(config, "kept_percent", None) or [])
    if not all(isinstance(p, int) and 0 < p <= 100 for p in percent) or percent != sorted(percent, reverse=True):
        raise ValueError(f"kept_percent is {percent}, expected whole numbers of 1 to 100 that do not rise")
    if len(percent) >= config.n_layers:
        raise ValueError(
            f"kept_percent names {len(percent)} layers, expected fewer than the model's {config.n_layers}: what the "
            "last one keeps is [CLS] alone"
        )
    return percent


def min_kept_tokens(config: DistilBertConfig) -> int:
    """Returns how many tokens a review keeps at least, all if it has no more.

    Raises:
        ValueError: it is no number of tokens.
    """
    minimum = getattr(config, "min_kept_tokens", None) or 0
    if not isinstance(minimum, int) or minimum < 0:
        raise ValueError(f"min_kept_tokens is {minimum}, expected a whole number, 0 or more")
    return minimum


def num_kept(num_tokens: _Count, percent: int, minimum: int) -> _Count:
    """Returns how many of `num_tokens` go on: `percent`, rounded up, but at least `minimum`, or all of fewer."""
    share = (num_tokens * percent + 99) // 100
    if isinstance(num_tokens, int):
        return max(share, min(num_tokens, minimum))
    return torch.maximum(share, num_tokens.clamp(max=minimum))


def kept_after(percent: Sequence[int]) -> dict[int, int]:
    """Returns the layers, from 0 on, after whose attention tokens are dropped, and the percent kept."""
    before = [100, *percent]
    return {layer: kept for layer, kept in enumerate(percent) if kept < before[layer]}


def classifier_class(config: DistilBertConfig) -> type[DistilBertForSequenceClassification]:
    """Returns the class that a new checkpoint names as its architecture: the library's own if it drops nothing."""
    return TokenDroppingClassifier if kept_percent(config) else DistilBertForSequenceClassification


class TokenDroppingClassifier(DistilBertForSequenceClassification):
    """The classifier, with or without dropping, as `kept_percent` and `min_kept_tokens` in its configuration have it.

    B reviews, T tokens.
    """

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Returns `logits` (B, C) and, if there are `labels` (class ids), the loss."""
        kept = kept_after(kept_percent(self.config))
        if not kept:
            return super().forward(input_ids, attention_mask, labels=labels)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self._encode(input_ids, mask.bool(), kept)
        pooled = torch.relu(self.pre_classifier(hidden[:, 0]))  # (B, dim)
        logits = self.classifier(self.dropout(pooled))  # (B, C)
        loss: Any = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _encode(self, input_ids: torch.Tensor, mask: torch.Tensor, kept: dict[int, int]) -> torch.Tensor:
        """Returns what is kept of the reviews, (B, kept, dim), [CLS] first; `mask` (B, T) is true for tokens."""
        num_tokens = mask.sum(dim=1, keepdim=True)  # (B, 1)
        minimum = min_kept_tokens(self.config)
        hidden = self.distilbert.embeddings(input_ids)  # (B, T, dim)
        layers: Any = self.distilbert.transformer.layer
        for number, layer in enumerate(layers):
            attention = layer.attention
            query, key, value = _heads(attention, hidden)
            probability = attention.dropout.p if attention.training else 0.0
            context = scaled_dot_product_attention(query, key, value, mask[:, None, None, :], dropout_p=probability)
            answer = attention.out_lin(context.transpose(1, 2).flatten(2))  # (B, T, dim)
            attended = layer.sa_layer_norm(answer + hidden)
            if number in kept:
                count = num_kept(input_ids.shape[1], kept[number], minimum)
                places = most_attended(query, key, mask, count)  # (B, count)
                attended = attended.gather(1, places[:, :, None].expand(-1, -1, attended.shape[2]))
                mask = torch.arange(count, device=mask.device) < num_kept(num_tokens, kept[number], minimum)
            hidden = layer.output_layer_norm(layer.ffn(attended) + attended)
        return hidden


def _heads(attention: MultiHeadSelfAttention, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields query, key and value of `hidden` (B, T, dim), each (B, heads, T, dim a head)."""
    for project in (attention.q_lin, attention.k_lin, attention.v_lin):
        yield project(hidden).unflatten(2, (attention.n_heads, -1)).transpose(1, 2)


@torch.no_grad()
def most_attended(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the places (B, count) of [CLS] and then of the tokens that receive most attention, most first.

    In fp32 whatever the training's precision: in bf16's 8 bits many would be equal, and others chosen than in serving.
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = query.float() @ key.float().transpose(2, 3) / query.shape[3] ** 0.5  # (B, heads, T, T)
        weights = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(dim=3)
        received = mask[:, None, :].float() @ weights.sum(dim=1)  # (B, 1, T); padding attends to nothing
        received[:, :, 0] = torch.inf
        return received[:, 0].topk(count).indices
