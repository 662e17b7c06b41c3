"""What a run's measurements amount to: which limits broke, which are invalid, and both tools side by side.

Pure functions of summaries, shared by the gate and the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.answers import WrongAnswerError
from benchmarks.profiles import Limits, Profile, Validity
from benchmarks.samples import SAMPLES_SUFFIX
from benchmarks.summary import Summary, summarise

MEMORY_FILE = "memory.csv"
RUN_FILE = "run.json"
WRONG_ANSWER = WrongAnswerError.__name__
"""The kind of failure that no run may hold."""
SETTLE_S = 120
"""Memory may grow this long after the start before its growth counts."""


@dataclass(frozen=True)
class Verdict:
    """Whether a run keeps its promise, and why not."""

    broken: list[str]
    """Limits that do not hold, and measurements that are needed for the gate and invalid."""
    remarks: list[str]
    """What is worth knowing and breaks nothing: invalid measurements outside the gate, tools that disagree."""
    judged: bool
    """Whether a measurement had to keep the limits on latency, by a profile that is known."""

    @property
    def passed(self) -> bool | None:
        """False where something is broken, None where nothing is and nothing was judged."""
        return False if self.broken else True if self.judged else None


def read_all(folder: Path) -> list[Summary]:
    """Returns the summaries of every measurement in `folder`, by name."""
    files = sorted(file for file in folder.glob("*.json") if file.with_name(file.stem + SAMPLES_SUFFIX).exists())
    return [summarise(file) for file in files]


def judge(
    summaries: Sequence[Summary], limits: Limits, validity: Validity, profile: Profile | None, folder: Path
) -> Verdict:
    """Returns the verdict over a run's measurements; memory growth is judged where the profile limits it.

    `profile` is None where it is not known any more or was not run to its end: failures that break every run are still
    told, memory is not judged.
    """
    broken: list[str] = []
    remarks: list[str] = []
    for summary in summaries:
        invalid = [f"{summary.name}: invalid, {reason}" for reason in summary.invalid(validity)]
        (broken if summary.gate else remarks).extend(invalid)
        broken += [f"{summary.name}: {reason}" for reason in broken_by(summary, limits)]
    remarks += disagreements(summaries, validity)
    broken += memory_growth(folder / MEMORY_FILE, profile.max_memory_growth_percent if profile else None)
    if profile is not None:  # another file's limits may be those of a profile that is not known here
        broken += memory_excess(folder / MEMORY_FILE, limits.memory_mib)
        if not (folder / MEMORY_FILE).exists() or not processes.most_mib(folder / MEMORY_FILE):
            remarks.append("memory: no process of the server could be watched, so its limits were not checked")
    return Verdict(broken, remarks, judged=profile is not None and any(summary.gate for summary in summaries))


def headline(outcome: Verdict, limits: Limits) -> str:
    """Returns the outcome and what it is about, in one line."""
    latencies = f"p50 <= {limits.p50_ms:g} ms, p99 <= {limits.p99_ms:g} ms"
    if outcome.passed is None:
        return f"not judged: {latencies}, for no measurement is gated by a profile that is known and was run to its end"
    return f"{'passed' if outcome.passed else 'failed'}: {latencies}, failures <= {limits.failures_percent:g} %"


def broken_by(summary: Summary, limits: Limits) -> list[str]:
    """Returns what of one measurement breaks its run.

    Wrong answers always, failures beyond their limit in all but a search's probes, the other limits where it is gated.
    """
    wrong = summary.failures.get(WRONG_ANSWER, 0)
    first = f", the first: {summary.first_wrong_answer}" if summary.first_wrong_answer else ""
    reasons = [f"{wrong} wrong answers{first}"] if wrong else []
    if summary.gate:
        reasons += summary.broken(limits)
    elif not summary.load.probe and summary.failures_percent > limits.failures_percent:
        reasons.append(f"failures_percent is {summary.failures_percent:.1f}, limit {limits.failures_percent:g}")
    return [f"{reason} ({failure_kinds(summary)})" if "failures" in reason else reason for reason in reasons]


def failure_kinds(summary: Summary) -> str:
    """Returns how many requests failed in which way, as in `ServerError 3, WrongAnswerError 1`; none is `none`."""
    return ", ".join(f"{kind} {count}" for kind, count in summary.failures.items()) or "none"


def memory_growth(file: Path, limit_percent: float | None) -> list[str]:
    """Returns which processes grew by more than `limit_percent`, and whether none was watched long enough."""
    if limit_percent is None:
        return []
    growth = processes.growth_percent(file, SETTLE_S) if file.exists() else {}
    if not growth:
        return ["memory: no process of the server was watched long enough to tell its growth"]
    return [
        f"memory: {name} grew by {percent:.1f} %, limit {limit_percent:g} %"
        for name, percent in growth.items()
        if percent > limit_percent
    ]


def memory_excess(file: Path, limits_mib: Mapping[Any, float]) -> list[str]:
    """Returns which processes were resident with more than their limit; nothing where none was watched.

    `limits_mib` goes by step; the instances of a step are "classifier", "classifier 2" and so on.
    """
    most = processes.most_mib(file) if file.exists() else {}
    return [
        f"memory: {name} held {mib:.0f} MiB, limit {limits_mib[name.split()[0]]:g} MiB"
        for name, mib in most.items()
        if mib > limits_mib.get(name.split()[0], float("inf"))
    ]


def pairs(summaries: Sequence[Summary]) -> list[tuple[Summary, Summary]]:
    """Returns the measurements of the same load by Locust and by perf_analyzer."""
    by_load: dict[tuple[Any, ...], dict[str, Summary]] = {}
    for summary in summaries:
        by_load.setdefault(summary.load.sent, {}).setdefault(summary.load.tool, summary)
    return [(found["locust"], found["perf_analyzer"]) for found in by_load.values() if len(found) == 2]


def disagreements(summaries: Sequence[Summary], validity: Validity) -> list[str]:
    """Returns where p50 or p99 of the two tools differ by more than the validity's limit."""
    lines = []
    for locust, other in pairs(summaries):
        for key in ("p50_ms", "p99_ms"):
            ours, theirs = getattr(locust, key), getattr(other, key)
            percent = 100 * abs(ours - theirs) / max(min(ours, theirs), 1e-9)
            if not percent <= validity.max_disagreement_percent:
                lines.append(
                    f"{locust.name} and {other.name}: {key} {ours:.1f} by Locust, {theirs:.1f} by perf_analyzer, "
                    f"{percent:.0f} % apart"
                )
    return lines


_COLUMNS = (
    ("offered", 8),
    ("answered", 8),
    ("failed", 7),
    ("p50", 7),
    ("p95", 7),
    ("p99", 7),
    ("batch", 6),
    ("queue", 6),
)
_HEADER = f"{'measurement':<34} " + " ".join(f"{name:>{width}}" for name, width in _COLUMNS)


def table(summaries: Sequence[Summary]) -> str:
    """Returns one line a measurement: requests a second, failures, ms, reviews an execution, share of queueing."""
    lines = [_HEADER]
    for summary in summaries:
        batching = summary.batching
        merged = f"{batching.reviews_per_execution['classifier']:6.1f} {batching.queue_share:6.0%}" if batching else ""
        lines.append(
            f"{summary.name:<34} {summary.offered_per_s:8.1f} {summary.answered_per_s:8.1f} "
            f"{summary.failures_percent:6.2f}% "
            f"{summary.p50_ms:7.1f} {summary.p95_ms:7.1f} {summary.p99_ms:7.1f} {merged}"
        )
    return "\n".join(lines)


def as_json(summary: Summary) -> dict[str, Any]:
    """Returns a summary as JSON shows it."""
    return {**asdict(summary), "load": summary.load.model_dump(), "failures_percent": summary.failures_percent}
