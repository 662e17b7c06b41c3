"""What a load test concludes, records and shows: verdict, exit status, last line, facts, report. No server runs."""

import contextlib
import json
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks import bench, figures, perf_analyzer, profiles, report, samples, service, triton_metrics, verdict
from benchmarks.doors import Door, Urls
from benchmarks.profiles import Limits, Load, LoadStage, Profile, ProfileError, Validity
from benchmarks.samples import OK, Sample
from benchmarks.search import Measure
from benchmarks.service import Service, ServiceError
from benchmarks.summary import Summary, summarise
from benchmarks.token_parity import first_difference
from clients import Prediction

LIMITS = Limits(p50_ms=200, p99_ms=200, failures_percent=1)
VALIDITY = Validity(max_generator_cpu_percent=85, max_littles_law_percent=2, max_disagreement_percent=15)
STAGE: dict[str, Any] = {"tool": "locust", "name": "a", "protocol": "grpc", "duration_s": 10}
OPEN, USERS = {**STAGE, "rates_per_s": [10], "warmup_s": 0}, {**STAGE, "users": [1], "warmup_s": 0}
PROFILE = Profile.model_validate({"about": "", "stages": [OPEN]})
REMOTE = Urls("http://node:8000", "grpc://node:8001", "http://node:8002/metrics")
LOCAL = Urls("http://127.0.0.1:8000", "grpc://127.0.0.1:8001", "http://127.0.0.1:8002/metrics")


def steady(latency_s: float = 0.05, outcome: str = OK, failed: int = 0) -> list[Sample]:
    """Returns a hundred requests over ten seconds, the first `failed` of them with `outcome`."""
    return [Sample(n / 10, n / 10, n / 10 + latency_s, 1, outcome if n < failed else OK) for n in range(100)]


def written(
    out: Path, load: Load, rows: Sequence[Sample], gate: bool = False, start_s: float = 0.0, **more: Any
) -> Path:
    """Writes the raw files of a measurement of ten seconds and returns the description's path."""
    out.parent.mkdir(exist_ok=True)
    samples.write(out.with_name(out.name + ".csv.gz"), rows, 0.0)
    file = out.with_name(out.name + ".json")
    raw = {"window_s": [start_s, 10.0], "generator": {"cpu_s": 1.0, "wall_s": 10.0}, "triton": None, **more}
    file.write_text(json.dumps({**raw, "load": load.model_dump(), "gate": gate}))
    return file


def load(**changes: Any) -> Load:
    kind = {"tool": "locust", "protocol": "grpc", "loop": "open", "level": 10, "warmup_s": 0, "duration_s": 10}
    return Load.model_validate({**kind, **changes})


def measured(folder: Path, rows: Sequence[Sample], name: str = "one", gate: bool = False, **changes: Any) -> Summary:
    return summarise(written(folder / name, load(**changes), rows, gate))


@pytest.mark.parametrize(
    ("kind", "failed", "change", "gate", "broken"),
    [
        pytest.param("ServerError", 100, {}, False, ["one: failures_percent is 100.0, limit 1 (ServerError 100)"]),
        pytest.param("ServerError", 1, {}, False, []),
        pytest.param("ServerError", 100, {"probe": True}, False, [], id="a search goes beyond what holds"),
        pytest.param("WrongAnswerError", 1, {"probe": True}, False, ["one: 1 wrong answers"]),
        pytest.param("WrongAnswerError", 1, {}, True, ["one: 1 wrong answers"]),
    ],
)
def test_failures_break_a_run_whatever_is_gated(
    tmp_path: Path, kind: str, failed: int, change: dict[str, Any], gate: bool, broken: list[str]
) -> None:
    summary = measured(tmp_path, steady(outcome=kind, failed=failed), gate=gate, **change)
    assert verdict.judge([summary], LIMITS, VALIDITY, PROFILE, tmp_path).broken == broken


@pytest.mark.parametrize(
    ("gate", "profile", "latency_s", "passed"),
    [
        pytest.param(True, PROFILE, 0.05, True, id="gated"),
        pytest.param(True, PROFILE, 0.3, False, id="gated and slow"),
        pytest.param(False, PROFILE, 0.3, None, id="nothing gated"),
        pytest.param(True, None, 0.05, None, id="unknown profile"),
    ],
)
def test_a_run_passes_only_what_it_was_asked(
    tmp_path: Path, gate: bool, profile: Profile | None, latency_s: float, passed: bool | None
) -> None:
    summary = measured(tmp_path, steady(latency_s), gate=gate)
    outcome = verdict.judge([summary], LIMITS, VALIDITY, profile, tmp_path)
    assert outcome.passed is passed
    assert verdict.headline(outcome, LIMITS).startswith({True: "passed", False: "failed", None: "not judged"}[passed])


