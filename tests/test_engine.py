"""The TensorRT engine without TensorRT: its plan, its two graphs, its gate, its installation. The build needs a GPU."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import serving
import torch
from google.protobuf import text_format
from onnxruntime.quantization import quantize_dynamic
from tiny_model import REVIEWS

from export import engine_manifest, graph, parity
from export import tensorrt as export_tensorrt
from export.engine_graph import GraphError, graph_precision
from export.engine_install import install_engine
from export.engine_plan import EnginePlan, PlanError, Profile, read_config, read_plan
from export.engine_precision import BuildError, check_precision
from export.repository import REPOSITORY, TOKENIZER_FILE
from local_server.preflight import pass_over_engine
from model_repository.tokenizer.review_text import ReviewEncoder

CONFIG = Path("classifier/configs/tensorrt.pbtxt")


@pytest.fixture(scope="module")
def models(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's repository, its TensorRT configuration warmed up at the width of its tokenizer."""
    folder = shutil.copytree(repository, tmp_path_factory.mktemp("engine") / "models")
    config = read_config(folder / CONFIG)
    for value in config.model_warmup[0].inputs.values():
        value.dims[0] = 64
    (folder / CONFIG).write_text(text_format.MessageToString(config))
    return folder


@pytest.fixture(scope="module")
def plan(models: Path, tiny_onnx: Path) -> EnginePlan:
    return read_plan(tiny_onnx, models / CONFIG)


def test_installed_model_gets_a_profile_for_each_width_of_its_tokenizer(tiny_onnx: Path) -> None:
    if not (REPOSITORY / TOKENIZER_FILE).exists():
        pytest.skip("no model is installed in this checkout: make export")
    plan = read_plan(tiny_onnx, REPOSITORY / CONFIG)
    config = read_config(REPOSITORY / CONFIG)
    opt, largest = int(config.parameters["opt_batch_size"].string_value), config.max_batch_size
    widths = [profile.max[1] for profile in plan.profiles]
    assert widths == sorted(set(widths))
    assert widths[-1] == ReviewEncoder(REPOSITORY / TOKENIZER_FILE).max_length
    assert plan.profiles == tuple(Profile(min=(1, w), opt=(opt, w), max=(largest, w)) for w in widths)


def test_plan_names_tensors_and_precision(plan: EnginePlan) -> None:
    assert plan.precision == "fp32"
    assert set(plan.inputs) == {"input_ids", "attention_mask"}
    assert set(plan.outputs) == {"logits", "probabilities", "score"}
    assert not [t for t in plan.graph.graph.initializer if t.data_type == onnx.TensorProto.STRING]


def test_precision_is_that_of_the_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    files = graph.build(tiny_checkpoint, ["fp32", "fp16", "int8"], tmp_path, ["negative", "positive"])
    assert {name: graph_precision(onnx.load(files[name])) for name in ("fp32", "fp16")} == {
        "fp32": "fp32",
        "fp16": "fp16",
    }
    with pytest.raises(GraphError, match="zero point"):
        graph_precision(onnx.load(files["int8"]))
    quantize_dynamic(files["fp32"], tmp_path / "dynamic.onnx")
    with pytest.raises(GraphError, match="MatMulInteger"):
        graph_precision(onnx.load(tmp_path / "dynamic.onnx"))


