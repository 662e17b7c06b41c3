"""serve.py when something is wrong, each error with its remedy, and how it ends."""

import contextlib
import ctypes
import glob
import http.client
import http.server
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import serving
import tritonclient.grpc
import tritonclient.http
from serving import CHECKOUT, SERVE_PYTHON, Server, command, free_ports

from clients import SentimentClient, ServerError
from export.repository import MODEL_FILE, TOKENIZER_FILE
from local_server.arguments import EXIT_TIMEOUT_S
from local_server.errors import ServeError
from local_server.options import parse
from local_server.preflight import check
from local_server.processes import children, name_of
from local_server.readiness import first_answer
from local_server.triton import STOP_TIMEOUT_S
from local_server.wheel import libpython_folder

PROMISED_STOP_S = 5.0
SLACK_S = 3.0
"""Allowed on top where other work takes the processor away; without a limit of its own serve.py would wait for ever."""


@pytest.fixture
def own_repository(repository: Path, tmp_path: Path) -> Path:
    """A copy of the tiny repository for a test to break."""
    return Path(shutil.copytree(repository, tmp_path / "models"))


@pytest.fixture
def run(own_repository: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs serve.py with further flags until it gives up."""

    def run(*flags: str, ports: dict[str, int] | None = None) -> subprocess.CompletedProcess[str]:
        line = [*command(own_repository, tmp_path / "triton.log", ports or free_ports()), *flags]
        return subprocess.run(line, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def own_server(own_repository: Path, tmp_path: Path) -> Iterator[Server]:
    server = serving.start(own_repository, tmp_path / "triton.log")
    yield server
    if server.process.poll() is None:  # a test that failed left it running
        server.stop()


def triton_processes(server: Server) -> list[int]:
    """Returns the ids of Triton and its models' processes that belong to `server`."""
    marks = (f"--http-port={server.ports['http']}", f"triton_{server.process.pid}_")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_text(errors="replace")
            if int(folder.name) != server.process.pid and any(mark in line for mark in marks):
                found.append(int(folder.name))
    return found


def wait_until_gone(server: Server) -> None:
    deadline_s = time.monotonic() + 30
    while triton_processes(server) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert triton_processes(server) == []


# ---- what is wrong before it starts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["http", "grpc", "metrics"])
def test_a_taken_port_is_named_with_its_owner(run: Callable[..., subprocess.CompletedProcess[str]], name: str) -> None:
    ports = free_ports()
    with socket.create_server(("127.0.0.1", ports[name])):
        result = run(ports=ports)
    assert result.returncode == 1
    assert f"{name} port 127.0.0.1:{ports[name]} cannot be used: Address already in use" in result.stderr
    assert f"by process {os.getpid()}" in result.stderr
    assert f"{name.upper()}_PORT=" in result.stderr


def test_an_address_that_is_not_this_machines_is_named(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run("--address=203.0.113.1", "--allow-remote")  # for documentation alone: RFC 5737
    assert result.returncode == 1
    assert "give --address an address of this machine" in result.stderr


def test_ports_come_from_the_environment(repository: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    result = subprocess.run(
        [SERVE_PYTHON, str(CHECKOUT / "serve.py"), f"--model-repository={repository}"],
        env={**os.environ, "METRICS_PORT": str(port), "HTTP_PORT": "0"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, "'0' came, expected a port from 1 to 65535" in result.stderr) == (2, True)
    result = subprocess.run(
        [SERVE_PYTHON, str(CHECKOUT / "serve.py"), f"--model-repository={repository}", "--http-port", str(port)],
        env={**os.environ, "METRICS_PORT": str(port)},
        capture_output=True,
        text=True,
    )
    taken.close()
    assert result.returncode == 1
    assert "three different ports are needed" in result.stderr


def test_a_missing_model_file_is_named_with_what_to_run(
    run: Callable[..., subprocess.CompletedProcess[str]], own_repository: Path
) -> None:
    (own_repository / TOKENIZER_FILE).unlink()
    result = run()
    assert result.returncode == 1
    assert TOKENIZER_FILE in result.stderr
    assert "git checkout -- model_repository" in result.stderr


def test_a_model_that_is_not_the_manifests_is_refused(
    run: Callable[..., subprocess.CompletedProcess[str]], own_repository: Path
) -> None:
    path = own_repository / MODEL_FILE
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    result = run()
    assert result.returncode == 1
    assert MODEL_FILE in result.stderr
    assert "sha256" in result.stderr
    assert "git checkout -- model_repository" in result.stderr


def test_an_interrupted_installation_is_finished_or_undone(own_repository: Path, tmp_path: Path) -> None:
    stray = own_repository / f"{MODEL_FILE}.installing"
    stray.write_bytes(b"half a model")
    server = serving.start(own_repository, tmp_path / "triton.log")
    assert server.stop() == 0
    assert not stray.exists()


def test_a_model_that_triton_cannot_load_ends_with_its_log(
    run: Callable[..., subprocess.CompletedProcess[str]], own_repository: Path
) -> None:
    (own_repository / "classifier" / "1" / "model.py").write_text("raise RuntimeError('broken on purpose')\n")
    result = run()
    assert result.returncode == 1
    assert "Triton ended while starting" in result.stderr
    assert "broken on purpose" in result.stderr


@pytest.mark.parametrize("value", ["-1", "20", "high"])
def test_a_niceness_that_is_none_is_named(
    run: Callable[..., subprocess.CompletedProcess[str]], own_repository: Path, value: str
) -> None:
    config = own_repository / "tokenizer" / "config.pbtxt"
    config.write_text(config.read_text().replace('string_value: "15"', f'string_value: "{value}"'))
    result = run()
    assert result.returncode == 1
    assert f"niceness '{value}' came in tokenizer/config.pbtxt, expected a whole number from 0 to 19" in result.stderr


def test_a_failure_of_the_engine_is_the_servers_and_is_logged(own_repository: Path, tmp_path: Path) -> None:
    with (own_repository / "classifier" / "runner.py").open("a") as module:
        module.write(FAILS_ON_A_WORD_TWICE)
    server = serving.start(own_repository, tmp_path / "triton.log")
    try:
        status, answer = serving.infer(server, serving.texts(["good good"]))
        assert status == 500  # /generate says 400 whatever it is
        assert "no memory, on purpose" in answer["error"]
        serving.await_log(tmp_path / "triton.log", "no memory, on purpose")
        assert serving.generate(server, "good")[0] == 200
        with SentimentClient(server.grpc_url) as client, pytest.raises(ServerError, match="on purpose"):
            client.predict(["good", "good good", "a good film"])
    finally:
        server.stop()


FAILS_ON_A_WORD_TWICE = """

_run = Runner.run


def _run_or_fail(self, rows, width, whose):
    for row in rows:
        half = len(row) // 2
        if row[0] != row[1] and row[1:half].tolist() == row[half:-1].tolist():
            raise RuntimeError("no memory, on purpose")
    return _run(self, rows, width, whose)


Runner.run = _run_or_fail
"""


@pytest.mark.parametrize(
    "flag",
    [
        *("--http-address=0.0.0.0", "--grpc-address=0.0.0.0", "--metrics-addr=0.0.0.0", "--allow-sage=true"),
        *("--http-port=1", "--grpc-p=1", "--metrics-port=1", "--allow-http=false"),
    ],
)
def test_a_place_to_listen_is_not_slipped_past_the_check_as_a_flag(
    run: Callable[..., subprocess.CompletedProcess[str]], flag: str
) -> None:
    result = run(f"--triton-flag={flag}")
    assert result.returncode == 1
    assert "--address" in result.stderr


def test_an_address_that_is_none_is_refused(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run("--address=::1")
    assert result.returncode == 2
    assert "expected an IPv4 address" in result.stderr


def test_an_address_that_others_reach_is_refused_with_the_reason(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    result = run("--address=0.0.0.0")
    assert result.returncode == 1
    assert "known vulnerabilities" in result.stderr
    assert "--allow-remote" in result.stderr


def test_a_folder_for_temporary_files_that_a_shell_would_take_apart_is_refused(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my files"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    result = run()
    assert result.returncode == 1
    assert f"'{folder}'" in result.stderr
    assert "TMPDIR=/tmp make serve" in result.stderr


def test_a_flag_that_triton_does_not_know_is_named(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run("--triton-flag=--no-such-flag")
    assert result.returncode == 1
    assert "unrecognized option '--no-such-flag'" in result.stderr


def test_a_log_that_cannot_be_written_is_named(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run("--log-file=/proc/no/such.log")
    assert result.returncode == 1
    assert "--log-file /proc/no/such.log cannot be written: No such file or directory" in result.stderr


def test_a_log_that_has_no_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--log-file=."], None)
    assert "argument --log-file: '.' came, expected the name of a file" in capsys.readouterr().err


def test_the_log_before_is_kept(
    run: Callable[..., subprocess.CompletedProcess[str]], own_repository: Path, tmp_path: Path
) -> None:
    """Under a supervisor it is the one that tells why the server ended."""
    (own_repository / "classifier" / "1" / "model.py").write_text("raise RuntimeError('broken on purpose')\n")
    for name in ("triton.log", "triton.log.1"):
        assert run().returncode == 1
        assert (tmp_path / name).read_text().count("broken on purpose") > 0


def test_another_servers_answer_is_not_taken_for_this_ones() -> None:
    """As when two start at once: both find the ports free, and only one gets them."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"label": "positive"}')

        def log_message(self, *_: Any) -> None:
            pass

    with (
        http.server.HTTPServer(("127.0.0.1", 0), Other) as other,
        subprocess.Popen(["sleep", "1"]) as ours,
    ):
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(ServeError, match="Triton ended while starting"):
            first_answer(ours, f"http://127.0.0.1:{other.server_port}/")
        other.shutdown()


def test_a_model_repository_may_have_a_space_in_its_path(repository: Path, tmp_path: Path) -> None:
    server = serving.start(shutil.copytree(repository, tmp_path / "my models"), tmp_path / "triton.log")
    assert '"label":' in server.announcement
    assert server.stop() == 0


def test_an_unsupported_python_is_refused_before_anything_else() -> None:
    line = "import sys; sys.version_info = (3, 9, 18); exec(compile(open('serve.py').read(), 'serve.py', 'exec'))"
    result = subprocess.run([sys.executable, "-c", line], cwd=CHECKOUT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "expected 3.10, 3.11 or 3.12: run `rm -rf .venv-serve && make serve PYTHON=python3.11`" in result.stderr


def test_the_first_lines_are_readable_for_old_pythons() -> None:
    import ast

    source = (CHECKOUT / "serve.py").read_text()
    ast.parse(source, feature_version=(3, 7))
    assert source.index("sys.version_info") < source.index("\nfrom ")


def test_a_python_without_its_shared_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def not_found(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: None)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(ctypes, "CDLL", not_found)
    with pytest.raises(ServeError, match=r"libpython3.\d+.so.1.0 was not found.*apt-get install.*pyenv"):
        libpython_folder()


def test_too_little_shared_memory_is_refused_with_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=8 << 20))
    options = parse([f"--{name}-port={port}" for name, port in free_ports().items()], None)
    with pytest.raises(ServeError, match=r"/dev/shm has 8 MiB free, expected 32.*--shm-size=256m"):
        check(options)


def test_a_process_with_a_name_that_is_no_text_keeps_nothing_from_serving() -> None:
    """Linux cuts names after 15 bytes, within a letter if need be, and serve.py looks through all processes."""
    rename = r"open('/proc/self/comm', 'wb').write(b'caf\xc3'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", rename], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as odd:
        assert odd.stdout is not None
        odd.stdout.readline()
        assert odd.pid in children(os.getpid())


@pytest.mark.parametrize(
    ("name", "expected"), [("triton-PORT.log", "triton-9000.log"), ("REPORT.log", "REPORT.log"), ("PORT", "9000")]
)
def test_log_file_has_the_port_where_its_name_asks_for_it(name: str, expected: str) -> None:
    assert parse(["--http-port=9000", f"--log-file=logs/{name}"], None).log_file == Path("logs") / expected


# ---- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_despite_an_idle_connection(own_server: Server, number: int) -> None:
    idle = http.client.HTTPConnection("127.0.0.1", own_server.ports["http"])
    idle.request("GET", "/v2/health/ready")
    assert idle.getresponse().read() == b""  # answered, and the connection stays open
    started_s = time.monotonic()
    assert own_server.stop(number) == 0
    assert time.monotonic() - started_s < PROMISED_STOP_S + SLACK_S
    assert EXIT_TIMEOUT_S < STOP_TIMEOUT_S < PROMISED_STOP_S, "Triton's own end, then ours, within what is promised"
    idle.close()
    wait_until_gone(own_server)
    assert not list(Path("/dev/shm").glob(f"triton_{own_server.process.pid}_*"))


SIGNALLED_WHILE_POLLING = """
import signal, sys, serve

class Lock:  # in subprocess.Popen: whoever takes it and does not come to release it keeps it for ever
    def __init__(self, lock):
        self.lock = lock

    def acquire(self, *arguments):
        taken = self.lock.acquire(*arguments)
        signal.raise_signal(signal.SIGTERM)
        return taken

    def release(self):
        self.lock.release()

    def __enter__(self):
        self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()

def wait_for_death(server, wait=serve.wait_for_death):
    server._waitpid_lock = Lock(server._waitpid_lock)
    return wait(server)

serve.wait_for_death = wait_for_death
sys.exit(serve.main(sys.argv[1:]))
"""


def test_a_signal_at_the_worst_moment_ends_it_too(repository: Path, tmp_path: Path) -> None:
    python, _, *flags = command(repository, tmp_path / "triton.log", free_ports())
    line = [python, "-c", SIGNALLED_WHILE_POLLING, *flags]
    result = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")


def test_no_triton_outlives_a_killed_serve(own_server: Server) -> None:
    lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in triton_processes(own_server)]
    (folder,) = (
        line.partition("--backend-directory=")[2].partition("\0")[0] for line in lines if "--http-port" in line
    )
    assert Path(folder).is_dir()
    assert own_server.stop(signal.SIGKILL) == -signal.SIGKILL
    wait_until_gone(own_server)
    shared_memory = f"/dev/shm/triton_{own_server.process.pid}_*"
    deadline_s = time.monotonic() + 10
    while (left := [*glob.glob(shared_memory), *glob.glob(folder)]) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not left


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        pytest.param("--http-port=", "Triton ended, killed by SIGKILL", id="Triton"),
        pytest.param("classifier/1/model.py", "the process of a model ended", id="a model's process"),
    ],
)
def test_a_death_while_serving_is_told_and_ends_it(
    own_repository: Path, tmp_path: Path, mark: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serving.start(own_repository, tmp_path / "triton.log")
    victim = next(pid for pid in triton_processes(server) if mark in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(victim, signal.SIGKILL)
    assert server.process.wait(timeout=60) == 1
    assert reason in capfd.readouterr().err
    wait_until_gone(server)


def test_a_death_is_told_where_the_log_is_a_pipe(repository: Path) -> None:
    """Which cannot be read back for the reason: it would never end."""
    line = command(repository, Path("/dev/stdout"), free_ports())
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        next(line for line in process.stdout if line.startswith("gRPC "))
        threading.Thread(target=process.stdout.read, daemon=True).start()
        try:
            (triton,) = (pid for pid in children(process.pid) if "tritonserver" in name_of(pid))
            os.kill(triton, signal.SIGKILL)
            assert process.wait(timeout=60) == 1
            assert "Triton ended, killed by SIGKILL" in process.stderr.read()
        finally:
            process.kill()


# ---- what it bears ---------------------------------------------------------------------------------------------------


def test_idle_connections_beyond_the_usual_limit_of_files_keep_nobody_out(repository: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        server = serving.start(repository, tmp_path / "triton.log")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    try:
        with contextlib.ExitStack() as idle:
            for _ in range(300):
                idle.enter_context(socket.create_connection(("127.0.0.1", server.ports["http"])))
            assert serving.generate(server, "good")[0] == 200
    finally:
        server.stop()


def test_shared_memory_is_for_its_user_alone(own_server: Server) -> None:
    assert serving.generate(own_server, "good")[0] == 200
    regions = list(Path("/dev/shm").glob(f"triton_{own_server.process.pid}_*"))
    assert regions
    assert {stat.S_IMODE(region.stat().st_mode) & 0o077 for region in regions} == {0}


@pytest.mark.xfail(strict=True, reason="Triton 2.51.0 dies of it (SIGSEGV): README, Limits")
def test_deeply_nested_lists_end_nothing(own_server: Server) -> None:
    depth = 300_000
    body = b'{"text": ' + b"[" * depth + b'"good"' + b"]" * depth + b"}"
    try:
        with contextlib.suppress(OSError, http.client.HTTPException):
            serving.post(f"{own_server.http_url}/v2/models/sentiment/generate", body)
        assert serving.generate(own_server, "good")[0] == 200
    finally:
        own_server.process.terminate()
        own_server.process.wait(timeout=60)


@pytest.mark.xfail(strict=True, reason="Triton 2.51.0 dies of it (SIGFPE): README, Limits")
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_asking_for_the_best_classes_of_a_text_output_ends_nothing(own_server: Server, protocol: str) -> None:
    """Triton's classification extension, asked of `label`, whose elements have no fixed size."""
    client = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
    request = serving.triton_request(client, [b"good"])
    try:
        with client.InferenceServerClient(f"127.0.0.1:{own_server.ports[protocol]}") as connection:
            with contextlib.suppress(Exception):
                connection.infer("sentiment", [request], outputs=[client.InferRequestedOutput("label", class_count=1)])
            assert serving.generate(own_server, "good")[0] == 200
    finally:
        own_server.process.terminate()
        own_server.process.wait(timeout=60)
