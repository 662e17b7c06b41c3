"""The model of capacity, against a queue that is simulated here event by event, in another way. No server runs."""

import heapq
import json
import math
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import capacity, capacity_fit, capacity_model, capacity_plan, samples, texts, verdict
from benchmarks.capacity_model import Floats, Measured, Requests, Service
from benchmarks.profiles import Load
from benchmarks.samples import OK, Sample
from export.repository import REPOSITORY, TOKENIZER_FILE

TRUE = Service(per_token_s=1.1e-4, noise=0.0, elsewhere_s=0.003, instances=2, max_merged=4)
"""The replica that the raw files come from."""
TRUE_NOISE = 0.2
REVIEWS = 64
WINDOW_S = 60.0
WARMUP_S = 5.0
PER_USER_PER_S = 35.0
MOST_USERS = 8
SOME_LENGTHS = np.array([40.0, 120.0, 256.0, 256.0])


def reference(arrivals_s: list[float], work_s: list[float], servers: int, most: int) -> list[float]:
    """Returns when each request is answered, one event after the other: a request comes, or an instance is free.

    First come, first served; an instance takes up to `most` of those that wait and answers each when its own work is
    done.
    """
    events = sorted((at, 0, index) for index, at in enumerate(arrivals_s))
    waiting: list[int] = []
    idle = servers
    done = [0.0] * len(arrivals_s)
    while events:
        now, is_end, index = events.pop(0)
        if is_end:
            idle += 1
        else:
            waiting.append(index)
        while idle and waiting:
            taken, waiting = waiting[:most], waiting[most:]
            idle -= 1
            finished = now
            for one in taken:
                finished += work_s[one]
                done[one] = finished
            events = sorted([*events, (finished, 1, -1)])
    return done


@pytest.mark.parametrize("most", [1, 4, 10_000])
@pytest.mark.parametrize("load", [0.3, 0.97])
def test_simulation_is_the_queue_event_by_event(most: int, load: float) -> None:
    service = Service(per_token_s=1e-4, noise=0.0, elsewhere_s=0.5, instances=2, max_merged=most)
    rate = load * service.saturated_per_s(float(SOME_LENGTHS.mean()))
    requests = capacity_model.draw(lambda at: np.full_like(at, rate), rate, 400 / rate, SOME_LENGTHS, 3)
    expected = reference(requests.arrivals_s.tolist(), (requests.tokens * 1e-4).tolist(), 2, most)
    found = capacity_model.serve(service, requests) + requests.arrivals_s - 0.5
    np.testing.assert_allclose(found, expected)


def in_python(service: Service, requests: Requests) -> list[float]:
    """Returns what `serve` returns, its rules written once more and run by Python."""
    scale, lasts_s = service.noise, service.noise_lasts_s
    mean = math.gamma(1 + scale) if lasts_s else 1 / math.gamma(1 - scale)
    noise = [math.exp(scale * luck) * mean for luck in requests.luck]
    came, free = requests.arrivals_s.tolist(), [0.0] * service.instances
    done: list[float] = []
    all_taken_until = 0.0
    while len(done) < len(came):
        first = len(done)
        taken = max(heapq.heappop(free), came[first])
        begin = max(taken, all_taken_until)
        slow = noise[int(begin / lasts_s) % len(came)] if lasts_s else noise[first]
        slow *= service.paces[(requests.first_pace + int(begin / capacity_model.PACE_LASTS_S)) % len(service.paces)]
        most = service.max_merged if service.alone is None else 1
        waiting = [at for at in came[first : first + most] if at <= taken]
        works = [tokens * service.per_token_s * slow for tokens in requests.tokens[first : first + len(waiting)]]
        has_company = first + 1 < len(came) and came[first + 1] <= taken
        if service.alone is not None and not has_company and begin == taken and all(at <= taken for at in free):
            works = [work * service.alone for work in works]
            all_taken_until = begin + works[0]
        done += [begin + total for total in accumulate(works)]
        heapq.heappush(free, done[-1])
    return [end - at + service.elsewhere_s for end, at in zip(done, came, strict=True)]


