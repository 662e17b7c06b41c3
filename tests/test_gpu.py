"""The measurements of the GPU path, on the CPU: what they build, serve and say. Their figures need a GPU."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import serving
from test_model_repository import tensors
from test_serving_configurations import read
from tiny_model import REVIEWS

from benchmarks import profiles
from benchmarks.gpu import engines, session
from benchmarks.gpu import repository as stand_in_repository
from clients import SentimentClient
from export.repository import REPOSITORY, TOKENIZER_FILE, verify
from model_repository.tokenizer.review_text import ReviewEncoder

PROFILES = serving.CHECKOUT / "benchmarks" / "gpu" / "profiles.yaml"


def test_missing_gpu_runtime_is_an_error_that_says_what_to_install(tiny_onnx: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if session.CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    with pytest.raises(session.NoProviderError, match=r"as benchmarks/gpu/requirements\.txt says"):
        session.open_session(tiny_onnx)


def test_engines_on_the_gpu(tiny_onnx: Path) -> None:
    try:
        session.open_session(tiny_onnx)
    except session.NoProviderError as error:
        pytest.skip(f"no GPU run: {error}")


def test_engines_time_every_shape_and_compare_the_answers(
    tiny_onnx: Path, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = repository / TOKENIZER_FILE
    out, files = tmp_path / "out", ["--onnx", str(tiny_onnx), "--tokenizer", str(tokenizer)]
    assert (
        engines.main([*files, "--provider", session.CPU, "--window-s", "0", "--num-reviews", "5", "--out", str(out)])
        == 0
    )
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result == json.loads((out / "engines.json").read_text())
    (figures,) = result["files"].values()
    widths = {shape["width"] for shape in figures["shapes"]}
    assert max(widths) == ReviewEncoder(tokenizer).max_length
    assert len(figures["shapes"]) == len(widths) * len(engines.BATCHES)
    assert figures["largest_difference"] == figures["labels_that_differ"] == 0
    assert "64 a batch" in printed
    assert (out / "engines.png").read_bytes().startswith(b"\x89PNG")


def test_profile_for_the_gpu_is_valid() -> None:
    assert profiles.load(PROFILES).profiles["gpu"].stages


def test_unknown_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none.onnx")
    with pytest.raises(SystemExit):
        engines.main(["--onnx", missing, "--out", str(tmp_path)])
    assert missing in capsys.readouterr().err
    assert stand_in_repository.main(["--onnx", missing, "--out", str(tmp_path / "out")]) == 2
    assert missing in capsys.readouterr().err


@pytest.fixture(scope="module")
def server(
    repository: Path, tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[serving.Server, Path]]:
    """The real server with the stand-in for the native backend, on the CPU, behind two tokenizers."""
    folder = tmp_path_factory.mktemp("gpu") / "model_repository"
    stand_in_repository.make(tiny_onnx, folder, session.CPU, tokenizers=2, queue=32, repository=repository)
    started = serving.start(folder, tmp_path_factory.mktemp("log") / "triton.log")
    yield started, folder
    assert started.stop() == 0


def test_stand_in_answers_as_the_default_configuration_does(
    server: tuple[serving.Server, Path], repository: Path, tmp_path: Path
) -> None:
    started, folder = server
    verify(folder)
    default = serving.start(repository, tmp_path / "triton.log")
    try:
        with SentimentClient(started.grpc_url) as ours, SentimentClient(default.grpc_url) as theirs:
            found, expected = ours.predict(REVIEWS), theirs.predict(REVIEWS)
    finally:
        assert default.stop() == 0
    assert [one.label for one in found] == [one.label for one in expected]
    assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)


def test_stand_in_repository_is_the_native_configuration_but_for_its_backend(
    server: tuple[serving.Server, Path],
) -> None:
    _, folder = server
    for model, parameter in (("tokenizer", "pad_to_multiple_of"), ("classifier", "provider")):
        native = read(REPOSITORY / model / "configs" / "onnxruntime.pbtxt")
        made = read(folder / model / "config.pbtxt")
        assert made.dynamic_batching.default_queue_policy.max_queue_size == 32
        assert tensors(made.input) == tensors(native.input)
        assert tensors(made.output) == tensors(native.output)
        assert parameter in made.parameters
    assert read(folder / "tokenizer" / "config.pbtxt").instance_group[0].count == 2
