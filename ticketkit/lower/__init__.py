"""Graph passes on ONNX: read and check, clean and fold, find the layers, say what each could be fused with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from ticketkit.lower import operators
from ticketkit.lower.cleanup import clean, concrete_shapes
from ticketkit.lower.fuse import Fused, fuse
from ticketkit.lower.graph import Graph, input_shapes, other_shapes, shapes
from ticketkit.lower.layers import Layer, Shapes, layers
from ticketkit.lower.reader import read

__all__ = ["Fused", "Graph", "Layer", "Network", "lower", "operators", "read"]


@dataclass(frozen=True, eq=False)
class Network:
    """A model lowered to its clean form; planner and exporters read nothing else.

    Attributes:
        graph: the folded graph.
        layers: its convolutions and products, in execution order.
        inputs: the concrete shape of each graph input that costs and checks are computed for.
        shapes: shape of every tensor for those inputs, as far as it can be told without running the model.
        others: the same for other sizes of the free dimensions, to tell what is equal from what happens to be.
    """

    graph: Graph
    layers: tuple[Layer, ...]
    inputs: dict[str, tuple[int, ...]]
    shapes: Shapes
    others: Shapes

    @property
    def model(self) -> ModelProto:
        """The clean model; not to be changed."""
        return self.graph.model

    @property
    def weights(self) -> set[str]:
        """Names of the constants that are weights of its layers."""
        return {self.model.graph.node[layer.at].input[1] for layer in self.layers}

    def fuse(self, chosen: Iterable[Layer]) -> list[Fused]:
        """These layers with the residual and activation each can absorb."""
        return fuse(self.graph, chosen, (self.shapes, self.others))


def lower(model: ModelProto, input_shape: Sequence[int] | None = None) -> Network:
    """Clean a model and find its layers.

    Args:
        model: from `read`.
        input_shape: of the first input, with or without batch; None: as declared, free image sides taken for 224.

    Raises:
        ModelError: onnxruntime cannot load the model, the shape does not fit it, or a weight holds NaN.
    """
    inputs = input_shapes(model, input_shape)
    graph = Graph(clean(model))
    assumed, others = (concrete_shapes(graph.model, fixed) for fixed in (inputs, other_shapes(model, inputs)))
    return Network(graph, layers(graph, assumed, shapes(graph.model, {})), inputs, assumed, others)
