"""The two ways of waiting, blocking and asyncio, behind one interface.

Everything that both clients share is written once, as coroutines over `Workers` and a transport. The blocking kinds of
these two never suspend, so such a coroutine runs to its end at the first `send`: `run_blocking` needs no event loop.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Protocol, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Workers(Protocol):
    """Sleeps, takes turns, and does a list of jobs."""

    async def sleep(self, delay_s: float) -> None:
        """Waits for `delay_s` seconds."""

    def turn(self) -> AbstractAsyncContextManager[None]:
        """Held while a request is on its way; bounds how many are."""

    def alone(self) -> AbstractAsyncContextManager[None]:
        """Held by one holder at a time."""

    async def map(self, job: Callable[[S], Awaitable[T]], items: Iterable[S]) -> list[T]:
        """Returns `job` of each item, in the order of `items`; the first failure ends the rest."""


class BlockingWorkers:
    """One job after the other, in the calling thread."""

    async def sleep(self, delay_s: float) -> None:
        time.sleep(delay_s)

    def turn(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    alone = turn

    async def map(self, job: Callable[[S], Awaitable[T]], items: Iterable[S]) -> list[T]:
        return [await job(item) for item in items]


class AsyncWorkers:
    """Jobs as tasks of the running event loop, at most `max_in_flight` requests at a time."""

    def __init__(self, max_in_flight: int) -> None:
        self._turns = asyncio.Semaphore(max_in_flight)
        self._lock = asyncio.Lock()

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)

    def turn(self) -> AbstractAsyncContextManager[None]:
        return self._turns

    def alone(self) -> AbstractAsyncContextManager[None]:
        return self._lock

    async def map(self, job: Callable[[S], Awaitable[T]], items: Iterable[S]) -> list[T]:
        listed = list(items)
        if len(listed) == 1:  # needs no task of its own, which would cost it another turn of the event loop
            return [await job(listed[0])]
        tasks = [asyncio.ensure_future(job(item)) for item in listed]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # no request outlives the call that made it
            raise


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Returns the result of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise AssertionError("a blocking transport or worker suspended")
