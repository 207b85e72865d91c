"""`bench --device … --layers`: rows, partial rows, and answers that are not believed."""

import dataclasses
import json
import os
from importlib import import_module
from pathlib import Path

import onnx
import pytest
from boards import Board
from graphs import conv_net, graph, node

from ticketkit.bench import bundle, timing
from ticketkit.bench import device as on
from ticketkit.bench.devices import _layers, _run, _runner, qemu
from ticketkit.errors import DeviceError, ModelError, TicketkitError
from ticketkit.runtime import native

PROTOCOL = timing.Protocol(rounds=2, seconds=0, warmup=0, timeout=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    onnx.save(conv_net(0.9, channels=64, batch=1), path)
    return path


@pytest.fixture
def board(tmp_path, monkeypatch, model):
    made = Board(tmp_path, monkeypatch)
    made.runners(model)
    monkeypatch.setenv("FAKE_LAYERS", json.dumps(bundle.write(model, tmp_path / "names.bundle")))
    monkeypatch.setattr(_layers, "SLACK", 0.0)
    return made


def measure(model, name="ssh:board", cpus=None, **settings):
    return _layers.measure(_run.Target(name, cpus), model, protocol=PROTOCOL, **settings)


def test_rows_of_layers(board, model):
    report = measure(model, names=["sparse", "dense", "xnnpack-dense"])
    assert len(report.rows) == 3 * 5 and not report.failures and not report.stopped
    row = next(row for row in report.rows if row.engine == "sparse")
    assert (row.n, row.p50_ms, row.rounds_p50_ms, row.baseline, row.speedup) == (2, 1.25, [1.0, 1.5], "xnnpack-dense", pytest.approx(2.6))
    assert (row.gflops, row.isa, row.format) == (pytest.approx(2 * 2088 / 1.25 / 1e6), "neon", "csr")
    assert json.loads(row.to_json())["device"]["kind"] == "ssh"
    assert "--engines\nsparse,dense,xnnpack-dense\n" in "\n".join(board.calls())
    assert board.left() == []


def test_layers_below_a_tick_of_the_clock(board, model, capsys):
    board.do("coarse")
    report = measure(model, cpus="0")
    assert {(row.p50_ms, row.gflops, row.speedup) for row in report.rows} == {(0, None, None)}
    on.bench(on.Target("ssh:board"), model, protocol=PROTOCOL, layers=True)
    assert "all sparse layers" not in capsys.readouterr().out


def test_one_processor_is_used_and_named(board, model):
    two = sorted(os.sched_getaffinity(0))[:2]
    report = measure(model, cpus=",".join(map(str, two)))
    assert {tuple(row.device["cpus"]) for row in report.rows} == {(two[-1],)}
    assert f"--cpu\n{two[-1]}\n" in "\n".join(board.calls())
    assert f"pinned to cpu {two[-1]}" in report.notes


def test_a_killed_run_keeps_its_layers(board, model, capsys, tmp_path):
    board.do("killed")
    with pytest.raises(TicketkitError, match=r"cut off: signal 9.*the rows are of the layers before that"):
        on.bench(on.Target("adb"), model, protocol=PROTOCOL, layers=True, json_to=str(tmp_path / "rows.jsonl"))
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3
    assert "broken off: not all layers" in capsys.readouterr().out
    assert board.left() == []


def test_sums_are_of_engines_that_have_all_sparse_layers(board, model, capsys):
    """The faster dense engine lacks a layer: it has no sum, and the ratio is against the other."""
    report = measure(model)
    rows = [row for row in report.rows if (row.engine, row.layer) != ("xnnpack-dense", "conv1")]
    print_table(dataclasses.replace(report, rows=rows))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("all sparse layers")]
    assert line.split()[3:] == ["6.25", "21.2", "-", "3.40"]


def test_names_of_layers_are_text_and_no_more(board, model, capsys):
    report = measure(model)
    print_table(dataclasses.replace(report, rows=[dataclasses.replace(row, layer="[/x]\x1b[2J", format="[/y]") for row in report.rows]))
    printed = capsys.readouterr().out
    assert "[/x]?[2J" in printed and "[/y]" in printed and "\x1b[2J" not in printed


def print_table(report):
    on.table.publish(lambda: on._layers_table(report), [], None, {})


def test_a_wrong_layer_has_no_speed(board, model):
    board.do("wrong")
    report = measure(model, "local")
    assert [row.engine for row in report.rows].count("sparse") == 4
    (failure,) = report.failures.values()
    assert "in sparse: expected the result in double precision within 1e-05, got a difference of 0.5" in failure


