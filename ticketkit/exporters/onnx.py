"""One small ONNX file that runs in any onnxruntime, and runs sparse where ticketkit's library is registered.

The operators and their function bodies are specified in `ticketkit.lower.operators`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ticketkit import __version__
from ticketkit.errors import ExportError
from ticketkit.exporters._check import require_equal
from ticketkit.formats import Array, gaps
from ticketkit.lower import Fused, Graph, Network, half_weights, operators, read
from ticketkit.lower.around import around
from ticketkit.lower.layouts import layouts
from ticketkit.lower.reader import digest, opset
from ticketkit.lower.storage import LIMIT, nbytes
from ticketkit.planner import Plan

SUFFIX = ".onnx"
VALUES = ("fp32", "fp16")


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
    model = _sparse(network, {c.name: operators.Execution(c.format, c.tuning) for c in plan.sparse})
    return finish(with_values(model, network, plan))


def decode(data: bytes, network: Network) -> ModelProto:
    """The network the file stands for; checks the file, and raises ExportError if a weight or bias of a layer is not the network's."""
    model = read(data)
    stored, constants = operators.decode(model), half_weights.constants(model)
    layers = {layer.name: layer for layer in network.layers}
    for node in operators.nodes(model):
        require_equal(f"{node.name}.weight", stored[node.output[0]].weight(), layers[node.name].weight)
        require_equal(f"{node.name}.bias", half_weights.array(node.input[3], constants), layers[node.name].bias)
    for name in sorted(constants.keys() & network.weights):
        require_equal(name, half_weights.array(name, constants), network.graph.constant(name))
    return model


def with_values(model: ModelProto, network: Network, plan: Plan) -> ModelProto:
    """The model, changed in place, with the values of its weights of the type that the plan says."""
    if plan.values == "fp16":
        half_weights.narrow(model, network.weights | {node.input[1] for node in operators.nodes(model)})
    return model


def finish(model: ModelProto) -> bytes:
    """Serialize with ticketkit's name and the hash of the model, by which `read` knows damage; ExportError if one file cannot hold it."""
    if (size := nbytes(model)) >= LIMIT:
        raise ExportError(f"the file would have {size:,} bytes, and an ONNX file holds less than {LIMIT:,}: prune more")
    model.producer_name, model.producer_version = "ticketkit", __version__
    model.metadata_props.add(key="ticketkit.version", value=__version__)
    model.metadata_props.add(key=operators.DIGEST, value=digest(model))
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _sparse(network: Network, chosen: Mapping[str, operators.Execution]) -> ModelProto:
    source = network.model
    fused = {f.absorbed[-1]: f for f in network.fuse(layer for layer in network.layers if layer.name in chosen)}
    executions = layouts(network.graph, tuple(fused.values()), chosen)
    absorbed = {at for f in fused.values() for at in f.absorbed}
    staying = [node for at, node in enumerate(source.graph.node) if at not in absorbed]
    needed = _reads(staying, source)
    kept = [tensor for name, tensor in network.graph.constants.items() if name in needed]
    constants = _Constants(needed | {name for node in source.graph.node for name in node.output})
    nodes = []
    for at, node in enumerate(source.graph.node):
        if at in fused:
            nodes.extend(_sparse_nodes(fused[at], executions[fused[at].layer.name], constants))
        elif at not in absorbed:
            nodes.append(node)
    used = sorted({n.op_type for n in nodes if n.domain == operators.DOMAIN})
    model = helper.make_model(
        helper.make_graph(nodes, source.graph.name, source.graph.input, source.graph.output, [*kept, *constants.tensors]),
        functions=[*source.functions, *(operators.function(name, opset(source)) for name in used)],
        opset_imports=[*source.opset_import, helper.make_opsetid(operators.DOMAIN, operators.VERSION)],
        ir_version=max(source.ir_version, operators.IR_VERSION),
    )
    model.metadata_props.extend(source.metadata_props)
    return model


def _sparse_nodes(fused: Fused, execution: operators.Execution, constants: _Constants) -> list[NodeProto]:
    layer = fused.layer
    if layer.obstacle or layer.bias is None:
        raise ExportError(f"{layer.name}: the plan makes it sparse, but: {layer.obstacle}; plan the network again")
    parts = {**gaps.pack(layer.weight), "bias": layer.bias}
    before, x, y, after = around(fused, constants.add, constants.fresh)
    inputs = [x, *(constants.add(f"{layer.name}.{part}", array) for part, array in parts.items())]
    op = operators.CONV if layer.op == "Conv" else operators.GEMM
    node = operators.make_node(op, inputs, y, layer.name, layer.weight.shape, layer.window, fused.epilogue, execution, layer.group)
    return [*before, node, *after]


def _reads(nodes: Sequence[NodeProto], source: ModelProto) -> set[str]:
    """Names that these nodes, their subgraphs or the graph outputs read."""
    rest = ModelProto()
    rest.graph.node.extend(nodes)
    rest.graph.output.extend(source.graph.output)
    return set(Graph(rest).consumers)


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
            self._names[key] = self.fresh(name)
            self.tensors.append(numpy_helper.from_array(array, self._names[key]))
        return self._names[key]

    def fresh(self, name: str) -> str:
        """The name, or one like it if it is taken."""
        while name in self._taken:
            name = f"{name}_"
        self._taken.add(name)
        return name
