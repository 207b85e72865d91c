"""Weights stored as float16: rounded once, then the same network to the bit in every runtime, in 4 bytes per non-zero."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import Array, conv_net, graph, node, normal, optimized, pruned, run, weights
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ticketkit.bench.subject import Subject
from ticketkit.errors import ExportError, FormatError, ModelError
from ticketkit.exporters import examine, export, onnx_dense
from ticketkit.exporters import onnx as sparse_onnx
from ticketkit.lower import Network, half_weights, lower, operators, read
from ticketkit.planner import plan
from ticketkit.runtime import ort
from ticketkit.session import InferenceSession

TARGETS = ["onnx", "onnx-dense"]
X = normal(3, 3, 32, 32)


def rounded(model: ModelProto) -> ModelProto:
    """The lowered network with rounded weights, float32: what a file stands for."""
    network, made = lower(read(model.SerializeToString())), ModelProto()
    made.CopyFrom(network.model)
    half_weights.round_weights(made, network.weights)
    return made


# Numbers ---------------------------------------------------------------------------------------------------------------------

ULP = 2.0**-10  # of float16 from 1 to 2
LEAST = 2.0**-24  # the smallest float16
ROUNDED = {  # float32 -> float16, by hand
    1 + ULP / 2: 1.0, 1 + 3 * ULP / 2: 1 + 2 * ULP, -1 - 3 * ULP / 2: -1 - 2 * ULP, 1 + 9 * ULP / 16: 1 + ULP, 65504.0: 65504.0,
    LEAST: LEAST, LEAST / 2: 0.0, -LEAST / 2: 0.0, 9 * LEAST / 16: LEAST, 3 * LEAST / 2: 2 * LEAST, 2.0**-30: 0.0,
    1023.5 * LEAST: 1024 * LEAST,
}  # fmt: skip


def small(weight: Array) -> ModelProto:
    return graph([node("Conv", "x c.weight", "y")], {"x": ["N", weight.shape[1], 16, 16]}, ["y"], {"c.weight": weight})


def test_rounding_is_to_the_nearest_and_to_even() -> None:
    weight = np.array([*ROUNDED], np.float32)
    assert weight.tolist() == [*ROUNDED], "the numbers are float32"
    model = small(weight.reshape(1, -1, 1, 1))
    assert half_weights.round_weights(model, {"c.weight"}) == 3
    np.testing.assert_array_equal(weights(model)["c.weight"].ravel(), [*ROUNDED.values()])
    assert weights(model)["c.weight"].dtype == np.float32
    assert half_weights.round_weights(model, {"c.weight"}) == 0, "rounded once is rounded for good"


@pytest.mark.parametrize("value", [65504.01, 65520.0, -1e30])
def test_a_weight_too_large_is_one_clear_error(value: float, tmp_path: Path) -> None:
    weight = pruned((64, 64, 3, 3), 0.9)
    weight[3, 5, 1, 1] = value
    with pytest.raises(ModelError, match=r"c\.weight: [0-9.e+]+ does not fit float16, which ends at 65504; store the values as fp32"):
        export(small(weight), tmp_path / "a.onnx", values="fp16")
    assert not list(tmp_path.iterdir())


def test_every_float16_comes_back_to_the_bit() -> None:
    """All 63,488 finite ones, through the file and onnxruntime's Cast."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].astype(np.float32)
    model = graph([node("MatMul", "x w", "y")], {"x": [1, 1]}, ["y"], {"w": every[None]})
    half_weights.narrow(model, {"w"})
    assert [t.data_type for t in model.graph.initializer] == [TensorProto.FLOAT16]
    np.testing.assert_array_equal(run(model, {"x": np.ones((1, 1), np.float32)})[0].ravel(), every)


