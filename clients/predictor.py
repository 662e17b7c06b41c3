"""The part that both clients share: reviews in, predictions out, over a transport and workers.

The flow: check the arguments, encode, split at the server's maximum batch size, one request for each batch with
retries, and where a batch is refused, halve it until the bad reviews stand alone and all others have their answers.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NoReturn, TypeAlias, TypeVar

from clients.errors import InvalidReviewError, RequestRefusedError
from clients.prediction import Prediction
from clients.retry import RetryPolicy, with_retries
from clients.signature import Signature
from clients.transport import Transport
from clients.workers import Workers

Outcome: TypeAlias = "Prediction | InvalidReviewError"
T = TypeVar("T")
_Row: TypeAlias = "tuple[int, bytes]"
"""Index in the caller's list, and the review in UTF-8."""


class Predictor:
    """Asks one model on one server."""

    def __init__(
        self, transport: Transport, workers: Workers, model: str, timeout_s: float, retry: RetryPolicy
    ) -> None:
        self.transport = transport
        self._workers = workers
        self._model = model
        self._timeout_s = timeout_s
        self._retry = retry
        self._signature: Signature | None = None

    async def signature(self) -> Signature:
        """Returns the model's names and limits; only the first call asks the server."""
        if self._signature is None:
            async with self._workers.alone():
                if self._signature is None:  # not while waiting for the lock either
                    describe = partial(self.transport.describe, self._model)
                    self._signature = await with_retries(describe, self._retry, self._timeout_s, self._workers.sleep)
        return self._signature

    async def predict(self, reviews: Iterable[str]) -> list[Prediction]:
        """Returns a prediction for each review, or raises for the first that cannot be classified."""
        return await self._answers(reviews, _raise)

    async def predict_each(self, reviews: Iterable[str]) -> list[Outcome]:
        """Returns for each review its prediction, or the error that says why there is none."""
        return await self._answers(reviews, _keep)

    async def _answers(
        self, reviews: Iterable[str], invalid: Callable[[InvalidReviewError], T]
    ) -> list[Prediction | T]:
        texts = _checked(reviews)
        answers: dict[int, Prediction | T] = {}
        rows: list[_Row] = []
        for index, text in enumerate(texts):
            try:
                rows.append((index, text.encode()))
            except UnicodeEncodeError as error:
                answers[index] = invalid(_because(InvalidReviewError(index, _surrogate(error)), error))
        if rows:
            size = (await self.signature()).max_batch_size
            batches = [rows[start : start + size] for start in range(0, len(rows), size)]
            for answered in await self._workers.map(partial(self._batch, invalid=invalid), batches):
                answers.update(answered)
        return [answers[index] for index in range(len(texts))]

    async def _batch(self, rows: list[_Row], invalid: Callable[[InvalidReviewError], T]) -> dict[int, Prediction | T]:
        """Returns the answers to `rows` by index.

        The server refuses a request as a whole and names the row only in prose, so the rows of a refused request are
        sent again by halves: each bad one costs two requests for each halving, the good ones keep their company.
        """
        indices = [index for index, _ in rows]
        try:
            return dict(zip(indices, await self._infer([raw for _, raw in rows]), strict=True))
        except RequestRefusedError as refusal:
            if len(rows) == 1:
                reason = (await self.signature()).plain(refusal.reason)
                return {indices[0]: invalid(_because(InvalidReviewError(indices[0], reason), refusal))}
        middle = len(rows) // 2
        halves = await self._workers.map(partial(self._batch, invalid=invalid), [rows[:middle], rows[middle:]])
        return halves[0] | halves[1]

    async def _infer(self, reviews: list[bytes]) -> list[Prediction]:
        signature = await self.signature()
        # The turn is kept while backing off: a server without room is asked less, not more.
        async with self._workers.turn():
            send = partial(self.transport.infer, signature, reviews)
            return await with_retries(send, self._retry, self._timeout_s, self._workers.sleep)


def _raise(error: InvalidReviewError) -> NoReturn:
    raise error


def _keep(error: InvalidReviewError) -> InvalidReviewError:
    return error


def _because(error: InvalidReviewError, cause: Exception) -> InvalidReviewError:
    """Returns `error` as `raise error from cause` would leave it, for an error that may be returned instead."""
    error.__cause__ = cause
    return error


def _surrogate(error: UnicodeEncodeError) -> str:
    return (
        f"character {error.start} is U+{ord(error.object[error.start]):04X}, half of a surrogate pair, which UTF-8 "
        "cannot hold: decode the text with its own encoding"
    )


def _checked(reviews: Iterable[str]) -> list[str]:
    """Returns `reviews` as a list.

    Raises:
        TypeError: it is a single string, or holds something else than strings.
    """
    if isinstance(reviews, str | bytes):
        raise TypeError(f"reviews is one {type(reviews).__name__}, expected a list of str: write predict([review])")
    texts = list(reviews)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            hint = "; decode it first" if isinstance(text, bytes) else ""
            raise TypeError(f"reviews[{index}] is {type(text).__name__}, expected str{hint}")
    return texts
