"""The report, on raw files made here by a queue whose capacity is known. No server runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import capacity_fit, capacity_model, profiles, report, samples, texts, verdict
from benchmarks.capacity_model import Service
from benchmarks.profiles import Load
from benchmarks.samples import OK, Sample
from export.repository import REPOSITORY, TOKENIZER_FILE

TRUE = Service(per_token_s=1.1e-4, noise=0.1, elsewhere_s=0.003, instances=2)
"""The replica that the raw files come from."""
REVIEWS = 64
WINDOW_S = 120.0
PER_USER_PER_S = 35.0
MOST_USERS = 8


def contention(lengths: capacity_model.Floats) -> float:
    """Returns the contention with which `MOST_USERS` get exactly what the instances of `TRUE` can do."""
    saturated_per_s = TRUE.instances / (TRUE.per_token_s * float(lengths.mean()))
    return (PER_USER_PER_S * MOST_USERS / saturated_per_s - 1) / (MOST_USERS - 1)


@pytest.fixture(scope="module")
def lengths() -> capacity_model.Floats:
    if not (REPOSITORY / TOKENIZER_FILE).exists():
        pytest.skip("no model is installed in this checkout: make export")
    return capacity_fit.lengths_sent({"data": "generated", "reviews": REVIEWS, "seed": texts.DEFAULT_SEED})


@pytest.fixture(scope="module")
def sweep(lengths: capacity_model.Floats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with six rates and four numbers of users of the replica `TRUE`."""
    folder = tmp_path_factory.mktemp("sweep")
    for rate in (10.0, 20.0, 30.0, 40.0, 50.0, 60.0):
        arrivals, latency_s = capacity_model.simulate(
            TRUE, lambda at, r=rate: np.full_like(at, r), rate, WINDOW_S, lengths, int(rate)
        )
        rows = [Sample(at, at, at + took, 1, OK) for at, took in zip(arrivals, latency_s, strict=True)]
        write(folder, f"rates-{rate:g}", "open", rate, rows, float(lengths.mean()))
    law = capacity_model.Scalability(PER_USER_PER_S, contention(lengths), 0.0)
    for users in (1, 2, 4, MOST_USERS):
        took = users / float(law.throughput(users))
        rows = [Sample(at, at, at + took, 1, OK) for at in np.arange(0, WINDOW_S, took) for _ in range(users)]
        write(folder, f"users-{users}", "closed", users, rows, float(lengths.mean()))
    facts = {
        "profile": "sweep",
        "texts": {"data": "generated", "reviews": REVIEWS, "seed": texts.DEFAULT_SEED},
        "classifier_instances": TRUE.instances,
        "highest_rate_per_s": {"highest-one-review": 70.0},
    }
    (folder / verdict.RUN_FILE).write_text(json.dumps(facts))
    (folder / verdict.MEMORY_FILE).write_text("time_s,process,pid,rss_bytes\n0.0,triton,1,1000\n1.0,triton,1,1100\n")
    return folder


def write(folder: Path, name: str, loop: str, level: float, rows: list[Sample], mean_tokens: float) -> None:
    """Writes one measurement; every execution held one review, and took what `TRUE` says of a mean one."""
    samples.write(folder / f"{name}.csv.gz", rows, 0.0)
    took_us = len(rows) * TRUE.per_token_s * mean_tokens * 1e6
    counters = {
        "nv_inference_request_success{sentiment}": len(rows),
        "nv_inference_request_duration_us{sentiment}": took_us,
    }
    for step in ("tokenizer", "classifier"):
        counters |= {f"nv_inference_count{{{step}}}": len(rows), f"nv_inference_exec_count{{{step}}}": len(rows)}
    counters["nv_inference_compute_infer_duration_us{classifier}"] = took_us
    batches = {step: {"1": len(rows)} for step in ("tokenizer", "classifier")}
    load = {"tool": "locust", "protocol": "grpc", "loop": loop, "level": level, "warmup_s": 0, "duration_s": WINDOW_S}
    raw = {
        "load": Load.model_validate(load).model_dump(),
        "gate": False,
        "window_s": [0.0, WINDOW_S],
        "generator": {"cpu_s": 1.0, "wall_s": WINDOW_S},
        "triton": {
            "before": {"counters": dict.fromkeys(counters, 0.0), "batches": {}},
            "after": {"counters": counters, "batches": batches},
        },
    }
    (folder / f"{name}.json").write_text(json.dumps(raw))


def test_report_is_one_page_that_needs_nothing_else(sweep: Path) -> None:
    page = report.write(sweep, profiles.load()).read_text()
    for plot in ("latency-distribution", "latency-against-rate-grpc-imdb-1", "time-by-phase", "memory"):
        assert f"alt='{plot}'" in page
        assert (sweep / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert "rates-30" in page
    assert "src='http" not in page
    assert "<script" not in page


def test_same_raw_files_give_the_same_report(sweep: Path) -> None:
    first = report.write(sweep, profiles.load()).read_bytes()
    assert report.write(sweep, profiles.load()).read_bytes() == first


def test_report_judges_by_what_the_run_had_unless_told_otherwise(sweep: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sweep, tmp_path / "run"))
    raw = json.loads((folder / "rates-30.json").read_text())
    (folder / "rates-30.json").write_text(json.dumps({**raw, "gate": True}))
    facts = json.loads((folder / verdict.RUN_FILE).read_text())
    shipped = profiles.load()
    lenient = shipped.model_copy(update={"limits": shipped.limits.model_copy(update={"p99_ms": 1e6})})
    own = lenient.of_run("my own", shipped.profile("sweep"))
    rules = {"rules": own.model_dump(mode="json")}
    (folder / verdict.RUN_FILE).write_text(json.dumps({**facts, "profile": "my own", **rules}))
    assert report.main([str(folder)]) == 0
    assert "<p class=passed>passed: p50 &lt;= 200 ms, p99 &lt;= 1e+06 ms" in (folder / "report.html").read_text()
    assert report.main([str(folder), "--profiles", str(profiles.PROFILES_FILE)]) == 0
    assert "no profile &#x27;my own&#x27; is known here" in (folder / "report.html").read_text()


def test_report_of_an_empty_folder_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "make bench" in capsys.readouterr().err
