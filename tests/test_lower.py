"""Reading, cleaning, finding layers and fusing, on graphs small enough to know the answer."""

from __future__ import annotations

import numpy as np
import onnx
import oracle
import pytest
from graphs import Array, conv_net, everything_sparse, graph, node, normal, pruned, run, sparse_nodes, weights
from onnx import helper, numpy_helper

from ticketkit.errors import ModelError
from ticketkit.lower import lower, read
from ticketkit.planner import plan

W = pruned((8, 8, 3, 3), 0.8)
BIAS = normal(8, seed=9)
PAD = {"pads": [1, 1, 1, 1]}
X = {"x": ["N", 8, 10, 10]}


# Cleaning -------------------------------------------------------------------------------------------------------------------


def test_batch_norm_is_folded_and_zeros_stay_zero() -> None:
    model = conv_net(0.9)
    network = lower(read(model.SerializeToString()))
    assert {n.op_type for n in network.model.graph.node} == {"Conv", "Relu", "Add", "GlobalAveragePool", "Flatten", "Gemm"}
    before = weights(model)
    for layer in network.layers[1:-1]:
        original = before[f"{layer.name}.weight"]
        np.testing.assert_array_equal(layer.weight == 0, original == 0)
        scale = before[f"{layer.name}.scale"] / np.sqrt(before[f"{layer.name}.var"] + 1e-5)
        np.testing.assert_allclose(layer.weight, original * scale[:, None, None, None], rtol=1e-5)
        assert layer.bias is not None
        np.testing.assert_allclose(layer.bias, before[f"{layer.name}.shift"] - before[f"{layer.name}.mean"] * scale, rtol=1e-4, atol=1e-6)


def test_layers_are_named_after_their_weights() -> None:
    assert {layer.name for layer in lower(conv_net()).layers} == {"stem", "conv1", "conv2", "down", "head"}


def test_weights_through_constants_identities_and_transposes() -> None:
    constants = {"fc.weight": pruned((6, 8), 0.5), "c.weight": W}
    nodes = [
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(W)),
        node("Identity", "c.weight", "c2"),
        node("Conv", "x k", "a", **PAD),
        node("Conv", "a c2", "b", **PAD),
        node("GlobalAveragePool", "b", "p"),
        node("Flatten", "p", "f"),
        node("Transpose", "fc.weight", "fct", perm=[1, 0]),
        node("MatMul", "f fct", "y"),
    ]
    found = lower(read(graph(nodes, X, ["y"], constants).SerializeToString())).layers
    assert [layer.op for layer in found] == ["Conv", "Conv", "MatMul"]
    assert [layer.name for layer in found][1:] == ["c", "fc"]
    for layer, weight in zip(found, (W, W, constants["fc.weight"]), strict=True):
        np.testing.assert_array_equal(layer.weight, weight)


def test_initializers_that_are_also_inputs_are_constants() -> None:
    model = graph([node("Conv", "x w", "y", **PAD)], X, ["y"], {"w": W})
    model.graph.input.append(helper.make_tensor_value_info("w", 1, W.shape))
    read_back = read(model.SerializeToString())
    assert [i.name for i in read_back.graph.input] == ["x"]
    assert lower(read_back).layers[0].sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("opset", [11, 12, 13, 15, 17, 18, 21, 24, 26])
def test_every_opset_computes_the_same_sparse(opset: int) -> None:
    nodes = [node("Conv", "x w b", "c", **PAD), node("Add", "c x", "s"), node("Clip", "s lo hi", "y")]
    bounds = {"lo": np.float32(-0.5), "hi": np.float32(0.75)}
    model = graph(nodes, X, ["y"], {"w": W, "b": BIAS, **bounds}, opset=opset, ir_version=4 if opset == 11 else 8)
    x = normal(2, 8, 10, 10)
    expected = oracle.conv2d(x, W, BIAS, x, pads=(1, 1, 1, 1), clip=(-0.5, 0.75))
    data = everything_sparse(model)
    (sparse,) = sparse_nodes(data)
    assert sparse.op_type == "SparseConvAddClip"
    for library in (False, True):
        difference = np.abs(run(data, {"x": x}, library)[0] - expected).max()
        assert difference <= oracle.tolerance(W, x, BIAS, x)


