"""The Triton kernels: right by the oracle on every form, type and ugly size, forward and backward.

Without a GPU Triton interprets them, which it decides when it is imported: `test_under_the_interpreter` runs this file in a process of
its own for that. With one they run there.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from itertools import product
from math import inf
from typing import Any

import numpy as np
import oracle
import pytest
from graphs import Array, normal, pruned

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from torch import Tensor  # noqa: E402

from ticketkit.errors import FormatError, KernelError  # noqa: E402
from ticketkit.formats import gaps as gap_coding  # noqa: E402
from ticketkit.runtime import gpu, torch_gpu  # noqa: E402
from ticketkit.runtime.gpu import Weight, Window, launch  # noqa: E402

INTERPRETED = gpu.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no GPU: test_under_the_interpreter runs these")
plain = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no compiler")
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float64: 2.0**-52}
FORMS = (None, 16, 32)  # CSR, and sides of blocks

# weight, image, window
WINDOWS: dict[str, tuple[tuple[int, ...], tuple[int, int], Window]] = {
    "pointwise": ((40, 33, 1, 1), (5, 7), Window()),
    "matrix": ((17, 50), (1, 1), Window()),
    "same": ((20, 18, 3, 3), (9, 7), Window(padding=(1, 1, 1, 1))),
    "stride": ((16, 16, 3, 3), (8, 9), Window((2, 2), (1, 1, 1, 1))),
    "ugly": ((9, 5, 3, 2), (10, 11), Window((2, 1), (1, 0, 2, 1), (1, 2))),
    "stride of one": ((35, 20, 1, 1), (7, 5), Window((2, 2))),
    "one pixel": ((3, 4, 3, 3), (3, 3), Window()),
}


def coded(weight: Array, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Values, rounded to the type, and gaps."""
    parts = gap_coding.pack(weight)
    return torch.from_numpy(parts["values"]).to(DEVICE, dtype), torch.from_numpy(parts["gaps"]).to(DEVICE)


def image(name: str, dtype: torch.dtype, last: bool, batch: int = 2) -> Tensor:
    shape, size, _ = WINDOWS[name]
    x = torch.from_numpy(normal(batch, shape[1], *size, seed=1)).to(DEVICE, dtype)
    return x.to(memory_format=torch.channels_last) if last else x


def exact(x: Tensor, weight: Array, window: Window, dtype: torch.dtype, **more: Any) -> Array:
    """The oracle's result, on operands rounded to the type."""
    rounded = torch.from_numpy(weight).to(dtype).double().numpy().reshape(*weight.shape, *[1] * (4 - weight.ndim))
    options: dict[str, Any] = {"strides": window.stride, "pads": window.padding, "dilations": window.dilation}
    return oracle.conv2d(x.double().cpu().numpy(), rounded, **options, **more)


def bound(x: Tensor, weight: Array, y: Array, *terms: Array) -> float:
    """What float32 sums owe (`oracle.tolerance`), and rounding of the result to its type."""
    return oracle.tolerance(weight, x.double().cpu().numpy().astype(np.float32), *terms) + EPS[x.dtype] * float(np.abs(y).max(initial=0))


def test_under_the_interpreter() -> None:
    """Everything below, where there is no GPU."""
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("these tests run as they are")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib", "-n0", __file__]
    if "xdist" not in sys.modules:
        words.remove("-n0")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


# Forward --------------------------------------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", WINDOWS)
def test_conv2d_is_the_oracle(name: str, form: int | None) -> None:
    shape, _, window = WINDOWS[name]
    weight, bias = pruned(shape, 0.7), normal(shape[0], seed=2)
    for dtype, last in ((torch.float32, True), (torch.float32, False), (torch.float16, True), (torch.bfloat16, True)):
        x = image(name, dtype, last)
        values, steps = coded(weight, dtype)
        pattern = Weight.of(steps, shape, form)
        rounded = torch.from_numpy(bias).to(DEVICE, dtype)
        y = gpu.conv2d(x, pattern, pattern.store(values, dtype), rounded, window=window)
        expected = exact(x, weight, window, dtype, bias=rounded.double().cpu().numpy())
        assert y.dtype == dtype and y.shape == expected.shape
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        allowed = bound(x, weight, expected, bias)
        assert np.abs(y.double().cpu().numpy() - expected).max() <= allowed
        wrong = exact(x, pruned(shape, 0.7, seed=9), window, dtype, bias=bias)  # negative control
        assert np.abs(wrong - expected).max() > allowed


