"""The time of a layer on a core (`ticketkit.cores.Core`), from what the kernels do there: *simulated*, nothing is run.

How a layer is cut up for the core's vectors comes from the library itself (`native.cut_conv2d`), operations of the loops from `loops`, and
data that is not in L1 costs its bytes over the bandwidth of the level it is in. A layer takes

    entries x vectors in the inner loop  +  visits of rows  +  filling of strips  +  transfers,

where out-of-order cores hide transfers behind the rest as far as they are no longer than it, and in-order cores hide nothing.

What is left out: address translation, associativity of caches, prefetchers that fail, other cores, heat. Dense layers are those of an
engine whose register tile (`Core.dense_tile`) runs at `Core.dense_sustained` of its rate and passes its operands once.
"""

from __future__ import annotations

from math import ceil, prod

from ticketkit import cost
from ticketkit.cores import Core, loops
from ticketkit.cores.loops import Ops, cycles
from ticketkit.cost import DENSE
from ticketkit.lower import Layer
from ticketkit.runtime import native
from ticketkit.runtime.geometry import ConvShape, Cut

UNITS = {"csr": (1, 1), "bsr": (4, 1), "bsr1x4": (1, 4)}  # rows and columns of an entry
MISSED = 0.5  # of the ends of rows, whose lengths differ: share that a branch predictor guesses wrong
L1_USED = 0.9  # of L1, before what a tile reads over and over begins to fall out of it


def predict_us(core: Core, layer: Layer, format: str, values: int | None = None) -> float | None:
    """Time of a layer on a core in µs; None if its size is unknown.

    Args:
        format: "dense", or one that the layer's operator has kernels for.
        values: that the format stores; None: those of the layer's weight.

    Raises:
        KernelError: the kernels refuse such a layer.
    """
    size = cost.Size.of(layer)
    if size is None or layer.uses is None:
        return None
    stored = cost.stored(layer, format) if values is None else values
    if format == DENSE:
        return core.us(dense(core, stored * layer.uses, prod(size.x), prod(size.y), layer.weight.size, depthwise=layer.depthwise))
    if size.operator == "Gemm":
        rows, cols = size.weight
        return core.us(gemm(core, rows, cols, prod(size.y[:-1]), format, stored))
    return core.us(conv2d(core, geometry(layer), size.x[0], format, stored))


def geometry(layer: Layer) -> ConvShape:
    """Of a convolution of known size, tensors in planes."""
    assert layer.x_shape is not None
    _, channels, height, width = layer.x_shape
    out_channels, _, kernel_h, kernel_w = layer.weight.shape
    strides, (top, left, bottom, right), dilations = (layer.window[key] for key in ("strides", "pads", "dilations"))
    return ConvShape(
        channels, height, width, out_channels, kernel_h, kernel_w, strides[0], strides[1], top, left, bottom, right, dilations[0],
        dilations[1], layer.group,
    )  # fmt: skip


def conv2d(core: Core, shape: ConvShape, images: int, format: str, stored: int) -> float:
    """Cycles of a convolution in our kernels with so many stored values."""
    cut = native.cut_conv2d(shape, stored, format, core.vectors)
    if shape.groups > 1:
        return images * _depthwise(core, shape, cut, stored) + core.call
    entries, (unit_rows, _) = stored / prod(UNITS[format]), UNITS[format]
    loop = loops.bsr if format == "bsr" else loops.csr
    split = _split(core, cut.misaligned_taps / cut.taps)
    work = visits = 0.0
    for tiles, vectors in _tiles(cut):
        per_entry = cycles(core, loop(core, vectors) + Ops(loads=split * vectors))
        work += tiles * entries * per_entry
        visits += tiles * cut.units * _visits(core, vectors, cut.blocks, unit_rows)
    lanes = core.vectors.lanes
    filled = cut.filled / lanes * cycles(core, loops.fill(core, shape.stride_w)) + cut.pieces * cycles(core, loops.piece())
    written = cut.spans * shape.out_channels * cycles(core, loops.piece())
    x, y = shape.in_channels * shape.in_h * shape.in_w, shape.out_channels * shape.out_h * shape.out_w
    weights = stored * 4 + entries * 2
    work += _over(core, entries * cut.vectors * lanes * 4 * _l1_misses(core, 4 * cut.window), 1)
    moved = (
        _streamed(core, weights, cut.tiles)
        + _over(core, 2 * 4 * (cut.blocks - 1) * cut.vectors * lanes * cut.units * unit_rows, _level(core, 4 * cut.waiting))
    )
    level = _level(core, 4 * (x + y))
    gathered = filled + (_over(core, 4 * x, level) if cut.filled else 0.0)
    moved += _over(core, 2 * 4 * y, level) + (0.0 if cut.filled else _over(core, 4 * x, level))
    return images * (_together(core, work + visits + written, moved) + gathered) + core.call


