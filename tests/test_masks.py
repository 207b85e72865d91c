"""Mask algebra against its definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ticketkit import masks
from ticketkit.errors import TicketError

# 1 - 0.8^k in percent, k = 1..18, as the papers print them
LEVELS = (20, 36, 48.8, 59.04, 67.23, 73.79, 79.03, 83.22, 86.58, 89.26, 91.41, 93.13, 94.50, 95.60, 96.48, 97.19, 97.75, 98.20)


def layers(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = {"a": (8, 3, 3, 3), "b": (16, 8, 1, 1), "c": (5, 7)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(("round", "percent"), enumerate(LEVELS, start=1))
def test_levels_are_the_papers(round: int, percent: float) -> None:
    level = 1 - 0.8**round
    assert level * 100 == pytest.approx(percent, abs=0.006)
    assert masks.rounds_to(level, 0.2) == round
    assert masks.rounds_to(level + 1e-6, 0.2) == round + 1


def test_rounds_prune_to_the_levels_and_nest() -> None:
    weights = {"w": np.random.default_rng(0).standard_normal((100, 100)).astype(np.float32)}
    now = masks.full(weights)
    assert masks.sparsity(now) == 0.0
    for round in range(1, 12):
        after = masks.global_magnitude(weights, now, 0.2)
        assert masks.sparsity(after) == pytest.approx(1 - 0.8**round, abs=1e-3)
        assert masks.is_nested(after, now) and not masks.is_nested(now, after)
        now = after


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(
        hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=5), elements=st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])),
        min_size=1,
        max_size=4,
    ),
    rate=st.floats(0.0, 0.99),
)
def test_global_magnitude_keeps_the_largest_and_counts_exactly(weights: list[np.ndarray], rate: float) -> None:
    """Many ties on purpose: the count is exact, nothing kept is smaller than anything pruned, ties go by index."""
    named = {str(i): w for i, w in enumerate(weights)}
    after = masks.global_magnitude(named, masks.full(named), rate)
    flat = np.concatenate([np.abs(w).ravel() for w in weights])
    stays = np.concatenate([after[name].ravel() for name in named])
    assert (~stays).sum() == round(rate * flat.size)
    assert flat[stays].min(initial=np.inf) >= flat[~stays].max(initial=-np.inf)
    expected = np.ones(flat.size, bool)
    expected[np.argsort(flat, kind="stable")[: round(rate * flat.size)]] = False
    np.testing.assert_array_equal(stays, expected)


def test_pruned_weights_stay_pruned_even_if_large() -> None:
    weights = {"w": np.array([9.0, 1.0, 2.0, 3.0, 4.0], np.float32)}
    before = {"w": np.array([False, True, True, True, True])}
    after = masks.global_magnitude(weights, before, 0.25)
    assert after["w"].tolist() == [False, False, True, True, True]
    assert before["w"].tolist() == [False, True, True, True, True], "arguments are left alone"


def test_negative_weights_count_by_magnitude() -> None:
    """A popular re-implementation pruned every negative weight (no abs)."""
    after = masks.global_magnitude({"w": np.array([-5.0, 0.1, -0.2, 4.0], np.float32)}, {"w": np.ones(4, bool)}, 0.5)
    assert after["w"].tolist() == [True, False, False, True]


def test_global_is_not_layer_wise() -> None:
    weights = {"small": np.full(10, 0.1, np.float32), "large": np.full(10, 1.0, np.float32)}
    whole = masks.global_magnitude(weights, masks.full(weights), 0.5)
    assert masks.layer_sparsity(whole) == {"small": 1.0, "large": 0.0}


def test_random_depends_on_the_seed_alone() -> None:
    full = masks.full(layers())
    first, again, other = masks.random(full, 0.3, 0), masks.random(full, 0.3, 0), masks.random(full, 0.3, 1)
    assert all(np.array_equal(first[name], again[name]) for name in full)
    assert not all(np.array_equal(first[name], other[name]) for name in full)
    assert masks.kept(first) == masks.kept(other) == masks.kept(full) - round(0.3 * masks.kept(full))


NAN = {**layers(), "b": np.full((16, 8, 1, 1), np.nan, np.float32)}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: masks.global_magnitude(NAN, masks.full(NAN), 0.2), "b: weights are NaN"),
        (lambda: masks.global_magnitude({}, masks.full(layers()), 0.2), "a: the mask names it"),
        (lambda: masks.global_magnitude({"a": np.zeros(3, np.float32)}, {"a": np.ones(4, bool)}, 0.2), "shape"),
        (lambda: masks.global_magnitude(layers(), masks.full(layers()), 1.0), "rate"),
        (lambda: masks.global_magnitude(layers(), masks.full(layers()), float("nan")), "rate"),
        (lambda: masks.rounds_to(1.0, 0.2), "sparsity"),
    ],
)
def test_bad_input_is_one_clear_line(call: object, words: str) -> None:
    with pytest.raises(TicketError, match=words) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
