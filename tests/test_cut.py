"""How layers would be cut up (tk_conv2d_cut, tk_gemm_cut), against what packing does with them on this machine."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ticketkit.errors import KernelError
from ticketkit.formats import csr
from ticketkit.runtime import native
from ticketkit.runtime.geometry import ConvShape, Cut, Tuning, Vectors

USABLE = [isa for isa in native.isas() if isa.usable]
SIZES = st.sampled_from([1, 2, 3, 5, 7, 8, 14, 17, 28, 33, 56])


def up(x: int, to: int) -> int:
    return -(-x // to) * to


@st.composite
def shapes(draw: st.DrawFn) -> ConvShape:
    k, s, d = draw(st.sampled_from([1, 1, 3, 5])), draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 1, 2]))
    side, channels, out = draw(SIZES), draw(st.sampled_from([1, 3, 16, 40, 130])), draw(st.sampled_from([1, 4, 17, 64]))
    pad = d * (k - 1) // 2
    return ConvShape(channels, side, side, out, k, k, s, s, pad, pad, pad, pad, d, d)


def bytes_of(cut: Cut, stored: int, entry: int, header: int) -> int:
    """Of the packed form (packed.h): header, strips, row pointers, values, offsets."""
    pointers = 4 * cut.blocks * (cut.units + 1)
    return header + up(28 * cut.strips, 64) + up(pointers, 64) + up(4 * stored, 64) + up(2 * stored // entry, 64)


def weight(rng: np.random.Generator, *shape: int) -> csr.Parts:
    return csr.pack(rng.standard_normal(shape, dtype=np.float32) * (rng.random(shape) < 0.3))


def header(isa: str) -> int:
    one = native.conv2d(ConvShape(1, 1, 1, 1, 1, 1), csr.pack(np.ones((1, 1, 1, 1), np.float32)), isa=isa)
    return int(one.packed.nbytes) - 4 * 64


@pytest.mark.parametrize("isa", USABLE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("format", ["csr", "bsr"])
@given(shape=shapes(), tuned=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_convolution_is_packed_as_its_cut_says(isa: native.Isa, format: str, shape: ConvShape, tuned: bool) -> None:
    tuning = Tuning(tile_vectors=3, block_channels=5, group_tiles=2) if tuned else Tuning(group_tiles=1)
    parts = weight(np.random.default_rng(0), shape.out_channels, shape.in_channels, shape.kernel_h, shape.kernel_w)
    layer = native.conv2d(shape, parts, format=format, isa=isa.name, tuning=tuning)
    stored = native.stored_values(shape.out_channels, shape.cols, parts, format)
    cut = native.cut_conv2d(shape, stored, format, native.vectors(isa.name), tuning)
    assert layer.packed.nbytes == bytes_of(cut, stored, 4 if format == "bsr" else 1, header(isa.name))
    assert layer.parts(1) == cut.tiles * ceil(shape.out_channels / 16)
    assert (cut.tiles - 1) * cut.tile_vectors < cut.vectors <= cut.tiles * cut.tile_vectors
    assert cut.vectors == -(-shape.out_h * cut.pitch // isa.lanes)
    if cut.group_tiles == 1:  # else the strips of a group lie further apart
        assert layer.workspace_bytes == up(4 * (up(cut.window + isa.lanes, 16) + cut.waiting), 64)
        filled = cut.tiles * cut.window // cut.block_channels * shape.in_channels
        assert cut.filled == (0 if cut.in_place else filled)


@pytest.mark.parametrize("isa", USABLE, ids=lambda isa: isa.name)
def test_tiles_in_memory_are_read_in_place(isa: native.Isa) -> None:
    for format in ("csr", "bsr"):
        shape = ConvShape(40, 28, 28, 24, 1, 1, x_layout=format, y_layout="bsr" if format == "csr" else "csr")
        cut = native.cut_conv2d(shape, 300, format, native.vectors(isa.name))
        tile = native.tile_pixels(format, 28 * 28, isa.name)
        assert (cut.in_place, cut.tile_vectors * isa.lanes) == (1, tile)
        assert cut.filled <= 40 * tile and cut.spans > cut.tiles  # the last tile, if it is shorter; rows for tiles of another width
        same = native.cut_conv2d(replace(shape, y_layout=format), 300, format, native.vectors(isa.name))
        assert same.spans == 0


@pytest.mark.parametrize("isa", USABLE, ids=lambda isa: isa.name)
@pytest.mark.parametrize(("kernel", "stride", "side"), [(3, 1, 28), (3, 2, 56), (5, 2, 28), (3, 1, 7), (3, 1, 130)])
def test_a_depthwise_convolution(isa: native.Isa, kernel: int, stride: int, side: int) -> None:
    pad = kernel // 2
    shape = ConvShape(8, side, side, 8, kernel, kernel, stride, stride, pad, pad, pad, pad, groups=8)
    cut = native.cut_conv2d(shape, 70, "csr", native.vectors(isa.name))
    layer = native.conv2d(shape, weight(np.random.default_rng(0), 8, 1, kernel, kernel), isa=isa.name)
    assert layer.parts(1) == 8 == cut.units
    assert cut.vectors == shape.out_h * -(-shape.out_w // isa.lanes)
    assert cut.filled == cut.tiles * cut.window and 4 * cut.window < layer.workspace_bytes


@pytest.mark.parametrize("isa", USABLE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("format", ["csr", "bsr", "bsr1x4"])
@given(rows=st.integers(1, 300), cols=st.integers(1, 700), batch=st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_a_product_is_packed_as_its_cut_says(isa: native.Isa, format: str, rows: int, cols: int, batch: int) -> None:
    parts = weight(np.random.default_rng(0), rows, cols)
    layer = native.gemm(rows, cols, parts, format=format, isa=isa.name)
    cut = native.cut_gemm(rows, cols, len(parts["values"]), format, native.vectors(isa.name), batch)
    assert layer.parts(batch) == (cut.tiles if batch > 1 else 1) * ceil(rows / 16)
    assert cut.units == (ceil(rows / 4) if format == "bsr" else rows)
    if batch > 1:
        assert cut.tiles * cut.tile_vectors * isa.lanes >= batch > (cut.tiles - 1) * cut.tile_vectors * isa.lanes
        assert cut.window * cut.blocks >= cols * cut.tile_vectors * isa.lanes
        assert 4 * cut.window <= layer.workspace_bytes


def test_planes_read_in_place_are_not_copied() -> None:
    """Where each channel has few uses, and only there."""
    shape, neon = ConvShape(96, 28, 28, 128, 1, 1), Vectors(4, 32, 20, 20, 6, 1, 4)
    few, many = (native.cut_conv2d(shape, 96 * uses, "csr", neon) for uses in (4, 64))
    assert (few.in_place, few.filled) == (1, 0) and (many.in_place, many.filled) == (0, 96 * 4 * 20 * many.tiles)
    assert native.cut_conv2d(shape, 96 * 4, "csr", replace(neon, reads_planes=0)).filled > 0


def test_wider_registers_change_the_cut() -> None:
    """A negative control: the numbers do depend on the processor."""
    shape = ConvShape(64, 28, 28, 64, 3, 3, 1, 1, 1, 1, 1, 1)
    on = {(lanes, n): Vectors(lanes, n, 14, 10, (n - 1) // 5, 0, 4) for lanes in (4, 8) for n in (16, 32)}
    cuts = {key: native.cut_conv2d(shape, 9000, "bsr", vectors) for key, vectors in on.items()}
    assert len({(cut.tile_vectors, cut.vectors) for cut in cuts.values()}) == 4
    assert cuts[8, 16].tile_vectors < cuts[8, 32].tile_vectors and cuts[4, 32].vectors > cuts[8, 32].vectors


BAD = [
    (0, 32, 14, 10, 6, 0, 4),
    (3, 32, 14, 10, 6, 0, 4),
    (32, 32, 14, 10, 6, 0, 4),
    (-4, 32, 14, 10, 6, 0, 4),
    (4, 7, 14, 10, 6, 0, 4),
    (4, 33, 14, 10, 6, 0, 4),
    (4, 32, 21, 10, 6, 0, 4),
    (4, 32, 14, 15, 6, 0, 4),
    (4, 32, 14, 10, 0, 0, 4),
    (4, 32, 14, 10, 21, 0, 4),
    (4, 32, 14, 10, 6, 2, 4),
    (4, 32, 14, 10, 6, 0, 8),
]


@pytest.mark.parametrize("numbers", BAD, ids=str)
def test_vectors_that_are_none(numbers: tuple[int, ...]) -> None:
    with pytest.raises(KernelError, match="cut"):
        native.cut_conv2d(ConvShape(1, 1, 1, 1, 1, 1), 1, "csr", Vectors(*numbers))
    with pytest.raises(KernelError, match="cut"):
        native.cut_gemm(4, 4, 4, "csr", Vectors(*numbers), 2)


HOSTILE = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([-1, 0, 1, 2, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32, 2**62])


@given(
    st.lists(HOSTILE, min_size=16, max_size=16),
    st.sampled_from(["csr", "bsr", "bsr1x4"]),
    st.sampled_from([(4, 32, 20, 20, 6, 1, 4), (16, 32, 14, 10, 6, 0, 4), (1, 8, 1, 1, 1, 1, 2)]),
)
@settings(max_examples=300, deadline=None)
def test_any_numbers_at_all(numbers: list[int], format: str, vectors: tuple[int, ...]) -> None:
    """Refused in one line, or an answer; never a crash."""
    for call in (
        lambda: native.cut_conv2d(ConvShape(*numbers[:15]), numbers[15], format, Vectors(*vectors)),
        lambda: native.cut_gemm(*numbers[:3], format, Vectors(*vectors), numbers[3]),
    ):
        try:
            cut = call()
        except KernelError as error:
            assert "\n" not in str(error)
        else:
            assert cut.tiles >= 1 and cut.blocks >= 1 and cut.filled >= 0
