"""The activations that kernels apply to what they have just written: exact enough everywhere, and on every output once."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from ticketkit.errors import KernelError
from ticketkit.formats import csr
from ticketkit.runtime import native
from ticketkit.runtime.geometry import ConvShape, Tuning
from ticketkit.runtime.native import Layer

ISAS = [isa.name for isa in native.isas() if isa.usable]
NAMES = [name for name in oracle.ACTIVATIONS if name != "identity"]
SLOPE = 0.2
INFINITY = np.float32(np.inf)


def identity_layer(isa: str) -> Layer:
    return native.gemm(1, 1, csr.pack(np.ones((1, 1), np.float32)), isa=isa)


def close(got: np.ndarray, z: np.ndarray, name: str) -> bool:
    """Whether each is the activation of z to a few roundings: of the result, and for HardSwish, whose factor is a difference, of z."""
    exact = oracle.ACTIVATIONS[name](z.astype(np.float64), SLOPE)
    size = np.abs(z) if name == "hard_swish" else np.abs(exact)
    return bool((np.abs(got - exact) <= 4 * oracle.EPS * size + 1e-36).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_every_number(isa: str, name: str) -> None:
    ends = [0.0, -0.0, 1e-38, -1e-30, 3e38, -3e38, -88.0, -87.9, 87.0, 88.0, 3.0, -3.0]
    z = np.concatenate([np.linspace(-100, 100, 300_001), np.linspace(-4, 4, 100_003), ends]).astype(np.float32)
    z = z[z > -85] if name == "silu" else z  # below, results vanish: next test
    assert close(identity_layer(isa).run(z[:, None], activation=name, slope=SLOPE)[:, 0], z, name)
    assert not close(z, z, name), "negative control"


@pytest.mark.parametrize("isa", ISAS)
def test_the_ends(isa: str) -> None:
    layer = identity_layer(isa)
    far = np.array([-85, -90, -1e5, -3e38, -np.inf], np.float32)
    assert (np.abs(layer.run(far[:, None], activation="silu")) < 1e-34).all()
    for name in oracle.ACTIVATIONS:
        y = layer.run(np.array([[np.nan], [np.inf]], np.float32), activation=name, slope=SLOPE)
        assert np.isnan(y[0]) and y[1] == INFINITY, name


def check_activated(layer: Layer, batch: int, name: str, cuts: int = 1) -> None:
    """A run with the activation is the run without it, activated; the residual is overwritten in place."""
    rng = np.random.default_rng(batch)
    x = 2 * rng.standard_normal((batch, *layer.in_shape)).astype(np.float32)
    bias, residual = rng.standard_normal(layer.out_shape[0]).astype(np.float32), rng.standard_normal((batch, *layer.out_shape))
    bounds = {"minimum": -2.0, "maximum": 2.5, "cuts": [layer.parts(batch) * i // cuts for i in range(1, cuts)]}
    given = residual.astype(np.float32)
    z = layer.run(x, bias, given, **bounds)
    assert z.min() == -2 and z.max() == 2.5
    guarded = np.full(z.size + 65, 77.0, np.float32)
    y = guarded[33:-32].reshape(z.shape)
    y[...] = given
    layer.run(x, bias, y, **bounds, activation=name, slope=SLOPE, out=y)
    assert close(y, z, name) and (guarded[:33] == 77).all() and (guarded[-32:] == 77).all()
    y[...] = np.nan
    layer.run(x, activation=name, slope=SLOPE, out=y, cuts=bounds["cuts"])
    assert close(y, layer.run(x), name) and (guarded[:33] == 77).all() and (guarded[-32:] == 77).all(), "nothing else in the way"


def sparse(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.where(rng.random(shape) < 0.4, rng.standard_normal(shape), 0).astype(np.float32)


SHAPES = {
    "whole vectors": ConvShape(20, 8, 16, 9, 1, 1),
    "odd rows": ConvShape(6, 7, 13, 5, 3, 3, 2, 1, 1, 1, 1, 1),
    "tiles": ConvShape(6, 15, 29, 7, 1, 1, x_layout="csr", y_layout="csr"),
    "tiles of blocks": ConvShape(6, 15, 29, 7, 3, 3, 1, 1, 1, 1, 1, 1, x_layout="bsr", y_layout="bsr"),
    "many tiles": ConvShape(40, 40, 41, 70, 1, 1),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["csr", "bsr"])
@pytest.mark.parametrize("shape", SHAPES)
def test_convolutions(isa: str, name: str, form: str, shape: str) -> None:
    s = SHAPES[shape]
    parts = csr.pack(sparse(s.out_channels, s.in_channels, s.kernel_h, s.kernel_w))
    check_activated(native.conv2d(s, parts, format=form, isa=isa), 2, name, cuts=3)
    check_activated(native.conv2d(s, parts, format=form, isa=isa, tuning=Tuning(tile_vectors=2, block_channels=3)), 1, name)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("side", "kernel", "stride"), [(29, 3, 1), (5, 5, 1), (30, 3, 2)])
def test_depthwise_convolutions(isa: str, name: str, side: int, kernel: int, stride: int) -> None:
    pad = kernel // 2
    shape = ConvShape(11, side, side, 11, kernel, kernel, stride, stride, pad, pad, pad, pad, groups=11)
    check_activated(native.conv2d(shape, csr.pack(sparse(11, 1, kernel, kernel)), isa=isa), 2, name, cuts=3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["csr", "bsr", "bsr1x4"])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_products(isa: str, name: str, form: str, batch: int) -> None:
    check_activated(native.gemm(83, 301, csr.pack(sparse(83, 301)), format=form, isa=isa), batch, name, cuts=4)


def test_an_unknown_activation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = identity_layer(ISAS[0]), np.zeros((1, 1), np.float32)
    with pytest.raises(KernelError, match="unknown activation 'gelu'; expected one of identity"):
        layer.run(x, activation="gelu")
    for slope in (np.nan, np.inf):
        with pytest.raises(KernelError, match="run: "):
            layer.run(x, activation="leaky_relu", slope=slope)
    monkeypatch.setitem(native._ACTIVATIONS, "gelu", len(oracle.ACTIVATIONS))
    with pytest.raises(KernelError, match="run: "):
        layer.run(x, activation="gelu")
