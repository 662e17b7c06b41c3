"""One measurement in figures: a pure function of its raw files.

`NAME.json` holds the load, the window that counts, the generator's CPU time and Triton's counters at both ends of it;
`NAME.csv.gz` the samples. The window is [start, end) on the samples' clock and leaves the warm-up out.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import samples, triton_metrics
from benchmarks.profiles import Limits, Load, Validity
from benchmarks.samples import OK, SAMPLES_SUFFIX, Samples
from benchmarks.triton_metrics import Batching

MAX_RATE_MISSED = 0.05
"""An open loop may miss its rate by this share, or by `MAX_RATE_SIGMAS` standard deviations where that is more: Locust
has as many arrivals in its window as the rate says, but not perf_analyzer, whose window is longer than asked for, nor
older runs."""
MAX_RATE_SIGMAS = 3


@dataclass(frozen=True)
class Summary:
    """Figures of one measurement; latencies are those of right answers to requests that were due in the window."""

    name: str
    load: Load
    gate: bool
    window_s: float
    """Length of the window."""
    requests: int
    """Due in the window."""
    failures: dict[str, int]
    """By kind, in the window."""
    offered_per_s: float
    answered_per_s: float
    """Right answers that came within the window, over its length."""
    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    in_flight: float
    """Requests due and not yet answered, averaged over the window; the users of a closed loop (see `littles_law`)."""
    littles_law_percent: float
    """Difference between `in_flight` and rate x mean latency, in percent of `in_flight`."""
    send_lag_p99_ms: float
    """How late the generator sent; part of the latencies."""
    generator_cpu_percent: float
    """CPU time of the load generator over the window, in percent of one core."""
    generator_warning: str
    """What the generator itself said about not keeping up, "" for nothing."""
    known_answers: int | None
    """Texts whose right answer was known; None where no answers were checked."""
    batching: Batching | None
    first_wrong_answer: str
    """What was wrong with it, in the warm-up or the window; "" for none, or where it was not kept."""

    @property
    def failures_percent(self) -> float:
        """Share of the requests that failed or were answered wrongly."""
        return 100 * sum(self.failures.values()) / self.requests if self.requests else 100.0

    @property
    def p99_is_maximum(self) -> bool:
        """Whether so few requests were answered rightly that the slowest of them is the p99."""
        return self.requests - sum(self.failures.values()) <= 100

    def invalid(self, validity: Validity) -> list[str]:
        """Returns why the measurement says nothing about the service; empty when it does."""
        reasons = self.generator_failed(validity)
        if not self.littles_law_percent <= validity.max_littles_law_percent:
            reasons.append(
                f"not in a steady state: {self.in_flight:.2f} requests in flight, but rate x mean latency is "
                f"{self.littles_law_percent:.1f} % off, limit {validity.max_littles_law_percent:g} %"
            )
        return reasons

    def generator_failed(self, validity: Validity) -> list[str]:
        """Returns what the load generator did not do as asked; empty when it did."""
        reasons = []
        if not self.requests:
            reasons.append("no request was due in the window")
        if self.known_answers == 0:
            reasons.append("no right answer was known, so that wrong ones passed: raise --reviews")
        due = self.load.level * self.window_s
        missed = abs(self.requests - due)
        if self.load.loop == "open" and missed > max(MAX_RATE_MISSED * due, MAX_RATE_SIGMAS * math.sqrt(due)):
            reasons.append(
                f"the load generator did not keep to its rate: {self.offered_per_s:.1f} requests/s were due, expected "
                f"{self.load.level:g}"
            )
        if self.generator_cpu_percent > validity.max_generator_cpu_percent:
            reasons.append(
                f"the load generator was the bottleneck: it used {self.generator_cpu_percent:.0f} % of a core, limit "
                f"{validity.max_generator_cpu_percent:g} %"
            )
        if self.generator_warning:
            reasons.append(f"the load generator was the bottleneck: {self.generator_warning}")
        return reasons

    def broken(self, limits: Limits) -> list[str]:
        """Returns which limits do not hold."""
        found = {"p50_ms": self.p50_ms, "p99_ms": self.p99_ms, "failures_percent": self.failures_percent}
        return [
            f"{key} is {value:.5g}, limit {getattr(limits, key):g}"
            for key, value in found.items()
            if not value <= getattr(limits, key)  # a p99 of nothing is not a number, and no good one
        ]


def littles_law(
    data: Samples, start_s: float, end_s: float, users: float | None = None, counted: float | None = None
) -> tuple[float, float]:
    """Returns requests in flight, averaged over the window, and the percentage by which rate x mean latency differs.

    In flight are the `users` of a closed loop, who always have one, or what the generator `counted` as requests became
    due and ended. Neither comes from the samples, so users that ended and samples that are missing show. Without either
    it is what overlaps the window by the samples: they agree in a steady state, and not when a queue grows.

    Rate and latency are those of requests due in the window. In a closed loop, which has a steady state by nature, a
    request under way at an edge counts by its part within: a few long ones would otherwise come out by chance.
    """
    length_s = end_s - start_s
    overlap_s = np.minimum(data.done_s, end_s) - np.maximum(data.scheduled_s, start_s)
    by_samples = float(np.maximum(overlap_s, 0).sum()) / length_s
    if users is not None:
        return users, _percent_off(by_samples, users)
    product = float(data.due_between(start_s, end_s).latency_s.sum()) / length_s
    in_flight = by_samples if counted is None else counted
    return in_flight, _percent_off(product, in_flight)


def _percent_off(value: float, reference: float) -> float:
    return 100 * abs(value - reference) / reference if reference else float("nan")


def summarise(file: Path) -> Summary:
    """Returns the figures of the measurement whose description is `file` (NAME.json, samples beside it)."""
    raw: dict[str, Any] = json.loads(file.read_text())
    name = file.name.removesuffix(".json")
    data = samples.read(file.with_name(name + SAMPLES_SUFFIX))
    start_s, end_s = raw["window_s"]
    due = data.due_between(start_s, end_s)
    answered_in_time = data.ok & (data.done_s >= start_s) & (data.done_s < end_s)
    latency_ms = due.latency_s[due.ok] * 1000
    lag_ms = (due.sent_s - due.scheduled_s) * 1000
    load = Load.model_validate(raw["load"])
    # perf_analyzer leaves out what its users are waiting for at the end.
    users = load.level if load.loop == "closed" and load.tool == "locust" else None
    in_flight, littles_law_percent = littles_law(data, start_s, end_s, users, raw.get("in_flight"))
    p50, p95, p99 = (_percentile(latency_ms, percent) for percent in (50, 95, 99))
    outcomes, requests = Counter(due.outcomes), len(due.outcomes)
    snapshots = raw["triton"]
    return Summary(
        name=name,
        load=load,
        gate=raw["gate"],
        window_s=end_s - start_s,
        requests=requests,
        failures={outcome: count for outcome, count in sorted(outcomes.items()) if outcome != OK},
        offered_per_s=requests / (end_s - start_s),
        answered_per_s=int(answered_in_time.sum()) / (end_s - start_s),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        mean_ms=float(latency_ms.mean()) if latency_ms.size else float("nan"),
        in_flight=in_flight,
        littles_law_percent=littles_law_percent,
        send_lag_p99_ms=_percentile(lag_ms, 99),
        generator_cpu_percent=100 * raw["generator"]["cpu_s"] / raw["generator"]["wall_s"],
        generator_warning=raw["generator"].get("warning", ""),
        known_answers=raw.get("known_answers"),
        batching=triton_metrics.batching(snapshots["before"], snapshots["after"]) if snapshots else None,
        first_wrong_answer=raw.get("first_wrong_answer", ""),
    )


def window(summary: Summary, folder: Path) -> tuple[Samples, float, float]:
    """Returns all samples of `summary` in `folder`, and start and end of their window on their clock, in s."""
    start_s, end_s = json.loads((folder / f"{summary.name}.json").read_text())["window_s"]
    return samples.read(folder / f"{summary.name}{SAMPLES_SUFFIX}"), start_s, end_s


def due_in_window(summary: Summary, folder: Path) -> tuple[Samples, float]:
    """Returns the samples of `summary` in `folder` that count, and the start of their window on their clock, in s."""
    data, start_s, end_s = window(summary, folder)
    return data.due_between(start_s, end_s), start_s


def _percentile(values: "np.typing.NDArray[np.float64]", percent: float) -> float:
    """Returns a latency that was observed, the next higher one between two: never better than what happened."""
    return float(np.percentile(values, percent, method="higher")) if values.size else float("nan")
