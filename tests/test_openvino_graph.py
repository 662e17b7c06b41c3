"""The graph that OpenVINO runs: attention's first product in floating point, and the same answers."""

from pathlib import Path

import numpy as np
import openvino
import pytest
from openvino import opset13
from tiny_model import REVIEWS

from export import graph
from export.generated_reviews import generate
from export.repository import REPOSITORY, TOKENIZER_FILE
from model_repository.classifier import engine
from model_repository.classifier.engine import OPENVINO, Engine, precision
from model_repository.classifier.openvino_graph import unquantised_attention
from model_repository.tokenizer.review_text import ReviewEncoder, pad

NUM_LAYERS = 2
"""Of the tiny model."""


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return graph.build(tiny_checkpoint, ["fp32", "int8"], tmp_path_factory.mktemp("files"), ["negative", "positive"])


def operators(model: openvino.Model) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


def test_query_and_key_are_multiplied_as_they_are(files: dict[str, Path]) -> None:
    model = openvino.Core().read_model(files["int8"])
    before = operators(model).count("FakeQuantize")
    assert unquantised_attention(model) == NUM_LAYERS
    assert before - operators(model).count("FakeQuantize") == 2 * NUM_LAYERS
    assert unquantised_attention(model) == 0  # nothing is left to be done


def test_file_without_int8_stays_as_it_is(files: dict[str, Path]) -> None:
    model = openvino.Core().read_model(files["fp32"])
    before = operators(model)
    assert unquantised_attention(model) == 0
    assert operators(model) == before


def test_what_is_multiplied_after_the_rounding_is_no_part_of_it(files: dict[str, Path]) -> None:
    model = openvino.Core().read_model(files["int8"])
    product = next(node.input_value(0).get_node() for node in model.get_ops() if is_masked_score(node))
    scaled = opset13.multiply(product.input_value(0), np.float32(2))
    product.input(0).replace_source_output(scaled.output(0))
    assert unquantised_attention(model) == NUM_LAYERS - 1


def is_masked_score(node: openvino.Node) -> bool:
    """Whether `node` adds the mask to the products of query and key."""
    readers = [target.get_node().get_type_name() for output in node.outputs() for target in output.get_target_inputs()]
    return node.get_type_name() == "Add" and readers == ["Softmax"]


@pytest.mark.parametrize("padding", [0, 3])
def test_answers_stay(installed: Path, padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "precision", lambda is_int8: "f32")  # bf16, on CPUs with AMX, rounds more
    rewritten = Engine(installed, num_threads=1, runtime=OPENVINO)
    plain = openvino.Core().compile_model(installed, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for row in ReviewEncoder(REPOSITORY / TOKENIZER_FILE).encode(generate(6, seed=3)):
        input_ids, attention_mask = pad([row], len(row) + padding)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits, labels = rewritten.run(["logits", "label"], inputs)
        expected = plain(inputs)
        np.testing.assert_allclose(logits, expected["logits"], atol=0.2)  # scores that were int8 are not
        assert labels.tolist() == expected["label"].tolist()


def test_row_of_padding_alone_harms_nobody(files: dict[str, Path], tiny_checkpoint: Path) -> None:
    rewritten = Engine(files["int8"], num_threads=1, runtime=OPENVINO)
    input_ids, attention_mask = pad([*ReviewEncoder(tiny_checkpoint / "tokenizer.json").encode(REVIEWS[:1]), [0]])
    attention_mask[1] = 0
    (logits,) = rewritten.run(["logits"], {"input_ids": input_ids, "attention_mask": attention_mask})
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("is_int8", "flags", "expected"),
    [
        pytest.param(True, "avx512_vnni amx_tile amx_int8 amx_bf16", "bf16", id="int8 with tiles"),
        pytest.param(True, "avx512_vnni avx512_bf16", "f32", id="int8 without tiles"),
        pytest.param(False, "avx512_vnni amx_tile amx_int8 amx_bf16", "f32", id="fp32 stays fp32"),
    ],
)
def test_cpu_and_file_decide_the_precision(is_int8: bool, flags: str, expected: str) -> None:
    assert precision(is_int8, flags.split()) == expected
