"""The clients against the real server: what it serves, what it refuses, and the same answers over every way in."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import serving

import clients
from clients import (
    AsyncSentimentClient,
    InvalidReviewError,
    ModelContractError,
    ModelNotFoundError,
    Prediction,
    SentimentClient,
)

REVIEWS = [
    "A wonderful, warm film; the cast is superb and the ending moved me to tears.",
    "Dull, endless and badly acted. I want my two hours back.",
    "It has its moments.<br /><br />The second half drags, though.",
    "Été 1967: naïve, tender, and utterly convincing 😀",
    "Long. " * 2000,
    "ok",
]
UNCLASSIFIABLE = ["", " \n\t ", "<br />", "\x00\x01", "x" * (2 << 20)]
CLOSE = 0.02
"""Largest difference of a probability between two askings: an int8 model rounds a review a little differently in other
company. A wrong order or another review's answer is far outside of it for most of the reviews here."""

Ask = Callable[[list[str]], list[Any]]


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: serving.Server) -> str:
    return str(getattr(server, f"{request.param}_url"))


@pytest.fixture(params=["blocking", "asyncio"])
def method(request: pytest.FixtureRequest, url: str) -> Iterator[Callable[[str], Ask]]:
    """Returns a client's method by name, to be called without `await` whichever client it is."""
    if request.param == "blocking":
        with SentimentClient(url) as client:
            yield lambda name: getattr(client, name)
        return
    loop = asyncio.new_event_loop()
    twin = AsyncSentimentClient(url)
    yield lambda name: lambda reviews: loop.run_until_complete(getattr(twin, name)(reviews))
    loop.run_until_complete(twin.close())
    loop.close()


def assert_alike(found: list[Prediction], expected: list[Prediction]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=CLOSE)


def test_each_review_gets_a_label_with_its_probability(method: Callable[[str], Ask]) -> None:
    for prediction in method("predict")(REVIEWS):
        assert prediction.label in ("negative", "positive")
        assert prediction.score == max(prediction.probabilities)
        assert prediction.label == ("negative", "positive")[prediction.probabilities.index(prediction.score)]
        assert sum(prediction.probabilities) == pytest.approx(1)


def test_a_list_longer_than_the_servers_batch_is_answered_in_order(method: Callable[[str], Ask]) -> None:
    alone = [method("predict")([review])[0] for review in REVIEWS]
    assert_alike(method("predict")(REVIEWS * 25), alone * 25)


def test_both_protocols_agree(server: serving.Server) -> None:
    with SentimentClient(server.grpc_url) as grpc, SentimentClient(server.http_url) as http:
        assert_alike(grpc.predict(REVIEWS), http.predict(REVIEWS))


def test_a_batch_of_many_megabytes_passes(method: Callable[[str], Ask]) -> None:
    long = "word " * 50_000
    assert len(method("predict")([long] * 24)) == 24


def test_many_requests_in_flight_get_their_own_answers(url: str) -> None:
    async def run() -> list[list[Prediction]]:
        async with AsyncSentimentClient(url, max_in_flight=16) as client:
            return await asyncio.gather(*(client.predict([review]) for review in REVIEWS * 20))

    with SentimentClient(url) as client:
        expected = client.predict(REVIEWS)
    assert_alike([prediction for (prediction,) in asyncio.run(run())], expected * 20)


def test_reviews_that_cannot_be_classified_leave_the_others_alone(method: Callable[[str], Ask]) -> None:
    mixed = [review for pair in zip(REVIEWS, UNCLASSIFIABLE, strict=False) for review in pair]
    outcomes = method("predict_each")(mixed)
    assert_alike(outcomes[::2], method("predict")(REVIEWS[: len(UNCLASSIFIABLE)]))
    for index, outcome in enumerate(outcomes[1::2]):
        assert isinstance(outcome, InvalidReviewError)
        assert outcome.index == 2 * index + 1
        assert outcome.reason.startswith("review ")


def test_predict_names_the_review_that_cannot_be_classified(method: Callable[[str], Ask]) -> None:
    with pytest.raises(InvalidReviewError, match=r"^reviews\[70\] cannot be classified: review is empty"):
        method("predict")(["fine"] * 70 + [""] + ["fine"] * 9)


def test_names_and_limits_come_from_the_server(url: str) -> None:
    with SentimentClient(url) as client:
        assert client.signature() == clients.Signature("sentiment", 64, "text", "label", "score", "probabilities")


def test_other_models_are_refused_by_name(url: str) -> None:
    with SentimentClient(url, model="feelings") as client, pytest.raises(ModelNotFoundError, match="feelings"):
        client.predict(["fine"])
    with SentimentClient(url, model="tokenizer") as client, pytest.raises(ModelContractError, match="input_ids INT64"):
        client.predict(["fine"])


def test_the_command_line_answers_a_file(url: str, tmp_path: Path) -> None:
    path = tmp_path / "reviews.txt"
    path.write_bytes("\n".join([*REVIEWS, "", "<br />"] * 20).encode() + b"\n\xff\n")
    command = [sys.executable, "-m", "clients.predict", "--url", url, "--json", "--file", str(path)]
    done = subprocess.run(command, cwd=Path(clients.__file__).parents[1], capture_output=True, text=True, timeout=120)
    rows = [json.loads(row) for row in done.stdout.splitlines()]
    assert done.returncode == 1
    assert [row["line"] for row in rows] == list(range(1, 162))
    broken = [row["line"] for row in rows if "error" in row]
    assert broken == sorted([*range(7, 161, 8), *range(8, 161, 8), 161])
    assert [int(row.split(":")[0].removeprefix("line ")) for row in done.stderr.splitlines()] == broken
    scores = [row["probabilities"][1] for row in rows[:160:8]]  # of the same review
    assert scores == pytest.approx(scores[:1] * 20, abs=CLOSE)