def answering(monkeypatch: pytest.MonkeyPatch, runtime: str = "auto") -> None:
    """Makes a service answer what bench asks about it."""
    parameters = {"runtime": {"string_value": runtime}} if runtime else {}
    config = {
        "backend": "python",
        "max_batch_size": 64,
        "instance_group": [{"count": 1}, {"count": 1}],
        "parameters": parameters,
    }
    monkeypatch.setattr(
        triton_metrics, "get", lambda url: json.dumps({"version": "9.9"} if url.endswith("/v2") else config)
    )


def run_bench(
    monkeypatch: pytest.MonkeyPatch, folder: Path, stage: dict[str, Any], *options: str, rows: list[Sample]
) -> int:
    """Runs bench with a service and a Locust that are made up."""

    @contextlib.contextmanager
    def running(urls: Urls, _: Path, may_start: bool) -> Iterator[Service]:
        yield Service(urls, None, started_here=False)

    def locust(load: Load, urls: Urls, out: Path, source: object, gate: bool) -> Path:
        return written(out, load, rows, gate)

    answering(monkeypatch)
    monkeypatch.setattr(bench, "running", running)
    monkeypatch.setattr(bench.locust_run, "run", locust)
    content = {"limits": LIMITS.model_dump(), "validity": VALIDITY.model_dump()}
    profile = {"about": "", "stages": [stage]}
    (folder / "profiles.yaml").write_text(json.dumps({**content, "profiles": {"try": profile}}))
    fixed = [
        "--profiles",
        str(folder / "profiles.yaml"),
        "--profile",
        "try",
        "--out",
        str(folder / "out"),
        "--reviews",
        "4",
    ]
    return bench.main([*fixed, *options])


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


@pytest.mark.parametrize(
    ("stage", "rows", "status", "passed"),
    [
        pytest.param({**OPEN, "gate": True}, steady(), 0, True, id="gated"),
        pytest.param(OPEN, steady(0.3), 0, None, id="not gated"),
        pytest.param(USERS, steady(outcome="ServerError", failed=100), 1, False, id="not gated, and nothing answered"),
    ],
)
def test_exit_status_and_last_line_say_what_came_of_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: dict[str, Any],
    rows: list[Sample],
    status: int,
    passed: bool | None,
) -> None:
    assert run_bench(monkeypatch, tmp_path, stage, rows=rows) == status
    assert last_line(capsys)["passed"] is passed


def test_a_rate_tried_again_has_other_arrivals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def twice(measure: Measure, *_: float) -> float:
        for duration_s in (10, 10, 20):
            measure(10.0, duration_s)
        return 10.0

    monkeypatch.setattr(bench, "highest_rate", twice)
    stage = {"tool": "search", "name": "highest", "protocol": "grpc", "duration_s": 10, "probe_s": 10}
    assert run_bench(monkeypatch, tmp_path, stage, rows=steady()) == 0
    loads = [summary.load for summary in verdict.read_all(tmp_path / "out") if summary.load.loop == "open"]
    assert len({load.sent for load in loads}) == 3
    assert [load.level for load in loads] == pytest.approx([10, 10, 10], rel=0.001)


def test_a_rate_replaces_that_of_the_gated_open_loops_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_bench(monkeypatch, tmp_path, {**OPEN, "gate": True}, "--rate", "7.5", rows=steady())
    document = last_line(capsys)
    assert document["measurements"][0]["load"]["level"] == 7.5
    assert json.loads((tmp_path / "out" / verdict.RUN_FILE).read_text())["rate_per_s"] == 7.5


def test_a_rate_leaves_other_stages_alone_and_needs_a_gated_open_loop() -> None:
    stages = [{**OPEN, "gate": True}, {**OPEN, "name": "b"}, {**USERS, "gate": True}, {**STAGE, "tool": "search"}]
    changed = Profile.model_validate({"about": "", "stages": stages}).at_rate(3).stages
    assert [stage.rates_per_s for stage in changed if isinstance(stage, LoadStage)] == [[3], [10], None]
    with pytest.raises(ProfileError, match=r"rate 0\.001.*no request"):
        Profile.model_validate({"about": "", "stages": [{**OPEN, "gate": True}]}).at_rate(0.001)
    for rate_per_s, stage in ((3, OPEN), (0, {**OPEN, "gate": True}), (float("nan"), {**OPEN, "gate": True})):
        with pytest.raises(ProfileError, match="gated open loop"):
            Profile.model_validate({"about": "", "stages": [stage]}).at_rate(rate_per_s)


def test_a_missing_perf_analyzer_is_said_before_the_first_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.perf_analyzer, "find", lambda: None)
    assert run_bench(monkeypatch, tmp_path, {**STAGE, "tool": "perf_analyzer", "rates_per_s": [10]}, rows=[]) == 2
    assert "no perf_analyzer on the PATH" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir()), "nothing was measured"