def test_configuration_that_misses_a_profile_is_refused(models: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(models, tmp_path / "models")
    config = read_config(copy / CONFIG)
    config.instance_group[0].profile[:] = ["0", "1"]
    (copy / CONFIG).write_text(text_format.MessageToString(config))
    with pytest.raises(PlanError, match=r"pads to \[64\]"):
        read_plan(tiny_onnx, copy / CONFIG)


def test_batches_smaller_than_the_gates_are_refused_before_anything_is_built(
    models: Path, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(models, tmp_path / "models")
    config = read_config(copy / CONFIG)
    for max_batch_size, status in ((31, 2), (32, 0)):
        config.max_batch_size = max_batch_size
        (copy / CONFIG).write_text(text_format.MessageToString(config))
        command = ["--onnx", str(tiny_onnx), "--config", str(copy / CONFIG), "--plan-only"]
        assert export_tensorrt.main(command) == status
    assert "has max_batch_size 31, expected at least 32: the parity gate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("refuses", "what"),
    [
        ("set_optimization_profile_async", "optimisation profile 0"),
        ("set_input_shape", r"input_ids of shape \(2, 64\) in profile 0"),
        ("set_tensor_address", "the memory of input_ids"),
    ],
)
def test_what_the_engine_refuses_is_an_error_and_not_a_wrong_answer(
    plan: EnginePlan, monkeypatch: pytest.MonkeyPatch, refuses: str, what: str
) -> None:
    class Context:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: (2, 2) if name == "get_tensor_shape" else name != refuses

    tensorrt = SimpleNamespace(ILogger=type("ILogger", (), {"Severity": int}), IProgressMonitor=object)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.delitem(sys.modules, "export.engine_build", raising=False)
    engine_build = importlib.import_module("export.engine_build")
    del sys.modules["export.engine_build"]  # no other test is to find it
    on_cpu = SimpleNamespace(
        cuda=SimpleNamespace(current_stream=lambda: SimpleNamespace(cuda_stream=0, synchronize=lambda: None)),
        from_numpy=lambda array: SimpleNamespace(cuda=lambda: torch.from_numpy(array)),
        empty=lambda shape, device: torch.empty(shape),
    )
    monkeypatch.setattr(engine_build, "torch", on_cpu)
    engine = object.__new__(engine_build.Engine)
    engine._context, engine._plan, engine._widths = Context(), plan, [64]
    ids = np.ones((2, 8), np.int64)
    with pytest.raises(BuildError, match=f"the engine refused {what}"):
        engine.run(ids, ids)


def test_plan_is_printed_without_tensorrt(models: Path, tiny_onnx: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_tensorrt.main(["--onnx", str(tiny_onnx), "--config", str(models / CONFIG), "--plan-only"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["profiles"] == [{"min": [1, 64], "opt": [16, 64], "max": [64, 64]}]


def test_a_graph_that_is_not_there_is_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_tensorrt.main(["--onnx", "no.onnx", "--config", str(models / CONFIG), "--plan-only"]) == 2
    assert "no.onnx is no file" in capsys.readouterr().err


def test_a_graph_that_was_cut_short_is_named(
    models: Path, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(tiny_onnx.read_bytes()[:-8])
    assert export_tensorrt.main(["--onnx", str(file), "--config", str(models / CONFIG), "--plan-only"]) == 2
    assert f"export.tensorrt: {file} is no whole ONNX file" in capsys.readouterr().err


def stand_in(plan: EnginePlan) -> Any:
    """Returns a function that computes the plan's graph as the engine would."""
    session = onnxruntime.InferenceSession(plan.graph.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        feed = {"input_ids": input_ids, "attention_mask": attention_mask}
        return dict(zip(plan.outputs, session.run(plan.outputs, feed), strict=True))

    return run


def test_both_graphs_together_pass_the_gate_of_the_whole(
    plan: EnginePlan, tiny_checkpoint: Path, tiny_onnx: Path
) -> None:
    run = export_tensorrt.with_labels(plan, stand_in(plan))
    checks = parity.compare(tiny_checkpoint, tiny_onnx, "fp32", list(REVIEWS) * 16, run)
    assert all(check.passed for check in checks), checks


def test_gate_stops_an_engine_that_computes_something_else(
    plan: EnginePlan, tiny_checkpoint: Path, tiny_onnx: Path
) -> None:
    def wrong(input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        outputs = stand_in(plan)(input_ids, attention_mask)
        return {**outputs, "logits": outputs["logits"][:, ::-1]}

    checks = parity.compare(
        tiny_checkpoint, tiny_onnx, "fp32", list(REVIEWS) * 16, export_tensorrt.with_labels(plan, wrong)
    )
    assert not all(check.passed for check in checks)


def test_installed_engine_is_accepted_on_its_machine(plan: EnginePlan, models: Path, tmp_path: Path) -> None:
    copy, labels = shutil.copytree(models, tmp_path / "models"), tmp_path / "labels"
    (tmp_path / "plan").write_bytes(b"an engine")
    here = engine_manifest.Machine(tensorrt="11.4.0", compute_capabilities=("9.0",), gpu="H200", driver="610.1")
    facts = {"machine": {"tensorrt": "11.4.0", "compute_capability": "9.0", "gpu": "H200"}}
    install_engine(tmp_path / "plan", plan.labels.SerializeToString(), facts, copy, labels)
    engine_manifest.check_engine(copy, here, labels)
    engine_manifest.engine_manifest_path(copy).unlink()
    with pytest.raises(engine_manifest.EngineError, match="make engine"):
        engine_manifest.check_engine(copy, here, labels)


@pytest.mark.parametrize("changed", ["model.safetensors", "tokenizer.json"])
def test_engine_is_built_from_the_checkpoint_of_the_installed_model_alone(
    models: Path, tiny_checkpoint: Path, tmp_path: Path, changed: str
) -> None:
    engine_manifest.check_source(tiny_checkpoint, models)
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    (other / changed).write_bytes((other / changed).read_bytes() + b" ")
    with pytest.raises(engine_manifest.EngineError, match=rf"{changed} is not what .*make export CHECKPOINT={other}"):
        engine_manifest.check_source(other, models)


KILLED_INSTALLATION = """
import os, signal, sys
from pathlib import Path
from export.engine_install import install_engine

folder, text, call = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(folder / "plan").write_text(text)
machine = {"tensorrt": "11.4.0", "compute_capability": "9.0", "gpu": "H200"}
count = 0

def kill(event, arguments):
    global count
    writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
    if writes or event in ("os.rename", "os.remove"):
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
manifest = {"machine": machine, "built": text}
install_engine(folder / "plan", text.encode(), manifest, folder / "models", folder / "labels")
"""


def test_killed_installation_leaves_the_old_engine_the_new_one_or_none(models: Path, tmp_path: Path) -> None:
    here = engine_manifest.Machine(tensorrt="11.4.0", compute_capabilities=("9.0",), gpu="H200", driver="610.1")

    def install(folder: Path, text: str, call: int) -> int:
        command = [sys.executable, "-c", KILLED_INSTALLATION, str(folder), text, str(call)]
        return subprocess.run(command, cwd=serving.CHECKOUT).returncode

    outcomes = []
    for call in range(1, 20):
        folder = tmp_path / str(call)
        copy = shutil.copytree(models, folder / "models")
        assert install(folder, "old", 0) == 0
        killed = install(folder, "new", call) != 0
        try:
            manifest = engine_manifest.check_engine(copy, here, folder / "labels")
        except engine_manifest.EngineError:
            outcomes.append("none")
        else:
            outcomes.append(manifest["built"])
            assert (copy / engine_manifest.ENGINE_FILE).read_text() == manifest["built"]
            assert (folder / "labels" / engine_manifest.LABELS_FILE).read_text() == manifest["built"]
        if not killed:
            break
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"
    assert len(outcomes) > 4


def test_reviews_and_labels_in_other_columns_are_taken_once_they_are_named(
    models: Path, tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "reviews.csv"
    file.write_text("body,verdict,label\na good film,positive,fresh\na bad film,negative,rotten\n")
    command = ["--onnx", str(tiny_onnx), "--config", str(models / CONFIG), "--checkpoint", str(tiny_checkpoint)]
    command += ["--data", str(file)]
    assert export_tensorrt.main(command) == 2
    assert "no column 'text'; columns are ['body', 'verdict', 'label']: set" in capsys.readouterr().err
    command += ["--text-column", "body"]
    assert export_tensorrt.main(command) == 2
    assert "labels ['fresh', 'rotten'] are neither names in ['negative', 'positive']" in capsys.readouterr().err
    args = export_tensorrt._parser().parse_args([*command, "--label-column", "verdict"])
    assert sorted(export_tensorrt._reviews(args)) == ["a bad film", "a good film"]


def test_build_on_this_machine(tiny_checkpoint: Path, tiny_onnx: Path, models: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt", reason="TensorRT is not installed: run this test in docker/Dockerfile.export")
    try:
        engine_manifest.this_machine()
    except engine_manifest.EngineError as error:
        pytest.skip(str(error))
    copy = shutil.copytree(models, tmp_path / "models")
    arguments = ["--onnx", str(tiny_onnx), "--config", str(copy / CONFIG), "--checkpoint", str(tiny_checkpoint)]
    labels = tmp_path / "labels"
    assert export_tensorrt.main([*arguments, "--labels-repository", str(labels)]) == 0
    engine_manifest.check_engine(copy, engine_manifest.this_machine(), labels)


def test_local_server_passes_over_an_engine(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(models, tmp_path / "models")
    engine_manifest.engine_manifest_path(copy).write_text("{}")
    pass_over_engine(copy)
    (line,) = capsys.readouterr().err.splitlines()
    assert "serving the ONNX model instead" in line


def layer(kind: str, *types: str) -> dict[str, Any]:
    return {"LayerType": kind, "Inputs": [{"Format/Datatype": name} for name in types]}


def test_precision_is_read_back_from_the_engine() -> None:
    assert check_precision([layer("gemm", "Half", "Half"), layer("kgen", "Float")], "fp16")["fp16"] == 1
    assert check_precision([layer("gemm", "Row major linear FP16 format")], "fp16")["fp16"] == 1
    for layers in ([layer("gemm", "Float", "Float")], [layer("kgen", "Half")], []):
        with pytest.raises(BuildError):
            check_precision(layers, "fp16")
    bf16 = [layer("gemm", "BFloat16", "BFloat16")]
    assert check_precision(bf16, "bf16")["fp32"] == 0
    with pytest.raises(BuildError, match=r"fp32 was asked for, but 1 matrix layers take inputs of .*'bf16': 1"):
        check_precision(bf16, "fp32")
