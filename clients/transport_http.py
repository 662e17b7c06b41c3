"""HTTP, blocking (on gevent) and asyncio (on aiohttp).

Neither of tritonclient's clients can bound one request as a whole: `network_timeout` is for each read, and the asyncio
client's `conn_timeout` is fixed at its construction. Both are off here, and the whole call is bounded from outside.
"""

import asyncio
import threading
from http.client import HTTPException
from typing import Any

import aiohttp
import gevent  # type: ignore[import-untyped]
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from clients.address import Address
from clients.transport import Transport

# geventhttpclient's errors are HTTPException; aiohttp's are ClientError, some of them OSError as well.
_BROKEN_CONNECTION = (OSError, HTTPException, aiohttp.ClientError)


class _HttpTransport(Transport):
    def __init__(self, address: Address) -> None:
        super().__init__(address, tritonclient.http)

    async def _get(self, method: str, model: str, timeout_s: float) -> dict[str, Any]:
        answer: dict[str, Any] = await self._call(method, timeout_s, model)
        return answer


class BlockingHttpTransport(_HttpTransport):
    """tritonclient's HTTP client, one for each thread: gevent's sockets belong to the thread that opened them."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._local = threading.local()

    async def close(self) -> None:
        """Closes this thread's connection; those of other threads end with their threads."""
        client = self._local.__dict__.pop("client", None)
        if client is not None:
            client.close()

    async def _call(self, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        if "client" not in self._local.__dict__:
            self._local.client = tritonclient.http.InferenceServerClient(
                self.address.target, connection_timeout=None, network_timeout=None
            )
        timer = gevent.Timeout(max(timeout_s, 0.0))
        try:
            with timer:
                return getattr(self._local.client, method)(*args, **kwargs)
        except gevent.Timeout as error:
            if error is not timer:  # a caller's own, under gevent
                raise
            await self.close()  # half a request or answer may be left on the connection
            self._late(error)
        except InferenceServerException as error:
            self._fail(error)
        except _BROKEN_CONNECTION as error:
            self._unavailable(error, str(error) or type(error).__name__)


class AsyncHttpTransport(_HttpTransport):
    """tritonclient's asyncio HTTP client."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        # conn_limit 0 is none: how many requests are on their way is bounded above the transport.
        self._client = tritonclient.http.aio.InferenceServerClient(address.target, conn_limit=0, conn_timeout=None)

    async def close(self) -> None:
        await self._client.close()

    async def _call(self, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        try:
            return await asyncio.wait_for(getattr(self._client, method)(*args, **kwargs), max(timeout_s, 0.0))
        except asyncio.TimeoutError as error:
            self._late(error)
        except InferenceServerException as error:
            self._fail(error)
        except _BROKEN_CONNECTION as error:
            self._unavailable(error, str(error) or type(error).__name__)


blocking = BlockingHttpTransport
asynchronous = AsyncHttpTransport
