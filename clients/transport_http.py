"""HTTP, asyncio (on aiohttp) and blocking (the same, on an event loop in a thread).

tritonclient has a blocking HTTP client too, on gevent. It is not used: each thread that called it leaves four file
descriptors behind, it bounds each read but not a request as a whole, and it fails in ways of its own.
"""

import asyncio
import os
import selectors
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

import aiohttp
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from clients.address import Address
from clients.transport import Transport

T = TypeVar("T")


class AsyncHttpTransport(Transport):
    """An asyncio client of tritonclient's, in the event loop it was made in."""

    def __init__(self, address: Address, client: Any) -> None:
        super().__init__(address, tritonclient.http)
        self._client = client

    async def close(self) -> None:
        await self._client.close()

    async def _get(self, method: str, model: str, timeout_s: float) -> dict[str, Any]:
        answer: dict[str, Any] = await self._call(method, timeout_s, model)
        return answer

    async def _call(self, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        try:
            return await asyncio.wait_for(getattr(self._client, method)(*args, **kwargs), max(timeout_s, 0.0))
        except asyncio.TimeoutError as error:
            self._late(error)
        except InferenceServerException as error:
            self._fail(error)
        except (OSError, aiohttp.ClientError) as error:
            self._unavailable(error, str(error) or type(error).__name__)


class BlockingHttpTransport(AsyncHttpTransport):
    """The same with an event loop of its own, in a thread that ends with `close`, or with the transport itself."""

    def __init__(self, address: Address) -> None:
        thread = _LoopThread(f"client of {address.url}")
        super().__init__(address, thread.wait(_open(address)))
        self._thread = thread
        self._end = weakref.finalize(self, thread.end, self._client)

    async def close(self) -> None:
        self._end()

    async def _call(self, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        return self._thread.wait(super()._call(method, timeout_s, *args, **kwargs))


class _LoopThread:
    """An event loop in a thread of its own, which also a caller inside another event loop may wait for."""

    def __init__(self, name: str) -> None:
        self._process = os.getpid()
        # Forks share an epoll: one that lets go of its copy of a connection removes it from the parent's loop, which
        # then waits for answers in vain. A poll is in the memory of each.
        selector = selectors.PollSelector() if hasattr(os, "fork") else selectors.DefaultSelector()
        self._loop = asyncio.SelectorEventLoop(selector)
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns the result of `coroutine`, run by the loop."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C as well: the request must not go on
            future.cancel()
            raise

    def end(self, client: Any) -> None:
        """Closes `client`, then the loop and its thread; in a fork, where that thread does not run, nothing."""
        if os.getpid() != self._process:
            return
        self.wait(client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _open(address: Address) -> Any:
    return _client(address)


def _client(address: Address) -> Any:
    # conn_limit 0 is none: how many requests are on their way is bounded above the transport. conn_timeout is for each
    # request, but fixed here; off, since `_call` has its own for each.
    return tritonclient.http.aio.InferenceServerClient(address.target, conn_limit=0, conn_timeout=None)


def blocking(address: Address) -> Transport:
    """Returns a transport whose coroutines never suspend."""
    return BlockingHttpTransport(address)


def asynchronous(address: Address) -> Transport:
    """Returns a transport of the running event loop."""
    return AsyncHttpTransport(address, _client(address))
