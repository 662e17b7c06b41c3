"""A system's server: started on free ports, awaited until it answers, ended with everything that it started."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil

from benchmarks.compare import doors
from benchmarks.compare.doors import Door
from benchmarks.compare.plan import START_TIMEOUT_S
from benchmarks.compare.systems import CHECKOUT, Machine, System

STOP_TIMEOUT_S = 15
_SAMPLE = "Amazing movie!"


class StartError(RuntimeError):
    """A server did not come up; the message says where its log is and quotes its end."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    pid: int
    door: Door
    triton: tuple[str, ...]
    """HTTP address and metrics of this service's Triton; empty for peers."""


def free_ports(count: int) -> list[int]:
    """Returns ports of this machine that nothing listens on at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextlib.contextmanager
def running(
    system: System, machine: Machine, log_file: Path, more: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Server]:
    """Runs `system`, with `more` environment variables, until the block is left; what it prints goes to `log_file`.

    Raises:
        StartError: it ended, or did not answer within `START_TIMEOUT_S`.
    """
    http_port, grpc_port, metrics_port = free_ports(3)
    with (
        tempfile.TemporaryDirectory(prefix="compare-", ignore_cleanup_errors=True) as scratch,
        log_file.open("wb") as log,
    ):
        process = subprocess.Popen(
            machine.arguments(system, http_port),
            cwd=CHECKOUT,
            env=machine.environ(system, (http_port, grpc_port, metrics_port), Path(scratch), more),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        json_door = Door(f"http://127.0.0.1:{http_port}{system.path}", system.body, system.label_at)
        if system.protocol == "grpc":
            door = Door(f"grpc://127.0.0.1:{grpc_port}", {}, ())
            ready_url, ready_body = f"http://127.0.0.1:{http_port}/v2/models/sentiment/ready", None
        else:
            door, ready_url = json_door, json_door.url
            ready_body = json.dumps(doors.fill(system.body, _SAMPLE)).encode()
        triton = (f"http://127.0.0.1:{http_port}", f"http://127.0.0.1:{metrics_port}/metrics")
        try:
            _await_answer(process, ready_url, ready_body, log_file)
            yield Server(process.pid, door, triton if system.is_service else ())
        finally:
            stop(process)


def _await_answer(process: subprocess.Popen[bytes], url: str, body: bytes | None, log_file: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    deadline_s = time.monotonic() + START_TIMEOUT_S
    last = "no answer"
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise StartError(f"ended with exit code {process.returncode} while starting{_tail(log_file)}")
        try:
            with opener.open(request, timeout=START_TIMEOUT_S):
                return
        except urllib.error.HTTPError as error:  # some answer 404 or 503 until the model is loaded
            last = f"{error.code}: {error.read()[:200]!r}"
        except OSError as error:
            last = str(error)
        time.sleep(0.1)
    raise StartError(f"no first answer within {START_TIMEOUT_S:g} s, last came {last}{_tail(log_file)}")


def _tail(log_file: Path, max_lines: int = 8) -> str:
    lines = log_file.read_text(errors="replace").strip().splitlines()[-max_lines:]
    return f"; log {log_file}:" + "".join(f"\n    {line}" for line in lines)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends `process` and everything below it, gently first."""
    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for one in below:  # those that made a session of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(below, timeout=STOP_TIMEOUT_S)
    process.wait()
