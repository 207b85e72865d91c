"""Which nodes one sparse node can stand for: the layer itself, then Add of a bias or residual, then Relu or Clip.

Fusion is a view, not a rewrite: the exporter that has the operator asks for it, the dense targets leave the graph as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from ticketkit.lower.graph import Graph
from ticketkit.lower.layers import Layer, Shapes
from ticketkit.lower.operators import Epilogue

UNBOUNDED = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Fused:
    """A layer and what follows it.

    Attributes:
        layer: the convolution or product.
        epilogue: residual and activation.
        output: name of the tensor the last absorbed node writes.
        absorbed: positions of the nodes this replaces, ascending. The fused node goes to the last of them: its residual may be
            made after the layer, and nobody else reads what lies between.
    """

    layer: Layer
    epilogue: Epilogue
    output: str
    absorbed: tuple[int, ...]


def fuse(graph: Graph, layers: Iterable[Layer], shapes: Sequence[Shapes]) -> list[Fused]:
    """The given layers, each with everything it can absorb; no node is absorbed twice. `shapes` are those of several assignments of the
    free dimensions.

    Where both sides of an Add are layers the later one takes it, so that the other's result is there in time. A tensor with
    several readers, or one that is a graph output, is kept, and fusion stops at it.
    """
    taken: set[int] = set()
    found = []
    for layer in sorted(layers, key=lambda each: -each.at):
        output, absorbed = layer.y, [layer.at]
        if layer.bias_at is not None:
            absorbed.append(layer.bias_at)
            output = graph.model.graph.node[layer.bias_at].output[0]
        residual, activation, low, high = "", "None", 0.0, 0.0
        following = graph.only_reader(output)
        images = layer.op == "Conv" and not layer.sequence
        if following and following[0] not in taken and images and (residual := _residual(graph, following[1], output, shapes)):
            absorbed.append(following[0])
            output = following[1].output[0]
            following = graph.only_reader(output)
        if following and (bounds := _activation(graph, following[1], output)):
            activation, low, high = bounds
            absorbed.append(following[0])
            output = following[1].output[0]
        taken.update(absorbed)
        found.append(Fused(layer, Epilogue(residual, activation, low, high), output, tuple(absorbed)))
    return found[::-1]


def _residual(graph: Graph, node: NodeProto, product: str, shapes: Sequence[Shapes]) -> str:
    """The other operand of an Add that needs no broadcasting, whatever the free dimensions are; "" if there is none."""
    if node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
        return ""
    other = node.input[1] if node.input[0] == product else node.input[0]
    same = all(known.get(other) == known.get(product) is not None for known in shapes)
    return other if same and other not in graph.constants else ""


def _activation(graph: Graph, node: NodeProto, value: str) -> tuple[str, float, float] | None:
    """Name and bounds of a Relu, or of a Clip with constant bounds, that reads `value`."""
    if node.op_type == "Relu":
        return "Relu", 0.0, 0.0
    if node.op_type != "Clip" or node.input[0] != value:
        return None
    bounds = [-UNBOUNDED, UNBOUNDED]
    for i, name in enumerate(node.input[1:]):
        if name:
            constant = graph.constant(name)
            if constant is None or constant.size != 1:
                return None
            bounds[i] = float(constant.reshape(()))
    return ("Clip", bounds[0], bounds[1]) if bounds[0] <= bounds[1] else None
