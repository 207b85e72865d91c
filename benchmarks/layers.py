"""Layer by layer: every distinct layer shape of seven networks at several sparsities, one thread, against dense onnxruntime.

    python benchmarks/layers.py                                                  the whole table, about a quarter of an hour
    python benchmarks/layers.py --network resnet50 --sparsity 80 90 --layer k3 --rounds 5
    python benchmarks/layers.py --resume                                         go on where a run of this commit was stopped
    python benchmarks/layers.py --table                                          write layers.csv anew (needs the extra `find`)

Rows are appended to results/layers.jsonl, layer by layer; Ctrl-C keeps them. The protocol is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import product
from math import prod
from pathlib import Path
from typing import TypeAlias

import command
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table
from shapes import NETWORKS, TABLE, Conv, Entry, Shape, read, write

from ticketkit import __version__, formats, masks
from ticketkit.bench import machine, rows, table, worker
from ticketkit.errors import DataError, TicketkitError
from ticketkit.formats import bsr
from ticketkit.runtime import native

Floats: TypeAlias = NDArray[np.float32]
Run: TypeAlias = Callable[[], list[np.ndarray]]  # computes, and gives [y], always the same array

RESULTS = Path(__file__).resolve().parent / "results" / "layers.jsonl"
SPARSITIES = (50, 60, 70, 80, 90, 95, 98)  # percent
FORMATS: dict[str, masks.Block] = {"csr": (1, 1), **bsr.KERNELS}  # packed format -> blocks that the zeros come in
DENSE, LIMIT = "onnxruntime", "L1 limit"


@dataclass(frozen=True)
class Row:
    """One layer at one sparsity in one format, in one run; times are milliseconds of one thread."""

    layer: str
    shape: dict[str, int]
    part: str
    sparsity: float  # as asked for; nnz is exact
    nnz: int
    format: str
    kernel: str
    isa: str
    rounds: int
    seconds: float  # timed, per contender and round
    n: int
    min_ms: float
    median_ms: float  # of the rounds' medians, as dense_ms
    rounds_ms: list[float]  # median of each alternating round
    gflops: float  # of non-zero work, 2 for each multiply-add
    gflops_effective: float  # dense work / time
    limit_gflops: float  # of the probe whose operands stay in L1, in the same rounds
    limit_share: float  # median over the rounds of gflops / limit_gflops
    dense_ms: float  # of onnxruntime
    dense_min_ms: float
    speedup: float  # median over the rounds of dense time / this time
    max_abs_diff: float  # against onnxruntime with the same weights
    cpu: str
    onnxruntime: str
    ticketkit: str
    commit: str
    timestamp: str  # UTC, ISO 8601, start of the run

    @property
    def key(self) -> Key:
        return self.layer, self.sparsity, self.format


Wish: TypeAlias = tuple[float, str]  # sparsity, format
Key: TypeAlias = tuple[str, float, str]  # layer, sparsity, format
Found: TypeAlias = dict[Key, Row]


# --- measuring ---


@dataclass(frozen=True)
class Settings:
    """How to measure. `commit` is read once, so that all rows of a run agree."""

    isa: str
    rounds: int
    seconds: float
    commit: str
    timestamp: str


def measure(entry: Entry, wanted: Sequence[Wish], settings: Settings) -> list[Row]:
    """Rows of one layer for each (sparsity, format), all in the same alternating rounds with dense onnxruntime and the limit.

    Raises TicketkitError where a sparse layer answers otherwise than onnxruntime does with the same weights.
    """
    shape, rng = entry.shape, np.random.default_rng(0)
    x, bias = normal(rng, shape.x), normal(rng, shape.y[1:2])
    weight = normal(rng, shape.weight) / np.float32(np.sqrt(prod(shape.weight[1:])))
    limit, limit_flops = l1_limit(settings.isa)
    runs: dict[str, Run] = {DENSE: dense(shape, x, weight, bias), LIMIT: limit}
    made: dict[str, tuple[float, str, int, float]] = {}
    for sparsity, name in wanted:
        mask = masks.global_magnitude({"w": weight}, masks.full({"w": weight}), sparsity, FORMATS[name])["w"]
        pruned = np.where(mask, weight, np.float32(0))
        runs[f"{name} {sparsity}"] = run = sparse(shape, pruned, name, settings.isa, x, bias)
        made[f"{name} {sparsity}"] = sparsity, name, int(np.count_nonzero(pruned)), difference(shape, run, x, pruned, bias)
    times = take_turns(runs, settings)
    medians = {name: [float(np.median(ms)) for ms in turns] for name, turns in times.items()}
    speedups, of_limit = (rows.ratios(times, [name])[1] for name in (DENSE, LIMIT))
    flops = 2 * prod(shape.weight) * prod(shape.y) // shape.y[1]
    found = []
    for key, (sparsity, name, nnz, off) in made.items():
        left, ms = flops * nnz // prod(shape.weight), float(np.median(medians[key]))
        found.append(
            Row(
                layer=shape.name,
                shape=asdict(shape),
                part=entry.part,
                sparsity=sparsity,
                nnz=nnz,
                format=name,
                kernel=f"{shape.op}_{name}_f32",
                isa=settings.isa,
                rounds=settings.rounds,
                seconds=settings.seconds,
                n=sum(map(len, times[key])),
                min_ms=min(map(min, times[key])),
                median_ms=ms,
                rounds_ms=medians[key],
                gflops=left / ms / 1e6,
                gflops_effective=flops / ms / 1e6,
                limit_gflops=limit_flops / float(np.median(medians[LIMIT])) / 1e6,
                limit_share=of_limit[key][1] * left / limit_flops,
                dense_ms=float(np.median(medians[DENSE])),
                dense_min_ms=min(map(min, times[DENSE])),
                speedup=speedups[key][1],
                max_abs_diff=off,
                cpu=machine.cpu_name(),
                onnxruntime=onnxruntime.__version__,
                ticketkit=__version__,
                commit=settings.commit,
                timestamp=settings.timestamp,
            )
        )
    return found


def take_turns(runs: dict[str, Run], settings: Settings) -> dict[str, list[list[float]]]:
    """Milliseconds of single runs, [round][run], by contender; every second round goes backwards."""
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    for i in range(settings.rounds):
        for name in list(runs)[:: -1 if i % 2 else 1]:
            times[name].append(worker.turn(runs[name], settings.seconds, settle=1, least=1)["ms"])
    return times


def sparse(shape: Shape, weight: Floats, name: str, isa: str, x: Floats, bias: Floats) -> Run:
    """The layer with its weight in that format, scratch memory and result each in one place."""
    layer = shape.pack(formats.get("csr").pack(weight), name, isa)
    y, scratch = buffer((len(x), *layer.out_shape)), native.aligned(layer.workspace_bytes)
    return lambda: [layer.run(x, bias, minimum=shape.minimum, out=y, workspace=scratch)]


def dense(shape: Shape, x: Floats, weight: Floats, bias: Floats) -> Run:
    """The layer as a model of its own in onnxruntime, input and output bound."""
    constants = [numpy_helper.from_array(array, name) for name, array in (("w", weight), ("b", bias))]
    x_info, y_info = (helper.make_tensor_value_info(*of) for of in (("x", TensorProto.FLOAT, shape.x), ("y", TensorProto.FLOAT, shape.y)))
    graph = helper.make_graph(shape.nodes(), "layer", [x_info], [y_info], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 1, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding, bound = session.io_binding(), {"x": x, "y": buffer(shape.y)}  # a binding holds addresses, no references
    binding.bind_input("x", "cpu", 0, np.float32, shape.x, bound["x"].ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, shape.y, bound["y"].ctypes.data)

    def run() -> list[np.ndarray]:
        session.run_with_iobinding(binding)
        return [bound["y"]]

    return run


def difference(shape: Shape, run: Run, x: Floats, weight: Floats, bias: Floats) -> float:
    """Largest difference between `run` and onnxruntime; TicketkitError if rounding cannot explain it."""
    (y,), (expected,) = run(), dense(shape, x, weight, bias)()
    off = float(np.abs(y - expected).max())
    terms = prod(shape.weight[1:]) + 1
    tolerance = 2 * np.finfo(np.float32).eps * terms * float(np.abs(weight).max() * np.abs(x).max() + np.abs(bias).max())
    if not off <= tolerance:  # "not <=": NaN must fail too
        raise TicketkitError(f"{shape.name}: expected onnxruntime's output within {tolerance:.3g}, got a difference of {off:.3g}")
    return off


def l1_limit(isa: str) -> tuple[Run, int]:
    """(run, FLOPs) of our own kernel where nothing holds it up: a dense 1x1 convolution, one full tile, 28 KB of input for 256 rows."""
    pixels = 14 * next(known.lanes for known in native.isas() if known.name == isa)
    shape, images = Conv(28 * 1024 // (4 * pixels), 1, pixels, 256, 1, 1, 0, 1), 16
    rng = np.random.default_rng(0)
    x, weight, bias = normal(rng, (images, *shape.x[1:])), normal(rng, shape.weight), normal(rng, shape.y[1:2])
    return sparse(shape, weight, "csr", isa, x, bias), 2 * images * prod(shape.weight) * pixels


def buffer(shape: Sequence[int]) -> Floats:
    """Aligned as onnxruntime aligns its tensors."""
    return native.aligned(4 * prod(shape)).view(np.float32).reshape(shape)


def normal(rng: np.random.Generator, shape: Sequence[int]) -> Floats:
    """Standard normal numbers in an aligned buffer."""
    return rng.standard_normal(out=buffer(shape), dtype=np.float32)


# --- the command ---


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="N", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--layer", default="", help="only layers whose name holds this, such as k3 or 56x56 or gemm")
    parser.add_argument("--sparsity", nargs="+", type=float, default=SPARSITIES, metavar="S", help="percent; default %(default)s")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: all")
    parser.add_argument("--isa", choices=[isa.name for isa in native.isas() if isa.usable], help="default: the active one")
    parser.add_argument("--rounds", type=int, default=11, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=0.03, help="timed, per contender and round; default %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows are appended to this file")
    parser.add_argument("--resume", action="store_true", help="skip what that file has of this commit, processor and settings")
    parser.add_argument("--table", action="store_true", help="write layers.csv anew and stop")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; 0 unless stopped."""
    chosen = arguments(words)
    if chosen.table:
        write()
        return 0
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    settings = Settings(chosen.isa or native.active_isa().name, chosen.rounds, chosen.seconds, machine.commit(), now)
    entries = [e for e in read() if chosen.layer in e.shape.name and e.counts.keys() & set(chosen.network)]
    if not entries:
        raise DataError(f"--layer {chosen.layer}: no layer of {', '.join(chosen.network)} has this in its name; see {TABLE.name}")
    wanted = [(percent / 100, name) for percent, name in product(chosen.sparsity, chosen.format)]
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    found: Found = {row.key: row for row in earlier(chosen.results, settings)} if chosen.resume else {}
    try:
        with chosen.results.open("a", encoding="utf-8") as file, table.progress("layers") as progress:
            for i, entry in enumerate(entries):
                progress(i, len(entries), entry.shape.name)
                if left := [(s, name) for s, name in wanted if name in entry.shape.packed and (entry.shape.name, s, name) not in found]:
                    fresh = measure(entry, left, settings)
                    file.writelines(json.dumps(asdict(row)) + "\n" for row in fresh)
                    file.flush()
                    found |= {row.key: row for row in fresh}
    finally:  # after Ctrl-C too
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(totals(found, entries, chosen.network, wanted))
        console.print()
        console.print(furthest(found, entries, chosen.network, wanted))
    return 0


