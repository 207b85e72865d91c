"""Where sparse layers win on a GPU: every layer shape of three networks, against the fastest dense and the fastest foreign sparse kernel.

    python benchmarks/gpu.py                                                     the whole map, some hours
    python benchmarks/gpu.py --network resnet50 --batch 32 --dtype fp16 --sparsity 90 --form bsr32 bsr64
    python benchmarks/gpu.py --resume                                            go on where a run of this commit was stopped
    python benchmarks/gpu.py --map                                               rows to gpu.md and gpu.png

Layers of ResNet-50, MobileNetV2 and ViT-B/16 (layers.csv) x batch 1, 32, 256 x 70 … 98 % x single weights and blocks of 16, 32, 64. In one
CUDA graph each, rounds alternating: ours, cuDNN or cuBLAS dense in the same type (channels_last, tuned), and where torch has them
torch.sparse (CSR, BSR) and 2:4. Two ceilings of the same run stand beside them: the bytes that must move at the measured bandwidth and
the products at the measured rate of a large matrix product. Rows are appended to results/gpu.jsonl; Ctrl-C keeps them.

Without a GPU it says so, checks the kernels in Triton's interpreter on small shapes, and ends with 0: nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import command
import numpy as np
import torch
from gpu_layers import TYPES, dense_ones, foreign, make, sparse
from gpu_map import FORMS, Row, draw, load
from rich.console import Console
from shapes import Conv, Shape, read
from torch import Tensor

from ticketkit import __version__
from ticketkit.bench import machine, table
from ticketkit.errors import DataError, KernelError, first_line
from ticketkit.runtime import gpu

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.jsonl"
NETWORKS = ("resnet50", "mobilenet_v2", "vit_b_16")
BATCHES, SPARSITIES = (1, 32, 256), (70, 80, 90, 95, 98)
AGREE = {"fp16": 4e-3, "bf16": 3e-2, "fp32": 4e-3}  # of the largest output: a few roundings of the type, fp32 being TF32
REPLAYS = 20  # of a graph between two events


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at best, measured."""

    bandwidth: float  # bytes a second, a large copy
    products: dict[str, float]  # operations a second of a large matrix product, by type
    additions: float  # of fused multiply-adds in float32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--sparsity", nargs="+", type=int, default=SPARSITIES, metavar="PERCENT")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=tuple(FORMS))
    parser.add_argument("--dtype", nargs="+", choices=TYPES, default=("fp16",))
    parser.add_argument("--layer", default="", help="only layers whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resume", action="store_true", help="skip what this commit has measured on this GPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--map", action="store_true", help="write the page and the map of the rows there are, and measure nothing")
    args = parser.parse_args()
    if args.map:
        draw(args.results)
        return 0
    if not torch.cuda.is_available():
        return interpret()
    table.check_writable(str(args.results))
    gpu.require(torch.device("cuda"))
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # what fp32 means here, for all
    ceilings = measure_ceilings(args.dtype)
    done = finished(args.results) if args.resume else set()
    cases = list(plan(args))
    with table.progress("gpu") as progress, args.results.open("a", encoding="utf-8") as file:
        for i, (shape, networks, batch, dtype, sparsity, form) in enumerate(cases):
            progress(i, len(cases), f"{shape.name} batch {batch} {dtype} {sparsity} % {form}")
            if (shape.name, batch, dtype, sparsity / 100, form) in done:
                continue
            try:
                row = measure(shape, networks, batch, dtype, sparsity, form, args.rounds, ceilings)
            except (torch.OutOfMemoryError, KernelError) as error:
                torch.cuda.empty_cache()
                print(f"{shape.name} batch {batch} {dtype} {sparsity} % {form}: left out: {first_line(error)}", file=sys.stderr)
                continue
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
    draw(args.results)
    return 0


def plan(args: argparse.Namespace) -> Iterator[tuple[Shape, dict[str, int], int, str, int, str]]:
    """Every case asked for; stems and heads stay dense."""
    for entry in read():
        counts = {name: entry.counts[name] for name in args.network if name in entry.counts}
        if counts and entry.part == "body" and args.layer in entry.shape.name:
            for batch, dtype, sparsity, form in product(args.batch, args.dtype, args.sparsity, args.form):
                yield entry.shape, counts, batch, dtype, sparsity, form


