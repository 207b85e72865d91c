"""Mask algebra against its definitions."""

from __future__ import annotations

import tracemalloc

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


def blocks_of(array: np.ndarray, block: tuple[int, int]) -> list[np.ndarray]:
    """The blocks of the matrix [M, K] of an array in C order, as views."""
    matrix, (r, c) = array.reshape(len(array), -1), block
    return [matrix[i : i + r, j : j + c] for i in range(0, matrix.shape[0], r) for j in range(0, matrix.shape[1], c)]


BLOCKS = st.tuples(st.integers(1, 6), st.integers(1, 20))


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(
        hnp.arrays(np.float32, hnp.array_shapes(max_dims=4, max_side=5), elements=st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])),
        min_size=1,
        max_size=4,
    ),
    block=BLOCKS,
    rates=st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.99)),
)
def test_blocks_go_whole_by_their_mean_magnitude(weights: list[np.ndarray], block: tuple[int, int], rates: tuple[float, float]) -> None:
    """Two rounds against the definition: blocks sorted by mean |w|, pruned while at least half of each is due. Many ties."""
    named = {str(i): w for i, w in enumerate(weights)}
    now = masks.full(named)
    for rate in rates:
        after = masks.global_magnitude(named, now, rate, block)
        assert masks.is_nested(after, now)
        before = [kept for mask in now.values() for kept in blocks_of(mask, block)]
        means = [np.abs(w, dtype=np.float64).mean() for weight in weights for w in blocks_of(weight, block)]
        due, gone = round(rate * masks.kept(now)), 0
        expected = [kept.copy() for kept in before]
        for i in sorted((i for i, kept in enumerate(before) if kept.any()), key=lambda i: means[i]):
            gone += before[i].size
            expected[i][:] = gone - before[i].size // 2 > due
        found = [kept for mask in after.values() for kept in blocks_of(mask, block)]
        assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
        assert abs(masks.kept(now) - masks.kept(after) - due) <= max(kept.size for kept in before) / 2
        now = after


def concatenated(weights: dict[str, np.ndarray], now: dict[str, np.ndarray], rate: float, block: tuple[int, int]) -> dict[str, np.ndarray]:
    """The oracle of the selection: all magnitudes in one array, and one partition of it."""
    layers = {name: masks._remaining(name, weights, mask, block) for name, mask in now.items()}
    pool = np.concatenate([np.repeat(means, sizes) for _, means, sizes in layers.values()])
    if not (drop := round(rate * pool.size)):
        return {name: mask.copy() for name, mask in now.items()}
    threshold = np.partition(pool, drop - 1)[drop - 1]
    ties, pruned = drop - int(np.count_nonzero(pool < threshold)), {}
    for name, (left, means, sizes) in layers.items():
        stays, equal = means > threshold, np.flatnonzero(means == threshold)
        stays[equal[np.cumsum(sizes[equal]) - sizes[equal] // 2 > ties]] = True
        ties -= int(sizes[equal].sum())
        left[left] = stays
        pruned[name] = now[name] & masks._weights_of(left, now[name].shape, block)
    return pruned


def values(dtype: type) -> st.SearchStrategy[float]:
    """Zeros, denormals, infinities, many ties, and neighbours that differ in the last bit or two."""
    one, bit = dtype(1.5), np.finfo(dtype).eps
    often = [0.0, -0.0, 1.5, -1.5, one + bit, one + 2 * bit, one - bit, np.finfo(dtype).smallest_subnormal, np.finfo(dtype).tiny, np.inf]
    return st.one_of(st.sampled_from([float(x) for x in often]), st.floats(-(2.0**100), 2.0**100, width=np.finfo(dtype).bits))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rates=st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.99)), block=st.one_of(st.just((1, 1)), BLOCKS))
def test_the_streamed_selection_is_the_partition(data: st.DataObject, rates: tuple[float, float], block: tuple[int, int]) -> None:
    """Bit for bit, in float32, float64 and both at once; the second round starts from masks with holes."""
    dtypes = data.draw(st.lists(st.sampled_from([np.float32, np.float64]), min_size=1, max_size=4))
    arrays = (hnp.arrays(dtype, hnp.array_shapes(max_dims=4, max_side=5), elements=values(dtype)) for dtype in dtypes)
    weights = {str(i): data.draw(array) for i, array in enumerate(arrays)}
    now = masks.full(weights)
    for rate in rates:
        after, expected = masks.global_magnitude(weights, now, rate, block), concatenated(weights, now, rate, block)
        assert list(after) == list(expected) and all(np.array_equal(after[name], expected[name]) for name in now)
        now = after


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_last_bit_counts(dtype: type) -> None:
    """Digits are 16 bits wide: a selection that left one out would take these for ties, and prune the first."""
    for power in range(np.finfo(dtype).nmant):
        larger = dtype(1) + np.finfo(dtype).eps * dtype(2**power)
        after = masks.global_magnitude({"w": np.array([larger, 1], dtype)}, {"w": np.ones(2, bool)}, 0.5)
        assert after["w"].tolist() == [True, False]


