"""Any pruned network in: torchvision's and timm's, exported by both torch exporters, converted, compared, timed; one row each.

    python benchmarks/zoo.py                                        every network, at 70 and 90 %: hours
    python benchmarks/zoo.py --network resnet50 timm/swin_tiny_patch4_window7_224 --exporter dynamo --sparsity 90
    python benchmarks/zoo.py --task detection --rounds 0            convert and compare only
    python benchmarks/zoo.py --resume                               go on where a run of this commit was stopped
    python benchmarks/zoo.py --list                                 the networks

A network has random weights (He-initialised, BatchNorm with statistics of its own), pruned by global magnitude: every convolution but the
first, or, in networks that have only one, every layer but the first and the last. Each row comes from a process of its own, so that one
that dies is a row too. Rows are appended to results/zoo.jsonl; Ctrl-C keeps them. Their fields are documented at `Row`. Needs the extras
`find` and `bench`, and, for networks named timm/…, timm.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import resource
import sys
import tempfile
import warnings
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
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from ticketkit import __version__, export, masks
from ticketkit.bench import engines, machine, table, timing
from ticketkit.bench.engines import Arrays
from ticketkit.bench.subject import make_feeds
from ticketkit.errors import DataError, ExportError, TicketkitError, first_line
from ticketkit.exporters import ExportReport
from ticketkit.lower import read
from ticketkit.quickstart import weights

if TYPE_CHECKING:
    from torch import Tensor, nn

RESULTS = Path(__file__).resolve().parent / "results" / "zoo.jsonl"
EXPORTERS = {"dynamo": 18, "torchscript": 17}  # of torch.onnx.export -> opset
TASKS: dict[str, tuple[str, ...]] = {
    "classification": (
        *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t"),
        *("mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d"),
        *("shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16", "wide_resnet50_2"),
        *("timm/coatnet_nano_rw_224", "timm/cspresnet50", "timm/deit_tiny_patch16_224", "timm/dla34", "timm/edgenext_xx_small"),
        *("timm/ese_vovnet19b_dw", "timm/ghostnet_100", "timm/hrnet_w18_small", "timm/levit_128s", "timm/mixer_s16_224"),
        *("timm/mobilevit_xxs", "timm/poolformer_s12", "timm/repvgg_a0", "timm/res2net50_26w_4s", "timm/resmlp_12_224", "timm/rexnet_100"),
        *("timm/swin_tiny_patch4_window7_224", "timm/tf_efficientnet_b0", "timm/xception41"),
    ),
    "detection": (
        *("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssd300_vgg16"),
        "ssdlite320_mobilenet_v3_large",
    ),
    "segmentation": ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"),
}
SIDES = {"inception_v3": 299, "detection": 320, "ssd300_vgg16": 300}  # pixels of an image, where not 224 or what timm says
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


# --- networks ---


def build(network: str, seed: int = 0) -> nn.Module:
    """The network in evaluation mode, randomly initialised, taking a batch of images and giving tensors."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = _make(network)
        for weight in weights(module).values():
            # as in ticketkit.quickstart: the largest weights of a layer carry most of its energy
            nn.init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu")
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                for tensor, low, high in ((part.weight, 0.5, 1.0), (part.running_var, 0.5, 1.5), (part.running_mean, -0.2, 0.2)):
                    if tensor is not None:
                        tensor.uniform_(low, high)
            if hasattr(part, "score_thresh"):
                part.score_thresh = 0.0  # or else an untrained detector finds nothing, and nothing is compared
    return _flat(module, task_of(network)).eval()


def prune(module: nn.Module, sparsity: float) -> int:
    """Sets the prunable weights of least magnitude to zero, by the rule of `ticketkit.estimator`; their number before."""
    found = weights(module)
    names = [name for name, weight in found.items() if weight.dim() > 2][1:] or list(found)[1:-1]
    arrays = {name: found[name].numpy() for name in names}  # of the same memory
    for name, mask in masks.global_magnitude(arrays, masks.full(arrays), sparsity).items():
        arrays[name][~mask] = 0
    return sum(array.size for array in arrays.values())


