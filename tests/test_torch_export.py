"""Programs of torch.export: the network's own tensors, any batch, right where torch runs them, and clear errors where damaged."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import Array, conv_net, graph, node, normal, pruned, run
from onnx import ModelProto, numpy_helper

torch = pytest.importorskip("torch")
import torchvision  # noqa: E402

from ticketkit import exporters, models  # noqa: E402
from ticketkit.capture import capture  # noqa: E402
from ticketkit.errors import ExportError, FormatError, ModelError  # noqa: E402
from ticketkit.exporters import _torch, export  # noqa: E402
from ticketkit.exporters import torch as target  # noqa: E402
from ticketkit.formats import gaps  # noqa: E402
from ticketkit.lower import lower, operators, read  # noqa: E402
from ticketkit.planner import plan  # noqa: E402
from ticketkit.runtime import native  # noqa: E402
from ticketkit.runtime.torch_graph import rebuild  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def program(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    report = export(source, path, format="torch")
    assert [c.engine for c in report.comparisons] == ["onnxruntime", "torch"]
    assert "layers run sparse" in str(report)
    return path


def test_it_runs_any_batch_and_compiles(program: Path, source: Path) -> None:
    network = torch.export.load(program).module()
    compiled = torch.compile(network, backend="aot_eager", dynamic=True)
    for batch in (1, 2, 7):
        x = normal(batch, 3, 32, 32, seed=batch)
        expected = run(onnx.load(source), {"x": x})[0]
        with torch.inference_mode():
            for run_it in (network, compiled):
                np.testing.assert_allclose(run_it(torch.from_numpy(x))[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_state_dict_holds_sparse_and_dense_weights_by_name(program: Path, source: Path) -> None:
    state = torch.export.load(program).state_dict
    layers = {layer.name: layer for layer in lower(read(source)).layers}
    for name in ("conv1", "conv2", "down"):
        parts = {part: state[f"{name}.{part}"].numpy() for part in ("values", "gaps")}
        np.testing.assert_array_equal(gaps.unpack(parts, layers[name].weight.shape), layers[name].weight)
        np.testing.assert_array_equal(state[f"{name}.bias"].numpy(), layers[name].bias)
    for name in ("stem", "head"):
        np.testing.assert_array_equal(state[f"{name}.weight"].numpy(), layers[name].weight)


def test_it_is_small_and_says_nothing_of_this_machine(program: Path, source: Path) -> None:
    nnz = sum(layer.nnz for layer in lower(read(source)).layers)
    assert program.stat().st_size < 8 * nnz + 150_000, "weights, the graph in JSON, and no example inputs"
    with zipfile.ZipFile(program) as archive:
        everything = b"".join(archive.read(name) for name in archive.namelist())
    for trace in (b"site-packages", b"/tmp/", str(Path(__file__).parent).encode(), b"torch_graph.py"):
        assert trace not in everything


def rewritten(program: Path, change: Any) -> bytes:
    """The file with one of its tensors changed in place."""
    loaded, _ = target.load(program.read_bytes())
    extra = {target.HEADER: ""}
    torch.export.load(program, extra_files=extra)
    change(loaded.state_dict)
    file = io.BytesIO()
    torch.export.save(loaded, file, extra_files=extra)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [("conv1.values", 3, r"conv1\.weight: what was stored differs"), ("conv1.bias", 0, r"conv1\.bias: what was"),
     ("stem.weight", (0, 0, 0, 0), r"stem\.weight: what was"), ("head.bias", 1, r"head\.bias: what was")],
)  # fmt: skip
def test_other_weights_are_noticed_to_the_last_bit(name: str, at: Any, message: str, program: Path, source: Path) -> None:
    network = lower(read(source))

    def change(state: dict[str, Any]) -> None:
        state[name][at] = torch.nextafter(state[name][at], torch.tensor(9.0))

    assert target.decode(rewritten(program, lambda state: None), network)
    with pytest.raises(ExportError, match=message):
        target.decode(rewritten(program, change), network)


def test_a_wrong_program_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the comparison: right weights, a wrong stride of the rebuilt graph."""
    honest = target._step

    def wrong(sparse: operators.Sparse) -> Any:
        pads = [p + d for p, d in zip(sparse.window["pads"], (1, 0, -1, 0), strict=True)] if sparse.window["pads"][0] else [0] * 4
        return honest(operators.Sparse(**{**vars(sparse), "window": {**sparse.window, "pads": pads}}))

    monkeypatch.setattr(target, "_step", wrong)
    with pytest.raises(ExportError, match=r"differs from the original by .* in torch"):
        export(source, tmp_path / "net.pt2", format="torch")
    assert not list(tmp_path.iterdir())


