"""An ONNX graph as a torch program, for the torch export targets and the torch engines of `bench`.

It knows the operators that vision networks are captured to, and refuses any other by name. The converters on the package index were tried
first: the best kept of them (onnx2torch 1.5.15, 2024) rejects what torch.onnx writes since opset 18. Every export, and every bench,
compares outputs with onnxruntime's, so a mistake here can lose a file or a row but cannot give a wrong one.

Shapes, axes and bounds are numbers while the program runs, not tensors: numpy arrays, of objects where torch traces sizes symbolically.

torch is imported by the functions only: this module loads where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from ticketkit.errors import ModelError
from ticketkit.formats import Array

if TYPE_CHECKING:
    import torch

Attributes: TypeAlias = dict[str, Any]
Step: TypeAlias = Callable[..., Any]  # tensors and numbers in, a tensor or a tuple of them out
Maker: TypeAlias = Callable[[Attributes], Step]

# Operator -> positions of the inputs that must be numbers
NUMBERS = {
    "Clip": (1, 2), "Expand": (1,), "Pad": (1, 2, 3), "ReduceMax": (1,), "ReduceMean": (1,), "ReduceSum": (1,), "Reshape": (1,),
    "Resize": (1, 2, 3), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,), "Unsqueeze": (1,),
}  # fmt: skip
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
        ModelError: an operator, or a use of one, outside the tables below.
    """
    graph = model.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    constants |= {n.output[0]: _constant(_attributes(n)) for n in graph.node if n.op_type == "Constant"}
    nodes = [node for node in graph.node if node.op_type != "Constant"]
    inputs, outputs = [i.name for i in graph.input if i.name not in constants], [o.name for o in graph.output]
    known = {name for name, array in constants.items() if array.dtype.kind in "iub" and array.size <= MOST_NUMBERS}
    last_use = {name: at for at, node in enumerate(nodes) for name in node.input if name not in (*constants, *outputs, *known)}
    read = {*outputs, *(name for node in nodes for name in node.input)}
    calls, makers, ours = [], _makers(), ours or {}
    for at, node in enumerate(nodes):
        attributes = _attributes(node)
        if _gives_numbers(node, attributes, known):
            step = _ON_NUMBERS[node.op_type](attributes)
            arguments = [(node.op_type != "Shape", name) for name in node.input]
            known.update(node.output)
        else:
            step = ours.get(node.output[0]) or _plain(node, attributes, makers, read)
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
    return node.op_type == "Shape" or (node.op_type in _ON_NUMBERS and all(name in known for name in node.input if name))


def _plain(node: NodeProto, attributes: Attributes, makers: Mapping[str, Maker], read: set[str]) -> Step:
    """The step of a standard node."""
    several = node.op_type != "Split" and any(name and name in read for name in node.output[1:])
    if node.op_type not in makers or node.domain or several or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        what = f"{node.domain or 'ai.onnx'}.{node.op_type}"
        raise ModelError(f"torch: cannot rebuild node {node.name!r} ({what}, auto_pad unset, one output); known: {', '.join(makers)}")
    return makers[node.op_type]({**attributes, "outputs": len(node.output)})


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


def _ints(value: Any) -> list[Any]:
    """Shapes, axes and the like: numbers, or the attribute of older opsets, as a plain list."""
    found: list[Any] = np.asarray(value).tolist()
    return found


# Numbers ------------------------------------------------------------------------------------------------------------------------

_ON_NUMBERS: dict[str, Maker] = {
    "Add": lambda _: np.add,
    "Cast": lambda _: lambda n: n,
    "Concat": lambda a: lambda *ns: np.concatenate(ns, a["axis"]),
    "Div": lambda _: np.floor_divide,
    "Gather": lambda a: lambda n, at: np.take(n, at.astype(np.int64), a.get("axis", 0)),
    "Identity": lambda _: lambda n: n,
    "Mul": lambda _: np.multiply,
    "Reshape": lambda _: lambda n, shape: np.reshape(n, _ints(shape)),
    "Shape": lambda a: lambda x: np.fromiter(x.shape, object)[a.get("start", 0) : a.get("end")],
    "Slice": lambda a: lambda n, *ends: n[_slices(a, n.ndim, *ends)],
    "Squeeze": lambda a: lambda n, axes=None: np.squeeze(n, _axes(a, axes)),
    "Sub": lambda _: np.subtract,
    "Unsqueeze": lambda a: lambda n, axes=None: np.expand_dims(n, _axes(a, axes) or ()),
}


