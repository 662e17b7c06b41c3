"""The classifier over reviews laid end to end: padding is neither sent nor multiplied. An experiment, not served.

B reviews, S tokens as they arrive, T of them not padding, L the longest review, D hidden size, C labels.
Inputs `input_ids`, `attention_mask` int64 (S,), what Triton's ragged batching hands over, and `item_shape` int32
(B, 1), its `batch_input` of kind BATCH_ITEM_SHAPE: tokens of each row. Outputs as those of export.graph.

Everything that treats tokens one by one, which is nearly all the arithmetic of an encoder, runs over (T, D). Attention
alone, which treats pairs within a review, gathers its (B, L, D) and is masked there.

Two faults of a client must stay that client's own: a row without tokens, whose place in the flat row is its
neighbour's, and an id that the vocabulary lacks, for which ONNX Runtime fails the whole batch, or, below zero, takes a
row from the table's end. Both rows get logits that are not a number, never a plausible answer; their neighbours get
theirs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from transformers import DistilBertForSequenceClassification

from export.checkpoint_folder import CheckpointError
from export.graph import OPSET, append_head, metadata
from training.token_dropping import kept_percent

INPUTS = ("input_ids", "attention_mask", "item_shape")


class RaggedClassifier(nn.Module):
    """A checkpoint's own layers, applied to the tokens that are there."""

    def __init__(self, model: DistilBertForSequenceClassification) -> None:
        """Takes the layers of `model`, which stays as it is."""
        super().__init__()
        self.model = model
        self.num_heads = model.config.n_heads
        self.vocab_size = model.config.vocab_size

    def forward(self, input_ids: Tensor, attention_mask: Tensor, item_shape: Tensor) -> Tensor:
        """Returns logits (B, C) of `input_ids`, `attention_mask` (S,) and `item_shape` (B, 1)."""
        ends = item_shape[:, 0].to(torch.int64).cumsum(0)  # (B,)
        row = (torch.arange(input_ids.shape[0])[:, None] >= ends[None, :]).sum(1)  # (S,)
        kept = torch.nonzero(attention_mask)[:, 0]  # (T,)
        ids, row = input_ids[kept], row[kept]
        member = row[None, :] == torch.arange(ends.shape[0])[:, None]  # (B, T)
        lengths = member.sum(1)  # (B,)
        starts = lengths.cumsum(0) - lengths
        known = (ids >= 0) & (ids < self.vocab_size)
        is_right = (lengths > 0) & ((member & ~known[None, :]).sum(1) == 0)  # (B,)

        place = torch.arange(ids.shape[0]) - starts[row]  # (T,)
        column = torch.arange(lengths.max())  # type: ignore[call-overload]  # (L,); an int would be fixed in the graph
        mask = column[None, :] < lengths[:, None]  # (B, L)
        grid = (starts[:, None] + column[None, :]).clamp(max=ids.shape[0] - 1)  # (B, L) -> T
        flat = row * mask.shape[1] + place  # (T,) -> B * L

        encoder: Any = self.model.distilbert
        ids = torch.where(known, ids, torch.zeros_like(ids))
        hidden = encoder.embeddings.word_embeddings(ids) + encoder.embeddings.position_embeddings(place)
        hidden = encoder.embeddings.LayerNorm(hidden)  # (T, D)
        for layer in encoder.transformer.layer:
            context = self._attention(layer.attention, hidden, grid, flat, mask)
            hidden = layer.sa_layer_norm(context + hidden)
            hidden = layer.output_layer_norm(layer.ffn(hidden) + hidden)
        pooled = torch.relu(self.model.pre_classifier(hidden[starts.clamp(max=ids.shape[0] - 1)]))  # (B, D)
        logits = self.model.classifier(pooled)
        return torch.where(is_right[:, None], logits, torch.full_like(logits, torch.nan))

    def _attention(self, attention: Any, hidden: Tensor, grid: Tensor, flat: Tensor, mask: Tensor) -> Tensor:
        """Returns the attention's output (T, D) for `hidden` (T, D)."""
        dim = hidden.shape[1]

        def heads(linear: Any) -> Tensor:  # (B, heads, L, D / heads)
            values: Tensor = linear(hidden)[grid]
            return values.view(grid.shape[0], grid.shape[1], self.num_heads, dim // self.num_heads).transpose(1, 2)

        queries, keys, values = heads(attention.q_lin), heads(attention.k_lin), heads(attention.v_lin)
        scores = queries @ keys.transpose(2, 3) * (dim // self.num_heads) ** -0.5  # (B, heads, L, L)
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        context = (scores.softmax(-1) @ values).transpose(1, 2).reshape(-1, dim)  # (B * L, D)
        output: Tensor = attention.out_lin(context[flat])
        return output


def build(checkpoint: Path, output: Path, labels: Sequence[str]) -> Path:
    """Writes the ragged graph of `checkpoint` in fp32 with the head of every other graph, and returns `output`.

    Raises:
        CheckpointError: it drops tokens, of which this graph knows nothing.
    """
    model = DistilBertForSequenceClassification.from_pretrained(checkpoint, attn_implementation="eager").eval()
    if percent := kept_percent(model.config):
        raise CheckpointError(
            f"{checkpoint} drops tokens (kept_percent {percent}), expected a checkpoint that does not"
        )
    example = (torch.tensor([1, 2, 3, 1, 2]), torch.ones(5, dtype=torch.int64), torch.tensor([[3], [2]]).int())
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        RaggedClassifier(model).eval(),
        example,
        output,
        input_names=list(INPUTS),
        output_names=["logits"],
        dynamic_axes={"input_ids": {0: "tokens"}, "attention_mask": {0: "tokens"}, "item_shape": {0: "batch"}},
        opset_version=OPSET,
        dynamo=False,  # the other exporter wants to know how many tokens are padding before it has seen any
    )
    onnx.save(append_head(onnx.load(output), labels, metadata(checkpoint)), output)
    return output
