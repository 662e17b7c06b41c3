"""Load generator of the comparison: one process, the same for every system, answers checked.

    python -m benchmarks.compare.load SPEC.json OUT        # writes OUT.json and OUT.csv.gz (raw samples)

It runs as a process of its own so that its CPU time is its own. SPEC is `Spec` as JSON. The closed loop keeps `users`
requests going; the open loop sends at Poisson arrivals, drawn by the round's seed and the rate, and times each request
from its arrival. An open loop ends as soon as more requests are late than `plan.MIN_SHARE_IN_TIME` allows.
Lone reviews are sent one after the other by a blocking client, in turn with the same work in this process
(benchmarks/compare/lone.py).
"""

import asyncio
import json
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import samples, triton_metrics
from benchmarks.arrivals import poisson_s
from benchmarks.compare import cpu, doors, lone
from benchmarks.compare.plan import LIMIT_S, MIN_SHARE_IN_TIME
from benchmarks.samples import OK, SAMPLES_SUFFIX, Sample
from benchmarks.texts import mixed_order

WRONG = "wrong answer"


@dataclass(frozen=True)
class Spec:
    """One load."""

    door: doors.Door
    texts: Sequence[str]
    labels: Sequence[str | None]
    """The right answer to each text, None where it is on the fence."""
    server_pid: int
    """Whose CPU time, children included, is noted; 0 for none."""
    warmup_s: float
    window_s: float
    users: int = 0
    """Of a closed loop."""
    rate_per_s: float = 0.0
    """Of an open loop."""
    lone_threads: int = 0
    """Of the engine in this process where each text is sent once, alone, in turn with tokenizing and inferring it here.
    Exactly one of `users`, `rate_per_s` and `lone_threads` is set."""
    seed: int = 1
    triton: Sequence[str] = ()
    """HTTP address and metrics of Triton, whose counters are noted; empty for none."""


class Generator:
    """Sends and notes; times are those of `time.perf_counter`."""

    def __init__(self, spec: Spec, ask: doors.Ask) -> None:
        self._spec = spec
        self._ask = ask
        self.samples: list[Sample] = []
        self._order = mixed_order([len(text) for text in spec.texts], spec.seed)
        self._sent = 0
        self.late_or_wrong = 0
        """Requests due in the window that are not answered rightly within `LIMIT_S`."""
        self.window_start_s = float("inf")

    async def send(self, due_s: float, index: int | None = None) -> None:
        """Sends one review, the next in the shuffled order by default, and notes what came of it."""
        if index is None:
            index = self._order[self._sent % len(self._order)]
            self._sent += 1
        sent_s = time.perf_counter()
        try:
            label = await self._ask(index)
            expected = self._spec.labels[index]
            outcome = OK if expected in (None, label) else WRONG
        except Exception as error:  # whatever a system may answer under load is a failure of that request
            outcome = type(error).__name__
        done_s = time.perf_counter()
        self.samples.append(Sample(due_s, sent_s, done_s, 1, outcome, index))
        if due_s >= self.window_start_s and (outcome != OK or done_s - due_s > LIMIT_S):
            self.late_or_wrong += 1

    async def closed_loop(self, users: int, until_s: float) -> None:
        """Keeps `users` requests going until all that were sent before `until_s` are answered, and so under load."""
        owed = 0

        async def user() -> None:
            nonlocal owed
            while (now_s := time.perf_counter()) < until_s or owed:
                counts = now_s < until_s
                owed += counts
                await self.send(now_s)
                owed -= counts

        await asyncio.gather(*(user() for _ in range(users)))

    async def open_loop(self, arrivals_s: Sequence[float], give_up: Callable[[], bool]) -> bool:
        """Sends at each of `arrivals_s`; returns False if `give_up` said so before the last."""
        pending: set[asyncio.Task[None]] = set()
        complete = True
        for due_s in arrivals_s:
            await asyncio.sleep(due_s - time.perf_counter())
            if give_up():
                complete = False
                break
            task = asyncio.ensure_future(self.send(due_s))
            pending.add(task)
            task.add_done_callback(pending.discard)
        await asyncio.gather(*pending)
        return complete


