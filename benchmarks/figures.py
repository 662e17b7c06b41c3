"""The report's plots: summaries in, PNG bytes out. The same figures give the same bytes."""

import io
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display is needed
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from benchmarks import processes
from benchmarks.late_share import Crossing
from benchmarks.profiles import Limits
from benchmarks.summary import Summary, due_in_window
from benchmarks.triton_metrics import PHASES

_SIZE_INCHES = (8.0, 4.2)
_DPI = 110
_MAX_CURVES = 8
_MAX_POINTS = 1000
_COLOURS = ("#c9ccd1", "#e0a458", "#4a7fb5", "#8f9aa8")


def _png(draw: Callable[[Axes], None], title: str, x: str, y: str) -> bytes:
    figure, axes = plt.subplots(figsize=_SIZE_INCHES, dpi=_DPI)
    draw(axes)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    plain_ticks(axes)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(fontsize=8 if len(handles) <= _MAX_CURVES else 6)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def plain_ticks(axes: Axes) -> None:
    """Labels logarithmic axes of `axes` with 200 and 400, not with powers of ten."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(LogFormatter())
            axis.set_minor_formatter(LogFormatter())


def latency_distribution(summaries: Sequence[Summary], folder: Path) -> bytes:
    """Returns the share of the window's requests answered rightly within a latency, a curve for each longest
    measurement; where requests failed it ends below 1."""
    chosen = sorted(summaries, key=lambda s: (-s.load.duration_s, s.name))[:_MAX_CURVES]

    def draw(axes: Axes) -> None:
        for summary in sorted(chosen, key=lambda s: s.name):
            latency_ms = window_latency_ms(summary, folder)
            if latency_ms.size:
                shares = np.arange(1, latency_ms.size + 1) / summary.requests
                kept = np.linspace(0, latency_ms.size - 1, min(latency_ms.size, _MAX_POINTS)).astype(int)
                axes.plot(latency_ms[kept], shares[kept], label=summary.name)
        axes.set_xscale("log")

    return _png(draw, "Latency distribution", "latency [ms]", "share answered within it")


def window_latency_ms(summary: Summary, folder: Path) -> npt.NDArray[np.float64]:
    """Returns the sorted latencies of the right answers to requests due in the window, which the tables count too."""
    due, _ = due_in_window(summary, folder)
    return np.sort(due.latency_s[due.ok] * 1000)


def latency_against_rate(summaries: Sequence[Summary], limits: Limits, crossing: Crossing | None) -> bytes:
    """Returns p50, p95 and p99 of open loops over the rate: lines for each tool and duration, points of a search.

    `crossing`, where 1 % is late, is drawn with how far it may be off.
    """

    def draw(axes: Axes) -> None:
        for (name, runs), marker in zip(open_loops(summaries).items(), cycle("osv^Dx")):
            first = runs[0].load
            line = "" if first.probe else "-" if first.tool == "locust" else "--"
            for key, colour in (("p50_ms", "#4a7fb5"), ("p95_ms", "#e0a458"), ("p99_ms", "#b5494a")):
                points = [s.offered_per_s for s in runs], [getattr(s, key) for s in runs]
                axes.plot(*points, marker + line, color=colour, markersize=4, linewidth=1, label=f"{key[:3]} {name}")
        axes.axhline(limits.p99_ms, color="black", linewidth=1, linestyle=":", label=f"limit {limits.p99_ms:g} ms")
        if crossing:
            rate, low, high = crossing
            label = f"1 % late at {rate:.1f}/s ({low:.1f} to {high:.1f})"
            axes.axvspan(low, high, color="#8f9aa8", alpha=0.2, label=label)
        axes.set_yscale("log")

    return _png(draw, "Latency against rate, open loop", "requests offered [1/s]", "latency [ms]")


def open_loops(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Returns the measurements by rate, those of a tool and duration together, and those of a search.

    A short run sees less, so durations stand apart; those of a search differ from probe to probe.
    """
    found: dict[str, list[Summary]] = {}
    for summary in sorted(summaries, key=lambda s: (s.load.tool, s.load.probe, s.load.duration_s, s.offered_per_s)):
        load = summary.load
        name = "search" if load.probe else f"{load.tool} {load.duration_s:g} s"
        found.setdefault(name, []).append(summary)
    return found


def throughput_against_users(summaries: Sequence[Summary]) -> bytes:
    """Returns reviews answered a second over the reviews in flight, closed loop."""

    def draw(axes: Axes) -> None:
        for tool, style in (("locust", "o-"), ("perf_analyzer", "s--")):
            runs = sorted((s for s in summaries if s.load.tool == tool), key=lambda s: s.load.level)
            if runs:
                in_flight = [s.load.level * s.load.batch_size for s in runs]
                axes.plot(in_flight, [s.answered_per_s * s.load.batch_size for s in runs], style, label=tool)
        axes.set_ylim(bottom=0)

    return _png(draw, "Throughput against concurrency, closed loop", "reviews in flight", "reviews answered [1/s]")


def time_by_phase(summaries: Sequence[Summary]) -> bytes:
    """Returns where a request's time in the server goes, one bar a measurement."""

    def draw(axes: Axes) -> None:
        runs = [(s.name, s.batching) for s in summaries if s.batching]
        left = np.zeros(len(runs))
        for phase, colour in zip(PHASES, _COLOURS, strict=True):
            widths = np.array([getattr(batching, f"{phase}_share") * batching.mean_ms for _, batching in runs])
            axes.barh([name for name, _ in runs], widths, left=left, color=colour, label=phase)
            left = left + widths
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=6)

    return _png(draw, "Mean time of a request in the server, by phase", "ms", "")


def memory_over_time(file: Path) -> bytes:
    """Returns each server process's resident memory."""

    def draw(axes: Axes) -> None:
        for name, points in sorted(processes.read_memory(file).items()):
            step = max(1, len(points) // _MAX_POINTS)
            times_s, held = zip(*points[::step], strict=True)
            axes.plot(times_s, np.array(held) / 2**20, label=name)
        axes.set_ylim(bottom=0)

    return _png(draw, "Resident memory of the server's processes", "time [s]", "MiB")
