"""The options of model_repository/README.md on the real server: each does what it says, and the answers stay.

Run: python -m pytest tests/test_serving_options.py
"""

import contextlib
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import serving
import tritonclient.grpc
from onnx import TensorProto, helper
from serving import Server
from tiny_model import REVIEWS

from benchmarks.doors import Urls
from benchmarks.service import ServiceError, running
from clients import SentimentClient

Start = Callable[..., Server]


@pytest.fixture
def changed(repository: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model repository, to be changed."""
    return shutil.copytree(repository, tmp_path / "model_repository")


@pytest.fixture
def start(changed: Path, tmp_path: Path) -> Iterator[Start]:
    """Serves `changed` with more flags of serve.py."""
    started: list[Server] = []

    def run(*flags: str) -> Server:
        started.append(serving.start(changed, tmp_path / "triton.log", *flags))
        return started[-1]

    yield run
    for server in started:
        assert server.stop() == 0


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
    file.write_text(text.replace(old, new))


def assert_same_answers(one: Server, other: Server) -> None:
    for batch in (list(REVIEWS), REVIEWS[0]):
        answers = [serving.generate(each, batch)[1] for each in (one, other)]
        assert answers[0]["label"] == answers[1]["label"]
        np.testing.assert_allclose(answers[0]["probabilities"], answers[1]["probabilities"], atol=1e-4)


def cache_hits(server: Server) -> int:
    metrics = serving.get(server.metrics_url)[1]
    return sum(int(hits) for hits in re.findall(r"^nv_cache_num_hits_per_model\{.*\} (\d+)", metrics, re.MULTILINE))


def test_response_cache_is_off_unless_given_memory(server: Server) -> None:
    for _ in range(3):
        assert serving.generate(server, REVIEWS[0])[0] == 200
    assert cache_hits(server) == 0


def test_response_cache_answers_repeats_without_running_a_step_and_keeps_no_errors(
    start: Start, server: Server, tmp_path: Path
) -> None:
    cached = start("--response-cache-mib=16")
    first, second = (serving.probabilities(cached, [REVIEWS[0]]) for _ in range(2))
    assert cache_hits(cached) == 1
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(second, serving.probabilities(server, [REVIEWS[0]]), atol=1e-4)
    for _ in range(2):
        status, answer = serving.infer(cached, serving.texts([" "]))
        assert status == 400, answer
    assert cache_hits(cached) == 1
    urls = Urls(cached.http_url, cached.grpc_url, cached.metrics_url)
    with pytest.raises(ServiceError, match="has a response cache"), running(urls, tmp_path / "bench.log"):
        pass


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_runtime_named_in_the_configuration_serves_the_same_answers_and_the_log_names_it(
    start: Start, changed: Path, server: Server, tmp_path: Path, runtime: str
) -> None:
    replace(changed / "classifier" / "config.pbtxt", 'string_value: "auto"', f'string_value: "{runtime}"')
    assert_same_answers(start(), server)
    serving.await_log(tmp_path / "triton.log", f"runs model.onnx in {runtime}")


def add_version(repository: Path, labels: list[bytes]) -> None:
    """Installs version 2 of the classifier: the same model under other label names."""
    version = shutil.copytree(repository / "classifier" / "1", repository / "classifier" / "2")
    model = onnx.load(version / "model.onnx")
    (names,) = [tensor for tensor in model.graph.initializer if tensor.name == "label_names"]
    names.CopyFrom(helper.make_tensor(names.name, TensorProto.STRING, [len(labels)], labels))
    onnx.save(model, version / "model.onnx")


@pytest.mark.parametrize(
    ("policy", "loaded", "answering"),
    [
        pytest.param("", ["2"], {"bad", "good"}, id="the newest alone by default"),
        pytest.param("version_policy { specific { versions: [ 1 ] } }", ["1"], {"negative", "positive"}, id="pinned"),
        pytest.param("version_policy { latest { num_versions: 2 } }", ["1", "2"], {"bad", "good"}, id="both"),
    ],
)
def test_version_policy_decides_which_classifier_answers(
    start: Start, changed: Path, policy: str, loaded: list[str], answering: set[str]
) -> None:
    add_version(changed, [b"bad", b"good"])
    config = changed / "classifier" / "config.pbtxt"
    config.write_text(config.read_text() + policy + "\n")
    served = start()
    assert serving.generate(served, REVIEWS[0])[1]["label"] in answering
    ready = [serving.get(f"{served.http_url}/v2/models/classifier/versions/{version}/ready")[0] for version in "12"]
    assert ready == [200 if version in loaded else 400 for version in "12"]


def test_a_row_that_fails_takes_no_row_of_its_group_along(start: Start, changed: Path) -> None:
    """Four requests, in one execution since it waits for four, of one width, so that their rows run as one tensor."""
    waiting = "preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 2000000"
    replace(changed / "classifier" / "config.pbtxt", "preferred_batch_size: [ 4 ]", waiting)
    served = start()

    def ask(token: int) -> tuple[int, dict[str, Any]]:
        rows = {"input_ids": [[2, token, 3]], "attention_mask": [[1, 1, 1]]}
        inputs = [{"name": name, "datatype": "INT64", "shape": [1, 3], "data": row} for name, row in rows.items()]
        return serving.infer(served, inputs, "classifier")

    before = serving.classifier_counts(served)
    with ThreadPoolExecutor(4) as pool:
        statuses = [status for status, _ in pool.map(ask, [5, 10**6, 6, 7])]
    assert statuses == [200, 400, 200, 200]
    assert serving.classifier_counts(served)["execution_count"] - before["execution_count"] == 1


def test_urgent_request_overtakes_those_that_wait(start: Start, changed: Path) -> None:
    levels = "dynamic_batching { priority_levels: 2 default_priority_level: 2 "
    for model in ("tokenizer", "classifier"):
        replace(changed / model / "config.pbtxt", "dynamic_batching { ", levels)
    served = start()
    num_waiting = 60
    done: list[object] = []
    one_done, all_done = threading.Event(), threading.Event()

    def note(name: object) -> Callable[[object, object], None]:
        def callback(result: object, error: object) -> None:
            done.append(error or name)
            one_done.set()
            if len(done) == num_waiting + 2:
                all_done.set()

        return callback

    request = serving.triton_request(tritonclient.grpc, [b"a film that takes its time " * 20] * 64)
    with tritonclient.grpc.InferenceServerClient(served.grpc_url.removeprefix("grpc://")) as client:
        for index in range(num_waiting):
            client.async_infer("sentiment", [request], note(index))
        assert one_done.wait(60)  # by now all have arrived
        client.async_infer("sentiment", [request], note("patient"))
        client.async_infer("sentiment", [request], note("urgent"), priority=1)
        assert all_done.wait(60)
    assert set(done) == {"urgent", "patient", *range(num_waiting)}
    assert done.index("urgent") < done.index("patient"), done
    assert done.index("urgent") < num_waiting / 2, done


LIMITER = "--triton-flag=--rate-limit-resource=core:1"


def ask_for_cores(repository: Path, count: int) -> None:
    resources = f"resources [ {{ name: 'core' count: {count} }} ]"
    replace(repository / "tokenizer" / "config.pbtxt", "KIND_CPU", f"KIND_CPU\n    rate_limiter {{ {resources} }}")
    classifier = repository / "classifier" / "config.pbtxt"
    classifier.write_text(classifier.read_text().replace("rate_limiter {", f"rate_limiter {{ {resources}"))


def test_rate_limiter_serves_within_its_resources(start: Start, changed: Path, server: Server) -> None:
    ask_for_cores(changed, 1)
    assert_same_answers(start(LIMITER), server)


def test_rate_limiter_refuses_to_start_what_could_never_run(changed: Path, tmp_path: Path) -> None:
    ask_for_cores(changed, 2)
    command = [*serving.command(changed, tmp_path / "triton.log", serving.free_ports()), LIMITER]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert 'Resource count for \\"core\\" is limited to 1' in run.stderr


def model_processes(served: Server, model: str) -> list[Path]:
    """Returns the folders in /proc of the server's processes of `model`; their command line names the model's file."""
    needles = f"/{model}/1/model.py", f"triton_{served.process.pid}_"
    children = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # any process may end meanwhile
            children[file.parent] = file.read_text(errors="replace")
    return [folder for folder, line in children.items() if all(needle in line for needle in needles)]


def niceness(process: Path) -> int:
    """Returns how far behind others a process stands for a core: proc_pid_stat(5)."""
    return int((process / "stat").read_text().rpartition(")")[2].split()[16])


def test_tokenizer_stands_behind_the_classifiers_for_a_core(server: Server) -> None:
    (tokenizer,), classifiers = (model_processes(server, model) for model in ("tokenizer", "classifier"))
    assert niceness(tokenizer) == os.nice(0) + 15
    assert {niceness(classifier) for classifier in classifiers} == {os.nice(0)}


def test_one_instance_with_two_threads_answers_as_two_with_one(start: Start, changed: Path, server: Server) -> None:
    config = changed / "classifier" / "config.pbtxt"
    config.write_text(re.sub(r",\n  {\n    count: 1  # on four cores.*?\n  }", "", config.read_text(), flags=re.DOTALL))
    replace(config, 'value: { string_value: "1" }', 'value: { string_value: "2" }')
    served = start()
    assert [len(model_processes(each, "classifier")) for each in (served, server)] == [1, 2]
    assert_same_answers(served, server)


COUNTS_ITS_REVIEWS = """

import os

_run = Runner.run


def _run_and_count(self, rows, width, whose):
    with open(f"{__file__}.{os.getpid()}", "ab") as file:
        file.write(b"." * len(rows))
    return _run(self, rows, width, whose)


Runner.run = _run_and_count
"""


def test_lone_reviews_all_go_to_one_classifier_process_and_a_crowd_to_both(start: Start, changed: Path) -> None:
    runner = changed / "classifier" / "runner.py"
    with runner.open("a") as module:
        module.write(COUNTS_ITS_REVIEWS)
    served = start()

    def counts() -> list[int]:
        return [
            file.stat().st_size if file.exists() else 0
            for process in model_processes(served, "classifier")
            for file in [Path(f"{runner}.{process.name}")]
        ]

    def reviews_of_each(num_users: int, reviews: list[str], pause_s: float) -> list[int]:
        """Returns the reviews that each process runs of 200 requests, the lowest first."""

        def ask(reviews: list[str]) -> None:
            client.predict(reviews)
            time.sleep(pause_s)

        before = counts()
        with ThreadPoolExecutor(num_users) as pool:
            list(pool.map(ask, [reviews] * 200))
        return sorted(after - earlier for after, earlier in zip(counts(), before, strict=True))

    with SentimentClient(served.grpc_url) as client:
        # An answer leaves before its execution returns, and on a busy machine long before: until then one is at work.
        idle, busy = reviews_of_each(1, [REVIEWS[0]], pause_s=0.02)
        assert idle + busy == 200
        assert idle <= 0.1 * busy, (idle, busy)
        less, more = reviews_of_each(32, [REVIEWS[0]] * 32, pause_s=0.0)
        assert less + more == 200 * 32
        assert less >= 0.25 * more, (less, more)


def reviews_by_cores(served: Server) -> dict[str, int]:
    """Returns how many reviews the classifier ran on all cores and how many on one instance's own."""
    metrics = serving.get(served.metrics_url)[1]
    return {
        cores: int(n) for cores, n in re.findall(r'^sentiment_classifier_reviews\{cores="(\w+)"\} (\d+)', metrics, re.M)
    }


def settled(served: Server) -> dict[str, int]:
    """Returns `reviews_by_cores` once it is the same for half a second: metrics come a moment after the answers."""
    counted, since_s = reviews_by_cores(served), time.monotonic()
    while time.monotonic() - since_s < 0.5:
        time.sleep(0.05)
        if (now := reviews_by_cores(served)) != counted:
            counted, since_s = now, time.monotonic()
    return counted


def test_lone_reviews_run_on_all_cores_a_batch_on_lent_ones_too_and_a_crowd_on_each_instances_own(
    start: Start, changed: Path, server: Server
) -> None:
    replace(changed / "classifier" / "config.pbtxt", 'string_value: "auto"', 'string_value: "onnxruntime"')
    with (changed / "classifier" / "runner.py").open("a") as module:
        module.write(TAKES_10_MS)
    served = start()
    before = settled(served)
    with SentimentClient(served.grpc_url) as client:
        for _ in range(20):
            client.predict([REVIEWS[0]])
        lone = settled(served)
        client.predict([f"{REVIEWS[0]} {'Good. ' * length}" for length in range(0, 320, 5)])
        batch = settled(served)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(client.predict, [[REVIEWS[0] * 5]] * 400))
    crowd = settled(served)
    assert (lone["all"] - before["all"], lone["own"] - before["own"]) == (20, 0)
    assert batch["lent"] > lone["lent"], batch
    assert sum(batch.values()) - sum(lone.values()) == 64
    assert sum(crowd.values()) - sum(batch.values()) == 400
    assert crowd["own"] - batch["own"] > 200, crowd
    assert_same_answers(served, server)


