"""The highest rate that holds: probes find out where to look, long runs follow where one request in 100 is late."""

import math
from collections.abc import Callable
from typing import NamedTuple

from benchmarks import late_share
from benchmarks.late_share import Trial


class Outcome(NamedTuple):
    """What a run told."""

    held: bool
    trial: Trial


Measure = Callable[[float, float], Outcome | None]
"""Rate in requests a second and duration in seconds in; what the run told out, None if nothing."""
_LOWEST_SHARE = 0.05
_FIRST_SHARE = 0.8
"""Of the saturated throughput: where an open loop with short queues is expected to end up, roughly."""
_PROBE_REQUESTS = 500
"""Of a probe, where it need not last longer than a long run: of 200, two late ones break the limit."""
_MAX_TRIES = 3
"""Of a run that tells nothing, each longer: at low rates a few requests at the edges of its window make it invalid."""
_BRACKET = 1.25
"""Times the rate that held, the one that did not: near enough for long runs. Nearer, one probe tells nothing."""
_LONG_RUNS = 5


def highest_rate(
    measure: Measure, saturated_per_s: float, probe_s: float, long_s: float, precision_percent: float
) -> float | None:
    """Returns the highest rate that held for `long_s`; None if a twentieth of `saturated_per_s` did not, or that is 0.

    Probes of `probe_s`, at low rates longer, bisect between the highest rate that held and the lowest that did not,
    until these are near each other. Each long run is at the rate at which one request of a hundred is late by all runs
    before it, and above what held, towards what did not. If none of them holds, the rate is lowered by
    `precision_percent` until one does. A run that tells nothing is repeated, and a rate at which none of them does
    counts as one that does not hold.
    """
    if not saturated_per_s > 0:
        return None
    trials: list[Trial] = []

    def is_held(rate_per_s: float, duration_s: float) -> bool:
        outcomes = (measure(rate_per_s, times * duration_s) for times in range(1, _MAX_TRIES + 1))
        outcome = next((one for one in outcomes if one is not None), None)
        if outcome is None:
            return False
        trials.append(outcome.trial)
        return outcome.held

    def probe(rate_per_s: float) -> bool:
        return is_held(rate_per_s, max(probe_s, min(long_s, math.ceil(_PROBE_REQUESTS / rate_per_s))))

    step, lowest = 1 + precision_percent / 100, saturated_per_s * _LOWEST_SHARE
    low, high = 0.0, saturated_per_s * step
    rate = saturated_per_s * _FIRST_SHARE
    while high > max(low, lowest) * (_BRACKET if low else step):
        if probe(rate):
            low = rate
        else:
            high = rate
        rate = (low * high) ** 0.5 if low else high / 2
    lowest_tried = low or high / step
    held = 0.0
    for _ in range(_LONG_RUNS if low else 0):
        rate = late_share.rate_at(trials) or held * step or low
        if rate <= held:  # which is not tried again
            rate = (held * high) ** 0.5 if high > held else held * step
        lowest_tried = min(lowest_tried, rate)
        if is_held(rate, long_s):
            held = max(held, rate)
        elif rate > held:
            high = rate
    while not held and lowest_tried / step >= lowest:
        lowest_tried /= step
        if is_held(lowest_tried, long_s):
            held = lowest_tried
    return held or None
