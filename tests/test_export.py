"""Exports: right in every runtime, exactly zero where pruned, small, and clear about whatever goes wrong. test_export_check: the check."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
from graphs import Array, conv_net, graph, node, normal, optimized, pruned, run, weights
from onnx import ModelProto
from safetensors.numpy import save as to_safetensors
from targets import TARGETS
from torch import nn

from ticketkit import exporters, models
from ticketkit.capture import capture
from ticketkit.errors import ExportError, FormatError, ModelError, TicketError, TicketkitError
from ticketkit.exporters import export
from ticketkit.inputs import IMAGE_KEY
from ticketkit.lower import lower, operators, read
from ticketkit.lower.operators import Execution
from ticketkit.planner import plan
from ticketkit.ticket import Ticket

torch.set_num_threads(1)


def prune(module: nn.Module, names: list[str], sparsity: float) -> dict[str, Array]:
    """Random masks on these parameters; returns the masks."""
    state, rng, masks = module.state_dict(), np.random.default_rng(0), {}
    for name in names:
        masks[name] = rng.random(tuple(state[name].shape)) >= sparsity
        state[name].mul_(torch.from_numpy(masks[name]))
    return masks


@pytest.fixture(scope="session")
def resnet18() -> ModelProto:
    """torchvision's, random weights and BatchNorm statistics, random masks at 90 % of the prunable weights, 64 x 64 images."""
    torch.manual_seed(0)
    module = torchvision.models.resnet18(weights=None)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    prune(module, models.prunable("resnet18", module), 0.9)
    return capture(module, (3, 64, 64))


def stored(path: Path, source: Path | ModelProto, target: str = "onnx") -> dict[str, Array]:
    """Layer name -> dense weight of an exported file."""
    model = source if isinstance(source, ModelProto) else read(source)
    back = read(exporters.get(target).decode(path.read_bytes(), lower(model)).SerializeToString())
    return {layer.name: layer.weight for layer in lower(back).layers}


# Every target ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_holds_the_network_and_its_zeros(target: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / f"net{exporters.get(target).SUFFIX}"
    report = export(source, path, format=target)
    assert report.bytes == path.stat().st_size and report.format == target
    assert report.comparisons and all(c.difference <= c.tolerance < 1e-2 for c in report.comparisons)
    pruned_weights, back = weights(onnx.load(source)), stored(path, source, target)
    assert back.keys() == {"stem", "conv1", "conv2", "down", "head"}
    for name, weight in back.items():
        np.testing.assert_array_equal(weight == 0, pruned_weights[f"{name}.weight"] == 0)
    assert json.loads(json.dumps(report.to_dict()))["bytes"] == report.bytes
    assert report.inputs == {"x": ("N", 3, 32, 32)} and ("x [N, 3, 32, 32]" in str(report)) == target.startswith(("onnx", "torch"))
    assert "max |difference|" in str(report) and f"{report.bytes:,}" in str(report)
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file may stay"


