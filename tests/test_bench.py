"""`python -m benchmarks.bench` against the real server: raw files, gate, exit status, last line. Speed is no matter."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import CHECKOUT, Server

from benchmarks import perf_analyzer, verdict

STAGES: list[dict[str, Any]] = [
    {"tool": "locust", "name": "grpc", "protocol": "grpc", "rates_per_s": [20], "batch_size": 2, "gate": True},
    {"tool": "locust", "name": "infer", "protocol": "infer", "users": [2]},
    {"tool": "locust", "name": "generate", "protocol": "generate", "rates_per_s": [10], "texts": "short"},
]


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
        "profiles": {
            "try": {"about": "", "stages": [{"warmup_s": 0.5, "duration_s": 1.5, **stage} for stage in stages]}
        },
    }
    (folder / "profiles.yaml").write_text(json.dumps(content))
    urls = ["--http-url", server.http_url, "--grpc-url", server.grpc_url, "--metrics-url", server.metrics_url]
    options = ["--profiles", str(folder / "profiles.yaml"), "--profile", "try", "--reviews", "16", "--out", str(folder)]
    command = [sys.executable, "-m", "benchmarks.bench", *options, *urls]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=False)


def test_every_kind_of_user_is_measured_and_kept_raw(server: Server, tmp_path: Path) -> None:
    run = bench(server, tmp_path, STAGES, p99_ms=5000)
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads(run.stdout.splitlines()[-1])
    assert document["passed"] is True
    measured = {summary.name: summary for summary in verdict.read_all(tmp_path)}
    assert set(measured) == {"grpc-20", "infer-2", "generate-10"}
    for summary in measured.values():
        assert summary.requests > 0
        assert summary.failures == {}
        assert summary.batching is not None
        assert summary.batching.reviews > 0
    assert json.loads((tmp_path / verdict.RUN_FILE).read_text())["machine"]["cores"] >= 1
    assert {"triton", "tokenizer", "classifier"} <= {
        line.split(",")[1] for line in (tmp_path / verdict.MEMORY_FILE).read_text().splitlines()[1:]
    }


def test_a_broken_limit_fails_the_run(server: Server, tmp_path: Path) -> None:
    run = bench(server, tmp_path, STAGES[:1], p99_ms=0.001)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "BROKEN grpc-20: p99_ms" in run.stdout
    assert json.loads(run.stdout.splitlines()[-1])["passed"] is False


def test_perf_analyzer_leaves_the_same_raw_files(server: Server, tmp_path: Path) -> None:
    if perf_analyzer.find() is None:
        pytest.skip("no perf_analyzer on the PATH or in .venv-bench: make bench fetches it")
    stage = {"tool": "perf_analyzer", "name": "pa", "protocol": "grpc", "users": [2], "duration_s": 3}
    run = bench(server, tmp_path, [stage], p99_ms=5000)
    assert run.returncode == 0, run.stdout + run.stderr
    (summary,) = verdict.read_all(tmp_path)
    assert summary.requests > 0
    assert json.loads((tmp_path / "pa-2.json").read_text())["perf_analyzer"]["composing_models"]


def test_no_service_on_another_machine_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.bench", "--http-url", "http://192.0.2.1:8000", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert "start it there" in run.stderr
