"""The classifier's own metrics on the metrics port: tokens run, the padding among them, batch sizes, cores used."""

from __future__ import annotations  # the stub adds most names to pb_utils only after this file is imported

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import triton_python_backend_utils as pb_utils
from crew import CORES

BATCH_BUCKETS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
"""Reviews: the upper bounds of the histogram of merged executions."""
REPORT_INTERVAL_S = 0.25


class Execution(NamedTuple):
    """What one execution ran."""

    review_tokens: int
    padding_tokens: int
    reviews: int
    reviews_on: Mapping[str, int]
    """Of them, those that ran on each of `crew.CORES`."""


class ExecutionMetrics:
    """Reports from a thread of its own: each call waits for the server, and no answer may wait for it."""

    def __init__(self) -> None:
        """Adds the metrics to the server's and starts the thread, which `close` ends."""
        self._token_family = pb_utils.MetricFamily(  # kept, since its metrics die with it
            name="sentiment_classifier_tokens",
            description="Tokens run by the classifier: those of reviews, and the padding of their groups",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self._review_tokens = self._token_family.Metric(labels={"kind": "review"})
        self._padding_tokens = self._token_family.Metric(labels={"kind": "padding"})
        self._batch_family = pb_utils.MetricFamily(
            name="sentiment_classifier_batch_reviews",
            description="Reviews merged into one execution of the classifier",
            kind=pb_utils.MetricFamily.HISTOGRAM,
        )
        self._batch_reviews = self._batch_family.Metric(buckets=BATCH_BUCKETS)
        self._review_family = pb_utils.MetricFamily(
            name="sentiment_classifier_reviews",
            description="Reviews run by the classifier on an instance's own cores, on lent ones, or alone on all",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self._reviews_on = {cores: self._review_family.Metric(labels={"cores": cores}) for cores in CORES}
        self._executions: queue.SimpleQueue[Execution] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._report_until_closed, name="metrics", daemon=True)
        self._thread.start()

    def note(self, execution: Execution) -> None:
        """Takes what an execution ran; the server has it within `REPORT_INTERVAL_S` and the time of the calls."""
        self._executions.put(execution)

    def close(self) -> None:
        """Ends the thread and lets go of the metrics; left to the interpreter, their order would crash this process."""
        self._closing.set()
        self._thread.join()
        del self._review_tokens, self._padding_tokens, self._batch_reviews, self._reviews_on
        del self._token_family, self._batch_family, self._review_family

    def _report_until_closed(self) -> None:
        while not self._closing.wait(REPORT_INTERVAL_S):
            executions = [self._executions.get() for _ in range(self._executions.qsize())]
            if not executions:
                continue
            try:
                self._report(executions)
            except Exception as error:  # as for want of shared memory: these are lost, later ones are counted
                pb_utils.Logger.log_error(f"metrics of {len(executions)} executions are lost: {error!r}")

    def _report(self, executions: Sequence[Execution]) -> None:
        self._review_tokens.increment(sum(execution.review_tokens for execution in executions))
        self._padding_tokens.increment(sum(execution.padding_tokens for execution in executions))
        for cores, counter in self._reviews_on.items():
            counter.increment(sum(execution.reviews_on.get(cores, 0) for execution in executions))
        for execution in executions:
            self._batch_reviews.observe(execution.reviews)
