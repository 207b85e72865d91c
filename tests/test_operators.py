"""The operators of our own domain: what each activation means, what expanding gives back, and what a malformed node is told."""

from __future__ import annotations

import numpy as np
import onnx
import oracle
import pytest
from graphs import Array, everything_sparse, graph, node, normal, pruned, run, weights
from onnx import ModelProto, helper, numpy_helper

from ticketkit.errors import FormatError
from ticketkit.formats import gaps
from ticketkit.lower import Graph, lower, operators, read
from ticketkit.lower.fuse import fuse

W = pruned((8, 8, 3, 3), 0.8)
BIAS = normal(8, seed=9)
PAD = {"pads": [1, 1, 1, 1]}
X = {"x": ["N", 8, 10, 10]}
CONV = node("Conv", "x w b", "c", **PAD)
LIMITS = {"lo": np.float32(0), "hi": np.float32(6)}


def sparse_file() -> ModelProto:
    nodes = [CONV, node("Add", "c x", "s"), node("Clip", "s lo hi", "y")]
    return onnx.load_from_string(everything_sparse(graph(nodes, X, ["y"], {"w": W, "b": BIAS, **LIMITS})))


@pytest.mark.parametrize("residual", ["", "x"])
@pytest.mark.parametrize("activation", operators.ACTIVATIONS)
def test_every_activation_means_the_same_everywhere(activation: str, residual: str) -> None:
    """As standard operators, as a function body, and in the library."""
    numbers = {"Clip": (-0.5, 0.75), "LeakyRelu": (0.3,)}.get(activation, ())
    parts = {**gaps.pack(W), "b": BIAS}
    epilogue, window = operators.Epilogue(residual, activation, numbers), {"strides": [1, 1], "pads": [1] * 4, "dilations": [1, 1]}
    made = operators.make_node(operators.CONV, ["x", *parts], "y", "c", W.shape, window, epilogue, operators.Execution())
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, X["x"]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph([made], "test", infos[:1], infos[1:], [numpy_helper.from_array(array, name) for name, array in parts.items()]),
        functions=[operators.function(made.op_type, 17)],
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(operators.DOMAIN, operators.VERSION)],
        ir_version=operators.IR_VERSION,
    )
    feeds, tolerance = {"x": normal(2, 8, 10, 10)}, 2 * oracle.tolerance(W, normal(2, 8, 10, 10), BIAS)
    z = oracle.conv2d(feeds["x"], W, BIAS, feeds["x"] if residual else None, pads=(1, 1, 1, 1))
    exact = {
        "None": z, "Relu": np.maximum(z, 0), "Clip": np.clip(z, -0.5, 0.75), "LeakyRelu": oracle.ACTIVATIONS["leaky_relu"](z, 0.3),
        "HardSwish": oracle.ACTIVATIONS["hard_swish"](z, 0), "Silu": oracle.ACTIVATIONS["silu"](z, 0),
    }[activation]  # fmt: skip
    for got in (run(operators.expand(model), feeds), run(model, feeds), run(model, feeds, True)):
        assert np.abs(got[0] - exact).max() <= tolerance
    again = lower(read(operators.expand(model).SerializeToString()))
    assert [f.epilogue.activation for f in again.fuse(again.layers)] == [activation]


@pytest.mark.parametrize(
    ("alpha", "domain", "activation"),
    [(1 / 6, "", "HardSwish"), (None, "", "None"), (0.3, "", "None"), (1 / 6, "foreign", "None")],
)
def test_a_hard_swish_of_two_nodes(alpha: float | None, domain: str, activation: str) -> None:
    """As it is, before onnxruntime's passes rewrite anything."""
    gate = helper.make_node("HardSigmoid", ["c"], ["s"], domain=domain, **({} if alpha is None else {"alpha": alpha}))
    for other in ("", "foreign") if activation == "HardSwish" else ("",):
        network = lower(graph([CONV, node("Relu", "c", "y")], X, ["y"], {"w": W, "b": BIAS}))
        product = helper.make_node("Mul", ["s", "c"], ["y"], domain=other)
        del network.model.graph.node[1:]
        network.model.graph.node.extend([gate, product])
        (fused,) = fuse(Graph(network.model), network.layers, [])
        assert fused.epilogue.activation == ("None" if other else activation)


