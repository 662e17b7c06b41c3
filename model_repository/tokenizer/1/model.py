"""Served tokenizer: text (B, 1) bytes -> input_ids, attention_mask (B, T) int64, one encode call per execution.

Outcomes per review: UTF-8 with something in it is encoded, cut to the model's length and with control characters
dropped; invalid UTF-8, more than `MAX_REVIEW_BYTES`, or nothing left after cleaning is an INVALID_ARG error that
names the bad rows of its request. Requests merged into the same execution do not see it.
"""

from __future__ import annotations  # the stub adds most names to pb_utils only after this file is imported

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils
from review_text import ReviewEncoder, ReviewError, decode, fixed_widths, pad
from window_metric import WindowMetric

# The encoder's threads would only take cores from the classifier, which needs twenty times as long per review.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MAX_NAMED_ROWS = 10
"""Rows named in one error: gRPC carries the message in headers, and clients refuse more than 8 KiB of those."""
_MAX_NICENESS = 19


class TritonPythonModel:
    """Encodes the reviews of all requests of an execution together and answers each request by itself."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads tokenizer.json from the version directory, and from the configuration how to pad and how nice to be."""
        version_dir = Path(args["model_repository"]) / args["model_version"]
        entries = json.loads(args["model_config"])["parameters"]
        parameters = {name: entry["string_value"] for name, entry in entries.items()}
        os.nice(_niceness(parameters))  # of this thread, which answers, and of those that it starts
        self._encoder = ReviewEncoder(version_dir / "tokenizer.json")
        multiple = parameters.get("pad_to_multiple_of")
        self._widths = fixed_widths(int(multiple), self._encoder.max_length) if multiple else []
        self._metric = WindowMetric()

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Returns one response per request: tokens, or an error that names its bad rows."""
        decoded = [_decode(pb_utils.get_input_tensor_by_name(request, "text").as_numpy()) for request in requests]
        rows = self._encoder.encode([text for texts, _ in decoded for text in texts])
        longest = max(map(len, rows), default=0)
        width = next((width for width in self._widths if width >= longest), None)
        responses, start = [], 0
        for texts, problems in decoded:
            responses.append(self._respond(rows[start : start + len(texts)], problems, width))
            start += len(texts)
        self._metric.note(sum(len(row) == self._encoder.max_length for row in rows))
        return responses

    def finalize(self) -> None:
        """Ends what `initialize` started."""
        self._metric.close()

    def _respond(
        self, rows: Sequence[Sequence[int]], problems: dict[int, str], width: int | None
    ) -> pb_utils.InferenceResponse:
        """Returns the encoded rows of one request, padded to `width` or its longest, or its error."""
        for index, row in enumerate(rows):
            if self._encoder.is_empty(row):
                problems.setdefault(
                    index, "review is empty: nothing to classify is left without tags and control codes"
                )
        if problems:
            named = [f"text[{index}]: {problem}" for index, problem in sorted(problems.items())]
            message = "; ".join(named[:MAX_NAMED_ROWS])
            if len(named) > MAX_NAMED_ROWS:
                message += f"; and {len(named) - MAX_NAMED_ROWS} more"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
        input_ids, attention_mask = pad(rows, width)
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor("input_ids", input_ids), pb_utils.Tensor("attention_mask", attention_mask)]
        )


def _niceness(parameters: Mapping[str, str]) -> int:
    """Returns how far this process stands behind others for a core, as nice(2) has it; by default it does not.

    Raises:
        ValueError: something else than 0 to 19. Less than 0, before others, would take rights that a server lacks.
    """
    value = parameters.get("niceness", "0")
    if not value.isdecimal() or int(value) > _MAX_NICENESS:
        raise ValueError(
            f"niceness {value!r} came in tokenizer/config.pbtxt, expected a whole number from 0 to {_MAX_NICENESS}"
        )
    return int(value)


def _decode(raw_texts: npt.NDArray[np.object_]) -> tuple[list[str], dict[int, str]]:
    """Returns the rows of `raw_texts` (B, 1) as strings, and by row what is wrong with those that became ""."""
    texts: list[str] = []
    problems: dict[int, str] = {}
    for index, raw in enumerate(raw_texts.ravel()):
        try:
            texts.append(decode(raw))
        except ReviewError as error:
            texts.append("")
            problems[index] = str(error)
    return texts, problems
