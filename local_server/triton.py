"""The server's process, from its start to its end, whatever ends it."""

import argparse
import contextlib
import glob
import os
import re
import resource
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from local_server import wheel
from local_server.arguments import command
from local_server.errors import ServeError
from local_server.signals import hold_signals, release_signals

STACK_BYTES = 64 << 20
"""Of each Triton thread. Its HTTP library copies a body of type application/x-www-form-urlencoded, which is what
`curl -d` sends, to the stack twice: with the usual 8 MiB a text of 5 MB kills the server."""

OPEN_FILES = 1 << 16
"""Of Triton at most, where the hard limit allows. Beside idle connections, which it never closes, the usual 1,024 run
out: then it answers nobody, and logs so a hundred thousand times a second."""

STOP_TIMEOUT_S = 4  # from the signal to killing Triton, below the 5 s promised


@contextlib.contextmanager
def triton(options: argparse.Namespace) -> Iterator[subprocess.Popen[bytes]]:
    """Runs Triton, its output in the log file; ends it on the way out, gently first. Holds signals from here on."""
    hold_signals()
    shm_prefix = _shm_prefix(options)
    with tempfile.TemporaryDirectory(prefix="triton-") as name, _opened(options.log_file) as log:
        folder = Path(name)
        wheel.link_python_backend(folder / "python")
        repository = wheel.plain_path(options.model_repository, folder)
        server = subprocess.Popen(
            command(options, repository, folder, shm_prefix),
            env=wheel.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for this process alone
            preexec_fn=_before_exec,
        )
        guard = None
        try:
            guard = _guard(server.pid, shm_prefix, name)
            yield server
        except ServeError as error:
            raise ServeError(f"{error}{_log_errors(options.log_file)}") from error
        finally:
            _stop(server)
            if guard is not None:
                guard.kill()
                guard.communicate()
            for region in _regions(shm_prefix):  # a killed Triton leaves them behind
                region.unlink()


def close_shared_memory(options: argparse.Namespace) -> None:
    """Keeps other users of this machine from reading the reviews that pass through the server's shared memory.

    Once its models are loaded: Triton opens each region for all to read, whatever the umask.
    """
    for region in _regions(_shm_prefix(options)):
        region.chmod(0o600)


def _shm_prefix(options: argparse.Namespace) -> str:
    return f"triton_{os.getpid()}_{options.http_port}_"


def _regions(shm_prefix: str) -> list[Path]:
    return [Path(region) for region in glob.glob(f"/dev/shm/{shm_prefix}*")]


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
    release_signals()  # else Triton inherits that they are held
    _, limit = resource.getrlimit(resource.RLIMIT_STACK)
    stack = STACK_BYTES if limit == resource.RLIM_INFINITY else min(STACK_BYTES, limit)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, limit))
    files, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, min(OPEN_FILES, limit)), limit))


def _opened(log_file: Path) -> BinaryIO:
    """Returns the file to log to, empty; what it held is kept beside it: it may tell why the server had to start again.

    Raises:
        ServeError: it cannot be written.
    """
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        if log_file.is_file() and log_file.stat().st_size:
            log_file.replace(log_file.with_name(f"{log_file.name}.1"))
        return log_file.open("ab")
    except OSError as error:
        raise ServeError(f"--log-file {log_file} cannot be written: {error.strerror}; name another") from error


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
    if not log_file.is_file():  # deleted meanwhile, or a pipe, which this process would wait for the end of
        return ""
    try:
        log = log_file.read_text(errors="replace")
    except OSError:  # no reason to say nothing of why Triton died
        return ""
    lines = [line for line in log.splitlines() if line.strip() and line[0] not in "|+"]
    # Without a GPU Triton logs errors about CUDA and serves all the same.
    is_error = re.compile(r"E\d{4} |error:|\S+/tritonserver: ").match
    errors = [line for line in lines if is_error(line) and "cuda" not in line.lower()]
    return "".join(f"\n  {line}" for line in (errors or lines)[-max_lines:])
