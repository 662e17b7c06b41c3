"""What all users of one load test share: texts, connections, known answers, samples, and the window that counts."""

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks import answers, arrivals, doors, samples, texts, triton_metrics
from benchmarks.doors import Door, Urls
from benchmarks.profiles import Load, Protocol, TextKind
from benchmarks.samples import OK, SAMPLES_SUFFIX, Sample
from benchmarks.texts import TextSource

TIMEOUT_S = 10.0
"""A request without an answer by then is a failure."""
_ENDLESS_S = 60.0
_AT_ONCE = 100
"""For so long, or so many, arrivals are drawn at once where the window has no end."""
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
    source: TextSource = field(default_factory=TextSource)
    known: Path | None = None
    """Known answers to these texts (answers.write_known), None to find them out."""
    warmup_s: float = 5.0
    window_s: float = 0.0
    """0 is until stopped."""
    out: str = ""

    def load(self, protocol: Protocol, loop: Literal["open", "closed"], level: float) -> Load:
        """Returns the load that these options amount to; raises ValueError for what is none."""
        return Load(
            tool="locust",
            protocol=protocol,
            loop=loop,
            level=level,
            texts=self.kind,
            batch_size=self.batch_size,
            warmup_s=self.warmup_s,
            duration_s=self.window_s or max(_ENDLESS_S, _AT_ONCE / level if level > 0 else 0),
        )


class InFlight:
    """Requests that are due and have not ended, counted as both happen: whatever becomes of their samples, and of
    those that never end."""

    def __init__(self) -> None:
        self.count = 0
        self._since_s = 0.0
        """Sum of the times at which they became due, less what is over."""

    def due(self, at_s: float) -> None:
        """One more, due at `at_s`."""
        self.count += 1
        self._since_s += at_s

    def ended(self, at_s: float) -> None:
        """One fewer since `at_s`."""
        self.count -= 1
        self._since_s -= at_s

    def integral_s(self, now_s: float) -> float:
        """Returns the time that all of them have been in flight together, up to `now_s`."""
        return self.count * now_s - self._since_s


@functools.cache
def _reviews(kind: TextKind, source: TextSource) -> list[str]:
    """Returns these texts, which take seconds to make, made once a process."""
    return texts.make(kind, source.reviews, source.seed, source.data)


@functools.cache
def known_answers(kind: TextKind, source: TextSource) -> Mapping[str, str]:
    """Returns the known labels of these texts (answers.known_labels), found out once a process.

    Raises:
        OSError, TextError: this checkout has no model, or the texts cannot be used.
    """
    reviews = _reviews(kind, source)
    logger.info("finding out known answers with the model of this checkout ...")
    known = answers.known_labels(reviews, source.seed)
    logger.info("%d of %d texts have a known answer", len(known), len(reviews))
    return known


