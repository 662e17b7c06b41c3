"""`python -m benchmarks.bench` against the real server: raw files, gate, exit status, last line. Speed is no matter."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving
from serving import CHECKOUT, Server

from benchmarks import arrivals, perf_analyzer, samples, texts, verdict
from export.repository import MODEL_FILE, REPOSITORY

LOCUST = {"tool": "locust", "warmup_s": 0.5}
STAGES: list[dict[str, Any]] = [
    {**LOCUST, "name": "grpc", "protocol": "grpc", "rates_per_s": [4], "batch_size": 2, "gate": True},
    {**LOCUST, "name": "infer", "protocol": "infer", "users": [2]},
    {**LOCUST, "name": "generate", "protocol": "generate", "rates_per_s": [8], "texts": "short"},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real serve.py with this checkout's model, whose labels are the known answers."""
    if not (REPOSITORY / MODEL_FILE).exists():
        pytest.skip("no model is installed in this checkout: make export")
    started = serving.start(REPOSITORY, tmp_path_factory.mktemp("log") / "triton.log")
    yield started
    started.stop()


def bench(
    server: Server, folder: Path, stages: list[dict[str, Any]], p99_ms: float
) -> subprocess.CompletedProcess[str]:
    """Runs the stages for a second each; Little's law is left alone, since a busy test machine has no steady state."""
    content = {
        "limits": {"p50_ms": 5000, "p99_ms": p99_ms, "failures_percent": 1},
        "validity": {
            "max_generator_cpu_percent": 100,
            "max_littles_law_percent": 100,
            "max_disagreement_percent": 15,
        },
        "profiles": {"try": {"about": "", "stages": [{"duration_s": 1.5, **stage} for stage in stages]}},
    }
    (folder / "profiles.yaml").write_text(json.dumps(content))
    urls = ["--http-url", server.http_url, "--grpc-url", server.grpc_url, "--metrics-url", server.metrics_url]
    options = ["--profiles", str(folder / "profiles.yaml"), "--profile", "try", "--reviews", "16"]
    command = [sys.executable, "-m", "benchmarks.bench", *options, "--out", str(folder / "out"), *urls]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=False)


def test_every_kind_of_user_is_measured_and_kept_raw(server: Server, tmp_path: Path) -> None:
    run = bench(server, tmp_path, STAGES, p99_ms=5000)
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads(run.stdout.splitlines()[-1])
    assert document["passed"] is True
    out = tmp_path / "out"
    measured = {summary.name: summary for summary in verdict.read_all(out)}
    assert set(measured) == {"grpc-4", "infer-2", "generate-8"}
    for summary in measured.values():
        assert summary.requests > 0
        assert summary.failures == {}
        assert summary.batching is not None
        assert summary.batching.reviews > 0
    facts = json.loads((out / verdict.RUN_FILE).read_text())
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["of"] == "service and load generator"
    assert facts["runtime"] in ("openvino", "onnxruntime")
    assert facts["versions"]["triton"] == "2.51.0"
    assert {"triton", "tokenizer", "classifier"} <= {
        line.split(",")[1] for line in (out / verdict.MEMORY_FILE).read_text().splitlines()[1:]
    }


def test_a_broken_limit_fails_the_run(server: Server, tmp_path: Path) -> None:
    run = bench(server, tmp_path, STAGES[:1], p99_ms=0.001)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "BROKEN grpc-4: p99_ms" in run.stdout
    assert json.loads(run.stdout.splitlines()[-1])["passed"] is False


def test_perf_analyzer_leaves_the_same_raw_files(server: Server, tmp_path: Path) -> None:
    if perf_analyzer.find() is None:
        pytest.skip("no perf_analyzer on the PATH or in this environment: `make test` installs one")
    pa = {"tool": "perf_analyzer", "protocol": "grpc", "texts": "short", "duration_s": 3}
    run = bench(
        server, tmp_path, [{**pa, "name": "closed", "users": [2]}, {**pa, "name": "open", "rates_per_s": [8]}], 5000
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["passed"] is None
    out = tmp_path / "out"
    closed, opened = sorted(verdict.read_all(out), key=lambda summary: summary.load.loop)
    assert closed.requests > 0 < opened.requests
    assert json.loads((out / "closed-2.json").read_text())["perf_analyzer"]["composing_models"]

    sent_s = samples.read(out / "open-8.csv.gz").sent_s[:20]
    due_us = arrivals.intervals_us(opened.load, texts.DEFAULT_SEED, 3)
    assert np.corrcoef(np.diff(sent_s), due_us[1 : sent_s.size])[0, 1] > 0.5  # by chance within 0.45 of 0


def test_no_service_on_another_machine_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.bench", "--http-url", "http://192.0.2.1:8000", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert "start it there" in run.stderr
    assert "start it there" in json.loads(run.stdout.splitlines()[-1])["error"]


@pytest.mark.parametrize("door", ["grpc", "metrics"])
def test_a_door_that_does_not_answer_is_named_before_anything_is_measured(
    server: Server, tmp_path: Path, door: str
) -> None:
    nobody = f"127.0.0.1:{serving.free_ports()['http']}"
    urls = {"http": server.http_url, "grpc": server.grpc_url, "metrics": server.metrics_url}
    urls[door] = f"grpc://{nobody}" if door == "grpc" else f"http://{nobody}/metrics"
    flags = [f"--{name}-url={url}" for name, url in urls.items()]
    command = [sys.executable, "-m", "benchmarks.bench", *flags, "--out", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert nobody in run.stderr
    assert f"--{door}-url" in run.stderr
