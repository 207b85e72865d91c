"""The check of exports: wrong weights and wrong results are refused, and its tolerance is neither too wide nor too narrow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from graphs import Array, graph, node, pruned
from onnx import ModelProto, numpy_helper

from ticketkit import exporters, formats
from ticketkit.errors import ExportError
from ticketkit.exporters import _check, export
from ticketkit.lower import Fused, Layer, Network, lower, read
from ticketkit.lower.operators import Epilogue
from ticketkit.planner import plan

torch.set_num_threads(1)


def without_a_weight(parts: dict[str, Array]) -> None:
    parts["values"][np.flatnonzero(parts["values"])[0]] = 0


def with_two_weights_swapped(parts: dict[str, Array]) -> None:
    at = np.flatnonzero(parts["values"])[:2]
    parts["values"][at] = parts["values"][at[::-1]]


def with_a_last_bit_off(parts: dict[str, Array]) -> None:
    parts["values"][0] = np.nextafter(parts["values"][0], np.float32(9))


@pytest.mark.parametrize("target", ["onnx", "csr", "bsr"])
@pytest.mark.parametrize("damage", [without_a_weight, with_two_weights_swapped, with_a_last_bit_off], ids=lambda f: f.__name__)
def test_wrong_weights_are_refused_and_the_old_file_stays(
    target: str, damage: Callable[[dict[str, Array]], None], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packer = formats.get("gaps" if target == "onnx" else target)
    honest = packer.pack

    def broken(weight: Array) -> dict[str, Array]:
        parts = honest(weight)
        damage(parts)
        return parts

    (tmp_path / "net").write_bytes(b"old")
    monkeypatch.setattr(packer, "pack", broken)
    with pytest.raises(ExportError, match="what was stored differs from the network"):
        export(source, tmp_path / "net", format=target)
    assert (tmp_path / "net").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    export(source, tmp_path / "net", format=target)
    assert (tmp_path / "net").read_bytes() != b"old"


@pytest.mark.parametrize("wrong", [Epilogue("", "Relu"), Epilogue("down.bn"), Epilogue("down.bn", "Clip", (0.0, 1.0))], ids=str)
def test_a_wrong_result_is_refused(wrong: Epilogue, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual, the activation or its bound is lost from the fused node: right weights, wrong outputs."""
    honest = Network.fuse

    def broken(network: Network, chosen: Iterable[Layer]) -> list[Fused]:
        return [dataclasses.replace(f, epilogue=wrong) if f.epilogue.residual else f for f in honest(network, chosen)]

    fused = lower(read(source))
    residual = next(f.epilogue.residual for f in fused.fuse(fused.layers) if f.epilogue.residual)
    wrong = dataclasses.replace(wrong, residual=residual if wrong.residual else "")
    monkeypatch.setattr(Network, "fuse", broken)
    with pytest.raises(ExportError, match=r"differs from the original by .* rounding permits"):
        export(source, tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["bias", "relu", "residual", "stride"])
def test_the_tolerance_notices(change: str, source: Path) -> None:
    """Negative controls of the check itself, on the graph: a bias entry, an activation, a residual, a stride."""
    original = read(source)
    network = lower(original)
    wrong = ModelProto()
    wrong.CopyFrom(network.model)
    nodes = {n.op_type: n for n in wrong.graph.node}
    if change == "bias":
        name = next(n.input[2] for n in wrong.graph.node if n.name == "conv1")
        tensor = next(t for t in wrong.graph.initializer if t.name == name)
        bias = numpy_helper.to_array(tensor).copy()
        bias[np.argmax(bias)] *= 1.01
        tensor.CopyFrom(numpy_helper.from_array(bias, name))
    elif change == "relu":
        nodes["Relu"].op_type = "Identity"
    elif change == "residual":
        nodes["Add"].op_type = "Sub"
    else:
        conv2 = next(n for n in wrong.graph.node if n.name == "conv2")
        next(a for a in conv2.attribute if a.name == "pads").ints[:] = [2, 2, 0, 0]
    assert _check.compare(original, network.model, network)
    with pytest.raises(ExportError, match="differs from the original"):
        _check.compare(original, wrong, network)


def test_the_tolerance_is_near_the_truth(source: Path) -> None:
    """It bounds what float32 really loses against float64, and by less than a factor of ten thousand."""
    network = lower(read(source))
    feeds = _check.random_inputs(network)
    expected = _check._run(network.model, feeds, "it")
    tolerance = _check.derive_tolerance(network, feeds, expected)["y"]
    module = torch.nn.functional
    w = {layer.name: (torch.tensor(layer.weight).double(), torch.tensor(layer.bias).double()) for layer in network.layers}
    x = torch.from_numpy(feeds["x"]).double()
    stem = module.conv2d(x, *w["stem"], padding=1).relu()
    inner = module.conv2d(stem, *w["conv1"], padding=1).relu()
    total = (module.conv2d(inner, *w["conv2"], padding=1, stride=2) + module.conv2d(stem, *w["down"], stride=2)).relu()
    exact = module.linear(total.mean((2, 3)), *w["head"]).numpy()
    error = float(np.abs(exact - expected["y"]).max())
    assert 0 < error <= tolerance < 10_000 * error


def test_each_output_has_its_own_tolerance(source: Path) -> None:
    """A large output beside it hides no error of a small one."""
    original = read(source)
    scales = {"large.scale": np.float32(1e4), "small.scale": np.float32(1e-4)}
    original.graph.node.extend(node("Mul", f"y {name}.scale", name) for name in ("large", "small"))
    original.graph.initializer.extend(numpy_helper.from_array(np.array(value), name) for name, value in scales.items())
    original.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 10]) for name in ("large", "small"))
    wrong = ModelProto()
    wrong.CopyFrom(original)
    wrong.graph.initializer[-1].CopyFrom(numpy_helper.from_array(np.array(np.float32(1.01e-4)), "small.scale"))
    network = lower(original)
    assert _check.compare(original, network.model, network)
    with pytest.raises(ExportError, match="output 'small'"):
        _check.compare(original, wrong, network)


def test_a_wrong_bias_is_refused(source: Path) -> None:
    network = lower(read(source))
    target = exporters.get("onnx")
    chosen = plan(network)
    data = target.encode(network, chosen)
    assert target.decode(data, network)
    layer = next(layer for layer in network.layers if layer.name == chosen.sparse[0].name)
    wrong = dataclasses.replace(layer, bias=np.nextafter(layer.bias, np.float32(9)))
    other = dataclasses.replace(network, layers=tuple(wrong if each is layer else each for each in network.layers))
    with pytest.raises(ExportError, match=rf"{layer.name}\.bias: what was stored differs"):
        target.decode(data, other)


def test_an_original_that_overflows_cannot_be_checked(tmp_path: Path) -> None:
    model = graph([node("Exp", "x", "e"), node("Exp", "e", "f"), node("Conv", "f c.weight", "y")], {"x": ["N", 64, 32, 32]}, ["y"],
                  {"c.weight": pruned((64, 64, 1, 1), 0.9)})  # fmt: skip
    with pytest.raises(ExportError, match="NaN or infinite on random input"):
        export(model, tmp_path / "a.onnx")
    export(model, tmp_path / "a.onnx", check=False)
