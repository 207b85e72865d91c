"""The torch operators: exact against the oracle, sound under torch.compile and torch.export, packed as often as needed and no more."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from graphs import Array, normal, pruned

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from ticketkit.errors import FormatError, KernelError  # noqa: E402
from ticketkit.formats import gaps  # noqa: E402
from ticketkit.runtime import native, torch_cache, torch_cpu, torch_op  # noqa: E402
from ticketkit.runtime.torch_op import sparse_conv2d, sparse_linear  # noqa: E402

# weight, strides, pads, dilations, group; images are [2, weight[1] * group, 13, 11]
WINDOWS = [
    ((6, 5, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    ((7, 5, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    ((4, 3, 3, 2), (2, 1), (1, 0, 2, 1), (1, 1), 1),
    ((8, 4, 3, 3), (2, 2), (2, 1, 2, 1), (2, 1), 1),
    ((9, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 9),
    ((9, 1, 5, 5), (2, 2), (2, 2, 2, 2), (1, 1), 9),
]


def coded(weight: Array) -> tuple[Tensor, Tensor]:
    """values and gaps of a weight, as tensors."""
    parts = gaps.pack(weight)
    return torch.from_numpy(parts["values"]), torch.from_numpy(parts["gaps"])


def layer(shape: tuple[int, ...] = (64, 32, 3, 3), sparsity: float = 0.9) -> tuple[Array, list[Any], dict[str, Any]]:
    """weight, and the operands and options of a 3x3 convolution with it."""
    weight = pruned(shape, sparsity)
    operands = [*coded(weight), torch.from_numpy(normal(shape[0], seed=3)), None, list(shape)]
    return weight, operands, {"padding": [1, 1, 1, 1]}


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Right --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("format", ["csr", "bsr"])
@pytest.mark.parametrize("fused", [False, True])
def test_conv2d_is_the_oracle(window: Any, format: str, fused: bool) -> None:
    shape, strides, pads, dilations, group = window
    if group > 1 and format == "bsr":
        pytest.skip("depthwise layers have one form")
    weight, x, bias = pruned(shape, 0.7), normal(2, shape[1] * group, 13, 11, seed=1), normal(shape[0], seed=2)
    options = {"strides": strides, "pads": pads, "dilations": dilations, "groups": group}
    residual = normal(*oracle.conv2d(x, weight, **options).shape, seed=3) if fused else None
    clip = (-0.25, 0.5) if fused else (-np.inf, np.inf)
    exact = oracle.conv2d(x, weight, bias, residual, clip=clip, **options)
    bounds = clip if fused else (None, None)
    operands = [torch.from_numpy(a) if a is not None else None for a in (bias, residual)]
    y = sparse_conv2d(torch.from_numpy(x), *coded(weight), *operands, shape, strides, pads, dilations, group, *bounds, format)
    worst = np.abs(y.numpy() - exact).max()
    assert worst <= oracle.tolerance(weight, x, bias, residual)
    wrong = pruned(shape, 0.7, seed=9)  # negative control
    assert np.abs(oracle.conv2d(x, wrong, bias, residual, clip=clip, **options) - exact).max() > oracle.tolerance(weight, x, bias, residual)


@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("format", ["csr", "bsr", "bsr1x4"])
def test_linear_is_the_oracle(rows: tuple[int, ...], format: str) -> None:
    weight, x, bias = pruned((17, 40), 0.8), normal(*rows, 40, seed=1), normal(17, seed=2)
    exact = oracle.gemm(x.reshape(-1, 40), weight, bias, clip=(0.0, np.inf)).reshape(*rows, 17)
    y = sparse_linear(torch.from_numpy(x), *coded(weight), torch.from_numpy(bias), [17, 40], 0.0, None, format).numpy()
    assert y.shape == exact.shape
    np.testing.assert_allclose(y, exact, atol=oracle.tolerance(weight, x, bias) if x.size else 0)


def test_strided_inputs_are_taken() -> None:
    _, operands, options = layer()
    x = torch.from_numpy(normal(2, 32, 9, 9))
    expected = sparse_conv2d(x, *operands, **options)
    for same in (x.to(memory_format=torch.channels_last), torch.cat([x, x], 1)[:, :32], x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(sparse_conv2d(same, *operands, **options), expected)


def test_threads_do_not_change_a_bit(threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_cpu, "SHARED", 0)
    _, operands, options = layer()
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results += [sparse_conv2d(torch.from_numpy(normal(b, 32, 20, 20)), *operands, **options)[:1] for b in (1, 3)]
    for result in results[2:]:
        assert torch.equal(result, results[0]) or torch.equal(result, results[1])
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_eight_callers_at_once(threads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_cpu, "SHARED", 0)
    threads(2)
    _, operands, options = layer()
    images = [torch.from_numpy(normal(1, 32, 8 + i % 3, 8, seed=i)) for i in range(48)]
    expected = [sparse_conv2d(x, *operands, **options) for x in images]
    _, fresh, _ = layer()  # packed for the first time by all of them at once
    with ThreadPoolExecutor(8) as pool:
        for y, exact in zip(pool.map(lambda x: sparse_conv2d(x, *fresh, **options), images), expected, strict=True):
            assert torch.equal(y, exact)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_runs_too() -> None:
    code = """
