"""The table of networks: rows that hold what they say, errors that are rows, runs that are taken up again."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchvision")
pytest.importorskip("openvino")
pytest.importorskip("ticketkit.runtime.native").isas()
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import networks  # noqa: E402
import zoo  # noqa: E402

from ticketkit.errors import DataError  # noqa: E402
from ticketkit.quickstart import weights  # noqa: E402

SMALL = "squeezenet1_1"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(networks.SIDES, SMALL, 64)


def test_the_table_is_wide():
    names = sum(networks.TASKS.values(), ())
    assert len(names) == len({*names}) and len(names) >= 25
    assert len([name for name in names if name.startswith("timm/")]) >= 10
    assert {networks.task_of(name) for name in names} == {*networks.TASKS}
    with pytest.raises(DataError, match="lenet: not in the table"):
        zoo.blank("lenet", "dynamo", 0.9)


def transformer():
    """Like vit_b_16, but small."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)


@pytest.mark.parametrize("network", ["shufflenet_v2_x1_0", "vit_b_16"])
def test_what_is_pruned(network, monkeypatch):
    if network == "vit_b_16":
        monkeypatch.setattr(networks, "_make", lambda name: transformer())
    module = networks.build(network)
    before = {name: weight.numpy().copy() for name, weight in weights(module).items()}
    count = networks.prune(module, 0.9)
    after = {name: weight.numpy() for name, weight in weights(module).items()}
    first, *body, last = before
    dense = {first, last}
    assert (count == sum(before[name].size for name in body)) and all((after[name] != 0).all() for name in dense)
    kept = sum(np.count_nonzero(after[name]) for name in body)
    assert kept == count - round(0.9 * count)
    for name in body:
        np.testing.assert_array_equal(after[name], np.where(after[name] != 0, before[name], 0))
    threshold = min(np.abs(after[name][after[name] != 0]).min() for name in body)
    assert all(np.abs(before[name][after[name] == 0]).max(initial=0) <= threshold for name in body), "by magnitude, over all layers"


@pytest.mark.parametrize("exporter", networks.EXPORTERS)
def test_a_row_holds_what_it_says(exporter, small):
    row = zoo.measure(zoo.blank(SMALL, exporter, 0.95), None)
    assert row.error is None and row.task == "classification" and row.image == 64
    assert row.layers == 26 and row.opset == networks.EXPORTERS[exporter]
    assert {*row.checker.values()} == {"passes"}
    assert {*row.differences} >= {"onnxruntime", "openvino"}
    for engine, tolerance in row.tolerances.items():
        assert 0 <= row.differences[engine] <= tolerance < 1e-2 * row.scale
    assert row.differences["openvino"] < 1e-3 * row.scale
    assert row.sparse_layers and row.file_ratio == row.bytes["dense"] / row.bytes["sparse"] > 2  # two fifths of the weights are the head's
    assert row.flops_left < 0.5 * row.flops_dense and row.speedup is None and not row.p50_ms
    assert {"build", "torch", "onnx-dense", "onnx", "checker", "compare", "openvino"} <= {*row.seconds}


def test_errors_are_rows(monkeypatch):
    def fails(module, exporter, image, task, path):
        raise RuntimeError("cannot trace\nfor many reasons")

    monkeypatch.setattr(zoo, "export_torch", fails)
    row = zoo.measure(zoo.blank(SMALL, "dynamo", 0.9), None)
    assert row.error == "torch dynamo: RuntimeError: cannot trace" and row.pruned and row.layers is None


def test_a_process_of_its_own_and_one_that_dies(monkeypatch):
    row = zoo.alone(dataclasses.replace(zoo.blank(SMALL, "dynamo", 0.9), network="lenet"), None)
    assert row.error.startswith("build: --network lenet: not in the table; expected one of alexnet, convnext_tiny")

    class Dies(zoo.ProcessPoolExecutor):
        def submit(self, *work):
            return super().submit(os._exit, 1)

    monkeypatch.setattr(zoo, "ProcessPoolExecutor", Dies)
    assert "the process died" in zoo.alone(zoo.blank(SMALL, "dynamo", 0.9), None).error


def test_runs_are_taken_up_where_they_stopped(tmp_path, monkeypatch, capsys):
    made = []

    def fake(start, protocol):
        made.append(start.key)
        if start.exporter == "dynamo":
            return dataclasses.replace(start, error="onnx: it failed")
        differences = {"ticketkit": 1e-6, "openvino": None}
        return dataclasses.replace(start, layers=3, sparse_layers=1, scale=2.0, differences=differences, speedup_onnxruntime=0.5)

    monkeypatch.setattr(zoo, "alone", fake)
    words = ["--network", SMALL, "--sparsity", "90", "--rounds", "0", "--results", str(tmp_path / "rows" / "zoo.jsonl")]
    assert zoo.main(words) == 1
    assert "it failed" in capsys.readouterr().out
    assert zoo.main([*words, "--resume"]) == 1
    assert made == [(SMALL, "dynamo", 0.9), (SMALL, "torchscript", 0.9), (SMALL, "dynamo", 0.9)]
    rows = [json.loads(line) for line in (tmp_path / "rows" / "zoo.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(set(row) == {field.name for field in dataclasses.fields(zoo.Row)} for row in rows)
    assert zoo.main(["--list"]) == 0 and SMALL in capsys.readouterr().out
    assert zoo.main([*words, "--report"]) == 0
    legend, _, head, rule, *lines = capsys.readouterr().out.splitlines()
    assert legend.startswith("sparse: layers") and len(head.split("|")) == len(rule.split("|")) == len(zoo.COLUMNS) + 2
    ours = f"| {SMALL} | torchscript | 90% | 1/3 | 0% | fails | 5e-07 | - | - | - | 0.50 | - |"
    assert lines == [ours, "", f"- {SMALL}, dynamo, 90%: onnx: it failed"]
