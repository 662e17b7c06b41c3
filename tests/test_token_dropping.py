"""Dropping tokens: the reviews go on with what most attention goes to, alone or beside others, in torch and in ONNX."""

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from exact import exact_session
from onnx import TensorProto, helper
from tiny_model import REVIEWS, make_checkpoint
from transformers import DistilBertForSequenceClassification

from benchmarks.peers import model as peer
from export import checkpoint as export_checkpoint
from export import graph, parity, ragged
from export import onnx as export_onnx
from export.repository import MODEL_FILE, REPOSITORY, manifest_path
from export.token_dropping import drop_tokens
from model_repository.classifier.engine import OPENVINO, RUNTIMES, Engine
from model_repository.classifier.fused_graph import fused
from model_repository.tokenizer.review_text import ReviewEncoder, pad
from training.token_dropping import TokenDroppingClassifier, most_attended, num_kept

CHECKOUT = Path(__file__).resolve().parents[1]
PERCENT = 40
MINIMUM = 6
"""Tokens that the checkpoint of four layers keeps at least."""
LABELS = ["negative", "positive"]


@pytest.fixture(scope="module")
def dropping(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, of whose tokens 40 percent are kept after the first layer's attention."""
    folder = tmp_path_factory.mktemp("dropping") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    set_dropping(folder, [PERCENT])
    return folder


@pytest.fixture(scope="module")
def dropping_twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four layers that drops tokens in two of them, down to a minimum."""
    folder = make_checkpoint(tmp_path_factory.mktemp("twice"), num_layers=4)
    set_dropping(folder, [100, 60, 30], MINIMUM)
    return folder


def set_dropping(checkpoint: Path, percent: list[int], minimum: int = 0) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"kept_percent": percent, "min_kept_tokens": minimum}
    (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def files(dropping: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return graph.build(dropping, graph.PRECISIONS, tmp_path_factory.mktemp("onnx"), LABELS)


@pytest.fixture(scope="module")
def tiny_encoder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as optimum exports it."""
    return graph.export_encoder(tiny_checkpoint, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def rows(tiny_checkpoint: Path) -> list[list[int]]:
    return ReviewEncoder(tiny_checkpoint / "tokenizer.json").encode(REVIEWS)


def torch_logits(model: TokenDroppingClassifier, rows: list[list[int]]) -> np.ndarray:
    with torch.inference_mode():
        return model(*map(torch.from_numpy, pad(rows))).logits.numpy()


def by_hand(model: DistilBertForSequenceClassification, row: list[int]) -> np.ndarray:
    """Returns the logits of one review with the library's own layers, the tokens chosen with its own attention."""
    ids = torch.tensor([row])
    first, second = model.distilbert.transformer.layer
    with torch.inference_mode():
        embedded = model.distilbert.embeddings(ids)
        answer, weights = first.attention(embedded, embedded, embedded, torch.ones_like(ids), output_attentions=True)
        received = weights[0].sum(dim=(0, 1))
        others = sorted(range(1, len(row)), key=lambda place: -received[place])
        places = [0, *others[: math.ceil(Fraction(len(row) * PERCENT, 100)) - 1]]
        attended = first.sa_layer_norm(answer + embedded)[:, places]
        hidden = first.output_layer_norm(first.ffn(attended) + attended)
        hidden = second(hidden, torch.ones(1, len(places)))[-1]
        return model.classifier(torch.relu(model.pre_classifier(hidden[:, 0])))[0].numpy()


def test_the_tokens_with_most_attention_go_on(dropping: Path, rows: list[list[int]]) -> None:
    model = TokenDroppingClassifier.from_pretrained(dropping).eval()
    plain = DistilBertForSequenceClassification.from_pretrained(dropping, attn_implementation="eager").eval()
    for row in rows:
        logits = torch_logits(model, [row])[0]
        np.testing.assert_allclose(logits, by_hand(plain, row), atol=1e-4)
    all_tokens = plain(*map(torch.from_numpy, pad(rows))).logits.detach().numpy()
    assert np.abs(torch_logits(model, rows) - all_tokens).max() > 0.01, "dropping changed nothing here"


@pytest.mark.parametrize("checkpoint", ["dropping", "dropping_twice"])
def test_an_answer_does_not_depend_on_the_padding_beside_it(
    request: pytest.FixtureRequest, checkpoint: str, rows: list[list[int]]
) -> None:
    model = TokenDroppingClassifier.from_pretrained(request.getfixturevalue(checkpoint)).eval()
    mixed = with_short_ones(rows)
    alone = np.concatenate([torch_logits(model, [row]) for row in mixed])
    assert len({len(row) for row in mixed}) > 1
    np.testing.assert_allclose(torch_logits(model, mixed), alone, atol=1e-4)


def test_without_the_key_it_is_the_library_s_model(tiny_checkpoint: Path, rows: list[list[int]]) -> None:
    ours = TokenDroppingClassifier.from_pretrained(tiny_checkpoint).eval()
    theirs = DistilBertForSequenceClassification.from_pretrained(tiny_checkpoint).eval()
    with torch.inference_mode():
        expected = theirs(*map(torch.from_numpy, pad(rows))).logits.numpy()
    np.testing.assert_array_equal(torch_logits(ours, rows), expected)


def test_the_graph_passes_the_gate(files: dict[str, Path], dropping: Path) -> None:
    arguments = ["--checkpoint", str(dropping), "--onnx", str(files["fp32"]), "--precision", "fp32"]
    assert parity.main([*arguments, "--num-reviews", "64"]) == 0


@pytest.mark.parametrize("runtime", RUNTIMES[1:])
def test_tokens_are_dropped_twice_in_the_graph_as_in_torch(
    dropping_twice: Path, tmp_path: Path, rows: list[list[int]], runtime: str
) -> None:
    (file,) = graph.build(dropping_twice, ["fp32"], tmp_path, LABELS).values()
    mixed = with_short_ones(rows)
    input_ids, attention_mask = pad(mixed)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    expected = torch_logits(TokenDroppingClassifier.from_pretrained(dropping_twice).eval(), mixed)
    (logits,) = Engine(file, num_threads=1, runtime=runtime).run(["logits"], inputs)
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_half_precision_changes_which_tokens_go_on_in_few_reviews(
    files: dict[str, Path], dropping: Path, rows: list[list[int]]
) -> None:
    session = exact_session(files["fp16"])
    input_ids, attention_mask = pad(rows)
    (logits,) = session.run(["logits"], {"input_ids": input_ids, "attention_mask": attention_mask})
    expected = torch_logits(TokenDroppingClassifier.from_pretrained(dropping).eval(), rows)
    assert np.median(np.abs(logits - expected).max(axis=1)) <= 0.01


@pytest.mark.parametrize("runtime", RUNTIMES[1:])
@pytest.mark.parametrize(
    ("percent", "minimum"), [(1, 0), (7, 0), (25, 0), (29, 0), (50, 0), (58, 0), (99, 0), (25, 10), (1, 100)]
)
def test_every_share_is_rounded_up_and_no_less_than_the_minimum(
    tiny_checkpoint: Path, tiny_encoder: Path, tmp_path: Path, runtime: str, percent: int, minimum: int
) -> None:
    model = drop_tokens(onnx.load(tiny_encoder), {0: percent}, minimum)
    (mask,) = [node.output[0] for node in model.graph.node if node.name.endswith("kept_mask")]
    model = graph.append_head(model, LABELS, graph.metadata(tiny_checkpoint))
    model.graph.output.append(helper.make_tensor_value_info(mask, TensorProto.INT64, ["batch", "kept"]))
    onnx.save(model, tmp_path / "kept.onnx")
    input_ids, attention_mask = pad([[2] * length for length in range(1, 65)])
    engine = Engine(tmp_path / "kept.onnx", num_threads=1, runtime=runtime)
    (kept,) = engine.run([mask], {"input_ids": input_ids, "attention_mask": attention_mask})
    shares = {length: math.ceil(Fraction(length * percent, 100)) for length in range(1, 65)}
    expected = [share if share >= minimum else min(length, minimum) for length, share in shares.items()]
    assert kept.sum(axis=1).tolist() == expected
    assert [num_kept(length, percent, minimum) for length in shares] == expected
    assert num_kept(torch.tensor(list(shares)), percent, minimum).tolist() == expected


def test_shares_are_not_rounded_to_half_precision(tiny_checkpoint: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    percent = 89  # of 9 tokens 8.01, in half precision 8
    model = graph.to_fp16(drop_tokens(onnx.load(tiny_encoder), {0: percent}, 0))
    (mask,) = [node.output[0] for node in model.graph.node if node.name.endswith("kept_mask")]
    model.graph.output.append(helper.make_tensor_value_info(mask, TensorProto.INT64, ["batch", "kept"]))
    onnx.save(model, tmp_path / "kept.onnx")
    input_ids, attention_mask = pad([[2] * length for length in range(1, 65)])
    (kept,) = exact_session(tmp_path / "kept.onnx").run(
        [mask], {"input_ids": input_ids, "attention_mask": attention_mask}
    )
    assert kept.sum(axis=1).tolist() == [num_kept(length, percent, 0) for length in range(1, 65)]


def test_half_precision_rounds_nothing_between_scores_and_choice(files: dict[str, Path]) -> None:
    model = onnx.load(files["fp16"])
    makers = {name: node for node in model.graph.node for name in node.output}
    (name,) = (node.input[0] for node in model.graph.node if node.op_type == "TopK")
    behind, rounded = [name], []
    while behind:
        node = makers.get(behind.pop())
        is_query_times_key = node is not None and node.op_type == "MatMul" and "received" not in node.name
        if node is None or node.op_type == "Shape" or is_query_times_key:  # what is before these may be rounded
            continue
        behind.extend(node.input)
        to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), None)
        rounded += [node.name] if to == TensorProto.FLOAT16 else []
    assert rounded == []


def test_training_in_bf16_chooses_as_in_fp32() -> None:
    query, key = torch.randn(2, 3, 2, 40, 16, generator=torch.Generator().manual_seed(0))  # (B, heads, T, a head's)
    mask = torch.arange(40) < torch.tensor([[40], [25], [7]])
    places = most_attended(query, key, mask, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(most_attended(query, key, mask, 20), places)


@pytest.mark.parametrize(
    ("percent", "minimum", "message"),
    [
        ([50, 50], 0, "config.json: kept_percent names 2 layers, expected fewer than the model's 2"),
        ([0], 0, "config.json: kept_percent is [0], expected whole numbers of 1 to 100"),
        ([50], -1, "config.json: min_kept_tokens is -1, expected a whole number, 0 or more"),
    ],
)
def test_a_configuration_written_by_hand_is_checked(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    percent: list[int],
    minimum: int,
    message: str,
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    set_dropping(checkpoint, percent, minimum)
    assert export_onnx.main(["--checkpoint", str(checkpoint), "--no-install"]) == 2
    assert message in capsys.readouterr().err


def test_the_gate_notices_a_graph_that_drops_nothing(dropping: Path, tiny_onnx: Path) -> None:
    assert parity.main(["--checkpoint", str(dropping), "--onnx", str(tiny_onnx), "--precision", "fp32"]) == 1


def test_what_chooses_tokens_is_not_rounded(files: dict[str, Path]) -> None:
    model = onnx.load(files["int8"])
    makers = {name: node for node in model.graph.node for name in node.output}
    choice = next(node for node in model.graph.node if node.op_type == "MatMul" and "dropping" in node.name)
    masked = makers[makers[choice.input[1]].input[0]]
    scores = makers[masked.input[0]]
    assert (masked.op_type, scores.op_type) == ("Add", "MatMul")
    query, key = makers[scores.input[0]], makers[scores.input[1]]
    assert "DequantizeLinear" not in (query.op_type, key.op_type)
    behind = [node for node in model.graph.node if "layer.0/ffn" in node.name and node.op_type == "MatMul"]
    assert {makers[node.input[0]].op_type for node in behind} == {"DequantizeLinear"}, "what is kept is int8 again"


def test_onnxruntimes_own_operators_give_the_same(files: dict[str, Path], rows: list[list[int]]) -> None:
    rewritten, is_int8 = fused(files["int8"])
    assert is_int8
    attention = [node for node in onnx.load_from_string(rewritten).graph.node if node.op_type == "If"]
    assert len(attention) == 1, "the second layer's; the first's numbers are needed one by one"
    own, plain = (
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for file in (rewritten, files["int8"].read_bytes())
    )
    input_ids, attention_mask = pad(rows)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    np.testing.assert_allclose(own.run(["logits"], inputs)[0], plain.run(["logits"], inputs)[0], atol=0.2)


def test_onnxruntimes_own_operators_have_the_mask_of_what_is_kept(
    dropping_twice: Path, tmp_path: Path, rows: list[list[int]]
) -> None:
    (file,) = graph.build(dropping_twice, ["int8"], tmp_path, LABELS).values()
    rewritten, _ = fused(file)
    assert sum(node.op_type == "If" for node in onnx.load_from_string(rewritten).graph.node) == 4
    session = onnxruntime.InferenceSession(rewritten, providers=["CPUExecutionProvider"])
    mixed = with_short_ones(rows)

    def logits(rows: list[list[int]]) -> np.ndarray:
        input_ids, attention_mask = pad(rows)
        return session.run(["logits"], {"input_ids": input_ids, "attention_mask": attention_mask})[0]

    alone = np.concatenate([logits([row]) for row in mixed])
    assert np.median(np.abs(logits(mixed) - alone)) < 1e-3, "rounding moves few, padding would move all short ones"


def test_narrow_batches_have_onnxruntimes_own_attention_everywhere(
    dropping_twice: Path, tmp_path: Path, rows: list[list[int]]
) -> None:
    (file,) = graph.build(dropping_twice, ["int8"], tmp_path, LABELS).values()
    model = onnx.load_from_string(fused(file)[0])
    chosen = 0
    for node in model.graph.node:
        if node.op_type == "If" and node.input[0] == "keeps_all_tokens":
            branches = {attribute.name: {n.op_type for n in attribute.g.node} for attribute in node.attribute}
            assert "TopK" in branches["else_branch"]
            assert "TopK" not in branches["then_branch"]
            chosen += 1
    assert chosen == 2
    own, plain = (
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for file in (model.SerializeToString(), file.read_bytes())
    )
    for width in (MINIMUM, MINIMUM + 1):
        input_ids, attention_mask = pad([row[: min(width, 3 + place)] for place, row in enumerate(rows)])
        assert input_ids.shape[1] == width
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        differences = np.abs(own.run(["logits"], inputs)[0] - plain.run(["logits"], inputs)[0])
        assert np.median(differences) < 0.1, "some are larger: sums of these random weights overflow without VNNI"


def with_short_ones(rows: list[list[int]]) -> list[list[int]]:
    return [*rows, *(row[:length] for row in rows for length in (1, 2, 3))]


def test_openvino_gives_the_same(files: dict[str, Path], dropping: Path, rows: list[list[int]]) -> None:
    engine = Engine(files["fp32"], num_threads=1, runtime=OPENVINO)
    input_ids, attention_mask = pad(rows)
    (logits,) = engine.run(["logits"], {"input_ids": input_ids, "attention_mask": attention_mask})
    expected = torch_logits(TokenDroppingClassifier.from_pretrained(dropping).eval(), rows)
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_a_checkpoint_made_from_the_file_drops_as_much(dropping_twice: Path, tmp_path: Path) -> None:
    (file,) = graph.build(dropping_twice, ["int8"], tmp_path, LABELS).values()
    export_checkpoint.restore(file, dropping_twice / "tokenizer.json", tmp_path / "restored")
    config = TokenDroppingClassifier.from_pretrained(tmp_path / "restored").config
    assert (config.kept_percent, config.min_kept_tokens) == ([100, 60, 30], MINIMUM)


def test_a_text_of_the_minimum_or_less_keeps_all_its_tokens(dropping_twice: Path, rows: list[list[int]]) -> None:
    model = TokenDroppingClassifier.from_pretrained(dropping_twice).eval()
    plain = DistilBertForSequenceClassification.from_pretrained(dropping_twice).eval()
    longest = max(rows, key=len)
    for length in (1, MINIMUM, MINIMUM + 3):
        cut = [row[:length] for row in rows]
        with torch.inference_mode():
            all_tokens = plain(*map(torch.from_numpy, pad(cut))).logits.numpy()
        beside_a_long_one = torch_logits(model, [*cut, longest])[:-1]
        same = np.abs(beside_a_long_one - all_tokens).max() < 1e-4
        assert same == (length <= MINIMUM)


def test_the_comparison_s_pipeline_drops_tokens_when_asked(dropping: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEER_CHECKPOINT", str(dropping))
    monkeypatch.setenv("PEER_THREADS", str(torch.get_num_threads()))
    scores = {}
    for name in ("torch", "torch-dropping"):
        monkeypatch.setenv("PEER_ENGINE", name)
        scores[name] = [answer["score"] for answer in peer.pipeline()(REVIEWS)]
    rows = ReviewEncoder(dropping / "tokenizer.json").encode(REVIEWS)
    logits = torch_logits(TokenDroppingClassifier.from_pretrained(dropping).eval(), rows)
    expected = torch.from_numpy(logits).softmax(dim=1).max(dim=1).values.numpy()
    np.testing.assert_allclose(scores["torch-dropping"], expected, atol=1e-4)
    assert np.abs(np.array(scores["torch"]) - expected).max() > 1e-3


def test_the_shipped_model_keeps_what_its_recipe_says() -> None:
    recipe = yaml.safe_load((CHECKOUT / "training" / "configs" / "dropping.yaml").read_text())["training"]
    file = onnx.load(REPOSITORY / MODEL_FILE, load_external_data=False)
    facts = {entry.key: json.loads(entry.value) for entry in file.metadata_props}
    shipped = json.loads(manifest_path().read_text())["source_checkpoint"]["name"]
    if shipped != "dropping-more":
        pytest.skip("another model is installed in this checkout: git checkout -- model_repository")
    for name in ("kept_percent", "min_kept_tokens"):
        assert facts[name] == recipe[name]


def test_the_ragged_graph_refuses_it(dropping: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ragged.main(["--checkpoint", str(dropping)]) == 2
    assert f"drops tokens (kept_percent [{PERCENT}])" in capsys.readouterr().err
