"""Weight formats, one file each; listing this folder is the registry.

A format module holds ``ROLE`` ("compute": a kernel multiplies with it, "storage": files only), ``PARTS`` (its array
names) and four functions, all numpy and all without side effects:

    pack(weight)           weight f32 [M, ...]  -> {part: array}
    unpack(parts, shape)   {part: array}        -> weight f32 of that shape, bit-identical but for the sign of zeros
    validate(parts, shape) raises FormatError naming the part; work and memory follow the arrays, never the claimed shape
    nbytes(shape, nnz)     bytes the arrays of such a weight take; a third argument gives those of one value, else 4

A convolution weight [M, C, kh, kw] is handled as the matrix [M, C*kh*kw] in C order, a fully connected one as [M, K].
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from math import prod
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from ticketkit.errors import FormatError

Array: TypeAlias = NDArray[Any]
Parts: TypeAlias = Mapping[str, Array]
Shape: TypeAlias = tuple[int, ...]
MOST = 2**29  # weights of one layer: 2 GiB of floats, more than an ONNX message holds, and more than a file may make us allocate


class Format(Protocol):
    """What a module of this folder offers (see the package docstring)."""

    ROLE: str
    PARTS: tuple[str, ...]

    def pack(self, weight: Array) -> dict[str, Array]: ...
    def unpack(self, parts: Parts, shape: Shape) -> Array: ...
    def validate(self, parts: Parts, shape: Shape) -> None: ...
    def nbytes(self, shape: Shape, nnz: int, itemsize: int = 4) -> int: ...


def names(role: str | None = None) -> list[str]:
    """Names of the formats in this folder, or of those with that role."""
    found = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return [name for name in found if role in (None, get(name).ROLE)]


def get(name: str) -> Format:
    """The format of that name; FormatError for an unknown one."""
    if name not in {m.name for m in pkgutil.iter_modules(__path__)}:
        raise FormatError(f"unknown weight format {name!r}; expected one of {', '.join(names())}")
    return cast(Format, import_module(f"{__name__}.{name}"))


def matrix(shape: Shape) -> tuple[int, int]:
    """Rows and columns (M, K) of a weight of that shape; FormatError for a dimension that is not positive, or `MOST` weights or more."""
    if len(shape) < 2 or any(int(d) <= 0 for d in shape):
        raise FormatError(f"weight_shape: expected 2 or more positive dimensions, got {list(shape)}")
    if (claimed := prod(int(d) for d in shape)) >= MOST:
        raise FormatError(f"weight_shape: {list(shape)} claims {claimed} weights, expected fewer than {MOST} (2 GiB of floats)")
    return int(shape[0]), prod(int(d) for d in shape[1:])


def parts_of(parts: Parts, expected: Mapping[str, type[np.generic]]) -> list[Array]:
    """The expected parts in order, each checked to be there, 1-D and of its dtype, float parts to be finite."""
    arrays = []
    for name, dtype in expected.items():
        if name not in parts:
            raise FormatError(f"{name}: missing; expected the arrays {', '.join(expected)}")
        array = parts[name]
        if array.dtype != dtype:
            raise FormatError(f"{name}: expected {np.dtype(dtype)}, got {array.dtype}")
        if array.ndim != 1:
            raise FormatError(f"{name}: expected a 1-D array, got shape {list(array.shape)}")
        finite(name, array)
        arrays.append(array)
    return arrays


def finite(name: str, array: Array) -> None:
    """FormatError if a float array holds NaN or infinity."""
    if array.dtype.kind == "f" and not (good := np.isfinite(array)).all():
        bad = int(np.argmin(good))
        raise FormatError(f"{name}: expected finite numbers, got {array.ravel()[bad]} at flat index {bad}")