import os, torch
from test_torch_op import layer, normal, sparse_conv2d, torch_cpu
torch_cpu.SHARED = 0
torch.set_num_threads(2)
_, operands, options = layer()
x = torch.from_numpy(normal(1, 32, 20, 20))
expected = sparse_conv2d(x, *operands, **options)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(sparse_conv2d(x, *operands, **options), expected) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
                          check=False)  # fmt: skip
    assert done.stdout.strip() == "0", done.stderr


# Packed -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[native.ConvShape]:
    """The shapes of the convolutions packed during a test."""
    made: list[native.ConvShape] = []
    honest = native.conv2d

    def pack(shape: native.ConvShape, *args: Any, **kwargs: Any) -> native.Layer:
        made.append(shape)
        return honest(shape, *args, **kwargs)

    monkeypatch.setattr(native, "conv2d", pack)
    return made


def test_a_weight_is_packed_once_for_each_size(packings: list[native.ConvShape]) -> None:
    _, operands, options = layer()
    for size in (8, 8, 9, 8, 9):
        sparse_conv2d(torch.zeros(1, 32, size, size), *operands, **options)
    sparse_conv2d(torch.zeros(4, 32, 8, 8), *[t.detach() if isinstance(t, Tensor) else t for t in operands], **options)
    assert [shape.in_h for shape in packings] == [8, 9]
    for size in range(10, 10 + torch_cache.MOST):  # the oldest go
        sparse_conv2d(torch.zeros(1, 32, size, size), *operands, **options)
    sparse_conv2d(torch.zeros(1, 32, 17, 17), *operands, **options)
    assert len(packings) == 2 + torch_cache.MOST
    sparse_conv2d(torch.zeros(1, 32, 8, 8), *operands, **options)
    assert len(packings) == 3 + torch_cache.MOST


def test_a_weight_that_is_gone_is_never_taken_for_another() -> None:
    """New weights of the same size come to lie where old ones were."""
    x, options = torch.from_numpy(normal(1, 32, 6, 6)), {"padding": [1, 1, 1, 1]}
    places = set()
    for seed in range(20):
        weight = pruned((16, 32, 3, 3), 0.9, seed)
        values, steps = coded(weight)
        places.add(values.data_ptr())
        y = sparse_conv2d(x, values, steps, torch.zeros(16), None, [16, 32, 3, 3], **options)
        exact = oracle.conv2d(x.numpy(), weight, pads=(1, 1, 1, 1))
        assert np.abs(y.numpy() - exact).max() <= oracle.tolerance(weight, x.numpy())
        del values, steps, y
        gc.collect()
    assert len(places) < 20, "no address was used twice, so nothing was tested"


