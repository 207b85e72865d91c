"""What a device sends is believed or refused, and never anything else: random lines, random fields of real events."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ticketkit.bench.devices import _events, _layers, _run
from ticketkit.errors import DeviceError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63, 10**18])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["before", "ticketkit", "sparse", "conv2d", 0, 1.5]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
RIGHT = [
    {"event": "device", "machine": "aarch64", "isa": None, "kernel": "Linux", "runtime": None},
    {"event": "state", "at": "after", "temperatures": {"soc": 41000}, "khz": {"0": 2e6}},
    {"event": "loaded", "engine": "ticketkit", "load_s": 0.5},
    {"event": "round", "engine": "ticketkit", "round": 0, "ms": [1, 2.5]},
    {"event": "round", "engine": "sparse", "layer": "a", "format": "csr", "round": 0, "ms": [1]},
    {"event": "checked", "engine": "sparse", "layer": "a", "max_abs_diff": 0, "max_abs_output": 1.0, "tolerance": 1e-5, "ok": True},
    {"event": "layer", "layer": "a", "op": "gemm", "shape": [1] * 10, "weights": 1, "nnz": 1, "multiply_adds": 1, "multiply_adds_dense": 1},
    {"event": "finished", "engine": "ticketkit", "peak_rss_bytes": 1},
    {"event": "failed", "engine": "ticketkit", "message": "no"},
    {"event": "error", "message": "no"},
    {"event": "exit", "code": 1},
    {"event": "end"},
]


@pytest.mark.parametrize("event", RIGHT, ids=lambda event: event["event"])
def test_right_events_are_believed(event):
    assert _events.parse(f"  {json.dumps(event)}\r") == event


@settings(deadline=None)  # the machine may be busy
@given(st.text() | st.binary().map(lambda raw: raw.decode(errors="replace")) | VALUES.map(json.dumps))
def test_any_line_is_an_event_or_none_or_refused(line):
    try:
        event = _events.parse(line)
    except DeviceError as error:
        assert "\n" not in str(error)
    else:
        assert event is None or event["event"] in _events.FIELDS


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(RIGHT), st.data())
def test_events_with_a_field_of_anything_break_nothing(event, data):
    """Whatever comes through is fit to be taken, in any order."""
    field = data.draw(st.sampled_from([name for name in event if name != "event"] or ["other"]))
    changed = {**event, field: data.draw(VALUES)}
    if data.draw(st.booleans()):
        changed.pop(field)
    for heard in (_run.Heard(["ticketkit"]), _layers.Heard(frozenset({"a"}))):
        try:
            believed = _events.parse(json.dumps(changed))
            if believed is not None:
                heard.take(believed)
        except DeviceError as error:
            assert "\n" not in str(error)
        for state in heard.states.values():
            assert _run.celsius(state) is not None and _run.falling_clocks((), {"before": state, "after": state}) == []