def measure(
    shape: Shape, networks: dict[str, int], batch: int, dtype: str, sparsity: int, form: str, rounds: int, ceilings: Ceilings
) -> Row:
    """A row. Raises torch.OutOfMemoryError, KernelError, and DataError where the kernel's answer is wrong."""
    case = make(shape, batch, TYPES[dtype], sparsity, FORMS[form], "cuda")
    ours, weight = sparse(case, FORMS[form])
    contenders: dict[str, Callable[[], Tensor]] = {"ours": ours, **dense_ones(case), **foreign(case, FORMS[form])}
    exact, found = case.dense(), ours()
    off, largest = float((found.double() - exact.double()).abs().max()), float(exact.abs().max())
    if not off <= AGREE[dtype] * largest:
        raise DataError(f"{shape.name} {dtype} {form}: expected outputs within {AGREE[dtype]} of the largest, {largest:g}, got {off:g}")
    graphs = {name: graph for name, call in contenders.items() if (graph := captured(call)) is not None}
    if "ours" not in graphs:
        raise KernelError("expected the kernel to be captured in a CUDA graph")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds):
        for name in list(graphs) if turn % 2 == 0 else list(graphs)[::-1]:
            times[name].append(timed(graphs[name]))
    medians = {name: float(np.median(found)) for name, found in times.items()}
    dense = min((name for name in medians if name.startswith("dense")), key=medians.__getitem__)
    moved = case.x.nbytes + exact.nbytes + weight.size * case.x.itemsize
    operations = 2 * weight.size * exact.numel() // exact.shape[1 if isinstance(shape, Conv) else -1]
    rate = ceilings.products[dtype] if FORMS[form] else ceilings.additions
    return Row(
        shape.name, networks, batch, dtype, sparsity / 100, form, weight.size, medians["ours"], times["ours"], medians[dense], dense,
        {name: us for name, us in medians.items() if not name.startswith(("dense", "ours"))},
        float(np.median([a / b for a, b in zip(times[dense], times["ours"], strict=True)])),
        moved, operations, moved / ceilings.bandwidth * 1e6, operations / rate * 1e6,
        off, largest,
        torch.cuda.get_device_name(), torch.__version__, _triton(), str(torch.version.cuda), __version__, machine.commit() or "",
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip


# Time ---------------------------------------------------------------------------------------------------------------------------


def captured(call: Callable[[], Tensor]) -> torch.cuda.CUDAGraph | None:
    """A CUDA graph of the call, after tuning and warm-up; None for what cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def timed(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of a replay: the median of several stretches of `REPLAYS`, after one untimed."""
    found = []
    for stretch in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        if stretch:
            found.append(begin.elapsed_time(end) * 1e3 / REPLAYS)
    return float(np.median(found))


def measure_ceilings(types: Sequence[str]) -> Ceilings:
    """A copy of 1 GiB, products of 8192 x 8192 in each type, and 64 multiply-adds a number in float32, each in a graph."""
    large = torch.empty(2**28, device="cuda")
    copy = captured(lambda: large[: 2**27].copy_(large[2**27 :]))
    assert copy is not None
    bandwidth = 2**30 / (timed(copy) * 1e-6)
    products = {}
    for name in types:
        a = torch.randn(8192, 8192, device="cuda", dtype=TYPES[name])
        graph = captured(lambda a=a: a @ a)
        assert graph is not None
        products[name] = 2 * 8192**3 / (timed(graph) * 1e-6)
    a = torch.randn(4096, 4096, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = False  # cuBLAS then runs on the ordinary units
    graph = captured(lambda: a @ a)
    torch.backends.cuda.matmul.allow_tf32 = True
    assert graph is not None
    return Ceilings(bandwidth, products, 2 * 4096**3 / (timed(graph) * 1e-6))


def _triton() -> str:
    import triton

    return str(triton.__version__)


def finished(results: Path) -> set[tuple[Any, ...]]:
    """What this commit measured on this GPU before."""
    name, commit = torch.cuda.get_device_name(), machine.commit() or ""
    rows = load(results) if results.exists() else []
    return {(r.layer, r.batch, r.dtype, r.sparsity, r.form) for r in rows if (r.gpu, r.commit) == (name, commit)}


# Without a GPU ------------------------------------------------------------------------------------------------------------------


def interpret() -> int:
    """Says that nothing is timed, and checks the kernels on small forms of a few layers."""
    console = Console(stderr=True)
    if not gpu.interpreted():
        console.print("no CUDA device here: nothing is timed; the kernels are checked in Triton's interpreter on small shapes")
        return subprocess.run([sys.executable, *sys.argv], env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    shapes = (Conv(24, 7, 6, 40, 3, 1, 1, 1), Conv(33, 6, 6, 20, 1, 2, 0, 1), Conv(32, 5, 5, 32, 1, 1, 0, 1))
    worst = 0.0
    for shape, (form, side), name in product(shapes, FORMS.items(), ("fp32", "fp16", "bf16")):
        case = make(shape, 2, TYPES[name], 90, side, "cpu")
        exact = torch.nn.functional.conv2d(case.x.double(), case.weight.double(), None, shape.stride, shape.pad, shape.dilation)
        diff = float((sparse(case, side)[0]().double() - exact).abs().max() / max(float(exact.abs().max()), 1e-30))
        allowed = 2 * torch.finfo(TYPES[name]).eps + 1e-6
        if diff > allowed:
            what = f"a difference of at most {allowed:.1e} of the largest output"
            raise DataError(f"{shape.name} {form} {name}: expected {what}, got {diff:.1e}")
        worst = max(worst, diff / allowed)
    count = len(shapes) * len(FORMS) * 3
    console.print(f"{count} kernels agree with the dense layer, the worst differs by {worst:.0%} of what rounding explains")
    return 0


if __name__ == "__main__":
    command.run(main)
