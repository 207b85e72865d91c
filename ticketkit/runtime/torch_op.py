"""Sparse convolution and linear layer as torch operators; importing this module registers them.

    ticketkit::sparse_conv2d(x [N,C,H,W], values [n], gaps u16 [n], bias [M], residual? [N,M,OH,OW], weight_shape, ...) -> [N,M,OH,OW]
    ticketkit::sparse_linear(x [...,K],   values [n], gaps u16 [n], bias [M], weight_shape, ...)                        -> [...,M]

clip(op(x, W) + bias (+ residual), minimum, maximum), with W of `weight_shape` gap-coded (`ticketkit.formats.gaps`). On a processor the
native kernels run (`torch_cpu`; all float32), on a GPU the Triton kernels (`torch_gpu`; x float32, float16, bfloat16 or float64, values and
bias converted to its type). They work under torch.compile and in programs of torch.export, which need this import before
`torch.export.load`:

    import torch, ticketkit.runtime.torch_op
    network = torch.export.load("network.pt2").module()

A weight is validated and packed when a call first meets it (on processors: for each image size), and stays packed until the first packing
after its tensors are gone; changing them in place packs it again, but through `.data` or in inference mode, where torch does not count
changes: `forget()` then. On processors work is shared by as many threads as `torch.get_num_threads()` says. Float32 products on GPUs are in
TF32 where torch's own convolutions (`torch.backends.cudnn`) or products (`torch.backends.cuda.matmul`) may be.

x, values, bias and residual have gradients; those of bounded results are zero where a bound holds. On GPUs they cost what the non-zeros
do. On processors the backward pass multiplies zeros: it is torch's own on the dense weight.

Raised by a call: FormatError for a weight that breaks its format; KernelError for other wrong arguments, and where the native library,
Triton or a GPU that it can use is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ticketkit.errors import KernelError
from ticketkit.runtime import torch_cpu, torch_gpu

# Packing at the first call is nothing that a CUDA graph can hold
_TAGS = tuple(tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None)) is not None)
_WEIGHT = "Tensor values, Tensor gaps, Tensor bias"
_WINDOW = "int[] stride=[1, 1], int[] padding=[0, 0, 0, 0], int[] dilation=[1, 1], int groups=1"
_RUN = 'float? minimum=None, float? maximum=None, str format="csr"'


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "ticketkit::sparse_conv2d",
    mutates_args=(),
    device_types="cpu",
    tags=_TAGS,
    schema=f"(Tensor x, {_WEIGHT}, Tensor? residual, int[] weight_shape, {_WINDOW}, {_RUN},"
    ' str x_layout="planes", str y_layout="planes", int block=0) -> Tensor',
)
def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    gaps: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    minimum: float | None = None,
    maximum: float | None = None,
    format: str = "csr",
    x_layout: str = "planes",
    y_layout: str = "planes",
    block: int = 0,
) -> Tensor:
    """A 2-D convolution with a sparse weight.

    Args:
        x: [N, C, H, W].
        values, gaps: the weight [M, C / groups, kh, kw]; gaps uint16.
        bias: [M].
        residual: [N, M, OH, OW], added before clipping.
        padding: top, left, bottom, right; groups: 1, or C for a depthwise one (processors only).
        minimum, maximum: of the result; None for no bound.
        format: the form the kernels work on, "csr" or "bsr".
        x_layout, y_layout: order of the floats of x, and of residual and result (`ticketkit.lower.operators`); "planes" on GPUs.
        block: GPUs, bsr: side of the blocks, outputs x input channels of a tap: 16, 32, 64 or 128; 0: the largest that is full.
    """
    _expect_window(x, weight_shape, stride, padding, dilation)
    window = stride, padding, dilation, groups
    return torch_cpu.conv2d(x, values, gaps, bias, residual, weight_shape, *window, minimum, maximum, format, x_layout, y_layout)


@sparse_conv2d.register_kernel("cuda")  # type: ignore[untyped-decorator]
def _conv2d_on_gpu(
    x: Tensor, values: Tensor, gaps: Tensor, bias: Tensor, residual: Tensor | None, weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0, 0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1,
    minimum: float | None = None, maximum: float | None = None, format: str = "csr", x_layout: str = "planes", y_layout: str = "planes",
    block: int = 0,
) -> Tensor:  # fmt: skip
    _expect_window(x, weight_shape, stride, padding, dilation)
    window = stride, padding, dilation, groups
    y = torch_gpu.conv2d(x, values, gaps, bias, residual, weight_shape, *window, minimum, maximum, format, x_layout, y_layout, block)
    return y.contiguous(memory_format=_memory_format(x))


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "ticketkit::sparse_linear",
    mutates_args=(),
    device_types="cpu",
    tags=_TAGS,
    schema=f"(Tensor x, {_WEIGHT}, int[] weight_shape, {_RUN}, int block=0) -> Tensor",
)
def sparse_linear(
    x: Tensor,
    values: Tensor,
    gaps: Tensor,
    bias: Tensor,
    weight_shape: Sequence[int],
    minimum: float | None = None,
    maximum: float | None = None,
    format: str = "csr",
    block: int = 0,
) -> Tensor:
    """A fully connected layer with a sparse weight.

    Args:
        x: [..., K].
        values, gaps: the weight [M, K]; gaps uint16.
        bias: [M].
        minimum, maximum: of the result; None for no bound.
        format: the form the kernels work on, "csr" or "bsr", on processors also "bsr1x4".
        block: as in `sparse_conv2d`, outputs x inputs.
    """
    rows = _rows(x, weight_shape)
    return torch_cpu.linear(rows, values, gaps, bias, weight_shape, minimum, maximum, format).reshape(*x.shape[:-1], weight_shape[0])


@sparse_linear.register_kernel("cuda")  # type: ignore[untyped-decorator]
def _linear_on_gpu(
    x: Tensor, values: Tensor, gaps: Tensor, bias: Tensor, weight_shape: Sequence[int], minimum: float | None = None,
    maximum: float | None = None, format: str = "csr", block: int = 0,
) -> Tensor:  # fmt: skip
    y = torch_gpu.linear(_rows(x, weight_shape), values, gaps, bias, weight_shape, minimum, maximum, format, block)
    return y.contiguous().reshape(*x.shape[:-1], weight_shape[0])


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "ticketkit::sparse_conv2d_backward",
    mutates_args=(),
    device_types="cpu",
    tags=_TAGS,
    schema="(Tensor gradient, Tensor x, Tensor values, Tensor gaps, int[] weight_shape, int[] stride,"
    " int[] padding, int[] dilation, int groups, str format, int block, bool of_x, bool of_values) -> (Tensor, Tensor)",
)
def sparse_conv2d_backward(
    gradient: Tensor, x: Tensor, values: Tensor, gaps: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, format: str, block: int, of_x: bool, of_values: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x [N, C, H, W] and of values [n] from that of conv2d(x, W) [N, M, OH, OW]; empty where they are not asked for."""
    window = stride, padding, dilation, groups
    found = torch_cpu.gradients(gradient, x, values, gaps, weight_shape, *window, of_x, of_values)
    return _as_promised(found, x, values)


