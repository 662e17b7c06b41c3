"""Resident memory and CPU time of the server's processes while a load runs."""

import contextlib
import csv
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median_high
from typing import Any

import psutil

from model_repository.classifier.engine import choose

PERIOD_S = 1.0
MEMORY_COLUMNS = ("time_s", "process", "pid", "rss_bytes")


def family(pid: int | None) -> dict[str, psutil.Process]:
    """Returns Triton's process and those of its Python models by what they do; empty where `pid` is None.

    A Python model's process names the model in its command line (…/<name>/<version>/model.py); a second instance of
    one is `<name> 2`.
    """
    if pid is None:
        return {}
    triton = psutil.Process(pid)
    named = {"triton": triton}
    for child in triton.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name, number = _model(child.cmdline()), 2
            unique = name
            while unique in named:
                unique, number = f"{name} {number}", number + 1
            named[unique] = child
    return named


def _model(command: list[str]) -> str:
    for part in command:
        path = Path(part)
        if path.name == "model.py":
            return path.parent.parent.name
    return Path(command[0]).name if command else "unknown"


class Watch:
    """Samples the processes below Triton's `pid` from now on, in a thread of its own."""

    def __init__(self, pid: int | None) -> None:
        self._origin_s = time.monotonic()
        self._processes = family(pid)
        self._rows: list[tuple[float, str, int, int]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> list[tuple[float, str, int, int]]:
        """Ends the sampling and returns its rows: seconds since the start, process, pid, resident bytes."""
        self._stopped.set()
        self._thread.join()
        return self._rows

    def _sample(self) -> None:
        while True:
            for name, process in self._processes.items():
                with contextlib.suppress(psutil.Error):
                    elapsed_s = time.monotonic() - self._origin_s
                    self._rows.append((elapsed_s, name, process.pid, process.memory_info().rss))
            if self._stopped.wait(PERIOD_S):
                return


@contextlib.contextmanager
def watching(pid: int | None) -> Iterator[Watch]:
    """Gives a `Watch` that has stopped at the end."""
    watch = Watch(pid)
    try:
        yield watch
    finally:
        watch.stop()


def write_memory(file: Path, rows: list[tuple[float, str, int, int]]) -> None:
    """Writes the rows of `Watch.stop` to `file`, CSV."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(MEMORY_COLUMNS)
        writer.writerows((f"{elapsed_s:.1f}", *rest) for elapsed_s, *rest in rows)


def growth_percent(file: Path, settle_s: float) -> dict[str, float]:
    """Returns by how much each process of a memory file grew from `settle_s` after the start to the end, in percent.

    Both ends are medians of ten samples. A process with too few samples after `settle_s` is left out.
    """
    growth = {}
    for name, samples in read_memory(file).items():
        late = [rss for elapsed_s, rss in samples if elapsed_s >= settle_s]
        if len(late) >= 2 * _MEDIAN_OF:
            first, last = median_high(late[:_MEDIAN_OF]), median_high(late[-_MEDIAN_OF:])
            growth[name] = 100 * (last / first - 1)
    return growth


def most_mib(file: Path) -> dict[str, float]:
    """Returns the most MiB that each process of a memory file was resident with."""
    return {name: max(rss for _, rss in samples) / 2**20 for name, samples in read_memory(file).items()}


def read_memory(file: Path) -> dict[str, list[tuple[float, int]]]:
    """Returns by process the seconds and the resident bytes of each sample."""
    columns: dict[str, list[tuple[float, int]]] = {}
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            columns.setdefault(row["process"], []).append((float(row["time_s"]), int(row["rss_bytes"])))
    return columns


_MEDIAN_OF = 10


def machine() -> dict[str, Any]:
    """Returns this machine's processor, the runtime that the classifier's `auto` means on it, cores, memory, system."""
    import platform

    model = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(psutil.Process().cpu_affinity() or []) or psutil.cpu_count()
    return {
        "cpu": model,
        "runtime": choose(),
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }
