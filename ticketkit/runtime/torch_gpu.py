"""The torch operators on GPUs: patterns and values brought into the order of the Triton kernels, once for each weight."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from ticketkit.errors import FormatError, KernelError
from ticketkit.runtime import gpu
from ticketkit.runtime.torch_cache import Cache

FILLED = 0.9  # share of non-zeros that makes blocks of a side the weight's own
TRANSPOSED = 32  # rows of a matrix product from which on CSR turns its input, so that neighbours in memory are neighbours in the batch

patterns: Cache[gpu.Weight] = Cache()
stores: Cache[Tensor] = Cache()
sides: Cache[int] = Cache()


def conv2d(
    x: Tensor, values: Tensor, gaps: Tensor, bias: Tensor, residual: Tensor | None, weight_shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, minimum: float | None, maximum: float | None, format: str,
    x_layout: str, y_layout: str, block: int,
) -> Tensor:  # fmt: skip
    """`torch_op.sparse_conv2d`, its arguments counted."""
    for name, layout in (("x_layout", x_layout), ("y_layout", y_layout)):
        if layout != "planes":
            raise KernelError(f"{name}: expected 'planes' on a GPU, got {layout!r}, an order of processors' kernels")
    weight, stored = packed(x, values, gaps, weight_shape, groups, format, block)
    low, high = -inf if minimum is None else minimum, inf if maximum is None else maximum
    residual = None if residual is None else residual.to(x.dtype)
    how = window(stride, padding, dilation), low, high, tf32("conv")
    return gpu.conv2d(_ordered(x, weight), weight, stored, bias.to(x.dtype), residual, *how)


def linear(
    x: Tensor, values: Tensor, gaps: Tensor, bias: Tensor, weight_shape: Sequence[int], minimum: float | None, maximum: float | None,
    format: str, block: int,
) -> Tensor:  # fmt: skip
    """`torch_op.sparse_linear`, of rows [N, K] -> [N, M]."""
    weight, stored = packed(x, values, gaps, weight_shape, 1, format, block)
    low, high = -inf if minimum is None else minimum, inf if maximum is None else maximum
    images, how = _ordered(x[:, :, None, None], weight), (gpu.Window(), low, high, tf32("matmul"))
    return gpu.conv2d(images, weight, stored, bias.to(x.dtype), None, *how)[:, :, 0, 0]


def gradients(
    gradient: Tensor, x: Tensor, values: Tensor, gaps: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, format: str, block: int, of_x: bool, of_values: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x and of the values, by sparse kernels."""
    weight, stored = packed(x, values, gaps, weight_shape, groups, format, block)
    return gpu.gradients(gradient, x, weight, stored, window(stride, padding, dilation), of_x, of_values, tf32("conv"))


def tf32(kind: str) -> bool:
    """Whether torch's own layers of that kind, "conv" or "matmul", may round float32 operands to TF32 in this process."""
    switch = torch.backends.cudnn if kind == "conv" else torch.backends.cuda.matmul
    try:
        return bool(switch.allow_tf32)
    except RuntimeError:  # set by torch's newer names, beside which it refuses the older one
        newer = torch.backends.cudnn.conv if kind == "conv" else torch.backends.cuda.matmul
        return bool(newer.fp32_precision == "tf32")


def window(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> gpu.Window:
    """The operator's three lists."""
    (down, across), (top, left, bottom, right), (tall, wide) = stride, padding, dilation
    return gpu.Window((down, across), (top, left, bottom, right), (tall, wide))


def packed(
    x: Tensor, values: Tensor, gaps: Tensor, shape: Sequence[int], groups: int, format: str, block: int
) -> tuple[gpu.Weight, Tensor]:
    """Pattern and stored values of a weight, of x's type.

    Raises:
        KernelError: a format, block or number of groups that the kernels do not have.
        FormatError: gaps or values that break their format.
    """
    gpu.require(x.device)
    if groups != 1:
        raise KernelError(f"groups: expected 1 on a GPU, got {groups}; leave grouped and depthwise layers dense")
    if format not in ("csr", "bsr"):
        raise KernelError(f"format: expected csr or bsr on a GPU, got {format!r}")
    if values.device != x.device or gaps.device != x.device:
        raise KernelError(f"values and gaps: expected them on {x.device}, where x is, got {values.device} and {gaps.device}")
    if values.shape != gaps.shape:
        raise FormatError(f"gaps: expected {values.numel()} entries (values length), got {gaps.numel()}")
    side = None if format == "csr" else block or sides.get((gaps,), tuple(shape), lambda: own_side(gaps, shape) or gpu.BLOCKS[-1])
    weight = patterns.get((gaps,), (side, *shape), lambda: gpu.Weight.of(gaps, shape, side))

    def store() -> Tensor:
        if not bool(values.isfinite().all()):
            raise FormatError("values: expected finite numbers, got NaN or infinity")
        return weight.store(values.detach(), x.dtype)

    return weight, stores.get((values, gaps), (side, *shape, x.dtype), store)


def own_side(gaps: Tensor, shape: Sequence[int]) -> int:
    """The largest side of blocks that the non-zeros fill to `FILLED` or more, 0 if there is none."""
    return next((side for side in gpu.BLOCKS if gpu.fill(gaps, shape, side) >= FILLED), 0)


def _ordered(x: Tensor, weight: gpu.Weight) -> Tensor:
    """x in the order of memory that its kernel reads in whole lines; BSR takes any, and channels_last is what it likes."""
    if weight.block:
        return x
    if x.shape[2:] != (1, 1):
        return x.contiguous()
    return x if len(x) < TRANSPOSED else x[:, :, 0, 0].t().contiguous().t()[:, :, None, None]
