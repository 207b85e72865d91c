"""Any pruned network in: torchvision's and timm's, exported by both torch exporters, converted, compared, timed; one row each.

    python benchmarks/zoo.py                                        every network, at 70 and 90 %: hours
    python benchmarks/zoo.py --network resnet50 timm/swin_tiny_patch4_window7_224 --exporter dynamo --sparsity 90
    python benchmarks/zoo.py --task detection --rounds 0            convert and compare only
    python benchmarks/zoo.py --resume                               go on where a run of this commit was stopped
    python benchmarks/zoo.py --list                                 the networks
    python benchmarks/zoo.py --report > benchmarks/results/zoo.md   the latest rows as a table

A network has random weights (He-initialised, BatchNorm with statistics of its own), pruned by global magnitude: every convolution and
linear layer but the first and the last. Each row comes from a process of its own, so that one that dies is a row too. Rows are appended to
results/zoo.jsonl; Ctrl-C keeps them. Their fields are documented at `Row`. Needs the extras `find` and `bench`, and, for networks named
timm/…, timm.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from math import isfinite
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import TypeAlias

import command
import numpy as np
import onnx
from networks import EXPORTERS, TASKS, build, export_torch, prune, side, task_of
from rich.console import Console
from rich.table import Table

from ticketkit import __version__, export
from ticketkit.bench import engines, machine, table, timing
from ticketkit.bench.engines import Arrays
from ticketkit.bench.subject import make_feeds
from ticketkit.errors import ExportError, TicketkitError, first_line
from ticketkit.exporters import ExportReport
from ticketkit.lower import read
from ticketkit.quiet import quiet

RESULTS = Path(__file__).resolve().parent / "results" / "zoo.jsonl"
TIMED = ("onnxruntime", "openvino", "ticketkit")
LONG = 200  # characters of an error, of which torch's can be thousands
FLOOR = 0.97  # speedup over dense onnxruntime below which a network counts as slower


Key: TypeAlias = tuple[str, str, float]  # network, exporter, sparsity


@dataclass(frozen=True)
class Row:
    """One network from one exporter at one sparsity; what was not reached is None, and `error` says why."""

    network: str
    task: str
    exporter: str
    opset: int
    image: int
    sparsity: float  # of the prunable weights, as asked for
    commit: str
    cpu: str
    versions: dict[str, str]
    timestamp: str  # UTC, ISO 8601
    error: str | None = None  # of the first step that failed, which it begins with; "torch …": its exporter
    pruned: int | None = None  # weights that may be pruned
    parameters: int | None = None
    layers: int | None = None  # convolutions and products with constant weights
    sparse_layers: int | None = None  # of those; 0 where the planner expects no gain, and no sparse file is written
    obstacles: dict[str, int] = field(default_factory=dict)  # why layers cannot run sparse -> how many
    flops_dense: int | None = None
    flops_left: int | None = None
    checker: dict[str, str] = field(default_factory=dict)  # file -> what the ONNX checker says, "passes" if nothing
    differences: dict[str, float | None] = field(default_factory=dict)  # engine -> max |difference| from torch's file in onnxruntime;
    # None where shapes differ, as those of detections do when rounding makes one more or less
    tolerances: dict[str, float] = field(default_factory=dict)  # engine -> what float32 permits (ticketkit.exporters._check)
    scale: float | None = None  # largest output, to read differences on
    bytes: dict[str, int] = field(default_factory=dict)  # file -> size
    file_ratio: float | None = None  # dense / sparse
    seconds: dict[str, float] = field(default_factory=dict)  # step -> duration
    peak_rss_bytes: int | None = None  # of the whole process: torch, export, conversion, comparison
    p50_ms: dict[str, float] = field(default_factory=dict)  # engine -> median, batch 1, one thread, by benchmarks/README.md
    speedup: float | None = None  # over the fastest dense engine of the run, median of the rounds' ratios
    speedup_onnxruntime: float | None = None  # over dense onnxruntime, likewise

    @property
    def key(self) -> Key:
        return self.network, self.exporter, self.sparsity


# --- a row ---


def measure(start: Row, protocol: timing.Protocol | None) -> Row:
    """Fills a row in, step by step, as far as it gets; without a protocol nothing is timed."""
    found: dict[str, object] = {}
    try:
        with quiet(), tempfile.TemporaryDirectory(prefix="ticketkit-zoo-") as folder:
            for facts in _steps(start, protocol, Path(folder)):
                found |= facts
    except Exception as error:  # torch's exporters, foreign engines: whatever fails is what the row is for
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        kind = "" if isinstance(cause, TicketkitError) else f"{type(cause).__name__}: "
        found["error"] = f"{found['step']}: {kind}{first_line(cause)[:LONG]}"
    found.pop("step", None)
    return replace(start, **found, peak_rss_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # type: ignore[arg-type]


def _steps(start: Row, protocol: timing.Protocol | None, folder: Path) -> Iterator[dict[str, object]]:
    """Facts for the row, in the order they become known; "step" says what comes next."""
    source, sparse, dense = (folder / f"{name}.onnx" for name in ("source", "sparse", "dense"))
    shape, seconds = (3, start.image, start.image), {}
    begin = perf_counter()

    def step(name: str, done: str = "") -> dict[str, object]:
        nonlocal begin
        now = perf_counter()
        if done:
            seconds[done] = round(now - begin, 3)
        begin = now
        return {"step": name, "seconds": dict(seconds)}

    yield step("build")
    module = build(start.network)
    pruned = prune(module, start.sparsity)
    yield {"pruned": pruned, "parameters": sum(p.numel() for p in module.parameters())} | step(f"torch {start.exporter}", "build")
    export_torch(module, start.exporter, start.image, start.task, source)
    del module
    yield step("export onnx-dense", "torch")
    report = export(source, dense, format="onnx-dense", input_shape=shape)
    yield _facts(report) | step("export onnx", "onnx-dense")
    try:
        report = export(source, sparse, input_shape=shape)
    except ExportError as error:
        if "no layer would run faster" not in str(error):
            raise
    yield _facts(report) | step("checker", "onnx")
    files = {path.stem: path for path in (source, dense, sparse) if path.exists()}
    sizes = {name: sum(each.stat().st_size for each in folder.glob(f"{name}.onnx*")) for name in files}
    yield {"bytes": sizes, "file_ratio": sizes["dense"] / sizes["sparse"] if sparse.exists() else None}
    yield {"checker": {name: check(path) for name, path in files.items()}} | step("compare", "checker")
    feeds = make_feeds(read(source), 1)
    expected = engines.get("onnxruntime").load(source, 1, feeds)()
    yield {"scale": max(float(np.abs(y).max(initial=0)) for y in expected)}
    differences = {c.engine: c.difference if isfinite(c.difference) else None for c in report.comparisons}
    yield step("openvino", "compare")
    differences["openvino"] = difference(expected, engines.get("openvino").load(dense, 1, feeds)())
    tolerances = {c.engine: c.tolerance for c in report.comparisons if isfinite(c.tolerance)}
    yield {"differences": differences, "tolerances": tolerances} | step("bench", "openvino")
    if protocol:
        yield _speed(sparse if sparse.exists() else dense, protocol) | step("", "bench")


def _facts(report: ExportReport) -> dict[str, object]:
    choices, (flops, left) = report.plan.choices, report.plan.flops
    reasons = Counter(c.reason.removesuffix(": dense only") for c in choices if c.reason.endswith(": dense only"))
    sparse = len(report.plan.sparse) if report.format == "onnx" else 0
    return {"layers": len(choices), "sparse_layers": sparse, "obstacles": dict(reasons), "flops_dense": flops, "flops_left": left}


def check(path: Path) -> str:
    """What the ONNX checker says of a file."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return first_line(error)
    return "passes"


