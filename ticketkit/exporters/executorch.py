"""A program of ExecuTorch in one .pte file: dense, on XNNPACK where that has the operators. What phones run without us, to compare with.

    from executorch.runtime import Runtime
    outputs = Runtime.get().load_program("network.pte").load_method("forward").execute([image])

Pruned weights are exact zeros in it and multiplied like all others. Sizes are fixed: a batch that the source leaves free is 1, and image
sides are those of `--input-shape`, else 224. XNNPACK packs weights its own way, so that they cannot be compared bit for bit with the
network's as in other targets: the outputs alone say that they are right.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from ticketkit.errors import ExportError, FormatError, first_line
from ticketkit.exporters._check import Runner, random_inputs
from ticketkit.exporters._torch import as_module, require_torch, trace
from ticketkit.formats import Array
from ticketkit.lower import Network
from ticketkit.planner import Plan
from ticketkit.quiet import quiet
from ticketkit.runtime import torch_graph

SUFFIX = ".pte"
BACKEND = "XnnpackBackend"
LINES = "a line of executorch is made for one of torch: 1.3 for 2.12, 1.2 for 2.11, 1.1 for 2.10"


def encode(network: Network, plan: Plan) -> bytes:
    """The bytes of the file; the plan does not matter to it.

    Raises:
        ExportError: executorch is missing or does not load, it cannot lower the network, or XNNPACK takes over nothing of it.
        ModelError: an operator unknown to `ticketkit.runtime.torch_graph`.
    """
    return lowered(network.model, list(random_inputs(network, batch=1).values()))


def lowered(model: ModelProto, inputs: Sequence[Array]) -> bytes:
    """A program for inputs of the shapes and types of these, in the order of the graph's; raises as `encode`."""
    lower, partitioner, _ = _executorch()
    import torch

    module, _ = as_module(torch_graph.rebuild(model))
    examples = [torch.from_numpy(array) for array in inputs]
    program = trace(module, examples, [{}] * len(examples))
    try:
        with quiet():
            data = bytes(lower(program, partitioner=[partitioner()]).to_executorch().buffer)
    except Exception as error:  # whatever its passes raise
        raise ExportError(f"executorch cannot lower the network: {first_line(error)}; try another --format") from None
    if BACKEND.encode() not in data:
        raise ExportError("XNNPACK takes over no operator of this network; export with --format onnx-dense")
    return data


def decode(data: bytes, network: Network) -> ModelProto:
    """The network, once the file has proved to be a program; FormatError for a damaged one."""
    method(data)
    return network.model


def runners(data: bytes, network: Network) -> Mapping[str, Runner]:
    """The program in ExecuTorch's own runtime, as many samples at a time as it takes."""
    import torch

    program = method(data)
    names = [info.name for info in network.model.graph.output]

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        tensors = [torch.from_numpy(array) for array in feeds.values()]
        step, batch = program.metadata.input_tensor_meta(0).sizes()[0], len(tensors[0])
        pieces = [[t[at : at + step] if len(t) == batch else t for t in tensors] for at in range(0, batch, step)]
        results = [[np.array(y) for y in program.execute(piece)] for piece in pieces]
        return {name: np.concatenate(parts) for name, *parts in zip(names, *results, strict=True)}

    return {"executorch": run}


def method(data: bytes) -> Any:
    """The program's only method, loaded; FormatError for a damaged one."""
    *_, runtime = _executorch()
    try:
        with quiet():
            return runtime.get().load_program(data).load_method("forward")
    except Exception as error:  # its runtime raises RuntimeError with a code of its own
        raise FormatError(f"not a whole program of ExecuTorch ({first_line(error)}); truncated or damaged, copy it again") from None


def _executorch() -> tuple[Any, Any, Any]:
    """(to_edge_transform_and_lower, XnnpackPartitioner, Runtime); ExportError where they are not to be had."""
    require_torch("executorch")
    compiler = Path(sysconfig.get_path("scripts"), "flatc")  # its own, not on the PATH of an environment that is not activated
    if shutil.which("flatc") is None and compiler.exists():
        os.environ.setdefault("FLATC_EXECUTABLE", str(compiler))
    if find_spec("executorch") is None:
        raise ExportError(f"--format executorch needs executorch; pip install 'ticketkit[executorch]' ({LINES})")
    try:
        with quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
            from executorch.runtime import Runtime
    except Exception as error:  # ImportError, OSError or RuntimeError, by what of it does not fit
        installed = f"executorch {version('executorch')} does not load with torch {version('torch')}"
        raise ExportError(f"{installed}: {first_line(error)}; {LINES}") from None
    return to_edge_transform_and_lower, XnnpackPartitioner, Runtime
