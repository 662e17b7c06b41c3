"""Turns a run's raw files into one page: report.html, self-contained, and its plots as PNG files beside it.

    python -m benchmarks.report artefacts/bench/sweep-20261123-150000
    python -m benchmarks.report                                        # the newest run

A pure function of the raw files and of the limits in profiles.yaml: the same files give the same bytes.
"""

import argparse
import base64
import html
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures, profiles, verdict
from benchmarks.bench import RESULTS
from benchmarks.profiles import ProfileError, Profiles
from benchmarks.summary import Summary
from benchmarks.texts import ManPage

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-size:13px;margin:1rem 0}"
    "td,th{border-bottom:1px solid #ddd;padding:.2rem .6rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}code{font-size:13px}"
    ".bad{color:#a11}.good{color:#171}"
)


class ReportError(ValueError):
    """There is nothing to report on; the message says which command makes it."""


def write(folder: Path, rules: Profiles) -> Path:
    """Writes report.html and the PNG files into `folder`; returns the page's path.

    Raises:
        ReportError: `folder` holds no run.
    """
    run_file = folder / verdict.RUN_FILE
    summaries = verdict.read_all(folder)
    if not run_file.exists() or not summaries:
        raise ReportError(f"{folder} holds no run with measurements: `make bench` makes one")
    facts = json.loads(run_file.read_text())
    images = dict(_images(summaries, rules, folder))
    for name, content in images.items():
        (folder / f"{name}.png").write_bytes(content)
    page = folder / "report.html"
    page.write_text(_page(facts, summaries, rules, folder, images), encoding="utf-8")
    return page


def _images(summaries: Sequence[Summary], rules: Profiles, folder: Path) -> Iterator[tuple[str, bytes]]:
    yield "latency-distribution", figures.latency_distribution(summaries, folder)
    kinds = sorted({(s.load.protocol, s.load.texts, s.load.batch_size) for s in summaries})
    for kind in kinds:
        alike = [s for s in summaries if (s.load.protocol, s.load.texts, s.load.batch_size) == kind]
        suffix = "-".join(map(str, kind))
        for loop, name in (("open", "latency-against-rate"), ("closed", "throughput-against-users")):
            runs = [s for s in alike if s.load.loop == loop]
            if len({s.load.level for s in runs}) > 1:
                plot = figures.latency_against_rate(runs, rules.limits) if loop == "open" else None
                yield f"{name}-{suffix}", plot or figures.throughput_against_users(runs)
    if any(s.batching for s in summaries):
        yield "time-by-phase", figures.time_by_phase(summaries)
    memory = folder / verdict.MEMORY_FILE
    if memory.exists() and len(memory.read_text().splitlines()) > 1:
        yield "memory", figures.memory_over_time(memory)


def _page(
    facts: dict[str, Any], summaries: Sequence[Summary], rules: Profiles, folder: Path, images: dict[str, bytes]
) -> str:
    profile = rules.profiles.get(facts["profile"])
    outcome = verdict.judge(summaries, rules.limits, rules.validity, profile, folder) if profile else None
    passed = outcome is not None and outcome.passed
    lines = [*(outcome.broken if outcome else []), *(outcome.remarks if outcome else [])]
    return "\n".join(
        [
            f"<!doctype html><meta charset=utf-8><title>Load test {facts['profile']}</title><style>{_STYLE}</style>",
            f"<h1>Load test, profile {html.escape(facts['profile'])}</h1>",
            f"<p class={'good' if passed else 'bad'}>{'passed' if passed else 'not passed'}: p50 &le; "
            f"{rules.limits.p50_ms:g} ms, p99 &le; {rules.limits.p99_ms:g} ms, failures &le; "
            f"{rules.limits.failures_percent:g} %</p>",
            "".join(f"<p>{html.escape(line)}</p>" for line in lines),
            _facts(facts),
            "<h2>Measurements</h2>",
            _table(_measurements(summaries)),
            "<h2>Batching and where time goes</h2>",
            _table(_batching(summaries)),
            f"<p>{_COUNTED}</p>",
            "<h2>Locust beside perf_analyzer</h2>",
            _table(_side_by_side(summaries)),
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
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        rows.append((key, shown))
    return _table(rows)


_MEASUREMENT_COLUMNS = (
    *("measurement", "tool", "loop", "offered/s", "answered/s", "failed", "p50 ms", "p95 ms", "p99 ms", "mean ms"),
    *("in flight", "Little", "generator CPU", "sent late p99 ms"),
)
_COUNTED = (
    "As Triton counts: a request's time ends with its execution, although each is answered as soon as its own reviews "
    "have run. So under load the mean in the server is above the client's."
)
_BATCHING_COLUMNS = (
    *("measurement", "reviews per tokenizer execution", "per classifier execution", "padded / real tokens"),
    *("window filled", "queue", "tokenizing", "inference", "other", "mean ms in the server"),
)
Rows = list[tuple[str, ...]]


def _measurements(summaries: Sequence[Summary]) -> Rows:
    rows: Rows = [_MEASUREMENT_COLUMNS]
    for s in summaries:
        name = s.name + (" *" if s.gate else "")
        rates = (f"{s.offered_per_s:.1f}", f"{s.answered_per_s:.1f}", f"{s.failures_percent:.2f} %")
        times = (f"{value:.1f}" for value in (s.p50_ms, s.p95_ms, s.p99_ms, s.mean_ms, s.in_flight))
        checks = (f"{s.littles_law_percent:.1f} %", f"{s.generator_cpu_percent:.0f} %", f"{s.send_lag_p99_ms:.1f}")
        rows.append((name, s.load.tool, s.load.loop, *rates, *times, *checks))
    return rows


def _batching(summaries: Sequence[Summary]) -> Rows:
    rows: Rows = [_BATCHING_COLUMNS]
    for s in summaries:
        b = s.batching
        if b:
            padded = "not counted" if b.padded_over_real_tokens is None else f"{b.padded_over_real_tokens:.4f}"
            filled = "not counted" if b.window_filled_share is None else f"{b.window_filled_share:.0%}"
            shares = (b.queue_share, b.tokenizing_share, b.inference_share, b.other_share)
            merged = tuple(f"{b.reviews_per_execution[step]:.2f}" for step in ("tokenizer", "classifier"))
            rows.append((s.name, *merged, padded, filled, *(f"{x:.0%}" for x in shares), f"{b.mean_ms:.1f}"))
    return rows


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
    parser.add_argument("--profiles", type=Path, default=profiles.PROFILES_FILE, metavar="FILE", help="its limits")
    options = parser.parse_args(argv)
    try:
        print(write(options.folder or _newest(), profiles.load(options.profiles)))
    except (ReportError, ProfileError) as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