def difference(expected: Arrays, got: Arrays) -> float | None:
    """max |difference|, None where shapes differ."""
    if [y.shape for y in expected] != [y.shape for y in got]:
        return None
    return max(float(np.abs(y.astype(np.float64) - e).max(initial=0)) for y, e in zip(got, expected, strict=True))


def _speed(path: Path, protocol: timing.Protocol) -> dict[str, object]:
    report = timing.measure(path, engines.require(TIMED), protocol=protocol)
    rows = {row.engine: row for row in report.rows}
    if "ticketkit" not in rows:
        raise TicketkitError(report.failures["ticketkit"])
    ours = rows["ticketkit"]
    ratios = np.divide(rows["onnxruntime"].rounds_p50_ms, ours.rounds_p50_ms)
    return {
        "p50_ms": {name: row.p50_ms for name, row in rows.items()},
        "speedup": ours.speedup_rounds,
        "speedup_onnxruntime": round(float(np.median(ratios)), 4),
    }


def alone(start: Row, protocol: timing.Protocol | None) -> Row:
    """`measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, start, protocol).result()
        except BrokenProcessPool:
            return replace(start, error="the process died: out of memory, or a crash in native code")


# --- the command ---


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--network", nargs="+", metavar="N", help="of --list; default: all")
    which.add_argument("--task", nargs="+", choices=TASKS, help="all networks for these")
    parser.add_argument("--exporter", nargs="+", choices=EXPORTERS, default=list(EXPORTERS), help="of torch.onnx.export; default: both")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[70.0, 90.0], metavar="S", help="percent; default %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="of timing; 0: no timing; default %(default)s")
    parser.add_argument("--seconds", type=float, default=0.3, help="timed, per engine and round; default %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows are appended to this file")
    parser.add_argument("--resume", action="store_true", help="skip what that file has of this commit and processor without an error")
    parser.add_argument("--report", action="store_true", help="print the latest rows of that file as Markdown and stop")
    parser.add_argument("--list", action="store_true", help="print the networks and stop")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; 0 when every network that torch could export is without an error and not slower than dense."""
    chosen, console = arguments(words), Console()
    if chosen.list:
        for task, networks in TASKS.items():
            console.print(f"{task}: {', '.join(networks)}", highlight=False)
        return 0
    if chosen.report:
        print(markdown(latest(rows_of(chosen.results))))
        return 0
    networks = chosen.network or [n for task in chosen.task or TASKS for n in TASKS[task]]
    wanted = [blank(*key) for key in product(networks, chosen.exporter, (percent / 100 for percent in chosen.sparsity))]
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    found = earlier(chosen.results, wanted) if chosen.resume else {}
    protocol = timing.Protocol(rounds=chosen.rounds, seconds=chosen.seconds) if chosen.rounds else None
    try:
        with chosen.results.open("a", encoding="utf-8") as file, table.progress("zoo") as progress:
            for i, start in enumerate(wanted):
                progress(i, len(wanted), f"{start.network} {start.exporter} {start.sparsity:.0%}")
                if start.key not in found:
                    found[start.key] = row = alone(start, protocol)
                    file.write(json.dumps(asdict(row)) + "\n")
                    file.flush()
    finally:  # after Ctrl-C too
        done = [found[start.key] for start in wanted if start.key in found]
        console.print(summary([row for row in done if row.error is None]))
        for row in (row for row in done if row.error is not None):
            console.print(f"{row.network} {row.exporter} {row.sparsity:.0%}: {row.error}", markup=False, highlight=False, soft_wrap=True)
    rows = [found[start.key] for start in wanted]
    ours = [row for row in rows if not (row.error or "").startswith("torch ")]
    return int(any(row.error or (row.speedup_onnxruntime or 1) < FLOOR for row in ours))


