"""A request of the served classifier on its way: its reviews, and the one response that they make together."""

from __future__ import annotations  # the stub adds most names to pb_utils only after this file is imported

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils
from runner import OUTPUTS, Ids

Answer = list[npt.NDArray[Any]]
"""The outputs (1, ...) of one row, in the order of `OUTPUTS`."""


class Pending:
    """A request whose rows are answered one by one, and which is answered once, when all of them are."""

    def __init__(self, request: pb_utils.InferenceRequest) -> None:
        self._request = request
        self._answers: list[Answer | Exception | None] = []
        self.response: pb_utils.InferenceResponse | None = None
        """The whole answer, once there is one, until it is sent."""

    def open(self) -> list[Ids]:
        """Returns the rows to be answered; none for a bad request, whose response is the error."""
        try:
            rows = _rows(self._request)
        except ValueError as error:
            self.response = _error(str(error), pb_utils.TritonError.INVALID_ARG)
            return []
        self._answers = [None] * len(rows)
        return rows

    def answer(self, place: int, answer: Answer | Exception) -> None:
        """Takes the outputs of a row, or what went wrong with it; the last one makes the response."""
        self._answers[place] = answer
        if all(one is not None for one in self._answers):
            self.response = _response([one for one in self._answers if one is not None])

    def take_response(self) -> pb_utils.InferenceResponse | None:
        """Returns the response, once and if there is one, to whoever sends it."""
        response, self.response = self.response, None
        return response

    def send(self, response: pb_utils.InferenceResponse) -> None:
        """Sends `response`, which ends the request.

        A failure is only logged: raised by `execute` it would have Triton answer what has been answered.
        """
        try:
            self._request.get_response_sender().send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:
            pb_utils.Logger.log_error(f"an answer could not be sent: {error!r}")


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


def _response(answers: Sequence[Answer | Exception]) -> pb_utils.InferenceResponse:
    """Returns the answers of one request as its output tensors, or the error of its first row that has one.

    Only a `ValueError` is the sender's fault: told that a request is invalid, clients look for the bad review in it.
    """
    rows: list[Answer] = []
    for index, answer in enumerate(answers):
        if isinstance(answer, Exception):
            code = pb_utils.TritonError.INVALID_ARG if isinstance(answer, ValueError) else pb_utils.TritonError.INTERNAL
            return _error(f"row {index}: {answer}", code)
        rows.append(answer)
    columns = rows[0] if len(rows) == 1 else [np.concatenate(column) for column in zip(*rows, strict=True)]
    named = zip(OUTPUTS, columns, strict=True)
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, column) for name, column in named])


def _error(message: str, code: int) -> pb_utils.InferenceResponse:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
