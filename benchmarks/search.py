"""The highest rate that holds: probes narrow it down, then a long run must confirm it."""

import math
from collections.abc import Callable

Holds = Callable[[float, float], bool | None]
"""Rate in requests a second and duration in seconds in; whether the limits held, out, None if it cannot be told."""
_LOWEST_SHARE = 0.05
_FIRST_SHARE = 0.8
"""Of the saturated throughput: where an open loop with short queues is expected to end up, roughly."""
_PROBE_REQUESTS = 500
"""Of a probe, where it need not last longer than the run that confirms: of 200, two late ones break the limit."""
_MAX_TRIES = 3
"""Of a run that tells nothing, each longer: at low rates a few requests at the edges of its window make it invalid."""


def highest_rate(
    holds: Holds, saturated_per_s: float, probe_s: float, confirm_s: float, precision_percent: float
) -> float | None:
    """Returns the highest rate that held for `confirm_s`, None if even a twentieth of `saturated_per_s` did not.

    Probes of `probe_s`, at low rates longer, bisect between the highest rate that held and the lowest that did not,
    until they are within `precision_percent`. The winner is confirmed; while it does not hold, it is lowered by that
    much. A run that tells nothing is repeated, and a rate at which none of them does counts as one that does not hold.
    """

    def is_held(rate_per_s: float, duration_s: float) -> bool:
        tries = (holds(rate_per_s, times * duration_s) for times in range(1, _MAX_TRIES + 1))
        return next((held for held in tries if held is not None), False)

    def probe(rate_per_s: float) -> bool:
        return is_held(rate_per_s, max(probe_s, min(confirm_s, math.ceil(_PROBE_REQUESTS / rate_per_s))))

    step = 1 + precision_percent / 100
    low, high = 0.0, saturated_per_s * step
    rate = saturated_per_s * _FIRST_SHARE
    while high > max(low, saturated_per_s * _LOWEST_SHARE) * step:
        if probe(rate):
            low = rate
        else:
            high = rate
        rate = (low * high) ** 0.5 if low else high / 2
    rate = low or high / step
    while rate >= saturated_per_s * _LOWEST_SHARE:
        if is_held(rate, confirm_s):
            return rate
        rate /= step
    return None