def export_torch(module: nn.Module, exporter: str, image: int, task: str, path: Path) -> None:
    """Write the module as ONNX by one of torch's exporters, free batch but for detection."""
    import torch

    free = task != "detection"
    example = torch.zeros(2 if free else 1, 3, image, image)
    arguments: dict[str, object] = {"dynamo": False, "dynamic_axes": {"images": {0: "batch"}} if free else None}
    if exporter == "dynamo":
        arguments = {"dynamo": True, "verbose": False, "dynamic_shapes": ({0: torch.export.Dim("batch")},) if free else None}
    torch.backends.mha.set_fastpath_enabled(False)  # an operator that ONNX has not
    with torch.no_grad():
        torch.onnx.export(module, (example,), str(path), input_names=["images"], opset_version=EXPORTERS[exporter], **arguments)


def task_of(network: str) -> str:
    """The task a network of the table is for; DataError for another."""
    for task, networks in TASKS.items():
        if network in networks:
            return task
    raise DataError(f"--network {network}: not in the table; expected one of {', '.join(sum(TASKS.values(), ()))}")


def side(network: str) -> int:
    """Height and width of an image."""
    return SIDES.get(network) or SIDES.get(task_of(network), 224)


def _make(network: str) -> nn.Module:
    if network.startswith("timm/"):
        import timm

        return timm.create_model(network.removeprefix("timm/"), pretrained=False)
    from torchvision import models as zoo

    backbone = {} if task_of(network) == "classification" else {"weights_backbone": None}
    extra = {"init_weights": False} if network in ("googlenet", "inception_v3") else {}  # minutes of truncated normal numbers
    return zoo.get_model(network, weights=None, **backbone, **extra)


def _flat(module: nn.Module, task: str) -> nn.Module:
    """A module of one tensor in, a tuple of tensors out; torchvision's detectors take a list of images and give a list of dictionaries."""
    from torch import nn

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = module

        def forward(self, images: Tensor) -> tuple[Tensor, ...] | Tensor:
            found = self.network([images[0]] if task == "detection" else images)
            found = found[0] if task == "detection" else found
            return tuple(found.values()) if isinstance(found, dict) else found

    return Flat()


# --- a row ---


def measure(start: Row, protocol: timing.Protocol | None) -> Row:
    """Fills a row in, step by step, as far as it gets; without a protocol nothing is timed."""
    found: dict[str, object] = {}
    try:
        with _quiet(), tempfile.TemporaryDirectory(prefix="ticketkit-zoo-") as folder:
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporters print, warn and log."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


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
    parser.add_argument("--list", action="store_true", help="print the networks and stop")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; 0 when every network that torch could export is without an error and not slower than dense."""
    chosen, console = arguments(words), Console()
    if chosen.list:
        for task, networks in TASKS.items():
            console.print(f"{task}: {', '.join(networks)}", highlight=False)
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
    rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    same = {(start.key, start.commit, start.cpu) for start in wanted}
    return {row.key: row for row in rows if (row.key, row.commit, row.cpu) in same and row.error is None}


def summary(rows: Sequence[Row]) -> Table:
    """What there is to know of each network that was converted, at a glance."""
    grid = Table("network", "exporter", "zeros", "sparse", "checker", "ticketkit", "stock", "openvino", "file", "× ort", "× best", box=None)
    grid.title, grid.title_justify = "differences are of the largest output; file: dense over sparse bytes", "left"
    for column in grid.columns:
        column.no_wrap = True
    for row in rows:
        name = [row.network, row.exporter, f"{row.sparsity:.0%}"]
        apart = [_share(row.differences.get(engine), row.scale) for engine in ("ticketkit", "onnxruntime", "openvino")]
        passes = "passes" if {*row.checker.values()} == {"passes"} else "fails"
        ratios = [f"{ratio:.2f}" if ratio else "-" for ratio in (row.file_ratio, row.speedup_onnxruntime, row.speedup)]
        grid.add_row(*name, f"{row.sparse_layers}/{row.layers}", passes, *apart, *ratios)
    return grid


def _share(difference: float | None, scale: float | None) -> str:
    return "-" if difference is None or not scale else f"{difference / scale:.0e}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TicketkitError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the rows so far are kept")
