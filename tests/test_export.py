"""Export: the graph's contract, and a parity gate that lets a good model through and stops a broken one."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export import checkpoint as export_checkpoint
from export import graph, parity
from export import onnx as export_onnx
from export.generated_reviews import LENGTH_QUANTILES, generate
from export.repository import MODEL_FILE, TOKENIZER_FILE, RepositoryError, verify

LABELS = ["negative", "positive"]
pytestmark = pytest.mark.usefixtures("exact_engine")


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return graph.build(tiny_checkpoint, graph.PRECISIONS, tmp_path_factory.mktemp("onnx"), LABELS)


@pytest.fixture(autouse=True)
def wider_int8_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random, wide weights round worse, and put far more reviews near a tie, where rounding decides."""
    monkeypatch.setitem(
        parity.TOLERANCES,
        "int8",
        replace(parity.TOLERANCES["int8"], logits=1.0, mean_probability=0.1, flipped_share=0.1),
    )


def gate(checkpoint: Path, file: Path, precision: str = "fp32") -> int:
    arguments = ["--checkpoint", str(checkpoint), "--onnx", str(file), "--precision", precision]
    return parity.main([*arguments, "--num-reviews", "64"])


@pytest.mark.parametrize("precision", graph.PRECISIONS)
def test_graph_keeps_the_contract(files: dict[str, Path], precision: str) -> None:
    session = onnxruntime.InferenceSession(str(files[precision]))
    assert {(i.name, i.type, tuple(i.shape)) for i in session.get_inputs()} == {
        ("input_ids", "tensor(int64)", ("batch", "sequence")),
        ("attention_mask", "tensor(int64)", ("batch", "sequence")),
    }
    assert [(o.name, o.type, tuple(o.shape)) for o in session.get_outputs()] == [
        ("logits", "tensor(float)", ("batch", 2)),
        ("probabilities", "tensor(float)", ("batch", 2)),
        ("score", "tensor(float)", ("batch", 1)),
        ("label", "tensor(string)", ("batch", 1)),
    ]


@pytest.mark.parametrize("precision", graph.PRECISIONS)
def test_file_is_readable_by_the_containers_runtime_and_alone(files: dict[str, Path], precision: str) -> None:
    model = onnx.load(files[precision], load_external_data=False)
    assert model.ir_version <= 10
    assert {entry.domain: entry.version for entry in model.opset_import}[""] <= 20
    assert not [tensor.name for tensor in model.graph.initializer if tensor.external_data]
    assert [path.name for path in files[precision].parent.iterdir()] == ["model.onnx"]


def test_fp16_and_int8_hold_their_weights_in_that_type(files: dict[str, Path]) -> None:
    def types(precision: str) -> set[int]:
        return {tensor.data_type for tensor in onnx.load(files[precision]).graph.initializer if len(tensor.dims) == 2}

    assert TensorProto.FLOAT16 in types("fp16")
    assert TensorProto.INT8 in types("int8")


