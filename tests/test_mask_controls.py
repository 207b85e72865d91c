"""Masks drawn at random, complements and perturbations, and how alike two masks are, against their definitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ticketkit import masks
from ticketkit.errors import TicketError

Named = dict[str, np.ndarray]
SHAPES = {"b": (16, 8, 3, 3), "a": (12, 16, 1, 1), "c": (5, 7)}
SOME: st.SearchStrategy[Named] = st.lists(hnp.arrays(bool, hnp.array_shapes(max_dims=4, max_side=5)), min_size=1, max_size=4).map(
    lambda arrays: {f"l{len(arrays) - i}": array for i, array in enumerate(arrays)}
)
SEEDS = st.integers(0, 3)


def ticket(density: float = 0.2, seed: int = 0) -> Named:
    generator = np.random.default_rng(seed)
    return {name: generator.random(shape) < density * (i + 1) for i, (name, shape) in enumerate(SHAPES.items())}


def counts(named: Named) -> list[int]:
    return [int(mask.sum()) for mask in named.values()]


def same(a: Named, b: Named) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


@settings(max_examples=100, deadline=None)
@given(named=SOME, seed=SEEDS)
def test_counts_are_exact(named: Named, seed: int) -> None:
    shapes = {name: mask.shape for name, mask in named.items()}
    drawn, shuffled, other = masks.random_like(named, seed), masks.shuffled(named, seed), masks.complement(named)
    for found in (drawn, shuffled, other):
        assert {name: mask.shape for name, mask in found.items()} == shapes and list(found) == list(named)
        assert all(mask.dtype == bool for mask in found.values())
    assert masks.kept(drawn) == masks.kept(named)
    assert counts(shuffled) == counts(named)
    assert all((named[name] ^ other[name]).all() for name in named)


@settings(max_examples=100, deadline=None)
@given(named=SOME, fraction=st.floats(0.0, 1.0), seed=SEEDS)
def test_perturb_moves_exactly_that_many(named: Named, fraction: float, seed: int) -> None:
    ones, zeros = masks.kept(named), masks.kept(masks.complement(named))
    moved = round(fraction * ones)
    if moved > zeros:
        with pytest.raises(TicketError, match=f"of {ones} weights kept: that many \\({moved}\\) must be pruned, {zeros} are"):
            masks.perturb(named, fraction, seed)
        return
    after = masks.perturb(named, fraction, seed)
    assert sum(int((named[name] & ~after[name]).sum()) for name in named) == moved
    assert sum(int((after[name] & ~named[name]).sum()) for name in named) == moved


DRAWS: list[Callable[[Named, int], Named]] = [
    lambda named, seed: masks.random(named, 0.3, seed),
    masks.random_like,
    masks.shuffled,
    lambda named, seed: masks.perturb(named, 0.1, seed),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_a_draw_depends_on_the_seed_alone(draw: Callable[[Named, int], Named]) -> None:
    named = ticket()
    copy = {name: mask.copy() for name, mask in named.items()}
    first = draw(named, 0)
    assert same(first, draw(named, 0)) and not same(first, draw(named, 1)) and not same(first, named)
    assert same(named, copy), "arguments are left alone"
    as_in_a_file = {name: named[name] for name in sorted(named)}
    assert list(as_in_a_file) != list(named)
    assert same({name: first[name] for name in sorted(named)}, draw(as_in_a_file, 0)), "the order of layers must not matter"


@pytest.mark.parametrize("draw", DRAWS)
def test_a_negative_seed_is_one_clear_line(draw: Callable[[Named, int], Named]) -> None:
    with pytest.raises(TicketError, match=r"^seed: expected 0 or more, got -1$"):
        draw(ticket(), -1)


def test_random_like_is_uniform_over_all_layers_and_shuffled_within_each() -> None:
    """Every weight is kept equally often over 2000 seeds: within 5 sd. Negative control: the other one's probability is far off."""
    named = {"a": np.arange(6).reshape(2, 3) < 5, "b": np.arange(4) < 1}
    like, within = ({name: np.zeros(mask.shape) for name, mask in named.items()} for _ in range(2))
    for seed in range(2000):
        for name in named:
            like[name] += masks.random_like(named, seed)[name]
            within[name] += masks.shuffled(named, seed)[name]
    slack = 5 * 0.5 / 2000**0.5
    for name, of_layer in (("a", 5 / 6), ("b", 1 / 4)):
        assert np.abs(like[name] / 2000 - 6 / 10).max() < slack < np.abs(like[name] / 2000 - of_layer).min()
        assert np.abs(within[name] / 2000 - of_layer).max() < slack < np.abs(within[name] / 2000 - 6 / 10).min()


