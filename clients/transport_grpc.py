"""gRPC, blocking and asyncio: tritonclient takes a deadline with each call and reports every failure by status."""

import inspect
from types import ModuleType
from typing import Any

import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from clients.address import Address
from clients.transport import Transport

_UNLIMITED = -1
_CHANNEL_ARGS = [
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
    """tritonclient's gRPC client from `module`: `tritonclient.grpc`, or its twin `tritonclient.grpc.aio`."""

    def __init__(self, address: Address, module: ModuleType) -> None:
        super().__init__(address, tritonclient.grpc)
        self._client = module.InferenceServerClient(address.target, channel_args=_CHANNEL_ARGS)

    async def _close(self) -> None:
        closing = self._client.close()
        if inspect.isawaitable(closing):
            await closing

    async def _get(self, method: str, model: str, timeout_s: float) -> dict[str, Any]:
        answer: dict[str, Any] = await self._call(method, timeout_s, model, as_json=True)
        config: dict[str, Any] = answer.get("config", answer)
        return config

    async def _call(self, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        try:
            answer = getattr(self._client, method)(*args, client_timeout=max(timeout_s, 0.0), **kwargs)
            return await answer if inspect.isawaitable(answer) else answer
        except InferenceServerException as error:
            self._fail(error)


def blocking(address: Address) -> GrpcTransport:
    """Returns a transport whose coroutines never suspend."""
    return GrpcTransport(address, tritonclient.grpc)


def asynchronous(address: Address) -> GrpcTransport:
    """Returns a transport of the running event loop."""
    return GrpcTransport(address, tritonclient.grpc.aio)