@runs
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_residual_and_bounds(form: int | None) -> None:
    shape, _, window = WINDOWS["same"]
    weight, x = pruned(shape, 0.8), image("same", torch.float32, True)
    residual = torch.from_numpy(normal(2, shape[0], 9, 7, seed=3)).to(DEVICE)
    values, steps = coded(weight)
    pattern = Weight.of(steps, shape, form)
    for low, high in ((-inf, inf), (0.0, inf), (-0.25, 0.5)):
        y = gpu.conv2d(x, pattern, pattern.store(values, x.dtype), None, residual, window, low, high)
        expected = exact(x, weight, window, x.dtype, residual=residual.cpu().numpy(), clip=(low, high))
        assert np.abs(y.cpu().numpy() - expected).max() <= bound(x, weight, expected, residual.cpu().numpy())
    x[0, 0, 4, 4] = torch.nan
    y = gpu.conv2d(x, pattern, pattern.store(values, x.dtype), None, residual, window, 0.0, 1.0)
    assert torch.isnan(y[0]).any() and not torch.isnan(y[1]).any()


@runs
@pytest.mark.parametrize("form", [None, 16], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_small_tiles_change_nothing_but_rounding(kernel: int, form: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that end within an image, within the rows and within the pixels of a piece."""
    shape, window = (18, 3, kernel, kernel), Window(padding=(kernel // 2,) * 4)
    weight, x = pruned(shape, 0.6), torch.from_numpy(normal(2, 3, 5, 4, seed=1)).to(DEVICE)
    values, steps = coded(weight)
    pattern = Weight.of(steps, shape, form)
    stored = pattern.store(values, x.dtype)
    gradient = torch.from_numpy(normal(2, 18, 5, 4, seed=5)).to(DEVICE)
    wide = [gpu.conv2d(x, pattern, stored, window=window), *gpu.gradients(gradient, x, pattern, stored, window)]
    tiles = {"BLOCK_P": 16, "BLOCK_M": 4, "BLOCK_E": 16}
    small = {name: {key: tiles[key] for key in tile} for name, tile in launch.INTERPRETED.items()}
    monkeypatch.setattr(launch, "INTERPRETED", small)
    monkeypatch.setattr(launch, "SHARE", 19)
    monkeypatch.setattr(launch, "_multiprocessors", lambda _: 100)
    narrow = [gpu.conv2d(x, pattern, stored, window=window), *gpu.gradients(gradient, x, pattern, stored, window)]
    for a, b in zip(wide, narrow, strict=True):
        assert a is not None and b is not None
        assert (a - b).abs().max() <= 1e-5 * a.abs().max() < (a - b.flip(0)).abs().max()


@runs
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_degenerate_weights_and_batches(form: int | None) -> None:
    shape = (33, 20, 3, 3)
    window = Window(padding=(1, 1, 1, 1))
    x = torch.from_numpy(normal(1, 20, 4, 4)).to(DEVICE)
    one = np.zeros(shape, np.float32)
    one[32, 19, 2, 2] = 2.0
    for weight in (np.zeros(shape, np.float32), one):
        values, steps = coded(weight)
        pattern = Weight.of(steps, shape, form)
        y = gpu.conv2d(x, pattern, pattern.store(values, x.dtype), window=window)
        np.testing.assert_allclose(y.cpu().numpy(), exact(x, weight, window, x.dtype), atol=1e-6)
        none = gpu.conv2d(x[:0], pattern, pattern.store(values, x.dtype), window=window)
        assert none.shape == (0, 33, 4, 4)
        of_x, of_values = gpu.gradients(none, x[:0], pattern, pattern.store(values, x.dtype), window)
        assert of_x is not None and of_x.shape == (0, 20, 4, 4)
        assert of_values is not None and not of_values.any()


@runs
def test_strided_inputs_and_equal_bits() -> None:
    shape, _, window = WINDOWS["same"]
    x = image("same", torch.float32, False)
    values, steps = coded(pruned(shape, 0.7))
    for form in (None, 32):
        pattern = Weight.of(steps, shape, form)
        stored = pattern.store(values, x.dtype)
        expected = gpu.conv2d(x, pattern, stored, window=window)
        turned = x.transpose(2, 3).contiguous().transpose(2, 3)
        for same in (x, x.to(memory_format=torch.channels_last), torch.cat([x, x], 1)[:, :18], turned):
            assert torch.equal(gpu.conv2d(same, pattern, stored, window=window), expected)


# Backward -------------------------------------------------------------------------------------------------------------------------


class Layer(torch.autograd.Function):
    """conv2d and its gradients as the operators of `torch_op` put them together, on whichever device the kernels run here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, pattern: Weight, window: Window) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.rest = pattern, window
        return gpu.conv2d(x, pattern, pattern.store(values, x.dtype), window=window)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        pattern, window = ctx.rest
        of_x, of_values = gpu.gradients(gradient.contiguous(), x, pattern, pattern.store(values, x.dtype), window)
        return of_x, of_values, None, None


@runs
@pytest.mark.parametrize("form", [None, 16], ids=str)
@pytest.mark.parametrize("name", ["ugly", "one pixel", "matrix"])
def test_gradcheck(name: str, form: int | None) -> None:
    """Against differences of the function itself, in float64."""
    shape, _, window = WINDOWS[name]
    shape = (3, 4, *shape[2:])
    values, steps = coded(pruned(shape, 0.6), torch.float64)
    x = torch.from_numpy(normal(1, 4, *((5, 4) if name == "ugly" else WINDOWS[name][1]))).to(DEVICE, torch.float64)
    pattern = Weight.of(steps, shape, form)
    leaves = x.requires_grad_(), values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: Layer.apply(x, v, pattern, window), leaves, fast_mode=True)


