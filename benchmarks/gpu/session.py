"""Opens an ONNX file on the GPU. Standard library and ONNX Runtime alone: stand_in.py imports it inside Triton."""

import os
from pathlib import Path
from typing import Any

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
PROVIDERS = (CUDA, CPU)


class NoProviderError(RuntimeError):
    """ONNX Runtime cannot run on the device that was named; the message says what to install."""


def open_session(onnx_file: Path, provider: str = CUDA, num_threads: int = 1) -> Any:
    """Returns an onnxruntime.InferenceSession of `onnx_file` on `provider`, and on the CPU what that has no kernel for.

    Raises:
        NoProviderError: this ONNX Runtime has no such provider, or it finds no GPU. Without the second check it would
            say so in its log alone and compute everything on the CPU.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        has = ", ".join(onnxruntime.get_available_providers())
        raise NoProviderError(
            f"onnxruntime {onnxruntime.__version__} has no {provider}, only {has}: make an environment as "
            "benchmarks/gpu/requirements.txt says, and run this there"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3  # else every node that stays on the CPU is a warning
    session = onnxruntime.InferenceSession(str(onnx_file), options, providers=list(dict.fromkeys([provider, CPU])))
    if provider not in session.get_providers():
        raise NoProviderError(
            f"{provider} did not start: no GPU, no driver, or not the CUDA and cuDNN that it was built for"
        )
    return session
