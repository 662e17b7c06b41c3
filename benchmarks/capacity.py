"""How many replicas does a rate need? Answered from the raw files of a sweep, with what the answer is worth.

    python -m benchmarks.capacity --rate 50000 --p99-ms 200                        # the newest sweep
    python -m benchmarks.capacity --rate 500 --results artefacts/bench/sweep-... --startup-s 30

Fits contention over users (Universal Scalability Law), takes the time of a review from the saturated throughput,
calibrates noise and waking of a simulated replica on every second rate that was measured, and reports its errors on the
rates in between. Then: the highest rate of a replica within the p99, replicas for the rate with one to spare, and what
happens while one is gone and while new ones start.
Writes capacity.png into the folder; the last line on stdout is one JSON document. capacity_model.py cites the laws.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import capacity_model, profiles, texts, verdict
from benchmarks.bench import RESULTS
from benchmarks.capacity_model import Floats, Scalability, Service
from benchmarks.summary import Summary
from export.repository import REPOSITORY, TOKENIZER_FILE
from model_repository.tokenizer.review_text import ReviewEncoder

_MIN_RATES = 4
_SCENARIO_S = 180.0
_EVENT_S = 60.0
_REPETITIONS = 100
_BUCKET_S = 5.0


class CapacityError(ValueError):
    """The folder lacks what the model is fitted to; the message says what, and which command makes it."""


@dataclass(frozen=True)
class Fit:
    """A fitted replica and what it was fitted to."""

    scalability: Scalability
    users: list[tuple[float, float]]
    """Closed loop: users and requests answered a second."""
    service: Service
    lengths: Floats
    """Tokens of the reviews that were sent, truncated."""
    fitted: list[tuple[float, float, float]]
    """Rate, p50 and p99 in ms that the service was calibrated on."""
    held_out: list[tuple[float, float, float]]


def fit(folder: Path) -> Fit:
    """Returns the replica that the sweep in `folder` measured.

    Raises:
        CapacityError: too few rates or users were measured, or not with one review of IMDb's lengths per request.
    """
    run_file = folder / verdict.RUN_FILE
    if not run_file.exists():
        raise CapacityError(f"{folder} holds no run: `make bench PROFILE=sweep` makes one")
    one = [s for s in verdict.read_all(folder) if s.load.tool == "locust" and s.load.texts == "imdb"]
    one = [s for s in one if s.load.batch_size == 1 and s.load.protocol == "grpc" and s.batching]
    validity = profiles.load().validity
    one = [s for s in one if not s.invalid(validity)]
    closed = sorted(((s.load.level, s.answered_per_s) for s in one if s.load.loop == "closed"), key=lambda p: p[0])
    steady = sorted((s for s in one if s.load.loop == "open" and not s.failures), key=lambda s: s.offered_per_s)
    steady = [s for s in steady if s.answered_per_s > 0.97 * s.offered_per_s]
    if len(steady) < _MIN_RATES or len({users for users, _ in closed}) < 3:
        raise CapacityError(
            f"{folder} has {len(steady)} steady rates and {len(closed)} valid numbers of users, expected at least "
            f"{_MIN_RATES} and 3: `make bench PROFILE=sweep` measures them"
        )
    facts = json.loads(run_file.read_text())
    lengths = _lengths(facts["texts"])
    instances = facts["classifier_instances"]
    saturated_per_s = max(answered for _, answered in closed)
    per_token_s = capacity_model.time_per_token_s(instances, saturated_per_s, float(lengths.mean()))
    elsewhere_s = _elsewhere_s(steady[0])
    points = [(s.offered_per_s, s.p50_ms, s.p99_ms) for s in steady]
    fitted, held_out = points[::2], points[1::2]
    service = Service(per_token_s, 0.0, elsewhere_s, instances=instances)
    service = capacity_model.calibrate(service, fitted, lengths)
    return Fit(capacity_model.fit_scalability(*zip(*closed, strict=True)), closed, service, lengths, fitted, held_out)


def _lengths(source: dict[str, Any]) -> Floats:
    data = None if source["data"] == "generated" else Path(source["data"])
    reviews = texts.make("imdb", source["reviews"], source["seed"], data)
    encoder = ReviewEncoder(REPOSITORY / TOKENIZER_FILE)
    return np.array([len(row) for row in encoder.encode(reviews)], dtype=np.float64)


def _elsewhere_s(summary: Summary) -> float:
    """Returns the part of the mean latency that is neither the classifier's queue nor its execution.

    Only at a low rate: where reviews share executions, most are answered before the execution that Triton times ends.
    """
    batching = summary.batching
    assert batching is not None
    in_classifier_ms = (batching.queue_share + batching.inference_share) * batching.mean_ms
    return max(summary.mean_ms - in_classifier_ms, 0.0) / 1000


@dataclass(frozen=True)
class Plan:
    """Replicas for a rate, and how the rest fares while some are missing."""

    highest_rate_per_s: float
    """Of one replica within the p99."""
    replicas: int
    """For the rate, none missing."""
    replicas_one_failed: int
    """For the rate while one is missing."""
    failure: list[tuple[float, float]]
    """Second and p99 in ms: one of `replicas_one_failed` is gone from 60 s on, for as long as one takes to start."""
    surge: list[tuple[float, float]]
    """The same while the rate grows by half at 60 s and the replicas for it answer after they have started."""


def plan(found: Fit, rate_per_s: float, p99_ms: float, startup_s: float) -> Plan:
    """Returns the replicas for `rate_per_s` within `p99_ms`.

    Raises:
        CapacityError: not even an idle replica keeps the p99.
    """
    highest = capacity_model.highest_rate(found.service, p99_ms, found.lengths)
    if highest <= 0:
        raise CapacityError(f"a replica does not answer within {p99_ms:g} ms even when idle")
    replicas = math.ceil(rate_per_s / highest)
    spare = replicas + 1
    usual = rate_per_s / spare
    failure = _scenario(found, usual, usual * spare / max(spare - 1, 1), startup_s)
    surge = _scenario(found, usual, usual * 1.5, startup_s)
    return Plan(highest, replicas, spare, failure, surge)


def _scenario(found: Fit, usual_per_s: float, meanwhile_per_s: float, length_s: float) -> list[tuple[float, float]]:
    """Returns the p99 over time of a replica whose rate is another one for `length_s` from second 60 on.

    Requests are spread at random, so each replica of many has Poisson arrivals of its share.
    """

    def rate_per_s(at_s: Floats) -> Floats:
        return np.where((at_s >= _EVENT_S) & (at_s < _EVENT_S + length_s), meanwhile_per_s, usual_per_s)

    peak = max(usual_per_s, meanwhile_per_s)
    runs = [
        capacity_model.simulate(found.service, rate_per_s, peak, _SCENARIO_S, found.lengths, seed)
        for seed in range(_REPETITIONS)
    ]
    arrivals, latency_s = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    points = []
    for start_s in np.arange(0, _SCENARIO_S, _BUCKET_S):
        inside = latency_s[(arrivals >= start_s) & (arrivals < start_s + _BUCKET_S)]
        if inside.size:
            points.append((float(start_s), 1000 * float(np.percentile(inside, 99))))
    return points


def _errors(found: Fit) -> list[dict[str, float]]:
    """Returns measured and predicted p99 for the rates that were held out."""
    rows = []
    for rate, _, p99 in found.held_out:
        predicted = capacity_model.percentiles_ms(found.service, rate, found.lengths)[1]
        rows.append({"rate_per_s": rate, "measured_p99_ms": p99, "predicted_p99_ms": predicted})
    return rows


def _measured_highest(folder: Path) -> float | None:
    """Returns what the sweep's search found with one review per request, None where it did not search."""
    highest: dict[str, float | None] = json.loads((folder / verdict.RUN_FILE).read_text()).get("highest_rate_per_s", {})
    return next((rate for name, rate in highest.items() if name.endswith("one-review")), None)


