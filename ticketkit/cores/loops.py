"""What the kernels' inner loops do, in operations: for one entry of a weight (a non-zero, or a block of them) and for one visit of a row.

Counted in `kernels/algo/*-inl.h` and in what compilers make of it, by two ways of handing a weight to a multiply-add: *broadcast* from
memory (x86, where multiply-adds also load their second operand), and *by lane* (NEON: one load brings the weights of four entries, and
pairs of vectors are loaded by one instruction). The loops' cycles are the same on any data, so they can be checked: against `llvm-mca`
(benchmarks/results/mca.jsonl) and against measurements (benchmarks/results/layers.jsonl), both in tests/test_cores.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ticketkit.cores import Core

BLOCK_ROWS = 4  # of a BSR block, kBlockRows of kernels/packed.h
DEPTHWISE_VECTORS = 4  # kDepthwiseVectors


@dataclass(frozen=True)
class Ops:
    """So many operations.

    Attributes:
        instructions: all of them, as the front end counts: a multiply-add that loads is one, a load of a pair too.
        fma: multiply-adds and other arithmetic of whole vectors.
        loads, stores: of whole vectors, or of single numbers, which take the same slot on every core here.
        chain: dependent multiply-adds, each waiting for the one before; 0 where they do not matter.
    """

    instructions: float = 0.0
    fma: float = 0.0
    loads: float = 0.0
    stores: float = 0.0
    chain: float = 0.0

    def __add__(self, other: Ops) -> Ops:
        return Ops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Ops)))

    def __mul__(self, times: float) -> Ops:
        return Ops(*(getattr(self, f.name) * times for f in fields(Ops)))


def cycles(core: Core, ops: Ops) -> float:
    """Cycles on a core, everything in L1.

    Out of order the busiest of its resources decides. In order the pipes wait for each other: loads, arithmetic and stores add up, and only
    the bookkeeping between them goes along in the second slot.
    """
    loads, fma, stores = ops.loads / core.loads, ops.fma / core.fma, ops.stores / core.stores
    issue = ops.instructions / core.instructions
    if core.in_order:
        return max(loads + fma + stores, issue, ops.chain * core.fma_latency)
    return max(loads, fma, stores, issue, ops.chain * core.fma_latency) / core.sustained


def chains(vectors: int) -> int:
    """Sums at once in CSR, as in kernels/algo: narrow tiles would else wait for each multiply-add."""
    return 1 if vectors >= 6 else 2 if vectors >= 3 else 4


def csr(core: Core, vectors: int) -> Ops:
    """One non-zero times so many vectors of pixels, or of rows of batch."""
    at_once = chains(vectors)
    if core.weights_by_lane > 1:
        pairs = vectors // 2 + vectors % 2 if core.pairs else vectors
        of_weight = 1 / core.weights_by_lane
        return Ops(vectors + pairs + 2 + 3 * of_weight, vectors, vectors + 1 + of_weight, 0.0, 1 / at_once)
    return Ops(vectors + 3 + 2 / at_once, vectors, vectors + 2, 0.0, 1 / at_once)


def bsr(core: Core, vectors: int) -> Ops:
    """One block of four output rows x one column times so many vectors: each is loaded once."""
    fma = BLOCK_ROWS * vectors
    if core.weights_by_lane > 1:
        pairs = vectors // 2 + vectors % 2 if core.pairs else vectors
        moved = BLOCK_ROWS  # compilers copy each weight to a register of its own, in the multiply-adds' pipes
        return Ops(fma + moved + pairs + 4, fma + moved, vectors + 2, 0.0, 1.0)
    return Ops(fma + vectors + BLOCK_ROWS + 4, fma, vectors + BLOCK_ROWS + 1, 0.0, 1.0)


def depthwise(core: Core, weights: float) -> Ops:
    """`DEPTHWISE_VECTORS` vectors of output, of so many weights that wait in registers: loads, multiply-adds, clip, store."""
    v = DEPTHWISE_VECTORS
    loaded = 0 if core.fused_loads else weights * v
    return Ops(weights * v + loaded + 8 * v + 4, weights * v + 2 * v, weights * v + 3 * v, v, weights)


def dense(core: Core) -> Ops:
    """One step of the reduction of a dense product's register tile, as BLAS-like engines have it: `core.dense_tile` rows x vectors."""
    rows, vectors = core.dense_tile
    weights = rows / core.weights_by_lane if core.weights_by_lane > 1 else rows
    loads = vectors + weights
    moved = loads if core.weights_by_lane > 1 else vectors  # x86 broadcasts in the multiply-add's own load, once for a row
    return Ops(rows * vectors + moved + rows * (core.weights_by_lane == 1) + 1, rows * vectors, loads, 0.0, 1.0)


def dot(core: Core, columns: int) -> Ops:
    """One entry of `columns` weights (CSR 1, 1x4 blocks 4) of a product of a single row: a lane each, inputs gathered."""
    lanes = core.vectors.lanes
    entries = max(lanes // columns, 1)  # in one vector
    gathered = Ops(2 * lanes, 0.5 * lanes, lanes, 0, 0) if columns == 1 else Ops(2 * entries, 0.5 * entries, entries, 0, 0)
    whole = gathered + Ops(4, 1, 2 + (lanes // 4 if columns == 1 else entries), 0.0, 0.5)
    return whole * (1 / entries)


def visit(core: Core, vectors: int, first: bool, last: bool, rows: int = 1) -> Ops:
    """Beginning and end of a row of a tile in one block of channels, or of a unit of `rows` of them: accumulators are set from the bias or
    loaded, and clipped and written, or stored."""
    v = rows * vectors
    begin = Ops(v / 2, 0.0, 1.0) if first else Ops(v / (2 if core.pairs else 1), 0.0, v)
    prefetches = v * core.vectors.lanes * 4 / core.line
    end = Ops(3 * v + 14 * rows + prefetches, 2 * v, prefetches, v) if last else Ops(v / (2 if core.pairs else 1), 0.0, 0.0, v)
    return Ops(14 + 2 * rows, 0.0, 3.0) + begin + end


def fill(core: Core, stride: int) -> Ops:
    """One vector of a strip: its place and mask are looked up, it is loaded, masked and stored; of every other pixel two are loaded and
    shuffled, of fewer each pixel by itself."""
    if stride > 2:
        return Ops(4 * core.vectors.lanes, 0, core.vectors.lanes, core.vectors.lanes)
    return Ops(10, 1, 5, 1) if stride == 1 else Ops(13, 3, 6, 1)


def piece() -> Ops:
    """What a short piece costs, of a row to be gathered or written, beside its vectors."""
    return Ops(40, 0, 4, 2)
