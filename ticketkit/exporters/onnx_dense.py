"""Plain ONNX for any runtime: constants and BatchNorm folded, weights dense with exact zeros."""

from __future__ import annotations

from onnx import ModelProto

from ticketkit.exporters import onnx as sparse_onnx
from ticketkit.lower import Network, read
from ticketkit.planner import Plan

SUFFIX = ".onnx"


def encode(network: Network, plan: Plan) -> bytes:
    """The bytes of the file; the plan does not matter to it."""
    model = ModelProto()
    model.CopyFrom(network.model)
    return sparse_onnx.finish(model)


def decode(data: bytes, network: Network) -> ModelProto:
    """The network the file stands for; checks the file."""
    return read(data)
