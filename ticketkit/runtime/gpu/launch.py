"""Launches of the Triton kernels: which form, which strides, which configuration."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from ticketkit.errors import KernelError, first_line
from ticketkit.runtime.gpu.weight import Weight

BLOCKS = (128, 64, 32, 16)  # sides of blocks that the kernels take, best first
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OLDEST = (3, 3)  # Triton: the first with results of tuning kept on disk
CAPABILITY = (8, 0)  # of the GPU: the first whose matrix units Triton uses, and with bfloat16 and TF32
PIECES = 4  # of work for each multiprocessor, where the gradient of the values is cut by pixels
SHARE = 1024  # pixels of such a piece at least


@dataclass(frozen=True)
class Window:
    """How a convolution goes over its images: (vertical, horizontal) each; padding is top, left, bottom, right."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def size(self, image: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the result for an image of such; KernelError where the window does not fit."""
        top, left, bottom, right = self.padding
        ends = zip(image, kernel, self.stride, (top + bottom, left + right), self.dilation, strict=True)
        if min(self.stride) < 1 or min(self.dilation) < 1 or min(self.padding) < 0:
            raise KernelError(f"conv2d: expected positive strides and dilations and no negative padding, got {self}")
        height, width = ((n + pad - step * (k - 1) - 1) // s + 1 for n, k, s, pad, step in ends)
        if height < 1 or width < 1:
            raise KernelError(f"conv2d: expected a window that fits the image {list(image)}, got kernel {list(kernel)}, {self}")
        return height, width


def interpreted() -> bool:
    """Whether Triton interprets its kernels in this process (TRITON_INTERPRET=1 when Triton was imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require(device: torch.device | None = None) -> None:
    """KernelError, naming what is missing and what to do, where the kernels cannot run on that device; None: the one torch calls cuda."""
    device = device or torch.device("cuda")
    if find_spec("triton") is None:
        raise KernelError("GPU kernels need Triton, which is not installed; pip install 'ticketkit[gpu]'")
    _require_version()
    if interpreted():
        return
    if device.type != "cuda" or not torch.cuda.is_available():
        hint = "on processors TRITON_INTERPRET=1 runs them for tests"
        raise KernelError(f"GPU kernels: expected tensors on a CUDA device, got some on {device}; {hint}")
    _require_capability(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _require_version() -> None:
    import triton

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < OLDEST:
        raise KernelError(f"GPU kernels need Triton {'.'.join(map(str, OLDEST))} or newer, got {triton.__version__}; pip install -U triton")


@cache
def _require_capability(index: int) -> None:
    found = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and found < CAPABILITY:
        needed, got = (".".join(map(str, pair)) for pair in (CAPABILITY, found))
        raise KernelError(f"GPU kernels need compute capability {needed} or newer, got {got} ({torch.cuda.get_device_name(index)})")


def conv2d(
    x: Tensor, weight: Weight, stored: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, window: Window = Window(),
    minimum: float = -inf, maximum: float = inf, tf32: bool = False,
) -> Tensor:  # fmt: skip
    """clip(conv2d(x, W) + bias + residual, minimum, maximum).

    Args:
        x: [N, C, H, W], of one of TYPES, on the weight's device.
        weight, stored: the pattern, and `weight.store(values, x.dtype)`.
        bias: [M]; residual: [N, M, OH, OW]; in x's type.
        minimum, maximum: as float32 numbers, whatever x's type.
        tf32: whether the matrix units may round float32 operands to TF32; else blocks of float32 run on the ordinary units.

    Returns:
        [N, M, OH, OW], in x's type, channels_last where x is (or has one row of one pixel), else in planes.

    Raises:
        KernelError: a wrong shape, type or device; no usable GPU or Triton; the compiler refuses.
    """
    _check(x, weight, stored)
    out_channels, _, *kernel = weight.shape
    shape = (len(x), out_channels, *window.size(x.shape[2:], kernel))
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory(x))
    _expect("bias", bias, (out_channels,), x)
    _expect("residual", residual, shape, x)
    if residual is not None and residual.stride() != y.stride():
        residual = torch.empty_like(y).copy_(residual)
    bias = bias.contiguous() if bias is not None else None
    _multiply(x, weight, stored, bias, residual, y, window, (minimum, maximum), tf32, transposed=False)
    return y


def gradients(
    gradient: Tensor, x: Tensor, weight: Weight, stored: Tensor, window: Window = Window(), of_x: bool = True, of_values: bool = True,
    tf32: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x, and of the n kept values, from that of conv2d(x, W).

    Args:
        gradient: [N, M, OH, OW], in x's type.
        x, weight, stored, window, tf32: of the forward pass.

    Returns:
        [N, C, H, W] in x's type and memory order, and [n] in float32 (float64 for float64); None for what is not asked for.

    Raises:
        KernelError: as `conv2d`.
    """
    _check(x, weight, stored)
    out_channels, _, *kernel = weight.shape
    shape = (len(x), out_channels, *window.size(x.shape[2:], kernel))
    _expect("gradient", gradient, shape, x)
    of_input = torch.empty_like(x) if of_x else None
    if of_input is not None:
        _multiply(gradient, weight, stored, None, None, of_input, window, (-inf, inf), tf32, transposed=True)
    return of_input, weight.gather(_of_values(gradient, x, weight, window, tf32)) if of_values else None


def _check(x: Tensor, weight: Weight, stored: Tensor) -> None:
    require(x.device)
    if x.dtype not in TYPES:
        raise KernelError(f"x: expected one of {', '.join(map(str, TYPES))}, got {x.dtype}")
    if x.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise KernelError(f"x: expected [N, {weight.shape[1]}, H, W] for a weight {list(weight.shape)}, got {list(x.shape)}")
    _expect("values", stored, (weight.size,), x)
    if weight.block is not None and weight.block not in BLOCKS:
        raise KernelError(f"block: expected one of {', '.join(map(str, BLOCKS))}, got {weight.block}")


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor is None or (tuple(tensor.shape) == shape and tensor.dtype == x.dtype and tensor.device == x.device):
        return
    got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    raise KernelError(f"{name}: expected {x.dtype} {list(shape)} on {x.device}, got {got}")


def _memory(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _multiply(
    x: Tensor, weight: Weight, stored: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor, window: Window,
    clip: tuple[float, float], tf32: bool, transposed: bool,
) -> None:  # fmt: skip
    """y from x by the weight, or by the transposed one."""
    if not y.numel():
        return
    rows = weight.transposed if transposed else weight.rows
    pixels, out_channels = len(y) * prod(y.shape[2:]), y.shape[1]
    arguments = {
        "x": x, "values": stored, "columns": rows.columns, "row_ptr": rows.row_ptr, "order": rows.order,
        "block_at" if weight.block else "value_at": rows.at,
        "bias": y if bias is None else bias, "residual": y if residual is None else residual, "y": y,  # y where nothing is read
        "pixels": pixels, "out_h": y.shape[2], "out_w": y.shape[3], "out_channels": out_channels,
        "in_h": x.shape[2], "in_w": x.shape[3], "in_channels": x.shape[1],
        **_strides("x", x), **_strides("y", y), **_window(weight, window, x, y),
        "minimum": clip[0], "maximum": clip[1], "bucket": _bucket(pixels, len(rows.columns) // len(rows.order)),
        "TRANSPOSED": transposed, "BIAS": bias is not None, "RESIDUAL": residual is not None, "CLIP": clip != (-inf, inf),
    }  # fmt: skip
    if weight.block:
        arguments |= {"BLOCK_M": weight.block, "BLOCK_K": weight.block, "PRECISION": _precision(x, tf32)}
        _launch("conv2d_bsr", x, arguments, lambda c: (-(-pixels // c["BLOCK_P"]) * -(-out_channels // weight.block),))
    else:
        _launch("conv2d_csr", x, arguments, lambda c: (-(-pixels // c["BLOCK_P"]) * -(-out_channels // c["BLOCK_M"]),))


def _of_values(gradient: Tensor, x: Tensor, weight: Weight, window: Window, tf32: bool) -> Tensor:
    """The gradient of the values, in the kernels' order."""
    total = torch.float64 if x.dtype == torch.float64 else torch.float32
    pixels = len(gradient) * prod(gradient.shape[2:])
    wanted = PIECES * _multiprocessors(x.device) // max(weight.entries if weight.block else weight.entries // 16, 1)
    pieces = max(1, min(wanted, pixels // SHARE))
    share = -(-pixels // pieces)
    size = weight.block**2 if weight.block else 1
    result = torch.zeros((pieces, weight.entries * size), dtype=total, device=x.device)
    arguments = {
        "x": x, "gradient": gradient, "columns": weight.rows.columns, "block_rows" if weight.block else "rows": weight.entry_rows,
        "result": result, "pixels": pixels, "share": share, "blocks" if weight.block else "nnz": weight.entries,
        "out_h": gradient.shape[2], "out_w": gradient.shape[3], "in_h": x.shape[2], "in_w": x.shape[3],
        **_strides("x", x), **_strides("y", gradient), **_window(weight, window, x, gradient), "bucket": _bucket(share, weight.entries),
    }  # fmt: skip
    if pixels and weight.block:
        arguments |= {"out_channels": gradient.shape[1], "in_channels": x.shape[1], "BLOCK_M": weight.block, "BLOCK_K": weight.block}
        _launch("conv2d_bsr_values", x, arguments | {"PRECISION": _precision(x, tf32)}, lambda _: (weight.entries, pieces))
    elif pixels:
        _launch("conv2d_csr_values", x, arguments, lambda c: (-(-weight.entries // c["BLOCK_E"]), pieces))
    return result.sum(0)


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip("nchw", tensor.stride(), strict=True)}


def _window(weight: Weight, window: Window, x: Tensor, y: Tensor) -> dict[str, int | bool]:
    kernel = weight.shape[2:]
    pointwise = kernel == (1, 1) and window.stride == (1, 1) and x.shape[2:] == y.shape[2:] and not any(window.padding)
    return {
        "stride_h": window.stride[0], "stride_w": window.stride[1], "pad_top": window.padding[0], "pad_left": window.padding[1],
        "dilation_h": window.dilation[0], "dilation_w": window.dilation[1], "KERNEL_W": kernel[1], "POINTWISE": pointwise,
    }  # fmt: skip


def _precision(x: Tensor, tf32: bool) -> str:
    return "tf32" if x.dtype == torch.float32 and tf32 else "ieee"


def _bucket(pixels: int, entries: int) -> int:
    """Powers of two of both: layers of one bucket share their configuration."""
    return 64 * pixels.bit_length() + entries.bit_length()


@cache
def _multiprocessors(device: torch.device) -> int:
    return 1 if device.type != "cuda" else int(torch.cuda.get_device_properties(device).multi_processor_count)


# Configurations -----------------------------------------------------------------------------------------------------------------

# kernel -> what its configurations vary
SPACE: dict[str, list[dict[str, int]]] = {
    "conv2d_bsr": [
        {"BLOCK_P": pixels, "num_warps": warps, "num_stages": stages}
        for pixels, warps, stages in ((64, 4, 3), (128, 4, 3), (128, 8, 3), (128, 4, 5), (256, 8, 3), (32, 2, 4), (64, 2, 5), (16, 1, 4))
    ],
    "conv2d_csr": [
        {"BLOCK_P": pixels, "BLOCK_M": rows, "num_warps": warps}
        for pixels, rows, warps in ((128, 4, 4), (128, 1, 2), (128, 8, 4), (256, 4, 4), (256, 8, 8), (64, 16, 4), (32, 16, 4), (16, 32, 4))
    ],
    "conv2d_bsr_values": [
        {"BLOCK_P": pixels, "num_warps": warps, "num_stages": stages}
        for pixels, warps, stages in ((64, 4, 3), (32, 4, 4), (128, 8, 3), (32, 2, 4))
    ],
    "conv2d_csr_values": [
        {"BLOCK_P": pixels, "BLOCK_E": entries, "num_warps": warps}
        for pixels, entries, warps in ((128, 16, 4), (256, 8, 4), (128, 32, 8), (64, 16, 2))
    ],
}  # fmt: skip
INTERPRETED: dict[str, dict[str, int]] = {  # large: the interpreter takes its time for an operation, hardly more for a large tile
    "conv2d_bsr": {"BLOCK_P": 256},
    "conv2d_csr": {"BLOCK_P": 256, "BLOCK_M": 32},
    "conv2d_bsr_values": {"BLOCK_P": 256},
    "conv2d_csr_values": {"BLOCK_P": 256, "BLOCK_E": 256},
}
# what decides which configuration is fastest; beside them the types of the tensors
KEYS = {
    "conv2d_bsr": ["bucket", "out_channels", "in_channels", "KERNEL_W", "POINTWISE", "TRANSPOSED", "x_c", "BLOCK_M", "PRECISION", "GPU"],
    "conv2d_csr": ["bucket", "out_channels", "in_channels", "KERNEL_W", "POINTWISE", "TRANSPOSED", "x_c", "GPU"],
    "conv2d_bsr_values": ["bucket", "out_channels", "in_channels", "KERNEL_W", "POINTWISE", "x_c", "BLOCK_M", "PRECISION", "GPU"],
    "conv2d_csr_values": ["bucket", "KERNEL_W", "POINTWISE", "x_c", "GPU"],
}


def _launch(name: str, x: Tensor, arguments: dict[str, Any], grid: Callable[[dict[str, int]], tuple[int, ...]]) -> None:
    """Runs a kernel, on a GPU with the fastest configuration for its arguments: tried at the first such call, then kept on disk.

    Triton's own cache holds them (TRITON_CACHE_DIR, else ~/.triton/cache), by kernel, version of Triton, name of the GPU,
    arguments (`KEYS`), and numbers of pixels and of entries to the power of two.
    """
    import triton.language as tl

    arguments = {**arguments, "SUM": tl.float64 if x.dtype == torch.float64 else tl.float32}
    if "PRECISION" in arguments:  # the interpreter multiplies the bits of bfloat16; every product of two is a float32
        exact = interpreted() and x.dtype == torch.bfloat16
        arguments["FACTOR"] = tl.float32 if exact else getattr(tl, str(x.dtype).removeprefix("torch."))
    if interpreted():
        _kernel(name)[grid(INTERPRETED[name])](**arguments, **INTERPRETED[name], GPU="interpreter")
        return
    with torch.cuda.device(x.device), _told(name):
        tuned(name)[grid](**arguments, GPU=torch.cuda.get_device_name(x.device))


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What the compiler raises as one line."""
    try:
        yield
    except KernelError:
        raise
    except Exception as error:  # Triton's compiler, ptxas and the driver have no common base
        if isinstance(error, torch.OutOfMemoryError):
            raise
        what = f"{type(error).__name__}: {first_line(error)}"
        raise KernelError(f"{name}: expected Triton to compile and run the kernel, got {what}") from error


@cache
def _kernel(name: str) -> Any:
    module = import_module(f"ticketkit.runtime.triton.{'bsr' if 'bsr' in name else 'csr'}")
    return getattr(module, name)


@cache
def tuned(name: str) -> Any:
    """The kernel of that name that tunes itself, telling on a terminal what it tries."""
    import triton

    tiles = [{key: value for key, value in one.items() if key.isupper()} for one in SPACE[name]]
    others = [{key: value for key, value in one.items() if not key.isupper()} for one in SPACE[name]]
    configurations = [triton.Config(tile, **other) for tile, other in zip(tiles, others, strict=True)]
    tried = 0

    def measure(call: Callable[[], None], quantiles: Sequence[float]) -> Any:
        """Milliseconds of a call at these quantiles, with a line on a terminal: the first call of a configuration compiles it."""
        nonlocal tried
        tried += 1
        if sys.stderr.isatty():
            which = (tried - 1) % len(configurations) + 1
            line = f"\rticketkit: tuning {name} for this layer and GPU, {which} of {len(configurations)}"
            print(line, end="", file=sys.stderr, flush=True)
        times = triton.testing.do_bench(call, warmup=10, rep=40, quantiles=quantiles)
        if sys.stderr.isatty() and tried % len(configurations) == 0:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        return times

    return triton.autotune(configurations, KEYS[name], cache_results=True, do_bench=measure)(_kernel(name))