class LoadTest:
    """One load test.

    Raises:
        OSError, TextError: there are no known answers, or the texts cannot be used.
    """

    def __init__(self, options: Options, load: Load | None = None) -> None:
        """`load` is what `options` amount to, for the raw files."""
        self.options, self._load = options, load
        self.urls = Urls(options.http_url, options.grpc_url, options.metrics_url)
        texts_of = (options.kind, options.source)
        self.reviews = _reviews(*texts_of)
        self._labels = answers.model_labels()
        self._known = answers.read_known(options.known) if options.known else known_answers(*texts_of)
        self._order = texts.mixed_order([len(review) for review in self.reviews], options.source.seed)
        self._position = 0
        self._doors: dict[Protocol, Door] = {}
        self._samples: list[Sample] = []
        self._first_wrong = ""
        self._in_flight = InFlight()
        self.start_s = time.perf_counter()
        """When the warm-up begins."""
        self._raw: dict[str, Any] = {}

    def arrivals_s(self, protocol: Protocol) -> Iterator[float]:
        """Yields, without end, when the requests of an open loop are due (time.perf_counter).

        The first review of the window is the first in order, whatever the warm-up, as perf_analyzer has it.
        """
        options, load = self.options, self.options.load(protocol, "open", self.options.rate_per_s)
        before_s = arrivals.warmup_s(load, options.source.seed)
        self._position = -len(before_s) * options.batch_size
        for due_s in before_s:
            yield self.start_s + due_s
        for due_s in arrivals.window_s(load, options.source.seed):
            yield self.start_s + options.warmup_s + due_s

    def due(self, due_s: float) -> None:
        """Counts a request that is due at `due_s` (time.perf_counter); `ask` with the same time must follow."""
        self._in_flight.due(due_s)

    def ask(self, protocol: Protocol, due_s: float) -> tuple[Sample, Exception | None]:
        """Sends the next reviews, and returns the sample and why it failed, if it did."""
        places = self._next()
        reviews = [self.reviews[place] for place in places]
        error: Exception | None = None
        sent_s = time.perf_counter()
        try:
            predictions = self._door(protocol).ask(reviews)
            done_s = time.perf_counter()
            answers.check(predictions, self._labels, [self._known.get(review) for review in reviews])
        except Exception as failure:  # whatever the service does under load is a failure of that request
            done_s = time.perf_counter()
            error = failure
        if isinstance(error, answers.WrongAnswerError):
            self._first_wrong = self._first_wrong or str(error)
        outcome = OK if error is None else type(error).__name__
        sample = Sample(due_s, sent_s, done_s, len(reviews), outcome, places[0])
        self._samples.append(sample)
        self._in_flight.ended(done_s)
        return sample, error

    def _next(self) -> list[int]:
        """Returns which reviews are next, round and round in one shuffled order."""
        start, self._position = self._position, self._position + self.options.batch_size
        return [self._order[position % len(self._order)] for position in range(start, self._position)]

    def _door(self, protocol: Protocol) -> Door:
        if protocol not in self._doors:
            self._doors[protocol] = doors.open_door(protocol, self.urls, TIMEOUT_S)
        return self._doors[protocol]

    def watch_window(self, sleep: Callable[[float], None]) -> None:
        """Notes Triton's counters, this process's CPU time and what is in flight at both ends of the window.

        Without `out`, for which nothing is noted, it only waits for the end.

        Raises:
            OSError: Triton's counters cannot be read.
        """
        if not self.options.out:
            self._sleep_until(self.options.warmup_s + self.options.window_s, sleep)
            return
        window_s = [self.options.warmup_s, self.options.warmup_s + self.options.window_s]
        self._sleep_until(window_s[0], sleep)
        start_s, start_cpu_s, start_in_flight_s = self._now()
        before = triton_metrics.snapshot(self.urls.http, self.urls.metrics)
        self._sleep_until(window_s[1], sleep)
        end_s, end_cpu_s, end_in_flight_s = self._now()
        self._raw = {
            "window_s": window_s,
            "in_flight": (end_in_flight_s - start_in_flight_s) / max(end_s - start_s, 1e-9),
            "generator": {"cpu_s": end_cpu_s - start_cpu_s, "wall_s": end_s - start_s},
            "triton": {"before": before, "after": triton_metrics.snapshot(self.urls.http, self.urls.metrics)},
            "known_answers": sum(review in self._known for review in self.reviews),
            "load": self._load.model_dump() if self._load else None,
            "gate": False,
        }

    def _sleep_until(self, elapsed_s: float, sleep: Callable[[float], None]) -> None:
        sleep(max(0.0, self.start_s + elapsed_s - time.perf_counter()))

    def _now(self) -> tuple[float, float, float]:
        """Returns the time, this process's CPU time and the time that requests have been in flight, in seconds."""
        now_s = time.perf_counter()
        return now_s, time.process_time(), self._in_flight.integral_s(now_s)

    def end(self) -> None:
        """Closes the connections; writes samples and window, where `out` says so and the window has passed."""
        for door in self._doors.values():
            door.close()
        if not self.options.out:
            return
        if not self._raw:
            logger.warning("stopped before the window had passed: %s.json is not written", self.options.out)
            return
        self._raw["first_wrong_answer"] = self._first_wrong
        out = Path(self.options.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        samples.write(out.with_name(out.name + SAMPLES_SUFFIX), self._samples, self.start_s)
        out.with_name(out.name + ".json").write_text(json.dumps(self._raw, indent=1) + "\n")