@runs
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", WINDOWS)
def test_gradients_are_those_of_the_dense_layer(name: str, form: int | None) -> None:
    shape, _, window = WINDOWS[name]
    weight = pruned(shape, 0.7)
    for dtype in (torch.float32, torch.bfloat16):
        x = image(name, dtype, True)
        values, steps = coded(weight, dtype)
        pattern = Weight.of(steps, shape, form)
        stored = pattern.store(values, dtype)
        dense = torch.from_numpy(weight).to(DEVICE, dtype).double().reshape(pattern.shape).requires_grad_()
        wide = x.double().requires_grad_()
        top, left, bottom, right = window.padding
        padded = torch.nn.functional.pad(wide, (left, right, top, bottom))
        y = torch.nn.functional.conv2d(padded, dense, None, window.stride, 0, window.dilation)
        gradient = torch.from_numpy(normal(*y.shape, seed=4)).to(DEVICE, dtype)
        of_x, of_weight = torch.autograd.grad(y, (wide, dense), gradient.double())
        expected = of_x, of_weight.reshape(-1)[steps.to(torch.int64).cumsum(0)]
        found = gpu.gradients(gradient, x, pattern, stored, window)
        assert found[0] is not None and found[0].dtype == dtype and found[0].stride() == x.stride()
        assert found[1] is not None and found[1].dtype == torch.float32
        for got, right_one, rounding in zip(found, expected, (EPS[dtype], 0.0), strict=True):
            assert got is not None
            scale = float(right_one.abs().max())
            assert float((got.double() - right_one).abs().max()) <= (1e-5 + rounding) * scale
            assert float((got.double() - right_one.flip(0)).abs().max()) > 1e-2 * scale  # negative control


# The operators' side --------------------------------------------------------------------------------------------------------------


def operands(form: str = "bsr", **change: Any) -> dict[str, Any]:
    """Arguments of `torch_gpu.conv2d`."""
    shape, _, window = WINDOWS["same"]
    values, steps = coded(pruned(shape, 0.8))
    given = {
        "x": image("same", torch.float32, True), "values": values, "gaps": steps, "bias": torch.zeros(20, device=DEVICE), "residual": None,
        "weight_shape": list(shape), "stride": [1, 1], "padding": list(window.padding), "dilation": [1, 1], "groups": 1, "minimum": 0.0,
        "maximum": None, "format": form, "x_layout": "planes", "y_layout": "planes", "block": 0,
    }  # fmt: skip
    return {**given, **change}


@runs
@pytest.mark.parametrize("form", ["csr", "bsr"])
def test_the_operators_reach_the_kernels(form: str) -> None:
    given = operands(form)
    y = torch_gpu.conv2d(**given)
    expected = exact(given["x"], pruned(WINDOWS["same"][0], 0.8), WINDOWS["same"][2], torch.float32, clip=(0.0, inf))
    assert np.abs(y.cpu().numpy() - expected).max() <= bound(given["x"], pruned(WINDOWS["same"][0], 0.8), expected)
    half = torch_gpu.conv2d(**{**given, "x": given["x"].half()})  # values in float32, as in training with autocast
    assert half.dtype == torch.float16
    assert np.abs(half.double().cpu().numpy() - expected).max() <= 1e-2 * np.abs(expected).max()
    weight = pruned((24, 70), 0.8)
    values, steps = coded(weight)
    for rows in (3, 40):
        x = torch.from_numpy(normal(rows, 70, seed=2)).to(DEVICE)
        y = torch_gpu.linear(x, values, steps, torch.ones(24, device=DEVICE), [24, 70], None, None, form, 0)
        exactly = oracle.gemm(x.cpu().numpy(), weight, np.ones(24, np.float32))
        assert np.abs(y.cpu().numpy() - exactly).max() <= oracle.tolerance(weight, x.cpu().numpy(), np.ones(1, np.float32))


