"""Malformed graphs, whatever is wrong with them: one clear line, at once, and without the memory they claim."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import conv_net, graph, node, normal, pruned, run
from onnx import ModelProto, SparseTensorProto, TensorProto, helper, numpy_helper

from ticketkit.errors import FormatError, ModelError, TicketkitError
from ticketkit.exporters import examine, export
from ticketkit.lower import lower, operators, read
from ticketkit.lower.operators import Execution
from ticketkit.planner import plan
from ticketkit.session import InferenceSession

Change = Callable[[ModelProto], None]
MOST_BYTES, MOST_SECONDS = 20_000_000, 5.0  # of reading a small damaged model; a claim of 10^9 elements would be 4 GB


def plain() -> ModelProto:
    return conv_net(0.9, channels=64)


def sparse() -> ModelProto:
    """An exported file without its hash, which would notice every change first."""
    from ticketkit.exporters import onnx as target

    network = lower(plain())
    keep = {layer.name: Execution() for layer in network.layers if layer.name != "head"}
    model = onnx.load_from_string(target.encode(network, plan(network, keep)))
    del model.metadata_props[:]
    assert len(operators.decode(model)) == 4
    return model


def standard() -> ModelProto:
    """A file with sparse initializers of standard ONNX, without its hash."""
    from ticketkit.exporters import onnx_sparse_initializer as target

    network = lower(plain())
    model = onnx.load_from_string(target.encode(network, plan(network)))
    del model.metadata_props[:]
    assert len(model.graph.sparse_initializer) == 3
    return model


def find(model: ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name or name in n.output)


def reads(name: str, at: int, tensor: str) -> Change:
    """Node `name`, or the one that writes it, reads another tensor."""

    def change(model: ModelProto) -> None:
        find(model, name).input[at] = tensor

    return change


def writes(name: str, outputs: list[str]) -> Change:
    def change(model: ModelProto) -> None:
        target = find(model, name)
        del target.output[:]
        target.output.extend(outputs)

    return change


def without(ending: str) -> Change:
    """An initializer is missing."""

    def change(model: ModelProto) -> None:
        model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name.endswith(ending)))

    return change


def backwards(model: ModelProto) -> None:
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def tensor(ending: str, edit: Callable[[TensorProto], object]) -> Change:
    def change(model: ModelProto) -> None:
        edit(next(t for t in model.graph.initializer if t.name.endswith(ending)))

    return change


def array(ending: str, make: Callable[[np.ndarray], np.ndarray]) -> Change:
    return tensor(ending, lambda t: t.CopyFrom(numpy_helper.from_array(make(numpy_helper.to_array(t).copy()), t.name)))


def claim(*dims: int, typed: bool = False) -> Callable[[TensorProto], object]:
    """Other dimensions over the same bytes, or over as many floats outside raw_data."""

    def edit(t: TensorProto) -> None:
        if typed:
            t.float_data.extend(numpy_helper.to_array(t).ravel().tolist())
            t.ClearField("raw_data")
        t.dims[:] = dims

    return edit


def shape(*dims: int) -> Change:
    """What the first sparse node says of its weight."""

    def change(model: ModelProto) -> None:
        attributes = {a.name: a for a in next(operators.nodes(model)).attribute}
        attributes["weight_shape"].ints[:] = dims
        attributes["numel"].ints[:] = [int(np.prod(np.array(dims, object)))]

    return change


def put(at: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def make(a: np.ndarray) -> np.ndarray:
        a[at] = value
        return a

    return make


def first(edit: Callable[[SparseTensorProto], object]) -> Change:
    return lambda model: edit(model.graph.sparse_initializer[0]) and None


def positions(make: Callable[[np.ndarray], np.ndarray]) -> Change:
    return first(lambda s: s.indices.CopyFrom(numpy_helper.from_array(make(numpy_helper.to_array(s.indices).copy()))))


def entries(count: int) -> Callable[[SparseTensorProto], None]:
    """Values and indices claim to be so many."""

    def edit(s: SparseTensorProto) -> None:
        s.values.dims[:] = [count]
        s.indices.dims[:] = [count]

    return edit


BILLION = 10**9
CASES: dict[str, tuple[Callable[[], ModelProto], Change, str]] = {
    "a cycle of two": (plain, reads("conv1", 0, "sum"), "malformed ONNX"),
    "a node that reads itself": (plain, reads("conv1", 0, "conv1"), "malformed ONNX"),
    "nodes backwards": (plain, backwards, "malformed ONNX"),
    "two writers": (plain, writes("conv2", ["conv1"]), "malformed ONNX"),
    "no writer": (plain, writes("conv2", ["somewhere"]), "malformed ONNX"),
    "a missing weight": (plain, without("conv1.weight"), "malformed ONNX"),
    "a claim over raw bytes": (plain, tensor("conv1.weight", claim(64, 64, 3, BILLION)), "expected .* bytes for shape"),
    "a claim over floats": (plain, tensor("conv1.weight", claim(64, 64, BILLION, 3, typed=True)), "conv1.weight|malformed"),
    "a claim over nothing": (plain, tensor("conv1.weight", lambda t: (claim(BILLION)(t), t.ClearField("raw_data"))), "malformed"),
    "dimensions that overflow": (plain, tensor("conv1.weight", claim(2**32, 2**32, 2**32)), "expected .* bytes for shape"),
    "sparse: a cycle": (sparse, reads("conv1", 0, "relu"), "malformed ONNX"),
    "sparse: its own residual": (sparse, reads("down", 4, "relu"), "malformed ONNX"),
    "sparse: no output": (sparse, writes("conv2", []), "malformed ONNX|outputs: expected Y"),
    "sparse: missing values": (sparse, without("conv1.values"), "malformed ONNX"),
    "sparse: missing gaps": (sparse, without("conv1.gaps"), "malformed ONNX"),
    "sparse: missing bias": (sparse, without("conv1.bias"), "malformed ONNX"),
    "sparse: gaps made at run time": (sparse, reads("conv1", 2, "x"), "gaps: expected an initializer"),
    "sparse: positions that stand still": (sparse, array("conv1.gaps", put(5, 0)), "conv1: gaps: expected positive gaps"),
    "sparse: positions out of range": (sparse, array("conv1.gaps", put(5, 65535)), "conv1: gaps: expected positions below"),
    "sparse: no positions": (sparse, array("conv1.gaps", lambda a: a[:0]), "conv1: gaps: expected .* entries"),
    "sparse: a claim of positions": (sparse, tensor("conv1.gaps", claim(BILLION)), "expected .* bytes for shape"),
    "sparse: a claim of values": (sparse, tensor("conv1.values", claim(BILLION, typed=True)), "malformed"),
    "sparse: a claim of weights": (sparse, shape(1000, 1000, 31, 33), "weight_shape: .* claims 1023000000 weights, expected fewer"),
    "sparse: a claim of rows": (sparse, shape(BILLION, 1, 1, 1), "weight_shape: .* claims 1000000000 weights"),
    "sparse: a claim near 64 bits": (sparse, shape(2**31, 2**31, 1, 1), "weight_shape: .* claims 4611686018427387904 weights"),
    "sparse: no rows": (sparse, shape(0, 3, 3, 3), "weight_shape: expected 4 ints of at least 1"),
    "sparse: no taps": (sparse, shape(64, 3, 0, 3), "weight_shape: expected 4 ints of at least 1"),
    "standard: positions descend": (standard, positions(lambda a: a[::-1]), "indices: expected ascending"),
    "standard: positions repeat": (standard, positions(lambda a: put(4, a[3])(a)), "indices: expected ascending"),
    "standard: positions out of range": (standard, positions(put(-1, BILLION)), "indices: expected positions within"),
    "standard: negative positions": (standard, positions(put(0, -1)), "indices: expected positions within"),
    "standard: positions of another type": (standard, positions(lambda a: a.astype(np.int32)), "int64 indices"),
    "standard: too few positions": (standard, positions(lambda a: a[1:]), r"expected values \[n\] and int64 indices"),
    "standard: a claim of weights": (standard, first(lambda s: s.dims.__setitem__(0, BILLION)), "dims: .* claim .* expected fewer"),
    "standard: a claim of entries": (standard, first(entries(BILLION)), "values: not a whole tensor"),
    "standard: no weights": (standard, first(lambda s: s.dims.__setitem__(0, 0)), "expected a name and positive dimensions"),
    "standard: no dimensions": (standard, first(lambda s: s.ClearField("dims")), "expected a name and positive dimensions"),
    "standard: no name": (standard, first(lambda s: s.values.ClearField("name")), "expected a name"),
    "standard: values elsewhere": (standard, first(lambda s: setattr(s.values, "data_location", TensorProto.EXTERNAL)), "in the file"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_graph_is_refused_at_once(case: str) -> None:
    make, change, message = CASES[case]
    model = make()
    read(model.SerializeToString())
    change(model)
    data, start = model.SerializeToString(), time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message) as caught:
            read(data)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES and time.process_time() - start < MOST_SECONDS
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def unchecked(model: ModelProto) -> ModelProto:
    """Output shapes that nobody can infer: ONNX's checker cannot run, and the checks of onnxruntime have to do."""
    model.graph.input.append(helper.make_tensor_value_info("shape", TensorProto.INT64, ["rank"]))
    model.graph.node.append(helper.make_node("Reshape", ["y", "shape"], ["reshaped"]))
    model.graph.output.append(helper.make_tensor_value_info("reshaped", TensorProto.FLOAT, None))
    assert read(model.SerializeToString())
    return model


