"""The tokenizer's own metric on the metrics port: reviews that fill the model's window, nearly all truncated."""

from __future__ import annotations  # the stub adds most names to pb_utils only after this file is imported

import queue
import threading

import triton_python_backend_utils as pb_utils

REPORT_INTERVAL_S = 0.25


class WindowMetric:
    """Counts from a thread of its own: each call waits for the server, and no answer may wait for it.

    The classifier's metrics do likewise; they share no code because Triton gives a model only its own folder to import.
    """

    def __init__(self) -> None:
        """Adds the counter to the server's metrics and starts the thread, which `close` ends."""
        self._family = pb_utils.MetricFamily(  # kept, since its metrics die with it
            name="sentiment_reviews_filling_window",
            description="Reviews whose tokens fill the model's window: nearly all of them were truncated",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self._reviews = self._family.Metric()
        self._counts: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._report_until_closed, name="metric", daemon=True)
        self._thread.start()

    def note(self, num_reviews: int) -> None:
        """Takes the reviews of an execution; the server has them after `REPORT_INTERVAL_S` or so."""
        if num_reviews:
            self._counts.put(num_reviews)

    def close(self) -> None:
        """Ends the thread and lets go of the metric; left to the interpreter, their order would crash this process."""
        self._closing.set()
        self._thread.join()
        del self._reviews, self._family

    def _report_until_closed(self) -> None:
        while not self._closing.wait(REPORT_INTERVAL_S):
            counts = [self._counts.get() for _ in range(self._counts.qsize())]
            if not counts:
                continue
            try:
                self._reviews.increment(sum(counts))
            except Exception as error:  # as for want of shared memory: these are lost, later ones are counted
                pb_utils.Logger.log_error(f"the metric of {sum(counts)} reviews is lost: {error!r}")
