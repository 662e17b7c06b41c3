"""One interface over a checkpoint, an ONNX file and a running server, so that the same reviews compare all three.

A scorer gives class probabilities (N, C) for N raw reviews, in the reviews' order, and the C label names.
"""

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from model_repository.tokenizer.review_text import ReviewEncoder, pad

Probabilities = npt.NDArray[np.floating[Any]]


class TokenizerNotFoundError(ValueError):
    """No tokenizer.json that can be used belongs to the model; the message says where one was looked for, or why."""


class OnnxFileError(ValueError):
    """An .onnx file that export.onnx did not write; the message says what it lacks."""


class NoClassifierError(ValueError):
    """A checkpoint without a classifier's weights, such as base weights or a file cut short; the message says which."""


class ServerLabelsError(ValueError):
    """A server answers with other labels than it was taken to have; the message says which, and what to pass."""


class Scorer(Protocol):
    """Anything that turns raw reviews into class probabilities."""

    labels: list[str]

    def probabilities(self, reviews: Sequence[str]) -> Probabilities:
        """Returns (N, C) probabilities in the order of `reviews`."""
        ...


def _batches_by_length(rows: list[list[int]], batch_size: int, description: str) -> Iterator[list[int]]:
    """Yields indices of reviews of similar length, so that little of a batch is padding."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in tqdm(range(0, len(rows), batch_size), desc=description, unit="batch", disable=None):
        yield order[start : start + batch_size]


class _EncodedScorer:
    """Shared part of the scorers that tokenise here: batches by length, answers in the reviews' order."""

    labels: list[str]
    name = "scoring"

    def __init__(self, tokenizer_file: Path, batch_size: int) -> None:
        try:
            self._encoder = ReviewEncoder(tokenizer_file)
        except (ValueError, OSError) as error:
            raise TokenizerNotFoundError(str(error)) from error
        self._batch_size = batch_size

    def _infer(self, input_ids: npt.NDArray[np.int64], attention_mask: npt.NDArray[np.int64]) -> Probabilities:
        raise NotImplementedError

    def probabilities(self, reviews: Sequence[str]) -> Probabilities:
        """Returns (N, C) probabilities in the order of `reviews`."""
        rows = self._encoder.encode(reviews)
        result = np.empty((len(rows), len(self.labels)), dtype=np.float64)
        for indices in _batches_by_length(rows, self._batch_size, self.name):
            result[indices] = self._infer(*pad([rows[index] for index in indices]))
        return result


class CheckpointScorer(_EncodedScorer):
    """A Hugging Face checkpoint folder, computed by torch in fp32.

    Raises:
        TokenizerNotFoundError: no tokenizer.json in the folder, or one without truncation.
        NoClassifierError: the folder holds an encoder whose head would be random, or weights that are cut short.
    """

    name = "checkpoint"

    def __init__(self, folder: Path, batch_size: int = 32) -> None:
        import torch
        from safetensors import SafetensorError

        from training.token_dropping import TokenDroppingClassifier

        super().__init__(folder / "tokenizer.json", batch_size)
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model, loading = TokenDroppingClassifier.from_pretrained(folder, output_loading_info=True)
        except SafetensorError as error:
            raise NoClassifierError(
                f"{folder / 'model.safetensors'} cannot be read ({error}), expected the whole file: copy it again"
            ) from error
        if loading["missing_keys"]:
            missing = ", ".join(sorted(loading["missing_keys"]))
            raise NoClassifierError(f"{folder} lacks {missing}: fine-tune it first, as base.source of training.train")
        self._model = model.to(self._device).eval()
        self.labels = [self._model.config.id2label[index] for index in range(self._model.config.num_labels)]

    def _infer(self, input_ids: npt.NDArray[np.int64], attention_mask: npt.NDArray[np.int64]) -> Probabilities:
        torch = self._torch
        with torch.inference_mode():
            logits = self._model(
                input_ids=torch.from_numpy(input_ids).to(self._device),
                attention_mask=torch.from_numpy(attention_mask).to(self._device),
            ).logits  # (B, C)
        return torch.softmax(logits, dim=-1).cpu().numpy()


