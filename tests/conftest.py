"""What tests share: a tiny model made here, a model repository that holds it, and the real Triton serving that."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import serving

from export.repository import MODEL_FILE, REPOSITORY, TOKENIZER_FILE, describe, install, manifest_path
from model_repository.tokenizer.review_text import ReviewEncoder

# Examples are not timed: how long one takes says more about the machine's other work than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _no_handlers_left() -> Iterator[None]:
    """Takes away the log handlers that a command line set up: they write to a test's own stdout, closed by then."""
    yield
    for handler in [one for one in logging.root.handlers if type(one) in (logging.StreamHandler, logging.FileHandler)]:
        logging.root.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer checkpoint and its tokenizer."""
    import tiny_model  # takes seconds: it needs torch

    return tiny_model.make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def tiny_onnx(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as the graph that is served, in fp32."""
    from export import graph

    return graph.build(tiny_checkpoint, ["fp32"], tmp_path_factory.mktemp("onnx"), ["negative", "positive"])["fp32"]


@pytest.fixture
def exact_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without VNNI, computes int8 files node by node; on others the served engine stays.

    Such a CPU adds two int8 products in 16 bits, which the tiny model's wide, random weights overflow.
    """
    from exact import exact_session

    from model_repository.classifier import engine

    class Exact:
        def __init__(self, file: Path, num_threads: int) -> None:
            self.run = exact_session(file).run

    if engine.choose() == engine.ONNXRUNTIME:
        monkeypatch.setattr(engine, "Engine", Exact)


@pytest.fixture(scope="session")
def installed() -> Path:
    """The int8 file of this checkout: the tiny model's wide, random weights overflow where the CPU has no VNNI."""
    file = REPOSITORY / MODEL_FILE
    if not file.exists() or json.loads(manifest_path().read_text())["precision"] != "int8":
        pytest.skip("no int8 model is installed in this checkout: git checkout -- model_repository")
    return file


@pytest.fixture(scope="session")
def repository(tiny_checkpoint: Path, tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout's model repository with the tiny model installed in it; copy it before changing it."""
    folder = tmp_path_factory.mktemp("repository") / "model_repository"
    of_installing = shutil.ignore_patterns(
        "__pycache__", "model.onnx", "tokenizer.json", "manifest.json", "*.installing"
    )
    shutil.copytree(REPOSITORY, folder, ignore=of_installing)
    max_length = ReviewEncoder(tiny_checkpoint / "tokenizer.json").max_length
    install(
        {MODEL_FILE: tiny_onnx, TOKENIZER_FILE: tiny_checkpoint / "tokenizer.json"},
        {
            "precision": "fp32",
            "labels": ["negative", "positive"],
            "max_length": max_length,
            "source_checkpoint": {"model_sha256": describe(tiny_checkpoint / "model.safetensors")["sha256"]},
        },
        folder,
    )
    return folder


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    """The real serve.py with the tiny model, shared by all tests: leave it as it was."""
    started = serving.start(repository, tmp_path_factory.mktemp("log") / "triton.log")
    yield started
    exit_code = started.stop()
    assert exit_code == 0, f"serve.py ended with {exit_code}"
