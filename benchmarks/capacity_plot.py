"""The picture of benchmarks.capacity: contention, latency against rate, one replica gone, a surge of traffic."""

import io
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display is needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks import capacity_model
from benchmarks.figures import plain_ticks

if TYPE_CHECKING:
    from benchmarks.capacity_fit import Fit
    from benchmarks.capacity_plan import Plan

_SIZE_INCHES = (11.0, 7.5)
_DPI = 100
_RATES = 12
_ROOM = 1.5


def draw(found: "Fit", result: "Plan", p99_ms: float) -> bytes:
    """Returns the picture as PNG bytes."""
    figure, ((users, rates), (failure, surge)) = plt.subplots(2, 2, figsize=_SIZE_INCHES, dpi=_DPI)
    _users(users, found)
    _rates(rates, found, result, p99_ms)
    for axes, points, title in (
        (failure, result.failure, f"One of {result.replicas_one_failed} replicas gone from 60 s on"),
        (surge, result.surge, "Half as much again from 60 s on, until replicas start"),
    ):
        axes.plot(*zip(*points, strict=True), color="#b5494a")
        axes.axhline(p99_ms, color="black", linewidth=1, linestyle=":")
        axes.set(title=title, xlabel="time [s]", ylabel="p99 [ms], simulated", yscale="log")
        shown = [p99_ms, *(p99 for _, p99 in points)]
        axes.set_ylim(min(shown) / _ROOM, max(shown) * _ROOM)  # else chance of a few per cent looks like an event
    for axes in (rates, failure, surge):
        plain_ticks(axes)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _users(axes: Axes, found: "Fit") -> None:
    measured = np.array(found.users)
    grid = np.linspace(1, measured[:, 0].max(), 100)
    axes.plot(measured[:, 0], measured[:, 1], "o", label="measured")
    axes.plot(grid, found.scalability.throughput(grid), label="Universal Scalability Law")
    axes.set(title="Contention, closed loop", xlabel="users", ylabel="requests answered [1/s]", ylim=(0, None))
    axes.legend()


def _rates(axes: Axes, found: "Fit", result: "Plan", p99_ms: float) -> None:
    highest = max(run.rate_per_s for run in (*found.fitted, *found.held_out))
    grid = np.linspace(0.1, 1.02, _RATES) * max(result.highest_rate_per_s, highest)
    axes.plot(
        grid, [capacity_model.percentiles_ms(found.service, r, found.lengths)[1] for r in grid], label="simulated"
    )
    for points, marker, label in ((found.fitted, "o", "fitted"), (found.held_out, "x", "held out")):
        axes.plot(
            [run.rate_per_s for run in points], [run.p99_ms for run in points], marker, label=f"measured, {label}"
        )
    axes.axhline(p99_ms, color="black", linewidth=1, linestyle=":")
    axes.axvline(result.highest_rate_per_s, color="#4a7fb5", linewidth=1, linestyle="--", label="highest, predicted")
    if found.crossing:
        rate, low, high = found.crossing
        axes.axvline(rate, color="#b5494a", linewidth=1, linestyle="--", label="1 % late, measured")
        axes.axvspan(low, high, color="#b5494a", alpha=0.12)
    axes.set(title="p99 against rate, open loop", xlabel="requests [1/s]", ylabel="p99 [ms]", yscale="log")
    axes.legend(fontsize=8)