@runs
def test_weights_are_packed_once_until_they_change() -> None:
    given = operands()
    first = torch_gpu.conv2d(**given)
    before = len(torch_gpu.stores.entries), len(torch_gpu.patterns.entries)
    assert torch.equal(torch_gpu.conv2d(**given), first)
    for form in ("csr", "bsr"):
        for _ in range(4):  # values made for a call go with it
            torch_gpu.conv2d(**{**given, "values": given["values"] * 1.0, "format": form})
    gc.collect()
    assert sum(not entry.gone for entry in torch_gpu.stores.entries.values()) <= before[0]
    torch_gpu.conv2d(**operands())  # the next packing drops what is gone
    given["values"].mul_(2)
    assert torch.equal(torch_gpu.conv2d(**given), 2 * first)
    assert sum(not entry.gone for entry in torch_gpu.stores.entries.values()) <= before[0]


@runs
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"groups": 20}, KernelError, "groups: expected 1"),
        ({"format": "ell"}, KernelError, "format: expected csr or bsr"),
        ({"block": 24}, KernelError, "block: expected one of 128, 64, 32, 16"),
        ({"x_layout": "csr_tiles"}, KernelError, "x_layout: expected 'planes'"),
        ({"padding": [0, 0, -1, 0]}, KernelError, "no negative padding"),
        ({"stride": [0, 1]}, KernelError, "positive strides"),
        ({"dilation": [9, 9]}, KernelError, "a window that fits"),
        ({"x": torch.zeros(1, 7, 9, 9, device=DEVICE if INTERPRETED else None)}, KernelError, r"x: expected \[N, 18, H, W\]"),
        ({"x": torch.zeros(1, 18, 9, 9, dtype=torch.int32)}, KernelError, "x: expected one of torch.float32"),
        ({"bias": torch.zeros(7)}, KernelError, r"bias: expected torch.float32 \[20\]"),
        ({"residual": torch.zeros(2, 20, 9, 8)}, KernelError, r"residual: expected torch.float32 \[2, 20, 9, 7\]"),
        ({"values": torch.zeros(3)}, FormatError, "gaps: expected 3 entries"),
        ({"values": "nan"}, FormatError, "finite"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = operands()
    change = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in change.items()}
    if isinstance(change.get("values"), str):
        change["values"] = torch.full_like(given["values"], torch.nan)
    with pytest.raises(error, match=message) as caught:
        torch_gpu.conv2d(**{**given, **change})
    assert "\n" not in str(caught.value)


@plain
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="expected tensors on a CUDA device, got some on cpu"):
        gpu.require(torch.device("cpu"))
    import triton

    launch._require_version.cache_clear()
    monkeypatch.setattr(triton, "__version__", "2.1.0")
    with pytest.raises(KernelError, match=r"Triton 3\.3 or newer, got 2\.1\.0"):
        gpu.require(torch.device("cpu"))
    monkeypatch.setattr(launch, "find_spec", lambda _: None)
    with pytest.raises(KernelError, match=r"pip install 'ticketkit\[gpu\]'"):
        gpu.require(torch.device("cpu"))
    launch._require_version.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GTX 1080")
    with pytest.raises(KernelError, match=r"capability 8\.0 or newer, got 6\.1 \(GTX 1080\)"):
        launch._require_capability(0)
    launch._require_capability.cache_clear()


def test_the_operators_know_gpus() -> None:
    from ticketkit.runtime import torch_op  # noqa: F401

    for name in ("sparse_conv2d", "sparse_linear", "sparse_conv2d_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ticketkit::{name}", "CUDA")


@runs
def test_types_and_forms_meet() -> None:
    """Every type with every form and side, once."""
    shape = (40, 130, 1, 1)
    weight = pruned(shape, 0.9)
    for dtype, side in product(launch.TYPES, (None, *gpu.BLOCKS)):
        values, steps = coded(weight, dtype)
        x = torch.from_numpy(normal(1, 130, 3, 5, seed=1)).to(DEVICE, dtype)
        pattern = Weight.of(steps, shape, side)
        y = gpu.conv2d(x, pattern, pattern.store(values, dtype))
        expected = exact(x, weight, Window(), dtype)
        assert np.abs(y.double().cpu().numpy() - expected).max() <= bound(x, weight, expected)