def _axes(a: Attributes, axes: Any = None) -> tuple[int, ...] | None:
    """The input of newer opsets, or the attribute of older ones; None where there is neither."""
    given = a.get("axes") if axes is None else axes
    return None if given is None else tuple(_ints(given))


def _slices(a: Attributes, rank: int, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> tuple[slice, ...]:
    """What Slice cuts from each axis."""
    first, last = _ints(a["starts"] if starts is None else starts), _ints(a["ends"] if ends is None else ends)
    where = _axes(a, axes) or range(len(first))
    strides = [1] * len(first) if steps is None else _ints(steps)
    found = [slice(None)] * rank
    for axis, start, end, stride in zip(where, first, last, strides, strict=True):
        if stride < 1:
            raise ModelError(f"torch: Slice expected steps of 1 or more, got {stride}")
        found[axis] = slice(start, end, stride)
    return tuple(found)


# Tensors ------------------------------------------------------------------------------------------------------------------------


def _makers() -> dict[str, Maker]:
    """ONNX operator -> (attributes -> function of its inputs). One line per operator where torch has its twin."""
    import torch
    from torch.nn import functional as F

    def plain(function: Callable[..., torch.Tensor]) -> Maker:
        return lambda _: function

    return {
        "Abs": plain(torch.abs),
        "Add": plain(torch.add),
        "AveragePool": _average_pool,
        "BatchNormalization": lambda a: lambda x, w, b, mean, var: F.batch_norm(x, mean, var, w, b, eps=a.get("epsilon", 1e-5)),
        "Cast": _cast,
        "Clip": _clip,
        "Concat": lambda a: lambda *xs: torch.cat(xs, a["axis"]),
        "Conv": _conv,
        "ConvTranspose": _conv_transpose,
        "Div": plain(torch.div),
        "Dropout": plain(lambda x, *_: x),
        "Elu": lambda a: lambda x: F.elu(x, a.get("alpha", 1.0)),
        "Erf": plain(torch.erf),
        "Exp": plain(torch.exp),
        "Expand": plain(_expand),
        "Flatten": lambda a: lambda x: x.reshape(prod(x.shape[: a.get("axis", 1)]), -1),
        "Gather": lambda a: lambda x, at: _gather(x, at, a.get("axis", 0)),
        "Gelu": lambda a: lambda x: F.gelu(x, approximate=a.get("approximate", b"none").decode()),
        "Gemm": _gemm,
        "GlobalAveragePool": plain(lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True)),
        "HardSigmoid": lambda a: lambda x: torch.clamp(x * a.get("alpha", 0.2) + a.get("beta", 0.5), 0, 1),
        "HardSwish": plain(F.hardswish),
        "Identity": plain(lambda x: x),
        "LayerNormalization": lambda a: lambda x, w, b=None: F.layer_norm(x, w.shape, w, b, a.get("epsilon", 1e-5)),
        "LeakyRelu": lambda a: lambda x: F.leaky_relu(x, a.get("alpha", 0.01)),
        "MatMul": plain(torch.matmul),
        "MaxPool": _max_pool,
        "Mul": plain(torch.mul),
        "Neg": plain(torch.neg),
        "PRelu": plain(lambda x, slope: torch.where(x < 0, x * slope, x)),
        "Pad": _pad,
        "Pow": plain(torch.pow),
        "ReduceMax": lambda a: _reduce(a, torch.amax),
        "ReduceMean": lambda a: _reduce(a, torch.mean),
        "ReduceSum": lambda a: _reduce(a, torch.sum),
        "Relu": plain(torch.relu),
        "Reshape": _reshape,
        "Resize": _resize,
        "Sigmoid": plain(torch.sigmoid),
        "Slice": lambda a: lambda x, *ends: x[_slices(a, x.dim(), *ends)],
        "Softmax": lambda a: lambda x: torch.softmax(x, a.get("axis", -1)),
        "Softplus": plain(F.softplus),
        "Split": _split,
        "Sqrt": plain(torch.sqrt),
        "Squeeze": lambda a: lambda x, axes=None: x.squeeze() if (gone := _axes(a, axes)) is None else x.squeeze(gone),
        "Sub": plain(torch.sub),
        "Tanh": plain(torch.tanh),
        "Transpose": lambda a: lambda x: x.permute(*a["perm"]),
        "Unsqueeze": lambda a: lambda x, axes=None: _unsqueeze(x, _axes(a, axes) or ()),
    }


