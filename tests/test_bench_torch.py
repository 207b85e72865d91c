"""The torch engines rebuild ONNX graphs: every operator they know is compared with onnxruntime."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from ticketkit.errors import ModelError

torch = pytest.importorskip("torch")

from ticketkit.bench.torch_graph import as_module  # noqa: E402

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
    ("Dropout", {}, [], 17),
    ("Flatten", {}, [], 17),
    ("Flatten", {"axis": 2}, [], 17),
    ("GlobalAveragePool", {}, [], 17),
    ("HardSigmoid", {"alpha": 0.25}, [], 17),
    ("HardSwish", {}, [], 17),
    ("Identity", {}, [], 17),
    ("LeakyRelu", {"alpha": 0.2}, [], 17),
    ("MatMul", {}, [floats(8, 4)], 17),
    ("MaxPool", {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2]}, [], 17),
    ("MaxPool", {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "strides": [2, 2]}, [], 17),
    ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, [], 17),
    ("Pad", {}, [ints(0, 1, 0, 0, 0, 2, 0, 0)], 17),
    ("Pad", {}, [ints(1, 2, 0, 1), np.float32(0.5), ints(3, 1)], 18),
    ("Pad", {"mode": "reflect"}, [ints(0, 0, 1, 2, 0, 0, 2, 1)], 17),
    ("Pad", {"pads": [0, 1, 0, 0, 0, 2, 0, 0], "value": 0.5}, [], 10),
    ("ReduceMean", {"axes": [2, 3], "keepdims": 0}, [], 17),
    ("ReduceMean", {}, [ints(-1, -2)], 18),
    ("ReduceMean", {}, [], 18),
    ("Relu", {}, [], 17),
    ("Reshape", {}, [ints(0, -1, 4)], 17),
    ("Sigmoid", {}, [], 17),
    ("Slice", {}, [ints(0, -7), ints(9, 1000), ints(3, 2), ints(2, 3)], 17),
    ("Slice", {"starts": [1, 2], "ends": [-1, 8], "axes": [1, 3]}, [], 9),
    ("Softmax", {"axis": 1}, [], 17),
    ("Tanh", {}, [], 17),
    ("Transpose", {"perm": [0, 2, 3, 1]}, [], 17),
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
    module = as_module(path)
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
    from ticketkit.bench.torch_graph import _makers

    tested_below = {"Gemm", "Squeeze", "Cast"}
    assert set(_makers()) == {case[0] for case in CASES} | tested_below


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
        (helper.make_node("Erf", ["x"], ["y"], name="odd"), "cannot rebuild node 'odd' .ai.onnx.Erf"),
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], auto_pad="SAME_UPPER"), "auto_pad"),
        (helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], pads=[0, 0, 1, 1]), "equal padding"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, node, message):
    with pytest.raises(ModelError, match=message):
        as_module(save(tmp_path / "odd.onnx", [node], {}, 17))
