"""Sparse convolution and linear layer as torch operators on the CPU; importing this module registers them.

    ticketkit::sparse_conv2d(x [N,C,H,W], values [n], gaps u16 [n], bias [M], residual? [N,M,OH,OW], weight_shape, ...) -> [N,M,OH,OW]
    ticketkit::sparse_linear(x [...,K],   values [n], gaps u16 [n], bias [M], weight_shape, ...)                        -> [...,M]

clip(op(x, W) + bias (+ residual), minimum, maximum), with W of `weight_shape` gap-coded (`ticketkit.formats.gaps`); everything but gaps is
float32. They work under torch.compile and in programs of torch.export, which need this import before `torch.export.load`:

    import torch, ticketkit.runtime.torch_op
    network = torch.export.load("network.pt2").module()

A weight is validated and packed for the native kernels when an image size first meets it, and stays packed as long as its tensor lives;
changing it in place packs it again. Work is shared by as many threads as `torch.get_num_threads()` says. The operators are for inference:
a backward pass through them is an error.

Raised by a call: FormatError for a weight that breaks its format; KernelError for other wrong arguments and where the native library is
missing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from math import prod
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ticketkit.errors import KernelError
from ticketkit.formats import Parts, matrix
from ticketkit.runtime import native

Key: TypeAlias = tuple[Any, ...]
SIZES = 8  # packed forms kept of one weight; of more image sizes the oldest goes
SHARED = 2_000_000  # multiply-adds; less is done before another thread has woken up

_WEIGHT = "Tensor values, Tensor gaps, Tensor bias"
_RUN = 'float? minimum=None, float? maximum=None, str format="csr"'


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "ticketkit::sparse_conv2d",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, {_WEIGHT}, Tensor? residual, int[] weight_shape, int[] stride=[1, 1], int[] padding=[0, 0, 0, 0],"
    f' int[] dilation=[1, 1], int groups=1, {_RUN}, str x_layout="planes", str y_layout="planes") -> Tensor',
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
) -> Tensor:
    """A 2-D convolution with a sparse weight.

    Args:
        x: [N, C, H, W].
        values, gaps: the weight [M, C / groups, kh, kw]; gaps uint16.
        bias: [M].
        residual: [N, M, OH, OW], added before clipping.
        padding: top, left, bottom, right; groups: 1, or C for a depthwise one.
        minimum, maximum: of the result; None for no bound.
        format: the form the kernels work on, "csr" or "bsr".
        x_layout, y_layout: order of the floats of x, and of residual and result (`ticketkit.lower.operators`).
    """
    _expect_window(x, weight_shape, stride, padding, dilation)
    out_channels, channels, *kernel = weight_shape
    geometry = (channels * groups, *x.shape[2:], out_channels, *kernel, *stride, *padding, *dilation, groups, x_layout, y_layout)

    def pack(parts: Parts) -> native.Layer:
        return native.conv2d(native.ConvShape(*geometry), parts, format=format)

    layer = _packed(values, gaps, weight_shape, (geometry, format), pack)
    return _run(layer, x, bias, residual, minimum, maximum, values.numel() * prod(layer.out_shape[1:]))


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "ticketkit::sparse_linear",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, {_WEIGHT}, int[] weight_shape, {_RUN}) -> Tensor",
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
) -> Tensor:
    """A fully connected layer with a sparse weight.

    Args:
        x: [..., K].
        values, gaps: the weight [M, K]; gaps uint16.
        bias: [M].
        minimum, maximum: of the result; None for no bound.
        format: the form the kernels work on, "csr", "bsr" or "bsr1x4".
    """
    _expect("weight_shape", weight_shape, 2)
    rows, cols = weight_shape
    if not x.dim() or x.shape[-1] != cols:
        raise KernelError(f"x: expected [..., {cols}] for a weight {list(weight_shape)}, got {list(x.shape)}")
    layer = _packed(values, gaps, weight_shape, (format,), lambda parts: native.gemm(rows, cols, parts, format=format))
    y = _run(layer, x.reshape(prod(x.shape[:-1]), cols), bias, None, minimum, maximum, values.numel())
    return y.reshape(*x.shape[:-1], rows)


@sparse_conv2d.register_fake  # type: ignore[untyped-decorator]
def _conv2d_shape(
    x: Tensor, values: Tensor, gaps: Tensor, bias: Tensor, residual: Tensor | None, weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0, 0, 0), dilation: Sequence[int] = (1, 1), *_: Any, **__: Any,
) -> Tensor:  # fmt: skip
    _expect_window(x, weight_shape, stride, padding, dilation)
    ends = zip(x.shape[2:], weight_shape[2:], stride, padding[:2], padding[2:], dilation, strict=True)
    size = [(n + before + after - step * (k - 1) - 1) // s + 1 for n, k, s, before, after, step in ends]
    return x.new_empty((x.shape[0], weight_shape[0], *size))


@sparse_linear.register_fake  # type: ignore[untyped-decorator]
def _linear_shape(x: Tensor, values: Tensor, gaps: Tensor, bias: Tensor, weight_shape: Sequence[int], *_: Any, **__: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_shape[0]))


def _no_backward(*_: Any) -> NoReturn:
    raise KernelError(
        "ticketkit's sparse operators have no backward pass: run them under torch.inference_mode(); train the network they are made from"
    )


for operator in (sparse_conv2d, sparse_linear):
    operator.register_autograd(_no_backward)


# Packed weights -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """What is packed of one weight, as long as the memory of its values and gaps lives."""

    memory: tuple[StorageWeakRef, ...]
    forms: dict[Key, native.Layer] = field(default_factory=dict)

    @property
    def gone(self) -> bool:
        return any(storage.expired() for storage in self.memory)


_weights: dict[Key, _Weight] = {}
_lock = threading.Lock()


def _packed(values: Tensor, gaps: Tensor, shape: Sequence[int], form: Key, pack: Callable[[Parts], native.Layer]) -> native.Layer:
    """The layer that `pack` makes of a weight, made once for each `form`.

    A storage whose weak reference is held keeps its address, so no other weight can be taken for one that is gone.
    """
    storages = [tensor.untyped_storage() for tensor in (values, gaps)]
    places = ((s._cdata, t.data_ptr(), t.numel(), _version(t)) for s, t in zip(storages, (values, gaps), strict=True))
    key = (*places, *shape)
    weight = _weights.get(key)
    layer = weight.forms.get(form) if weight else None
    if layer is not None:
        return layer
    with _lock:
        for old in [old for old, entry in _weights.items() if entry.gone]:
            del _weights[old]
        weight = _weights.setdefault(key, _Weight(tuple(map(StorageWeakRef, storages))))
        if form not in weight.forms:
            layer = pack(_csr(values, gaps, shape))
            while len(weight.forms) >= SIZES:
                del weight.forms[next(iter(weight.forms))]
            weight.forms[form] = layer
        return weight.forms[form]


def _csr(values: Tensor, gaps: Tensor, shape: Sequence[int]) -> Parts:
    rows, cols = matrix(tuple(shape))
    col_indices, row_ptr = native.gaps_decode(rows, cols, gaps.detach().contiguous().numpy())
    return {"values": _array("values", values), "col_indices": col_indices, "row_ptr": row_ptr}


def _version(tensor: Tensor) -> int:
    """Counts changes in place; tensors made in inference mode have no such count, and count as constant."""
    return 0 if tensor.is_inference() else tensor._version


def _expect_window(x: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    if x.dim() != 4:
        raise KernelError(f"x: expected [N, C, H, W], got {list(x.shape)}")
    counts = {"weight_shape": (weight_shape, 4), "stride": (stride, 2), "padding": (padding, 4), "dilation": (dilation, 2)}
    for name, (numbers, count) in counts.items():
        _expect(name, numbers, count)


def _expect(name: str, numbers: Sequence[int], count: int) -> None:
    if len(numbers) != count:
        raise KernelError(f"{name}: expected {count} numbers, got {list(numbers)}")


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
    """The threads of the pool, and whoever held the lock, are not in the child."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