def test_cleaning_is_reproducible() -> None:
    first, second = (lower(conv_net()).model.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


# Finding layers ---------------------------------------------------------------------------------------------------------------

OBSTACLES = [
    (node("Conv", "x w", "y", group=8), {"w": pruned((16, 1, 3, 3), 0.5)}, X, "grouped convolution"),
    (node("Conv", "x w", "y", group=2), {"w": pruned((8, 4, 3, 3), 0.5)}, X, "grouped convolution"),
    (node("Conv", "x w", "y"), {"w": pruned((4, 8, 3, 3, 3), 0.5)}, {"x": ["N", 8, 5, 5, 5]}, "3-D convolution"),
    (node("ConvTranspose", "x w", "y"), {"w": pruned((8, 4, 3, 3), 0.5)}, X, "transposed convolution"),
    (node("Conv", "x w", "y", auto_pad="SAME_UPPER", strides=[2, 2]), {"w": W}, {"x": ["N", 8, "H", "W"]}, "unknown input size"),
    (node("Conv", "x w b", "y"), {"w": W}, {**X, "b": [8]}, "bias computed at run time"),
    (node("Gemm", "x w", "y", transA=1), {"w": pruned((8, 4), 0.5)}, {"x": [8, 3]}, "transposed input"),
    (node("Gemm", "x w b", "y"), {"w": pruned((8, 4), 0.5), "b": normal(3, 1)}, {"x": [3, 8]}, "one per row"),
    (node("MatMul", "x w", "y"), {"w": pruned((8, 4), 0.5)}, {"x": [8]}, "rank 1"),
    (node("MatMul", "x w", "y"), {"w": pruned((2, 8, 4), 0.5)}, {"x": [2, 7, 8]}, "stacked"),
]


@pytest.mark.parametrize(("layer", "constants", "inputs", "obstacle"), OBSTACLES, ids=[o[-1] for o in OBSTACLES])
def test_what_no_kernel_takes_stays_dense_and_says_why(
    layer: onnx.NodeProto, constants: dict[str, Array], inputs: dict[str, list[int | str]], obstacle: str
) -> None:
    network = lower(read(graph([layer], inputs, ["y"], constants).SerializeToString()))
    (found,) = network.layers
    assert obstacle in found.obstacle
    (choice,) = plan(network).choices
    assert choice.format == "dense" and obstacle in choice.reason


GEMMS = [
    (node("Gemm", "x w b", "y", transB=1), {"w": pruned((6, 9), 0.6), "b": normal(6)}),
    (node("Gemm", "x w b", "y", alpha=0.5, beta=2.0), {"w": pruned((9, 6), 0.6), "b": normal(1, 6)}),
    (node("Gemm", "x w b", "y"), {"w": pruned((9, 6), 0.6), "b": np.float32(3)}),
    (node("Gemm", "x w", "y"), {"w": pruned((9, 6), 0.6)}),
    (node("MatMul", "x w", "y"), {"w": pruned((9, 6), 0.6)}),
]


@pytest.mark.parametrize(("layer", "constants"), GEMMS, ids=["transB", "alpha-beta", "scalar-bias", "no-bias", "MatMul"])
@pytest.mark.parametrize("tail", ["", "Relu", "Clip"])
def test_products_in_every_dress(layer: onnx.NodeProto, constants: dict[str, Array], tail: str) -> None:
    nodes, constants = [layer], dict(constants)
    if tail:
        nodes = [onnx.NodeProto(), node(tail, "h lo hi" if tail == "Clip" else "h", "y")]
        nodes[0].CopyFrom(layer)
        nodes[0].output[0] = "h"
        constants |= {"lo": np.float32(-0.25), "hi": np.float32(1)} if tail == "Clip" else {}
    model, x = graph(nodes, {"x": ["N", 9]}, ["y"], constants), normal(5, 9)
    data = everything_sparse(model)
    (sparse,) = sparse_nodes(data)
    assert (sparse.op_type, sparse.output[0]) == (f"SparseGemm{tail}", "y")
    expected, tolerance = run(model, {"x": x})[0], 2 * oracle.tolerance(constants["w"].reshape(6, -1), x, normal(6) * 4)
    for library in (False, True):
        assert np.abs(run(data, {"x": x}, library)[0] - expected).max() <= tolerance


def test_matmul_and_add_become_one_product() -> None:
    nodes = [node("MatMul", "x w", "h"), node("Add", "h b", "a"), node("Relu", "a", "y")]
    model = graph(nodes, {"x": ["N", 9]}, ["y"], {"w": pruned((9, 6), 0.6), "b": normal(6)})
    data = everything_sparse(model)
    assert [n.op_type for n in sparse_nodes(data)] == ["SparseGemmRelu"] and len(onnx.load_from_string(data).graph.node) == 1


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3])
def test_automatic_padding(mode: str, stride: int, kernel: int) -> None:
    weight = pruned((4, 8, kernel, kernel), 0.5)
    model = graph([node("Conv", "x w", "y", auto_pad=mode, strides=[stride, stride], dilations=[1, 1])], X, ["y"], {"w": weight})
    x = normal(1, 8, 10, 10)
    expected = run(model, {"x": x})[0]
    for library in (False, True):
        got = run(everything_sparse(model), {"x": x}, library)[0]
        assert got.shape == expected.shape and np.abs(got - expected).max() <= 2 * oracle.tolerance(weight, x)