@pytest.mark.parametrize("alone", [None, 0.6])
@pytest.mark.parametrize("lasts_s", [0.0, 0.3])
@pytest.mark.parametrize(("instances", "paces"), [(1, (1.0,)), (2, (0.9, 1.3)), (3, (0.8, 1.0, 1.4))])
def test_compiled_or_not_the_replica_is_the_same(
    alone: float | None, lasts_s: float, instances: int, paces: tuple[float, ...]
) -> None:
    service = Service(1e-4, 0.15, 0.004, alone, instances, lasts_s, max_merged=4, paces=paces)
    rate = 0.8 * service.saturated_per_s(float(SOME_LENGTHS.mean()))
    requests = capacity_model.draw(lambda at: np.full_like(at, rate), rate, 2000 / rate, SOME_LENGTHS, instances)
    found = capacity_model.serve(service, requests)
    np.testing.assert_allclose(found, in_python(service, requests))


def test_a_machine_of_two_paces_takes_turns() -> None:
    service = Service(per_token_s=0.01, noise=0.0, elsewhere_s=0.0, max_merged=1, paces=(1.0, 1.5))
    came = np.array([1.0, 61.0, 121.0])
    requests = Requests(came, np.full(3, 100.0), np.zeros(3))
    np.testing.assert_allclose(capacity_model.serve(service, requests), [1.0, 1.5, 1.0])
    np.testing.assert_allclose(capacity_model.serve(service, requests._replace(first_pace=3)), [1.5, 1.0, 1.5])


def test_a_review_that_comes_alone_is_done_sooner_and_who_comes_meanwhile_waits() -> None:
    service = Service(per_token_s=0.01, noise=0.0, elsewhere_s=0.0, alone=0.6, instances=2, max_merged=4)
    came = np.array([0.0, 0.2, 0.3, 5.0, 5.61, 5.62, 5.63])
    requests = Requests(came, np.full(came.size, 100.0), np.zeros(came.size))
    done = capacity_model.serve(service, requests) + came
    # alone; the next two wait for it and have an instance each; alone twice; the last two wait as those did
    np.testing.assert_allclose(done, [0.6, 1.6, 1.6, 5.6, 6.21, 7.21, 7.21])


def test_reviews_that_may_run_alone_cost_a_busy_server_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together = Service(per_token_s=1e-4, noise=0.0, elsewhere_s=0.0, instances=2, max_merged=4)
    alone = replace(together, alone=0.6)
    rate = 0.97 * together.saturated_per_s(float(SOME_LENGTHS.mean()))
    low, high = (
        [capacity_model.percentiles_ms(service, at, SOME_LENGTHS)[0] for service in (together, alone)]
        for at in (0.1 * rate, rate)
    )
    assert low[1] < 0.7 * low[0]
    assert high[1] == pytest.approx(high[0], rel=0.2)


@pytest.mark.parametrize("lasts_s", [0.0, 1.0])
def test_noise_leaves_the_throughput_of_busy_instances(lasts_s: float) -> None:
    service = Service(1e-4, noise=0.2, elsewhere_s=0.0, instances=2, noise_lasts_s=lasts_s, max_merged=4)
    count = 40_000
    requests = Requests(np.zeros(count), np.full(count, 200.0), np.random.default_rng(0).gumbel(size=count))
    assert count / capacity_model.serve(service, requests).max() == pytest.approx(
        service.saturated_per_s(200), rel=0.05
    )


def test_highest_rate_follows_what_a_replica_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity_model, "_LONG_SAMPLE", 50_000)

    def highest(**changes: Any) -> float:
        service = Service(**{"per_token_s": 2e-4, "noise": 0.1, "elsewhere_s": 0.004, "instances": 2, **changes})
        return capacity_model.highest_rate(service, 200, SOME_LENGTHS)

    usual = highest(max_merged=4)
    assert highest(max_merged=64) < usual * 0.97  # one instance takes all that waits, the other has nothing to do
    assert highest(max_merged=4, instances=1) < usual / 2
    assert highest(max_merged=4, per_token_s=3e-4) < usual / 1.5
    assert highest(max_merged=4, noise=0.3) < usual * 0.97
    assert highest(max_merged=4, paces=(0.8, 1.2)) < usual * 0.97


def test_scalability_recovers_the_law_it_was_made_with() -> None:
    law = capacity_model.Scalability(30, 0.3, 0.001)
    users = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    found = capacity_model.fit_scalability(users, [float(law.throughput(n)) for n in users])
    assert found.contention == pytest.approx(0.3, rel=0.01)
    assert found.coherence == pytest.approx(0.001, rel=0.05)
    with pytest.raises(ValueError, match="at least 3"):
        capacity_model.fit_scalability([1, 1, 2], [1, 1, 2])


