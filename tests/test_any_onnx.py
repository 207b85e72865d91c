"""What pruned networks look like in the wild: each must convert, compute the same in stock onnxruntime and with the library, and run sparse
where it can."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import oracle
import pytest
from graphs import Array, conv_net, everything_sparse, graph, node, normal, pruned, run, sparse_nodes, weights
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ticketkit.errors import FormatError
from ticketkit.exporters import export
from ticketkit.lower import lower, read, storage

W, W2 = pruned((8, 8, 3, 3), 0.8), pruned((8, 8, 3, 3), 0.7, seed=1)
BIAS = normal(8, seed=9)
PAD = {"pads": [1, 1, 1, 1]}
X = {"x": ["N", 8, 10, 10]}
NORM = {name: np.random.default_rng(i).uniform(0.5, 1.5, 8).astype(np.float32) for i, name in enumerate(("scale", "shift", "mean", "var"))}
CONV, NORMAL = node("Conv", "x w", "c", **PAD), node("BatchNormalization", "c scale shift mean var", "n")


def agree(model: ModelProto, feeds: dict[str, Array], tolerance: float) -> list[str]:
    """The export equals the model in both runtimes; the operators of its sparse nodes, in order."""
    data, expected = everything_sparse(model), run(model, feeds)
    for library in (False, True):
        for got, want in zip(run(data, feeds, library), expected, strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
            assert np.abs(got.astype(np.float64) - want).max() <= tolerance
    return [each.op_type for each in sparse_nodes(data)]


# Activations, residuals, neighbours ----------------------------------------------------------------------------------------------

# what follows Conv and BatchNorm -> sparse node it becomes, operators that stay
TAILS = {
    "nothing": ([node("Identity", "n", "y")], "SparseConv", set()),
    "ReLU": ([node("Relu", "n", "y")], "SparseConvRelu", set()),
    "ReLU6": ([node("Clip", "n zero six", "y")], "SparseConvClip", set()),
    "HardSwish": ([node("HardSwish", "n", "y")], "SparseConvHardSwish", set()),
    "HardSwish written out": (
        [node("Add", "n three", "a"), node("Clip", "a zero six", "b"), node("Div", "b six", "d"), node("Mul", "n d", "y")],
        "SparseConv",
        {"Add", "Clip", "Div", "Mul"},
    ),
    "SiLU": ([node("Sigmoid", "n", "s"), node("Mul", "n s", "y")], "SparseConvSilu", set()),
    "LeakyReLU": ([node("LeakyRelu", "n", "y", alpha=0.2)], "SparseConvLeakyRelu", set()),
    "PReLU": ([node("PRelu", "n slope", "y")], "SparseConv", {"PRelu"}),
    "residual on the left": ([node("Add", "x n", "a"), node("Relu", "a", "y")], "SparseConvAddRelu", set()),
    "residual on the right, HardSwish": ([node("Add", "n x", "a"), node("HardSwish", "a", "y")], "SparseConvAddHardSwish", set()),
    "concatenation": ([node("Relu", "n", "r"), node("Concat", "r x", "y", axis=1)], "SparseConvRelu", {"Concat"}),
}


@pytest.mark.parametrize("tail", TAILS)
def test_convolutions_with_batch_norm_and(tail: str) -> None:
    nodes, operator, left = TAILS[tail]
    bounds = {"zero": np.float32(0), "three": np.float32(3), "six": np.float32(6), "slope": normal(8, 1, 1)}
    model = graph([CONV, NORMAL, *nodes], X, ["y"], {"w": W, **NORM, **bounds})
    x = normal(2, 8, 10, 10)
    scaled = W * (NORM["scale"] / np.sqrt(NORM["var"] + 1e-5))[:, None, None, None]
    assert agree(model, {"x": x}, 8 * oracle.tolerance(scaled, x, BIAS * 4, x)) == [operator]
    operators = {each.op_type for each in onnx.load_from_string(everything_sparse(model)).graph.node}
    assert operators == {operator} | left


DENSE = [
    (node("Conv", "h w", "y", group=2, **PAD), pruned((8, 4, 3, 3), 0.5)),
    (node("ConvTranspose", "h w", "y", strides=[2, 2]), pruned((8, 4, 2, 2), 0.5)),
    (node("Conv", "h w", "y", dilations=[1, 1], group=4), pruned((8, 2, 1, 1), 0.5)),
]


@pytest.mark.parametrize(("layer", "weight"), DENSE, ids=["groups", "transposed", "groups of 1x1"])
def test_layers_without_a_kernel_stay_dense_beside_sparse_ones(layer: onnx.NodeProto, weight: Array) -> None:
    model = graph([node("Conv", "x v", "h", **PAD), layer], X, ["y"], {"v": W, "w": weight})
    x = normal(2, 8, 10, 10)
    assert agree(model, {"x": x}, 8 * oracle.tolerance(W, x) * float(np.abs(weight).sum())) == ["SparseConv"]


WINDOWS = [{}, {"pads": [2, 1]}, {"strides": [2]}, {"dilations": [2], "pads": [2, 2]}, {"auto_pad": "SAME_UPPER"}, {"auto_pad": "VALID"}]


@pytest.mark.parametrize("length", [10, "L"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_convolutions_of_sequences(window: dict[str, object], length: int | str, tmp_path: Path) -> None:
    nodes = [node("Conv", "x w b", "c", **window), node("Relu", "c", "r"), node("Conv", "r v", "d"), node("Add", "d d", "y")]
    weight, other = pruned((8, 8, 3), 0.5), pruned((6, 8, 1), 0.5)
    model = graph(nodes, {"x": ["N", 8, length]}, ["y"], {"w": weight, "v": other, "b": BIAS})
    x = normal(2, 8, 10)
    assert agree(model, {"x": x}, 16 * oracle.tolerance(weight[:, :, None], x[:, :, None], BIAS)) == ["SparseConvRelu", "SparseConv"]
    export(model, tmp_path / "m.csr", format="csr", input_shape=[8, 10])  # its weights go back into the graph to be checked


def test_depthwise_convolutions_of_sequences_and_residuals() -> None:
    nodes = [node("Conv", "x w", "c", group=8, pads=[1, 1]), node("Conv", "c v", "d"), node("Add", "d x", "s"), node("Relu", "s", "y")]
    model = graph(nodes, {"x": ["N", 8, 10]}, ["y"], {"w": pruned((8, 1, 3), 0.3), "v": pruned((8, 8, 1), 0.5)})
    assert agree(model, {"x": normal(2, 8, 10)}, 1e-4) == ["SparseConv", "SparseConv"]


# Products of more than two axes --------------------------------------------------------------------------------------------------

MATRIX = pruned((16, 12), 0.6)
SHAPES = {
    "free batch": ["N", 7, 16],
    "free batch of maps": ["N", 3, 5, 16],
    "all fixed": [2, 7, 16],
    "free in the middle": [2, "T", 16],
    "free batch and length": ["N", "T", 16],
    "rank 5": ["N", 2, "H", 3, 16],
    "rank 2": ["N", 16],
}
BIASES = {"none": None, "per channel": normal(12), "of rank 3": normal(1, 1, 12), "scalar": np.float32(0.5)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("tail", ["", "Relu", "Gelu"])
def test_products_of_many_axes(shape: str, bias: str, tail: str) -> None:
    dims, added, nodes = SHAPES[shape], BIASES[bias], [node("MatMul", "x w", "p")]
    constants = {"w": MATRIX} | ({} if added is None else {"b": added})
    nodes += [] if added is None else [node("Add", "b p" if bias == "scalar" else "p b", "s")]
    nodes += [node(tail or "Identity", nodes[-1].output[0], "y")]
    x = normal(*(d if isinstance(d, int) else 4 for d in dims))
    model = graph(nodes, {"x": dims}, ["y"], constants, opset=20)
    (operator,) = agree(model, {"x": x}, 4 * oracle.tolerance(MATRIX.T, x.reshape(-1, 16), normal(12)))
    kinds = [each.op_type for each in onnx.load_from_string(everything_sparse(model)).graph.node]
    more = bias == "of rank 3" and shape == "rank 2"  # the sum has more axes than the product
    between = bias == "per channel" and shape == "all fixed"  # onnxruntime itself makes it a Gemm between Reshapes
    assert operator == ("SparseGemmRelu" if tail == "Relu" and not more and not between else "SparseGemm")
    assert ("Add" in kinds) == more
    assert ("Shape" in kinds) == (shape in ("free batch and length", "rank 5")), "sizes are computed at run time only where they must be"


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_products_of_tensors_of_unknown_rank(rank: int) -> None:
    nodes = [node("Reshape", "x shape", "h"), node("MatMul", "h w", "p"), node("Add", "p b", "y")]
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.FLOAT, ["N", 16]), value("shape", TensorProto.INT64, ["R"])]
    constants = [numpy_helper.from_array(array, name) for name, array in (("w", MATRIX), ("b", normal(12)))]
    body = helper.make_graph(nodes, "test", inputs, [value("y", TensorProto.FLOAT, None)], constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    shape = {2: [8, 16], 3: [2, 4, 16], 4: [2, 2, 2, 16]}[rank]
    feeds = {"x": normal(8, 16), "shape": np.array(shape)}
    assert agree(model, feeds, 4 * oracle.tolerance(MATRIX.T, feeds["x"], normal(12))) == ["SparseGemm"]


def test_sizes_that_the_graph_computes_are_known_for_a_concrete_input() -> None:
    """Windows of 4 x 4 pixels, as TorchScript exports them: ONNX does not follow the division."""
    sizes = [
        node("Shape", "x", "s"), node("Gather", "s two", "h"), node("Div", "h four", "rows"), node("Unsqueeze", "rows zero", "r"),
        node("Concat", "minus eight r f r f", "target", axis=0), node("Reshape", "x target", "windows"),
    ]  # fmt: skip
    nodes = [
        *sizes,
        node("Transpose", "windows", "t", perm=[0, 2, 4, 3, 5, 1]),
        node("Reshape", "t tokens", "k"),
        node("MatMul", "k w", "p"),
        node("Add", "p b", "y"),
    ]
    ints = {"two": 2, "four": 4, "zero": [0], "minus": [-1], "eight": [8], "f": [4], "tokens": [-1, 16, 8]}
    constants = {name: np.array(value, np.int64) for name, value in ints.items()} | {"w": pruned((8, 12), 0.9), "b": normal(12)}
    model = graph(nodes, {"x": ["N", 8, "S", "S"]}, ["y"], constants)
    (layer,) = lower(read(model), [8, 32, 32]).layers
    assert (layer.x_shape, layer.y_shape) == ((64, 16, 8), (64, 16, 12))
    assert agree(model, {"x": normal(2, 8, 16, 16)}, 1e-4) == ["SparseGemm"]
    assert lower(read(model)).layers[0].y_shape == (56 * 56, 16, 12)


def test_products_of_two_activations_stay_as_they_are() -> None:
    nodes = [node("Transpose", "x", "t", perm=[0, 2, 1]), node("MatMul", "x t", "a"), node("Softmax", "a", "y")]
    assert lower(read(graph(nodes, {"x": ["N", 7, 16]}, ["y"], {}).SerializeToString())).layers == ()


def test_an_exported_transformer_layer_is_read_again_as_it_was() -> None:
    nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "y")]
    model = graph(nodes, {"x": ["N", 7, 16]}, ["y"], {"block.weight": MATRIX, "w": MATRIX, "b": normal(12)})
    data = everything_sparse(model)
    (layer,) = lower(read(data)).layers
    np.testing.assert_array_equal(layer.weight, MATRIX.T)
    assert everything_sparse(onnx.load_from_string(data)) == everything_sparse(onnx.load_from_string(everything_sparse(read(data))))


# float16 -------------------------------------------------------------------------------------------------------------------------


def in_half(model: ModelProto) -> ModelProto:
    """The same network in float16, inputs and outputs too."""
    halved = ModelProto()
    halved.CopyFrom(model)
    for tensor in halved.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for info in (*halved.graph.input, *halved.graph.output, *halved.graph.value_info):
        info.type.tensor_type.elem_type = TensorProto.FLOAT16
    return halved


def as_stored(model: ModelProto) -> ModelProto:
    """The same network in float32, its float32 initializers stored as float16 behind Casts."""
    stored = ModelProto()
    stored.CopyFrom(model)
    casts = []
    for tensor in stored.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            casts.append(node("Cast", f"{tensor.name}.half", tensor.name, to=TensorProto.FLOAT))
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), f"{tensor.name}.half"))
    nodes = [*casts, *stored.graph.node]
    del stored.graph.node[:]
    stored.graph.node.extend(nodes)
    return stored


def test_weights_stored_as_float16_are_found() -> None:
    model = as_stored(conv_net(0.9))
    x = normal(2, 3, 32, 32)
    assert len(agree(model, {"x": x}, 1e-3)) == 5
    for layer in lower(read(model.SerializeToString())).layers:
        assert layer.weight.dtype == np.float32 and not layer.obstacle


def test_float16_networks_compute_in_float32_between_their_inputs_and_outputs(tmp_path: Path) -> None:
    model, x = in_half(conv_net(0.9, channels=64)), normal(2, 3, 32, 32).astype(np.float16)
    report = export(model, tmp_path / "m.onnx")
    assert report.plan.sparse and all("float16" not in choice.reason for choice in report.plan.choices)
    exported = onnx.load(tmp_path / "m.onnx")
    assert [i.type.tensor_type.elem_type for i in (*exported.graph.input, *exported.graph.output)] == [TensorProto.FLOAT16] * 2
    wide = conv_net(0.9, channels=64)
    for tensor in wide.graph.initializer:
        rounded = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    (expected,) = run(wide, {"x": x.astype(np.float32)})
    for library in (False, True):
        (got,) = run(exported, {"x": x}, library)
        assert got.dtype == np.float16
        np.testing.assert_allclose(got, expected, rtol=2**-10, atol=1e-3)
    (original,) = run(model, {"x": x})  # as onnxruntime runs it, rounding more often
    assert np.abs(got.astype(np.float32) - original).max() < 0.05 * np.abs(original).max()


def test_float16_in_subgraphs_attributes_and_handed_through() -> None:
    half = TensorProto.FLOAT16
    one = helper.make_tensor("one", half, [1], [1.0])
    two, value = helper.make_tensor("two", half, [1], [2.0]), helper.make_tensor_value_info
    then = helper.make_graph([node("Mul", "c two", "t")], "then", [], [value("t", half, None)], [two])
    constant = helper.make_node("Constant", [], ["k"], value=one)
    other = helper.make_graph([constant, node("Add", "c k", "e")], "else", [], [value("e", half, None)])
    nodes = [
        node("Conv", "x w", "c", **PAD),
        helper.make_node("If", ["which"], ["i"], then_branch=then, else_branch=other),
        helper.make_node("ConstantOfShape", ["shape"], ["o"], value=one),
        node("Cast", "i", "f", to=TensorProto.FLOAT),
        node("Cast", "f", "g", to=half),
        node("Sub", "g o", "y"),
    ]
    inputs = [value("x", half, ["N", 8, 10, 10]), value("which", TensorProto.BOOL, [])]
    outputs = [value("y", half, None), value("x", half, ["N", 8, 10, 10])]
    constants = [numpy_helper.from_array(W.astype(np.float16), "w"), numpy_helper.from_array(np.array([1]), "shape")]
    model = helper.make_model(
        helper.make_graph(nodes, "half", inputs, outputs, constants), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    x = normal(2, 8, 10, 10).astype(np.float16)
    for which in (True, False):
        assert agree(model, {"x": x, "which": np.array(which)}, 2e-2) == ["SparseConv"]


# Storage -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", range(11, 24))
def test_every_opset_with_a_free_batch(opset: int) -> None:
    head = [node("GlobalAveragePool", "r", "p"), node("Flatten", "p", "f"), node("MatMul", "f m", "y")]
    nodes = [CONV, NORMAL, node("Relu", "n", "r"), *head]
    model = graph(nodes, X, ["y"], {"w": W, **NORM, "m": pruned((8, 6), 0.5)}, opset=opset, ir_version=6 if opset < 15 else 8)
    for batch in (1, 3):
        assert agree(model, {"x": normal(batch, 8, 10, 10)}, 1e-4) == ["SparseConvRelu", "SparseGemm"]


@pytest.mark.parametrize("opset", [11, 17])
def test_large_weights_travel_apart_and_come_back(opset: int, tmp_path: Path) -> None:
    model = conv_net(0.9, channels=64)
    model.opset_import[0].version = opset
    bare, large = storage.split(read(model.SerializeToString()))
    assert {t.name for t in large} == {f"{name}.weight" for name in ("stem", "conv1", "conv2", "down", "head")}
    assert not {t.name for t in bare.graph.initializer} & {t.name for t in large} and bare.ByteSize() < 20_000
    storage.save(bare, large, tmp_path / "m.onnx")
    again = onnx.load(tmp_path / "m.onnx")
    for name, array in weights(model).items():
        np.testing.assert_array_equal(weights(again)[name], array)
    x = normal(2, 3, 32, 32)
    np.testing.assert_array_equal(storage.session(model).run(None, {"x": x})[0], run(model, {"x": x})[0])
    assert storage.nbytes(model) == pytest.approx(model.ByteSize(), rel=1e-3)


def test_a_model_given_as_such_is_left_as_it_is() -> None:
    model = in_half(conv_net())
    before = model.SerializeToString(deterministic=True)
    lower(read(model))
    assert model.SerializeToString(deterministic=True) == before


def test_external_data_without_its_file_is_said_so() -> None:
    model = conv_net()
    for key, value in (("location", "gone.bin"), ("offset", "0")):
        model.graph.initializer[0].external_data.add(key=key, value=value)
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(FormatError, match=r"its data is in another file; give the path") as caught:
        read(model.SerializeToString())
    assert "\n" not in str(caught.value)


def test_the_comparison_can_fail() -> None:
    """Negative control of `agree`: one changed weight."""
    changed = W.copy()
    changed.reshape(-1)[np.flatnonzero(W)[5]] *= 1.01
    x = normal(2, 8, 10, 10)
    first, second = (run(graph([CONV], X, ["c"], {"w": w}), {"x": x})[0] for w in (W, changed))
    assert np.abs(first - second).max() > 8 * oracle.tolerance(W, x, BIAS * 4, x)
