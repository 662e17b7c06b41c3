"""Tensors as KServe v2 carries them over gRPC: their elements' bytes one after another, little-endian."""

import struct
from collections.abc import Sequence
from typing import Any

_LENGTH = struct.Struct("<I")
"""Before each element of BYTES."""


def pack_bytes(elements: Sequence[bytes]) -> bytes:
    """Returns a BYTES tensor of `elements`."""
    return b"".join([part for element in elements for part in (_LENGTH.pack(len(element)), element)])


def unpack_rows(datatype: str, shape: Sequence[int], raw: bytes) -> list[Sequence[Any]]:
    """Returns the rows of a tensor [B, W] of BYTES or FP32: B of W elements each.

    Raises:
        ValueError: another type, another number of dimensions, or `raw` is not as long as both say.
    """
    if datatype not in _UNPACK or len(shape) != 2:
        raise ValueError(f"a tensor {datatype} {list(shape)} came, expected BYTES or FP32 [B, W]")
    num_rows, width = shape
    try:
        elements = _UNPACK[datatype](raw, num_rows * width)
    except struct.error as error:
        raise ValueError(f"{len(raw)} bytes came of a tensor {datatype} {list(shape)}: {error}") from error
    return [elements[start : start + width] for start in range(0, num_rows * width, width)]


def _unpack_bytes(raw: bytes, num_elements: int) -> list[bytes]:
    elements, end = [], 0
    for _ in range(num_elements):
        start = end + _LENGTH.size
        end = start + _LENGTH.unpack_from(raw, end)[0]
        elements.append(raw[start:end])
    if end != len(raw):
        raise struct.error(f"{num_elements} elements end at {end}")
    return elements


def _unpack_floats(raw: bytes, num_elements: int) -> tuple[float, ...]:
    return struct.unpack(f"<{num_elements}f", raw)


_UNPACK = {"BYTES": _unpack_bytes, "FP32": _unpack_floats}