# Fusing -----------------------------------------------------------------------------------------------------------------------

CONV = node("Conv", "x w b", "c", **PAD)
SILU = [node("Sigmoid", "c", "s"), node("Mul", "c s", "r")]
OTHER, OTHER_OF_M = node("Conv", "x w2", "d", **PAD), node("Conv", "m w2", "e", **PAD)
LIMITS = {"lo": np.float32(0), "hi": np.float32(6)}
# nodes after the convolution `c` -> outputs of the graph -> suffix and output name of each sparse node, in order
FUSIONS = {
    "alone": ([], "c", [("", "c")]),
    "relu": ([node("Relu", "c", "y")], "y", [("Relu", "y")]),
    "clip": ([node("Clip", "c lo hi", "y")], "y", [("Clip", "y")]),
    "clip without a lower bound": ([node("Clip", "c - hi", "y")], "y", [("Clip", "y")]),
    "residual on the right": ([node("Add", "c x", "y")], "y", [("Add", "y")]),
    "residual on the left": ([node("Add", "x c", "y")], "y", [("Add", "y")]),
    "residual and relu": ([node("Add", "x c", "s"), node("Relu", "s", "y")], "y", [("AddRelu", "y")]),
    "residual and clip": ([node("Add", "c x", "s"), node("Clip", "s lo hi", "y")], "y", [("AddClip", "y")]),
    "residual made later": ([node("Sigmoid", "x", "z"), node("Add", "c z", "y")], "y", [("Add", "y")]),
    "several readers": ([node("Relu", "c", "r"), node("Add", "c r", "y")], "y", [("", "c")]),
    "also an output": ([node("Relu", "c", "y")], "y c", [("", "c")]),
    "sum also an output": ([node("Add", "c x", "s"), node("Relu", "s", "y")], "y s", [("Add", "s")]),
    "added to itself": ([node("Add", "c c", "y")], "y", [("", "c")]),
    "broadcast residual": ([node("GlobalAveragePool", "x", "z"), node("Add", "c z", "y")], "y", [("", "c")]),
    "relu before the sum": ([node("Relu", "c", "r"), node("Add", "r x", "y")], "y", [("Relu", "r")]),
    "two activations": ([node("Relu", "c", "r"), node("Sigmoid", "r", "y")], "y", [("Relu", "r")]),
    "another activation": ([node("Sigmoid", "c", "y")], "y", [("", "c")]),
    "leaky relu": ([node("LeakyRelu", "c", "y", alpha=0.3)], "y", [("LeakyRelu", "y")]),
    "leaky relu as it is by default": ([node("LeakyRelu", "c", "y")], "y", [("LeakyRelu", "y")]),
    "hard swish": ([node("HardSwish", "c", "y")], "y", [("HardSwish", "y")]),
    "silu": ([node("Sigmoid", "c", "s"), node("Mul", "c s", "y")], "y", [("Silu", "y")]),
    "silu from the right": ([node("Sigmoid", "c", "s"), node("Mul", "s c", "y")], "y", [("Silu", "y")]),
    "residual and silu": (
        [node("Add", "c x", "a"), node("Sigmoid", "a", "s"), node("Mul", "a s", "y")], "y", [("AddSilu", "y")],
    ),
    "a residual made between the nodes of another's silu": (
        [node("Sigmoid", "c", "s"), node("Relu", "x", "z"), node("Mul", "c s", "m"), OTHER_OF_M, node("Add", "e z", "y")],
        "y",
        [("Silu", "m"), ("Add", "y")],
    ),
    "the gate also an output": ([node("Sigmoid", "c", "s"), node("Mul", "c s", "y")], "y s", [("", "c")]),
    "the gate of a third reader": ([node("Sigmoid", "c", "s"), node("Mul", "c s", "m"), node("Add", "m c", "y")], "y", [("", "c")]),
    "another factor": ([node("Sigmoid", "c", "s"), node("Tanh", "c", "t"), node("Mul", "s t", "y")], "y", [("", "c")]),
    "another hard sigmoid": ([node("HardSigmoid", "c", "s", alpha=0.3), node("Mul", "c s", "y")], "y", [("", "c")]),
    "a square": ([node("Mul", "c c", "y")], "y", [("", "c")]),
    "layers on both sides": ([OTHER, node("Add", "c d", "s"), node("Relu", "s", "y")], "y", [("", "c"), ("AddRelu", "y")]),
    "layers on both sides, other order": ([OTHER, node("Add", "d c", "s"), node("Relu", "s", "y")], "y", [("", "c"), ("AddRelu", "y")]),
    "a chain": ([node("Relu", "c", "r"), node("Conv", "r w2", "e", **PAD), node("Add", "x e", "y")], "y", [("Relu", "r"), ("Add", "y")]),
    "bounds computed at run time": ([node("ReduceMax", "x", "top", keepdims=0), node("Clip", "c lo top", "y")], "y", [("", "c")]),
}


