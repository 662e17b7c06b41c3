"""Loading and splitting labelled reviews."""

from collections import Counter
from pathlib import Path

import datasets
import pytest

from training.config import Data
from training.data import DataError, load, load_unlabelled, num_held_out_texts, split


def rows(count: int) -> dict[str, list[object]]:
    return {"text": [f"review number {i}" for i in range(count)], "label": [i % 4 == 0 for i in range(count)]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("train", 200), ("test", 40)):
        table = rows(count)
        table["label"] = [int(bool(label)) for label in table["label"]]
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


def test_split_keeps_the_share_of_each_label(folder: Path) -> None:
    splits = split(Data(source=str(folder), validation_fraction=0.1), seed=1)
    for part, count in ((splits.train, 180), (splits.validation, 20), (splits.test, 40)):
        assert len(part) == count
        assert Counter(part["label"])[1] == pytest.approx(count / 4, abs=1)


def test_split_is_the_same_for_the_same_seed_and_disjoint(folder: Path) -> None:
    data = Data(source=str(folder), validation_fraction=0.1)
    first, again, other = (split(data, seed) for seed in (1, 1, 2))
    assert first.validation["text"][:] == again.validation["text"][:]
    assert first.validation["text"][:] != other.validation["text"][:]
    assert not set(first.train["text"]) & set(first.validation["text"])


def test_single_csv_file_is_split_three_ways_with_label_names(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    lines = [f"review {i},{'good' if i % 2 else 'bad'}" for i in range(100)]
    path.write_text("\n".join(["body,mood", *lines]) + "\n")
    data = Data(source=str(path), text_column="body", label_column="mood", labels=["bad", "good"], test_fraction=0.2)
    splits = split(data, seed=0)
    assert (len(splits.test), Counter(splits.test["label"])) == (20, {0: 10, 1: 10})
    assert all(
        int(text.split()[1]) % 2 == label
        for text, label in zip(splits.train["text"], splits.train["label"], strict=True)
    )


def test_training_texts_that_are_also_held_out_are_counted(folder: Path) -> None:
    texts = [f"review number {i}" for i in range(100)]
    train = {"text": [*texts, *texts], "label": [0, 1] * 100}  # each twice, so that validation repeats what is left
    datasets.Dataset.from_dict(train).to_parquet(folder / "train.parquet")
    test = {"text": ["review number 3", "review number 4", "another"], "label": [0, 1, 0]}
    datasets.Dataset.from_dict(test).to_parquet(folder / "test.parquet")
    splits = split(Data(source=str(folder), validation_fraction=0.1), seed=1)
    counted = num_held_out_texts(splits)
    of_both = [text for text in splits.train["text"] if text in ("review number 3", "review number 4")]
    assert counted["test"] == len(of_both) > 0
    assert counted["validation"] == sum(text in splits.validation["text"] for text in splits.train["text"]) > 0


def test_max_train_reviews_bounds_the_training_split_only(folder: Path) -> None:
    splits = split(Data(source=str(folder), max_train_reviews=40), seed=0)
    assert (len(splits.train), len(splits.test)) == (40, 40)
    assert Counter(splits.train["label"])[1] == 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param({"text_column": "review"}, "no column 'review'.*set data.text_column", id="column"),
        pytest.param({"labels": ["a", "b"], "label_column": "text"}, "neither names in", id="labels"),
        pytest.param({"source": "./absent.parquet"}, "no such file", id="path"),
    ],
)
def test_unusable_data_says_what_was_expected(folder: Path, data: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split(Data.model_validate({"source": str(folder), **data}), seed=0)


def test_folder_without_a_training_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'train' or 'test'; there are: none; .* train.parquet or train.csv"):
        split(Data(source=str(tmp_path)), seed=0)
    (tmp_path / "test.csv").write_text("text,label\ngood film,1\n")
    with pytest.raises(DataError, match="no split 'train'; there are: test"):
        split(Data(source=str(tmp_path)), seed=0)


def test_other_files_of_a_folder_do_not_matter(folder: Path) -> None:
    (folder / "train.manifest.json").write_text("{}")
    (folder / "train.csv").write_text("text,label\nthe parquet file counts,1\n")
    assert (len(load(Data(source=str(folder)))["train"]), len(load(Data(source=str(folder)))["test"])) == (200, 40)


@pytest.mark.parametrize(
    ("count", "data"),
    [
        pytest.param(20, {}, id="validation_fraction"),
        pytest.param(5, {"validation_fraction": 0.5}, id="test_fraction"),
        pytest.param(200, {"max_train_reviews": 1}, id="max_train_reviews"),
    ],
)
def test_too_few_reviews_name_the_key_and_a_remedy(
    tmp_path: Path, count: int, data: dict[str, object], request: pytest.FixtureRequest
) -> None:
    lines = [f"review {i},{i % 2}" for i in range(count)]
    (tmp_path / "all.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    key = request.node.callspec.id
    with pytest.raises(DataError, match=rf"data\.{key}=.*of \d+ reviews.*bring more"):
        split(Data.model_validate({"source": str(tmp_path / "all.csv"), **data}), seed=0)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        pytest.param(b"", "No columns", id="empty"),
        pytest.param(b"text,label\n", "no data", id="header alone"),
        pytest.param(b'text,label\n"good film,1\nbad film,0\n', "EOF inside string", id="unclosed quote"),
        pytest.param(b"text,label\ngood film,1\nbad, film,0\n", "Expected 2 fields in line 3, saw 3", id="comma"),
        pytest.param("text,label\nun café,1\n".encode("latin-1"), "can't decode", id="not UTF-8"),
    ],
)
def test_a_csv_file_that_cannot_be_read_is_named_with_the_cause(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "reviews.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"reviews\.csv cannot be read \(.*{cause}.*\); expected a whole CSV file"):
        load(Data(source=str(path)))
    with pytest.raises(DataError, match=cause):
        load_unlabelled(str(path), ["unsupervised"])


def test_a_parquet_file_that_was_cut_is_named_with_the_cause(folder: Path) -> None:
    path = folder / "test.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"test\.parquet cannot be read \(.*footer.*\); expected a whole parquet file"):
        load(Data(source=str(folder)))


def test_a_row_without_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\ngood film,1\n,0\nbad film,0\n <br />,1\n")
    with pytest.raises(DataError, match=r"rows \[1, 3\] have no text"):
        load(Data(source=str(path)))
    with pytest.raises(DataError, match=r"rows \[1, 3\] have no text"):
        load_unlabelled(str(path), ["unsupervised"])
