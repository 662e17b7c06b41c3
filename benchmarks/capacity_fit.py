"""The replica that a sweep measured, fitted to its raw files by the laws of capacity_model.py."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import capacity_model, late_share, profiles, samples, texts, verdict
from benchmarks.capacity_model import Floats, Measured, Scalability, Service
from benchmarks.late_share import Crossing
from benchmarks.summary import Summary, window
from export.repository import REPOSITORY, TOKENIZER_FILE
from model_repository.tokenizer.review_text import ReviewEncoder

MERGED_KEY = "classifier_max_merged"
"""In run.json: reviews of different requests that Triton puts into one execution at most. Older sweeps lack it."""
HELD_OUT_SHARE = 0.1
"""Rates this close to the measured highest rate are held out of the fit: the prediction is judged by them. That is
`Fit.crossing`, or what the search found where there is none."""
_FAR = 1.5
"""Times the measured highest rate: what is offered beyond tells of long queues, not of the limit, and is left out."""
_BUSY_SHARE = 0.5
"""Of the measured highest rate, from which on a run's pace counts. Chosen with 0.3 to 0.6 tried on eleven sweeps that
were known: CHANGELOG."""
_MIN_RATES = 4
_MOSTLY = 0.9
"""Share of one user's reviews that run alone where a server lets them at all; the metrics lag by some."""
_BUSY_USERS = 4
"""Users an instance, from which on all instances are busy."""


class CapacityError(ValueError):
    """The folder lacks what the model is fitted to; the message says what, and which command makes it."""


@dataclass(frozen=True)
class Fit:
    """A fitted replica and what it was fitted to."""

    scalability: Scalability
    users: list[tuple[float, float]]
    """Closed loop: users and requests answered a second."""
    service: Service
    alternatives: list[Service]
    """What it would be without one of the rates that it was fitted to."""
    lengths: Floats
    """Tokens of the reviews that were sent, truncated."""
    fitted: list[Measured]
    held_out: list[Measured]
    highest_per_s: float | None
    """What the sweep's search found with one review per request, None where it did not search, found none or searched
    for another p99."""
    crossing: Crossing | None
    """Where one of a hundred requests is late by all of the sweep's open loops together, None where none passes it.
    Late is beyond the p99 asked for."""


def fit(folder: Path, p99_ms: float) -> Fit:
    """Returns the replica that the sweep in `folder` measured, the same whatever `p99_ms` is asked for, and which of
    its rates keep that.

    Raises:
        CapacityError: too few rates or users were measured, or not with one review of IMDb's lengths per request.
    """
    run_file = folder / verdict.RUN_FILE
    if not run_file.exists():
        raise CapacityError(f"{folder} holds no run: `make bench PROFILE=sweep` makes one")
    facts = json.loads(run_file.read_text())
    promised, measured = profiles.load(), _one_review(folder)
    rules = promised.model_copy(update={"limits": promised.limits.model_copy(update={"p99_ms": p99_ms})})
    one = [s for s in measured if not s.invalid(rules.validity)]
    closed = sorted((s.load.level, s.answered_per_s) for s in one if s.load.loop == "closed")
    steady = sorted((s for s in one if s.load.loop == "open" and not s.failures), key=lambda s: s.offered_per_s)
    steady = [s for s in steady if s.answered_per_s > 0.97 * s.offered_per_s]
    highest = _measured_highest(facts) if p99_ms == promised.limits.p99_ms else None  # of a search for the promise
    crossing = late_share.of_open_loops(measured, folder, rules)
    of_promise = late_share.of_open_loops(measured, folder, promised)
    lengths = lengths_sent(facts["texts"])
    points = [_measured(s, folder, lengths) for s in steady]
    highest_per_s = of_promise.rate_per_s if of_promise else _measured_highest(facts)
    fitted, held_out = _split(points, highest_per_s)
    if len(fitted) < _MIN_RATES or len({users for users, _ in closed}) < 3:
        raise CapacityError(
            f"{folder} has {len(fitted)} steady rates to fit and {len(closed)} valid numbers of users, expected at "
            f"least {_MIN_RATES} and 3: `make bench PROFILE=sweep` measures them"
        )
    instances = facts["classifier_instances"]
    per_token_s = capacity_model.time_per_token_s(instances, _saturated_per_s(closed, instances), float(lengths.mean()))
    merged = facts.get(MERGED_KEY) or _largest_execution(one)
    alone = _alone(one, per_token_s * float(lengths.mean()))
    base = Service(per_token_s, 0.0, _elsewhere_s(steady[0]), alone=alone, instances=instances, max_merged=merged)
    service, alternatives = capacity_model.calibrate(base, fitted, _BUSY_SHARE * (highest_per_s or 0.0))
    law = capacity_model.fit_scalability(*zip(*closed, strict=True))
    return Fit(law, closed, service, alternatives, lengths, fitted, held_out, highest, crossing)


