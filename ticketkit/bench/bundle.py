"""The layers of a network in one file, for `ticketkit-layers`, which knows no ONNX: kernels/device/bundle.h has the format.

Sparse layers are as the exported file has them, fused with their residual and activation, in its formats, layouts and tuning. Layers that
it keeps dense come with their bias alone.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from math import inf, prod
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from ticketkit.errors import ModelError
from ticketkit.exporters import get
from ticketkit.formats import Array, csr
from ticketkit.lower import Layer, half_weights, lower, operators, read
from ticketkit.lower.cleanup import concrete_shapes
from ticketkit.lower.graph import input_shapes
from ticketkit.planner import plan
from ticketkit.ticket import write_atomic

MAGIC, VERSION = b"TKBUNDLE", 1
PRODUCT, RESIDUAL, DENSE = 1, 2, 4  # flags
ACTIVATIONS = {"None": 0, "Relu": 0, "Clip": 0, "LeakyRelu": 1, "HardSwish": 2, "Silu": 3}  # tk_activation, the clip aside
MOST = 2**27  # floats of an input, output or dense weight


def write(model: str | os.PathLike[str] | ModelProto, to: str | os.PathLike[str], input_shape: Sequence[int] | None = None) -> list[str]:
    """Write the bundle of a model's convolutions and products with constant weights, whole or not at all.

    Args:
        model: a file of `ticketkit export`, or any ONNX model, which is exported in memory first.
        to: the file to write.
        input_shape: of the model's input, with or without batch; free dimensions are 1 image of 224 x 224 without it.

    Returns:
        The names of its layers in execution order. Left out are those that no kernel takes (grouped, transposed, 3-D), and those whose
        sizes ONNX cannot tell.

    Raises:
        ModelError, FormatError: the model cannot be read, the shape does not fit it, or it has no layer to write.
        TicketError: the file cannot be written.
    """
    found = _layers(_exported(read(model), input_shape), input_shape)
    if not found:
        raise ModelError("it has no convolution or product with constant weights and known sizes; there is no layer to time")
    body = b"".join([MAGIC, struct.pack("<II", VERSION, len(found)), *(record for _, record in found)])
    write_atomic(to, body + struct.pack("<I", zlib.crc32(body)))
    return [name for name, _ in found]


def count(path: str | os.PathLike[str]) -> int:
    """How many layers the bundle in a file says it has."""
    with Path(path).open("rb") as file:
        return int(struct.unpack("<8sII", file.read(16))[2])


def _exported(model: ModelProto, input_shape: Sequence[int] | None) -> ModelProto:
    if any(operators.nodes(model)):
        return model
    network = lower(model, input_shape)
    chosen = plan(network)
    return onnx.load_from_string(get("onnx").encode(network, chosen)) if chosen.sparse else model


def _layers(model: ModelProto, input_shape: Sequence[int] | None) -> list[tuple[str, bytes]]:
    """(name, record) of each layer, in execution order."""
    decoded = operators.decode(model)
    plain = operators.expand(model) if decoded else model
    shapes = concrete_shapes(plain, input_shapes(plain, input_shape))
    sparse = {node.name or node.output[0]: node for node in operators.nodes(model)}
    constants = half_weights.constants(model)
    found, seen = [], set[str]()
    for layer in lower(plain, input_shape).layers:
        if layer.name in sparse:
            node = sparse[layer.name]
            bias = half_weights.array(node.input[3], constants)
            record = _sparse_record(layer.name, decoded[node.output[0]], bias, shapes.get(node.input[0]))
        else:
            record = _dense_record(layer)
        if record is not None:
            found.append((layer.name, record))
        seen.add(layer.name)
    if missing := sorted(sparse.keys() - seen):  # a sparse layer must not get lost on the way
        raise ModelError(f"layer {missing[0]}: not found in the expanded model; export it again with this version of ticketkit")
    return found


def _sparse_record(name: str, layer: operators.Sparse, bias: Array, x_shape: Sequence[object] | None) -> bytes | None:
    epilogue, execution = layer.epilogue, layer.execution
    given = dict(zip(operators.ACTIVATIONS[epilogue.activation], epilogue.parameters, strict=True))
    least = 0.0 if epilogue.activation == "Relu" else given.get("min", -inf)
    limits = (least, given.get("max", inf), given.get("alpha", 0.0))
    lanes, height, width, *cut = execution.tuning
    if x_shape is None or [height, width] != list(x_shape[2:]):
        lanes, cut = 0, [0, 0, 0]
    flags = (0 if layer.window else PRODUCT) | (RESIDUAL if epilogue.residual else 0)
    codes = (operators.PACKED.index(execution.format), ACTIVATIONS[epilogue.activation])
    layouts = [operators.LAYOUTS.index(layout) for layout in (execution.x_layout, execution.y_layout)]
    geometry = _geometry(layer.shape, x_shape, layer.window, layer.group, layouts)
    return None if geometry is None else _record(name, flags, codes, limits, (lanes, *cut), geometry, layer.weight(), bias)


def _dense_record(layer: Layer) -> bytes | None:
    if layer.obstacle or layer.bias is None or layer.op == "ConvTranspose":
        return None
    x_shape = layer.x_shape
    if layer.op != "Conv" and x_shape is not None:
        x_shape = (prod(x_shape[:-1]), x_shape[-1])  # a product takes leading axes as rows
    geometry = _geometry(layer.weight.shape, x_shape, layer.window, layer.group, [0, 0])
    flags = DENSE | (PRODUCT if layer.op != "Conv" else 0)
    none = (0, 0), (-inf, inf, 0.0), (0, 0, 0, 0)
    return None if geometry is None else _record(layer.name, flags, *none, geometry, layer.weight, layer.bias)


def _geometry(
    weight: Sequence[int], x_shape: Sequence[object] | None, window: dict[str, list[int]], group: int, layouts: Sequence[int]
) -> tuple[int, ...] | None:
    """Batch and the fields of tk_conv2d; None where a size is unknown, or beyond what a bundle takes."""
    sizes = [size for size in x_shape or () if isinstance(size, int) and size > 0]
    if not sizes or len(sizes) != len(x_shape or ()) or len(sizes) != (4 if window else 2):
        return None
    batch, channels, *image = sizes
    height, width = image or (1, 1)
    kernel = list(weight[2:]) or [1, 1]
    defaults = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1]}
    strides, pads, dilations = (window.get(key, default) for key, default in defaults.items())
    if max(prod(sizes), prod(weight)) > MOST:
        return None
    return (batch, channels, height, width, weight[0], *kernel, *strides, *pads, *dilations, group, *layouts)


def _record(
    name: str,
    flags: int,
    codes: tuple[int, int],
    limits: tuple[float, float, float],
    tuning: tuple[int, ...],
    geometry: tuple[int, ...],
    weight: Array,
    bias: Array,
) -> bytes:
    text, parts = name.encode(), csr.pack(weight)
    arrays = ((bias, "<f4"), (parts["row_ptr"], "<i8"), (parts["col_indices"], "<i4"), (parts["values"], "<f4"))
    head = struct.pack(f"<I{len(text)}sI2i3f4i18qq", len(text), text, flags, *codes, *limits, *tuning, *geometry, len(parts["values"]))
    return head + b"".join(np.ascontiguousarray(array, dtype).tobytes() for array, dtype in arrays)
