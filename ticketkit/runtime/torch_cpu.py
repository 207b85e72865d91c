"""The torch operators on processors: weights packed for the native kernels, work shared by threads, a dense backward pass."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ticketkit.errors import KernelError
from ticketkit.formats import Parts, matrix
from ticketkit.runtime import native
from ticketkit.runtime.geometry import ConvShape
from ticketkit.runtime.torch_cache import Cache, Key

SHARED = 2_000_000  # multiply-adds; less is done before another thread has woken up

layers: Cache[native.Layer] = Cache()


def conv2d(
    x: Tensor, values: Tensor, gaps: Tensor, bias: Tensor, residual: Tensor | None, weight_shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, minimum: float | None, maximum: float | None, format: str,
    x_layout: str, y_layout: str,
) -> Tensor:  # fmt: skip
    """`torch_op.sparse_conv2d`, its arguments counted."""
    out_channels, channels, *kernel = weight_shape
    geometry = (channels * groups, *x.shape[2:], out_channels, *kernel, *stride, *padding, *dilation, groups, x_layout, y_layout)

    def pack(parts: Parts) -> native.Layer:
        return native.conv2d(ConvShape(*geometry), parts, format=format)

    layer = _packed(values, gaps, weight_shape, (geometry, format), pack)
    return _run(layer, x, bias, residual, minimum, maximum, values.numel() * prod(layer.out_shape[1:]))


def linear(
    x: Tensor, values: Tensor, gaps: Tensor, bias: Tensor, weight_shape: Sequence[int], minimum: float | None, maximum: float | None,
    format: str,
) -> Tensor:  # fmt: skip
    """`torch_op.sparse_linear`, of rows [N, K] -> [N, M]."""
    rows, cols = weight_shape
    layer = _packed(values, gaps, weight_shape, (format,), lambda parts: native.gemm(rows, cols, parts, format=format))
    return _run(layer, x, bias, None, minimum, maximum, values.numel())


def gradients(
    gradient: Tensor, x: Tensor, values: Tensor, gaps: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, of_x: bool, of_values: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x and of the values, by torch's dense backward pass on the unpacked weight: there is no native one."""
    at = torch.from_numpy(gaps.detach().numpy().astype(np.int64)).cumsum(0)
    weight = x.new_zeros(prod(weight_shape)).index_copy_(0, at, values.detach().to(x.dtype)).reshape(*weight_shape)
    top, left, bottom, right = padding
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    of_padded, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient, padded, weight, None, list(stride), [0, 0], list(dilation), False, [0, 0], groups, [of_x, of_values, False]
    )
    of_input = of_padded[:, :, top : top + x.shape[2], left : left + x.shape[3]].contiguous() if of_x else None
    return of_input, of_weight.reshape(-1)[at] if of_values else None


def _packed(values: Tensor, gaps: Tensor, shape: Sequence[int], form: Key, pack: Callable[[Parts], native.Layer]) -> native.Layer:
    """The layer that `pack` makes of a weight, made once for each form."""

    def make() -> native.Layer:
        rows, cols = matrix(tuple(shape))
        col_indices, row_ptr = native.gaps_decode(rows, cols, gaps.detach().contiguous().numpy())
        return pack({"values": _array("values", values), "col_indices": col_indices, "row_ptr": row_ptr})

    return layers.get((values, gaps), (*shape, *form), make)


# Threads ------------------------------------------------------------------------------------------------------------------------

_pool: tuple[int, Executor] | None = None
_local = threading.local()


def _run(
    layer: native.Layer, x: Tensor, bias: Tensor, residual: Tensor | None, minimum: float | None, maximum: float | None, work: int
) -> Tensor:
    """Runs a layer on contiguous copies where there must be any; `work` is the multiply-adds of one image or row."""
    y = torch.empty((len(x), *layer.out_shape))
    low, high = -np.inf if minimum is None else minimum, np.inf if maximum is None else maximum
    added = None if residual is None else _array("residual", residual)
    run = layer.prepare(_array("x", x), _array("bias", bias), added, minimum=low, maximum=high, out=y.numpy())
    threads = min(torch.get_num_threads(), run.parts) if work * len(x) >= SHARED else 1
    size = layer.workspace_bytes
    if threads <= 1:
        run(0, run.parts, _workspace(size))
        return y
    edges = [run.parts * i // threads for i in range(threads + 1)]

    def work_on(begin: int, end: int) -> None:
        run(begin, end, _workspace(size))

    others = [_executor(threads).submit(work_on, *edges[i : i + 2]) for i in range(1, len(edges) - 1)]
    try:
        work_on(*edges[:2])
    finally:
        wait(others)
    for other in others:
        other.result()
    return y


def _array(name: str, tensor: Tensor) -> NDArray[np.float32]:
    """The tensor, or a copy in C order, as an array; numpy knows fewer types than torch, so that they are checked here."""
    if tensor.dtype != torch.float32:
        raise KernelError(f"{name}: expected float32, got {tensor.dtype}")
    array: NDArray[np.float32] = tensor.detach().contiguous().numpy()
    return array


def _workspace(count_bytes: int) -> NDArray[np.uint8]:
    """This thread's scratch memory, grown to that size."""
    kept: NDArray[np.uint8] | None = getattr(_local, "workspace", None)
    if kept is None or kept.nbytes < count_bytes:
        kept = _local.workspace = native.aligned(count_bytes)
    return kept


def _executor(threads: int) -> Executor:
    """A pool for all threads but the caller's. One that grew too small ends by itself when its work is done."""
    global _pool  # noqa: PLW0603
    pool = _pool
    if pool is None or pool[0] < threads:
        pool = _pool = threads, ThreadPoolExecutor(threads - 1, "ticketkit")
    return pool[1]


def _after_fork() -> None:
    """The threads of the pool are not in the child."""
    global _pool  # noqa: PLW0603
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
