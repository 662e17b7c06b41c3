"""The precision that an engine really has, by TensorRT's own description of its layers. Needs no TensorRT.

A build may quietly be fp32, as a precision flag that TensorRT 11 no longer has would leave it; so what was asked for is
read back and asserted.
"""

import re
from typing import Any

_MATRIX_LAYERS = ("gemm", "matrix", "matmul", "fc", "mha", "attention", "conv")
_NAMES = {
    "fp32": ("float", "fp32"),
    "fp16": ("half", "fp16"),
    "bf16": ("bf16", "bfloat16"),
    "int8": ("int8",),
    "fp8": ("fp8",),
}
"""How the inspector spells each type, in lower case: "Half" since TensorRT 10, "Row major linear FP16" before."""


class BuildError(RuntimeError):
    """TensorRT did not build what was asked for; the message says what came."""


def check_precision(layers: list[dict[str, Any]], expected: str) -> dict[str, int]:
    """Returns how many matrix layers take inputs of each type, `expected` being nearly all of them.

    Raises:
        BuildError: under 90 % of them have an input of `expected`, or no matrix layer can be recognised.
    """
    counts: dict[str, int] = dict.fromkeys(_NAMES, 0)
    total = 0
    for layer in layers:
        if not any(word in str(layer.get("LayerType", "")).lower() for word in _MATRIX_LAYERS):
            continue
        total += 1
        formats = " ".join(str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs", [])).lower()
        words = set(re.findall(r"\w+", formats))  # whole ones: a BFloat16 is no Float
        for precision, names in _NAMES.items():
            counts[precision] += not words.isdisjoint(names)
    if total == 0:
        raise BuildError("the inspector shows no matrix layer that is known here, so the precision is unknown")
    if counts[expected] < 0.9 * total:
        raise BuildError(f"{expected} was asked for, but {total} matrix layers take inputs of {counts}")
    return counts