def test_nothing_and_everything() -> None:
    assert masks.random_like({}, 0) == masks.shuffled({}, 0) == masks.perturb({}, 0.5, 0) == masks.zero_kernels({}) == {}
    none, every = {"a": np.zeros((2, 3), bool)}, {"a": np.ones((2, 3), bool)}
    for draw in (masks.random_like, masks.shuffled):
        assert same(draw(none, 0), none) and same(draw(every, 0), every)
    assert same(masks.perturb(none, 1.0, 0), none) and same(masks.perturb(every, 0.0, 0), every)


@settings(max_examples=100, deadline=None)
@given(a=SOME, data=st.data())
def test_similarity_is_intersection_over_union(a: Named, data: st.DataObject) -> None:
    b = {name: data.draw(hnp.arrays(bool, mask.shape)) for name, mask in a.items()}
    flat_a, flat_b = (np.concatenate([named[name].ravel() for name in a]) for named in (a, b))
    union = int((flat_a | flat_b).sum())
    assert masks.similarity(a, b) == ((flat_a & flat_b).sum() / union if union else 1.0) == masks.similarity(b, a)
    assert masks.similarity(a, a) == 1.0
    assert masks.similarity(a, masks.complement(a)) == 0.0


def test_expected_similarity_is_the_mean_over_random_masks() -> None:
    """Monte Carlo, 300 pairs: within 5 standard errors. Negative control: the other expectation is farther off than that."""
    a, b = ticket(0.1), ticket(0.3)
    for by_layer, draw in ((False, masks.random_like), (True, masks.shuffled)):
        found = [masks.similarity(draw(a, 2 * seed), draw(b, 2 * seed + 1)) for seed in range(300)]
        error = 5 * float(np.std(found)) / 300**0.5
        assert abs(np.mean(found) - masks.expected_similarity(a, b, by_layer)) < error
        assert abs(np.mean(found) - masks.expected_similarity(a, b, not by_layer)) > error


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 1.0])
def test_expected_similarity_at_equal_density(density: float) -> None:
    mask = {"a": np.arange(1000) < 1000 * density, "b": np.arange(50) < 50 * density}
    for by_layer in (False, True):
        assert masks.expected_similarity(mask, mask, by_layer) == pytest.approx(density / (2 - density))


def test_layers_of_unlike_density_share_more_by_chance() -> None:
    mask = {"dense": np.ones(100, bool), "sparse": np.zeros(900, bool)}
    assert masks.expected_similarity(mask, mask, by_layer=True) == 1.0
    assert masks.expected_similarity(mask, mask) == pytest.approx(0.1 / 1.9)
    empty = {"a": np.zeros(3, bool)}
    assert masks.expected_similarity(empty, empty) == masks.expected_similarity(empty, empty, True) == masks.similarity({}, {}) == 1.0


@pytest.mark.parametrize("measure", [masks.similarity, masks.expected_similarity])
@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"a": np.ones((2, 3), bool)}, "b: only one of the two masks has this layer"),
        ({"a": np.ones((2, 3), bool), "b": np.ones(5, bool)}, r"b: shapes \(4,\) and \(5,\) differ"),
    ],
)
def test_masks_of_other_networks_are_one_clear_line(measure: Callable[..., float], other: Named, words: str) -> None:
    with pytest.raises(TicketError, match=words) as caught:
        measure({"a": np.ones((2, 3), bool), "b": np.ones(4, bool)}, other)
    assert "\n" not in str(caught.value)


def test_zero_kernels() -> None:
    """Of six 3x3 kernels one has a single weight left, one is full. For 1x1 and for matrices a kernel is a weight."""
    conv = np.zeros((3, 2, 3, 3), bool)
    conv[0, 1, 2, 2] = True
    conv[2, 0] = True
    pointwise = np.array([[True, False], [False, False]])
    named = {"conv": conv, "pointwise": pointwise.reshape(2, 2, 1, 1), "linear": pointwise, "depthwise": conv.reshape(6, 1, 3, 3)}
    assert masks.zero_kernels(named) == {"conv": (4, 6), "pointwise": (3, 4), "linear": (3, 4), "depthwise": (4, 6)}
    assert {name: masks.kernel_size(mask) for name, mask in named.items()} == {"conv": 9, "pointwise": 1, "linear": 1, "depthwise": 9}


@settings(max_examples=50, deadline=None)
@given(mask=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=4, max_side=4)))
def test_zero_kernels_against_a_loop(mask: np.ndarray) -> None:
    kernels = [mask[o, i].any() for o in range(mask.shape[0]) for i in range(mask.shape[1])]
    assert masks.zero_kernels({"w": mask})["w"] == (kernels.count(False), len(kernels))


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_senseless_fractions(fraction: float) -> None:
    with pytest.raises(TicketError, match="fraction to perturb: expected 0 <= f <= 1"):
        masks.perturb(ticket(), fraction, 0)
