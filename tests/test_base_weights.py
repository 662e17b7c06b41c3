"""Base weights: a BERT checkpoint folded into DistilBERT computes the same hidden states."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from training import tokenizer
from training.config import BaseWeights, Config, ConfigError, Data, Tokens
from training.weights import load_model, load_tokenizer, resolve

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film"]


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    BertTokenizerFast(vocab_file=str(vocabulary)).save_pretrained(tmp_path)
    return tmp_path


def config_for(source: str) -> Config:
    return Config(name="x", base=BaseWeights(source=source), data=Data(source="unused"))


def test_folded_bert_gives_the_same_hidden_states(bert_folder: Path) -> None:
    bert = BertModel.from_pretrained(bert_folder).eval()
    distilbert = load_model(config_for(str(bert_folder)), vocab_size=50).distilbert.eval()
    input_ids = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(1))  # (B, T)
    attention_mask = (torch.arange(17) < torch.tensor([[17], [9], [3], [1]])).long()  # (B, T)
    with torch.inference_mode():
        expected = bert(input_ids, attention_mask, output_hidden_states=True).hidden_states
        folded = distilbert(input_ids, attention_mask, output_hidden_states=True).hidden_states
    assert len(expected) == len(folded) == 4
    real = attention_mask.bool()
    for layer, (theirs, ours) in enumerate(zip(expected, folded, strict=True)):
        assert (theirs - ours)[real].abs().max() < 1e-5, f"layer {layer}"


def test_labels_reach_the_model_configuration(bert_folder: Path) -> None:
    model = load_model(config_for(str(bert_folder)), vocab_size=50)
    assert model.config.id2label == {0: "negative", 1: "positive"}


def test_local_folder_brings_its_tokenizer(bert_folder: Path) -> None:
    fast = load_tokenizer(BaseWeights(source=str(bert_folder)))
    assert fast.tokenize("A good film") == ["a", "good", "film"]


@pytest.mark.parametrize(
    ("lower_case", "expected"), [(True, ["a", "good", "film"]), (False, ["[UNK]", "good", "film"])]
)
def test_a_cased_base_stays_cased(tmp_path: Path, lower_case: bool, expected: list[str]) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    BertTokenizerFast(vocab_file=str(vocabulary), do_lower_case=lower_case).save_pretrained(tmp_path)
    BertConfig(vocab_size=len(WORDS)).save_pretrained(tmp_path)
    built = tokenizer.build(BaseWeights(source=str(tmp_path)), Tokens(max_length=16), [], tmp_path)
    assert built.tokenize("A good film") == expected
    encoder = tokenizer.save(built, tmp_path, Tokens(max_length=16))
    assert encoder.encode(["A good film"]) == [[2, *(WORDS.index(word) for word in expected), 3]]


def test_package_that_is_not_installed_says_what_to_run() -> None:
    with pytest.raises(ConfigError, match="pip install no-such-weights"):
        resolve("package:no_such_weights/model")


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="is a 'gpt2', expected distilbert or bert"):
        load_model(config_for(str(tmp_path)), vocab_size=50)