def contention(lengths: Floats) -> float:
    """Returns the contention with which `MOST_USERS` get exactly what the instances of `TRUE` can do."""
    saturated_per_s = TRUE.saturated_per_s(float(lengths.mean()))
    return (PER_USER_PER_S * MOST_USERS / saturated_per_s - 1) / (MOST_USERS - 1)


@pytest.fixture(scope="module")
def lengths() -> Floats:
    if not (REPOSITORY / TOKENIZER_FILE).exists():
        pytest.skip("no model is installed in this checkout: make export")
    return capacity_fit.lengths_sent({"data": "generated", "reviews": REVIEWS, "seed": texts.DEFAULT_SEED})


def open_loop(rate_per_s: float, lengths: Floats, seed: int) -> list[Sample]:
    """Returns the samples of Poisson arrivals at the replica `TRUE`, with noise, by the reference."""
    random = np.random.default_rng(seed)
    arrivals = random.exponential(1 / rate_per_s, int(rate_per_s * (WARMUP_S + WINDOW_S))).cumsum().tolist()
    noise = np.exp(random.normal(0, TRUE_NOISE, len(arrivals)))
    sent = random.integers(lengths.size, size=len(arrivals))
    done = reference(arrivals, (lengths[sent] * TRUE.per_token_s * noise).tolist(), TRUE.instances, TRUE.max_merged)
    rows = zip(arrivals, done, sent.tolist(), strict=True)
    return [Sample(at, at, end + TRUE.elsewhere_s, 1, OK, text) for at, end, text in rows]


