"""Laws behind benchmarks.capacity, each with its source. Pure functions; the same input gives the same output.

Throughput over users, closed loop: the Universal Scalability Law, X(n) = g n / (1 + s (n - 1) + k n (n - 1)) with
contention s and coherence k (N. J. Gunther, Guerrilla Capacity Planning, Springer 2007, chapter 4).

Latency over rate, open loop: classifier instances that, when free, each take the oldest that wait, up to as many as
the server merges (bulk service; N. T. J. Bailey, J. R. Stat. Soc. B 16, 1954), with a time proportional to tokens. It
has no closed form for percentiles with such a service time, so it is simulated. Within an execution the oldest review
runs first and is answered at once. What else the machine does makes executions slower and faster in two ways (a queue
subject to extraneous phase changes; M. F. Neuts, Advances in Applied Probability 3, 1971): from minute to minute, by
the paces that were measured, and within them, one by one or all for a part of a second, by factors whose logarithm
follows the distribution of the largest of many (E. J. Gumbel, Statistics of Extremes, Columbia University Press 1958):
reviews that were alone on a server took that, a long tail of slow ones included. Where a review that comes alone takes
the cores of all instances, it is done sooner, whoever comes meanwhile waits for it, and instances lend each other
cores, so that each review waits for a core by itself. The time a token comes from the
utilisation law, instances = throughput x time a review, where all are busy (P. J. Denning and J. P. Buzen, ACM
Computing Surveys 10, 1978); it so contains what the tokenizer, the server and the load generator take of the same
cores.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

Floats = npt.NDArray[np.float64]
_SAMPLE = 5_000
_MIN_REPETITIONS = 8
"""Requests and runs, at least, behind a percentile that is compared with a measured one."""
_LONG_SAMPLE = 200_000
_LONG_S = 2000.0
_IDLE_SHARE = 0.001
_NOISE = np.linspace(0.0, 0.24, 13).tolist()
_LASTING_S = (0.0, 0.2, 0.3, 0.5, 1.0, 2.0)
_PACES = np.geomspace(0.6, 1.9, 12)
PACE_LASTS_S = 60.0
"""A run's length, of which each tells one pace."""
PERCENTS = (50, 90, 95, 99)
"""The first tells a run's pace, the others the noise within it."""


@dataclass(frozen=True)
class Scalability:
    """Parameters of the Universal Scalability Law."""

    per_user_per_s: float
    contention: float
    coherence: float

    def throughput(self, users: "float | Floats") -> "float | Floats":
        """Returns requests a second with that many users in the closed loop."""
        slowed = 1 + self.contention * (users - 1) + self.coherence * users * (users - 1)
        return self.per_user_per_s * users / slowed


def fit_scalability(users: Sequence[float], throughput_per_s: Sequence[float]) -> Scalability:
    """Returns the law through the measurements, least squares of n / X over n, with parameters that are not negative.

    Raises:
        ValueError: fewer than three different numbers of users.
    """
    n, x = np.asarray(users, dtype=np.float64), np.asarray(throughput_per_s, dtype=np.float64)
    if len(set(n.tolist())) < 3:
        raise ValueError(f"{len(set(n.tolist()))} different numbers of users, expected at least 3")
    columns = {"first": np.ones_like(n), "contention": n - 1, "coherence": n * (n - 1)}
    used = list(columns)
    while True:  # n / X is linear in 1/g, s/g and k/g; a negative term means that the law does not need it
        weights = 1 / (n / x)  # relative errors
        solution, *_ = np.linalg.lstsq(
            np.stack([columns[c] for c in used], 1) * weights[:, None], np.ones_like(n), rcond=None
        )
        values = dict(zip(used, solution.tolist(), strict=True))
        negative = [c for c in used if values[c] < 0 and c != "first"]
        if not negative:
            break
        used.remove(min(negative, key=lambda c: values[c]))
    first = values["first"]
    return Scalability(1 / first, values.get("contention", 0.0) / first, values.get("coherence", 0.0) / first)


@dataclass(frozen=True)
class Service:
    """What the queue needs to know of one replica."""

    per_token_s: float
    noise: float
    """Scale of the logarithm of an execution's time, which follows Gumbel's distribution: whatever else the machine
    does. It leaves the throughput of busy instances as it is."""
    elsewhere_s: float
    """Added to each request: tokenizing, network, client."""
    alone: float | None = None
    """Share of a review's time that it takes on the cores of all instances, when it comes alone and all are idle; then
    instances lend each other their cores, and a review waits for the next one that is free, whatever it was merged
    with. None where reviews keep to their instance's."""
    instances: int = 1
    """Of the classifier; they share one queue."""
    noise_lasts_s: float = 0.0
    """How long the noise stays the same, for all instances; 0 if every execution has its own."""
    max_merged: int = 64
    """Reviews that an execution takes at most; the default is the classifier's `max_batch_size`."""
    paces: tuple[float, ...] = (1.0,)
    """A review's time over what `per_token_s` says, in each of the runs that tell: machines are slower and faster from
    minute to minute. They take turns, each for `PACE_LASTS_S`."""

    def saturated_per_s(self, mean_tokens: float) -> float:
        """Returns reviews a second, in the long run, while all instances are busy."""
        return float(np.mean(1 / np.array(self.paces))) * self.instances / (self.per_token_s * mean_tokens)


