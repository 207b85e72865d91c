"""Weights stored as float16 and computed in float32.

In the file a weight NAME is a float16 initializer ``NAME.fp16``, and a standard Cast to float writes NAME, for whatever node reads it:
operators, function bodies and kernels know nothing of it. onnxruntime folds casts of constants when it loads a model, before it makes any
kernel, and then computes with float32 weights that are those of the file to the bit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ticketkit.errors import ModelError
from ticketkit.formats import Array
from ticketkit.lower.graph import Graph

SUFFIX = ".fp16"
LARGEST = float(np.finfo(np.float16).max)


def round_weights(model: ModelProto, names: Collection[str]) -> int:
    """Rounds the float32 initializers of these names to the nearest float16, ties to even; they stay float32.

    Returns:
        How many weights became zero.

    Raises:
        ModelError: a weight beyond the largest float16.
    """
    lost = 0
    for tensor in model.graph.initializer:
        if tensor.name not in names or tensor.data_type != TensorProto.FLOAT:
            continue
        array = numpy_helper.to_array(tensor)
        if (most := float(np.abs(array).max(initial=0))) > LARGEST:
            raise ModelError(f"{tensor.name}: {most:.9g} does not fit float16, which ends at {LARGEST:g}; store the values as fp32")
        rounded = array.astype(np.float16).astype(np.float32)
        lost += int(np.count_nonzero(array)) - int(np.count_nonzero(rounded))
        tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    return lost


def narrow(model: ModelProto, names: Collection[str]) -> None:
    """Stores the float32 initializers of these names as float16 where that loses nothing."""
    taken = {t.name for t in model.graph.initializer} | {name for node in model.graph.node for name in (*node.input, *node.output)}
    casts = []
    for tensor in model.graph.initializer:
        wide, narrowed = tensor.name, f"{tensor.name}{SUFFIX}"
        if wide not in names or tensor.data_type != TensorProto.FLOAT or narrowed in taken:
            continue
        array = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):  # infinite then, hence not equal
            half = array.astype(np.float16)
        if np.array_equal(half.astype(np.float32), array):
            tensor.CopyFrom(numpy_helper.from_array(half, narrowed))
            casts.append(helper.make_node("Cast", [narrowed], [wide], name=f"{wide}.cast", to=TensorProto.FLOAT))
    _put_nodes(model, [*casts, *model.graph.node])


def widen(model: ModelProto) -> None:
    """Puts float32 initializers in place of the casts of `narrow`, for tools that would cast at every run; leaves the float16 ones."""
    found, consumers = constants(model), Graph(model).consumers
    ours = [_widens(node, found) and node.input[0] == f"{node.output[0]}{SUFFIX}" for node in model.graph.node]
    wide = [node.output[0] for node, own in zip(model.graph.node, ours, strict=True) if own and node.output[0] in consumers]
    _put_nodes(model, [node for node, own in zip(model.graph.node, ours, strict=True) if not own])
    model.graph.initializer.extend(numpy_helper.from_array(array(name, found), name) for name in wide)


def constants(model: ModelProto) -> dict[str, TensorProto]:
    """Initializers by name, those of float16 also by the name of a Cast to float32; `array` gives their values."""
    found = {t.name: t for t in model.graph.initializer}
    return {**found, **{node.output[0]: found[node.input[0]] for node in model.graph.node if _widens(node, found)}}


def array(name: str, found: Mapping[str, TensorProto]) -> Array:
    """The value under this name of `constants`."""
    tensor = found[name]
    value: Array = numpy_helper.to_array(tensor)
    return value if tensor.name == name else value.astype(np.float32)


def is_narrow(model: ModelProto) -> bool:
    """Whether the model stores a weight as float16 behind a Cast."""
    return any(tensor.name != name for name, tensor in constants(model).items())


def _widens(node: NodeProto, found: Mapping[str, TensorProto]) -> bool:
    """Whether it is a Cast of a float16 initializer to float32."""
    if node.op_type != "Cast" or node.domain not in ("", "ai.onnx") or len(node.input) != 1 or len(node.output) != 1:
        return False
    tensor = found.get(node.input[0])
    to = next((a.i for a in node.attribute if a.name == "to"), None)
    return tensor is not None and tensor.data_type == TensorProto.FLOAT16 and to == TensorProto.FLOAT


def _put_nodes(model: ModelProto, nodes: list[NodeProto]) -> None:
    del model.graph.node[:]
    model.graph.node.extend(nodes)