def run(options: argparse.Namespace) -> int:
    """Fits, predicts, prints and draws; returns the exit status."""
    from benchmarks.capacity_plot import draw

    folder = options.results or _newest_sweep()
    print("fitting and simulating takes about a minute ...", file=sys.stderr)
    found = fit(folder)
    result = plan(found, options.rate, options.p99_ms, options.startup_s)
    measured, errors, law = _measured_highest(folder), _errors(found), found.scalability
    per_review_ms = 1000 * found.service.per_token_s * float(found.lengths.mean())
    print(f"{folder}, machine as in its run.json")
    print(
        f"closed loop: {law.per_user_per_s:.1f}/s for one user, contention {law.contention:.3f}, "
        f"coherence {law.coherence:.5f}"
    )
    service = found.service
    print(
        f"a review of mean length: {per_review_ms:.1f} ms in one of {service.instances} instances, "
        f"{100 * service.waking:.0f} % more where it was idle, {1000 * service.elsewhere_s:.1f} ms elsewhere; "
        f"noise {service.noise:.1f}"
    )
    for row in errors:
        wrong = 100 * (row["predicted_p99_ms"] / row["measured_p99_ms"] - 1)
        print(
            f"held out {row['rate_per_s']:.1f}/s: p99 {row['measured_p99_ms']:.0f} ms measured, "
            f"predicted {wrong:+.0f} %"
        )
    beside = "no search in this folder" if measured is None else f"measured {measured:.1f}/s"
    print(f"highest rate of a replica with p99 <= {options.p99_ms:g} ms: {result.highest_rate_per_s:.1f}/s ({beside})")
    print(f"{options.rate:g}/s: {result.replicas} replicas, {result.replicas_one_failed} so that one may fail")
    worst = {name: max(p99 for _, p99 in getattr(result, name)) for name in ("failure", "surge")}
    print(
        f"one of {result.replicas_one_failed} gone for {options.startup_s:g} s: p99 up to {worst['failure']:.0f} ms; "
        f"half as much again until new ones start: up to {worst['surge']:.0f} ms"
    )
    (folder / "capacity.png").write_bytes(draw(found, result, options.p99_ms, measured))
    document = {
        "scalability": asdict(law),
        "service": asdict(found.service),
        "held_out": errors,
        "highest_rate_per_s": {"predicted": result.highest_rate_per_s, "measured": measured},
        "replicas": result.replicas,
        "replicas_one_failed": result.replicas_one_failed,
        "worst_p99_ms": worst,
        "plot": str(folder / "capacity.png"),
    }
    print(json.dumps(document))
    return 0


def _newest_sweep() -> Path:
    runs = sorted(RESULTS.glob(f"sweep-*/{verdict.RUN_FILE}"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise CapacityError(f"{RESULTS} holds no sweep: `make bench PROFILE=sweep` makes one")
    return runs[-1].parent


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.capacity", description=__doc__, formatter_class=texts.ManPage
    )
    parser.add_argument("--rate", type=float, required=True, help="requests a second to serve, one review each")
    parser.add_argument("--p99-ms", type=float, default=200, help="latency that 99 %% of them must keep")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="a sweep's results (default: the newest)")
    parser.add_argument("--startup-s", type=float, default=30, help="seconds until a new replica answers")
    options = parser.parse_args(argv)
    if options.rate <= 0 or options.p99_ms <= 0:
        parser.error("--rate and --p99-ms must be above 0")
    try:
        return run(options)
    except (CapacityError, ValueError) as error:
        print(f"benchmarks.capacity: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
