"""Starts Triton in the container: picks the configuration that this machine can serve, then becomes the server.

    python3 docker/start.py --configuration auto      # TensorRT with a fitting engine, else ONNX Runtime
    python3 docker/start.py --configuration cpu       # CPU nodes: config.pbtxt, the configuration of a laptop
    python3 docker/start.py --configuration tensorrt --on-mismatch stop
    python3 docker/start.py --print                   # show the command, start nothing

Each option can also be given as the environment variable named in its help. The model files are checked against their
manifest first, and an engine against this machine: one for another GPU or TensorRT is never loaded. The flags are in
server.flags.
"""

import argparse
import os
import resource
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from export.engine_manifest import EngineError, check_engine, read_manifest, this_machine
from export.repository import RepositoryError, verify

FOLDER = Path(__file__).resolve().parent
LABELS_REPOSITORY = FOLDER / "tensorrt"
"""The last step of the TensorRT configuration: a plan cannot hold the label strings."""

WITHOUT_ENGINE = ("cpu", "onnxruntime")
"""Configurations that run model.onnx. No file is named `cpu`, so each model takes its config.pbtxt."""

RESTRICTED_APIS = "shared-memory,trace,logging,model-repository"
KEY_HEADER = "sentiment-control-key"
STACK_BYTES = 64 << 20
"""Of each server thread: Triton's HTTP library copies a form body (what `curl -d` sends) to the stack twice."""
OPEN_FILES = 1 << 16
"""At most: of the usual 1,024, idle connections, which Triton never closes, can take all."""


def choose_configuration(wanted: str, on_mismatch: str, repository: Path) -> tuple[str, str]:
    """Returns the configuration to serve and, where it is not the one wanted, why.

    Raises:
        EngineError: the engine does not fit and `on_mismatch` is "stop".
    """
    if wanted in WITHOUT_ENGINE:
        return wanted, ""
    try:
        read_manifest(repository)  # without an engine there is nothing to say about the machine
        check_engine(repository, this_machine(), LABELS_REPOSITORY)
    except EngineError as error:
        if on_mismatch == "stop":
            raise
        return "onnxruntime", str(error)
    return "tensorrt", ""


def server_flags() -> list[str]:
    """Returns the flags in server.flags."""
    lines = (FOLDER / "server.flags").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def command(repository: Path, configuration: str, metrics_address: str, response_cache_mib: int = 0) -> list[str]:
    """Returns Triton's command line; its key for the restricted interfaces is kept by nobody, but stands in /proc."""
    restricted = f"{RESTRICTED_APIS}:{KEY_HEADER}={secrets.token_hex(32)}"
    repositories = [repository, LABELS_REPOSITORY] if configuration == "tensorrt" else [repository]
    return [
        "tritonserver",
        *(f"--model-repository={folder}" for folder in repositories),
        f"--model-config-name={configuration}",
        f"--metrics-address={metrics_address}",
        f"--http-restricted-api={restricted}",
        f"--grpc-restricted-protocol={restricted}",
        # For the priorities of the default configuration's instances; the others have one instance, or one a GPU.
        *(["--rate-limit=execution_count"] if configuration == "cpu" else []),
        *([f"--cache-config=local,size={response_cache_mib << 20}"] if response_cache_mib else []),
        *server_flags(),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(name: str, default: str, help_text: str, choices: Sequence[str] | None = None) -> None:
        variable = name.upper().replace("-", "_")
        value = os.environ.get(variable) or default
        parser.add_argument(
            f"--{name}", default=value, choices=choices, help=f"{help_text} (${variable}, default {default})"
        )

    option("model-repository", "/models", "the folder with tokenizer, classifier and sentiment")
    option("configuration", "auto", "auto: tensorrt where an engine fits", ["auto", "tensorrt", *WITHOUT_ENGINE])
    option("on-mismatch", "fallback", "when the engine does not fit: serve ONNX, or stop", ["fallback", "stop"])
    option("metrics-address", "127.0.0.1", "the address metrics listen on; only 0.0.0.0 or the monitoring network's")
    option("response-cache-mib", "0", "memory for the answers to repeated requests; 0 is none")
    parser.add_argument("--print", action="store_true", dest="print_only", help="print the command and end")
    return parser


def main(argv: Sequence[str] | None = None) -> int:  # noqa: RET503  (execvp does not return)
    """Runs the command line; does not return when the server starts."""
    parser = _parser()
    args = parser.parse_args(argv)
    for action in parser._actions:  # argparse checks no default that came from the environment
        if action.choices and getattr(args, action.dest) not in action.choices:
            parser.error(f"{action.dest}: {getattr(args, action.dest)!r} came, expected one of {action.choices}")
    if not args.response_cache_mib.isdecimal():
        parser.error(f"response_cache_mib: {args.response_cache_mib!r} came, expected a number of MiB")
    repository = Path(args.model_repository)
    try:
        verify(repository)
        configuration, refusal = choose_configuration(args.configuration, args.on_mismatch, repository)
    except (RepositoryError, EngineError) as error:
        print(f"start.py: error: {error}", file=sys.stderr)
        return 1
    if refusal:
        print(f"start.py: {refusal}; serving the configuration {configuration} instead", file=sys.stderr)
    line = command(repository, configuration, args.metrics_address, int(args.response_cache_mib))
    if args.print_only:
        print("\n  ".join(line))
        return 0
    _, limit = resource.getrlimit(resource.RLIMIT_STACK)
    stack = STACK_BYTES if limit == resource.RLIM_INFINITY else min(STACK_BYTES, limit)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, limit))
    files, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, min(OPEN_FILES, limit)), limit))
    os.execvp(line[0], line)


if __name__ == "__main__":
    sys.exit(main())
