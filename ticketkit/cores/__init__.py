"""Processor cores, each a JSON file of this folder: what `ticketkit estimate --device NAME` predicts from, without the device.

A core is a dozen numbers (`Core`): what starts in a cycle, latencies, caches and their bandwidths, and the clock. They come from the
vendors' optimisation guides and from published measurements, named in the file's `sources`; what no source says is marked in `assumed`.
Nothing here was measured on the cores but `zen3`, which is the processor of benchmarks/results and serves as the self-check. Predictions
(`ticketkit.cores.predict`) are *simulated* everywhere they are shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from ticketkit.errors import TicketkitError
from ticketkit.runtime.geometry import Vectors

FOLDER = Path(__file__).parent
GHZ = 0.1, 6.0  # what a clock may be
LABEL = "simulated"


@dataclass(frozen=True)
class Cache:
    """One level: its size, the part of it one core gets where it is shared, and what it hands to the level above in a cycle."""

    bytes: int
    bytes_per_cycle: float


@dataclass(frozen=True)
class Core:
    """What of a core the predictions use. Rates are per cycle.

    Attributes:
        name: of its file; processor: where it is found, for people.
        isa: the instruction set our kernels would run in; vectors: what of it decides how layers are cut up.
        weights_by_lane: weights of a register that multiply-adds take by lane; 1: each is broadcast from memory.
        pairs: one instruction loads two vectors; fused_loads: a multiply-add loads an operand.
        ghz: clock under load; in_order: whether it issues in program order.
        instructions, fma, loads, stores: that can start, of whole vectors the last three (0.5: one in two cycles).
        fma_latency, mispredict: cycles until a result can be added to, and lost at a branch that was guessed wrong.
        line: bytes of a cache line; split: load slots lost where a load crosses its end.
        sustained: share of these rates that long loops reach in practice.
        caches: L1 first; memory_gb: GB/s that one core gets from memory.
        dense_tile: rows x vectors of the register tile of a dense engine; dense_sustained: as `sustained`, of its loops.
        call: cycles an operator of a runtime costs beside its kernel.
        sources, assumed: where the numbers are from, and which are not from there.
    """

    name: str
    processor: str
    isa: str
    vectors: Vectors
    weights_by_lane: int
    pairs: bool
    fused_loads: bool
    ghz: float
    in_order: bool
    instructions: float
    fma: float
    loads: float
    stores: float
    fma_latency: float
    mispredict: float
    line: int
    split: float
    sustained: float
    caches: tuple[Cache, ...]
    memory_gb: float
    dense_tile: tuple[int, int]
    dense_sustained: float
    call: float
    sources: tuple[str, ...]
    assumed: str

    @property
    def label(self) -> str:
        """For people: name and clock."""
        return f"{self.name} at {self.ghz:g} GHz"

    @property
    def peak_gflops(self) -> float:
        """2 FLOPs for each multiply-add that can start."""
        return 2 * self.fma * self.vectors.lanes * self.ghz

    def us(self, cycles: float) -> float:
        """µs of so many cycles."""
        return cycles / self.ghz / 1e3


def names() -> list[str]:
    """Names of the cores, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def get(text: str) -> Core:
    """The core called NAME, or NAME@GHZ for another clock than its file says.

    Raises:
        TicketkitError: no such core, or a clock that is none; names those there are.
    """
    name, at, ghz = text.partition("@")
    if name not in names():
        known = ", ".join(names())
        raise TicketkitError(f"device: expected a core, one of {known}, or one with its clock such as cortex-a55@2.0, got {text!r}")
    core = _load(name)
    if not at:
        return core
    try:
        clock = float(ghz)
    except ValueError:
        clock = math.nan
    if not GHZ[0] <= clock <= GHZ[1]:
        expected = f"a clock of {GHZ[0]:g} to {GHZ[1]:g} GHz behind {name}@, such as {name}@{core.ghz:g}"
        raise TicketkitError(f"device: expected {expected}, got {ghz!r}")
    return replace(core, ghz=clock)


@cache
def _load(name: str) -> Core:
    return read(FOLDER / f"{name}.json")


