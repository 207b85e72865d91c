"""ONNX graphs rebuilt in torch: every operator known there is compared with onnxruntime."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from ticketkit.errors import ModelError

torch = pytest.importorskip("torch")

from ticketkit.runtime.torch_graph import as_module  # noqa: E402
from ticketkit.runtime.torch_operators import ON_NUMBERS, makers  # noqa: E402

rng = np.random.default_rng(5)


def ints(*values):
    return np.array(values, np.int64)


def floats(*shape):
    return rng.standard_normal(shape).astype(np.float32)


# operator, attributes, constant operands after the input, opset; the input is [2, 6, 9, 8]
CASES = [
    ("Add", {}, [floats(6, 1, 1)], 17),
    ("Sub", {}, [floats(6, 1, 1)], 17),
    ("Mul", {}, [floats(6, 1, 1)], 17),
    ("Div", {}, [floats(6, 1, 1)], 17),
    ("Abs", {}, [], 17),
    ("AveragePool", {"kernel_shape": [3, 2], "pads": [1, 0, 1, 0], "strides": [2, 1]}, [], 17),
    ("AveragePool", {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1}, [], 17),
    ("BatchNormalization", {"epsilon": 1e-3}, [floats(6), floats(6), floats(6), floats(6) ** 2 + 0.5], 17),
    ("Clip", {}, [np.float32(-0.5), np.float32(0.75)], 17),
    ("Clip", {}, [np.float32(0)], 17),
    ("Clip", {"min": 0.0, "max": 6.0}, [], 6),
    ("Concat", {"axis": 1}, [floats(2, 3, 9, 8)], 17),
    ("Conv", {"pads": [1, 0, 1, 0], "strides": [2, 1], "kernel_shape": [3, 2]}, [floats(5, 6, 3, 2), floats(5)], 17),
    ("Conv", {"pads": [0, 1, 2, 1], "dilations": [2, 1]}, [floats(5, 6, 3, 3)], 17),
    ("Conv", {"group": 3}, [floats(6, 2, 1, 1)], 17),
    ("ConvTranspose", {"strides": [2, 3], "pads": [1, 0, 1, 0], "output_padding": [1, 0]}, [floats(6, 4, 3, 3), floats(4)], 17),
    ("Dropout", {}, [], 17),
    ("Elu", {"alpha": 0.5}, [], 17),
    ("Erf", {}, [], 17),
    ("Exp", {}, [], 17),
    ("Expand", {}, [ints(3, 1, 1, 1, 8)], 17),
    ("Flatten", {}, [], 17),
    ("Flatten", {"axis": 2}, [], 17),
    ("Gather", {"axis": 1}, [ints(2, -1, 0)], 17),
    ("Gather", {"axis": 2}, [np.array(-3)], 17),
    ("Gelu", {}, [], 20),
    ("Gelu", {"approximate": "tanh"}, [], 20),
    ("GlobalAveragePool", {}, [], 17),
    ("HardSigmoid", {"alpha": 0.25}, [], 17),
    ("HardSwish", {}, [], 17),
    ("Identity", {}, [], 17),
    ("LayerNormalization", {"epsilon": 1e-3}, [floats(8), floats(8)], 17),
    ("LayerNormalization", {"axis": 2}, [floats(9, 8)], 17),
    ("LeakyRelu", {"alpha": 0.2}, [], 17),
    ("MatMul", {}, [floats(8, 4)], 17),
    ("MaxPool", {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2]}, [], 17),
    ("MaxPool", {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "strides": [2, 2]}, [], 17),
    ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, [], 17),
    ("Neg", {}, [], 17),
    ("PRelu", {}, [floats(6, 1, 1)], 17),
    ("Pad", {}, [ints(0, 1, 0, 0, 0, 2, 0, 0)], 17),
    ("Pad", {}, [ints(1, 2, 0, 1), np.float32(0.5), ints(3, 1)], 18),
    ("Pad", {"mode": "reflect"}, [ints(0, 0, 1, 2, 0, 0, 2, 1)], 17),
    ("Pad", {"pads": [0, 1, 0, 0, 0, 2, 0, 0], "value": 0.5}, [], 10),
    ("Pow", {}, [np.float32(2)], 17),
    ("ReduceMax", {"axes": [1]}, [], 17),
    ("ReduceMean", {"axes": [2, 3], "keepdims": 0}, [], 17),
    ("ReduceMean", {}, [ints(-1, -2)], 18),
    ("ReduceMean", {}, [], 18),
    ("ReduceSum", {"keepdims": 0}, [ints(1, 3)], 17),
    ("Relu", {}, [], 17),
    ("Reshape", {}, [ints(0, -1, 4)], 17),
    ("Resize", {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}, [floats(0), floats(0), ints(2, 6, 18, 12)], 17),
    ("Resize", {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, [floats(0), floats(0), ints(2, 6, 5, 15)], 17),
    ("Resize", {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
     [floats(0), np.array([1, 1, 2, 3], np.float32)], 17),
    ("Sigmoid", {}, [], 17),
    ("Slice", {}, [ints(0, -7), ints(9, 1000), ints(3, 2), ints(2, 3)], 17),
    ("Slice", {"starts": [1, 2], "ends": [-1, 8], "axes": [1, 3]}, [], 9),
    ("Softmax", {"axis": 1}, [], 17),
    ("Softplus", {}, [], 17),
    ("Squeeze", {}, [], 17),
    ("Tanh", {}, [], 17),
    ("Transpose", {"perm": [0, 2, 3, 1]}, [], 17),
    ("Unsqueeze", {}, [ints(-1, 0, 2)], 17),
    ("Unsqueeze", {"axes": [1]}, [], 12),
]


def save(path, nodes, constants, opset):
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    ends[0] = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6, 9, 8])
    weights = [numpy_helper.from_array(np.asarray(c), name) for name, c in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), str(path))
    return path


def both(path):
    """(onnxruntime's output, torch's, the traced module's) on the same input."""
    x = floats(2, 6, 9, 8)
    expected = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]
    module = as_module(onnx.load(str(path)))
    with torch.inference_mode():
        (eager,) = module(torch.from_numpy(x))
        (traced,) = torch.jit.trace(module, torch.from_numpy(x), check_trace=False)(torch.from_numpy(x))
    return expected, eager.numpy(), traced.numpy()