def test_narrow_loses_nothing_and_widen_undoes_it() -> None:
    constants = {"exact": normal(4, 4).astype(np.float16).astype(np.float32), "inexact": normal(4, 4), "large": normal(4, 4) * 1e6}
    constants["other"] = constants["exact"]
    nodes = [node("Add", f"{x} {w}", y) for x, w, y in zip(["x", *"abc"], constants, "abcy", strict=True)]
    model = graph(nodes, {"x": [4, 4]}, ["y"], constants)
    before = model.SerializeToString()
    half_weights.narrow(model, {"exact", "inexact", "large"})
    onnx.checker.check_model(model)
    assert half_weights.is_narrow(model)
    assert {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16} == {"exact.fp16"}
    np.testing.assert_array_equal(run(model, {"x": X[0, 0, :4, :4]})[0], run(before, {"x": X[0, 0, :4, :4]})[0])
    half_weights.widen(model)
    operators.drop_unused(model)
    assert not half_weights.is_narrow(model) and [n.op_type for n in model.graph.node] == ["Add"] * 4
    for name, array in constants.items():
        np.testing.assert_array_equal(weights(model)[name], array)


# Files -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_the_file_is_the_rounded_network_to_the_bit(target: str, source: Path, tmp_path: Path) -> None:
    report = export(source, tmp_path / "net", format=target, values="fp16")
    data, reference = (tmp_path / "net").read_bytes(), rounded(onnx.load(source))
    back, expected = lower(read(data)), lower(reference)
    for layer, other in zip(back.layers, expected.layers, strict=True):
        assert layer.name == other.name and layer.weight.dtype == np.float32
        np.testing.assert_array_equal(layer.weight, other.weight)
        np.testing.assert_array_equal(layer.bias, other.bias)
    np.testing.assert_allclose(run(data, {"x": X})[0], run(reference, {"x": X})[0], rtol=0, atol=1e-6)  # fused in another order
    exact = run(onnx.load(source), {"x": X})[0]
    assert report.rounding and report.rounding.difference and report.rounding.difference < 0.01
    assert 1e-5 < np.abs(run(data, {"x": X})[0] - exact).max() < 10 * report.rounding.difference, "negative control: rounding shows"
    assert all(c.difference <= c.tolerance < 1e-4 for c in report.comparisons)
    assert [c.engine for c in report.comparisons] == (["onnxruntime", "ticketkit"] if target == "onnx" else ["onnxruntime"])
    assert json.loads(json.dumps(report.to_dict()))["plan"]["values"] == "fp16" and "outputs move by up to" in str(report)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_stored_as_float16(target: str, source: Path, tmp_path: Path) -> None:
    """The weights of all layers, sparse or dense; nothing else."""
    export(source, tmp_path / "net", format=target, values="fp16", check=False)
    model = onnx.load(tmp_path / "net")
    onnx.checker.check_model(model, full_check=True)
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    halves = {name for name, kind in kinds.items() if kind == TensorProto.FLOAT16}
    sparse = {n.name for n in operators.nodes(model)}
    assert sparse >= ({"conv1", "conv2"} if target == "onnx" else set())
    assert halves == {f"{n}.{'values' if n in sparse else 'weight'}.fp16" for n in ("stem", "conv1", "conv2", "down", "head")}
    assert {kind for name, kind in kinds.items() if "bias" in name} == {TensorProto.FLOAT}


def test_bytes_per_weight(source: Path, tmp_path: Path) -> None:
    """Of the sparse layers: their arrays in the file; the whole file against fp32."""
    sizes = {}
    for values, most in (("fp32", 6.5), ("fp16", 4.5)):
        report = export(source, tmp_path / values, values=values, check=False)
        model, sizes[values] = onnx.load(tmp_path / values), report.bytes
        arrays = sum(len(t.raw_data) for t in model.graph.initializer if ".values" in t.name or ".gaps" in t.name)
        nonzero = sum(np.count_nonzero(s.weight()) for s in operators.decode(model).values())
        assert nonzero > 10_000 and arrays <= most * nonzero
        stored = examine(tmp_path / values).totals()["weight_bytes_stored"]
        weights_bytes = sum(len(t.raw_data) for t in model.graph.initializer if ".bias" not in t.name and t.data_type != TensorProto.INT64)
        assert stored == pytest.approx(weights_bytes, rel=0.001)
    assert sizes["fp16"] < 0.72 * sizes["fp32"]


