"""gRPC, blocking and asyncio, on the stub that tritonclient generated from the protocol.

tritonclient's own client on top of it is not used: it takes tensors as numpy arrays and a list of the outputs, which
makes 0.1 to 0.2 ms of a lone review's 20 (CHANGELOG).
"""

import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2, service_pb2_grpc

from clients.address import Address
from clients.raw_tensors import pack_bytes, unpack_rows
from clients.signature import Rows, Signature
from clients.transport import Transport

_UNLIMITED = -1
_CHANNEL_OPTIONS = [
    # The server limits reviews; gRPC's own 4 MB would refuse a batch of long ones with a status nobody expects.
    ("grpc.max_send_message_length", _UNLIMITED),
    ("grpc.max_receive_message_length", _UNLIMITED),
    # gRPC's first reconnection comes after 1 s, and until then each call repeats the last failure: retries within that
    # second would never see a server that has come back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A client owns its connection: closing it closes it, and its failures are its own.
    ("grpc.use_local_subchannel_pool", 1),
    # As over HTTP, the URL is where requests go, whatever http_proxy says.
    ("grpc.enable_http_proxy", 0),
]


class GrpcTransport(Transport):
    """A channel of `module`: `grpc`, or its twin `grpc.aio`."""

    def __init__(self, address: Address, module: ModuleType) -> None:
        super().__init__(address)
        self._channel = module.insecure_channel(address.target, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def _close(self) -> None:
        closing = self._channel.close()
        if inspect.isawaitable(closing):
            await closing

    async def _metadata(self, model: str, timeout_s: float) -> dict[str, Any]:
        request = service_pb2.ModelMetadataRequest(name=model)
        return _plain(await self._call(self._stub.ModelMetadata, request, timeout_s))

    async def _config(self, model: str, timeout_s: float) -> dict[str, Any]:
        request = service_pb2.ModelConfigRequest(name=model)
        return _plain((await self._call(self._stub.ModelConfig, request, timeout_s)).config)

    async def _infer(self, signature: Signature, reviews: Sequence[bytes], timeout_s: float) -> dict[str, Rows]:
        request = service_pb2.ModelInferRequest(
            model_name=signature.model,
            inputs=[{"name": signature.text, "datatype": "BYTES", "shape": (len(reviews), 1)}],
            raw_input_contents=[pack_bytes(reviews)],
        )
        answer = await self._call(self._stub.ModelInfer, request, timeout_s)
        outputs, contents = answer.outputs, answer.raw_output_contents
        if len(contents) != len(outputs):
            raise ValueError(
                f"{len(outputs)} outputs came with {len(contents)} raw contents, expected one for each, as from Triton"
            )
        return {
            output.name: unpack_rows(output.datatype, output.shape, raw)
            for output, raw in zip(outputs, contents, strict=True)
        }

    async def _call(self, method: Callable[..., Any], request: Any, timeout_s: float) -> Any:
        """Returns the answer of the stub's `method`, its failures translated."""
        try:
            answer = method(request, timeout=max(timeout_s, 0.0))
            return await answer if inspect.isawaitable(answer) else answer
        except grpc.RpcError as error:
            self._fail(error, str(error.code()), str(error.details()))


def _plain(message: Any) -> dict[str, Any]:
    plain: dict[str, Any] = MessageToDict(message, preserving_proto_field_name=True)
    return plain


def blocking(address: Address) -> GrpcTransport:
    """Returns a transport whose coroutines never suspend."""
    return GrpcTransport(address, grpc)


def asynchronous(address: Address) -> GrpcTransport:
    """Returns a transport of the running event loop."""
    return GrpcTransport(address, grpc.aio)
