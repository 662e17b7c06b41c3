"""The comparison's arithmetic, plan and report, on raw files made here; no server of this project runs."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from benchmarks.compare import cpu, measure, results, table
from benchmarks.compare.__main__ import figures
from benchmarks.compare.doors import fill
from benchmarks.compare.load import arrivals
from benchmarks.compare.plan import DEFAULT, QUICK, Plan
from benchmarks.compare.results import Comparison, Spread
from benchmarks.compare.systems import SYSTEMS, TEXT, chosen, default_machine
from benchmarks.peers.served import CLASSIFIER_CONFIG, lone_threads, served_layout
from benchmarks.samples import OK, Sample
from benchmarks.samples import write as write_samples

WINDOW_S = 10.0


@pytest.mark.parametrize(("plan", "limit_minutes"), [(DEFAULT, 50), (QUICK, 6)])
def test_plan_keeps_its_documented_duration(plan: Plan, limit_minutes: float) -> None:
    assert plan.minutes(len(SYSTEMS)) <= limit_minutes


def test_default_plan_has_the_rounds_that_a_spread_needs() -> None:
    assert DEFAULT.rounds >= 3


@given(highest=st.floats(min_value=0, max_value=1.5))
def test_bisection_finds_the_highest_step_that_holds(highest: float) -> None:
    tried: list[float] = []

    def holds(share: float) -> bool:
        tried.append(share)
        return share <= highest

    expected = max((share for share in DEFAULT.ladder if share <= highest), default=0.0)
    assert measure.highest(DEFAULT.ladder, holds) == expected
    assert len(tried) <= DEFAULT.probes


@pytest.mark.parametrize(
    ("rate_per_s", "window_s"),
    [
        pytest.param(50.0, 8.0, id="fast"),
        pytest.param(10.0, 20.0, id="as-many-requests"),
        pytest.param(1.0, 60.0, id="slow"),
    ],
)
def test_slow_systems_are_judged_by_as_many_requests_in_bounded_time(rate_per_s: float, window_s: float) -> None:
    assert DEFAULT.probe_window_s(rate_per_s) == window_s


def test_ratio_is_taken_round_by_round_and_infinite_over_nothing() -> None:
    ratio = Spread((10.0, 12.0, 9.0)).over(Spread((5.0, 4.0, 0.0)))
    assert ratio.values == (2.0, 3.0, float("inf"))
    assert (ratio.median, ratio.lowest) == (3.0, 2.0)


def test_an_aim_over_nothing_is_not_reached_with_nothing() -> None:
    ratio = Spread((0.0, 0.0)).over(Spread((0.0, 0.0)))
    assert not table.Aim("sustained rate", ratio, 6, at_least=True).holds


def test_arrivals_are_the_rounds_and_the_rates_and_as_many_as_that_says() -> None:
    times = arrivals(rate_per_s=50, warmup_s=10, window_s=100, seed=3)
    assert times == arrivals(rate_per_s=50, warmup_s=10, window_s=100, seed=3)
    assert times == sorted(times)
    assert [sum(at < 10 for at in times), sum(at >= 10 for at in times)] == [500, 5000]
    assert not np.allclose(np.array(arrivals(rate_per_s=25, warmup_s=20, window_s=200, seed=3)), 2 * np.array(times))


def test_a_peer_that_misses_a_round_leaves_the_others_theirs() -> None:
    whole, short = (SimpleNamespace(sustained_at_most_per_s=Spread(rates)) for rates in ((3.0, 4.0, 5.0), (6.0,)))
    assert table.best([whole, short]).values == (6.0, 4.0, 5.0)


def test_review_takes_its_place_in_any_body() -> None:
    assert fill({"a": [TEXT, 1], "b": {"c": TEXT}}, "fine") == {"a": ["fine", 1], "b": {"c": "fine"}}


def test_cpu_share_is_that_of_the_processes_so_named() -> None:
    spent = cpu.difference({"1 tritonserver": 2.0}, {"1 tritonserver": 3.0, "7 tokenizer": 1.0, "8 classifier": 6.0})
    assert cpu.share(spent, "tokenizer") == pytest.approx(1 / 8)


def test_layout_of_the_service_is_read_from_its_configuration(tmp_path: Path) -> None:
    assert min(served_layout()) >= 1
    config = text_format.Parse(CLASSIFIER_CONFIG.read_text(), model_config_pb2.ModelConfig())
    del config.instance_group[:]
    for count in (1, 3):
        config.instance_group.add(count=count)
    config.parameters["num_threads"].string_value = "2"
    (tmp_path / "config.pbtxt").write_text(str(config))
    assert served_layout(tmp_path / "config.pbtxt") == (4, 2)
    (tmp_path / "config.pbtxt").write_text('name: "classifier"\n')
    with pytest.raises(ValueError, match="num_threads"):
        served_layout(tmp_path / "config.pbtxt")


@pytest.mark.parametrize(("runtime", "expected"), [("openvino", 1), ("onnxruntime", 2)])
def test_lone_reviews_are_compared_with_the_threads_that_serve_them(
    tmp_path: Path, runtime: str, expected: int
) -> None:
    config = text_format.Parse(CLASSIFIER_CONFIG.read_text(), model_config_pb2.ModelConfig())
    config.parameters["runtime"].string_value = runtime
    (tmp_path / "config.pbtxt").write_text(str(config))
    assert lone_threads(tmp_path / "config.pbtxt") == expected


def test_unknown_system_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown system 'torchserve'.*litserve-torch"):
        chosen(["torchserve"])


def test_missing_checkpoint_and_environment_say_what_to_run(tmp_path: Path) -> None:
    machine = default_machine(2)
    python = tmp_path / "litserve" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    here = replace(machine, peers=tmp_path / "PEER", checkpoint=tmp_path / "nothing")
    torch, ray, same = chosen(["litserve-torch", "ray-torch", "litserve-shipped"])
    assert "python -m export.checkpoint" in here.missing(torch)
    assert here.missing(same) == ""
    assert "make .venv-peer-ray/.ready" in here.missing(ray)


def test_torch_drops_tokens_where_the_checkpoint_does(tmp_path: Path) -> None:
    for name in ("model.safetensors", "fastapi/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    here = replace(default_machine(2), peers=tmp_path / "PEER", checkpoint=tmp_path)
    keeping, dropping = chosen(["fastapi-torch", "fastapi-torch-dropping"])
    for percent in ([], [100, 50]):
        (tmp_path / "config.json").write_text(json.dumps({"kept_percent": percent}))
        assert here.missing(keeping) == ""
        assert ("drops no tokens" in here.missing(dropping)) == (not percent)


def test_batching_peers_share_the_cores_among_their_workers(tmp_path: Path) -> None:
    machine = replace(default_machine(4), peer_workers=2)
    one_by_one, batching = (machine.environ(s, (1, 2, 3), tmp_path) for s in chosen(["fastapi-torch", "ray-torch"]))
    assert (one_by_one["PEER_WORKERS"], one_by_one["PEER_THREADS"]) == ("1", "4")
    assert (batching["PEER_WORKERS"], batching["PEER_THREADS"]) == ("2", "2")


def test_answers_across_an_edge_of_the_window_count_by_their_part_in_it(tmp_path: Path) -> None:
    samples = [Sample(sent_s, sent_s, sent_s + 4.0, 1, OK) for sent_s in (-2.0, 1.0, 5.0, 9.0)]
    write_samples(tmp_path / "load.csv.gz", samples, 0.0)
    _write(tmp_path / "load.json", {"complete": True, "window_s": [0.0, 10.0]})
    assert measure.summarise(tmp_path / "load").right_per_s == pytest.approx((0.5 + 1 + 1 + 0.25) / 10)


def test_report_shows_ratios_aims_and_what_is_missing(comparison: Comparison) -> None:
    report = table.markdown(comparison)
    assert "| LitServe, batching | torch | 10.0 (10.0..10.0) | 5.0 (5.0..5.0) | 4.00 (4.00..4.00) |" in report
    assert "the best batching peer with torch | 4.000 (4.000..4.000) | at least 2 | yes |" in report
    assert (
        "saturated throughput, this service, HTTP, over the ceiling | 0.800 (0.800..0.800) | at least 0.85 | **no**"
        in (report)
    )
    assert "p50 at concurrency 1 less 1.15 x in process, this service, HTTP | 0.350" in report
    assert "| 20 | 2.00 (2.00..2.00) | 4.00 (4.00..4.00) |" in report
    assert "| this service, HTTP | 3.50 (3.50..3.50) | 0.020 (0.020..0.020) | 0.20 (0.20..0.20) |" in report
    assert "- ray-torch: no environment" in report


def test_a_peer_that_does_not_batch_is_not_what_the_same_engine_is_measured_by(comparison: Comparison) -> None:
    peer = comparison.systems["litserve-torch"]
    names = ["litserve-shipped", "fastapi-shipped"]
    ten, forty = (
        replace(peer, name=name, engine="shipped", sustained_at_most_per_s=Spread((per_s,) * 2))
        for name, per_s in zip(names, (10.0, 40.0), strict=True)
    )
    both = replace(comparison, systems={**comparison.systems, ten.name: ten, forty.name: forty})
    assert "the best batching peer with the same engine | 2.000 (2.000..2.000) | at least 1 | yes" in table.markdown(
        both
    )


def test_the_pipeline_is_an_aim_with_all_tokens_and_with_those_that_are_served(comparison: Comparison) -> None:
    peer = comparison.systems["litserve-torch"]
    keeping, dropping = (
        replace(peer, name=name, title=name, engine=engine, sustained_at_most_per_s=Spread((per_s,) * 2))
        for name, engine, per_s in (
            ("fastapi-torch", "torch", 2.0),
            ("fastapi-torch-dropping", "torch-dropping", 4.0),
        )
    )
    both = replace(comparison, systems={**comparison.systems, keeping.name: keeping, dropping.name: dropping})
    report = table.markdown(both)
    assert "HTTP, over fastapi-torch | 10.000 (10.000..10.000) | at least 6 | yes" in report
    assert "HTTP, over fastapi-torch-dropping | 5.000 (5.000..5.000) | at least 6 | **no**" in report
    assert "the best batching peer with torch | 4.000" in report, "as before: neither merges reviews"


def test_a_folder_that_is_no_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run.json, expected a results folder of `make bench-compare`"):
        results.read(tmp_path)


def test_padding_and_tokenizer_shares_come_from_the_saturated_window(comparison: Comparison) -> None:
    service = comparison.systems["service"]
    assert service.padding_share.values == pytest.approx((0.02, 0.02))
    assert service.tokenizer_share.values == pytest.approx((0.05, 0.05))
    assert service.generator_cores.values == pytest.approx((0.3, 0.3))


def test_each_layout_contends_for_the_ceiling_with_its_fastest_grouping() -> None:
    rates = [("1 x 2", "one by one", 46.7), ("1 x 2", "512 tokens", 38.2), ("2 x 1", "512 tokens", 45.8)]
    candidates = [{"layout": layout, "grouping": grouping, "reviews_per_s": rate} for layout, grouping, rate in rates]
    chosen_ones = measure.fastest_of_each_layout(candidates)
    assert {(one["layout"], one["grouping"]) for one in chosen_ones} == {
        ("1 x 2", "one by one"),
        ("2 x 1", "512 tokens"),
    }


def test_an_interrupted_round_without_its_last_ceiling_is_left_out(comparison: Comparison, tmp_path: Path) -> None:
    assert comparison.systems["service"].ceiling_per_s.values == (50.0, 50.0)
    (tmp_path / "round-2" / "service.ceiling-2.json").unlink()
    interrupted = results.read(tmp_path).systems["service"]
    assert interrupted.ceiling_per_s.values == (50.0,)
    assert len(interrupted.saturated_per_s.values) == len(interrupted.lone_p50_ms.values) == 1


def test_saturation_and_its_ceiling_are_the_means_of_their_turns(comparison: Comparison, tmp_path: Path) -> None:
    run = comparison.run
    _write(tmp_path / "run.json", {**run, "plan": {**run["plan"], "turns": 2}})
    for folder in (tmp_path / "round-1", tmp_path / "round-2"):
        _load(folder / "service.saturated-turn-2", 20, latency_s=1.0, complete=True)
        _write(folder / "service.ceiling-3.json", [{"reviews_per_s": 18.0}, {"reviews_per_s": 20.0}])
    service = results.read(tmp_path).systems["service"]
    assert service.saturated_per_s.values == pytest.approx((30.0, 30.0))
    assert service.ceiling_per_s.values == pytest.approx((40.0, 40.0)), "the layout that is faster over all turns"
    assert service.generator_cores.values == pytest.approx((0.3, 0.3))
    (tmp_path / "round-2" / "service.ceiling-3.json").unlink()
    assert len(results.read(tmp_path).systems["service"].saturated_per_s.values) == 1


def test_a_round_whose_search_was_cut_off_does_not_count_as_a_rate_of_nothing(
    comparison: Comparison, tmp_path: Path
) -> None:
    run = json.loads((tmp_path / "run.json").read_text())
    run["plan"]["ladder"] = [0.5, 0.8]
    _write(tmp_path / "run.json", run)
    assert len(results.read(tmp_path).systems["litserve-torch"].sustained_per_s.values) == 2
    for file in (tmp_path / "round-2").glob("litserve-torch.open-*"):
        file.unlink()
    assert results.read(tmp_path).systems["litserve-torch"].sustained_per_s.values == (5.0,)
    for file in (tmp_path / "round-1").glob("litserve-torch.open-*"):
        file.unlink()
    assert "litserve-torch" not in results.read(tmp_path).systems


def test_over_a_peer_that_held_no_rate_ratios_take_the_lowest_that_was_tried(
    comparison: Comparison, tmp_path: Path
) -> None:
    run = json.loads((tmp_path / "run.json").read_text())
    run["plan"]["ladder"] = [0.25, 0.5, 0.8]
    _write(tmp_path / "run.json", run)
    for folder in tmp_path.glob("round-*"):
        for share in (25, 50):
            _load(folder / f"litserve-torch.open-{share:03d}", 2, latency_s=0.1, complete=False)
        _load(folder / "service.open-025", 10, latency_s=0.1, complete=True)
    peer = results.read(tmp_path).systems["litserve-torch"]
    assert peer.sustained_per_s.values == (0.0, 0.0)
    assert peer.sustained_at_most_per_s.values == pytest.approx((2.5, 2.5))
    report = table.markdown(results.read(tmp_path))
    assert "the best batching peer with torch | 8.000 (8.000..8.000) | at least 2 | yes |" in report
    assert "0 where the lowest, 25% of what saturates, did not hold" in report


def test_what_tokens_cost_comes_from_saturation_with_one_length_at_a_time(comparison: Comparison) -> None:
    (cost,) = (
        aim for aim in table.aims(comparison) if "saturated, this service" in aim.what and "core time" in aim.what
    )
    assert cost.found.values == pytest.approx((0.1, 0.1), rel=0.02)
    assert cost.holds


def test_wrong_answers_are_told_from_other_failures(comparison: Comparison) -> None:
    peer = comparison.systems["litserve-torch"]
    assert peer.wrong == 2
    assert peer.failures == {"TimeoutError": 2}


def test_figures_are_json_that_any_parser_reads(comparison: Comparison) -> None:
    text = json.dumps(figures(comparison), allow_nan=False)
    assert json.loads(text)["systems"]["service"]["sustained_per_s"] == [20.0, 20.0]


@pytest.mark.parametrize("draw", ["draw", "draw_tokens"])
def test_chart_is_a_png(comparison: Comparison, tmp_path: Path, draw: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks.compare import chart

    getattr(chart, draw)(comparison, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_time_of_one_review_is_a_share_of_what_was_measured_in_the_same_round(comparison: Comparison) -> None:
    found = {aim.what: aim for aim in table.aims(comparison)}
    assert found["time of 20 tokens over 256, one at a time, in process"].found.values == (0.1, 0.1)
    served = found["time of 20 tokens over 256, one at a time, this service, HTTP"]
    assert served.found.values == pytest.approx((0.2, 0.2))
    assert not served.holds


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Two rounds of the service (40 reviews/s, 20 sustained) and of a peer (10 and 5), ceiling 50."""
    systems = chosen(["service", "litserve-torch"])
    run = {
        "date": "2026-01-02",
        "command": "x",
        "cpu": "a CPU",
        "threads": 2,
        "plan": {"reviews": 8, "rounds": 2, "users": 4},
        "systems": [
            {"name": s.name, "title": s.title, "engine": s.engine, "is_service": s.is_service} for s in systems
        ],
        "skipped": {"ray-torch": "no environment"},
    }
    _write(tmp_path / "run.json", run)
    candidate = {"layout": "1 x 2", "grouping": "one by one", "reviews_per_s": 50.0, "tokens_per_s": 1.0}
    _write(tmp_path / "candidates.json", [candidate])
    _write(tmp_path / "lengths.json", [{"tokens": n, "text": ""} for n in (20, 256)])
    for folder in (tmp_path / "round-1", tmp_path / "round-2"):
        folder.mkdir()
        _write(folder / "service.ceiling-1.json", [{"reviews_per_s": 55.0}, {"reviews_per_s": 48.0}])
        _write(folder / "service.ceiling-2.json", [{"reviews_per_s": 41.0}, {"reviews_per_s": 52.0}])
        for name, per_s, sustained_per_s in (("service", 40, 20), ("litserve-torch", 10, 5)):
            _load(folder / f"{name}.saturated", per_s, latency_s=1.0, complete=True)
            _load(folder / f"{name}.open-050", sustained_per_s, latency_s=0.1, complete=True)
            _load(folder / f"{name}.open-080", 2 * sustained_per_s, latency_s=0.1, complete=False)
        _load(folder / "service.saturated-20", 400, latency_s=0.1, complete=True)
        _load(folder / "service.saturated-256", 40, latency_s=0.1, complete=True)
        _load(folder / "service.lone", 50, latency_s=0.013, complete=True, in_process_s=[0.009, 0.011, 0.020])
        curve = [Sample(at, at, at + latency_s, 1, OK) for at, latency_s in enumerate((0.004, 0.020, 0.004, 0.020))]
        _load(folder / "service.curve", 0, 0.0, complete=True, extra=curve, in_process_s=[0.002, 0.020, 0.002, 0.020])
        failed = [Sample(-2.0, -2.0, -1.0, 1, outcome) for outcome in ("wrong answer", "TimeoutError")]
        _load(folder / "litserve-torch.open-090", 1, latency_s=0.3, complete=True, extra=failed)
    return results.read(tmp_path)


