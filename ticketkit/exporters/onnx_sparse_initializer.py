"""Plain ONNX whose pruned weights are standard sparse tensors (SparseTensorProto), where that takes fewer bytes.

For tools that read the standard. Runtimes make these tensors dense when they load the model, onnxruntime 1.31 among them: the file is
small (12 bytes per non-zero, twice those of the target `onnx`), the session neither small nor fast.
"""

from __future__ import annotations

from onnx import ModelProto, load_from_string

from ticketkit.exporters import onnx as sparse_onnx
from ticketkit.lower import Network, sparse
from ticketkit.planner import Plan

SUFFIX = ".onnx"


def encode(network: Network, plan: Plan) -> bytes:
    """The bytes of the file; the plan does not matter to it."""
    model, weights = ModelProto(), network.weights
    model.CopyFrom(network.model)
    smaller = {name for name, t in network.graph.constants.items() if name in weights and sparse.nbytes(t) < t.ByteSize()}
    del model.graph.initializer[:]
    model.graph.initializer.extend(t for name, t in network.graph.constants.items() if name not in smaller)
    model.graph.sparse_initializer.extend(sparse.pack(network.graph.constants[name]) for name in sorted(smaller))
    return sparse_onnx.finish(model)


def decode(data: bytes, network: Network) -> ModelProto:
    """The network the file stands for, sparse as it is; checks the file, and raises ExportError if a weight is not the network's."""
    sparse_onnx.decode(data, network)
    return load_from_string(data)