def earlier(path: Path, settings: Settings) -> Iterator[Row]:
    """Rows in the file of this commit, processor and settings."""
    same = (settings.isa, settings.rounds, settings.seconds, settings.commit, machine.cpu_name())
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = Row(**json.loads(line))
        if (row.isa, row.rounds, row.seconds, row.commit, row.cpu) == same:
            yield row


def body(found: Found, entries: Sequence[Entry], network: str, sparsity: float, name: str) -> list[tuple[int, Row]]:
    """(occurrences, row) of what was measured of a network, without stem and head."""
    rows = [(e.counts[network], found.get((e.shape.name, sparsity, name))) for e in entries if e.part == "body" and network in e.counts]
    return [(count, row) for count, row in rows if row]


def totals(found: Found, entries: Sequence[Entry], networks: Sequence[str], wanted: Sequence[Wish]) -> Table:
    """Milliseconds of all layers of a network together, dense and at each sparsity, and below these the speedup."""
    levels, names = (list(dict.fromkeys(each)) for each in zip(*wanted, strict=True))
    grid = Table("network", "layers", "format", "dense", *(f"{100 * level:g}%" for level in levels), box=None, pad_edge=False)
    for column in grid.columns:
        column.no_wrap = True
    grid.title, grid.title_justify = "all layers but stem and head: ms, and below × onnxruntime", "left"
    whole = Counter({n: sum(e.counts.get(n, 0) for e in read() if e.part == "body") for n in networks})
    for network, name in product(networks, names):
        cells, dense_ms, layers = [], "", 0
        for level in levels:
            measured = body(found, entries, network, level, name)
            before, after = sum(count * row.dense_ms for count, row in measured), sum(count * row.median_ms for count, row in measured)
            cells.append(f"{table.milliseconds(after)}\n{before / after:.2f}" if measured else "")
            if measured:
                dense_ms, layers = table.milliseconds(before), sum(count for count, _ in measured)
        if layers:
            grid.add_row(network, f"{layers}/{whole[network]}", name, dense_ms, *cells)
    return grid


def furthest(found: Found, entries: Sequence[Entry], networks: Sequence[str], wanted: Sequence[Wish]) -> Table:
    """The ten layers with the smallest share of the L1 limit, of those that take 1 % of a network's time or more."""
    level = min((sparsity for sparsity, _ in wanted), key=lambda sparsity: abs(sparsity - 0.9))
    heavy: Found = {}
    for network in networks:
        for name in dict.fromkeys(name for _, name in wanted):
            measured = body(found, entries, network, level, name)
            total = sum(count * row.median_ms for count, row in measured)
            heavy |= {row.key: row for count, row in measured if count * row.median_ms >= total / 100}
    headings = f"furthest from the limit at {100 * level:g}%", "format", "ms", "GFLOP/s", "of limit", "× dense"
    grid = Table(*headings, box=None, pad_edge=False)
    for row in sorted(heavy.values(), key=lambda row: row.limit_share)[:10]:
        numbers = f"{row.gflops:.1f}", f"{row.limit_share:.0%}", f"{row.speedup:.2f}"
        grid.add_row(row.layer, row.format, table.milliseconds(row.median_ms), *numbers)
    return grid


if __name__ == "__main__":
    command.run(main)