def _counters(times: int) -> dict[str, object]:
    """Triton's counters after so many times of 7 reviews in 2 executions, 98 tokens and 2 of padding, in 100 us."""
    counters = {
        "nv_inference_request_success{sentiment}": 7,
        "nv_inference_request_duration_us{sentiment}": 100,
        "nv_inference_queue_duration_us{classifier}": 20,
        "nv_inference_compute_infer_duration_us{tokenizer}": 10,
        "nv_inference_compute_infer_duration_us{classifier}": 60,
        "nv_inference_count{classifier}": 7,
        "nv_inference_exec_count{classifier}": 2,
        'sentiment_classifier_tokens{kind="review"}': 98,
        'sentiment_classifier_tokens{kind="padding"}': 2,
    }
    return {"counters": {name: value * times for name, value in counters.items()}, "batches": {}}


def _write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value))


def _load(
    out: Path,
    per_s: int,
    latency_s: float,
    complete: bool,
    extra: list[Sample] | None = None,
    in_process_s: list[float] | None = None,
) -> None:
    """Writes a load of `per_s` requests a second, due and answered at even distances."""
    due_s = [(place + 0.5) / per_s for place in range(int(per_s * (WINDOW_S + latency_s)))]
    samples = [Sample(t - latency_s, t - latency_s, t, 1, OK) for t in due_s]
    write_samples(out.with_name(out.name + ".csv.gz"), [*samples, *(extra or [])], 0.0)
    record = {
        "complete": complete,
        "window_s": [0.0, WINDOW_S],
        "wall_s": WINDOW_S,
        "generator_cpu_s": 3.0,
        "server_cpu_s": {"1 tritonserver": 2.0, "2 tokenizer": 1.0, "3 classifier": 17.0},
        "triton": {"before": _counters(0), "after": _counters(1)} if out.name.startswith("service.") else None,
        "in_process_s": in_process_s,
    }
    _write(out.with_name(out.name + ".json"), record)
