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
    ceiling_per_s: Spread
    """In process, right before and right after saturation, of the faster layout; empty for peers."""
    padding_share: Spread
    """Of the tokens run at saturation; empty where the server does not count them."""
    short_per_s: Spread
    long_per_s: Spread
    """At saturation with texts of `measure.SHORT_TOKENS` and `LONG_TOKENS` alone; empty for peers."""
    lone_p50_ms: Spread
    in_process_p50_ms: Spread
    """Tokenizing and inferring the same lone reviews in process, in turn with sending them."""
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
    candidates: list[dict[str, Any]]
    curve_ms: dict[str, dict[int, float]]
    """Median time by tokens, `in process` and for each door of the service."""

    @property
    def ceiling_per_s(self) -> Spread:
        """Every ceiling measured, whichever door of the service it stood beside."""
        return Spread(tuple(value for result in self.systems.values() for value in result.ceiling_per_s.values))


def read(folder: Path) -> Comparison:
    """Reads the raw files under `folder`; systems without a complete round are left out."""
    run = json.loads((folder / "run.json").read_text())
    rounds = sorted(folder.glob("round-*"))
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
    is_service = bool(entry["is_service"])
    at = _loads(name, measure.SATURATED, rounds)
    if is_service:  # an interrupted run may lack the second ceiling of its last round
        at = [out for out in at if out.with_suffix(f".{measure.CEILINGS[-1]}.json").exists()]
    complete = [out.parent for out in at]
    records = [json.loads(out.with_name(out.name + ".json").read_text()) for out in at]
    tokens = [record["tokens"] for record in records if record["tokens"].get("review")]
    lone = [parts for folder in complete if (parts := _lone_parts(name, folder))]
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
        ceiling_per_s=_each(at if is_service else [], _ceiling_per_s),
        padding_share=_each(tokens, lambda t: t["padding"] / (t["padding"] + t["review"])),
        short_per_s=_each(_loads(name, measure.one_length(measure.SHORT_TOKENS), complete), _right_per_s),
        long_per_s=_each(_loads(name, measure.one_length(measure.LONG_TOKENS), complete), _right_per_s),
        lone_p50_ms=_each(lone, lambda parts: _p50_ms(*parts)),
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


def _ceiling_per_s(saturated: Path) -> float:
    """Returns what the faster layout ran in process around the load `saturated`, the mean of before and after."""
    files = (saturated.with_suffix(f".{part}.json") for part in measure.CEILINGS)
    rates = [[float(one["reviews_per_s"]) for one in json.loads(file.read_text())] for file in files]
    return float(np.mean(rates, axis=0).max())


def _lone_parts(name: str, folder: Path) -> list[Path]:
    files = sorted(folder.glob(f"{name}.{measure.LONE}-*.json"))
    return [file.with_name(file.name.removesuffix(".json")) for file in files]


def _in_process_p50_ms(parts: Sequence[Path]) -> float:
    """Returns the median of what ran in process before each of the lone loads `parts`."""
    files = (part.with_name(f"{part.name.replace(measure.LONE, measure.IN_PROCESS)}.json") for part in parts)
    return 1000 * float(np.median([seconds for file in files for seconds in json.loads(file.read_text())]))


def _p50_ms(*loads: Path) -> float:
    data = [samples.read(out.with_name(out.name + SAMPLES_SUFFIX)) for out in loads]
    latency_s = np.concatenate([one.latency_s[one.ok] for one in data])
    return float(np.median(latency_s) * 1000) if latency_s.size else float("nan")


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
