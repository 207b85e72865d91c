"""Batches in pieces: which models allow it, and that outputs, errors and Ctrl-C are those of the whole."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import Array, Dims, conv_net, graph, node, normal, pruned
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto

from ticketkit.errors import DataError, ModelError
from ticketkit.formats import gaps
from ticketkit.lower import operators
from ticketkit.lower.batch import independent
from ticketkit.runtime import ort, streams
from ticketkit.runtime.streams import IDLE, PIECE_BYTES, Streams, cores, pieces
from ticketkit.session import InferenceSession

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


# What is cut, and where


@given(st.integers(1, 300), st.integers(0, 2**20), st.integers(1, 9))
def test_pieces(batch: int, image_bytes: int, threads: int) -> None:
    parts = pieces(batch, image_bytes, threads)
    if batch // threads < 2 or batch // threads * image_bytes < PIECE_BYTES or -batch % threads > batch / IDLE:
        assert not parts
        return
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])] and parts[-1].stop == batch
    sizes = {part.stop - part.start for part in parts}
    assert min(sizes) > 0 and max(sizes) - min(sizes) < 2
    assert len(parts) % threads == 0 or sizes == {1}
    assert all(size == 1 or size * image_bytes <= PIECE_BYTES for size in sizes)


def test_the_cores_of_this_process() -> None:
    assert 1 <= cores() <= len(os.sched_getaffinity(0))


# Runs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces each batch was cut into, 0 for whole."""
    counts = []

    def spy(batch: int, image_bytes: int, threads: int) -> list[slice]:
        parts = pieces(batch, 1 << 20, threads)  # as if images were large
        counts.append(len(parts))
        return parts

    monkeypatch.setattr(streams, "pieces", spy)
    return counts


@pytest.mark.parametrize("threads", [None, 1, 2, 3])
@pytest.mark.parametrize("batch", [0, 1, 2, 4, 6, 7, 9, 23])
def test_bit_for_bit(batch: int, threads: int | None, asked: list[int]) -> None:
    model = sparse_model()
    x = normal(batch, CHANNELS, 6, 6)
    session = InferenceSession(model.SerializeToString(), threads=threads)
    first = session.run(None, {"x": x})
    np.testing.assert_array_equal(first[0], whole(model, x))
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], first[0])
    cut = {1: (2, 4, 6, 7, 9, 23), 2: (4, 6, 9, 23), 3: (6, 9, 23)}
    if threads:
        assert asked == ([batch if batch in cut[threads] else 0] * 2 if batch > 1 else [])


def test_a_network(asked: list[int]) -> None:
    """Dense operators round as they like; the tolerance is that of tests/test_session.py."""
    model = conv_net(0.9, channels=64)
    x = normal(9, 3, 32, 32)
    session = InferenceSession(model.SerializeToString(), threads=2)
    np.testing.assert_allclose(session.run(["y"], {"x": x})[0], whole(model, x), atol=3e-5, rtol=0)
    assert asked == [9]


def test_outputs_and_inputs_by_name(asked: list[int]) -> None:
    model = sparse_model(node("Sub", "b x", "y"))
    for info in (model.graph.input.add(), model.graph.output.add()):
        info.CopyFrom(model.graph.input[0])
    model.graph.input[1].name, model.graph.output[1].name, model.graph.node[-1].input[1] = "x2", "a", "x2"
    assert independent(model)
    session = InferenceSession(model.SerializeToString(), threads=2)
    feed = {"x2": normal(4, CHANNELS, 6, 6, seed=1), "x": normal(4, CHANNELS, 6, 6)}
    y, a = session.run(None, feed)
    for names in (["a"], ["a", "y"], ["y", "y"]):
        for name, output in zip(names, session.run(names, feed), strict=True):
            np.testing.assert_array_equal(output, {"y": y, "a": a}[name])
    assert asked == [4] * 4
    np.testing.assert_array_equal(session.run(None, feed, onnxruntime.RunOptions())[0], y)
    with pytest.raises(ModelError, match="cannot run the model"):  # batches that differ are onnxruntime's to judge
        session.run(None, {**feed, "x2": feed["x2"][:3]})
    assert asked == [4] * 5


def test_a_slice_of_memory(asked: list[int]) -> None:
    model, x = sparse_model(), normal(4, 6, 6, CHANNELS).transpose(0, 3, 1, 2)[::-1]
    np.testing.assert_array_equal(InferenceSession(model.SerializeToString(), threads=2).run(None, {"x": x})[0], whole(model, x.copy()))
    assert asked == [4]


