"""CPU time of a server's processes."""

import re
from collections.abc import Mapping

import psutil

_STEP = re.compile(r"/(tokenizer|classifier)/\d+/model\.py")
CpuSeconds = Mapping[str, float]
"""CPU seconds by process: its number and what it is."""


def by_process(pid: int) -> dict[str, float]:
    """Returns the CPU seconds of process `pid` and of all below it so far, those that just ended left out."""
    found: dict[str, float] = {}
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in processes:
        try:
            times = process.cpu_times()
            found[f"{process.pid} {_name(process)}"] = times.user + times.system
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def _name(process: psutil.Process) -> str:
    step = _STEP.search(" ".join(process.cmdline()))
    return step[1] if step else str(process.name())


def difference(before: CpuSeconds, after: CpuSeconds) -> dict[str, float]:
    """Returns the CPU seconds between two calls of `by_process`."""
    return {process: seconds - before.get(process, 0.0) for process, seconds in after.items()}


def share(spent: CpuSeconds, name: str) -> float:
    """Returns the share of the CPU time in `spent` that processes called `name` took; 0 of nothing."""
    total = sum(spent.values())
    return sum(seconds for process, seconds in spent.items() if process.endswith(f" {name}")) / total if total else 0.0
