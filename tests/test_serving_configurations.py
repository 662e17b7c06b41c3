"""The native configurations: every file agrees with graph, widths and ensemble, and all answer as the default does.

The wheel's Triton lacks the native backends. So on the real server a Python model stands in for each: it runs the ONNX
file with the outputs that the configuration names, and everything else of the configuration stays as it is written.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import serving
from google.protobuf import text_format
from test_model_repository import tensors
from tiny_model import REVIEWS
from tritonclient.grpc import model_config_pb2

from benchmarks.gpu import repository as stand_in_repository
from benchmarks.gpu import session
from export.engine_graph import split_labels
from export.repository import REPOSITORY, TOKENIZER_FILE
from model_repository.tokenizer.review_text import ReviewEncoder, fixed_widths

CONFIGURATIONS = ("onnxruntime", "tensorrt")
LABELS = serving.CHECKOUT / "docker" / "tensorrt" / "labels"


def read(file: Path) -> model_config_pb2.ModelConfig:
    return text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())


def config(model: str, name: str) -> model_config_pb2.ModelConfig:
    """Returns the configuration that `--model-config-name` picks."""
    if model == "labels":
        return read(LABELS / "config.pbtxt")
    named = REPOSITORY / model / "configs" / f"{name}.pbtxt"
    return read(named if named.exists() else REPOSITORY / model / "config.pbtxt")


def widths(name: str, tokenizer_file: Path) -> list[int]:
    multiple = config("tokenizer", name).parameters["pad_to_multiple_of"].string_value
    return fixed_widths(int(multiple), ReviewEncoder(tokenizer_file).max_length)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_steps_of_the_ensemble_fit_together_and_keep_the_public_contract(name: str) -> None:
    ensemble, public = config("sentiment", name), read(REPOSITORY / "sentiment" / "config.pbtxt")
    assert tensors(ensemble.input) == tensors(public.input)
    assert tensors(ensemble.output) == tensors(public.output)
    assert ensemble.max_batch_size == public.max_batch_size
    known = tensors(ensemble.input)
    for step in ensemble.ensemble_scheduling.step:
        model = config(step.model_name, name)
        assert model.name == step.model_name
        assert model.max_batch_size == ensemble.max_batch_size
        assert {inner: known[outer] for inner, outer in step.input_map.items()} == tensors(model.input)
        known.update({outer: tensors(model.output)[inner] for inner, outer in step.output_map.items()})
    assert tensors(ensemble.output).items() <= known.items()


def test_native_configurations_tokenise_alike_and_merge_one_width() -> None:
    onnx_tokenizer, plan_tokenizer = (config("tokenizer", name) for name in CONFIGURATIONS)
    for policy in (onnx_tokenizer, plan_tokenizer):
        policy.dynamic_batching.Clear()
    assert onnx_tokenizer == plan_tokenizer
    for name in CONFIGURATIONS:
        assert not any(tensor.allow_ragged_batch for tensor in config("classifier", name).input)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("model", ["tokenizer", "classifier"])
def test_queues_are_bounded_without_a_timeout_and_nothing_waits_for_company(name: str, model: str) -> None:
    batching = config(model, name).dynamic_batching
    assert batching.default_queue_policy.max_queue_size > 0
    assert batching.default_queue_policy.default_timeout_microseconds == 0
    assert batching.max_queue_delay_microseconds == 0


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_width_of_the_installed_tokenizer_is_warmed_up(name: str) -> None:
    if not (REPOSITORY / TOKENIZER_FILE).exists():
        pytest.skip("no model is installed in this checkout: make export")
    expected = widths(name, REPOSITORY / TOKENIZER_FILE)
    classifier = config("classifier", name)
    for tensor in ("input_ids", "attention_mask"):
        assert [list(warm_up.inputs[tensor].dims) for warm_up in classifier.model_warmup] == [[w] for w in expected]
    (group,) = classifier.instance_group
    assert group.count == 1, "a warm-up that fails with two instances has crashed servers"
    if name == "tensorrt":
        assert list(group.profile) == [str(index) for index in range(len(expected))]
        assert 1 <= int(classifier.parameters["opt_batch_size"].string_value) <= classifier.max_batch_size


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_request_gets_one_width_so_that_all_merge(name: str) -> None:
    tokenizer_file = REPOSITORY / TOKENIZER_FILE
    if not tokenizer_file.exists():
        pytest.skip("no model is installed in this checkout: make export")
    assert widths(name, tokenizer_file) == [ReviewEncoder(tokenizer_file).max_length]


ONNX_TYPES = {
    onnx.TensorProto.INT64: model_config_pb2.TYPE_INT64,
    onnx.TensorProto.FLOAT: model_config_pb2.TYPE_FP32,
    onnx.TensorProto.STRING: model_config_pb2.TYPE_STRING,
}


def graph_tensors(values: object) -> dict[str, tuple[int, list[int]]]:
    """Returns data type and dims, without the batch, of a graph's inputs or outputs by name."""
    return {
        value.name: (
            ONNX_TYPES[value.type.tensor_type.elem_type],
            [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim][1:],
        )
        for value in values  # type: ignore[attr-defined]
    }


