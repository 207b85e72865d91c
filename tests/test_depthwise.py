"""The depthwise rows of the kernel table on every usable ISA against the oracle: ugly sizes, any geometry, any split of the work."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import ISAS, LANES, pairs, sparse

from ticketkit.errors import KernelError
from ticketkit.formats import csr
from ticketkit.runtime import native
from ticketkit.runtime.geometry import ConvShape


def depthwise(channels: int, height: int, width: int, *window: int) -> ConvShape:
    """`window`: kernel, strides, pads and dilations as in ConvShape."""
    return ConvShape(channels, height, width, channels, *window, groups=channels)


def square(channels: int, size: int, kernel: int, stride: int) -> ConvShape:
    pad = kernel // 2
    return depthwise(channels, size, size, kernel, kernel, stride, stride, pad, pad, pad, pad)


def case(shape: ConvShape, batch: int, density: float, seed: int = 0) -> tuple[np.ndarray, ...]:
    """weight, x, bias, residual of that geometry."""
    rng = np.random.default_rng(seed)
    weight = sparse(rng, (shape.out_channels, 1, shape.kernel_h, shape.kernel_w), density)
    x = rng.standard_normal((batch, shape.in_channels, shape.in_h, shape.in_w)).astype(np.float32)
    bias = rng.standard_normal(shape.out_channels).astype(np.float32)
    return weight, x, bias, rng.standard_normal((batch, shape.out_channels, shape.out_h, shape.out_w)).astype(np.float32)


def exact(shape: ConvShape, weight: np.ndarray, x: np.ndarray, *terms: np.ndarray | None, clip: tuple[float, float]) -> np.ndarray:
    return oracle.conv2d(
        x, weight, *terms, clip=clip, groups=shape.groups,
        strides=(shape.stride_h, shape.stride_w),
        pads=(shape.pad_top, shape.pad_left, shape.pad_bottom, shape.pad_right),
        dilations=(shape.dilation_h, shape.dilation_w),
    )  # fmt: skip


def check(shape: ConvShape, isa: str, *, batch: int = 1, density: float = 1.0, seed: int = 0, cuts: tuple[float, ...] = ()) -> None:
    """One layer, plain and with everything fused, misaligned, between guard floats, against the oracle."""
    weight, aligned_x, bias, residual = case(shape, batch, density, seed)
    x = np.empty(aligned_x.size + 1, np.float32)[1:].reshape(aligned_x.shape)
    x[...] = aligned_x
    layer = native.conv2d(shape, csr.pack(weight), isa=isa)
    at = [int(cut * layer.parts(batch)) for cut in cuts]
    for terms, clip in (((None, None), (-np.inf, np.inf)), ((bias, residual), (0.0, np.inf)), ((bias, None), (-0.5, 0.5))):
        guarded = np.full(residual.size + 65, 77.0, np.float32)
        y = guarded[33:-32].reshape(residual.shape)
        y[...] = np.nan if terms[1] is None else residual
        layer.run(x, terms[0], None if terms[1] is None else y, minimum=clip[0], maximum=clip[1], cuts=at, out=y)
        worst = np.abs(y - exact(shape, weight, x, *terms, clip=clip)).max()
        assert worst <= oracle.tolerance(weight, x, *terms), (shape, isa, terms[0] is not None, worst)
        assert (guarded[:33] == 77).all() and (guarded[-32:] == 77).all()


def test_the_oracle_is_torch() -> None:
    torch = pytest.importorskip("torch")
    shape = depthwise(5, 11, 9, 3, 2, 2, 1, 1, 2, 1, 2, 2, 3)
    weight, x, bias, _ = case(shape, 2, 1.0)
    double = [torch.from_numpy(a).double() for a in (x, weight, bias)]
    expected = torch.nn.functional.conv2d(*double, stride=(2, 1), padding=(1, 2), dilation=(2, 3), groups=5).numpy()
    np.testing.assert_allclose(exact(shape, weight, x, bias, clip=(-np.inf, np.inf)), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 5, 8, 9, 13])
def test_widths_around_every_vector(isa: str, vectors: int, offset: int) -> None:
    width = vectors * LANES[isa] + offset
    check(depthwise(3, 1, width, 1, 1), isa)
    check(depthwise(2, 5, width, 3, 3, 1, 1, 1, 1, 1, 1), isa)
    check(depthwise(2, 6, width, 5, 5, 2, 2, 2, 2, 2, 2), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_usual_layers(isa: str, kernel: int, stride: int, density: float) -> None:
    """Every number of weights a channel, none too; maps of networks; cut between and within images."""
    for size in (7, 14, 29):
        check(square(11, size, kernel, stride), isa, batch=2, density=density, cuts=(0.3, 0.7))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_many_tiles_and_rows_longer_than_one(isa: str, stride: int, dilation: int) -> None:
    for height, width in ((9, 9000), (150, 160), (4, 70001)):
        check(depthwise(2, height, width, 3, 3, stride, stride, 1, 1, 1, 1, dilation, dilation), isa)


@st.composite
def geometry(draw: st.DrawFn) -> ConvShape:
    """Any depthwise convolution whose window fits its image."""
    kernel, stride, pads, dilation = draw(pairs(1, 7)), draw(pairs(1, 3)), draw(pairs(0, 4, 4)), draw(pairs(1, 3))
    extra = draw(pairs(0, 70))
    size = [max(1, dilation[i] * (kernel[i] - 1) + 1 - pads[i] - pads[i + 2]) + extra[i] for i in (0, 1)]
    return depthwise(draw(st.integers(2, 40)), *size, *kernel, *stride, *pads, *dilation)


@settings(max_examples=150, deadline=None)
@given(shape=geometry(), batch=st.integers(1, 3), density=st.floats(0, 1), seed=st.integers(0, 99), isa=st.sampled_from(ISAS),
       cuts=st.lists(st.floats(0, 1), max_size=3))  # fmt: skip
def test_any_geometry(shape, batch, density, seed, isa, cuts) -> None:  # type: ignore[no-untyped-def]
    check(shape, isa, batch=batch, density=density, seed=seed, cuts=tuple(cuts))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2])
def test_result_does_not_depend_on_the_split_or_the_run(isa: str, stride: int) -> None:
    shape = square(37, 30, 3, stride)
    weight, x, bias, residual = case(shape, 2, 1.0)
    layer = native.conv2d(shape, csr.pack(weight), isa=isa)
    whole = layer.run(x, bias, residual, minimum=0)
    assert layer.parts(2) == 2 * 37
    assert np.array_equal(whole, layer.run(x, bias, residual, minimum=0))
    assert np.array_equal(whole, layer.run(x, bias, residual, minimum=0, cuts=range(1, layer.parts(2))))


@pytest.mark.parametrize("isa", ISAS)
def test_negative_control(isa: str) -> None:
    """The comparison can fail: one weight off by a thousandth of the largest is noticed."""
    shape = square(8, 14, 3, 1)
    weight, x, _, _ = case(shape, 1, 1.0)
    wrong = weight.copy()
    wrong[3, 0, 1, 2] += 1e-3 * np.abs(weight).max()
    y = native.conv2d(shape, csr.pack(wrong), isa=isa).run(x)
    assert np.abs(y - exact(shape, weight, x, clip=(-np.inf, np.inf))).max() > oracle.tolerance(weight, x)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_in_its_window(isa: str) -> None:
    x = np.ones((1, 2, 9, 9), np.float32)
    x[0, 1, 4, 4] = np.nan
    y = native.conv2d(square(2, 9, 3, 1), csr.pack(np.ones((2, 1, 3, 3), np.float32)), isa=isa).run(x, minimum=0.0)
    expected = np.zeros((2, 9, 9), bool)
    expected[1, 3:6, 3:6] = True
    assert np.array_equal(np.isnan(y[0]), expected)


@pytest.mark.parametrize(("channels", "outputs", "groups"), [(6, 6, 2), (6, 12, 6), (6, 6, 0), (6, 6, -1), (1, 6, 6), (6, 3, 3)])
def test_other_groups_are_refused(channels: int, outputs: int, groups: int) -> None:
    shape = ConvShape(channels, 8, 8, outputs, 3, 3, groups=groups)
    weight = np.ones((outputs, max(channels // max(groups, 1), 1), 3, 3), np.float32)
    with pytest.raises(KernelError, match="dimension"):
        native.conv2d(shape, csr.pack(weight))


def test_there_are_no_blocks() -> None:
    with pytest.raises(KernelError, match="bound"):
        native.conv2d(square(8, 8, 3, 1), csr.pack(np.ones((8, 1, 3, 3), np.float32)), format="bsr")
