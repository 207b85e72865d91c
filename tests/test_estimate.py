"""`ticketkit.estimate`: distributions against their definitions, predictions against the planner's, sources, and errors."""

from __future__ import annotations

import dataclasses
import json
import sys
from math import prod
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import conv_net, graph, node, pruned, weights

import ticketkit
from ticketkit import cost, estimator
from ticketkit.errors import ModelError, TicketError, TicketkitError
from ticketkit.estimator import DISTRIBUTIONS, estimate
from ticketkit.exporters import examine, export
from ticketkit.lower import lower
from ticketkit.planner import plan

NET = conv_net(0.0, channels=64)
PRUNABLE = ("conv1", "conv2", "down")
SIZE = sum(weights(NET)[f"{name}.weight"].size for name in PRUNABLE)
LEVELS = (0.3, 0.5, 0.777, 0.9, 0.95, 0.99)


def mlp(depth: int) -> onnx.ModelProto:
    """Fully connected layers of 32 by 32, named fc0, fc1 and so on; input "x" [N, 32]."""
    nodes = [node("Gemm", f"{f'fc{i - 1}.y' if i else 'x'} fc{i}.weight", f"fc{i}.y", transB=1) for i in range(depth)]
    return graph(nodes, {"x": ["N", 32]}, [f"fc{depth - 1}.y"], {f"fc{i}.weight": pruned((32, 32), 0.0, i) for i in range(depth)})


# distributions --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_totals_are_exact(distribution: str) -> None:
    found = estimate(NET, LEVELS, distribution=distribution)
    assert sorted(found.prunable) == list(PRUNABLE)
    for asked, level in zip(LEVELS, found.levels, strict=True):
        kept = {c.name: c.nnz for c in level.plan.choices}
        assert sum(kept[name] for name in PRUNABLE) == SIZE - round(asked * SIZE)
        assert level.plan.prunable_sparsity == pytest.approx(asked, abs=0.5 / SIZE)
        assert [c.sparsity for c in level.plan.choices if c.name not in PRUNABLE] == [0, 0]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("granularity", "block"), [("4x1", 4), ("1x8", 8), ("128x3", 384)])
def test_blocks_are_exact_to_half_a_block_a_layer(distribution: str, granularity: str, block: int) -> None:
    for level in estimate(NET, LEVELS, distribution=distribution, granularity=granularity).levels:
        assert abs(level.plan.prunable_sparsity - level.sparsity) * SIZE <= len(PRUNABLE) * (block / 2 + 1)


def test_uniform_is_the_same_everywhere() -> None:
    choices = estimate(NET, 0.777, distribution="uniform").levels[0].plan.choices
    assert all(c.sparsity == pytest.approx(0.777, abs=1 / prod(c.shape)) for c in choices if c.name in PRUNABLE)


def test_erk_by_hand() -> None:
    """Sums of dimensions 18 and 26, sizes 288 and 128: at 50 % both scale by 208/44; at 30 % the small one would exceed 1."""
    shapes = [(8, 4, 3, 3), (16, 8, 1, 1)]
    assert estimator.erk(shapes, 0.5) == pytest.approx([208 / 44 * 18 / 288, 208 / 44 * 26 / 128])
    assert 0.7 * 416 / 44 * 26 / 128 > 1
    assert estimator.erk(shapes, 0.3) == pytest.approx([(0.7 * 416 - 128) / 288, 1])
    assert estimator.erk(shapes, 0.0) == pytest.approx([1, 1])
    assert estimator.erk([(32, 32), (32, 16)], 0.9) == pytest.approx([0.1 * 1536 / 112 * 64 / 1024, 0.1 * 1536 / 112 * 48 / 512])


def test_erk_of_a_network_keeps_small_layers_denser() -> None:
    shares = {c.name: c.sparsity for c in estimate(NET, 0.9, distribution="erk").levels[0].plan.choices}
    assert shares["down"] < shares["conv1"] < 0.9 + 0.02 and shares["conv1"] < shares["conv2"]


def test_global_is_one_threshold() -> None:
    network = lower(NET)
    arrays = {layer.name: np.abs(layer.weight) for layer in network.layers if layer.name in PRUNABLE}
    order = np.sort(np.concatenate([a.ravel() for a in arrays.values()]))
    threshold = order[round(0.8 * SIZE)]
    found = {c.name: c.nnz for c in estimate(NET, 0.8).levels[0].plan.choices}
    assert {name: found[name] for name in arrays} == {name: np.count_nonzero(a >= threshold) for name, a in arrays.items()}
    uniform = estimate(NET, 0.8, distribution="uniform").levels[0].plan.choices
    assert {c.name: c.nnz for c in uniform} != found