def _cast(a: Attributes) -> Step:
    import torch

    dtype = torch.from_numpy(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(a["to"]))).dtype
    return lambda x: x.to(dtype)


def _split_pads(pads: Sequence[int]) -> tuple[list[int], list[int]]:
    """ONNX pads [begin..., end...] -> (symmetric part, what is left in the order of torch's F.pad: last axis first)."""
    axes = len(pads) // 2
    begin, end = list(pads[:axes]), list(pads[axes:])
    if begin == end:
        return begin, []
    return [0] * axes, [p for pair in zip(reversed(begin), reversed(end), strict=True) for p in pair]


def _conv(a: Attributes) -> Step:
    import torch
    from torch.nn import functional as F

    rank = len(a["kernel_shape"]) if "kernel_shape" in a else 2
    convolution = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[rank]
    same, extra = _split_pads(a.get("pads", [0] * 2 * rank))
    stride, dilation, groups = a.get("strides", [1] * rank), a.get("dilations", [1] * rank), a.get("group", 1)

    def step(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return convolution(F.pad(x, extra) if extra else x, w, b, stride, same, dilation, groups)

    return step


def _gemm(a: Attributes) -> Step:
    from torch.nn import functional as F

    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)

    def step(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        x, w = x.t() if a.get("transA") else x, w if a.get("transB") else w.t()
        if alpha == 1 and beta == 1 and (b is None or b.dim() == 1):
            return F.linear(x, w, b)
        y = alpha * F.linear(x, w)
        return y if b is None else y + beta * b

    return step


def _max_pool(a: Attributes) -> Step:
    import torch
    from torch.nn import functional as F

    kernel = a["kernel_shape"]
    same, extra = _split_pads(a.get("pads", [0] * 2 * len(kernel)))
    stride, dilation, ceil = a.get("strides", [1] * len(kernel)), a.get("dilations", 1), bool(a.get("ceil_mode", 0))

    def step(x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, extra, value=-torch.inf) if extra else x
        return F.max_pool2d(x, kernel, stride, same, dilation, ceil)

    return step


def _average_pool(a: Attributes) -> Step:
    from torch.nn import functional as F

    kernel = a["kernel_shape"]
    same, extra = _split_pads(a.get("pads", [0] * 2 * len(kernel)))
    if extra:
        raise ModelError(f"torch: AveragePool expected equal padding on both sides, got pads={list(a['pads'])}")
    stride, ceil = a.get("strides", [1] * len(kernel)), bool(a.get("ceil_mode", 0))
    return lambda x: F.avg_pool2d(x, kernel, stride, same, ceil, count_include_pad=bool(a.get("count_include_pad", 0)))


def _clip(a: Attributes) -> Step:
    import torch

    def step(x: torch.Tensor, low: Array | None = None, high: Array | None = None) -> torch.Tensor:
        least, most = (a.get(n) if t is None else t.item() for n, t in (("min", low), ("max", high)))
        return x if least is None and most is None else torch.clamp(x, least, most)

    return step


def _pad(a: Attributes) -> Step:
    from torch.nn import functional as F

    mode = a.get("mode", b"constant").decode()

    def step(x: torch.Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> torch.Tensor:
        amounts = _ints(a["pads"] if pads is None else pads)
        where = [axis % x.dim() for axis in (_ints(axes) if axes is not None else range(x.dim()))]
        both = dict(zip(where, zip(amounts[: len(where)], amounts[len(where) :], strict=True), strict=True))
        flat = [p for axis in reversed(range(x.dim())) for p in both.get(axis, (0, 0))]
        fill = a.get("value", 0.0) if value is None else value.item()
        return F.pad(x, flat, value=fill) if mode == "constant" else F.pad(x, flat[: 2 * (x.dim() - 2)], mode=mode)

    return step


def _reshape(a: Attributes) -> Step:
    def step(x: torch.Tensor, shape: Any) -> torch.Tensor:
        sizes = _ints(shape)
        return x.reshape([x.shape[i] if s == 0 and not a.get("allowzero") else s for i, s in enumerate(sizes)])

    return step


def _conv_transpose(a: Attributes) -> Step:
    import torch

    rank = len(a["kernel_shape"]) if "kernel_shape" in a else 2
    convolution = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}[rank]
    same, extra = _split_pads(a.get("pads", [0] * 2 * rank))
    if extra or "output_shape" in a:
        raise ModelError("torch: ConvTranspose expected equal padding on both sides and no output_shape")
    stride, dilation, groups = a.get("strides", [1] * rank), a.get("dilations", [1] * rank), a.get("group", 1)
    more = a.get("output_padding", [0] * rank)
    return lambda x, w, b=None: convolution(x, w, b, stride, same, more, groups, dilation)


def _expand(x: torch.Tensor, shape: Any) -> torch.Tensor:
    sizes = _ints(shape)
    own = [*[1] * (len(sizes) - x.dim()), *x.shape]
    sizes = [*[1] * (len(own) - len(sizes)), *sizes]
    return x.expand([d if s == 1 else s for d, s in zip(own, sizes, strict=True)])


def _gather(x: torch.Tensor, at: torch.Tensor, axis: int) -> torch.Tensor:
    axis, flat = axis % x.dim(), at.reshape(-1).long()
    found = x.index_select(axis, (flat < 0) * x.shape[axis] + flat)
    return found.reshape(*x.shape[:axis], *at.shape, *x.shape[axis + 1 :])


def _reduce(a: Attributes, function: Callable[..., torch.Tensor]) -> Step:
    keep = bool(a.get("keepdims", 1))
    if a.get("noop_with_empty_axes", 0):
        raise ModelError("torch: reductions expected noop_with_empty_axes 0, got 1")
    return lambda x, axes=None: function(x, _axes(a, axes) or tuple(range(x.dim())), keepdim=keep)


def _resize(a: Attributes) -> Step:
    from torch.nn import functional as F

    place, mode = a.get("coordinate_transformation_mode", b"half_pixel").decode(), a.get("mode", b"nearest").decode()
    rounding = a.get("nearest_mode", b"round_prefer_floor").decode()
    if mode == "nearest" and (place, rounding) == ("asymmetric", "floor"):
        options: Attributes = {"mode": "nearest"}
    elif mode == "linear" and place in ("align_corners", "half_pixel", "pytorch_half_pixel"):
        options = {"mode": "bilinear", "align_corners": place == "align_corners"}
    else:
        raise ModelError(f"torch: Resize expected nearest (asymmetric, floor) or linear (align_corners, half_pixel), got {mode}, {place}")

    def step(x: torch.Tensor, roi: Any = None, scales: Any = None, sizes: Any = None) -> torch.Tensor:
        if x.dim() != 4:
            raise ModelError(f"torch: Resize expected images [N, C, H, W], got rank {x.dim()}")
        if sizes is not None:
            return F.interpolate(x, size=_ints(sizes)[2:], **options)
        return F.interpolate(x, scale_factor=_ints(scales)[2:], **options)

    return step


def _split(a: Attributes) -> Step:
    def step(x: torch.Tensor, split: Any = None) -> tuple[torch.Tensor, ...]:
        axis, sizes = a.get("axis", 0), a.get("split") if split is None else _ints(split)
        return tuple(x.split(-(-x.shape[axis] // a["outputs"]) if sizes is None else sizes, axis))

    return step


def _unsqueeze(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x
