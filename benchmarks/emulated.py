"""Whole networks on 64-bit ARM, emulated: are the outputs those of this machine? Right or wrong only, no times.

    python benchmarks/emulated.py                              ResNet-18, ResNet-50, MobileNetV2, uniform 90 %, 224 x 224
    python benchmarks/emulated.py --image 64 --layers          quick; every layer of them too, by ticketkit-layers
    python benchmarks/emulated.py --model gm-90.00             any name of models.py

Each exported file runs in `ticketkit.InferenceSession` here, and under qemu's user mode in ONNX Runtime's own library for 64-bit ARM, out
of PyPI's wheel, with our operators cross-built for it and without them. The input is the same. Outputs must agree to half of float32's
digits, as in `ticketkit bench`. With --layers each layer of the file is also compared with a result in double precision, for our kernels
and our dense baseline, by a tolerance that kernels/device/reference.h derives.

Needs Debian's qemu-user-static and g++-aarch64-linux-gnu, and the build of CMake's preset aarch64-linux-gnu (--build names another). Rows
are appended to results/emulated.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
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

import ticketkit
from ticketkit.bench import bundle, machine, table, timing
from ticketkit.bench.devices import _runner, qemu
from ticketkit.errors import DataError, KernelError
from ticketkit.lower import operators, read
from ticketkit.runtime import native

HERE = Path(__file__).resolve().parent
BUILDS = HERE.parent / "build"
NETWORKS = ("resnet18-uniform-90.00", "resnet50-uniform-90.00", "mobilenet_v2-uniform-90.00")
EMULATOR, CPU, PRESET = qemu.CLIENT, qemu.CPU, "aarch64-linux-gnu"


@dataclass(frozen=True)
class Row:
    """One network, or one layer of it by one engine, under emulation."""

    model: str
    model_sha256: str  # of the exported file
    image: int  # height and width of the input
    layer: str | None  # None: the whole network
    engine: str
    format: str | None  # of a layer: what its weights are packed in
    layers: int  # of the network, in the bundle
    sparse_layers: int
    ok: bool
    max_abs_diff: float | None  # of a network: from its outputs here; of a layer: from a result in double precision
    max_abs_diff_dense: float | None  # of a network: from the outputs of dense ONNX Runtime in the same emulation
    max_abs_output: float
    tolerance: float
    isa: str  # emulated
    host_isa: str
    emulator: str
    cpu: str  # emulated
    onnxruntime: str
    ticketkit: str
    commit: str
    timestamp: str  # UTC, ISO 8601, start of the run


@dataclass(frozen=True)
class Emulation:
    """Programs for 64-bit ARM, and how they are run here; `root` holds what they see in place of this machine's files."""

    root: Path
    build: Path
    library: Path

    @classmethod
    def prepare(cls, root: Path, build: Path, library: Path) -> Emulation:
        qemu.make_root(root)
        return cls(root, build, library)

    def run(self, name: str, *words: object) -> list[programs.Event]:
        """What the program of that name says."""
        return programs.run([EMULATOR, "-cpu", CPU, "-L", self.root, programs.find(self.build, name, PRESET), *words])

    def network(self, model: Path, plain: Path, x: np.ndarray, scratch: Path) -> tuple[list[programs.Event], dict[str, np.ndarray]]:
        """Events and outputs of both engines."""
        x.astype("<f4").tofile(scratch / "x.f32")
        chosen = ["--engine", f"onnxruntime={plain}", "--engine", f"ticketkit={model}"]
        libraries = ["--library", self.library, "--operators", programs.find(self.build, "libticketkit.so", PRESET)]
        inputs = ["--input", scratch / "x.f32", "--shape", ",".join(map(str, x.shape))]
        said = self.run("ticketkit-network", *libraries, *chosen, *inputs, "--outputs", scratch, "--check-only", "--timeout", 3600)
        for event in programs.of(said, "failed"):
            raise KernelError(f"{model.name}: {event['engine']} under emulation: {event['message']}")
        return said, {name: np.fromfile(scratch / f"{name}.f32", "<f4") for name in ("onnxruntime", "ticketkit")}