@pytest.mark.parametrize(("op", "attributes", "operands", "opset"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_operator_is_rebuilt(tmp_path, op, attributes, operands, opset):
    constants = {f"c{i}": operand for i, operand in enumerate(operands)}
    node = helper.make_node(op, ["x", *constants], ["y"], **attributes)
    expected, *found = both(save(tmp_path / "op.onnx", [node], constants, opset))
    for y in found:
        assert y.shape == expected.shape
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_every_operator_of_the_table_has_a_case():
    tested_below = {"Gemm", "Cast", "Split", "Sqrt"}
    assert set(makers()) == {case[0] for case in CASES} | tested_below


@pytest.mark.parametrize("gemm", [{"transB": 1}, {"transB": 1, "alpha": 0.5, "beta": 2.0}])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_head_is_rebuilt(tmp_path, gemm):
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["a"]),
        helper.make_node("Constant", [], ["axes"], value_ints=[2, 3]),
        helper.make_node("Squeeze", ["a", "axes"], ["b"]),
        helper.make_node("Cast", ["b"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Gemm", ["c", "w", "bias"], ["y"], **gemm),
    ]
    expected, *found = both(save(tmp_path / "head.onnx", nodes, {"w": floats(4, 6), "bias": floats(4)}, 17))
    for y in found:
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found[0] * 1.001 - expected).max() > 1e-5  # negative control: the comparison can fail


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("Selu", ["x"], ["y"], name="odd"), "cannot rebuild node 'odd' .ai.onnx.Selu"),
        (helper.make_node("Dropout", ["x"], ["z", "y"], name="odd"), "cannot rebuild node 'odd' .ai.onnx.Dropout"),
        (helper.make_node("Shape", ["x"], ["y"]), "output 'y' is a shape"),
        (helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="cubic"), "Resize expected nearest"),
        (helper.make_node("ConvTranspose", ["x", "w"], ["y"], pads=[1, 0, 0, 0]), "ConvTranspose expected equal padding"),
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], auto_pad="SAME_UPPER"), "auto_pad"),
        (helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], pads=[0, 0, 1, 1]), "equal padding"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, node, message):
    with pytest.raises(ModelError, match=message):
        as_module(onnx.load(str(save(tmp_path / "odd.onnx", [node], {}, 17))))


@pytest.mark.parametrize("split", [{"attribute": 12}, {"input": 17}, {"outputs": 18}])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_splits_are_rebuilt(tmp_path, split):
    constants = {"sizes": ints(4, 5)} if "input" in split else {"one": np.float32(1)}
    opset = next(iter(split.values()))
    options = {12: {"split": [4, 5]}, 17: {}, 18: {"num_outputs": 2}}[opset]
    nodes = [
        helper.make_node("Split", ["x", "sizes"] if opset == 17 else ["x"], ["a", "b"], axis=2, **options),
        helper.make_node("Abs", ["b"], ["c"]),
        helper.make_node("Sqrt", ["c"], ["d"]),
        helper.make_node("Concat", ["d", "a"], ["y"], axis=2),
    ]
    expected, *found = both(save(tmp_path / "split.onnx", nodes, constants, opset))
    for y in found:
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_arithmetic_on_shapes(tmp_path):
    """Numbers, not tensors: each operator that computes with shapes is there, and gives what onnxruntime gives."""
    constants = {"one": ints(1), "two": ints(2), "zero": ints(0), "scalar": np.array(2), "shape": ints(1), "pair": ints(-1, 1)}
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),  # 2, 6, 9, 8
        helper.make_node("Slice", ["s", "zero", "two", "zero"], ["head"]),  # 2, 6
        helper.make_node("Gather", ["s", "scalar"], ["h"]),  # 9
        helper.make_node("Unsqueeze", ["h", "zero"], ["h1"]),
        helper.make_node("Squeeze", ["h1", "zero"], ["h0"]),
        helper.make_node("Reshape", ["h0", "shape"], ["h2"]),
        helper.make_node("Mul", ["h2", "two"], ["m"]),  # 18
        helper.make_node("Add", ["m", "two"], ["p"]),  # 20
        helper.make_node("Sub", ["p", "two"], ["q"]),  # 18
        helper.make_node("Div", ["q", "two"], ["r"]),  # 9
        helper.make_node("Cast", ["r"], ["i"], to=TensorProto.INT64),
        helper.make_node("Identity", ["i"], ["j"]),
        helper.make_node("Concat", ["head", "j", "pair"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["y"]),
    ]
    assert {n.op_type for n in nodes} == set(ON_NUMBERS)
    expected, eager, traced = both(save(tmp_path / "shape.onnx", nodes, constants, 17))
    assert eager.shape == traced.shape == expected.shape == (2, 6, 9, 8, 1)
    np.testing.assert_array_equal(eager, expected)