def test_labels_come_from_the_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"id2label": {"0": "thumbs down", "1": "thumbs up"}, "label2id": {"thumbs down": 0, "thumbs up": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--checkpoint", str(tmp_path), "--precision", "fp32", "--no-install", "--num-reviews", "64"]
    assert export_onnx.main(arguments) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "fp32" / "model.onnx"))
    ids = np.arange(5, 45, dtype=np.int64).reshape(4, 10)
    logits, labels = session.run(["logits", "label"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert labels[:, 0].tolist() == [["thumbs down", "thumbs up"][index] for index in logits.argmax(axis=1)]


def test_a_checkpoint_of_more_labels_is_refused_before_it_replaces_anything(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"id2label": {"0": "bad", "1": "fair", "2": "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert export_onnx.main(["--checkpoint", str(tmp_path), "--no-install"]) != 0
    assert "3 labels, expected 2" in capsys.readouterr().err


def test_same_checkpoint_gives_the_same_bytes(tiny_checkpoint: Path, files: dict[str, Path], tmp_path: Path) -> None:
    again = graph.build(tiny_checkpoint, graph.PRECISIONS, tmp_path, LABELS)
    assert {name: path.read_bytes() == files[name].read_bytes() for name, path in again.items()} == dict.fromkeys(
        graph.PRECISIONS, True
    )


@pytest.mark.parametrize("precision", graph.PRECISIONS)
def test_gate_passes_what_export_made(tiny_checkpoint: Path, files: dict[str, Path], precision: str) -> None:
    assert gate(tiny_checkpoint, files[precision], precision) == 0


def test_gate_takes_labels_by_their_ids_in_whatever_order_the_checkpoint_lists_them(
    tiny_checkpoint: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["id2label"] = {"1": "positive", "0": "negative"}
    (copy / "config.json").write_text(json.dumps(config))
    assert gate(copy, files["fp32"]) == 0


def scaled_weights(model: ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2 and t.data_type == TensorProto.FLOAT)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.5, tensor.name))


def biased_classifier(model: ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "classifier.bias")
    bias = numpy_helper.to_array(tensor) + np.array([8e-4, 0], np.float32)  # within what one logit may differ by
    tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))


def swapped_labels(model: ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "label_names")
    tensor.string_data[:] = list(tensor.string_data)[::-1]


def ignored_mask(model: ModelProto) -> None:
    for node in model.graph.node:
        node.input[:] = ["all_ones" if name == "attention_mask" else name for name in node.input]
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    nodes = [
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("ConstantOfShape", ["mask_shape"], ["all_ones"], value=one),
    ]
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def not_a_number_for_padded_rows(model: ModelProto) -> None:
    for node in model.graph.node:
        node.output[:] = ["finite_logits" if name == "logits" else name for name in node.output]
    divide = [
        helper.make_node("ReduceMax", ["attention_mask", "label_axis"], ["any_token"], keepdims=1),
        helper.make_node("Cast", ["any_token"], ["any_token_float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["finite_logits", "any_token_float"], ["logits"]),
    ]
    rest = list(model.graph.node)
    del model.graph.node[:]
    head = next(index for index, node in enumerate(rest) if node.name == "head_softmax")
    model.graph.node.extend([*rest[:head], *divide, *rest[head:]])


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        pytest.param(scaled_weights, "max |difference of logits|", id="weights"),
        pytest.param(biased_classifier, "mean |difference of probabilities|", id="bias"),
        pytest.param(swapped_labels, "wrong scores or labels", id="labels"),
        pytest.param(ignored_mask, "max |change among 31 others|", id="mask"),
        pytest.param(not_a_number_for_padded_rows, "not finite with a padded row", id="padding"),
    ],
)
def test_gate_stops_a_broken_model(
    tiny_checkpoint: Path,
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[ModelProto], None],
    line: str,
) -> None:
    model = onnx.load(files["fp32"])
    damage(model)
    onnx.save(model, tmp_path / "broken.onnx")
    assert gate(tiny_checkpoint, tmp_path / "broken.onnx") == 1
    broken = [text for text in capsys.readouterr().out.splitlines() if text.endswith("BROKEN")]
    assert any(line in text for text in broken), broken


