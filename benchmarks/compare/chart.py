"""A comparison in pictures: throughput and sustained rate of each system, and what a token costs."""

from pathlib import Path
from types import ModuleType

import numpy as np

from benchmarks.compare.plan import PROMISE
from benchmarks.compare.results import Comparison, Spread


def _pyplot() -> ModuleType:
    import matplotlib

    matplotlib.use("Agg")  # before pyplot: no display is needed
    from matplotlib import pyplot

    return pyplot


def draw(comparison: Comparison, file: Path) -> None:
    """Writes bars of saturated throughput and sustained rate, with the rounds' spread, to `file` (PNG)."""
    pyplot = _pyplot()
    results = list(comparison.systems.values())
    names = ["in-process ceiling", *(f"{result.title}\n({result.engine})" for result in results)]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.6 * len(names)), layout="constrained")
    bars = {
        "saturated, closed loop": [comparison.ceiling_per_s, *(result.saturated_per_s for result in results)],
        f"sustained, {PROMISE}": [Spread(()), *(result.sustained_per_s for result in results)],
    }
    for place, (label, spreads) in enumerate(bars.items()):
        heights = [spread.median if spread.values else 0.0 for spread in spreads]
        below = [
            height - spread.lowest if spread.values else 0.0 for height, spread in zip(heights, spreads, strict=True)
        ]
        above = [
            spread.highest - height if spread.values else 0.0 for height, spread in zip(heights, spreads, strict=True)
        ]
        rows = [row + 0.4 * place - 0.2 for row in range(len(names))]
        axes.barh(rows, heights, height=0.38, xerr=[below, above], capsize=2, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("reviews a second")
    axes.set_title(f"{comparison.run['threads']} cores of {comparison.run['cpu']}, load generator included")
    figure.legend(loc="outside lower center", ncols=2)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def draw_tokens(comparison: Comparison, file: Path) -> None:
    """Writes the time of one review against its tokens to `file` (PNG)."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, rounds in comparison.curves.items():
        lengths = sorted(rounds[0]) if rounds else []
        axes.plot(lengths, [np.median([curve[n] for curve in rounds]) for n in lengths], "o-", label=name)
    axes.set(xlabel="tokens of the review", ylabel="median time [ms], one at a time", xlim=(0, None), ylim=(0, None))
    axes.set_title("Cost grows with tokens, up to the model's window")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
