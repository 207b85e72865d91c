"""The weights alone, as CSR arrays in one safetensors file, for other people's kernels. BatchNorm is folded into them.

Tensors, for each layer NAME
    ``NAME.values`` f32 [nnz], ``NAME.col_indices`` i32 [nnz], ``NAME.row_ptr`` i64 [M + 1]   as in `ticketkit.formats.csr`, or
    ``NAME.weight`` f32           where dense takes fewer bytes
    ``NAME.bias``   f32 [M]       absent where the network computes it at run time

Metadata, one key ``ticketkit.csr``, JSON: ``format`` 1, ``layers`` [{name, op, shape, format, group, strides, pads, dilations}] in
execution order, ``version`` of ticketkit, ``sha256`` over all of these and the tensors.
``scipy.sparse.csr_array((values, col_indices, row_ptr))`` and ``torch.sparse_csr_tensor(row_ptr, col_indices, values)`` take
the arrays as they are; the matrix of a convolution is [M, C*kh*kw].
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

SUFFIX = ".safetensors"
KEY = "ticketkit.csr"
FORMAT = 1
WINDOW = ("strides", "pads", "dilations")


@dataclass(frozen=True, eq=False)
class Weights:
    """One layer of a CSR file.

    Attributes:
        op: the ONNX operator it was: Conv, ConvTranspose, Gemm or MatMul (the last two as y = x Wᵀ + b).
        shape: of the weight, [M, C/group, kh, kw] or [M, K].
        format: "csr" or "dense"; parts: its arrays, as that module of `ticketkit.formats` names them.
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


def encode(network: Network, plan: Plan) -> bytes:
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
        chosen = _smaller(layer)
        parts = formats.get(chosen).pack(layer.weight)
        if chosen == "dense":
            parts = {"weight": parts["values"].reshape(layer.weight.shape)}
        if layer.bias is not None:
            parts["bias"] = layer.bias
        tensors |= {f"{layer.name}.{part}": array for part, array in parts.items()}
        where = {"name": layer.name, "op": layer.op, "shape": layer.weight.shape, "format": chosen, "group": layer.group}
        described.append({**where, **layer.window})
    header: dict[str, Any] = {"format": FORMAT, "version": __version__, "layers": described}
    header["sha256"] = _digest(header, tensors)
    data: bytes = to_safetensors(tensors, {KEY: json.dumps(header, separators=(",", ":"))})
    return data


def load(source: str | os.PathLike[str] | bytes) -> dict[str, Weights]:
    """The layers of a CSR file by name, in execution order, each checked.

    Raises:
        FormatError: no such file, truncated, damaged, of a newer format, or a layer that breaks its format (named with the field).
    """
    where = "CSR file" if isinstance(source, bytes) else os.fspath(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        tensors = from_safetensors(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        header = json.loads(metadata[KEY]) if KEY in metadata else None
    except OSError as error:
        raise FormatError(f"{where}: {error.strerror}; expected a .safetensors file of `ticketkit export --format csr`") from None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{where}: not a whole safetensors file ({error}); truncated or damaged, copy it again") from None
    if not isinstance(header, dict):
        raise FormatError(f"{where}: a safetensors file without {KEY!r} metadata; expected one of `ticketkit export --format csr`")
    if header.get("format") != FORMAT:
        raise FormatError(f"{where}: expected CSR file format {FORMAT}, got {header.get('format')}; upgrade ticketkit")
    if not isinstance(header.get("layers"), list):
        raise FormatError(f"{where}: layers: expected a list, got {header.get('layers')}; the file is damaged, copy it again")
    layers: dict[str, Weights] = {}
    for entry in header["layers"]:
        try:
            layers[entry["name"]] = _layer(entry, tensors)
        except FormatError as error:
            raise FormatError(f"{where}: {entry['name']}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{where}: layers: malformed entry {entry} ({error!r})") from None
    if header.get("sha256") != _digest(header, tensors):
        raise FormatError(f"{where}: sha256 differs from the one in its header: the file is damaged, copy it again")
    return layers


def decode(data: bytes, network: Network) -> ModelProto:
    """The network with the weights of the file put back, to compare with the original; ExportError if they are other ones."""
    model = ModelProto()
    model.CopyFrom(network.model)
    stored = load(data)
    for layer in network.layers:
        weights = stored[layer.name]
        require_equal(f"{layer.name}.weight", weights.weight(), layer.weight)
        require_equal(f"{layer.name}.bias", weights.bias, layer.bias)
        _put_back(model, model.graph.node[layer.at], layer.name, weights)
    return model


def _smaller(layer: Layer) -> str:
    shape = tuple(layer.weight.shape)
    return min(("dense", "csr"), key=lambda name: formats.get(name).nbytes(shape, layer.nnz))


def _layer(entry: dict[str, Any], tensors: Mapping[str, Array]) -> Weights:
    name, shape, chosen = entry["name"], tuple(entry["shape"]), entry["format"]
    if chosen not in ("csr", "dense") or not all(isinstance(d, int) for d in shape):
        raise FormatError(f"expected format csr or dense and a shape of ints, got {chosen} and {list(shape)}")
    parts = {part: tensors[f"{name}.{part}"] for part in formats.get(chosen).PARTS if f"{name}.{part}" in tensors}
    if chosen == "dense" and f"{name}.weight" in tensors:
        parts = {"values": tensors[f"{name}.weight"].ravel()}
    formats.get(chosen).validate(parts, shape)
    bias = tensors.get(f"{name}.bias")
    if bias is not None:
        finite("bias", bias)
        channels = shape[1] * entry["group"] if entry["op"] == "ConvTranspose" else shape[0]
        if bias.shape != (channels,) or bias.dtype != np.float32:
            raise FormatError(f"bias: expected float32 [{channels}], got {bias.dtype} {list(bias.shape)}")
    return Weights(entry["op"], shape, chosen, parts, bias, entry["group"], {k: entry[k] for k in WINDOW if k in entry})


def _put_back(model: ModelProto, node: NodeProto, name: str, weights: Weights) -> None:
    """Let a node of the model read the stored arrays instead of its own."""
    weight = weights.weight()
    if node.op_type == "MatMul":
        original = next(t for t in model.graph.initializer if t.name == node.input[1])
        weight = np.ascontiguousarray(weight.T).reshape(tuple(original.dims))
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


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Array]) -> str:
    """sha256 over the header, but for the hash itself, and the tensors."""
    described = {key: value for key, value in header.items() if key != "sha256"}
    state = hashlib.sha256(json.dumps(described, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        state.update(f"{name}\0{tensors[name].dtype.str}\0{list(tensors[name].shape)}\0".encode())
        state.update(np.ascontiguousarray(tensors[name]).tobytes())
    return state.hexdigest()
