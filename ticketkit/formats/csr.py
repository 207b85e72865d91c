"""csr: compressed sparse rows, one row per output channel (Saad, Iterative Methods for Sparse Linear Systems, section 3.4).

    values       f32 [nnz]     the non-zeros, row after row, columns ascending
    col_indices  i32 [nnz]     column of each, in [0, K)
    row_ptr      i64 [M + 1]   row r is values[row_ptr[r] : row_ptr[r + 1]]

The arrays are those of ``scipy.sparse.csr_array`` and ``torch.sparse_csr_tensor``.
"""

from __future__ import annotations

import numpy as np

from ticketkit.errors import FormatError
from ticketkit.formats import Array, Parts, Shape, matrix, parts_of

ROLE = "compute"
PARTS = ("values", "col_indices", "row_ptr")


def pack(weight: Array) -> dict[str, Array]:
    """CSR arrays of the non-zeros of weight f32 [M, ...]."""
    rows, cols = matrix(weight.shape)
    flat = np.ascontiguousarray(weight, np.float32).reshape(rows, cols)
    row, col = np.nonzero(flat)
    row_ptr = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(row, minlength=rows), out=row_ptr[1:])
    return {"values": flat[row, col], "col_indices": col.astype(np.int32), "row_ptr": row_ptr}


def unpack(parts: Parts, shape: Shape) -> Array:
    """weight f32 of that shape."""
    validate(parts, shape)
    rows, cols = matrix(shape)
    weight = np.zeros((rows, cols), np.float32)
    weight[np.repeat(np.arange(rows), np.diff(parts["row_ptr"])), parts["col_indices"]] = parts["values"]
    return weight.reshape(shape)


def validate(parts: Parts, shape: Shape) -> None:
    """FormatError naming the array that breaks the format."""
    rows, cols = matrix(shape)
    values, col, row_ptr = parts_of(parts, {"values": np.float32, "col_indices": np.int32, "row_ptr": np.int64})
    if row_ptr.size != rows + 1:
        raise FormatError(f"row_ptr: expected {rows + 1} entries for {rows} rows, got {row_ptr.size}")
    if row_ptr[0] != 0 or row_ptr[-1] != values.size:
        raise FormatError(f"row_ptr: expected to run from 0 to {values.size} (values length), got {row_ptr[0]} to {row_ptr[-1]}")
    if (row_ptr[1:] < row_ptr[:-1]).any():
        row = int(np.argmax(row_ptr[1:] < row_ptr[:-1]))
        raise FormatError(f"row_ptr: expected to never decrease, got {row_ptr[row]} then {row_ptr[row + 1]} at row {row}")
    if col.size != values.size:
        raise FormatError(f"col_indices: expected {values.size} entries (values length), got {col.size}")
    if col.size and (col.min() < 0 or col.max() >= cols):
        raise FormatError(f"col_indices: expected columns in [0, {cols}), got {col.min()} to {col.max()}")
    fall = col[1:] <= col[:-1]
    starts = row_ptr[(row_ptr > 0) & (row_ptr < col.size)]
    fall[starts - 1] = False  # the first column of a row owes nothing to the row before
    if fall.any():
        at = int(np.argmax(fall))
        raise FormatError(f"col_indices: expected ascending columns within a row, got {col[at]} then {col[at + 1]} at entry {at}")


def nbytes(shape: Shape, nnz: int, itemsize: int = 4) -> int:
    """Bytes of values, column indices and row pointers."""
    return (itemsize + 4) * nnz + 8 * (matrix(shape)[0] + 1)
