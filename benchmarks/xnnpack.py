"""Our sparse convolutions against XNNPACK's on this machine, layer by layer: the pointwise layers of a network, one thread.

    python benchmarks/xnnpack.py                               MobileNetV2 at 80 and 90 %, 224 x 224
    python benchmarks/xnnpack.py --model resnet50-uniform-90.00
    python benchmarks/xnnpack.py --cpu 1 --rounds 21

A file exported by `ticketkit export` is cut into layers (ticketkit/bench/bundle.py), and `ticketkit-layers` times each of those that
XNNPACK's sparse operator takes, pointwise of stride 1: by our kernels, by that operator (SpMM over NCHW) and by XNNPACK's dense convolution
(NHWC), in one process and alternating rounds, every result first compared with one in double precision. Each gets input and output in the
order of floats it wants: ours as the file says, planes or tiles. All compute convolution, bias and clip: XNNPACK's operators have no
residual, so ours leaves it out here.

Ratios are medians over the rounds of the ratio within a round. A row for each layer, and one for all of them together (layer null: sums of
times), is appended to results/xnnpack.jsonl. Needs ticketkit-layers built with XNNPACK (CMake's preset device; Debian: libxnnpack-dev,
libpthreadpool-dev).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import command
import numpy as np
import programs
from models import Model
from rich.console import Console
from rich.table import Table

from ticketkit import __version__
from ticketkit.bench import bundle, machine, table
from ticketkit.errors import DataError, KernelError

HERE = Path(__file__).resolve().parent
BUILDS = HERE.parent / "build"
MODELS = ("mobilenet_v2-uniform-80.00", "mobilenet_v2-uniform-90.00")
OURS, SPARSE, DENSE = "sparse", "xnnpack-sparse", "xnnpack-dense"


@dataclass(frozen=True)
class Row:
    """One layer, or all of a model's together; times are milliseconds of one thread, medians of the rounds' medians."""

    model: str
    image: int  # height and width of the network's input
    layer: str | None  # None: all that follow, their times summed round by round
    layers: int  # how many that is
    shape: list[int] | None  # batch, in_channels, in_h, in_w, out_channels, kernel_h, kernel_w, stride_h, stride_w, groups
    layouts: list[str] | None  # of our input and output (tk_layout)
    format: str | None  # ours
    weights: int
    nnz: int
    multiply_adds: int  # of non-zeros
    ms: float  # ours
    xnnpack_sparse_ms: float
    xnnpack_dense_ms: float
    rounds_ms: list[float]
    xnnpack_sparse_rounds_ms: list[float]
    xnnpack_dense_rounds_ms: list[float]
    speedup_over_sparse: float
    speedup_over_dense: float
    isa: str  # ours
    cpu: str
    xnnpack: str  # version of the library's package, "" where dpkg does not know it
    rounds: int
    seconds: float  # timed, per layer, engine and round
    ticketkit: str
    commit: str
    timestamp: str  # UTC, ISO 8601, start of the run


def measure(model: Model, chosen: argparse.Namespace, timestamp: str) -> list[Row]:
    """Rows of a model: all its pointwise layers together, then each. KernelError for a wrong result; DataError for a model without one."""
    path = model.file(chosen.image, chosen.files)
    program = programs.find(chosen.build, "ticketkit-layers", "device")
    with tempfile.TemporaryDirectory(prefix="ticketkit-xnnpack-") as folder:
        file = Path(folder) / "bundle"
        bundle.write(path, file, (1, 3, chosen.image, chosen.image))
        pin = [] if chosen.cpu is None else ["--cpu", chosen.cpu]
        words = [program, file, "--plain", "--engines", f"{OURS},{SPARSE},{DENSE}", *pin]
        timing = ["--rounds", chosen.rounds, "--seconds", chosen.seconds, "--warmup", chosen.seconds]
        said = programs.run([*words, *timing])
    for event in (*programs.of(said, "failed"), *programs.of(said, "checked", ok=False)):
        raise KernelError(f"{model}: {event['layer']} by {event['engine']}: {event.get('message', 'a wrong result')}")
    taken = [e["layer"] for e in programs.of(said, "checked", engine=SPARSE)]
    both = [name for name in taken if programs.of(said, "checked", engine=OURS, layer=name)]
    if not both:
        raise DataError(f"{model}: expected pointwise layers of stride 1 that run sparse, got none")
    common = (str(model), chosen.image, said[0]["isa"], machine.cpu_name(), version(), chosen.rounds, chosen.seconds, timestamp)
    rows = [row([name], said, common) for name in both]
    return [row(both, said, common), *rows]


def row(names: Sequence[str], said: Sequence[programs.Event], common: tuple[str, int, str, str, str, int, float, str]) -> Row:
    """The row of these layers, times of a round summed."""
    model, image, isa, cpu, library, rounds, seconds, timestamp = common
    times: dict[str, list[float]] = {}
    for engine in (OURS, SPARSE, DENSE):
        by_layer = [medians(said, name, engine) for name in names]
        times[engine] = [sum(of_round) for of_round in zip(*by_layer, strict=True)]
    about = [programs.of(said, "layer", layer=name)[0] for name in names]
    one = about[0] if len(names) == 1 else {}
    (ours,) = programs.of(said, "checked", layer=names[0], engine=OURS) if one else ({},)
    ratio = {engine: float(np.median(np.array(times[engine]) / times[OURS])) for engine in (SPARSE, DENSE)}
    return Row(
        model=model,
        image=image,
        layer=one.get("layer"),
        layers=len(names),
        shape=one.get("shape"),
        layouts=one.get("layouts"),
        format=ours.get("format"),
        **{key: sum(event[key] for event in about) for key in ("weights", "nnz", "multiply_adds")},
        ms=float(np.median(times[OURS])),
        xnnpack_sparse_ms=float(np.median(times[SPARSE])),
        xnnpack_dense_ms=float(np.median(times[DENSE])),
        rounds_ms=times[OURS],
        xnnpack_sparse_rounds_ms=times[SPARSE],
        xnnpack_dense_rounds_ms=times[DENSE],
        speedup_over_sparse=ratio[SPARSE],
        speedup_over_dense=ratio[DENSE],
        isa=isa,
        cpu=cpu,
        xnnpack=library,
        rounds=rounds,
        seconds=seconds,
        ticketkit=__version__,
        commit=machine.commit(),
        timestamp=timestamp,
    )


def medians(said: Sequence[programs.Event], layer: str, engine: str) -> list[float]:
    """Milliseconds of each round."""
    return [float(np.median(event["ms"])) for event in programs.of(said, "round", layer=layer, engine=engine)]


def version() -> str:
    """Of Debian's package of the library."""
    try:
        words = ["dpkg-query", "-W", "-f", "${Version}", "libxnnpack0"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [Model.parse(name) for name in MODELS]
    parser.add_argument("--model", nargs="+", type=Model.parse, default=models, metavar="M", help="names as in models.py")
    parser.add_argument("--image", type=int, default=224, help="height and width in pixels; default %(default)s")
    parser.add_argument("--rounds", type=int, default=11, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=0.03, help="timed, per layer, engine and round; default %(default)s")
    parser.add_argument("--cpu", type=int, help="bind to this processor")
    parser.add_argument("--build", type=Path, default=BUILDS / "device", help="the build with XNNPACK; default %(default)s")
    parser.add_argument("--files", type=Path, default=BUILDS / "benchmarks", help="the networks are kept here")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "xnnpack.jsonl", help="rows are appended to this file")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    chosen = arguments(words)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    grid = Table("model", "layer", "ours", "XNNPACK sparse", "dense", "over sparse", "over dense", box=None, pad_edge=False)
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    with chosen.results.open("a", encoding="utf-8") as file, table.progress("models") as progress:
        for i, model in enumerate(chosen.model):
            progress(i, len(chosen.model), str(model))
            for each in measure(model, chosen, now):
                file.write(json.dumps(asdict(each)) + "\n")
                file.flush()
                times = (table.milliseconds(ms) for ms in (each.ms, each.xnnpack_sparse_ms, each.xnnpack_dense_ms))
                ratios = (f"{ratio:.2f}" for ratio in (each.speedup_over_sparse, each.speedup_over_dense))
                grid.add_row(str(model), each.layer or f"all {each.layers}", *times, *ratios)
    Console(width=None if sys.stdout.isatty() else 140).print(grid)


if __name__ == "__main__":
    command.run(main)