def test_damaged_files(program: Path, source: Path) -> None:
    data, network = program.read_bytes(), lower(read(source))
    for damaged in (data[: len(data) // 2], b"", b"text", data[:-30]):
        with pytest.raises(FormatError, match=r"not a whole program of torch\.export") as caught:
            target.decode(damaged, network)
        assert "\n" not in str(caught.value)
    later = io.BytesIO()
    torch.export.save(target.load(data)[0], later, extra_files={target.HEADER: '{"format": 2}'})
    with pytest.raises(FormatError, match="expected torch file format 1, got 2"):
        target.load(later.getvalue())


def test_a_library_that_is_missing_is_not_needed_to_export(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKETKIT_LIBRARY", str(tmp_path / "none.so"))
    assert [c.engine for c in export(source, tmp_path / "a.pt2", format="torch").comparisons] == ["onnxruntime"]


def test_torch_that_is_missing_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"--format torch needs torch; pip install 'ticketkit\[find\]'"):
        export(source, tmp_path / "a.pt2", format="torch")


# Networks -----------------------------------------------------------------------------------------------------------------------


def exported(model: ModelProto, feeds: dict[str, Array]) -> tuple[list[Array], list[Array], dict[str, Any]]:
    """Outputs of the original in onnxruntime and of its .pt2 program, and the tensors of that; every layer with zeros runs sparse."""
    network = lower(read(model.SerializeToString()))
    keep = {layer.name: operators.Execution() for layer in network.layers if layer.sparsity > 0.3 and not layer.obstacle}
    data = target.encode(network, plan(network, keep=keep))
    target.decode(data, network)
    got = target.runners(data, network)["torch"](feeds)
    return run(model, feeds), [got[info.name] for info in model.graph.output], target.load(data)[0].state_dict


def test_depthwise_clip_linear_and_two_outputs() -> None:
    w = {"dw.weight": pruned((16, 1, 3, 3), 0.5), "pw.weight": pruned((24, 16, 1, 1), 0.8), "fc.weight": pruned((24, 20), 0.8),
         "low": np.float32(0), "high": np.float32(6)}  # fmt: skip
    nodes = [
        node("Conv", "x dw.weight", "a", group=16, pads=[1] * 4, strides=[2, 2]), node("Clip", "a low high", "b"),
        node("Conv", "b pw.weight", "c"), node("Relu", "c", "d"), node("GlobalAveragePool", "d", "e"), node("Flatten", "e", "f"),
        node("MatMul", "f fc.weight", "y"),
    ]  # fmt: skip
    model = graph(nodes, {"x": ["N", 16, 9, 11]}, ["y", "d"], w)
    for batch in (1, 4):
        expected, got, state = exported(model, {"x": normal(batch, 16, 9, 11)})
        for a, b in zip(expected, got, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
    assert {"dw.values", "pw.values", "fc.values"} <= state.keys()


def test_activations_that_are_no_bounds_are_torchs_own() -> None:
    w = {f"{name}.weight": pruned((8, 8, 3, 3), 0.7, seed=i) for i, name in enumerate("abc")} | {"fc.weight": pruned((8, 20), 0.7)}
    nodes = [
        node("Conv", "x a.weight", "a"), node("LeakyRelu", "a", "b", alpha=0.3), node("Conv", "b b.weight", "c", pads=[1] * 4),
        node("Add", "b c", "d"), node("HardSwish", "d", "e"), node("Conv", "e c.weight", "f"), node("Sigmoid", "f", "g"),
        node("Mul", "f g", "h"), node("GlobalAveragePool", "h", "i"), node("Flatten", "i", "j"), node("MatMul", "j fc.weight", "k"),
        node("Sigmoid", "k", "l"), node("Mul", "l k", "y"),
    ]  # fmt: skip
    model = graph(nodes, {"x": ["N", 8, 9, 9]}, ["y"], w)
    fused = lower(read(model.SerializeToString())).fuse(lower(read(model.SerializeToString())).layers)
    assert [each.epilogue.suffix for each in fused] == ["LeakyRelu", "AddHardSwish", "Silu", "Silu"]
    (expected,), (got,), _ = exported(model, {"x": normal(2, 8, 9, 9)})
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_free_image_sides_and_several_inputs() -> None:
    nodes = [node("Conv", "x c.weight", "a", pads=[1] * 4), node("Add", "a z", "y")]
    model = graph(nodes, {"x": ["N", 8, "H", "W"], "z": ["N", 8, "H", "W"]}, ["y"], {"c.weight": pruned((8, 8, 3, 3), 0.8)})
    for size in ((1, 8, 12, 10), (3, 8, 30, 17)):
        (expected,), (got,), _ = exported(model, {"x": normal(*size), "z": normal(*size, seed=1)})
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_shapes_computed_at_run_time() -> None:
    """What flatten becomes in older exporters: Shape, Gather, Concat, Reshape."""
    w = {"c.weight": pruned((8, 8, 3, 3), 0.8), "zero": np.array(0), "axis": np.array([0]), "rest": np.array([-1])}
    nodes = [
        node("Conv", "x c.weight", "a"), node("Shape", "a", "s"), node("Gather", "s zero", "n"), node("Unsqueeze", "n axis", "u"),
        node("Concat", "u rest", "t", axis=0), node("Reshape", "a t", "y"),
    ]  # fmt: skip
    model = graph(nodes, {"x": ["N", 8, 6, 6]}, ["y"], {k: np.asarray(v) for k, v in w.items()})
    for batch in (1, 5):
        (expected,), (got,), _ = exported(model, {"x": normal(batch, 8, 6, 6)})
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_names_that_attributes_cannot_have() -> None:
    names = ["forward", "a", "a.b", "a.b.c", "onnx::Conv_1", "1.2", "x y", "", ".", "weights..z"]
    model = graph([node("Identity", "x", "y")], {"x": ["N", 2]}, ["y"], {})
    del model.graph.node[:]
    previous = "x"
    for i, name in enumerate(name for name in names if name):
        model.graph.initializer.append(numpy_helper.from_array(np.full(2, i, np.float32), name))
        model.graph.node.append(onnx.helper.make_node("Add", [previous, name], [f"t{i}"]))
        previous = f"t{i}"
    model.graph.node.append(node("Identity", previous, "y"))
    program = rebuild(model)
    module, places = _torch.as_module(program)
    assert places.keys() == program.constants.keys() == set(names) - {""} and len(set(places.values())) == len(places)
    assert {name: places[name] for name in ("a.b", "onnx::Conv_1")} == {"a.b": "a_.b", "onnx::Conv_1": "onnx__Conv_1"}
    for name, place in places.items():
        np.testing.assert_array_equal(module.state_dict()[place].numpy(), program.constants[name])
    np.testing.assert_array_equal(module(torch.zeros(1, 2))[0].numpy(), np.full((1, 2), sum(range(len(names) - 1)), np.float32))


def test_a_pruned_resnet18(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torchvision.models.resnet18(weights=None).eval()
    with torch.no_grad():
        for name in models.prunable("resnet18", module):
            module.get_parameter(name)[torch.rand_like(module.get_parameter(name)) < 0.9] = 0
    report = export(capture(module, (3, 64, 64)), tmp_path / "net.pt2", format="torch", check=False)
    assert len(report.plan.sparse) == 19 and report.bytes * 3 < report.dense_bytes
    x = normal(3, 3, 64, 64)
    with torch.inference_mode():
        got = torch.export.load(tmp_path / "net.pt2").module()(torch.from_numpy(x))[0]
        torch.testing.assert_close(got, module(torch.from_numpy(x)), rtol=1e-3, atol=1e-4)


def test_what_torch_cannot_hold_is_named(tmp_path: Path) -> None:
    w = pruned((64, 64, 3, 3), 0.95)
    odd = graph([node("Conv", "x w", "a", pads=[1] * 4), node("Selu", "a", "y")], {"x": ["N", 64, 32, 32]}, ["y"], {"w": w})
    with pytest.raises(ModelError, match=r"cannot rebuild node .* \(ai\.onnx\.Selu"):
        export(odd, tmp_path / "a.pt2", format="torch")
    with pytest.raises(ExportError, match="no layer would run faster sparse"):
        export(conv_net(0.3), tmp_path / "a.pt2", format="torch")
    assert not list(tmp_path.iterdir()) and "torch" in exporters.names() and native.isas()