def check(model: Model, chosen: argparse.Namespace, emulation: Emulation, timestamp: str) -> list[Row]:
    """The rows of one network. KernelError, ModelError where it cannot be run."""
    path = model.file(chosen.image, chosen.files)
    plain = path.with_name(f"{path.stem}-plain.onnx")
    x = np.random.default_rng(0).standard_normal((1, 3, chosen.image, chosen.image), np.float32)
    session = ticketkit.InferenceSession(path, threads=1)
    here = np.concatenate([y.ravel() for y in session.run(None, {session.get_inputs()[0].name: x})])
    with tempfile.TemporaryDirectory(prefix="ticketkit-emulated-") as folder:
        scratch = Path(folder)
        said, outputs = emulation.network(path, plain, x, scratch)
        names = bundle.write(path, scratch / "bundle", x.shape)
        words = [scratch / "bundle", "--check-only", "--engines", "sparse,dense"]
        checked = programs.of(emulation.run("ticketkit-layers", *words), "checked") if chosen.layers else []
    scale = float(np.abs(here).max())
    tolerance = timing.AGREE * scale
    whole, dense = (difference(outputs["ticketkit"], other) for other in (here, outputs["onnxruntime"]))
    common = {
        "model": str(model),
        "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "image": chosen.image,
        "layers": len(names),
        "sparse_layers": len(list(operators.nodes(read(path)))),
        "isa": said[0]["isa"],
        "host_isa": native.active_isa().name,
        "emulator": version(),
        "cpu": CPU,
        "onnxruntime": said[0]["runtime"],
        "ticketkit": ticketkit.__version__,
        "commit": machine.commit(),
        "timestamp": timestamp,
    }
    ok = max(whole, dense) <= tolerance  # a NaN was refused by the runner
    fields = ("layer", "engine", "format", "ok", "max_abs_diff", "max_abs_output", "tolerance")
    return [
        Row(layer=None, engine="ticketkit", format=None, ok=ok, max_abs_diff=whole, max_abs_diff_dense=dense, max_abs_output=scale,
            tolerance=tolerance, **common),
        *(Row(max_abs_diff_dense=None, **{key: event[key] for key in fields}, **common) for event in checked),
    ]  # fmt: skip


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference; KernelError for arrays of different lengths."""
    if a.shape != b.shape:
        raise KernelError(f"expected {b.size} outputs as here, got {a.size} under emulation")
    return float(np.abs(a.astype(np.float64) - b).max())


def version() -> str:
    """The emulator's own name and version. DataError where it is missing."""
    try:
        said = subprocess.run([EMULATOR, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise DataError(f"no {EMULATOR}; install Debian's qemu-user-static") from None
    return said.splitlines()[0]


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = [Model.parse(name) for name in NETWORKS]
    parser.add_argument("--model", nargs="+", type=Model.parse, default=networks, metavar="M", help="names as in models.py")
    parser.add_argument("--image", type=int, default=224, help="height and width in pixels; default %(default)s")
    parser.add_argument("--layers", action="store_true", help="each layer too")
    parser.add_argument("--build", type=Path, default=BUILDS / PRESET, help="the build for 64-bit ARM; default %(default)s")
    parser.add_argument("--onnxruntime", type=Path, help="libonnxruntime.so for 64-bit ARM; default: out of PyPI's wheel")
    parser.add_argument("--files", type=Path, default=BUILDS / "benchmarks", help="the networks are kept here")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "emulated.jsonl", help="rows are appended to this file")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run and print; 1 where anything differs by more than rounding explains."""
    chosen = arguments(words)
    version()
    library = _runner.onnxruntime("aarch64-linux", chosen.onnxruntime, lambda what: print(what, file=sys.stderr))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    grid = Table("network", "layers", "ARM to here", "ARM, sparse to dense", "tolerance", "layer results right", box=None, pad_edge=False)
    wrong: list[Row] = []
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ticketkit-root-") as folder, chosen.results.open("a", encoding="utf-8") as file:
        emulation = Emulation.prepare(Path(folder) / "root", chosen.build, library)
        with table.progress("emulated networks") as progress:
            for i, model in enumerate(chosen.model):
                progress(i, len(chosen.model), str(model))
                network, *layers = rows = check(model, chosen, emulation, now)
                file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
                file.flush()
                wrong += [row for row in rows if not row.ok]
                numbers = (f"{each:.2g}" for each in (network.max_abs_diff, network.max_abs_diff_dense, network.tolerance))
                grid.add_row(str(model), str(network.layers), *numbers, f"{sum(row.ok for row in layers)} of {len(layers)}")
    Console(width=None if sys.stdout.isatty() else 140).print(grid)
    for row in wrong:
        what = f"layer {row.layer} by {row.engine}" if row.layer else "outputs"
        print(f"error: {row.model}: {what}: expected a difference within {row.tolerance:.3g}, got {row.max_abs_diff}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    command.run(main)