def blank(network: str, exporter: str, sparsity: float) -> Row:
    """The row as it is before anything was done; DataError for a network that is not in the table."""
    packages = ("onnx", "onnxruntime", "openvino", "torch", "timm" if network.startswith("timm/") else "torchvision")
    versions = {"ticketkit": __version__, **{name: _version(name) for name in packages}}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    of_run = {"commit": machine.commit(), "cpu": machine.cpu_name(), "versions": versions, "timestamp": now}
    return Row(network, task_of(network), exporter, EXPORTERS[exporter], side(network), sparsity, **of_run)


def earlier(path: Path, wanted: Sequence[Row]) -> dict[Key, Row]:
    """Rows in the file of the same commit and processor without an error, the latest of each."""
    same = {(start.key, start.commit, start.cpu) for start in wanted}
    return {row.key: row for row in rows_of(path) if (row.key, row.commit, row.cpu) in same and row.error is None}


def rows_of(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file."""
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each network, exporter and sparsity, in the order of the table of networks."""
    networks = sum(TASKS.values(), ())
    found = {row.key: row for row in rows if row.network in networks}
    return sorted(found.values(), key=lambda row: (networks.index(row.network), row.exporter, row.sparsity))


COLUMNS = ("network", "exporter", "zeros", "sparse", "FLOPs", "checker", "ticketkit", "stock", "openvino", "file", "× ort", "× best")
LEGEND = (
    "sparse: layers that run sparse, of all convolutions and products; FLOPs: left; differences of outputs are fractions of the largest, of"
    " openvino on the plain file; file: dense over sparse bytes; speed of ticketkit over dense onnxruntime, and over the faster of"
    " onnxruntime and OpenVINO, batch 1, one thread"
)


def cells(row: Row) -> list[str]:
    """A row at a glance, by `COLUMNS`."""
    apart = [_share(row.differences.get(engine), row.scale) for engine in ("ticketkit", "onnxruntime", "openvino")]
    ratios = [f"{ratio:.2f}" if ratio else "-" for ratio in (row.file_ratio, row.speedup_onnxruntime, row.speedup)]
    passes = "passes" if {*row.checker.values()} == {"passes"} else "fails"
    left = f"{(row.flops_left or 0) / (row.flops_dense or 1):.0%}"
    return [row.network, row.exporter, f"{row.sparsity:.0%}", f"{row.sparse_layers}/{row.layers}", left, passes, *apart, *ratios]


def summary(rows: Sequence[Row]) -> Table:
    """What there is to know of each network that was converted, for a terminal."""
    grid = Table(*COLUMNS, box=None, caption=LEGEND, caption_justify="left")
    for column in grid.columns:
        column.no_wrap = True
    for row in rows:
        grid.add_row(*cells(row))
    return grid


def markdown(rows: Sequence[Row]) -> str:
    """The same as a page, with what failed below."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *(cells(row) for row in rows if row.error is None)]
    failed = [f"- {row.network}, {row.exporter}, {row.sparsity:.0%}: {row.error}" for row in rows if row.error is not None]
    return "\n".join([LEGEND + ".", "", *(f"| {' | '.join(line)} |" for line in lines), *([""] if failed else []), *failed])


def _share(difference: float | None, scale: float | None) -> str:
    return "-" if difference is None or not scale else f"{difference / scale:.0e}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    command.run(main)
