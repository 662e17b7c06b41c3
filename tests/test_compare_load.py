"""The load generator against a small HTTP server made here and the real one; the shipped model in process."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest
import serving
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import REVIEWS

from benchmarks import texts
from benchmarks.compare import inprocess, load, lone, measure
from benchmarks.compare.doors import Door, open_door
from benchmarks.compare.load import WRONG, Spec
from benchmarks.compare.plan import LIMIT_S
from benchmarks.compare.systems import TEXT
from benchmarks.samples import OK


class _Handler(BaseHTTPRequestHandler):
    """Says `positive` to everything; `slow` takes longer than the limit, `broken` fails."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
        if text == "slow":
            time.sleep(LIMIT_S * 1.5)
        body = json.dumps([{"label": "positive"}]).encode()
        self.send_response(500 if text == "broken" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def door() -> Iterator[Door]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Door(f"http://127.0.0.1:{server.server_address[1]}/", {"text": TEXT}, (0, "label"))
    server.shutdown()
    thread.join()
    server.server_close()


def test_answers_are_compared_with_the_known_ones(door: Door) -> None:
    texts, labels = ["good", "bad", "fence", "broken"], ["positive", "negative", None, "positive"]
    record, samples, _ = asyncio.run(load.run(Spec(door, texts, labels, 0, 0, 0, lone_threads=1)))
    assert [sample.outcome for sample in samples] == [OK, WRONG, OK, "UnexpectedStatusError"]
    assert len(record["in_process_s"]) == len(texts)


@pytest.mark.parametrize("one_at_a_time", [False, True])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_every_door_of_the_service_gives_the_same_labels(
    server: serving.Server, protocol: str, one_at_a_time: bool
) -> None:
    paths = {"grpc": server.grpc_url, "http": f"{server.http_url}/v2/models/sentiment/generate"}
    door = Door(paths[protocol], {"text": TEXT}, ("label",))

    async def labels() -> list[str]:
        async with open_door(door, REVIEWS, one_at_a_time) as ask:
            return [await ask(index) for index in range(len(REVIEWS))]

    assert asyncio.run(labels()) == [serving.generate(server, review)[1]["label"] for review in REVIEWS]


def test_lone_reviews_run_in_process_and_are_sent_in_turn(door: Door) -> None:
    texts = [f"review {number}" for number in range(2 * lone.TURN + 1)]
    record, samples, _ = asyncio.run(load.run(Spec(door, texts, [None] * len(texts), 0, 0, 0, lone_threads=1)))
    turns = [samples[start : start + lone.TURN] for start in range(0, len(samples), lone.TURN)]
    assert [len(turn) for turn in turns] == [lone.TURN, lone.TURN, 1]
    for place, turn in enumerate(turns[1:], start=1):
        in_process_s = sum(record["in_process_s"][place * lone.TURN : (place + 1) * lone.TURN])
        assert turn[0].sent_s - turns[place - 1][-1].done_s >= in_process_s, "nothing else fits between two turns"


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200), st.integers(0, 5))
def test_order_holds_every_text_once(lengths: list[int], seed: int) -> None:
    assert sorted(texts.mixed_order(lengths, seed)) == list(range(len(lengths)))


@given(st.integers(1, 6), st.integers(0, 5), st.randoms(use_true_random=False))
def test_order_mixes_lengths_all_along(repeats: int, seed: int, random: Random) -> None:
    lengths = random.sample(range(5000), repeats * texts.STRATA)
    ranks = {length: rank for rank, length in enumerate(sorted(lengths))}
    sent = [ranks[lengths[index]] // repeats for index in texts.mixed_order(lengths, seed)]
    for start in range(0, len(sent), texts.STRATA):
        assert sorted(sent[start : start + texts.STRATA]) == list(range(texts.STRATA))


def test_closed_loop_sends_every_text_and_notes_the_generators_cpu(door: Door, tmp_path: Path) -> None:
    spec = Spec(door, ["a", "b"], ["positive"] * 2, 0, warmup_s=0.1, window_s=0.4, users=2)
    (tmp_path / "spec.json").write_text(load.to_json(spec))
    assert load.main([str(tmp_path / "spec.json"), str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["generator_cpu_s"] > 0
    assert measure.summarise(tmp_path / "out").right_per_s > 0


def test_open_loop_ends_early_once_too_many_requests_are_late(door: Door) -> None:
    spec = Spec(door, ["slow"], [None], 0, warmup_s=0, window_s=30, rate_per_s=20)
    record, samples, _ = asyncio.run(load.run(spec))
    assert not record["complete"]
    assert len(samples) < 20 * 30
    assert Counter(sample.outcome for sample in samples) == {OK: len(samples)}


def test_shipped_model_labels_what_is_sure_and_leaves_the_rest_open(tmp_path: Path) -> None:
    spec = {"texts": ["An amazing, moving film!", "Terrible. A boring waste of time."], "threads": 1, "served": [1, 1]}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    assert inprocess.main(["labels", str(tmp_path / "spec.json"), str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == ["positive", "negative"]


def test_ceiling_runs_every_text_equally_often() -> None:
    rows = [[101, 2307, 102], [101, 6659, 3185, 102]]
    for layout in [(1, 2), (2, 1)]:
        found = inprocess.ceiling(rows, layout, "one by one", length_s=0.0)
        assert found["tokens_per_s"] / found["reviews_per_s"] == pytest.approx(3.5)
