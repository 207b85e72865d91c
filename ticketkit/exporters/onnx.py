"""One small ONNX file that runs in any onnxruntime, and runs sparse where ticketkit's library is registered.

The operators and their function bodies are specified in `ticketkit.lower.operators`.
"""

from __future__ import annotations

import hashlib

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ticketkit import __version__
from ticketkit.errors import ExportError
from ticketkit.formats import Array, gaps
from ticketkit.lower import Graph, Network, operators, read
from ticketkit.lower.reader import DIGEST, digest, opset
from ticketkit.planner import Plan

SUMMARY = "compact, portable, accelerated: sparse layers become ai.ticketkit nodes with a function body"
SUFFIX = ".onnx"


def encode(network: Network, plan: Plan) -> bytes:
    """The bytes of the file.

    Raises:
        ExportError: the plan leaves every layer dense.
    """
    if not plan.sparse:
        most = max((c.sparsity for c in plan.choices), default=0.0)
        raise ExportError(
            f"no layer would run faster sparse (the sparsest is {most:.0%} zero): prune more, or export with --format onnx-dense;"
            " `ticketkit inspect` gives the reason for each layer"
        )
    return finish(_sparse(network, {c.name for c in plan.sparse}))


def decode(data: bytes, network: Network) -> ModelProto:
    """The network the file stands for; checks the file."""
    return read(data)


def finish(model: ModelProto) -> bytes:
    """Serialize with ticketkit's name and the hash of the weights, by which `read` knows damage."""
    model.producer_name, model.producer_version = "ticketkit", __version__
    model.metadata_props.add(key="ticketkit.version", value=__version__)
    model.metadata_props.add(key=DIGEST, value=digest(model))
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _sparse(network: Network, names: set[str]) -> ModelProto:
    source = network.model
    fused = {f.absorbed[-1]: f for f in network.fuse(layer for layer in network.layers if layer.name in names)}
    absorbed = {at for f in fused.values() for at in f.absorbed}
    constants = _Constants({name for node in source.graph.node for name in (*node.input, *node.output)})
    nodes: list[NodeProto] = []
    for at, node in enumerate(source.graph.node):
        if at in fused:
            layer, epilogue = fused[at].layer, fused[at].epilogue
            if layer.obstacle or layer.bias is None:
                raise ExportError(f"{layer.name}: the plan makes it sparse, but it is a {layer.obstacle}; plan the network again")
            parts = {**gaps.pack(layer.weight), "bias": layer.bias}
            inputs = [layer.x, *(constants.add(f"{layer.name}.{part}", array) for part, array in parts.items())]
            op = operators.CONV if layer.op == "Conv" else operators.GEMM
            nodes.append(
                operators.make_node(op, inputs, fused[at].output, layer.name, layer.weight.shape, layer.window, epilogue)
            )
        elif at not in absorbed:
            nodes.append(node)
    kept = _still_used(network, nodes)
    graph = helper.make_graph(nodes, source.graph.name, source.graph.input, source.graph.output, [*kept, *constants.tensors])
    variants = sorted({(n.op_type, n.overload) for n in nodes if n.domain == operators.DOMAIN})
    imports = [*source.opset_import, helper.make_opsetid(operators.DOMAIN, operators.VERSION)]
    model = helper.make_model(
        graph,
        functions=[*source.functions, *(operators.function(op, overload, opset(source)) for op, overload in variants)],
        opset_imports=imports,
        ir_version=max(source.ir_version, operators.IR_VERSION),
    )
    model.metadata_props.extend(source.metadata_props)
    onnx.checker.check_model(model)
    return model


def _still_used(network: Network, nodes: list[NodeProto]) -> list[TensorProto]:
    """Initializers that the remaining nodes, their subgraphs or the graph outputs read."""
    rest = onnx.ModelProto()
    rest.graph.node.extend(nodes)
    rest.graph.output.extend(network.model.graph.output)
    read_by_rest = Graph(rest).consumers
    return [tensor for name, tensor in network.graph.constants.items() if name in read_by_rest]


class _Constants:
    """Initializers under construction, under names not yet taken; equal arrays are stored once."""

    def __init__(self, taken: set[str]) -> None:
        self.tensors: list[TensorProto] = []
        self._taken = taken
        self._names: dict[tuple[str, bytes], str] = {}

    def add(self, name: str, array: Array) -> str:
        """Name of the initializer that holds this array."""
        key = (f"{array.dtype}{array.shape}", hashlib.sha256(array.tobytes()).digest())
        if key not in self._names:
            while name in self._taken:
                name = f"{name}_"
            self._taken.add(name)
            self._names[key] = name
            self.tensors.append(numpy_helper.from_array(array, name))
        return self._names[key]