def test_packed_weights_go_with_their_tensors() -> None:
    sparse_conv2d(torch.zeros(1, 32, 8, 8), *layer()[1], padding=[1, 1, 1, 1])  # its weight is gone at once
    gc.collect()
    kept, options = layer()[1:]
    sparse_conv2d(torch.zeros(1, 32, 8, 8), *kept, **options)
    assert torch_cpu.layers.entries and not any(entry.gone for entry in torch_cpu.layers.entries.values())


def test_other_views_of_a_storage_are_other_weights() -> None:
    base = torch.arange(1.0, 9.0)
    steps = torch.tensor([0, 1, 1, 1], dtype=torch.uint16)
    x, bias = torch.ones(1, 4), torch.zeros(1)
    assert sparse_linear(x, base[:4], steps, bias, [1, 4]).item() == 10
    assert sparse_linear(x, base[::2], steps, bias, [1, 4]).item() == 16


def test_forgotten_weights_are_packed_again() -> None:
    _, operands, options = layer()
    x = torch.from_numpy(normal(1, 32, 8, 8))
    before = sparse_conv2d(x, *operands, **options)
    operands[0].data.mul_(2)  # torch does not count it
    torch_op.forget()
    bias = operands[2][:, None, None]
    torch.testing.assert_close(sparse_conv2d(x, *operands, **options) - bias, 2 * (before - bias))


def test_a_weight_changed_in_place_is_packed_again() -> None:
    _, operands, options = layer()
    x = torch.from_numpy(normal(1, 32, 8, 8))
    before = sparse_conv2d(x, *operands, **options)
    operands[0].mul_(2)
    after = sparse_conv2d(x, *operands, **options)
    bias = operands[2][:, None, None]
    torch.testing.assert_close(after - bias, 2 * (before - bias))


# torch's own checks ---------------------------------------------------------------------------------------------------------------


def test_torch_finds_no_fault_with_the_operators() -> None:
    """Schema, fake kernels and AOT dispatch, static and dynamic, by torch.library.opcheck."""
    shape = [6, 4, 3, 3]
    weight = coded(pruned(tuple(shape), 0.5))
    x, bias = torch.from_numpy(normal(2, 4, 9, 8)), torch.zeros(6)
    window = [shape, [2, 1], [1, 0, 2, 1], [2, 1]]
    residual = torch.zeros(2, 6, 4, 7)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for given in (None, residual):
        torch.library.opcheck(sparse_conv2d, (x, *weight, bias, given, *window), {"minimum": 0.0}, test_utils=checks)
    linear = coded(pruned((5, 8), 0.5))
    torch.library.opcheck(sparse_linear, (x, *linear, torch.zeros(5), [5, 8]), {"maximum": 1.0}, test_utils=checks)


