"""When the requests of an open loop are due: Poisson arrivals, alike for Locust and perf_analyzer under the same load.

Another load has other arrivals: runs that shared theirs, stretched to their rates, would all have the same bursts, and
together tell no more about them than one. What comes before the window is drawn apart, so that it may differ.
"""

import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile

import numpy as np

from benchmarks.profiles import Load

_US_PER_S = 1e6


def window_s(load: Load, seed: int) -> Iterator[float]:
    """Yields, without end, the seconds from the window's start to each arrival of the open loop `load`."""
    sent = (load.protocol, load.texts, load.batch_size, load.level, load.duration_s)
    return _poisson_s(load.level, [seed, zlib.crc32(repr(sent).encode())])


def warmup_s(load: Load, seed: int) -> list[float]:
    """Returns the seconds from the start to each arrival before the window."""
    return list(takewhile(lambda due_s: due_s < load.warmup_s, _poisson_s(load.level, [seed])))


def intervals_us(load: Load, seed: int, length_s: float) -> list[int]:
    """Returns the microseconds from each arrival of the window to the next, from its start on, for `length_s`."""
    due_us = [round(due_s * _US_PER_S) for due_s in takewhile(lambda due_s: due_s < length_s, window_s(load, seed))]
    return [due - before for before, due in pairwise([0, *due_us])]


def _poisson_s(rate_per_s: float, seed: Sequence[int]) -> Iterator[float]:
    random = np.random.default_rng(seed)
    due_s = 0.0
    while True:
        due_s += random.exponential(1 / rate_per_s)
        yield due_s
