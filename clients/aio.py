"""The asyncio client: the same calls, awaited, with many requests in flight.

from clients import AsyncSentimentClient

async with AsyncSentimentClient("grpc://127.0.0.1:8001", max_in_flight=8) as client:
    predictions = await client.predict(reviews)
"""

import asyncio
from collections.abc import Iterable
from functools import partial
from types import TracebackType

from clients.address import DEFAULT_URL, Address
from clients.connection import DEFAULT_MODEL, DEFAULT_TIMEOUT_S, Connection
from clients.prediction import Prediction
from clients.predictor import Outcome
from clients.retry import RetryPolicy
from clients.signature import Signature
from clients.transport import Transport
from clients.workers import AsyncWorkers

DEFAULT_MAX_IN_FLIGHT = 8


def _open_transport(address: Address) -> Transport:
    # Imported here, so that gRPC callers need no aiohttp and HTTP callers no gRPC.
    if address.scheme == "grpc":
        from clients import transport_grpc

        return transport_grpc.asynchronous(address)
    from clients import transport_http

    return transport_http.asynchronous(address)


class AsyncSentimentClient:
    """Predictions from a running server, several requests at a time.

    Tasks of one event loop may share a client, and then share its `max_in_flight`.

    Args:
        url: `grpc://host:port` or `http://host:port[/base]`.
        model: name of the model on the server.
        timeout_s: time for each request of at most the server's `max_batch_size` reviews, its retries and their waits
            included, but not the wait for its turn among `max_in_flight`.
        retry: when to send again; by default four attempts within a second or so.
        max_in_flight: how many requests may be on their way at once.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str = DEFAULT_MODEL,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        max_in_flight: int = DEFAULT_MAX_IN_FLIGHT,
    ) -> None:
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight is {max_in_flight}, expected at least 1")
        self._connection = Connection(
            url,
            model=model,
            timeout_s=timeout_s,
            retry=retry,
            open_transport=_open_transport,
            open_workers=partial(AsyncWorkers, max_in_flight),
            place=asyncio.get_running_loop,
        )

    async def predict(self, reviews: Iterable[str]) -> list[Prediction]:
        """Returns a prediction for each review, in their order; none for none.

        Raises:
            InvalidReviewError: a review cannot be classified; with several bad ones, `.index` is any of them.
            SentimentError: any other failure, see `clients.errors`.
            TypeError: `reviews` is a single string, or holds something else than strings.
        """
        return await self._connection.predictor().predict(reviews)

    async def predict_each(self, reviews: Iterable[str]) -> list[Outcome]:
        """Returns for each review its prediction, or the `InvalidReviewError` that says why there is none.

        Raises:
            SentimentError: a failure that is not about one review, see `clients.errors`.
            TypeError: `reviews` is a single string, or holds something else than strings.
        """
        return await self._connection.predictor().predict_each(reviews)

    async def signature(self) -> Signature:
        """Returns the model's names and limits, asked from the server once; raises as `predict` does."""
        return await self._connection.predictor().signature()

    async def close(self) -> None:
        """Closes the connection; closing again does nothing, and any other use raises `ClientStateError`."""
        transport = self._connection.end()
        if transport is not None:
            await transport.close()

    async def __aenter__(self) -> "AsyncSentimentClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
