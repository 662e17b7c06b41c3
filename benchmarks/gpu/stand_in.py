"""Stands in for Triton's native ONNX Runtime backend: one tensor an execution, of one width, on the device named.

benchmarks.gpu.repository puts it into a model repository as the classifier's model.py. What the native backend does in
C++, collecting the requests' tensors and splitting the outputs, costs more here.
"""

from __future__ import annotations  # the stub adds most names to pb_utils only after this file is imported

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils
from session import open_session


class TritonPythonModel:
    """Runs the whole execution as one rectangle."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the ONNX file beside this one that the parameter `onnx_file` names, on `provider`."""
        config = json.loads(args["model_config"])
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        file, provider = (config["parameters"][name]["string_value"] for name in ("onnx_file", "provider"))
        self._session = open_session(Path(args["model_repository"]) / args["model_version"] / file, provider)
        pb_utils.Logger.log_info(f"{args['model_instance_name']} runs {file} on {provider}")

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Returns one response per request; Triton merged only requests of one width."""
        feed = {name: np.concatenate([_tensor(request, name) for request in requests]) for name in self._inputs}
        outputs = dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))
        responses, start = [], 0
        for request in requests:
            stop = start + len(_tensor(request, self._inputs[0]))
            own = [pb_utils.Tensor(name, _served(output[start:stop])) for name, output in outputs.items()]
            responses.append(pb_utils.InferenceResponse(own))
            start = stop
        return responses


def _tensor(request: pb_utils.InferenceRequest, name: str) -> npt.NDArray[Any]:
    tensor: npt.NDArray[Any] = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
    return tensor


def _served(output: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return output.astype(object) if output.dtype.kind in "UO" else output