class Net(nn.Module):
    """Sparse between two of torch's own, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        weight, operands, self.options = layer((32, 32, 3, 3))
        self.dense = nn.Conv2d(32, 32, 3, padding=1)
        with torch.no_grad():
            self.dense.weight.copy_(torch.from_numpy(weight))
            self.dense.bias.copy_(operands[2])
        for name, tensor in zip(("values", "gaps", "bias"), operands, strict=False):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor, dense: bool = False) -> Tensor:
        x = self.stem(x)
        if dense:
            return torch.relu(self.dense(x) + x).mean((2, 3))
        y = torch.ops.ticketkit.sparse_conv2d(x, self.values, self.gaps, self.bias, x, [32, 32, 3, 3], minimum=0.0, **self.options)
        return y.mean((2, 3))


def test_a_compiled_backward_pass() -> None:
    _, (values, steps, bias, _, shape), options = layer((8, 8, 3, 3))
    x = torch.from_numpy(normal(2, 8, 6, 6))

    linear = *coded(pruned((5, 36), 0.5)), torch.zeros(5), [5, 36]

    def loss(values: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        y = torch.ops.ticketkit.sparse_conv2d(x, values, steps, bias, None, shape, minimum=0.0, **options)
        return (torch.ops.ticketkit.sparse_linear(y.flatten(2), *linear) ** 2).sum()

    for run in (loss, torch.compile(loss, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (values, bias, x)]
        found = torch.autograd.grad(run(*leaves), leaves)
        if run is loss:
            expected = found
    for got, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(got, exact)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    window = [1, 1], [1, 1, 1, 1], [1, 1], 1, "csr", 0
    for needs in ((True, True), (False, True), (True, False)):
        arguments = torch.ones(2, 8, 6, 6), x, values, steps, shape, *window, *needs
        torch.library.opcheck(torch_op.sparse_conv2d_backward, arguments, test_utils=checks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_on_a_gpu() -> None:
    """Forward and backward of the operators, csr and bsr, against those of the processor."""
    _, (values, steps, bias, _, shape), options = layer((64, 32, 3, 3))
    x = torch.from_numpy(normal(2, 32, 9, 8))
    for format in ("csr", "bsr"):
        results = []
        for device in ("cpu", "cuda"):
            leaves = [t.to(device).requires_grad_() for t in (x, values, bias)]
            y = sparse_conv2d(leaves[0], leaves[1], steps.to(device), leaves[2], None, shape, minimum=0.0, format=format, **options)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend: str) -> None:
    net = Net().eval()
    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for batch in (2, 5):
            x = torch.from_numpy(normal(batch, 3, 16, 16, seed=batch))
            torch.testing.assert_close(compiled(x), net(x, dense=True), rtol=1e-4, atol=1e-5)


def test_torch_export_with_a_free_batch(tmp_path: Path) -> None:
    net = Net().eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (torch.zeros(2, 3, 16, 16),), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    x = torch.from_numpy(normal(7, 3, 16, 16))
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), net(x, dense=True), rtol=1e-4, atol=1e-5)


# Refused ------------------------------------------------------------------------------------------------------------------------


def gradients(weight: Array, window: Any, bounds: tuple[float | None, float | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of x, values, bias and residual: of the operator, and of torch's dense layer in float64."""
    shape, strides, pads, dilations, group = window
    x, bias = torch.from_numpy(normal(2, shape[1] * group, 13, 11, seed=1)), torch.from_numpy(normal(shape[0], seed=2))
    top, left, bottom, right = pads
    values, steps = coded(weight)
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    size = torch.nn.functional.conv2d(padded, torch.from_numpy(weight), None, strides, 0, dilations, group).shape
    residual = torch.from_numpy(normal(*size, seed=3))
    wanted = torch.from_numpy(normal(*residual.shape, seed=4))
    leaves = [t.requires_grad_() for t in (x, values, bias, residual)]
    y = sparse_conv2d(x, values, steps, bias, residual, shape, strides, pads, dilations, group, *bounds)
    found = list(torch.autograd.grad(y, leaves, wanted))
    exact = [t.detach().double().requires_grad_() for t in (x, torch.from_numpy(weight), bias, residual)]
    padded = torch.nn.functional.pad(exact[0], (left, right, top, bottom))
    z = torch.nn.functional.conv2d(padded, exact[1], exact[2], strides, 0, dilations, group) + exact[3]
    low, high = (end if bound is None else bound for bound, end in zip(bounds, (-np.inf, np.inf), strict=True))
    expected = list(torch.autograd.grad(z.clamp(low, high), exact, wanted.double()))
    expected[1] = expected[1].reshape(-1)[steps.to(torch.int64).cumsum(0)]
    return found, expected


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_gradients_are_those_of_the_dense_layer(window: Any) -> None:
    for bounds in ((None, None), (0.0, None), (-0.5, 0.5)):
        found, expected = gradients(pruned(window[0], 0.7), window, bounds)
        for got, exact in zip(found, expected, strict=True):
            scale = float(exact.abs().max())
            assert float((got.double() - exact).abs().max()) <= 1e-5 * scale
            assert float((got.double() - exact.roll(1, 0)).abs().max()) > 1e-2 * scale  # negative control


