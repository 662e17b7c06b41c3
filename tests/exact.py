"""ONNX files computed node by node, as they are written: fused int8 kernels round elsewhere, and may overflow."""

from pathlib import Path

import onnxruntime


def exact_session(file: Path) -> onnxruntime.InferenceSession:
    """Returns `file` in ONNX Runtime without any rewriting of its graph."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