@pytest.mark.parametrize(
    ("event", "why"),
    [
        ('{"event": "layer", "layer": "stranger", "op": "gemm"}', "whose shape is nothing"),
        ('{"event": "round", "layer": "LAYER", "engine": "sparse", "round": 0, "ms": [1]}', "before the layer itself"),
        ('{"event": "checked", "engine": "gpu", "max_abs_diff": 0, "max_abs_output": 1, "ok": true}', "engine 'gpu'; expected"),
    ],
)
def test_layers_that_were_not_asked_for(event, why, board, model):
    board.do(event)
    report = measure(model)
    assert why in report.stopped and len(report.rows) == 3


def test_what_cannot_be_asked_for(board, model, tmp_path):
    with pytest.raises(DeviceError, match="--engine: expected sparse, dense, xnnpack-dense, xnnpack-sparse with --layers, got 'ticketkit'"):
        measure(model, names=["ticketkit"])
    with pytest.raises(DeviceError, match="--instructions: expected --device qemu, local is no emulator"):
        on.bench(on.Target("local"), model, instructions=True)
    with pytest.raises(DeviceError, match="--layers: expected one thread and one sample, got 2 and 1"):
        on.bench(on.Target("local"), model, threads=2, layers=True)
    onnx.save(graph([node("Relu", "x", "y")], {"x": [1, 4]}, ["y"], {}), tmp_path / "none.onnx")
    with pytest.raises(ModelError, match=r"none\.onnx: .*no layer to time"):
        measure(tmp_path / "none.onnx")


# --- the real runner ---


HERE, ARM = native.library_path().parent, Path(os.environ.get("TICKETKIT_RUNNER_AARCH64", "/nowhere"))


def has_layers(folder):
    return (folder / _runner.LAYERS).exists() or (folder / "device" / _runner.LAYERS).exists()


@pytest.mark.skipif(not has_layers(HERE), reason="ticketkit-layers is not built beside the library")
def test_the_real_runner_agrees_and_is_timed(model, capsys):
    report = _layers.measure(_run.Target("local"), model, protocol=PROTOCOL)
    assert not report.failures and not report.stopped
    assert {row.engine for row in report.rows} >= {"sparse", "dense"}
    assert all(row.p50_ms > 0 for row in report.rows)
    sparse = [row for row in report.rows if row.engine == "sparse"]
    assert sparse and all(row.max_abs_diff <= row.tolerance for row in sparse)
    on.bench(on.Target("local"), model, protocol=PROTOCOL, layers=True)
    assert "all sparse layers" in capsys.readouterr().out


@pytest.mark.skipif(not has_layers(ARM) or not qemu.available()[0], reason="no $TICKETKIT_RUNNER_AARCH64 or no qemu-aarch64-static")
def test_emulated_layers_have_instructions_and_no_times(tmp_path, capsys):
    target, model = _run.Target("qemu", runner=ARM), tmp_path / "net.onnx"
    onnx.save(conv_net(0.95, channels=24, batch=1), model)
    report = _layers.measure(target, model, ["sparse"], PROTOCOL, instructions=True)
    assert not report.failures
    for row in report.rows:
        assert row.instructions > row.multiply_adds / 4
        assert not [name for name in json.loads(row.to_json()) if name.endswith("_ms")]
    on.bench(target, model, ["sparse"], protocol=PROTOCOL, layers=True)
    assert "no times" in capsys.readouterr().out


@pytest.mark.skipif(not has_layers(ARM) or not qemu.available()[0], reason="no $TICKETKIT_RUNNER_AARCH64 or no qemu-aarch64-static")
def test_emulated_models_are_right(tmp_path, capsys):
    model = tmp_path / "net.onnx"
    onnx.save(conv_net(0.95, channels=24, batch=1), model)
    on.bench(on.Target("qemu", runner=ARM), model, protocol=timing.Protocol(timeout=60), json_to=str(tmp_path / "rows.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["engine"], row["instructions"]) for row in rows] == [("onnxruntime", None), ("ticketkit", None)]
    assert all(row["max_abs_diff"] < 1e-4 * row["max_abs_output"] for row in rows) and rows[1]["sparse_layers"] > 0
    assert rows[1]["isa"] == "neon" and not [name for name in rows[1] if name.endswith("_ms")]
    assert "no times" in capsys.readouterr().out


# --- the script of benchmarks/ ---


def test_the_script_goes_on_after_a_failure(board, model, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    script = import_module("device")
    monkeypatch.setattr(script.models.Model, "file", lambda self, image, folder: model if self.level > 0.75 else tmp_path / "none.onnx")
    results = tmp_path / "rows.jsonl"
    words = ["--device", "ssh:board", "--rounds", "1", "--seconds", "0", "--rest", "0", "--results", str(results), "--layers"]
    assert script.main([*words, "--model", "resnet18-uniform-70.00", "resnet18-uniform-80.00"]) == 1
    assert len(results.read_text().splitlines()) == 15
    assert "1 of 2 models measured on ssh:board" in capsys.readouterr().err
    assert len(script.MODELS) == 15 and len({str(script.models.Model.parse(name)) for name in script.MODELS}) == 15
