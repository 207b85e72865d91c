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
from math import prod
from pathlib import Path
from typing import Any

import command
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from shapes import Conv, Shape, read
from torch import Tensor

from ticketkit import __version__
from ticketkit.bench import machine, table
from ticketkit.errors import DataError, KernelError, first_line
from ticketkit.formats import gaps
from ticketkit.runtime import gpu

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.jsonl"
NETWORKS = ("resnet50", "mobilenet_v2", "vit_b_16")
BATCHES, SPARSITIES = (1, 32, 256), (70, 80, 90, 95, 98)
FORMS = {"csr": None, "bsr16": 16, "bsr32": 32, "bsr64": 64}
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
AGREE = {"fp16": 4e-3, "bf16": 3e-2, "fp32": 4e-3}  # of the largest output: a few roundings of the type, fp32 being TF32
REPLAYS = 20  # of a graph between two events


@dataclass(frozen=True)
class Row:
    """One layer at one batch, sparsity, form and type; times are microseconds, medians of the rounds' medians."""

    layer: str
    networks: dict[str, int]  # how often each has it
    batch: int
    dtype: str
    sparsity: float  # as asked for
    form: str
    stored: int  # values in the kernel's weight, zeros within blocks included
    us: float
    rounds_us: list[float]
    dense_us: float
    dense: str  # which of the dense kernels was the fastest
    others_us: dict[str, float]  # foreign sparse kernels that ran
    speedup: float  # median over the rounds of dense / ours
    bytes: int  # that must move: input, result, weight
    flops: int  # 2 for each product with a stored value
    bytes_us: float  # at the measured bandwidth
    flops_us: float  # at the measured rate of a large product, CSR: of fused multiply-adds on the ordinary units
    max_abs_diff: float  # against the dense result
    max_abs_output: float
    gpu: str
    torch: str
    triton: str
    cuda: str
    ticketkit: str
    commit: str
    timestamp: str


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at best, measured."""

    bandwidth: float  # bytes a second, a large copy
    products: dict[str, float]  # operations a second of a large matrix product, by type
    additions: float  # of fused multiply-adds in float32


@dataclass(frozen=True)
class Case:
    """A layer with data on the GPU."""

    shape: Shape
    dtype: torch.dtype
    x: Tensor  # [N, C, H, W] channels_last, or [N, K]
    weight: Tensor  # dense, with zeros
    bias: Tensor
    steps: Tensor
    values: Tensor

    def dense(self) -> Tensor:
        if isinstance(self.shape, Conv):
            s = self.shape
            return torch.nn.functional.conv2d(self.x, self.weight, self.bias, s.stride, s.pad, s.dilation)
        return torch.nn.functional.linear(self.x, self.weight, self.bias)


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


def make(shape: Shape, batch: int, dtype: torch.dtype, sparsity: int, side: int | None, device: str) -> Case:
    """A layer with random weights, pruned singly or in blocks of side x side (outputs x channels of a tap)."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal(shape.weight, np.float32)
    window = shape.weight[2:] or (1, 1)
    grid = (-(-shape.weight[0] // (side or 1)), -(-shape.weight[1] // (side or 1)), *window)
    kept = np.zeros(prod(grid), bool)
    kept[generator.permutation(kept.size)[: max(1, round(kept.size * (100 - sparsity) / 100))]] = True
    mask = kept.reshape(grid).repeat(side or 1, 0).repeat(side or 1, 1)[: shape.weight[0], : shape.weight[1]]
    weight *= mask.reshape(shape.weight)
    weight[~mask.reshape(shape.weight)] = 0.0
    weight = torch.from_numpy(weight).to(dtype).float().numpy()  # in the type's own numbers
    coded = gaps.pack(weight)
    x = torch.from_numpy(generator.standard_normal((batch * shape.x[0], *shape.x[1:]), np.float32)).to(device, dtype)
    dense = torch.from_numpy(weight).to(device, dtype)
    if isinstance(shape, Conv):
        x, dense = x.to(memory_format=torch.channels_last), dense.to(memory_format=torch.channels_last)
    values, steps = torch.from_numpy(coded["values"]).to(device), torch.from_numpy(coded["gaps"]).to(device)
    return Case(shape, dtype, x, dense, torch.zeros(shape.weight[0], device=device, dtype=dtype), steps, values)


def sparse(case: Case, side: int | None) -> tuple[Callable[[], Tensor], gpu.Weight]:
    """Our call, and the weight that it takes. CSR gets its input in planes, as a network of CSR layers would hold it."""
    weight = gpu.Weight.of(case.steps, case.shape.weight, side)
    stored = weight.store(case.values, case.dtype)
    if isinstance(case.shape, Conv):
        s = case.shape
        window = gpu.Window((s.stride,) * 2, (s.pad,) * 4, (s.dilation,) * 2)
        x = case.x if side else case.x.contiguous()
        return lambda: gpu.conv2d(x, weight, stored, case.bias, window=window, tf32=True), weight
    rows = case.x if side else case.x.t().contiguous().t()
    return lambda: gpu.conv2d(rows[:, :, None, None], weight, stored, case.bias, tf32=True)[:, :, 0, 0], weight


def dense_ones(case: Case) -> dict[str, Callable[[], Tensor]]:
    """cuDNN or cuBLAS, and for pointwise layers both."""
    found: dict[str, Callable[[], Tensor]] = {"dense": case.dense}
    if isinstance(case.shape, Conv) and case.shape.kernel == case.shape.stride == 1:
        pixels = case.x.permute(0, 2, 3, 1).reshape(-1, case.shape.in_channels)
        matrix = case.weight.reshape(case.shape.out_channels, -1)
        found["dense, as a product"] = lambda: torch.nn.functional.linear(pixels, matrix, case.bias)
    return found


def foreign(case: Case, side: int | None) -> dict[str, Callable[[], Tensor]]:
    """torch's own sparse kernels for a matrix product; whatever does not run here is left out."""
    s = case.shape
    if isinstance(s, Conv) and not s.kernel == s.stride == 1:
        return {}
    rows = case.x if not isinstance(s, Conv) else case.x.permute(0, 2, 3, 1).reshape(-1, s.in_channels)
    matrix, columns = case.weight.reshape(len(case.weight), -1).contiguous(), rows.t()
    makers: dict[str, Callable[[], Any]] = {"torch.sparse CSR": matrix.to_sparse_csr}
    if side and not any(n % side for n in matrix.shape):
        makers["torch.sparse BSR"] = lambda: matrix.to_sparse_bsr(side)
    makers["2:4 (half of the weights, its own pattern)"] = lambda: torch.sparse.to_sparse_semi_structured(half(matrix))
    found: dict[str, Callable[[], Tensor]] = {}
    for name, make_one in makers.items():
        try:
            other = make_one()
            if "2:4" in name:
                torch.nn.functional.linear(rows, other)
                found[name] = lambda other=other: torch.nn.functional.linear(rows, other)  # type: ignore[misc]
            else:
                other @ columns
                found[name] = lambda other=other: other @ columns  # type: ignore[misc]
        except (RuntimeError, NotImplementedError, ValueError):
            torch.cuda.synchronize()
    return found


def half(matrix: Tensor) -> Tensor:
    """The matrix with the two larger of each four in a row."""
    fours = matrix.reshape(len(matrix), -1, 4)
    kept = torch.zeros_like(fours).scatter_(2, fours.abs().topk(2, dim=2).indices, 1.0)
    return torch.where(kept.bool(), fours, 0).reshape(matrix.shape)


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


# The map ------------------------------------------------------------------------------------------------------------------------


def load(path: Path) -> list[Row]:
    """The rows of a file; DataError naming the line that is none."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(Row(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(f"{path.name}: line {number}: expected a row of this script, got {error}") from None
    return found


def draw(results: Path) -> None:
    """gpu.md, a table of how many layers win, and gpu.png: the speedup of every layer by form, batch and sparsity, 1.0 marked."""
    if not results.exists():
        raise DataError(f"{results}: expected rows of this script, found no file; run it on a machine with a GPU first")
    rows = load(results)
    latest = {(r.gpu, r.layer, r.batch, r.dtype, r.sparsity, r.form): r for r in rows}
    groups: dict[tuple[str, str, int, str, float], list[Row]] = {}
    for row in latest.values():
        groups.setdefault((row.gpu, row.dtype, row.batch, row.form, row.sparsity), []).append(row)
    head = ("GPU", "type", "batch", "form", "sparsity", "layers", "faster than dense", "median", "least", "most")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    shown = Table(*head, title="layers against the fastest dense kernel", title_justify="left")
    for key, members in sorted(groups.items()):
        ratios = [r.speedup for r in members]
        wins = sum(r > 1 for r in ratios)
        cells = [*map(str, key[:4]), f"{key[4]:.0%}", str(len(ratios)), f"{wins / len(ratios):.0%}"]
        cells += [f"{value:.2f}x" for value in (np.median(ratios), min(ratios), max(ratios))]
        lines.append(f"| {' | '.join(cells)} |")
        shown.add_row(*cells)
    Console().print(shown)
    results.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    picture(groups, results.with_suffix(".png"))


def picture(groups: dict[tuple[str, str, int, str, float], list[Row]], path: Path) -> None:
    """One panel for each GPU, type and batch; needs the extra `report`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = sorted({key[:3] for key in groups})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 4), sharey=True, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        for color, form in enumerate(FORMS):
            own = {key[4]: members for key, members in groups.items() if key[:4] == (*panel, form)}
            points = sorted((sparsity, [r.speedup for r in members]) for sparsity, members in own.items())
            if points:
                sparsity, ratios = [100 * s for s, _ in points], [r for _, r in points]
                axis.plot(sparsity, [np.median(r) for r in ratios], color=f"C{color}", marker="o", label=form)
                axis.fill_between(sparsity, *([np.percentile(r, q) for r in ratios] for q in (10, 90)), color=f"C{color}", alpha=0.15)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(title=f"{panel[0]}\n{panel[1]}, batch {panel[2]}", xlabel="sparsity in %", yscale="log")
    axes[0][0].set(ylabel="dense time / sparse time (median, 10 to 90 % of the layers)")
    axes[0][0].legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    command.run(main)
