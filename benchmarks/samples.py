"""Raw samples of a load test: one row for each request, in a small compressed file.

Percentiles come from these and not from Locust's own statistics, which round times from 100 ms on to 10 ms.
"""

import csv
import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

OK = "ok"
SAMPLES_SUFFIX = ".csv.gz"
"""Of the samples' file; what was measured is described in NAME.json beside it."""
_COLUMNS = ("scheduled_us", "sent_us", "done_us", "reviews", "outcome", "text")
_OLDER_COLUMNS = _COLUMNS[:-1]
UNKNOWN = -1
"""In place of a text that is not known."""


class Sample(NamedTuple):
    """One request; times are in seconds on any one clock."""

    scheduled_s: float
    """When the request was due: an open loop's arrival, or the moment a closed loop's user was free."""
    sent_s: float
    done_s: float
    reviews: int
    outcome: str
    """`ok`, or the name of the failure."""
    text: int = UNKNOWN
    """Which one of the load test's texts was the first review. perf_analyzer does not say."""


@dataclass(frozen=True)
class Samples:
    """Columns over n requests, times in seconds from the start of the file, ordered by `scheduled_s`."""

    scheduled_s: npt.NDArray[np.float64]
    sent_s: npt.NDArray[np.float64]
    done_s: npt.NDArray[np.float64]
    reviews: npt.NDArray[np.int64]
    outcomes: Sequence[str]
    texts: npt.NDArray[np.int64]
    """`Sample.text`; all unknown in files from before it was kept."""

    @property
    def latency_s(self) -> npt.NDArray[np.float64]:
        """From due to answered: time lost by a generator that is late counts, so nothing is hidden by omission."""
        return self.done_s - self.scheduled_s

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """Which requests were answered rightly."""
        return np.array([outcome == OK for outcome in self.outcomes], dtype=np.bool_)

    def due_between(self, start_s: float, end_s: float) -> "Samples":
        """Returns the samples of requests that were due in [start_s, end_s)."""
        due = (self.scheduled_s >= start_s) & (self.scheduled_s < end_s)
        outcomes = [outcome for outcome, is_due in zip(self.outcomes, due, strict=True) if is_due]
        times = (self.scheduled_s[due], self.sent_s[due], self.done_s[due])
        return Samples(*times, self.reviews[due], outcomes, self.texts[due])


def write(path: Path, samples: Sequence[Sample], origin_s: float) -> None:
    """Writes `samples` to `path` (.csv.gz), times in whole microseconds from `origin_s`.

    The same samples give the same bytes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for sample in sorted(samples):
        times = (sample.scheduled_s, sample.sent_s, sample.done_s)
        microseconds = (round((time - origin_s) * 1e6) for time in times)
        writer.writerow([*microseconds, sample.reviews, sample.outcome, sample.text])
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def read(path: Path) -> Samples:
    """Returns what `write` wrote.

    Raises:
        ValueError: other columns than expected; the message names the file.
    """
    rows = list(csv.reader(io.StringIO(gzip.decompress(path.read_bytes()).decode())))
    header = tuple(rows[0]) if rows else ()
    if header not in (_COLUMNS, _OLDER_COLUMNS):
        raise ValueError(f"{path}: columns are {list(header)}, expected {list(_COLUMNS)}")
    columns = list(zip(*rows[1:], strict=True)) or [()] * len(header)
    times = [np.array(column, dtype=np.float64) / 1e6 for column in columns[:3]]
    reviews = np.array(columns[3], dtype=np.int64)
    texts = np.array(columns[5], dtype=np.int64) if header == _COLUMNS else np.full_like(reviews, UNKNOWN)
    return Samples(times[0], times[1], times[2], reviews, columns[4], texts)
