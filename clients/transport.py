"""Requests to one server, whatever the protocol; `transport_grpc` and `transport_http` add how it is spoken."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from clients.address import Address
from clients.errors import (
    ClientStateError,
    DeadlineError,
    ModelNotFoundError,
    RequestRefusedError,
    SentimentError,
    ServerError,
    ServerUnavailableError,
)
from clients.prediction import Prediction
from clients.signature import Rows, Signature

_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError)
"""What reading an answer that is none of Triton's raises."""

_NO_ROOM = ("StatusCode.UNAVAILABLE", "StatusCode.CANCELLED", "StatusCode.RESOURCE_EXHAUSTED", "429", "502", "503")
"""Statuses of a server that cannot answer now; RESOURCE_EXHAUSTED, 429 and 502 are a gateway's."""

_NO_CONNECTION = "failed to connect to all addresses"
"""gRPC's own words, in place of an answer."""

_UNLOADED = "has no available versions"
"""In what Triton says of a model that it has but does not serve: while it stops, and where loading it failed. A model
that it does not have "is not found"."""


class Transport(ABC):
    """A connection to the server at `address`, opened by the first request."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._closed = False

    async def describe(self, model: str, timeout_s: float) -> Signature:
        """Returns the signature of `model`.

        Raises:
            SentimentError: see `clients.errors`; `ModelNotFoundError` when the server has no such model.
        """
        deadline = time.monotonic() + timeout_s
        with self._translated():
            metadata = await self._metadata(model, timeout_s)
            config = await self._config(model, deadline - time.monotonic())
            return Signature.read(metadata, config)

    async def infer(self, signature: Signature, reviews: Sequence[bytes], timeout_s: float) -> list[Prediction]:
        """Returns the predictions for at most `signature.max_batch_size` reviews, in one request.

        Raises:
            RequestRefusedError: at least one of the reviews is invalid.
            SentimentError: any other failure, see `clients.errors`.
        """
        with self._translated():
            return signature.predictions(await self._infer(signature, reviews, timeout_s), len(reviews))

    async def close(self) -> None:
        """Closes the connection; requests on their way end with `ClientStateError`."""
        self._closed = True
        await self._close()

    @abstractmethod
    async def _close(self) -> None:
        """Closes the connection."""

    @abstractmethod
    async def _metadata(self, model: str, timeout_s: float) -> dict[str, Any]:
        """Returns what the protocol says of `model`, its failures translated by the three below, as of each call."""

    @abstractmethod
    async def _config(self, model: str, timeout_s: float) -> dict[str, Any]:
        """Returns Triton's configuration of `model`."""

    @abstractmethod
    async def _infer(self, signature: Signature, reviews: Sequence[bytes], timeout_s: float) -> Mapping[str, Rows]:
        """Returns the rows of each output of the answer to `reviews` by its name."""

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Makes errors of this package of what a closed connection, or a server that is not Triton, makes of a call."""
        try:
            yield
        except BaseException as error:
            is_end = isinstance(error, asyncio.CancelledError) and not _is_cancelled()
            if self._closed and (is_end or isinstance(error, Exception)):
                raise ClientStateError(f"this client of {self.address.url} was closed meanwhile") from error
            if isinstance(error, SentimentError) or not isinstance(error, _UNREADABLE):
                raise
            raise ServerError(
                f"{self.address.url} answers, but not in the KServe v2 protocol ({type(error).__name__}: {error}): is "
                "it Triton's port?"
            ) from error

    def _fail(self, error: Exception, status: str, reason: str) -> NoReturn:
        """Raises what a failure that the server (or gRPC in its place) reported means to a caller.

        `status` is an HTTP status in digits or gRPC's as `StatusCode.NAME`, `reason` the message beside it.
        """
        url = self.address.url
        if status in _NO_ROOM or _UNLOADED in reason:
            self._unavailable(error, reason, was_answered=_NO_CONNECTION not in reason)
        if status in ("StatusCode.DEADLINE_EXCEEDED", "504"):
            self._late(error)
        if status in ("StatusCode.NOT_FOUND", "404"):
            raise ModelNotFoundError(
                f"{url} has no such model ready ({reason}): check the name, and the server's log if it failed to load"
            ) from error
        if status in ("StatusCode.INVALID_ARGUMENT", "400"):
            raise RequestRefusedError(f"{url} refused the request as invalid: {reason}", reason) from error
        raise ServerError(f"{url} failed with {status}: {reason}; look for errors in the server's log") from error

    def _unavailable(self, error: Exception, reason: str, was_answered: bool = False) -> NoReturn:
        """Raises `ServerUnavailableError`; tells a server that is not there from one that has no room.

        What a server, or a gateway in front of one, answered came from where something listens, whatever it says.
        """
        url = self.address.url
        if not was_answered and ("refused" in reason.lower() or "connect call failed" in reason.lower()):
            raise ServerUnavailableError(
                f"nothing listens at {url}: start the server with `make serve`, or correct the URL ({reason})"
            ) from error
        raise ServerUnavailableError(
            f"{url} is unavailable: {reason}; it may be starting, stopping or overloaded: try later, or send less at "
            "once. If it never answers, the port may be the other protocol's: by default grpc:// has 8001, http:// 8000"
        ) from error

    def _late(self, error: BaseException) -> NoReturn:
        """Raises `DeadlineError`."""
        raise DeadlineError(
            f"no answer from {self.address.url} in time: raise timeout_s or a gateway's limit, send less at once, or "
            "see whether the server is stuck"
        ) from error


def _is_cancelled() -> bool:
    """Whether somebody cancels the running task; Python 3.10 cannot tell, and there the closing counts as the cause."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop: a blocking client
        return False
    return task is not None and hasattr(task, "cancelling") and task.cancelling() > 0
