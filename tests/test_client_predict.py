"""`python -m clients.predict`: what it reads, what it prints where, and its exit codes."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_standins import MODEL, Script, free_port, stand_in, wait_until

import clients
from clients import AsyncSentimentClient
from clients.lines import Line, answer_lines
from clients.predict import main

ROOT = Path(clients.__file__).parents[1]
MIXED = "good 1\n\nnot \udcff text\nwrong\nbad 5\n".encode("utf-8", "surrogateescape")


@pytest.fixture
def script() -> Script:
    return Script(refuses=lambda review: b"wrong" in review)


@pytest.fixture(params=["grpc", "http"])
def server(request: pytest.FixtureRequest, script: Script) -> Iterator[list[str]]:
    """The arguments that point at a stand-in which refuses reviews with the word `wrong`."""
    with stand_in(request.param, script) as url:
        yield ["--url", url, "--model", MODEL]


@pytest.fixture
def reviews_file(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.txt"
    path.write_bytes(MIXED)
    return path


def run(arguments: list[str], **settings: Any) -> "subprocess.CompletedProcess[bytes]":
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "clients.predict", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, **settings)


def test_arguments_are_answered_one_a_row(server: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*server, "good 250", "a bore 300"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["positive  0.7500  good 250", "negative  0.8000  a bore 300"]
    assert err == ""


def test_broken_lines_are_reported_by_number_and_the_rest_goes_on(
    server: list[str], reviews_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*server, "--file", str(reviews_file)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == ["positive  0.5010  good 1", "negative  0.5050  bad 5"]
    assert err.splitlines() == [
        "line 2: empty",
        "line 3: not UTF-8: byte 0xff at offset 4",
        "line 4: something in here is wrong",
    ]


def test_json_is_one_object_a_line_also_for_broken_ones(
    server: list[str], reviews_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*server, "--json", "--file", str(reviews_file)]) == 1
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0] == {"line": 1, "label": "positive", "score": 0.501, "probabilities": [0.499, 0.501]}
    assert rows[1] == {"line": 2, "error": "empty"}


def test_a_long_file_keeps_its_order(
    server: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], script: Script
) -> None:
    path = tmp_path / "long.txt"
    path.write_text("\n".join(f"good {number}" for number in range(450)))  # no end of line at the end
    script.before = lambda: wait_until(lambda: len(script.batches) >= 3)  # the first waits for two more
    assert main([*server, "--json", "--file", str(path), "--max-in-flight", "5"]) == 0
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [round(1000 * (row["score"] - 0.5)) for row in rows] == list(range(450))
    assert 3 <= script.most_at_once <= 5


@pytest.mark.parametrize("arguments", [["-"], ["--file", "-"]])
def test_a_dash_reads_stdin(server: list[str], arguments: list[str]) -> None:
    done = run([*server, *arguments], input=MIXED)
    assert done.returncode == 1
    assert [row.split()[0] for row in done.stdout.splitlines()] == [b"positive", b"negative"]
    assert done.stderr.splitlines()[0] == b"line 2: empty"


def test_a_line_in_a_pipe_is_answered_before_the_next_comes(server: list[str]) -> None:
    command = [sys.executable, "-m", "clients.predict", *server, "-"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(3):
            process.stdin.write(b"good %d\n" % number)
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"good %d\n" % number)
        process.stdin.close()
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("source", [["-"], ["--file", "/dev/stdin"]], ids=["-", "--file"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (None, 2)], ids=["Ctrl-C", "server gone"])
def test_an_end_while_a_pipe_is_silent_is_no_crash(
    script: Script, number: int | None, status: int, source: list[str]
) -> None:
    with stand_in("http", script) as url:
        command = [sys.executable, "-m", "clients.predict", "--url", url, "--model", MODEL, *source]
        pipe = subprocess.PIPE
        before = signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a job in the background ignores it, inherited
        process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe)
        signal.signal(signal.SIGINT, before)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"good 1\n")
        process.stdin.flush()
        assert process.stdout.readline().endswith(b"good 1\n")  # and now the reader waits for the next line
        if number:
            process.send_signal(number)
    if not number:
        process.stdin.write(b"good 2\n")
        process.stdin.flush()
    with process:
        assert process.wait(timeout=60) == status
        assert process.stderr is not None
        assert b"Fatal Python error" not in process.stderr.read()


def test_only_a_few_batches_are_read_ahead(server: list[str], script: Script) -> None:
    num_read, num_answered, most_ahead = 0, 0, 0

    def lines() -> Iterator[Line]:
        nonlocal num_read, most_ahead
        for number in range(1, 1001):
            num_read += 1
            most_ahead = max(most_ahead, num_read - num_answered)
            yield Line(number, "good")

    async def read_all() -> None:
        nonlocal num_answered
        async with AsyncSentimentClient(server[1], model=MODEL) as client:
            async for answers in answer_lines(client, lines(), max_in_flight=3):
                num_answered += len(answers)

    asyncio.run(read_all())
    assert num_answered == 1000
    queued, in_flight, in_hand = 2 * script.max_batch_size, 3 * script.max_batch_size, 1
    assert most_ahead <= queued + in_flight + in_hand


def test_an_argument_that_is_not_utf8_is_reported(server: list[str]) -> None:
    done = run([*server, b"caf\xe9", "good"])  # type: ignore[list-item]
    assert done.returncode == 1
    assert done.stderr.startswith(b"review 1: character 3 is U+DCE9")
    assert done.stdout.startswith(b"positive")


def test_a_progress_bar_goes_to_stderr_only_when_asked_or_on_a_terminal(server: list[str], reviews_file: Path) -> None:
    quiet = run([*server, "--file", str(reviews_file)])
    asked = run([*server, "--file", str(reviews_file), "--progress"])
    assert b"review/s" not in quiet.stderr
    assert b"/5" in asked.stderr
    assert b"review/s" in asked.stderr
    assert asked.stdout == quiet.stdout


def test_a_server_that_cannot_be_reached_ends_the_run(reviews_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"grpc://127.0.0.1:{free_port()}"
    assert main(["--url", url, "--file", str(reviews_file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"stopped after 0 lines: nothing listens at {url}")
    assert "make serve" in err


def test_a_server_that_fails_midway_leaves_the_answers_so_far(
    server: list[str], script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_late() -> None:
        if len(script.batches) > 3:
            script.num_unavailable = 1000

    script.before = fail_late
    path = tmp_path / "long.txt"
    path.write_text("good 1\n" * 100)
    assert main([*server, "--file", str(path), "--max-in-flight", "1"]) == 2
    out, err = capsys.readouterr()
    num_done = len(out.splitlines())
    assert 0 < num_done < 100
    assert f"stopped after {num_done} lines: " in err


def test_a_reader_that_leaves_early_is_no_traceback(server: list[str], tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("good and long enough to fill a pipe\n" * 5000)
    command = [sys.executable, "-m", "clients.predict", *server, "--file", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "expected either reviews or --file", id="nothing"),
        pytest.param(["good", "--file", "x"], "expected either reviews or --file", id="both"),
        pytest.param(["--file", "no/such/file"], "cannot read no/such/file: No such file", id="no-file"),
        pytest.param(["good", "--url", "127.0.0.1:8001"], "write for example grpc://", id="url"),
        pytest.param(["good", "--timeout-s", "0"], "expected more than 0 and at most", id="timeout"),
        pytest.param(["good", "--max-in-flight", "0"], "expected at least 1", id="in-flight"),
    ],
)
def test_wrong_usage_says_what_to_write(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_teaches_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert 'python -m clients.predict "I loved it"' in out
    assert "(default: grpc://127.0.0.1:8001)" in " ".join(out.split())
    assert "None" not in out