def test_single_zeros_fill_blocks_as_chance_has_it() -> None:
    """Unstructured, a block of four rows is stored with probability 1 - s^4; in whole blocks nothing else is stored."""
    network, array = lower(NET), {"conv2": weights(NET)["conv2.weight"]}
    layer = next(layer for layer in network.layers if layer.name == "conv2")
    for block, expected in (((1, 1), 1 - 0.9**4), ((4, 1), 0.1), ((16, 1), 0.1)):
        mask = DISTRIBUTIONS["uniform"](array, 0.9, block)["conv2"]
        share = cost.stored(dataclasses.replace(layer, weight=mask), "bsr") / mask.size
        assert share == pytest.approx(expected, rel=0.01)


def test_prunable_layers() -> None:
    found = estimate(mlp(5), 0.5, distribution="uniform")
    assert found.prunable == ("fc1", "fc2", "fc3") and "every layer but the first and the last" in found.rule
    assert found.share == pytest.approx(3 / 5)
    assert [c.sparsity for c in found.levels[0].plan.choices] == [0, 0.5, 0.5, 0.5, 0]
    with pytest.raises(ModelError, match="nothing to prune"):
        estimate(mlp(2), 0.5)


# predictions ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("granularity", ["1x1", "4x1"])
def test_sparser_is_never_predicted_slower(distribution: str, granularity: str) -> None:
    found = estimate(NET, [0.0, *np.linspace(0.3, 0.99, 24).tolist()], distribution=distribution, granularity=granularity)
    times = [level.ms[1] for level in found.levels]
    assert times == sorted(times, reverse=True) and times[-1] < 0.5 * times[0]
    assert len({level.ms[0] for level in found.levels}) == 1
    assert found.levels[0].speedup == 1 and not found.levels[0].plan.sparse


def test_blocks_run_as_bsr() -> None:
    single, blocks = (estimate(NET, 0.8, distribution="uniform", granularity=g).levels[0] for g in ("1x1", "4x1"))
    assert (single.count("bsr"), blocks.count("csr")) == (0, 0) and single.count("csr") and blocks.count("bsr")
    assert blocks.speedup > single.speedup


def test_a_pruned_model_at_its_own_sparsity_is_what_inspect_says() -> None:
    model = conv_net(0.9, channels=64)
    inspected = examine(model)
    level = estimate(model, inspected.prunable_sparsity).levels[0]
    assert level.plan == inspected and level.ms[1] == pytest.approx(inspected.predicted_us[1] / 1e3)


def test_a_pruned_model_and_less_sparsity() -> None:
    model = conv_net(0.9, channels=64)
    with pytest.raises(TicketError, match=r"sparsity 0\.5: 90\.0\d% of the prunable weights are zero already"):
        estimate(model, 0.5)
    assert estimate(model, 0.8995).levels[0].plan.prunable_sparsity == pytest.approx(0.8995, abs=1e-5)
    again = estimate(model, 0.5, distribution="erk").levels[0].plan
    assert again == estimate(NET, 0.5, distribution="erk").levels[0].plan  # values do not matter, only shapes


