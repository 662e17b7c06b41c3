"""Reviews: loaded by Hugging Face `datasets`, split with the labels' shares kept, turned into tokens.

Sources: a hub name (`stanfordnlp/imdb`), one parquet or CSV file, or a folder with a file for each split, as
`train.parquet` and `test.parquet`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets.exceptions import DatasetsError
from pyarrow import ArrowException

from model_repository.tokenizer.review_text import ReviewEncoder, clean
from training.config import Data

_READERS = {".parquet": "parquet", ".csv": "csv"}
_EXPECTED = {
    ".parquet": "a whole parquet file with rows",
    ".csv": "a whole CSV file in UTF-8: a header, rows, and quotes around text with commas, quotes or line breaks",
}


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Reviews with columns `text` (str) and `label` (class id)."""

    train: Dataset
    validation: Dataset
    test: Dataset


class DataError(ValueError):
    """The data cannot be used; the message says what came and what was expected."""


def load(data: Data, names: Sequence[str] = ("train", "test"), with_labels: bool = True) -> DatasetDict:
    """Returns those of the splits `names` that the source has, columns `text` and, if wanted, `label`.

    One file is `train`, whatever its name.

    Raises:
        DataError: no such source, a file that cannot be read, none of these splits, a missing column, a row without
            text, or a label outside `data.labels`.
    """
    path = Path(data.source)
    if path.is_file():
        there: Mapping[str, Dataset | Path] = {"train": path}
    elif path.is_dir():
        there = _split_files(path)
    elif data.source.startswith(("/", ".")) or path.suffix in _READERS:
        raise DataError(f"data.source={data.source}: no such file or folder")
    else:
        there = _from_hub(data.source)
    found = {name: there[name] for name in names if name in there}
    if not found:
        wanted = " or ".join(map(repr, dict.fromkeys(names)))
        files = f"; expected a file such as {names[0]}.parquet or {names[0]}.csv" if path.is_dir() else ""
        raise DataError(f"{data.source}: no split {wanted}; there are: {', '.join(there) or 'none'}{files}")
    return DatasetDict({name: _normalise(split, data, with_labels) for name, split in found.items()})


def load_unlabelled(source: str, names: Sequence[str], text_column: str = "text") -> list[str]:
    """Returns the reviews of a folder's splits `names`, all of which it must have, or of one parquet or CSV file.

    Raises:
        DataError: no such source, a file that cannot be read, a split that is not there, a missing column, or a row
            without text.
    """
    path = Path(source)
    files = [path] if path.is_file() else [_needed_file(path, name) for name in names]
    return [text for file in files for text in _texts(_read(file), text_column, str(file))]


def _split_files(folder: Path) -> dict[str, Path]:
    """Returns the file of each split in `folder`; of two the parquet file."""
    files = [file for suffix in _READERS for file in sorted(folder.glob(f"*{suffix}")) if file.is_file()]
    return {file.stem: file for file in reversed(files)}


def _needed_file(folder: Path, name: str) -> Path:
    file = _split_files(folder).get(name)
    if file is None:
        what = "has no" if folder.is_dir() else "is no file or folder: expected a folder with"
        raise DataError(
            f"{folder} {what} {name}.parquet or {name}.csv; one parquet or CSV file of reviews does as well"
        )
    return file


def _read(file: Path) -> Dataset:
    if file.suffix not in _READERS:
        raise DataError(f"{file}: expected a .parquet or .csv file")
    try:
        return load_dataset(_READERS[file.suffix], data_files=str(file), split="train")
    except (DatasetsError, ArrowException, ValueError, OSError) as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise DataError(f"{file} cannot be read ({cause}); expected {_EXPECTED[file.suffix]}") from error


def _from_hub(name: str) -> DatasetDict:
    try:
        return load_dataset(name)
    except Exception as error:  # the hub client raises its own family, and httpx's, and OSError
        raise DataError(
            f"data.source={name}: neither a local path nor a data set the hub gave ({error}); without the "
            "hub, name a local parquet or CSV file or folder: -o data.source=PATH"
        ) from error