def errors(found: Fit) -> list[dict[str, float]]:
    """Returns measured and predicted p99 for the rates that were held out: the median over the fitted paces."""
    rows = []
    for run in found.held_out:
        again = capacity_model.repeat(run)
        by_pace = [capacity_model.as_measured_ms(found.service, run, again, pace)[-1] for pace in found.service.paces]
        predicted = float(np.median(by_pace))
        rows.append({"rate_per_s": run.rate_per_s, "measured_p99_ms": run.p99_ms, "predicted_p99_ms": predicted})
    return rows


def _measured(summary: Summary, folder: Path, lengths: Floats) -> Measured:
    """Returns the open loop `summary`, whose reviews have some of `lengths`: which, older files do not say."""
    data, *window_s = window(summary, folder)
    due = data.due_between(*window_s)
    is_known = (data.texts != samples.UNKNOWN).all()
    tokens = lengths[data.texts] if is_known else np.random.default_rng(0).choice(lengths, data.texts.size)
    latency_ms = due.latency_s[due.ok] * 1000
    return Measured(summary.offered_per_s, data.scheduled_s, tokens, (window_s[0], window_s[1]), latency_ms)


def lengths_sent(source: dict[str, Any]) -> Floats:
    """Returns the tokens, truncated, of each of the reviews that run.json's `texts` describe, in their order."""
    data = None if source["data"] == "generated" else Path(source["data"])
    reviews = texts.make("imdb", source["reviews"], source["seed"], data)
    encoder = ReviewEncoder(REPOSITORY / TOKENIZER_FILE)
    return np.array([len(row) for row in encoder.encode(reviews)], dtype=np.float64)


def _one_review(folder: Path) -> list[Summary]:
    """Returns Locust's measurements with one review of IMDb's lengths per gRPC request."""
    found = [s for s in verdict.read_all(folder) if s.load.tool == "locust" and s.load.texts == "imdb"]
    return [s for s in found if s.load.batch_size == 1 and s.load.protocol == "grpc" and s.batching]


def _measured_highest(facts: dict[str, Any]) -> float | None:
    highest: dict[str, float | None] = facts.get("highest_rate_per_s", {})
    return next((rate for name, rate in highest.items() if name.endswith("one-review")), None)


def _split(points: Sequence[Measured], highest_per_s: float | None) -> tuple[list[Measured], list[Measured]]:
    """Returns the measurements to fit and those held out: around the highest rate, or every second without one."""
    if highest_per_s is None:
        return list(points[::2]), list(points[1::2])
    points = [point for point in points if point.rate_per_s <= _FAR * highest_per_s]
    near = [abs(point.rate_per_s / highest_per_s - 1) <= HELD_OUT_SHARE for point in points]
    return (
        [point for point, held in zip(points, near, strict=True) if not held],
        [point for point, held in zip(points, near, strict=True) if held],
    )


def _saturated_per_s(closed: Sequence[tuple[float, float]], instances: int) -> float:
    """Returns the median throughput with all instances busy; the most users' where they are few."""
    busy = [answered for users, answered in closed if users >= _BUSY_USERS * instances]
    return float(np.median(busy or [closed[-1][1]]))


def _largest_execution(summaries: Sequence[Summary]) -> int:
    """Returns the reviews of the largest execution: a sweep's most users have more waiting than the server merges."""
    return max(max(s.batching.executions_by_reviews["classifier"], default=1) for s in summaries if s.batching)


def _alone(summaries: Sequence[Summary], review_s: float) -> float | None:
    """Returns the share of `review_s`, what a review of mean length takes on a busy server, that one user's reviews
    take; None where these do not run on the cores of all instances."""
    one_user = [s.batching for s in summaries if s.load.loop == "closed" and s.load.level == 1]
    for batching in one_user:
        if batching and (batching.all_cores_share or 0) > _MOSTLY:
            return batching.inference_share * batching.mean_ms / 1000 / review_s
    return None


def _elsewhere_s(summary: Summary) -> float:
    """Returns the part of the mean latency that is neither the classifier's queue nor its execution.

    Only at a low rate: where reviews share executions, most are answered before the execution that Triton times ends.
    """
    batching = summary.batching
    assert batching is not None
    in_classifier_ms = (batching.queue_share + batching.inference_share) * batching.mean_ms
    return max(summary.mean_ms - in_classifier_ms, 0.0) / 1000
