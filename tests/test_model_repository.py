"""The hand-written model configurations, read as Triton reads them, and what lies beside them."""

import struct
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from export.repository import REPOSITORY

MODELS = ("classifier", "sentiment", "tokenizer")


def read_config(model: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse((REPOSITORY / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def tensors(side: object) -> dict[str, tuple[int, list[int]]]:
    """Returns data type and dims of inputs or outputs by name."""
    return {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in side}  # type: ignore[attr-defined]


def test_repository_holds_the_models_and_no_other_folder() -> None:
    assert sorted(path.name for path in REPOSITORY.iterdir() if path.is_dir()) == list(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_model_has_one_version_and_the_name_of_its_folder(model: str) -> None:
    assert read_config(model).name == model
    versions = [path.name for path in (REPOSITORY / model).iterdir() if path.name.isdecimal()]
    assert versions == ["1"]


def test_the_public_contract_holds() -> None:
    config = read_config("sentiment")
    assert config.max_batch_size == 64
    assert tensors(config.input) == {"text": (model_config_pb2.TYPE_STRING, [1])}
    assert tensors(config.output) == {
        "label": (model_config_pb2.TYPE_STRING, [1]),
        "score": (model_config_pb2.TYPE_FP32, [1]),
        "probabilities": (model_config_pb2.TYPE_FP32, [2]),
    }


def test_ensemble_steps_fit_together() -> None:
    ensemble = read_config("sentiment")
    known = tensors(ensemble.input)
    for step in ensemble.ensemble_scheduling.step:
        model = read_config(step.model_name)
        assert model.max_batch_size == ensemble.max_batch_size
        inputs, outputs = tensors(model.input), tensors(model.output)
        assert {name: known[source] for name, source in step.input_map.items()} == inputs
        known.update({target: outputs[name] for name, target in step.output_map.items()})
        assert set(step.output_map) == set(outputs)
    assert tensors(ensemble.output).items() <= known.items()


def test_classifier_takes_requests_of_different_widths() -> None:
    assert all(tensor.allow_ragged_batch for tensor in read_config("classifier").input)


@pytest.mark.parametrize("model", ["classifier", "tokenizer"])
def test_models_batch_without_delay_and_without_timeout(model: str) -> None:
    config = read_config(model)
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert config.dynamic_batching.default_queue_policy.default_timeout_microseconds == 0


@pytest.mark.parametrize("model", ["classifier", "tokenizer"])
def test_no_model_has_both_a_warm_up_and_two_instances(model: str) -> None:
    config = read_config(model)
    count = sum(group.count for group in config.instance_group)
    assert count == 1 or not config.model_warmup, "two instances and a failing warm-up crash 2.51.0"


def test_warm_up_data_of_the_tokenizer_is_a_review_as_the_protocol_sends_it() -> None:
    (sample,) = read_config("tokenizer").model_warmup
    data = (REPOSITORY / "tokenizer" / "warmup" / sample.inputs["text"].input_data_file).read_bytes()
    assert struct.unpack("<I", data[:4]) == (len(data) - 4,)
    assert data[4:].decode().strip()


def test_installed_files_are_where_the_models_look_for_them(repository: Path) -> None:
    assert (repository / "classifier" / "1" / "model.onnx").is_file()
    assert (repository / "tokenizer" / "1" / "tokenizer.json").is_file()
