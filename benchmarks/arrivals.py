"""When the requests of an open loop are due: Poisson arrivals, alike for Locust and perf_analyzer under the same load.

In each window there are exactly as many as the rate says, anywhere in it with the same probability: what Poisson
arrivals are, given their number. So a stated rate is the rate that comes. Another load has other arrivals: runs that
shared theirs, stretched to their rates, would all have the same bursts, and together tell no more about them than one.
What comes before the window is drawn apart, so that it may differ.
"""

import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile

import numpy as np

from benchmarks.profiles import Load

_US_PER_S = 1e6


def window_s(load: Load, seed: int) -> Iterator[float]:
    """Yields the seconds from the window's start to each arrival of the open loop `load`, window after window."""
    return poisson_s(load.level, load.duration_s, [seed, zlib.crc32(repr(load.sent).encode())])


def warmup_s(load: Load, seed: int) -> list[float]:
    """Returns the seconds from the start to each arrival before the window."""
    if not load.warmup_s:
        return []
    return list(takewhile(lambda due_s: due_s < load.warmup_s, poisson_s(load.level, load.warmup_s, [seed])))


def intervals_us(load: Load, seed: int, length_s: float) -> list[int]:
    """Returns the microseconds from each arrival of the window to the next, from its start on, for `length_s`."""
    due_us = [round(due_s * _US_PER_S) for due_s in takewhile(lambda due_s: due_s < length_s, window_s(load, seed))]
    return [due - before for before, due in pairwise([0, *due_us])]


def poisson_s(rate_per_s: float, length_s: float, seed: Sequence[int]) -> Iterator[float]:
    """Yields Poisson arrivals in seconds, without end: as many in each `length_s` as the rate says."""
    random = np.random.default_rng(seed)
    count = max(1, round(rate_per_s * length_s))
    start_s = 0.0
    while True:
        yield from (start_s + np.sort(random.uniform(0, length_s, count))).tolist()
        start_s += length_s
