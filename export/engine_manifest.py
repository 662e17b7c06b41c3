"""The installed TensorRT engine: what it was built for, and whether it fits the machine that is to serve it.

`classifier/engine.json` lists the plan and the label graph with their sha256, and TensorRT, compute capability,
driver and the files they were made from. A plan loads only in the TensorRT version and on the compute capability that
built it, so `check_engine` refuses any other before the server starts.

Standard library only: the server image imports this file and has none of the export's packages.
"""

import ctypes
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.repository import MODEL_FILE, TOKENIZER_FILE, describe, manifest_path

ENGINE_FILE = "classifier/1/model.plan"
"""The engine, relative to the model repository."""

LABELS_FILE = "labels/1/model.onnx"
"""The graph from probabilities to label strings, relative to the labels repository."""

TIMING_CACHE_FILE = "timing-cache.bin"
_REMEDY = "build one for this machine: make engine"
_MAJOR_VERSIONS = (11, 10)


class EngineError(ValueError):
    """There is no engine that this machine can serve; the message says what came, what was expected, what to run."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides whether an engine loads here."""

    tensorrt: str
    """Version of libnvinfer, as in 11.4.0."""
    compute_capabilities: tuple[str, ...]
    """Of each GPU, as in 9.0."""
    gpu: str
    """Name of the first GPU."""
    driver: str
    """Version of the NVIDIA driver."""


def engine_manifest_path(repository: Path) -> Path:
    """Returns where the engine's manifest lies."""
    return repository / "classifier" / "engine.json"


def check_engine(repository: Path, machine: Machine, labels_repository: Path) -> dict[str, Any]:
    """Checks that the installed engine is whole, belongs to the installed model and fits `machine`.

    Returns:
        The engine's manifest.

    Raises:
        EngineError: there is no engine, or it must not be served here.
    """
    manifest = read_manifest(repository)
    built = manifest["machine"]
    if built["tensorrt"] != machine.tensorrt:
        raise EngineError(
            f"the engine is for TensorRT {built['tensorrt']}, this machine has {machine.tensorrt}; {_REMEDY}"
        )
    others = sorted(set(machine.compute_capabilities) - {built["compute_capability"]})
    if others:
        raise EngineError(
            f"the engine is for compute capability {built['compute_capability']} ({built['gpu']}), this machine has "
            f"{', '.join(others)} ({machine.gpu}); {_REMEDY}"
        )
    roots = {
        ENGINE_FILE: repository,
        LABELS_FILE: labels_repository,
        TOKENIZER_FILE: repository,
        MODEL_FILE: repository,
    }
    for name, root in roots.items():
        _check_file(root / name, manifest["files"].get(name))
    return manifest


def check_source(checkpoint: Path, repository: Path) -> None:
    """Checks that the model installed in `repository` was made from `checkpoint`, and its tokenizer with it.

    Raises:
        EngineError: an engine of this checkpoint would be served with another one's tokenizer.
    """
    remedy = f"install that one first: make export CHECKPOINT={checkpoint}"
    path = manifest_path(repository)
    try:
        installed = json.loads(path.read_text(encoding="utf-8"))["source_checkpoint"]["model_sha256"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EngineError(f"{path} does not say which checkpoint was installed ({error!r}); {remedy}") from error
    pairs = {"model.safetensors": installed, "tokenizer.json": describe(repository / TOKENIZER_FILE)["sha256"]}
    for name, expected in pairs.items():
        if describe(checkpoint / name)["sha256"] != expected:
            raise EngineError(f"{checkpoint / name} is not what the model in {repository} was made from; {remedy}")


def read_manifest(repository: Path) -> dict[str, Any]:
    """Returns the engine's manifest.

    Raises:
        EngineError: there is none, or it is not one.
    """
    path = engine_manifest_path(repository)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        complete = {"tensorrt", "compute_capability", "gpu"} <= manifest["machine"].keys() and manifest["files"].keys()
    except FileNotFoundError as error:
        raise EngineError(f"no engine is installed ({path} is missing); {_REMEDY}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EngineError(f"{path} is no engine manifest ({error!r}); {_REMEDY}") from error
    if not complete:
        raise EngineError(f"{path} lacks `machine` or `files`; {_REMEDY}")
    return dict(manifest)


def _check_file(file: Path, expected: dict[str, Any] | None) -> None:
    try:
        found = describe(file)
    except OSError as error:
        raise EngineError(f"{file} cannot be read ({error.strerror}); {_REMEDY}") from error
    if expected is None or found["sha256"] != expected["sha256"]:
        raise EngineError(f"{file} is not the file that the engine was built with; {_REMEDY}")


def this_machine() -> Machine:
    """Returns this machine's TensorRT and GPUs.

    Raises:
        EngineError: there is no GPU, or no TensorRT.
    """
    query = ["nvidia-smi", "--query-gpu=compute_cap,driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(f"no NVIDIA GPU was found ({error}); start the container with --gpus all") from error
    rows = [[value.strip() for value in line.split(",", 2)] for line in answer.splitlines() if line.strip()]
    if not rows or any(len(row) != 3 for row in rows):
        raise EngineError(f"nvidia-smi answered {answer!r}, expected one line a GPU: compute_cap, driver, name")
    return Machine(
        tensorrt=tensorrt_version(),
        compute_capabilities=tuple(row[0] for row in rows),
        driver=rows[0][1],
        gpu=rows[0][2],
    )


def tensorrt_version() -> str:
    """Returns the version of the TensorRT library that a server on this machine loads.

    Raises:
        EngineError: there is none.
    """
    for major in _MAJOR_VERSIONS:
        try:
            library = ctypes.CDLL(f"libnvinfer.so.{major}")
        except OSError:
            continue
        number = int(library.getInferLibVersion())  # from 10 on: major * 10000 + minor * 100 + patch
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    wanted = " or ".join(f"libnvinfer.so.{major}" for major in _MAJOR_VERSIONS)
    raise EngineError(f"TensorRT was not found ({wanted}); serve with the container, or --configuration onnxruntime")