@pytest.mark.parametrize("case", FUSIONS)
def test_fusion(case: str) -> None:
    nodes, outputs, expected = FUSIONS[case]
    constants = {"w": W, "b": BIAS, "w2": pruned((8, 8, 3, 3), 0.7, seed=5), **LIMITS}
    model = graph([CONV, *nodes], X, outputs.split(), constants)
    data = everything_sparse(model)
    assert [(n.op_type.removeprefix("SparseConv"), n.output[0]) for n in sparse_nodes(data)] == expected
    x = normal(2, 8, 10, 10)
    wanted = run(model, {"x": x})
    tolerance = 8 * oracle.tolerance(W, x, BIAS, x)
    for library in (False, True):
        for got, want in zip(run(data, {"x": x}, library), wanted, strict=True):
            assert np.abs(got - want).max() <= tolerance


def test_fusion_tests_can_fail() -> None:
    """Negative control: the tolerance above notices a single missing weight."""
    x, thinned = normal(2, 8, 10, 10), W.copy()
    thinned.reshape(-1)[np.flatnonzero(W)[7]] = 0
    first, second = (run(graph([CONV], X, ["c"], {"w": w, "b": BIAS}), {"x": x})[0] for w in (W, thinned))
    assert np.abs(first - second).max() > 8 * oracle.tolerance(W, x, BIAS, x)


