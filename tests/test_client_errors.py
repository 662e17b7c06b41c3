"""What the clients make of servers that are absent, silent, busy, gone, or something else altogether."""

import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client_standins import (
    MODEL,
    Cancelled,
    Exhausted,
    Script,
    Unavailable,
    Unloaded,
    free_port,
    socket_server,
    stand_in,
    wait_until,
)

import clients.client
from clients import (
    AsyncSentimentClient,
    ClientStateError,
    DeadlineError,
    ModelNotFoundError,
    RetryPolicy,
    SentimentClient,
    SentimentError,
    ServerError,
    ServerUnavailableError,
)

ONCE = RetryPolicy(max_attempts=1)
QUICK = RetryPolicy(max_attempts=3, first_backoff_s=0.001)
PATIENT = RetryPolicy(max_attempts=40, first_backoff_s=0.1, max_backoff_s=0.3)


@pytest.fixture(params=["grpc", "http"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["blocking", "asyncio"])
def predict(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Returns the first prediction for one review by a fresh client."""

    def blocking(url: str, **settings: Any) -> Any:
        with SentimentClient(url, **{"model": MODEL} | settings) as client:
            return client.predict(["good 1"])[0].label

    def asynchronous(url: str, **settings: Any) -> Any:
        async def run() -> Any:
            async with AsyncSentimentClient(url, **{"model": MODEL} | settings) as client:
                return (await client.predict(["good 1"]))[0].label

        return asyncio.run(run())

    return blocking if request.param == "blocking" else asynchronous


def causes(error: BaseException | None) -> list[BaseException]:
    """Returns the chain of causes, `error` first."""
    return [] if error is None else [error, *causes(error.__cause__)]


def test_where_nothing_listens_the_error_says_how_to_start_a_server(predict: Any, scheme: str) -> None:
    url = f"{scheme}://127.0.0.1:{free_port()}"
    with pytest.raises(
        ServerUnavailableError, match=rf"nothing listens at {url}: .*`make serve`.*attempts: 3"
    ) as raised:
        predict(url, retry=QUICK)
    assert not isinstance(causes(raised.value)[-1], SentimentError)  # the library's own error is at the bottom


def test_an_unknown_host_is_unavailable(predict: Any, scheme: str) -> None:
    with pytest.raises(ServerUnavailableError, match="unavailable"):
        predict(f"{scheme}://no-such-host.invalid:8001", retry=ONCE)


def test_a_server_that_accepts_and_stalls_meets_the_deadline_and_is_not_asked_again(predict: Any, scheme: str) -> None:
    with socket_server(lambda connection: None) as (port, connections):
        with pytest.raises(DeadlineError, match="timeout_s"):
            predict(f"{scheme}://127.0.0.1:{port}", timeout_s=1, retry=QUICK)
        assert len(connections) == 1


def test_an_inference_that_stalls_meets_the_deadline_and_is_not_sent_again(predict: Any, scheme: str) -> None:
    released = threading.Event()
    script = Script(before=lambda: released.wait(60))
    with stand_in(scheme, script) as url:
        try:
            with pytest.raises(DeadlineError, match=url):
                predict(url, timeout_s=2.0, retry=QUICK)
            assert len(script.batches) == 1
        finally:
            released.set()


def test_a_server_that_drips_its_answer_meets_the_deadline(predict: Any) -> None:
    stopped = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not stopped.wait(0.05):
            try:
                connection.sendall(b"x")
            except OSError:
                return

    with socket_server(drip) as (port, _):
        try:
            with pytest.raises(DeadlineError):
                predict(f"http://127.0.0.1:{port}", timeout_s=0.5)
        finally:
            stopped.set()


def test_after_a_deadline_the_client_still_works(scheme: str) -> None:
    released = threading.Event()
    script = Script(before=lambda: released.wait(60))
    with stand_in(scheme, script) as url, SentimentClient(url, model=MODEL, timeout_s=3.0) as client:
        with pytest.raises(DeadlineError):
            client.predict(["good"])
        released.set()
        assert client.predict(["good"])[0].label == "positive"


def test_a_busy_server_is_asked_again_until_it_has_room(predict: Any, scheme: str) -> None:
    script = Script(num_unavailable=2)
    with stand_in(scheme, script) as url:
        assert predict(url, retry=QUICK) == "positive"
    assert len(script.batches) == 3


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(Unloaded(f"Request for unknown model: '{MODEL}' has no available versions"), id="models gone"),
        pytest.param(Cancelled("CANCELLED"), id="calls cancelled"),
        pytest.param(Exhausted("too many requests"), id="a gateway's limit"),
    ],
)
def test_a_server_that_cannot_answer_now_is_asked_again(predict: Any, scheme: str, failure: Exception) -> None:
    script = Script(num_unavailable=2, failure=failure)
    with stand_in(scheme, script) as url:
        assert predict(url, retry=QUICK) == "positive"
    assert len(script.batches) == 3


def test_a_server_that_stays_busy_is_given_up(predict: Any, scheme: str) -> None:
    script = Script(num_unavailable=99)
    given_up = pytest.raises(ServerUnavailableError, match=r"Exceeds maximum queue size.*attempts: 3")
    with stand_in(scheme, script) as url, given_up:
        predict(url, retry=QUICK)
    assert len(script.batches) == 3


def test_a_gateway_whose_server_is_not_there_is_not_taken_for_it(predict: Any, scheme: str) -> None:
    script = Script(num_unavailable=99, failure=Unavailable("upstream connect error: Connection refused"))
    with (
        stand_in(scheme, script) as url,
        pytest.raises(ServerUnavailableError, match=rf"^{url} is unavailable: .*upstream connect error"),
    ):
        predict(url, retry=ONCE)


def test_a_server_that_comes_back_is_found_again(scheme: str) -> None:
    port = free_port()
    with stand_in(scheme, Script(), port) as url:
        client = SentimentClient(url, model=MODEL, retry=PATIENT)
        assert client.predict(["good"])[0].label == "positive"
    with pytest.raises(ServerUnavailableError), SentimentClient(url, model=MODEL, retry=ONCE) as other:
        other.predict(["good"])
    with client, stand_in(scheme, Script(), port):
        assert client.predict(["good"])[0].label == "positive"


def test_a_connection_that_breaks_before_the_answer_is_tried_again(predict: Any, scheme: str) -> None:
    def hang_up(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.close()

    # Long enough for gRPC, which connects again after 0.1 s and until then repeats the last failure.
    retry = RetryPolicy(max_attempts=3, first_backoff_s=0.4)
    with socket_server(hang_up) as (port, connections):
        with pytest.raises(ServerUnavailableError, match="attempts: 3"):
            predict(f"{scheme}://127.0.0.1:{port}", retry=retry)
        assert len(connections) >= 2


def test_half_an_answer_is_a_broken_connection(predict: Any) -> None:
    def hang_up(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"name":')
        connection.close()

    with socket_server(hang_up) as (port, _), pytest.raises(ServerUnavailableError):
        predict(f"http://127.0.0.1:{port}", retry=ONCE)


def test_a_web_server_is_told_from_triton(predict: Any) -> None:
    def greet(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>")

    with socket_server(greet) as (port, _), pytest.raises(ServerError, match="is it Triton's port"):
        predict(f"http://127.0.0.1:{port}")


METADATA = json.dumps(
    {
        "name": MODEL,
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1, 1]}],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1, 1]},
            {"name": "score", "datatype": "FP32", "shape": [-1, 1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]},
        ],
    }
)


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param(["{}", "{}"], id="metadata without tensors"),
        pytest.param(["[]", "{}"], id="metadata that is a list"),
        pytest.param(["null", "{}"], id="metadata that is null"),
        pytest.param([METADATA, "[]"], id="configuration that is a list"),
        pytest.param([METADATA, '{"max_batch_size": "x"}'], id="configuration without a number"),
        pytest.param([METADATA, '{"max_batch_size": 8}', "<html></html>"], id="answer in HTML"),
        pytest.param([METADATA, '{"max_batch_size": 8}', ""], id="empty answer"),
    ],
)
def test_answers_that_are_not_tritons_are_told_so(predict: Any, answers: list[str]) -> None:
    """As from a gateway, or from another service behind it."""
    left = iter(answers)

    def answer(connection: socket.socket) -> None:
        for body in left:
            connection.recv(65536)
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

    with socket_server(answer) as (port, _), pytest.raises(SentimentError, match="not in the KServe v2 protocol"):
        predict(f"http://127.0.0.1:{port}", retry=ONCE)


def test_an_answer_without_raw_contents_is_told_so(predict: Any) -> None:
    """As from another server of KServe's protocol, which may send its tensors typed."""
    with (
        stand_in("grpc", Script(sends_raw=False)) as url,
        pytest.raises(ServerError, match="3 outputs came with 0 raw"),
    ):
        predict(url, retry=ONCE)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("502 Bad Gateway", ServerUnavailableError),
        ("429 Slow Down", ServerUnavailableError),
        ("504 Late", DeadlineError),
    ],
)
@pytest.mark.parametrize("first", [[], [METADATA, '{"max_batch_size": 8}']], ids=["metadata", "inference"])
def test_a_gateway_that_cannot_pass_on_a_request_is_no_failure_of_the_model(
    predict: Any, status: str, expected: type[SentimentError], first: list[str]
) -> None:
    left = iter(first)

    def answer(connection: socket.socket) -> None:
        while connection.recv(65536):
            body = next(left, None)
            line, sent = ("200 OK", body) if body is not None else (status, "<html>nginx</html>")
            connection.sendall(f"HTTP/1.1 {line}\r\nContent-Length: {len(sent)}\r\n\r\n{sent}".encode())

    def answer_until_closed(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):  # once the client has its answer the test's end closes the connection
            answer(connection)

    with socket_server(answer_until_closed) as (port, _), pytest.raises(expected):
        predict(f"http://127.0.0.1:{port}", retry=ONCE)


