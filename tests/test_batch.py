"""Which models treat the images of a batch one by one: what is accepted is so, whatever mixes images is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from batches import CHANNELS, IMAGE, sparse_model, whole
from graphs import Array, conv_net, graph, node, normal
from onnx import NodeProto

from ticketkit.lower import operators
from ticketkit.lower.batch import independent

ints = np.array


def shape_chain(*, swapped: bool = False) -> list[NodeProto]:
    """Reshape to [N, -1] as exporters with a Gather of the shape write it; swapped, to [-1, N]."""
    return [
        node("Shape", "b", "shape"),
        node("Gather", "shape zero", "n"),
        node("Unsqueeze", "n zeros", "n1"),
        node("Concat", "rest n1" if swapped else "n1 rest", "target", axis=0),
        node("Reshape", "b target", "y"),
    ]


# name -> (nodes from "b" [N, 8, 6, 6] to "y", constants, dimensions of y)
CASES = dict[str, tuple[list[NodeProto], dict[str, Array], list[Any]]]
FLAT = 8 * 6 * 6
KEPT: CASES = {
    "nothing more": ([node("Identity", "b", "y")], {}, ["N", 8, 6, 6]),
    "broadcast scalar": ([node("Mul", "b c", "y")], {"c": np.float32(2)}, ["N", 8, 6, 6]),
    "broadcast [1, 8, 1, 1]": ([node("Add", "c b", "y")], {"c": normal(1, 8, 1, 1)}, ["N", 8, 6, 6]),
    "sum of two": ([node("Add", "a b", "y")], {}, ["N", 8, 6, 6]),
    "pool": ([node("MaxPool", "b", "y", kernel_shape=[2, 2])], {}, ["N", 8, 5, 5]),
    "flatten": ([node("Flatten", "b", "y")], {}, ["N", FLAT]),
    "flatten -3": ([node("Flatten", "b", "y", axis=-3)], {}, ["N", FLAT]),
    "mean of an image": ([node("ReduceMean", "b c", "y", keepdims=0)], {"c": ints([-1, 2])}, ["N", 8]),
    "softmax": ([node("Softmax", "b", "y", axis=1)], {}, ["N", 8, 6, 6]),
    "concat": ([node("Concat", "a b", "y", axis=-3)], {}, ["N", 16, 6, 6]),
    "reshape 0": ([node("Reshape", "b c", "y")], {"c": ints([0, 2, -1])}, ["N", 2, FLAT // 2]),
    "reshape -1": ([node("Reshape", "b c", "y", allowzero=1)], {"c": ints([-1, FLAT])}, ["N", FLAT]),
    "reshape by shape": (shape_chain(), {"zero": ints(0), "zeros": ints([0]), "rest": ints([-1])}, ["N", FLAT]),
    "channel shuffle": (
        [node("Reshape", "b c", "r"), node("Transpose", "r", "t", perm=[0, 2, 1, 3, 4]), node("Reshape", "t d", "y")],
        {"c": ints([-1, 2, 4, 6, 6]), "d": ints([-1, 8, 6, 6])},
        ["N", 8, 6, 6],
    ),
    "slice": ([node("Slice", "b s e d", "y")], {"s": ints([1]), "e": ints([5]), "d": ints([-1])}, ["N", 8, 6, 4]),
    "pad": ([node("Pad", "b c", "y")], {"c": ints([0, 1, 0, 0, 0, 2, 0, 0])}, ["N", 11, 6, 6]),
    "gemm": ([node("Flatten", "b", "f"), node("Gemm", "f w c", "y")], {"w": normal(FLAT, 5), "c": normal(5)}, ["N", 5]),
    "matmul of images": ([node("MatMul", "a b", "y")], {}, ["N", 8, 6, 6]),
    "matmul": ([node("MatMul", "b w", "y")], {"w": normal(6, 3)}, ["N", 8, 6, 3]),
    "resize by scales": ([node("Resize", "b - c", "y")], {"c": np.array([1, 1, 2, 2], np.float32)}, ["N", 8, 12, 12]),
    "resize by sizes": (
        [node("Shape", "b", "s", start=0, end=2), node("Concat", "s c", "t", axis=0), node("Resize", "b - - t", "y", mode="linear")],
        {"c": ints([9, 12])},
        ["N", 8, 9, 12],
    ),
    "shortcut and head as torch exports them": (
        [
            node("Slice", "b s e d t", "h"), node("Pad", "h p", "w"), node("Relu", "w", "r"),
            node("ReduceMean", "r m", "q", keepdims=1, noop_with_empty_axes=0), node("Reshape", "q v", "f", allowzero=1),
            node("Gemm", "f l", "y", transB=1, transA=0, alpha=1.0, beta=1.0),
        ],
        {"s": ints([0]), "e": ints([2**63 - 1]), "d": ints([2]), "t": ints([2]), "p": ints([0, 4, 0, 0, 0, 4, 0, 0]), "m": ints([-1, -2]),
         "v": ints([-1, 16]), "l": normal(5, 16)},
        ["N", 5],
    ),
    "rows of images": (
        [node("Reshape", "b c", "r"), node("Gemm", "r w", "g"), node("Relu", "g", "h"), node("Reshape", "h d", "y")],
        {"c": ints([-1, 6]), "w": normal(6, 3), "d": ints([-1, 8, 6, 3])},
        ["N", 8, 6, 3],
    ),
    "squeeze": ([node("Unsqueeze", "b c", "u"), node("Squeeze", "u c", "y")], {"c": ints([1])}, ["N", 8, 6, 6]),
    "split": ([node("Split", "b", "s t", axis=1, num_outputs=2), node("Sub", "s t", "y")], {}, ["N", 4, 6, 6]),
    "gather": ([node("Gather", "b c", "y", axis=1)], {"c": ints([3, 0])}, ["N", 2, 6, 6]),
    "size of an image": (
        [node("Shape", "b", "s", start=3), node("Cast", "s", "f", to=1), node("Div", "b f", "y")], {}, ["N", 8, 6, 6],
    ),
}  # fmt: skip
MIXED: CASES = {
    "mean over the batch": ([node("ReduceMean", "b c", "m", keepdims=1), node("Sub", "b m", "y")], {"c": ints([0])}, ["N", 8, 6, 6]),
    "mean over everything": ([node("ReduceMean", "b", "m", keepdims=1), node("Sub", "b m", "y")], {}, ["N", 8, 6, 6]),
    "reshape mixes": ([node("Reshape", "b c", "r"), node("Reshape", "r d", "y")], {"c": ints([8, -1]), "d": ints([-1, 8, 6, 6])}, IMAGE),
    "reshape -1, half an image": ([node("Reshape", "b c", "y")], {"c": ints([-1, FLAT // 2])}, ["N", FLAT // 2]),
    "rows": ([node("Reshape", "b c", "y")], {"c": ints([-1, 6])}, ["N", 6]),
    "rows of two images": (
        [node("Reshape", "b c", "r"), node("Reshape", "r d", "y")], {"c": ints([-1, 6]), "d": ints([-1, 2 * FLAT])}, ["N", 2 * FLAT],
    ),
    "rows that cross images": ([node("Reshape", "b c", "r"), node("Relu", "r", "y")], {"c": ints([-1, 5])}, ["N", 5]),
    "rows mixed": (
        [node("Reshape", "b c", "r"), node("Softmax", "r", "s", axis=0), node("Reshape", "s d", "y")],
        {"c": ints([-1, 6]), "d": ints([-1, 8, 6, 6])},
        IMAGE,
    ),
    "reshape to zero": ([node("Reshape", "b c", "y", allowzero=1)], {"c": ints([0, FLAT])}, ["N", FLAT]),
    "reshape by shape, swapped": (shape_chain(swapped=True), {"zero": ints(0), "zeros": ints([0]), "rest": ints([-1])}, ["N", "M"]),
    "transpose": ([node("Transpose", "b", "y", perm=[1, 0, 2, 3])], {}, ["N", "M", 6, 6]),
    "transpose, default": ([node("Transpose", "b", "y")], {}, ["N", 6, 8, "M"]),
    "concat of batches": ([node("Concat", "a b", "y", axis=0)], {}, ["N", 8, 6, 6]),
    "concat of batches, -4": ([node("Concat", "a b", "y", axis=-4)], {}, ["N", 8, 6, 6]),
    "softmax": ([node("Softmax", "b", "y", axis=0)], {}, ["N", 8, 6, 6]),
    "flatten 0": ([node("Flatten", "b", "y", axis=0)], {}, ["N", "M"]),
    "flatten 2": ([node("Flatten", "b", "y", axis=2)], {}, ["N", 36]),
    "constant with a batch": ([node("Add", "b c", "y")], {"c": normal(4, 1, 1, 1)}, ["N", 8, 6, 6]),
    "constant of higher rank": ([node("Add", "b c", "y")], {"c": normal(4, 1, 1, 1, 1)}, ["N", "M", 8, 6, 6]),
    "ranks differ": (
        [node("Flatten", "b", "f"), node("ReduceMean", "f c", "m", keepdims=0), node("Add", "f m", "y")], {"c": ints([1])}, ["N", FLAT],
    ),
    "rows of batches": (
        [node("Flatten", "b", "f"), node("Transpose", "f", "t", perm=[1, 0]), node("MatMul", "f t", "y")], {}, ["N", "M"],
    ),
    "gram": ([node("Flatten", "b", "f"), node("Gemm", "f f", "y", transB=1)], {}, ["N", "M"]),
    "gemm, transposed": ([node("Flatten", "b", "f"), node("Gemm", "f w", "y", transA=1)], {"w": normal(4, 3)}, ["N", 3]),
    "gemm, bias by row": ([node("Flatten", "b", "f"), node("Gemm", "f w c", "y")], {"w": normal(FLAT, 5), "c": normal(4, 1)}, ["N", 5]),
    "slice of the batch": ([node("Slice", "b s e d", "y")], {"s": ints([1]), "e": ints([5]), "d": ints([-4])}, ["N", 8, 6, 6]),
    "slice without axes": ([node("Slice", "b s e", "y")], {"s": ints([0]), "e": ints([5])}, ["N", 8, 6, 6]),
    "pad": ([node("Pad", "b c", "y")], {"c": ints([0, 0, 0, 0, 1, 0, 0, 0])}, ["N", 8, 6, 6]),
    "gather": ([node("Gather", "b c", "y")], {"c": ints([0])}, ["N", 8, 6, 6]),
    "split": ([node("Split", "b", "y z", num_outputs=2)], {}, ["N", 8, 6, 6]),
    "resize": ([node("Resize", "b - c", "y")], {"c": np.array([2, 1, 1, 1], np.float32)}, ["N", 8, 6, 6]),
    "resize to a batch": ([node("Resize", "b - - c", "y")], {"c": ints([4, 8, 9, 9])}, ["N", 8, 9, 9]),
    "squeeze, default": ([node("Squeeze", "b", "y")], {}, ["N", 8, 6, 6]),
    "unsqueeze": ([node("Unsqueeze", "b c", "y")], {"c": ints([0])}, ["N", "M", 8, 6, 6]),
    "arg max": ([node("ArgMax", "b", "i"), node("Cast", "i", "f", to=1), node("Add", "b f", "y")], {}, ["N", 8, 6, 6]),
    "the batch size": ([node("Shape", "b", "s", end=1), node("Cast", "s", "f", to=1), node("Mul", "b f", "y")], {}, ["N", 8, 6, 6]),
    "as many rows": ([node("Shape", "b", "s", end=1), node("ConstantOfShape", "s", "y")], {}, ["N"]),
    "a running sum": ([node("CumSum", "b z", "y")], {"z": ints(0)}, ["N", 8, 6, 6]),
    "indices into the batch": ([node("MaxPool", "b", "p i", kernel_shape=[2, 2]), node("Cast", "i", "y", to=1)], {}, ["N", 8, 5, 5]),
    "training": (
        [node("BatchNormalization", "b s s s v", "y m w", training_mode=1)], {"s": normal(8), "v": np.ones(8, np.float32)}, ["N", 8, 6, 6],
    ),
    "noise": ([node("RandomNormal", "", "r", shape=[1, 8, 6, 6]), node("Add", "b r", "y")], {}, ["N", 8, 6, 6]),
    "noise like": ([node("RandomNormalLike", "b", "r"), node("Add", "b r", "y")], {}, ["N", 8, 6, 6]),
    "a constant": ([node("Identity", "c", "y")], {"c": normal(4, 8)}, ["N", 8]),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_images_kept_apart(name: str) -> None:
    """And what is said to be independent is, in onnxruntime."""
    nodes, constants, outputs = KEPT[name]
    model = sparse_model(*nodes, constants=constants, outputs=outputs)
    assert independent(model) and independent(operators.expand(model))
    x = normal(4, CHANNELS, 6, 6)
    together, apart = whole(model, x), np.concatenate([whole(model, x[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXED)
def test_images_mixed(name: str) -> None:
    nodes, constants, outputs = MIXED[name]
    model = sparse_model(*nodes, constants=constants, outputs=outputs)
    assert not independent(model) and not independent(operators.expand(model))


def test_networks() -> None:
    assert independent(conv_net(0.9))
    assert not independent(conv_net(0.9, batch=4)), "a fixed batch"


@pytest.mark.parametrize(
    ("image", "outputs"),
    [
        ([4, CHANNELS, 6, 6], [4, CHANNELS, 6, 6]),
        ([None, CHANNELS, 6, 6], [None, CHANNELS, 6, 6]),
        (IMAGE, ["M", CHANNELS, 6, 6]),
        (IMAGE, [4, CHANNELS, 6, 6]),
        (["N", CHANNELS, "N", 6], ["N", CHANNELS, "N", 6]),
    ],
    ids=["fixed", "unnamed", "another name", "fixed output", "twice"],
)
def test_declared_shapes(image: Any, outputs: Any) -> None:
    assert not independent(sparse_model(image=image, outputs=outputs))


def test_other_models() -> None:
    """Inputs that are no images, operators of others, subgraphs, a constant among the outputs."""
    weights = {"w": normal(FLAT, 5)}
    assert not independent(graph([node("MatMul", "x w", "y")], {"x": ["N", FLAT]}, ["y"], weights)), "rank 2"
    foreign = sparse_model(node("Relu", "b", "y"))
    foreign.graph.node[-1].domain = "com.example"
    assert not independent(foreign)
    branch = onnx.helper.make_graph([node("Relu", "b", "z")], "g", [], [onnx.helper.make_empty_tensor_value_info("z")])
    chosen = node("If", "c", "y", then_branch=branch, else_branch=branch)
    assert not independent(sparse_model(chosen, constants={"c": np.array(True)}))
    two = sparse_model(node("Identity", "b", "y"))
    two.graph.output.append(onnx.helper.make_tensor_value_info("a.bias", onnx.TensorProto.FLOAT, [CHANNELS]))
    assert not independent(two)