@pytest.mark.parametrize(
    ("batch", "height", "fused"), [("N", "H", True), (1, "H", False), ("M", "H", False), ("N", 224, False), ("N", "W", False)]
)
def test_a_residual_that_is_equal_by_accident_stays(batch: int | str, height: int | str, fused: bool) -> None:
    """At batch 1 and sides of 224 all of these are equal; at others onnxruntime broadcasts or refuses the Add."""
    inputs = {"x": ["N", 8, "H", "W"], "z": [batch, 8, height, "W"]}
    data = everything_sparse(graph([CONV, node("Add", "c z", "y")], inputs, ["y"], {"w": W, "b": BIAS}))
    assert [n.op_type for n in sparse_nodes(data)] == ["SparseConvAdd" if fused else "SparseConv"]
    if batch == 1:
        x, z = normal(2, 8, 10, 10), normal(1, 8, 10, 10, seed=1)
        np.testing.assert_allclose(run(data, {"x": x, "z": z}, True)[0], run(data, {"x": x, "z": z})[0], atol=1e-4)


@pytest.mark.parametrize(
    ("tail", "read_by_it"), [([node("Relu", "c", "r")], "c"), (SILU, "c"), (SILU, "s")], ids=["relu", "silu", "its gate"]
)
def test_a_result_read_by_a_subgraph_is_kept(tail: list[onnx.NodeProto], read_by_it: str) -> None:
    branches = [helper.make_graph([node(op, read_by_it, out)], "b", [], [helper.make_tensor_value_info(out, 1, [None] * 4)])
                for op, out in (("Neg", "n"), ("Abs", "a"))]  # fmt: skip
    choose = helper.make_node("If", ["bool"], ["y"], then_branch=branches[0], else_branch=branches[1])
    nodes = [CONV, *tail, node("Cast", "which", "bool", to=onnx.TensorProto.BOOL), choose]
    model = graph(nodes, {**X, "which": []}, ["r", "y"], {"w": W, "b": BIAS})
    data = everything_sparse(model)
    assert [(n.op_type.removeprefix("SparseConv"), n.output[0]) for n in sparse_nodes(data)] == [("", "c")]
    feeds = {"x": normal(1, 8, 10, 10), "which": np.ones((), np.float32)}
    for got, want in zip(run(data, feeds, True), run(model, feeds), strict=True):
        np.testing.assert_allclose(got, want, atol=oracle.tolerance(W, feeds["x"], BIAS))


def test_shared_weights_and_biases_are_stored_once() -> None:
    nodes = [node("Conv", "x w", "c", **PAD), node("Relu", "c", "r"), node("Conv", "r w", "y", **PAD)]
    data = everything_sparse(graph(nodes, X, ["y"], {"w": W}))
    assert len(sparse_nodes(data)) == 2 and len(onnx.load_from_string(data).graph.initializer) == 3


# Shapes ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "message"), [([3, 33, 32], "declares"), ([1, 1, 3, 32, 32], "declares"), ([3, 32, 0], "declares")])
def test_an_input_shape_that_does_not_fit(given: list[int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        lower(conv_net(), given)


def test_free_sides_are_assumed_or_given() -> None:
    model = graph([CONV], {"x": ["N", 8, "H", "W"]}, ["c"], {"w": W, "b": BIAS})
    assert lower(model).layers[0].y_shape == (1, 8, 224, 224)
    assert lower(model, [8, 20, 30]).layers[0].y_shape == (1, 8, 20, 30)
    assert lower(model, [4, 8, 20, 30]).layers[0].y_shape == (4, 8, 20, 30)
