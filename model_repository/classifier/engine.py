"""Runs model.onnx with OpenVINO on the CPU: for the served classifier, and for whatever checks what is served.

B reviews, T tokens, C labels. Inputs `input_ids`, `attention_mask` int64 (B, T); outputs `logits`, `probabilities`
float32 (B, C), `score` float32 (B, 1), `label` str (B, 1), computed in int8 where the file says so, else in fp32.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Importing openvino would write an analytics id to ~/intel and report to a server; without this package it does not.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
import openvino  # noqa: E402


class Engine:
    """model.onnx, compiled; one thread at a time may call it."""

    def __init__(self, model_file: Path, num_threads: int) -> None:
        """Compiles `model_file` for `num_threads` threads (0: all cores)."""
        core = openvino.Core()
        model = core.read_model(model_file)
        self.vocab_size, self.max_tokens = (_limit(model, name) for name in ("vocab_size", "max_tokens"))
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": num_threads,
            "ENABLE_CPU_PINNING": False,  # else one-threaded engines of several processes all run on the first core
            "INFERENCE_PRECISION_HINT": "f32",  # by default bf16 on CPUs that have it: others would answer otherwise
        }
        self._request = core.compile_model(model, "CPU", options).create_infer_request()

    def run(self, names: Sequence[str], inputs: Mapping[str, npt.NDArray[np.int64]]) -> list[npt.NDArray[Any]]:
        """Returns the outputs `names` for `inputs`.

        Raises:
            ValueError: an id or a position that the model has no embedding for. OpenVINO would answer the one with
                anything, and the other with an error for this batch and for every one that follows.
        """
        ids = inputs["input_ids"]
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"input_ids has {ids.min()} to {ids.max()}, expected 0 to {self.vocab_size - 1}")
        if ids.shape[1] > self.max_tokens:
            raise ValueError(f"input_ids has {ids.shape[1]} tokens, expected at most {self.max_tokens}")
        outputs = self._request.infer(dict(inputs), share_inputs=True)  # else it copies them first
        return [_as_objects(outputs[name]) for name in names]


def _limit(model: openvino.Model, name: str) -> int:
    """Returns a limit of the inputs, which export.graph wrote into the file; raises ValueError if it did not."""
    path = ["framework", name]  # where OpenVINO puts the metadata of an ONNX file
    if not model.has_rt_info(path):
        raise ValueError(f"model.onnx does not say its {name}: export it again with `python -m export.onnx`")
    return int(str(model.get_rt_info(path).value))


def _as_objects(output: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return output.astype(object) if output.dtype.kind == "U" else output
