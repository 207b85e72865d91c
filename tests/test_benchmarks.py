"""The scripts of benchmarks/: the table of layers, a row's arithmetic, names of models, the plot."""

import argparse
import dataclasses
import json
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ticketkit.runtime.native").isas()
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import layers  # noqa: E402
import models  # noqa: E402
import plot  # noqa: E402
import shapes  # noqa: E402
import simulated  # noqa: E402

from ticketkit.errors import DataError, ModelError, TicketkitError  # noqa: E402

TINY = [
    shapes.Entry(shapes.Conv(8, 6, 5, 12, 3, 2, 1, 1), "body", {"resnet50": 3, "vit_b_16": 1}),
    shapes.Entry(shapes.Gemm(20, 16, 7), "body", {"vit_b_16": 2}),
]
QUICK = ["--rounds", "1", "--seconds", "0", "--sparsity", "50", "90"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Two layers for a table; `measure(*words)` runs the script and gives the rows in the file."""
    monkeypatch.setattr(layers, "read", lambda: TINY)
    results = tmp_path / "rows" / "layers.jsonl"

    def measure(*words):
        assert layers.main([*QUICK, "--results", str(results), *words]) == 0
        return [json.loads(line) for line in results.read_text().splitlines()]

    return measure


# --- the table of layers ---


@pytest.mark.parametrize(
    ("network", "layers_in_all", "gmacs"),
    [("resnet50", 54, 4.089), ("resnet152", 156, 11.514), ("vit_b_16", 50, 16.849), ("bert_base", 72, 10.872), ("mobilenet_v2", 36, 0.280)],
)
def test_the_table_adds_up_to_the_networks(network, layers_in_all, gmacs):
    table = [(entry.counts[network], entry) for entry in shapes.read() if network in entry.counts]
    assert sum(count for count, _ in table) == layers_in_all
    work = sum(count * prod(e.shape.weight) * prod(e.shape.y) // e.shape.y[1] for count, e in table)
    assert work / 1e9 == pytest.approx(gmacs, abs=6e-4)
    ends = [entry.part for _, entry in table if entry.part != "body"]
    assert ends == ([] if network == "bert_base" else ["stem", "head"])


def test_the_table_has_every_network_and_no_layer_twice():
    entries = shapes.read()
    assert {name for entry in entries for name in entry.counts} == set(shapes.NETWORKS)
    assert len({(entry.part, entry.shape) for entry in entries}) == len(entries) == len({entry.shape.name for entry in entries})


def test_the_table_is_what_the_networks_say(tmp_path):
    pytest.importorskip("torchvision")
    shapes.write(tmp_path / "layers.csv")
    assert (tmp_path / "layers.csv").read_text() == shapes.TABLE.read_text()


# --- rows of layers ---


def test_a_row_of_a_layer_adds_up(tiny, capsys):
    rows = tiny()
    assert [(row["layer"], row["sparsity"], row["format"]) for row in rows] == [
        (entry.shape.name, sparsity, name) for entry in TINY for sparsity in (0.5, 0.9) for name in entry.shape.packed
    ]
    macs = {TINY[0].shape.name: 12 * 8 * 9 * 3 * 3, TINY[1].shape.name: 20 * 16 * 7}
    weights = {TINY[0].shape.name: 12 * 8 * 9, TINY[1].shape.name: 20 * 16}
    for row in rows:
        assert set(row) == {field.name for field in dataclasses.fields(layers.Row)}
        flops, kept = 2 * macs[row["layer"]], row["nnz"] / weights[row["layer"]]
        assert kept == pytest.approx(1 - row["sparsity"], abs=4 / weights[row["layer"]])
        assert row["gflops_effective"] == pytest.approx(flops / row["median_ms"] / 1e6)
        assert row["gflops"] == pytest.approx(kept * flops / row["median_ms"] / 1e6, rel=1e-3)
        assert row["limit_share"] == pytest.approx(row["gflops"] / row["limit_gflops"])
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["median_ms"])
        assert row["n"] == row["rounds"] == len(row["rounds_ms"]) == 1
        assert row["min_ms"] == pytest.approx(row["median_ms"]) and row["dense_min_ms"] == pytest.approx(row["dense_ms"])
        assert row["kernel"] in layers.native.kernels()
        assert row["shape"] == dataclasses.asdict(next(e.shape for e in TINY if e.shape.name == row["layer"]))
        assert row["cpu"] and row["onnxruntime"] and row["timestamp"].endswith("+00:00")
    text = capsys.readouterr().out
    assert "3/3" in text and "furthest from the limit at 90%" in text and TINY[0].shape.name in text


def test_totals_weigh_layers_by_their_number(tiny, capsys):
    rows = tiny("--network", "vit_b_16", "--format", "csr", "--sparsity", "90")
    dense, sparse = (sum(count * row[key] for count, row in zip((1, 2), rows, strict=True)) for key in ("dense_ms", "median_ms"))
    text = capsys.readouterr().out
    assert layers.table.milliseconds(dense) in text and f"{dense / sparse:.2f}" in text


def test_layers_are_chosen_by_network_and_name(tiny):
    assert {row["layer"] for row in tiny("--network", "resnet50")} == {TINY[0].shape.name}
    assert len(tiny("--layer", "gemm-20", "--format", "bsr")) == 4 + 2
    assert [row["layer"] for row in tiny("--format", "bsr1x4")[6:]] == [TINY[1].shape.name] * 2
    with pytest.raises(DataError, match="no layer of resnet50"):
        tiny("--network", "resnet50", "--layer", "gemm")


def test_resume_measures_only_what_is_missing(tiny):
    first = tiny("--format", "csr")
    assert tiny("--format", "csr", "--resume") == first
    assert [row["format"] for row in tiny("--resume")[4:]] == ["bsr", "bsr", "bsr", "bsr1x4", "bsr", "bsr1x4"]
    assert len(tiny("--resume", "--rounds", "2")) == 20  # other settings, other rows


def test_ctrl_c_keeps_the_rows_so_far(tiny, monkeypatch, capsys):
    measure = layers.measure

    def interrupted(entry, *rest):
        if entry is TINY[1]:
            raise KeyboardInterrupt
        return measure(entry, *rest)

    monkeypatch.setattr(layers, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny()
    assert "3/3" in capsys.readouterr().out  # the table of what is there
    monkeypatch.setattr(layers, "measure", measure)
    assert len(tiny("--resume")) == 10


def test_a_wrong_answer_has_no_speed(tiny, monkeypatch):
    right = layers.sparse
    monkeypatch.setattr(layers, "sparse", lambda shape, weight, *rest: right(shape, weight * np.float32(1.001), *rest))
    with pytest.raises(TicketkitError, match="expected onnxruntime's output"):
        tiny()


# --- models ---


def test_names_of_models():
    for group in models.SETS.values():
        for name in group.models:
            assert str(models.Model.parse(name)).removeprefix("resnet50-") == name.removeprefix("resnet50-")
    assert models.Model.parse("gm-90.00") == models.Model("resnet50", "gm", 0.9, 1)
    assert models.Model.parse("uniform-70.00-4x1") == models.Model("resnet50", "uniform", 0.7, 4)
    assert models.Model.parse("mobilenet_v2-uniform-90.00") == models.Model("mobilenet_v2", "uniform", 0.9, 1)
    assert len(models.SETS["guard"].models) == 3 * 11
    mobile = models.Model.parse("mobilenet_v2-pointwise-90.00").sparsity()
    assert mobile["features.2.conv.1.0"] == 0 and mobile["features.2.conv.0.0"] == 0.9  # depthwise, pointwise
    assert models.Model.parse("mobilenet_v2-uniform-90.00").sparsity()["features.2.conv.1.0"] == 0.9
    for name in ("gm-90", "resnet50", "uniform-90.00-4x4", "resnet50-random-90.00"):
        with pytest.raises(argparse.ArgumentTypeError, match=name):
            models.Model.parse(name)


def test_files_of_models_are_built_once_and_a_slow_one_is_reported(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchvision")
    folder = tmp_path / "files"
    dense, pruned = (models.Model.parse(f"squeezenet1_1-uniform-{percent}") for percent in ("0.00", "95.00-4x1"))
    assert dense.file(224, folder).name == "squeezenet1_1-uniform-0.00-224px-plain.onnx"
    assert pruned.file(224, folder).name == "squeezenet1_1-uniform-95.00-4x1-224px.onnx"
    monkeypatch.setattr(models, "network", None)
    words = ["--set", "guard", "--rounds", "1", "--seconds", "0", "--files", str(folder), "--results", str(tmp_path / "models.jsonl")]
    for floor, status in ((0.0, 0), (1e6, 1)):
        monkeypatch.setitem(models.SETS, "guard", models.Set((str(dense), str(pruned)), ("onnxruntime", "ticketkit"), floor))
        assert models.main(words) == status
        assert ("expected a speedup of 1e+06 or more" in capsys.readouterr().out) == bool(status)
    drawn = plot.panels(tmp_path / "models.jsonl")
    assert list(drawn) == ["squeezenet1_1, uniform, 224px", "squeezenet1_1, uniform, 4x1, 224px"]


def test_a_network_torchvision_does_not_have(tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(ModelError, match="no network 'lenet'"):
        models.Model.parse("lenet-uniform-90.00").file(224, tmp_path)


# --- the plot ---


def row(model="resnet50-gm-90.00-224px.onnx", speedup=2.0, sparsity=0.9, left=25, day=1, **changes):
    own = {"engine": "ticketkit", "model": model, "cpu": "A", "batch": 1, "threads": 1, "sparsity_prunable": sparsity, "speedup": speedup}
    return {**own, "flops_dense": 100, "flops_left": left, "timestamp": f"2026-01-{day:02}T00:00:00+00:00", **changes}


def save(path, *found):
    path.write_text("".join(json.dumps(each) + "\n" for each in found))
    return path


def test_what_is_plotted(tmp_path):
    path = save(
        tmp_path / "models.jsonl",
        row(speedup=1.0),
        row(speedup=2.5, day=2),  # measured again
        row("resnet50-gm-79.03-224px.onnx", 1.5, 0.79, 50),
        row(threads=2, speedup=2.0),
        row("resnet50-uniform-70.00-4x1-224px.onnx", 3.0, 0.7, 30),
        row("resnet18-uniform-0.00-224px.onnx", 0.5, 0.0, 100),
        row("resnet18-uniform-0.00-224px-plain.onnx", 1.0, 0.0, 100),  # the same network, later
        row(cpu="B", day=1, speedup=9.0),
        row(engine="onnxruntime", speedup=1.0),
        row("my own.onnx"),
    )
    found = plot.panels(path)
    assert found == {
        "resnet18, uniform, 224px": {(1, 1): [plot.Point(0.0, 1.0, 1.0)]},
        "resnet50, global magnitude, 224px": {
            (1, 1): [plot.Point(0.79, 1.5, 2.0), plot.Point(0.9, 2.5, 4.0)],
            (1, 2): [plot.Point(0.9, 2.0, 4.0)],
        },
        "resnet50, uniform, 4x1, 224px": {(1, 1): [plot.Point(0.7, 3.0, 100 / 30)]},
    }
    assert plot.panels(path, "B")["resnet50, global magnitude, 224px"][1, 1] == [plot.Point(0.9, 9.0, 4.0)]
    pytest.importorskip("matplotlib")
    plot.main(["--results", str(path), "--output", str(tmp_path / "plot.svg")])
    first = (tmp_path / "plot.svg").read_text()
    assert "<svg" in first[:1000] and "FLOPs dense" in first
    plot.main(["--results", str(path), "--output", str(tmp_path / "plot.svg")])
    assert (tmp_path / "plot.svg").read_text() == first
    plot.main(["--results", str(path), "--output", str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_rows_that_cannot_be_plotted(tmp_path):
    path = tmp_path / "models.jsonl"
    with pytest.raises(DataError, match="no such file"):
        plot.panels(path)
    with pytest.raises(DataError, match="no row of ticketkit"):
        plot.panels(save(path, row(engine="onnxruntime"), row(speedup=None)))
    with pytest.raises(DataError, match="with a speedup on C"):
        plot.panels(save(path, row()), "C")
    with pytest.raises(DataError, match=r"models\.jsonl:2: a row without cpu, speedup"):
        plot.panels(save(path, row(), {name: value for name, value in row().items() if name not in ("cpu", "speedup")}))
    path.write_text("half a r")
    with pytest.raises(DataError, match=r"models\.jsonl:1: expected a row as JSON"):
        plot.panels(path)


# --- simulated.py ---


def made(core, sparsity, speedup, block="1x1"):
    return simulated.Row(
        True, "resnet18", "uniform", block, sparsity, core, 2.0, 10.0, 10.0 / speedup, speedup, 0.2, 20, 0, 21, "0.1.0", "c", "t",
    )  # fmt: skip


def test_the_simulated_page_has_the_newest_rows_and_the_check(tmp_path):
    rows = [made("zen3", 0.9, 9.0), made("cortex-a55", 0.9, 3.0), made("cortex-a55", 0.9, 3.5, "4x1"), made("zen3", 0.9, 2.2)]
    path = tmp_path / "simulated.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    found = simulated.newest(path)
    assert len(found) == 3
    page = simulated.report(found, {("resnet18", "1x1", 0.9): 2.0, ("resnet50", "1x1", 0.9): 4.0})
    assert "| resnet18 | 10 | 3.00x | 3.50x |" in page and "| resnet18 | 1x1 | 90% | 2.20x | 2.00x | +10% |" in page
    assert "9.00" not in page and page.count("imulated") >= 5 and "Simulated, nothing here was run" in page


def test_what_was_measured_of_the_simulated_networks():
    found = simulated.measured(BENCHMARKS / "results" / "models.jsonl")
    assert found["resnet50", "1x1", 0.9] == pytest.approx(4, rel=0.15) and ("resnet50", "4x1", 0.9) in found


def test_simulating_no_such_core_writes_nothing(tmp_path):
    with pytest.raises(TicketkitError, match="expected a core"):
        simulated.main(["--core", "pentium", "--results", str(tmp_path / "rows.jsonl")])
    assert not (tmp_path / "rows.jsonl").exists()
