"""The native library through its C ABI (kernels/ticketkit.h). The only module that uses ctypes.

Everything here works on numpy arrays and raises KernelError (library, ISA, buffers) or FormatError (a weight that breaks its format).
"""

from __future__ import annotations

import contextlib
import ctypes as c
import functools
import importlib.metadata
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ticketkit.errors import FormatError, KernelError
from ticketkit.formats import Parts
from ticketkit.runtime.geometry import ConvShape, Cut, Tuning, Vectors

FloatArray = NDArray[np.float32]
ALIGNMENT = 64  # bytes, TK_ALIGNMENT
_FORMATS = {"csr": 0, "bsr": 1, "bsr1x4": 2}  # tk_format
_LAYOUTS = {"planes": 0, "csr": 1, "bsr": 2}  # tk_layout
_ACTIVATIONS = {"identity": 0, "leaky_relu": 1, "hard_swish": 2, "silu": 3}  # tk_activation
_FORMAT_STATUSES = range(3, 7)  # TK_BAD_VALUES … TK_BAD_GAPS: the weight is at fault, not the call
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


@dataclass(frozen=True)
class Isa:
    """One instruction set of this build; `usable` where processor and operating system support it, `lanes` float32 per vector."""

    index: int
    name: str
    usable: bool
    lanes: int


class _Csr(c.Structure):
    _fields_ = [("rows", c.c_int64), ("cols", c.c_int64), ("nnz", c.c_int64),
                ("values", c.c_void_p), ("col_indices", c.c_void_p), ("row_ptr", c.c_void_p)]  # fmt: skip


class _Conv2d(c.Structure):
    _fields_ = [(name, c.c_int64) for name in ConvShape.__dataclass_fields__]


class _Tuning(c.Structure):
    _fields_ = [(name, c.c_int32) for name in ("tile_vectors", "block_channels", "group_tiles")]


class _Vectors(c.Structure):
    _fields_ = [(name, c.c_int32) for name in Vectors.__dataclass_fields__]


class _Cut(c.Structure):
    _fields_ = [(name, c.c_int64) for name in Cut.__dataclass_fields__]


class _Args(c.Structure):
    _fields_ = [("batch", c.c_int64), ("x", c.c_void_p), ("bias", c.c_void_p), ("residual", c.c_void_p), ("y", c.c_void_p),
                ("min", c.c_float), ("max", c.c_float), ("activation", c.c_int32), ("slope", c.c_float)]  # fmt: skip


_SIGNATURES: dict[str, tuple[Any, Sequence[Any]]] = {
    "tk_status_text": (c.c_char_p, [c.c_int]),
    "tk_version": (c.c_char_p, []),
    "tk_isa_count": (c.c_int32, []),
    "tk_isa_name": (c.c_char_p, [c.c_int32]),
    "tk_isa_usable": (c.c_int32, [c.c_int32]),
    "tk_isa_lanes": (c.c_int32, [c.c_int32]),
    "tk_isa_active": (c.c_int, [c.POINTER(c.c_int32)]),
    "tk_kernel_count": (c.c_int32, []),
    "tk_kernel_name": (c.c_char_p, [c.c_int32]),
    "tk_csr_validate": (c.c_int, [c.POINTER(_Csr)]),
    "tk_gaps_decode": (c.c_int, [c.c_int64, c.c_int64, c.c_int64, c.c_void_p, c.c_void_p, c.c_void_p]),
    "tk_tile_pixels": (c.c_int64, [c.c_int, c.c_int64, c.c_int32]),
    "tk_stored_values": (c.c_int64, [c.POINTER(_Csr), c.c_int]),
    "tk_conv2d_packed_bytes": (
        c.c_int,
        [c.POINTER(_Conv2d), c.POINTER(_Csr), c.c_int, c.c_int32, c.POINTER(_Tuning), c.POINTER(c.c_size_t)],
    ),
    "tk_conv2d_pack": (c.c_int, [c.POINTER(_Conv2d), c.POINTER(_Csr), c.c_int, c.c_int32, c.POINTER(_Tuning), c.c_void_p, c.c_size_t]),
    "tk_gemm_packed_bytes": (c.c_int, [c.POINTER(_Csr), c.c_int, c.c_int32, c.POINTER(c.c_size_t)]),
    "tk_gemm_pack": (c.c_int, [c.POINTER(_Csr), c.c_int, c.c_int32, c.c_void_p, c.c_size_t]),
    "tk_isa_vectors": (c.c_int, [c.c_int32, c.POINTER(_Vectors)]),
    "tk_conv2d_cut": (c.c_int, [c.POINTER(_Conv2d), c.c_int64, c.c_int, c.POINTER(_Vectors), c.POINTER(_Tuning), c.POINTER(_Cut)]),
    "tk_gemm_cut": (c.c_int, [*[c.c_int64] * 3, c.c_int, c.POINTER(_Vectors), c.c_int64, c.POINTER(_Cut)]),
    "tk_parts": (c.c_int64, [c.c_void_p, c.c_int64]),
    "tk_workspace_bytes": (c.c_size_t, [c.c_void_p]),
    "tk_run": (c.c_int, [c.c_void_p, c.POINTER(_Args), c.c_int64, c.c_int64, c.c_void_p]),
}


