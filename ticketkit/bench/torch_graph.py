"""A plain ONNX graph as a torch module, for the two torch engines of `bench`.

It knows the operators that vision networks are captured to, and refuses any other by name. The converters on the package
index were tried first: the best kept of them (onnx2torch 1.5.15, 2024) rejects what torch.onnx writes since opset 18. Every bench
compares the module's output with onnxruntime's, so a mistake here can lose a row but cannot give a wrong one.

torch is imported by `as_module` only: this module loads where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
from onnx import numpy_helper

from ticketkit.errors import ModelError

if TYPE_CHECKING:
    import torch

Attributes: TypeAlias = dict[str, Any]
Step: TypeAlias = Callable[..., Any]  # tensors in, tensor out
Maker: TypeAlias = Callable[[Attributes], Step]


def as_module(path: Path) -> torch.nn.Module:
    """The graph of the ONNX file at `path` as an eval-mode module: graph inputs in order -> tuple of graph outputs.

    Raises ModelError for an operator, or a padding rule, outside the table below.
    """
    import torch

    graph = onnx.load(str(path)).graph
    makers = _makers()
    constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    constants |= {n.output[0]: torch.from_numpy(_constant(_attributes(n))) for n in graph.node if n.op_type == "Constant"}
    nodes = [node for node in graph.node if node.op_type != "Constant"]
    for node in nodes:
        if node.op_type not in makers or node.domain or _attributes(node).get("auto_pad", b"NOTSET") != b"NOTSET":
            what = f"{node.domain or 'ai.onnx'}.{node.op_type}"
            raise ModelError(f"torch: cannot rebuild node {node.name!r} ({what}, auto_pad unset); known: {', '.join(makers)}")
    names = [i.name for i in graph.input if i.name not in constants]
    outputs = [o.name for o in graph.output]
    last_use = {name: i for i, node in enumerate(nodes) for name in node.input if name not in (*constants, *outputs)}
    steps = [
        (makers[node.op_type](_attributes(node)), list(node.input), node.output[0], [n for n, at in last_use.items() if at == i])
        for i, node in enumerate(nodes)
    ]

    class Graph(torch.nn.Module):  # type: ignore[misc]
        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            values = {**constants, **dict(zip(names, inputs, strict=True)), "": None}
            for step, arguments, output, finished in steps:
                values[output] = step(*(values[a] for a in arguments))
                for name in finished:  # else every activation would stay alive, and cost cache
                    values[name] = None
            return tuple(values[o] for o in outputs)

    return Graph().eval()


def _attributes(node: onnx.NodeProto) -> Attributes:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _constant(attributes: Attributes) -> np.ndarray:
    ((kind, value),) = attributes.items()  # the standard allows exactly one
    number = np.float32 if "float" in kind else np.int64
    return np.array(numpy_helper.to_array(value) if kind == "value" else np.asarray(value, number))


def _ints(value: Any) -> list[int]:
    """Shapes, axes and the like: a constant tensor, or the attribute of older opsets, as plain numbers."""
    return [int(v) for v in value]


def _makers() -> dict[str, Maker]:
    """ONNX operator -> (attributes -> function of its inputs). One line per operator where torch has its twin."""
    import torch
    from torch.nn import functional as F

    def plain(function: Callable[..., torch.Tensor]) -> Maker:
        return lambda _: function

    return {
        "Add": plain(torch.add),
        "AveragePool": _average_pool,
        "BatchNormalization": lambda a: lambda x, w, b, mean, var: F.batch_norm(x, mean, var, w, b, eps=a.get("epsilon", 1e-5)),
        "Cast": lambda a: lambda x: x if a["to"] == onnx.TensorProto.FLOAT else x.to(_dtype(a["to"])),
        "Clip": _clip,
        "Concat": lambda a: lambda *xs: torch.cat(xs, a["axis"]),
        "Conv": _conv,
        "Div": plain(torch.div),
        "Dropout": plain(lambda x, *_: x),
        "Flatten": lambda a: lambda x: x.reshape(x.shape[: a.get("axis", 1)].numel(), -1),
        "Gemm": _gemm,
        "GlobalAveragePool": plain(lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True)),
        "HardSigmoid": lambda a: lambda x: torch.clamp(x * a.get("alpha", 0.2) + a.get("beta", 0.5), 0, 1),
        "HardSwish": plain(F.hardswish),
        "Identity": plain(lambda x: x),
        "LeakyRelu": lambda a: lambda x: F.leaky_relu(x, a.get("alpha", 0.01)),
        "MatMul": plain(torch.matmul),
        "MaxPool": _max_pool,
        "Mul": plain(torch.mul),
        "Pad": _pad,
        "ReduceMean": _reduce_mean,
        "Relu": plain(torch.relu),
        "Reshape": _reshape,
        "Sigmoid": plain(torch.sigmoid),
        "Slice": _slice,
        "Softmax": lambda a: lambda x: torch.softmax(x, a.get("axis", -1)),
        "Squeeze": lambda a: lambda x, axes=None: x.squeeze(tuple(_ints(a["axes"] if axes is None else axes))),
        "Sub": plain(torch.sub),
        "Tanh": plain(torch.tanh),
        "Transpose": lambda a: lambda x: x.permute(*a["perm"]),
    }


def _dtype(onnx_type: int) -> torch.dtype:
    import torch

    return torch.from_numpy(np.zeros(0, onnx.helper.tensor_dtype_to_np_dtype(onnx_type))).dtype


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
    import torch

    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)

    def step(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        x, w = x.t() if a.get("transA") else x, w.t() if a.get("transB") else w
        if alpha == 1 and beta == 1 and b is not None and b.dim() == 1:
            return torch.nn.functional.linear(x, w.t(), b)
        y = alpha * (x @ w)
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

    def step(x: torch.Tensor, low: torch.Tensor | None = None, high: torch.Tensor | None = None) -> torch.Tensor:
        least, most = (a.get(n) if t is None else float(t) for n, t in (("min", low), ("max", high)))
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
        fill = float(value) if value is not None else a.get("value", 0.0)
        return F.pad(x, flat, value=fill) if mode == "constant" else F.pad(x, flat[: 2 * (x.dim() - 2)], mode=mode)

    return step


def _reduce_mean(a: Attributes) -> Step:
    keep = bool(a.get("keepdims", 1))

    def step(x: torch.Tensor, axes: Any = None) -> torch.Tensor:
        chosen = a.get("axes") if axes is None else axes
        return x.mean(_ints(range(x.dim()) if chosen is None else chosen), keepdim=keep)

    return step


def _reshape(a: Attributes) -> Step:
    def step(x: torch.Tensor, shape: Any) -> torch.Tensor:
        sizes = _ints(shape)
        return x.reshape([x.shape[i] if s == 0 and not a.get("allowzero") else s for i, s in enumerate(sizes)])

    return step


def _slice(a: Attributes) -> Step:
    def step(x: torch.Tensor, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> torch.Tensor:
        first, last = _ints(a["starts"] if starts is None else starts), _ints(a["ends"] if ends is None else ends)
        where = _ints(axes) if axes is not None else a.get("axes", range(len(first)))
        strides = _ints(steps) if steps is not None else [1] * len(first)
        for axis, start, end, stride in zip(where, first, last, strides, strict=True):
            length = int(x.shape[axis])
            if stride < 1:
                raise ModelError(f"torch: Slice expected steps of 1 or more, got {stride}")
            chosen = slice(start, min(end, length), stride).indices(length)
            x = x[(slice(None),) * (axis % x.dim()) + (slice(*chosen),)]
        return x

    return step
