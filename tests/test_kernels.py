"""Every row of the kernel table on every usable ISA against the oracle: ugly sizes, any geometry, any split of the work."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ticketkit.errors import KernelError
from ticketkit.formats import csr
from ticketkit.runtime import native
from ticketkit.runtime.geometry import ConvShape, Tuning

FORMATS = ["csr", "bsr"]  # that every operation has
GEMM_FORMATS = [*FORMATS, "bsr1x4"]
ISAS = [isa.name for isa in native.isas() if isa.usable]
LANES = {isa.name: isa.lanes for isa in native.isas()}
TILE = 20  # vectors of the widest tile of any ISA


def sparse(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> np.ndarray:
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape) >= density] = 0
    return weight


def conv_case(shape: ConvShape, batch: int, density: float, seed: int = 0) -> tuple[np.ndarray, ...]:
    """weight, x, bias, residual of that geometry."""
    rng = np.random.default_rng(seed)
    weight = sparse(rng, (shape.out_channels, shape.in_channels, shape.kernel_h, shape.kernel_w), density)
    x = rng.standard_normal((batch, shape.in_channels, shape.in_h, shape.in_w)).astype(np.float32)
    bias = rng.standard_normal(shape.out_channels).astype(np.float32)
    residual = rng.standard_normal((batch, shape.out_channels, shape.out_h, shape.out_w)).astype(np.float32)
    return weight, x, bias, residual


def exact_conv(shape: ConvShape, weight: np.ndarray, x: np.ndarray, *terms: np.ndarray | None, clip: tuple[float, float]) -> np.ndarray:
    return oracle.conv2d(
        x, weight, *terms, clip=clip,
        strides=(shape.stride_h, shape.stride_w),
        pads=(shape.pad_top, shape.pad_left, shape.pad_bottom, shape.pad_right),
        dilations=(shape.dilation_h, shape.dilation_w),
    )  # fmt: skip


def check_conv(shape: ConvShape, isa: str, *, batch: int = 1, density: float = 0.3, seed: int = 0,
               tuning: Tuning | None = None, cuts: tuple[float, ...] = ()) -> None:  # fmt: skip
    """One layer in every packed form, plain and with everything fused, against the oracle."""
    weight, x, bias, residual = conv_case(shape, batch, density, seed)
    for terms, clip in (((None, None), (-np.inf, np.inf)), ((bias, residual), (0.0, np.inf)), ((bias, None), (-0.5, 0.5))):
        exact = exact_conv(shape, weight, x, *terms, clip=clip)
        for form in FORMATS:
            layer = native.conv2d(shape, csr.pack(weight), format=form, isa=isa, tuning=tuning)
            at = [int(cut * layer.parts(batch)) for cut in cuts]
            bias_of, residual_of = terms
            x_tile = native.tile_pixels(shape.x_layout, shape.in_h * shape.in_w, isa)
            y_tile = native.tile_pixels(shape.y_layout, shape.out_h * shape.out_w, isa)
            if residual_of is not None:
                residual_of = oracle.tiled(residual_of, y_tile)
            unwritten = np.full((batch, *layer.out_shape), np.nan, np.float32)
            y = layer.run(oracle.tiled(x, x_tile), bias_of, residual_of,
                          minimum=clip[0], maximum=clip[1], cuts=at, out=unwritten)  # fmt: skip
            y = oracle.planes(y, y_tile)
            worst = np.abs(y - exact).max()
            assert worst <= oracle.tolerance(weight, x, *terms), (shape, form, isa, terms[0] is not None, worst)


def test_the_oracle_is_torch() -> None:
    """The anchor: float64 torch and the oracle agree to the last bits."""
    torch = pytest.importorskip("torch")
    shape = ConvShape(5, 11, 9, 4, 3, 2, 2, 1, 1, 2, 1, 2, 2, 3)
    weight, x, bias, _ = conv_case(shape, 2, 1.0)
    double = [torch.from_numpy(a).double() for a in (x, weight, bias)]
    expected = torch.nn.functional.conv2d(*double, stride=(2, 1), padding=(1, 2), dilation=(2, 3)).numpy()
    np.testing.assert_allclose(exact_conv(shape, weight, x, bias, clip=(-np.inf, np.inf)), expected, rtol=1e-13, atol=1e-13)


def test_table_and_isas() -> None:
    assert native.kernels() == ["conv2d_csr_f32", "conv2d_bsr_f32", "depthwise_csr_f32", "gemm_csr_f32", "gemm_bsr_f32", "gemm_bsr1x4_f32"]
    assert native.isas()[0].name == "scalar" and native.isas()[0].usable
    assert native.active_isa().name in ISAS


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 6, 7, 8, 9, 13, 14, 15, 20, 21, 28])
def test_conv2d_pixels_around_every_tile(isa: str, vectors: int, offset: int) -> None:
    """Row counts of pixels just below, at and above whole vectors and whole tiles."""
    pixels = vectors * LANES[isa] + offset
    check_conv(ConvShape(6, 1, pixels, 5, 1, 1), isa)
    check_conv(ConvShape(3, 1, pixels, 2, 1, 3, pad_left=1, pad_right=1), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("vectors", [1, 3, 6, 10, 11, 20, 25])
@pytest.mark.parametrize(("x_layout", "y_layout"), [("csr", "planes"), ("planes", "csr"), ("csr", "csr"), ("bsr", "bsr"), ("csr", "bsr")])
def test_conv2d_tiled_layouts(isa: str, vectors: int, offset: int, x_layout: str, y_layout: str) -> None:
    """Tensors in tiles: read in place, gathered for other windows and by another format, written whole or in pieces."""
    pixels = vectors * LANES[isa] + offset
    layouts = {"x_layout": x_layout, "y_layout": y_layout}
    check_conv(ConvShape(6, 1, pixels, 5, 1, 1, **layouts), isa, batch=2, tuning=Tuning(block_channels=4), cuts=(0.4,))
    check_conv(ConvShape(6, 1, pixels, 5, 1, 1, **layouts), isa, tuning=Tuning(tile_vectors=2))
    check_conv(ConvShape(3, 5, pixels, 9, 1, 1, 2, 2, **layouts), isa, batch=2)
    check_conv(ConvShape(3, 6, pixels, 5, 3, 3, 1, 1, 1, 1, 1, 1, **layouts), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pixels", [1, 3, 16, 17, 337])
@pytest.mark.parametrize("density", [0.05, 0.9])
def test_conv2d_planes_read_in_place(isa: str, pixels: int, density: float) -> None:
    """Pointwise layers whose channels have few uses and many: in several blocks, tiles that end in the next plane, and at the end of x."""
    check_conv(ConvShape(9, 1, pixels, 37, 1, 1), isa, batch=2, density=density, tuning=Tuning(block_channels=4), cuts=(0.4,))
    check_conv(ConvShape(1, pixels, 1, 5, 1, 1), isa, density=density)


def test_layouts_name_every_float_once() -> None:
    channels, pixels = 3, 15 * 29
    images = np.arange(2 * channels * pixels, dtype=np.float32).reshape(2, channels, 15, 29)
    assert native.tile_pixels("planes", pixels) == 0 and np.array_equal(oracle.tiled(images, 0), images)
    for isa in ISAS:
        for layout in ("csr", "bsr"):
            tile = native.tile_pixels(layout, pixels, isa)
            assert tile % LANES[isa] == 0 and tile < pixels
            tiled = oracle.tiled(images, tile)
            for c, p in ((0, 0), (2, 0), (1, tile), (2, tile + 1), (2, pixels - 1)):  # the definition, in ticketkit.h
                at = (p - p % tile) * channels + c * min(tile, pixels - p + p % tile) + p % tile
                assert tiled[1].ravel()[at] == images[1].reshape(channels, pixels)[c, p]
            assert sorted(tiled[0].ravel()) == list(images[0].ravel())
            assert np.array_equal(oracle.planes(tiled, tile), images)


@pytest.mark.parametrize("layout", ["tiles", ""])
def test_conv2d_refuses_unknown_layouts(layout: str) -> None:
    with pytest.raises(KernelError, match=r"unknown layout .*; expected one of planes, csr, bsr"):
        native.conv2d(ConvShape(1, 1, 1, 1, 1, 1, x_layout=layout), csr.pack(np.ones((1, 1, 1, 1), np.float32)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d_usual_layers(isa: str, kernel: int, stride: int, density: float) -> None:
    """Empty rows, all-zero and all-dense weights; padded as networks do; batch 2; several channel blocks."""
    pad = kernel // 2
    shape = ConvShape(11, 19, 17, 18, kernel, kernel, stride, stride, pad, pad, pad, pad)
    check_conv(shape, isa, batch=2, density=density, tuning=Tuning(block_channels=4), cuts=(0.3, 0.7))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_conv2d_rows_longer_than_a_tile(isa: str, stride: int, dilation: int) -> None:
    """Wide, flat images, where kernel rows have strips of their own."""
    check_conv(ConvShape(5, 9, 1500, 3, 3, 3, stride, stride, 1, 1, 1, 1, dilation, dilation), isa, tuning=Tuning(block_channels=2))


def pairs(low: int, high: int, size: int = 2) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(low, high)] * size)


@st.composite
def geometry(draw: st.DrawFn) -> ConvShape:
    """Any convolution whose window fits its image."""
    kernel, stride, pads, dilation = draw(pairs(1, 7)), draw(pairs(1, 3)), draw(pairs(0, 4, 4)), draw(pairs(1, 3))
    extra = draw(pairs(0, 37))
    size = [max(1, dilation[i] * (kernel[i] - 1) + 1 - pads[i] - pads[i + 2]) + extra[i] for i in (0, 1)]
    layout = st.sampled_from(["planes", "csr", "bsr"])
    channels = draw(st.integers(1, 24)), draw(st.integers(1, 150))
    return ConvShape(channels[0], *size, channels[1], *kernel, *stride, *pads, *dilation, x_layout=draw(layout), y_layout=draw(layout))


@settings(max_examples=150, deadline=None)
@given(shape=geometry(), batch=st.integers(1, 3), density=st.floats(0, 1), seed=st.integers(0, 99), isa=st.sampled_from(ISAS),
       cut_up=st.builds(Tuning, st.integers(0, TILE), st.integers(0, 30), st.integers(0, 9)),
       cuts=st.lists(st.floats(0, 1), max_size=3))  # fmt: skip
def test_conv2d_any_geometry(shape, batch, density, seed, isa, cut_up, cuts) -> None:  # type: ignore[no-untyped-def]
    check_conv(shape, isa, batch=batch, density=density, seed=seed, tuning=cut_up, cuts=tuple(cuts))


def check_gemm(batch: int, k: int, m: int, isa: str, *, density: float = 0.3, seed: int = 0, cuts: tuple[float, ...] = ()) -> None:
    """One layer in every packed form, plain and with everything fused, misaligned, between guard floats, against the oracle."""
    rng = np.random.default_rng(seed)
    weight, bias = sparse(rng, (m, k), density), rng.standard_normal(m + 1).astype(np.float32)[1:]
    x = rng.standard_normal(batch * k + 1).astype(np.float32)[1:].reshape(batch, k)
    residual = rng.standard_normal((batch, m)).astype(np.float32)
    for terms, clip in (((None, None), (-np.inf, np.inf)), ((bias, residual), (-np.inf, 1.0)), ((bias, None), (-0.5, 0.5))):
        exact = oracle.gemm(x, weight, *terms, clip=clip)
        for form in GEMM_FORMATS:
            layer = native.gemm(m, k, csr.pack(weight), format=form, isa=isa)
            guarded = np.full(batch * m + 65, 77.0, np.float32)
            y = guarded[33:-32].reshape(batch, m)
            y[...] = np.nan if terms[1] is None else residual
            at = [int(cut * layer.parts(batch)) for cut in cuts]
            layer.run(x, terms[0], None if terms[1] is None else y, minimum=clip[0], maximum=clip[1], cuts=at, out=y)
            assert np.abs(y - exact).max() <= oracle.tolerance(weight, x, *terms), (form, isa, terms[0] is not None)
            assert (guarded[:33] == 77).all() and (guarded[-32:] == 77).all()


@settings(max_examples=100, deadline=None)
@given(batch=st.integers(1, 150), k=st.integers(1, 1100), m=st.integers(1, 70), density=st.floats(0, 1), seed=st.integers(0, 99),
       isa=st.sampled_from(ISAS), cuts=st.lists(st.floats(0, 1), max_size=3))  # fmt: skip
def test_gemm_any_size(batch, k, m, density, seed, isa, cuts) -> None:  # type: ignore[no-untyped-def]
    check_gemm(batch, k, m, isa, density=density, seed=seed, cuts=tuple(cuts))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 8, 9])
def test_gemm_batch_around_every_tile(isa: str, vectors: int, offset: int, density: float) -> None:
    """Row counts just below, at and above whole vectors and tiles; K and M primes; empty rows, all zero, all dense."""
    check_gemm(vectors * LANES[isa] + offset, 257, 37, isa, density=density, cuts=(0.4,))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 63, 64, 65, 66, 67, 68, 131])
def test_gemm_blocks_of_columns_stick_out(isa: str, k: int) -> None:
    for batch in (1, 2, LANES[isa] + 1):
        check_gemm(batch, k, 11, isa, density=1.0)
        check_gemm(batch, k, 11, isa, density=0.3)


@pytest.mark.parametrize("isa", ISAS)
def test_gemm_more_columns_than_16_bits_and_more_rows_than_a_chunk(isa: str) -> None:
    for batch in (1, 3, 40):
        check_gemm(batch, 2**17 + 77, 5, isa, density=0.001)
        check_gemm(batch, 67, 7001, isa, density=0.02, cuts=(0.1, 0.9))


@pytest.mark.parametrize("form", GEMM_FORMATS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [1, 5, 67])
def test_gemm_does_not_depend_on_the_split(isa: str, form: str, batch: int) -> None:
    rng = np.random.default_rng(0)
    weight, x = sparse(rng, (83, 1301), 0.1), rng.standard_normal((batch, 1301)).astype(np.float32)
    bias, residual = rng.standard_normal(83).astype(np.float32), rng.standard_normal((batch, 83)).astype(np.float32)
    layer = native.gemm(83, 1301, csr.pack(weight), format=form, isa=isa)
    whole = layer.run(x, bias, residual, minimum=0)
    assert np.array_equal(whole, layer.run(x, bias, residual, minimum=0, cuts=range(1, layer.parts(batch))))
    assert np.array_equal(whole, layer.run(x, bias, out := residual.copy(), minimum=0, out=out)), "y may be the residual itself"


@pytest.mark.parametrize("form", GEMM_FORMATS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_gemm_nan_passes_the_clip_of_its_own_row_only(isa: str, form: str, batch: int) -> None:
    x = np.ones((batch, 19), np.float32)
    x[-1] = np.nan
    y = native.gemm(21, 19, csr.pack(np.ones((21, 19), np.float32)), format=form, isa=isa).run(x, minimum=0.0, maximum=20.0)
    assert np.isnan(y[-1]).all() and (y[:-1] == 19).all()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_negative_control(isa: str, form: str) -> None:
    """The comparison can fail: one weight off by a thousandth of the largest is noticed."""
    shape = ConvShape(16, 14, 14, 8, 3, 3, pad_top=1, pad_left=1, pad_bottom=1, pad_right=1)
    weight, x, _, _ = conv_case(shape, 1, 0.3)
    wrong = weight.copy()
    wrong[tuple(np.argwhere(weight)[0])] += 1e-3 * np.abs(weight).max()
    y = native.conv2d(shape, csr.pack(wrong), format=form, isa=isa).run(x)
    assert np.abs(y - exact_conv(shape, weight, x, clip=(-np.inf, np.inf))).max() > oracle.tolerance(weight, x)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_result_does_not_depend_on_the_split_or_the_run(isa: str, form: str) -> None:
    shape = ConvShape(40, 30, 30, 70, 3, 3, pad_top=1, pad_left=1, pad_bottom=1, pad_right=1)
    weight, x, bias, residual = conv_case(shape, 2, 0.1)
    layer = native.conv2d(shape, csr.pack(weight), format=form, isa=isa)
    whole = layer.run(x, bias, residual, minimum=0)
    assert np.array_equal(whole, layer.run(x, bias, residual, minimum=0))
    assert np.array_equal(whole, layer.run(x, bias, residual, minimum=0, cuts=range(1, layer.parts(2))))
    assert np.array_equal(whole, layer.run(x, bias, out := residual.copy(), minimum=0, out=out)), "y may be the residual itself"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_misaligned_buffers_and_nothing_written_outside(isa: str, form: str) -> None:
    """Pointers on 4-byte boundaries only; guard floats around the output survive."""
    shape = ConvShape(7, 13, 11, 9, 3, 3, pad_top=1, pad_left=1, pad_bottom=1, pad_right=1)
    weight, x, bias, _ = conv_case(shape, 1, 0.4)
    shifted = np.empty(x.size + 1, np.float32)[1:].reshape(x.shape)
    shifted[...] = x
    guarded = np.full(shape.out_channels * shape.out_h * shape.out_w + 65, 77.0, np.float32)
    out = guarded[33:-32].reshape(1, shape.out_channels, shape.out_h, shape.out_w)
    native.conv2d(shape, csr.pack(weight), format=form, isa=isa).run(shifted, bias, out=out)
    assert np.abs(out - exact_conv(shape, weight, x, bias, clip=(-np.inf, np.inf))).max() <= oracle.tolerance(weight, x, bias)
    assert (guarded[:33] == 77).all() and (guarded[-32:] == 77).all()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_nan_in_the_input_is_not_hidden_by_the_clip(isa: str, form: str) -> None:
    x = np.full((1, 1, 1, 9), np.nan, np.float32)
    layer = native.conv2d(ConvShape(1, 1, 9, 1, 1, 1), csr.pack(np.ones((1, 1, 1, 1), np.float32)), format=form, isa=isa)
    assert np.isnan(layer.run(x, minimum=0.0)).all()
