"""Writes kernel cases, each with the oracle's answer, for replay.cc: so kernels are checked on processors where Python does not run.

One case: int64 [20] (kind 0 conv2d / 1 gemm / 2 depthwise, batch, the 15 numbers of tk_conv2d before its layouts or rows and cols, nnz,
x count, y count), float32 tolerance, min, max, activation, slope, tolerance in half precision, then x, values, bias, residual, expected
(float32), col_indices (int32), row_ptr (int64), padded to 8 bytes each.
"""

from __future__ import annotations

import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
import oracle

from ticketkit.formats import csr
from ticketkit.runtime.geometry import ConvShape

CLIP = (-2.0, 3.0)
SLOPE = 0.2
STEEPEST = 1.5  # slope of an activation: HardSwish at 3


def cases(count: int) -> list[list[np.ndarray]]:
    """`count` random convolutions, half as many fully connected layers, and as many depthwise convolutions as these."""
    rng = np.random.default_rng(0)
    return [_conv(rng) for _ in range(count)] + [_gemm(rng) for _ in range(count // 2)] + [_conv(rng, True) for _ in range(count // 2)]


def _conv(rng: np.random.Generator, depthwise: bool = False) -> list[np.ndarray]:
    def draw(low: int, high: int, n: int) -> list[int]:
        return [int(v) for v in rng.integers(low, high + 1, n)]

    (c,), (m,), kernel, stride = draw(1, 20, 1), draw(1, 40, 1), draw(1, 5, 2), draw(1, 3, 2)
    pads, dilation = draw(0, 3, 4), draw(1, 2, 2)
    size = [max(1, dilation[i] * (kernel[i] - 1) + 1 - pads[i] - pads[i + 2]) + draw(0, 30, 1)[0] for i in (0, 1)]
    m, groups = (c, c) if depthwise else (m, 1)
    shape = ConvShape(c, *size, m, *kernel, *stride, *pads, *dilation, groups)
    weight = _sparse(rng, m, c // groups, *kernel)
    (batch,) = draw(1, 3, 1)
    x = rng.standard_normal((batch, c, *size)).astype(np.float32)
    residual = rng.standard_normal((batch, m, shape.out_h, shape.out_w)).astype(np.float32)
    bias = rng.standard_normal(m).astype(np.float32)
    y = oracle.conv2d(
        x, weight, bias, residual, clip=CLIP, strides=tuple(stride), pads=tuple(pads), dilations=tuple(dilation), groups=groups
    )
    return _case([2 if depthwise else 0, batch, *astuple(shape)[:15]], weight, x, bias, residual, y)


def _gemm(rng: np.random.Generator) -> list[np.ndarray]:
    m, k, batch = (int(rng.integers(1, high)) for high in (60, 900, 100))
    weight, x = _sparse(rng, m, k), rng.standard_normal((batch, k)).astype(np.float32)
    bias, residual = rng.standard_normal(m).astype(np.float32), rng.standard_normal((batch, m)).astype(np.float32)
    y = oracle.gemm(x, weight, bias, residual, clip=CLIP)
    return _case([1, batch, m, k, *[0] * 13], weight, x, bias, residual, y)


def _sparse(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.where(rng.random(shape) < rng.random(), rng.standard_normal(shape), 0).astype(np.float32)


def _case(head: list[int], weight: np.ndarray, x: np.ndarray, bias: np.ndarray, residual: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    parts = csr.pack(weight)
    index = head[1] % len(oracle.ACTIVATIONS)  # by the batch, as good as any number
    y = list(oracle.ACTIVATIONS.values())[index](y, SLOPE)
    tolerances = [STEEPEST * bound(weight, x, bias, residual) for bound in (oracle.tolerance, oracle.half_tolerance)]
    floats = np.array([tolerances[0], *CLIP, index, SLOPE, tolerances[1]], np.float32)
    numbers = np.array([*head, len(parts["values"]), x.size, y.size], np.int64)
    return [numbers, floats, x, parts["values"], bias, residual, y.astype(np.float32), parts["col_indices"], parts["row_ptr"]]


def write(path: Path, count: int) -> None:
    with path.open("wb") as out:
        for case in cases(count):
            for array in case:
                data = array.tobytes()
                out.write(data + bytes(-len(data) % 8))


if __name__ == "__main__":
    write(Path(sys.argv[1]), 150)