def gemm(core: Core, rows: int, cols: int, batch: int, format: str, stored: int) -> float:
    """Cycles of a product of `batch` rows in our kernels with so many stored values."""
    unit_rows, unit_columns = UNITS[format]
    entries, lanes = stored / (unit_rows * unit_columns), core.vectors.lanes
    bytes_of = stored * 4 + entries * 2
    if batch == 1:
        per_entry = cycles(core, _dot(core, format))
        ends = ceil(rows / unit_rows) * (cycles(core, Ops(30, 8, 8, 1)) + MISSED * core.mispredict)
        return _together(core, entries * per_entry + ends, _streamed(core, bytes_of, 1)) + core.call
    cut = native.cut_gemm(rows, cols, stored, format, core.vectors, batch)
    loop = loops.bsr if format == "bsr" else loops.csr
    per_entry = cycles(core, loop(core, cut.tile_vectors)) * unit_columns
    work = cut.tiles * entries * per_entry
    visits = cut.tiles * cut.units * _visits(core, cut.tile_vectors, cut.blocks, unit_rows, gemm=True)
    transposed = (cut.filled + cut.tiles * cut.tile_vectors * lanes * rows) / lanes * cycles(core, Ops(6, 3, 1, 1))
    work += _over(core, entries * unit_columns * cut.vectors * lanes * 4 * _l1_misses(core, 4 * cut.window), 1)
    moved = (
        _streamed(core, bytes_of, cut.tiles)
        + _over(core, 2 * 4 * cut.blocks * cut.vectors * lanes * rows, _level(core, 4 * cut.waiting))
    )
    return _together(core, work, moved) + visits + _together(core, transposed, _passed(core, batch * cols, batch * rows)) + core.call


def dense(core: Core, madds: int, x: int, y: int, weights: int, depthwise: bool = False) -> float:
    """Cycles of a layer of a dense engine: so many multiply-adds, numbers of input, output and weight."""
    lanes = core.vectors.lanes
    if depthwise:  # no reuse of loads between outputs: bound by them
        ops = loops.depthwise(core, 9) * (1 / (9 * loops.DEPTHWISE_VECTORS))
        return _together(core, madds / lanes * cycles(core, ops), _passed(core, x, y)) + core.call
    rows, vectors = core.dense_tile
    step = cycles(core, loops.dense(core)) * core.sustained / core.dense_sustained
    work = madds / (rows * vectors * lanes) * step
    return _together(core, work, _over(core, 4 * weights, _level(core, 4 * (weights + x)))) + _passed(core, x, y) + core.call


def loop_cycles(core: Core, format: str, vectors: int) -> float:
    """Cycles of the inner loop for one non-zero times one pixel, in tiles of so many vectors, everything in L1 and aligned."""
    loop, pixels = (loops.bsr if format == "bsr" else loops.csr), vectors * core.vectors.lanes
    return cycles(core, loop(core, vectors)) / (pixels * UNITS[format][0])


