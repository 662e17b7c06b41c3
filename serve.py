#!/usr/bin/env python3
"""Serves the model repository on NVIDIA Triton Inference Server, without a container.

    make serve                                        # HTTP 8000, gRPC 8001, metrics 8002 on 127.0.0.1
    HTTP_PORT=9000 GRPC_PORT=9001 METRICS_PORT=9002 make serve
    make serve SERVE_ARGS="--response-cache-mib 256"  # or .venv-serve/bin/python serve.py --response-cache-mib 256

The server is the one inside the nvidia-pytriton wheel, run where it is installed. When a real prediction has come
back, its curl line is printed and the server stays in the foreground. Ctrl-C or SIGTERM ends it within 5 s, exit code
0. A server that cannot start, or dies, is an error with its reason, exit code 1. Triton never outlives this process.
"""

import sys

if sys.version_info[:2] not in ((3, 10), (3, 11), (3, 12)):  # before any import that an older Python lacks
    sys.exit(
        f"serve.py: error: Python {sys.version.split()[0]} ({sys.executable}) came, expected 3.10, 3.11 or 3.12: "
        "run `make serve PYTHON=python3.11`, or name another of these"
    )

import argparse
import contextlib
import ctypes
import errno
import glob
import importlib.metadata
import importlib.util
import ipaddress
import json
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from export.engine_manifest import engine_manifest_path
from export.repository import REPOSITORY, RepositoryError, recover, verify

PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
LOG_FILE = Path(__file__).resolve().parent / "artefacts" / "logs" / "triton-PORT.log"
SAMPLE = {"text": "A moving and beautifully acted film. I loved every minute of it."}
START_TIMEOUT_S = 60
EXIT_TIMEOUT_S = 3  # for requests in flight; Triton waits all of it for an idle keep-alive connection
CLOSED_APIS = "shared-memory,trace,logging,model-repository"
KEY_HEADER = "sentiment-control-key"
STACK_BYTES = 64 << 20
"""Of each Triton thread. Its HTTP library copies a body of type application/x-www-form-urlencoded, which is what
`curl -d` sends, to the stack twice: with the usual 8 MiB a text of 5 MB kills the server."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Each ends the server."""

WATCH_INTERVAL_S = 0.2
_SHELL_SPECIAL = re.compile(r"[^A-Za-z0-9._/@%+=:,-]")
STOP_TIMEOUT_S = 4  # from the signal to killing Triton, below the 5 s promised
MIN_SHM_BYTES = 32 << 20
"""Free shared memory needed: texts and tokens reach the models' processes through it. Each takes 1 MiB to start, a
full batch of the longest IMDb reviews 1 MiB more, a 10 MB text 10 MiB until it is refused, 64 reviews of the largest
accepted size 20. A request for which the memory is too small gets an error and the server goes on."""


class ServeError(Exception):
    """Triton cannot be served; the message says why, and what to do."""


class _ManPage(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the module docstring and shows defaults."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal comes or Triton dies; returns the exit code."""
    options = _parse(argv)
    # All end in KeyboardInterrupt: SIGINT too, which a script's background job starts with ignored; not nohup's SIGHUP.
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    started_s = time.monotonic()
    try:
        check(options)
        with triton(options) as server:
            url = f"http://{_local(options.address)}:{options.http_port}/v2/models/sentiment/generate"
            answer = first_answer(server, url)
            log = os.path.relpath(options.log_file)
            print(f"Triton answers after {time.monotonic() - started_s:.1f} s; Ctrl-C stops it. Log: {log}")
            print(f"\n  curl -s {url} \\\n    -d '{json.dumps(SAMPLE)}'\n  {answer}\n")
            print(f"gRPC {options.address}:{options.grpc_port}, metrics :{options.metrics_port}/metrics", flush=True)
            raise ServeError(wait_for_death(server))
    except KeyboardInterrupt:
        return 0
    except (ServeError, RepositoryError, OSError) as error:
        print(f"serve.py: error: {error}", file=sys.stderr)
    return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_ManPage)
    parser.add_argument("--model-repository", type=Path, default=REPOSITORY, metavar="DIR", help="what to serve")
    for name, port in PORTS.items():
        variable = f"{name.upper()}_PORT"
        default = os.environ.get(variable) or str(port)
        parser.add_argument(f"--{name}-port", type=_port, default=default, metavar="PORT", help=f"or ${variable}")
    parser.add_argument("--address", type=_ipv4, default="127.0.0.1", metavar="IP", help="where the ports listen: IPv4")
    parser.add_argument("--allow-remote", action="store_true", help="accept an --address beyond this machine")
    parser.add_argument("--log-file", type=Path, default=LOG_FILE, metavar="FILE", help="Triton's log, PORT for HTTP's")
    parser.add_argument(
        "--response-cache-mib",
        type=_mib,
        default=0,
        metavar="MIB",
        help="memory for answers to repeated requests; only a model whose config.pbtxt enables it uses it",
    )
    parser.add_argument(
        "--triton-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="one more flag of tritonserver, as in --triton-flag=--rate-limit-resource=core:1; may be repeated",
    )
    options = parser.parse_args(argv)
    options.log_file = options.log_file.with_name(options.log_file.name.replace("PORT", str(options.http_port)))
    return options


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} came, expected a port from 1 to 65535")
    return int(text)


