"""The weights alone, as BSR arrays in one safetensors file: blocks of weights that share an index, for other people's kernels.

For each layer NAME stored sparse: ``NAME.values`` f32 [blocks, r, c], ``NAME.col_indices`` i32 [blocks], ``NAME.row_ptr`` i64
[ceil(M / r) + 1], as in `ticketkit.formats.bsr`; the block is the one its zeros are pruned in (`formats.bsr.detect`), else 4x1. The rest
of the file is specified in `ticketkit.exporters._weights`. With w = load(file)[NAME], ``scipy.sparse.bsr_array(w.arrays, w.size)`` and
``torch.sparse_bsr_tensor(*map(torch.tensor, w.arrays[::-1]), w.size)`` take them, w.size being that of whole blocks.
"""

from __future__ import annotations

import os

from onnx import ModelProto

from ticketkit.exporters._weights import Kind, Weights
from ticketkit.lower import Network
from ticketkit.planner import Plan

SUFFIX = ".safetensors"
KIND = Kind("bsr")


def encode(network: Network, plan: Plan) -> bytes:
    """The bytes of the file: every layer of the network, whatever the plan chose for speed; ExportError if there is none."""
    return KIND.encode(network)


def decode(data: bytes, network: Network) -> ModelProto:
    """The network with the weights of the file put back, to compare with the original; ExportError if they are other ones."""
    return KIND.decode(data, network)


def load(source: str | os.PathLike[str] | bytes) -> dict[str, Weights]:
    """The layers of a file by name, in execution order; FormatError, naming the field, for a file that is missing, damaged or newer."""
    return KIND.load(source)