@dataclass(frozen=True)
class Measured:
    """A measured open loop of n requests with one review each."""

    rate_per_s: float
    arrivals_s: Floats
    """When they were due, those before and after the window too, (n,)."""
    tokens: Floats
    """Of their reviews, truncated, (n,)."""
    window_s: tuple[float, float]
    """What counts: what was due from the one to the other."""
    latency_ms: Floats
    """Of right answers that count."""

    @property
    def percentiles_ms(self) -> Floats:
        """Latencies at `PERCENTS`."""
        return np.array([percentile(self.latency_ms, percent) for percent in PERCENTS])

    @property
    def p99_ms(self) -> float:
        """Latency that 99 % keep."""
        return percentile(self.latency_ms, 99)


class Requests(NamedTuple):
    """What comes to a replica, by arrival."""

    arrivals_s: Floats
    tokens: Floats
    luck: Floats
    """Standard Gumbel, as many as requests: of the execution that each leads, or of the times that the noise lasts."""
    first_pace: int = 0
    """Whose turn it is at the start."""


def time_per_token_s(instances: int, saturated_per_s: float, mean_tokens: float) -> float:
    """Returns seconds a token, from requests a second while all instances are busy and the mean tokens of a review."""
    return instances / saturated_per_s / mean_tokens


def draw(
    rate_per_s: Callable[[Floats], Floats], peak_per_s: float, duration_s: float, lengths: Floats, seed: int
) -> Requests:
    """Returns Poisson arrivals of that rate over `duration_s`, each a review of one of the `lengths`.

    `rate_per_s` takes seconds since the start, many at once, and returns the rate at each.
    `peak_per_s` bounds the rate: arrivals are drawn at it and thinned (Lewis and Shedler, 1979).
    """
    random = np.random.default_rng(seed)
    count = random.poisson(peak_per_s * duration_s)
    arrivals = np.sort(random.uniform(0, duration_s, count))
    arrivals = arrivals[random.uniform(0, peak_per_s, count) < rate_per_s(arrivals)]
    tokens, luck = random.choice(lengths, arrivals.size), random.gumbel(size=arrivals.size)
    return Requests(arrivals, tokens, luck, int(random.integers(1 << 30)))


def serve(service: Service, requests: Requests) -> Floats:
    """Returns the latency, in seconds, of each request."""
    lasts_s, scale = service.noise_lasts_s, service.noise
    # Executions on average as long, or, over time, as many of them, as without noise.
    unbiased = math.gamma(1 + scale) if lasts_s else 1 / math.gamma(1 - scale)
    done_s: Floats = _done_s(
        requests.arrivals_s,
        requests.tokens * service.per_token_s,
        np.exp(scale * requests.luck) * unbiased,
        lasts_s,
        np.array(service.paces),
        requests.first_pace,
        service.instances,
        service.max_merged,
        service.alone or 0.0,
    )
    return done_s - requests.arrivals_s + service.elsewhere_s


@numba.njit()
def _done_s(
    arrivals_s: Floats,
    seconds: Floats,
    noise: Floats,
    lasts_s: float,
    paces: Floats,
    first_pace: int,
    instances: int,
    max_merged: int,
    alone: float,
) -> Floats:
    """Returns when each request of `serve` is done; `seconds` is its time on an instance, `alone` 0 where cores are
    not lent. Compiled when first called, in three seconds: a fit simulates more than a hundred million requests."""
    count = arrivals_s.size
    done_s = np.empty(count)
    free_s = np.zeros(instances)  # when each instance is free
    alone_until_s = 0.0
    start = 0
    while start < count:
        instance = np.argmin(free_s)
        taken_s = max(free_s[instance], arrivals_s[start])
        begin_s = max(taken_s, alone_until_s)
        slowed = noise[int(begin_s / lasts_s) % count if lasts_s else start]
        slowed *= paces[(first_pace + int(begin_s / PACE_LASTS_S)) % paces.size]
        if alone and begin_s == taken_s and (start + 1 == count or arrivals_s[start + 1] > taken_s):
            free_s[instance] = 0.0
            if free_s.max() <= taken_s:  # the others are idle too
                slowed *= alone
                alone_until_s = begin_s + seconds[start] * slowed
        limit = min(start + (1 if alone else max_merged), count)
        at_s = begin_s
        while start < limit and arrivals_s[start] <= taken_s:
            at_s += seconds[start] * slowed
            done_s[start] = at_s
            start += 1
        free_s[instance] = at_s
    return done_s


def simulate(
    service: Service,
    rate_per_s: Callable[[Floats], Floats],
    peak_per_s: float,
    duration_s: float,
    lengths: Floats,
    seed: int,
) -> tuple[Floats, Floats]:
    """Returns arrival and latency, in seconds, of each request of a replica; `draw` says what the arguments are."""
    requests = draw(rate_per_s, peak_per_s, duration_s, lengths, seed)
    return requests.arrivals_s, serve(service, requests)


def _constant(rate_per_s: float, duration_s: float, lengths: Floats, seed: int) -> Requests:
    return draw(lambda at: np.full_like(at, rate_per_s), rate_per_s, duration_s, lengths, seed)


def percentiles_ms(service: Service, rate_per_s: float, lengths: Floats, seed: int = 0) -> tuple[float, float]:
    """Returns p50 and p99, in ms, at a constant rate in the long run."""
    requests = _constant(rate_per_s, max(_LONG_SAMPLE / rate_per_s, _LONG_S), lengths, seed)
    settled = serve(service, requests)[requests.arrivals_s.size // 10 :] * 1000
    return percentile(settled, 50), percentile(settled, 99)


def percentile(values: Floats, percent: float) -> float:
    """Returns the percentile as summary.py takes it of what was measured."""
    return float(np.percentile(values, percent, method="higher"))


def repeat(run: Measured) -> list[Requests]:
    """Returns the requests of `run`, several times, each with other luck."""
    count = max(_MIN_REPETITIONS, math.ceil(_SAMPLE / run.arrivals_s.size))
    lucks = [np.random.default_rng(seed).gumbel(size=run.arrivals_s.size) for seed in range(count)]
    return [Requests(run.arrivals_s, run.tokens, luck) for luck in lucks]


def as_measured_ms(service: Service, run: Measured, repetitions: Sequence[Requests], pace: float) -> Floats:
    """Returns the percentiles `PERCENTS`, in ms, of `run` on a machine of that `pace`: the medians over
    `repetitions`."""
    at_pace = replace(service, paces=(pace,))
    counts = (run.arrivals_s >= run.window_s[0]) & (run.arrivals_s < run.window_s[1])
    latencies_ms = [serve(at_pace, requests)[counts] * 1000 for requests in repetitions]
    found = [np.percentile(one, PERCENTS, method="higher") for one in latencies_ms]
    return np.asarray(np.median(found, axis=0), dtype=np.float64)


def calibrate(
    base: Service, measured: Sequence[Measured], busy_from_per_s: float = 0.0
) -> tuple[Service, list[Service]]:
    """Returns `base` with the paces of the measured runs and the noise that is closest to them, and the same without
    each of these runs in turn.

    Paces are of the runs with at least `busy_from_per_s`, where there are any: a machine that is mostly idle may be
    slower, up to 1.28 times in one sweep, and what is predicted is not. A run's pace is that at which the simulated p50
    is the measured one. Closest: the sum of absolute differences of logarithms of the other percentiles, in the median
    run, so that one in a bad minute decides nothing.
    """
    tried = [
        replace(base, noise=noise, noise_lasts_s=lasting_s)
        for noise in _NOISE
        for lasting_s in (_LASTING_S if noise else (0.0,))
    ]
    errors = np.empty((len(tried), len(measured)))
    paces = np.empty_like(errors)
    for column, run in enumerate(tqdm(measured, desc="fitting", unit="run", disable=None)):
        repetitions = repeat(run)
        for row, service in enumerate(tried):
            paces[row, column], errors[row, column] = _pace(service, run, repetitions)

    def best(among: Sequence[int]) -> Service:
        row = int(np.argmin(np.median(errors[:, among], axis=1)))
        busy = [index for index in among if measured[index].rate_per_s >= busy_from_per_s] or among
        return replace(tried[row], paces=tuple(paces[row, busy].tolist()))

    every = range(len(measured))
    return best(every), [best([other for other in every if other != one]) for one in every]


def _pace(service: Service, run: Measured, repetitions: Sequence[Requests]) -> tuple[float, float]:
    """Returns the pace of `run`, and how far the other percentiles are off at it."""
    curves = np.log([as_measured_ms(service, run, repetitions, pace) for pace in _PACES]).T  # (percents, paces)
    measured, scale = np.log(run.percentiles_ms), np.log(_PACES)
    pace = np.interp(measured[0], np.maximum.accumulate(curves[0]), scale)
    found = np.array([np.interp(pace, scale, curve) for curve in curves[1:]])
    return float(np.exp(pace)), float(np.abs(found - measured[1:]).sum())


def highest_rate(service: Service, p99_limit_ms: float, lengths: Floats) -> float:
    """Returns the highest rate, requests a second, at which the simulated p99 is within the limit; 0 if none is."""
    high = service.saturated_per_s(float(lengths.mean()))
    low = _IDLE_SHARE * high
    if not percentiles_ms(service, low, lengths)[1] <= p99_limit_ms:
        return 0.0
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        if percentiles_ms(service, middle, lengths)[1] <= p99_limit_ms:
            low = middle
        else:
            high = middle
    return low
