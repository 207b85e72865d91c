"""The Plan: what is chosen and why, its sums by hand, and its life as JSON."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
from graphs import conv_net, graph, node, pruned
from rich.console import Console

from ticketkit import cost, formats
from ticketkit.errors import FormatError
from ticketkit.formats import bsr
from ticketkit.lower import Network, lower
from ticketkit.lower.operators import Execution
from ticketkit.planner import DENSE, STORED, WORTH, Choice, Plan, plan, render

SIZE = (64, 64, 3, 3)


def one_conv(sparsity: float, size: int = 28, shape: tuple[int, int, int, int] = SIZE, **attributes: Any) -> Network:
    inputs = {"x": ["N", shape[1] * attributes.get("group", 1), size, size]}
    return lower(graph([node("Conv", "x c.weight", "y", **attributes)], inputs, ["y"], {"c.weight": pruned(shape, sparsity)}))


def choice(network: Network) -> Choice:
    return plan(network).choices[0]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.2])
def test_nothing_is_sparse_where_too_little_is_zero(sparsity: float) -> None:
    chosen = choice(one_conv(sparsity))
    assert (chosen.format, chosen.kernel) == (DENSE, "onnxruntime")
    assert chosen.reason == ("no zeros" if sparsity == 0 else "too few zeros: sparse would take more bytes")


@pytest.mark.parametrize("zeros", [2, 300_000, 400_000])
def test_no_product_is_sparse_where_that_takes_more_bytes(zeros: int) -> None:
    """However fast: a head with a few accidental zeros would double a file. 6 bytes for 4 pay from a third of zeros on."""
    weight = pruned((1000, 1000), zeros / 1e6)
    network = lower(graph([node("Gemm", "x fc.weight", "y", transB=1)], {"x": ["N", 1000]}, ["y"], {"fc.weight": weight}))
    chosen = choice(network)
    if zeros < 1e6 / 3:
        assert chosen.format == DENSE and chosen.reason.startswith("too few zeros")
    else:
        assert chosen.format != DENSE or chosen.reason.startswith("predicted")


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.98, 1.0])
def test_large_and_sparse_is_sparse(sparsity: float) -> None:
    network = one_conv(sparsity)
    chosen = choice(network)
    predicted = {format: cost.predict_us(network.layers[0], format) or 0.0 for format in (DENSE, "csr", "bsr")}
    fastest = min(predicted, key=lambda format: predicted[format])
    assert chosen.format == fastest == ("csr" if sparsity < 1 else "bsr")  # without non-zeros, whose rows are fewer
    assert chosen.kernel == f"conv2d_{chosen.format}_f32"
    assert chosen.chosen_us is not None and chosen.dense_us is not None and chosen.chosen_us < chosen.dense_us


def test_tiny_layers_stay_dense() -> None:
    chosen = choice(one_conv(0.9, size=4, shape=(4, 4, 1, 1)))
    assert chosen.format == DENSE and chosen.reason.startswith("predicted")


def test_groups_stay_dense_however_sparse() -> None:
    chosen = choice(one_conv(0.95, shape=(64, 16, 3, 3), group=4))
    assert chosen.format == DENSE and "grouped" in chosen.reason


def inverted_bottleneck(sparsity: float) -> Network:
    """1x1, depthwise 3x3 without zeros, 1x1, as in MobileNetV2."""
    shapes = {"a": (384, 64, 1, 1), "b": (384, 1, 3, 3), "c": (64, 384, 1, 1)}
    weights = {f"{name}.weight": pruned(shape, 0.0 if name == "b" else sparsity) for name, shape in shapes.items()}
    depthwise = {"group": 384, "pads": [1, 1, 1, 1]}
    nodes = [node("Conv", "x a.weight", "a"), node("Conv", "a b.weight", "b", **depthwise), node("Conv", "b c.weight", "y")]
    return lower(graph(nodes, {"x": ["N", 64, 28, 28]}, ["y"], weights))


def test_depthwise_goes_with_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where changes of order are dear a depthwise layer runs where its neighbours do; where they are free, wherever it is faster."""
    kernels = [c.kernel for c in plan(inverted_bottleneck(0.95)).choices]
    assert kernels == ["conv2d_csr_f32", "depthwise_csr_f32", "conv2d_csr_f32"]
    assert not plan(inverted_bottleneck(0.0)).sparse
    slow = {**cost.table(), "Depthwise": {DENSE: {"madd": 0.02}, "csr": {"madd": 0.03}}}
    monkeypatch.setattr("ticketkit.cost.table", lambda: slow)
    assert "but sparse neighbours" in plan(inverted_bottleneck(0.95)).choices[1].reason
    monkeypatch.setattr("ticketkit.cost.reorder_us", lambda elements: 0.0)
    assert [c.format for c in plan(inverted_bottleneck(0.95)).choices] == ["csr", DENSE, "csr"]


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_depthwise_layers_alone_do_not_make_a_model_sparse(monkeypatch: pytest.MonkeyPatch, sparsity: float) -> None:
    fast = {**cost.table(), "Depthwise": {DENSE: {"madd": 1.0}, "csr": {"madd": 0.01}}}
    monkeypatch.setattr("ticketkit.cost.table", lambda: fast)
    made = plan(one_conv(sparsity, shape=(64, 1, 3, 3), group=64))
    assert not made.sparse and "hardly gain" in made.choices[0].reason


