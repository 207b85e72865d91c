"""Random damage to the sparse initializers and attributes of a small model, run through the operator library in onnxruntime.

Each mutant must either run or be refused in one line; the process must survive. The tests run a few hundred; continuous integration
runs `python tests/mutate.py 1000` with the library built under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from ticketkit.formats import gaps
from ticketkit.lower import operators
from ticketkit.runtime import ort

CHANNELS, OUT, SIZE = 5, 7, 9


def model(seed: int = 0) -> onnx.ModelProto:
    """Two convolutions, the second with a residual, and a fully connected layer, all sparse; input x [N, 5, 9, 9]."""
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return np.where(rng.random(shape) < 0.3, rng.standard_normal(shape), 0).astype(np.float32)

    window = {"strides": [1, 1], "pads": [1, 1, 1, 1], "dilations": [1, 1]}
    initializers, nodes = [], []
    for name, w, x, y, window_of, epilogue in (
        ("first", weight(OUT, CHANNELS, 3, 3), "x", "a", window, operators.Epilogue("", "LeakyRelu", (0.2,))),
        ("second", weight(OUT, OUT, 3, 3), "a", "b", window, operators.Epilogue("a", "Clip", (-1.0, 1.0))),
        ("head", weight(4, OUT * SIZE * SIZE), "flat", "y", {}, operators.Epilogue("", "Silu")),
    ):
        parts = {**gaps.pack(w), "bias": rng.standard_normal(len(w)).astype(np.float32)}
        initializers += [numpy_helper.from_array(array, f"{name}.{part}") for part, array in parts.items()]
        if name == "head":
            nodes.append(helper.make_node("Flatten", ["b"], ["flat"]))
        op = operators.GEMM if name == "head" else operators.CONV
        inputs = [x, *(f"{name}.{part}" for part in parts)]
        execution = operators.Execution({"first": "csr", "second": "bsr", "head": "bsr1x4"}[name])
        nodes.append(operators.make_node(op, inputs, y, name, w.shape, window_of, epilogue, execution))
    graph = helper.make_graph(
        nodes, "mutate", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", CHANNELS, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])], initializers,
    )  # fmt: skip
    used = sorted({node.op_type for node in nodes if node.domain == operators.DOMAIN})
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(operators.DOMAIN, operators.VERSION)]
    return helper.make_model(
        graph, functions=[operators.function(name, 17) for name in used], opset_imports=opsets, ir_version=operators.IR_VERSION
    )


def mutate(original: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """A copy with one to three wounds: bytes, lengths, types or attributes."""
    mutant = onnx.ModelProto()
    mutant.CopyFrom(original)
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.7:
            _wound_tensor(mutant.graph.initializer[rng.integers(len(mutant.graph.initializer))], rng)
        else:
            _wound_attribute([n for n in mutant.graph.node if n.domain][rng.integers(3)], rng)
    return mutant


def _wound_tensor(tensor: TensorProto, rng: np.random.Generator) -> None:
    data, kind = bytearray(tensor.raw_data), rng.integers(5)
    if kind == 0 and data:  # flipped bits
        for at in rng.integers(len(data), size=rng.integers(1, 9)):
            data[at] ^= 1 << rng.integers(8)
    elif kind == 1 and data:  # noise
        at = int(rng.integers(len(data)))
        data[at : at + 16] = rng.bytes(len(data[at : at + 16]))
    elif kind == 2:  # a different length that agrees with its bytes
        item = len(data) // max(int(np.prod(tensor.dims)), 1) or 1
        count = int(rng.integers(0, 2 * np.prod(tensor.dims) + 2))
        data = bytearray((bytes(data) + rng.bytes(item * (count + 1)))[: item * count])
        tensor.dims[:] = [count]
    elif kind == 3:  # another rank or a claim its bytes do not back
        tensor.dims[:] = [[1, *tensor.dims], [], [10**9], [0]][rng.integers(4)]
    else:
        tensor.data_type = int(rng.choice([TensorProto.FLOAT, TensorProto.UINT16, TensorProto.INT32, TensorProto.FLOAT16]))
    tensor.raw_data = bytes(data)


def _wound_attribute(node: onnx.NodeProto, rng: np.random.Generator) -> None:
    attribute = node.attribute[rng.integers(len(node.attribute))]
    if attribute.type == onnx.AttributeProto.INTS and attribute.ints:
        value = int(rng.choice([0, 1, 2, 3, -1, 7, 64, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63)]))
        attribute.ints[rng.integers(len(attribute.ints))] = value
        if rng.random() < 0.2:
            del attribute.ints[-1]
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = float(rng.choice([np.nan, np.inf, -np.inf, 0.0]))
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = bytes(rng.choice([b"", b"Relu", b"None", b"Clip", b"x" * 300]))


def survives(mutant: onnx.ModelProto) -> str | None:
    """Loads and runs a mutant with the library; None where it ran, else the one-line refusal."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    ort.register(options)
    try:
        session = onnxruntime.InferenceSession(mutant.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": np.ones((2, CHANNELS, SIZE, SIZE), np.float32)})
    except Exception as error:  # onnxruntime's own classes have no common base
        return str(error)
    return None


def main(count: int) -> tuple[int, int]:
    """Run `count` mutants and say how they ended, (ran, refused); there must be some of both, or nothing was tested."""
    rng, original = np.random.default_rng(0), model()
    assert survives(original) is None
    refused = [why for _ in range(count) if (why := survives(mutate(original, rng))) is not None]
    assert 0 < len(refused) < count, "the mutations test nothing"
    print(f"{count} mutants: {count - len(refused)} ran, {len(refused)} were refused, none crashed")
    return count - len(refused), len(refused)


if __name__ == "__main__":
    main(int(sys.argv[1]))
