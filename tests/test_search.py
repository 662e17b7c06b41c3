"""The search for the highest rate that holds, and the rate at which one request of a hundred is late."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import late_share
from benchmarks.late_share import Trial
from benchmarks.search import Measure, Outcome, highest_rate

SATURATED_PER_S = 100.0
SHORT_S, LONG_S = 20.0, 60.0


def sharp(capacity: float) -> Measure:
    """Returns a service that answers everything in time up to `capacity` requests a second, and half beyond it."""

    def measure(rate: float, duration_s: float) -> Outcome:
        requests = int(rate * duration_s)
        return Outcome(rate <= capacity, Trial(rate, [requests], [0 if rate <= capacity else requests // 2]))

    return measure


def unsteady(one_percent_at: float, seed: int, trials: list[Trial]) -> Measure:
    """Returns a service whose late requests come in bursts, 1 % of all at `one_percent_at`, e times the odds 4/s on."""
    random = np.random.default_rng(seed)

    def measure(rate: float, duration_s: float) -> Outcome:
        requests = random.poisson(rate * 5, size=int(duration_s // 5))
        log_odds = math.log(0.01 / 0.99) + (rate - one_percent_at) / 4 + random.normal(-0.5, 1, size=requests.size)
        late = random.binomial(requests, 1 / (1 + np.exp(-log_odds)))
        trials.append(Trial(rate, requests.tolist(), late.tolist()))
        return Outcome(bool(late.sum() <= 0.01 * requests.sum()), trials[-1])

    return measure


def search(measure: Measure, saturated_per_s: float = SATURATED_PER_S) -> float | None:
    return highest_rate(measure, saturated_per_s, SHORT_S, LONG_S, 5)


def noting(measure: Callable[[float, float], Outcome | None], runs: list[tuple[float, float]]) -> Measure:
    def noted(rate: float, duration_s: float) -> Outcome | None:
        runs.append((rate, duration_s))
        return measure(rate, duration_s)

    return noted


@given(capacity=st.floats(min_value=10, max_value=100))
def test_search_ends_near_the_capacity(capacity: float) -> None:
    found = search(sharp(capacity))
    assert found is not None
    assert capacity / 1.1 <= found <= capacity


def test_search_returns_what_held_for_long() -> None:
    def measure(rate: float, duration_s: float) -> Outcome:
        return sharp(70 if duration_s == SHORT_S else 60)(rate, duration_s)

    runs: list[tuple[float, float]] = []
    found = search(noting(measure, runs))
    assert found is not None
    assert found <= 60
    assert (found, LONG_S) in runs


def test_search_lowers_what_does_not_hold_for_long_until_it_does() -> None:
    def measure(rate: float, duration_s: float) -> Outcome:
        return sharp(90 if duration_s == SHORT_S else 30)(rate, duration_s)

    found = search(measure)
    assert found is not None
    assert 30 / 1.05 <= found <= 30


def test_search_repeats_a_run_that_tells_nothing_for_longer() -> None:
    found = search(lambda rate, duration_s: None if duration_s < LONG_S else sharp(70)(rate, duration_s))
    assert found is not None
    assert 70 / 1.05 <= found <= 70


@pytest.mark.parametrize(("capacity", "least", "longest"), [(100, 20, 20), (12, 500 / 15, 60), (1.5, 60, 60)])
def test_probes_have_500_requests_unless_that_takes_longer_than_a_long_run(
    capacity: float, least: float, longest: float
) -> None:
    runs: list[tuple[float, float]] = []
    search(noting(sharp(capacity), runs), 1.25 * capacity)
    *probes, (_, first), _, _, _, (_, last) = runs
    assert all(least <= duration_s <= longest for _, duration_s in probes)
    assert first == last == LONG_S
    assert all(rate * duration_s >= 500 - 1e-9 or duration_s == LONG_S for rate, duration_s in runs)


def test_search_gives_a_rate_up_at_which_no_run_tells_anything() -> None:
    assert search(lambda *_: None) is None


def test_search_of_a_service_that_holds_nothing_says_so() -> None:
    runs: list[tuple[float, float]] = []
    assert search(noting(sharp(0), runs)) is None
    assert len(runs) < 10


def test_all_runs_together_find_the_rate_where_single_ones_do_not() -> None:
    rates = []
    for seed in range(20):
        trials: list[Trial] = []
        search(unsteady(12.5, seed, trials), 33)
        found = late_share.crossing(trials)
        assert found is not None
        assert found.low_per_s <= found.rate_per_s <= found.high_per_s
        rates.append(found.rate_per_s)
    assert abs(np.mean(rates) - 12.5) < 1
    assert np.std(rates) < 1.5


def test_no_rate_is_named_beyond_those_tried() -> None:
    assert late_share.crossing([Trial(10, [500], [0]), Trial(20, [500], [1])]) is None
    assert late_share.crossing([Trial(10, [500], [50]), Trial(20, [500], [60])]) is None
    assert late_share.crossing([]) is None
    found = late_share.crossing([Trial(10, [500], [0]), Trial(20, [500], [400])])
    assert found is not None
    assert 10 < found.rate_per_s < 20


def test_interval_does_not_depend_on_the_order_of_the_runs() -> None:
    runs = [Trial(10, [50, 60], [0, 1]), Trial(14, [70, 70], [0, 3]), Trial(14, [60, 80], [2, 0]), Trial(20, [99], [9])]
    assert late_share.crossing(runs) == late_share.crossing(runs[::-1])


def test_a_service_that_answers_nothing_has_no_rate() -> None:
    runs: list[tuple[float, float]] = []
    assert search(noting(sharp(10), runs), saturated_per_s=0.0) is None
    assert not runs
