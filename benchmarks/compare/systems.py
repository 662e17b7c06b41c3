"""What is compared: for each system how it is started, asked and read."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from benchmarks.compare.plan import LIMIT_S

CHECKOUT = Path(__file__).resolve().parents[2]
SERVICE, SERVICE_GRPC, FASTAPI, FASTAPI_SHIPPED = "service", "service-grpc", "fastapi-torch", "fastapi-shipped"
FASTAPI_DROPPING = "fastapi-torch-dropping"
EngineName: TypeAlias = Literal["torch", "torch-dropping", "shipped"]
"""torch: as transformers loads a checkpoint, so with all tokens; torch-dropping: with those alone that it keeps."""
TEXT = "$TEXT"
"""Stands for the review in the body of a request."""
_NO_REPORTS = {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "BENTOML_DO_NOT_TRACK": "True",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Nothing that is compared may report to anybody or look for models elsewhere."""


@dataclass(frozen=True)
class System:
    """One row of the comparison."""

    name: str
    title: str
    environment: str
    """`serve`, or the peer of benchmarks/peers/requirements-<peer>.txt."""
    engine: EngineName
    command: tuple[str, ...]
    """After the environment's python; PORT stands for the port."""
    path: str
    body: dict[str, Any] = field(default_factory=lambda: {"text": TEXT})
    label_at: tuple[str | int, ...] = ("label",)
    """Keys and indices that lead to the label in the answer."""
    protocol: Literal["json", "grpc"] = "json"
    batching: bool = True
    """Whether it merges reviews, in as many workers as it is given; else it has one, which runs them one by one."""
    open_loop: dict[str, str] = field(default_factory=dict)
    """More environment variables for the open loops, which then get a fresh server."""

    @property
    def is_service(self) -> bool:
        """Whether this is the project's own service."""
        return self.environment == "serve"


def _peer(name: str, title: str, engine: EngineName, module: str, path: str) -> System:
    command = ("-m", f"benchmarks.peers.{module}", "--port", "PORT")
    return System(f"{name}-{engine}", title, name, engine, command, path)


def _fastapi(engine: EngineName, title: str) -> System:
    command = ("-m", "uvicorn", "benchmarks.peers.fastapi_app:app", "--host", "127.0.0.1", "--port", "PORT")
    quiet = ("--no-access-log", "--log-level", "warning")
    return System(f"fastapi-{engine}", title, "fastapi", engine, (*command, *quiet), "/classify", batching=False)


def _bentoml(engine: EngineName) -> System:
    app = ("serve", "benchmarks.peers.bentoml_app:Sentiment", "--host", "127.0.0.1", "--port", "PORT")
    return System(
        f"bentoml-{engine}",
        "BentoML, adaptive batching",
        "bentoml",
        engine,
        ("-m", "bentoml", *app),
        "/classify",
        body={"texts": [TEXT]},
        label_at=(0, "label"),
        open_loop={"PEER_MAX_LATENCY_MS": str(round(LIMIT_S * 1000))},
    )


SYSTEMS: tuple[System, ...] = (
    System(SERVICE, "this service, HTTP", "serve", "shipped", ("serve.py",), "/v2/models/sentiment/generate"),
    System(SERVICE_GRPC, "this service, gRPC", "serve", "shipped", ("serve.py",), "", protocol="grpc"),
    _fastapi("torch", "transformers pipeline, FastAPI"),
    _fastapi("torch-dropping", "transformers pipeline, FastAPI, dropping tokens"),
    _fastapi("shipped", "FastAPI, one by one"),
    _peer("litserve", "LitServe, batching", "torch", "litserve_app", "/predict"),
    _peer("ray", "Ray Serve, @serve.batch", "torch", "ray_app", "/"),
    _bentoml("torch"),
    _peer("litserve", "LitServe, batching", "shipped", "litserve_app", "/predict"),
    _peer("ray", "Ray Serve, @serve.batch", "shipped", "ray_app", "/"),
    _bentoml("shipped"),
)