def read(path: Path) -> Core:
    """The core that a file describes, its name the file's.

    Raises:
        TicketkitError: the file cannot be read, is not JSON, lacks a field, has one too many, or one of another type or out of range.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TicketkitError(f"{path}: expected the JSON of a core ({error}); copy the form of {FOLDER / 'zen3.json'}") from None
    try:
        return _core(path.stem, data)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise TicketkitError(f"{path}: {error}; copy the form of {FOLDER / 'zen3.json'}") from None


RANGES: Mapping[str, tuple[float, float]] = {
    "ghz": GHZ, "instructions": (1, 16), "fma": (0.25, 8), "loads": (0.25, 8), "stores": (0.25, 8), "fma_latency": (1, 32),
    "mispredict": (0, 64), "split": (0, 32), "sustained": (0.1, 1), "memory_gb": (0.1, 1000), "dense_sustained": (0.1, 1),
    "call": (0, 1e6), "weights_by_lane": (1, 8), "line": (16, 1024),
    "lanes": (1, 16), "registers": (8, 32), "tile": (1, 20), "good_tile": (1, 20), "block_tile": (1, 20), "reads_planes": (0, 1),
    "value_bytes": (2, 4), "bytes": (1024, 2**31), "bytes_per_cycle": (0.5, 512),
}  # fmt: skip
"""Field -> smallest and largest value."""
FLAGS = ("pairs", "fused_loads", "in_order")


def _core(name: str, data: Any) -> Core:
    """Raises TypeError, ValueError, KeyError, OverflowError with what was expected."""
    _fields("a core", data, {f.name for f in fields(Core)} - {"name"})
    found: dict[str, Any] = {}
    for field in fields(Core):
        value = data.get(field.name)
        if field.name == "name":
            value = name
        elif field.name == "vectors":
            _fields("vectors", value, {f.name for f in fields(Vectors)})
            value = Vectors(**{key: int(_number(key, number)) for key, number in value.items()})
            if value.good_tile > value.tile:
                raise ValueError(f"good_tile: expected at most tile {value.tile}, got {value.good_tile}")
        elif field.name == "caches":
            value = tuple(_cache(level) for level in _list("caches", value, dict))
            if not value or list(value) != sorted(value, key=lambda level: level.bytes):
                raise ValueError("caches: expected one level or more, each larger than the one before")
        elif field.name == "dense_tile":
            rows, vectors = _list("dense_tile", value, int)
            if not (1 <= rows <= 32 and 1 <= vectors <= 32):
                raise ValueError(f"dense_tile: expected rows and vectors of 1 to 32, got {[rows, vectors]}")
            value = rows, vectors
        elif field.name == "sources":
            value = tuple(_list("sources", value, str))
        elif field.name in RANGES:
            value = _number(field.name, value)
            value = int(value) if field.name in ("weights_by_lane", "line") else value
        elif not isinstance(value, bool if field.name in FLAGS else str):
            raise TypeError(f"{field.name}: expected {'true or false' if field.name in FLAGS else 'words'}, got {repr(value)[:40]}")
        found[field.name] = value
    return Core(**found)


def _cache(data: Any) -> Cache:
    _fields("a cache", data, {"bytes", "bytes_per_cycle"})
    return Cache(int(_number("bytes", data["bytes"])), _number("bytes_per_cycle", data["bytes_per_cycle"]))


def _fields(what: str, data: Any, expected: set[str]) -> None:
    if not isinstance(data, dict):
        raise TypeError(f"{what}: expected an object, got {type(data).__name__}")
    if data.keys() != expected:
        missing, more = sorted(expected - data.keys()), sorted(data.keys() - expected)
        raise ValueError(f"{what}: " + "; ".join([*(f"{key} is missing" for key in missing), *(f"{key} is unknown" for key in more)]))


def _number(name: str, value: Any) -> float:
    low, high = RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name}: expected a number of {low:g} to {high:g}, got {repr(value)[:40]}")
    return float(value)


def _list(name: str, value: Any, kind: type) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise TypeError(f"{name}: expected a list of {kind.__name__}, got {repr(value)[:40]}")
    return value
