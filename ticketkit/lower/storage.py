"""Large weights apart from their graph, so that it is checked, converted and handed to onnxruntime without copying them into one message
(which can hold 2 GiB at most)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import ModelProto, TensorProto

from ticketkit.lower.graph import SHAPE_DATA, declare

LIMIT = 2**31 - 2**20  # bytes of a protobuf message, with room for a hash
PAGE = 4096  # external data begins at multiples of it, as onnxruntime maps it into memory
CPU = ("CPUExecutionProvider",)


def split(model: ModelProto) -> tuple[ModelProto, list[TensorProto]]:
    """(a copy without the large initializers, these as they are in the model)."""
    bare = ModelProto()
    _copy(model, bare, without="graph")
    _copy(model.graph, bare.graph, without="initializer")
    bare.graph.initializer.extend(tensor for tensor in model.graph.initializer if not _is_large(tensor))
    return bare, [tensor for tensor in model.graph.initializer if _is_large(tensor)]


def skeleton(model: ModelProto) -> ModelProto:
    """A copy with the large initializers as inputs: the same names, types and shapes, for whoever needs no values."""
    bare, large = split(model)
    known = {info.name for info in bare.graph.input}
    for tensor in large:
        if tensor.name not in known:
            declare(bare.graph, tensor)
    return bare


def save(bare: ModelProto, large: Iterable[TensorProto], path: Path) -> None:
    """Writes a model that was split to `path`, the large initializers to a second file beside it."""
    with path.with_suffix(".weights").open("wb") as file:
        for tensor in large:
            file.seek(-file.tell() % PAGE, 1)
            place = {"location": Path(file.name).name, "offset": file.tell(), "length": file.write(tensor.raw_data)}
            stored = bare.graph.initializer.add(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
            stored.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                stored.external_data.add(key=key, value=str(value))
    onnx.save(bare, path)


def session(model: ModelProto, options: Any = None, providers: Sequence[Any] = CPU) -> Any:
    """An `onnxruntime.InferenceSession` of a model of any size; raises what onnxruntime raises."""
    with tempfile.TemporaryDirectory(prefix="ticketkit-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        save(*split(model), path)
        return onnxruntime.InferenceSession(path, options, providers=list(providers))


def nbytes(model: ModelProto) -> int:
    """Bytes of a model as one file, whether or not one could hold it."""
    bare, large = split(model)
    return int(bare.ByteSize()) + sum(len(tensor.raw_data) for tensor in large)


def _is_large(tensor: TensorProto) -> bool:
    return bool(tensor.HasField("raw_data")) and prod(tensor.dims) > SHAPE_DATA


def _copy(source: Any, target: Any, without: str) -> None:
    """Sets all fields of a message but one."""
    for field, value in source.ListFields():
        if field.name == without:
            continue
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            getattr(target, field.name).extend(value)
        elif field.message_type is not None:
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)
