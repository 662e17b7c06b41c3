"""Served classifier: input_ids, attention_mask (B, T) int64 -> label, score (B, 1), probabilities (B, 2).

One execution holds the requests that Triton merged, each a rectangle of its own width. Their rows lose their padding
and run in groups of one width (`length_groups`), whatever request they came from; each request gets its rows back as
one response when the last of them has run. A bad request fails alone, also when it shares a group with good ones.
"""

from __future__ import annotations  # the stub adds most names to pb_utils only after this file is imported

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils
from core_sharing import Cores
from execution_metrics import Execution, ExecutionMetrics
from runner import OUTPUTS, Ids, Runner

Answer = list[npt.NDArray[Any]]
"""The outputs (1, ...) of one row, in the order of `OUTPUTS`."""


class TritonPythonModel:
    """Runs model.onnx over the reviews of all requests of an execution, in groups of one width."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens model.onnx in the version directory and runs it before any review comes: a broken model fails to load,
        and no review waits for what only a first run does."""
        config = json.loads(args["model_config"])
        parameters = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        model_dir = Path(args["model_repository"])
        model_file = model_dir / args["model_version"] / "model.onnx"
        self._runner = Runner(
            model_file,
            parameters["runtime"],
            int(parameters["max_group_tokens"]),
            int(parameters["num_threads"]),
            int(parameters["num_threads_alone"]),
            _cores(),
        )
        pb_utils.Logger.log_info(f"{args['model_instance_name']} runs {model_file.name} in {self._runner.runtime}")
        self._runner.prepare(json.loads((model_dir / "manifest.json").read_text())["max_length"])  # the tokenizer's
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what the first runs freed: 150 MiB
        self._metrics = ExecutionMetrics()

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse | None]:
        """Answers each request when its last row has run, oldest first.

        What ends with the last group is returned, the rest is sent before: returning costs the server less. Where
        requests were merged the server is busy, so that each instance keeps to its own cores.
        """
        pendings = [_Pending(request) for request in requests]
        rows: list[tuple[Ids, _Pending, int]] = []  # with the request that a row belongs to and its place there
        for pending in pendings:
            request_rows = pending.open()
            rows.extend((row, pending, place) for place, row in enumerate(request_rows))
        lengths = [len(row) for row, _, _ in rows]
        groups = self._runner.groups(lengths)
        for number, (width, group) in enumerate(groups, start=1):
            answers = self._answer([rows[index][0] for index in group], width, may_take_all=len(requests) == 1)
            for index, answer in zip(group, answers, strict=True):
                _, pending, place = rows[index]
                pending.answer(place, answer)
                if number < len(groups):
                    pending.send_if_complete()
        num_run = sum(len(group) * width for width, group in groups)
        on_all_cores = self._runner.take_reviews_on_all_cores()
        self._metrics.note(Execution(sum(lengths), num_run - sum(lengths), len(rows), on_all_cores))
        return [pending.response for pending in pendings]

    def finalize(self) -> None:
        """Ends what `initialize` started."""
        self._metrics.close()

    def _answer(self, rows: Sequence[Ids], width: int, may_take_all: bool) -> Sequence[Answer | str]:
        """Returns the answers of one group; when the group fails its rows run alone, so that only the cause fails."""
        try:
            outputs = self._runner.run(rows, width, may_take_all)
        except Exception as error:  # whatever it is, it must not reach the group's other rows
            if len(rows) == 1:
                return [str(error)]
            return [self._answer([row], width, may_take_all)[0] for row in rows]
        return [[output[index : index + 1] for output in outputs] for index in range(len(rows))]


def _cores() -> Cores | None:
    """Returns the cores of all instances, None where this machine cannot tell which are taken."""
    try:
        return Cores.of_server()
    except OSError as error:
        pb_utils.Logger.log_warn(
            f"each instance keeps to num_threads, since the server's cores cannot be locked: {error}"
        )
        return None


def _rows(request: pb_utils.InferenceRequest) -> list[Ids]:
    """Returns the ids of each review in `request` without their padding.

    Raises:
        ValueError: the tensors did not come from the tokenizer; only a client that calls this step itself gets here.
    """
    input_ids: Ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()  # (B, T)
    attention_mask: Ids = pb_utils.get_input_tensor_by_name(request, "attention_mask").as_numpy()  # (B, T)
    if input_ids.shape != attention_mask.shape:
        raise ValueError(f"attention_mask has shape {attention_mask.shape}, expected input_ids' {input_ids.shape}")
    if attention_mask.size and (attention_mask == 1).all():
        return list(input_ids)  # a lone review has no padding; what else is looked at below costs it 0.1 ms
    lengths = attention_mask.sum(axis=1)
    expected_mask = np.arange(input_ids.shape[1]) < lengths[:, None]  # (B, T)
    if not np.array_equal(attention_mask, expected_mask) or not lengths.all():
        raise ValueError("attention_mask must be ones, at least one in each row, then zeros")
    return [row[:length] for row, length in zip(input_ids, lengths, strict=True)]


class _Pending:
    """A request whose rows are answered one by one, and which is answered once, when all of them are."""

    def __init__(self, request: pb_utils.InferenceRequest) -> None:
        self._request = request
        self._answers: list[Answer | str | None] = []
        self.response: pb_utils.InferenceResponse | None = None
        """The whole answer, once there is one, until it is sent."""

    def open(self) -> list[Ids]:
        """Returns the rows to be answered; none for a bad request, whose response is the error."""
        try:
            rows = _rows(self._request)
        except ValueError as error:
            self.response = _error(str(error))
            return []
        self._answers = [None] * len(rows)
        return rows

    def answer(self, place: int, answer: Answer | str) -> None:
        """Takes the outputs of a row, or what went wrong with it; the last one makes the response."""
        self._answers[place] = answer
        if all(one is not None for one in self._answers):
            self.response = _response([one for one in self._answers if one is not None])

    def send_if_complete(self) -> None:
        """Sends the response if there is one."""
        if self.response is not None:
            sender = self._request.get_response_sender()
            sender.send(self.response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            self.response = None


def _response(answers: Sequence[Answer | str]) -> pb_utils.InferenceResponse:
    """Returns the answers of one request as its output tensors, or its first row's error."""
    failures = [f"row {index}: {answer}" for index, answer in enumerate(answers) if isinstance(answer, str)]
    if failures:
        return _error(failures[0])
    columns = answers[0] if len(answers) == 1 else [np.concatenate(column) for column in zip(*answers, strict=True)]
    named = zip(OUTPUTS, columns, strict=True)
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, column) for name, column in named])


def _error(message: str) -> pb_utils.InferenceResponse:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