@pytest.mark.parametrize(
    ("error", "status"), [(OSError("no counters"), 2), (bench.LoadError("no tool"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_run_that_did_not_end_still_ends_in_a_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(bench, "run", fail)
    assert bench.main([]) == status
    document = last_line(capsys)
    assert document["passed"] is None
    assert document["error"]


def test_a_results_folder_that_holds_something_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(monkeypatch, tmp_path, OPEN, rows=steady()) == 0
    assert run_bench(monkeypatch, tmp_path, OPEN, rows=steady()) == 2
    assert "not empty" in last_line(capsys)["error"]


@pytest.mark.parametrize(
    ("urls", "named", "runtime"),
    [
        (LOCAL, "auto", "meant"),
        (REMOTE, "auto", "auto, on the server"),
        (LOCAL, "openvino", "openvino"),
        (REMOTE, "openvino", "openvino"),
        (REMOTE, "", "python"),
    ],
)
def test_a_run_records_what_serves_and_whose_machine_it_describes(
    monkeypatch: pytest.MonkeyPatch, urls: Urls, named: str, runtime: str
) -> None:
    answering(monkeypatch, named)
    monkeypatch.setattr(bench.processes, "machine", lambda: {"cpu": "x", "runtime": "meant"})
    options = bench._parser().parse_args([])
    facts = bench.describe(options, Service(urls, None, started_here=False), [])
    assert facts["runtime"] == runtime
    assert facts["machine"] == {
        "of": "service and load generator" if urls is LOCAL else "load generator alone",
        "cpu": "x",
    }
    assert facts["classifier_instances"] == 2
    assert facts["versions"]["triton"] == "9.9"
    assert set(facts["checkout"]) == {"of", "commit", "dirty", "model_sha256"}
    assert facts["checkout"]["of"] == "load generator", "what was running already may be another build"


def test_another_machines_process_is_not_looked_for_on_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    listening = SimpleNamespace(status=psutil.CONN_LISTEN, laddr=SimpleNamespace(port=8000), pid=42)
    monkeypatch.setattr(psutil, "net_connections", lambda _: [listening])
    monkeypatch.setattr(psutil, "Process", lambda pid: SimpleNamespace(name=lambda: "tritonserver"))
    assert service._listening_process(LOCAL.http) == 42
    assert service._listening_process(REMOTE.http) is None


@pytest.mark.parametrize(
    ("metrics", "cached"),
    [
        ('nv_cache_num_hits_per_model{model="sentiment",version="1"} 0\nnv_cache_util_of_nothing 1', False),
        ('nv_cache_num_misses_per_model{model="sentiment",version="1"} 1', True),
        ("nv_cache_num_entries 0", True),
    ],
)
def test_a_cache_of_any_kind_is_told_from_none(metrics: str, cached: bool) -> None:
    assert triton_metrics.has_response_cache(metrics) is cached


def test_a_service_with_a_cache_is_refused_once_it_has_counted_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ask(reviews: Sequence[str]) -> list[Prediction]:
        asked.extend(reviews)
        return []

    monkeypatch.setattr(service.doors, "open_door", lambda *_: Door(ask, lambda: None))
    counter = 'nv_cache_num_misses_per_model{model="sentiment",version="1"}'
    monkeypatch.setattr(triton_metrics, "get", lambda _: f"{counter} {len(asked)}")
    with pytest.raises(ServiceError, match="has a response cache"), service.running(REMOTE, tmp_path / "log"):
        pass


def test_perf_analyzer_says_when_it_did_not_keep_up() -> None:
    said = "[WARNING] Perf Analyzer was not able to keep up with the desired request rate. 11.90% of the requests ..."
    assert perf_analyzer.keeping_up_warning(f"  Client:\n    {said} \n") == said
    assert perf_analyzer.keeping_up_warning("  Client:\n") == ""


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({**OPEN, "tool": "perf_analyzer"}, "perf_analyzer has no warm-up"),
        ({**STAGE, "users": [1]}, "warmup_s is missing"),
    ],
)
def test_a_warm_up_belongs_to_locust_which_needs_it(tmp_path: Path, stage: dict[str, Any], message: str) -> None:
    content = {"limits": LIMITS.model_dump(), "validity": VALIDITY.model_dump()}
    file = tmp_path / "profiles.yaml"
    file.write_text(json.dumps({**content, "profiles": {"try": {"about": "", "stages": [stage]}}}))
    with pytest.raises(ProfileError, match=message):
        profiles.load(file)


STEPS = [
    "classifier, version: 1",
    "Inference count: 24",
    "Execution count: 20",
    "Avg request latency: 5370 usec (overhead 4 usec + queue 120 usec + cache hit/miss 5246 usec)",
    "Average Cache Miss Latency: 5246 usec (cache lookup/insertion 0 usec + compute input 30 usec + compute infer 4588 "
    "usec + compute output 627 usec)",
    "tokenizer, version: 1",
    "Inference count: 24",
    "Execution count: 24",
    "Avg request latency: 1188 usec (overhead 4 usec + queue 91 usec + compute input 52 usec + compute infer 620 usec "
    "+ compute output 421 usec)",
]


def page(folder: Path, name: str, rows: Sequence[Sample], **more: Any) -> str:
    """Returns the report of one measurement of a run of the profile `name`."""
    finished = more.pop("finished", True)
    written(folder / "one", load(), rows, **more)
    (folder / verdict.RUN_FILE).write_text(json.dumps({"profile": name, "finished": finished}))
    return report.write(folder, profiles.load()).read_text()


def test_report_judges_nothing_that_was_not_gated_and_no_unknown_profile(tmp_path: Path) -> None:
    assert "<p class=unjudged>not judged" in page(tmp_path, "sweep", steady(0.3))
    unknown = page(tmp_path, "<gone>", steady(), gate=True)
    assert "<p class=unjudged>not judged" in unknown
    assert "<title>Load test &lt;gone&gt;</title>" in unknown
    assert "<p class=failed>failed" in page(tmp_path, "sweep", steady(outcome="ServerError", failed=50))


def test_report_does_not_pass_a_run_that_ended_early(tmp_path: Path) -> None:
    assert "<p class=passed>passed" in page(tmp_path, "slo", steady(), gate=True)
    early = page(tmp_path, "slo", steady(), gate=True, finished=False)
    assert "<p class=unjudged>not judged" in early
    assert "ended before its profile did" in early


def test_report_shows_requests_kinds_of_failures_and_perf_analyzers_steps(tmp_path: Path) -> None:
    shown = page(tmp_path, "sweep", steady(outcome="ServerError", failed=2), perf_analyzer={"composing_models": STEPS})
    assert "<td>100</td>" in shown
    assert "<td>2.00 % (ServerError 2)</td>" in shown
    assert "<td>50.0 (max)</td>" in shown
    for step in (("classifier", 24, 20, 0.1, 0.0, 4.6, 0.6), ("tokenizer", 24, 24, 0.1, 0.1, 0.6, 0.4)):
        assert "".join(f"<td>{cell}</td>" for cell in step) in shown


@pytest.mark.parametrize(("share", "shown"), [(-0.001, "0%"), (0.874, "87%"), (-0.02, "-2%")])
def test_no_share_is_minus_nothing(share: float, shown: str) -> None:
    assert report._percent(share) == shown


def test_plots_leave_the_warm_up_out_and_keep_durations_and_searches_apart(tmp_path: Path) -> None:
    rows = [Sample(n / 10, n / 10, n / 10 + (9 if n < 20 else 0.05), 1, OK) for n in range(100)]
    summary = summarise(written(tmp_path / "one", load(), rows, start_s=2.0))
    assert figures.window_latency_ms(summary, tmp_path).max() == pytest.approx(50)
    runs = [
        measured(tmp_path, steady(), f"run-{number}", duration_s=duration_s, probe=probe)
        for number, (duration_s, probe) in enumerate([(30, False), (60, False), (30, False), (20, True), (43, True)])
    ]
    found = {name: len(alike) for name, alike in figures.open_loops(runs).items()}
    assert found == {"locust 30 s": 2, "locust 60 s": 1, "search": 2}


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([1, 7, 2], [1, 8, 2], "id 7 served, 8 expected at position 1 (3 ids served, 3 expected)"),
        ([1, 7], [1, 7, 2], "id none served, 2 expected at position 2 (2 ids served, 3 expected)"),
    ],
)
def test_token_parity_names_the_first_id_that_differs(ours: list[int], theirs: list[int], said: str) -> None:
    assert first_difference(ours, theirs) == said


def test_what_listens_in_the_services_place_is_not_measured_for_it() -> None:
    """As a tunnel to another machine would: its memory says nothing about the service."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert service._listening_process(f"http://127.0.0.1:{listener.getsockname()[1]}") is None


def test_no_service_is_started_if_that_is_ruled_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert bench.main(["--no-start", "--http-url", f"http://127.0.0.1:{port}", "--out", str(tmp_path / "out")]) == 2
    assert "--no-start came" in last_line(capsys)["error"]


def test_no_reviews_at_all_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--reviews", "0", "--out", str(tmp_path / "out")]) == 2
    assert "expected at least 1: raise --reviews" in last_line(capsys)["error"]