def test_the_other_protocols_port_is_an_error_not_a_hang(predict: Any, scheme: str) -> None:
    other = {"grpc": "http", "http": "grpc"}[scheme]
    with stand_in(other, Script()) as url, pytest.raises(SentimentError):
        predict(url.replace(other, scheme), retry=ONCE, timeout_s=5.0)


def test_an_unknown_model_is_named(predict: Any, scheme: str) -> None:
    with stand_in(scheme, Script()) as url, pytest.raises(ModelNotFoundError, match=r"no such model ready.*blues"):
        predict(url, model="blues")


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf"), 1e12])
def test_a_timeout_that_cannot_be_waited_for_is_refused(timeout_s: float) -> None:
    with pytest.raises(ValueError, match=r"timeout_s is .*expected more than 0 and at most 1e\+09 seconds"):
        SentimentClient(timeout_s=timeout_s)


# ---------------------------------------------------------------------------------------------------------------------
# Ends, forks, event loops


def test_closing_twice_is_fine_and_use_after_it_is_an_error(scheme: str) -> None:
    with stand_in(scheme, Script()) as url:
        client = SentimentClient(url, model=MODEL)
        client.predict(["good"])
        client.close()
        client.close()
        with pytest.raises(ClientStateError, match="is closed"):
            client.predict(["good"])

        async def run() -> None:
            client = AsyncSentimentClient(url, model=MODEL)
            await client.predict(["good"])
            await client.close()
            await client.close()
            with pytest.raises(ClientStateError, match="is closed"):
                await client.predict(["good"])

        asyncio.run(run())


