"""How the load generator asks: JSON over HTTP, the same way for every system, or this project's gRPC client.

Many requests at once take an event loop (aiohttp, the asyncio client). One after the other takes none: there it would
be 0.1 to 0.4 ms of each, and who has one request at a time has a blocking client (http.client, the blocking twin).
"""

import http.client
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.compare.plan import TIMEOUT_S
from benchmarks.compare.systems import TEXT

Ask = Callable[[int], Awaitable[str]]
"""Index of a text in, its label out; raises for anything else, and after `TIMEOUT_S`, where it blocks
over HTTP after that long without a byte."""
_MAX_IN_FLIGHT = 10_000
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Door:
    """Where and how a system is asked."""

    url: str
    """`http://host:port/path` or `grpc://host:port`."""
    body: dict[str, Any]
    """JSON to send, with `TEXT` in the place of the review."""
    label_at: Sequence[str | int]
    """Keys and indices that lead to the label in the answer."""


class UnexpectedStatusError(RuntimeError):
    """Something else than 200 came."""


def fill(template: object, text: str) -> object:
    """Returns `template` with `text` in the place of `TEXT`."""
    if isinstance(template, dict):
        return {key: fill(value, text) for key, value in template.items()}
    if isinstance(template, list):
        return [fill(value, text) for value in template]
    return text if template == TEXT else template


@asynccontextmanager
async def open_door(door: Door, texts: Sequence[str], one_at_a_time: bool = False) -> AsyncIterator[Ask]:
    """Yields the way to ask about one of `texts`; with `one_at_a_time` it blocks the event loop until the answer."""
    if door.url.startswith("grpc://"):
        opened = (_open_grpc_blocking if one_at_a_time else _open_grpc)(door, texts)
    else:
        opened = (_open_json_blocking if one_at_a_time else _open_json)(door, texts)
    async with opened as ask:
        yield ask


def _bodies(door: Door, texts: Sequence[str]) -> list[bytes]:
    return [json.dumps(fill(door.body, text)).encode() for text in texts]


def _label(door: Door, status: int, answer: bytes) -> str:
    if status != 200:
        raise UnexpectedStatusError(f"{status}: {answer[:200]!r}")
    found = json.loads(answer)
    for key in door.label_at:
        found = found[key]
    return str(found)


@asynccontextmanager
async def _open_json(door: Door, texts: Sequence[str]) -> AsyncIterator[Ask]:
    import aiohttp

    bodies = _bodies(door, texts)  # made before anything is timed
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session:

        async def ask(index: int) -> str:
            async with session.post(door.url, data=bodies[index], headers=_JSON) as response:
                answer = await response.read()
            return _label(door, response.status, answer)

        yield ask


@asynccontextmanager
async def _open_json_blocking(door: Door, texts: Sequence[str]) -> AsyncIterator[Ask]:
    url, bodies = urlsplit(door.url), _bodies(door, texts)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=TIMEOUT_S)

    async def ask(index: int) -> str:
        connection.request("POST", url.path, body=bodies[index], headers=_JSON)
        with connection.getresponse() as response:
            return _label(door, response.status, response.read())

    with closing(connection):
        yield ask


@asynccontextmanager
async def _open_grpc(door: Door, texts: Sequence[str]) -> AsyncIterator[Ask]:
    from clients.aio import AsyncSentimentClient
    from clients.retry import RetryPolicy

    once = RetryPolicy(max_attempts=1)
    async with AsyncSentimentClient(door.url, timeout_s=TIMEOUT_S, retry=once, max_in_flight=_MAX_IN_FLIGHT) as client:

        async def ask(index: int) -> str:
            return (await client.predict([texts[index]]))[0].label

        yield ask


@asynccontextmanager
async def _open_grpc_blocking(door: Door, texts: Sequence[str]) -> AsyncIterator[Ask]:
    from clients.client import SentimentClient
    from clients.retry import RetryPolicy

    with SentimentClient(door.url, timeout_s=TIMEOUT_S, retry=RetryPolicy(max_attempts=1)) as client:

        async def ask(index: int) -> str:
            return client.predict([texts[index]])[0].label

        yield ask