@pytest.mark.parametrize("case", [name for name, (make, change, _) in CASES.items() if make is not standard and change is not backwards])
def test_what_the_checker_cannot_see_is_refused_later(case: str, tmp_path: Path) -> None:
    """Never more than one line, whichever way such a graph is used. (onnxruntime sorts nodes that stand backwards.)"""
    make, change, _ = CASES[case]
    model = unchecked(make())
    change(model)
    data = model.SerializeToString()
    for use in (lambda: InferenceSession(data), lambda: export(data, tmp_path / "a", format="onnx-dense"), lambda: examine(data)):
        with pytest.raises(TicketkitError) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# Sizes of zero ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(0, 3, 3, 3), (8, 0, 3, 3), (8, 3, 0, 3), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("target", ["onnx", "onnx-dense", "csr", "bsr", "onnx-sparse-initializer"])
def test_weights_without_elements(dims: tuple[int, ...], target: str, tmp_path: Path) -> None:
    model = graph([node("Conv", "x w", "y")], {"x": ["N", 3, 8, 8]}, ["y"], {"w": pruned((8, 3, 3, 3), 0.5)})
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros(dims, np.float32), "w"))
    for use in (lambda: export(model, tmp_path / "a", format=target), lambda: InferenceSession(model.SerializeToString())):
        with pytest.raises(TicketkitError) as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dims", [[0, 3, 8, 8], ["N", 3, 0, 8]], ids=str)