def test_infinities_go_last_and_two_of_them_by_index() -> None:
    weights = {"w": np.array([np.inf, -np.inf, 3e38, 0.0], np.float32)}
    kept = [masks.global_magnitude(weights, masks.full(weights), rate)["w"].tolist() for rate in (0.25, 0.5, 0.75)]
    assert kept == [[True, True, True, False], [True, True, False, False], [False, True, False, False]]


def test_memory_is_that_of_the_largest_layer() -> None:
    """Beyond the masks returned. Negative control: the partition takes more than all weights together."""
    weights = {str(i): np.random.default_rng(i).standard_normal((256, 256), np.float32) for i in range(40)}
    full, largest = masks.full(weights), weights["0"].nbytes

    def extra(prune: object) -> int:
        tracemalloc.start()
        result = prune(weights, full, 0.2, (1, 1))  # type: ignore[operator]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak - sum(mask.nbytes for mask in result.values())

    assert extra(masks.global_magnitude) < 12 * largest
    assert extra(concatenated) > 40 * largest


@pytest.mark.parametrize("block", [(4, 1), (16, 1), (1, 4), (1, 16), (1, 9), (3, 5), (1000000000, 1), (1, 1000000000)], ids=str)
def test_rounds_of_blocks_prune_to_the_levels(block: tuple[int, int]) -> None:
    """Each round is half a block off at most, and the next one starts from what is left: five halves in all at rate 0.2."""
    shapes = {"a": (64, 16, 3, 3), "b": (50, 7, 3, 3), "c": (128, 64)}
    weights = {name: np.random.default_rng(i).standard_normal(shape).astype(np.float32) for i, (name, shape) in enumerate(shapes.items())}
    now, total = masks.full(weights), sum(w.size for w in weights.values())
    largest = max(kept.size for mask in now.values() for kept in blocks_of(mask, block))
    for round in range(1, 9):
        after = masks.global_magnitude(weights, now, 0.2, block)
        assert abs(masks.sparsity(after) - (1 - 0.8**round)) * total <= 2.5 * (largest + 1)
        assert masks.is_nested(after, now) and all(k.all() or not k.any() for mask in after.values() for k in blocks_of(mask, block))
        now = after


def test_short_blocks_at_the_edge_are_not_pruned_for_being_short() -> None:
    """Rows 0 to 3 and row 4 make one block each; their sums are 4 and 2, their means 1 and 2."""
    weights = {"w": np.array([[1.0], [-1.0], [1.0], [1.0], [-2.0]], np.float32)}
    after = masks.global_magnitude(weights, masks.full(weights), 0.8, (4, 1))
    assert after["w"].ravel().tolist() == [False, False, False, False, True]


def test_one_large_weight_keeps_its_block_and_single_weights_are_another_mask() -> None:
    weights = {"w": np.array([[9.0, 3.0], [0.1, 3.0], [2.0, 0.1], [2.5, 0.1]], np.float32)}
    full = masks.full(weights)
    assert masks.global_magnitude(weights, full, 0.5, (2, 1))["w"].tolist() == [[True, True], [True, True], [False, False], [False, False]]
    assert masks.global_magnitude(weights, full, 0.5)["w"].tolist() == [[True, True], [False, True], [False, False], [True, False]]


def test_of_a_partly_pruned_block_the_rest_counts() -> None:
    weights = {"w": np.array([[5.0, 2.0], [9.0, 2.0]], np.float32)}
    before = {"w": np.array([[True, True], [False, True]])}
    after = masks.global_magnitude(weights, before, 0.6, (2, 1))
    assert after["w"].tolist() == [[True, False], [False, False]]


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
        (lambda: masks.global_magnitude(NAN, masks.full(NAN), 0.2, (4, 1)), "b: weights are NaN"),
        (lambda: masks.global_magnitude(layers(), masks.full(layers()), 0.2, (0, 1)), "block: expected 1x1 or more, got 0x1"),
        (lambda: masks.rounds_to(1.0, 0.2), "sparsity"),
    ],
)
def test_bad_input_is_one_clear_line(call: object, words: str) -> None:
    with pytest.raises(TicketError, match=words) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
