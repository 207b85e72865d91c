"""Single weights: every non-zero is a multiply-add of a pixel for each lane, on the ordinary units.

A program makes a tile of pixels for BLOCK_M rows, which go along together, a non-zero of each at a time. Rows come longest first, so
that those of a program are nearly as long as each other and the last programs are short (row swizzle, as in `bsr.py`). Sums are float32
(float64 for float64).
"""

import triton
import triton.language as tl
from ticketkit.runtime.triton.geometry import channel_of, finish, offset, source, split_pixel, tap_of


@triton.jit(do_not_specialize=["bucket"])
def conv2d_csr(
    x, values, columns, row_ptr, order, value_at, bias, residual, y,
    pixels, out_h, out_w, out_channels, in_h, in_w, in_channels,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w,
    stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, minimum, maximum, bucket,
    KERNEL_W: tl.constexpr, POINTWISE: tl.constexpr, TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, CLIP: tl.constexpr, SUM: tl.constexpr, GPU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y[n,m,oh,ow] = clip(bias[m] + residual[n,m,oh,ow] + sum over the non-zeros of row m).

    Args:
        x: [N, C, H, W] by its strides; y, residual: [N, M, OH, OW] by theirs; bias [M]. BIAS, RESIDUAL, CLIP: whether they are used.
        values, columns: [nnz]; row m has the entries row_ptr[m] … row_ptr[m + 1]; columns: tap and channel.
        order: the rows, longest first.
        value_at: TRANSPOSED only: rows are input channels there, and entry e has the value values[value_at[e]].
        POINTWISE: 1x1, stride 1, no padding: pixels of x and y are the same. bucket: of sizes that share a configuration; not read.
    """
    groups = tl.cdiv(out_channels, BLOCK_M)
    place = tl.program_id(0) % groups * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.load(order + place, mask=place < out_channels, other=0)
    begin = tl.load(row_ptr + m)
    length = tl.where(place < out_channels, tl.load(row_ptr + m + 1) - begin, 0)
    pixel = tl.program_id(0) // groups * BLOCK_P + tl.arange(0, BLOCK_P)
    real = pixel < pixels
    image, h, w = split_pixel(pixel, out_h, out_w)
    here = offset(image, h, w, x_n, x_h, x_w)[:, None]
    sums = tl.zeros((BLOCK_P, BLOCK_M), SUM)
    for step in range(0, tl.max(length, 0)):
        alive = step < length
        entry = begin + step
        column = tl.load(columns + entry, mask=alive, other=0)
        if POINTWISE:
            at = here + channel_of(column).to(tl.int64)[None, :] * x_c
            there = real[:, None] & alive[None, :]
        else:
            up, left, found = source(h[:, None], w[:, None], tap_of(column)[None, :], stride_h, stride_w, pad_top, pad_left, dilation_h,
                                     dilation_w, in_h, in_w, KERNEL_W, TRANSPOSED)  # fmt: skip
            at = offset(image[:, None], up, left, x_n, x_h, x_w) + channel_of(column).to(tl.int64)[None, :] * x_c
            there = found & real[:, None] & alive[None, :]
        if TRANSPOSED:
            entry = tl.load(value_at + entry, mask=alive, other=0)
        value = tl.load(values + entry, mask=alive, other=0.0).to(SUM)
        sums += tl.load(x + at, mask=there, other=0.0).to(SUM) * value[None, :]
    results = offset(image, h, w, y_n, y_h, y_w)[:, None] + m.to(tl.int64)[None, :] * y_c
    finish(sums, bias, residual, y, results, m, real, place < out_channels, minimum, maximum, BIAS, RESIDUAL, CLIP)


@triton.jit(do_not_specialize=["bucket"])
def conv2d_csr_values(
    x, gradient, columns, rows, result,
    pixels, share, nnz, out_h, out_w, in_h, in_w,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w,
    stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, bucket,
    KERNEL_W: tl.constexpr, POINTWISE: tl.constexpr, SUM: tl.constexpr, GPU: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradient of the kept weights: result[s, e] is that of non-zero e over the pixels s * share … (s + 1) * share.

    Args:
        x: [N, C, H, W]; gradient: of y [N, M, OH, OW]; by their strides.
        columns, rows: of each non-zero.
        result: [pieces, nnz], to be summed over the pieces: additions keep one order, whatever runs first.
    """
    entry, piece = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.program_id(1)
    alive = entry < nnz
    column = tl.load(columns + entry, mask=alive, other=0)
    m = tl.load(rows + entry, mask=alive, other=0)
    sums = tl.zeros((BLOCK_E,), SUM)
    end = tl.minimum((piece + 1) * share, pixels)
    for first in range(piece * share, end, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        real = (pixel < end)[:, None]
        image, h, w = split_pixel(pixel, out_h, out_w)
        place = offset(image, h, w, y_n, y_h, y_w)[:, None] + m.to(tl.int64)[None, :] * y_c
        out = tl.load(gradient + place, mask=real & alive[None, :], other=0.0)
        if POINTWISE:
            at = offset(image, h, w, x_n, x_h, x_w)[:, None] + channel_of(column).to(tl.int64)[None, :] * x_c
            there = real & alive[None, :]
        else:
            up, left, found = source(h[:, None], w[:, None], tap_of(column)[None, :], stride_h, stride_w, pad_top, pad_left, dilation_h,
                                     dilation_w, in_h, in_w, KERNEL_W, False)  # fmt: skip
            at = offset(image[:, None], up, left, x_n, x_h, x_w) + channel_of(column).to(tl.int64)[None, :] * x_c
            there = found & real & alive[None, :]
        tile = tl.load(x + at, mask=there, other=0.0)
        sums += tl.sum(tile.to(SUM) * out.to(SUM), 0)
    tl.store(result + piece.to(tl.int64) * nnz + entry, sums, mask=alive)