REFUSED: dict[str, Callable[[], InferenceSession]] = {
    "own options": lambda: InferenceSession(sparse_model().SerializeToString(), onnxruntime.SessionOptions(), threads=2),
    "dense": lambda: InferenceSession(conv_net(0.0).SerializeToString(), threads=2),
    "mixed": lambda: InferenceSession(
        sparse_model(*MIXED["mean over the batch"][0], constants={"c": ints([0])}).SerializeToString(), threads=2
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_runs_whole(name: str, asked: list[int]) -> None:
    session = REFUSED[name]()
    shape = [d if isinstance(d, int) else 4 for d in session.get_inputs()[0].shape]
    assert len(session.run(None, {"x": normal(*shape)})[0]) == 4
    assert asked == []


def test_one_copy_of_the_weights_until_needed(monkeypatch: pytest.MonkeyPatch, asked: list[int]) -> None:
    made: list[int] = []
    original = onnxruntime.InferenceSession

    def counted(*args: Any, **options: Any) -> Any:
        made.append(args[1].intra_op_num_threads)
        return original(*args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counted)
    data = sparse_model().SerializeToString()
    one, two = InferenceSession(data, threads=1), InferenceSession(data, threads=2)
    for batch in (4, 1, 4, 6):
        for session in (one, two):
            session.run(None, {"x": normal(batch, CHANNELS, 6, 6)})
            assert made == ([1, 2] if session is one and len(asked) < 2 else [1, 2, 1])


def test_wrong_inputs_and_errors_in_a_stream(asked: list[int]) -> None:
    free: Dims = ["N", CHANNELS, "H", "W"]
    tail = [node("Slice", "b s e d", "c"), node("MatMul", "c w", "y")]
    constants = {"s": ints([0]), "e": ints([6]), "d": ints([3]), "w": normal(6, 2)}
    session = InferenceSession(
        sparse_model(*tail, image=free, outputs=["N", CHANNELS, "H", 2], constants=constants).SerializeToString(), threads=2
    )
    assert session.run(None, {"x": normal(4, CHANNELS, 6, 9)})[0].shape == (4, CHANNELS, 6, 2)
    with pytest.raises(ModelError, match="onnxruntime cannot run the model") as caught:
        session.run(None, {"x": normal(4, CHANNELS, 6, 5)})
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="expected float32"):
        session.run(None, {"x": np.zeros((4, CHANNELS, 6, 6))})
    assert asked == [4] * 2
    assert session.run(None, {"x": normal(4, CHANNELS, 6, 6)})[0].shape == (4, CHANNELS, 6, 2), "usable after an error"


class Fake:
    """A session whose outputs are its inputs; it stops at the image that is `bad`, at others after an event."""

    def __init__(self, bad: BaseException | None = None) -> None:
        self.bad, self.seen, self.go = bad, list[int](), threading.Event()

    def run(self, names: Any, feed: dict[str, Array], options: Any) -> list[Array]:
        image = int(feed["x"].flat[0])
        self.seen.append(image)
        if image == 0 and self.bad is not None:
            self.go.set()
            raise self.bad
        if self.bad is not None:
            self.go.wait(10)
        return [feed["x"], feed["x"] * 2]


LARGE = np.broadcast_to(np.arange(40.0).reshape(-1, 1, 1, 1), (40, 1, 256, 256)).copy()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_order(threads: int) -> None:
    fake = Fake()
    outputs = Streams(fake, threads, lambda: fake).run(None, {"x": LARGE})
    np.testing.assert_array_equal(outputs[0], LARGE)
    np.testing.assert_array_equal(outputs[1], LARGE * 2)
    assert sorted(fake.seen) == [*range(40)]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_nothing_runs_on_after_an_error(error: BaseException) -> None:
    fake = Fake(error)
    runner = Streams(fake, 2, lambda: fake)
    with pytest.raises(type(error)):
        runner.run(None, {"x": LARGE})
    seen = list(fake.seen)
    assert len(seen) < 40
    fake.bad = None
    runner.run(None, {"x": LARGE})
    assert len(fake.seen) == len(seen) + 40, "nothing of the first batch was left to run"


def test_many_threads_may_run_one_session(asked: list[int]) -> None:
    model = sparse_model()
    session = InferenceSession(model.SerializeToString(), threads=2)
    batches = [normal(2 + i % 5, CHANNELS, 6, 6, seed=i) for i in range(20)]
    with ThreadPoolExecutor(5) as pool:
        results = list(pool.map(lambda x: session.run(None, {"x": x})[0], batches))
    for x, result in zip(batches, results, strict=True):
        np.testing.assert_array_equal(result, whole(model, x))


def test_the_threads_end_with_the_session() -> None:
    before = set(threading.enumerate())
    runner = Streams(fake := Fake(), 2, lambda: fake)
    runner.run(None, {"x": LARGE})
    workers = set(threading.enumerate()) - before
    assert workers and all(worker.name.startswith("ticketkit") for worker in workers)
    del runner
    gc.collect()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