def arrivals(rate_per_s: float, warmup_s: float, window_s: float, seed: int) -> list[float]:
    """Returns arrivals in seconds from the start, in warm-up and window as many as the rate says; others at another
    rate."""
    random = np.random.default_rng([seed, zlib.crc32(repr(rate_per_s).encode())])
    before = poisson_s(rate_per_s, warmup_s, random)
    return [*before, *(warmup_s + due_s for due_s in poisson_s(rate_per_s, window_s, random))]


async def run(spec: Spec) -> tuple[dict[str, Any], list[Sample], float]:
    """Returns the record of one load, its samples, and the origin of their clock."""
    async with doors.open_door(spec.door, spec.texts, one_at_a_time=spec.lone_threads > 0) as ask:
        generator = Generator(spec, ask)
        origin_s = time.perf_counter()
        start_s = origin_s + spec.warmup_s
        end_s = start_s + spec.window_s
        generator.window_start_s = start_s
        noted: dict[str, Any] = {}
        if spec.lone_threads:
            complete, noted = True, {"in_process_s": await lone.in_turn(spec.texts, spec.lone_threads, generator.send)}
        else:
            noting = asyncio.ensure_future(_note_window(spec, start_s, end_s))
            complete = await _load(spec, generator, origin_s, start_s, end_s)
            if complete:
                noted = await noting
            else:
                noting.cancel()
    record = {"complete": complete, "window_s": [start_s - origin_s, end_s - origin_s], **noted}
    return record, generator.samples, origin_s


async def _load(spec: Spec, generator: Generator, origin_s: float, start_s: float, end_s: float) -> bool:
    if spec.users:
        await generator.closed_loop(spec.users, end_s)
        return True
    due_s = [origin_s + at_s for at_s in arrivals(spec.rate_per_s, spec.warmup_s, spec.window_s, spec.seed)]
    allowed = (1 - MIN_SHARE_IN_TIME) * sum(time_s >= start_s for time_s in due_s)
    return await generator.open_loop(due_s, lambda: generator.late_or_wrong > allowed)


async def _note_window(spec: Spec, start_s: float, end_s: float) -> dict[str, Any]:
    """Returns CPU seconds of generator and server over the window, and Triton's counters at both ends of it."""
    before = await _note_at(spec, start_s)
    after = await _note_at(spec, end_s)
    return {
        "wall_s": after["time_s"] - before["time_s"],
        "generator_cpu_s": after["own_cpu_s"] - before["own_cpu_s"],
        "server_cpu_s": cpu.difference(before["server"], after["server"]),
        "triton": {"before": before["triton"], "after": after["triton"]} if spec.triton else None,
    }


async def _note_at(spec: Spec, when_s: float) -> dict[str, Any]:
    await asyncio.sleep(max(0.0, when_s - time.perf_counter()))
    server = cpu.by_process(spec.server_pid) if spec.server_pid else {}
    triton = triton_metrics.snapshot(*spec.triton) if spec.triton else None
    return {"time_s": time.perf_counter(), "own_cpu_s": time.process_time(), "server": server, "triton": triton}


def to_json(spec: Spec) -> str:
    """Returns what `from_json` reads."""
    return json.dumps(asdict(spec))


def from_json(text: str) -> Spec:
    """Returns the load that `to_json` wrote."""
    raw = json.loads(text)
    return Spec(**{**raw, "door": doors.Door(**raw["door"])})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one load and writes its record and samples."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2:
        print(f"benchmarks.compare.load: error: expected SPEC.json and OUT, got {arguments}", file=sys.stderr)
        return 2
    spec_file, out = Path(arguments[0]), Path(arguments[1])
    record, taken, origin_s = asyncio.run(run(from_json(spec_file.read_text())))
    samples.write(out.with_name(out.name + SAMPLES_SUFFIX), taken, origin_s)
    out.with_name(out.name + ".json").write_text(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