def library_path() -> Path:
    """The shared library with the kernels and onnxruntime's custom operators; `$TICKETKIT_LIBRARY` overrides the installed one.

    Raises KernelError where there is none.
    """
    forced = os.environ.get("TICKETKIT_LIBRARY")
    path = Path(forced) if forced else _installed_library()
    if not path.is_file():
        source = "named by $TICKETKIT_LIBRARY" if forced else "of the installed package"
        raise KernelError(f"native library {source} not found at {path}; reinstall ticketkit (pip install .) so that kernels/ is built")
    return path


def _installed_library() -> Path:
    """Beside this file; for a checkout imported from its own folder, where pip put the package."""
    name = f"libticketkit{_SUFFIX}"
    beside = Path(__file__).with_name(name)
    if not beside.is_file():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return Path(str(importlib.metadata.distribution("ticketkit").locate_file(f"ticketkit/runtime/{name}")))
    return beside


@functools.cache
def _library() -> c.CDLL:
    path = library_path()
    try:
        library = c.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise KernelError(f"native library {path} cannot be loaded: {error}; reinstall ticketkit (pip install .)") from error
    return library


def _check(status: int, what: str) -> None:
    if status:
        text = f"{what}: {_library().tk_status_text(status).decode()}"
        raise FormatError(text) if status in _FORMAT_STATUSES else KernelError(text)


def version() -> str:
    """Version of the native library, which is that of the package it was built with."""
    return str(_library().tk_version().decode())


def isas() -> list[Isa]:
    """The instruction sets of this build, slowest first; "scalar" is always there and always usable."""
    tk = _library()
    return [Isa(i, tk.tk_isa_name(i).decode(), bool(tk.tk_isa_usable(i)), tk.tk_isa_lanes(i)) for i in range(tk.tk_isa_count())]


def active_isa() -> Isa:
    """The instruction set in use: the one `$TICKETKIT_ISA` names, else the fastest usable.

    Raises KernelError for a name that is unknown or cannot run here.
    """
    index = c.c_int32()
    if _library().tk_isa_active(c.byref(index)):
        usable = ", ".join(isa.name for isa in isas() if isa.usable)
        raise KernelError(f"TICKETKIT_ISA={os.environ.get('TICKETKIT_ISA')} is unknown or cannot run here; usable: {usable}")
    return isas()[index.value]


def kernels() -> list[str]:
    """Names of the rows of kernels.inc, such as "conv2d_csr_f32"; every ISA has every row."""
    tk = _library()
    return [tk.tk_kernel_name(i).decode() for i in range(tk.tk_kernel_count())]


