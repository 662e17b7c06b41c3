"""HTTP, asyncio (on aiohttp) and blocking (the same, on an event loop in a thread).

tritonclient has a blocking HTTP client too, on gevent. It is not used: each thread that called it leaves four file
descriptors behind, it bounds each read but not a request as a whole, and it fails in ways of its own.
"""

import asyncio
import os
import selectors
import threading
import weakref
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import aiohttp
import numpy as np
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from clients.address import Address
from clients.signature import Rows, Signature
from clients.transport import Transport

T = TypeVar("T")


class AsyncHttpTransport(Transport):
    """An asyncio client of tritonclient's, in the event loop it was made in."""

    def __init__(self, address: Address, client: Any) -> None:
        super().__init__(address)
        self._client = client
        self._calls: set[asyncio.Task[Any]] = set()

    async def _close(self) -> None:
        await self._client.close()
        for call in list(self._calls):  # closing leaves those alone whose answer has begun to come
            call.cancel()

    async def _metadata(self, model: str, timeout_s: float) -> dict[str, Any]:
        metadata: dict[str, Any] = await self._call("get_model_metadata", timeout_s, model)
        return metadata

    async def _config(self, model: str, timeout_s: float) -> dict[str, Any]:
        config: dict[str, Any] = await self._call("get_model_config", timeout_s, model)
        return config

    async def _infer(self, signature: Signature, reviews: Sequence[bytes], timeout_s: float) -> dict[str, Rows]:
        text = tritonclient.http.InferInput(signature.text, [len(reviews), 1], "BYTES")
        text.set_data_from_numpy(np.array(reviews, dtype=np.object_).reshape(-1, 1))
        outputs = [tritonclient.http.InferRequestedOutput(name) for name in signature.outputs]
        result = await self._call("infer", timeout_s, signature.model, [text], outputs=outputs)
        tensors = ((name, result.as_numpy(name)) for name in signature.outputs)
        return {name: tensor.tolist() for name, tensor in tensors if tensor is not None and tensor.ndim == 2}

    async def _call(self, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        """Returns the answer of tritonclient's `method`, its failures translated."""
        call = asyncio.ensure_future(getattr(self._client, method)(*args, **kwargs))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        try:
            return await asyncio.wait_for(call, max(timeout_s, 0.0))
        except asyncio.TimeoutError as error:
            self._late(error)
        except InferenceServerException as error:
            self._fail(error, str(error.status()), str(error.message()))
        except (OSError, aiohttp.ClientError) as error:
            self._unavailable(error, str(error) or type(error).__name__)


class BlockingHttpTransport(AsyncHttpTransport):
    """The same with an event loop of its own, in a thread that ends with `close`, or with the transport itself."""

    def __init__(self, address: Address) -> None:
        thread = _LoopThread(f"client of {address.url}")
        super().__init__(address, thread.wait(_open(address)))
        self._thread = thread
        self._end = weakref.finalize(self, thread.end, self._client)

    async def _close(self) -> None:
        self._end()

    async def _call(self, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        return self._thread.wait(super()._call(method, timeout_s, *args, **kwargs))


class _LoopThread:
    """An event loop in a thread of its own, which also a caller inside another event loop may wait for."""

    def __init__(self, name: str) -> None:
        self._process = os.getpid()
        # Forks share an epoll: one that lets go of its copy of a connection removes it from the parent's loop, which
        # then waits for answers in vain. A poll is in the memory of each.
        self._loop = asyncio.SelectorEventLoop(selectors.PollSelector())
        self._ending: asyncio.Task[None] | None = None
        self._has_ended = False
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Returns the result of `coroutine`, run by the loop.

        Raises:
            RuntimeError: the loop has ended.
            concurrent.futures.CancelledError: it ended before the coroutine did.
        """
        with self._sending:  # what is sent to a loop that has stopped would be waited for for ever
            if self._has_ended:
                coroutine.close()
                raise RuntimeError("the event loop has ended")
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
        with self._sending:
            self._has_ended = True
            self._loop.call_soon_threadsafe(self._begin_end, client)
        if threading.current_thread() is not self._thread:  # the garbage collector runs in whichever thread it is
            self._thread.join()

    def _begin_end(self, client: Any) -> None:
        self._ending = self._loop.create_task(self._end(client))  # kept: a loop does not keep its tasks

    async def _end(self, client: Any) -> None:
        try:
            await client.close()
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self._loop.stop()


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