TAKES_10_MS = """

import time

_run = Runner.run


def _run_in_10_ms(self, rows, width, whose):
    time.sleep(0.01)
    return _run(self, rows, width, whose)


Runner.run = _run_in_10_ms
"""
"""Whatever the machine: the tiny model is faster than clients whose cores are busy, and crowds were lone reviews."""


def test_as_many_threads_alone_as_in_company_leave_the_cores_of_others_alone(start: Start, changed: Path) -> None:
    config = changed / "classifier" / "config.pbtxt"
    replace(config, 'string_value: "auto"', 'string_value: "onnxruntime"')
    replace(config, 'value: { string_value: "2" }', 'value: { string_value: "1" }')
    served = start()
    assert serving.generate(served, REVIEWS[0])[0] == 200
    counted = settled(served)
    assert counted["own"] > 0 == counted["all"], counted


def test_without_warm_up_the_answers_are_the_same(start: Start, changed: Path, server: Server) -> None:
    config = changed / "tokenizer" / "config.pbtxt"
    config.write_text(config.read_text().partition("model_warmup")[0])
    assert_same_answers(start(), server)


@pytest.mark.parametrize(
    "flags", [["--model-control-mode=poll"], ["--model-control=poll"], ["--model-control", "POLL"]]
)
def test_polling_is_refused_with_a_reason(changed: Path, tmp_path: Path, flags: list[str]) -> None:
    command = serving.command(changed, tmp_path / "triton.log", serving.free_ports())
    run = subprocess.run([*command, *(f"--triton-flag={flag}" for flag in flags)], capture_output=True, text=True)
    assert run.returncode == 1
    assert "start a second server" in run.stderr


def test_explicit_control_stays_closed_to_clients(start: Start) -> None:
    served = start("--triton-flag=--model-control-mode=explicit", "--triton-flag=--load-model=*")
    status, answer = serving.post(f"{served.http_url}/v2/repository/models/sentiment/unload", {})
    assert status == 403, answer
    assert serving.generate(served, REVIEWS[0])[0] == 200
