"""Which nodes one sparse node can stand for: the layer itself, then Add of a bias or residual, then an activation.

Fusion is a view, not a rewrite: the exporter that has the operator asks for it, the dense targets leave the graph as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

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
        residual, activation = "", "None"
        parameters: tuple[float, ...] = ()
        following = graph.only_reader(output)
        images = layer.op == "Conv" and not layer.sequence
        if following and following[0] not in taken and images and (residual := _residual(graph, following[1], output, shapes)):
            absorbed.append(following[0])
            output = following[1].output[0]
        if then := _activation(graph, output):
            activation, parameters, last = then
            absorbed += [at for at in graph.consumers[output] if at != last] + [last]
            output = graph.model.graph.node[last].output[0]
        taken.update(absorbed)
        found.append(Fused(layer, Epilogue(residual, activation, parameters), output, tuple(absorbed)))
    return found[::-1]


def _residual(graph: Graph, node: NodeProto, product: str, shapes: Sequence[Shapes]) -> str:
    """The other operand of an Add that needs no broadcasting, whatever the free dimensions are; "" if there is none."""
    if node.op_type != "Add" or not _is_standard(node):
        return ""
    other = node.input[1] if node.input[0] == product else node.input[0]
    same = all(known.get(other) == known.get(product) is not None for known in shapes)
    return other if same and other not in graph.constants else ""


def _is_standard(node: NodeProto) -> bool:
    return node.domain in ("", "ai.onnx")


def _activation(graph: Graph, value: str) -> tuple[str, tuple[float, ...], int] | None:
    """Name and parameters of the activation that `value` goes through, and the position of its last node; None if it has other readers."""
    if following := graph.only_reader(value):
        found = _one_node(graph, following[1], value)
        return found and (*found, following[0])
    readers = graph.consumers.get(value, [])
    if len(readers) == 2 and min(readers) >= 0 and (name := _two_nodes(graph, *readers)):
        return name, (), readers[1]
    return None


def _two_nodes(graph: Graph, gate: int, product: int) -> str:
    """Name of the activation that two nodes make of a value which both of them read, the second by its product with the first: SiLU with a
    Sigmoid, HardSwish with a HardSigmoid of x / 6 + 1 / 2; "" if they make none."""
    first, second = graph.model.graph.node[gate], graph.model.graph.node[product]
    then = graph.only_reader(first.output[0])
    if not (_is_standard(first) and _is_standard(second)) or second.op_type != "Mul" or not then or then[0] != product:
        return ""
    options = {a.name: a.f for a in first.attribute}
    sixth = abs(6 * options.get("alpha", 0.2) - 1) < 1e-6 and options.get("beta", 0.5) == 0.5
    return "Silu" if first.op_type == "Sigmoid" else "HardSwish" if first.op_type == "HardSigmoid" and sixth else ""


def _one_node(graph: Graph, node: NodeProto, value: str) -> tuple[str, tuple[float, ...]] | None:
    """Name and parameters of a node that is an activation: Relu, HardSwish, LeakyRelu, or Clip of `value` with constant bounds."""
    if not _is_standard(node):
        return None
    if node.op_type in ("Relu", "HardSwish"):  # of which onnxruntime 1.31 writes HardSwish out before it comes here
        return node.op_type, ()
    if node.op_type == "LeakyRelu":
        alpha = next((a.f for a in node.attribute if a.name == "alpha"), 0.01)
        return ("LeakyRelu", (alpha,)) if isfinite(alpha) else None
    if node.op_type != "Clip" or node.input[0] != value:
        return None
    bounds = [-UNBOUNDED, UNBOUNDED]
    for i, name in enumerate(node.input[1:]):
        if name:
            constant = graph.constant(name)
            if constant is None or constant.size != 1:
                return None
            bounds[i] = float(constant.reshape(()))
    return ("Clip", (bounds[0], bounds[1])) if bounds[0] <= bounds[1] else None
