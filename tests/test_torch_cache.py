"""Packed weights of the torch operators: made once, made anew when the tensors change, gone with them."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import oracle
import pytest
from graphs import normal, pruned

torch = pytest.importorskip("torch")
from operands import coded, layer  # noqa: E402
from torch import Tensor  # noqa: E402

from ticketkit.runtime import native, torch_cache, torch_cpu, torch_op  # noqa: E402
from ticketkit.runtime.geometry import ConvShape  # noqa: E402
from ticketkit.runtime.torch_op import sparse_conv2d, sparse_linear  # noqa: E402


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[ConvShape]:
    """The shapes of the convolutions packed during a test."""
    made: list[ConvShape] = []
    honest = native.conv2d

    def pack(shape: ConvShape, *args: Any, **kwargs: Any) -> native.Layer:
        made.append(shape)
        return honest(shape, *args, **kwargs)

    monkeypatch.setattr(native, "conv2d", pack)
    return made


def test_a_weight_is_packed_once_for_each_size(packings: list[ConvShape]) -> None:
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
