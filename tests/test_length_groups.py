"""The grouping rule of the served classifier: which reviews run together, and in which shapes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_repository.classifier.engine import ONNXRUNTIME, OPENVINO, WIDTH_STEPS
from model_repository.classifier.length_groups import length_groups, shapes, width_of

MAX_WIDTH = 512
LENGTHS = st.lists(st.integers(1, MAX_WIDTH), max_size=80)
MAX_TOKENS = st.integers(1, 4096)
STEPS = st.sampled_from(sorted(WIDTH_STEPS.values()))


@given(LENGTHS, MAX_TOKENS, STEPS)
def test_every_review_is_in_exactly_one_group(lengths: list[int], max_tokens: int, step: int) -> None:
    groups = [group for _, group in length_groups(lengths, MAX_WIDTH, max_tokens, step)]
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(groups)


@given(LENGTHS, MAX_TOKENS, STEPS)
def test_a_group_is_reviews_of_one_width_within_the_limit(lengths: list[int], max_tokens: int, step: int) -> None:
    for width, group in length_groups(lengths, MAX_WIDTH, max_tokens, step):
        assert {width_of(lengths[index], MAX_WIDTH, step) for index in group} == {width}
        assert len(group) == 1 or len(group) * width <= max_tokens


@given(st.integers(1, MAX_WIDTH), STEPS)
def test_no_review_gets_more_padding_than_a_step(length: int, step: int) -> None:
    assert 0 <= width_of(length, MAX_WIDTH, step) - length < step


@given(LENGTHS, MAX_TOKENS, STEPS)
def test_nobody_waits_for_a_group_that_came_later(lengths: list[int], max_tokens: int, step: int) -> None:
    groups = [group for _, group in length_groups(lengths, MAX_WIDTH, max_tokens, step)]
    assert [group[0] for group in groups] == sorted(min(group) for group in groups)


@given(LENGTHS, STEPS)
def test_reviews_of_one_width_keep_their_order(lengths: list[int], step: int) -> None:
    runs: dict[int, list[int]] = {}
    for width, group in length_groups(lengths, MAX_WIDTH, 256, step):
        runs.setdefault(width, []).extend(group)
    assert all(indices == sorted(indices) for indices in runs.values())


@given(st.lists(st.integers(1, 320), max_size=64), st.integers(1, 1024), STEPS)
def test_every_shape_that_comes_has_been_run_before(lengths: list[int], max_tokens: int, step: int) -> None:
    known = set(shapes(320, MAX_WIDTH, max_tokens, step))
    assert {(len(group), width) for width, group in length_groups(lengths, MAX_WIDTH, max_tokens, step)} <= known


def test_few_shapes_are_enough_for_every_review_where_each_must_be_prepared() -> None:
    assert len(list(shapes(320, 512, 512, WIDTH_STEPS[OPENVINO]))) <= 128


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([384, 384], [(384, [0]), (384, [1])], id="long reviews run alone"),
        pytest.param([16] * 8, [(16, [0, 1, 2, 3, 4, 5, 6, 7])], id="short reviews of one length run together"),
        pytest.param([16] * 7, [(16, [0, 1, 2, 3]), (16, [4, 5]), (16, [6])], id="in powers of two"),
        pytest.param([64] * 5, [(64, [0, 1, 2, 3]), (64, [4])], id="up to the limit"),
        pytest.param([10, 100, 11], [(16, [0, 2]), (104, [1])], id="a long one does not pad the short ones"),
        pytest.param([100, 10, 99, 9], [(104, [0, 2]), (16, [1, 3])], id="first come, first run"),
        pytest.param([510], [(511, [0])], id="never wider than the model takes"),
        pytest.param([600], [(600, [0])], id="too long for the model, which is the engine's to refuse"),
    ],
)
def test_groups_of_typical_batches(lengths: list[int], expected: list[tuple[int, list[int]]]) -> None:
    assert list(length_groups(lengths, 511, max_group_tokens=256, width_step=8)) == expected


def test_less_is_padding_where_no_shape_must_be_prepared() -> None:
    fine, coarse = (
        [width for width, _ in length_groups([9, 100, 20], 511, 256, WIDTH_STEPS[runtime])]
        for runtime in (ONNXRUNTIME, OPENVINO)
    )
    assert (fine, coarse) == ([12, 100, 20], [16, 104, 24])
