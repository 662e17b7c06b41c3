"""Starts the real serve.py on free ports, and asks it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CHECKOUT = Path(__file__).resolve().parent.parent
SERVE_PYTHON = os.environ.get("SERVE_PYTHON", sys.executable)
"""The interpreter that serves: `make test` names that of `make serve`, which has no torch."""


@dataclass(frozen=True)
class Server:
    """A running serve.py."""

    process: subprocess.Popen[str]
    ports: dict[str, int]
    announcement: str
    home: Path
    """$HOME of the server, an empty folder before it started."""

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['http']}"

    @property
    def grpc_url(self) -> str:
        return f"grpc://127.0.0.1:{self.ports['grpc']}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['metrics']}/metrics"

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


def free_ports() -> dict[str, int]:
    """Returns three ports that nothing listens on at the moment."""
    sockets = [socket.socket() for _ in range(3)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return dict(zip(("http", "grpc", "metrics"), ports, strict=True))


def command(repository: Path, log_file: Path, ports: dict[str, int]) -> list[str]:
    """Returns the command line that serves `repository`."""
    flags = [f"--{name}-port={port}" for name, port in ports.items()]
    script = str(CHECKOUT / "serve.py")
    return [SERVE_PYTHON, script, f"--model-repository={repository}", f"--log-file={log_file}", *flags]


def start(repository: Path, log_file: Path, *more_flags: str) -> Server:
    """Starts serve.py and returns once it has announced its first prediction."""
    ports = free_ports()
    home = log_file.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "HOME": str(home)}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited, as by a job that a script starts with &
    line = [*command(repository, log_file, ports), *more_flags]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment)
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    announcement = ""
    for line in process.stdout:
        announcement += line
        if line.startswith("gRPC "):
            return Server(process, ports, announcement, home)
    raise AssertionError(f"serve.py ended with {process.wait()}:\n{announcement}\n{log_file.read_text()}")


def get(url: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """Returns status and body of a GET request."""
    return _send(urllib.request.Request(url, headers=headers or {}))


def post(url: str, body: Any) -> tuple[int, Any]:
    """Returns status and parsed answer of a POST request; `body` is sent as it is if bytes, else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer = _send(urllib.request.Request(url, data))
    return status, json.loads(answer or "null")


def _send(request: urllib.request.Request) -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def generate(server: Server, text: Any) -> tuple[int, Any]:
    """Returns status and answer of the simple API; `text` is a review or a list of them."""
    return post(f"{server.http_url}/v2/models/sentiment/generate", {"text": text})


def infer(server: Server, inputs: list[dict[str, Any]], model: str = "sentiment") -> tuple[int, Any]:
    """Returns status and answer of the KServe protocol in JSON."""
    return post(f"{server.http_url}/v2/models/{model}/infer", {"inputs": inputs})


def classifier_counts(server: Server) -> dict[str, int]:
    """Returns reviews and executions so far, once they stand still: answers leave before their execution counts."""
    seen: list[dict[str, int]] = []
    while len(seen) < 50:
        _, answer = get(f"{server.http_url}/v2/models/classifier/stats")
        (stats,) = json.loads(answer)["model_stats"]
        seen.append({key: int(stats[key]) for key in ("inference_count", "execution_count")})
        if seen.count(seen[-1]) > 5:
            return seen[-1]
        time.sleep(0.1)
    raise AssertionError(f"the classifier never comes to rest: {seen}")


def await_log(log_file: Path, words: str) -> None:
    """Returns once the server has logged `words`: a model's lines have a thread of their own, and answers pass them."""
    deadline_s = time.monotonic() + 10
    while words not in (log := log_file.read_text()):
        assert time.monotonic() < deadline_s, f"{words!r} is never logged:\n{log}"
        time.sleep(0.05)


def texts(reviews: list[str]) -> list[dict[str, Any]]:
    """Returns the input tensor of `infer` for `reviews`."""
    return [{"name": "text", "datatype": "BYTES", "shape": [len(reviews), 1], "data": reviews}]


def probabilities(server: Server, reviews: list[str]) -> npt.NDArray[np.float64]:
    """Returns the answers of one request (B, 2)."""
    status, answer = infer(server, texts(reviews))
    assert status == 200, answer
    (output,) = [output for output in answer["outputs"] if output["name"] == "probabilities"]
    return np.array(output["data"]).reshape(output["shape"])


def triton_request(client: Any, raw_texts: list[bytes]) -> Any:
    """Returns the input tensor of tritonclient; `client` is its module for HTTP or gRPC."""
    tensor = client.InferInput("text", [len(raw_texts), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(raw_texts, dtype=np.object_).reshape(-1, 1))
    return tensor