def test_weights_that_round_to_zero_are_dropped(tmp_path: Path) -> None:
    weight = pruned((64, 64, 3, 3), 0.9)
    at = np.argwhere(weight)[:25]
    weight[tuple(at.T)] = 1e-9
    report = export(small(weight), tmp_path / "a.onnx", values="fp16")
    assert report.rounding and report.rounding.zeros == 25 and "25 more are zero" in str(report)
    (sparse,) = operators.decode(read(tmp_path / "a.onnx")).values()
    assert np.count_nonzero(sparse.parts["values"]) == np.count_nonzero(weight) - 25 == report.plan.choices[0].nnz
    assert not sparse.weight()[tuple(at.T)].any()


def test_scaled_products_stay_exact(tmp_path: Path) -> None:
    """alpha scales the weight after it was rounded: what float16 cannot hold then is stored as float32."""
    constants = {"w": pruned((1024, 1024), 0.95), "b": normal(1024)}
    model = graph([node("Gemm", "x w b", "y", alpha=0.3, transB=1)], {"x": ["N", 1024]}, ["y"], constants)
    report = export(model, tmp_path / "a.onnx", values="fp16")
    assert report.plan.sparse and all(c.difference <= c.tolerance for c in report.comparisons)


def test_a_float16_file_is_a_source_too(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "half.onnx", values="fp16")
    export(tmp_path / "half.onnx", tmp_path / "full.onnx")
    export(tmp_path / "half.onnx", tmp_path / "dense.onnx", format="onnx-dense", values="fp16")
    again = export(tmp_path / "dense.onnx", tmp_path / "again.onnx", values="fp16")
    assert again.rounding and again.rounding.zeros == 0
    stored = [lower(read(tmp_path / f"{name}.onnx")).layers for name in ("half", "full", "dense", "again")]
    for one in zip(*stored, strict=True):
        assert len({layer.name for layer in one}) == 1 and all(np.array_equal(one[0].weight, other.weight) for other in one)
    assert not half_weights.is_narrow(read(tmp_path / "full.onnx"))


# Runtimes --------------------------------------------------------------------------------------------------------------------


def test_casts_are_gone_when_kernels_are_made(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "net", values="fp16", check=False)
    made = optimized((tmp_path / "net").read_bytes(), tmp_path)
    assert "Cast" not in {n.op_type for n in made.graph.node}
    assert TensorProto.FLOAT16 not in {t.data_type for t in made.graph.initializer}


@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernels_compute_the_rounded_network(threads: int, source: Path, tmp_path: Path) -> None:
    """To the bit what they compute for the same weights stored as float32."""
    export(source, tmp_path / "half.onnx", values="fp16", check=False)
    export(rounded(onnx.load(source)), tmp_path / "full.onnx", check=False)
    outputs = [InferenceSession(tmp_path / f"{name}.onnx", threads=threads).run(None, {"x": X})[0] for name in ("half", "full")]
    np.testing.assert_array_equal(*outputs)


