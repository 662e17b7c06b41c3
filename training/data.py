"""Reviews: loaded by Hugging Face `datasets`, split with the labels' shares kept, turned into tokens.

Sources: a hub name (`stanfordnlp/imdb`), one parquet or CSV file, or a folder with `train.*` and, optionally, `test.*`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset

from model_repository.tokenizer.review_text import ReviewEncoder, clean
from training.config import Data

_READERS = {".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Reviews with columns `text` (str) and `label` (class id)."""

    train: Dataset
    validation: Dataset
    test: Dataset


class DataError(ValueError):
    """The data cannot be used; the message says what came and what was expected."""


def _local_files(path: Path) -> tuple[str, dict[str, str]]:
    if path.is_file():
        found = {"train": path}
    else:
        candidates = {split: sorted(path.glob(f"{split}.*")) for split in ("train", "test")}
        found = {split: hits[0] for split, hits in candidates.items() if hits}
    suffixes = {file.suffix for file in found.values()}
    if "train" not in found or len(suffixes) != 1 or not suffixes <= _READERS.keys():
        came = ", ".join(file.name for file in found.values()) or "nothing"
        raise DataError(f"{path}: found {came}; expected one file, or train.* and test.*, as .parquet or .csv")
    return _READERS[suffixes.pop()], {split: str(file) for split, file in found.items()}


def load(data: Data, with_labels: bool = True) -> DatasetDict:
    """Returns the source's splits (`train`, and `test` where it has one), columns `text` and, if wanted, `label`.

    Raises:
        DataError: no such source, a missing column, a row without text, or a label outside `data.labels`.
    """
    path = Path(data.source)
    if path.exists():
        reader, files = _local_files(path)
        loaded = load_dataset(reader, data_files=files)
    elif data.source.startswith(("/", ".")) or path.suffix in _READERS:
        raise DataError(f"data.source={data.source}: no such file or folder")
    else:
        try:
            loaded = load_dataset(data.source)
        except Exception as error:  # the hub client raises its own family, and httpx's, and OSError
            raise DataError(
                f"data.source={data.source}: neither a local path nor a data set the hub gave ({error}); without the "
                "hub, name a local parquet or CSV file or folder: -o data.source=PATH"
            ) from error
    splits = {name: loaded[name] for name in ("train", "test") if name in loaded}
    return DatasetDict({name: _normalise(split, data, with_labels) for name, split in splits.items()})


def _normalise(split: Dataset, data: Data, with_labels: bool) -> Dataset:
    for column in (data.text_column, data.label_column) if with_labels else (data.text_column,):
        if column not in split.column_names:
            raise DataError(
                f"{data.source}: no column {column!r}; columns are {split.column_names}: set data.text_column and "
                "data.label_column"
            )
    reviews: list[str] = split[data.text_column][:]
    empty = [index for index, review in enumerate(reviews) if not isinstance(review, str) or not clean(review).strip()]
    if empty:
        raise DataError(f"{data.source}: rows {empty[:10]} have no text, expected a review in each: leave them out")
    if not with_labels:
        return Dataset.from_dict({"text": reviews})
    return _with_label_ids(reviews, split[data.label_column][:], data)


def _with_label_ids(reviews: list[str], labels: list[Any], data: Data) -> Dataset:
    ids: dict[object, int] = {label: index for index, label in enumerate(data.labels)}
    ids |= {index: index for index in ids.values()}
    unknown = sorted({str(label) for label in labels if label not in ids})
    if unknown:
        raise DataError(
            f"{data.source}: labels {unknown[:10]} are neither names in {data.labels} nor their ids; set data.labels"
        )
    features = Features({"text": Value("string"), "label": ClassLabel(names=data.labels)})
    return Dataset.from_dict({"text": reviews, "label": [ids[label] for label in labels]}, features=features)


def load_unlabelled(source: str, parts: Sequence[str], text_column: str = "text") -> list[str]:
    """Returns the reviews of a folder's `parts` (`train`, `unsupervised`), all needed, or of one parquet or CSV file.

    Raises:
        DataError: no such source, a part that is not there, a missing column, or a row without text.
    """
    path = Path(source)
    files = [path] if path.is_file() else [_part(path, part) for part in parts]
    return [text for file in files for text in _texts(file, text_column)]


def _part(folder: Path, part: str) -> Path:
    files = [folder / f"{part}{suffix}" for suffix in _READERS]
    for file in files:
        if file.is_file():
            return file
    expected = " or ".join(file.name for file in files)
    what = "has no" if folder.is_dir() else "is no file or folder: expected a folder with"
    raise DataError(f"{folder} {what} {expected}; one parquet or CSV file of reviews does as well")


def _texts(file: Path, text_column: str) -> list[str]:
    if file.suffix not in _READERS:
        raise DataError(f"{file}: expected a .parquet or .csv file")
    loaded = load_dataset(_READERS[file.suffix], data_files=str(file), split="train")
    if text_column not in loaded.column_names:
        raise DataError(f"{file}: no column {text_column!r}; columns are {loaded.column_names}")
    texts = loaded[text_column][:]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{file}: row {index} of column {text_column!r} holds {text!r}, expected text")
    return texts


def split(data: Data, seed: int) -> Splits:
    """Returns stratified train, validation and test reviews; the same seed gives the same splits."""
    loaded = load(data)
    train = loaded["train"]
    if "test" in loaded:
        test = loaded["test"]
    else:
        parts = train.train_test_split(test_size=data.test_fraction, stratify_by_column="label", seed=seed)
        train, test = parts["train"], parts["test"]
    parts = train.train_test_split(test_size=data.validation_fraction, stratify_by_column="label", seed=seed)
    train, validation = parts["train"], parts["test"]
    limit = data.max_train_reviews
    if limit is not None and limit < len(train):
        train = train.train_test_split(train_size=limit, stratify_by_column="label", seed=seed)["train"]
    return Splits(train=train, validation=validation, test=test)


def encode(reviews: Dataset, encoder: ReviewEncoder) -> Dataset:
    """Returns columns `input_ids`, `attention_mask` and `label`, rows truncated and unpadded."""

    def tokens(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        rows = encoder.encode(batch["text"])
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}

    return reviews.map(
        tokens,
        batched=True,
        remove_columns=["text"],
        desc="tokenizing",
        load_from_cache_file=False,
        keep_in_memory=True,
    )