# Parts ------------------------------------------------------------------------------------------------------------------------


def _depthwise(core: Core, shape: ConvShape, cut: Cut, stored: int) -> float:
    """Cycles of one image of a depthwise convolution, whose cut is that of a channel."""
    lanes, channels, weights = core.vectors.lanes, shape.out_channels, stored / shape.out_channels
    groups = ceil(cut.vectors / loops.DEPTHWISE_VECTORS)
    split = _split(core, cut.misaligned_taps / cut.taps) * loops.DEPTHWISE_VECTORS * weights
    work = groups * cycles(core, loops.depthwise(core, weights) + Ops(loads=split))
    fill = cut.filled / lanes * cycles(core, loops.fill(core, shape.stride_w))
    visit = cut.tiles * (cycles(core, Ops(60 + 3 * weights, 0, 30, 4)) + 2 * MISSED * core.mispredict)
    x, y = shape.in_channels * shape.in_h * shape.in_w, channels * shape.out_h * shape.out_w
    return _together(core, channels * (work + fill + visit), _passed(core, x, y))


def _tiles(cut: Cut) -> list[tuple[int, int]]:
    """(number, vectors) of the whole tiles and of the last one."""
    last = cut.vectors - (cut.tiles - 1) * cut.tile_vectors
    return [(cut.tiles - 1, cut.tile_vectors), (1, last)]


def _visits(core: Core, vectors: int, blocks: int, rows: int, gemm: bool = False) -> float:
    """Cycles of all the visits of one unit of a tile: once for each block."""
    total = 0.0
    for first, last, times in ((True, blocks == 1, 1), (False, False, blocks - 2), (False, True, 1)):
        if times > 0 and (blocks > 1 or first):
            total += times * cycles(core, loops.visit(core, vectors, first, last and not gemm, rows))
    waits = core.fma_latency if not core.in_order else 2 * core.fma_latency
    return total + blocks * (waits + MISSED * core.mispredict)


def _dot(core: Core, format: str) -> Ops:
    if format == "bsr":  # the four rows in a vector
        return Ops(6, 2, 3, 0.0, 0.5)
    return loops.dot(core, UNITS[format][1])


def _split(core: Core, misaligned: float) -> float:
    """Load slots lost for each load of a loop of which so large a share begins in the middle of a vector."""
    return misaligned * min(core.vectors.lanes * 4 / core.line, 1.0) * core.split


def _l1_misses(core: Core, bytes: float) -> float:
    """Share of loads that miss L1 where so many bytes are read over and over, in any order."""
    return max(0.0, 1 - L1_USED * core.caches[0].bytes / bytes) if bytes else 0.0


def _level(core: Core, bytes: float) -> int:
    """The cache level that holds so many bytes; the number of levels stands for memory."""
    return sum(level.bytes < bytes for level in core.caches)


def _over(core: Core, bytes: float, level: int) -> float:
    """Cycles to bring so many bytes from a level to L1; 0 from L1 itself."""
    if level == 0 or not bytes:
        return 0.0
    if level < len(core.caches):
        return bytes / core.caches[level].bytes_per_cycle
    return bytes / (core.memory_gb / core.ghz)


def _streamed(core: Core, bytes: float, times: int) -> float:
    """Cycles to read the same bytes so many times, first from where a network of their size leaves them."""
    again = _level(core, 2 * bytes)
    return _over(core, bytes, max(again, len(core.caches) - 1)) + (times - 1) * _over(core, bytes, again)


def _passed(core: Core, x: float, y: float) -> float:
    """Cycles to read an input and to write an output, in floats: from where the layer before has left it, and where it goes."""
    level = _level(core, 4 * (x + y))
    return _over(core, 4 * (x + 2 * y), level)  # what is written is fetched first


def _together(core: Core, work: float, transfers: float) -> float:
    """Cycles of work and transfers at once, or one after the other."""
    return work + transfers if core.in_order else max(work, transfers)
