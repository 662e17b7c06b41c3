"""Clients of the sentiment server: `SentimentClient` and its asyncio twin, over gRPC or HTTP."""

from clients.aio import AsyncSentimentClient
from clients.client import SentimentClient
from clients.errors import (
    ClientStateError,
    DeadlineError,
    InvalidReviewError,
    ModelContractError,
    ModelNotFoundError,
    RequestRefusedError,
    SentimentError,
    ServerError,
    ServerUnavailableError,
)
from clients.prediction import Prediction
from clients.retry import RetryPolicy
from clients.signature import Signature

__all__ = [
    "AsyncSentimentClient",
    "ClientStateError",
    "DeadlineError",
    "InvalidReviewError",
    "ModelContractError",
    "ModelNotFoundError",
    "Prediction",
    "RequestRefusedError",
    "RetryPolicy",
    "SentimentClient",
    "SentimentError",
    "ServerError",
    "ServerUnavailableError",
    "Signature",
]
