"""Device functions that all kernels share: which pixel a tap reads, and what is done with a finished sum.

A *pixel* is an image with a position in it, numbered (image * height + row) * width + column. A *tap* is a position in the window of the
convolution, numbered i * kernel_w + j. Tensors come as a pointer and four strides in elements (image, channel, row, column).
"""

import triton
import triton.language as tl

# A column of a sparse weight is an int32: above the tap, below the channel (BSR: which block of channels).
BITS = tl.constexpr(20)
CHANNELS = tl.constexpr((1 << 20) - 1)


@triton.jit
def tap_of(column):
    """The tap of packed columns."""
    return column >> BITS


@triton.jit
def channel_of(column):
    """The channel, or the block of channels, of packed columns."""
    return column & CHANNELS


@triton.jit
def split_pixel(pixel, height, width):
    """Image, row and column of pixels."""
    image = pixel // (height * width)
    rest = pixel - image * (height * width)
    row = rest // width
    return image, row, rest - row * width


@triton.jit
def offset(image, row, column, stride_n, stride_h, stride_w):
    """Elements from the start of a tensor to channel 0 of pixels; 64 bits, since large batches pass 2^31 elements."""
    return image.to(tl.int64) * stride_n + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w


@triton.jit
def source(row, column, tap, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, height, width, KERNEL_W: tl.constexpr,
           TRANSPOSED: tl.constexpr):  # fmt: skip
    """Row and column of the pixel that a tap reads for a pixel of the result, and whether there is one.

    TRANSPOSED turns the convolution round, for the gradient of its input: that tap carried a pixel of the input to the pixel of the
    result which is read now. height and width are those of the tensor that is read.
    """
    i = tap // KERNEL_W
    j = tap - i * KERNEL_W
    if TRANSPOSED:
        up = row + pad_top - i * dilation_h
        left = column + pad_left - j * dilation_w
        h = up // stride_h
        w = left // stride_w
        there = (up >= 0) & (left >= 0) & (h * stride_h == up) & (w * stride_w == left)
    else:
        h = row * stride_h - pad_top + i * dilation_h
        w = column * stride_w - pad_left + j * dilation_w
        there = (h >= 0) & (w >= 0)
    return h, w, there & (h < height) & (w < width)


@triton.jit
def finish(sums, bias, residual, y, at, channel, real, known, minimum, maximum, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
           CLIP: tl.constexpr):  # fmt: skip
    """Writes clip(sums + bias + residual), of sums [pixels, channels]; NaN stays NaN.

    `at`: the offsets of the results [pixels, channels]; real [pixels] and known [channels]: which of them there are.
    """
    inside = real[:, None] & known[None, :]
    if BIAS:
        sums += tl.load(bias + channel, mask=known, other=0.0).to(sums.dtype)[None, :]
    if RESIDUAL:
        sums += tl.load(residual + at, mask=inside, other=0.0).to(sums.dtype)
    if CLIP:
        sums = tl.where(sums < minimum, minimum, sums)
        sums = tl.where(sums > maximum, maximum, sums)
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=inside)
