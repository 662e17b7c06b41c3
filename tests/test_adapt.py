"""Masked language modelling of the base weights: an exact shortcut, BERT's masks, and weights that training takes."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertForMaskedLM, DistilBertTokenizerFast

from model_repository.tokenizer.review_text import ReviewEncoder
from training import adapt, evaluate, train
from training.config import AdaptConfig, BaseWeights, Config, Data, UnlabelledReviews
from training.masked_lm import NOT_MASKED, MaskedPositionsLM, Masker, plain
from training.weights import load_masked_lm, load_model

CONFIGS = Path(__file__).resolve().parent.parent / "training" / "configs"
REVIEWS = CONFIGS / "smoke_reviews.csv"
TINY = (
    *("base.source=random", f"data.source={REVIEWS}", "data.validation_fraction=0.2", "tokens.max_length=64"),
    *("training.num_epochs=8", "training.batch_size=8", "training.learning_rate=5e-3", "training.num_evaluations=2"),
)


def run_adapt(artefacts: Path, *overrides: str) -> int:
    options = [part for override in (*TINY, *overrides) for part in ("-o", override)]
    return adapt.main(["--config", str(CONFIGS / "adapt.yaml"), "--artefacts", str(artefacts), *options])


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefacts")
    assert run_adapt(folder) == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> DistilBertTokenizerFast:
    return DistilBertTokenizerFast.from_pretrained(tiny_checkpoint)


def tiny_masked_lm(vocab_size: int) -> MaskedPositionsLM:
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=vocab_size, dim=32, n_layers=2, n_heads=2, hidden_dim=64, dropout=0.0, attention_dropout=0.0
    )
    return MaskedPositionsLM(config)


def random_rows(tokenizer: DistilBertTokenizerFast, lengths: list[int]) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    words = [torch.randint(5, len(tokenizer), (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": [tokenizer.cls_token_id, *row, tokenizer.sep_token_id]} for row in words]


def test_adaptation_lowers_the_validation_loss_and_writes_what_it_promises(artefacts: Path) -> None:
    run = artefacts / "adapted"
    manifest = json.loads((run / "manifest.json").read_text())
    loss = manifest["validation_loss"]
    assert loss["after"] < 0.8 * loss["before"]
    assert manifest["data"]["num_reviews"] == {"train": 64, "validation": 16}
    assert manifest["num_steps"] == 64
    assert {"base_sha256", "model_sha256", "versions", "git_revision", "hardware", "wall_time_s"} <= manifest.keys()
    assert json.loads((run / "config.json").read_text())["architectures"] == ["DistilBertForMaskedLM"]
    assert ReviewEncoder(run / "tokenizer.json").max_length == 64
    assert "validation loss" in (artefacts / "logs" / "adapt.log").read_text()
    assert not (run / "state").exists()
    assert not [*run.rglob("*.bin"), *run.rglob("*.pt")]


def test_adapted_folder_is_a_base_that_trains(artefacts: Path, tmp_path: Path) -> None:
    base = artefacts / "adapted"
    config = Config(name="x", base=BaseWeights(source=str(base)), data=Data(source="unused"))
    encoder, saved = load_model(config, vocab_size=0).distilbert.state_dict(), load_file(base / "model.safetensors")
    assert all(tensor.equal(saved[f"distilbert.{name}"]) for name, tensor in encoder.items())
    overrides = (f"base.source={base}", "training.num_epochs=1", "training.num_evaluations=1")
    options = [part for override in overrides for part in ("-o", override)]
    smoke = str(CONFIGS / "smoke.yaml")
    assert train.main(["--config", smoke, "--artefacts", str(tmp_path), *options]) == 0
    manifest = json.loads((tmp_path / "smoke" / "manifest.json").read_text())
    assert manifest["base_sha256"] == json.loads((base / "manifest.json").read_text())["model_sha256"]


def test_finished_adaptation_is_not_overwritten_unasked(artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_adapt(artefacts) == 2
    assert "pass --overwrite" in capsys.readouterr().err


def test_base_weights_are_no_classifier(artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--model-path", str(artefacts / "adapted"), "--examples", "fine"]) == 2
    assert "lacks classifier.bias" in capsys.readouterr().err


def test_loss_at_masked_positions_is_the_loss_of_all_positions(tokenizer: DistilBertTokenizerFast) -> None:
    model = tiny_masked_lm(len(tokenizer))
    whole = plain(model)
    batch = Masker(tokenizer, 0.15, seed=3)(random_rows(tokenizer, [60, 31, 9]))
    ours, theirs = model(**batch).loss, whole(**batch).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    ours.backward()
    theirs.backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


def test_batch_without_a_masked_token_has_no_loss(tokenizer: DistilBertTokenizerFast) -> None:
    input_ids = torch.tensor([[tokenizer.cls_token_id, tokenizer.sep_token_id]])
    labels = torch.full_like(input_ids, NOT_MASKED)
    assert tiny_masked_lm(len(tokenizer))(input_ids, torch.ones_like(input_ids), labels).loss.item() == 0


def test_masks_are_those_of_bert(tokenizer: DistilBertTokenizerFast) -> None:
    rows = random_rows(tokenizer, [500] * 39 + [20])
    batch = Masker(tokenizer, 0.15, seed=0)(rows)
    original = torch.zeros_like(batch["input_ids"])
    for index, row in enumerate(rows):
        original[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    chosen = batch["labels"] != NOT_MASKED
    assert batch["labels"][chosen].equal(original[chosen])
    assert batch["input_ids"][~chosen].equal(original[~chosen])
    assert not (chosen & torch.isin(original, torch.tensor(tokenizer.all_special_ids))).any()
    num_words = int((batch["attention_mask"].sum() - 2 * len(rows)).item())
    assert chosen.sum().item() / num_words == pytest.approx(0.15, abs=0.01)
    shown = batch["input_ids"][chosen]
    assert (shown == tokenizer.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (shown == original[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.03)


def test_validation_reviews_keep_their_masks(tokenizer: DistilBertTokenizerFast) -> None:
    masker = Masker(tokenizer, 0.15, seed=0)
    fixed = masker.mask_once([row["input_ids"] for row in random_rows(tokenizer, [40, 12])])
    first, again = masker(fixed), masker(fixed)
    assert all(first[name].equal(again[name]) for name in first)
    assert (first["labels"] != NOT_MASKED).any()
    assert (first["labels"][first["attention_mask"] == 0] == NOT_MASKED).all()


def test_masked_lm_of_a_folded_bert_has_its_embeddings_tied(tmp_path: Path) -> None:
    bert = BertModel(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    )
    bert.save_pretrained(tmp_path)
    config = AdaptConfig(name="x", base=BaseWeights(source=str(tmp_path)), data=UnlabelledReviews(source="unused"))
    model = load_masked_lm(config, vocab_size=50)
    words = model.distilbert.embeddings.word_embeddings.weight
    assert model.vocab_projector.weight is words
    assert words.equal(bert.embeddings.word_embeddings.weight)
    plain(model).save_pretrained(tmp_path / "saved")
    saved = DistilBertForMaskedLM.from_pretrained(tmp_path / "saved")
    assert saved.vocab_projector.weight is saved.distilbert.embeddings.word_embeddings.weight


def test_folder_gives_its_training_and_unlabelled_reviews_and_never_the_test(tmp_path: Path) -> None:
    for part, count in (("train", 30), ("unsupervised", 20)):
        texts = [f"{part} review {index}" for index in range(count)]
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / f"{part}.parquet")
    (tmp_path / "test.parquet").write_text("not read")
    reviews = UnlabelledReviews(source=str(tmp_path), validation_fraction=0.1)
    train_reviews, validation = adapt.split(reviews, seed=1)
    assert (len(train_reviews), len(validation), len({*train_reviews, *validation})) == (45, 5, 50)
    assert adapt.split(reviews, seed=1) == (train_reviews, validation)
    bounded, _ = adapt.split(reviews.model_copy(update={"max_reviews": 10}), seed=1)
    assert len(bounded) == 9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(["data.source=./absent"], "is no file or folder: expected a folder with train.parquet", id="path"),
        pytest.param([f"data.source={CONFIGS}"], "has no train.parquet or train.csv", id="part"),
        pytest.param(["data.text_column=review"], "no column 'review'; columns are", id="column"),
        pytest.param(["data.label_column=label"], "unknown key 'data.label_column'; did you mean", id="key"),
        pytest.param(["training.masked_fraction=1.5"], "'training.masked_fraction'", id="share"),
    ],
)
def test_unusable_input_says_what_was_expected(
    tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_adapt(tmp_path, *overrides) == 2
    assert message in capsys.readouterr().err
