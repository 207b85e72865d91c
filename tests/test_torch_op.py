"""The torch operators: exact against the oracle, sound under torch.compile and torch.export, packed as often as needed and no more."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from graphs import normal, pruned

torch = pytest.importorskip("torch")
from operands import WINDOWS, coded, layer  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from ticketkit.errors import FormatError, KernelError  # noqa: E402
from ticketkit.runtime import torch_cpu  # noqa: E402
from ticketkit.runtime.torch_op import sparse_conv2d, sparse_linear  # noqa: E402


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
from operands import layer
from test_torch_op import normal, sparse_conv2d, torch_cpu
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