def test_export_that_fails_the_gate_installs_nothing(
    tiny_checkpoint: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def append_swapped(model: ModelProto, labels: list[str], facts: dict[str, str]) -> ModelProto:
        return append_head(model, labels[::-1], facts)

    append_head = graph.append_head
    monkeypatch.setattr(graph, "append_head", append_swapped)
    before = (repository / MODEL_FILE).read_bytes()
    arguments = ["--checkpoint", str(tiny_checkpoint), "--output-dir", str(tmp_path), "--num-reviews", "64"]
    assert export_onnx.main([*arguments, "--repository", str(repository)]) == 1
    assert (repository / MODEL_FILE).read_bytes() == before


def test_a_checkpoint_that_int8_alone_rounds_too_much_is_told_what_can_be_served(
    tiny_checkpoint: Path,
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def compare(checkpoint: Path, onnx_file: Path, precision: str, reviews: list[str]) -> list[parity.Check]:
        return [parity.Check(name="share of labels flipped", measured=float(precision in broken), limit=0)]

    monkeypatch.setattr(graph, "build", lambda *arguments: files)
    monkeypatch.setattr(parity, "compare", compare)
    command = ["--checkpoint", str(tiny_checkpoint), "--output-dir", str(tmp_path), "--no-install"]
    broken = ["int8"]
    assert export_onnx.main(command) == 1
    error = capsys.readouterr().err
    assert "BROKEN in int8: nothing was installed" in error
    assert f'make export CHECKPOINT={tiny_checkpoint} EXPORT_ARGS="--precision fp32 --install fp32"' in error
    broken = ["fp16", "int8"]  # then it is not int8's rounding
    assert export_onnx.main(command) == 1
    error = capsys.readouterr().err
    assert "BROKEN in fp16, int8: nothing was installed" in error
    assert "EXPORT_ARGS" not in error


def test_export_installs_a_set_that_verifies(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model_repository"
    (folder / "classifier").mkdir(parents=True)
    with pytest.raises(RepositoryError):
        verify(folder)
    arguments = ["--checkpoint", str(tiny_checkpoint), "--output-dir", str(tmp_path / "out"), "--num-reviews", "64"]
    assert export_onnx.main([*arguments, "--precision", "int8", "--repository", str(folder)]) == 0
    manifest = verify(folder)
    assert (manifest["precision"], manifest["labels"], manifest["max_length"]) == ("int8", LABELS, 64)
    assert {"source_checkpoint", "parity", "versions", "git_revision"} <= manifest.keys()


def test_folder_without_a_checkpoint_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_onnx.main(["--checkpoint", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["no config.json", "model.onnx is no file"])
def test_the_gate_alone_says_what_is_missing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    checkpoint = tmp_path if "config" in missing else tiny_checkpoint
    assert gate(checkpoint, tmp_path / "model.onnx") == 2
    assert missing in capsys.readouterr().err


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_checkpoint_with_a_file_that_was_cut_short_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    cut(copy / name)
    assert export_onnx.main(["--checkpoint", str(copy), "--no-install"]) == 2
    assert f"export.onnx: {copy / name} cannot be read" in capsys.readouterr().err
    assert not (copy / "onnx").exists()


def test_an_onnx_file_that_was_cut_short_or_is_another_is_refused(
    tiny_checkpoint: Path, tiny_onnx: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(shutil.copy(tiny_onnx, tmp_path))
    cut(file)
    assert gate(tiny_checkpoint, file) == 2
    assert f"export.parity: {file} is no whole ONNX file" in capsys.readouterr().err
    command = ["--onnx", str(file), "--tokenizer", str(repository / TOKENIZER_FILE)]
    assert export_checkpoint.main([*command, "--output", str(tmp_path / "out")]) == 2
    assert f"export.checkpoint: {file} is no whole ONNX file" in capsys.readouterr().err
    file.write_bytes(b"")
    assert gate(tiny_checkpoint, file) == 2
    assert f"{file} has the outputs [], expected an ONNX file as export.onnx writes it" in capsys.readouterr().err


def test_generated_reviews_have_the_lengths_they_claim() -> None:
    reviews = generate(600, seed=1)
    assert reviews == generate(600, seed=1)
    words = np.array([len(review.split()) for review in reviews])
    quantiles = dict(LENGTH_QUANTILES)
    for share in (0.25, 0.5, 0.75, 0.9):
        assert np.quantile(words, share) == pytest.approx(quantiles[share] / 1.2, rel=0.2)


def test_reviews_that_calibrate_int8_are_not_those_of_its_gate(
    tiny_checkpoint: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "reviews.csv"
    file.write_text("text,label\n" + "".join(f"film {number},fresh\n" for number in range(200)))
    given: dict[str, list[str]] = {}

    def build(*arguments: Any) -> dict[str, Path]:
        given["calibration"] = list(arguments[-1])
        return {"int8": files["int8"]}

    def compare(checkpoint: Path, onnx_file: Path, precision: str, reviews: list[str]) -> list[Any]:
        given["gate"] = reviews
        return []

    monkeypatch.setattr(graph, "build", build)
    monkeypatch.setattr(parity, "compare", compare)
    command = ["--checkpoint", str(tiny_checkpoint), "--output-dir", str(tmp_path), "--no-install", "--data", str(file)]
    assert export_onnx.main([*command, "--calibration-data", str(file), "--num-reviews", "72"]) == 0
    assert len(given["calibration"]) == 128
    assert len(given["gate"]) == 72
    assert not set(given["gate"]) & set(given["calibration"])
    assert export_onnx.main([*command, "--calibration-data", str(file), "--num-reviews", "100"]) == 0
    assert len(given["gate"]) == 100, "filled up where there are no others"


def test_reviews_in_another_column_are_taken_once_it_is_named(
    tiny_checkpoint: Path,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(graph, "build", lambda *arguments: {"fp32": files["fp32"]})
    file = tmp_path / "reviews.csv"
    file.write_text("body,label\n" + "".join(f"film {number},fresh\n" for number in range(64)))
    commands: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (parity.main, ["--onnx", str(files["fp32"]), "--precision", "fp32"]),
        (export_onnx.main, ["--output-dir", str(tmp_path), "--precision", "fp32", "--no-install"]),
    ]
    for main, options in commands:
        command = ["--checkpoint", str(tiny_checkpoint), *options, "--data", str(file)]
        assert main(command) == 2
        assert "no column 'text'; columns are ['body', 'label']: set data.text_column or --text-column" in (
            capsys.readouterr().err
        )
        assert main([*command, "--text-column", "body"]) == 0
    calibrated = ["--calibration-data", str(file), "--text-column", "body", "--num-reviews", "8"]
    assert export_onnx.main(["--checkpoint", str(tiny_checkpoint), *commands[1][1], *calibrated]) == 0


@pytest.mark.parametrize("option", ["--data", "--calibration-data"])
def test_reviews_that_cannot_be_read_end_the_export_before_it_replaces_anything(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    earlier = tmp_path / "fp32" / "model.onnx"
    earlier.parent.mkdir()
    earlier.write_text("an earlier one")
    command = [
        "--checkpoint",
        str(tiny_checkpoint),
        "--output-dir",
        str(tmp_path),
        "--precision",
        "fp32",
        "--no-install",
    ]
    assert export_onnx.main([*command, option, str(tmp_path / "absent.csv")]) == 2
    assert "absent.csv: no such file" in capsys.readouterr().err
    assert earlier.read_text() == "an earlier one"


def test_a_tokenizer_without_truncation_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps({**tokenizer, "truncation": None}))
    assert export_onnx.main(["--checkpoint", str(copy), "--no-install"]) == 2
    assert "sets no truncation" in capsys.readouterr().err
    assert not (copy / "onnx").exists()