@dataclass(frozen=True)
class Machine:
    """Where the interpreters and the checkpoint are, and what every system may use."""

    serve_python: Path
    peers: Path
    """Pattern of the peers' environments: a folder in which `PEER` stands for the name."""
    checkpoint: Path
    threads: int
    """Cores that a system may use."""
    peer_workers: int = 1
    """Of a batching peer; they share `threads`."""

    def python(self, system: System) -> Path:
        """Returns the interpreter that runs `system`."""
        if system.is_service:
            return self.serve_python
        return Path(str(self.peers).replace("PEER", system.environment)) / "bin" / "python"

    def missing(self, system: System) -> str:
        """Returns why `system` cannot run here and what to do, "" if it can."""
        if not self.python(system).exists():
            target = "make serve" if system.is_service else f"make .venv-peer-{system.environment}/.ready"
            return f"{self.python(system)} is missing: run `{target}`"
        if system.engine != "shipped" and not (self.checkpoint / "model.safetensors").exists():
            return (
                f"{self.checkpoint} holds no checkpoint (model.safetensors): make the shipped model's with `python -m "
                "export.checkpoint`, or name another with --checkpoint"
            )
        if system.engine == "torch-dropping" and not _drops_tokens(self.checkpoint):
            return f"{self.checkpoint} drops no tokens (kept_percent in its config.json), so that {FASTAPI} is the same"
        return ""

    def arguments(self, system: System, port: int) -> list[str]:
        """Returns the command line that serves `system` on `port`."""
        return [str(self.python(system)), *(str(port) if part == "PORT" else part for part in system.command)]

    def environ(
        self, system: System, ports: Sequence[int], scratch: Path, more: Mapping[str, str] = MappingProxyType({})
    ) -> dict[str, str]:
        """Returns the environment variables of `system`, `more` among them; it keeps its files in `scratch`."""
        own = {name: value for name, value in os.environ.items() if not name.endswith("_proxy")}
        if system.is_service:
            names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
            return own | dict(zip(names, map(str, ports), strict=True))
        workers = self.peer_workers if system.batching else 1
        return (
            own
            | _NO_REPORTS
            | dict(more)
            | {
                "PEER_ENGINE": system.engine,
                "PEER_CHECKPOINT": str(self.checkpoint),
                "PEER_WORKERS": str(workers),
                "PEER_THREADS": str(self.threads // workers),
                "OMP_NUM_THREADS": str(self.threads // workers),
                "PYTHONPATH": str(CHECKOUT),
                "BENTOML_HOME": str(scratch / "bentoml"),
                "RAY_TMPDIR": str(scratch),
                "PATH": f"{self.python(system).parent}:{os.environ.get('PATH', os.defpath)}",
            }
        )


def _drops_tokens(checkpoint: Path) -> bool:
    config = checkpoint / "config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("kept_percent"))


def chosen(names: Sequence[str]) -> list[System]:
    """Returns the systems called `names`, all of them for none.

    Raises:
        ValueError: an unknown name.
    """
    known = {system.name: system for system in SYSTEMS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown system {unknown[0]!r}; there are: {', '.join(known)}")
    return [system for system in SYSTEMS if not names or system.name in names]


def default_machine(threads: int) -> Machine:
    """Returns what the Makefile makes, environments in the checkout, or what $SERVE_PYTHON and $PEERS name."""
    return Machine(
        serve_python=Path(os.environ.get("SERVE_PYTHON", CHECKOUT / ".venv-serve/bin/python")),
        peers=Path(os.environ.get("PEERS", CHECKOUT / ".venv-peer-PEER")),
        checkpoint=CHECKOUT / "artefacts/shipped",
        threads=threads,
    )


PYTHON = sys.executable
"""Runs the load generator: the environment of the comparison itself."""
