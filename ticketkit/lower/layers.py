"""The layers of a clean graph: every convolution and every product with a constant weight, in execution order."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
from onnx import NodeProto, helper

from ticketkit.errors import ModelError
from ticketkit.formats import Array
from ticketkit.lower.graph import Dim, Graph

Shapes: TypeAlias = dict[str, tuple[Dim, ...]]


@dataclass(frozen=True, eq=False)
class Layer:
    """One convolution or fully connected layer.

    Attributes:
        name: unique within its graph.
        op: the ONNX operator it was: Conv, ConvTranspose, Gemm or MatMul.
        at: position of its node in the graph.
        x, y: names of its input and output tensors.
        x_shape, y_shape: their shapes, None where ONNX cannot infer them.
        weight: f32 [M, C/group, kh, kw] for Conv, [M, K] for Gemm and MatMul (transposed and scaled so that y = x Wᵀ + b).
        bias: f32 [M], zeros where the node has none, None where it is computed at run time.
        bias_at: position of the node that adds it, where that is an Add after a MatMul; else None.
        sequence: whether it is a convolution of sequences [N, C, L]; weight, shapes and window are those of one of images [N, C, 1, L].
        leading: of a MatMul whose input has more than two axes all but the last, as far as they are the same for every input; an input of
            unknown rank counts as one of three unknown axes. Such a layer takes them as rows (`ticketkit.lower.around`). Else empty.
        group: of a convolution, else 1.
        window: strides, pads (top, left, bottom, right) and dilations of a 2-D convolution, else empty.
        obstacle: why no sparse kernel can take this layer, "" if one can.
    """

    name: str
    op: str
    at: int
    x: str
    y: str
    x_shape: tuple[int, ...] | None
    y_shape: tuple[int, ...] | None
    weight: Array
    bias: Array | None
    group: int
    window: dict[str, list[int]]
    obstacle: str
    bias_at: int | None = None
    leading: tuple[Dim, ...] = ()
    sequence: bool = False

    @property
    def depthwise(self) -> bool:
        """Whether each output channel of a convolution reads one input channel, its own."""
        return self.op == "Conv" and 1 < self.group == self.weight.shape[0] and self.weight.shape[1] == 1

    @property
    def pointwise(self) -> bool:
        """Whether each output pixel of a convolution over all channels reads the input pixel at its own place."""
        window = self.window
        one = self.op == "Conv" and self.group == 1 and self.weight.shape[2:] == (1, 1)
        return bool(one and window and {*window["strides"]} == {1} and not any(window["pads"]))

    @property
    def nnz(self) -> int:
        """Number of weights that are not zero."""
        return int(np.count_nonzero(self.weight))

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are zero."""
        return 1 - self.nnz / self.weight.size

    @property
    def uses(self) -> int | None:
        """How often each weight is multiplied in one run of the model: N*OH*OW, or the rows of a product; None if unknown."""
        if self.op == "ConvTranspose":
            return None if self.x_shape is None else prod((self.x_shape[0], *self.x_shape[2:]))
        if self.y_shape is None:
            return None
        return prod((self.y_shape[0], *self.y_shape[2:])) if self.op == "Conv" else prod(self.y_shape[:-1])


def layers(graph: Graph, assumed: Shapes, declared: Shapes) -> tuple[Layer, ...]:
    """The layers of a clean graph.

    Args:
        graph: constants folded, so that weights are initializers.
        assumed: shapes of its tensors for concrete inputs, from `ticketkit.lower.graph.shapes`.
        declared: the same for the inputs as declared; what must hold for every input is read here.

    Raises:
        ModelError: a weight or bias holds NaN or infinity.
    """
    found = []
    for at, node in enumerate(graph.model.graph.node):
        reader = {"Conv": _conv, "ConvTranspose": _conv, "Gemm": _gemm, "MatMul": _matmul}.get(node.op_type)
        if reader is None or node.domain not in ("", "ai.onnx"):
            continue
        weight = graph.constant(node.input[1])
        if weight is None or weight.dtype.kind != "f" or weight.ndim < 2:
            continue
        if not weight.size:
            raise ModelError(f"{node.name}: its weight {list(weight.shape)} has no elements; the model is broken, export it again")
        x_shape, y_shape = (assumed.get(name) for name in (node.input[0], node.output[0]))
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        fields = reader(node, attributes, weight, graph, declared.get(node.input[0]))
        if fields.get("sequence"):
            x_shape, y_shape = _as_image(x_shape), _as_image(y_shape)
        layer = Layer(node.name, node.op_type, at, node.input[0], node.output[0], _whole(x_shape), _whole(y_shape), **fields)
        for what, array in (("weight", weight), ("bias", layer.bias)):
            if array is not None and not np.isfinite(array).all():
                raise ModelError(f"{layer.name}: its {what} holds NaN or infinity; the model is broken, export or train it again")
        found.append(layer)
    return tuple(found)


