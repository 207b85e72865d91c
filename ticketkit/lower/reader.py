"""Reading ONNX from anywhere: whatever is wrong with a file is said in one line, before anything trusts its contents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, version_converter

from ticketkit.errors import FormatError, ModelError, first_line
from ticketkit.lower import operators, sparse
from ticketkit.lower.graph import dims
from ticketkit.lower.half_networks import widen
from ticketkit.lower.storage import skeleton, split

OLDEST = 11  # the first opset whose Clip takes its bounds as inputs, which is how activations are recognised
WORKING = 12  # the first whose Constant takes plain ints, which the function bodies need; older graphs are converted to it
SUB_BYTE = ("INT2", "INT4", "FLOAT4E2M1")  # element types that share bytes


def read(source: str | os.PathLike[str] | bytes | ModelProto) -> ModelProto:
    """A checked ONNX model, external data included, at opset 12 or newer, computing in float32 (`ticketkit.lower.half_networks`), without
    sparse initializers: they are made dense.

    Args:
        source: a path, the bytes of a file, or a model, which is left as it is.

    Raises:
        ModelError: no such file, or an opset that cannot be handled.
        FormatError: truncated, damaged or no ONNX at all; a malformed graph or sparse weight; a model that is not the one
            ticketkit once wrote into the file.
    """
    where = "model" if isinstance(source, bytes | ModelProto) else os.fspath(source)
    try:
        model = _parse(source)
        _check_text(model)
        if not model.graph.node:
            raise FormatError("not an ONNX model (it has no nodes); truncated, or of another format")
        _check_opset(model)
        for tensor in model.graph.initializer:
            _check_extent(tensor)
        sparse.validate(model)
        _check_graph(model)
        operators.decode(model)  # raises on a malformed sparse weight
        _check_digest(model)
        sparse.densify(model)
        return widen(_modern(model))
    except (FormatError, ModelError) as error:
        raise type(error)(f"{where}: {error}") from None
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, TypeError, RuntimeError) as error:
        raise FormatError(f"{where}: malformed ONNX: {first_line(error)}") from None


def digest(model: ModelProto) -> str:
    """sha256 over the deterministic serialization of the model, but for the metadata entry that holds it."""
    rest = ModelProto()
    rest.CopyFrom(model)
    del rest.metadata_props[:]
    rest.metadata_props.extend(entry for entry in model.metadata_props if entry.key != operators.DIGEST)
    return hashlib.sha256(rest.SerializeToString(deterministic=True)).hexdigest()


def opset(model: ModelProto) -> int:
    """Version of the standard operator set a model imports."""
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if len(versions) != 1:
        raise FormatError(f"opset_import: expected the standard operator set once, got it {len(versions)} times")
    return int(versions[0])


def _parse(source: str | os.PathLike[str] | bytes | ModelProto) -> ModelProto:
    if isinstance(source, ModelProto):
        model = ModelProto()
        model.CopyFrom(source)
        return model
    if not isinstance(source, bytes):
        if not Path(source).exists():
            raise ModelError("no such file; expected an .onnx file")
        if Path(source).is_dir():
            raise ModelError("is a folder; expected an .onnx file")
    try:
        return onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)
    except Exception as error:  # protobuf's DecodeError, onnx's own on external data, OSError: all mean that it cannot be read whole
        raise FormatError(f"not a whole ONNX file ({first_line(error)}); truncated or damaged, copy it again") from None


def _check_text(message: Any) -> None:
    """Every string of a message must be UTF-8. protobuf hands others out as bytes, and fails much later, when they are written again."""
    data = isinstance(message, TensorProto)  # a name and much data
    for field, value in [(message.DESCRIPTOR.fields_by_name["name"], message.name)] if data else message.ListFields():
        several = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        if field.type == field.TYPE_STRING and not all(isinstance(text, str) for text in several):
            raise FormatError(f"{field.name}: expected UTF-8 text, got {value!r}; the file is damaged, copy it again")
        if field.message_type is not None:
            for inner in several:
                _check_text(inner)


def _check_opset(model: ModelProto) -> None:
    version, newest = opset(model), onnx.defs.onnx_opset_version()
    if not OLDEST <= version <= newest:
        raise ModelError(f"opset {version}: expected {OLDEST} to {newest}; export the model again with a supported opset")
    known = {operators.DOMAIN: operators.VERSION}
    for entry in model.opset_import:
        if entry.version > known.get(entry.domain, entry.version):
            raise ModelError(f"operator set {entry.domain} {entry.version}: expected {known[entry.domain]}; upgrade ticketkit")


def _check_extent(tensor: TensorProto) -> None:
    """A tensor must hold what its dimensions claim; the claim alone never allocates."""
    if any(d < 0 for d in tensor.dims):
        raise FormatError(f"{tensor.name}: negative dimension in {list(tensor.dims)}")
    if tensor.data_location == TensorProto.EXTERNAL:
        raise FormatError(f"{tensor.name}: its data is in another file; give the path of the .onnx file that stands beside it")
    if tensor.HasField("raw_data"):
        try:
            itemsize = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
        except (KeyError, TypeError):
            raise FormatError(f"{tensor.name}: unknown element type {tensor.data_type}") from None
        packed = TensorProto.DataType.Name(tensor.data_type).endswith(SUB_BYTE)
        claimed = prod(tensor.dims) * itemsize
        if not packed and claimed != len(tensor.raw_data):
            raise FormatError(f"{tensor.name}: expected {claimed} bytes for shape {list(tensor.dims)}, got {len(tensor.raw_data)}")


def _check_graph(model: ModelProto) -> None:
    """The ONNX checker. It insists on output shapes where onnxruntime does not, so missing ones are inferred for it; where even that is
    impossible, onnxruntime's own checks at load have to do."""
    model = skeleton(model)
    if any(dims(output) is None for output in model.graph.output):
        model = onnx.shape_inference.infer_shapes(model)
    if all(dims(output) is not None for output in model.graph.output):
        onnx.checker.check_model(model)


def _check_digest(model: ModelProto) -> None:
    for entry in model.metadata_props:
        if entry.key == operators.DIGEST and entry.value != digest(model):
            raise FormatError(
                "the model is not the one ticketkit wrote (sha256 differs): the file is damaged, copy it again;"
                f" or edited on purpose, then delete its metadata {operators.DIGEST}"
            )


def _modern(model: ModelProto) -> ModelProto:
    """Without overridable initializers (a habit of IR version 3, it forbids constant folding), and at a working opset."""
    constants = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 4)
    if opset(model) >= WORKING:
        return model
    _, large = split(model)
    try:
        converted = version_converter.convert_version(skeleton(model), WORKING)
    except RuntimeError as error:
        reason = first_line(error)
        raise ModelError(f"opset {opset(model)} cannot be converted to {WORKING} ({reason}); export the model with a newer one") from None
    inputs = [i for i in converted.graph.input if i.name not in {t.name for t in large}]
    del converted.graph.input[:]
    converted.graph.input.extend(inputs)
    converted.graph.initializer.extend(large)
    return converted
