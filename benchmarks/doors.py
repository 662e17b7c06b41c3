"""The three ways in: gRPC and HTTP /infer through the project's client, HTTP /generate as curl asks it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from geventhttpclient import HTTPClient

from benchmarks.answers import WrongAnswerError
from benchmarks.profiles import Protocol
from clients import Prediction, RetryPolicy, SentimentClient, ServerError


@dataclass(frozen=True)
class Door:
    """An open way in, which many users may share."""

    ask: Callable[[Sequence[str]], list[Prediction]]
    """Reviews in, their predictions out, in one request. Raises what the client raises, and WrongAnswerError for an
    answer of /generate that is none."""
    close: Callable[[], None]


_MAX_CONNECTIONS = 1000
_GENERATE = "/v2/models/sentiment/generate"
_SHOWN = 500
"""Bytes of an answer that an error shows."""


@dataclass(frozen=True)
class Urls:
    """Where the service listens: `http://host:port`, `grpc://host:port`, `http://host:port/metrics`."""

    http: str
    grpc: str
    metrics: str


def open_door(protocol: Protocol, urls: Urls, timeout_s: float) -> Door:
    """Returns a door with connections of its own; a failure is never retried."""
    if protocol == "generate":
        return _generate(urls.http, timeout_s)
    url = urls.grpc if protocol == "grpc" else urls.http
    client = SentimentClient(url, timeout_s=timeout_s, retry=RetryPolicy(max_attempts=1))
    return Door(client.predict, client.close)


def _generate(http_url: str, timeout_s: float) -> Door:
    client = HTTPClient.from_url(
        http_url, concurrency=_MAX_CONNECTIONS, connection_timeout=timeout_s, network_timeout=timeout_s
    )

    def ask(reviews: Sequence[str]) -> list[Prediction]:
        body = json.dumps({"text": reviews[0] if len(reviews) == 1 else list(reviews)})
        response = client.post(_GENERATE, body=body, headers={"Content-Type": "application/json"})
        answer = response.read()
        if response.status_code != 200:
            raise ServerError(f"{http_url}{_GENERATE} answered {response.status_code}: {answer[:_SHOWN]!r}")
        return _predictions(answer)

    return Door(ask, client.close)


def _predictions(body: bytes) -> list[Prediction]:
    """Returns the predictions in an answer of /generate: scalars for one review, flat lists for several.

    Raises:
        WrongAnswerError: it is no JSON, or not of that form.
    """
    try:
        answer = json.loads(body)
        labels = _listed(answer["label"])
        scores, flat = ([_number(value) for value in _listed(answer[key])] for key in ("score", "probabilities"))
        width = len(flat) // len(labels)
        rows = [tuple(flat[start : start + width]) for start in range(0, len(flat), width)]
        return [Prediction(label, score, row) for label, score, row in zip(labels, scores, rows, strict=True)]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise WrongAnswerError(f"{body[:_SHOWN]!r} came, expected label, score and probabilities: {error!r}") from error


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return value
