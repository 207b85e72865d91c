"""gaps: the compact form in ONNX files, 6 bytes per non-zero, 4 where files store the values as float16; the kernel and the function
body both decode it.

    values  f32 [n]   the non-zeros in C order of the weight, among them fillers of 0.0
    gaps    u16 [n]   p_0 = gaps[0], p_i = p_(i-1) + gaps[i] are their flat positions, strictly ascending

Where two non-zeros are more than 65535 apart a filler stands every 65535 positions. A weight without any non-zero
holds one filler at position 0, so that no runtime meets an empty tensor.
"""

from __future__ import annotations

import numpy as np

from ticketkit.errors import FormatError
from ticketkit.formats import Array, Parts, Shape, matrix, parts_of

ROLE = "storage"
PARTS = ("values", "gaps")
REACH = 65535  # the largest gap a uint16 holds


def pack(weight: Array) -> dict[str, Array]:
    """values and gaps of weight f32 [M, ...]."""
    matrix(weight.shape)
    flat = np.ascontiguousarray(weight, np.float32).ravel()
    at = np.flatnonzero(flat)
    if not at.size:
        return {"values": np.zeros(1, np.float32), "gaps": np.zeros(1, np.uint16)}
    gap = np.diff(at, prepend=0)
    fillers = np.maximum(gap - 1, 0) // REACH
    last = np.cumsum(fillers + 1) - 1  # where each non-zero lands, behind its own fillers
    values = np.zeros(last[-1] + 1, np.float32)
    gaps = np.full(last[-1] + 1, REACH, np.uint16)
    values[last] = flat[at]
    gaps[last] = gap - fillers * REACH
    return {"values": values, "gaps": gaps}


def unpack(parts: Parts, shape: Shape) -> Array:
    """weight f32 of that shape."""
    validate(parts, shape)
    weight = np.zeros(shape, np.float32)
    weight.reshape(-1)[np.cumsum(parts["gaps"], dtype=np.int64)] = parts["values"]
    return weight


def validate(parts: Parts, shape: Shape) -> None:
    """FormatError naming the array that breaks the format."""
    rows, cols = matrix(shape)
    values, gaps = parts_of(parts, {"values": np.float32, "gaps": np.uint16})
    if values.size != gaps.size:
        raise FormatError(f"gaps: expected {values.size} entries (values length), got {gaps.size}")
    if not gaps.size:
        raise FormatError("values: expected at least one entry (a filler where the weight is all zero), got none")
    if not gaps[1:].all():
        raise FormatError(f"gaps: expected positive gaps after the first, got 0 at entry {int(np.argmin(gaps[1:])) + 1}")
    if (end := int(gaps.sum(dtype=np.int64))) >= rows * cols:
        raise FormatError(f"gaps: expected positions below {rows * cols} for shape {list(shape)}, got {end}")


def nbytes(shape: Shape, nnz: int, itemsize: int = 4) -> int:
    """Bytes of values and gaps without fillers, of which there is at most one per 65535 weights."""
    return (itemsize + 2) * max(nnz, 1)
