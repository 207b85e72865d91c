"""A small sparse network of images, and running it: material of the tests of batches."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from graphs import Array, Dims, node, normal, pruned
from onnx import ModelProto, NodeProto

from ticketkit.formats import gaps
from ticketkit.lower import operators
from ticketkit.runtime import ort

CHANNELS = 8
IMAGE: Dims = ["N", CHANNELS, 6, 6]


def sparse_conv(source: str, name: str, seed: int, residual: str = "", activation: str = "Relu") -> tuple[NodeProto, dict[str, Array]]:
    """A 3 x 3 convolution that keeps the shape."""
    shape = (CHANNELS, CHANNELS, 3, 3)
    parts = {**gaps.pack(pruned(shape, 0.8, seed)), "bias": normal(CHANNELS, seed=seed + 1)}
    window = {"strides": [1, 1], "pads": [1] * 4, "dilations": [1, 1]}
    made = operators.make_node(
        operators.CONV, [source, f"{name}.values", f"{name}.gaps", f"{name}.bias"], name, name, shape, window,
        operators.Epilogue(residual, activation), operators.Execution(),
    )  # fmt: skip
    return made, {f"{name}.{key}": value for key, value in parts.items()}


def sparse_model(*nodes: NodeProto, image: Dims = IMAGE, outputs: Dims = IMAGE, constants: dict[str, Array] | None = None) -> ModelProto:
    """x -> SparseConvRelu "a" -> SparseConvAddRelu "b" of it, plus a -> the nodes -> "y"."""
    (first, weights), (second, more) = sparse_conv("x", "a", 1), sparse_conv("a", "b", 3, "a")
    tail = nodes or (node("Sigmoid", "b", "y"),)
    tensor = onnx.TensorProto.FLOAT
    made = onnx.helper.make_graph(
        [first, second, *tail],
        "test",
        [onnx.helper.make_tensor_value_info("x", tensor, list(image))],
        [onnx.helper.make_tensor_value_info("y", tensor, list(outputs))],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in {**weights, **more, **(constants or {})}.items()],
    )
    used = sorted({n.op_type for n in made.node if n.domain})
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(operators.DOMAIN, operators.VERSION)]
    functions = [operators.function(name, 18) for name in used]
    model = onnx.helper.make_model(made, opset_imports=opsets, functions=functions, ir_version=8)
    onnx.checker.check_model(model)
    return model


def whole(model: ModelProto, x: Array, threads: int = 1) -> Array:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    ort.register(options)
    output: Array = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]
    return output
