"""Small servers that misbehave on demand, which the real one will not: unavailable twice, silent, gone.

They speak enough KServe v2 for the clients, over gRPC and HTTP, and name their tensors otherwise than the real model
does. A review `good 17` is positive with score 0.517; anything without `good` is negative.
"""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

MODEL = "mood"
INPUTS = [("utterance", "BYTES", [-1, 1])]
OUTPUTS = [("odds", "FP32", [-1, 2]), ("verdict", "BYTES", [-1, 1]), ("certainty", "FP32", [-1, 1])]
Row = tuple[list[float], str, float]
"""odds, verdict, certainty"""


class Unavailable(Exception):
    """To be answered with UNAVAILABLE or 503."""


class Unloaded(Exception):
    """To be answered with NOT_FOUND or 404, as Triton does for its own models while it stops."""


class Cancelled(Exception):
    """To be answered with CANCELLED, as gRPC does when the server goes, or 503."""


class Exhausted(Exception):
    """To be answered with RESOURCE_EXHAUSTED or 429, as a gateway does that limits requests."""


class Refused(Exception):
    """To be answered with INVALID_ARGUMENT or 400."""


@dataclass
class Script:
    """What a stand-in does, and what it saw.

    Attributes:
        max_batch_size: as the model's configuration says.
        refuses: a request with such a review is refused as a whole.
        num_unavailable: this many inferences are answered `failure` before the first success.
        failure: `Unavailable`, `Unloaded`, `Cancelled` or `Exhausted`.
        before: called in each inference, to hold it up.
        sends_raw: whether answers over gRPC carry their tensors as Triton does, or no raw contents.
        batches: the reviews of each inference, in order of arrival.
        num_descriptions: how often metadata was asked.
        most_at_once: most inferences on their way at one time.
    """

    max_batch_size: int = 4
    refuses: Callable[[bytes], bool] = lambda review: False
    num_unavailable: int = 0
    failure: Exception = field(default_factory=lambda: Unavailable("Exceeds maximum queue size"))
    before: Callable[[], object] = lambda: None
    sends_raw: bool = True
    batches: list[list[bytes]] = field(default_factory=list)
    num_descriptions: int = 0
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def infer(self, reviews: list[bytes]) -> list[Row]:
        with self._lock:
            self.batches.append(reviews)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            unavailable = len(self.batches) <= self.num_unavailable
        try:
            self.before()
        finally:
            with self._lock:
                self._at_once -= 1
        if unavailable:
            raise self.failure
        if len(reviews) > self.max_batch_size or any(map(self.refuses, reviews)):
            raise Refused("utterance[0]: something in here is wrong")
        return [_row(review) for review in reviews]


def _row(review: bytes) -> Row:
    number = re.search(rb"\d+", review)
    score = 0.5 + (int(number[0]) if number else 0) / 1000
    return ([1 - score, score], "positive", score) if b"good" in review else ([score, 1 - score], "negative", score)


class _GrpcService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, script: Script) -> None:
        self.script = script

    def ModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        if request.name != MODEL:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        self.script.num_descriptions += 1
        tensor = service_pb2.ModelMetadataResponse.TensorMetadata
        return service_pb2.ModelMetadataResponse(
            name=MODEL,
            inputs=[tensor(name=name, datatype=datatype, shape=shape) for name, datatype, shape in INPUTS],
            outputs=[tensor(name=name, datatype=datatype, shape=shape) for name, datatype, shape in OUTPUTS],
        )

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ModelConfigResponse(config={"name": MODEL, "max_batch_size": self.script.max_batch_size})

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            rows = self.script.infer(list(deserialize_bytes_tensor(request.raw_input_contents[0])))
        except Unavailable as error:
            context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except Unloaded as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except Cancelled as error:
            context.abort(grpc.StatusCode.CANCELLED, str(error))
        except Exhausted as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except Refused as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        response = service_pb2.ModelInferResponse(model_name=MODEL)
        for (name, datatype, _), column in zip(OUTPUTS, zip(*rows, strict=True), strict=True):
            array = np.array(column, dtype=np.object_ if datatype == "BYTES" else np.float32).reshape(len(rows), -1)
            response.outputs.add(name=name, datatype=datatype, shape=array.shape)
            raw = serialize_byte_tensor(array).item() if datatype == "BYTES" else array.tobytes()
            if self.script.sends_raw:
                response.raw_output_contents.append(raw)
        return response


class _HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open, as Triton does
    disable_nagle_algorithm = True

    def __init__(self, script: Script, *args: Any) -> None:
        self.script = script
        super().__init__(*args)

    def do_GET(self) -> None:
        if self.path == f"/v2/models/{MODEL}":
            self.script.num_descriptions += 1
            described = [
                [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in tensors]
                for tensors in (INPUTS, OUTPUTS)
            ]
            self._answer(200, {"name": MODEL, "inputs": described[0], "outputs": described[1]})
        elif self.path == f"/v2/models/{MODEL}/config":
            self._answer(200, {"name": MODEL, "max_batch_size": self.script.max_batch_size})
        else:
            self._answer(404, {"error": f"Request for unknown model: {self.path} is not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        raw = body[int(self.headers["Inference-Header-Content-Length"]) :]
        try:
            rows = self.script.infer(list(deserialize_bytes_tensor(raw)))
        except (Unavailable, Cancelled) as error:
            return self._answer(503, {"error": str(error)})
        except Unloaded as error:
            return self._answer(404, {"error": str(error)})
        except Exhausted as error:
            return self._answer(429, {"error": str(error)})
        except Refused as error:
            return self._answer(400, {"error": str(error)})
        outputs = []
        for (name, datatype, _), column in zip(OUTPUTS, zip(*rows, strict=True), strict=True):
            data = np.array(column).reshape(len(rows), -1)
            outputs.append({"name": name, "datatype": datatype, "shape": data.shape, "data": data.ravel().tolist()})
        return self._answer(200, {"model_name": MODEL, "outputs": outputs})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def _grpc_server(script: Script, port: int) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_GrpcService(script), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, *args: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*args)

    def get_request(self) -> Any:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, *args: Any) -> None:
        """Says nothing of clients that hang up: that is what the tests are about."""

    def cut(self) -> None:
        """Ends the connections, as a server that stops does."""
        for connection in self.connections:
            with suppress(OSError):  # the client was first
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def _http_server(script: Script, port: int) -> Iterator[str]:
    with _HttpServer(("127.0.0.1", port), partial(_HttpHandler, script)) as server:
        threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.cut()


def stand_in(scheme: str, script: Script, port: int = 0) -> AbstractContextManager[str]:
    """Returns a running server that follows `script`; entering it gives its URL."""
    return {"grpc": _grpc_server, "http": _http_server}[scheme](script, port)


@contextmanager
def socket_server(handle: Callable[[socket.socket], None]) -> Iterator[tuple[int, list[socket.socket]]]:
    """Accepts connections and gives each to `handle` in a thread; yields the port and the connections so far."""
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connections.append(connection)
                threading.Thread(target=handle, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1], connections
        finally:
            for connection in connections:
                connection.close()


def free_port() -> int:
    """Returns a port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Waits for `condition`; a machine that is too slow for `timeout_s` fails the test."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
