"""The one oracle: float64 numpy on dense weights, anchored once to torch (test_oracle_is_torch), and the tolerance float32 owes it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Exact = NDArray[np.float64]
EPS = float(np.finfo(np.float32).eps)
EPS_HALF = float(np.finfo(np.float16).eps)
ACTIVATIONS: dict[str, Callable[[Exact, float], Exact]] = {  # name in `native` -> function of z, slope; in order of tk_activation
    "identity": lambda z, _: z,
    "leaky_relu": lambda z, slope: np.where(z < 0, slope * z, z),
    "hard_swish": lambda z, _: z * np.clip(z / 6 + 0.5, 0, 1),
    "silu": lambda z, _: z / (1 + np.exp(np.minimum(-z, 700.0))),
}


def conv2d(
    x: Array,  # [N, C, H, W]
    weight: Array,  # [M, C / groups, kh, kw]
    bias: Array | None = None,  # [M]
    residual: Array | None = None,  # [N, M, OH, OW]
    *,
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),  # top, left, bottom, right
    dilations: tuple[int, int] = (1, 1),
    groups: int = 1,
    clip: tuple[float, float] = (-np.inf, np.inf),
) -> Exact:
    """clip(conv2d(x, weight) + bias + residual) in float64, [N, M, OH, OW]."""
    top, left, bottom, right = pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))  # [N, C, ., ., reach_h, reach_w]
    windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    n, c, *rest = windows.shape
    grouped, weights = windows.reshape(n, groups, c // groups, *rest), weight.astype(np.float64).reshape(groups, -1, *weight.shape[1:])
    y = np.einsum("ngchwij,gmcij->ngmhw", grouped, weights, optimize=True).reshape(n, len(weight), *rest[:2])
    if bias is not None:
        y = y + bias[:, None, None]
    return np.clip(y if residual is None else y + residual, *clip)


def gemm(
    x: Array, weight: Array, bias: Array | None = None, residual: Array | None = None, *, clip: tuple[float, float] = (-np.inf, np.inf)
) -> Exact:
    """clip(x weight^T + bias + residual) in float64; x [N, K], weight [M, K], result [N, M]."""
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    for term in (bias, residual):
        y = y if term is None else y + term
    return np.clip(y, *clip)


def tiled(images: Array, tile: int) -> Array:
    """Images [N, C, H, W] with their floats in tiles of so many pixels (tk_layout in ticketkit.h; 0: planes), of the same shape."""
    flat = images.reshape(*images.shape[:2], -1)
    pieces = [flat[:, :, piece].reshape(len(images), -1) for piece in _tiles(flat.shape[2], tile)]
    return np.ascontiguousarray(np.concatenate(pieces, axis=1)).reshape(images.shape)


def planes(images: Array, tile: int) -> Array:
    """Images in C order of those that `tiled` or a layer wrote."""
    n, channels, height, width = images.shape
    flat = images.reshape(n, -1)
    pieces = [flat[:, channels * at.start : channels * at.stop].reshape(n, channels, -1) for at in _tiles(height * width, tile)]
    return np.ascontiguousarray(np.concatenate(pieces, axis=2)).reshape(images.shape)


def _tiles(pixels: int, tile: int) -> list[slice]:
    return [slice(at, min(at + (tile or pixels), pixels)) for at in range(0, pixels, tile or pixels)]


def tolerance(weight: Array, x: Array, *terms: Array | None) -> float:
    """Bound on |float32 result - exact result|: 2 eps (k + 1) max|w| max|x| for sums of k products, plus as much for each added term.

    k is the largest number of non-zeros of a row, since a zero weight adds no rounding.
    """
    k = int((weight.reshape(len(weight), -1) != 0).sum(axis=1).max(initial=0))
    largest = max(float(np.abs(weight).max(initial=0)) * float(np.abs(x).max(initial=0)), 1e-30)
    extra = sum(float(np.abs(t).max(initial=0)) for t in terms if t is not None)
    return 2 * EPS * (k + 1) * (largest + extra)


def half_tolerance(weight: Array, x: Array, *terms: Array | None) -> float:
    """The same bound for convolutions in half precision ("neon_fp16"), by its epsilon, and 2^-24 for each product where numbers are too
    small for it: half of that for each weight, input and sum that is rounded to a multiple of 2^-24."""
    k = int((weight.reshape(len(weight), -1) != 0).sum(axis=1).max(initial=0))
    w, most = (float(np.abs(a).max(initial=0)) for a in (weight, x))
    return 2 * EPS_HALF * (k + 1) * w * most + 2.0**-24 * (k + 1) * (1 + w + most) + tolerance(weight, x, *terms)
