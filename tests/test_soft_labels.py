"""Soft labels: the mean of what checkpoints answer, and training on it beside the labelled reviews."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from transformers import DistilBertForSequenceClassification

from training import soft_labels, train
from training.config import Data
from training.data import DataError, split
from training.fit import _cross_entropy
from training.scorers import CheckpointScorer

CONFIGS = Path(__file__).resolve().parent.parent / "training" / "configs"
LABELS = ["negative", "positive"]


def smoke_reviews() -> list[dict[str, str]]:
    with (CONFIGS / "smoke_reviews.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def make_teacher(source: Path, folder: Path, labels: list[str], max_length: int) -> Path:
    """Writes a checkpoint that answers otherwise than `source`, with a window of its own."""
    shutil.copytree(source, folder)
    model = DistilBertForSequenceClassification.from_pretrained(source)
    with torch.no_grad():
        model.classifier.bias += torch.tensor([0.5, -0.5])
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}
    model.save_pretrained(folder)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.enable_truncation(max_length, direction="left")
    fast.save(str(folder / "tokenizer.json"))
    return folder


def run_soft_labels(teachers: list[Path], data: Path, out: Path, *options: str) -> int:
    folders = [str(folder) for folder in teachers]
    return soft_labels.main(["--model-path", *folders, "--data", str(data), "--out", str(out), *options])


def write_half(folder: Path) -> tuple[Path, Path]:
    """Writes half of the smoke reviews as labelled CSV, the other half with soft labels that agree with their own."""
    reviews = smoke_reviews()
    labelled = folder / "labelled.csv"
    with labelled.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(reviews[:40])
    positive = np.array([0.9 if row["label"] == "positive" else 0.1 for row in reviews[40:]])
    soft = folder / "soft.parquet"
    soft_labels.write(soft, [row["text"] for row in reviews[40:]], np.stack([1 - positive, positive], axis=1), LABELS)
    return labelled, soft


def test_soft_labels_are_the_mean_of_the_checkpoints(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teachers = [tiny_checkpoint, make_teacher(tiny_checkpoint, tmp_path / "other", LABELS, max_length=16)]
    texts = [row["text"] for row in smoke_reviews()]
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table({"text": texts, "label": [-1] * len(texts)}), folder / "unsupervised.parquet")
    (folder / "train.parquet").write_text("not read")
    out = tmp_path / "soft" / "reviews.parquet"
    assert run_soft_labels(teachers, folder, out) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_reviews"] == 80
    table = pq.read_table(out)
    assert table.column_names == ["text", "probabilities"]
    assert table["text"].to_pylist() == texts
    first, second = (CheckpointScorer(teacher).probabilities(texts) for teacher in teachers)
    assert np.abs(first - second).max() > 0.05, "teachers that agree prove nothing"
    written = np.array(table["probabilities"].to_pylist())
    np.testing.assert_allclose(written, (first + second) / 2, atol=1e-6)
    np.testing.assert_allclose(written.sum(axis=1), 1, atol=1e-6)
    manifest = json.loads((tmp_path / "soft" / "reviews.manifest.json").read_text())
    assert [teacher["name"] for teacher in manifest["teachers"]] == [tiny_checkpoint.name, "other"]
    assert len({teacher["model_sha256"] for teacher in manifest["teachers"]}) == 2
    assert manifest["labels"] == LABELS
    assert run_soft_labels(teachers, folder, out) == 2
    assert "pass --overwrite" in capsys.readouterr().err


def test_checkpoints_with_different_labels_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = make_teacher(tiny_checkpoint, tmp_path / "swapped", LABELS[::-1], max_length=64)
    assert run_soft_labels([tiny_checkpoint, swapped], CONFIGS / "smoke_reviews.csv", tmp_path / "out.parquet") == 2
    error = capsys.readouterr().err
    assert f"swapped has labels {LABELS[::-1]}" in error
    assert f"has {LABELS}" in error
    assert not (tmp_path / "out.parquet").exists()


def test_folder_that_is_no_checkpoint_or_has_no_reviews_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.parquet"
    assert run_soft_labels([tmp_path], CONFIGS / "smoke_reviews.csv", out) == 2
    assert "no model.safetensors" in capsys.readouterr().err
    assert run_soft_labels([tiny_checkpoint], tmp_path, out) == 2
    assert "has no unsupervised.parquet or unsupervised.csv" in capsys.readouterr().err


def test_soft_labels_join_the_training_split_alone(tmp_path: Path) -> None:
    labelled, soft = write_half(tmp_path)
    splits = split(Data(source=str(labelled), validation_fraction=0.2), seed=0)
    added = soft_labels.read(soft, LABELS)
    train_reviews = soft_labels.append(splits, added)
    num_hard = len(splits.train)
    assert train_reviews["text"][:] == [*splits.train["text"], *added["text"]]
    assert train_reviews["label"][:num_hard] == [[1 - label, label] for label in splits.train["label"]]
    assert np.allclose(train_reviews["label"][num_hard:], added["label"][:])


def test_held_out_reviews_stay_unseen(tmp_path: Path) -> None:
    labelled, _ = write_half(tmp_path)
    splits = split(Data(source=str(labelled), validation_fraction=0.2), seed=0)
    texts = [splits.validation["text"][0], "A new one.", splits.test["text"][0]]
    soft_labels.write(tmp_path / "repeated.parquet", texts, np.full((3, 2), 0.5), LABELS)
    train_reviews = soft_labels.append(splits, soft_labels.read(tmp_path / "repeated.parquet", LABELS))
    assert train_reviews["text"][len(splits.train) :] == ["A new one."]


def test_model_learns_from_labelled_and_soft_labelled_reviews(tmp_path: Path) -> None:
    labelled, soft = write_half(tmp_path)
    overrides = (
        *(f"data.source={labelled}", f"data.soft_labels={soft}"),
        *("training.num_epochs=20", "training.learning_rate=5e-3", "training.num_evaluations=1"),
    )
    options = [part for override in overrides for part in ("-o", override)]
    smoke = str(CONFIGS / "smoke.yaml")
    assert train.main(["--config", smoke, "--artefacts", str(tmp_path), *options]) == 0
    manifest = json.loads((tmp_path / "smoke" / "manifest.json").read_text())
    assert manifest["data"]["num_reviews"] == {"train": 25, "validation": 7, "test": 8}
    assert manifest["data"]["soft_labels"]["num_reviews"] == 40
    assert manifest["data"]["soft_labels"]["sha256"]
    assert manifest["metrics_test"]["accuracy"] >= 0.9


def test_one_hot_labels_cost_what_class_ids_cost() -> None:
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 1, 2, 2, 1, 0, 1])
    by_id = _cross_entropy({"logits": logits}, ids)
    assert _cross_entropy({"logits": logits}, torch.eye(3)[ids]).item() == pytest.approx(by_id.item(), rel=1e-6)


def write_table(path: Path, probabilities: list[list[float]], **columns: list[str]) -> None:
    pq.write_table(pa.table({"text": ["a"] * len(probabilities), "probabilities": probabilities} | columns), path)


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        pytest.param([[0.5, 0.5], [0.2, 0.3, 0.5]], "row 1 has probabilities .*expected 2", id="classes"),
        pytest.param([[0.5, 0.6]], "row 0 has probabilities .*sum 1", id="sum"),
        pytest.param([[1.5, -0.5]], "row 0 has probabilities", id="negative"),
        pytest.param([[float("nan")] * 2], "row 0 has probabilities .*sum 1", id="not a number"),
        pytest.param([[0.5, 0.5], [None, 1.0]], r"row 1 has probabilities \[None, 1.0\]", id="null"),
        pytest.param([[0.5, 0.5], None], "row 1 has probabilities None", id="null row"),
        pytest.param([0.5], "row 0 has probabilities 0.5, expected 2", id="no list"),
    ],
)
def test_rows_that_are_no_distribution_are_refused(tmp_path: Path, probabilities: list[Any], message: str) -> None:
    write_table(tmp_path / "soft.parquet", probabilities)
    with pytest.raises(DataError, match=message):
        soft_labels.read(tmp_path / "soft.parquet", LABELS)


@pytest.mark.parametrize("text", [None, " <br /> "])
def test_rows_without_text_are_refused(tmp_path: Path, text: str | None) -> None:
    table = {"text": ["a good film", text], "probabilities": [[0.5, 0.5]] * 2}
    pq.write_table(pa.table(table), tmp_path / "soft.parquet")
    with pytest.raises(DataError, match=r"rows \[1\] have no text"):
        soft_labels.read(tmp_path / "soft.parquet", LABELS)


def test_a_teacher_that_was_cut_short_is_told(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = Path(shutil.copytree(tiny_checkpoint, tmp_path / "cut"))
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-8])
    assert run_soft_labels([cut], CONFIGS / "smoke_reviews.csv", tmp_path / "out.parquet") == 2
    assert "model.safetensors cannot be read" in capsys.readouterr().err


def test_unusable_file_says_what_was_expected(tmp_path: Path) -> None:
    path = tmp_path / "soft.parquet"
    with pytest.raises(DataError, match=r"no such file; python -m training\.soft_labels writes one"):
        soft_labels.read(path, LABELS)
    path.write_text("text,probabilities")
    with pytest.raises(DataError, match="not a parquet file"):
        soft_labels.read(path, LABELS)
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), path)
    with pytest.raises(DataError, match=r"columns are .*expected text and probabilities"):
        soft_labels.read(path, LABELS)
    soft_labels.write(path, ["a"], np.array([[0.2, 0.8]]), LABELS[::-1])
    with pytest.raises(DataError, match=r"labels are .*expected data\.labels"):
        soft_labels.read(path, LABELS)