@pytest.mark.parametrize("target", TARGETS)
def test_exports_are_reproducible(target: str, source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(source, tmp_path / name, format=target, check=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_resnet18_is_small_and_right_everywhere(resnet18: ModelProto, tmp_path: Path) -> None:
    onnx.save(resnet18, tmp_path / "dense.onnx")
    report = export(tmp_path / "dense.onnx", tmp_path / "sparse.onnx")
    assert report.plan.prunable_sparsity == pytest.approx(0.9, abs=0.001)
    assert len(report.plan.sparse) == 19
    assert report.bytes * 3 <= (tmp_path / "dense.onnx").stat().st_size
    assert [c.engine for c in report.comparisons] == ["onnxruntime", "ticketkit"]
    data, x = (tmp_path / "sparse.onnx").read_bytes(), normal(3, 3, 64, 64)
    expected = run(resnet18, {"input": x})[0]
    for library in (False, True):
        got = run(data, {"input": x}, library)[0]
        np.testing.assert_allclose(got, expected, atol=report.comparisons[0].tolerance)
        np.testing.assert_array_equal(got.argmax(1), expected.argmax(1))


def test_stock_onnxruntime_is_left_with_plain_convolutions(resnet18: ModelProto, tmp_path: Path) -> None:
    export(resnet18, tmp_path / "sparse.onnx", check=False)
    kinds = [n.op_type for n in optimized((tmp_path / "sparse.onnx").read_bytes(), tmp_path).graph.node]
    assert kinds.count("Conv") == 20
    assert not {"ScatterElements", "CumSum", "Cast", "Reshape", "SparseConv"} & set(kinds) - {"Reshape"}


def test_fused_operators_cover_the_residual_blocks(resnet18: ModelProto, tmp_path: Path) -> None:
    export(resnet18, tmp_path / "sparse.onnx", check=False)
    kinds = [n.op_type.removeprefix("SparseConv") for n in operators.nodes(read(tmp_path / "sparse.onnx"))]
    assert sorted(kinds) == sorted(["Relu"] * 8 + ["AddRelu"] * 8 + [""] * 3)
    rest = {n.op_type for n in read(tmp_path / "sparse.onnx").graph.node if not n.domain}
    assert "Add" not in rest


# Sources --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of two rounds, as `find` leaves it, without the training."""
    path, model = tmp_path_factory.mktemp("run"), "resnet20"
    torch.manual_seed(0)
    module = models.build(model, 10, 32)
    rule = {"mean": [0.5] * 3, "std": [0.25] * 3, "classes": [f"kind {i}" for i in range(10)]}
    (path / "run.json").write_text(json.dumps({"model": model, "num_classes": 10, "input_shape": [3, 32, 32], "threads": 1, **rule}))
    for k, sparsity in enumerate((0.0, 0.95)):
        masks, home = prune(module, models.prunable(model, module), sparsity), path / f"round_{k:02d}"
        home.mkdir()
        ticket = Ticket(masks, models.arrays(module), {"model": model, "head": ["linear"]})
        ticket.save(home / "ticket.safetensors")
        (home / "weights.safetensors").write_bytes(to_safetensors(ticket.merge()))
    row = {"metric_name": "accuracy", "metric": 0.5, "sparsity": 0.0, "sparsity_model": 0.0, "kept": 0, "seconds": 1.0}
    (path / "rounds.jsonl").write_text("".join(json.dumps({"round": k, **row}) + "\n" for k in range(2)))
    return path


def test_a_run_directory_exports_its_last_round(run_dir: Path, tmp_path: Path) -> None:
    report = export(run_dir, tmp_path / "run.onnx")
    assert report.plan.prunable_sparsity == pytest.approx(0.95, abs=0.01)
    kept = {entry.key: entry.value for entry in read(tmp_path / "run.onnx").metadata_props}
    assert json.loads(kept[IMAGE_KEY])["classes"][3] == "kind 3"
    masks = Ticket.load(run_dir / "round_01" / "ticket.safetensors").masks
    for name, weight in stored(tmp_path / "run.onnx", tmp_path / "run.onnx").items():
        if f"{name}.weight" in masks:
            assert not weight[~masks[f"{name}.weight"]].any()
    with pytest.raises(ExportError, match="no layer would run faster sparse"):
        export(run_dir, tmp_path / "dense.onnx", round=0)
    with pytest.raises(TicketError, match="7"):
        export(run_dir, tmp_path / "none.onnx", round=7)


def test_a_ticket_exports_its_masked_weights(run_dir: Path, tmp_path: Path) -> None:
    file = run_dir / "round_01" / "ticket.safetensors"
    report = export(file, tmp_path / "t.onnx", input_shape=(3, 32, 32))
    assert report.plan.prunable_sparsity == pytest.approx(0.95, abs=0.01)
    with pytest.raises(TicketError, match="input shape"):
        export(file, tmp_path / "u.onnx")
    bare = Ticket(Ticket.load(file).masks, {}, {"model": "resnet20"})
    bare.save(tmp_path / "bare.safetensors")
    with pytest.raises(TicketError, match="no weights"):
        export(tmp_path / "bare.safetensors", tmp_path / "u.onnx", input_shape=(3, 32, 32))


@pytest.mark.parametrize("shape", [(3, -1, 16), (16,), (3, 0, 16), (1, 1, 3, 16, 16), (3, 16.0, 16)], ids=str)
def test_an_impossible_input_shape_is_one_clear_line(shape: Sequence[int], run_dir: Path, tmp_path: Path) -> None:
    for place in (run_dir, run_dir / "round_01" / "ticket.safetensors"):
        with pytest.raises(ModelError, match="input shape: expected 3 or 4 positive whole numbers"):
            export(place, tmp_path / "a.onnx", input_shape=shape)


def test_an_exported_file_is_a_source_too(source: Path, tmp_path: Path) -> None:
    """Sparse to dense and back: the weights come out bit for bit."""
    export(source, tmp_path / "sparse.onnx")
    export(tmp_path / "sparse.onnx", tmp_path / "dense.onnx", format="onnx-dense")
    export(tmp_path / "dense.onnx", tmp_path / "again.onnx")
    first, second = (stored(tmp_path / f"{name}.onnx", tmp_path / "dense.onnx") for name in ("sparse", "again"))
    for name, weight in first.items():
        np.testing.assert_array_equal(weight, second[name])


def test_sources_in_memory(tmp_path: Path) -> None:
    model = conv_net(0.9, channels=64)
    export(model, tmp_path / "a.onnx", check=False)
    export(model.SerializeToString(), tmp_path / "b.onnx", check=False)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_fixed_batch(tmp_path: Path) -> None:
    report = export(conv_net(0.9, channels=64, batch=4), tmp_path / "a.onnx")
    assert report.plan.inputs == {"x": (4, 3, 32, 32)}


def test_a_library_that_is_missing_is_not_needed_to_export(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKETKIT_LIBRARY", str(tmp_path / "none.so"))
    assert [c.engine for c in export(source, tmp_path / "a.onnx").comparisons] == ["onnxruntime"]


# What goes wrong ----------------------------------------------------------------------------------------------------------------


def test_no_sparse_layer_comes_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the sparsest is 30% zero.*onnx-dense"):
        export(conv_net(0.3), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("where", "message"),
    [("", "is a folder"), ("none/a.onnx", "does not exist"), ("file/a.onnx", "does not exist"), ("/proc/a.onnx", "cannot write|read-only")],
)
def test_impossible_places(where: str, message: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError, match=message):
        export(source, tmp_path / where)


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    onnx.save(conv_net(0.9), tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="overwrite the source"):
        export(tmp_path / "a.onnx", tmp_path / "a.onnx")


def test_unknown_words(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"unknown export format 'tflite'.*onnx-dense"):
        export(source, tmp_path / "a", format="tflite")
    with pytest.raises(ExportError, match="no run directory"):
        export(source, tmp_path / "a", round=1)
    with pytest.raises(ModelError, match=r"without run\.json"):
        export(tmp_path, tmp_path / "a")
    with pytest.raises(ModelError, match="no such file"):
        export(tmp_path / "none.onnx", tmp_path / "a")


def test_a_plan_that_asks_for_the_impossible(tmp_path: Path) -> None:
    network = lower(graph([node("Conv", "x w", "y", group=2)], {"x": [1, 8, 9, 9]}, ["y"], {"w": pruned((8, 4, 3, 3), 0.5)}))
    with pytest.raises(ExportError, match="grouped convolution"):
        exporters.get("onnx").encode(network, plan(network, keep={network.layers[0].name: Execution()}))


def test_flipped_bits_of_an_exported_file(source: Path, tmp_path: Path) -> None:
    """In a weight they are always noticed; anywhere else reading either refuses or gives a model, and never anything worse."""
    export(source, tmp_path / "a.onnx", check=False)
    data = (tmp_path / "a.onnx").read_bytes()
    rng = np.random.default_rng(0)
    for tensor in onnx.load_from_string(data).graph.initializer:
        at = data.index(tensor.raw_data) + int(rng.integers(len(tensor.raw_data)))
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(FormatError):
            read(bytes(flipped))
    for at in rng.integers(0, len(data), 200):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        try:
            read(bytes(flipped))
        except TicketkitError as error:
            assert "\n" not in str(error)
    with pytest.raises(FormatError, match=r"sha256 differs|not a whole|expected"):
        read(data[: len(data) // 2])
