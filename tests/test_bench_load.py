"""What Locust's users share and what becomes of it: answers, failures, requests in flight. No Triton runs here."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.client import RemoteDisconnected
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import CHECKOUT

from benchmarks import answers, arrivals, doors, load_test, locust_run, samples, texts, triton_metrics, verdict
from benchmarks.answers import WrongAnswerError
from benchmarks.doors import Door, Urls
from benchmarks.load_test import InFlight, LoadTest, Options
from benchmarks.peers import shipped_engine
from benchmarks.profiles import Limits, Load, Validity
from benchmarks.samples import OK, Sample
from benchmarks.summary import Summary, summarise
from benchmarks.texts import TextSource
from clients import Prediction
from export.repository import MODEL_FILE, REPOSITORY, manifest_path

LIMITS = Limits(p50_ms=200, p99_ms=200, failures_percent=1)
VALIDITY = Validity(max_generator_cpu_percent=85, max_littles_law_percent=2, max_disagreement_percent=15)
POSITIVE = {"label": "positive", "score": 0.9, "probabilities": [0.1, 0.9]}
SOURCE = TextSource(reviews=8)
MODEL = REPOSITORY / MODEL_FILE


def summary(folder: Path, rows: Sequence[Sample], loop: str = "open", level: float = 10, **raw: Any) -> Summary:
    """Returns what ten seconds with these samples amount to."""
    load = {"tool": "locust", "protocol": "grpc", "loop": loop, "level": level, "warmup_s": 0, "duration_s": 10}
    content = {
        "load": {**load, **raw.pop("load", {})},
        "gate": True,
        "window_s": [0.0, 10.0],
        "generator": {"cpu_s": 1.0, "wall_s": 10.0},
        "triton": None,
        **raw,
    }
    samples.write(folder / "one.csv.gz", rows, 0.0)
    (folder / "one.json").write_text(json.dumps(content))
    return summarise(folder / "one.json")


def steady(count: int, latency_s: float = 0.05) -> list[Sample]:
    return [Sample(at, at, at + latency_s, 1, OK) for at in np.linspace(0, 10, count, endpoint=False)]


def users(count: int, latency_s: float = 0.1) -> list[Sample]:
    return [row for row in steady(round(10 / latency_s), latency_s) for _ in range(count)]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"not JSON", id="no JSON"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b'{"label": "positive", "score": 0.9}', id="a key is missing"),
        pytest.param(b'{"label": [], "score": [], "probabilities": []}', id="no labels"),
        pytest.param(b'{"label": "positive", "score": 0.9, "probabilities": null}', id="null"),
        pytest.param(b'{"label": "positive", "score": "0.9", "probabilities": [0.1, 0.9]}', id="no number"),
        pytest.param(b'{"label": ["positive"], "score": [0.9, 0.9], "probabilities": [0.1, 0.9]}', id="uneven"),
    ],
)
def test_a_malformed_answer_of_generate_is_a_wrong_one(body: bytes) -> None:
    assert doors._predictions(json.dumps(POSITIVE).encode()) == [Prediction("positive", 0.9, (0.1, 0.9))]
    with pytest.raises(WrongAnswerError, match="came, expected label, score"):
        doors._predictions(body)


def load_test_with(monkeypatch: pytest.MonkeyPatch, folder: Path, ask: Any, known: dict[str, str]) -> LoadTest:
    monkeypatch.setattr(doors, "open_door", lambda *_: Door(ask, lambda: None))
    answers.write_known(folder / "known.json", known)
    return LoadTest(Options(kind="short", source=SOURCE, known=folder / "known.json"))


@pytest.mark.parametrize(
    "error", [RemoteDisconnected("closed"), KeyError("label"), ZeroDivisionError(), RuntimeError()]
)
def test_whatever_goes_wrong_is_a_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    def fail(_: Sequence[str]) -> list[Prediction]:
        raise error

    test = load_test_with(monkeypatch, tmp_path, fail, {})
    test.due(0.0)
    sample, failure = test.ask("grpc", 0.0)
    assert (sample.outcome, failure) == (type(error).__name__, error)
    assert test._samples == [sample]
    assert test._in_flight.count == 0


def test_a_server_that_always_says_the_same_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    same = [Prediction("positive", 0.9, (0.1, 0.9))]
    reviews = load_test._reviews("short", SOURCE)
    known = {review: ("negative", "positive")[index % 2] for index, review in enumerate(reviews)}
    test = load_test_with(monkeypatch, tmp_path, lambda _: same, known)
    asked = [test.ask("grpc", 0.0) for _ in reviews]
    assert [sample.outcome for sample, _ in asked].count("WrongAnswerError") == SOURCE.reviews // 2
    assert any("expected 'negative' as the model of this checkout says" in str(error) for _, error in asked)


def test_labels_are_those_of_the_checkouts_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifest = manifest_path(tmp_path)
    manifest.parent.mkdir()
    manifest.write_text(json.dumps({"labels": ["BAD", "GOOD"]}))
    monkeypatch.setattr(answers, "REPOSITORY", tmp_path)
    given = iter([Prediction("GOOD", 0.9, (0.1, 0.9)), Prediction("positive", 0.9, (0.1, 0.9))])
    test = load_test_with(monkeypatch, tmp_path, lambda _: [next(given)], {})
    (right, _), (wrong, error) = (test.ask("grpc", 0.0) for _ in range(2))
    assert (right.outcome, wrong.outcome) == (OK, "WrongAnswerError")
    assert str(error) == "label 'positive' came, expected one of ['BAD', 'GOOD']"


def test_known_answers_come_from_the_model_and_a_fence_sitter_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    if not MODEL.exists():
        pytest.skip("no model is installed in this checkout: make export")

    def engine(num_threads: int) -> shipped_engine.Infer:
        return lambda rows: (["negative"], [0.95 if len(rows[0]) > 6 else answers.SURE_SCORE - 0.01])

    monkeypatch.setattr(shipped_engine, "open_engine", engine)
    monkeypatch.setattr(answers, "KNOWN_SHARE", 1.0)
    long = "this film was far too long and much too loud for me"
    assert answers.known_labels(["short", long], seed=1) == {long: "negative"}


def test_without_a_model_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(answers, "REPOSITORY", tmp_path)
    with pytest.raises(FileNotFoundError, match="make export"):
        answers.known_labels(["a review"], seed=1)


def test_without_known_answers_a_measurement_is_invalid(tmp_path: Path) -> None:
    assert "no right answer was known" in summary(tmp_path, steady(100), known_answers=0).invalid(VALIDITY)[0]
    assert summary(tmp_path, steady(100), known_answers=1).invalid(VALIDITY) == []
    assert summary(tmp_path, steady(100)).invalid(VALIDITY) == []  # perf_analyzer checks none


def test_time_in_flight_is_counted_from_due_to_ended() -> None:
    counted = InFlight()
    counted.due(1.0)
    counted.due(2.0)
    assert counted.integral_s(4.0) == pytest.approx(5.0)
    counted.ended(3.5)
    assert counted.integral_s(5.0) - counted.integral_s(4.0) == pytest.approx(1.0)


def test_littles_law_misses_samples_of_an_open_loop_that_were_counted(tmp_path: Path) -> None:
    assert summary(tmp_path, steady(100), in_flight=0.5).invalid(VALIDITY) == []
    assert "not in a steady state" in summary(tmp_path, steady(100), in_flight=0.55).invalid(VALIDITY)[0]


def test_littles_law_misses_users_of_a_closed_loop_that_ended(tmp_path: Path) -> None:
    assert summary(tmp_path, users(4), "closed", 4).invalid(VALIDITY) == []
    assert "4.00 requests in flight" in summary(tmp_path, users(3), "closed", 4).invalid(VALIDITY)[0]


def test_long_requests_at_the_edges_of_a_closed_loop_are_no_miss(tmp_path: Path) -> None:
    rows = [Sample(at, at, at + 2.2, 1, OK) for at in np.arange(-1.9, 10, 2.2)]
    assert summary(tmp_path, rows, "closed", 1).littles_law_percent == pytest.approx(0)


@pytest.mark.parametrize(("count", "kept"), [(100, True), (128, True), (135, False), (60, False)])
def test_an_open_loop_must_keep_to_its_rate_within_what_chance_allows(tmp_path: Path, count: int, kept: bool) -> None:
    reasons = summary(tmp_path, steady(count)).invalid(VALIDITY)
    assert [reason for reason in reasons if "did not keep to its rate" in reason] == reasons
    assert (not reasons) is kept
    assert summary(tmp_path, users(1), "closed", 1).invalid(VALIDITY) == []


@pytest.mark.parametrize(("count", "is_maximum"), [(99, True), (100, True), (101, False), (400, False)])
def test_a_p99_of_few_requests_is_the_slowest(tmp_path: Path, count: int, is_maximum: bool) -> None:
    rows = [*steady(count - 1), Sample(9.0, 9.0, 9.9, 1, OK)]
    found = summary(tmp_path, rows)
    assert found.p99_is_maximum is is_maximum
    assert (found.p99_ms == pytest.approx(900)) is is_maximum


class _StandIn(BaseHTTPRequestHandler):
    """Answers every review with `POSITIVE`, and Triton's statistics with nothing."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(json.dumps({"model_stats": [{}]}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.1)
        self._send(json.dumps(POSITIVE).encode())

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def stand_in() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


