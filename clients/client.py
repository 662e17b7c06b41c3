"""The blocking client.

from clients import SentimentClient

with SentimentClient("grpc://127.0.0.1:8001") as client:
    (prediction,) = client.predict(["I loved it"])
    print(prediction.label, prediction.score)
"""

from collections.abc import Iterable
from types import TracebackType

from clients.address import DEFAULT_URL, Address
from clients.connection import DEFAULT_MODEL, DEFAULT_TIMEOUT_S, Connection
from clients.prediction import Prediction
from clients.predictor import Outcome
from clients.retry import RetryPolicy
from clients.signature import Signature
from clients.transport import Transport
from clients.workers import BlockingWorkers, run_blocking


def _open_transport(address: Address) -> Transport:
    # Imported here, so that gRPC callers need no aiohttp and HTTP callers no gRPC.
    if address.scheme == "grpc":
        from clients import transport_grpc

        return transport_grpc.blocking(address)
    from clients import transport_http

    return transport_http.blocking(address)


class SentimentClient:
    """Predictions from a running server, one request after the other.

    Threads may share a client. Processes may not: open one in each, after the fork.

    Args:
        url: `grpc://host:port` or `http://host:port[/base]`.
        model: name of the model on the server.
        timeout_s: time for each request of at most the server's `max_batch_size` reviews, its retries and their waits
            included. A call with more reviews makes several requests, each with this time of its own; the first call
            also asks for the model's names and limits, with this time again.
        retry: when to send again; by default four attempts within a second or so.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str = DEFAULT_MODEL,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
    ) -> None:
        self._connection = Connection(
            url,
            model=model,
            timeout_s=timeout_s,
            retry=retry,
            open_transport=_open_transport,
            open_workers=BlockingWorkers,
        )

    def predict(self, reviews: Iterable[str]) -> list[Prediction]:
        """Returns a prediction for each review, in their order; none for none.

        Raises:
            InvalidReviewError: a review cannot be classified; `.index` is that of one such. See `predict_each`.
            SentimentError: any other failure, see `clients.errors`.
            TypeError: `reviews` is a single string, or holds something else than strings.
        """
        return run_blocking(self._connection.predictor().predict(reviews))

    def predict_each(self, reviews: Iterable[str]) -> list[Outcome]:
        """Returns for each review its prediction, or the `InvalidReviewError` that says why there is none.

        Raises:
            SentimentError: a failure that is not about one review, see `clients.errors`.
            TypeError: `reviews` is a single string, or holds something else than strings.
        """
        return run_blocking(self._connection.predictor().predict_each(reviews))

    def signature(self) -> Signature:
        """Returns the model's names and limits, asked from the server once; raises as `predict` does."""
        return run_blocking(self._connection.predictor().signature())

    def close(self) -> None:
        """Closes the connection; closing again does nothing, and any other use raises `ClientStateError`."""
        transport = self._connection.end()
        if transport is not None:
            run_blocking(transport.close())

    def __enter__(self) -> "SentimentClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
