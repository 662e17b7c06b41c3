"""What can go wrong between a caller and the server.

    SentimentError
    ├── ServerUnavailableError   nothing listens, the connection broke, or the server has no room; retried before raised
    ├── DeadlineError            no answer within `timeout_s`; never retried
    ├── ModelNotFoundError       the server runs, but has no such model ready
    ├── ModelContractError       the model's inputs and outputs are not those of a sentiment model
    ├── ServerError              the server answered with any other failure
    │   └── RequestRefusedError  ... it called the request itself invalid
    ├── InvalidReviewError       one review cannot be classified; `.index` and `.reason` say which and why
    └── ClientStateError         the client is closed, or used in a forked process or another event loop

Each is raised `from` the error of the library below it, and its message ends with what to do. Those that have a
counterpart in Python are that as well: a `DeadlineError` is a `TimeoutError`, an `InvalidReviewError` a `ValueError`.
Wrong arguments (a string where a list is expected, a URL without a scheme) are plain `TypeError` and `ValueError`.
"""


class SentimentError(Exception):
    """Any failure to get predictions."""


class ServerUnavailableError(SentimentError, ConnectionError):
    """The server could not be reached or had no room; sending again later may succeed."""


class DeadlineError(SentimentError, TimeoutError):
    """The server did not answer in time; whether it did the work is unknown."""


class ModelNotFoundError(SentimentError, LookupError):
    """The server has no such model ready."""


class ModelContractError(SentimentError):
    """The model takes or gives other tensors than a sentiment model does."""


class ServerError(SentimentError):
    """The server answered with a failure that sending again would not cure."""


class RequestRefusedError(ServerError):
    """The server called the request invalid; for reviews, it is turned into an `InvalidReviewError`.

    Attributes:
        reason: the server's own words.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class InvalidReviewError(SentimentError, ValueError):
    """One review cannot be classified.

    Attributes:
        index: position of the review in the list the caller gave, from 0.
        reason: what is wrong with it, in the server's words where the server refused it.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index = index
        self.reason = reason

    def __str__(self) -> str:
        return f"reviews[{self.index}] cannot be classified: {self.reason}"


class ClientStateError(SentimentError, RuntimeError):
    """The client cannot be used here any more."""