def test_expand_restores_the_dense_graph() -> None:
    model = sparse_file()
    plain = read(operators.expand(model).SerializeToString())  # and can be read again
    assert [n.op_type for n in plain.graph.node] == ["Conv", "Add", "Clip"] and not plain.functions
    np.testing.assert_array_equal(weights(plain)[f"{model.graph.node[0].name}.weight"], W)
    assert not [t.name for t in plain.graph.initializer if t.name.endswith((".values", ".gaps"))], "the compact form is left behind"
    x = normal(1, 8, 10, 10)
    np.testing.assert_array_equal(run(plain, {"x": x})[0], run(model, {"x": x})[0])


def attribute(name: str, value: object) -> object:
    def change(model: ModelProto) -> None:
        sparse = model.graph.node[0]
        kept = [a for a in sparse.attribute if a.name != name]
        del sparse.attribute[:]
        sparse.attribute.extend([*kept, *([] if value is None else [helper.make_attribute(name, value)])])

    return change


def initializer(ending: str, array: Array) -> object:
    def change(model: ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name.endswith(ending))
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return change


def drop_input(model: ModelProto) -> None:
    model.graph.node[0].input.pop()
    model.graph.node[0].input.pop()


MALFORMED = [
    (attribute("weight_shape", [8, 8, 3]), "weight_shape: expected 4"),
    (attribute("weight_shape", [8, 8, 3, -3]), "weight_shape: expected 4 ints of at least 1"),
    (attribute("weight_shape", None), "weight_shape: expected 4"),
    (attribute("weight_shape", "wide"), "weight_shape: expected 4"),
    (attribute("numel", [7]), r"numel: expected \[576\]"),
    (attribute("strides", [1]), "strides: expected 2"),
    (attribute("strides", [0, 1]), "strides: expected 2 ints of at least 1"),
    (attribute("pads", [1, 1]), "pads: expected 4"),
    (attribute("pads", [-1, 0, 0, 0]), "pads: expected 4 ints of at least 0"),
    (attribute("dilations", None), "dilations: expected 2"),
    (attribute("activation", "Gelu"), "activation: expected one of None, Relu, Clip, LeakyRelu, HardSwish, Silu"),
    (attribute("min", None), "min, max: expected two floats in this order, got None, 6.0"),
    (attribute("min", 9.0), "min, max: expected two floats in this order, got 9.0, 6.0"),
    (attribute("activation", "LeakyRelu"), "alpha: expected a finite float, got None"),
    (initializer("gaps", np.zeros(115, np.uint16)), "gaps: expected positive"),
    (initializer("gaps", np.full(115, 65535, np.uint16)), "gaps: expected positions below 576"),
    (initializer("gaps", np.ones(3, np.uint16)), "gaps: expected 115 entries"),
    (initializer("gaps", np.ones(115, np.int64)), "gaps: expected uint16"),
    (initializer("values", np.full(115, np.nan, np.float32)), "values: expected finite"),
    (initializer("values", np.ones((5, 23), np.float32)), "values: expected a 1-D"),
    (initializer("bias", np.ones(3, np.float32)), r"B: expected float32 \[8\]"),
    (initializer("bias", np.full(8, np.inf, np.float32)), "B: expected finite"),
    (drop_input, "inputs: expected X, values, gaps, B"),
]


@pytest.mark.parametrize(("change", "message"), MALFORMED, ids=[m for _, m in MALFORMED])
def test_a_malformed_sparse_node_names_its_field(change: object, message: str) -> None:
    model = sparse_file()
    assert len(operators.decode(model)) == 1
    change(model)  # type: ignore[operator]
    with pytest.raises(FormatError, match=message):
        read(model.SerializeToString())
