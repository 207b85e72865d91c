"""Backward passes of the torch operators: those of the dense layer, compiled too, and good enough to learn with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import Array, normal, pruned

torch = pytest.importorskip("torch")
from operands import WINDOWS, coded, layer  # noqa: E402
from torch import Tensor  # noqa: E402

from ticketkit.runtime import torch_cpu, torch_op  # noqa: E402
from ticketkit.runtime.torch_op import sparse_conv2d  # noqa: E402


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
