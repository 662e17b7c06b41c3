"""Load-tests the service against its promise: p50 and p99 within 200 ms, at most 1 % failures, at a stated load.

    python -m benchmarks.bench                             # profile smoke, a minute and a half
    python -m benchmarks.bench --profile slo               # the promise at the stated load
    python -m benchmarks.bench --profile sweep             # highest rates, latency against rate; forty minutes
    python -m benchmarks.bench --profile soak --rate 30    # twenty minutes, memory must not grow
    ... --http-url http://node:8000 --grpc-url grpc://node:8001 --metrics-url http://node:8002/metrics

A service that answers at the URLs is tested; otherwise one is started for the run (loopback). Loads, durations and
limits stand in benchmarks/profiles.yaml. Raw files of every request go to the results folder, which benchmarks.report
turns into a page. Exit status 0 when nothing broke, 1 when a limit did, a gated measurement is invalid or an answer was
wrong, 2 when the run could not be made, 130 when it was stopped. The last line on stdout is one JSON document: `passed`
is true, false, or null where no measurement was gated (a sweep) and nothing broke; a run that was not made to its end
has `passed` null and `error`.
"""

import argparse
import json
import logging
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    documents,
    late_share,
    locust_run,
    perf_analyzer,
    processes,
    profiles,
    texts,
    triton_metrics,
    verdict,
)
from benchmarks.doors import Urls
from benchmarks.locust_run import LoadError
from benchmarks.profiles import Load, Profile, Profiles, SearchStage
from benchmarks.search import Outcome, highest_rate
from benchmarks.service import CHECKOUT, Service, ServiceError, checkout, is_local, running
from benchmarks.summary import Summary, summarise
from benchmarks.texts import TextSource
from model_repository.classifier.engine import AUTO
from model_repository.classifier.length_groups import max_merged
from training.provenance import utc_now, versions

RESULTS = CHECKOUT / "artefacts" / "bench"
SATURATING_REVIEWS = 64
"""In flight while the search looks for the saturated throughput it starts from."""
_A_HAIR = 1.0001
_PACKAGES = (
    "locust",
    "tritonclient",
    "nvidia-pytriton",
    "openvino",
    "onnxruntime",
    "tokenizers",
    "numpy",
    "gevent",
    "grpcio",
)


