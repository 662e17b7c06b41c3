"""Measures this service beside its in-process ceiling and other serving frameworks, on the same cores in one run.

    make bench-compare                                     # makes the environments; over an hour
    make bench-compare COMPARE_ARGS=--quick                # 6 minutes at most, one round, no spread
    python -m benchmarks.compare --systems service litserve-shipped
    python -m benchmarks.compare --report artefacts/compare/20260102-030405     # the report again, from raw files

Same checkpoint, same texts, same load generator, in interleaved rounds. transformers' own classes keep all tokens of
a checkpoint that drops some; one system with torch drops them as the service does. benchmarks/compare/plan.py states
every duration. Writes raw files, report.md and report.png into --out, prints the report, and as its last line its
figures as JSON. Systems whose environment or checkpoint is missing are skipped, and the report says why.
"""

import argparse
import json
import logging
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import documents, processes, texts
from benchmarks.compare import chart, measure, results, table, versions
from benchmarks.compare.measure import Bench
from benchmarks.compare.plan import DEFAULT, QUICK, Plan
from benchmarks.compare.results import Comparison
from benchmarks.compare.systems import CHECKOUT, SYSTEMS, Machine, System, chosen, default_machine
from benchmarks.peers.served import served_layout
from benchmarks.service import checkout
from training.command_line import positive

REPORT, CHART, TOKENS_CHART = "report.md", "report.png", "tokens.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and reports, or only reports."""
    options = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # else the server under test would outlive the run
    try:
        folder = options.report or _measure(options)
        comparison = results.read(folder)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"benchmarks.compare: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks.compare: stopped; --report shows what was measured so far", file=sys.stderr)
        return 130
    report = table.markdown(comparison)
    (folder / REPORT).write_text(report)
    chart.draw(comparison, folder / CHART)
    chart.draw_tokens(comparison, folder / TOKENS_CHART)
    print(report)
    print(f"Raw files, {REPORT}, {CHART} and {TOKENS_CHART}: {folder}\n")
    print(documents.one_line(figures(comparison)))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=texts.ManPage
    )
    machine = default_machine(0)
    cores = served_layout()
    parser.add_argument("--quick", action="store_true", help="one short round, for a look; ratios then have no spread")
    names = [system.name for system in SYSTEMS]
    parser.add_argument("--systems", nargs="+", default=[], metavar="NAME", help=f"only these of: {', '.join(names)}")
    parser.add_argument("--rounds", type=positive, help="instead of the plan's")
    parser.add_argument(
        "--probe-requests",
        type=positive,
        metavar="N",
        help="requests of each open loop, about, as far as the plan's longest allows, instead of the plan's: with 60 "
        "none may be late, with 200 two, so that chance decides less what is sustained, and everything takes longer",
    )
    parser.add_argument(
        "--peer-workers", type=positive, default=1, help="workers of a batching peer, which share the cores"
    )
    parser.add_argument("--cores", type=positive, default=cores[0] * cores[1], help="cores that everything shares")
    parser.add_argument("--data", type=Path, help="parquet or CSV file of real reviews, column `text`, to draw from")
    parser.add_argument("--seed", type=int, default=texts.DEFAULT_SEED, help="seed of texts, arrivals and order")
    parser.add_argument("--checkpoint", type=Path, default=machine.checkpoint, help="fp32, for the peers with torch")
    parser.add_argument("--serve-python", type=Path, default=machine.serve_python, help="interpreter that serves")
    parser.add_argument("--peers", type=Path, default=machine.peers, help="peers' environments; PEER is the name")
    parser.add_argument("--out", type=Path, help="folder for the results, by default artefacts/compare/<time>")
    parser.add_argument("--report", type=Path, metavar="DIR", help="measure nothing, report on these raw files")
    return parser.parse_args(argv)


def _measure(options: argparse.Namespace) -> Path:
    """Runs the plan and returns the folder of its raw files; raises ValueError, OSError before measuring anything."""
    now = datetime.now(timezone.utc)
    plan = QUICK if options.quick else DEFAULT
    plan = replace(plan, rounds=options.rounds) if options.rounds else plan
    plan = replace(plan, probe_requests=options.probe_requests) if options.probe_requests else plan
    systems = chosen(options.systems)
    allowed = sorted(os.sched_getaffinity(0))[: options.cores]
    os.sched_setaffinity(0, allowed)  # and with it every process that this one starts
    machine = Machine(
        options.serve_python.absolute(),
        options.peers.absolute(),
        options.checkpoint.absolute(),
        len(allowed),
        options.peer_workers,
    )
    if not 1 <= options.peer_workers <= len(allowed):
        raise ValueError(f"--peer-workers {options.peer_workers} came, expected 1 to {len(allowed)}, the cores")
    skipped = {system.name: reason for system in systems if (reason := machine.missing(system))}
    if not machine.serve_python.exists():
        raise ValueError(f"{machine.serve_python} is missing: run `make serve` once, or name it with --serve-python")
    out: Path = options.out or CHECKOUT / "artefacts" / "compare" / now.strftime("%Y%m%d-%H%M%S")
    out.mkdir(parents=True)
    reviews = texts.make("imdb", plan.reviews, options.seed, options.data)
    for name, reason in skipped.items():
        logging.warning("%s is skipped: %s", name, reason)
    logging.info(
        "about %.0f minutes for %d systems", plan.minutes(len(systems) - len(skipped)), len(systems) - len(skipped)
    )
    bench = Bench(plan, machine, reviews, [None] * len(reviews), out.absolute(), options.seed)
    bench = replace(bench, labels=bench.in_process("labels", out.absolute() / "labels.json"))
    _describe(out, now, plan, machine, systems, skipped)  # now, so that an interrupted run can be reported on
    measure.measure(bench, systems, skipped)
    _describe(out, now, plan, machine, systems, skipped)
    return out


def _describe(
    out: Path, now: datetime, plan: Plan, machine: Machine, systems: Sequence[System], skipped: dict[str, str]
) -> None:
    kept = ("name", "title", "engine", "protocol")
    run = {
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.compare", *sys.argv[1:]]),
        "checkout": checkout(),
        **{key: value for key, value in processes.machine().items() if key in ("cpu", "runtime")},
        "threads": machine.threads,
        "peer_workers": machine.peer_workers,
        "versions": {system.name: versions.of(machine.python(system), system.environment) for system in systems},
        "python": platform.python_version(),
        "plan": asdict(plan),
        "systems": [{**{key: getattr(s, key) for key in kept}, "is_service": s.is_service} for s in systems],
        "skipped": skipped,
    }
    (out / "run.json").write_text(json.dumps(run, indent=1) + "\n")


def figures(comparison: Comparison) -> dict[str, Any]:
    """Returns the figures of the report."""
    aims = [
        {"what": a.what, "found": a.found.values, "aim": a.wanted, "reached": a.holds} for a in table.aims(comparison)
    ]
    return {
        "date": comparison.run["date"],
        "ceiling_per_s": comparison.ceiling_per_s.values,
        "systems": {name: _plain(asdict(result)) for name, result in comparison.systems.items()},
        "aims": aims,
        "skipped": comparison.run["skipped"],
    }


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value["values"] if isinstance(value, dict) and "values" in value else value
        for key, value in result.items()
    }


if __name__ == "__main__":
    sys.exit(main())
