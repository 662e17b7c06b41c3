"""The ragged graph in ONNX Runtime: the padded graph's logits without the padding, and faults that stay their own."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tiny_model import REVIEWS

from export import ragged, ragged_graph
from model_repository.tokenizer.review_text import ReviewEncoder, pad

TOLERANCE = ragged.MAX_DIFFERENCE


@pytest.fixture(scope="module")
def rows(tiny_checkpoint: Path) -> list[list[int]]:
    """Reviews of 3 to 64 tokens."""
    encoder = ReviewEncoder(tiny_checkpoint / "tokenizer.json")
    return encoder.encode([*REVIEWS, "short", *(" ".join(REVIEWS)[:length] for length in range(1, 300, 7))])


@pytest.fixture(scope="module")
def ragged_file(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ragged graph of the tiny checkpoint."""
    return ragged_graph.build(tiny_checkpoint, tmp_path_factory.mktemp("ragged") / "m.onnx", ["negative", "positive"])


@pytest.fixture(scope="module")
def session(ragged_file: Path) -> onnxruntime.InferenceSession:
    """The ragged graph, opened."""
    return ragged.session(ragged_file, 1)


def test_a_folder_without_a_checkpoint_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ragged.main(["--checkpoint", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_mixed_batches_have_the_padded_graph_s_logits(
    tiny_onnx: Path, ragged_file: Path, rows: list[list[int]]
) -> None:
    found = ragged.compare(tiny_onnx, ragged_file, rows, num_batches=100, seed=0)
    assert found["difference"].max() <= TOLERANCE
    assert found["padded_tokens"].sum() > found["real_tokens"].sum(), "without padding this would prove nothing"


def test_head_is_that_of_the_other_graphs(session: onnxruntime.InferenceSession, rows: list[list[int]]) -> None:
    names = ("logits", "probabilities", "score", "label")
    logits, probabilities, score, label = session.run(names, ragged.ragged_feed(rows[:4]))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(score[:, 0], probabilities.max(axis=1))
    assert label[:, 0].tolist() == [["negative", "positive"][index] for index in logits.argmax(axis=1)]


def test_padding_that_a_client_s_own_batch_brings_is_dropped(
    session: onnxruntime.InferenceSession, rows: list[list[int]]
) -> None:
    """Triton concatenates whole rectangles, so a request of several reviews comes with its padding."""
    input_ids, attention_mask = pad(rows[:6])
    item_shape = np.full((6, 1), input_ids.shape[1], dtype=np.int32)
    feed = {"input_ids": input_ids.ravel(), "attention_mask": attention_mask.ravel(), "item_shape": item_shape}
    (logits,) = session.run(["logits"], feed)
    (expected,) = session.run(["logits"], ragged.ragged_feed(rows[:6]))
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("bad", [pytest.param([], id="empty"), [2, 10**6, 3], [2, -1, 3]])
def test_bad_row_gets_no_answer_and_its_neighbours_get_theirs(
    session: onnxruntime.InferenceSession, rows: list[list[int]], bad: list[int], place: int
) -> None:
    (expected,) = session.run(["logits"], ragged.ragged_feed(rows[:4]))
    (logits,) = session.run(["logits"], ragged.ragged_feed([*rows[:place], bad, *rows[place:4]]))
    assert np.isnan(logits[place]).all()
    np.testing.assert_allclose(np.delete(logits, place, axis=0), expected, atol=TOLERANCE)
