"""Patterns of a weight as the GPU kernels take them, which need no GPU."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, pruned

torch = pytest.importorskip("torch")

from ticketkit.errors import FormatError, KernelError  # noqa: E402
from ticketkit.formats import gaps as gap_coding  # noqa: E402
from ticketkit.runtime import gpu, torch_gpu  # noqa: E402
from ticketkit.runtime.gpu import Weight  # noqa: E402


def test_a_pattern_is_the_weight_again() -> None:
    """Rows hold each entry once, longest rows first; the transposed lists hold the same entries."""
    shape = (37, 21, 3, 3)
    weight = pruned(shape, 0.85)
    parts = gap_coding.pack(weight)
    values, steps = torch.from_numpy(parts["values"]), torch.from_numpy(parts["gaps"])
    for side in (None, 16, 32):
        pattern = Weight.of(steps, shape, side)
        step = side or 1
        stored = pattern.store(values, torch.float32).reshape(-1, step, step)
        for rows, swapped in ((pattern.rows, False), (pattern.transposed, True)):
            found = np.zeros((-(-37 // step) * step, -(-21 // step) * step, 9), np.float32)
            lengths = rows.row_ptr.diff()
            assert (lengths[rows.order.long()].diff() <= 0).all()
            for row in range(len(lengths)):
                for e in range(int(rows.row_ptr[row]), int(rows.row_ptr[row + 1])):
                    column = int(rows.columns[e])
                    tap, channel = column >> 20, column & (2**20 - 1)
                    m, c = (channel, row) if swapped else (row, channel)
                    found[m * step : (m + 1) * step, c * step : (c + 1) * step, tap] += stored[int(rows.at[e])].numpy()
            np.testing.assert_array_equal(found[:37, :21].reshape(shape), weight)
        assert torch.equal(pattern.gather(pattern.store(values, torch.float32)), values)


@pytest.mark.parametrize("side", [16, 32, 64])
def test_blocks_are_found_by_their_fill(side: int) -> None:
    blocks = np.random.default_rng(0).random((128 // side, 128 // side, 3, 3)) < 0.3
    blocks[0, 0, 0, 0], blocks[0, 1, 0, 0] = True, False  # no larger blocks by chance
    weight = normal(128, 128, 3, 3) * np.kron(blocks.transpose(2, 3, 0, 1), np.ones((side, side))).transpose(2, 3, 0, 1)
    steps = torch.from_numpy(gap_coding.pack(weight.astype(np.float32))["gaps"])
    assert gpu.fill(steps, weight.shape, side) == 1.0
    assert torch_gpu.own_side(steps, weight.shape) == side
    scattered = torch.from_numpy(gap_coding.pack(pruned((64, 64, 1, 1), 0.9))["gaps"])
    assert torch_gpu.own_side(scattered, (64, 64, 1, 1)) == 0


@pytest.mark.parametrize(
    ("steps", "shape", "error", "message"),
    [
        ([0, 1, 0], [4, 4], FormatError, "positive gaps"),
        ([0, 20], [4, 4], FormatError, "positions below 16"),
        ([], [4, 4], FormatError, "at least one entry"),
        ([0], [2, 2**20], KernelError, "fewer than"),
        ([0], [2**20, 2], KernelError, "fewer than"),
        ([0], [2, 2, 64, 64], KernelError, "fewer than"),
        ([0], [2, 2, 2], KernelError, r"\[M, K\] or \[M, C, kh, kw\]"),
        ([0], [2, 0], FormatError, "positive dimensions"),
    ],
    ids=str,
)
def test_wrong_weights_are_named(steps: list[int], shape: list[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Weight.of(torch.tensor(steps, dtype=torch.uint16), shape, None)
    with pytest.raises(FormatError, match="expected uint16"):
        Weight.of(torch.tensor([0.0]), [4, 4], None)