def test_the_cheapest_format_is_chosen() -> None:
    """At every sparsity the choice is never predicted slower than dense, and sparse time falls with sparsity."""
    times = []
    for sparsity in np.linspace(0.45, 1.0, 12):
        network = one_conv(float(sparsity))
        chosen = choice(network)
        times.append(cost.predict_us(network.layers[0], "csr"))
        assert chosen.chosen_us is not None and chosen.dense_us is not None and chosen.chosen_us <= chosen.dense_us
        assert chosen.chosen_us == cost.predict_us(network.layers[0], chosen.format)
    assert times == sorted(times, reverse=True)


def test_full_blocks_are_found() -> None:
    """Of equal sparsity, whole blocks of four output channels run as bsr, scattered zeros as csr; half-full blocks do not pay."""
    weight = pruned(SIZE, 0.8)
    blocks = np.where(np.random.default_rng(0).random((16, *SIZE[1:])) < 0.8, 0, 1).repeat(4, 0)
    whole = np.random.default_rng(1).standard_normal(SIZE).astype(np.float32) * blocks.astype(np.float32)
    for array, expected in ((weight, "csr"), (whole, "bsr")):
        network = lower(graph([node("Conv", "x c.weight", "y")], {"x": ["N", 64, 28, 28]}, ["y"], {"c.weight": array}))
        assert choice(network).format == expected
        assert choice(network).kernel == f"conv2d_{expected}_f32"


