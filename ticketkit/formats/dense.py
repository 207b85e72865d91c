"""dense: the weight itself, zeros and all. The reference every other format is compared with."""

from __future__ import annotations

import numpy as np

from ticketkit.errors import FormatError
from ticketkit.formats import Array, Parts, Shape, matrix, parts_of

ROLE = "compute"
PARTS = ("values",)


def pack(weight: Array) -> dict[str, Array]:
    """values f32 [numel], C order."""
    matrix(weight.shape)
    return {"values": np.ascontiguousarray(weight, np.float32).ravel()}


def unpack(parts: Parts, shape: Shape) -> Array:
    """weight f32 of that shape."""
    validate(parts, shape)
    weight: Array = parts["values"].reshape(shape).copy()
    return weight


def validate(parts: Parts, shape: Shape) -> None:
    """FormatError unless ``values`` holds exactly the weight's elements, all finite."""
    rows, cols = matrix(shape)
    (values,) = parts_of(parts, {"values": np.float32})
    if values.size != rows * cols:
        raise FormatError(f"values: expected {rows * cols} elements for shape {list(shape)}, got {values.size}")


def nbytes(shape: Shape, nnz: int, itemsize: int = 4) -> int:
    """Bytes of a dense weight; its zeros cost as much as the rest."""
    rows, cols = matrix(shape)
    return itemsize * rows * cols
