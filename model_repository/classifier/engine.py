"""Runs model.onnx on the CPU: for the served classifier, and for whatever checks what is served.

B reviews, T tokens, C labels. Inputs `input_ids`, `attention_mask` int64 (B, T); outputs `logits`, `probabilities`
float32 (B, C), `score` float32 (B, 1), `label` str (B, 1), computed in int8 where the file says so, else in fp32. An
int8 file's other steps are in bf16 in OpenVINO on CPUs with tiles for it (AMX).

Two runtimes can do it. With instructions for 8-bit dot products (VNNI) OpenVINO is the faster one. Without them its
int8 is slower than its own fp32, and ONNX Runtime twice as fast (CHANGELOG has both comparisons). Each is imported only
where it is chosen: the other then costs neither memory nor start.
"""

import importlib
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

AUTO, OPENVINO, ONNXRUNTIME = "auto", "openvino", "onnxruntime"
RUNTIMES = (AUTO, OPENVINO, ONNXRUNTIME)
WIDTH_STEPS = {OPENVINO: 8, ONNXRUNTIME: 4}
"""Tokens: each runtime gets reviews at widths that are multiples of this. OpenVINO makes code for every shape, so there
must be few; IMDb's reviews, 226 tokens on average once truncated, get 1 % padding from it. ONNX Runtime makes none:
there steps only give short reviews company, and a group runs at the width of its longest."""
GROUP_TOKENS = {OPENVINO: 1 << 30, ONNXRUNTIME: 256}
"""Tokens of reviews that run as one tensor, at most. In ONNX Runtime only short ones gain by it; two long ones would
both be answered when both are done."""
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
"""Flags of /proc/cpuinfo for 8-bit dot products: x86 with AVX-512, x86 without it, x86 with matrix tiles, ARM."""
_BF16_TILES = "amx_bf16"
_Run = Callable[[Sequence[str], Mapping[str, npt.NDArray[np.int64]]], list[npt.NDArray[Any]]]
_Metadata = Callable[[str], str | None]


class Engine:
    """model.onnx, ready to run; one thread at a time may call it, in ONNX Runtime any number."""

    def __init__(self, model_file: Path, num_threads: int, runtime: str = AUTO) -> None:
        """Opens `model_file` for `num_threads` threads (0: all cores) in the runtime that `choose` returns."""
        self.runtime = choose(runtime)
        if self.runtime == OPENVINO:
            self._run, metadata = _openvino(model_file, num_threads)
        else:
            self._run, metadata = _onnxruntime(model_file, num_threads)
        self.vocab_size, self.max_tokens = (_limit(metadata(name), name) for name in ("vocab_size", "max_tokens"))

    @property
    def width_step(self) -> int:
        """Tokens: reviews whose lengths are the same in multiples of it should run together."""
        return WIDTH_STEPS[self.runtime]

    @property
    def padding_step(self) -> int:
        """Tokens: a group runs at a multiple of it, for few shapes where each must be prepared."""
        return self.width_step if self.prepares_each_shape else 1

    @property
    def prepares_each_shape(self) -> bool:
        """Whether a shape's first run takes two to three times as long as later ones: OpenVINO makes code for it."""
        return self.runtime == OPENVINO

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
        return self._run(names, inputs)


def choose(runtime: str = AUTO, cpu_flags: Collection[str] | None = None) -> str:
    """Returns the runtime meant: `runtime` itself, or for `AUTO` the faster one on a CPU with `cpu_flags`.

    They are this machine's by default. A CPU whose flags cannot be read counts as one with dot products.

    Raises:
        ValueError: an unknown name.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime {runtime!r} came, expected one of {', '.join(RUNTIMES)}")
    if runtime != AUTO:
        return runtime
    flags = set(_cpu_flags() if cpu_flags is None else cpu_flags)
    return OPENVINO if not flags or flags & _DOT_PRODUCTS else ONNXRUNTIME


def precision(is_int8: bool, cpu_flags: Collection[str] | None = None) -> str:
    """Returns what OpenVINO computes in whatever is not int8 on a CPU with `cpu_flags`, by default this machine's.

    bf16 where an int8 file meets tiles for it: 6 to 18 % less time from 128 tokens on, and logits no farther from the
    checkpoint's. Where tokens are dropped as much less, and 0.06 points of accuracy, since the choice of tokens is in
    bf16 as well (CHANGELOG). OpenVINO's own default is bf16 on any CPU that knows it, for a file in fp32 too.
    """
    flags = _cpu_flags() if cpu_flags is None else cpu_flags
    return "bf16" if is_int8 and _BF16_TILES in flags else "f32"


def shares_cores(runtime: str) -> bool:
    """Returns whether instances should lend each other their cores in `runtime`.

    In OpenVINO it takes half as much memory again, and only the lone review's part was tried: a third sooner, but with
    30 requests a second a higher p99 (CHANGELOG).
    """
    return runtime == ONNXRUNTIME


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])


def _openvino(model_file: Path, num_threads: int) -> tuple[_Run, _Metadata]:
    # Importing openvino would write an analytics id to ~/intel and report to a server; without this package it doesn't.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    core = openvino.Core()
    model = core.read_model(model_file)

    def metadata(key: str) -> str | None:
        path = ["framework", key]  # where OpenVINO puts the metadata of an ONNX file
        return str(model.get_rt_info(path).value) if model.has_rt_info(path) else None

    is_int8 = _beside("openvino_graph").unquantised_attention(model) > 0
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": num_threads,
        "ENABLE_CPU_PINNING": False,  # else one-threaded engines of several processes all run on the first core
        "INFERENCE_PRECISION_HINT": precision(is_int8),
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def run(names: Sequence[str], inputs: Mapping[str, npt.NDArray[np.int64]]) -> list[npt.NDArray[Any]]:
        outputs = request.infer(dict(inputs), share_inputs=True)  # else it copies them first
        return [_as_objects(outputs[name]) for name in names]

    return run, metadata


def _as_objects(output: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return output.astype(object) if output.dtype.kind == "U" else output


def _onnxruntime(model_file: Path, num_threads: int) -> tuple[_Run, _Metadata]:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else 1.32 writes a device id and a database to ~/.cache
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    # Threads spin within a run, where each waits for microseconds, and sleep between runs: else they would go on for
    # tens of milliseconds, on cores that others want.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    graph, is_int8 = _beside("fused_graph").fused(model_file)
    # Of GELU; it moved the shipped model's logits by up to 0.02 where it was tried, less than int8 does.
    options.add_session_config_entry("optimization.enable_gelu_approximation", str(int(is_int8)))
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(names: Sequence[str], inputs: Mapping[str, npt.NDArray[np.int64]]) -> list[npt.NDArray[Any]]:
        outputs: list[npt.NDArray[Any]] = session.run(list(names), dict(inputs))
        return outputs

    return run, session.get_modelmeta().custom_metadata_map.get


def _beside(name: str) -> Any:
    """Returns a module of this folder, which in Triton is no package, once its runtime is wanted."""
    return importlib.import_module(f"{__package__}.{name}" if __package__ else name)


def _limit(value: str | None, name: str) -> int:
    """Returns a limit of the inputs, which export.graph wrote into the file; raises ValueError if it did not."""
    if value is None:
        raise ValueError(f"model.onnx does not say its {name}: export it again with `python -m export.onnx`")
    return int(value)
