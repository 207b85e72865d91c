"""Searches, on this machine, how each sparse convolution of a plan is best cut up, and measures whether the whole model gains.

Both compare in turns, a pair of runs after the other, and go by the median of the pairs' ratios: this stays true on a machine whose
speed wanders. A cut is taken only if it is clearly faster than the library's own choice, which every other machine uses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ticketkit.formats import csr
from ticketkit.lower import Layer, Network
from ticketkit.planner import Choice, Plan
from ticketkit.runtime import native, ort
from ticketkit.runtime.geometry import ConvShape, Tuning

GAIN = 0.95  # of the time of the best so far: what a cut must get below
PAIRS = 7
TILES = {"csr": (4, 5, 6, 7, 10, 12, 14), "bsr": (1, 2, 3, 4, 5, 6)}
NEON_TILES = {**TILES, "csr": (*TILES["csr"], 17, 20)}  # x86 takes no wider ones than 14
BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16)  # the input channels in so many blocks
GROUPS = (1, 2, 4, 1000)

Run = Callable[[], object]


def tune(network: Network, plan: Plan, seconds: float, progress: Callable[[str], None] | None = None) -> Plan:
    """The plan with the fastest cut found for each sparse convolution, for images of the size it was planned for, on one thread.

    Args:
        network, plan: what to tune.
        seconds: when to stop at the latest; layers not reached by then keep the library's choice.
        progress: called with the name of each layer before its turn.
    """
    layers = {layer.name: layer for layer in network.layers}
    end = time.monotonic() + seconds
    choices = []
    for choice in plan.choices:
        layer = layers[choice.name]
        if choice.format in TILES and choice.kernel.startswith("conv2d") and layer.x_shape and time.monotonic() < end:
            if progress:
                progress(choice.name)
            choice = replace(choice, tuning=_search(layer, choice, end))  # noqa: PLW2901
        choices.append(choice)
    return replace(plan, choices=tuple(choices))


def speedup(dense: bytes, sparse: bytes, feeds: dict[str, NDArray[Any]], seconds: float = 2.0) -> float:
    """Time of a dense model in stock onnxruntime over that of its sparse export, one thread each: the median over alternating pairs."""

    def session(model: bytes, register: bool) -> Run:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        if register:
            ort.register(options)
        made = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda: made.run(None, feeds)

    slow, fast = session(dense, False), session(sparse, True)
    end, pairs = time.monotonic() + seconds, PAIRS
    ratios: list[float] = []
    while len(ratios) < pairs or (time.monotonic() < end and len(ratios) < 20 * pairs):
        ratios.append(_ratio(slow, fast, len(ratios) % 2 == 1))
    return float(np.median(ratios))


def _search(layer: Layer, choice: Choice, end: float) -> tuple[int, ...]:
    """The attribute `tuning` of a node, all zero where nothing beats the library's choice."""
    shape = _shape(layer)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, shape.in_channels, shape.in_h, shape.in_w), dtype=np.float32)
    y = np.empty((1, shape.out_channels, shape.out_h, shape.out_w), np.float32)
    bias, parts = np.zeros(shape.out_channels, np.float32), csr.pack(layer.weight)

    def prepared(tuning: Tuning) -> Run:
        packed = native.conv2d(shape, parts, format=choice.format, tuning=tuning)
        scratch = native.aligned(packed.workspace_bytes)
        return lambda: packed.run(x, bias, minimum=0.0, out=y, workspace=scratch)

    best = Tuning()
    fastest = prepared(best)
    sizes = sorted({-(-shape.in_channels // count) for count in BLOCKS if count <= shape.in_channels})
    tiles = NEON_TILES if native.active_isa().name.startswith("neon") else TILES
    for field, values in (("tile_vectors", tiles[choice.format]), ("block_channels", sizes), ("group_tiles", GROUPS)):
        for value in values:
            if time.monotonic() > end:
                break
            tuning = replace(best, **{field: value})
            run = prepared(tuning)
            if np.median([_ratio(run, fastest, i % 2 == 1) for i in range(PAIRS)]) < GAIN:
                best, fastest = tuning, run
    if best == Tuning():
        return (0,) * 6
    return (native.active_isa().lanes, shape.in_h, shape.in_w, best.tile_vectors, best.block_channels, best.group_tiles)


def _ratio(a: Run, b: Run, backwards: bool) -> float:
    """Time of a over time of b, once each, after a run of each that warms the caches."""
    seconds = {}
    for name, run in (("b", b), ("a", a)) if backwards else (("a", a), ("b", b)):
        run()
        start = time.perf_counter()
        run()
        seconds[name] = time.perf_counter() - start
    return seconds["a"] / seconds["b"]


def _shape(layer: Layer) -> ConvShape:
    assert layer.x_shape is not None
    m, c, kh, kw = layer.weight.shape
    window: Any = [*layer.window["strides"], *layer.window["pads"], *layer.window["dilations"]]
    return ConvShape(c, layer.x_shape[2], layer.x_shape[3], m, kh, kw, *window)
