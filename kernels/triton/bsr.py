"""Blocks of BLOCK_M outputs x BLOCK_K channels of one tap: each is a product on the matrix units of a tile of pixels with the block.

An implicit GEMM: the tile of pixels is gathered from the image for each block, through its tap, and never stored. Sums are float32
(float64 for float64). A program makes one tile of one row of blocks; rows come longest first (`order`), so that the last to run are short
(row swizzle: Gale et al., Sparse GPU Kernels for Deep Learning, SC 2020, section V-C).
"""

import triton
import triton.language as tl
from ticketkit.runtime.triton.geometry import channel_of, finish, offset, source, split_pixel, tap_of


@triton.jit(do_not_specialize=["bucket"])
def conv2d_bsr(
    x, values, columns, row_ptr, order, block_at, bias, residual, y,
    pixels, out_h, out_w, out_channels, in_h, in_w, in_channels,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w,
    stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, minimum, maximum, bucket,
    KERNEL_W: tl.constexpr, POINTWISE: tl.constexpr, TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, CLIP: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr, FACTOR: tl.constexpr, GPU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y[n,m,oh,ow] = clip(bias[m] + residual[n,m,oh,ow] + sum over the blocks of row m // BLOCK_M).

    Args:
        x: [N, C, H, W] by its strides; y, residual: [N, M, OH, OW] by theirs; bias [M]. BIAS, RESIDUAL, CLIP: whether they are used.
        values: [blocks, BLOCK_M, BLOCK_K]; block row r has those from row_ptr[r] to row_ptr[r + 1]; columns: tap and block of channels.
        order: the rows, longest first.
        block_at: TRANSPOSED only: rows are blocks of input channels there, and entry k is block block_at[k] of `values`, transposed.
        POINTWISE: 1x1, stride 1, no padding: pixels of x and y are the same. bucket: of sizes that share a configuration; not read.
        FACTOR, SUM: types of what is multiplied and added.
    """
    rows = tl.cdiv(out_channels, BLOCK_M)
    row = tl.load(order + tl.program_id(0) % rows)
    pixel = tl.program_id(0) // rows * BLOCK_P + tl.arange(0, BLOCK_P)
    real = pixel < pixels
    image, h, w = split_pixel(pixel, out_h, out_w)
    there, at = real, offset(image, h, w, x_n, x_h, x_w)
    k = tl.arange(0, BLOCK_K)
    inner = k[:, None] + tl.arange(0, BLOCK_M)[None, :] * BLOCK_K
    if TRANSPOSED:  # the block of values is [BLOCK_K, BLOCK_M]
        inner = k[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    sums = tl.zeros((BLOCK_P, BLOCK_M), SUM)
    for entry in range(tl.load(row_ptr + row), tl.load(row_ptr + row + 1)):
        column = tl.load(columns + entry)
        if not POINTWISE:
            up, left, there = source(h, w, tap_of(column), stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, in_h, in_w,
                                     KERNEL_W, TRANSPOSED)  # fmt: skip
            there = there & real
            at = offset(image, up, left, x_n, x_h, x_w)
        channel = channel_of(column) * BLOCK_K + k
        place = at[:, None] + channel.to(tl.int64)[None, :] * x_c
        tile = tl.load(x + place, mask=there[:, None] & (channel < in_channels)[None, :], other=0.0)
        block = entry
        if TRANSPOSED:
            block = tl.load(block_at + entry)
        weight = tl.load(values + block.to(tl.int64) * (BLOCK_M * BLOCK_K) + inner)
        sums = tl.dot(tile.to(FACTOR), weight.to(FACTOR), sums, input_precision=PRECISION, out_dtype=SUM)
    m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    results = offset(image, h, w, y_n, y_h, y_w)[:, None] + m.to(tl.int64)[None, :] * y_c
    finish(sums, bias, residual, y, results, m, real, m < out_channels, minimum, maximum, BIAS, RESIDUAL, CLIP)


@triton.jit(do_not_specialize=["bucket"])
def conv2d_bsr_values(
    x, gradient, columns, block_rows, result,
    pixels, share, blocks, out_h, out_w, out_channels, in_h, in_w, in_channels,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w,
    stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, bucket,
    KERNEL_W: tl.constexpr, POINTWISE: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr, FACTOR: tl.constexpr, GPU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradient of the kept blocks: result[s, b] [BLOCK_M, BLOCK_K] is that of block b over the pixels s * share … (s + 1) * share.

    Args:
        x: [N, C, H, W]; gradient: of y [N, M, OH, OW]; by their strides.
        columns, block_rows: of each block.
        result: [pieces, blocks, BLOCK_M, BLOCK_K], to be summed over the pieces: additions keep one order, whatever runs first.
    """
    block, piece = tl.program_id(0), tl.program_id(1)
    column = tl.load(columns + block)
    m = tl.load(block_rows + block) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = channel_of(column) * BLOCK_K + tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_K), SUM)
    end = tl.minimum((piece + 1) * share, pixels)
    for first in range(piece * share, end, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        real = pixel < end
        image, h, w = split_pixel(pixel, out_h, out_w)
        up, left, there = h, w, real
        if not POINTWISE:
            up, left, there = source(h, w, tap_of(column), stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, in_h, in_w,
                                     KERNEL_W, False)  # fmt: skip
            there = there & real
        at = offset(image, up, left, x_n, x_h, x_w)
        place = at[:, None] + channel.to(tl.int64)[None, :] * x_c
        tile = tl.load(x + place, mask=there[:, None] & (channel < in_channels)[None, :], other=0.0)
        at = offset(image, h, w, y_n, y_h, y_w)
        out = tl.load(gradient + at[None, :] + m.to(tl.int64)[:, None] * y_c, mask=real[None, :] & (m < out_channels)[:, None], other=0.0)
        sums = tl.dot(out.to(FACTOR), tile.to(FACTOR), sums, input_precision=PRECISION, out_dtype=SUM)
    inner = tl.arange(0, BLOCK_M)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    tl.store(result + (piece.to(tl.int64) * blocks + block) * (BLOCK_M * BLOCK_K) + inner, sums)
