"""The highest rate that holds: probes narrow it down, then a long run must confirm it."""

from collections.abc import Callable

Holds = Callable[[float, float], bool]
"""Rate in requests a second and duration in seconds in; whether the limits held, out."""
_LOWEST_SHARE = 0.05
_FIRST_SHARE = 0.8
"""Of the saturated throughput: where an open loop with short queues is expected to end up, roughly."""


def highest_rate(
    holds: Holds, saturated_per_s: float, probe_s: float, confirm_s: float, precision_percent: float
) -> float | None:
    """Returns the highest rate that held for `confirm_s`, None if even a twentieth of `saturated_per_s` did not.

    Probes of `probe_s` bisect between the highest rate that held and the lowest that did not, until they are within
    `precision_percent`. The winner is confirmed; while it does not hold, it is lowered by that much.
    """
    step = 1 + precision_percent / 100
    low, high = 0.0, saturated_per_s * step
    rate = saturated_per_s * _FIRST_SHARE
    while high > max(low, saturated_per_s * _LOWEST_SHARE) * step:
        if holds(rate, probe_s):
            low = rate
        else:
            high = rate
        rate = (low * high) ** 0.5 if low else high / 2
    rate = low or high / step
    while rate >= saturated_per_s * _LOWEST_SHARE:
        if holds(rate, confirm_s):
            return rate
        rate /= step
    return None