def _conv(node: NodeProto, attributes: dict[str, Any], weight: Array, graph: Graph, x_shape: tuple[Dim, ...] | None) -> dict[str, Any]:
    group, spatial = int(attributes.get("group", 1)), weight.ndim - 2
    channels = weight.shape[1] * group if node.op_type == "ConvTranspose" else weight.shape[0]
    bias = _bias(node, graph, channels)
    sequence = spatial == 1 and node.op_type == "Conv"
    if sequence:
        weight, x_shape = weight[:, :, None], _as_image(x_shape)
        above = {"strides": 1, "dilations": 1, "pads": 0}
        attributes = {key: [n for side in a for n in (above[key], side)] if key in above else a for key, a in attributes.items()}
    window = _window(attributes, weight.shape[2:], x_shape) if weight.ndim == 4 and node.op_type == "Conv" else {}
    obstacles = {
        "transposed convolution": node.op_type == "ConvTranspose",
        f"{spatial}-D convolution": spatial > 2,
        f"grouped convolution ({group} groups)": group > 1 and weight.shape[:2] != (group, 1),
        f"weights of type {weight.dtype}": weight.dtype != np.float32,
        "bias computed at run time": bias is None,
        "padding depends on an unknown input size": not window,
        "negative padding": min(window.get("pads", [0]), default=0) < 0,
    }
    return {"weight": weight, "bias": bias, "group": group, "window": window, "sequence": sequence, "obstacle": _first(obstacles)}


def _gemm(node: NodeProto, attributes: dict[str, Any], weight: Array, graph: Graph, x_shape: tuple[Dim, ...] | None) -> dict[str, Any]:
    oriented = weight if attributes.get("transB", 0) else weight.T
    alpha, beta = (weight.dtype.type(attributes.get(key, 1.0)) for key in ("alpha", "beta"))
    bias = _bias(node, graph, oriented.shape[0])
    obstacles = {
        f"weights of type {weight.dtype}": weight.dtype != np.float32,
        "transposed input": bool(attributes.get("transA", 0)),
        "bias computed at run time, or one per row": bias is None,
    }
    return {
        "weight": np.ascontiguousarray(oriented if alpha == 1 else oriented * alpha),
        "bias": None if bias is None else bias * beta,
        "group": 1,
        "window": {},
        "obstacle": _first(obstacles),
    }


def _matmul(node: NodeProto, attributes: dict[str, Any], weight: Array, graph: Graph, x_shape: tuple[Dim, ...] | None) -> dict[str, Any]:
    stacked = weight.ndim > 2  # matrices used one by one
    oriented = np.ascontiguousarray(weight.reshape(-1, weight.shape[-1]).T)
    leading = (None, None) if x_shape is None else x_shape[:-1]
    least = 1 if x_shape is None else len(x_shape)
    bias, bias_at = (None, None) if stacked else _added(node, graph, oriented.shape[0], least)
    obstacles = {
        f"weights of type {weight.dtype}": weight.dtype != np.float32,
        "stacked weight": stacked,
        "input of rank 1": not leading,
        "empty input": 0 in leading,
    }
    return {
        "weight": oriented,
        "bias": np.zeros(oriented.shape[0], np.float32) if bias is None else bias,
        "bias_at": bias_at,
        "leading": leading if len(leading) > 1 else (),
        "group": 1,
        "window": {},
        "obstacle": _first(obstacles),
    }


def _added(node: NodeProto, graph: Graph, channels: int, rank: int) -> tuple[Array | None, int | None]:
    """(bias [channels], its position) where only an Add of a constant per channel reads a product of that rank or more, else Nones."""
    following = graph.only_reader(node.output[0])
    if following is None or following[1].op_type != "Add" or following[1].domain not in ("", "ai.onnx"):
        return None, None
    at, add = following
    bias = graph.constant(add.input[1] if add.input[0] == node.output[0] else add.input[0])
    if bias is None or bias.dtype != np.float32 or bias.ndim > rank or (bias.size > 1 and bias.shape[-1:] != (bias.size,)):
        return None, None
    return (np.ascontiguousarray(np.broadcast_to(bias.ravel(), (channels,))), at) if bias.size in (1, channels) else (None, None)


def _bias(node: NodeProto, graph: Graph, channels: int) -> Array | None:
    """Bias [channels], zeros if the node has none; None unless it is constant and one per channel."""
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros(channels, np.float32)
    bias = graph.constant(node.input[2])
    if bias is None or bias.size not in (1, channels) or (bias.size > 1 and bias.shape[-1] != channels):
        return None
    return np.ascontiguousarray(np.broadcast_to(bias.ravel(), (channels,)))


def _window(attributes: dict[str, Any], kernel: tuple[int, ...], x_shape: tuple[Dim, ...] | None) -> dict[str, list[int]]:
    """Strides, explicit pads and dilations; empty where SAME padding needs an input size that is not known."""
    strides, dilations = (list(attributes.get(key, (1, 1))) for key in ("strides", "dilations"))
    pads = list(attributes.get("pads", (0, 0, 0, 0)))
    mode = attributes.get("auto_pad", b"NOTSET").decode()
    if mode == "VALID":
        pads = [0, 0, 0, 0]
    elif mode.startswith("SAME"):
        sizes = _whole(x_shape[2:]) if x_shape is not None else None
        if sizes is None and strides != [1, 1]:
            return {}
        total = [
            max(0, (-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size)
            for size, stride, dilation, k in zip(sizes or (1, 1), strides, dilations, kernel, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = small + large if mode == "SAME_UPPER" else large + small
    return {"strides": strides, "pads": pads, "dilations": dilations}


def _as_image(shape: tuple[Dim, ...] | None) -> tuple[Dim, ...] | None:
    """The shape of sequences [N, C, L] as that of images of one row."""
    return None if shape is None else (*shape[:2], 1, *shape[2:])


def _whole(shape: tuple[Dim, ...] | None) -> tuple[int, ...] | None:
    """A shape whose every dimension is a number, else None."""
    numbers = tuple(d for d in shape or () if isinstance(d, int))
    return numbers if shape is not None and len(numbers) == len(shape) else None


def _first(obstacles: dict[str, bool]) -> str:
    return next((text for text, holds in obstacles.items() if holds), "")
