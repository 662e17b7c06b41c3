"""Reviews through both clients and both protocols: order, splitting, bad rows, requests in flight."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from client_standins import MODEL, Script, stand_in

from clients import AsyncSentimentClient, InvalidReviewError, Prediction, SentimentClient


@pytest.fixture(params=["grpc", "http"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["blocking", "asyncio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def url(scheme: str, script: Script) -> Iterator[str]:
    with stand_in(scheme, script) as url:
        yield url


def ask(kind: str, url: str, method: str, reviews: Any, **settings: Any) -> Any:
    """Returns what `method` of a fresh client of this kind returns."""
    if kind == "blocking":
        with SentimentClient(url, model=MODEL, **settings) as client:
            return getattr(client, method)(reviews)

    async def run() -> Any:
        async with AsyncSentimentClient(url, model=MODEL, **settings) as client:
            return await getattr(client, method)(reviews)

    return asyncio.run(run())


def scores(predictions: list[Prediction]) -> list[float]:
    return [round(1000 * (prediction.score - 0.5)) for prediction in predictions]


def test_a_prediction_has_label_score_and_probabilities(kind: str, url: str) -> None:
    good, bad = ask(kind, url, "predict", ["good 250", "bad 250, naïve 😀"])
    assert good == Prediction("positive", 0.75, (0.25, 0.75))  # quarters are exact in FP32
    assert bad == Prediction("negative", 0.75, (0.75, 0.25))


def test_a_long_list_is_split_and_keeps_its_order(kind: str, url: str, script: Script) -> None:
    assert scores(ask(kind, url, "predict", [f"good {number}" for number in range(11)])) == list(range(11))
    assert sorted(len(batch) for batch in script.batches) == [3, 4, 4]


def test_an_iterator_of_reviews_will_do(kind: str, url: str) -> None:
    assert scores(ask(kind, url, "predict", (f"good {number}" for number in range(5)))) == list(range(5))


def test_no_reviews_need_no_server(kind: str) -> None:
    assert ask(kind, "grpc://127.0.0.1:1", "predict", []) == []


@pytest.mark.parametrize(
    ("reviews", "message"),
    [
        pytest.param("I loved it", r"one str, expected a list of str: write predict\(\[review\]\)", id="str"),
        pytest.param(b"I loved it", "one bytes, expected a list of str", id="bytes"),
        pytest.param(["fine", None], r"reviews\[1\] is NoneType, expected str", id="none"),
        pytest.param([b"fine"], r"reviews\[0\] is bytes, expected str; decode it first", id="list-of-bytes"),
    ],
)
def test_other_arguments_are_type_errors_with_a_hint(kind: str, reviews: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ask(kind, "grpc://127.0.0.1:1", "predict", reviews)


def test_predict_names_the_bad_review_by_its_place_in_the_list(kind: str, url: str, script: Script) -> None:
    script.refuses = lambda review: b"wrong" in review
    reviews = [f"good {number}" for number in range(10)]
    reviews[6] = "wrong"
    with pytest.raises(InvalidReviewError, match=r"reviews\[6\] cannot be classified: something") as raised:
        ask(kind, url, "predict", reviews)
    assert raised.value.index == 6
    assert type(raised.value.__cause__).__name__ == "RequestRefusedError"


def test_predict_each_answers_the_good_ones_beside_the_bad(kind: str, url: str, script: Script) -> None:
    script.refuses = lambda review: b"wrong" in review
    bad = {0, 5, 6, 12}
    reviews = ["wrong" if number in bad else f"good {number}" for number in range(13)]
    outcomes = ask(kind, url, "predict_each", reviews)
    assert {index for index, outcome in enumerate(outcomes) if isinstance(outcome, InvalidReviewError)} == bad
    assert all(outcomes[index].index == index for index in bad)
    assert scores([outcome for outcome in outcomes if isinstance(outcome, Prediction)]) == sorted(set(range(13)) - bad)


def test_one_bad_review_costs_two_requests_for_each_halving(url: str, script: Script) -> None:
    script.max_batch_size = 64
    script.refuses = lambda review: b"wrong" in review
    ask("blocking", url, "predict_each", ["wrong"] + ["good"] * 63)
    assert len(script.batches) == 1 + 2 * 6


def test_half_a_surrogate_pair_is_found_before_anything_is_sent(kind: str, url: str, script: Script) -> None:
    first, second = ask(kind, url, "predict_each", ["broken \ud83d", "good 7"])
    assert isinstance(first, InvalidReviewError)
    assert (first.index, "U+D83D" in first.reason) == (0, True)
    assert scores([second]) == [7]
    with pytest.raises(InvalidReviewError, match=r"reviews\[1\]"):
        ask(kind, url, "predict", ["good", "broken \ud83d"])
    assert script.batches == [[b"good 7"]]


def test_the_server_is_asked_for_its_names_once(url: str, script: Script) -> None:
    async def run() -> None:
        async with AsyncSentimentClient(url, model=MODEL) as client:
            await asyncio.gather(*(client.predict(["good"]) for _ in range(10)))
            assert (await client.signature()).text == "utterance"

    asyncio.run(run())
    assert script.num_descriptions == 1


def test_as_many_requests_as_allowed_are_in_flight_and_no_more(url: str, script: Script) -> None:
    script.max_batch_size = 1
    script.before = threading.Barrier(3, timeout=60).wait  # lets nobody through who does not come with two others
    reviews = [f"good {number}" for number in range(12)]
    assert scores(ask("asyncio", url, "predict", reviews, max_in_flight=3)) == list(range(12))
    assert script.most_at_once == 3


def test_the_blocking_client_has_one_request_in_flight(url: str, script: Script) -> None:
    ask("blocking", url, "predict", ["good"] * 12)
    assert script.most_at_once == 1


def test_threads_may_share_a_client(url: str, script: Script) -> None:
    script.before = threading.Barrier(4, timeout=60).wait
    with SentimentClient(url, model=MODEL) as client, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(client.predict, [[f"good {number}"] for number in range(16)]))
    assert [scores(answer) for answer in answers] == [[number] for number in range(16)]


def test_a_cancelled_call_leaves_the_client_usable(url: str, script: Script) -> None:
    held = threading.Event()
    script.before = lambda: held.wait(60)

    async def run() -> list[Prediction]:
        async with AsyncSentimentClient(url, model=MODEL, max_in_flight=1) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.predict(["good 1"] * 9), 0.3)
            held.set()
            return await client.predict(["good 2"])

    assert scores(asyncio.run(run())) == [2]
