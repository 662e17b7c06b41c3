"""One measurement with perf_analyzer, whose raw timestamps are kept in the same files as Locust's.

Where none is on the PATH, the one in the tritonclient 2.51.0 wheel is taken from `PERF_ANALYZER_DIR`, else from the
running environment (the Makefile puts it there), with the two libraries that it misses from the nvidia-pytriton wheel.
It has no warm-up of its own and measures a request from sending on: what its own sending was late by does not count,
unlike in Locust's open loop. An open loop has the arrivals and reviews of Locust's window under the same load
(arrivals.py).

It checks no answers: it could compare them with `validation_data`, but compares those of an open loop with another
request's once several are in flight. One request that fails ends it and with it the run: its measurements hold none.
"""

import csv
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import arrivals, samples, texts, triton_metrics
from benchmarks.doors import Urls
from benchmarks.locust_run import LoadError
from benchmarks.profiles import Load
from benchmarks.samples import OK, SAMPLES_SUFFIX, Sample
from benchmarks.texts import TextSource

WINDOWS = 3
"""perf_analyzer reports after this many windows; each is a third of the duration, and all three are kept."""
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
_NEVER_UNSTABLE_PERCENT = 10_000
_MAX_WINDOWS = 10
_OVERHEAD_S = 60
_NS_PER_S = 1e9


def find() -> Path | None:
    """Returns the perf_analyzer to run, None where there is none."""
    on_path = shutil.which("perf_analyzer")
    folder = Path(os.environ.get("PERF_ANALYZER_DIR") or Path(sys.prefix) / "perf_analyzer")
    in_wheel = folder / "bin" / "perf_analyzer"
    return Path(on_path) if on_path else in_wheel if in_wheel.is_file() else None


def _environment(scratch: Path) -> dict[str, str]:
    """Returns the environment in which the wheel's binary finds its libraries, linked into `scratch`."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        return dict(os.environ)
    bundled = Path(spec.origin).parent.parent / "nvidia_pytriton.libs"
    for name, pattern in _LIBRARIES.items():
        for library in bundled.glob(pattern):
            (scratch / name).symlink_to(library)
            break
    paths = [str(scratch), os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths))}


def command(binary: Path, load: Load, urls: Urls, scratch: Path) -> list[str]:
    """Returns perf_analyzer's command line for `load`, inputs and outputs in `scratch`."""
    level = f"{load.level:g}"
    url = urls.grpc if load.protocol == "grpc" else urls.http
    open_loop = ["--request-intervals", str(scratch / "intervals.txt")]
    closed_loop = ["--concurrency-range", f"{level}:{level}:1"]
    return [
        *(str(binary), "-m", triton_metrics.ENSEMBLE, "-u", urlsplit(url).netloc),
        *("-i", "grpc" if load.protocol == "grpc" else "http", "-b", str(load.batch_size), "--async"),
        *("--input-data", str(scratch / "input.json")),
        *(open_loop if load.loop == "open" else closed_loop),
        *("--measurement-interval", str(round(load.duration_s * 1000 / WINDOWS))),
        *("--stability-percentage", str(_NEVER_UNSTABLE_PERCENT), "--max-trials", str(_MAX_WINDOWS)),
        *("--percentile", "99", "-f", str(scratch / "own.csv"), "--verbose-csv"),
        *("--profile-export-file", str(scratch / "profile.json")),
    ]


def needed() -> Path:
    """Returns perf_analyzer's path.

    Raises:
        LoadError: there is none.
    """
    binary = find()
    if binary is None:
        raise LoadError(
            "no perf_analyzer on the PATH, in PERF_ANALYZER_DIR or in this environment: `make bench` fetches it"
        )
    return binary