class Bench:
    """One run: a service, its texts, the results folder, and what has been measured so far."""

    def __init__(self, service: Service, rules: Profiles, source: TextSource, folder: Path) -> None:
        self.service, self.rules, self.source, self.folder = service, rules, source, folder
        self.summaries: list[Summary] = []
        self.highest: dict[str, float | None] = {}

    def run(self, profile: Profile) -> None:
        """Runs every stage of `profile`; raises LoadError."""
        for stage in profile.stages:
            if isinstance(stage, SearchStage):
                self.highest[stage.name] = self._search(stage)
            else:
                for load in stage.loads():
                    self.measure(f"{stage.name}-{load.level:g}", load, stage.gate)

    def measure(self, name: str, load: Load, gate: bool) -> Summary:
        """Runs one load, prints its line and returns its figures; raises LoadError."""
        unit = "requests/s" if load.loop == "open" else "users"
        what = f"{load.tool} {load.protocol}, {load.level:.4g} {unit}, {load.warmup_s:g} + {load.duration_s:g} s"
        print(f"{name}: {what} ...", flush=True)
        tool = locust_run if load.tool == "locust" else perf_analyzer
        summary = summarise(tool.run(load, self.service.urls, self.folder / name, self.source, gate))
        self.summaries.append(summary)
        problems = [*summary.invalid(self.rules.validity), *verdict.broken_by(summary, self.rules.limits)]
        print(verdict.table([summary]).splitlines()[1] + "".join(f"\n  {problem}" for problem in problems), flush=True)
        return summary

    def _search(self, stage: SearchStage) -> float | None:
        users = max(1, SATURATING_REVIEWS // stage.batch_size)
        saturated = self.measure(
            f"{stage.name}-saturated", self._load(stage, "closed", users, stage.probe_s), gate=False
        )

        tried: set[tuple[float, float]] = set()
        failed_at: set[float] = set()  # rates at which the load generator, not the service, was what failed

        def measure(rate_per_s: float, duration_s: float) -> Outcome | None:
            name = f"{stage.name}-{len(self.summaries):02d}-{duration_s:.0f}s-{rate_per_s:.4g}"
            level = rate_per_s
            while (level, duration_s) in tried:  # whose arrivals would come again, and tell nothing new
                level *= _A_HAIR
            tried.add((level, duration_s))
            summary = self.measure(name, self._load(stage, "open", level, duration_s), gate=False)
            held = not summary.broken(self.rules.limits)
            if summary.generator_failed(self.rules.validity):
                failed_at.add(rate_per_s)
                return None
            if held and summary.invalid(self.rules.validity):
                return None
            failed_at.discard(rate_per_s)
            return Outcome(held, late_share.trial(summary, self.folder, self.rules.limits.p99_ms))

        found = highest_rate(
            measure, saturated.answered_per_s, stage.probe_s, stage.duration_s, stage.precision_percent
        )
        failed_at = {rate_per_s for rate_per_s in failed_at if rate_per_s > (found or 0)}
        rate = "none" if found is None else f"{found:.1f} requests/s, {found * stage.batch_size:.1f} reviews/s"
        above = f"; the load generator failed at {min(failed_at):.1f}, so it may hold more" if failed_at else ""
        print(f"{stage.name}: highest rate that held for {stage.duration_s:g} s: {rate}{above}")
        alike = [summary for summary in self.summaries if summary.load.kind == saturated.load.kind]
        crossing = late_share.of_open_loops(alike, self.folder, self.rules)
        print(f"{stage.name}: {late_share.sentence(crossing)}", flush=True)
        return found

    def _load(self, stage: SearchStage, loop: str, level: float, duration_s: float) -> Load:
        return Load.model_validate(
            {
                **{key: getattr(stage, key) for key in ("protocol", "texts", "batch_size", "warmup_s")},
                "tool": "locust",
                "loop": loop,
                "level": level,
                "duration_s": duration_s,
                "probe": True,
            }
        )


def describe(options: argparse.Namespace, service: Service, argv: Sequence[str]) -> dict[str, Any]:
    """Returns what the figures depend on: date, command, machine, versions, texts; raises OSError."""
    url = service.urls.http
    config = triton_metrics.configuration(url, "classifier")
    machine, runtime = processes.machine(), triton_metrics.runtime(config)
    meant = machine.pop("runtime")
    if runtime == AUTO:
        runtime = meant if is_local(url) else "auto, on the server"
    return {
        "profile": options.profile,
        "finished": False,
        "profiles_file": options.profiles.name,
        "rate_per_s": options.rate,
        "command": shlex.join(["python", "-m", "benchmarks.bench", *argv]),
        "date": utc_now(),
        "machine": {"of": "service and load generator" if is_local(url) else "load generator alone", **machine},
        "runtime": runtime,
        "checkout": {"of": "service and load generator" if service.started_here else "load generator", **checkout()},
        "versions": {
            "triton": triton_metrics.server_version(url),
            "perf_analyzer": perf_analyzer.version(),
            **versions(*_PACKAGES),
        },
        "texts": {
            "data": str(options.data.absolute()) if options.data else "generated",
            "reviews": options.reviews,
            "seed": options.seed,
        },
        "service_started_here": service.started_here,
        "classifier_instances": triton_metrics.instances(config),
        "classifier_max_merged": max_merged(config),
    }


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Makes the run that `options` describe; returns the exit status.

    Raises:
        ProfileError, TextError, ServiceError, LoadError, OSError: it cannot be made, or not to its end.
    """
    rules = profiles.load(options.profiles)
    profile = rules.profile(options.profile)
    if options.rate is not None:
        profile = profile.at_rate(options.rate)
    folder = (options.out or RESULTS / f"{options.profile}-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: its files would count as measured in this run")
    source = TextSource(options.data.absolute() if options.data else None, options.reviews, options.seed)
    texts.make("imdb", source.reviews, source.seed, source.data)  # unusable texts end the run before it starts ...
    if any(stage.tool == "perf_analyzer" for stage in profile.stages):
        perf_analyzer.needed()  # ... and so does a missing tool
    urls = Urls(options.http_url, options.grpc_url, options.metrics_url)
    print(f"profile {options.profile}: {profile.about}\nresults: {folder}", flush=True)
    with (
        running(urls, folder / "serve.log", may_start=not options.no_start) as service,
        processes.watching(service.pid) as watch,
    ):
        bench = Bench(service, rules, source, folder)
        facts = describe(options, service, argv)
        facts["rules"] = rules.of_run(options.profile, profile).model_dump(mode="json")
        _write_facts(facts, folder)  # a run that is killed can still be reported
        try:
            bench.run(profile)
            facts["finished"] = True
        finally:
            facts["highest_rate_per_s"] = bench.highest
            _write_facts(facts, folder)
            processes.write_memory(folder / verdict.MEMORY_FILE, watch.stop())
    return _conclude(bench, rules, profile, folder, facts)


def _write_facts(facts: dict[str, Any], folder: Path) -> None:
    (folder / verdict.RUN_FILE).write_text(json.dumps(facts, indent=1) + "\n")


def _conclude(bench: Bench, rules: Profiles, profile: Profile, folder: Path, facts: dict[str, Any]) -> int:
    outcome = verdict.judge(bench.summaries, rules.limits, rules.validity, profile, folder)
    print("\n" + verdict.table(bench.summaries))
    print("\n".join([*(f"BROKEN {line}" for line in outcome.broken), *(f"note {line}" for line in outcome.remarks)]))
    name, _, rest = verdict.headline(outcome, rules.limits).partition(":")
    print(f"{name.upper()}:{rest}")
    document = {
        "passed": outcome.passed,
        "broken": outcome.broken,
        "remarks": outcome.remarks,
        "results": str(folder),
        **facts,
        "measurements": [verdict.as_json(summary) for summary in bench.summaries],
    }
    print(documents.one_line(document), flush=True)
    return 1 if outcome.broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=__doc__, formatter_class=texts.ManPage
    )
    defaults = Urls("http://127.0.0.1:8000", "grpc://127.0.0.1:8001", "http://127.0.0.1:8002/metrics")
    parser.add_argument("--profile", default="smoke", help="which load, from the profile file")
    parser.add_argument(
        "--profiles", type=Path, default=profiles.PROFILES_FILE, metavar="FILE", help="the profile file"
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="requests a second, in place of the rates of the profile's gated open loops",
    )
    parser.add_argument("--http-url", default=defaults.http, metavar="URL", help="HTTP of the service")
    parser.add_argument("--grpc-url", default=defaults.grpc, metavar="URL", help="its gRPC")
    parser.add_argument("--metrics-url", default=defaults.metrics, metavar="URL", help="its metrics")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"empty results folder (default: {RESULTS}/PROFILE-TIME)"
    )
    parser.add_argument("--no-start", action="store_true", help="end if no service answers, do not start one")
    texts.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else a service started here would outlive the run
    try:
        return run(options, arguments)
    except KeyboardInterrupt:
        status, reason = 130, "stopped; what was measured so far is in the results folder"
    except (profiles.ProfileError, ServiceError, LoadError, texts.TextError, OSError) as error:
        status, reason = 2, str(error)
    except Exception as error:  # else Python ends with 1, which says that a limit broke
        logging.exception("a mistake in the load test itself, or an answer that nothing here understands")
        status, reason = 2, f"{type(error).__name__}: {error}"
    print(f"benchmarks.bench: {'error: ' if status == 2 else ''}{reason}", file=sys.stderr)
    print(documents.one_line({"passed": None, "error": reason}), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
