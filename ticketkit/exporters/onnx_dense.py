"""Plain ONNX for any runtime: constants and BatchNorm folded, weights dense with exact zeros."""

from __future__ import annotations

from onnx import ModelProto

from ticketkit.exporters import onnx as sparse_onnx
from ticketkit.lower import Network
from ticketkit.planner import Plan

SUFFIX = ".onnx"
VALUES = ("fp32", "fp16")


def encode(network: Network, plan: Plan) -> bytes:
    """The bytes of the file; of the plan only the type of values matters to it."""
    model = ModelProto()
    model.CopyFrom(network.model)
    return sparse_onnx.finish(sparse_onnx.with_values(model, network, plan))


def decode(data: bytes, network: Network) -> ModelProto:
    """The network the file stands for; checks the file, and raises ExportError if a weight is not the network's."""
    return sparse_onnx.decode(data, network)