@sparse_conv2d_backward.register_kernel("cuda")  # type: ignore[untyped-decorator]
def _backward_on_gpu(
    gradient: Tensor, x: Tensor, values: Tensor, gaps: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, format: str, block: int, of_x: bool, of_values: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    window = stride, padding, dilation, groups
    found = torch_gpu.gradients(gradient, x, values, gaps, weight_shape, *window, format, block, of_x, of_values)
    return _as_promised(found, x, values)


def _as_promised(found: tuple[Tensor | None, Tensor | None], x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients as the fake kernel has them: of the type of what they are of, in planes, empty for None."""
    of_x, of_values = found
    return x.new_empty(0) if of_x is None else of_x.contiguous(), values.new_empty(0) if of_values is None else of_values.to(values.dtype)


def forget() -> None:
    """Drops every packed weight; the next calls pack anew."""
    for cache in (torch_cpu.layers, torch_gpu.patterns, torch_gpu.stores, torch_gpu.sides):
        cache.clear()


# Shapes ---------------------------------------------------------------------------------------------------------------------------


@sparse_conv2d.register_fake  # type: ignore[untyped-decorator]
def _conv2d_shape(
    x: Tensor, values: Tensor, gaps: Tensor, bias: Tensor, residual: Tensor | None, weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0, 0, 0), dilation: Sequence[int] = (1, 1), *_: Any, **__: Any,
) -> Tensor:  # fmt: skip
    _expect_window(x, weight_shape, stride, padding, dilation)
    ends = zip(x.shape[2:], weight_shape[2:], stride, padding[:2], padding[2:], dilation, strict=True)
    size = [(n + before + after - step * (k - 1) - 1) // s + 1 for n, k, s, before, after, step in ends]
    shape = (x.shape[0], weight_shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


@sparse_linear.register_fake  # type: ignore[untyped-decorator]
def _linear_shape(x: Tensor, values: Tensor, gaps: Tensor, bias: Tensor, weight_shape: Sequence[int], *_: Any, **__: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_shape[0]))


@sparse_conv2d_backward.register_fake  # type: ignore[untyped-decorator]
def _backward_shape(gradient: Tensor, x: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    of_x, of_values = rest[-2:]
    return x.new_empty(x.shape if of_x else (0,)), values.new_empty(values.shape if of_values else (0,))


def _memory_format(x: Tensor) -> torch.memory_format:
    """Of the result: on GPUs that of x, on processors planes."""
    last = x.device.type == "cuda" and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _rows(x: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """x [..., K] as [N, K]."""
    _expect("weight_shape", weight_shape, 2)
    cols = weight_shape[1]
    if not x.dim() or x.shape[-1] != cols:
        raise KernelError(f"x: expected [..., {cols}] for a weight {list(weight_shape)}, got {list(x.shape)}")
    return x.reshape(prod(x.shape[:-1]), cols)


def _expect_window(x: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    if x.dim() != 4:
        raise KernelError(f"x: expected [N, C, H, W], got {list(x.shape)}")
    counts = {"weight_shape": (weight_shape, 4), "stride": (stride, 2), "padding": (padding, 4), "dilation": (dilation, 2)}
    for name, (numbers, count) in counts.items():
        _expect(name, numbers, count)


def _expect(name: str, numbers: Sequence[int], count: int) -> None:
    if len(numbers) != count:
        raise KernelError(f"{name}: expected {count} numbers, got {list(numbers)}")


# Gradients ------------------------------------------------------------------------------------------------------------------------


def _keep_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, gaps, bias, residual, shape, *window, minimum, maximum, format, x_layout, y_layout, block = inputs
    if {x_layout, y_layout} != {"planes"} and any(ctx.needs_input_grad):
        raise KernelError(f"layouts: expected 'planes' where gradients are needed, got {x_layout!r} and {y_layout!r}")
    bounds = minimum, maximum
    ctx.save_for_backward(x, values, gaps, output if bounds != (None, None) else None)
    ctx.bounds, ctx.shape, ctx.window, ctx.form = bounds, shape, window, (format, block)
    ctx.types = bias.dtype, None if residual is None else residual.dtype


def _conv2d_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, values, gaps, output = ctx.saved_tensors
    free = _unbounded(gradient, output, *ctx.bounds)
    of_x, of_values = _of_both(ctx, free, x, values, gaps, ctx.shape, ctx.window)
    bias_type, residual_type = ctx.types
    of_bias = free.sum((0, 2, 3), dtype=bias_type) if ctx.needs_input_grad[3] else None
    of_residual = free.to(residual_type) if ctx.needs_input_grad[4] else None
    return of_x, of_values, None, of_bias, of_residual, *[None] * 11


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, gaps, bias, shape, minimum, maximum, format, block = inputs
    bounds = minimum, maximum
    ctx.save_for_backward(x, values, gaps, output if bounds != (None, None) else None)
    ctx.bounds, ctx.shape, ctx.form, ctx.bias_type = bounds, shape, (format, block), bias.dtype


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, values, gaps, output = ctx.saved_tensors
    rows, cols = ctx.shape
    free = _unbounded(gradient, output, *ctx.bounds).reshape(-1, rows)
    window = [1, 1], [0, 0, 0, 0], [1, 1], 1
    images = x.reshape(-1, cols)[:, :, None, None]
    of_x, of_values = _of_both(ctx, free[:, :, None, None], images, values, gaps, [rows, cols, 1, 1], window)
    of_bias = free.sum(0, dtype=ctx.bias_type) if ctx.needs_input_grad[3] else None
    return None if of_x is None else of_x.reshape(x.shape), of_values, None, of_bias, *[None] * 5


def _of_both(
    ctx: Any, gradient: Tensor, x: Tensor, values: Tensor, gaps: Tensor, shape: Sequence[int], window: Sequence[Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and values, None where they are not needed."""
    needs = tuple(ctx.needs_input_grad[:2])
    if not any(needs):
        return None, None
    found = sparse_conv2d_backward(gradient.contiguous(), x, values, gaps, shape, *window, *ctx.form, *needs)
    of_x, of_values = (gradient if needed else None for gradient, needed in zip(found, needs, strict=True))
    return of_x, of_values


def _unbounded(gradient: Tensor, output: Tensor | None, minimum: float | None, maximum: float | None) -> Tensor:
    """The gradient of the sum before clipping."""
    if output is None:
        return gradient
    held = torch.zeros_like(output, dtype=torch.bool)
    if minimum is not None:
        held = held | (output <= minimum)
    if maximum is not None:
        held = held | (output >= maximum)
    return gradient.masked_fill(held, 0.0)


sparse_conv2d.register_autograd(_conv2d_backward, setup_context=_keep_conv2d)
sparse_linear.register_autograd(_linear_backward, setup_context=_keep_linear)