def test_a_sparse_layer_learns() -> None:
    """SGD on the kept values alone: the loss falls, the pattern stays, and no packed weight of an earlier step is kept."""
    _, (values, steps, bias, _, shape), options = layer((8, 8, 3, 3))
    values = values.clone().requires_grad_()
    x, wanted = torch.from_numpy(normal(4, 8, 6, 6)), torch.from_numpy(normal(4, 8, 6, 6, seed=1))
    bias = bias.clone().requires_grad_()
    sgd, losses = torch.optim.SGD([values, bias], lr=0.05), []
    before = len(torch_cpu.layers.entries)
    for _ in range(5):
        loss = (sparse_conv2d(x, values, steps, bias, None, shape, **options) - wanted).square().mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert len(torch_cpu.layers.entries) <= before + 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(1, 31, 8, 8)}, KernelError, r"x: expected float32 \[1, 32, 8, 8\]"),
        ({"x": torch.zeros(32, 8, 8)}, KernelError, r"x: expected \[N, C, H, W\]"),
        ({"x": torch.zeros(1, 32, 8, 8, dtype=torch.float64)}, KernelError, "x: expected float32"),
        ({"x": torch.zeros(1, 32, 8, 8, dtype=torch.bfloat16)}, KernelError, "expected float32"),
        ({"bias": torch.zeros(63)}, KernelError, r"bias: expected float32 \[64\]"),
        ({"residual": torch.zeros(1, 64, 8, 7)}, KernelError, "residual: expected float32"),
        ({"gaps": torch.zeros(3, dtype=torch.uint16)}, FormatError, "values|gaps"),
        ({"gaps": torch.zeros(3, dtype=torch.int64)}, FormatError, "gaps: expected"),
        ({"values": torch.full((1844,), torch.nan)}, FormatError, "conv2d|finite|values"),
        ({"weight_shape": [64, 32, 3]}, KernelError, "weight_shape: expected 4"),
        ({"weight_shape": [64, 0, 3, 3]}, FormatError, "weight_shape: expected"),
        ({"stride": [1]}, KernelError, "stride: expected 2"),
        ({"padding": [1, 1]}, KernelError, "padding: expected 4"),
        ({"padding": [-5, 0, 0, 0]}, KernelError, "conv2d"),
        ({"minimum": 1.0, "maximum": 0.0}, KernelError, "run"),
        ({"format": "ell"}, KernelError, "unknown packed format"),
        ({"x_layout": "ell"}, KernelError, "unknown layout"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    _, (values, steps, bias, residual, shape), options = layer()
    if "values" in change:
        change = {"values": torch.full_like(values, torch.nan)}
    given = {"x": torch.zeros(1, 32, 8, 8), "values": values, "gaps": steps, "bias": bias, "residual": residual, "weight_shape": shape}
    with pytest.raises(error, match=message) as caught:
        sparse_conv2d(**{**given, **options, **change})
    assert "\n" not in str(caught.value)


def test_wrong_arguments_of_linear_are_named() -> None:
    operands = [*coded(pruned((5, 8), 0.5)), torch.zeros(5)]
    for x, shape, message in (
        (torch.zeros(2, 7), [5, 8], r"x: expected \[\.\.\., 8\]"),
        (torch.tensor(0.0), [5, 8], "x: expected"),
        (torch.zeros(2, 8), [5, 8, 1], "weight_shape: expected 2"),
    ):
        with pytest.raises(KernelError, match=message):
            sparse_linear(x, *operands, shape)


def test_a_missing_library_is_one_clear_error(tmp_path: Path) -> None:
    code = "import torch; from ticketkit.runtime.torch_op import sparse_linear as f\n"
    code += "f(torch.zeros(1, 4), torch.ones(1), torch.zeros(1, dtype=torch.uint16), torch.zeros(2), [2, 4])"
    environment = {**os.environ, "TICKETKIT_LIBRARY": str(tmp_path / "none.so"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1].startswith("ticketkit.errors.KernelError: native library")
