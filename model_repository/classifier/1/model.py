"""Served classifier: input_ids, attention_mask (B, T) int64 -> label, score (B, 1), probabilities (B, 2).

One execution holds the requests that Triton merged, each a rectangle of its own width. Their rows lose their padding
and run in groups of like length (`length_groups`), whatever request they came from; then each request gets its rows
back as one response. A bad request fails alone, also when it shares a group with good ones.
"""

from __future__ import annotations  # the stub adds most names to pb_utils only after this file is imported

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils
from engine import Engine
from length_groups import length_groups

Ids = npt.NDArray[np.int64]

OUTPUTS = ("label", "score", "probabilities")


class TritonPythonModel:
    """Runs model.onnx over the reviews of all requests of an execution, in groups of like length."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens model.onnx in the version directory and runs it, so that a broken model fails to load."""
        config = json.loads(args["model_config"])
        parameters = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        self._max_group_tokens = int(parameters["max_group_tokens"])
        self._max_padding_percent = float(parameters["max_padding_percent"])
        version_dir = Path(args["model_repository"]) / args["model_version"]
        self._engine = Engine(version_dir / "model.onnx", int(parameters["num_threads"]))
        self._run([np.zeros(length, dtype=np.int64) for length in (8, 16, 16)])
        self._metrics = pb_utils.MetricFamily(  # kept, since its metrics die with it
            name="sentiment_classifier_tokens",
            description="Tokens run by the classifier: those of reviews, and the padding of their groups",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self._review_tokens = self._metrics.Metric(labels={"kind": "review"})
        self._padding_tokens = self._metrics.Metric(labels={"kind": "padding"})

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Returns one response per request: its rows' answers, or its error."""
        rows: list[Ids] = []
        spans: list[slice | str] = []
        for request in requests:
            try:
                request_rows = _rows(request)
            except ValueError as error:
                spans.append(str(error))
            else:
                spans.append(slice(len(rows), len(rows) + len(request_rows)))
                rows.extend(request_rows)
        answers = self._classify(rows)
        return [_error(span) if isinstance(span, str) else _respond(answers[span]) for span in spans]

    def finalize(self) -> None:
        """Lets go of the metrics before the interpreter does, in whose wrong order this process would crash."""
        del self._review_tokens, self._padding_tokens
        del self._metrics

    def _classify(self, rows: Sequence[Ids]) -> list[list[Any] | str]:
        """Returns for each row its outputs, in the order of `OUTPUTS`, or what went wrong with it."""
        answers: list[list[Any] | str] = [""] * len(rows)
        for group in length_groups([len(row) for row in rows], self._max_group_tokens, self._max_padding_percent):
            for index, answer in zip(group, self._answer([rows[index] for index in group]), strict=True):
                answers[index] = answer
        return answers

    def _answer(self, rows: Sequence[Ids]) -> list[list[Any] | str]:
        """Returns the answers of one group; when the group fails its rows run alone, so that only the cause fails."""
        try:
            outputs = self._run(rows)
        except Exception as error:  # whatever it is, it must not reach the group's other rows
            return [str(error)] if len(rows) == 1 else [answer for row in rows for answer in self._answer([row])]
        num_tokens = sum(map(len, rows))
        self._review_tokens.increment(num_tokens)
        self._padding_tokens.increment(len(rows) * max(map(len, rows)) - num_tokens)
        return [list(answer) for answer in zip(*outputs, strict=True)]

    def _run(self, rows: Sequence[Ids]) -> list[npt.NDArray[Any]]:
        """Runs `rows` as one rectangle; the outputs (n, ...) come in the order of `OUTPUTS`."""
        input_ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)  # (n, longest)
        attention_mask = np.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        return self._engine.run(OUTPUTS, {"input_ids": input_ids, "attention_mask": attention_mask})


def _rows(request: pb_utils.InferenceRequest) -> list[Ids]:
    """Returns the ids of each review in `request` without their padding.

    Raises:
        ValueError: the tensors did not come from the tokenizer; only a client that calls this step itself gets here.
    """
    input_ids: Ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()  # (B, T)
    attention_mask: Ids = pb_utils.get_input_tensor_by_name(request, "attention_mask").as_numpy()  # (B, T)
    if input_ids.shape != attention_mask.shape:
        raise ValueError(f"attention_mask has shape {attention_mask.shape}, expected input_ids' {input_ids.shape}")
    lengths = attention_mask.sum(axis=1)
    expected_mask = np.arange(input_ids.shape[1]) < lengths[:, None]  # (B, T)
    if not np.array_equal(attention_mask, expected_mask) or not lengths.all():
        raise ValueError("attention_mask must be ones, at least one in each row, then zeros")
    if (input_ids < 0).any():
        raise ValueError(f"input_ids has {input_ids.min()}, expected ids from 0: send text to the model `sentiment`")
    return [row[:length] for row, length in zip(input_ids, lengths, strict=True)]


def _respond(answers: Sequence[list[Any] | str]) -> pb_utils.InferenceResponse:
    """Returns the answers of one request as its output tensors, or its first row's error."""
    failures = [f"row {index}: {answer}" for index, answer in enumerate(answers) if isinstance(answer, str)]
    if failures:
        return _error(failures[0])
    columns = zip(OUTPUTS, zip(*answers, strict=True), strict=True)
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, np.stack(column)) for name, column in columns])


def _error(message: str) -> pb_utils.InferenceResponse:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
