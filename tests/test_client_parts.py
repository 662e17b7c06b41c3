"""The clients' pure parts: addresses, retry decisions, signatures, lines, and what importing them brings in."""

import asyncio
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import serialize_byte_tensor

import clients
from clients import transport_http
from clients.address import Address
from clients.errors import DeadlineError, InvalidReviewError, ModelContractError, ServerUnavailableError
from clients.lines import Line, read_lines
from clients.prediction import Prediction
from clients.raw_tensors import pack_bytes, unpack_rows
from clients.retry import RetryPolicy, with_retries
from clients.signature import Signature
from clients.workers import AsyncWorkers, BlockingWorkers, run_blocking

METADATA: dict[str, Any] = {
    "name": "sentiment",
    "inputs": [{"name": "text", "datatype": "BYTES", "shape": ["-1", "1"]}],
    "outputs": [
        {"name": "probabilities", "datatype": "FP32", "shape": ["-1", "2"]},
        {"name": "score", "datatype": "FP32", "shape": ["-1", "1"]},
        {"name": "label", "datatype": "BYTES", "shape": ["-1", "1"]},
    ],
}


# ---------------------------------------------------------------------------------------------------------------------
# Addresses


@pytest.mark.parametrize(
    ("url", "scheme", "target"),
    [
        pytest.param("grpc://127.0.0.1:8001", "grpc", "127.0.0.1:8001", id="grpc"),
        pytest.param("grpc://[::1]:8001/", "grpc", "[::1]:8001", id="ipv6"),
        pytest.param("http://reviews.example:80", "http", "reviews.example:80", id="http"),
        pytest.param("http://proxy:9000/triton/", "http", "proxy:9000/triton", id="base-path"),
    ],
)
def test_a_url_names_protocol_and_target(url: str, scheme: str, target: str) -> None:
    assert Address.parse(url) == Address(url, scheme, target)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("127.0.0.1:8001", id="no-scheme"),
        pytest.param("localhost:8001", id="a-host-is-no-scheme"),
        pytest.param("https://host:443", id="another-scheme"),
        pytest.param("grpc://host", id="no-port"),
        pytest.param("grpc://:8001", id="no-host"),
        pytest.param("http://host:http", id="port-in-words"),
        pytest.param("grpc://host:0", id="port-zero"),
        pytest.param("grpc://host:99999", id="port-too-high"),
        pytest.param("grpc://host:8001/base", id="grpc-with-path"),
        pytest.param("http://user@host:8000", id="user"),
        pytest.param("http://host:8000?x=1", id="query"),
        pytest.param("", id="nothing"),
    ],
)
def test_a_malformed_url_is_refused_with_one_that_works(url: str) -> None:
    with pytest.raises(ValueError, match=r"write for example grpc://127\.0\.0\.1:8001"):
        clients.SentimentClient(url)


# ---------------------------------------------------------------------------------------------------------------------
# Retries