LOAD = Load(
    tool="locust", protocol="generate", loop="closed", level=2, texts="short", warmup_s=0.2, duration_s=0.8, probe=True
)


def locust(monkeypatch: pytest.MonkeyPatch, url: str, metrics_url: str, folder: Path) -> Path:
    """Runs two closed users against the stand-in for a second; half of the texts have a known answer."""
    reviews = load_test._reviews("short", SOURCE)
    monkeypatch.setattr(load_test, "known_answers", lambda *_: dict.fromkeys(reviews[::2], "negative"))
    urls = Urls(url, "grpc://127.0.0.1:9", metrics_url)
    return locust_run.run(LOAD, urls, folder / "two", SOURCE, gate=False)


def test_locust_keeps_what_is_under_way_at_the_end_and_finds_wrong_answers(
    monkeypatch: pytest.MonkeyPatch, stand_in: str, tmp_path: Path
) -> None:
    found = summarise(locust(monkeypatch, stand_in, f"{stand_in}/metrics", tmp_path))
    assert found.load == LOAD
    assert set(found.failures) == {"WrongAnswerError"}
    assert found.failures["WrongAnswerError"] < found.requests
    assert found.first_wrong_answer.startswith("'positive' came, expected 'negative'")
    assert found.first_wrong_answer in verdict.broken_by(found, LIMITS)[0]
    assert (found.known_answers, found.invalid(VALIDITY)) == (SOURCE.reviews // 2, [])
    data = samples.read(tmp_path / "two.csv.gz")
    (_, end_s) = json.loads((tmp_path / "two.json").read_text())["window_s"]
    assert int(((data.scheduled_s < end_s) & (data.done_s >= end_s)).sum()) == 2
    assert set(data.texts.tolist()) == set(range(SOURCE.reviews))


def test_locust_ends_at_once_with_the_reason_when_there_are_no_metrics(
    monkeypatch: pytest.MonkeyPatch, stand_in: str, tmp_path: Path
) -> None:
    with pytest.raises(locust_run.LoadError, match="error: URLError"):
        locust(monkeypatch, stand_in, "http://127.0.0.1:9/metrics", tmp_path)


def test_without_a_file_to_write_no_metrics_are_asked_for(tmp_path: Path) -> None:
    answers.write_known(tmp_path / "known.json", {})
    nowhere = "http://127.0.0.1:9/metrics"
    test = LoadTest(Options(kind="short", source=SOURCE, known=tmp_path / "known.json", metrics_url=nowhere))
    slept_s: list[float] = []
    test.watch_window(slept_s.append)
    assert len(slept_s) == 1
    test.end()


IN_LOCUST = """
import locust
from types import SimpleNamespace
import gevent
from benchmarks import locustfile

ended = []
class Endless:
    options = SimpleNamespace(window_s=1)
    def watch_window(self, sleep): sleep(1e6)
    def end(self): ended.append(self)

environment = SimpleNamespace(web_ui=None, runner=None, parsed_options=None)
make, locustfile._make = locustfile._make, lambda _: Endless()
locustfile._start(environment)
watcher = locustfile._running[id(environment)].watcher
locustfile._finish(environment)
assert watcher.dead and len(ended) == 1, "the watcher of a test that ended goes on"
locustfile._finish(environment)

runner = SimpleNamespace(target_user_count=3)
picked = [locustfile.GrpcUser, locustfile.GrpcArrivals]
wrong = [
    (picked, {"window_s": 5, "out": "x"}, "--out needs --window-s"),
    (picked[:1], {"out": "x"}, "--out needs --window-s"),
    (picked, {"rate_per_s": 0}, "level"),
    (picked, {"rate_per_s": float("inf")}, "level"),
    (picked[:1], {"batch_size": 65}, "batch_size"),
    (picked[:1], {"warmup_s": -1}, "warmup_s"),
]
for users, options, said in wrong:
    try:
        locustfile._load(SimpleNamespace(user_classes=users, runner=runner), locustfile.Options(**options))
    except ValueError as error:
        assert said in str(error), error
    else:
        raise AssertionError(f"accepted {options}")
assert locustfile._load(SimpleNamespace(user_classes=picked, runner=runner), locustfile.Options()) is None

locustfile._make = make
try:
    locustfile._start(environment)
except SystemExit as end:
    assert "AssertionError" in str(end.code), end.code
else:
    raise AssertionError("Locust would run on without a test")
"""


def test_a_load_test_that_ended_or_never_began_leaves_nothing_running() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IN_LOCUST], cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr


