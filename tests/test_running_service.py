"""A service that already runs, wherever it runs: SENTIMENT_URL and SENTIMENT_GRPC_URL, else the tests' own server."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_model import REVIEWS

from clients import SentimentClient


@pytest.fixture(params=["SENTIMENT_URL", "SENTIMENT_GRPC_URL"])
def url(request: pytest.FixtureRequest) -> str:
    given = os.environ.get(request.param)
    if given:
        return given
    server = request.getfixturevalue("server")
    return str(server.http_url if request.param == "SENTIMENT_URL" else server.grpc_url)


def test_every_review_gets_a_label_and_its_probability(url: str) -> None:
    with SentimentClient(url, timeout_s=30) as client:
        for prediction in client.predict([*REVIEWS, "short", "word " * 2000]):
            assert prediction.label in ("negative", "positive")
            assert sum(prediction.probabilities) == pytest.approx(1, abs=1e-3)
            assert prediction.score == pytest.approx(max(prediction.probabilities))


def test_an_empty_review_is_refused_and_its_neighbours_are_answered(url: str) -> None:
    def outcome(review: str) -> str:
        with SentimentClient(url, timeout_s=30) as client:
            try:
                return client.predict([review])[0].label
            except Exception as error:
                return str(error)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(outcome, [*REVIEWS, "", *REVIEWS, "<br />"]))
    assert [outcome in ("negative", "positive") for outcome in outcomes] == [*[True] * 5, False, *[True] * 5, False]
