"""The figures of a comparison: a pure function of the raw files that benchmarks/compare/measure.py wrote."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import samples, triton_metrics
from benchmarks.compare import cpu, measure
from benchmarks.compare.load import WRONG
from benchmarks.samples import OK, SAMPLES_SUFFIX

IN_PROCESS = "in process"


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
        """Returns the ratios round by round, only rounds that both have; infinite over 0, and 0 over 0 not a number."""
        pairs = zip(self.values, other.values, strict=False)
        return Spread(tuple(own / its if its else (float("inf") if own else float("nan")) for own, its in pairs))


@dataclass(frozen=True)
class SystemResult:
    """One system over all rounds."""

    name: str
    title: str
    engine: str
    saturated_per_s: Spread
    sustained_per_s: Spread
    """Highest open-loop rate that held; 0 where none of the ladder did."""
    sustained_at_most_per_s: Spread
    """The same, but the ladder's lowest rate, which did not hold, where none did: what ratios are taken over."""
    generator_cores: Spread
    """CPU seconds of the load generator a second, at saturation."""
    server_cores: Spread
    tokenizer_share: Spread
    """Of the server's CPU time at saturation, in its tokenizer's process; empty for peers."""
    ceiling_per_s: Spread
    """In process, before, between and after the turns of saturation, of the faster layout; empty for peers."""
    padding_share: Spread
    """Of the tokens run at saturation; empty for peers."""
    reviews_per_execution: Spread
    """Of the classifier, at saturation; empty for peers."""
    phases: dict[str, Spread]
    """Shares of the server's time at saturation: queue, tokenizing, inference, other; empty for peers."""
    short_per_s: Spread
    long_per_s: Spread
    """At saturation with texts of `measure.SHORT_TOKENS` and `LONG_TOKENS` alone; empty for peers."""
    lone_p50_ms: Spread
    in_process_p50_ms: Spread
    """Tokenizing and inferring the same lone reviews in process, in turn with sending them."""
    curves: tuple["Curve", ...]
    """Of each round; empty for peers."""
    requests: int
    """Of all loads."""
    wrong: int
    failures: dict[str, int]
    """By kind, wrong answers left out."""


@dataclass(frozen=True)
class Curve:
    """Median time of one review against its tokens, in ms."""

    served_ms: dict[int, float]
    in_process_ms: dict[int, float]
    """In turn with sending them."""


@dataclass(frozen=True)
class Comparison:
    """Everything that the report shows."""

    run: dict[str, Any]
    systems: dict[str, SystemResult]
    candidates: list[dict[str, Any]]

    @property
    def ceiling_per_s(self) -> Spread:
        """Every ceiling measured, whichever door of the service it stood beside."""
        return Spread(tuple(value for result in self.systems.values() for value in result.ceiling_per_s.values))

    @property
    def curves(self) -> dict[str, list[dict[int, float]]]:
        """Time in ms by tokens, a curve for each round: `IN_PROCESS`, and of each door of the service."""
        doors = [result for result in self.systems.values() if result.curves]
        in_process = [curve.in_process_ms for result in doors for curve in result.curves]
        return {IN_PROCESS: in_process, **{r.title: [curve.served_ms for curve in r.curves] for r in doors}}


def read(folder: Path) -> Comparison:
    """Reads the raw files under `folder`; systems without a complete round are left out.

    Raises:
        ValueError: `folder` holds no run.
    """
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} holds no run.json, expected a results folder of `make bench-compare`")
    run = json.loads((folder / "run.json").read_text())
    rounds = sorted(folder.glob("round-*"))
    ladder = run["plan"].get("ladder", [])
    turns = run["plan"].get("turns", 1)
    results = (_system(entry, rounds, ladder, turns if entry["is_service"] else 1) for entry in run["systems"])
    return Comparison(
        run=run,
        systems={result.name: result for result in results if result.saturated_per_s.values},
        candidates=json.loads((folder / "candidates.json").read_text()),
    )


