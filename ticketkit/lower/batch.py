"""Whether a model treats the images of a batch one by one, so that a batch may be run in pieces.

Every tensor is one of four things, found in one walk from inputs to outputs, or else the answer is no:

    BATCH   axis 0 counts images, and slice i is computed from slice i of the inputs and from nothing else
    rows R  the same, but R slices for each image, one image after the other: tokens, as products of rows take them
    FREE    the same for every batch: constants, and sizes of other axes
    SIZES   integers of which the first is the number of images and the others are FREE, such as the shape of a BATCH tensor

An operator that is not in the table below, or not used as its rule says, mixes images as far as we know.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, helper

from ticketkit.formats import Array
from ticketkit.lower import operators
from ticketkit.lower.graph import Dim, Graph, declare, dims, shapes

BATCH, FREE, SIZES, ROWS = "batch", "free", "sizes", "rows "
RANK = 4  # of the inputs: images


def independent(model: ModelProto) -> bool:
    """Whether running any cut of a batch along axis 0 and joining the outputs gives what the whole batch gives, up to rounding.

    Args:
        model: checked, at opset 12 or newer; plain or with nodes of `operators`.

    Returns:
        True where it is certain: inputs of rank 4 and outputs share one named first dimension, and every node keeps images apart.
    """
    graph = model.graph
    constants = {t.name for t in graph.initializer}
    inputs = {info.name: dims(info) or () for info in graph.input if info.name not in constants}
    outputs = [dims(info) or (None,) for info in graph.output]
    batch = {shape[0] for shape in (*inputs.values(), *outputs) if shape}
    if not inputs or not outputs or len(batch) != 1 or not isinstance(next(iter(batch)), str):
        return False
    if any(len(shape) != RANK or batch & {*shape[1:]} for shape in inputs.values()):
        return False
    try:
        walk = _Walk(model, dict.fromkeys(inputs, BATCH) | dict.fromkeys(constants, FREE))
    except onnx.shape_inference.InferenceError:
        return False
    return all(walk.follow(node) for node in graph.node) and all(walk.kinds.get(info.name) == BATCH for info in graph.output)


class _Walk:
    """What is known so far: the kind of each tensor, and for all of them the shapes that hold for every input."""

    def __init__(self, model: ModelProto, kinds: dict[str, str]) -> None:
        self.kinds = kinds
        self._graph = Graph(model)
        self._shapes = shapes(_skeleton(model), {})

    def follow(self, node: NodeProto) -> bool:
        """Notes the kind of what a node writes; False if it has none."""
        rule = RULES.get(node.op_type) if node.domain == "" else _sparse if node.domain == operators.DOMAIN else None
        kinds = [self.kinds.get(name) for name in node.input if name]
        if rule is None or None in kinds:
            return False
        kind = FREE if all(k == FREE for k in kinds) else rule(self, node)
        self.kinds.update((name, kind) for name in node.output if name and kind)
        return kind is not None

    def kind(self, node: NodeProto, at: int) -> str | None:
        """Of input `at`; an absent one is FREE."""
        return self.kinds[node.input[at]] if len(node.input) > at and node.input[at] else FREE

    def each(self, node: NodeProto) -> bool:
        """Whether input 0 is BATCH, or rows."""
        return self.kinds[node.input[0]] not in (FREE, SIZES)

    def free(self, node: NodeProto, start: int, stop: int | None = None) -> bool:
        """Whether these inputs are FREE or absent."""
        return all(self.kinds[name] == FREE for name in node.input[start:stop] if name)

    def shape(self, name: str) -> tuple[Dim, ...] | None:
        """As inferred; no batch size is assumed."""
        tensor = self._graph.constants.get(name)
        return tuple(tensor.dims) if tensor is not None else self._shapes.get(name)

    def rank(self, node: NodeProto, at: int = 0) -> int:
        """Of input `at`, -1 if unknown."""
        shape = self.shape(node.input[at])
        return -1 if shape is None else len(shape)

    def ints(self, node: NodeProto, key: str, at: int) -> list[int] | None:
        """A list given by an attribute or, in newer opsets, by the initializer at input `at`; None if neither."""
        values = _attribute(node, key, None)
        if values is None and len(node.input) > at:
            array: Array | None = self._graph.constant(node.input[at])
            values = None if array is None else array.reshape(-1).tolist()
        return [values] if isinstance(values, int) else values

    def beside(self, node: NodeProto, axes: list[int] | None, rank: int | None = None) -> bool:
        """Whether none of the axes of input 0 (or of so many) is axis 0; False for no axes, which stand for all."""
        rank = self.rank(node) if rank is None else rank
        return bool(axes) and rank > 0 and all(-rank <= axis < rank and axis % rank != 0 for axis in axes or ())

    def stretches(self, name: str, rank: int) -> bool:
        """Whether a tensor that broadcasts to this rank is the same for every index of axis 0."""
        shape = self.shape(name)
        return shape is not None and (len(shape) < rank or (len(shape) == rank and shape[0] == 1))


Rule = Callable[[_Walk, NodeProto], str | None]  # -> kind of the outputs; some input is not FREE


def _attribute(node: NodeProto, key: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == key), default)


def _only(node: NodeProto) -> bool:
    """Whether just the first output is asked for (others: indices into the whole batch, statistics of it)."""
    return not any(node.output[1:])


def _never(walk: _Walk, node: NodeProto) -> str | None:
    """Allowed among constants only."""
    return None


def _first(walk: _Walk, node: NodeProto) -> str | None:
    """Images in input 0, parameters in the others."""
    return walk.kind(node, 0) if walk.each(node) and walk.free(node, 1) and _only(node) else None


def _normalized(walk: _Walk, node: NodeProto) -> str | None:
    return None if _attribute(node, "training_mode", 0) else _first(walk, node)


def _cast(walk: _Walk, node: NodeProto) -> str | None:
    return walk.kind(node, 0)


def _sparse(walk: _Walk, node: NodeProto) -> str | None:
    """Images, their weight in three parts, and the residual, of the shape of the output."""
    apart = walk.each(node) and walk.free(node, 1, 4) and len(node.input) < 6 and _only(node)
    return walk.kind(node, 0) if apart and (len(node.input) < 5 or walk.kind(node, 4) == walk.kind(node, 0)) else None


def _elementwise(walk: _Walk, node: NodeProto) -> str | None:
    """Broadcasting: images stay on axis 0 if all batches have one rank, and nothing else has an extent there."""
    ranks = {walk.rank(node, at) for at in range(len(node.input)) if walk.kind(node, at) == BATCH}
    if len(ranks) != 1 or (rank := ranks.pop()) < 1:
        return None
    others = [name for name in node.input if name and walk.kinds[name] != BATCH]
    return BATCH if all(walk.kinds[name] == FREE and walk.stretches(name, rank) for name in others) else None


def _along_axis(default: int) -> Rule:
    """Works along one axis, given by attribute."""

    def rule(walk: _Walk, node: NodeProto) -> str | None:
        images = walk.kind(node, 0) == BATCH and walk.free(node, 1)
        return BATCH if images and walk.beside(node, [_attribute(node, "axis", default)]) else None

    return rule


def _softmax(walk: _Walk, node: NodeProto) -> str | None:
    """Before opset 13 from the axis on, then along it; either way axis 0 is outside unless named (defaults: 1, then the last)."""
    return BATCH if walk.kind(node, 0) == BATCH and walk.rank(node) > 1 and walk.beside(node, [_attribute(node, "axis", -1)]) else None


def _axes(walk: _Walk, node: NodeProto) -> str | None:
    """Reduces or drops some axes of input 0."""
    return BATCH if walk.kind(node, 0) == BATCH and walk.beside(node, walk.ints(node, "axes", 1)) else None


def _unsqueeze(walk: _Walk, node: NodeProto) -> str | None:
    axes, rank = walk.ints(node, "axes", 1), walk.rank(node)
    if walk.kind(node, 0) == SIZES:
        return SIZES if rank == 0 and walk.free(node, 1) else None
    known = walk.kind(node, 0) == BATCH and axes and rank > 0
    return BATCH if known and walk.beside(node, axes, rank + len(axes or ())) else None


def _concat(walk: _Walk, node: NodeProto) -> str | None:
    kinds = [walk.kind(node, at) for at in range(len(node.input))]
    if kinds[0] == SIZES and set(kinds[1:]) <= {FREE}:
        return SIZES
    return BATCH if set(kinds) == {BATCH} and walk.beside(node, [_attribute(node, "axis", 0)]) else None


def _flatten(walk: _Walk, node: NodeProto) -> str | None:
    rank, axis = walk.rank(node), _attribute(node, "axis", 1)
    return BATCH if walk.kind(node, 0) == BATCH and rank > 0 and axis in (1, 1 - rank) else None


def _reshape(walk: _Walk, node: NodeProto) -> str | None:
    """The number of images must stay in front: copied (0), taken from a shape, or left over (-1) when the rest is an image or a part."""
    kind = walk.kind(node, 0)
    if not walk.each(node):
        return None
    if walk.kind(node, 1) == SIZES:
        return BATCH if kind == BATCH else None
    target, shape = walk.ints(node, "shape", 1), walk.shape(node.input[0])
    if not target or not shape:
        return None
    if target[0] == 0:
        return None if _attribute(node, "allowzero", 0) else kind
    sizes = [d for d in shape[1:] if isinstance(d, int)]
    if target[0] != -1 or min(target[1:], default=1) < 1 or len(sizes) < len(shape) - 1:
        return None
    image, slices = prod(sizes) * (1 if kind == BATCH else int(str(kind).removeprefix(ROWS))), prod(target[1:])
    return BATCH if image == slices else f"{ROWS}{image // slices}" if image and image % slices == 0 else None


def _transpose(walk: _Walk, node: NodeProto) -> str | None:
    return BATCH if walk.kind(node, 0) == BATCH and _attribute(node, "perm", [-1])[0] == 0 else None


def _shape(walk: _Walk, node: NodeProto) -> str | None:
    if walk.kind(node, 0) != BATCH:
        return None
    start, rank = _attribute(node, "start", 0), walk.rank(node)
    at = min(max(start + rank if start < 0 else start, 0), rank)
    end = _attribute(node, "end", rank)
    if rank < 1 or -rank >= end or end == 0:  # of unknown rank, or empty
        return None
    return SIZES if at == 0 else FREE


def _gather(walk: _Walk, node: NodeProto) -> str | None:
    if walk.kind(node, 0) == BATCH:
        return _along_axis(0)(walk, node)
    index = walk.ints(node, "indices", 1)
    if walk.kind(node, 0) != SIZES or not index or min(index) < 0 or walk.rank(node) != 1 or walk.rank(node, 1) > 1:
        return None
    return SIZES if index[0] == 0 and min(index[1:], default=1) > 0 else FREE if min(index) > 0 else None


def _slice(walk: _Walk, node: NodeProto) -> str | None:
    """Without axes it starts at axis 0."""
    images = walk.kind(node, 0) == BATCH and walk.free(node, 1) and len(node.input) > 3
    return BATCH if images and walk.beside(node, walk.ints(node, "", 3)) else None


def _pad(walk: _Walk, node: NodeProto) -> str | None:
    pads, rank = walk.ints(node, "pads", 1), walk.rank(node)
    images = walk.kind(node, 0) == BATCH and walk.free(node, 1) and not any(node.input[3:])
    return BATCH if images and pads and len(pads) == 2 * rank and pads[0] == pads[rank] == 0 else None


def _resize(walk: _Walk, node: NodeProto) -> str | None:
    """To sizes that begin with the number of images, or by scales that begin with 1; no cropping, no common scale of all axes."""
    crop = _attribute(node, "coordinate_transformation_mode", b"") == b"tf_crop_and_resize"
    common = _attribute(node, "keep_aspect_ratio_policy", b"stretch") != b"stretch"
    if crop or common or walk.kind(node, 0) != BATCH or not walk.free(node, 1, 3) or not _only(node):
        return None
    axes = _attribute(node, "axes", None)
    if axes is not None:
        return BATCH if walk.free(node, 3) and walk.beside(node, axes) else None
    if walk.kind(node, 3) == SIZES:
        return BATCH
    scales = walk.ints(node, "", 2)
    return BATCH if not any(node.input[3:]) and scales and len(scales) == walk.rank(node) and scales[0] == 1 else None


def _gemm(walk: _Walk, node: NodeProto) -> str | None:
    kind, added = walk.kind(node, 0), walk.kind(node, 2)
    if not walk.each(node) or walk.kind(node, 1) != FREE or _attribute(node, "transA", 0):
        return None
    if len(node.input) < 3 or not node.input[2]:
        return kind
    return kind if (added == kind and walk.rank(node, 2) == 2) or (added == FREE and walk.stretches(node.input[2], 2)) else None


def _matmul(walk: _Walk, node: NodeProto) -> str | None:
    """Rows of A times a constant, or one product an image: then axis 0 is none of the two that are multiplied."""
    (a, b), ranks = (walk.kind(node, 0), walk.kind(node, 1)), (walk.rank(node, 0), walk.rank(node, 1))
    if (a, b) == (BATCH, FREE):
        return BATCH if ranks[0] > 1 and 0 < ranks[1] < 3 else None
    if (a, b) == (FREE, BATCH):
        return BATCH if ranks[1] > 2 and 0 < ranks[0] < 3 else None
    return BATCH if (a, b) == (BATCH, BATCH) and ranks[0] == ranks[1] > 2 else None


def _all(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_all(_never, "Constant ConstantOfShape Range"),
    # each element by itself, with scalars
    **_all(_first, "Abs Celu Ceil Clip Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log Mish Neg Not Reciprocal Relu"),
    **_all(_first, "Round Selu Sigmoid Sign Softplus Softsign Sqrt Tanh ThresholdedRelu"),
    # each image by itself, with parameters
    **_all(_first, "AveragePool Conv ConvTranspose GlobalAveragePool GlobalLpPool GlobalMaxPool InstanceNormalization LpPool LRN MaxPool"),
    **_all(_first, "DepthToSpace SpaceToDepth"),
    **_all(_elementwise, "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mul Or PRelu Pow Sub Sum Where Xor"),
    **_all(_softmax, "Hardmax LogSoftmax Softmax"),
    **_all(_axes, "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"),
    **_all(_axes, "Squeeze"),
    **_all(_along_axis(0), "ArgMax ArgMin Split"),
    "BatchNormalization": _normalized,
    "Cast": _cast,
    "Concat": _concat,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


def _skeleton(model: ModelProto) -> ModelProto:
    """The model with Conv or Gemm on undefined weights for our nodes: the same shapes, inferred 50 times faster than through functions."""
    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(entry for entry in model.opset_import if entry.domain != operators.DOMAIN)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        declare(bare.graph, tensor)
    for node in model.graph.node:
        if node.domain != operators.DOMAIN:
            bare.graph.node.append(node)
            continue
        weight = f"{node.output[0]}\0weight"
        is_conv = node.op_type.startswith(operators.CONV)
        kept = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name in (*operators.WINDOW, "group")}
        options = kept if is_conv else {"transB": 1}
        bare.graph.node.append(helper.make_node("Conv" if is_conv else "Gemm", [node.input[0], weight], list(node.output[:1]), **options))
        shape = _attribute(node, "weight_shape", None)
        bare.graph.input.append(helper.make_tensor_value_info(weight, onnx.TensorProto.FLOAT, shape))
    return bare
