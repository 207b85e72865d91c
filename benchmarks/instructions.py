"""Instructions of one sparse 1x1 convolution on 64-bit ARM, under emulation: ours and XNNPACK's, counted, not timed.

    python benchmarks/instructions.py --library build/aarch64/libticketkit.so --xnnpack DIR
    python benchmarks/instructions.py --library LIB --isa neon_fp16 --format bsr --sparsity 80 90

`--library` is a build for 64-bit ARM (kernels/README.md). `--xnnpack` is the folder that Debian's arm64 packages libxnnpack-dev,
libxnnpack0, libpthreadpool0 and libcpuinfo0 are unpacked in (`dpkg-deb -x`); without it only ours is counted. Needs Debian's qemu-user,
gcc and g++-aarch64-linux-gnu. Every instruction of a call is counted, by a plugin of QEMU (instructions/counter.c): of ours tk_run, of
theirs xnn_run_operator, and their set-up apart, which they repeat when the address of an input changes. Both get the same weights, a bias
and a ReLU, on one thread, and their outputs are compared. Instructions are no time: llvm-mca's estimate is in benchmarks/mca.py.

Rows are appended to results/instructions.jsonl; all that stand for instructions are per non-zero and pixel.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from math import exp, log
from pathlib import Path

import command
from rich.console import Console
from rich.table import Table
from shapes import Conv, read

from ticketkit import __version__
from ticketkit.errors import DataError, KernelError

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "instructions.jsonl"
SOURCES = HERE / "instructions"
NETWORKS = ("mobilenet_v2", "resnet50")
SYSROOT = "/usr/aarch64-linux-gnu"
ROWS_OF_A_BLOCK = {"csr": 1, "bsr": 4}
TOLERANCE = {"neon": 1e-4, "scalar": 1e-4, "neon_fp16": 0.2}  # of sums of up to 200 products below 1


@dataclass(frozen=True)
class Count:
    """One layer in one format: instructions per non-zero and pixel; None where XNNPACK was not counted."""

    layer: str
    sparsity: float
    block_rows: int  # rows that share their zeros
    format: str
    isa: str
    nnz: int
    pixels: int
    ours: float  # the whole call
    ours_inner: float  # pieces of code that multiply and add vectors
    xnnpack: float | None
    xnnpack_inner: float | None
    xnnpack_setup: float | None
    ratio: float | None  # ours / xnnpack
    difference: float | None  # of the outputs
    ticketkit: str
    timestamp: str


def pointwise() -> list[Conv]:
    """The distinct 1x1 convolutions of stride 1 of the networks, the classifiers left out."""
    found = [entry.shape for entry in read() if entry.part == "body" and any(n in entry.counts for n in NETWORKS)]
    return [s for s in found if isinstance(s, Conv) and (s.kernel, s.stride, s.pad) == (1, 1, 0)]


def run(words: Sequence[str | Path], env: dict[str, str] | None = None) -> str:
    """What a program prints. Raises KernelError with the last line of its complaints."""
    try:
        done = subprocess.run(
            [str(w) for w in words], check=False, capture_output=True, text=True, timeout=600, env={**os.environ, **(env or {})}
        )
    except FileNotFoundError:
        raise KernelError(f"{words[0]} is not installed; Debian has it in {_package(str(words[0]))}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise KernelError(f"{Path(str(words[0])).name} failed with status {done.returncode}: {said[-1]}")
    return done.stdout


def _package(program: str) -> str:
    return {"gcc": "gcc", "qemu-aarch64": "qemu-user"}.get(program, "g++-aarch64-linux-gnu")


class Counter:
    """The plugin and the program, built in a folder."""

    def __init__(self, folder: Path, library: Path, xnnpack: Path | None) -> None:
        for path in (library, *([xnnpack / "usr/include/xnnpack.h"] if xnnpack else [])):
            if not path.exists():
                raise DataError(f"{path}: no such file; expected a library for 64-bit ARM, and a folder with unpacked Debian packages")
        libraries = [library.resolve().parent, *([xnnpack / "usr/lib/aarch64-linux-gnu"] if xnnpack else [])]
        self.plugin, self.program = folder / "counter.so", folder / "layer"
        self.env = {"QEMU_LD_PREFIX": SYSROOT, "QEMU_SET_ENV": f"LD_LIBRARY_PATH={':'.join(map(str, libraries))}"}
        run(["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", SOURCES / "counter.c", "-o", self.plugin])
        theirs = ["-DWITH_XNNPACK", "-isystem", xnnpack / "usr/include", "-lXNNPACK"] if xnnpack else []
        paths = [word for path in libraries for word in (f"-L{path}", f"-Wl,-rpath-link,{path}")]
        run(
            ["aarch64-linux-gnu-g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{HERE.parent / 'kernels'}",
             SOURCES / "layer.cc", "-o", self.program, *paths, f"-l:{library.name}", *theirs]
        )  # fmt: skip

    def count(self, shape: Conv, percent: float, form: str, block: int, isa: str) -> Count:
        """One layer, `percent` % zeros in blocks of `block` rows x 1. Raises KernelError where it fails or the outputs differ."""
        words = [shape.in_channels, shape.in_h, shape.in_w, shape.out_channels, percent, block, form]
        env = {**self.env, "QEMU_SET_ENV": f"{self.env['QEMU_SET_ENV']},TICKETKIT_ISA={isa}"}
        lines = [line.split() for line in run(["qemu-aarch64", "-plugin", self.plugin, self.program, *map(str, words)], env).splitlines()]
        counts = [(int(line[1]), int(line[2])) for line in lines if line[0] == "counted"]
        said = {line[0]: line[1:] for line in lines}
        name, nnz = said["ticketkit"][0], int(said["ticketkit"][1])
        pixels = shape.in_h * shape.in_w
        per = [(every / (nnz * pixels), inner / (nnz * pixels)) for every, inner in counts]
        theirs = len(per) == 3
        difference = float(said["difference"][0]) if theirs else None
        if difference is not None and not difference <= TOLERANCE[name]:
            raise KernelError(f"{shape.name}: expected XNNPACK's outputs, got a difference of {difference:g} on {name}")
        return Count(
            shape.name, percent / 100, block, form, name, nnz, pixels, *per[0], *(per[2] if theirs else (None, None)),
            per[1][0] if theirs else None, per[0][0] / per[2][0] if theirs else None, difference, __version__,
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )  # fmt: skip


def mean(values: Sequence[float]) -> float:
    """Geometric."""
    return exp(sum(map(log, values)) / len(values))


def show(rows: Sequence[Count]) -> None:
    """A line for every layer, and the means."""
    first = rows[0]
    what = f"{first.isa}, {first.format}, {first.sparsity:.0%} zeros, {first.block_rows}x1"
    table = Table(title=f"instructions per non-zero and pixel: {what}")
    for head in ("layer", "non-zeros", "ours", "inner", "XNNPACK", "inner", "set-up", "ours / XNNPACK"):
        table.add_column(head, justify="left" if head == "layer" else "right")
    for row in rows:
        numbers = (row.ours, row.ours_inner, row.xnnpack, row.xnnpack_inner, row.xnnpack_setup, row.ratio)
        table.add_row(row.layer, str(row.nnz), *("" if n is None else f"{n:.3f}" for n in numbers))
    ratios = [row.ratio for row in rows if row.ratio is not None]
    last = ("", "", "", f"{mean(ratios):.3f}") if ratios else ("", "", "", "")
    table.add_row("mean", "", f"{mean([r.ours for r in rows]):.3f}", f"{mean([r.ours_inner for r in rows]):.3f}", *last)
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--library", type=Path, required=True, help="libticketkit.so for 64-bit ARM")
    words.add_argument("--xnnpack", type=Path, help="folder with Debian's unpacked arm64 packages")
    words.add_argument("--isa", default="neon")
    words.add_argument("--format", choices=ROWS_OF_A_BLOCK, default="csr")
    words.add_argument("--sparsity", type=float, nargs="+", default=[90.0], metavar="PERCENT")
    words.add_argument("--layer", default="", metavar="TEXT", help="only layers whose name contains it")
    words.add_argument("--results", type=Path, default=RESULTS)
    given = words.parse_args(arguments)
    shapes = [s for s in pointwise() if given.layer in s.name]
    if not shapes:
        raise DataError(f"--layer {given.layer}: no 1x1 convolution of {' or '.join(NETWORKS)} has that in its name")
    given.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        counter = Counter(Path(folder), given.library, given.xnnpack)
        for percent in given.sparsity:
            rows = []
            for shape in shapes:
                rows.append(counter.count(shape, percent, given.format, ROWS_OF_A_BLOCK[given.format], given.isa))
                with given.results.open("a") as out:
                    out.write(json.dumps(asdict(rows[-1])) + "\n")
            show(rows)
    return 0


if __name__ == "__main__":
    command.run(main)
