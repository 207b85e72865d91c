"""The target onnx-sparse-initializer: standard ONNX, and what runtimes make of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import conv_net, graph, node, normal, pruned, run, weights
from onnx import numpy_helper

from ticketkit.bench.subject import Subject
from ticketkit.errors import ExportError
from ticketkit.exporters import export, onnx_sparse_initializer
from ticketkit.lower import lower, read, sparse
from ticketkit.planner import plan
from ticketkit.session import InferenceSession


@pytest.fixture(scope="module")
def file(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("standard") / "net.onnx"
    export(source, path, format="onnx-sparse-initializer")
    return path


def test_it_is_standard_onnx(file: Path, source: Path) -> None:
    model, network = onnx.load(file), lower(read(source))
    onnx.checker.check_model(model)
    assert {entry.domain for entry in model.opset_import} == {""} and not model.functions
    assert [s.values.name for s in model.graph.sparse_initializer] == ["conv1.weight", "conv2.weight", "down.weight"]
    for s in model.graph.sparse_initializer:
        weight = network.graph.constant(s.values.name)
        values, at = numpy_helper.to_array(s.values), numpy_helper.to_array(s.indices)
        assert weight is not None and tuple(s.dims) == weight.shape and values.all() and len(values) == np.count_nonzero(weight)
        np.testing.assert_array_equal(weight.ravel()[at], values)


def test_small_in_the_file_and_loaded_by_onnxruntime(file: Path, source: Path) -> None:
    """To dense weights, or the outputs would not be the same to the bit."""
    assert file.stat().st_size < 0.5 * source.stat().st_size
    x = {"x": normal(2, 3, 32, 32)}
    np.testing.assert_array_equal(run(file.read_bytes(), x)[0], run(lower(read(source)).model, x)[0])


def test_it_is_a_source_too(file: Path, source: Path, tmp_path: Path) -> None:
    for name, model in (("again", file), ("direct", source)):
        export(model, tmp_path / name, check=False)
    again, direct = (lower(read(tmp_path / name)).layers for name in ("again", "direct"))
    for one, other in zip(again, direct, strict=True):
        np.testing.assert_array_equal(one.weight, other.weight)
    export(read(file), tmp_path / "in memory", check=False)
    x = {"x": normal(2, 3, 32, 32)}
    np.testing.assert_array_equal(InferenceSession(file, threads=1).run(None, x)[0], InferenceSession(source, threads=1).run(None, x)[0])


def test_every_engine_of_bench_gets_a_file_it_knows(file: Path, source: Path, tmp_path: Path) -> None:
    subject = Subject.open(file, 2, tmp_path)
    plain = onnx.load(subject.plain)
    assert subject.path == file and not plain.graph.sparse_initializer
    assert {"conv1.weight", "conv2.weight", "down.weight"} <= set(weights(plain))
    assert Subject.open(source, 2, tmp_path).plain == source


def test_weights_of_zeros_only(tmp_path: Path) -> None:
    model = graph([node("Conv", "x c.weight", "y")], {"x": ["N", 3, 8, 8]}, ["y"], {"c.weight": np.zeros((8, 3, 3, 3), np.float32)})
    export(model, tmp_path / "a", format="onnx-sparse-initializer")
    (only,) = onnx.load(tmp_path / "a").graph.sparse_initializer
    assert list(only.values.dims) == [1] and not weights(read(tmp_path / "a"))["c.weight"].any()


def test_dense_where_that_is_smaller(tmp_path: Path) -> None:
    model = graph([node("Conv", "x w", "y")], {"x": ["N", 3, 8, 8]}, ["y"], {"w": pruned((8, 3, 3, 3), 0.6)})
    export(model, tmp_path / "a", format="onnx-sparse-initializer")
    assert not onnx.load(tmp_path / "a").graph.sparse_initializer


def test_a_wrong_weight_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = lower(conv_net(0.9, channels=64))
    honest = sparse.pack

    def broken(tensor: onnx.TensorProto) -> onnx.SparseTensorProto:
        made = honest(tensor)
        values = numpy_helper.to_array(made.values).copy()
        values[:2] = values[1::-1]
        made.values.CopyFrom(numpy_helper.from_array(values, made.values.name))
        return made

    onnx_sparse_initializer.decode(onnx_sparse_initializer.encode(network, plan(network)), network)
    monkeypatch.setattr(sparse, "pack", broken)
    with pytest.raises(ExportError, match=r"conv1\.weight: what was stored differs"):
        onnx_sparse_initializer.decode(onnx_sparse_initializer.encode(network, plan(network)), network)
