"""Runs the measurements and writes their raw files; works nothing out beyond what the next measurement needs.

OUT/run.json                         plan, machine, systems, what was skipped and why, versions, command
OUT/candidates.json                  in process, once
OUT/lengths.json                     texts of given numbers of tokens
OUT/round-N/SYSTEM.LOAD.json         one load (benchmarks/compare/load.py); .csv.gz: its samples
OUT/round-N/SYSTEM.log               what the server printed

Of this service only:

OUT/round-N/SYSTEM.saturated-turn-*  the saturating load again
OUT/round-N/SYSTEM.ceiling-*.json    in process, before, between and after the turns of the saturating load
OUT/round-N/SYSTEM.saturated-TOKENS.* a saturating load of texts of one length
OUT/round-N/SYSTEM.lone.*            lone reviews, in turn with the same ones in process
OUT/round-N/SYSTEM.curve.*           the same with the texts of OUT/lengths.json
"""

import json
import logging
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import samples
from benchmarks.compare import load
from benchmarks.compare.load import Spec
from benchmarks.compare.plan import CURVE_TOKENS, LIMIT_S, MIN_SHARE_IN_TIME, Plan
from benchmarks.compare.server import Server, StartError, running
from benchmarks.compare.systems import CHECKOUT, PYTHON, Machine, System
from benchmarks.peers.served import lone_threads
from benchmarks.samples import SAMPLES_SUFFIX

LENGTHS_FILE = "lengths.json"
SHORT_TOKENS, LONG_TOKENS = 20, 256
"""Lengths that the aim about short texts names."""
SATURATED, LONE, CURVE = "saturated", "lone", "curve"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What the next measurement needs to know of one load."""

    right_per_s: float
    """Right answers a second of the window. One that was on its way at an edge counts by the part of its time within:
    a server that answers whole batches would otherwise gain or lose one by chance."""
    holds: bool
    """Whether enough requests due in the window were answered rightly within the limit."""


@dataclass(frozen=True)
class Bench:
    """Everything that all measurements share."""

    plan: Plan
    machine: Machine
    texts: Sequence[str]
    labels: Sequence[str | None]
    out: Path
    seed: int
    ceiling: Mapping[str, object] = field(default_factory=dict)
    """The candidates that contend for it, and how long each runs."""

    def in_process(self, task: str, out: Path, **numbers: object) -> Any:
        """Runs a task of benchmarks/compare/inprocess.py and returns what it wrote to `out`."""
        spec = {"texts": self.texts, "threads": self.machine.threads, **numbers}
        with tempfile.TemporaryDirectory() as folder:
            spec_file = Path(folder) / "spec.json"
            spec_file.write_text(json.dumps(spec))
            module = [str(self.machine.serve_python), "-m", "benchmarks.compare.inprocess"]
            subprocess.run([*module, task, str(spec_file), str(out)], cwd=CHECKOUT, check=True)
        return json.loads(out.read_text())

    def load(self, spec: Spec, out: Path) -> Loaded:
        """Runs one load in a process of its own; its raw files are `out` with two endings."""
        with tempfile.TemporaryDirectory() as folder:
            spec_file = Path(folder) / "spec.json"
            spec_file.write_text(load.to_json(spec))
            module = [PYTHON, "-m", "benchmarks.compare.load"]
            subprocess.run([*module, str(spec_file), str(out)], cwd=CHECKOUT, check=True)
        return summarise(out)

    def system(self, system: System, folder: Path) -> str:
        """Measures one system once; returns why it could not be, "" if it was."""
        log_file = folder / f"{system.name}.log"
        try:
            with running(system, self.machine, log_file) as server:
                saturated_per_s = self._saturated(system, server, folder)
                logger.info("%s: %.1f reviews/s saturated", system.name, saturated_per_s)
                if system.is_service:
                    self._one_length(system, server, folder)
                    self._lone(system, server, folder)
                if not system.open_loop:
                    self._open_loops(system, server, saturated_per_s, folder)
            if system.open_loop:
                log_file = folder / f"{system.name}.open.log"
                with running(system, self.machine, log_file, system.open_loop) as server:
                    self._warm_up(server)
                    self._open_loops(system, server, saturated_per_s, folder)
        except (StartError, subprocess.CalledProcessError) as error:
            logger.warning("%s: %s", system.name, error)
            return str(error)
        return ""

    def _spec(self, server: Server) -> Spec:
        return Spec(server.door, self.texts, self.labels, server.pid, 0, 0, seed=self.seed)

    def _closed(self, server: Server, window_s: float) -> Spec:
        plan = self.plan
        return replace(
            self._spec(server), users=plan.users, warmup_s=plan.warmup_s, window_s=window_s, triton=server.triton
        )

    def _warm_up(self, server: Server) -> None:
        """Puts a fresh server under the load that the others have had before their open loops."""
        with tempfile.TemporaryDirectory() as folder:
            self.load(self._closed(server, self.plan.saturated_s), Path(folder) / "warm-up")

    def _open_loops(self, system: System, server: Server, saturated_per_s: float, folder: Path) -> None:
        """Looks for the highest rate that holds."""
        plan = self.plan
        spec = replace(self._spec(server), server_pid=0)  # reading CPU times would make requests wait

        def holds(share: float) -> bool:
            rate_per_s = share * saturated_per_s
            window_s = plan.probe_window_s(rate_per_s)
            open_loop = replace(spec, warmup_s=plan.settle_s, window_s=window_s, rate_per_s=rate_per_s)
            held = self.load(open_loop, folder / f"{system.name}.open-{round(share * 100):03d}").holds
            logger.info("%s: %.1f requests/s %s", system.name, rate_per_s, "hold" if held else "do not hold")
            return held

        if saturated_per_s:
            highest(plan.ladder, holds)

    def _saturated(self, system: System, server: Server, folder: Path) -> float:
        """Returns right answers a second; of this service over several turns, in process before and after each."""
        closed = self._closed(server, self.plan.saturated_s)
        if not system.is_service:
            return self.load(closed, folder / f"{system.name}.{SATURATED}").right_per_s
        found = []
        for number in range(1, self.plan.turns + 1):
            self.in_process("ceiling", folder / f"{system.name}.{ceiling(number)}.json", **self.ceiling)
            found.append(self.load(closed, folder / f"{system.name}.{saturated_turn(number)}").right_per_s)
        self.in_process("ceiling", folder / f"{system.name}.{ceiling(self.plan.turns + 1)}.json", **self.ceiling)
        return float(np.mean(found))

    def _one_length(self, system: System, server: Server, folder: Path) -> None:
        """Saturates with one length at a time: what its tokens cost once requests share what each costs by itself."""
        texts = {entry["tokens"]: entry["text"] for entry in json.loads((self.out / LENGTHS_FILE).read_text())}
        for tokens in (SHORT_TOKENS, LONG_TOKENS):
            closed = self._closed(server, self.plan.one_length_s)
            one = replace(closed, texts=[texts[tokens]], labels=[None])
            self.load(one, folder / f"{system.name}.{one_length(tokens)}")

    def _lone(self, system: System, server: Server, folder: Path) -> None:
        spec = replace(self._spec(server), lone_threads=lone_threads())
        own = slice(self.plan.lone_requests)
        self.load(replace(spec, texts=self.texts[own], labels=self.labels[own]), folder / f"{system.name}.{LONE}")
        texts = [entry["text"] for entry in json.loads((self.out / LENGTHS_FILE).read_text())] * self.plan.curve_repeats
        self.load(replace(spec, texts=texts, labels=[None] * len(texts)), folder / f"{system.name}.{CURVE}")


def saturated_turn(number: int) -> str:
    """Returns the name of this service's saturating load, which runs several times, from 1 on."""
    return SATURATED if number == 1 else f"{SATURATED}-turn-{number}"


