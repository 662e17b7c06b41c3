"""Served classifier: input_ids, attention_mask (B, T) int64 -> label, score (B, 1), probabilities (B, 2).

One execution holds the requests that Triton merged, each a rectangle of its own width. Their rows lose their padding
and run in groups of one width (`length_groups`), whatever request they came from; each request gets its rows back as
one response when the last of them has run. A bad request fails alone, also when it shares a group with good ones.
"""

from __future__ import annotations  # the stub adds most names to pb_utils only after this file is imported

import ctypes
import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from core_sharing import Cores
from execution_metrics import Execution, ExecutionMetrics
from length_groups import max_merged
from pending import Answer, Pending
from runner import Ids, Runner


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
            _cores(config, args["model_instance_name"]),
        )
        pb_utils.Logger.log_info(f"{args['model_instance_name']} runs {model_file.name} in {self._runner.runtime}")
        self._max_merged = max_merged(config)
        self._runner.prepare(json.loads((model_dir / "manifest.json").read_text())["max_length"])  # the tokenizer's
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what the first runs freed: 150 MiB
        self._metrics = ExecutionMetrics()

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse | None]:
        """Answers each request when its last row has run, oldest first.

        What ends with the last group is returned, the rest is sent before: returning costs the server less.
        """
        execution = _Execution(requests, self._runner)
        execution.run(self._max_merged)
        self._metrics.note(execution.counted())
        return [pending.take_response() for pending in execution.pendings]

    def finalize(self) -> None:
        """Ends what `initialize` started."""
        self._metrics.close()


class _Execution:
    """The requests that Triton merged, their rows, and the groups that these run in."""

    def __init__(self, requests: Sequence[pb_utils.InferenceRequest], runner: Runner) -> None:
        self._runner = runner
        self.pendings = [Pending(request) for request in requests]
        self._rows: list[tuple[Ids, Pending, int]] = []  # with the request that a row belongs to and its place there
        for pending in self.pendings:
            self._rows.extend((row, pending, place) for place, row in enumerate(pending.open()))
        self._groups = runner.groups([len(row) for row, _, _ in self._rows])
        self._answering = threading.Lock()
        self._num_unanswered = len(self._groups)
        self._num_on: Counter[str] = Counter()

    def run(self, max_merged: int) -> None:
        """Runs all groups, and sends what is complete before the last of them has run.

        Fewer reviews than `max_merged`, which Triton merges at most, were all that waited: what comes later is younger,
        and has no older claim to the next core that comes free.
        """
        is_alone, is_busy = len(self.pendings) == len(self._rows) == 1, len(self._rows) >= max_merged
        self._runner.each(len(self._groups), is_alone, is_busy, self._infer, self._answer)

    def counted(self) -> Execution:
        """Returns what ran."""
        num_real = sum(len(row) for row, _, _ in self._rows)
        num_run = sum(len(group) * width for width, group in self._groups)
        return Execution(num_real, num_run - num_real, len(self._rows), self._num_on)

    def _infer(self, number: int, whose: str) -> tuple[str, Sequence[Answer | Exception]]:
        width, group = self._groups[number]
        return whose, self._outcomes([self._rows[index][0] for index in group], width, whose)

    def _outcomes(self, rows: Sequence[Ids], width: int, whose: str) -> Sequence[Answer | Exception]:
        """Returns the answers of one group; when the group fails its rows run alone, so that only the cause fails."""
        try:
            outputs = self._runner.run(rows, width, whose)
        except Exception as error:  # whatever it is, it must not reach the group's other rows
            if len(rows) == 1:
                if not isinstance(error, ValueError):  # no fault of the review
                    pb_utils.Logger.log_error(f"a review of {len(rows[0])} tokens failed: {error!r}")
                return [error]
            return [self._outcomes([row], width, whose)[0] for row in rows]
        return [[output[index : index + 1] for output in outputs] for index in range(len(rows))]

    def _answer(self, number: int, ran: tuple[str, Sequence[Answer | Exception]]) -> None:
        """Takes what a group's rows came to; of several threads one at a time, but for the sending."""
        (whose, outcomes), (_, group) = ran, self._groups[number]
        answered = [self._rows[index] for index in group]
        with self._answering:
            self._num_on[whose] += len(group)
            for (_, pending, place), outcome in zip(answered, outcomes, strict=True):
                pending.answer(place, outcome)
            self._num_unanswered -= 1
            if not self._num_unanswered:
                return  # these are returned
            complete = [(pending, pending.take_response()) for _, pending, _ in answered]
        for pending, response in complete:
            if response is not None:
                pending.send(response)


def _cores(config: Mapping[str, Any], instance_name: str) -> Cores | None:
    """Returns the cores of all instances, None where this machine cannot tell which are taken."""
    names = [f"{group['name']}_{number}" for group in config["instance_group"] for number in range(int(group["count"]))]
    try:
        return Cores.of_server(names.index(instance_name), len(names))
    except (OSError, ValueError) as error:
        pb_utils.Logger.log_warn(f"each instance keeps to its own cores, since the server's cannot be locked: {error}")
        return None