def _ipv4(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address("127.0.0.1" if text == "localhost" else text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} came, expected an IPv4 address, as 127.0.0.1") from error


def _mib(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} came, expected a number of MiB, 0 for no cache")
    return int(text)


def _local(address: str) -> str:
    return "127.0.0.1" if address == "0.0.0.0" else address


# ---- what can be known before Triton starts --------------------------------------------------------------------------


def check(options: argparse.Namespace) -> None:
    """Raises `ServeError` or `RepositoryError` for the first thing that would keep Triton from serving."""
    if not options.address.startswith("127.") and not options.allow_remote:
        raise ServeError(
            f"--address {options.address} can be reached from other machines; the wheel's Triton 2.51.0 (24.10) has "
            "known vulnerabilities, no TLS over HTTP and no login. Keep 127.0.0.1 and put a gateway in front, serve "
            "with a current container, or add --allow-remote on a network you trust"
        )
    for module, package in {"pytriton": "nvidia-pytriton", "numpy": "numpy"}.items():
        if importlib.util.find_spec(module) is None:
            raise ServeError(
                f"the package {package} is not installed for {sys.executable}: run `make serve`, which "
                "installs it into .venv-serve, with options in SERVE_ARGS"
            )
    if int(importlib.metadata.version("numpy").partition(".")[0]) >= 2:
        raise ServeError("numpy 2 came, expected 1.26: this Triton's Python backend dies of it: run `make serve`")
    libpython_folder()
    shm_bytes = shutil.disk_usage("/dev/shm").free
    if shm_bytes < MIN_SHM_BYTES:
        raise ServeError(
            f"/dev/shm has {shm_bytes >> 20} MiB free, expected {MIN_SHM_BYTES >> 20}: reviews reach the model through "
            "it. Run `mount -o remount,size=256m /dev/shm`, or the container with --shm-size=256m"
        )
    if _SHELL_SPECIAL.search(tempfile.gettempdir()):
        raise ServeError(
            f"the folder for temporary files is {tempfile.gettempdir()!r}, expected one without spaces, quotes and "
            "the like, in ASCII, since Triton hands it to a shell unquoted: run `TMPDIR=/tmp make serve`"
        )
    closed = [*(f"--{port}-address" for port in PORTS), "--allow-sagemaker", "--allow-vertex-ai"]
    for flag in options.triton_flag:
        name = flag.partition("=")[0]  # Triton takes shortened ones too, and the last of several
        if len(name) > len("--") and any(full.startswith(name) for full in closed):
            raise ServeError(
                f"--triton-flag={flag} came: where the ports listen is for --address to say, and the endpoints of "
                "SageMaker and Vertex AI, which listen everywhere, stay closed"
            )
    if any(flag.rpartition("=")[2].lower() == "poll" for flag in options.triton_flag):  # of a shortened flag too
        raise ServeError(
            "--model-control-mode=poll came; a reload ends a model's process, which serve.py takes for its death, "
            "and would run any code that appears in the folder. For another model start a second server and move "
            "the clients"
        )
    _check_ports(options)
    recover(options.model_repository)
    verify(options.model_repository)
    _pass_over_engine(options.model_repository)


def _pass_over_engine(repository: Path) -> None:
    path = engine_manifest_path(repository)
    if path.exists():
        print(
            f"serve.py: {path} describes a TensorRT engine, and this server has no TensorRT: serve it with "
            "docker/compose.yml; serving the ONNX model instead",
            file=sys.stderr,
        )


def libpython_folder() -> str:
    """Returns where this Python's shared library lies, "" if the system's loader finds it without help.

    Raises:
        ServeError: there is none, as with a Python built without --enable-shared.
    """
    version = "{}.{}".format(*sys.version_info)
    name = f"libpython{version}.so.1.0"
    for folder in (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"):
        if folder and os.path.exists(f"{folder}/{name}"):
            return str(folder)
    try:
        ctypes.CDLL(name)
    except OSError as error:
        raise ServeError(
            f"{name} was not found, which Triton's Python backend loads; {sys.executable} was built without it. Run "
            f"`apt-get install libpython{version}` (Debian, Ubuntu), `PYTHON_CONFIGURE_OPTS=--enable-shared pyenv "
            f"install --force {version}`, or take a Python of conda or uv: `make serve PYTHON=...`"
        ) from error
    return ""


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
                reason = f"{error.strerror}{_owner(port)}"
                raise ServeError(f"{name} port {options.address}:{port} cannot be used: {reason}; {remedy}") from error


def _owner(port: int) -> str:
    """Returns which process listens on `port`, as far as this user may see it."""
    sockets = [line.split() for file in glob.glob("/proc/net/tcp*") for line in Path(file).read_text().splitlines()]
    listening = {f"socket:[{s[9]}]" for s in sockets if s[3] == "0A" and s[1].endswith(f":{port:04X}")}
    for handle in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(handle) in listening:
                process = handle.split("/")[2]
                return f" by process {process} ({Path(f'/proc/{process}/comm').read_text().strip()})"
    return ""


# ---- the server process ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def triton(options: argparse.Namespace) -> Iterator[subprocess.Popen[bytes]]:
    """Runs Triton, its output in the log file; ends it on the way out, gently first.

    From here on signals wait for `_interruptible`. Anywhere else one could lose Triton before its guard is there, or
    leave the lock in its Popen taken for ever, as one of some thousand did.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    spec = importlib.util.find_spec("pytriton")
    assert spec is not None and spec.origin is not None  # noqa: PT018  (`check` saw the package)
    package = Path(spec.origin).parent
    libraries = [libpython_folder(), f"{package.parent}/nvidia_pytriton.libs", os.environ.get("LD_LIBRARY_PATH")]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        # The python3 found first decides which packages the models see.
        "PATH": f"{sys.exec_prefix}/bin:{os.environ.get('PATH', os.defpath)}",
        "ORT_DISABLE_TELEMETRY": "1",  # else ONNX Runtime 1.32 writes a device id and a database to ~/.cache
    }
    shm_prefix = f"triton_{os.getpid()}_{options.http_port}_"
    with tempfile.TemporaryDirectory(prefix="triton-") as folder, _opened(options.log_file) as log:
        _assemble_python_backend(package / "tritonserver", Path(folder) / "python")
        repository = _plain_path(options.model_repository, Path(folder))
        server = subprocess.Popen(
            [
                f"{package}/tritonserver/bin/tritonserver",
                f"--backend-directory={folder}",
                f"--model-repository={repository}",
                *_arguments(options, shm_prefix, package),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for this process alone
            preexec_fn=_before_exec,
        )
        guard = None
        try:
            guard = _guard(server.pid, shm_prefix, folder)
            yield server
        except ServeError as error:
            raise ServeError(f"{error}{_log_errors(options.log_file)}") from error
        finally:
            _stop(server)
            if guard is not None:
                guard.kill()
                guard.communicate()
            for region in glob.glob(f"/dev/shm/{shm_prefix}*"):  # a killed Triton leaves them behind
                os.unlink(region)


def _guard(group: int, shm_prefix: str, folder: str) -> "subprocess.Popen[bytes]":
    """Returns a shell that ends Triton's process group, shared memory and folder should this process be killed.

    The pipe that then closes tells it. Triton alone would not do: a model's process that is answering while Triton dies
    waits for it for ever.
    """
    script = 'read _; kill -s KILL -- "-$0"; rm -f "/dev/shm/$1"*; rm -rf "$2"'
    return subprocess.Popen(
        ["/bin/sh", "-c", script, str(group), shm_prefix, folder], stdin=subprocess.PIPE, start_new_session=True
    )


def _before_exec() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # else inherited
    _, limit = resource.getrlimit(resource.RLIMIT_STACK)
    stack = STACK_BYTES if limit == resource.RLIM_INFINITY else min(STACK_BYTES, limit)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, limit))


def _opened(log_file: Path) -> BinaryIO:
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        return log_file.open("wb")
    except OSError as error:
        raise ServeError(f"--log-file {log_file} cannot be written: {error.strerror}; name another") from error


def _plain_path(repository: Path, folder: Path) -> Path:
    """Returns `repository`, or a link to it in `folder` if its path has what a shell reads otherwise.

    Triton starts the process of a Python model through a shell, to which it hands the paths unquoted.
    """
    if not _SHELL_SPECIAL.search(str(repository)):
        return repository
    link = folder / "models"
    link.symlink_to(repository.absolute(), target_is_directory=True)
    return link


def _assemble_python_backend(package: Path, folder: Path) -> None:
    """Links the Python backend and its stub for this Python together; the wheel keeps them apart."""
    folder.mkdir()
    version = "{}.{}".format(*sys.version_info)
    stub = package / "python_backend_stubs" / version / "triton_python_backend_stub"
    for file in (stub, *(package / "backends" / "python").glob("*.*")):
        (folder / file.name).symlink_to(file)


def _arguments(options: argparse.Namespace, shm_prefix: str, package: Path) -> list[str]:
    """Returns Triton's arguments: local, nothing to be changed from outside, no answer from a guessed configuration."""
    key = secrets.token_hex(32)  # forgotten at once: nobody is meant to use the closed interfaces
    arguments = [f"--{name}-address={options.address}" for name in PORTS]
    arguments += [f"--{name}-port={getattr(options, f'{name}_port')}" for name in PORTS]
    return [
        *arguments,
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        f"--http-restricted-api={CLOSED_APIS}:{KEY_HEADER}={key}",
        f"--grpc-restricted-protocol={CLOSED_APIS}:{KEY_HEADER}={key}",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        "--allow-gpu-metrics=false",
        "--pinned-memory-pool-byte-size=0",  # memory for a GPU, which this repository's default does not use
        "--rate-limit=execution_count",  # else the priorities of the classifier's instances count for nothing
        *_cache_arguments(options.response_cache_mib, package),
        *options.triton_flag,
    ]


def _cache_arguments(size_mib: int, package: Path) -> list[str]:
    if not size_mib:
        return []
    return [f"--cache-directory={package}/tritonserver/caches", f"--cache-config=local,size={size_mib << 20}"]


def first_answer(server: subprocess.Popen[bytes], url: str) -> str:
    """Returns the JSON answer to the first review, once Triton gives one.

    Raises:
        ServeError: Triton ended, answered with an error, or took more than `START_TIMEOUT_S`.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine's ports
    request = urllib.request.Request(url, json.dumps(SAMPLE).encode())
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise ServeError(f"Triton ended while starting, {_ending(server)}")
        try:
            with _interruptible(), opener.open(request, timeout=START_TIMEOUT_S) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            raise ServeError(f"Triton started but cannot predict: {error.read().decode()}") from error
        except OSError:
            with _interruptible():
                time.sleep(0.05)
    raise ServeError(f"Triton gave no answer within {START_TIMEOUT_S} s")


def wait_for_death(server: subprocess.Popen[bytes]) -> str:
    """Returns how Triton ended; the death of a model's process counts, since Triton goes on without noticing."""
    models = [stat for stat in glob.glob("/proc/[0-9]*/stat") if _state(stat)[1] == str(server.pid)]
    while server.poll() is None:
        if any(_state(stat)[0] in "ZX" for stat in models):
            return "the process of a model ended, so no request can be answered any more"
        with _interruptible():
            time.sleep(WATCH_INTERVAL_S)
    return f"Triton ended, {_ending(server)}"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Lets signals in, those that have waited first: each raises KeyboardInterrupt."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _state(stat: str) -> list[str]:
    """Returns the state and the parent of the process that `stat` (/proc/N/stat) describes."""
    try:
        return Path(stat).read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return ["X", "0"]


def _ending(server: subprocess.Popen[bytes]) -> str:
    code = server.returncode
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Ends Triton and the processes of its models."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(timeout=STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _log_errors(log_file: Path, max_lines: int = 12) -> str:
    """Returns the last lines of Triton's log that tell of errors, or its last lines if none does."""
    try:
        log = log_file.read_text(errors="replace")
    except OSError:  # deleted meanwhile: no reason to say nothing of why Triton died
        return ""
    lines = [line for line in log.splitlines() if line.strip() and line[0] not in "|+"]
    # Without a GPU Triton logs errors about CUDA and serves all the same.
    is_error = re.compile(r"E\d{4} |error:|\S+/tritonserver: ").match
    errors = [line for line in lines if is_error(line) and "cuda" not in line.lower()]
    return "".join(f"\n  {line}" for line in (errors or lines)[-max_lines:])


if __name__ == "__main__":
    sys.exit(main())