def aligned(count_bytes: int) -> NDArray[np.uint8]:
    """Zeroed bytes that start on a TK_ALIGNMENT boundary and, where they are a multiple of it, end with their allocation."""
    raw = np.zeros(count_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count_bytes]


def _float_array(x: FloatArray | None, shape: tuple[int, ...], name: str) -> FloatArray | None:
    if x is not None and (x.shape != shape or x.dtype != np.float32 or not x.flags.c_contiguous):
        raise KernelError(f"{name}: expected float32 {list(shape)} in C order, got {x.dtype} {list(x.shape)}")
    return x


class Layer:
    """A packed sparse layer, ready to run. Build one with `conv2d` or `gemm`."""

    def __init__(self, packed: NDArray[np.uint8], in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
        self.packed, self.in_shape, self.out_shape = packed, in_shape, out_shape

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory one thread needs."""
        return int(_library().tk_workspace_bytes(self.packed.ctypes.data))

    def parts(self, batch: int) -> int:
        """Number of independent parts of a run over `batch` images or rows."""
        return int(_library().tk_parts(self.packed.ctypes.data, batch))

    def run(
        self,
        x: FloatArray,
        *operands: FloatArray | None,
        cuts: Sequence[int] = (),
        workspace: NDArray[np.uint8] | None = None,
        **finish: Any,
    ) -> FloatArray:
        """`prepare` with the other arguments, and the whole of it run at once; returns f32 [batch, *out_shape].

        `cuts` are the part numbers at which the work is split into separate calls (the result does not depend on them). `workspace` is
        scratch of `aligned(workspace_bytes)`, to be given where runs are timed: fresh memory costs page faults.
        """
        prepared = self.prepare(x, *operands, **finish)
        scratch = aligned(self.workspace_bytes) if workspace is None else workspace
        for begin, end in itertools.pairwise([0, *sorted(cuts), prepared.parts]):
            prepared(begin, end, scratch)
        return prepared.y

    def prepare(
        self,
        x: FloatArray,
        bias: FloatArray | None = None,
        residual: FloatArray | None = None,
        *,
        minimum: float = -np.inf,
        maximum: float = np.inf,
        activation: str = "identity",
        slope: float = 0.0,
        out: FloatArray | None = None,
    ) -> Run:
        """act(clip(op(x) + bias + residual)) for x f32 [batch, *in_shape], f32 [batch, *out_shape], ready to run: to be written to `out`
        if given, by callers that share its parts among threads, or at once by `run`.

        The activation is "identity", "leaky_relu" with that slope, "hard_swish" or "silu" (tk_activation in ticketkit.h). bias is f32
        [out_shape[0]], residual has the shape of the result; `out` may be the residual, but not overlap x. Raises KernelError for a wrong
        shape or dtype, an `out` that cannot be written, an unknown activation; running it for minimum > maximum and a slope that is not
        finite.
        """
        batch = x.shape[0] if x.ndim else 0
        y = np.empty((batch, *self.out_shape), np.float32) if out is None else out
        _float_array(x, (batch, *self.in_shape), "x")
        _float_array(bias, self.out_shape[:1], "bias")
        _float_array(residual, (batch, *self.out_shape), "residual")
        _float_array(y, (batch, *self.out_shape), "out")
        if not y.flags.writeable or np.may_share_memory(x, y):
            raise KernelError("out: expected a writable array that does not overlap x")
        finish = minimum, maximum, _named("activation", activation, _ACTIVATIONS), slope
        return Run(self, batch, x, bias, residual, y, finish)


class Run:
    """One run of a layer over checked arrays, `parts` independent parts; `y` is whole once each of them is done. From `Layer.prepare`."""

    def __init__(
        self, layer: Layer, batch: int, x: FloatArray, bias: FloatArray | None, residual: FloatArray | None, y: FloatArray,
        finish: tuple[float, float, int, float],
    ) -> None:  # fmt: skip
        self.y = y
        self.parts = layer.parts(batch) if batch else 0
        self._layer = layer
        self._arrays = x, bias, residual, y  # kept alive, for the addresses below
        self._args = _Args(batch, *(None if a is None else a.ctypes.data for a in self._arrays), *finish)

    def __call__(self, begin: int, end: int, workspace: NDArray[np.uint8]) -> None:
        """Compute the parts begin … end - 1, any ranges at the same time if each has a workspace of its own; KernelError."""
        if not self.parts:
            return
        if workspace.nbytes < self._layer.workspace_bytes:
            raise KernelError(f"workspace: expected {self._layer.workspace_bytes} bytes, got {workspace.nbytes}")
        _check(_library().tk_run(self._layer.packed.ctypes.data, c.byref(self._args), begin, end, workspace.ctypes.data), "run")


def _csr(rows: int, cols: int, parts: Parts) -> _Csr:
    """The matrix as the C ABI wants it; only what C cannot see is checked here: dtypes and lengths."""
    for name, dtype in (("values", np.float32), ("col_indices", np.int32), ("row_ptr", np.int64)):
        array = parts[name]
        if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
            raise FormatError(f"{name}: expected a one-dimensional {np.dtype(dtype)} array, got {array.dtype} {list(array.shape)}")
    values, col_indices, row_ptr = (parts[name] for name in ("values", "col_indices", "row_ptr"))
    if len(row_ptr) != rows + 1:
        raise FormatError(f"row_ptr: expected {rows + 1} entries for {rows} rows, got {len(row_ptr)}")
    if len(values) != len(col_indices):
        raise FormatError(f"col_indices: expected {len(values)} entries (values length), got {len(col_indices)}")
    return _Csr(rows, cols, len(values), values.ctypes.data, col_indices.ctypes.data, row_ptr.ctypes.data)


def _named(what: str, name: str, numbers: dict[str, int]) -> int:
    if name not in numbers:
        raise KernelError(f"unknown {what} {name!r}; expected one of {', '.join(numbers)}")
    return numbers[name]


def _isa_index(isa: str | None) -> int:
    if isa is None:
        return active_isa().index
    for known in isas():
        if known.name == isa:
            return known.index
    raise KernelError(f"unknown ISA {isa!r}; this build has {', '.join(i.name for i in isas())}")


def conv2d(shape: ConvShape, parts: Parts, *, format: str = "csr", isa: str | None = None, tuning: Tuning | None = None) -> Layer:
    """Packs a convolution whose weight [out_channels, in_channels / groups, kernel_h, kernel_w] is given as CSR arrays (formats/csr.py).

    `format` is the form it is packed in: "csr", or "bsr" for blocks of 4 output channels, whatever zeros those then hold, but for
    depthwise convolutions.
    `isa` defaults to the active one. Raises FormatError, KernelError.
    """
    tk, csr, geometry = _library(), _csr(shape.out_channels, shape.cols, parts), _geometry(shape)
    index, form, size = _isa_index(isa), _named("packed format", format, _FORMATS), c.c_size_t()
    cut = _Tuning(*astuple(tuning or Tuning()))
    _check(tk.tk_conv2d_packed_bytes(geometry, csr, form, index, cut, size), "conv2d")
    packed = aligned(size.value)
    _check(tk.tk_conv2d_pack(geometry, csr, form, index, cut, packed.ctypes.data, size.value), "conv2d")
    return Layer(packed, (shape.in_channels, shape.in_h, shape.in_w), (shape.out_channels, shape.out_h, shape.out_w))


def gemm(rows: int, cols: int, parts: Parts, *, format: str = "csr", isa: str | None = None) -> Layer:
    """Packs a fully connected layer whose weight [rows = out_features, cols = in_features] is given as CSR arrays (formats/csr.py).

    `format` as in `conv2d`, or "bsr1x4" for blocks of 4 columns of one row. Raises FormatError, KernelError.
    """
    tk, csr, index, size = _library(), _csr(rows, cols, parts), _isa_index(isa), c.c_size_t()
    form = _named("packed format", format, _FORMATS)
    _check(tk.tk_gemm_packed_bytes(csr, form, index, size), "gemm")
    packed = aligned(size.value)
    _check(tk.tk_gemm_pack(csr, form, index, packed.ctypes.data, size.value), "gemm")
    return Layer(packed, (cols,), (rows,))


def _geometry(shape: ConvShape) -> _Conv2d:
    layouts = [_named("layout", name, _LAYOUTS) for name in (shape.x_layout, shape.y_layout)]
    return _Conv2d(*astuple(shape)[: -len(layouts)], *layouts)


def vectors(isa: str | None = None) -> Vectors:
    """Those of an instruction set of this build, by default the active one. Raises KernelError."""
    found = _Vectors()
    _check(_library().tk_isa_vectors(_isa_index(isa), found), "vectors")
    return Vectors(*(getattr(found, name) for name in Vectors.__dataclass_fields__))


def cut_conv2d(shape: ConvShape, stored: int, format: str, on: Vectors, tuning: Tuning | None = None) -> Cut:
    """How `conv2d` would cut up one image, of a weight of so many stored values, on such vectors, of this processor or of another.

    Raises KernelError for a geometry that packing refuses, and for vectors beyond what `tk_vectors` allows.
    """
    cut, given, form = _Cut(), _Tuning(*astuple(tuning or Tuning())), _named("packed format", format, _FORMATS)
    _check(_library().tk_conv2d_cut(_geometry(shape), stored, form, _Vectors(*astuple(on)), given, cut), "cut")
    return Cut(*(getattr(cut, name) for name in Cut.__dataclass_fields__))


def cut_gemm(rows: int, cols: int, nnz: int, format: str, on: Vectors, batch: int) -> Cut:
    """How `gemm` would cut up a product of so many rows of input, as `cut_conv2d`. Raises KernelError."""
    cut, form = _Cut(), _named("packed format", format, _FORMATS)
    _check(_library().tk_gemm_cut(rows, cols, nnz, form, _Vectors(*astuple(on)), batch, cut), "cut")
    return Cut(*(getattr(cut, name) for name in Cut.__dataclass_fields__))


def stored_values(rows: int, cols: int, parts: Parts, format: str) -> int:
    """Values the packed form holds, zeros of half-full blocks included: nnz for "csr". Raises FormatError, KernelError."""
    csr = _csr(rows, cols, parts)
    _check(_library().tk_csr_validate(csr), "weight")
    return int(_library().tk_stored_values(csr, _named("packed format", format, _FORMATS)))


def tile_pixels(layout: str, pixels: int, isa: str | None = None) -> int:
    """Pixels of a tile of that layout (tk_layout) in an image of so many; 0 where it is that of planes. Raises KernelError."""
    return int(_library().tk_tile_pixels(_named("layout", layout, _LAYOUTS), pixels, _isa_index(isa)))


def gaps_decode(rows: int, cols: int, gaps: NDArray[np.uint16]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """col_indices i32 [nnz] and row_ptr i64 [rows + 1] of gap-coded positions u16 [nnz]. Raises FormatError."""
    if gaps.dtype != np.uint16 or gaps.ndim != 1:
        raise FormatError(f"gaps: expected a one-dimensional uint16 array, got {gaps.dtype} {list(gaps.shape)}")
    gaps = np.ascontiguousarray(gaps)
    if not 1 <= rows < 2**31:
        raise FormatError(f"rows: expected 1 … 2^31 - 1, got {rows}")
    col_indices, row_ptr = np.empty(len(gaps), np.int32), np.empty(rows + 1, np.int64)
    status = _library().tk_gaps_decode(rows, cols, len(gaps), gaps.ctypes.data, col_indices.ctypes.data, row_ptr.ctypes.data)
    _check(status, "gaps")
    return col_indices, row_ptr
