"""quickstart with a small budget, and the ResNet-50 it measures."""

import csv
import io
import json

import numpy as np
import pytest
from onnx import numpy_helper
from rich.console import Console

pytest.importorskip("torch")
pytest.importorskip("ticketkit.runtime.native").isas()

from ticketkit import quickstart  # noqa: E402
from ticketkit.bench import engines, table, timing  # noqa: E402
from ticketkit.errors import ModelError, TicketkitError  # noqa: E402

with quickstart.DISTRIBUTIONS.open() as lines:
    TABLE = {row["layer"]: row for row in csv.DictReader(line for line in lines if not line.startswith("#"))}
PRUNABLE = {name: row for name, row in TABLE.items() if name not in {"conv1", "fc"}}
QUICK = timing.Protocol(rounds=1, seconds=0, warmup=0, settle=0, least=1)


@pytest.fixture
def two_engines(monkeypatch):
    """Only these two, to keep the test short; test_bench times all of them."""
    monkeypatch.setattr(engines, "usable", lambda: (engines.require(["onnxruntime", "ticketkit"]), {"openvino": "left out"}))


def test_the_whole_line(tmp_path, two_engines):
    console = Console(width=120, file=io.StringIO())
    budget = quickstart.Budget(rounds=1, rate=0.9, steps=2, image=64, protocol=QUICK)
    reports = quickstart.quickstart(tmp_path / "out", budget, console)
    text = console.file.getvalue()
    assert [report.subject.path.name for report in reports] == ["digits.onnx", "resnet50.onnx"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["engine"] for row in rows] == ["onnxruntime", "ticketkit"] * 2
    for row in rows:
        assert row["sparsity_prunable"] == pytest.approx(0.9, abs=1e-3)
        assert row["baseline"] == "onnxruntime"
        assert row["max_abs_diff"] <= 1e-4 * row["max_abs_output"]
        assert table.milliseconds(row["p50_ms"]) in text
        assert f"{row['flops_left'] / row['flops_dense']:.1%}" in text
    assert rows[3]["sparse_layers"] > 40
    weights = reports[1].subject.plan.totals()  # at 64 pixels some of the last layers stay dense: not a third of the bytes, but half
    assert 0 < rows[3]["file_bytes"] - weights["weight_bytes_stored"] < 60_000  # biases and the graph
    assert 0 < rows[2]["file_bytes"] - weights["weight_bytes_dense"] < 60_000
    assert rows[3]["file_bytes"] < rows[2]["file_bytes"] / 2
    for honest in ("random weights", "on 360 of 360 test images", "without openvino: left out", "by layer |", "fastest dense engine"):
        assert honest in text
    assert "digits" in {p.name for p in (tmp_path / "out").iterdir()}


def test_without_torch_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(engines.get("torch"), "find_spec", lambda _: None)
    with pytest.raises(TicketkitError, match=r"pip install 'ticketkit\[find\]'"):
        quickstart.quickstart(tmp_path / "out", quickstart.Budget(), Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("level", [0.6723, 0.7903, 0.9, 0.956])
def test_the_distribution_has_the_level_it_names(level):
    sparsity = quickstart.global_magnitude(level)
    assert sparsity["conv1"] == sparsity["fc"] == 0
    assert sparsity.keys() == PRUNABLE.keys() | {"conv1", "fc"}
    prunable = [(int(row["params"]), sparsity[name]) for name, row in PRUNABLE.items()]
    assert len(prunable) == 52
    assert sum(size for size, _ in prunable) == 23_445_504
    assert sum(size * share for size, share in prunable) / 23_445_504 == pytest.approx(level, abs=1e-4)
    assert set(quickstart.uniform(level).values()) == {0.0, level}


def test_at_90_percent_a_seventh_of_the_work_is_left_and_the_fit_is_near_what_was_published():
    sparsity = quickstart.global_magnitude(0.9)
    work = {name: int(row["flops_dense"]) for name, row in PRUNABLE.items()}
    left = sum(count * (1 - sparsity[name]) for name, count in work.items()) / sum(work.values())
    assert left == pytest.approx(0.142, abs=5e-4)
    other = quickstart.global_magnitude(0.7903)
    off, control = (np.mean([abs(s[name] - float(row["GS90_published"])) for name, row in PRUNABLE.items()]) for s in (sparsity, other))
    assert off < 0.03
    assert control > 0.08  # another level is not near


def test_an_unknown_level_names_the_known_ones():
    with pytest.raises(ModelError, match=r"known at 67\.23, 79\.03, 90\.00, 95\.60 %, got 85\.00%"):
        quickstart.global_magnitude(0.85)


def test_blocks_of_output_channels_share_their_zeros():
    sparsity = quickstart.uniform(0.9, "squeezenet1_1")
    model = quickstart.network("squeezenet1_1", sparsity, image=64, block=4)
    weights = {each.name.removesuffix(".weight"): numpy_helper.to_array(each) for each in model.graph.initializer}
    dense = [name for name in sparsity if np.all(weights[name])]
    assert dense == ["features.0", "classifier.1"]  # the first and the last
    for name in sparsity.keys() - set(dense):
        kept = (weights[name] != 0).reshape(-1, 4, weights[name][0].size)
        assert (kept == kept[:, :1]).all()
        assert kept.mean() == pytest.approx(0.1, abs=4 / kept.size)


def test_networks_that_need_memory_to_be_built_are_named():
    """RegNet works out its widths with tensors."""
    sparsity = quickstart.uniform(0.5, "regnet_y_400mf")
    assert len(sparsity) > 50 and sparsity["stem.0"] == sparsity["fc"] == 0.0 and sparsity["trunk_output.block1.block1-0.proj.0"] == 0.5


def test_every_fully_connected_layer_is_named():
    sparsity = quickstart.uniform(0.5, "vit_b_16")
    assert len(sparsity) == 1 + 12 * 4 + 1 and sparsity["conv_proj"] == sparsity["heads.head"] == 0
    with pytest.raises(ModelError, match="no network 'lenet'"):
        quickstart.uniform(0.5, "lenet")