class FakeTime:
    """A clock that moves only while somebody sleeps or works."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.sleeps_s: list[float] = []

    async def sleep(self, delay_s: float) -> None:
        self.sleeps_s.append(delay_s)
        self.now_s += delay_s

    def run(self, send: Callable[[float], Any], policy: RetryPolicy, timeout_s: float, jitter: float = 0.0) -> Any:
        async def send_soon(left_s: float) -> Any:
            return send(left_s)

        return run_blocking(
            with_retries(send_soon, policy, timeout_s, self.sleep, monotonic=lambda: self.now_s, jitter=lambda: jitter)
        )


def failing(num_failures: int, error: Exception) -> Callable[[float], list[float]]:
    """Returns a `send` that fails so often and then returns the seconds each attempt was given."""
    given_s: list[float] = []

    def send(left_s: float) -> list[float]:
        given_s.append(left_s)
        if len(given_s) <= num_failures:
            raise error
        return given_s

    return send


def test_backoff_doubles_up_to_its_bound() -> None:
    policy = RetryPolicy(max_attempts=6, first_backoff_s=0.1, max_backoff_s=0.5)
    assert [policy.backoff_s(attempt, jitter=0.0) for attempt in range(1, 6)] == [0.1, 0.2, 0.4, 0.5, 0.5]


def test_jitter_takes_off_up_to_half() -> None:
    assert RetryPolicy().backoff_s(1, jitter=1.0) == pytest.approx(0.05)


def test_an_unavailable_server_is_asked_again_with_the_time_that_is_left() -> None:
    time = FakeTime()
    given_s = time.run(failing(2, ServerUnavailableError("busy")), RetryPolicy(first_backoff_s=1.0), timeout_s=10)
    assert given_s == [10, 9, 7]
    assert time.sleeps_s == [1, 2]


def test_attempts_are_bounded() -> None:
    time = FakeTime()
    busy = ServerUnavailableError("busy")
    with pytest.raises(ServerUnavailableError, match=r"busy \(attempts: 3\)") as raised:
        time.run(failing(99, busy), RetryPolicy(max_attempts=3), timeout_s=10)
    assert raised.value.__cause__ is busy
    assert len(time.sleeps_s) == 2


def test_many_attempts_wait_no_longer_than_the_longest() -> None:
    time = FakeTime()
    with pytest.raises(ServerUnavailableError, match="attempts: 1500"):
        time.run(failing(9999, ServerUnavailableError("busy")), RetryPolicy(1500, 0.001, 0.002), timeout_s=1e6)
    assert max(time.sleeps_s) <= 0.002


def test_no_attempt_starts_after_the_deadline() -> None:
    time = FakeTime()
    with pytest.raises(ServerUnavailableError, match="attempts: 2"):
        time.run(failing(99, ServerUnavailableError("busy")), RetryPolicy(first_backoff_s=2.0), timeout_s=3)
    assert time.now_s == 2


@pytest.mark.parametrize("error", [DeadlineError("late"), InvalidReviewError(0, "empty"), ValueError("bug")])
def test_other_failures_are_not_retried(error: Exception) -> None:
    time = FakeTime()
    with pytest.raises(type(error)):
        time.run(failing(1, error), RetryPolicy(), timeout_s=10)
    assert time.sleeps_s == []


@pytest.mark.parametrize("settings", [{"max_attempts": 0}, {"first_backoff_s": 0}, {"first_backoff_s": 3}])
def test_an_impossible_policy_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        RetryPolicy(**settings)


# ---------------------------------------------------------------------------------------------------------------------
# Signatures


def test_a_signature_is_read_from_the_description() -> None:
    signature = Signature.read(METADATA, {"max_batch_size": 64})
    assert signature == Signature("sentiment", 64, "text", "label", "score", "probabilities")


@pytest.mark.parametrize(
    ("change", "max_batch_size"),
    [
        pytest.param({}, 0, id="no-batching"),
        pytest.param({"inputs": []}, 8, id="no-input"),
        pytest.param({"inputs": METADATA["inputs"] * 2}, 8, id="two-inputs"),
        pytest.param({"outputs": METADATA["outputs"][:2]}, 8, id="no-label"),
        pytest.param({"outputs": METADATA["outputs"] + METADATA["outputs"][:1]}, 8, id="two-rows-of-numbers"),
    ],
)
def test_another_kind_of_model_is_refused_with_what_it_has(change: dict[str, Any], max_batch_size: int) -> None:
    with pytest.raises(ModelContractError, match=r"takes .* gives .* expected one BYTES"):
        Signature.read(METADATA | change, {"max_batch_size": max_batch_size})


@pytest.mark.parametrize("prefix", ["in ensemble 'sentiment', text[0]: ", "text[0]: ", ""])
def test_a_refusal_is_told_without_the_row_of_a_request_the_caller_never_saw(prefix: str) -> None:
    signature = Signature.read(METADATA, {"max_batch_size": 64})
    assert signature.plain(prefix + "review is empty: write text[0]") == "review is empty: write text[0]"


def test_tensors_become_predictions() -> None:
    signature = Signature.read(METADATA, {"max_batch_size": 64})
    tensors: dict[str, Any] = {
        "label": [[b"negative"], ["positive"]],  # gRPC has bytes, HTTP strings
        "score": [[0.75], [0.5]],
        "probabilities": [(0.75, 0.25), (0.5, 0.5)],
    }
    assert signature.predictions(tensors, 2) == [
        Prediction("negative", 0.75, (0.75, 0.25)),
        Prediction("positive", 0.5, (0.5, 0.5)),
    ]
    with pytest.raises(ModelContractError, match="gave 1 rows as 'label', expected 2 rows"):
        signature.predictions(tensors | {"label": tensors["label"][:1]}, 2)
    del tensors["score"]
    with pytest.raises(ModelContractError, match="gave no rows as 'score', expected 2 rows"):
        signature.predictions(tensors, 2)


@given(st.lists(st.binary(), min_size=1))
def test_strings_go_over_grpc_as_tritonclient_sends_and_reads_them(strings: list[bytes]) -> None:
    raw = pack_bytes(strings)
    assert raw == serialize_byte_tensor(np.array(strings, dtype=np.object_)).item()
    assert unpack_rows("BYTES", [len(strings), 1], raw) == [[string] for string in strings]


def test_numbers_come_over_grpc_as_little_endian_rows() -> None:
    array = np.array([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]], dtype="<f4")
    assert [list(row) for row in unpack_rows("FP32", array.shape, array.tobytes())] == array.tolist()


@pytest.mark.parametrize(
    ("datatype", "shape", "raw"),
    [
        pytest.param("FP64", [1, 1], b"\0" * 8, id="another-type"),
        pytest.param("FP32", [2], b"\0" * 8, id="one-dimension"),
        pytest.param("FP32", [2, 1], b"\0" * 4, id="too-few-numbers"),
        pytest.param("FP32", [1, 2**62], b"\0" * 4, id="far-too-few-numbers"),
        pytest.param("FP32", [-1, 1], b"\0" * 4, id="no-shape"),
        pytest.param("BYTES", [1, 1], b"\2\0\0\0a", id="half-a-string"),
        pytest.param("BYTES", [1, 1], b"\2\0", id="half-a-length"),
        pytest.param("BYTES", [1, 1], b"\1\0\0\0a\0", id="more-than-a-string"),
    ],
)
def test_bytes_that_are_no_such_tensor_are_refused(datatype: str, shape: list[int], raw: bytes) -> None:
    with pytest.raises(ValueError, match=f"tensor {datatype} "):
        unpack_rows(datatype, shape, raw)


def test_a_tensor_of_one_dimension_over_http_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Result:
        def as_numpy(self, name: str) -> npt.NDArray[np.float32]:
            return np.zeros(1, dtype=np.float32)

    async def infer(*args: Any, **kwargs: Any) -> Result:
        return Result()

    async def run() -> None:
        transport = transport_http.asynchronous(Address.parse("http://127.0.0.1:1"))
        monkeypatch.setattr(transport, "_call", infer)
        with pytest.raises(ModelContractError, match="gave no rows as 'label', expected 1 rows"):
            await transport.infer(Signature.read(METADATA, {"max_batch_size": 64}), [b"good"], 1.0)
        await transport.close()

    asyncio.run(run())


# ---------------------------------------------------------------------------------------------------------------------
# Waiting


def test_a_failed_job_ends_its_companions() -> None:
    ended = []

    async def job(name: str) -> None:
        if name == "bad":
            raise ValueError(name)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def run() -> None:
        with pytest.raises(ValueError, match="bad"):
            await AsyncWorkers(max_in_flight=2).map(job, ["first", "bad", "last"])

    asyncio.run(run())
    assert ended == ["first", "last"]


def test_blocking_jobs_stop_at_the_first_failure() -> None:
    seen = []

    async def job(number: int) -> None:
        seen.append(number)
        if number == 2:
            raise ValueError("two")

    with pytest.raises(ValueError, match="two"):
        run_blocking(BlockingWorkers().map(job, [1, 2, 3]))
    assert seen == [1, 2]


def test_a_coroutine_that_suspends_is_no_blocking_one() -> None:
    with pytest.raises(AssertionError, match="suspended"):
        run_blocking(asyncio.sleep(0))


# ---------------------------------------------------------------------------------------------------------------------
# Lines, errors, imports


def test_lines_keep_their_numbers_and_say_what_is_broken() -> None:
    stream = io.BytesIO("Fine é\r\n\n  \t\nbad \udcff byte\nlast".encode("utf-8", "surrogateescape"))
    assert list(read_lines(stream)) == [
        Line(1, "Fine é"),
        Line(2, "", "empty"),
        Line(3, "", "empty"),
        Line(4, "", "not UTF-8: byte 0xff at offset 4"),
        Line(5, "last"),
    ]


def test_errors_are_what_python_would_call_them() -> None:
    assert issubclass(DeadlineError, TimeoutError)
    assert issubclass(ServerUnavailableError, ConnectionError)
    assert issubclass(InvalidReviewError, ValueError)
    for error in (InvalidReviewError(3, "empty"), clients.RequestRefusedError("refused: empty", "empty")):
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.reason) == (str(error), "empty")


def test_the_error_tree_is_drawn_complete() -> None:
    drawn = (clients.errors.__doc__ or "").split("Each is raised")[0]
    errors = [name for name in clients.__all__ if name.endswith("Error")]
    assert all(name in drawn for name in errors)
    assert sorted(clients.__all__) == clients.__all__


def test_importing_the_clients_brings_in_no_training_code() -> None:
    code = (
        "import sys, clients, clients.predict, clients.transport_grpc, clients.transport_http\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'training', 'export') if name in sys.modules])"
    )
    root = Path(clients.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
