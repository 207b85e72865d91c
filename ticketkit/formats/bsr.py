"""bsr: block compressed sparse rows: csr whose entries are blocks of r x c weights, so that one index serves r * c of them.

    values       f32 [blocks * r * c]    block after block, along block rows, block columns ascending; each r x c in C order
    col_indices  i32 [blocks]            block column of each, in [0, ceil(K / c))
    row_ptr      i64 [ceil(M / r) + 1]   block row i is blocks row_ptr[i] to row_ptr[i + 1]
    block        i32 [2]                 r, c, each from 1 to 65535

A block is stored if any of its weights is not zero. The last blocks may stick out of the matrix; the values outside are zero.
The arrays are those of ``scipy.sparse.bsr_array`` and ``torch.sparse_bsr_tensor``, which take only matrices of whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ticketkit.errors import FormatError
from ticketkit.formats import Array, Parts, Shape, csr, matrix, parts_of

ROLE = "compute"
PARTS = ("values", "col_indices", "row_ptr", "block")
Block = tuple[int, int]
BLOCKS: tuple[Block, ...] = ((16, 1), (8, 1), (4, 1), (1, 16), (1, 8), (1, 4))  # best first: along output channels, and large
KERNELS: dict[str, Block] = {"bsr": (4, 1), "bsr1x4": (1, 4)}  # blocks of the forms that kernels pack weights in (tk_format)
DEFAULT: Block = KERNELS["bsr"]
LARGEST = 65535


def pack(weight: Array, block: Block | None = None) -> dict[str, Array]:
    """BSR arrays of weight f32 [M, ...], in blocks of that size, else of the size `detect` finds, else of `DEFAULT`."""
    r, c = block or detect(weight) or DEFAULT
    stored = _stored(weight, (r, c))
    rows, cols = matrix(weight.shape)
    padded = np.pad(np.asarray(weight, np.float32).reshape(rows, cols), ((0, -rows % r), (0, -cols % c)))
    tiles = padded.reshape(len(stored), r, -1, c).swapaxes(1, 2)
    row_ptr = np.zeros(len(stored) + 1, np.int64)
    np.cumsum(np.count_nonzero(stored, axis=1), out=row_ptr[1:])
    return {
        "values": tiles[stored].ravel(),
        "col_indices": np.nonzero(stored)[1].astype(np.int32),
        "row_ptr": row_ptr,
        "block": np.array((r, c), np.int32),
    }


def unpack(parts: Parts, shape: Shape) -> Array:
    """weight f32 of that shape."""
    validate(parts, shape)
    (rows, cols), (r, c) = matrix(shape), parts["block"].tolist()
    height, width = min(r, rows), min(c, cols)  # memory follows the shape, however large a block claims to be
    tiles = np.zeros((-(-rows // r), height, -(-cols // c), width), np.float32)
    row = np.repeat(np.arange(len(tiles)), np.diff(parts["row_ptr"]))
    tiles[row, :, parts["col_indices"]] = parts["values"].reshape(-1, r, c)[:, :height, :width]
    weight = tiles.reshape(len(tiles) * height, -1)[:rows, :cols]
    return np.ascontiguousarray(weight).reshape(shape)


def validate(parts: Parts, shape: Shape) -> None:
    """FormatError naming the array that breaks the format."""
    rows, cols = matrix(shape)
    dtypes: dict[str, type[np.generic]] = dict(zip(PARTS, (np.float32, np.int32, np.int64, np.int32), strict=True))
    values, col, row_ptr, block = parts_of(parts, dtypes)
    _check(block[:3].tolist())
    r, c = block.tolist()
    if values.size != col.size * r * c:
        raise FormatError(f"values: expected {col.size * r * c} for {col.size} blocks of {r}x{c}, got {values.size}")
    grid = -(-rows // r), -(-cols // c)
    try:  # one value for each block makes it csr
        csr.validate({"values": values[:: r * c], "col_indices": col, "row_ptr": row_ptr}, grid)
    except FormatError as error:
        raise FormatError(f"{error}, counted in blocks of {r}x{c}") from None
    tiles = values.reshape(-1, r, c)
    below = tiles[row_ptr[-2] :, rows - (grid[0] - 1) * r :]
    right = tiles[col == grid[1] - 1, :, cols - (grid[1] - 1) * c :]
    if below.any() or right.any():
        raise FormatError(f"values: expected zeros where blocks of {r}x{c} stick out of {rows}x{cols}, got others")


def nbytes(shape: Shape, nnz: int, itemsize: int = 4) -> int:
    """Bytes of the four arrays where the non-zeros fill blocks of `DEFAULT` size; more if they are scattered."""
    r, c = DEFAULT
    return -(-nnz // (r * c)) * (itemsize * r * c + 4) + 8 * (-(-matrix(shape)[0] // r) + 1) + 8


def fill(weight: Array, block: Block) -> float:
    """Share of non-zeros among the values that `pack` would store, padding included; 1.0 where it would store none."""
    blocks = int(np.count_nonzero(_stored(weight, block)))
    return float(np.count_nonzero(weight) / (blocks * block[0] * block[1])) if blocks else 1.0


def detect(weight: Array, least: float = 0.9) -> Block | None:
    """The first of `BLOCKS` that non-zeros fill to `least` or more, None if there is none.

    XNNPACK packs blocks of output channels by the same share (`src/operators/convolution-nchw.c`).
    """
    return next((block for block in BLOCKS if fill(weight, block) >= least), None)


def _stored(weight: Array, block: Block) -> Array:
    """bool [ceil(M / r), ceil(K / c)]: the blocks with a non-zero."""
    _check(block)
    rows, cols = matrix(weight.shape)
    r, c = min(block[0], rows), min(block[1], cols)
    padded = np.pad(weight.reshape(rows, cols) != 0, ((0, -rows % r), (0, -cols % c)))
    stored: Array = np.logical_or.reduce(padded.reshape(len(padded) // r, r, -1, c), axis=(1, 3))
    return stored


def _check(block: Sequence[int]) -> None:
    if len(block) != 2 or not all(1 <= side <= LARGEST for side in block):
        raise FormatError(f"block: expected 2 numbers (r, c) from 1 to {LARGEST}, got {list(block)}")
