"""How many replicas does a rate need? Answered from the raw files of a sweep, with what the answer is worth.

    python -m benchmarks.capacity --rate 50000 --p99-ms 200                        # the newest sweep
    python -m benchmarks.capacity --rate 500 --results artefacts/bench/sweep-... --startup-s 30

Fits contention over users (Universal Scalability Law), takes the time of a review from the saturated throughput, and
calibrates a simulated replica on the rates that were measured: each run with its own arrivals and texts tells how fast
the machine was in that minute, and all together how uneven it is. Rates within 10 % of the one at which one request of
a hundred is late (late_share.py) are left out, so that the prediction of it, and the errors reported there, are of
rates that the fit has not seen. Then: the highest rate of a replica within the p99, replicas for the rate with one to
spare, and what happens while one is gone and while new ones start.
Writes capacity.png into the folder; the last line on stdout is one JSON document. capacity_model.py cites the laws.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import capacity_fit, documents, profiles, texts, verdict
from benchmarks.bench import RESULTS
from benchmarks.capacity_fit import CapacityError, Fit
from benchmarks.capacity_plan import EVENT_S, Plan, plan


def run(options: argparse.Namespace) -> int:
    """Fits, predicts, prints and draws; returns the exit status."""
    from benchmarks.capacity_plot import draw

    folder = options.results or _newest_sweep()
    print("fitting ...", file=sys.stderr)
    found = capacity_fit.fit(folder, options.p99_ms)
    print(f"simulating; longer with --startup-s, here {options.startup_s:g} ...", file=sys.stderr)
    result = plan(found, options.rate, options.p99_ms, options.startup_s, options.detect_s)
    errors = capacity_fit.errors(found)
    print(f"{folder}, machine as in its run.json")
    _print_fit(found, errors)
    _print_plan(found, result, options)
    (folder / "capacity.png").write_bytes(draw(found, result, options.p99_ms))
    document = {
        "scalability": asdict(found.scalability),
        "service": asdict(found.service),
        "held_out": errors,
        "highest_rate_per_s": {
            "predicted": result.highest_rate_per_s,
            "range": result.highest_range_per_s,
            "measured": found.crossing._asdict() if found.crossing else None,
            "searched": found.highest_per_s,
        },
        "replicas": result.replicas,
        "replicas_one_failed": result.replicas_one_failed,
        "worst_p99_ms": _worst(result),
        "lost": {"requests": result.lost, "percent": result.lost_percent},
        "plot": str(folder / "capacity.png"),
    }
    print(documents.one_line(document))
    return 0


def _print_fit(found: Fit, errors: Sequence[dict[str, float]]) -> None:
    law, service = found.scalability, found.service
    print(
        f"closed loop: {law.per_user_per_s:.1f}/s for one user, contention {law.contention:.3f}, "
        f"coherence {law.coherence:.5f}"
    )
    print(
        f"a review of mean length: {1000 * service.per_token_s * float(found.lengths.mean()):.1f} ms in one of "
        f"{service.instances} instances, up to {service.max_merged} an execution, "
        f"{f'{100 * service.alone:.0f} % of it alone on all cores, ' if service.alone else ''}"
        f"{1000 * service.elsewhere_s:.1f} ms elsewhere"
    )
    print(
        f"that times {min(service.paces):.2f} to {max(service.paces):.2f} from run to run; noise {service.noise:.2f}, "
        f"{f'the same for {service.noise_lasts_s:g} s' if service.noise_lasts_s else 'of each execution'}"
    )
    print(f"fitted to {len(found.fitted)} runs: {', '.join(f'{run.rate_per_s:.1f}' for run in found.fitted)}/s")
    for row in errors:
        wrong = 100 * (row["predicted_p99_ms"] / row["measured_p99_ms"] - 1)
        print(
            f"held out {row['rate_per_s']:.1f}/s: p99 {row['measured_p99_ms']:.0f} ms measured, "
            f"predicted {wrong:+.0f} %"
        )


def _print_plan(found: Fit, result: Plan, options: argparse.Namespace) -> None:
    highest = result.highest_rate_per_s
    beside = "no rate with fewer than 1 % late and one with more in this folder"
    if found.crossing:
        measured, least, most = found.crossing
        beside = f"measured {measured:.1f}/s ({least:.1f} to {most:.1f}), so predicted {_off(highest, measured)}"
    if found.highest_per_s:
        beside += f"; the search held {found.highest_per_s:.1f}/s for a minute: {_off(highest, found.highest_per_s)}"
    low, high = result.highest_range_per_s
    print(
        f"highest rate of a replica with p99 <= {options.p99_ms:g} ms: {highest:.1f}/s ({beside}); "
        f"{low:.1f} to {high:.1f}/s with any one run left out of the fit"
    )
    print(f"{options.rate:g}/s: {result.replicas} replicas, {result.replicas_one_failed} so that one may fail")
    worst = _worst(result)
    print(
        f"one of {result.replicas_one_failed} gone, noticed after {options.detect_s:g} s and replaced "
        f"{options.startup_s:g} s later: {result.lost:.0f} requests lost, {result.lost_percent:.2g} % of all "
        f"until it is noticed (nobody tries again); p99 of the others up to {worst['failure']:.0f} ms, "
        f"before up to {worst['before']:.0f}"
    )
    print(f"half as much again, new ones {options.startup_s:g} s later: p99 up to {worst['surge']:.0f} ms")


def _off(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.0f} %"


def _worst(result: Plan) -> dict[str, float]:
    """Returns the highest p99, in ms, of each simulated event from it on, and before both: what chance alone does."""
    before = [p99 for at_s, p99 in (*result.failure, *result.surge) if at_s < EVENT_S]
    after = {name: [p99 for at_s, p99 in getattr(result, name) if at_s >= EVENT_S] for name in ("failure", "surge")}
    return {"before": max(before), **{name: max(values) for name, values in after.items()}}


def _newest_sweep() -> Path:
    files = sorted(RESULTS.glob(f"sweep-*/{verdict.RUN_FILE}"), key=lambda file: file.stat().st_mtime)
    runs = [file for file in files if json.loads(file.read_text()).get("finished", True)]
    if not runs:
        raise CapacityError(
            f"{RESULTS} holds no sweep: `make bench PROFILE=sweep` makes one, or name a "
            "kept one: `make capacity RESULTS=benchmarks/results/without-vnni/sweep`"
        )
    return runs[-1].parent


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.capacity", description=__doc__, formatter_class=texts.ManPage
    )
    limits = profiles.load().limits
    parser.add_argument("--rate", type=float, required=True, help="requests a second to serve, one review each")
    parser.add_argument("--p99-ms", type=float, default=limits.p99_ms, help="latency that 99 %% of them must keep")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="a sweep's results (default: the newest)")
    parser.add_argument("--startup-s", type=float, default=30, help="seconds until a new replica answers")
    parser.add_argument(
        "--detect-s",
        type=float,
        default=30,
        help="seconds in which a replica that failed is still sent requests; 30: Kubernetes asks a readiness probe "
        "every 10 s and believes the third failure",
    )
    options = parser.parse_args(argv)
    for name in ("rate", "p99_ms", "startup_s"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if not 0 <= options.detect_s < math.inf:
        parser.error("--detect-s must not be below 0")
    try:
        return run(options)
    except (CapacityError, ValueError) as error:
        print(f"benchmarks.capacity: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
