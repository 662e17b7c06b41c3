"""Graphs rewritten for speed: the answers stay, int8 runs as int8, and a checkpoint can be made of it again."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exact import exact_session
from tiny_model import REVIEWS
from transformers import AutoTokenizer, DistilBertForSequenceClassification

from export import checkpoint as export_checkpoint
from export import graph, parity
from export.first_token import keep_first_token
from model_repository.tokenizer.review_text import ReviewEncoder, pad

LABELS = ["negative", "positive"]
NUM_PRODUCTS = 2 * 6
"""Of the tiny model: query, key, value, the way out of attention and two more, in each of two layers."""


@pytest.fixture(scope="module")
def as_quantised(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int8 file as NNCF leaves it."""
    with pytest.MonkeyPatch.context() as patch:
        for step in ("rewrite", "keep_first_token"):
            patch.setattr(graph, step, lambda model: model)
        return graph.build(tiny_checkpoint, ["int8"], tmp_path_factory.mktemp("before"), LABELS)["int8"]


@pytest.fixture(scope="module")
def rewritten(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The int8 file as it is served."""
    return graph.build(tiny_checkpoint, ["int8"], tmp_path_factory.mktemp("after"), LABELS)["int8"]


@pytest.fixture(scope="module")
def batch(tiny_checkpoint: Path) -> dict[str, np.ndarray]:
    input_ids, attention_mask = pad(ReviewEncoder(tiny_checkpoint / "tokenizer.json").encode(REVIEWS))
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def exactly(file: Path, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Returns logits and labels."""
    return exact_session(file).run(["logits", "label"], batch)


def test_rewriting_changes_no_answer(as_quantised: Path, rewritten: Path, batch: dict[str, np.ndarray]) -> None:
    (logits, labels), (expected, expected_labels) = exactly(rewritten, batch), exactly(as_quantised, batch)
    assert labels.tolist() == expected_labels.tolist()
    # A sum in another order may move a value across a step of its range, which random, wide weights make coarse.
    np.testing.assert_allclose(logits, expected, atol=0.05)


def test_cutting_the_last_layer_changes_no_answer(
    tiny_checkpoint: Path, tiny_onnx: Path, batch: dict[str, np.ndarray]
) -> None:
    model = DistilBertForSequenceClassification.from_pretrained(tiny_checkpoint).eval()
    with torch.inference_mode():
        expected = model(**{name: torch.from_numpy(values) for name, values in batch.items()}).logits.numpy()
    np.testing.assert_allclose(exactly(tiny_onnx, batch)[0], expected, atol=1e-5)


def test_last_layer_computes_one_token(tiny_onnx: Path, batch: dict[str, np.ndarray], tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx)
    names = [f"/distilbert/transformer/layer.{layer}/ffn/lin2/MatMul_output_0" for layer in (0, 1)]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    onnx.save(model, tmp_path / "model.onnx")
    all_tokens, first = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(names, batch)
    assert all_tokens.shape[:2] == batch["input_ids"].shape
    assert first.shape[:2] == (len(batch["input_ids"]), 1)


def test_graph_that_reads_every_token_is_not_cut(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = onnx.load(graph.export_encoder(tiny_checkpoint, tmp_path))
    (gather,) = [node for node in model.graph.node if node.op_type == "Gather" and "/distilbert" not in node.name]
    gather.op_type = "ReduceMean"
    with pytest.raises(ValueError, match="expected one Gather"):
        keep_first_token(model)
    with pytest.raises(ValueError, match="no transformer layers"):
        keep_first_token(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])))


def run_as(file: Path, folder: Path) -> Counter[str]:
    """Returns how often each operator is in the graph that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def test_onnx_runtime_multiplies_in_int8_and_dequantises_no_table(
    as_quantised: Path, rewritten: Path, tmp_path: Path
) -> None:
    before, after = run_as(as_quantised, tmp_path), run_as(rewritten, tmp_path)
    assert before["MatMulIntegerToFloat"] < NUM_PRODUCTS, "ONNX Runtime finds them by itself: rewrite is not needed"
    assert after["MatMulIntegerToFloat"] >= NUM_PRODUCTS
    assert after["DequantizeLinear"] == 4, "only the head's two matrices and the one row a review that they read"
    assert after["Where"] == 0


def test_activations_have_no_sign(rewritten: Path) -> None:
    model = onnx.load(rewritten)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    offsets = {kinds[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert offsets == {onnx.TensorProto.UINT8}


@pytest.mark.usefixtures("exact_engine")
def test_checkpoint_made_from_the_served_file_is_that_model(
    rewritten: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(
        parity.TOLERANCES,
        "int8",
        parity.Tolerance(logits=1, probabilities=1, mean_probability=1, flipped_share=1, neighbours=1),
    )
    folder = tmp_path / "checkpoint"
    arguments = [
        "--onnx",
        str(rewritten),
        "--tokenizer",
        str(tiny_checkpoint / "tokenizer.json"),
        "--output",
        str(folder),
    ]
    assert export_checkpoint.main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["parity_passed"]
    trained, made = (DistilBertForSequenceClassification.from_pretrained(path) for path in (tiny_checkpoint, folder))
    assert made.config.n_heads == trained.config.n_heads
    assert made.config.id2label == trained.config.id2label
    # Half a step of 254 over a row, times what SmoothQuant took out of its columns.
    for (name, weight), (_, other) in zip(trained.named_parameters(), made.named_parameters(), strict=True):
        if weight.dim() == 2:
            assert (weight - other).abs().max() <= weight.abs().max() / 50, name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = ReviewEncoder(tiny_checkpoint / "tokenizer.json")
    assert tokenizer(list(REVIEWS), truncation=True)["input_ids"] == encoder.encode(REVIEWS)
    assert export_checkpoint.main(arguments) == 2, "a folder that exists is left alone"


def test_checkpoint_of_another_graph_is_refused(
    tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--onnx", str(tiny_onnx), "--output", str(tmp_path / "checkpoint")]
    assert export_checkpoint.main(arguments) == 2
    assert "no int8 DistilBERT" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()
