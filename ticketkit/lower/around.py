"""Layers whose tensors have other axes than the operators take, and the Reshapes that therefore stand around a sparse node.

SparseGemm multiplies rows [N, K]: of a product of more axes all but the last become one. SparseConv takes images: sequences [N, C, L]
become images [N, C, 1, L] of one row. Nothing moves in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import NodeProto, helper

from ticketkit.formats import Array
from ticketkit.lower.fuse import Fused


def around(
    fused: Fused, constant: Callable[[str, Array], str], fresh: Callable[[str], str]
) -> tuple[list[NodeProto], str, str, list[NodeProto]]:
    """(nodes before, input and output of the fused node, nodes after); no nodes where the layer's own input and output will do.

    Args:
        fused: the layer and what follows it.
        constant: name and value of an initializer -> the name it gets.
        fresh: name for a tensor -> the same or, if it is taken, another.
    """
    layer, name = fused.layer, fused.layer.name
    if not layer.leading and not layer.sequence:
        return [], layer.x, fused.output, []
    x, y = fresh(f"{name}.x"), fresh(f"{name}.y")
    if layer.sequence:
        inside, outside = ([0, 0, 1, -1], [0, 0, -1])  # 0: as it is
        before = [_reshape(layer.x, constant(f"{name}.images", np.array(inside)), x)]
        return before, x, y, [_reshape(y, constant(f"{name}.sequences", np.array(outside)), fused.output)]
    outputs, columns = layer.weight.shape
    before = [_reshape(layer.x, constant(f"{name}.rows", np.array([-1, columns])), x)]
    sizes = [size if isinstance(size, int) else -1 for size in layer.leading]
    if sizes.count(-1) < 2:
        return before, x, y, [_reshape(y, constant(f"{name}.shape", np.array([*sizes, outputs])), fused.output)]
    whole, leading, shape = (fresh(f"{name}.{part}") for part in ("whole", "leading", "shape"))
    start, end, last = (constant(f"{name}.{part}", np.array([value])) for part, value in (("start", 0), ("end", -1), ("last", outputs)))
    after = [
        helper.make_node("Shape", [layer.x], [whole], name=whole),
        helper.make_node("Slice", [whole, start, end], [leading], name=leading),
        helper.make_node("Concat", [leading, last], [shape], name=shape, axis=0),
        _reshape(y, shape, fused.output),
    ]
    return before, x, y, after


def _reshape(x: str, shape: str, y: str) -> NodeProto:
    return helper.make_node("Reshape", [x, shape], [y], name=f"{y}.reshape")