def run(load: Load, urls: Urls, out: Path, source: TextSource, gate: bool) -> Path:
    """Puts `load` on the service and returns the measurement's description, `out`.json.

    Raises:
        LoadError: there is no perf_analyzer, or it failed.
    """
    binary = needed()
    with tempfile.TemporaryDirectory(prefix="perf-analyzer-") as name:
        scratch = Path(name)
        reviews = texts.make(load.texts, source.reviews, source.seed, source.data)
        order = texts.mixed_order([len(review) for review in reviews], source.seed)
        data = [{"text": {"content": [review], "shape": [1]}} for review in map(reviews.__getitem__, order)]
        (scratch / "input.json").write_text(json.dumps({"data": data}))
        if load.loop == "open":
            due = arrivals.intervals_us(load, source.seed, load.duration_s * _MAX_WINDOWS / WINDOWS)
            (scratch / "intervals.txt").write_text("\n".join(map(str, due)))
        cpu_before, start_s = _children_cpu_s(), time.monotonic()
        before = triton_metrics.snapshot(urls.http, urls.metrics)
        printed = _execute(command(binary, load, urls, scratch), scratch, load.duration_s)
        after = triton_metrics.snapshot(urls.http, urls.metrics)
        generator = {
            "cpu_s": _children_cpu_s() - cpu_before,
            "wall_s": time.monotonic() - start_s,
            "warning": keeping_up_warning(printed),
        }
        window_s = _keep_samples(scratch / "profile.json", out, load)
        own = next(csv.DictReader((scratch / "own.csv").read_text().splitlines()))
    raw: dict[str, Any] = {
        "window_s": window_s,
        "generator": generator,
        "triton": {"before": before, "after": after},
        "load": load.model_dump(),
        "gate": gate,
        "perf_analyzer": {"own": own, "composing_models": _composing(printed)},
    }
    file = out.with_name(out.name + ".json")
    file.write_text(json.dumps(raw, indent=1) + "\n")
    return file


def _execute(arguments: list[str], scratch: Path, duration_s: float) -> str:
    timeout_s = duration_s * _MAX_WINDOWS / WINDOWS + _OVERHEAD_S
    try:
        done = subprocess.run(
            arguments, env=_environment(scratch), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"perf_analyzer did not end within {timeout_s:.0f} s") from error
    if done.returncode != 0 or not (scratch / "profile.json").exists():
        said = " | ".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise LoadError(f"perf_analyzer ended with {done.returncode}: {said}")
    return done.stdout + done.stderr


def _keep_samples(profile: Path, out: Path, load: Load) -> list[float]:
    """Writes the raw timestamps of a profile as samples; returns their window, seconds on the samples' clock.

    It is as long as Locust's: perf_analyzer's own windows together are up to a fifth longer.
    """
    (experiment,) = json.loads(profile.read_text())["experiments"]
    boundaries = [int(time_ns) for time_ns in experiment["window_boundaries"]][-WINDOWS - 1 :]
    origin_ns = boundaries[0]
    kept = []
    for request in experiment["requests"]:
        sent_s, done_s = (
            (int(time_ns) - origin_ns) / _NS_PER_S for time_ns in (request["timestamp"], _last_response(request))
        )
        kept.append(Sample(sent_s, sent_s, done_s, load.batch_size, OK))
    first_s = min((sample.sent_s for sample in kept), default=0.0)
    samples.write(out.with_name(out.name + SAMPLES_SUFFIX), kept, min(first_s, 0.0))
    shift_s = -min(first_s, 0.0)
    return [shift_s, min(load.duration_s, (boundaries[-1] - origin_ns) / _NS_PER_S) + shift_s]


def _last_response(request: dict[str, Any]) -> int:
    listed = request["response_timestamps"]
    return int((json.loads(listed) if isinstance(listed, str) else listed)[-1])


def keeping_up_warning(printed: str) -> str:
    """Returns the line in which perf_analyzer says that it did not keep up, "" for none."""
    return next((line.strip() for line in printed.splitlines() if "[WARNING]" in line and "keep up" in line), "")


def version() -> str | None:
    """Returns what perf_analyzer calls its version, None where there is none to run."""
    binary = find()
    if binary is None:
        return None
    with tempfile.TemporaryDirectory(prefix="perf-analyzer-") as scratch:
        line = [str(binary), "--version"]
        done = subprocess.run(line, env=_environment(Path(scratch)), capture_output=True, text=True, check=False)
    found = re.search(r"Version (\S+)", done.stdout + done.stderr)
    return found[1] if found else None


def _composing(printed: str) -> list[str]:
    """Returns perf_analyzer's lines about the steps of the ensemble."""
    _, found, rest = printed.partition("Composing models:")
    return (
        [line.strip() for line in rest.partition("Inferences/Second")[0].splitlines() if line.strip()] if found else []
    )


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
