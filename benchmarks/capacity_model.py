"""Laws behind benchmarks.capacity, each with its source. Pure functions; the same input gives the same output.

Throughput over users, closed loop: the Universal Scalability Law, X(n) = g n / (1 + s (n - 1) + k n (n - 1)) with
contention s and coherence k (N. J. Gunther, Guerrilla Capacity Planning, Springer 2007, chapter 4).

Latency over rate, open loop: classifier instances that each take everything queued, up to the largest batch, when they
are free (bulk service; N. T. J. Bailey, J. R. Stat. Soc. B 16, 1954), with a time proportional to tokens. It has no
closed form for percentiles with such a service time, so it is simulated. Within an execution the oldest review runs
first and is answered at once. An execution that finds its instance idle takes longer, as was seen (a queue in which
the first customer of a busy period is exceptional; P. D. Welch, Operations Research 12, 1964). The time a token
comes from the utilisation law, instances = throughput x time a review, where all are busy (P. J. Denning and J. P.
Buzen, ACM Computing Surveys 10, 1978); it so contains what the tokenizer, the server and the load generator take of the
same cores.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
MAX_BATCH = 64
"""Reviews that one execution takes, `max_batch_size` of the classifier."""


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
    """Standard deviation of the logarithm of an execution's time: whatever else the machine does."""
    elsewhere_s: float
    """Added to each request: tokenizing, network, client."""
    waking: float = 0.0
    """Share by which an execution takes longer when its instance was idle."""
    instances: int = 1
    """Of the classifier; they share one queue."""


def time_per_token_s(instances: int, saturated_per_s: float, mean_tokens: float) -> float:
    """Returns seconds a token, from requests a second while all instances are busy and the mean tokens of a review."""
    return instances / saturated_per_s / mean_tokens


def simulate(
    service: Service,
    rate_per_s: Callable[[Floats], Floats],
    peak_per_s: float,
    duration_s: float,
    lengths: Floats,
    seed: int,
) -> tuple[Floats, Floats]:
    """Returns arrival and latency, in seconds, of each request of a replica under Poisson arrivals of that rate.

    `rate_per_s` takes seconds since the start, many at once, and returns the rate at each.
    `peak_per_s` bounds the rate: arrivals are drawn at it and thinned (Lewis and Shedler, 1979).
    """
    random = np.random.default_rng(seed)
    count = random.poisson(peak_per_s * duration_s)
    arrivals = np.sort(random.uniform(0, duration_s, count))
    kept = random.uniform(0, peak_per_s, count) < rate_per_s(arrivals)
    arrivals = arrivals[kept]
    seconds = random.choice(lengths, arrivals.size) * service.per_token_s
    noise = np.exp(random.normal(0, service.noise, arrivals.size))
    done = np.empty_like(arrivals)
    start, free_s = 0, [0.0] * service.instances  # when each instance is free, a heap
    while start < arrivals.size:
        free = heapq.heappop(free_s)
        begin_s = max(free, arrivals[start])
        stop = min(int(np.searchsorted(arrivals, begin_s, side="right")), start + MAX_BATCH)
        slowed = noise[start] * (1 + service.waking if free < begin_s else 1)
        done[start:stop] = begin_s + seconds[start:stop].cumsum() * slowed
        heapq.heappush(free_s, float(done[stop - 1]))
        start = stop
    return arrivals, done - arrivals + service.elsewhere_s


def percentiles_ms(
    service: Service, rate_per_s: float, lengths: Floats, duration_s: float = 1200.0, seed: int = 0
) -> tuple[float, float]:
    """Returns p50 and p99, in ms, at a constant rate."""
    arrivals, latency_s = simulate(
        service, lambda at: np.full_like(at, rate_per_s), rate_per_s, duration_s, lengths, seed
    )
    settled = latency_s[arrivals > duration_s / 10] * 1000
    if not settled.size:
        return float("nan"), float("nan")
    return float(np.percentile(settled, 50)), float(np.percentile(settled, 99))


def calibrate(base: Service, measured: Sequence[tuple[float, float, float]], lengths: Floats) -> Service:
    """Returns `base` with the noise and the waking at which simulated p50 and p99 are closest to the measured.

    `measured` holds rate, p50 and p99 in ms. Closest: the sum of squared differences of logarithms.
    """

    def error(tried: Service) -> float:
        ours = [percentiles_ms(tried, rate, lengths, duration_s=400.0) for rate, _, _ in measured]
        return sum(
            float(np.log(p50 / one[1]) ** 2 + np.log(p99 / one[2]) ** 2)
            for (p50, p99), one in zip(ours, measured, strict=True)
        )

    grid = np.linspace(0.0, 0.6, 7).tolist()
    return min((replace(base, noise=noise, waking=waking) for noise in grid for waking in grid), key=error)


def highest_rate(service: Service, p99_limit_ms: float, lengths: Floats) -> float:
    """Returns the highest rate, requests a second, at which the simulated p99 is within the limit; 0 if none is."""
    low, high = 0.0, service.instances / (service.per_token_s * float(lengths.mean()))
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        if percentiles_ms(service, middle, lengths)[1] <= p99_limit_ms:
            low = middle
        else:
            high = middle
    return low
