"""Small ONNX graphs by hand, and running them: material of the export tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from ticketkit.exporters import get
from ticketkit.lower import lower, operators, read
from ticketkit.planner import plan
from ticketkit.runtime import ort

Array = NDArray[Any]
Dims = Sequence[int | str]


def pruned(shape: Sequence[int], sparsity: float, seed: int = 0) -> Array:
    """f32 weights of a plausible scale, that fraction of them (rounded) exactly zero."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(np.float32) / np.sqrt(max(np.prod(shape[1:]), 1)).astype(np.float32)
    weight.reshape(-1)[rng.permutation(weight.size)[: round(weight.size * sparsity)]] = 0
    return weight


def graph(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Dims],
    outputs: Sequence[str],
    constants: Mapping[str, Array],
    opset: int = 17,
    ir_version: int = 8,
) -> ModelProto:
    """A checked model with float32 inputs; output shapes are left to inference."""
    model = helper.make_model(
        helper.make_graph(
            list(nodes),
            "test",
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(dims)) for name, dims in inputs.items()],
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
    )
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model)
    return model


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """A node from space-separated names; `-` is an absent optional input."""
    return helper.make_node(op, ["" if name == "-" else name for name in inputs.split()], outputs.split(), **attributes)


def conv_net(sparsity: float = 0.9, channels: int = 32, batch: int | str = "N", seed: int = 0) -> ModelProto:
    """A residual block with a stem, a down-sampling branch, BatchNorm and a head; input "x" [N, 3, 32, 32], output "y" [N, 10]."""
    rng = np.random.default_rng(seed)
    constants: dict[str, Array] = {
        "stem.weight": pruned((channels, 3, 3, 3), 0.0, seed),
        "conv1.weight": pruned((channels, channels, 3, 3), sparsity, seed + 1),
        "conv2.weight": pruned((2 * channels, channels, 3, 3), sparsity, seed + 2),
        "down.weight": pruned((2 * channels, channels, 1, 1), sparsity, seed + 3),
        "head.weight": pruned((10, 2 * channels), 0.0, seed + 4),
        "head.bias": rng.standard_normal(10).astype(np.float32),
    }
    nodes = []
    for name, source, stride in (("stem", "x", 1), ("conv1", "stem.relu", 1), ("conv2", "conv1.relu", 2), ("down", "stem.relu", 2)):
        width, pad = len(constants[f"{name}.weight"]), constants[f"{name}.weight"].shape[2] // 2
        for part, low, high in (("scale", 0.5, 1.5), ("shift", -0.3, 0.7), ("mean", -0.2, 0.2), ("var", 0.5, 1.5)):
            constants[f"{name}.{part}"] = rng.uniform(low, high, width).astype(np.float32)
        nodes.append(node("Conv", f"{source} {name}.weight", name, pads=[pad] * 4, strides=[stride] * 2))
        nodes.append(node("BatchNormalization", " ".join(f"{name}{p}" for p in ("", ".scale", ".shift", ".mean", ".var")), f"{name}.bn"))
        if name in ("stem", "conv1"):
            nodes.append(node("Relu", f"{name}.bn", f"{name}.relu"))
    nodes += [
        node("Add", "conv2.bn down.bn", "sum"),
        node("Relu", "sum", "relu"),
        node("GlobalAveragePool", "relu", "pool"),
        node("Flatten", "pool", "flat"),
        node("Gemm", "flat head.weight head.bias", "y", transB=1),
    ]
    return graph(nodes, {"x": [batch, 3, 32, 32]}, ["y"], constants)


def everything_sparse(model: ModelProto) -> bytes:
    """The model with every layer that may be sparse made sparse, whatever the planner thinks of it."""
    network = lower(read(model))
    free = {layer.name: operators.Execution() for layer in network.layers if not layer.obstacle}
    return get("onnx").encode(network, plan(network, keep=free))


def sparse_nodes(data: bytes) -> list[NodeProto]:
    """The nodes of ticketkit's operators in a file, in order."""
    return list(operators.nodes(onnx.load_from_string(data)))


def run(model: ModelProto | bytes, feeds: Mapping[str, Array], library: bool = False) -> list[Array]:
    """Outputs in stock onnxruntime, or with ticketkit's operators registered; a missing library is an error, never a skip."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if library:
        ort.register(options)
    data = model if isinstance(model, bytes) else model.SerializeToString()
    outputs: list[Array] = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, dict(feeds))
    return outputs


def optimized(model: ModelProto | bytes, folder: Path) -> ModelProto:
    """What stock onnxruntime makes of a model at load, at its standard-ONNX level."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    data = model if isinstance(model, bytes) else model.SerializeToString()
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


def weights(model: ModelProto) -> dict[str, Array]:
    """Initializers by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def normal(*shape: int, seed: int = 0) -> Array:
    """Standard normal f32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
