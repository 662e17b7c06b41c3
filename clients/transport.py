"""Requests to one server, whatever the protocol; `transport_grpc` and `transport_http` add how it is spoken.

tritonclient's clients (gRPC and HTTP, blocking and asyncio) share method names, arguments and results; a transport
needs to add only how a call is bounded in time and how failures below HTTP or gRPC show.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

from tritonclient.utils import InferenceServerException

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
from clients.signature import Signature

_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError)
"""What reading an answer that is none of Triton's raises."""

_UNLOADED = "has no available versions"
"""In what Triton says of a model that it has but does not serve: while it stops, and where loading it failed. A model
that it does not have "is not found"."""


class Transport(ABC):
    """A connection to the server at `address`, opened by the first request."""

    def __init__(self, address: Address, tensors: ModuleType) -> None:
        """`tensors` is the tritonclient module with the protocol's InferInput and InferRequestedOutput."""
        self.address = address
        self._tensors = tensors
        self._closed = False

    async def describe(self, model: str, timeout_s: float) -> Signature:
        """Returns the signature of `model`.

        Raises:
            SentimentError: see `clients.errors`; `ModelNotFoundError` when the server has no such model.
        """
        deadline = time.monotonic() + timeout_s
        with self._translated():
            metadata = await self._get("get_model_metadata", model, timeout_s)
            config = await self._get("get_model_config", model, deadline - time.monotonic())
            return Signature.read(metadata, config)

    async def infer(self, signature: Signature, reviews: Sequence[bytes], timeout_s: float) -> list[Prediction]:
        """Returns the predictions for at most `signature.max_batch_size` reviews, in one request.

        Raises:
            RequestRefusedError: at least one of the reviews is invalid.
            SentimentError: any other failure, see `clients.errors`.
        """
        tensor = signature.request(reviews)  # (B, 1)
        text = self._tensors.InferInput(signature.text, list(tensor.shape), "BYTES")
        text.set_data_from_numpy(tensor)
        names = (signature.label, signature.score, signature.probabilities)
        outputs = [self._tensors.InferRequestedOutput(name) for name in names]
        with self._translated():
            result = await self._call("infer", timeout_s, signature.model, [text], outputs=outputs)
            return signature.predictions({name: result.as_numpy(name) for name in names}, len(reviews))

    async def close(self) -> None:
        """Closes the connection; requests on their way end with `ClientStateError`."""
        self._closed = True
        await self._close()

    @abstractmethod
    async def _close(self) -> None:
        """Closes the connection of tritonclient."""

    @abstractmethod
    async def _get(self, method: str, model: str, timeout_s: float) -> dict[str, Any]:
        """Returns the JSON answer of tritonclient's `method` about `model`."""

    @abstractmethod
    async def _call(self, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        """Returns the answer of tritonclient's `method`, its failures translated by the three below."""

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

    def _fail(self, error: InferenceServerException) -> NoReturn:
        """Raises what a failure that the server (or gRPC in its place) reported means to a caller."""
        url, reason, status = self.address.url, str(error.message()), str(error.status())
        if status in ("StatusCode.UNAVAILABLE", "StatusCode.CANCELLED", "429", "502", "503"):  # two are a gateway's
            self._unavailable(error, reason)
        if _UNLOADED in reason:
            self._unavailable(error, reason)
        if status in ("StatusCode.DEADLINE_EXCEEDED", "504"):
            self._late(error)
        if status in ("StatusCode.NOT_FOUND", "404"):
            raise ModelNotFoundError(
                f"{url} has no such model ready ({reason}): check the name, and the server's log if it failed to load"
            ) from error
        if status in ("StatusCode.INVALID_ARGUMENT", "400"):
            raise RequestRefusedError(f"{url} refused the request as invalid: {reason}", reason) from error
        raise ServerError(f"{url} failed with {status}: {reason}; look for errors in the server's log") from error

    def _unavailable(self, error: Exception, reason: str) -> NoReturn:
        """Raises `ServerUnavailableError`; tells a server that is not there from one that has no room."""
        url = self.address.url
        if "refused" in reason.lower() or "connect call failed" in reason.lower():
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
