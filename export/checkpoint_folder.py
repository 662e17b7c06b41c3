"""A checkpoint folder as export takes it: whether all of it is there, and which labels it has."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import DistilBertConfig

from training.token_dropping import kept_percent, min_kept_tokens

NUM_LABELS = 2


class CheckpointError(ValueError):
    """The checkpoint cannot be exported; the message says what is missing and where it comes from."""


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read ({error}), expected JSON: copy it again") from error
    return content


def read_labels(checkpoint: Path) -> list[str]:
    """Returns the label names of `checkpoint` in the order of their ids.

    Raises:
        CheckpointError: a file is missing or cut short, the tokenizer does not truncate, the model is no DistilBERT,
            it has not two labels, or it is to drop tokens as no model can.
    """
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (checkpoint / name).is_file():
            raise CheckpointError(
                f"{checkpoint} has no {name}, expected a checkpoint as training.train writes it: make train"
            )
    try:
        with safe_open(checkpoint / "model.safetensors", framework="pt"):  # reads where the tensors lie
            pass
    except SafetensorError as error:
        raise CheckpointError(
            f"{checkpoint}/model.safetensors cannot be read ({error}), expected the whole file: copy it again"
        ) from error
    if not _read_json(checkpoint / "tokenizer.json").get("truncation"):
        raise CheckpointError(
            f"{checkpoint}/tokenizer.json sets no truncation, expected its max_length: training.train saves it, and "
            "Tokenizer.enable_truncation(max_length=...) of the package tokenizers sets it"
        )
    model_type = _read_json(checkpoint / "config.json").get("model_type")
    if model_type != "distilbert":
        raise CheckpointError(
            f"{checkpoint} is a {model_type!r}, expected 'distilbert'; training.train folds BERT into one"
        )
    config = DistilBertConfig.from_pretrained(checkpoint)
    if config.num_labels != NUM_LABELS:
        raise CheckpointError(
            f"{checkpoint} has {config.num_labels} labels, expected {NUM_LABELS}: the served model's `probabilities` "
            "are [N, 2] (model_repository/*/config.pbtxt)"
        )
    try:
        kept_percent(config)
        min_kept_tokens(config)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint}/config.json: {error}") from error
    id2label: dict[int, str] = config.id2label or {}
    return [id2label[index] for index in range(config.num_labels)]