def ceiling(number: int) -> str:
    """Returns the name of what ran in process before turn `number`, or after the last.

    A virtual machine may be at two thirds of its speed for some seconds, and at all of it for the next: what is
    compared has to take turns.
    """
    return f"ceiling-{number}"


def one_length(tokens: int) -> str:
    """Returns the name of the saturating load of texts of `tokens` tokens."""
    return f"{SATURATED}-{tokens}"


def summarise(out: Path) -> Loaded:
    """Returns the outcome of the load whose raw files are `out` with two endings."""
    record = json.loads(out.with_name(out.name + ".json").read_text())
    data = samples.read(out.with_name(out.name + SAMPLES_SUFFIX))
    start_s, end_s = record["window_s"]
    if end_s <= start_s:
        return Loaded(0.0, False)
    within_s = np.minimum(data.done_s, end_s) - np.maximum(data.sent_s, start_s)
    parts = np.clip(within_s, 0, None)[data.ok] / np.maximum(data.done_s - data.sent_s, 1e-9)[data.ok]
    due = (data.scheduled_s >= start_s) & (data.scheduled_s < end_s)
    in_time = data.ok & (data.latency_s <= LIMIT_S)
    share = float(np.mean(in_time[due])) if due.any() else 0.0
    right_per_s = float(parts.sum()) / (end_s - start_s)
    return Loaded(right_per_s, bool(record["complete"]) and share >= MIN_SHARE_IN_TIME)


def highest(ladder: Sequence[float], holds: Callable[[float], bool]) -> float:
    """Returns the highest step of the ascending `ladder` that holds, by bisection; 0 if none does."""
    low, high = 0, len(ladder)  # everything below `low` holds, everything from `high` on does not
    while low < high:
        middle = (low + high) // 2
        if holds(ladder[middle]):
            low = middle + 1
        else:
            high = middle
    return ladder[low - 1] if low else 0.0


def fastest_of_each_layout(candidates: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns layout and grouping of the candidate with most reviews a second in each layout.

    One of each, since a single look at them all may pick a layout that was lucky: two threads for one engine lead two
    engines with a thread each within the noise once, and hold far less in the long run.
    """
    best: dict[str, Mapping[str, Any]] = {}
    for candidate in sorted(candidates, key=lambda candidate: float(candidate["reviews_per_s"])):
        best[candidate["layout"]] = candidate
    return [{"layout": one["layout"], "grouping": one["grouping"]} for one in best.values()]


def measure(bench: Bench, systems: Sequence[System], skipped: dict[str, str]) -> None:
    """Measures everything, in another order each round; reasons for systems that fail are added to `skipped`."""
    plan, out = bench.plan, bench.out
    logger.info("in process: layouts and groupings")
    candidates = bench.in_process("candidates", out / "candidates.json", length_s=plan.candidate_s)
    bench.in_process("lengths", out / LENGTHS_FILE, tokens=CURVE_TOKENS)
    bench = replace(bench, ceiling={"candidates": fastest_of_each_layout(candidates), "length_s": plan.ceiling_s})
    order = np.random.default_rng(bench.seed)
    for number in range(1, plan.rounds + 1):
        folder = out / f"round-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        logger.info("round %d of %d", number, plan.rounds)
        this_round = replace(bench, seed=bench.seed + number)  # other arrivals and another order of the texts
        for index in order.permutation(len(systems)):
            system = systems[index]
            if system.name not in skipped:
                reason = this_round.system(system, folder)
                if reason:
                    skipped[system.name] = reason
