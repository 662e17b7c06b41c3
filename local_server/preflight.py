"""What can be known before Triton starts."""

import argparse
import errno
import importlib.metadata
import importlib.util
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from export.engine_manifest import engine_manifest_path
from export.repository import recover, verify
from local_server.errors import ServeError
from local_server.options import PORTS
from local_server.processes import listeners, name_of
from local_server.wheel import SHELL_SPECIAL, libpython_folder

MIN_SHM_BYTES = 32 << 20
"""Free shared memory needed: texts and tokens reach the models' processes through it. Each takes 1 MiB to start, a
full batch of the longest IMDb reviews 1 MiB more, 64 reviews of the largest accepted size 20, a 10 MB text 10 MiB
though it is refused; what has grown stays so. A request for which the memory is too small gets an error and the server
goes on."""


def check(options: argparse.Namespace) -> None:
    """Raises `ServeError` or `RepositoryError` for the first thing that would keep Triton from serving.

    Finishes or undoes an installation of a model that was interrupted.
    """
    _check_address(options)
    _check_packages()
    libpython_folder()
    _check_folders()
    _check_flags(options.triton_flag)
    _check_ports(options)
    recover(options.model_repository)
    verify(options.model_repository)
    pass_over_engine(options.model_repository)


def pass_over_engine(repository: Path) -> None:
    """Says so if `repository` has a TensorRT engine, which this server cannot run."""
    path = engine_manifest_path(repository)
    if path.exists():
        print(
            f"serve.py: {path} describes a TensorRT engine, and this server has no TensorRT: serve it with "
            "docker/compose.yml; serving the ONNX model instead",
            file=sys.stderr,
        )


def _check_address(options: argparse.Namespace) -> None:
    if not options.address.startswith("127.") and not options.allow_remote:
        raise ServeError(
            f"--address {options.address} can be reached from other machines; the wheel's Triton 2.51.0 (24.10) has "
            "known vulnerabilities, no TLS over HTTP and no login. Keep 127.0.0.1 and put a gateway in front, serve "
            "with a current container, or add --allow-remote on a network you trust"
        )


def _check_packages() -> None:
    for module, name in {"pytriton": "nvidia-pytriton", "numpy": "numpy"}.items():
        if importlib.util.find_spec(module) is None:
            raise ServeError(
                f"the package {name} is not installed for {sys.executable}: run `make serve`, which "
                "installs it into .venv-serve, with options in SERVE_ARGS"
            )
    if int(importlib.metadata.version("numpy").partition(".")[0]) >= 2:
        raise ServeError("numpy 2 came, expected 1.26: this Triton's Python backend dies of it: run `make serve`")


def _check_folders() -> None:
    shm_bytes = shutil.disk_usage("/dev/shm").free
    if shm_bytes < MIN_SHM_BYTES:
        raise ServeError(
            f"/dev/shm has {shm_bytes >> 20} MiB free, expected {MIN_SHM_BYTES >> 20}: reviews reach the model through "
            "it. Run `mount -o remount,size=256m /dev/shm`, or the container with --shm-size=256m"
        )
    if SHELL_SPECIAL.search(tempfile.gettempdir()):
        raise ServeError(
            f"the folder for temporary files is {tempfile.gettempdir()!r}, expected one without spaces, quotes and "
            "the like, in ASCII, since Triton hands it to a shell unquoted: run `TMPDIR=/tmp make serve`"
        )


def _check_flags(flags: Sequence[str]) -> None:
    listening = [f"--{name}-{what}" for name in PORTS for what in ("address", "port")]
    closed = [*listening, "--allow-http", "--allow-grpc", "--allow-sagemaker", "--allow-vertex-ai"]
    for flag in flags:
        name = flag.partition("=")[0]  # Triton takes shortened ones too, and the last of several
        if len(name) > len("--") and any(full.startswith(name) for full in closed):
            raise ServeError(
                f"--triton-flag={flag} came: where the ports listen is for --address, --http-port, --grpc-port and "
                "--metrics-port to say, HTTP and gRPC stay open, and the endpoints of SageMaker and Vertex AI, which "
                "listen everywhere, closed"
            )
    if any(flag.rpartition("=")[2].lower() == "poll" for flag in flags):  # of a shortened flag too
        raise ServeError(
            "--model-control-mode=poll came; a reload ends a model's process, which serve.py takes for its death, "
            "and would run any code that appears in the folder. For another model start a second server and move "
            "the clients"
        )


def _check_ports(options: argparse.Namespace) -> None:
    ports = {name: getattr(options, f"{name}_port") for name in PORTS}
    if len(set(ports.values())) < len(ports):
        raise ServeError(f"three different ports are needed, {ports} came")
    for name, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections closing there do not matter
            try:
                probe.bind((options.address, port))
            except OSError as error:
                remedy = f"choose another port, as in `{name.upper()}_PORT={port % 60000 + 1000} make serve`"
                if error.errno == errno.EADDRINUSE:
                    remedy = f"stop that process, or {remedy}"
                elif error.errno == errno.EADDRNOTAVAIL:
                    remedy = "give --address an address of this machine"
                owner = "".join(f" by process {process} ({name_of(process)})" for process in listeners(port)[:1])
                reason = f"{error.strerror}{owner}"
                raise ServeError(f"{name} port {options.address}:{port} cannot be used: {reason}; {remedy}") from error