def test_inputs_without_elements(dims: list[int | str], tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "c", pads=[1] * 4), node("Relu", "c", "y")]
    model = graph(nodes, {"x": dims}, ["y"], {"w": pruned((8, 3, 3, 3), 0.9)})
    with pytest.raises(ModelError, match=r"input 'x': expected positive dimensions, the model declares \[.*0.*\]"):
        export(model, tmp_path / "a", format="onnx-dense")


# What is only unusual --------------------------------------------------------------------------------------------------------


def test_the_largest_claim_that_is_allowed_costs_nothing_to_read() -> None:
    model = sparse()
    shape(64, 3, 1000, 2000)(model)
    tracemalloc.start()
    try:
        assert next(iter(operators.decode(read(model.SerializeToString())).values())).shape == (64, 3, 1000, 2000)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def test_claims_that_are_too_large_only_together() -> None:
    model = sparse()
    for each in operators.nodes(model):
        attributes = {a.name: a for a in each.attribute}
        rows = attributes["weight_shape"].ints[0]
        attributes["weight_shape"].ints[:] = [rows, 2**27 // rows, 1, 1]
        attributes["numel"].ints[:] = [2**27]
    with pytest.raises(ModelError, match="2 GiB when dense"):
        operators.expand(read(model.SerializeToString()))


def test_sparse_initializers_are_read_dense() -> None:
    """With positions counted in one number or in one for each dimension."""
    model, x = standard(), {"x": normal(2, 3, 32, 32)}
    expected = run(lower(plain()).model, x)[0]
    for indices in ("flat", "one for each dimension"):
        back = read(model.SerializeToString())
        assert not back.graph.sparse_initializer
        np.testing.assert_array_equal(run(back, x)[0], expected)
        if indices == "flat":
            for s in model.graph.sparse_initializer:
                at = np.unravel_index(numpy_helper.to_array(s.indices), tuple(s.dims))
                s.indices.CopyFrom(numpy_helper.from_array(np.stack(at, 1)))
            onnx.checker.check_model(model)
