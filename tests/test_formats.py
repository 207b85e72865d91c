"""Every weight format of the folder: exact round trips, exact sizes, and an error that names the field for whatever breaks one."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from graphs import pruned
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ticketkit import formats
from ticketkit.errors import FormatError
from ticketkit.formats import bsr

SHAPES = [(1, 1), (1, 7), (7, 1), (3, 5), (4, 3, 1, 1), (5, 2, 3, 3), (2, 1, 5, 3), (16, 8, 3, 3), (3, 4, 2)]
SPARSITIES = [0.0, 0.5, 0.9, 1.0]


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_round_trip_is_exact(name: str, shape: tuple[int, ...], sparsity: float) -> None:
    chosen, weight = formats.get(name), pruned(shape, sparsity)
    parts = chosen.pack(weight)
    assert tuple(parts) == chosen.PARTS
    chosen.validate(parts, shape)
    back = chosen.unpack(parts, shape)
    assert back.dtype == np.float32 and back.shape == shape
    np.testing.assert_array_equal(back, weight)


@pytest.mark.parametrize("name", [name for name in formats.names() if name != "bsr"])  # whose size is that of full blocks, below
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_nbytes_are_those_of_the_arrays(name: str, shape: tuple[int, ...], sparsity: float) -> None:
    chosen, weight = formats.get(name), pruned(shape, sparsity)
    assert sum(a.nbytes for a in chosen.pack(weight).values()) == chosen.nbytes(shape, int(np.count_nonzero(weight)))


@pytest.mark.parametrize("name", formats.names())
@given(weight=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=6),
                         elements=st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-45, 3e38])))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_round_trip_of_anything(name: str, weight: formats.Array) -> None:
    chosen = formats.get(name)
    np.testing.assert_array_equal(chosen.unpack(chosen.pack(weight), weight.shape), weight)


@pytest.mark.parametrize("name", formats.names())
def test_packing_does_not_alias_or_change_the_weight(name: str) -> None:
    weight = pruned((4, 3, 3, 3), 0.5)
    before = weight.copy()
    back = formats.get(name).unpack(formats.get(name).pack(weight), weight.shape)
    back[:] = 7
    np.testing.assert_array_equal(weight, before)


def test_csr_is_scipys() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    weight = pruned((6, 4, 3, 3), 0.8)
    parts, theirs = formats.get("csr").pack(weight), sparse.csr_array(weight.reshape(6, 36))
    np.testing.assert_array_equal(parts["values"], theirs.data)
    np.testing.assert_array_equal(parts["col_indices"], theirs.indices)
    np.testing.assert_array_equal(parts["row_ptr"], theirs.indptr)


def test_gaps_by_hand() -> None:
    """Fillers: positions 3, 65539 (65536 on, one filler) and 200000 (134461 on, two fillers); the first may lie far, too."""
    weight = np.zeros((2, 150000), np.float32)
    weight.reshape(-1)[[3, 65539, 200000]] = [1, 2, 3]
    parts = formats.get("gaps").pack(weight)
    assert parts["gaps"].tolist() == [3, 65535, 1, 65535, 65535, 3391]
    assert parts["values"].tolist() == [1, 0, 2, 0, 0, 3]
    np.testing.assert_array_equal(formats.get("gaps").unpack(parts, weight.shape), weight)
    late = np.zeros((1, 70001), np.float32)
    late[0, 70000] = 5
    parts = formats.get("gaps").pack(late)
    assert (parts["gaps"].tolist(), parts["values"].tolist()) == ([65535, 4465], [0, 5])
    np.testing.assert_array_equal(formats.get("gaps").unpack(parts, late.shape), late)


@pytest.mark.parametrize("gap", [65534, 65535, 65536, 131070, 131071])
def test_gaps_at_the_edge_of_uint16(gap: int) -> None:
    weight = np.zeros((1, gap + 3), np.float32)
    weight[0, [1, 1 + gap]] = [4, 6]
    parts = formats.get("gaps").pack(weight)
    assert len(parts["gaps"]) == 2 + (gap - 1) // 65535
    np.testing.assert_array_equal(formats.get("gaps").unpack(parts, weight.shape), weight)


BLOCKS = [*bsr.BLOCKS, (1, 1), (2, 3), (3, 2), (100, 1), (1, 100), (100, 100)]


def blocked(shape: tuple[int, ...], block: tuple[int, int], sparsity: float, seed: int = 0) -> formats.Array:
    """f32 weights whose zeros are whole blocks of the matrix, that fraction of the blocks (rounded)."""
    (rows, cols), (r, c) = formats.matrix(shape), block
    kept = pruned((-(-rows // r), -(-cols // c)), sparsity, seed) != 0
    weight = pruned((rows, cols), 0.0, seed + 1) * np.kron(kept, np.ones(block, bool))[:rows, :cols]
    return weight.astype(np.float32).reshape(shape)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_bsr_round_trip_of_every_block(block: tuple[int, int], shape: tuple[int, ...], sparsity: float) -> None:
    """Blocks that fit, that stick out, and that are larger than the matrix; filled by chance or whole."""
    for weight in (pruned(shape, sparsity), blocked(shape, block, sparsity)):
        parts = bsr.pack(weight, block)
        assert parts["block"].tolist() == list(block)
        np.testing.assert_array_equal(bsr.unpack(parts, shape), weight)
        stored = parts["values"].size
        assert bsr.fill(weight, block) == (np.count_nonzero(weight) / stored if stored else 1.0)


@given(weight=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=6),
                         elements=st.sampled_from([0.0, 0.0, -0.0, 1.0, 3e38])),
       block=st.tuples(st.integers(1, 8), st.integers(1, 8)))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_bsr_stores_just_the_blocks_with_a_non_zero(weight: formats.Array, block: tuple[int, int]) -> None:
    """Against the definition, block by block."""
    (rows, cols), (r, c) = formats.matrix(weight.shape), block
    padded = np.zeros((rows + r, cols + c), np.float32)
    padded[:rows, :cols] = weight.reshape(rows, cols)
    tiles = {(i, j): padded[i * r : (i + 1) * r, j * c : (j + 1) * c] for i in range(-(-rows // r)) for j in range(-(-cols // c))}
    expected = {at: tile for at, tile in tiles.items() if tile.any()}
    parts = bsr.pack(weight, block)
    assert parts["col_indices"].tolist() == [j for _, j in expected]
    assert np.diff(parts["row_ptr"]).tolist() == [sum(i == row for i, _ in expected) for row in range(-(-rows // r))]
    np.testing.assert_array_equal(parts["values"], np.concatenate([np.zeros(0), *(tile.ravel() for tile in expected.values())]))
    np.testing.assert_array_equal(bsr.unpack(parts, weight.shape), weight)


def test_bsr_is_scipys() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    weight = blocked((8, 4, 3, 3), (4, 2), 0.7)
    parts, theirs = bsr.pack(weight, (4, 2)), sparse.csr_array(weight.reshape(8, 36)).tobsr((4, 2))
    theirs.sort_indices()
    np.testing.assert_array_equal(parts["values"], theirs.data.ravel())
    np.testing.assert_array_equal(parts["col_indices"], theirs.indices)
    np.testing.assert_array_equal(parts["row_ptr"], theirs.indptr)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_bsr_nbytes_are_those_of_full_default_blocks(sparsity: float) -> None:
    for shape in ((4, 7), (16, 8, 3, 3)):
        weight = blocked(shape, bsr.DEFAULT, sparsity)
        stored = sum(a.nbytes for a in bsr.pack(weight, bsr.DEFAULT).values())
        assert stored == bsr.nbytes(shape, int(np.count_nonzero(weight)))


@pytest.mark.parametrize("block", bsr.BLOCKS, ids=str)
def test_bsr_finds_the_block_of_a_pruned_weight(block: tuple[int, int]) -> None:
    weight = blocked((32, 8, 3, 4), block, 0.8)
    assert bsr.fill(weight, block) == 1.0 and bsr.detect(weight) == block
    assert bsr.pack(weight)["block"].tolist() == list(block)
    scattered = weight.copy()
    scattered[pruned(weight.shape, 0.12, seed=5) == 0] = 0  # 88 % of each block left, by and large
    assert bsr.detect(scattered) is None and bsr.detect(scattered, least=0.8) == block


def test_bsr_of_weights_without_blocks() -> None:
    assert bsr.detect(pruned((32, 32), 0.9)) is None and bsr.pack(pruned((32, 32), 0.9))["block"].tolist() == list(bsr.DEFAULT)
    assert bsr.fill(np.zeros((3, 5), np.float32), (4, 1)) == 1.0
    assert bsr.fill(np.ones((3, 5), np.float32), (4, 1)) == 0.75, "what sticks out is stored, too"


@pytest.mark.parametrize("block", [(0, 1), (1, -4), (4, 65536)], ids=str)
def test_bsr_blocks_that_are_none(block: tuple[int, int]) -> None:
    for use in (bsr.pack, bsr.fill):
        with pytest.raises(FormatError, match="block: expected 2 numbers"):
            use(pruned(SHAPE, 0.6), block)


def test_bsr_memory_follows_the_shape_not_the_block() -> None:
    """No block stored, each claimed to hold 65535 x 65535 weights: valid, and cheap to unpack."""
    parts = {**bsr.pack(np.zeros((3, 5), np.float32), (4, 8)), "block": np.array([65535, 65535], np.int32)}
    tracemalloc.start()
    try:
        assert not bsr.unpack(parts, (3, 5)).any()
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


Parts = dict[str, formats.Array]
SHAPE = (5, 2, 3, 3)


def put(part: str, at: int, value: float) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts[part][at] = value

    return change


def swap(part: str, make: Callable[[formats.Array], formats.Array]) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts[part] = make(parts[part])

    return change


FLOATS = ("bsr", "csr", "dense", "gaps")
BROKEN = [
    *[(name, swap("values", lambda a: a[:-1]), "values length|values: expected") for name in FLOATS],
    *[(name, put("values", 0, value), "values: expected finite") for name in FLOATS for value in (np.nan, np.inf)],
    *[(name, swap("values", lambda a: a.astype(np.float64)), "values: expected float32") for name in FLOATS],
    *[(name, swap("values", lambda a: a[None]), "values: expected a 1-D") for name in FLOATS],
    *[(name, lambda parts: parts.pop("values"), "values: missing") for name in FLOATS],
    ("csr", put("col_indices", 3, 18), "col_indices: expected columns in"),
    ("csr", put("col_indices", 3, -1), "col_indices: expected columns in"),
    ("csr", put("col_indices", 0, 17), "col_indices: expected ascending"),
    ("csr", swap("col_indices", lambda a: a.astype(np.int64)), "col_indices: expected int32"),
    ("csr", swap("col_indices", lambda a: a[1:]), "col_indices: expected .* entries"),
    ("csr", put("row_ptr", 0, 1), "row_ptr: expected to run from 0"),
    ("csr", put("row_ptr", -1, 10**12), "row_ptr: expected to run from 0"),
    ("csr", put("row_ptr", 2, 10**12), "row_ptr: expected to never decrease"),
    ("csr", put("row_ptr", 2, -4), "row_ptr: expected to never decrease"),
    ("csr", swap("row_ptr", lambda a: a[:-1]), "row_ptr: expected 6 entries"),
    # SHAPE is 5 x 18; `pack` finds no blocks in it and takes 4x1: 2 block rows, the second with 3 rows of padding
    ("bsr", put("values", -1, 1.0), "values: expected zeros where blocks of 4x1 stick out of 5x18"),
    ("bsr", lambda parts: parts.update(bsr.pack(np.ones((5, 20), np.float32), (5, 4))), "values: expected zeros .* 5x4 stick out"),
    ("bsr", swap("values", lambda a: a[4:]), "values: expected .* blocks of 4x1"),
    ("bsr", put("col_indices", 3, 18), "col_indices: expected columns in .*, counted in blocks of 4x1"),
    ("bsr", put("col_indices", 3, -1), "col_indices: expected columns in"),
    ("bsr", put("col_indices", 0, 17), "col_indices: expected ascending"),
    ("bsr", swap("col_indices", lambda a: a.astype(np.int64)), "col_indices: expected int32"),
    ("bsr", swap("col_indices", lambda a: a[None]), "col_indices: expected a 1-D"),
    ("bsr", swap("col_indices", lambda a: a[1:]), "values: expected .* blocks"),
    ("bsr", lambda parts: parts.pop("col_indices"), "col_indices: missing"),
    ("bsr", put("row_ptr", 0, 1), "row_ptr: expected to run from 0"),
    ("bsr", put("row_ptr", -1, 10**12), "row_ptr: expected to run from 0"),
    ("bsr", put("row_ptr", 1, 10**12), "row_ptr: expected to never decrease"),
    ("bsr", put("row_ptr", 1, -4), "row_ptr: expected to never decrease"),
    ("bsr", swap("row_ptr", lambda a: a[:-1]), "row_ptr: expected 3 entries"),
    ("bsr", swap("row_ptr", lambda a: a.astype(np.int32)), "row_ptr: expected int64"),
    ("bsr", lambda parts: parts.pop("row_ptr"), "row_ptr: missing"),
    ("bsr", put("block", 0, 0), "block: expected 2 numbers"),
    ("bsr", put("block", 1, -1), "block: expected 2 numbers"),
    ("bsr", put("block", 0, 2**31 - 1), "block: expected 2 numbers"),
    ("bsr", put("block", 0, 8), "values: expected .* blocks of 8x1"),
    ("bsr", swap("block", lambda a: a[::-1].copy()), "row_ptr: expected 6 entries"),
    ("bsr", swap("block", lambda a: a[:1]), "block: expected 2 numbers"),
    ("bsr", swap("block", lambda a: np.tile(a, 1000)), "block: expected 2 numbers"),
    ("bsr", swap("block", lambda a: a.astype(np.int64)), "block: expected int32"),
    ("bsr", lambda parts: parts.pop("block"), "block: missing"),
    ("gaps", swap("gaps", lambda a: a[:-1]), "gaps: expected .* entries"),
    ("gaps", swap("gaps", lambda a: a.astype(np.int64)), "gaps: expected uint16"),
    ("gaps", put("gaps", 1, 0), "gaps: expected positive gaps"),
    ("gaps", put("gaps", 4, 65535), "gaps: expected positions below 90"),
    ("gaps", lambda parts: parts.update({k: v[:0] for k, v in parts.items()}), "values: expected at least one"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN, ids=[f"{n}-{m[:30]}-{i}" for i, (n, _, m) in enumerate(BROKEN)])
def test_a_broken_weight_names_its_field(name: str, change: Callable[[Parts], None], message: str) -> None:
    parts = {key: array.copy() for key, array in formats.get(name).pack(pruned(SHAPE, 0.6)).items()}
    formats.get(name).validate(parts, SHAPE)
    change(parts)
    for use in (formats.get(name).validate, formats.get(name).unpack):
        with pytest.raises(FormatError, match=message):
            use(parts, SHAPE)


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (4, -1, 3, 3), (2, 0)], ids=str)
def test_impossible_shapes(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match="weight_shape"):
        formats.get(name).validate(formats.get(name).pack(pruned(SHAPE, 0.6)), shape)


@pytest.mark.parametrize("name", formats.names())
def test_a_claim_of_a_billion_weights_allocates_nothing(name: str) -> None:
    parts, claimed = formats.get(name).pack(pruned(SHAPE, 0.6)), (1000, 1000, 31, 33)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"weight_shape: .* claims 1023000000 weights, expected fewer than 536870912"):
            formats.get(name).validate(parts, claimed)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_the_folder_is_the_registry() -> None:
    assert {"dense", "csr", "bsr"} <= set(formats.names("compute"))
    assert set(formats.names("compute")) | set(formats.names("storage")) == set(formats.names())
    with pytest.raises(FormatError, match=r"unknown weight format 'ell'.*csr"):
        formats.get("ell")
