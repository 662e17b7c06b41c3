"""Triton's arguments: local, nothing to be changed from outside, no answer from a guessed configuration."""

import argparse
import secrets
from pathlib import Path

from local_server import wheel
from local_server.options import PORTS

EXIT_TIMEOUT_S = 3  # for requests in flight; Triton waits all of it for an idle keep-alive connection
CLOSED_APIS = "shared-memory,trace,logging,model-repository"
KEY_HEADER = "sentiment-control-key"


def command(options: argparse.Namespace, repository: Path, backends: Path, shm_prefix: str) -> list[str]:
    """Returns the command line that serves `repository`, which may be a link to the one in `options`."""
    server = wheel.package() / "tritonserver"
    # Forgotten at once: nobody is meant to use the closed interfaces. Whoever may read /proc here finds it there.
    key = secrets.token_hex(32)
    return [
        f"{server}/bin/tritonserver",
        f"--backend-directory={backends}",
        f"--model-repository={repository}",
        *(f"--{name}-address={options.address}" for name in PORTS),
        *(f"--{name}-port={getattr(options, f'{name}_port')}" for name in PORTS),
        "--model-control-mode=none",
        # A variable of Vertex AI in the environment would open its endpoint, everywhere, and close HTTP and gRPC.
        *("--allow-http=true", "--allow-grpc=true", "--allow-vertex-ai=false", "--allow-sagemaker=false"),
        "--disable-auto-complete-config",
        f"--http-restricted-api={CLOSED_APIS}:{KEY_HEADER}={key}",
        f"--grpc-restricted-protocol={CLOSED_APIS}:{KEY_HEADER}={key}",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        "--allow-gpu-metrics=false",
        "--pinned-memory-pool-byte-size=0",  # memory for a GPU, which this repository's default does not use
        "--rate-limit=execution_count",  # else the priorities of the classifier's instances count for nothing
        *_cache(options.response_cache_mib, server),
        *options.triton_flag,
    ]


def _cache(size_mib: int, server: Path) -> list[str]:
    if not size_mib:
        return []
    return [f"--cache-directory={server}/caches", f"--cache-config=local,size={size_mib << 20}"]