def load_of(rate_per_s: float, **changes: Any) -> Load:
    given = {"tool": "locust", "protocol": "grpc", "loop": "open", "warmup_s": 5, "duration_s": 60, **changes}
    return Load.model_validate({**given, "level": rate_per_s})


def first_of(load: Load, seed: int = 1) -> list[float]:
    return list(islice(arrivals.window_s(load, seed), 300))


def test_arrivals_are_of_the_load_and_others_for_another() -> None:
    once = first_of(load_of(5))
    assert once == first_of(load_of(5))
    assert once != first_of(load_of(5), seed=2)
    assert sum(due_s < 60 for due_s in once[:300]) == 300
    for other in (load_of(10), load_of(5, protocol="infer"), load_of(5, duration_s=30), load_of(5, texts="short")):
        assert not np.allclose(np.array(once) * 5, np.array(first_of(other)) * other.level)


def test_perf_analyzer_and_locust_send_the_same_at_the_same_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers.write_known(tmp_path / "known.json", {})
    options = Options(rate_per_s=20, kind="short", source=SOURCE, known=tmp_path / "known.json", window_s=60)
    test = LoadTest(options)
    sent: list[str] = []

    def answer(reviews: Sequence[str]) -> list[Prediction]:
        sent.extend(reviews)
        return [Prediction("positive", 0.9, (0.1, 0.9))]

    monkeypatch.setattr(doors, "open_door", lambda *_: Door(answer, lambda: None))
    due_s = list(takewhile(lambda at_s: at_s < test.start_s + options.warmup_s + 4, test.arrivals_s("grpc")))
    for at_s in due_s:
        test.due(at_s)
        test.ask("grpc", at_s)
    due_s = np.array(due_s) - test.start_s - options.warmup_s
    in_window = due_s >= 0
    assert 0 < in_window.sum() < in_window.size

    load = load_of(20, tool="perf_analyzer", texts="short", warmup_s=0)
    theirs_s = np.cumsum(arrivals.intervals_us(load, SOURCE.seed, 4)) / 1e6
    np.testing.assert_allclose(due_s[in_window], theirs_s[: in_window.sum()], atol=1e-6)
    reviews = texts.make("short", SOURCE.reviews, SOURCE.seed, None)
    order = texts.mixed_order([len(review) for review in reviews], SOURCE.seed)
    assert sent[in_window.argmax() :][: len(order)] == [reviews[place] for place in order]


def test_what_counts_is_the_window_that_was_drawn_however_long_the_counters_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers.write_known(tmp_path / "known.json", {})
    out = str(tmp_path / "one")
    options = Options(
        rate_per_s=40, kind="short", source=SOURCE, known=tmp_path / "known.json", warmup_s=0.3, window_s=1, out=out
    )
    positive = [Prediction("positive", 0.9, (0.1, 0.9))]
    monkeypatch.setattr(doors, "open_door", lambda *_: Door(lambda _: positive, lambda: None))
    monkeypatch.setattr(triton_metrics, "snapshot", lambda *_: time.sleep(0.2))  # busy servers take seconds
    test = LoadTest(options, options.load("grpc", "open", 40))
    watching = threading.Thread(target=test.watch_window, args=[time.sleep])
    watching.start()
    for due_s in takewhile(lambda at_s: at_s < test.start_s + 1.8, test.arrivals_s("grpc")):
        test.due(due_s)
        test.ask("grpc", due_s)
    watching.join()
    test.end()
    raw = json.loads((tmp_path / "one.json").read_text())
    assert raw["window_s"] == [0.3, 1.3]
    assert len(samples.read(tmp_path / "one.csv.gz").due_between(*raw["window_s"]).outcomes) == 40