@pytest.fixture(scope="module")
def sweep(lengths: Floats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with seven rates and four numbers of users of the replica `TRUE`, the highest among them."""
    folder = tmp_path_factory.mktemp("sweep")
    highest = 64.0
    for rate in (10.0, 20.0, 30.0, 40.0, 50.0, highest, 75.0):
        write(folder, f"rates-{rate:g}", "open", rate, open_loop(rate, lengths, int(rate)), float(lengths.mean()))
    law = capacity_model.Scalability(PER_USER_PER_S, contention(lengths), 0.0)
    for users in (1, 2, 4, MOST_USERS):
        took = users / float(law.throughput(users))
        times = np.arange(0, WARMUP_S + WINDOW_S, took)
        rows = [Sample(at, at, at + took, 1, OK) for at in times for _ in range(users)]
        write(folder, f"users-{users}", "closed", users, rows, float(lengths.mean()))
    facts = {
        "profile": "sweep",
        "texts": {"data": "generated", "reviews": REVIEWS, "seed": texts.DEFAULT_SEED},
        "classifier_instances": TRUE.instances,
        "highest_rate_per_s": {"highest-one-review": highest},
    }
    (folder / verdict.RUN_FILE).write_text(json.dumps(facts))
    return folder


def write(folder: Path, name: str, loop: str, level: float, rows: list[Sample], mean_tokens: float) -> None:
    """Writes one measurement; Triton's counters say that executions held one review, at most `TRUE.max_merged`."""
    samples.write(folder / f"{name}.csv.gz", rows, 0.0)
    took_us = len(rows) * TRUE.per_token_s * mean_tokens * 1e6
    counters: dict[str, float] = {
        "nv_inference_request_success{sentiment}": len(rows),
        "nv_inference_request_duration_us{sentiment}": took_us,
    }
    for step in ("tokenizer", "classifier"):
        counters |= {f"nv_inference_count{{{step}}}": len(rows), f"nv_inference_exec_count{{{step}}}": len(rows)}
    counters["nv_inference_compute_infer_duration_us{classifier}"] = took_us
    batches = {step: {"1": len(rows), str(TRUE.max_merged): 1} for step in ("tokenizer", "classifier")}
    load = {"tool": "locust", "protocol": "grpc", "loop": loop, "level": level}
    raw = {
        "load": Load.model_validate({**load, "warmup_s": WARMUP_S, "duration_s": WINDOW_S}).model_dump(),
        "gate": False,
        "window_s": [WARMUP_S, WARMUP_S + WINDOW_S],
        "generator": {"cpu_s": 1.0, "wall_s": WINDOW_S},
        "triton": {
            "before": {"counters": dict.fromkeys(counters, 0.0), "batches": {}},
            "after": {"counters": counters, "batches": batches},
        },
    }
    (folder / f"{name}.json").write_text(json.dumps(raw))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coarser fit and shorter simulations."""
    monkeypatch.setattr(capacity_model, "_NOISE", [0.0, 0.07, 0.14, 0.21])
    monkeypatch.setattr(capacity_model, "_LASTING_S", (0.0, 1.0))
    monkeypatch.setattr(capacity_model, "_PACES", np.geomspace(0.8, 1.3, 5))
    monkeypatch.setattr(capacity_model, "_LONG_SAMPLE", 30_000)
    monkeypatch.setattr(capacity_model, "_LONG_S", 0.0)
    monkeypatch.setattr(capacity_plan, "_REQUESTS", 100_000)


def test_capacity_finds_the_replica_that_made_the_files(
    sweep: Path, lengths: Floats, fast: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert capacity.main(["--rate", "1000", "--results", str(sweep)]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    predicted = document["highest_rate_per_s"]["predicted"]
    sent = [sample for seed in range(5) for sample in open_loop(predicted, lengths, seed)]
    p99_ms = np.percentile([1000 * (sample.done_s - sample.scheduled_s) for sample in sent], 99)
    assert p99_ms == pytest.approx(200, rel=0.3)  # by the reference; steep there: 10 % of the rate are half of it
    measured = document["highest_rate_per_s"]["measured"]
    assert measured["low_per_s"] <= measured["rate_per_s"] <= measured["high_per_s"]
    assert predicted == pytest.approx(measured["rate_per_s"], rel=0.1)
    assert document["service"]["max_merged"] == TRUE.max_merged
    assert document["replicas"] == int(np.ceil(1000 / predicted))
    assert document["replicas_one_failed"] == document["replicas"] + 1
    assert document["scalability"]["contention"] == pytest.approx(contention(lengths), abs=0.02)
    assert document["lost"]["percent"] == pytest.approx(100 / document["replicas_one_failed"])
    assert (sweep / "capacity.png").exists()


def test_rates_around_the_measured_highest_are_not_fitted() -> None:
    none = np.array([])
    points = [Measured(rate, none, none, (5.0, 30.0), none) for rate in (10.0, 50.0, 91.0, 100.0, 109.0, 112.0, 151.0)]
    fitted, held_out = capacity_fit._split(points, 100.0)
    assert [point.rate_per_s for point in held_out] == [91, 100, 109]
    assert [point.rate_per_s for point in fitted] == [10, 50, 112]  # 151 is too far beyond to tell of the limit
    assert capacity_fit._split(points, None) == (points[::2], points[1::2])


def run_of(service: Service, rate_per_s: float, seed: int) -> Measured:
    """Returns a minute of `service`."""
    requests = capacity_model.draw(lambda at: np.full_like(at, rate_per_s), rate_per_s, 60.0, SOME_LENGTHS, seed)
    latency_ms = capacity_model.serve(service, requests)[requests.arrivals_s >= WARMUP_S] * 1000
    return Measured(rate_per_s, requests.arrivals_s, requests.tokens, (WARMUP_S, 60.0), latency_ms)


def test_a_run_is_simulated_with_the_arrivals_and_the_texts_that_it_had() -> None:
    service = Service(2e-4, noise=0.0, elsewhere_s=0.004, instances=2, max_merged=4, paces=(1.1,))
    for seed in range(3):  # chance alone makes their p99 differ
        run = run_of(service, 0.6 * service.saturated_per_s(float(SOME_LENGTHS.mean())), seed)
        found = capacity_model.as_measured_ms(service, run, capacity_model.repeat(run), 1.1)
        np.testing.assert_allclose(found, run.percentiles_ms)


def test_calibration_finds_the_pace_of_each_run_and_the_noise(fast: None) -> None:
    base = Service(2e-4, noise=0.0, elsewhere_s=0.004, instances=2, max_merged=4)
    paces = (0.9, 1.0, 1.1, 1.2, 1.0, 1.1)
    saturated = base.saturated_per_s(float(SOME_LENGTHS.mean()))
    runs = [
        run_of(replace(base, noise=0.14, noise_lasts_s=1.0, paces=(pace,)), (0.2 + 0.1 * seed) * saturated, seed)
        for seed, pace in enumerate(paces)
    ]
    found, without_one = capacity_model.calibrate(base, runs)
    assert (found.noise, found.noise_lasts_s) == (0.14, 1.0)
    np.testing.assert_allclose(found.paces, paces, rtol=0.08)
    assert [len(other.paces) for other in without_one] == [len(paces) - 1] * len(paces)
    busy, without_one = capacity_model.calibrate(base, runs, busy_from_per_s=runs[2].rate_per_s)
    assert (busy.noise, busy.paces) == (found.noise, found.paces[2:])
    assert [len(other.paces) for other in without_one] == [4, 4, 3, 3, 3, 3]


def test_files_that_do_not_say_which_texts_were_sent_are_fitted_with_some_of_them(
    sweep: Path, lengths: Floats, tmp_path: Path
) -> None:
    for file in sweep.glob("rates-30.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (one,) = verdict.read_all(tmp_path)
    told = capacity_fit._measured(one, tmp_path, lengths)
    data = samples.read(tmp_path / "rates-30.csv.gz")
    rows = zip(data.scheduled_s, data.done_s, strict=True)
    samples.write(tmp_path / "rates-30.csv.gz", [Sample(at, at, done, 1, OK) for at, done in rows], 0.0)
    untold = capacity_fit._measured(one, tmp_path, lengths)
    np.testing.assert_array_equal(told.tokens, lengths[data.texts])
    assert set(untold.tokens) <= set(lengths)
    assert untold.p99_ms == told.p99_ms


def test_the_bound_that_the_run_states_counts_before_what_was_seen(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity_model, "calibrate", lambda base, *_: (base, [base]))
    assert capacity_fit.fit(sweep, 200).service.max_merged == TRUE.max_merged
    for file in sweep.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    facts = json.loads((sweep / verdict.RUN_FILE).read_text())
    (tmp_path / verdict.RUN_FILE).write_text(json.dumps({**facts, capacity_fit.MERGED_KEY: 16}))
    assert capacity_fit.fit(tmp_path, 200).service.max_merged == 16


def test_another_p99_is_compared_with_what_keeps_that_one(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity_model, "calibrate", lambda base, *_: (base, [base]))
    promised, stricter = (capacity_fit.fit(sweep, p99_ms) for p99_ms in (200, 100))
    assert promised.highest_per_s is not None
    assert stricter.highest_per_s is None  # the search was for the promise
    assert promised.crossing is not None
    assert stricter.crossing is None or stricter.crossing.rate_per_s < promised.crossing.rate_per_s


def test_an_event_lasts_as_long_as_a_replica_takes_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity_plan, "_REQUESTS", 50_000)
    service = Service(2e-4, noise=0.1, elsewhere_s=0.004, instances=2, max_merged=4)
    found = capacity_fit.Fit(
        capacity_model.Scalability(1, 0, 0), [], service, [], SOME_LENGTHS, [], [], highest_per_s=None, crossing=None
    )
    usual = 0.8 * service.saturated_per_s(float(SOME_LENGTHS.mean()))
    short, long = (capacity_plan._scenario(found, usual, usual * 1.5, length_s) for length_s in (30, 300))
    assert max(p99 for _, p99 in long) > 5 * max(p99 for _, p99 in short)  # the queue grows all the while
    for points in (short, long):
        assert points[-1][1] < max(p99 for _, p99 in points) / 5  # and has drained at the end


@pytest.mark.parametrize("option", [["--startup-s", "0"], ["--detect-s", "-1"], ["--rate", "nan"], ["--p99-ms", "0"]])
def test_times_that_make_no_sense_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        capacity.main(["--rate", "10", *option])
    assert option[0] in capsys.readouterr().err


def test_a_folder_without_a_sweep_is_refused_with_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert capacity.main(["--rate", "10", "--results", str(tmp_path)]) == 2
    assert "PROFILE=sweep" in capsys.readouterr().err


def test_a_limit_that_an_idle_replica_breaks_is_said(
    sweep: Path, fast: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert capacity.main(["--rate", "10", "--p99-ms", "1", "--results", str(sweep)]) == 2
    assert "even when idle" in capsys.readouterr().err
