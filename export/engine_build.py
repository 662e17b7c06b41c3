"""Builds a plan into a TensorRT engine, reads back its precision, and runs it. Needs TensorRT 10 or 11 and a GPU.

Precision is in the graph: the network is strongly typed, as it always is from TensorRT 11 on, so no precision flag
exists here.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorrt as trt
import torch
from tqdm import tqdm

from export.engine_plan import EnginePlan
from export.engine_precision import BuildError

_LOG = logging.getLogger(__name__)


class _Logger(trt.ILogger):
    """Passes TensorRT's messages to the logging module."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        serious = severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
        _LOG.log(logging.ERROR if serious else logging.DEBUG, "%s", msg)


class _Progress(trt.IProgressMonitor):
    """One bar for each phase of the build."""

    def __init__(self) -> None:
        trt.IProgressMonitor.__init__(self)
        self._bars: dict[str, tqdm[Any]] = {}

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: Any) -> None:
        self._bars[phase_name] = tqdm(total=int(num_steps), desc=phase_name, unit="step", leave=False, disable=None)

    def step_complete(self, phase_name: str, step: Any) -> bool:
        bar = self._bars[phase_name]
        bar.update(int(step) + 1 - bar.n)
        return True  # go on

    def phase_finish(self, phase_name: str) -> None:
        self._bars.pop(phase_name).close()


def build(plan: EnginePlan, timing_cache: Path) -> bytes:
    """Returns the serialised engine; `timing_cache` is read if it is there, and renewed.

    Raises:
        BuildError: the parser or the builder refused.
    """
    builder = trt.Builder(_Logger())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse(plan.graph.SerializeToString()):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise BuildError(f"TensorRT {trt.__version__} cannot read the graph: {errors}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what `engine_precision` reads
    progress = _Progress()  # kept here: the configuration holds no reference of its own
    config.progress_monitor = progress
    for profile in plan.profiles:
        optimisation = builder.create_optimization_profile()
        for name in plan.inputs:
            optimisation.set_shape(name, profile.min, profile.opt, profile.max)
        config.add_optimization_profile(optimisation)
    cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.exists() else b"")
    if not config.set_timing_cache(cache, False):
        _LOG.warning("%s is of another TensorRT or GPU and was not used", timing_cache)
        config.set_timing_cache(config.create_timing_cache(b""), False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError("TensorRT built no engine; its errors are above")
    timing_cache.write_bytes(memoryview(config.get_timing_cache().serialize()))  # type: ignore[arg-type,unused-ignore]
    return bytes(memoryview(engine))  # type: ignore[arg-type,unused-ignore]


class Engine:
    """A deserialised engine on the current GPU."""

    def __init__(self, serialised: bytes, plan: EnginePlan) -> None:
        if not torch.cuda.is_available():
            raise BuildError("torch sees no GPU, expected its CUDA build and a GPU: use docker/Dockerfile.export")
        self._runtime = trt.Runtime(_Logger())
        self._engine = self._runtime.deserialize_cuda_engine(serialised)
        if self._engine is None:
            raise BuildError(f"TensorRT {trt.__version__} cannot load the engine on this GPU")
        self._context = self._engine.create_execution_context()
        self._plan = plan
        self._widths = [profile.max[1] for profile in plan.profiles]

    def run(self, input_ids: npt.NDArray[np.int64], attention_mask: npt.NDArray[np.int64]) -> dict[str, Any]:
        """Returns the outputs (B, ...) by name for inputs (B, T), padded here to the next profile's width.

        Raises:
            BuildError: the engine does not take the batch, or fails on it.
        """
        index = next(i for i, width in enumerate(self._widths) if width >= input_ids.shape[1])
        padding = ((0, 0), (0, self._widths[index] - input_ids.shape[1]))
        stream = torch.cuda.current_stream()
        self._need(
            self._context.set_optimization_profile_async(index, stream.cuda_stream), f"optimisation profile {index}"
        )
        tensors = {
            name: torch.from_numpy(np.pad(array, padding)).cuda()
            for name, array in (("input_ids", input_ids), ("attention_mask", attention_mask))
        }
        for name, tensor in tensors.items():
            shape = tuple(tensor.shape)
            self._need(self._context.set_input_shape(name, shape), f"{name} of shape {shape} in profile {index}")
        for name in self._plan.outputs:
            dims = self._context.get_tensor_shape(name)
            tensors[name] = torch.empty([dims[axis] for axis in range(len(dims))], device="cuda")
        for name, tensor in tensors.items():
            self._need(self._context.set_tensor_address(name, tensor.data_ptr()), f"the memory of {name}")
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise BuildError(f"the engine failed on a batch of shape {input_ids.shape}")
        stream.synchronize()
        return {name: tensors[name].cpu().numpy() for name in self._plan.outputs}

    def _need(self, accepted: bool, what: str) -> None:
        """Raises `BuildError` unless TensorRT `accepted`, which it tells by a bool where others raise."""
        if not accepted:
            sizes = [(profile.min, profile.max) for profile in self._plan.profiles]
            raise BuildError(
                f"the engine refused {what}, built for shapes from, to {sizes}; TensorRT's errors are above"
            )

    def layers(self) -> list[dict[str, Any]]:
        """Returns TensorRT's own description of each layer, for the shapes that ran last."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context  # without shapes types read "N/A due to dynamic shapes"
        layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))["Layers"]
        return [layer for layer in layers if isinstance(layer, dict)]
