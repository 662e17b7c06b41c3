"""The grouping rule of the served classifier: which reviews run together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_repository.classifier.length_groups import length_groups

LENGTHS = st.lists(st.integers(2, 512), max_size=80)


@given(LENGTHS, st.integers(1, 4096), st.floats(0, 100))
def test_every_review_is_in_exactly_one_group(lengths: list[int], max_tokens: int, max_padding: float) -> None:
    groups = list(length_groups(lengths, max_tokens, max_padding))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(groups)


@given(LENGTHS, st.integers(1, 4096), st.floats(0, 100))
def test_no_group_exceeds_its_limits(lengths: list[int], max_tokens: int, max_padding: float) -> None:
    for group in length_groups(lengths, max_tokens, max_padding):
        members = [lengths[index] for index in group]
        rectangle = len(members) * max(members)
        assert len(group) == 1 or rectangle <= max_tokens
        assert (rectangle - sum(members)) * 100 <= max_padding * rectangle


@given(LENGTHS, st.integers(1, 4096), st.floats(0, 100))
def test_shorter_reviews_run_first(lengths: list[int], max_tokens: int, max_padding: float) -> None:
    order = [lengths[index] for group in length_groups(lengths, max_tokens, max_padding) for index in group]
    assert order == sorted(lengths)


@given(LENGTHS, st.integers(1, 4096), st.floats(0, 100), st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_no_group(lengths: list[int], max_tokens: int, max_padding: float, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = random.sample(lengths, len(lengths))
    as_lengths = [
        [[side[i] for i in g] for g in length_groups(side, max_tokens, max_padding)] for side in (lengths, shuffled)
    ]
    assert as_lengths[0] == as_lengths[1]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([384, 384], [[0], [1]], id="long reviews run alone"),
        pytest.param([16] * 8, [[0, 1, 2, 3, 4, 5, 6, 7]], id="short reviews of one length run together"),
        pytest.param([10, 100, 10], [[0, 2], [1]], id="a long one does not pad the short ones"),
        pytest.param([600], [[0]], id="longer than the token limit"),
    ],
)
def test_groups_of_typical_batches(lengths: list[int], expected: list[list[int]]) -> None:
    assert list(length_groups(lengths, max_group_tokens=256, max_padding_percent=10)) == expected
