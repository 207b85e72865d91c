"""What each ONNX operator is in torch: the tables from which `ticketkit.runtime.torch_graph` rebuilds a graph.

A new operator is one line of `makers`, or of `ON_NUMBERS` if it computes with shapes.

torch is imported by the functions only: this module loads where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx

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


def _ints(value: Any) -> list[Any]:
    """Shapes, axes and the like: numbers, or the attribute of older opsets, as a plain list."""
    found: list[Any] = np.asarray(value).tolist()
    return found


# Numbers ------------------------------------------------------------------------------------------------------------------------

ON_NUMBERS: dict[str, Maker] = {
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


def makers() -> dict[str, Maker]:
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
