"""Weights alone in one safetensors file: what the targets `csr` and `bsr` have in common. BatchNorm is folded into the weights.

Tensors, for each layer NAME
    the arrays of its sparse weight, as the target says, or
    ``NAME.weight`` f32           where dense takes fewer bytes
    ``NAME.bias``   f32 [M]       absent where the network computes it at run time

Metadata, one key ``ticketkit.csr`` or ``ticketkit.bsr``, JSON: ``format`` 1, ``layers`` [{name, op, shape, format, group, strides, pads,
dilations}] in execution order, ``version`` of ticketkit, ``sha256`` over all of these and the tensors. Layers in bsr also say ``block``.
The matrix of a convolution is [M, C*kh*kw].
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors
from safetensors.numpy import save as to_safetensors

from ticketkit import __version__, formats
from ticketkit.errors import ExportError, FormatError
from ticketkit.exporters._check import require_equal
from ticketkit.formats import Array, finite
from ticketkit.lower import Layer, Network
from ticketkit.planner import Plan

FORMAT = 1
WINDOW = ("strides", "pads", "dilations")


@dataclass(frozen=True, eq=False)
class Weights:
    """One layer of a file.

    Attributes:
        op: the ONNX operator it was: Conv, ConvTranspose, Gemm or MatMul (the last two as y = x Wᵀ + b).
        shape: of the weight, [M, C/group, kh, kw] or [M, K].
        format: "csr", "bsr" or "dense"; parts: its arrays, as that module of `ticketkit.formats` names them.
        bias: f32 [M], None where the network computes it at run time.
        group, window: of a convolution; window holds strides, pads and dilations of a 2-D one.
    """

    op: str
    shape: tuple[int, ...]
    format: str
    parts: Mapping[str, Array]
    bias: Array | None
    group: int
    window: Mapping[str, list[int]]

    def weight(self) -> Array:
        """The dense weight, f32 of that shape."""
        return formats.get(self.format).unpack(self.parts, self.shape)

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        """(values, col_indices, row_ptr), the order of ``scipy.sparse``; torch has the reverse. In bsr values is [blocks, r, c].

        Both kinds of indices are int64: in the file they differ, which torch takes without a word but breaks its invariants.

        Raises:
            FormatError: the layer is stored dense.
        """
        if self.format == "dense":
            raise FormatError(f"this layer is stored dense, as {list(self.shape)}: it has no sparse arrays, take weight()")
        values, columns, rows = (self.parts[part] for part in ("values", "col_indices", "row_ptr"))
        return values.reshape(-1, *self._block) if self.format == "bsr" else values, columns.astype(np.int64), rows

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the matrix, in bsr those of its whole blocks, which may stick out of the weight (zeros there)."""
        (rows, columns), (r, c) = formats.matrix(self.shape), self._block
        return -(-rows // r) * r, -(-columns // c) * c

    @property
    def _block(self) -> tuple[int, int]:
        r, c = self.parts["block"].tolist() if self.format == "bsr" else (1, 1)
        return r, c


@dataclass(frozen=True)
class Kind:
    """What one target writes: its layers are in this format of `ticketkit.formats`, or dense."""

    format: str

    @property
    def key(self) -> str:
        """Of the metadata."""
        return f"ticketkit.{self.format}"

    def encode(self, network: Network, plan: Plan) -> bytes:
        """The bytes of the file: every layer of the network, whatever the plan chose for speed.

        Raises:
            ExportError: the network has no layers.
        """
        if not network.layers:
            raise ExportError(
                "no layer with constant float32 weights to write: export the model in float32, its weights not behind Cast nodes,"
                " or use --format onnx-dense"
            )
        tensors: dict[str, Array] = {}
        described = []
        for layer in network.layers:
            stored, packed = self._smaller(layer)
            entry: dict[str, Any] = {"name": layer.name, "op": layer.op, "shape": layer.weight.shape, "format": stored}
            if "block" in packed:
                entry["block"] = packed["block"].tolist()
            described.append({**entry, "group": layer.group, **layer.window})
            weights = Weights(layer.op, layer.weight.shape, stored, packed, layer.bias, layer.group, layer.window)
            tensors |= {f"{layer.name}.{part}": array for part, array in _tensors(weights).items()}
        header: dict[str, Any] = {"format": FORMAT, "version": __version__, "layers": described}
        header["sha256"] = digest(header, tensors)
        data: bytes = to_safetensors(tensors, {self.key: json.dumps(header, separators=(",", ":"))})
        return data

    def load(self, source: str | os.PathLike[str] | bytes) -> dict[str, Weights]:
        """The layers of a file by name, in execution order, each checked.

        Raises:
            FormatError: no such file, truncated, damaged, of a newer format, or a layer that breaks its format (named with the field).
        """
        label, made_by = f"{self.format.upper()} file", f"`ticketkit export --format {self.format}`"
        where = label if isinstance(source, bytes) else os.fspath(source)
        try:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
            tensors = from_safetensors(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
            header = json.loads(metadata[self.key]) if self.key in metadata else None
        except OSError as error:
            raise FormatError(f"{where}: {error.strerror}; expected a .safetensors file of {made_by}") from None
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{where}: not a whole safetensors file ({error}); truncated or damaged, copy it again") from None
        if not isinstance(header, dict):
            raise FormatError(f"{where}: a safetensors file without {self.key!r} metadata; expected one of {made_by}")
        if header.get("format") != FORMAT:
            raise FormatError(f"{where}: expected {label} format {FORMAT}, got {header.get('format')}; upgrade ticketkit")
        if not isinstance(header.get("layers"), list):
            raise FormatError(f"{where}: layers: expected a list, got {header.get('layers')}; the file is damaged, copy it again")
        layers: dict[str, Weights] = {}
        for entry in header["layers"]:
            try:
                layers[entry["name"]] = self._layer(entry, tensors)
            except FormatError as error:
                raise FormatError(f"{where}: {entry['name']}: {error}") from None
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise FormatError(f"{where}: layers: malformed entry {entry} ({error!r})") from None
        if header.get("sha256") != digest(header, tensors):
            raise FormatError(f"{where}: sha256 differs from the one in its header: the file is damaged, copy it again")
        return layers

    def decode(self, data: bytes, network: Network) -> ModelProto:
        """The network with the weights of the file put back, to compare with the original; ExportError if they are other ones."""
        model = ModelProto()
        model.CopyFrom(network.model)
        stored = self.load(data)
        for layer in network.layers:
            weights = stored[layer.name]
            require_equal(f"{layer.name}.weight", weights.weight(), layer.weight)
            require_equal(f"{layer.name}.bias", weights.bias, layer.bias)
            _put_back(model, model.graph.node[layer.at], layer.name, weights)
        return model

    def _smaller(self, layer: Layer) -> tuple[str, dict[str, Array]]:
        """Name and arrays of the format that takes fewer bytes."""
        packed = {name: formats.get(name).pack(layer.weight) for name in ("dense", self.format)}
        return min(packed.items(), key=lambda item: sum(array.nbytes for array in item[1].values()))

    def _layer(self, entry: dict[str, Any], tensors: Mapping[str, Array]) -> Weights:
        name, shape, stored = entry["name"], tuple(entry["shape"]), entry["format"]
        if stored not in ("dense", self.format) or not all(isinstance(d, int) for d in shape):
            raise FormatError(f"expected format {self.format} or dense and a shape of ints, got {stored} and {list(shape)}")
        parts = _parts(entry, tensors)
        formats.get(stored).validate(parts, shape)
        bias = tensors.get(f"{name}.bias")
        if bias is not None:
            finite("bias", bias)
            channels = shape[1] * entry["group"] if entry["op"] == "ConvTranspose" else shape[0]
            if bias.shape != (channels,) or bias.dtype != np.float32:
                raise FormatError(f"bias: expected float32 [{channels}], got {bias.dtype} {list(bias.shape)}")
        return Weights(entry["op"], shape, stored, parts, bias, entry["group"], {k: entry[k] for k in WINDOW if k in entry})


def _tensors(weights: Weights) -> dict[str, Array]:
    """The tensors of one layer, without its name before them."""
    bias = {} if weights.bias is None else {"bias": weights.bias}
    if weights.format == "dense":
        return {"weight": weights.parts["values"].reshape(weights.shape), **bias}
    values, _, row_ptr = weights.arrays
    return {"values": values, "col_indices": weights.parts["col_indices"], "row_ptr": row_ptr, **bias}


def _parts(entry: Mapping[str, Any], tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays of a layer as its format names them; unchecked, but for what only the file has: the shape of blocks."""
    name, stored = entry["name"], entry["format"]
    if stored == "dense":
        return {"values": tensors[f"{name}.weight"].ravel()} if f"{name}.weight" in tensors else {}
    parts = {part: tensors[f"{name}.{part}"] for part in ("values", "col_indices", "row_ptr") if f"{name}.{part}" in tensors}
    if stored == "bsr":
        parts["block"] = np.array(entry["block"], np.int32)
        if "values" in parts:
            if parts["values"].ndim != 3 or list(parts["values"].shape[1:]) != list(entry["block"]):
                raise FormatError(f"values: expected blocks of {entry['block']}, got {list(parts['values'].shape)}")
            parts["values"] = parts["values"].ravel()
    return parts


def _put_back(model: ModelProto, node: NodeProto, name: str, weights: Weights) -> None:
    """Let a node of the model read the stored arrays instead of its own."""
    weight = weights.weight()
    if node.op_type == "MatMul":
        weight = np.ascontiguousarray(weight.T)
    if node.op_type != "Gemm":  # stacked, or of a convolution over sequences
        weight = weight.reshape(next(tuple(t.dims) for t in model.graph.initializer if t.name == node.input[1]))
    arrays = {f"{name}.weight.stored": weight}
    if node.op_type != "MatMul" and weights.bias is not None:
        arrays[f"{name}.bias.stored"] = weights.bias
    node.input[1 : 1 + len(arrays)] = list(arrays)
    if node.op_type == "Gemm":  # the stored weight is transposed and scaled already
        replaced = {"transB", "alpha", "beta"} if weights.bias is not None else {"transB", "alpha"}
        kept = [a for a in node.attribute if a.name not in replaced]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("transB", 1)])
    model.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in arrays.items())


def digest(header: Mapping[str, Any], tensors: Mapping[str, Array]) -> str:
    """sha256 over the header, but for the hash itself, and the tensors."""
    described = {key: value for key, value in header.items() if key != "sha256"}
    state = hashlib.sha256(json.dumps(described, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        state.update(f"{name}\0{tensors[name].dtype.str}\0{list(tensors[name].shape)}\0".encode())
        state.update(np.ascontiguousarray(tensors[name]).tobytes())
    return state.hexdigest()