def test_batch_and_image() -> None:
    free = graph(
        [node("Conv", "x a.weight", "a"), node("Conv", "a b.weight", "y")], {"x": ["N", 8, "H", "W"]}, ["y"],
        {"a.weight": pruned((8, 8, 1, 1), 0.0), "b.weight": pruned((8, 8, 1, 1), 0.0)},
    )  # fmt: skip
    flops = 2 * 2 * 64 * 16 * 16
    for options, times in (({}, 14**2), ({"input_shape": [8, 16, 16]}, 1), ({"input_shape": [8, 16, 16], "batch": 4}, 4)):
        found = estimate(free, 0.5, **options).levels[0].plan  # type: ignore[arg-type]
        assert found.flops == (flops * times, flops * times * 3 // 4)
    assert estimate(free, 0.5, input_shape=[2, 8, 16, 16]).levels[0].plan.flops[0] == 2 * flops
    fixed = conv_net(0.0, batch=2)
    assert estimate(fixed, 0.5, batch=2).levels[0].plan == estimate(fixed, 0.5).levels[0].plan
    with pytest.raises(ModelError, match="expected batch 3, the model has 2"):
        estimate(fixed, 0.5, batch=3)


# sources --------------------------------------------------------------------------------------------------------------------


def test_files_plain_and_sparse(tmp_path: Path) -> None:
    model = conv_net(0.9, channels=64)
    onnx.save(model, tmp_path / "plain.onnx")
    export(model, tmp_path / "sparse.onnx")
    plain, sparse = (estimate(tmp_path / f"{name}.onnx", [0.95, 0.98]) for name in ("plain", "sparse"))
    assert plain.model.endswith("plain.onnx") and "BatchNorm folded in" in " ".join(plain.notes)
    for a, b in zip(plain.levels, sparse.levels, strict=True):
        assert [c.nnz for c in a.plan.choices] == [c.nnz for c in b.plan.choices]
        assert a.ms == pytest.approx(b.ms)


def test_a_run_directory(small_run: Path) -> None:
    found = estimate(small_run, 0.9, round=0)
    assert len(found.prunable) > 10 and found.levels[0].plan.prunable_sparsity == pytest.approx(0.9, abs=1e-4)
    with pytest.raises(TicketError, match="zero already"):
        estimate(small_run, 0.1)


def test_networks_of_torchvision() -> None:
    pytest.importorskip("torchvision")
    first, again = (estimate("squeezenet1_1", 0.9, input_shape=[3, 64, 64]) for _ in range(2))
    assert first == again and len(first.prunable) == 25
    assert first.levels[0].plan.inputs == {"input": (1, 3, 64, 64)}
    assert any("random initialisation" in note for note in first.notes)
    assert not any("random" in note for note in estimate("squeezenet1_1", 0.9, input_shape=[3, 64, 64], distribution="erk").notes)
    for words, shape, message in (
        ("lenet", None, "torchvision.models has no such network"),
        ("squeezenet1_1", [3, 0, 64], "expected positive whole numbers"),
        ("squeezenet1_1", [4, 64, 64], "does not take an input"),
    ):
        with pytest.raises(ModelError, match=message):
            estimate(words, 0.9, input_shape=shape)


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimator, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"resnet18: no such file; .*pip install 'ticketkit\[find\]'"):
        estimate("resnet18", 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sparsity": 90}, "got 90; 90 % is 0.9"), ({"sparsity": 1.0}, "0 <= s < 1"), ({"sparsity": [0.5, -0.1]}, "got -0.1"),
     ({"sparsity": float("nan")}, "got nan"), ({"sparsity": []}, "got none"), ({"distribution": "fair"}, "uniform, erk, got 'fair'"),
     ({"granularity": "4"}, "expected RxC"), ({"granularity": "0x1"}, "expected RxC"), ({"source": "none.onnx"}, "no such file"),
     ({"round": 1}, "no run directory")],
)  # fmt: skip
def test_nonsense_is_said(options: dict[str, object], message: str) -> None:
    with pytest.raises(TicketkitError, match=message.replace("[", r"\[")):
        estimate(**{"source": NET, "sparsity": 0.5, **options})  # type: ignore[arg-type]


# the benchmark --------------------------------------------------------------------------------------------------------------


def test_the_error_is_against_the_newest_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    script, name = pytest.importorskip("estimate"), "squeezenet1_1-uniform-90.00"
    common = {"model": f"{name}-64px.onnx", "sparsity_prunable": 0.9, "batch": 1, "threads": 1, "cpu": "C", "isa": "I", "commit": "c"}
    rounds = {"ticketkit": [1.0, 2.0, 3.0], "onnxruntime": [5.0, 10.0, 20.0]}
    lines = [
        json.dumps({**common, "engine": engine, "timestamp": f"2026-01-0{day}", "rounds_p50_ms": times, "p50_ms": times[1], **more})
        for day, more in ((2, {}), (1, {}), (3, {"threads": 2}), (4, {"batch": 2}))
        for engine, times in rounds.items()
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "argv", ["estimate.py", "--rows", f"{tmp_path}/rows.jsonl", "--results", f"{tmp_path}/out.jsonl"])
    script.main()
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (row["model"], row["measured"], row["measured_speedup"]) == (name, "2026-01-02", 5.0)
    expected = estimate("squeezenet1_1", 0.9, distribution="uniform", input_shape=[3, 64, 64]).levels[0]
    assert row["predicted_dense_ms"] == pytest.approx(expected.ms[0])
    assert row["predicted_speedup"] == pytest.approx(expected.speedup, rel=0.02)
    assert row["error"] == pytest.approx(row["predicted_speedup"] / 5 - 1)
    assert "1 networks" in capsys.readouterr().out


# the value ------------------------------------------------------------------------------------------------------------------


def test_an_estimate_is_frozen_and_json() -> None:
    found = estimate(NET, [0.5, 0.9])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.levels = ()  # type: ignore[misc]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["machine"] == cost.table()["machine"] and data["machine"] in data["notes"][0]
    last = data["levels"][-1]
    assert (last["sparsity"], last["speedup"], last["csr_layers"]) == (0.9, found.levels[1].speedup, found.levels[1].count("csr"))
    assert last["predicted_us_dense"] == found.levels[1].ms[0] * 1e3 and last["weight_bytes_stored"] < last["weight_bytes_dense"]
    assert [c["name"] for c in last["choices"]] == [layer.name for layer in lower(NET).layers]


def test_it_is_a_verb_of_the_package() -> None:
    assert ticketkit.estimate is estimate and "estimate" in ticketkit.__all__


def test_the_network_is_left_alone() -> None:
    before = NET.SerializeToString(deterministic=True)
    estimate(NET, 0.9, batch=4)
    assert NET.SerializeToString(deterministic=True) == before and not plan(lower(NET)).sparse
