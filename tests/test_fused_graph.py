"""The graph that ONNX Runtime runs: its own operators in place of what model.onnx has, and the same answers."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny_model import REVIEWS

from export import graph
from export.generated_reviews import generate
from export.repository import REPOSITORY, TOKENIZER_FILE
from model_repository.classifier.engine import ONNXRUNTIME, Engine
from model_repository.classifier.fused_graph import fused
from model_repository.tokenizer.review_text import ReviewEncoder, pad

OUTPUTS = ["logits", "label"]
NUM_LAYERS = 2
"""Of the tiny model."""


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return graph.build(tiny_checkpoint, ["fp32", "int8"], tmp_path_factory.mktemp("files"), ["negative", "positive"])


@pytest.fixture(scope="module")
def rows(tiny_checkpoint: Path) -> list[list[int]]:
    return ReviewEncoder(tiny_checkpoint / "tokenizer.json").encode(REVIEWS)


@pytest.fixture(scope="module")
def reviews() -> list[list[int]]:
    return ReviewEncoder(REPOSITORY / TOKENIZER_FILE).encode(generate(12, seed=3))


def batch(rows: list[list[int]], width: int | None = None) -> dict[str, np.ndarray]:
    input_ids, attention_mask = pad(rows, width)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def plain(file: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Returns logits and labels of `file` as ONNX Runtime runs it by itself."""
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(OUTPUTS, inputs)


def operators(graph: onnx.GraphProto) -> Counter[str]:
    """Returns how often each operator comes in `graph`, the branches of a choice included."""
    counts: Counter[str] = Counter()
    for node in graph.node:
        counts[node.op_type] += 1
        for attribute in node.attribute:
            counts.update(operators(attribute.g))
    return counts


def test_products_add_their_bias_and_attention_is_one_operator(files: dict[str, Path]) -> None:
    model, is_int8 = fused(files["int8"])
    before, after = operators(onnx.load(files["int8"]).graph), operators(onnx.load_from_string(model).graph)
    assert is_int8
    # GELU takes the bias of the first product after attention.
    assert after["MatMulIntegerToFloat"] == 5 * NUM_LAYERS
    assert before["Add"] - after["Add"] >= 5 * NUM_LAYERS
    assert after["MultiHeadAttention"] == 2 * NUM_LAYERS  # with a mask, and without
    assert after["Softmax"] == 1  # the head's
    assert not {"MultiHeadAttention", "MatMulIntegerToFloat"} & set(before)


def test_the_installed_file_is_rewritten_as_well(installed: Path) -> None:
    num_layers = operators(onnx.load(installed).graph)["Softmax"] - 1  # the head's
    model, is_int8 = fused(installed)
    assert is_int8
    assert operators(onnx.load_from_string(model).graph)["MultiHeadAttention"] == 2 * num_layers > 0


@pytest.mark.parametrize("padding", [0, 3])
def test_answers_stay(installed: Path, reviews: list[list[int]], padding: int) -> None:
    engine = Engine(installed, num_threads=1, runtime=ONNXRUNTIME)
    differences = []
    for row in reviews:
        inputs = batch([row], len(row) + padding)
        logits, labels = engine.run(OUTPUTS, inputs)
        expected, expected_labels = plain(installed, inputs)
        differences.append(np.abs(logits - expected).max())
        assert labels.tolist() == expected_labels.tolist()
    # Scores that were int8 are fp32 here, and GELU is an approximation; that may change which tokens a review keeps.
    assert np.median(differences) <= 0.05
    assert max(differences) <= 0.25


def test_neighbours_change_no_answer(installed: Path, reviews: list[list[int]]) -> None:
    engine = Engine(installed, num_threads=1, runtime=ONNXRUNTIME)
    together, labels = engine.run(OUTPUTS, batch(reviews))
    for index, row in enumerate(reviews):
        logits, label = engine.run(OUTPUTS, batch([row]))
        np.testing.assert_allclose(logits[0], together[index], atol=0.1)
        assert label[0] == labels[index]


def test_row_of_padding_alone_harms_nobody(installed: Path, reviews: list[list[int]]) -> None:
    inputs = batch([reviews[0], [0]])
    inputs["attention_mask"][1] = 0
    logits, _ = Engine(installed, num_threads=1, runtime=ONNXRUNTIME).run(OUTPUTS, inputs)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[0], plain(installed, batch([reviews[0]]))[0][0], atol=0.2)


def test_what_is_not_int8_stays_as_it_is(files: dict[str, Path], rows: list[list[int]]) -> None:
    model, is_int8 = fused(files["fp32"])
    assert not is_int8
    assert operators(onnx.load_from_string(model).graph) == operators(onnx.load(files["fp32"]).graph)
    logits, _ = Engine(files["fp32"], num_threads=1, runtime=ONNXRUNTIME).run(OUTPUTS, batch(rows))
    np.testing.assert_allclose(logits, plain(files["fp32"], batch(rows))[0], atol=1e-5)


def test_facts_of_others_in_the_file_are_left_alone(files: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(files["int8"])
    model.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
    onnx.save(model, tmp_path / "model.onnx")
    assert fused(tmp_path / "model.onnx")[1]


def test_limits_of_the_inputs_are_those_of_the_file(files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="expected 0 to"):
        Engine(files["int8"], num_threads=1, runtime=ONNXRUNTIME).run(OUTPUTS, batch([[10**6]]))
