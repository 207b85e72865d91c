"""Networks that compute in float16, read as float32 networks of the same weights.

onnxruntime has no float16 convolutions on most processors: it casts the inputs of each operator to float32 and its output back. Here that
is done once, at the inputs and outputs of the graph, which keep their types; in between nothing is rounded to float16, so results are at
least as exact. Weights that are only stored as float16, behind a Cast, make no such network: folding constants deals with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ticketkit.lower.graph import every_node, subgraphs

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
TYPED = ("to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision")  # attributes that hold an element type


def widen(model: ModelProto) -> ModelProto:
    """The model as a float32 network, changed in place; as it is where it does not compute in float16."""
    graph = model.graph
    if not _computes(graph):
        return model
    inputs, outputs = ([info.name for info in infos if info.type.tensor_type.elem_type == HALF] for infos in (graph.input, graph.output))
    inside = {name: f"{name}.float32" for name in (*inputs, *outputs)}
    _widen_graph(graph, inside)
    for function in model.functions:
        for node in function.node:
            _widen_node(node, {})
    first = [helper.make_node("Cast", [name], [inside[name]], name=f"{name}.cast", to=FLOAT) for name in inputs]
    last = [helper.make_node("Cast", [inside[name]], [name], name=f"{name}.cast", to=HALF) for name in outputs if name not in inputs]
    nodes = [*first, *graph.node, *last]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


def _computes(graph: GraphProto) -> bool:
    """Whether anything but a Cast reads float16."""
    nodes = list(every_node(graph))
    halves = {info.name for info in graph.input if info.type.tensor_type.elem_type == HALF}
    halves |= {t.name for g in (graph, *(g for node in nodes for g in subgraphs(node))) for t in g.initializer if t.data_type == HALF}
    for node in nodes:
        if any(a.t.data_type == HALF or (a.name in TYPED and a.i == HALF) for a in node.attribute):
            halves.update(node.output)
    return any(halves & {*node.input} for node in nodes if node.op_type != "Cast")


def _widen_graph(graph: GraphProto, inside: Mapping[str, str]) -> None:
    """Types of everything but the inputs and outputs of the main graph, and the new names of what these are called inside."""
    for tensor in graph.initializer:
        tensor.name = inside.get(tensor.name, tensor.name)
        _widen_tensor(tensor)
    for node in graph.node:
        _widen_node(node, inside)


def _widen_node(node: NodeProto, inside: Mapping[str, str]) -> None:
    node.input[:] = [inside.get(name, name) for name in node.input]
    node.output[:] = [inside.get(name, name) for name in node.output]
    for attribute in node.attribute:
        if attribute.name in TYPED and attribute.i == HALF:
            attribute.i = FLOAT
        for tensor in (attribute.t, *attribute.tensors):
            _widen_tensor(tensor)
    for graph in subgraphs(node):
        _widen_graph(graph, inside)
        for info in (*graph.input, *graph.output, *graph.value_info):
            _widen_type(info.type)
            info.name = inside.get(info.name, info.name)


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type == HALF:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _widen_type(kind: Any) -> None:
    """A TypeProto: of a tensor, or of a sequence or optional of tensors."""
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        held = getattr(kind, which)
        held.elem_type = FLOAT if held.elem_type == HALF else held.elem_type
    elif which in ("sequence_type", "optional_type"):
        _widen_type(getattr(kind, which).elem_type)
