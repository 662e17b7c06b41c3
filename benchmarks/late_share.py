"""At which rate is one request of a hundred late? From all open loops together.

The p99 of a minute at ten requests a second is its sixth latest request, and late ones come in bursts: whether one run
keeps a limit says little about the rates next to it. Together the runs say more. The log-odds of being late are taken
to be linear in the rate, and to differ from run to run beyond chance, as the machine's speed does: logistic regression
with extra-binomial variation (D. A. Williams, Appl. Statist. 31, 1982, model III). The interval is that of a bootstrap
over slices of the runs (B. Efron, Ann. Stat. 7, 1979), so that a burst counts as one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.profiles import Profiles
from benchmarks.summary import Summary, due_in_window

Floats = npt.NDArray[np.float64]
SHARE = 0.01
"""Of the requests may be late: what the p99 of right answers and at most 1 % of failures come to."""
_SLICE_S = 5.0
"""Longer than a burst of late requests, shorter than any run."""
_EXTRA_VARIANCE = 0.2
"""Of the log-odds of being late, from run to run. Chosen: with 0.05 simulated searches came as near to the truth."""
_MAX_STEPS = 50
_MOST_LOG_ODDS = 12.0
_RESAMPLES = 200
_PERCENTILES = (5, 95)
"""Of the resamples: they hold slices of the runs that were made, no other runs, so that the truth is in between less
often than nine times of ten."""


@dataclass(frozen=True)
class Trial:
    """One open loop: requests and late ones, failures among them, of each few seconds of its window."""

    rate_per_s: float
    """Offered."""
    requests: Sequence[int]
    late: Sequence[int]


class Crossing(NamedTuple):
    """Where the share of late requests passes `SHARE`, in requests a second, and how far that may be off."""

    rate_per_s: float
    low_per_s: float
    high_per_s: float


def trial(summary: Summary, folder: Path, limit_ms: float) -> Trial:
    """Returns the open loop `summary` of `folder`'s results; late is what took longer than `limit_ms`, or failed."""
    due, start_s = due_in_window(summary, folder)
    is_late = ~due.ok | (due.latency_s * 1000 > limit_ms)
    slices = ((due.scheduled_s - start_s) // _SLICE_S).astype(int)
    count = max(1, round(summary.window_s / _SLICE_S))
    slices = np.minimum(slices, count - 1)  # windows of older runs are milliseconds longer
    requests = np.bincount(slices, minlength=count)
    late = np.bincount(slices, weights=is_late, minlength=count).astype(int)
    return Trial(summary.offered_per_s, requests.tolist(), late.tolist())


def rate_at(trials: Sequence[Trial]) -> float | None:
    """Returns the rate at which `SHARE` is late; None if no rate has less, or none more."""
    return _crossing([(run.rate_per_s, sum(run.requests), sum(run.late)) for run in trials])


def crossing(trials: Sequence[Trial]) -> Crossing | None:
    """Returns `rate_at` with its interval; the same trials in any order give the same."""
    ordered = sorted(trials, key=lambda run: (run.rate_per_s, *run.requests, *run.late))
    rate = rate_at(ordered)
    if rate is None:
        return None
    random = np.random.default_rng(0)
    counts = [(run.rate_per_s, np.array([run.requests, run.late])) for run in ordered]
    found = []
    for _ in range(_RESAMPLES):
        drawn = [(r, *c[:, random.integers(c.shape[1], size=c.shape[1])].sum(axis=1).tolist()) for r, c in counts]
        found.append(_crossing(drawn))
    low, high = np.percentile([one for one in found if one is not None] or [rate], _PERCENTILES).tolist()
    return Crossing(rate, min(low, rate), max(high, rate))


def of_open_loops(summaries: Sequence[Summary], folder: Path, rules: Profiles) -> Crossing | None:
    """Returns the crossing of Locust's open loops among `summaries` of `folder`, which should be of one kind.

    Those in no steady state count too, if the generator did its part: most of them have many late, and without them the
    rate would be too high.
    """
    runs = [s for s in summaries if (s.load.tool, s.load.loop) == ("locust", "open")]
    runs = [run for run in runs if not run.generator_failed(rules.validity)]
    return crossing([trial(run, folder, rules.limits.p99_ms) for run in runs])


def sentence(found: Crossing | None) -> str:
    """Returns what a crossing says, for people."""
    if found is None:
        return "no rate with fewer than 1 % late and one with more, by all open loops together"
    return (
        f"1 % late at {found.rate_per_s:.1f} requests/s by all open loops together "
        f"({found.low_per_s:.1f} to {found.high_per_s:.1f})"
    )


def _crossing(runs: Sequence[tuple[float, int, int]]) -> float | None:
    """Returns where `runs`, each a rate, requests and late ones of them, pass `SHARE`: between the rates tried."""
    rates, requests, late = np.array([run for run in runs if run[1]], dtype=np.float64).reshape(-1, 3).T
    is_below = late <= SHARE * requests
    if is_below.all() or not is_below.any():
        return None
    origin = float(rates.mean())
    constant, slope = _fit(np.stack([np.ones_like(rates), rates - origin], 1), requests, late).tolist()
    if not slope > 0:  # few runs, close to each other
        return origin
    rate = origin + (math.log(SHARE / (1 - SHARE)) - constant) / slope
    return float(np.clip(rate, rates.min(), rates.max()))


def _fit(columns: Floats, requests: Floats, late: Floats) -> Floats:
    """Returns the coefficients of `columns` (runs, 2), by reweighted least squares."""
    shares = late / requests
    log_odds = np.log((late + 0.5) / (requests - late + 0.5))
    found = np.zeros(columns.shape[1])
    for _ in range(_MAX_STEPS):
        odds = np.clip(log_odds, -_MOST_LOG_ODDS, _MOST_LOG_ODDS)
        fitted = 1 / (1 + np.exp(-odds))
        spread = fitted * (1 - fitted)
        weights = requests * spread / (1 + _EXTRA_VARIANCE * requests * spread)
        weighted = columns.T * weights
        wanted = odds + (shares - fitted) / spread
        last, found = found, np.linalg.lstsq(weighted @ columns, weighted @ wanted, rcond=None)[0]
        if np.allclose(last, found, rtol=1e-6, atol=1e-9):
            break
        log_odds = columns @ found
    return found
