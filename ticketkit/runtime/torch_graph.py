"""An ONNX graph as a torch program, for the torch export targets and the torch engines of `bench`.

It knows the operators of `ticketkit.runtime.torch_operators`, those that vision networks are captured to, and refuses any other by name.
The converters on the package index were tried first: the best kept of them (onnx2torch 1.5.15, 2024) rejects what torch.onnx writes since
opset 18. Every export, and every bench, compares outputs with onnxruntime's, so a mistake here can lose a file or a row but cannot give
a wrong one.

Shapes, axes and bounds are numbers while the program runs, not tensors: numpy arrays, of objects where torch traces sizes symbolically.

torch is imported by the functions only: this module loads where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from ticketkit.errors import ModelError
from ticketkit.formats import Array
from ticketkit.runtime.torch_operators import NUMBERS, ON_NUMBERS, Attributes, Maker, Step, makers

if TYPE_CHECKING:
    import torch

MOST_NUMBERS = 1024  # integer constants up to this many elements may be numbers; larger ones are data


@dataclass(frozen=True)
class _Call:
    """One node: its step, (is it a number, name) of each argument, the names it writes, whether these are numbers, and the tensors that
    nobody reads after it."""

    step: Step
    arguments: tuple[tuple[bool, str], ...]
    outputs: tuple[str, ...]
    numbers: bool
    finished: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A graph ready to run in torch.

    Attributes:
        inputs, outputs: names, in the order of the graph.
        constants: the tensors it reads beside the inputs, by name.
        numbers: known before it runs.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Array]
    numbers: Mapping[str, Array]
    calls: tuple[_Call, ...]

    def run(self, constants: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs, for `self.constants` as tensors."""
        values: dict[str, Any] = {**constants, **dict(zip(self.inputs, inputs, strict=True)), "": None}
        numbers: dict[str, Any] = {**self.numbers, "": None}
        for call in self.calls:
            results = call.step(*(numbers[name] if number else values[name] for number, name in call.arguments))
            results = results if isinstance(results, tuple) else (results,)
            (numbers if call.numbers else values).update(zip(call.outputs, results, strict=False))
            for name in call.finished:  # else every activation would stay alive, and cost cache
                values[name] = None
        return tuple(values[name] for name in self.outputs)


def rebuild(model: ModelProto, ours: Mapping[str, Step] | None = None) -> Program:
    """The steps of a graph.

    Args:
        model: plain ONNX, but for the nodes that write a name of `ours`: there stand their steps.

    Raises:
        ModelError: an operator, or a use of one, outside the tables of `ticketkit.runtime.torch_operators`.
    """
    graph = model.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    constants |= {n.output[0]: _constant(_attributes(n)) for n in graph.node if n.op_type == "Constant"}
    nodes = [node for node in graph.node if node.op_type != "Constant"]
    inputs, outputs = [i.name for i in graph.input if i.name not in constants], [o.name for o in graph.output]
    known = {name for name, array in constants.items() if array.dtype.kind in "iub" and array.size <= MOST_NUMBERS}
    last_use = {name: at for at, node in enumerate(nodes) for name in node.input if name not in (*constants, *outputs, *known)}
    read = {*outputs, *(name for node in nodes for name in node.input)}
    calls, operators, ours = [], makers(), ours or {}
    for at, node in enumerate(nodes):
        attributes = _attributes(node)
        if _gives_numbers(node, attributes, known):
            step = ON_NUMBERS[node.op_type](attributes)
            arguments = [(node.op_type != "Shape", name) for name in node.input]
            known.update(node.output)
        else:
            step = ours.get(node.output[0]) or _plain(node, attributes, operators, read)
            arguments = [_argument(node, i, name, constants, known) for i, name in enumerate(node.input)]
        finished = tuple(name for name, end in last_use.items() if end == at and name not in known)
        calls.append(_Call(step, tuple(arguments), tuple(node.output), node.output[0] in known, finished))
    for name in outputs:
        if name in known:
            raise ModelError(f"torch: output {name!r} is a shape, expected a tensor computed from the inputs")
    used = {*(argument for call in calls for argument in call.arguments), *((False, name) for name in outputs)}
    tensors, numbers = ({name: array for name, array in constants.items() if (kind, name) in used} for kind in (False, True))
    return Program(tuple(inputs), tuple(outputs), tensors, numbers, tuple(calls))


def as_module(model: ModelProto) -> torch.nn.Module:
    """The graph as an eval-mode module without parameters: graph inputs in order -> tuple of graph outputs. ModelError as `rebuild`."""
    import torch

    program = rebuild(model)
    constants = {name: torch.from_numpy(array.copy()) for name, array in program.constants.items()}

    class Graph(torch.nn.Module):  # type: ignore[misc]
        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return program.run(constants, inputs)

    return Graph().eval()


def _gives_numbers(node: NodeProto, attributes: Attributes, known: set[str]) -> bool:
    """Whether what a node computes is numbers: a shape, or arithmetic on others."""
    if node.op_type == "Cast" and attributes["to"] not in (onnx.TensorProto.INT32, onnx.TensorProto.INT64):
        return False
    return node.op_type == "Shape" or (node.op_type in ON_NUMBERS and all(name in known for name in node.input if name))


def _plain(node: NodeProto, attributes: Attributes, operators: Mapping[str, Maker], read: set[str]) -> Step:
    """The step of a standard node."""
    several = node.op_type != "Split" and any(name and name in read for name in node.output[1:])
    if node.op_type not in operators or node.domain or several or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        what = f"{node.domain or 'ai.onnx'}.{node.op_type}"
        raise ModelError(f"torch: cannot rebuild node {node.name!r} ({what}, auto_pad unset, one output); known: {', '.join(operators)}")
    return operators[node.op_type]({**attributes, "outputs": len(node.output)})


def _argument(node: NodeProto, position: int, name: str, constants: Mapping[str, Array], known: set[str]) -> tuple[bool, str]:
    """(is it a number, name) of one input of a node that computes tensors."""
    if position in NUMBERS.get(node.op_type, ()):
        if name and name not in constants and name not in known:
            raise ModelError(f"torch: cannot rebuild node {node.name!r}: input {position} of {node.op_type} is computed from data")
        return True, name
    if name in known and name not in constants:
        raise ModelError(f"torch: cannot rebuild node {node.name!r}: {node.op_type} of a shape")
    return False, name


def _attributes(node: onnx.NodeProto) -> Attributes:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _constant(attributes: Attributes) -> Array:
    ((kind, value),) = attributes.items()  # the standard allows exactly one
    number = np.float32 if "float" in kind else np.int64
    return np.array(numpy_helper.to_array(value) if kind == "value" else np.asarray(value, number))
