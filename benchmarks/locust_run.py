"""One measurement with Locust: headless, in a process of its own, its raw files in the results folder."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import answers, load_test
from benchmarks.doors import Urls
from benchmarks.load_test import TIMEOUT_S
from benchmarks.profiles import Load, Protocol
from benchmarks.service import CHECKOUT
from benchmarks.texts import TextSource

LOCUSTFILE = Path(__file__).resolve().parent / "locustfile.py"
_USERS: dict[tuple[Protocol, str], str] = {
    ("grpc", "closed"): "GrpcUser",
    ("infer", "closed"): "InferUser",
    ("generate", "closed"): "GenerateUser",
    ("grpc", "open"): "GrpcArrivals",
    ("infer", "open"): "InferArrivals",
    ("generate", "open"): "GenerateArrivals",
}
_SETTLE_S = 60
"""Beyond warm-up and window: importing, requests in flight at the end."""


class LoadError(RuntimeError):
    """A load generator did not deliver its raw files; the message ends with what it said."""


def command(load: Load, urls: Urls, out: Path, source: TextSource, known: Path) -> list[str]:
    """Returns Locust's command line for `load`; `known` has known answers, its raw files are `out`.json and .csv.gz."""
    users = int(load.level) if load.loop == "closed" else 1
    options: dict[str, Any] = {
        "host": urls.http,
        "grpc-url": urls.grpc,
        "metrics-url": urls.metrics,
        "users": users,
        "spawn-rate": users,
        "rate": load.level,
        "batch-size": load.batch_size,
        "kind": load.texts,
        "warmup-s": load.warmup_s,
        "window-s": load.duration_s,
        "out": out,
        "reviews": source.reviews,
        "seed": source.seed,
        "known": known,
        **({"data": source.data} if source.data else {}),
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    start = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(LOCUSTFILE),
        "--headless",
        "--only-summary",
        "--exit-code-on-error",
        "0",
    ]
    return [*start, *given, _USERS[load.protocol, load.loop]]


def run(load: Load, urls: Urls, out: Path, source: TextSource, gate: bool) -> Path:
    """Puts `load` on the service and returns the measurement's description, `out`.json.

    Raises:
        LoadError: Locust failed, or did not end, or there are no known answers.
    """
    try:
        known = load_test.known_answers(load.texts, source)
    except OSError as error:
        raise LoadError(str(error)) from error
    file = out.with_name(out.name + ".json")
    with tempfile.TemporaryDirectory(prefix="locust-") as scratch:
        answers.write_known(Path(scratch) / "known.json", known)
        timeout_s = load.warmup_s + load.duration_s + TIMEOUT_S + _SETTLE_S
        done = _execute(command(load, urls, out, source, Path(scratch) / "known.json"), timeout_s)
    if done.returncode != 0 or not file.exists():
        raise LoadError(f"Locust ended with {done.returncode}: {_tail(done.stderr)}")
    raw = json.loads(file.read_text())
    raw["gate"] = gate
    raw["load"]["probe"] = load.probe  # Locust does not know what its load is for
    raw["generator"]["warning"] = _warning(done.stderr)
    file.write_text(json.dumps(raw, indent=1) + "\n")
    return file


def _execute(arguments: list[str], timeout_s: float) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(arguments, cwd=CHECKOUT, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"Locust did not end within {timeout_s:.0f} s: {_tail(error.stderr)}") from error


def _warning(log: str) -> str:
    """Returns what Locust said about its own CPU use, "" for nothing."""
    return next((line.strip() for line in log.splitlines() if "CPU usage" in line and "WARNING" in line), "")


def _tail(text: str | bytes | None) -> str:
    text = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    return " | ".join(text.strip().splitlines()[-5:])
