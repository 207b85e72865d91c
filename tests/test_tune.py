"""The search for cuts: bounded in time, without a trace in the results; and the measurement that keeps slow files from being written."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import conv_net

from ticketkit import InferenceSession, export
from ticketkit.errors import ExportError
from ticketkit.exporters import get, random_inputs
from ticketkit.lower import lower
from ticketkit.planner import Plan, plan
from ticketkit.runtime import native
from ticketkit.tune import speedup, tune

NONE = (0,) * 6


def untuned(made: Plan) -> Plan:
    return replace(made, choices=tuple(replace(c, tuning=NONE) for c in made.choices))


def test_only_cuts_change_and_only_for_this_machine_and_size() -> None:
    network = lower(conv_net(0.9))
    made, seen = plan(network), []
    tuned = tune(network, made, 20.0, seen.append)
    assert untuned(tuned) == made
    assert seen == [c.name for c in made.sparse]
    for choice, layer in zip(tuned.choices, network.layers, strict=True):
        assert choice.tuning == NONE or choice.tuning[:3] == (native.active_isa().lanes, *layer.x_shape[2:])  # type: ignore[index]
        assert choice.format != "dense" or choice.tuning == NONE


def test_any_cut_gives_the_same_answer() -> None:
    """A node is cut as its attribute says, for the size it names; results differ in rounding only."""
    network = lower(conv_net(0.9))
    made = plan(network)
    x = {"x": np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}
    expected = InferenceSession(get("onnx").encode(network, made)).run(None, x)[0]
    for cut in ((1, 1, 1), (14, 3, 2), (3, 1000, 1000)):
        tuning = (native.active_isa().lanes, 32, 32, *cut)
        other = replace(made, choices=tuple(replace(c, tuning=tuning if c.format == "csr" else NONE) for c in made.choices))
        found = InferenceSession(get("onnx").encode(network, other)).run(None, x)[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_the_search_stops_in_time() -> None:
    network = lower(conv_net(0.9))
    start = time.monotonic()
    assert tune(network, plan(network), 1e-6) == plan(network)
    assert time.monotonic() - start < 5


def test_speedup_is_dense_over_sparse() -> None:
    network = lower(conv_net(0.9))
    dense = network.model.SerializeToString()
    feeds = random_inputs(network, 0, 1)
    assert 0.2 < speedup(dense, dense, feeds, 0.1) < 5
    assert speedup(dense, get("onnx").encode(network, plan(network)), feeds, 0.1) > 0


def test_a_slower_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ticketkit.tune.speedup", lambda *_: 0.5)
    with pytest.raises(ExportError, match=r"2\.00 times as long as dense.*--no-tune"):
        export(conv_net(0.9), tmp_path / "a.onnx", tune=0.01)
    assert not list(tmp_path.iterdir())
    assert export(conv_net(0.9), tmp_path / "a.onnx").speedup is None
    monkeypatch.setattr("ticketkit.tune.speedup", lambda *_: 1.5)
    report = export(conv_net(0.9), tmp_path / "a.onnx", tune=0.01)
    assert report.speedup == 1.5 and "1.50x faster than dense" in str(report)


def test_export_without_a_search_is_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(conv_net(0.9), tmp_path / name, check=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
