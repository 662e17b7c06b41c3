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
        self.vocab_size = _vocab_size(model)
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": num_threads,
            "INFERENCE_PRECISION_HINT": "f32",  # by default bf16 on CPUs that have it: others would answer otherwise
        }
        self._model = core.compile_model(model, "CPU", options)
        self._request = self._model.create_infer_request()

    def run(self, names: Sequence[str], inputs: Mapping[str, npt.NDArray[np.int64]]) -> list[npt.NDArray[Any]]:
        """Returns the outputs `names` for `inputs`.

        Raises:
            ValueError: an id is no row of the embedding table, which OpenVINO would answer with anything.
            RuntimeError: OpenVINO's own; a row longer than the position embeddings, for one.
        """
        ids = inputs["input_ids"]
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"input_ids has {ids.min()} to {ids.max()}, expected 0 to {self.vocab_size - 1}")
        try:
            outputs = self._request.infer(dict(inputs))
        except RuntimeError:
            self._request = self._model.create_infer_request()  # one that has failed fails from then on
            raise
        return [_as_objects(outputs[name]) for name in names]


def _vocab_size(model: openvino.Model) -> int:
    """Returns the number of rows of the table that `input_ids` looks up."""
    (ids,) = (port for port in model.inputs if port.any_name == "input_ids")
    consumers = [target.get_node() for target in ids.get_target_inputs()]
    while consumers:
        node = consumers.pop()
        if node.get_type_name() == "Gather":
            return int(node.input_value(0).get_shape()[0])
        if node.get_type_name() == "Convert":
            consumers += [target.get_node() for target in node.output(0).get_target_inputs()]
    raise ValueError("model.onnx looks up no embedding by input_ids")


def _as_objects(output: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return output.astype(object) if output.dtype.kind == "U" else output
