"""The figures of a comparison: a pure function of the raw files that benchmarks/compare/measure.py wrote."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import samples
from benchmarks.compare import cpu, measure
from benchmarks.compare.load import SAMPLES_SUFFIX, WRONG
from benchmarks.samples import OK


@dataclass(frozen=True)
class Spread:
    """The same figure of several rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one; not a number without values."""
        return float(np.median(self.values)) if self.values else float("nan")

    @property
    def lowest(self) -> float:
        """The smallest one."""
        return min(self.values, default=float("nan"))

    @property
    def highest(self) -> float:
        """The largest one."""
        return max(self.values, default=float("nan"))

    def over(self, other: "Spread") -> "Spread":
        """Returns the ratios round by round; infinite where `other` is 0, and only rounds that both have."""
        pairs = zip(self.values, other.values, strict=False)
        return Spread(tuple(own / its if its else float("inf") for own, its in pairs))


@dataclass(frozen=True)
class SystemResult:
    """One system over all rounds."""

    name: str
    title: str
    engine: str
    saturated_per_s: Spread
    sustained_per_s: Spread
    """Highest open-loop rate that held; 0 where none of the ladder did."""
    saturated_p50_ms: Spread
    generator_cores: Spread
    """CPU seconds of the load generator a second, at saturation."""
    server_cores: Spread
    tokenizer_share: Spread
    """Of the server's CPU time at saturation, in its tokenizer's process; empty for peers."""
    padding_share: Spread
    """Of the tokens run at saturation; empty where the server does not count them."""
    short_per_s: Spread
    long_per_s: Spread
    """At saturation with texts of `measure.SHORT_TOKENS` and `LONG_TOKENS` alone; empty for peers."""
    lone_p50_ms: Spread
    in_process_p50_ms: Spread
    """Tokenizing and inferring the same lone reviews in process, right before and after."""
    requests: int
    """Of all loads."""
    wrong: int
    failures: dict[str, int]
    """By kind, wrong answers left out."""


@dataclass(frozen=True)
class Comparison:
    """Everything that the report shows."""

    run: dict[str, Any]
    systems: dict[str, SystemResult]
    ceiling_per_s: Spread
    candidates: list[dict[str, Any]]
    curve_ms: dict[str, dict[int, float]]
    """Median time by tokens, `in process` and for each door of the service."""


def read(folder: Path) -> Comparison:
    """Reads the raw files under `folder`; systems without a complete round are left out."""
    run = json.loads((folder / "run.json").read_text())
    rounds = sorted(path for path in folder.glob("round-*") if (path / "ceiling.json").exists())
    results = (_system(entry, rounds) for entry in run["systems"])
    points = json.loads((folder / "curve.json").read_text())
    curves = {"in process": {int(p["tokens"]): float(np.median(p["seconds"])) * 1000 for p in points}}
    for entry in run["systems"]:
        curve = folder / "round-1" / f"{entry['name']}.{measure.CURVE}"
        if curve.with_name(curve.name + SAMPLES_SUFFIX).exists():
            curves[entry["title"]] = _curve(curve, points)
    return Comparison(
        run=run,
        systems={result.name: result for result in results if result.saturated_per_s.values},
        ceiling_per_s=Spread(tuple(json.loads((r / "ceiling.json").read_text())["reviews_per_s"] for r in rounds)),
        candidates=json.loads((folder / "candidates.json").read_text()),
        curve_ms=curves,
    )


def _curve(out: Path, points: Sequence[dict[str, Any]]) -> dict[int, float]:
    latency_ms = samples.read(out.with_name(out.name + SAMPLES_SUFFIX)).latency_s * 1000
    repeats = len(latency_ms) // len(points)
    return {
        int(point["tokens"]): float(np.median(latency_ms[place * repeats : (place + 1) * repeats]))
        for place, point in enumerate(points)
    }


def _system(entry: dict[str, str], rounds: Sequence[Path]) -> SystemResult:
    name = entry["name"]
    at = _loads(name, measure.SATURATED, rounds)
    complete = [out.parent for out in at]
    records = [json.loads(out.with_name(out.name + ".json").read_text()) for out in at]
    tokens = [record["tokens"] for record in records if record["tokens"].get("review")]
    is_service = bool(entry["is_service"])
    lone = _loads(name, measure.LONE, complete)
    outcomes = _outcomes(name, complete)
    return SystemResult(
        name=name,
        title=entry["title"],
        engine=entry["engine"],
        saturated_per_s=_each(at, _right_per_s),
        sustained_per_s=_each(complete, lambda r: _sustained(name, r)),
        saturated_p50_ms=_each(at, _p50_ms),
        generator_cores=_each(records, lambda r: r["generator_cpu_s"] / r["wall_s"]),
        server_cores=_each(records, lambda r: sum(r["server_cpu_s"].values()) / r["wall_s"]),
        tokenizer_share=_each(records if is_service else [], lambda r: cpu.share(r["server_cpu_s"], "tokenizer")),
        padding_share=_each(tokens, lambda t: t["padding"] / (t["padding"] + t["review"])),
        short_per_s=_each(_loads(name, measure.one_length(measure.SHORT_TOKENS), complete), _right_per_s),
        long_per_s=_each(_loads(name, measure.one_length(measure.LONG_TOKENS), complete), _right_per_s),
        lone_p50_ms=_each(lone, _p50_ms),
        in_process_p50_ms=_each(lone, _in_process_p50_ms),
        requests=outcomes.total(),
        wrong=outcomes.pop(WRONG, 0),
        failures={kind: count for kind, count in sorted(outcomes.items()) if kind != OK},
    )


def _loads(name: str, load: str, rounds: Sequence[Path]) -> list[Path]:
    """Returns the raw files, without their endings, of a system's load in the rounds that have it."""
    return [out for r in rounds if (out := r / f"{name}.{load}").with_name(f"{out.name}.json").exists()]


def _right_per_s(out: Path) -> float:
    return measure.summarise(out).right_per_s


def _each(items: Sequence[Any], figure: Callable[[Any], float]) -> Spread:
    return Spread(tuple(figure(item) for item in items))


def _in_process_p50_ms(out: Path) -> float:
    """Returns the median of the runs before and after the lone load `out`."""
    files = (out.with_suffix(f".{part}.json") for part in measure.IN_PROCESS)
    return 1000 * float(np.median([json.loads(file.read_text()) for file in files]))


def _p50_ms(out: Path) -> float:
    data = samples.read(out.with_name(out.name + SAMPLES_SUFFIX))
    return float(np.median(data.latency_s[data.ok]) * 1000) if data.ok.any() else float("nan")


def _sustained(name: str, folder: Path) -> float:
    """Returns the highest rate offered in a window that held."""
    held = [0.0]
    for file in folder.glob(f"{name}.open-*.json"):
        out = file.with_name(file.name.removesuffix(".json"))
        if measure.summarise(out).holds:
            start_s, end_s = json.loads(file.read_text())["window_s"]
            due_s = samples.read(out.with_name(out.name + SAMPLES_SUFFIX)).scheduled_s
            held.append(float(((due_s >= start_s) & (due_s < end_s)).sum()) / (end_s - start_s))
    return max(held)


def _outcomes(name: str, rounds: Sequence[Path]) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for folder in rounds:
        for file in folder.glob(f"{name}.*{SAMPLES_SUFFIX}"):
            outcomes.update(samples.read(file).outcomes)
    return outcomes
