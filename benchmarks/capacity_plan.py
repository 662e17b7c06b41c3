"""Replicas for a rate, and what happens while one of them is gone or while new ones start: simulated.

Requests are spread at random, so each replica of many has Poisson arrivals of its share. Not modelled: clients that try
again, and a new replica taking over what already waits.
"""

import math
from dataclasses import dataclass

import numpy as np

from benchmarks import capacity_model
from benchmarks.capacity_fit import CapacityError, Fit
from benchmarks.capacity_model import Floats

EVENT_S = 60.0
SURGE = 1.5
"""Times the usual rate."""
_AFTER_S = 30.0
_MAX_DRAIN = 10
"""Times the event's length: how long a queue may take to drain before the simulation ends all the same."""
_MEAN_OF = 1000
"""Requests at least, of a mean latency."""
_REQUESTS = 3_000_000
_REPETITIONS = (3, 400)
_BUCKETS = 40
_MIN_BUCKET_S = 5.0

Points = list[tuple[float, float]]
"""Second and p99 in ms."""


@dataclass(frozen=True)
class Plan:
    """Replicas for a rate, and how the rest fares while some are missing."""

    highest_rate_per_s: float
    """Of one replica within the p99."""
    highest_range_per_s: tuple[float, float]
    """Where that lies when one of the fitted rates is left out."""
    replicas: int
    """For the rate, none missing."""
    replicas_one_failed: int
    """For the rate while one is missing."""
    failure: Points
    """Of the others: one of `replicas_one_failed` is gone at 60 s, noticed `detect_s` later and replaced `startup_s`
    after that."""
    lost: float
    """Requests that the gone one had or was still given."""
    lost_percent: float
    """Of all from its failure until that was noticed."""
    surge: Points
    """Of all: the rate grows by half at 60 s, and the replicas for it answer `startup_s` later."""


def plan(found: Fit, rate_per_s: float, p99_ms: float, startup_s: float, detect_s: float) -> Plan:
    """Returns the replicas for `rate_per_s` within `p99_ms`.

    Raises:
        CapacityError: not even an idle replica keeps the p99.
    """
    highest = capacity_model.highest_rate(found.service, p99_ms, found.lengths)
    if highest <= 0:
        raise CapacityError(f"a replica does not answer within {p99_ms:g} ms even when idle")
    others = [capacity_model.highest_rate(service, p99_ms, found.lengths) for service in found.alternatives]
    replicas = math.ceil(rate_per_s / highest)
    spare = replicas + 1
    usual = rate_per_s / spare
    mean_s = float(np.mean(_simulate(found, usual, usual, 0.0, max(600.0, _MEAN_OF / usual), 0)[1]))
    lost = usual * (detect_s + mean_s)  # still given, and in flight by Little's law
    failure = _scenario(found, usual, usual * spare / replicas, startup_s, detect_s)
    surge = _scenario(found, usual, usual * SURGE, startup_s)
    return Plan(
        highest_rate_per_s=highest,
        highest_range_per_s=(min(highest, *others), max(highest, *others)),
        replicas=replicas,
        replicas_one_failed=spare,
        failure=failure,
        lost=lost,
        lost_percent=100 / spare,
        surge=surge,
    )


def _simulate(
    found: Fit,
    usual_per_s: float,
    meanwhile_per_s: float,
    event_s: float,
    length_s: float,
    seed: int,
    from_s: float = 0.0,
) -> tuple[Floats, Floats]:
    """Returns arrivals and latencies, in seconds, of a replica whose rate is another for `event_s` from `from_s`."""

    def rate_per_s(at_s: Floats) -> Floats:
        return np.where((at_s >= from_s) & (at_s < from_s + event_s), meanwhile_per_s, usual_per_s)

    peak = max(usual_per_s, meanwhile_per_s)
    return capacity_model.simulate(found.service, rate_per_s, peak, length_s, found.lengths, seed)


def _scenario(found: Fit, usual_per_s: float, meanwhile_per_s: float, event_s: float, delay_s: float = 0.0) -> Points:
    """Returns the p99 over time of a replica whose rate is another one for `event_s` from `EVENT_S + delay_s` on,
    until what queued up meanwhile has drained."""
    saturated = found.service.saturated_per_s(float(found.lengths.mean()))
    queued = max(meanwhile_per_s - saturated, 0.0) * event_s
    spare_per_s = saturated - usual_per_s
    drain_s = min(queued / spare_per_s if spare_per_s > 0 else math.inf, _MAX_DRAIN * event_s) if queued else 0.0
    from_s = EVENT_S + delay_s
    length_s = from_s + event_s + drain_s + _AFTER_S
    low, high = _REPETITIONS
    repetitions = min(max(round(_REQUESTS / (usual_per_s * length_s)), low), high)
    runs = [
        _simulate(found, usual_per_s, meanwhile_per_s, event_s, length_s, seed, from_s) for seed in range(repetitions)
    ]
    arrivals, latency_s = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    points = []
    later_s = max(_MIN_BUCKET_S, length_s / _BUCKETS)
    starts_s = np.concatenate([np.arange(0, EVENT_S, _MIN_BUCKET_S), np.arange(EVENT_S, length_s, later_s)])
    for start_s, end_s in zip(starts_s, [*starts_s[1:], length_s], strict=True):
        inside = latency_s[(arrivals >= start_s) & (arrivals < end_s)]
        if inside.size:
            points.append((float(start_s), 1000 * capacity_model.percentile(inside, 99)))
    return points
