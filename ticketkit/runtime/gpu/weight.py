"""Where the non-zeros of a weight are, in the arrays that the Triton kernels read; made on the device of the weight.

Columns are ordered tap by tap, channels within, as channels_last images lie in memory. Rows are listed longest first. The gradient of
the input reads the same values through the transposed lists, so that nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ticketkit.errors import FormatError, KernelError
from ticketkit.formats import matrix

CHANNEL_BITS = 20  # of a packed column (`kernels/triton/geometry.py`)
MOST_TAPS = 2**11


@dataclass(frozen=True)
class Rows:
    """The blocks (CSR: non-zeros) of each row: row r has entries row_ptr[r] … row_ptr[r + 1]."""

    row_ptr: Tensor  # int32 [rows + 1]
    columns: Tensor  # int32 [entries]: tap << CHANNEL_BITS | channel (BSR: block of channels)
    order: Tensor  # int32 [rows]: longest first
    at: Tensor  # int32 [entries]: which block (non-zero) of the values each entry is


@dataclass(frozen=True)
class Weight:
    """The pattern of a sparse weight [M, C, kh, kw] (a matrix: [M, K, 1, 1]) in CSR, or in BSR with square blocks; without its values.

    `place` int64 [n] says where each stored value goes in the kernels' values, of `size` numbers: CSR [nnz], BSR [blocks, block, block].
    """

    shape: tuple[int, int, int, int]
    block: int | None  # None: CSR
    rows: Rows
    transposed: Rows  # rows are (blocks of) input channels, columns (blocks of) output channels
    entry_rows: Tensor  # int32 [entries]: (block) row of each
    place: Tensor
    size: int

    @classmethod
    def of(cls, gaps: Tensor, shape: Sequence[int], block: int | None) -> Weight:
        """From gap coded positions (`ticketkit.formats.gaps`) on any device.

        Args:
            gaps: uint16 [n].
            shape: [M, C, kh, kw] or [M, K].
            block: side of the blocks, None for CSR.

        Raises:
            FormatError: gaps that repeat, leave the weight, or are no uint16.
            KernelError: a weight beyond the packed columns: 2^20 channels or 2^11 taps.
        """
        full = _full(shape)
        out_channels, channels, *window = full
        taps = prod(window)
        # rows are columns of the transposed lists
        if max(out_channels, channels) >= 2**CHANNEL_BITS or taps >= MOST_TAPS:
            most = f"{2**CHANNEL_BITS} channels in and out and {MOST_TAPS} taps"
            raise KernelError(f"weight_shape: expected fewer than {most}, got {list(shape)}")
        at = _positions(gaps, prod(full))
        m, rest = at // (channels * taps), at % (channels * taps)
        channel, tap = rest // taps, rest % taps
        if block is None:
            listed = _rows(m, tap, channel, out_channels, channels)
            return cls(full, None, *listed, m.int(), torch.arange(len(at), device=at.device), len(at))
        across = -(-channels // block)
        key, entry = torch.unique((m // block * taps + tap) * across + channel // block, return_inverse=True)
        high, low = key // across, key % across
        place = (entry * block + m % block) * block + channel % block
        listed = _rows(high // taps, high % taps, low, -(-out_channels // block), across)
        return cls(full, block, *listed, (high // taps).int(), place, len(key) * block * block)

    @property
    def entries(self) -> int:
        """Blocks, or non-zeros."""
        return len(self.entry_rows)

    def store(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of values [n] in the kernels' order, in that type."""
        if self.block is None:
            return values.to(dtype, copy=True).contiguous()
        values = values.to(dtype)
        return values.new_zeros(self.size).index_copy_(0, self.place, values)

    def gather(self, stored: Tensor) -> Tensor:
        """The n values out of those in the kernels' order."""
        return stored.reshape(-1)[self.place]


def fill(gaps: Tensor, shape: Sequence[int], block: int) -> float:
    """Share of stored weights in the blocks of that side which they touch: 1.0 where the mask is made of such blocks."""
    weight = Weight.of(gaps, shape, block)
    return len(weight.place) / max(weight.size, 1)


def _full(shape: Sequence[int]) -> tuple[int, int, int, int]:
    matrix(tuple(shape))
    if len(shape) not in (2, 4):
        raise KernelError(f"weight_shape: expected [M, K] or [M, C, kh, kw], got {list(shape)}")
    rows, cols, *window = map(int, shape)
    height, width = window or (1, 1)
    return rows, cols, height, width


def _positions(gaps: Tensor, size: int) -> Tensor:
    """Flat C-order positions, int64; the checks of `formats.gaps.validate`, on the gaps' own device."""
    if gaps.dtype != torch.uint16 or gaps.dim() != 1:
        raise FormatError(f"gaps: expected uint16 [n], got {gaps.dtype} {list(gaps.shape)}")
    if not len(gaps):
        raise FormatError("values: expected at least one entry (a filler where the weight is all zero), got none")
    steps = gaps.long()
    at = steps.cumsum(0)
    if not bool((steps[1:] > 0).all()):
        raise FormatError("gaps: expected positive gaps after the first, got 0")
    if int(at[-1]) >= size:
        raise FormatError(f"gaps: expected positions below {size}, got {int(at[-1])}")
    return at


def _rows(row: Tensor, tap: Tensor, channel: Tensor, rows: int, channels: int) -> tuple[Rows, Rows]:
    """Lists by row, and by channel, of entries that come in order of their rows."""
    return _list(row, tap, channel, rows), _list(channel, tap, row, channels)


def _list(row: Tensor, tap: Tensor, channel: Tensor, rows: int) -> Rows:
    at = torch.argsort(row, stable=True)
    lengths = torch.bincount(row, minlength=rows)
    row_ptr = torch.zeros(rows + 1, dtype=torch.int64, device=row.device)
    torch.cumsum(lengths, 0, out=row_ptr[1:])
    columns = (tap << CHANNEL_BITS) | channel
    order = torch.argsort(lengths, descending=True, stable=True)
    return Rows(row_ptr.int(), columns[at].int(), order.int(), at.int())