def _system(entry: dict[str, str], rounds: Sequence[Path], ladder: Sequence[float], turns: int) -> SystemResult:
    name = entry["name"]
    is_service = bool(entry["is_service"])
    at = _loads(name, measure.SATURATED, rounds)
    if is_service:  # an interrupted run may lack the last ceiling of its last round
        at = [out for out in at if out.with_suffix(f".{measure.ceiling(turns + 1)}.json").exists()]
    at = [out for out in at if _is_finished(out, name, ladder)]
    complete = [out.parent for out in at]
    records = [_record(_turns(out, turns)) for out in at]
    done = [triton_metrics.batching(**record["triton"]) for record in records if record.get("triton")]
    batching = [one for one in done if one]
    lone = _loads(name, measure.LONE, complete)
    outcomes = _outcomes(name, complete)
    return SystemResult(
        name=name,
        title=entry["title"],
        engine=entry["engine"],
        saturated_per_s=_each(at, lambda out: _saturated_per_s(out, turns)),
        sustained_per_s=_each(complete, lambda r: _sustained(name, r)),
        sustained_at_most_per_s=_each(
            at, lambda out: _sustained(name, out.parent) or min(ladder, default=0.0) * _saturated_per_s(out, turns)
        ),
        generator_cores=_each(records, lambda r: r["generator_cpu_s"] / r["wall_s"]),
        server_cores=_each(records, lambda r: sum(r["server_cpu_s"].values()) / r["wall_s"]),
        tokenizer_share=_each(records if is_service else [], lambda r: cpu.share(r["server_cpu_s"], "tokenizer")),
        ceiling_per_s=_each(at if is_service else [], lambda out: _ceiling_per_s(out, turns)),
        padding_share=_each(batching, lambda b: 1 - 1 / (b.padded_over_real_tokens or float("nan"))),
        reviews_per_execution=_each(batching, lambda b: b.reviews_per_execution["classifier"]),
        phases={phase: _each(batching, attrgetter(f"{phase}_share")) for phase in triton_metrics.PHASES if batching},
        short_per_s=_each(_loads(name, measure.one_length(measure.SHORT_TOKENS), complete), _right_per_s),
        long_per_s=_each(_loads(name, measure.one_length(measure.LONG_TOKENS), complete), _right_per_s),
        lone_p50_ms=_each(lone, _p50_ms),
        in_process_p50_ms=_each(lone, lambda out: 1000 * float(np.median(_in_process_s(out)))),
        curves=tuple(_curve(out) for out in _loads(name, measure.CURVE, complete)),
        requests=outcomes.total(),
        wrong=outcomes.pop(WRONG, 0),
        failures={kind: count for kind, count in sorted(outcomes.items()) if kind != OK},
    )


def _loads(name: str, load: str, rounds: Sequence[Path]) -> list[Path]:
    """Returns the raw files, without their endings, of a system's load in the rounds that have it."""
    return [out for r in rounds if (out := r / f"{name}.{load}").with_name(f"{out.name}.json").exists()]


def _right_per_s(out: Path) -> float:
    return measure.summarise(out).right_per_s


def _turns(saturated: Path, turns: int) -> list[Path]:
    """Returns the raw files, without their endings, of each turn of the load `saturated`."""
    return [saturated.with_suffix(f".{measure.saturated_turn(number)}") for number in range(1, turns + 1)]


def _saturated_per_s(saturated: Path, turns: int) -> float:
    return float(np.mean([_right_per_s(turn) for turn in _turns(saturated, turns)]))


def _record(turns: Sequence[Path]) -> dict[str, Any]:
    """Returns what was noted over all `turns`; the server has nothing to do between them."""
    records = [json.loads(turn.with_name(turn.name + ".json").read_text()) for turn in turns]
    server_cpu_s: Counter[str] = Counter()
    for record in records:
        server_cpu_s.update(record["server_cpu_s"])
    ends = [record["triton"] for record in records if record.get("triton")]
    return {
        "wall_s": sum(record["wall_s"] for record in records),
        "generator_cpu_s": sum(record["generator_cpu_s"] for record in records),
        "server_cpu_s": server_cpu_s,
        "triton": {"before": ends[0]["before"], "after": ends[-1]["after"]} if ends else None,
    }


def _each(items: Sequence[Any], figure: Callable[[Any], float]) -> Spread:
    return Spread(tuple(figure(item) for item in items))


def _ceiling_per_s(saturated: Path, turns: int) -> float:
    """Returns what the faster layout ran in process around the turns of the load `saturated`, the mean of all."""
    files = (saturated.with_suffix(f".{measure.ceiling(number)}.json") for number in range(1, turns + 2))
    rates = [[float(one["reviews_per_s"]) for one in json.loads(file.read_text())] for file in files]
    return float(np.mean(rates, axis=0).max())


def _in_process_s(out: Path) -> list[float]:
    seconds: list[float] = json.loads(out.with_name(out.name + ".json").read_text())["in_process_s"]
    return seconds


def _curve(out: Path) -> Curve:
    """Returns the curve of the lone load `out`, which went through all lengths again and again."""
    lengths = [int(entry["tokens"]) for entry in json.loads((out.parents[1] / measure.LENGTHS_FILE).read_text())]
    served_s = samples.read(out.with_name(out.name + SAMPLES_SUFFIX)).latency_s
    served, in_process = (
        {n: float(np.median(seconds[place :: len(lengths)])) * 1000 for place, n in enumerate(lengths)}
        for seconds in (served_s, np.array(_in_process_s(out)))
    )
    return Curve(served, in_process)


def _p50_ms(out: Path) -> float:
    data = samples.read(out.with_name(out.name + SAMPLES_SUFFIX))
    latency_s = data.latency_s[data.ok]
    return float(np.median(latency_s) * 1000) if latency_s.size else float("nan")


def _is_finished(saturated: Path, name: str, ladder: Sequence[float]) -> bool:
    """Whether the search for the highest rate that holds came to its end in the round of `saturated`.

    One that was cut off would count as a rate that does not hold, in the end as 0.
    """
    if not measure.summarise(saturated).right_per_s:
        return True  # nothing was to be looked for
    missing = []

    def holds(share: float) -> bool:
        out = saturated.with_name(f"{name}.open-{round(share * 100):03d}")
        if not out.with_name(out.name + ".json").exists():
            missing.append(share)
            return False
        return measure.summarise(out).holds

    measure.highest(ladder, holds)
    return not missing


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
