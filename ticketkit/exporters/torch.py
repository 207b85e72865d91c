"""A program of torch.export in one .pt2 file: sparse layers are torch operators of ticketkit on gap-coded weights, all others torch's own.

    import torch, ticketkit.runtime.torch_op
    network = torch.export.load("network.pt2").module()      # callable, torch.compile takes it

It needs torch and ticketkit with its native library where it runs, and says so where they are missing. torch does not promise that a newer
version reads it: keep the source. Its state dict has the tensors ``NAME.values`` f32, ``NAME.gaps`` u16 (`ticketkit.formats.gaps`) and
``NAME.bias`` of each sparse layer and the dense weights under their own names; equal ones once, under the first name.

Beside the program lies ``ticketkit.json``: ``format`` 1, ``version`` of ticketkit, ``inputs`` and ``outputs`` by name, in order,
``layers`` {sparse layer: its three tensors by name} and ``constants`` {ONNX name: tensor}.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from onnx import ModelProto

from ticketkit import __version__
from ticketkit.errors import FormatError, first_line
from ticketkit.exporters import onnx as sparse_onnx
from ticketkit.exporters._check import Runner, library_exists, random_inputs, require_equal
from ticketkit.exporters._torch import as_module, require_torch, trace
from ticketkit.formats import Array, gaps
from ticketkit.lower import Network, operators, read
from ticketkit.lower.graph import dims
from ticketkit.planner import Plan
from ticketkit.quiet import quiet
from ticketkit.runtime import torch_graph
from ticketkit.runtime.torch_operators import Step

if TYPE_CHECKING:
    import torch

SUFFIX = ".pt2"
HEADER = "ticketkit.json"
FORMAT = 1
PARTS = ("values", "gaps", "bias")
NOTES = ("from_node", "nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn")  # on the Python code, of this machine, behind a node


def encode(network: Network, plan: Plan) -> bytes:
    """The bytes of the file.

    Raises:
        ExportError: torch is missing or cannot export the network, or the plan leaves every layer dense.
        ModelError: an operator unknown to `ticketkit.runtime.torch_graph`.
    """
    require_torch("torch")
    import torch

    model = read(sparse_onnx.encode(network, plan))
    program = torch_graph.rebuild(model, {output: _step(sparse) for output, sparse in operators.decode(model).items()})
    module, names = as_module(program)
    layers = {node.name: dict(zip(PARTS, (names[part] for part in node.input[1:4]), strict=True)) for node in operators.nodes(model)}
    sparse = {tensor for parts in layers.values() for tensor in parts.values()}
    header = {
        "format": FORMAT,
        "version": __version__,
        "inputs": program.inputs,
        "outputs": program.outputs,
        "layers": layers,
        "constants": {name: tensor for name, tensor in names.items() if tensor not in sparse},
    }
    exported, file = trace(module, *_examples(network)), io.BytesIO()
    exported.example_inputs = None  # as large as the images, and nobody needs them
    for node in exported.graph.nodes:
        for note in NOTES:
            node.meta.pop(note, None)
    torch.export.save(exported, file, extra_files={HEADER: json.dumps(header)})
    return file.getvalue()


def decode(data: bytes, network: Network) -> ModelProto:
    """The network, once every tensor of the file has proved to be its own; ExportError if one is not, FormatError for a damaged file."""
    program, header = load(data)
    state = {name: tensor.numpy() for name, tensor in program.state_dict.items()}
    for layer in network.layers:
        if layer.name in header["layers"]:
            parts = {part: state[name] for part, name in header["layers"][layer.name].items()}
            require_equal(f"{layer.name}.bias", parts.pop("bias"), layer.bias)
            require_equal(f"{layer.name}.weight", gaps.unpack(parts, tuple(layer.weight.shape)), layer.weight)
    for name, tensor in header["constants"].items():
        require_equal(name, state[tensor], network.graph.constant(name))
    return network.model


def runners(data: bytes, network: Network) -> Mapping[str, Runner]:
    """The program itself, where the native library that it needs is there."""
    import torch

    if not library_exists():
        return {}
    program, header = load(data)
    module = program.module()

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(feeds[name]) for name in header["inputs"]))
        return dict(zip(header["outputs"], (y.numpy() for y in outputs), strict=True))

    return {"torch": run}


def load(data: bytes) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """The program of a file and the header beside it; FormatError for a damaged one."""
    import torch

    from ticketkit.runtime import torch_op  # noqa: F401  the operators must be known

    extra = {HEADER: ""}
    try:
        with quiet():
            program = torch.export.load(io.BytesIO(data), extra_files=extra)
        header: dict[str, Any] = json.loads(extra[HEADER])
    except Exception as error:  # zipfile's, json's and torch's own, which have no common base
        raise FormatError(f"not a whole program of torch.export ({first_line(error)}); truncated or damaged, copy it again") from None
    if header.get("format") != FORMAT:
        raise FormatError(f"expected torch file format {FORMAT}, got {header.get('format')}; upgrade ticketkit")
    return program, header


def _examples(network: Network) -> tuple[list[torch.Tensor], list[dict[int, Any]]]:
    """A tensor for each input of the network, and which of its axes are free."""
    import torch

    dim = torch.export.Dim
    shapes = [dims(info) or () for info in network.model.graph.input]
    free = [{i: dim.AUTO if i else dim.DYNAMIC for i, size in enumerate(shape) if not isinstance(size, int)} for shape in shapes]
    return [torch.from_numpy(array) for array in random_inputs(network).values()], free


def _step(sparse: operators.Sparse) -> Step:
    """A node of ours as a torch operator: x, values, gaps, bias, residual? -> y. Activations that are no bounds are torch's own."""
    from torch.nn import functional as F

    from ticketkit.runtime import torch_op

    shape, epilogue, execution = list(sparse.shape), sparse.epilogue, sparse.execution
    bounds = {"Relu": (0.0, None), "Clip": epilogue.parameters}.get(epilogue.activation, (None, None))
    own: dict[str, Callable[..., torch.Tensor]] = {"LeakyRelu": F.leaky_relu, "HardSwish": F.hardswish, "Silu": F.silu}
    other = own.get(epilogue.activation)
    window = [sparse.window[key] for key in operators.WINDOW if sparse.window]
    rest = (shape, *window, sparse.group, *bounds, execution.format, execution.x_layout, execution.y_layout)

    def step(x: torch.Tensor, values: torch.Tensor, gaps: torch.Tensor, bias: torch.Tensor, residual: Any = None) -> torch.Tensor:
        if window:
            y = torch_op.sparse_conv2d(x, values, gaps, bias, residual, *rest)
        else:
            y = torch_op.sparse_linear(x, values, gaps, bias, shape, *bounds, execution.format)
        return other(y, *epilogue.parameters) if other else y

    return step