@pytest.mark.parametrize(("block", "expected"), [((1, 1), "csr"), ((4, 1), "bsr"), ((1, 4), "bsr1x4"), ((1, 16), "bsr1x4")])
def test_full_blocks_of_a_product_are_found(block: tuple[int, int], expected: str) -> None:
    rng = np.random.default_rng(0)
    grid = np.where(rng.random((512 // block[0], 1024 // block[1])) < 0.9, 0, 1)
    weight = rng.standard_normal((512, 1024)).astype(np.float32) * np.kron(grid, np.ones(block, np.float32)).astype(np.float32)
    network = lower(graph([node("Gemm", "x w", "y", transB=1)], {"x": [1, 1024]}, ["y"], {"w": weight}))
    assert (choice(network).format, choice(network).kernel) == (expected, f"gemm_{expected}_f32")


def test_every_compute_format_has_a_cost_and_a_place_in_files() -> None:
    assert set(STORED) == set(formats.names("compute")) | set(bsr.KERNELS) == {DENSE, "csr", *bsr.KERNELS}
    without = {"Conv": {"bsr1x4"}, "Depthwise": {"bsr", "bsr1x4"}, "Gemm": set()}
    assert set(cost.COUNTS) == set(without)
    for operator, by_format in cost.COUNTS.items():
        assert set(by_format) == set(STORED) - without[operator]
        for name, counted in by_format.items():
            assert set(cost.table()[operator][name]) == set(counted)
            assert all(ns >= 0 for ns in cost.table()[operator][name].values())


def test_a_model_that_hardly_gains_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    network = lower(conv_net(0.9))
    made = plan(network)
    assert made.sparse and made.predicted_us[1] < WORTH * made.predicted_us[0]
    monkeypatch.setattr("ticketkit.planner.WORTH", 0.5 * made.predicted_us[1] / made.predicted_us[0])
    assert not plan(network).sparse and any("hardly gain" in c.reason for c in plan(network).choices)


def test_changing_order_between_layers_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where handing tensors over is dear, a lone sparse layer between dense ones stays dense."""
    network = lower(conv_net(0.9))
    assert plan(network).sparse
    monkeypatch.setattr("ticketkit.cost.reorder_us", lambda elements: 1e9)
    assert not plan(network).sparse


def test_neighbours_of_unlike_formats_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles fit one format: a pointwise layer takes that of its neighbour where gathering is dear; another window gathers anyway."""
    faster = {("a", "csr"): 10.0, ("a", "bsr"): 9.0, ("b", "csr"): 8.0, ("b", "bsr"): 10.0}
    monkeypatch.setattr("ticketkit.cost.predict_us", lambda layer, format: faster.get((layer.name, format), 100.0))

    def formats_chosen(size: int, gather_us: float) -> list[str]:
        monkeypatch.setattr("ticketkit.cost.gather_us", lambda x_shape: gather_us)
        weights = {"v": pruned((16, 16, 1, 1), 0.9), "w": pruned((16, 16, size, size), 0.9)}
        nodes = [node("Conv", "x v", "m", name="a"), node("Conv", "m w", "y", name="b")]
        return [c.format for c in plan(lower(graph(nodes, {"x": ["N", 16, 28, 28]}, ["y"], weights))).choices]

    assert formats_chosen(1, 0.5) == ["bsr", "csr"]
    assert formats_chosen(1, 5.0) == ["csr", "csr"]
    assert formats_chosen(3, 5.0) == ["bsr", "csr"]


def test_a_fit_finds_the_coefficients_back() -> None:
    rng = np.random.default_rng(0)
    rows = [{"madd": float(a), "call": 1.0, "input": float(b)} for a, b in rng.integers(1, 10**6, (50, 2))]
    times = [1e-3 * (0.03 * row["madd"] + 2000 + 0 * row["input"]) for row in rows]
    assert cost.fit(rows, times, ("madd", "call", "input")) == pytest.approx({"madd": 0.03, "call": 2000, "input": 0}, abs=1e-6)


def test_an_unknown_size_is_said() -> None:
    nodes = [node("NonZero", "x", "i"), node("Cast", "i", "f", to=1), node("Unsqueeze", "f axes", "u"), node("Conv", "u c.weight", "y")]
    constants = {"c.weight": pruned((8, 4, 1, 1), 0.9), "axes": np.array([0, 1], np.int64)}
    chosen = choice(lower(graph(nodes, {"x": [2, 3, 4, 5]}, ["y"], constants)))
    assert chosen.format == DENSE and chosen.flops_left is None and "give the input shape" in chosen.reason


def test_sums_by_hand() -> None:
    """conv_net has 32 channels: stem 3x3, conv1 3x3, conv2 3x3/2, down 1x1/2, head 64 -> 10; 32x32 pixels in, 16x16 after stride 2."""
    made = plan(lower(conv_net(0.75)))
    sizes = {"stem": 32 * 27, "conv1": 32 * 288, "conv2": 64 * 288, "down": 64 * 32, "head": 640}
    uses = {"stem": 1024, "conv1": 1024, "conv2": 256, "down": 256, "head": 1}
    for c in made.choices:
        kept = sizes[c.name] // (4 if c.name in ("conv1", "conv2", "down") else 1)
        assert (c.nnz, c.flops_dense, c.flops_left) == (kept, 2 * sizes[c.name] * uses[c.name], 2 * kept * uses[c.name])
    prunable = sizes["conv1"] + sizes["conv2"] + sizes["down"]
    assert made.prunable_sparsity == pytest.approx(0.75)
    parameters = sum(sizes.values()) + 32 + 32 + 64 + 64 + 10
    assert made.parameters == parameters and made.model_sparsity == pytest.approx(0.75 * prunable / parameters)
    totals = made.totals()
    assert totals["flops_dense"] == sum(2 * sizes[k] * uses[k] for k in sizes)
    assert totals["weight_bytes_dense"] == 4 * sum(sizes.values())
    sparse = {c.name for c in made.sparse}
    assert totals["weight_bytes_stored"] == sum(6 * n // 4 if name in sparse else 4 * n for name, n in sizes.items())


def test_flops_follow_the_input() -> None:
    model = graph([node("Conv", "x c.weight", "y")], {"x": ["N", 64, "H", "W"]}, ["y"], {"c.weight": pruned((8, 64, 1, 1), 0.5)})
    small, large, pair = (plan(lower(model, shape)).flops[0] for shape in ([64, 8, 8], [64, 16, 16], [2, 64, 8, 8]))
    assert (small, large, pair) == (2 * 512 * 64, 4 * small, 2 * small)


def test_a_plan_is_frozen_json_and_hashed() -> None:
    made = plan(lower(conv_net()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.choices[0].format = "csr"  # type: ignore[misc]
    back = Plan.from_dict(json.loads(json.dumps(made.to_dict())))
    assert back == made and back.sha256 == made.sha256
    assert plan(lower(conv_net(0.8))).sha256 != made.sha256
    with pytest.raises(FormatError, match="not a plan"):
        Plan.from_dict({"choices": [{"name": "conv1"}]})


def test_plans_say_how_values_are_stored() -> None:
    made = dataclasses.replace(plan(lower(conv_net(0.9, channels=64))), values="fp16")
    data = made.to_dict()
    assert Plan.from_dict(data) == made and made.totals()["weight_bytes_stored"] < 0.72 * plan_bytes(made, "fp32")
    assert Plan.from_dict({key: value for key, value in data.items() if key != "values"}).values == "fp32", "plans of before"
    with pytest.raises(FormatError, match="not a plan: 'int3'"):
        Plan.from_dict({**data, "values": "int3"})


def plan_bytes(made: Plan, values: str) -> int:
    stored: int = dataclasses.replace(made, values=values).totals()["weight_bytes_stored"]
    return stored


def test_a_plan_prints_every_layer_and_its_reason() -> None:
    made = plan(lower(conv_net()))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(made))
    for text in (str(made), console.export_text()):
        for c in made.choices:
            assert c.name in text and c.reason in text and c.kernel in text


def test_stored_formats_are_kept() -> None:
    network = lower(conv_net(0.3))
    kept = plan(network, keep={"conv1": Execution("bsr", (8, 32, 32, 4, 16, 2))})
    assert [(c.name, c.format, c.tuning) for c in kept.sparse] == [("conv1", "bsr", (8, 32, 32, 4, 16, 2))]
    assert {c.reason for c in kept.choices} == {"as stored in the file"}
