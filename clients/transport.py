"""Requests to one server, whatever the protocol; `transport_grpc` and `transport_http` add how it is spoken.

tritonclient's clients (gRPC and HTTP, blocking and asyncio) share method names, arguments and results; a transport
needs to add only how a call is bounded in time and how failures below HTTP or gRPC show.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from tritonclient.utils import InferenceServerException

from clients.address import Address
from clients.errors import (
    DeadlineError,
    ModelNotFoundError,
    RequestRefusedError,
    SentimentError,
    ServerError,
    ServerUnavailableError,
)
from clients.prediction import Prediction
from clients.signature import Signature


class Transport(ABC):
    """A connection to the server at `address`, opened by the first request."""

    def __init__(self, address: Address, tensors: ModuleType) -> None:
        """`tensors` is the tritonclient module with the protocol's InferInput and InferRequestedOutput."""
        self.address = address
        self._tensors = tensors

    async def describe(self, model: str, timeout_s: float) -> Signature:
        """Returns the signature of `model`.

        Raises:
            SentimentError: see `clients.errors`; `ModelNotFoundError` when the server has no such model.
        """
        deadline = time.monotonic() + timeout_s
        try:
            metadata = await self._get("get_model_metadata", model, timeout_s)
            config = await self._get("get_model_config", model, deadline - time.monotonic())
        except ValueError as error:
            if isinstance(error, SentimentError):
                raise
            raise ServerError(
                f"{self.address.url} answers, but not in the KServe v2 protocol ({error}): is it Triton's port?"
            ) from error
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
        result = await self._call("infer", timeout_s, signature.model, [text], outputs=outputs)
        return signature.predictions({name: result.as_numpy(name) for name in names}, len(reviews))

    @abstractmethod
    async def close(self) -> None:
        """Closes the connection."""

    @abstractmethod
    async def _get(self, method: str, model: str, timeout_s: float) -> dict[str, Any]:
        """Returns the JSON answer of tritonclient's `method` about `model`."""

    @abstractmethod
    async def _call(self, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        """Returns the answer of tritonclient's `method`, its failures translated by the three below."""

    def _fail(self, error: InferenceServerException) -> NoReturn:
        """Raises what a failure that the server (or gRPC in its place) reported means to a caller."""
        url, reason, status = self.address.url, str(error.message()), str(error.status())
        if status in ("StatusCode.UNAVAILABLE", "503"):
            self._unavailable(error, reason)
        if status == "StatusCode.DEADLINE_EXCEEDED":
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
            "once"
        ) from error

    def _late(self, error: BaseException) -> NoReturn:
        """Raises `DeadlineError`."""
        raise DeadlineError(
            f"no answer from {self.address.url} in time: raise timeout_s, send less at once, or see whether the server "
            "is stuck"
        ) from error