def test_closing_ends_the_calls_of_other_threads(scheme: str) -> None:
    released = threading.Event()
    script = Script(before=lambda: released.wait(60))
    raised: list[BaseException] = []

    def ask(client: SentimentClient) -> None:
        try:
            client.predict(["good"])
        except BaseException as error:
            raised.append(error)

    with stand_in(scheme, script) as url:
        client = SentimentClient(url, model=MODEL)
        threads = [threading.Thread(target=ask, args=(client,), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: script.most_at_once == len(threads))
        client.close()
        for thread in threads:
            thread.join(30)
        released.set()
    assert [type(error) for error in raised] == [ClientStateError] * len(threads)


def test_closing_ends_the_calls_of_other_tasks(scheme: str) -> None:
    released = threading.Event()
    script = Script(before=lambda: released.wait(60))

    async def run(url: str) -> list[Any]:
        client = AsyncSentimentClient(url, model=MODEL)
        calls = [asyncio.create_task(client.predict(["good"])) for _ in range(3)]
        while script.most_at_once < len(calls):
            await asyncio.sleep(0.01)
        await client.close()
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)

    with stand_in(scheme, script) as url:
        outcomes = asyncio.run(run(url))
        released.set()
    assert [type(outcome) for outcome in outcomes] == [ClientStateError] * 3


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_closing_ends_a_call_whose_answer_has_begun(kind: str) -> None:
    begun = threading.Event()

    def begin(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"name":')
        begun.set()

    async def asynchronous(url: str) -> BaseException:
        client = AsyncSentimentClient(url, model=MODEL, timeout_s=600)
        call = asyncio.create_task(client.predict(["good"]))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await client.close()
        (outcome,) = await asyncio.wait_for(asyncio.gather(call, return_exceptions=True), 30)
        assert isinstance(outcome, BaseException)
        return outcome

    def blocking(url: str) -> BaseException:
        client = SentimentClient(url, model=MODEL, timeout_s=600)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.predict, ["good"])
            assert begun.wait(30)
            time.sleep(0.1)
            client.close()
            outcome = call.exception(30)
        assert outcome is not None
        return outcome

    with socket_server(begin) as (port, _):
        url = f"http://127.0.0.1:{port}"
        assert type(blocking(url) if kind == "blocking" else asyncio.run(asynchronous(url))) is ClientStateError


