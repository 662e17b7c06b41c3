"""What all users of one load test share: texts, connections, known answers, samples, and the window that counts."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import answers, doors, samples, texts, triton_metrics
from benchmarks.doors import Door, Urls
from benchmarks.profiles import Protocol, TextKind
from benchmarks.samples import OK, Sample
from benchmarks.summary import SAMPLES_SUFFIX
from clients import SentimentError

TIMEOUT_S = 10.0
"""A request without an answer by then is a failure."""
KNOWN_SHARE = 0.25
"""Share of the texts whose answers under load are compared with the answer to the same text alone, at rest."""
LABELS = ("negative", "positive")
"""The contract of the model `sentiment`, in the order of its probabilities."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What is sent, how, where and for how long; benchmarks/locustfile.py explains them."""

    http_url: str = "http://127.0.0.1:8000"
    grpc_url: str = "grpc://127.0.0.1:8001"
    metrics_url: str = "http://127.0.0.1:8002/metrics"
    rate_per_s: float = 10.0
    batch_size: int = 1
    kind: TextKind = "imdb"
    data: Path | None = None
    reviews: int = texts.DEFAULT_COUNT
    seed: int = texts.DEFAULT_SEED
    warmup_s: float = 5.0
    window_s: float = 0.0
    out: str = ""


class LoadTest:
    """One load test; making it asks the known answers, so the service must be at rest and answering.

    Raises:
        SentimentError, OSError, TextError: the service does not answer, or the texts cannot be used.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.urls = Urls(options.http_url, options.grpc_url, options.metrics_url)
        self.reviews = texts.make(options.kind, options.reviews, options.seed, options.data)
        rng = np.random.default_rng(options.seed)
        self._order = rng.permutation(len(self.reviews))
        self._position = 0
        self._doors: dict[Protocol, Door] = {}
        self._samples: list[Sample] = []
        self._origin_s = time.perf_counter()
        self._raw: dict[str, Any] = {}
        num_known = round(KNOWN_SHARE * len(self.reviews))
        ask = self._door("grpc").ask
        alone = {int(i): ask([self.reviews[i]])[0] for i in rng.choice(len(self.reviews), num_known, replace=False)}
        self._known = answers.sure_labels(alone)
        logger.info("%d of %d texts have a known answer", len(self._known), len(self.reviews))

    def ask(self, protocol: Protocol, due_s: float) -> tuple[Sample, Exception | None]:
        """Sends the next reviews, and returns the sample and why it failed, if it did."""
        indices = self._next()
        reviews = [self.reviews[index] for index in indices]
        error: Exception | None = None
        sent_s = time.perf_counter()
        try:
            predictions = self._door(protocol).ask(reviews)
            done_s = time.perf_counter()
            answers.check(predictions, LABELS, [self._known.get(index) for index in indices])
        except (SentimentError, answers.WrongAnswerError, OSError, ValueError) as failure:
            done_s = time.perf_counter()
            error = failure
        sample = Sample(due_s, sent_s, done_s, len(reviews), OK if error is None else type(error).__name__)
        self._samples.append(sample)
        return sample, error

    def _next(self) -> list[int]:
        """Returns the indices of the next reviews, round and round in one shuffled order."""
        start, self._position = self._position, self._position + self.options.batch_size
        return [int(self._order[place % len(self._order)]) for place in range(start, self._position)]

    def _door(self, protocol: Protocol) -> Door:
        if protocol not in self._doors:
            self._doors[protocol] = doors.open_door(protocol, self.urls, TIMEOUT_S)
        return self._doors[protocol]

    def watch_window(self, sleep: Callable[[float], None]) -> None:
        """Notes Triton's counters, the time and this process's CPU time at both ends of the window."""
        sleep(self.options.warmup_s)
        before = triton_metrics.snapshot(self.urls.http, self.urls.metrics)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        sleep(self.options.window_s)
        end_s, end_cpu_s = time.perf_counter(), time.process_time()
        self._raw = {
            "window_s": [start_s - self._origin_s, end_s - self._origin_s],
            "generator": {"cpu_s": end_cpu_s - start_cpu_s, "wall_s": end_s - start_s},
            "triton": {"before": before, "after": triton_metrics.snapshot(self.urls.http, self.urls.metrics)},
            "known_answers": len(self._known),
        }

    def end(self) -> None:
        """Closes the connections; writes samples and window, where `out` says so and the window has passed."""
        for door in self._doors.values():
            door.close()
        if self.options.out and self._raw:
            out = Path(self.options.out)
            out.parent.mkdir(parents=True, exist_ok=True)
            samples.write(out.with_name(out.name + SAMPLES_SUFFIX), self._samples, self._origin_s)
            out.with_name(out.name + ".json").write_text(json.dumps(self._raw, indent=1) + "\n")
