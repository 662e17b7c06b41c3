"""A comparison as a bar chart: saturated throughput and sustained rate of each system, with the rounds' spread."""

from pathlib import Path

from benchmarks.compare.results import Comparison, Spread


def draw(comparison: Comparison, file: Path) -> None:
    """Writes the chart to `file` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = list(comparison.systems.values())
    names = ["in-process ceiling", *(f"{result.title}\n({result.engine})" for result in results)]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.6 * len(names)), layout="constrained")
    bars = {
        "saturated, closed loop": [comparison.ceiling_per_s, *(result.saturated_per_s for result in results)],
        "sustained, 99 % within 200 ms": [Spread(()), *(result.sustained_per_s for result in results)],
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
