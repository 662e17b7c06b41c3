"""Makes a model repository that serves the configuration `onnxruntime` on a GPU without the container.

    python -m benchmarks.gpu.repository --onnx artefacts/mine/onnx/fp16/model.onnx --out artefacts/gpu/models \\
        --tokenizers 4 --queue 1024
    .venv-gpu/bin/python serve.py --model-repository artefacts/gpu/models
    make bench PROFILE=gpu BENCH_ARGS="--profiles benchmarks/gpu/profiles.yaml"

benchmarks/gpu/requirements.txt says how to make .venv-gpu. The wheel's Triton has no native backends. So a Python
model, stand_in.py, runs the ONNX file on ONNX Runtime's CUDA provider, which is what the container's backend does;
ensemble, tokenizer, widths and batching are as configs/onnxruntime.pbtxt writes them. What is measured so is a bound
from below: the stand-in copies more.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from benchmarks.gpu import session
from benchmarks.texts import ManPage
from export.repository import MODEL_FILE, REPOSITORY, TOKENIZER_FILE, install
from model_repository.tokenizer.review_text import ReviewEncoder
from training.command_line import positive

CONFIGURATION = "onnxruntime"
_CODE = {"stand_in.py": "model.py", "session.py": "session.py"}


def make(onnx_file: Path, out: Path, provider: str, tokenizers: int, queue: int, repository: Path = REPOSITORY) -> None:
    """Writes a copy of `repository` to the new folder `out`, its classifier `onnx_file` on `provider`.

    Args:
        onnx_file: with the outputs that the configuration names.
        out: must not exist.
        provider: of ONNX Runtime.
        tokenizers: processes of the tokenizer.
        queue: requests that may wait for each step; what comes beyond is refused.
        repository: the copied one.

    Raises:
        FileExistsError: `out` is there.
        FileNotFoundError: `onnx_file` is not.
    """
    if not onnx_file.is_file():
        raise FileNotFoundError(
            f"{onnx_file}: no such file; `python -m export.onnx --no-install` writes fp16 and others"
        )
    shutil.copytree(repository, out, ignore=shutil.ignore_patterns("model.onnx", "manifest.json", "__pycache__"))
    tokenizer, classifier = (_named(repository, model) for model in ("tokenizer", "classifier"))
    tokenizer.instance_group[0].count = tokenizers
    if tokenizers > 1:
        del tokenizer.model_warmup[:]  # one that fails with two instances crashes server 2.51.0
    for config in (tokenizer, classifier):
        config.dynamic_batching.default_queue_policy.max_queue_size = queue
        shutil.rmtree(out / config.name / "configs")
    (out / "tokenizer" / "config.pbtxt").write_text(text_format.MessageToString(tokenizer))
    max_length = ReviewEncoder(repository / TOKENIZER_FILE).max_length
    use_stand_in(out / "classifier", classifier, Path(MODEL_FILE).name, provider, max_length)
    install({MODEL_FILE: onnx_file, TOKENIZER_FILE: repository / TOKENIZER_FILE}, {"source": str(onnx_file)}, out)


def _named(repository: Path, model: str) -> model_config_pb2.ModelConfig:
    file = repository / model / "configs" / f"{CONFIGURATION}.pbtxt"
    return text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())


def use_stand_in(
    model: Path, config: model_config_pb2.ModelConfig, onnx_name: str, provider: str, max_length: int
) -> None:
    """Makes `config`, of a native backend, the configuration of the folder `model`, served by stand_in.py.

    Args:
        model: of the model repository; its version is 1.
        config: is changed.
        onnx_name: of the ONNX file that will be in the version's folder.
        provider: of ONNX Runtime.
        max_length: tokens that the model takes; wider warm-ups are left out.
    """
    config.backend, config.default_model_filename = "python", ""
    for index in reversed(range(len(config.model_warmup))):
        if max(value.dims[0] for value in config.model_warmup[index].inputs.values()) > max_length:
            del config.model_warmup[index]
    config.parameters.clear()
    config.parameters["onnx_file"].string_value = onnx_name
    config.parameters["provider"].string_value = provider
    for group in config.instance_group:
        group.kind = model_config_pb2.ModelInstanceGroup.KIND_CPU  # Triton's part; the process takes the GPU itself
        del group.profile[:]
    (model / "config.pbtxt").write_text(text_format.MessageToString(config))
    (model / "1").mkdir(exist_ok=True)
    for source, name in _CODE.items():
        shutil.copyfile(Path(__file__).parent / source, model / "1" / name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.repository", description=__doc__, formatter_class=ManPage
    )
    parser.add_argument("--onnx", type=Path, required=True, help="the file to serve")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, which is not there yet")
    parser.add_argument("--provider", choices=session.PROVIDERS, default=session.CUDA, help="of ONNX Runtime")
    parser.add_argument("--tokenizers", type=positive, default=1, help="processes of the tokenizer")
    parser.add_argument(
        "--queue",
        type=positive,
        default=64,
        help="requests that may wait for a step; perf_analyzer ends at the first refusal",
    )
    options = parser.parse_args(argv)
    if options.out.exists():
        parser.error(f"--out {options.out} is there already: name another, or remove it")
    try:
        make(options.onnx, options.out, options.provider, options.tokenizers, options.queue)
    except OSError as error:
        print(f"benchmarks.gpu.repository: error: {error}", file=sys.stderr)
        return 2
    print(f"python serve.py --model-repository {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