def test_a_signal_handler_may_close_the_client_that_it_interrupts(scheme: str) -> None:
    code = f"""
import signal
import clients.client
from clients import ClientStateError, SentimentClient
client = SentimentClient("URL", model="{MODEL}")
open_transport = clients.client._open_transport
def interrupted(address):
    signal.raise_signal(signal.SIGUSR1)
    return open_transport(address)
clients.client._open_transport = interrupted
signal.signal(signal.SIGUSR1, lambda *_: client.close())
try:
    client.predict(["good"])
except ClientStateError:
    pass
"""
    with stand_in(scheme, Script()) as url:
        command = [sys.executable, "-c", code.replace("URL", url)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_client_closed_while_it_opens_stays_closed(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opening, closing = threading.Event(), threading.Event()
    open_transport = clients.client._open_transport

    def slowly(address: Any) -> Any:
        opening.set()
        closing.wait(30)
        return open_transport(address)

    monkeypatch.setattr(clients.client, "_open_transport", slowly)
    raised: list[BaseException] = []
    with stand_in(scheme, Script()) as url:
        client = SentimentClient(url, model=MODEL)

        def ask() -> None:
            try:
                client.predict(["good"])
            except BaseException as error:
                raised.append(error)

        threads = [threading.Thread(target=ask), threading.Thread(target=client.close)]
        threads[0].start()
        assert opening.wait(30)
        threads[1].start()
        closing.set()
        for thread in threads:
            thread.join(30)
        with pytest.raises(ClientStateError, match="is closed"):
            client.predict(["good"])
    assert not raised or type(raised[0]) is ClientStateError
    assert not [thread for thread in threading.enumerate() if thread.name == f"client of {url}"]


def test_the_garbage_collector_may_end_a_client_in_the_client_s_own_thread() -> None:
    code = f"""
import gc, threading
from clients import SentimentClient
client = SentimentClient("URL", model="{MODEL}")
client.predict(["good"])
loop = client._connection.predictor().transport._thread._loop
client.itself = client
del client
loop.call_soon_threadsafe(gc.collect)
for thread in threading.enumerate():
    if thread.name.startswith("client of"):
        thread.join(30)
        assert not thread.is_alive()
"""
    with stand_in("http", Script()) as url:
        command = [sys.executable, "-c", code.replace("URL", url)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_asyncio_client_stays_in_its_event_loop(scheme: str) -> None:
    with stand_in(scheme, Script()) as url:
        client = AsyncSentimentClient(url, model=MODEL)

        async def run() -> None:
            await client.predict(["good"])

        async def end() -> None:
            await client.close()

        loop = asyncio.new_event_loop()
        loop.run_until_complete(run())
        with pytest.raises(ClientStateError, match="another event loop"):
            asyncio.run(run())
        loop.run_until_complete(end())
        loop.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_fork_is_told_to_open_its_own_client(scheme: str) -> None:
    # In a process of its own, so that pytest's threads and other tests' connections are not forked as well.
    with stand_in(scheme, Script()) as url:
        process = multiprocessing.get_context("spawn").Process(target=_fork_with_open_client, args=(url,))
        process.start()
        wait_until(lambda: not process.is_alive(), timeout_s=60)
    assert process.exitcode == 0


def _fork_with_open_client(url: str) -> None:
    with SentimentClient(url, model=MODEL) as client:
        client.predict(["good"])
        child = os.fork()
        if child == 0:
            code = 1
            try:
                client.predict(["good"])
            except ClientStateError:
                code = 0
            client.close()
            del client  # neither this nor the end of the process touches the parent's connection
            sys.exit(code)
        _, status = os.waitpid(child, 0)
        client.predict(["good"])
        assert os.waitstatus_to_exitcode(status) == 0


def test_threads_that_end_leave_nothing_open(scheme: str) -> None:
    def num_open() -> int:
        return len(os.listdir("/dev/fd"))

    with stand_in(scheme, Script()) as url, SentimentClient(url, model=MODEL) as client:
        client.predict(["good"])
        before = num_open()
        for _ in range(20):
            thread = threading.Thread(target=client.predict, args=(["good"],))
            thread.start()
            thread.join()
        assert num_open() < before + 20


def test_a_client_that_is_never_closed_ends_in_silence(scheme: str) -> None:
    code = (
        "import sys; from clients import SentimentClient\n"
        "client = SentimentClient(sys.argv[1], model=sys.argv[2]); print(client.predict(['good'])[0].label)"
    )
    with stand_in(scheme, Script()) as url:
        command = [sys.executable, "-W", "error", "-c", code, url, MODEL]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "positive\n", "")