def _normalise(split: Dataset | Path, data: Data, with_labels: bool) -> Dataset:
    if isinstance(split, Path):
        split = _read(split)
    reviews = _texts(split, data.text_column, data.source)
    if not with_labels:
        return Dataset.from_dict({"text": reviews})
    return _with_label_ids(reviews, _column(split, data.label_column, data.source, "label_column"), data)


def _texts(split: Dataset, column: str, source: str) -> list[str]:
    """Returns the reviews in `column`, each of which must have text that `clean` leaves."""
    reviews = _column(split, column, source, "text_column")
    if not reviews:
        raise DataError(f"{source}: no rows, expected reviews")
    other = next((review for review in reviews if not isinstance(review, str | None)), None)
    if other is not None:
        raise DataError(
            f"{source}: column {column!r} holds {other!r}, expected text: set data.text_column or --text-column"
        )
    empty = [index for index, review in enumerate(reviews) if not isinstance(review, str) or not clean(review).strip()]
    if empty:
        raise DataError(f"{source}: rows {empty[:10]} have no text, expected a review in each: leave them out")
    return reviews


def _column(split: Dataset, column: str, source: str, key: str) -> list[Any]:
    """Returns `column`, which `key` names: data.`key` in a configuration, an option on other command lines."""
    if column not in split.column_names:
        raise DataError(
            f"{source}: no column {column!r}; columns are {split.column_names}: set data.{key} or "
            f"--{key.replace('_', '-')}"
        )
    return split[column][:]


def _with_label_ids(reviews: list[str], labels: list[Any], data: Data) -> Dataset:
    ids: dict[object, int] = {label: index for index, label in enumerate(data.labels)}
    ids |= {index: index for index in ids.values()}
    unknown = sorted({str(label) for label in labels if label not in ids})
    if unknown:
        raise DataError(
            f"{data.source}: labels {unknown[:10]} are neither names in {data.labels} nor their ids: set data.labels "
            "or --labels (export.tensorrt takes the checkpoint's), or data.label_column or --label-column"
        )
    features = Features({"text": Value("string"), "label": ClassLabel(names=data.labels)})
    return Dataset.from_dict({"text": reviews, "label": [ids[label] for label in labels]}, features=features)


def split(data: Data, seed: int) -> Splits:
    """Returns stratified train, validation and test reviews; the same seed gives the same splits.

    Raises:
        DataError: as `load` does, or no training reviews, or too few of a label for a part of this size.
    """
    loaded = load(data)
    if "train" not in loaded:
        raise DataError(f"{data.source}: no split 'train'; there are: {', '.join(loaded)}")
    train = loaded["train"]
    if "test" in loaded:
        test = loaded["test"]
    else:
        train, test = _parts(train, f"data.test_fraction={data.test_fraction}", seed, test_size=data.test_fraction)
    fraction = data.validation_fraction
    train, validation = _parts(train, f"data.validation_fraction={fraction}", seed, test_size=fraction)
    limit = data.max_train_reviews
    if limit is not None and limit < len(train):
        train, _ = _parts(train, f"data.max_train_reviews={limit}", seed, train_size=limit)
    return Splits(train=train, validation=validation, test=test)


def num_held_out_texts(splits: Splits) -> dict[str, int]:
    """Returns how many training reviews have the very text of a validation review, and of a test review.

    Sources repeat texts, as IMDb does, and the splits leave them as they are, so that figures compare with others'.
    """
    held_out = {"validation": set(splits.validation["text"]), "test": set(splits.test["text"])}
    return {name: sum(text in texts for text in splits.train["text"]) for name, texts in held_out.items()}


def _parts(reviews: Dataset, key: str, seed: int, **size: float) -> tuple[Dataset, Dataset]:
    """Returns a training and a test part of `size`, the latter's or the former's, as `key` of the configuration says.

    Each has the labels in the shares that `reviews` has them.
    """
    try:
        parts = reviews.train_test_split(**size, stratify_by_column="label", seed=seed)
    except ValueError as error:
        raise DataError(
            f"{key} of {len(reviews)} reviews: {error}; every part needs reviews of each label: bring more, or change "
            "that number"
        ) from error
    return parts["train"], parts["test"]


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
