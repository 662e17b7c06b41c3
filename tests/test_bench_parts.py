"""The load tests' arithmetic: texts, samples, percentiles, limits, profiles. No server runs here."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import answers, late_share, perf_analyzer, processes, profiles, samples, texts, verdict
from benchmarks.profiles import Limits, Load, Profile, ProfileError, Profiles, Validity
from benchmarks.samples import OK, Sample
from benchmarks.summary import Summary, summarise
from clients import Prediction
from export.generated_reviews import LENGTH_QUANTILES
from export.repository import REPOSITORY, TOKENIZER_FILE

LIMITS = Limits(p50_ms=200, p99_ms=200, failures_percent=1)
VALIDITY = Validity(max_generator_cpu_percent=85, max_littles_law_percent=2, max_disagreement_percent=15)
OPEN_LOOP = {"tool": "locust", "protocol": "grpc", "loop": "open", "level": 10, "warmup_s": 0, "duration_s": 10}


def measured(
    folder: Path, rows: Sequence[Sample], name: str = "one", gate: bool = True, cpu_s: float = 1.0, **load: Any
) -> Summary:
    """Writes raw files of ten seconds and returns what they amount to."""
    samples.write(folder / f"{name}.csv.gz", rows, 0.0)
    raw = {
        "load": Load.model_validate({**OPEN_LOOP, **load}).model_dump(),
        "gate": gate,
        "window_s": [0.0, 10.0],
        "generator": {"cpu_s": cpu_s, "wall_s": 10.0},
        "triton": None,
    }
    (folder / f"{name}.json").write_text(json.dumps(raw))
    return summarise(folder / f"{name}.json")


def steady(latency_s: float, outcome: str = OK, every: int = 1) -> list[Sample]:
    """Returns a hundred requests over ten seconds, each answered after `latency_s`, one in `every` with `outcome`."""
    return [
        Sample(at, at, at + latency_s, 1, outcome if index % every == 0 else OK)
        for index, at in enumerate(np.arange(0, 10, 0.1))
    ]


def test_samples_survive_their_file(tmp_path: Path) -> None:
    rows = [Sample(2.5, 2.5, 3.0, 2, "TimeoutError", 7), Sample(1.0, 1.1, 1.25, 1, OK)]
    samples.write(tmp_path / "s.csv.gz", rows, 1.0)
    data = samples.read(tmp_path / "s.csv.gz")
    assert data.scheduled_s.tolist() == [0.0, 1.5]
    assert data.latency_s.tolist() == [0.25, 0.5]
    assert data.ok.tolist() == [True, False]
    assert data.texts.tolist() == [samples.UNKNOWN, 7]


def test_samples_from_before_texts_were_kept_are_read(tmp_path: Path) -> None:
    older = "scheduled_us,sent_us,done_us,reviews,outcome\n0,0,250000,1,ok\n"
    (tmp_path / "s.csv.gz").write_bytes(gzip.compress(older.encode()))
    data = samples.read(tmp_path / "s.csv.gz")
    assert (data.latency_s.tolist(), data.texts.tolist()) == ([0.25], [samples.UNKNOWN])


def test_latency_counts_from_when_a_request_was_due(tmp_path: Path) -> None:
    late = [Sample(at, at + 0.3, at + 0.31, 1, OK) for at in np.arange(0, 9, 0.1)]
    assert measured(tmp_path, late).p50_ms == pytest.approx(310)


def test_late_are_slow_answers_and_failures_due_in_the_window(tmp_path: Path) -> None:
    slow = measured(tmp_path, steady(0.3), "slow")
    failing = measured(tmp_path, steady(0.05, "ServerError", every=10), "failing")
    all_late, some_late = (late_share.trial(summary, tmp_path, 200) for summary in (slow, failing))
    assert sum(all_late.requests) == sum(all_late.late) == slow.requests
    assert sum(some_late.late) == sum(failing.failures.values()) > 0
    longer = replace(slow, window_s=slow.window_s + 0.001)  # as windows are by the clock
    assert late_share.trial(longer, tmp_path, 200).requests == all_late.requests


@pytest.mark.parametrize(
    ("change", "counts"),
    [({"littles_law_percent": 9.0}, True), ({"generator_cpu_percent": 99.0}, False)],
    ids=["no steady state", "generator at its limit"],
)
def test_which_late_runs_tell_where_one_percent_is_late(tmp_path: Path, change: dict[str, float], counts: bool) -> None:
    in_time = measured(tmp_path, steady(0.05), "in-time")
    late = replace(measured(tmp_path, steady(0.3), "late"), **change)
    rules = Profiles(limits=LIMITS, validity=VALIDITY, profiles={})
    assert (late_share.of_open_loops([in_time, late], tmp_path, rules) is not None) is counts


def test_percentiles_are_latencies_that_were_observed_and_not_rounded(tmp_path: Path) -> None:
    rows = [Sample(at, at, at + (0.123456 if at < 9.85 else 0.156789), 1, OK) for at in np.arange(0, 10, 0.1)]
    summary = measured(tmp_path, rows)
    assert (summary.p50_ms, summary.p99_ms) == (pytest.approx(123.456), pytest.approx(156.789))


def test_a_good_run_keeps_the_limits_and_is_valid(tmp_path: Path) -> None:
    summary = measured(tmp_path, steady(0.05))
    assert summary.broken(LIMITS) == []
    assert summary.invalid(VALIDITY) == []
    assert summary.littles_law_percent <= 2


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        pytest.param(steady(0.25), "p50_ms", id="slow"),
        pytest.param(steady(0.05, "WrongAnswerError", every=50), "failures_percent", id="wrong answers"),
        pytest.param(steady(0.05, "TimeoutError"), "p99_ms", id="nothing answered"),
    ],
)
def test_broken_limits_are_named(tmp_path: Path, rows: list[Sample], named: str) -> None:
    assert any(reason.startswith(named) for reason in measured(tmp_path, rows).broken(LIMITS))


def test_a_run_whose_generator_was_the_bottleneck_is_invalid(tmp_path: Path) -> None:
    assert "bottleneck" in measured(tmp_path, steady(0.05), cpu_s=9.0).invalid(VALIDITY)[0]


def test_a_growing_queue_breaks_littles_law(tmp_path: Path) -> None:
    growing = [Sample(at, at, at + at / 2 + 0.05, 1, OK) for at in np.arange(0, 10, 0.1)]
    assert any("not in a steady state" in reason for reason in measured(tmp_path, growing).invalid(VALIDITY))


@pytest.mark.parametrize(("gate", "passed"), [(True, False), (False, None)])
def test_only_gated_measurements_must_keep_the_limits(tmp_path: Path, gate: bool, passed: bool | None) -> None:
    slow = measured(tmp_path, steady(0.3), gate=gate)
    profile = Profile.model_validate({"about": "", "stages": [{**STAGE, "name": "x"}]})
    assert verdict.judge([slow], LIMITS, VALIDITY, profile, tmp_path).passed is passed


def test_wrong_answers_fail_a_run_that_is_not_gated(tmp_path: Path) -> None:
    wrong = measured(tmp_path, steady(0.05, "WrongAnswerError", every=100), gate=False)
    profile = Profile.model_validate({"about": "", "stages": [{**STAGE, "name": "x"}]})
    assert "wrong answers" in verdict.judge([wrong], LIMITS, VALIDITY, profile, tmp_path).broken[0]


def test_tools_that_disagree_are_named(tmp_path: Path) -> None:
    ours = measured(tmp_path, steady(0.05), "ours")
    theirs = measured(tmp_path, steady(0.06), "theirs", tool="perf_analyzer")
    alike = measured(tmp_path, steady(0.052), "alike", tool="perf_analyzer")
    assert "20 % apart" in verdict.disagreements([ours, theirs], VALIDITY)[0]
    assert verdict.disagreements([ours, alike], VALIDITY) == []


@pytest.mark.parametrize(("last_bytes", "named"), [(1_040, []), (1_100, ["memory: triton grew by 10.0 %, limit 5 %"])])
def test_memory_may_grow_by_its_limit_after_it_settled(tmp_path: Path, last_bytes: int, named: list[str]) -> None:
    rows = [(float(s), "triton", 1, 500 if s < 100 else 1_000 if s < 300 else last_bytes) for s in range(400)]
    processes.write_memory(tmp_path / "memory.csv", rows)
    assert verdict.memory_growth(tmp_path / "memory.csv", 5) == named


@pytest.mark.parametrize(("limit_mib", "named"), [(3, []), (2, ["memory: classifier 2 held 3 MiB, limit 2 MiB"])])
def test_each_process_must_keep_its_memory_limit(tmp_path: Path, limit_mib: float, named: list[str]) -> None:
    sizes = {"triton": 9, "classifier": 1, "classifier 2": 3}
    rows = [(0.0, name, place, mib * 2**20) for place, (name, mib) in enumerate(sizes.items())]
    processes.write_memory(tmp_path / "memory.csv", rows)
    assert verdict.memory_excess(tmp_path / "memory.csv", {"classifier": limit_mib}) == named


def test_memory_is_judged_where_the_profile_is_known_and_what_was_not_watched_is_said(tmp_path: Path) -> None:
    summary = measured(tmp_path, steady(0.05))
    profile = Profile.model_validate({"about": "", "stages": [{**STAGE, "name": "x"}]})
    limits = LIMITS.model_copy(update={"memory_mib": {"triton": 2}})
    assert "could be watched" in verdict.judge([summary], limits, VALIDITY, profile, tmp_path).remarks[-1]
    processes.write_memory(tmp_path / "memory.csv", [(0.0, "triton", 1, 3 * 2**20)])
    known, unknown = (verdict.judge([summary], limits, VALIDITY, one, tmp_path) for one in (profile, None))
    assert known.broken == ["memory: triton held 3 MiB, limit 2 MiB"]
    assert known.remarks == unknown.broken == []


def test_memory_that_nobody_watched_is_no_proof(tmp_path: Path) -> None:
    assert "watched" in verdict.memory_growth(tmp_path / "memory.csv", 5)[0]


STAGE = {"tool": "locust", "name": "a", "protocol": "grpc", "rates_per_s": [1], "warmup_s": 0, "duration_s": 1}


def profile_file(folder: Path, stage: dict[str, Any]) -> Path:
    content = {
        "limits": LIMITS.model_dump(),
        "validity": VALIDITY.model_dump(),
        "profiles": {"try": {"about": "", "stages": [stage]}},
    }
    (folder / "profiles.yaml").write_text(json.dumps(content))
    return folder / "profiles.yaml"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"duraton_s": 1}, "did you mean 'duration_s'"),
        ({"users": [2]}, "either rates_per_s"),
        ({"tool": "perf_analyzer", "protocol": "generate"}, "perf_analyzer speaks"),
        ({"duration_s": 0}, "duration_s"),
    ],
)
def test_a_wrong_profile_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        profiles.load(profile_file(tmp_path, {**STAGE, **change}))


@pytest.mark.parametrize("levels", [[5, 8, 8], [8]])
def test_two_measurements_of_one_name_are_refused(tmp_path: Path, levels: list[float]) -> None:
    stages = [{**STAGE, "rates_per_s": levels}, {**STAGE, "rates_per_s": [8]}]
    content = {"limits": LIMITS.model_dump(), "validity": VALIDITY.model_dump()}
    (tmp_path / "p.yaml").write_text(json.dumps({**content, "profiles": {"try": {"about": "", "stages": stages}}}))
    with pytest.raises(ProfileError, match=rf"{STAGE['name']}-8 would be measured twice"):
        profiles.load(tmp_path / "p.yaml")


def test_shipped_profiles_are_valid_and_an_unknown_one_names_them() -> None:
    shipped = profiles.load()
    assert {"smoke", "slo", "sweep", "soak"} <= set(shipped.profiles)
    assert (shipped.limits.p50_ms, shipped.limits.p99_ms, shipped.limits.failures_percent) == (200, 200, 1)
    with pytest.raises(ProfileError, match="smoke"):
        shipped.profile("smok")


GOOD = Prediction("positive", 0.9, (0.1, 0.9))


@pytest.mark.parametrize(
    ("prediction", "known"),
    [
        pytest.param(Prediction("neutral", 0.9, (0.1, 0.9)), None, id="label outside the set"),
        pytest.param(Prediction("positive", 0.9, (0.2, 0.9)), None, id="probabilities that do not add up"),
        pytest.param(Prediction("positive", 0.1, (0.9, 0.1)), None, id="label of the smaller one"),
        pytest.param(Prediction("positive", 0.9, (float("nan"), 0.9)), None, id="not a number"),
        pytest.param(GOOD, "negative", id="another label than the known one"),
    ],
)
def test_wrong_answers_are_told(prediction: Prediction, known: str | None) -> None:
    answers.check([GOOD], ["negative", "positive"], ["positive"])
    with pytest.raises(answers.WrongAnswerError):
        answers.check([prediction], ["negative", "positive"], [known])


def test_generated_texts_follow_the_stated_quantiles() -> None:
    if not (REPOSITORY / TOKENIZER_FILE).exists():
        pytest.skip("no model is installed in this checkout: make export")
    reviews = texts.make("imdb", 512)
    assert reviews == texts.make("imdb", 512)
    lengths = texts.token_counts(reviews)
    for share, tokens in LENGTH_QUANTILES:
        if 0.1 <= share <= 0.9:
            assert np.quantile(lengths, share) == pytest.approx(tokens, rel=0.08)
    assert max(texts.token_counts(texts.make("short", 200))) <= texts.MAX_SHORT_TOKENS


def test_real_reviews_are_drawn_from_a_file_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text,label\n" + "".join(f"review {i},0\n" for i in range(20)))
    drawn = texts.make("imdb", 5, data=tmp_path / "reviews.csv")
    assert len(set(drawn)) == 5
    with pytest.raises(texts.TextError, match="lower --reviews"):
        texts.make("imdb", 50, data=tmp_path / "reviews.csv")
    (tmp_path / "other.csv").write_text("body\nx\n")
    with pytest.raises(texts.TextError, match="rename the column"):
        texts.make("imdb", 1, data=tmp_path / "other.csv")


def test_perf_analyzers_timestamps_become_samples(tmp_path: Path) -> None:
    start_ns = 1_700_000_000_000_000_000
    requests = [
        {"timestamp": str(start_ns + at * 10**6), "response_timestamps": f"[{start_ns + (at + 50) * 10**6}]"}
        for at in range(0, 900, 100)
    ]
    boundaries = [start_ns + at * 10**6 for at in (0, 300, 600, 900)]
    profile = {"experiments": [{"requests": requests, "window_boundaries": boundaries}]}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    load = Load(
        tool="perf_analyzer",
        protocol="grpc",
        loop="open",
        level=10,
        texts="imdb",
        warmup_s=0,
        duration_s=0.75,
        probe=True,
    )
    window_s = perf_analyzer._keep_samples(tmp_path / "profile.json", tmp_path / "pa", load)
    data = samples.read(tmp_path / "pa.csv.gz")
    assert window_s == [0.0, 0.75], "as long as Locust's, whatever perf_analyzer's own windows are"
    assert data.latency_s.tolist() == pytest.approx([0.05] * 9)