def _find_tokenizer(onnx_file: Path) -> Path:
    """Returns the tokenizer.json of `onnx_file`: beside it, in its checkpoint, or installed with it."""
    folder = onnx_file.resolve().parent
    root = folder.parent.parent  # of <checkpoint>/onnx/int8/model.onnx, or of <repository>/classifier/1/model.onnx
    candidates = [folder / "tokenizer.json", root / "tokenizer.json", root / "tokenizer" / "1" / "tokenizer.json"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = ", ".join(map(str, candidates))
    raise TokenizerNotFoundError(
        f"{onnx_file} has no tokenizer.json: looked for {looked}; put the checkpoint's beside it"
    )


class OnnxScorer(_EncodedScorer):
    """An ONNX file with outputs `probabilities` and `label`, computed by the served classifier's engine.

    Raises:
        TokenizerNotFoundError: no tokenizer.json with truncation beside it, in its checkpoint, or in its repository.
        OnnxFileError: it does not say its limits or its labels, or is cut short.
    """

    name = "onnx"

    def __init__(self, path: Path, batch_size: int = 8) -> None:
        import onnx
        from google.protobuf.message import DecodeError

        from model_repository.classifier.engine import Engine

        super().__init__(_find_tokenizer(path), batch_size)
        try:
            metadata = onnx.load(path, load_external_data=False).metadata_props
        except DecodeError as error:
            raise OnnxFileError(f"{path} is no ONNX file ({error}), expected a whole one: copy it again") from error
        labels = {entry.key: entry.value for entry in metadata}.get("labels")
        if labels is None:
            raise OnnxFileError(f"{path} does not say its labels: make it with `python -m export.onnx`")
        self.labels = json.loads(labels)
        try:
            self._engine = Engine(path, num_threads=0)
        except ValueError as error:
            raise OnnxFileError(f"{path}: {error}") from error

    def _infer(self, input_ids: npt.NDArray[np.int64], attention_mask: npt.NDArray[np.int64]) -> Probabilities:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self._engine.run(["probabilities"], inputs)[0]


class ServerScorer:
    """A running server, one request per review, many in flight, so that its own batching is what is measured.

    It tells the label of each answer, not which id that has, so every answer is held against `labels`. Where these are
    the `data_labels`, the server may name its own otherwise, but not give one of them another id.
    """

    def __init__(
        self,
        url: str,
        labels: list[str],
        data_labels: bool = False,
        max_in_flight: int = 32,
        timeout_s: float = 60.0,
    ) -> None:
        self._url, self.labels, self._data_labels = url, labels, data_labels
        self._max_in_flight, self._timeout_s = max_in_flight, timeout_s

    def probabilities(self, reviews: Sequence[str]) -> Probabilities:
        """Returns (N, C) probabilities in the order of `reviews`.

        Raises:
            ServerLabelsError: an answer has another label than `labels` say, or not one probability for each.
        """
        return asyncio.run(self._probabilities(reviews))

    def _check_label(self, label: str, probabilities: Sequence[float]) -> None:
        came = f"{self._url} answers {label!r} with the probabilities {[round(value, 4) for value in probabilities]}"
        remedy = "pass --labels with the names of the labels in the order of the model's ids"
        if len(probabilities) != len(self.labels):
            raise ServerLabelsError(f"{came}, expected one for each of {self.labels}: {remedy}")
        highest = max(probabilities)
        # More than one in a tie.
        expected = [name for name, value in zip(self.labels, probabilities, strict=True) if value == highest]
        if label not in expected and (label in self.labels or not self._data_labels):
            raise ServerLabelsError(f"{came}, expected {expected[0]!r} by the order {self.labels}: {remedy}")

    async def _probabilities(self, reviews: Sequence[str]) -> Probabilities:
        from clients import AsyncSentimentClient

        rows: list[Any] = [None] * len(reviews)
        pending = iter(enumerate(reviews))
        client = AsyncSentimentClient(self._url, timeout_s=self._timeout_s, max_in_flight=self._max_in_flight)
        async with client:
            with tqdm(total=len(reviews), desc=self._url, unit="review", disable=None) as bar:

                async def work() -> None:
                    for index, review in pending:  # one iterator shared by all workers
                        (prediction,) = await client.predict([review])
                        self._check_label(prediction.label, prediction.probabilities)
                        rows[index] = prediction.probabilities
                        bar.update()

                await asyncio.gather(*(work() for _ in range(self._max_in_flight)))
        return np.array(rows, dtype=np.float64)
