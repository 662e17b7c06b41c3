"""Turns a run's raw files into one page: report.html, self-contained, and its plots as PNG files beside it.

    python -m benchmarks.report artefacts/bench/sweep-20261123-150000
    python -m benchmarks.report                                        # the newest run

A pure function of the raw files, which hold the limits that the run had: the same files give the same bytes. Runs from
before they did are judged by profiles.yaml, and any by the file that --profiles names.
"""

import argparse
import base64
import html
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures, late_share, profiles, verdict
from benchmarks.bench import RESULTS
from benchmarks.profiles import ProfileError, Profiles
from benchmarks.summary import Summary
from benchmarks.texts import ManPage

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-size:13px;margin:1rem 0}"
    "td,th{border-bottom:1px solid #ddd;padding:.2rem .6rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}code{font-size:13px}"
    ".failed{color:#a11}.passed{color:#171}"
)
_CLASSES: dict[bool | None, str] = {True: "passed", False: "failed", None: "unjudged"}


Rows = list[tuple[str, ...]]
"""A table: its head, then its lines."""


class ReportError(ValueError):
    """There is nothing to report on; the message says which command makes it."""


def write(folder: Path, rules: Profiles | None = None) -> Path:
    """Writes report.html and the PNG files into `folder`; returns the page's path.

    Judged by `rules`, by default those of the run.

    Raises:
        ReportError: `folder` holds no run.
        ProfileError: it does not say by what it was judged, and profiles.yaml cannot be read.
    """
    run_file = folder / verdict.RUN_FILE
    summaries = verdict.read_all(folder)
    if not run_file.exists() or not summaries:
        raise ReportError(f"{folder} holds no run with measurements: `make bench` makes one")
    facts = json.loads(run_file.read_text())
    rules = rules or (Profiles.model_validate(facts["rules"]) if "rules" in facts else profiles.load())
    images = dict(_images(summaries, rules, folder))
    for name, content in images.items():
        (folder / f"{name}.png").write_bytes(content)
    page = folder / "report.html"
    steps = [row for summary in summaries for row in _steps(summary.name, folder)]
    page.write_text(_page(facts, summaries, rules, folder, images, steps), encoding="utf-8")
    return page


def _images(summaries: Sequence[Summary], rules: Profiles, folder: Path) -> Iterator[tuple[str, bytes]]:
    yield "latency-distribution", figures.latency_distribution(summaries, folder)
    for kind in sorted({s.load.kind for s in summaries}):
        alike = [s for s in summaries if s.load.kind == kind]
        suffix = "-".join(map(str, kind))
        for loop, name in (("open", "latency-against-rate"), ("closed", "throughput-against-users")):
            runs = [s for s in alike if s.load.loop == loop]
            if len({s.load.level for s in runs}) > 1:
                if loop == "open":
                    crossing = late_share.of_open_loops(runs, folder, rules)
                    yield f"{name}-{suffix}", figures.latency_against_rate(runs, rules.limits, crossing)
                else:
                    yield f"{name}-{suffix}", figures.throughput_against_users(runs)
    if any(s.batching for s in summaries):
        yield "time-by-phase", figures.time_by_phase(summaries)
    memory = folder / verdict.MEMORY_FILE
    if memory.exists() and len(memory.read_text().splitlines()) > 1:
        yield "memory", figures.memory_over_time(memory)


def _page(
    facts: dict[str, Any],
    summaries: Sequence[Summary],
    rules: Profiles,
    folder: Path,
    images: dict[str, bytes],
    steps: Rows,
) -> str:
    profile, doubts = rules.profiles.get(facts["profile"]), []
    if profile is None:
        doubts.append(f"no profile {facts['profile']!r} is known here, so what it asked for is not judged")
    elif not facts.get("finished", True):  # older runs do not say
        profile = None
        doubts.append("the run ended before its profile did, so what it asked for is not judged")
    outcome = verdict.judge(summaries, rules.limits, rules.validity, profile, folder)
    title = html.escape(facts["profile"])
    return "\n".join(
        [
            f"<!doctype html><meta charset=utf-8><title>Load test {title}</title><style>{_STYLE}</style>",
            f"<h1>Load test, profile {title}</h1>",
            f"<p class={_CLASSES[outcome.passed]}>{html.escape(verdict.headline(outcome, rules.limits))}</p>",
            "".join(f"<p>{html.escape(line)}</p>" for line in [*doubts, *outcome.broken, *outcome.remarks]),
            _facts(facts),
            "<h2>Measurements</h2>",
            _table(_measurements(summaries)),
            f"<p>{_MEASURED}</p>",
            "<h2>Batching and where time goes</h2>",
            _table(_batching(summaries)),
            f"<p>{_COUNTED}</p>",
            "<h2>Locust beside perf_analyzer</h2>",
            _table(_side_by_side(summaries)),
            *(["<h2>The steps, as perf_analyzer saw them</h2>", _table([_STEP_COLUMNS, *steps])] if steps else []),
            *(
                f"<h2>{html.escape(name)}</h2><img alt='{html.escape(name)}' src='data:image/png;base64,"
                f"{base64.b64encode(content).decode()}'>"
                for name, content in images.items()
            ),
            "",
        ]
    )


def _facts(facts: dict[str, Any]) -> str:
    rows: Rows = [("what", "value")]
    for key, value in facts.items():
        if key == "rules":  # above, as far as they matter
            continue
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        rows.append((key, shown))
    return _table(rows)


