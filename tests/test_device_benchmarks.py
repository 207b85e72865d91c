"""benchmarks/emulated.py and xnnpack.py: their rows, this machine in the emulator's place, and what they say where something is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
import pytest
from graphs import conv_net, graph, node, pruned
from runners import RUNTIME, runner

import ticketkit
from ticketkit.bench.devices import _runner
from ticketkit.errors import DataError, KernelError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import emulated
import models
import xnnpack


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is a small one."""
    onnx.save(conv_net(0.9, channels=64), tmp_path / "net-plain.onnx")
    ticketkit.export(tmp_path / "net-plain.onnx", tmp_path / "net.onnx")
    monkeypatch.setattr(models.Model, "file", lambda self, image, folder: tmp_path / "net.onnx")


@pytest.fixture
def emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An emulator that emulates nothing: it drops its own four words and runs the program."""
    fake = tmp_path / "bin" / "qemu-aarch64-static"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo fake 1; exit; }\nshift 4\n"$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=":")
    monkeypatch.setenv("QEMU_LD_PREFIX", str(fake.parent))
    monkeypatch.setattr(_runner, "onnxruntime", lambda abi, given, say: given)  # which would refuse the library of this machine
    return fake


def build(tmp_path: Path) -> Path:
    """The native programs and library in one folder."""
    folder = tmp_path / "build"
    folder.mkdir()
    for path in (runner("ticketkit-network"), runner("ticketkit-layers"), Path(ticketkit.get_library_path())):
        (folder / path.name).symlink_to(path)
    return folder


def emulate(tmp_path: Path, *words: str) -> tuple[int, list[dict[str, object]]]:
    if not RUNTIME:
        pytest.skip("this wheel of onnxruntime has no shared library to load")
    places = ["--build", str(build(tmp_path)), "--onnxruntime", str(RUNTIME[0]), "--results", str(tmp_path / "rows.jsonl")]
    code = emulated.main(["--model", "resnet18-uniform-90.00", "--image", "32", *places, *words])
    return code, [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def test_emulated_rows(tmp_path: Path, network: None, emulator: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = emulate(tmp_path, "--layers")
    assert code == 0 and all(row["ok"] for row in rows)
    assert [(row["layer"], row["engine"]) for row in rows] == [
        (None, "ticketkit"), ("stem", "dense"), ("conv1", "sparse"), ("conv1", "dense"), ("conv2", "sparse"), ("conv2", "dense"),
        ("down", "sparse"), ("down", "dense"), ("head", "dense"),
    ]  # fmt: skip
    whole = rows[0]
    assert (whole["layers"], whole["sparse_layers"], whole["image"], whole["emulator"]) == (5, 3, 32, "fake 1")
    assert whole["max_abs_diff"] < whole["tolerance"] < 1e-3 * whole["max_abs_output"] and whole["max_abs_diff_dense"] > 0  # type: ignore[operator]
    assert "8 of 8" in capsys.readouterr().out


def test_emulated_finds_wrong_outputs(tmp_path: Path, network: None, emulator: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The negative control: an emulator that changes a number of the sparse outputs once they are written."""
    swap = "import sys, numpy as np; p = sys.argv[1]; y = np.fromfile(p, '<f4'); y[3] += 0.01; y.tofile(p)"
    with emulator.open("a") as file:
        file.write(f"""for word; do y=$word/ticketkit.f32; [ -e "$y" ] && {sys.executable} -c "{swap}" "$y"; done; :\n""")
    code, rows = emulate(tmp_path)
    assert code == 1 and [row["ok"] for row in rows] == [False]
    assert "outputs: expected a difference within" in capsys.readouterr().err


