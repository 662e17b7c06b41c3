"""A comparison as Markdown: one row for each system, the aims and whether they were reached, and what was left out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from benchmarks.compare.measure import LONG_TOKENS, SHORT_TOKENS
from benchmarks.compare.plan import PROMISE
from benchmarks.compare.results import Comparison, Spread, SystemResult
from benchmarks.compare.systems import FASTAPI, FASTAPI_DROPPING, FASTAPI_SHIPPED, SERVICE, SERVICE_GRPC
from benchmarks.triton_metrics import PHASES

MAX_GENERATOR_CORES = 0.85
"""From here on the load generator, one Python process, may be what limits a system."""


@dataclass(frozen=True)
class Aim:
    """One figure of the comparison beside what it should be."""

    what: str
    found: Spread
    wanted: float
    at_least: bool
    unit: str = ""

    @property
    def holds(self) -> bool:
        """Whether the median is on the right side."""
        return self.found.median >= self.wanted if self.at_least else self.found.median <= self.wanted


def aims(comparison: Comparison) -> list[Aim]:
    """Returns the aims that what was measured can speak about."""
    found = [*_against_peers(comparison), *_against_ceiling(comparison), *_lone(comparison)]
    for name in (SERVICE, SERVICE_GRPC):
        result = comparison.systems.get(name)
        if result is not None:
            found.append(Aim(f"tokenizer's share of CPU time, {result.title}", result.tokenizer_share, 0.06, False))
            found.append(Aim(f"padding's share of tokens, {result.title}", result.padding_share, 0.03, False))
    generator = Spread(tuple(result.generator_cores.highest for result in comparison.systems.values()))
    found.append(
        Aim("load generator, cores, most of a system", Spread((generator.highest,)), MAX_GENERATOR_CORES, False)
    )
    short = f"{SHORT_TOKENS} tokens over {LONG_TOKENS}"
    for result in comparison.systems.values():
        costs = result.long_per_s.over(result.short_per_s)
        found.append(Aim(f"core time of {short}, saturated, {result.title}", costs, 1 / 6, False))
    for door, curves in comparison.curves.items():
        ratio = Spread(tuple(curve[SHORT_TOKENS] / curve[LONG_TOKENS] for curve in curves))
        found.append(Aim(f"time of {short}, one at a time, {door}", ratio, 1 / 6, False))
    return [aim for aim in found if aim.found.values]


def _against_peers(comparison: Comparison) -> Iterator[Aim]:
    systems = comparison.systems
    for name in (SERVICE, SERVICE_GRPC):
        own = systems.get(name)
        if own is None:
            continue
        torch = [r for r in systems.values() if r.engine == "torch" and r.name != FASTAPI]
        no_batching_peers = (SERVICE, SERVICE_GRPC, FASTAPI_SHIPPED)
        same = [r for r in systems.values() if r.engine == "shipped" and r.name not in no_batching_peers]
        what = f"sustained rate, {own.title}, over"
        for fastapi in (systems[peer] for peer in (FASTAPI, FASTAPI_DROPPING) if peer in systems):
            yield Aim(f"{what} {fastapi.title}", own.sustained_per_s.over(fastapi.sustained_at_most_per_s), 6, True)
        if torch:
            yield Aim(f"{what} the best batching peer with torch", own.sustained_per_s.over(best(torch)), 2, True)
        if same:
            yield Aim(
                f"{what} the best batching peer with the same engine", own.sustained_per_s.over(best(same)), 1, True
            )


def best(results: Sequence[SystemResult]) -> Spread:
    """Returns the highest sustained rate of each round, whoever had it, at most."""
    rounds = zip_longest(*(result.sustained_at_most_per_s.values for result in results), fillvalue=0.0)
    return Spread(tuple(map(max, rounds)))


def _against_ceiling(comparison: Comparison) -> Iterator[Aim]:
    num_cores = float(comparison.run["threads"])
    for name in (SERVICE, SERVICE_GRPC):
        own = comparison.systems.get(name)
        if own is not None:
            ratio = own.saturated_per_s.over(own.ceiling_per_s)
            left = Spread(tuple(1 - cores / num_cores for cores in own.generator_cores.values))
            yield Aim(f"saturated throughput, {own.title}, over the ceiling", ratio, 0.85, True)
            yield Aim("... over the ceiling of the cores that the load generator left", ratio.over(left), 0.95, True)


def _lone(comparison: Comparison) -> Iterator[Aim]:
    for name in (SERVICE, SERVICE_GRPC):
        own = comparison.systems.get(name)
        if own is not None and own.lone_p50_ms.values:
            beyond = (
                served_ms - 1.15 * alone_ms
                for served_ms, alone_ms in zip(own.lone_p50_ms.values, own.in_process_p50_ms.values, strict=True)
            )
            yield Aim(
                f"p50 at concurrency 1 less 1.15 x in process, {own.title}", Spread(tuple(beyond)), 0.5, False, " ms"
            )


def markdown(comparison: Comparison) -> str:
    """Returns the whole report."""
    run = comparison.run
    parts = [
        f"# Comparison of {run['date']}",
        f"{run['threads']} cores of {run['cpu']}, shipped model in {run.get('runtime', 'openvino')}, "
        f"{run['plan']['reviews']} reviews, {run['plan']['rounds']} rounds, "
        f"`{run['command']}`{_commit(run)}. Medians of the rounds, in brackets lowest..highest. "
        f"Saturated: {run['plan']['users']} users in a closed loop. Sustained: highest open-loop rate, of the steps "
        f"tried, that holds: {PROMISE}, answered rightly; 0 where the lowest, "
        f"{min(run['plan'].get('ladder', []), default=0):.0%} of what saturates, did not hold, which ratios then take. "
        "The load generator runs on the same cores.",
        _systems(comparison),
        _aims(comparison),
        _batching(comparison),
        _candidates(comparison),
        _curve(comparison),
        _skipped(comparison),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _commit(run: Mapping[str, Any]) -> str:
    checkout = run.get("checkout") or {}  # reports before 2026-11-27 have none
    changed = " with changes" if checkout.get("dirty") else ""
    return f" at commit {checkout['commit'][:9]}{changed}" if checkout.get("commit") else ""


def show(spread: Spread, digits: int = 2) -> str:
    """Returns `median (lowest..highest)`; over a system that held no rate at all a ratio is infinite."""
    if not spread.values:
        return "-"
    median, low, high = (f"{v:.{digits}f}".replace("inf", "∞") for v in (spread.median, spread.lowest, spread.highest))
    return f"{median} ({low}..{high})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _systems(comparison: Comparison) -> str:
    systems = comparison.systems
    own = {name: systems[name] for name in (SERVICE, SERVICE_GRPC) if name in systems}
    ratios = [f"{kind}: {result.title} ÷ this" for kind in ("saturated", "sustained") for result in own.values()]
    header = ["system", "engine", "saturated /s", "sustained /s", *ratios, "generator cores", "wrong", "failed"]
    rows = [
        [
            "in-process ceiling, tokens ready",
            "shipped",
            show(comparison.ceiling_per_s, 1),
            "",
            *_ceiling_ratios(comparison),
        ]
    ]
    for result in systems.values():
        rows.append(
            [
                result.title,
                result.engine,
                show(result.saturated_per_s, 1),
                show(result.sustained_per_s, 1),
                *(show(one.saturated_per_s.over(result.saturated_per_s)) for one in own.values()),
                *(show(one.sustained_per_s.over(result.sustained_at_most_per_s)) for one in own.values()),
                show(result.generator_cores),
                f"{result.wrong} of {result.requests}",
                ", ".join(f"{count} {kind}" for kind, count in result.failures.items()) or "0",
            ]
        )
    return _table(header, rows)


def _ceiling_ratios(comparison: Comparison) -> list[str]:
    own = [comparison.systems[name] for name in (SERVICE, SERVICE_GRPC) if name in comparison.systems]
    ratios = [show(result.saturated_per_s.over(result.ceiling_per_s)) for result in own]
    return [*ratios, *[""] * len(own), "", "", ""]


def _aims(comparison: Comparison) -> str:
    rows = [
        [
            aim.what,
            show(aim.found, 3) + aim.unit,
            f"{'at least' if aim.at_least else 'at most'} {aim.wanted:.3g}{aim.unit}",
            "yes" if aim.holds else "**no**",
        ]
        for aim in aims(comparison)
    ]
    return "## Aims\n\n" + _table(["what", "found", "aim", "reached"], rows) if rows else ""


def _candidates(comparison: Comparison) -> str:
    ordered = sorted(comparison.candidates, key=lambda candidate: -float(candidate["reviews_per_s"]))
    rows = [[c["layout"], c["grouping"], f"{c['reviews_per_s']:.1f}", f"{c['tokens_per_s']:.0f}"] for c in ordered]
    header = ["engines x threads", "grouping", "reviews/s", "tokens/s"]
    return "## What the ceiling was chosen from\n\n" + _table(header, rows)


def _curve(comparison: Comparison) -> str:
    curves = {name: rounds for name, rounds in comparison.curves.items() if rounds}
    lengths = sorted(next(iter(curves.values()))[0]) if curves else []
    rows = [[str(tokens), *(show(_at(rounds, tokens)) for rounds in curves.values())] for tokens in lengths]
    header = ["tokens", *(f"{name}, ms" for name in curves)]
    return "## Time of one review against its tokens\n\nThe model's window cuts longer reviews.\n\n" + _table(
        header, rows
    )


def _at(rounds: Sequence[Mapping[int, float]], tokens: int) -> Spread:
    return Spread(tuple(curve[tokens] for curve in rounds))


def _batching(comparison: Comparison) -> str:
    rows = [
        [r.title, show(r.reviews_per_execution), show(r.padding_share, 3), *(show(r.phases[p]) for p in PHASES)]
        for r in comparison.systems.values()
        if r.phases
    ]
    header = ["system", "reviews an execution", "padding's share of tokens", *(f"share of time: {p}" for p in PHASES)]
    return "## Batching at saturation, as Triton counts\n\n" + _table(header, rows) if rows else ""


def _skipped(comparison: Comparison) -> str:
    lines = [f"- {name}: {reason}" for name, reason in comparison.run["skipped"].items()]
    return "## Not measured\n\n" + "\n".join(lines) if lines else ""
