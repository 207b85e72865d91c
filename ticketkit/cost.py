"""The cost model: how long a layer is predicted to take in each format, from counts of what its kernel does.

A prediction is a sum of counts times coefficients, ns each on one core, linear, so that it can be fitted to measurements by non-negative
least squares: `benchmarks/fit.py` does it and writes `cost.json`. Absolute times belong to the machine named there; what decides
between formats is their ratio, which moves less from processor to processor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np

from ticketkit.formats import bsr
from ticketkit.lower import Layer

DENSE = "dense"
TILE = {"csr": 80, "bsr": 24, "bsr1x4": 80}  # pixels or batch rows of one tile: 10 and 3 vectors of 8 lanes
BLOCK = {"csr": 32 * 1024, "bsr": 96 * 1024, "bsr1x4": 32 * 1024}  # bytes of input that a block of columns takes in a tile
TABLE = Path(__file__).with_name("cost.json")

COUNTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Conv": {DENSE: ("madd", "input", "output", "call"), "csr": ("madd", "gather", "output", "visit", "call"),
             "bsr": ("madd", "gather", "output", "visit", "call")},
    "Depthwise": {DENSE: ("madd", "input", "output", "call"), "csr": ("madd", "input", "output", "call")},
    "Gemm": {DENSE: ("madd", "stored", "input", "output", "call"),
             **dict.fromkeys(("csr", "bsr", "bsr1x4"), ("madd", "dot", "stored", "input", "output", "visit", "call"))},
}  # fmt: skip
"""Operator -> format -> what is counted: multiply-adds of stored values (zeros of half-full blocks and lanes behind the last pixel too),
in products of one row, which have kernels of their own, as "dot" instead of "madd"; the stored values themselves; elements of input,
gathered (csr: once for every column of the window) and of output; visits of a row of a tile by a block of columns; calls."""


@dataclass(frozen=True)
class Size:
    """What of a layer its cost depends on: `operator` of `COUNTS`, and the shapes of weight, input and output."""

    operator: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    y: tuple[int, ...]

    @classmethod
    def of(cls, layer: Layer) -> Size | None:
        """The size of a layer, None if it is unknown."""
        if layer.x_shape is None or layer.y_shape is None:
            return None
        return cls(_operator(layer), tuple(layer.weight.shape), layer.x_shape, layer.y_shape)


def formats_for(layer: Layer) -> tuple[str, ...]:
    """The formats that a layer's operator has kernels for."""
    return tuple(COUNTS[_operator(layer)])


def stored(layer: Layer, format: str) -> int:
    """Values that a format stores of a layer's weight."""
    if format == DENSE:
        return layer.weight.size
    return layer.nnz if format == "csr" else round(layer.nnz / bsr.fill(layer.weight, bsr.KERNELS[format]))


def counts(size: Size, format: str, values: int) -> dict[str, float]:
    """What running a layer of this size with so many stored values takes, by the names of `COUNTS`."""
    conv = size.operator != "Gemm"
    images, rows = (size.x[0] if conv else 1), size.weight[0]
    pixels = prod(size.y[2:]) if conv else prod(size.y[:-1])
    found = {"stored": float(values), "input": float(prod(size.x)), "output": float(prod(size.y)), "call": 1.0}
    if format == DENSE:
        return {"madd": float(values * images * pixels), **found}
    if size.operator == "Depthwise":  # lanes behind the end of each row, one weight for one channel
        return {"madd": float(values * images * size.y[2] * 8 * ceil(size.y[3] / 8)), **found}
    columns = size.weight[1] * (size.weight[3] if conv and format == "csr" else 1)
    tiles, lanes = images * ceil(pixels / TILE[format]), images * 8 * ceil(pixels / 8)
    units = ceil(rows / bsr.KERNELS[format][0]) if format in bsr.KERNELS else rows
    if not conv and pixels == 1:
        return {"madd": 0.0, "dot": float(values), "visit": float(units), **found}
    visits = units * tiles * ceil(columns * TILE[format] * 4 / BLOCK[format])
    return {"madd": float(values * lanes), "dot": 0.0, "gather": float(columns * lanes), "visit": float(visits), **found}


def predict_us(layer: Layer, format: str, values: int | None = None) -> float | None:
    """Predicted time of a layer in µs on one core; None if its size is unknown. `values`: stored ones, default those of its weight."""
    size = Size.of(layer)
    if size is None or layer.uses is None:
        return None
    if layer.op == "ConvTranspose":  # each weight is used once for every input pixel
        size = Size(size.operator, size.weight, size.y, size.x)
    found = counts(size, format, stored(layer, format) if values is None else values)
    coefficients: Mapping[str, float] = table()[size.operator][format]
    return 1e-3 * sum(ns * found[name] for name, ns in coefficients.items())


def reorder_us(x_shape: Sequence[int]) -> float:
    """Predicted time of handing a tensor from a dense to a sparse layer or back: onnxruntime's dense convolutions want another order."""
    return 1e-3 * float(table()["reorder"]) * prod(x_shape)


def gather_us(x_shape: Sequence[int]) -> float:
    """Predicted time of gathering a tensor once."""
    return 1e-3 * float(table()["Conv"]["csr"]["gather"]) * prod(x_shape)


@cache
def table() -> Mapping[str, Any]:
    """The coefficients, ns: operator -> format -> count -> ns, and "reorder" ns per element; "machine" says where they were measured."""
    found: Mapping[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


def fit(rows: list[dict[str, float]], times_us: list[float], names: tuple[str, ...]) -> dict[str, float]:
    """Non-negative coefficients, ns, that predict these times with the least relative error.

    Lawson and Hanson's active set, in the small: coefficients that come out negative are left out until none is.
    """
    time = np.asarray(times_us) * 1e3
    columns = np.array([[row[name] for name in names] for row in rows], float) / time[:, None]
    kept = list(range(len(names)))
    while kept:
        solution = np.linalg.lstsq(columns[:, kept], np.ones(len(time)), rcond=None)[0]
        if (solution >= 0).all():
            return dict.fromkeys(names, 0.0) | {names[i]: float(c) for i, c in zip(kept, solution, strict=True)}
        kept.remove(kept[int(np.argmin(solution * np.linalg.norm(columns[:, kept], axis=0)))])
    return dict.fromkeys(names, 0.0)


def _operator(layer: Layer) -> str:
    if layer.op in ("Gemm", "MatMul"):
        return "Gemm"
    return "Depthwise" if layer.depthwise else "Conv"