def test_emulated_says_what_is_missing(tmp_path: Path, network: None, emulator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ["--build", str(tmp_path), "--onnxruntime", "x", "--results", str(tmp_path / "rows.jsonl"), "--image", "32"]
    with pytest.raises(DataError, match="cmake -S kernels --preset aarch64-linux-gnu"):
        emulated.main(places)
    emulator.write_text("#!/bin/sh\n[ $1 = --version ] && echo fake 1 && exit\necho '{\"event\": \"device\"}'\necho uncaught signal >&2\n")
    with pytest.raises(KernelError, match="cut off: uncaught signal"):
        emulate(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="qemu-user-static"):
        emulated.version()


def said(sparse: list[float], xnnpack: list[float], dense: list[float], name: str) -> list[dict[str, object]]:
    """Events of one layer, a run of each engine a round."""
    engines = {"sparse": sparse, "xnnpack-sparse": xnnpack, "xnnpack-dense": dense}
    layer = {"event": "layer", "layer": name, "shape": [1] * 10, "layouts": ["planes", "csr"], "weights": 10, "nnz": 2, "multiply_adds": 8}
    checked = [{"event": "checked", "layer": name, "engine": engine, "format": "csr", "ok": True} for engine in engines]
    rounds = [{"event": "round", "layer": name, "engine": engine, "ms": [ms]} for engine, times in engines.items() for ms in times]
    return [layer, *checked, *rounds]


def test_xnnpack_rows_add_up() -> None:
    events = said([1, 2, 4], [2, 6, 8], [10, 10, 10], "a") + said([3, 2, 4], [4, 6, 4], [20, 20, 20], "b")
    common = ("net", 32, "isa", "cpu", "1", 3, 0.1, "now")
    one, both = xnnpack.row(["a"], events, common), xnnpack.row(["a", "b"], events, common)
    assert (one.layer, one.layers, one.nnz, one.ms, one.xnnpack_sparse_ms) == ("a", 1, 2, 2, 6)
    assert (one.speedup_over_sparse, one.speedup_over_dense, one.format, one.layouts) == (2, 5, "csr", ["planes", "csr"])
    assert (both.layer, both.layers, both.nnz, both.multiply_adds, both.shape) == (None, 2, 4, 16, None)
    assert both.rounds_ms == [4, 4, 8] and both.xnnpack_sparse_rounds_ms == [6, 12, 12]
    assert both.speedup_over_sparse == 1.5, "the median of 6/4, 12/4 and 12/8"


def compare(tmp_path: Path, folder: Path) -> list[dict[str, object]]:
    words = ["--build", str(folder), "--results", str(tmp_path / "rows.jsonl"), "--rounds", "2", "--seconds", "0", "--image", "32"]
    xnnpack.main([*words, "--model", "resnet18-uniform-90.00"])
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def test_xnnpack_measures(tmp_path: Path, network: None) -> None:
    """Where the runner has XNNPACK, a row for all pointwise layers of stride 1 and one for each; none of either is said."""
    folder = build(tmp_path)
    try:
        compare(tmp_path, folder)
    except KernelError as error:
        assert "was built with sparse, dense" in str(error)
        return
    except DataError as error:
        assert "pointwise layers of stride 1" in str(error)  # the small network has one of stride 2 only
    else:
        pytest.fail("expected that a network without pointwise layers of stride 1 is refused")
    constants = {"stem.weight": pruned((64, 3, 1, 1), 0.0)}
    constants |= {f"{name}.weight": pruned((64, 64, 1, 1), 0.9, seed) for seed, name in enumerate("ab")}
    nodes = [node("Conv", "x stem.weight", "s"), node("Conv", "s a.weight", "a"), node("Relu", "a", "r"), node("Conv", "r b.weight", "y")]
    onnx.save(graph(nodes, {"x": [1, 3, 32, 32]}, ["y"], constants), tmp_path / "net-plain.onnx")
    ticketkit.export(tmp_path / "net-plain.onnx", tmp_path / "net.onnx")
    whole, *each = compare(tmp_path, folder)
    assert (whole["layer"], whole["layers"], [row["layers"] for row in each]) == (None, 2, [1, 1])
    assert whole["nnz"] == sum(row["nnz"] for row in each) and all(row["xnnpack_sparse_ms"] > 0 for row in each)  # type: ignore[misc, operator]
