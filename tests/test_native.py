"""The C ABI refuses what it cannot take, in words, and obeys $TICKETKIT_ISA."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from ticketkit.errors import FormatError, KernelError
from ticketkit.formats import csr
from ticketkit.runtime import native
from ticketkit.runtime.geometry import ConvShape


def broken(**change: object) -> dict[str, np.ndarray]:
    weight = np.array([[1, 0, 2], [0, 3, 0]], np.float32)
    return csr.pack(weight) | {name: np.asarray(array) for name, array in change.items()}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"values": np.array([1, np.nan, 3], np.float32)}, "values"),
        ({"values": np.array([1, np.inf, 3], np.float32)}, "values"),
        ({"values": np.array([1, 2], np.float32)}, "col_indices"),
        ({"values": np.array([1, 2, 3], np.float64)}, "values"),
        ({"col_indices": np.array([0, 3, 1], np.int32)}, "col_indices"),
        ({"col_indices": np.array([0, -1, 1], np.int32)}, "col_indices"),
        ({"col_indices": np.array([2, 0, 1], np.int32)}, "col_indices"),
        ({"col_indices": np.array([0, 0, 1], np.int32)}, "col_indices"),
        ({"row_ptr": np.array([0, 4, 3], np.int64)}, "row_ptr"),
        ({"row_ptr": np.array([1, 2, 3], np.int64)}, "row_ptr"),
        ({"row_ptr": np.array([0, 2, 2**40], np.int64)}, "row_ptr"),
        ({"row_ptr": np.array([0, 3], np.int64)}, "row_ptr"),
    ],
)
def test_broken_csr_is_a_format_error_naming_the_field(change: dict[str, np.ndarray], field: str) -> None:
    with pytest.raises(FormatError, match=field):
        native.gemm(2, 3, broken(**change))
    with pytest.raises(FormatError, match=field):
        native.conv2d(ConvShape(3, 4, 4, 2, 1, 1), broken(**change))


@pytest.mark.parametrize(
    "shape",
    [
        ConvShape(3, 4, 4, 2, 5, 1),  # the window does not fit
        ConvShape(3, 0, 4, 2, 1, 1),
        ConvShape(3, 4, 4, 2, 1, 1, stride_h=0),
        ConvShape(3, 4, 4, 2, 1, 1, pad_left=-1),
        ConvShape(3, 4, 2**40, 2, 1, 1),
        ConvShape(3, 4, 4, 2, 1, 1, dilation_w=0),
    ],
)
def test_impossible_geometry_is_an_error(shape: ConvShape) -> None:
    with pytest.raises(KernelError, match="dimension"):
        native.conv2d(shape, broken())


@pytest.mark.parametrize("gaps", [[0, 1, 0], [6], [3, 3], [65535]])
def test_broken_gaps_are_a_format_error(gaps: list[int]) -> None:
    with pytest.raises(FormatError, match="gaps"):
        native.gaps_decode(2, 3, np.array(gaps, np.uint16))


def test_gaps_decode() -> None:
    col_indices, row_ptr = native.gaps_decode(3, 4, np.array([1, 2, 6], np.uint16))  # flat positions 1, 3, 9
    assert col_indices.tolist() == [1, 3, 1] and row_ptr.tolist() == [0, 2, 2, 3]


def test_absurd_claims_allocate_nothing() -> None:
    """An empty matrix of 2^17 rows and 2^24 columns would take 16 GiB of row pointers."""
    empty = {"values": np.zeros(0, np.float32), "col_indices": np.zeros(0, np.int32), "row_ptr": np.zeros(2**17 + 1, np.int64)}
    with pytest.raises(KernelError, match="beyond the offsets"):
        native.gemm(2**17, 2**24, empty)


def test_stored_values_count_the_zeros_of_half_full_blocks() -> None:
    weight = np.zeros((9, 5), np.float32)
    weight[[0, 3, 4, 8], [1, 1, 2, 4]] = 1.0
    assert native.stored_values(9, 5, csr.pack(weight), "csr") == 4
    assert native.stored_values(9, 5, csr.pack(weight), "bsr") == 12
    assert native.stored_values(9, 5, csr.pack(weight), "bsr1x4") == 16
    with pytest.raises(KernelError, match="packed format"):
        native.stored_values(9, 5, csr.pack(weight), "ell")


def test_wrong_arrays_are_an_error() -> None:
    layer = native.gemm(2, 3, broken())
    with pytest.raises(KernelError, match=r"x: expected float32 \[4, 3\]"):
        layer.run(np.zeros((4, 5), np.float32))
    with pytest.raises(KernelError, match="bias"):
        layer.run(np.zeros((4, 3), np.float32), np.zeros(3, np.float32))
    with pytest.raises(KernelError, match="writable"):
        layer.run(np.zeros((4, 3), np.float32), out=np.frombuffer(bytes(32), np.float32).reshape(4, 2))
    with pytest.raises(KernelError, match="bound"):
        layer.run(np.zeros((4, 3), np.float32), minimum=1.0, maximum=0.0)
    assert layer.run(np.zeros((0, 3), np.float32)).shape == (0, 2)
    with pytest.raises(KernelError, match="unknown ISA"):
        native.gemm(2, 3, broken(), isa="mmx")


@pytest.mark.parametrize("isa", [isa.name for isa in native.isas()] + ["mmx"])
def test_forced_isa(isa: str) -> None:
    """TICKETKIT_ISA is obeyed, and refused in one line where it cannot be."""
    code = "from ticketkit.runtime import native; print(native.active_isa().name)"
    forced = os.environ | {"TICKETKIT_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=forced, capture_output=True, text=True, check=False)
    if isa in {known.name for known in native.isas() if known.usable}:
        assert done.stdout.strip() == isa
    else:
        assert "KernelError" in done.stderr and "cannot run here" in done.stderr
