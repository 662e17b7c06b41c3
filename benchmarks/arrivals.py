"""When the requests of an open loop are due: Poisson arrivals, alike for Locust and perf_analyzer under the same load.

In each window there are exactly as many as the rate says, anywhere in it with the same probability: what Poisson
arrivals are, given their number. So a stated rate is the rate that comes. Another load has other arrivals: runs that
shared theirs, stretched to their rates, would all have the same bursts, and together tell no more about them than one.
What comes before the window is drawn apart, so that its length may differ.
"""

import itertools
import zlib
from collections.abc import Iterator
from itertools import pairwise, takewhile

import numpy as np

from benchmarks.profiles import Load

_US_PER_S = 1e6


def window_s(load: Load, seed: int) -> Iterator[float]:
    """Yields the seconds from the window's start to each arrival of the open loop `load`, window after window."""
    random = np.random.default_rng(_entropy(load, seed))
    for number in itertools.count():
        start_s = number * load.duration_s
        yield from (start_s + due_s for due_s in poisson_s(load.level, load.duration_s, random))


def warmup_s(load: Load, seed: int) -> list[float]:
    """Returns the seconds from the start to each arrival before the window."""
    return poisson_s(load.level, load.warmup_s, np.random.default_rng([*_entropy(load, seed), 1]))


def intervals_us(load: Load, seed: int, length_s: float) -> list[int]:
    """Returns the microseconds from each arrival of the window to the next, from its start on, for `length_s`."""
    due_us = [round(due_s * _US_PER_S) for due_s in takewhile(lambda due_s: due_s < length_s, window_s(load, seed))]
    return [due - before for before, due in pairwise([0, *due_us])]


def poisson_s(rate_per_s: float, length_s: float, random: np.random.Generator) -> list[float]:
    """Returns the arrivals within `length_s`, in seconds from its start, as many as the rate says."""
    arrivals_s: list[float] = np.sort(random.uniform(0, length_s, round(rate_per_s * length_s))).tolist()
    return arrivals_s


def _entropy(load: Load, seed: int) -> list[int]:
    return [seed, zlib.crc32(repr(load.sent).encode())]
