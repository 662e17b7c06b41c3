#!/usr/bin/env python3
"""Serves the model repository on NVIDIA Triton Inference Server, without a container.

    make serve                                        # HTTP 8000, gRPC 8001, metrics 8002 on 127.0.0.1
    HTTP_PORT=9000 GRPC_PORT=9001 METRICS_PORT=9002 make serve
    make serve SERVE_ARGS="--response-cache-mib 256"  # or .venv-serve/bin/python serve.py --response-cache-mib 256

The server is the one inside the nvidia-pytriton wheel, run where it is installed. When a real prediction has come
back, its curl line is printed and the server stays in the foreground. Ctrl-C or SIGTERM ends it within 5 s, exit code
0. A server that cannot start, or dies, is an error with its reason, exit code 1. Triton never outlives this process.
"""

import sys

if sys.version_info[:2] not in ((3, 10), (3, 11), (3, 12)):  # before any import that an older Python lacks
    sys.exit(
        f"serve.py: error: Python {sys.version.split()[0]} ({sys.executable}) came, expected 3.10, 3.11 or 3.12: "
        "run `rm -rf .venv-serve && make serve PYTHON=python3.11`, or name another of these"
    )

import json
import os
import time
from collections.abc import Sequence

from export.repository import RepositoryError
from local_server.errors import ServeError
from local_server.options import parse
from local_server.preflight import check
from local_server.readiness import SAMPLE, first_answer, wait_for_death
from local_server.signals import interrupt_on_signals
from local_server.triton import close_shared_memory, triton


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal comes or Triton dies; returns the exit code."""
    options = parse(argv, __doc__)
    interrupt_on_signals()
    started_s = time.monotonic()
    try:
        check(options)
        with triton(options) as server:
            host = "127.0.0.1" if options.address == "0.0.0.0" else options.address
            url = f"http://{host}:{options.http_port}/v2/models/sentiment/generate"
            answer = first_answer(server, url)
            close_shared_memory(options)
            log = os.path.relpath(options.log_file)
            print(f"Triton answers after {time.monotonic() - started_s:.1f} s; Ctrl-C stops it. Log: {log}")
            print(f"\n  curl -s {url} \\\n    -d '{json.dumps(SAMPLE)}'\n  {answer}\n")
            print(f"gRPC {options.address}:{options.grpc_port}, metrics :{options.metrics_port}/metrics", flush=True)
            raise ServeError(wait_for_death(server))
    except KeyboardInterrupt:
        return 0
    except (ServeError, RepositoryError, OSError) as error:
        print(f"serve.py: error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
