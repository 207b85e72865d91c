"""A view of an ONNX graph by tensor name: constants, shapes, producers and consumers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeAlias

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ticketkit.errors import ModelError
from ticketkit.formats import Array

Dim: TypeAlias = int | str | None  # a number, a named free dimension, or nothing known
ASSUMED = 224  # what an undeclared image side is taken for, in planning only
SHAPE_DATA = 1024  # constants up to this many elements may hold shapes; larger ones are data


@dataclass(frozen=True)
class Graph:
    """One model, read only; build a new one after a change."""

    model: ModelProto

    @cached_property
    def constants(self) -> dict[str, TensorProto]:
        """Initializers by name."""
        return {t.name: t for t in self.model.graph.initializer}

    @cached_property
    def consumers(self) -> dict[str, list[int]]:
        """Tensor name -> positions of the nodes that read it, once per use; -1 for a graph output."""
        found: dict[str, list[int]] = defaultdict(list)
        for at, node in enumerate(self.model.graph.node):
            for name in _reads(node):
                found[name].append(at)
        for output in self.model.graph.output:
            found[output.name].append(-1)
        return found

    def constant(self, name: str) -> Array | None:
        """The value of an initializer, None for anything else."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def only_reader(self, name: str) -> tuple[int, NodeProto] | None:
        """Position and node of the single consumer of a tensor; None if it has several, none, or is a graph output."""
        readers = self.consumers.get(name, [])
        if len(readers) != 1 or readers[0] < 0 or name not in self.model.graph.node[readers[0]].input:
            return None
        return readers[0], self.model.graph.node[readers[0]]


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Graphs held by the attributes of a node (the branches of If, the bodies of Loop and Scan)."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def every_node(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph, and those of its subgraphs."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from every_node(inner)


def dims(info: ValueInfoProto) -> tuple[Dim, ...] | None:
    """Declared dimensions of a tensor; None if it is no tensor or of unknown rank."""
    if not info.type.HasField("tensor_type") or not info.type.tensor_type.HasField("shape"):
        return None
    shape = info.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in shape)


def input_shapes(model: ModelProto, input_shape: Sequence[int] | None = None, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """A concrete shape for every graph input: declared, given, or assumed (batch `batch`, image sides 224, else 1).

    Args:
        model: any model.
        input_shape: shape of the first input, with its batch dimension or without.
        batch: what a free first dimension becomes.

    Raises:
        ModelError: the given shape contradicts the declared one.
    """
    concrete = {}
    for position, info in enumerate(model.graph.input):
        declared = dims(info)
        if declared is None:
            continue
        if 0 in declared:
            raise ModelError(f"input {info.name!r}: expected positive dimensions, the model declares [{_text(declared)}]; export it again")
        assumed = [batch if i == 0 else ASSUMED if len(declared) == 4 and i > 1 else 1 for i in range(len(declared))]
        shape = [d if isinstance(d, int) else a for d, a in zip(declared, assumed, strict=True)]
        if position == 0 and input_shape is not None:
            given = [*shape[:1], *input_shape] if len(input_shape) == len(shape) - 1 else list(input_shape)
            clash = len(given) != len(shape) or any(isinstance(d, int) and d != g for d, g in zip(declared, given, strict=True))
            if clash or min(given) < 1:
                raise ModelError(f"input {info.name!r}: the model declares [{_text(declared)}], which {list(input_shape)} does not fit")
            shape = given
        concrete[info.name] = tuple(shape)
    return concrete


def other_shapes(model: ModelProto, first: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A second concrete shape for every graph input: each free dimension has a size of its own (the same where its name is the same),
    larger than any of the first ones, which are those of `input_shapes`.

    What is equal for both is equal whatever the free dimensions are, not by accident.
    """
    sizes: dict[str, int] = {}
    largest = max((d for shape in first.values() for d in shape), default=1)
    concrete = {}
    for info in model.graph.input:
        declared = dims(info) or ()
        names = [d if isinstance(d, str) else f"{info.name}\0{i}" for i, d in enumerate(declared)]
        for name, d in zip(names, declared, strict=True):
            if not isinstance(d, int):
                sizes.setdefault(name, 32 * (largest // 32 + len(sizes) + 1))  # image sides are halved on their way, all alike
        concrete[info.name] = tuple(d if isinstance(d, int) else sizes[name] for name, d in zip(names, declared, strict=True))
    return concrete


def shapes(model: ModelProto, fixed: dict[str, tuple[int, ...]]) -> dict[str, tuple[Dim, ...]]:
    """Shapes of all tensors ONNX can infer once the graph inputs have these shapes."""
    graph = model.graph
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    bare.graph.node.extend(graph.node)
    bare.graph.input.extend(graph.input)
    for info in bare.graph.input:
        for dim, size in zip(info.type.tensor_type.shape.dim, fixed.get(info.name, ()), strict=False):
            dim.dim_value = size
    for output in graph.output:  # not the declared shapes: they may hold for other inputs
        bare.graph.output.append(helper.make_empty_tensor_value_info(output.name))
    for tensor in graph.initializer:
        declare(bare.graph, tensor)
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    known = [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]
    return {info.name: shape for info in known if (shape := dims(info)) is not None}


def declare(graph: GraphProto, tensor: TensorProto) -> None:
    """Adds a constant to a graph made for shape inference: of large ones only the shape, their weights stay where they are."""
    if prod(tensor.dims) <= SHAPE_DATA:
        graph.initializer.append(tensor)
    else:
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def _text(declared: Sequence[Dim]) -> str:
    return ", ".join("?" if d is None else str(d) for d in declared)


def _reads(node: NodeProto) -> Iterator[str]:
    """Names a node reads, those of its subgraphs too (names local to them are harmless: they match nothing outside)."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from _reads(inner)
        yield from (output.name for output in graph.output)