def test_configurations_name_the_tensors_of_their_graphs(tiny_onnx: Path) -> None:
    whole = onnx.load(tiny_onnx)
    plan, labels = split_labels(whole)
    native, engine, tail = config("classifier", "onnxruntime"), config("classifier", "tensorrt"), config("labels", "")
    assert tensors(native.input) == graph_tensors(whole.graph.input)
    assert tensors(native.output).items() <= graph_tensors(whole.graph.output).items()
    assert tensors(engine.input) == graph_tensors(plan.graph.input)
    assert tensors(engine.output) == graph_tensors(plan.graph.output), "the backend wants every output of a plan named"
    assert tensors(tail.input) == graph_tensors(labels.graph.input)
    assert tensors(tail.output) == graph_tensors(labels.graph.output)


def use_stand_in(model: Path, configuration: model_config_pb2.ModelConfig, graph: bytes) -> None:
    for warm_up in configuration.model_warmup:  # the tiny model has fewer positions than the warm-up
        for value in warm_up.inputs.values():
            if value.data_type == model_config_pb2.TYPE_INT64:
                value.dims[0] = min(value.dims[0], 64)
    stand_in_repository.use_stand_in(model, configuration, "stand-in.onnx", session.CPU, 64)
    (model / "1" / "stand-in.onnx").write_bytes(graph)


def native_repository(name: str, repository: Path, tiny_onnx: Path, folder: Path) -> Path:
    """Makes `folder`, a copy of `repository` under a native configuration, with stand-ins for the native backends."""
    shutil.copytree(repository, folder)
    for model in ("tokenizer", "sentiment"):
        (folder / model / "config.pbtxt").write_text(text_format.MessageToString(config(model, name)))
    whole = onnx.load(tiny_onnx)
    plan, labels = split_labels(whole)
    graph = plan if name == "tensorrt" else whole
    use_stand_in(folder / "classifier", config("classifier", name), graph.SerializeToString())
    if name == "tensorrt":
        (folder / "labels").mkdir()
        use_stand_in(folder / "labels", config("labels", name), labels.SerializeToString())
    return folder


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def native_server(
    request: pytest.FixtureRequest, repository: Path, tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[serving.Server]:
    """The real server under a native configuration, with stand-ins for the native backends."""
    folder = tmp_path_factory.mktemp(request.param) / "model_repository"
    native_repository(request.param, repository, tiny_onnx, folder)
    started = serving.start(folder, tmp_path_factory.mktemp("log") / "triton.log")
    yield started
    assert started.stop() == 0


def test_native_configurations_answer_as_the_default_does(
    native_server: serving.Server, server: serving.Server
) -> None:
    reviews = [*REVIEWS, "short", "word " * 200]
    for batch in (reviews, *([review] for review in reviews)):
        (_, expected), (status, answer) = (serving.generate(each, batch) for each in (server, native_server))
        assert status == 200, answer
        assert answer["label"] == expected["label"]
        np.testing.assert_allclose(answer["score"], expected["score"], atol=1e-4)
        np.testing.assert_allclose(answer["probabilities"], expected["probabilities"], atol=1e-4)


def test_native_configurations_pad_to_a_fixed_width(native_server: serving.Server) -> None:
    status, answer = serving.infer(native_server, serving.texts(["short"]), "tokenizer")
    assert status == 200
    assert {output["name"]: output["shape"] for output in answer["outputs"]} == {
        "input_ids": [1, 64],
        "attention_mask": [1, 64],
    }


def executions(served: serving.Server, model: str) -> int:
    _, answer = serving.get(f"{served.http_url}/v2/models/{model}/stats")
    return int(json.loads(answer)["model_stats"][0]["execution_count"])


def test_padding_rule_lets_requests_of_mixed_lengths_share_an_execution(
    repository: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    """A native backend takes one width an execution: padded each to its own, these would need a dozen of them."""
    folder = native_repository("onnxruntime", repository, tiny_onnx, tmp_path / "model_repository")
    for model in ("tokenizer", "classifier"):
        changed = read(folder / model / "config.pbtxt")
        changed.dynamic_batching.max_queue_delay_microseconds = 500_000  # so that all arrive before the first runs
        if model == "tokenizer":
            changed.parameters["pad_to_multiple_of"].string_value = "8"
        (folder / model / "config.pbtxt").write_text(text_format.MessageToString(changed))
    served = serving.start(folder, tmp_path / "triton.log")
    try:
        before = executions(served, "classifier")
        reviews = ["word " * (1 + 5 * (index % 12)) for index in range(32)]
        with ThreadPoolExecutor(len(reviews)) as pool:
            answers = list(pool.map(lambda review: serving.generate(served, review), reviews))
        assert {status for status, _ in answers} == {200}
        assert executions(served, "classifier") - before <= 6
    finally:
        assert served.stop() == 0
