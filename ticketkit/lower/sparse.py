"""Sparse initializers of standard ONNX (SparseTensorProto): values and their int64 positions, 12 bytes per non-zero in float32.

Every tool after the reader knows only dense ones, so reading makes them dense; onnxruntime does the same when it loads a model.
"""

from __future__ import annotations

import os
from math import prod

import numpy as np
import onnx
from onnx import ModelProto, SparseTensorProto, TensorProto, numpy_helper

from ticketkit.errors import FormatError
from ticketkit.formats import MOST, Array
from ticketkit.lower.operators import OWN


def pack(tensor: TensorProto) -> SparseTensorProto:
    """The sparse form of an initializer, positions counted in C order; of one without non-zeros the zero at position 0 is stored."""
    weight = numpy_helper.to_array(tensor).ravel()
    at = np.flatnonzero(weight) if weight.any() else np.zeros(1, np.int64)
    values, indices = numpy_helper.from_array(weight[at], tensor.name), numpy_helper.from_array(at.astype(np.int64))
    return SparseTensorProto(values=values, indices=indices, dims=tensor.dims)


def nbytes(tensor: TensorProto) -> int:
    """Bytes of values and positions of the sparse form."""
    weight = numpy_helper.to_array(tensor)
    return (int(weight.itemsize) + 8) * max(int(np.count_nonzero(weight)), 1)


def stored(path: str | os.PathLike[str]) -> bool:
    """Whether a file, which can be read, has sparse initializers."""
    return bool(onnx.load(path, load_external_data=False).graph.sparse_initializer)


def validate(model: ModelProto) -> None:
    """FormatError, naming tensor and field, for a malformed sparse initializer, or if all claim `MOST` elements together; work and memory
    follow what is stored, never what is claimed."""
    tensors = model.graph.sparse_initializer
    for sparse in tensors:
        _flat(sparse)
    if (claimed := sum(prod(sparse.dims) for sparse in tensors)) >= MOST:
        raise FormatError(f"sparse initializers: they claim {claimed} elements together, expected fewer than {MOST}")


def densify(model: ModelProto) -> None:
    """Puts dense initializers in the place of the sparse ones, which are valid; the hash ticketkit wrote holds no longer, and goes."""
    if not model.graph.sparse_initializer:
        return
    model.graph.initializer.extend(_dense(sparse) for sparse in model.graph.sparse_initializer)
    del model.graph.sparse_initializer[:]
    foreign = [entry for entry in model.metadata_props if entry.key not in OWN]
    del model.metadata_props[:]
    model.metadata_props.extend(foreign)


def _dense(sparse: SparseTensorProto) -> TensorProto:
    values, at = _flat(sparse)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    dense.reshape(-1)[at] = values
    return numpy_helper.from_array(dense, sparse.values.name)


def _flat(sparse: SparseTensorProto) -> tuple[Array, Array]:
    """Values [n] and their flat positions [n], checked."""
    name, shape = sparse.values.name, tuple(sparse.dims)
    if not name or not shape or min(shape) < 1:
        raise FormatError(f"sparse initializer {name!r}: expected a name and positive dimensions, got {list(shape)}")
    if prod(shape) >= MOST:
        raise FormatError(f"{name}: dims: {list(shape)} claim {prod(shape)} elements, expected fewer than {MOST}")
    values, indices = _array(name, "values", sparse.values), _array(name, "indices", sparse.indices)
    if values.ndim != 1 or indices.dtype != np.int64 or indices.shape not in (values.shape, (values.size, len(shape))):
        got = f"values {list(values.shape)} and {indices.dtype} indices {list(indices.shape)}"
        raise FormatError(f"{name}: expected values [n] and int64 indices [n] or [n, {len(shape)}], got {got}")
    ends = np.array([prod(shape)] if indices.ndim == 1 else shape)
    if (indices < 0).any() or (indices >= ends).any():
        raise FormatError(f"{name}: indices: expected positions within {ends.tolist()}, got {indices.min()} to {indices.max()}")
    at: Array = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), shape)
    if (at[1:] <= at[:-1]).any():
        entry = int(np.argmax(at[1:] <= at[:-1]))
        raise FormatError(f"{name}: indices: expected ascending positions, got {at[entry]} then {at[entry + 1]} at entry {entry}")
    return values, at


def _array(name: str, field: str, tensor: TensorProto) -> Array:
    if tensor.data_location == TensorProto.EXTERNAL:
        raise FormatError(f"{name}: {field}: expected in the file itself, got the name of another; save the model in one file")
    try:
        array: Array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{name}: {field}: not a whole tensor ({error})") from None
    return array