def session(data: bytes, library: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if library:
        ort.register(options)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def test_without_graph_optimisations(source: Path, tmp_path: Path) -> None:
    """A stock runtime computes the casts; the kernels, which want constants, say so in one line."""
    export(source, tmp_path / "net", values="fp16", check=False)
    data = (tmp_path / "net").read_bytes()
    expected = run(data, {"x": X})[0]
    np.testing.assert_allclose(session(data, library=False).run(None, {"x": X})[0], expected, atol=1e-4)
    with pytest.raises(Exception, match=r"node '\w+': values: must be .* or a cast of one with graph optimizations on"):
        session(data, library=True)


@pytest.mark.parametrize("target", TARGETS)
def test_dense_engines_are_measured_on_float32_weights(target: str, source: Path, tmp_path: Path) -> None:
    """Some would cast in every run."""
    export(source, tmp_path / "net", format=target, values="fp16", check=False)
    plain = onnx.load(Subject.open(tmp_path / "net", 2, tmp_path).plain)
    assert "Cast" not in {n.op_type for n in plain.graph.node} and {"stem.weight", "head.weight"} <= set(weights(plain))
    np.testing.assert_array_equal(run(plain, {"x": X})[0], run((tmp_path / "net").read_bytes(), {"x": X})[0])


# What goes wrong -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["csr", "bsr", "onnx-sparse-initializer"])
def test_formats_without_float16(target: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"format {target} has no fp16 values; expected one of onnx, onnx-dense"):
        export(source, tmp_path / "a", format=target, values="fp16")
    with pytest.raises(ExportError, match="unknown type of values 'bf16'; expected one of fp32, fp16"):
        export(source, tmp_path / "a", format=target, values="bf16")
    assert not list(tmp_path.iterdir())


def exported(target: str = "onnx") -> tuple[Network, ModelProto]:
    """Some network with rounded weights and its file, without the hash that would notice any change first."""
    network = lower(read(rounded(conv_net(0.9, channels=64)).SerializeToString()))
    encode = {"onnx": sparse_onnx, "onnx-dense": onnx_dense}[target].encode
    model = onnx.load_from_string(encode(network, replace(plan(network), values="fp16")))
    del model.metadata_props[:]
    return network, model


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("at", range(5))
def test_a_last_bit_off_is_refused(target: str, at: int) -> None:
    """In every stored weight, whether its layer is sparse or dense."""
    network, model = exported(target)
    decode = {"onnx": sparse_onnx, "onnx-dense": onnx_dense}[target].decode
    decode(model.SerializeToString(), network)
    tensor = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16][at]
    array = numpy_helper.to_array(tensor).copy()
    largest = np.unravel_index(np.argmax(np.abs(array)), array.shape)
    array[largest] = np.nextafter(array[largest], np.float16(0))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.raises(ExportError, match="what was stored differs from the network"):
        decode(model.SerializeToString(), network)


def cast_of(model: ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == "Cast" and n.output[0] == f"{name}.values")


def test_a_malformed_cast_of_values() -> None:
    _, good = exported()
    assert len(operators.decode(good)) >= 2
    for change, message in (
        (lambda m: setattr(cast_of(m, "conv1").attribute[0], "i", TensorProto.DOUBLE), "conv1: values: expected an initializer"),
        (lambda m: m.graph.node.remove(cast_of(m, "conv1")), "conv1: values: expected an initializer"),
        (lambda m: cast_of(m, "conv1").input.__setitem__(0, "nobody"), "conv1: values: expected an initializer"),
        (lambda m: infinite(m, "conv1.values.fp16"), "conv1: values: expected finite"),
    ):
        model = ModelProto()
        model.CopyFrom(good)
        change(model)
        with pytest.raises(FormatError, match=message):
            operators.decode(model)


def infinite(model: ModelProto, name: str) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array[7] = np.inf
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def test_foreign_casts_are_read_and_left_alone() -> None:
    """Somebody else's float16 constant, also read by another node as it is."""
    constants = {"w.fp16": pruned((8, 3, 1, 1), 0.5).astype(np.float16), "shift": normal(1)}
    nodes = [
        helper.make_node("Cast", ["w.fp16"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["w.fp16"], ["d"], to=TensorProto.DOUBLE),
        node("Conv", "x w", "c"),
        node("Cast", "d", "e", to=TensorProto.FLOAT),
        node("ReduceMax", "e", "m", keepdims=0),
        node("Add", "c m", "y"),
    ]
    model = graph(nodes, {"x": ["N", 3, 4, 4]}, ["y"], constants)
    plain = operators.expand(model)
    onnx.checker.check_model(plain)
    x = normal(2, 3, 4, 4)
    np.testing.assert_array_equal(run(plain, {"x": x})[0], run(model, {"x": x})[0])
    np.testing.assert_array_equal(lower(read(model.SerializeToString())).layers[0].weight, constants["w.fp16"].astype(np.float32))