_MEASUREMENT_COLUMNS = (
    *("measurement", "tool", "loop", "requests", "offered/s", "answered/s", "failed", "p50 ms", "p95 ms", "p99 ms"),
    *("mean ms", "in flight", "Little", "generator CPU", "sent late p99 ms"),
)
_MEASURED = (
    "* is gated; (max): of so few requests that the slowest of them is the p99. Locust checks every answer; "
    "perf_analyzer checks none, and one request that fails ends it and the run."
)
_STEP_COLUMNS = ("measurement", "step", "reviews", "executions", "queue ms", "input ms", "infer ms", "output ms")
_STEP_COUNTS = (r"Inference count: (\d+)", r"Execution count: (\d+)")
_STEP_TIMES_US = tuple(
    rf"\b{phase} (\d+) usec" for phase in ("queue", "compute input", "compute infer", "compute output")
)
_COUNTED = (
    "As Triton counts: a request's time ends with its execution, although each is answered as soon as its own reviews "
    "have run. So under load the mean in the server is above the client's."
)
_BATCHING_COLUMNS = (
    *("measurement", "reviews per tokenizer execution", "per classifier execution", "padded / real tokens"),
    *("window filled", "alone on all cores", "queue", "tokenizing", "inference", "other", "mean ms in the server"),
)


def _steps(name: str, folder: Path) -> Rows:
    """Returns perf_analyzer's own figures of the ensemble's steps in one measurement; none of Locust's has them."""
    raw = json.loads((folder / f"{name}.json").read_text())
    text = "\n".join(raw.get("perf_analyzer", {}).get("composing_models", []))
    _, *parts = re.split(r"^(\w+), version.*$", text, flags=re.MULTILINE)
    rows: Rows = []
    for step, said in zip(parts[::2], parts[1::2], strict=True):
        counts, times_us = ([re.search(pattern, said) for pattern in kind] for kind in (_STEP_COUNTS, _STEP_TIMES_US))
        times = (f"{int(found[1]) / 1000:.1f}" if found else "" for found in times_us)
        rows.append((name, step, *(found[1] if found else "" for found in counts), *times))
    return rows


def _measurements(summaries: Sequence[Summary]) -> Rows:
    rows: Rows = [_MEASUREMENT_COLUMNS]
    for s in summaries:
        name = s.name + (" *" if s.gate else "")
        failed = f"{s.failures_percent:.2f} %" + (f" ({verdict.failure_kinds(s)})" if s.failures else "")
        rates = (str(s.requests), f"{s.offered_per_s:.1f}", f"{s.answered_per_s:.1f}", failed)
        p99 = f"{s.p99_ms:.1f}" + (" (max)" if s.p99_is_maximum else "")
        times = (f"{s.p50_ms:.1f}", f"{s.p95_ms:.1f}", p99, f"{s.mean_ms:.1f}", f"{s.in_flight:.1f}")
        checks = (f"{s.littles_law_percent:.1f} %", f"{s.generator_cpu_percent:.0f} %", f"{s.send_lag_p99_ms:.1f}")
        rows.append((name, s.load.tool, s.load.loop, *rates, *times, *checks))
    return rows


def _batching(summaries: Sequence[Summary]) -> Rows:
    rows: Rows = [_BATCHING_COLUMNS]
    for s in summaries:
        b = s.batching
        if b:
            padded = "not counted" if b.padded_over_real_tokens is None else f"{b.padded_over_real_tokens:.4f}"
            filled = "not counted" if b.window_filled_share is None else _percent(b.window_filled_share)
            alone = "not counted" if b.all_cores_share is None else _percent(b.all_cores_share)
            shares = (b.queue_share, b.tokenizing_share, b.inference_share, b.other_share)
            merged = tuple(f"{b.reviews_per_execution[step]:.2f}" for step in ("tokenizer", "classifier"))
            rows.append((s.name, *merged, padded, filled, alone, *(_percent(x) for x in shares), f"{b.mean_ms:.1f}"))
    return rows


def _percent(share: float) -> str:
    return f"{round(share, 2) + 0.0:.0%}"  # adding 0 turns -0 into 0


def _side_by_side(summaries: Sequence[Summary]) -> Rows:
    rows: Rows = [("load", "p50 Locust", "p50 perf_analyzer", "p99 Locust", "p99 perf_analyzer", "answered/s, both")]
    for ours, theirs in verdict.pairs(summaries):
        load = f"{ours.load.protocol}, {ours.load.loop} loop, {ours.load.level:g}"
        times = (ours.p50_ms, theirs.p50_ms, ours.p99_ms, theirs.p99_ms)
        rows.append((load, *(f"{x:.1f}" for x in times), f"{ours.answered_per_s:.1f}, {theirs.answered_per_s:.1f}"))
    return rows


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    if len(rows) < 2:
        return "<p>Nothing was measured for this.</p>"
    head, *body = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return f"<table><tr>{cells}</tr>{''.join(lines)}</table>"


def _newest() -> Path:
    runs = sorted(RESULTS.glob(f"*/{verdict.RUN_FILE}"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise ReportError(f"{RESULTS} holds no run: `make bench` makes one")
    return runs[-1].parent


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__, formatter_class=ManPage)
    parser.add_argument("folder", type=Path, nargs="?", help="results folder of a run (default: the newest)")
    parser.add_argument("--profiles", type=Path, metavar="FILE", help="judge by this file's limits, not by the run's")
    options = parser.parse_args(argv)
    try:
        rules = profiles.load(options.profiles) if options.profiles else None
        print(write(options.folder or _newest(), rules))
    except (ReportError, ProfileError) as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
