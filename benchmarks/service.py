"""The service under test: the one that answers at the URLs, or one that is started for the run and stopped after it."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks import doors, triton_metrics
from benchmarks.doors import Urls
from benchmarks.profiles import Protocol
from clients import SentimentError
from export.repository import MODEL_FILE, manifest_path
from training.provenance import git_state

CHECKOUT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 10
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ASK_TIMEOUT_S = 30
logger = logging.getLogger(__name__)


class ServiceError(Exception):
    """There is no service to test; the message says what to do."""


@dataclass(frozen=True)
class Service:
    """A service that answers."""

    urls: Urls
    pid: int | None
    """Triton's process, None where it runs on another machine or cannot be told."""
    started_here: bool


def is_local(url: str) -> bool:
    """Whether `url` is on this machine."""
    return urlsplit(url).hostname in _LOOPBACK


def checkout() -> dict[str, Any]:
    """Returns commit and model of this checkout; None for what is unknown."""
    commit, is_dirty = git_state()
    model = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        model = json.loads(manifest_path().read_text())["files"][MODEL_FILE]["sha256"]
    return {"commit": commit, "dirty": is_dirty, "model_sha256": model}


def answers(urls: Urls) -> bool:
    """Whether the model `sentiment` is ready at `urls`."""
    try:
        triton_metrics.get(f"{urls.http}/v2/models/sentiment/ready")
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def running(urls: Urls, log_file: Path, may_start: bool = True) -> Iterator[Service]:
    """Gives the service at `urls`, started here with serve.py and stopped at the end if none answers there.

    Raises:
        ServiceError: none answers, and none can be started, for the reason that the message gives.
    """
    if answers(urls):
        logger.info("testing the service that answers at %s", urls.http)
        _refuse_cache(urls)
        yield Service(urls, _listening_process(urls.http), started_here=False)
        return
    if not may_start:
        raise ServiceError(f"no service answers at {urls.http}, and --no-start came: start it, or correct --http-url")
    if not is_local(urls.http):
        raise ServiceError(
            f"no service answers at {urls.http}, and one can be started on 127.0.0.1 only: start it there"
        )
    with _started(urls, log_file) as process:
        _refuse_cache(urls)
        yield Service(urls, _triton(process.pid), started_here=True)


def _refuse_cache(urls: Urls) -> None:
    """Raises ServiceError where answers may come out of a response cache: they would be measured, not the model."""
    try:
        _ask("infer", urls)
    except (OSError, ValueError, SentimentError) as error:
        raise ServiceError(f"{urls.http} is ready, but answers no review: {error}") from error
    try:
        _ask("grpc", urls)
    except (OSError, ValueError, SentimentError) as error:
        raise ServiceError(
            f"{urls.http} answers, but {urls.grpc} does not; --grpc-url says where its gRPC is: {error}"
        ) from error
    try:
        metrics = triton_metrics.get(urls.metrics)
    except (OSError, ValueError) as error:
        raise ServiceError(
            f"no metrics at {urls.metrics}, which the report needs: {error}; --metrics-url says where they are"
        ) from error
    if triton_metrics.has_response_cache(metrics):
        raise ServiceError(f"{urls.http} has a response cache, which would be what is measured: start it without one")


def _ask(protocol: Protocol, urls: Urls) -> None:
    door = doors.open_door(protocol, urls, _ASK_TIMEOUT_S)
    try:
        door.ask(["A review, so that a cache has something to count."])
    finally:
        door.close()


@contextlib.contextmanager
def _started(urls: Urls, log_file: Path) -> Iterator["subprocess.Popen[str]"]:
    ports = {"HTTP_PORT": _port(urls.http), "GRPC_PORT": _port(urls.grpc), "METRICS_PORT": _port(urls.metrics)}
    python = os.environ.get("SERVE_PYTHON") or sys.executable
    logger.info("no service answers at %s: starting serve.py, log %s", urls.http, log_file)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("w") as output:
        process = subprocess.Popen(
            [python, str(CHECKOUT / "serve.py"), "--log-file", str(log_file.with_suffix(".triton.log"))],
            env={**os.environ, **{name: str(port) for name, port in ports.items()}},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        _wait(process, urls, log_file)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(process: "subprocess.Popen[str]", urls: Urls, log_file: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while "Triton answers" not in log_file.read_text() or not answers(urls):
        if process.poll() is not None:
            raise ServiceError(f"serve.py ended with {process.returncode}:\n{log_file.read_text().strip()}")
        if time.monotonic() > deadline_s:
            raise ServiceError(f"serve.py did not answer within {START_TIMEOUT_S} s: see {log_file}")
        time.sleep(0.1)


def _port(url: str) -> int:
    port = urlsplit(url).port
    if port is None:
        raise ServiceError(f"{url} names no port, expected one as in http://127.0.0.1:8000")
    return port


def _triton(parent_pid: int) -> int | None:
    """Returns the Triton process below serve.py."""
    for child in psutil.Process(parent_pid).children(recursive=True):
        if child.name() == "tritonserver":
            return int(child.pid)
    return None


def _listening_process(http_url: str) -> int | None:
    """Returns the process that listens at `http_url`, None where it is on another machine or cannot be told."""
    if not is_local(http_url):
        return None
    port = _port(http_url)
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                # Something else is a tunnel or a proxy: its memory is not the service's.
                return int(connection.pid) if psutil.Process(connection.pid).name() == "tritonserver" else None
    return None
