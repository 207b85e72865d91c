"""Cycles of the NEON inner loops by llvm-mca, LLVM's static model of processors: an estimate, *simulated*, no measurement.

    python benchmarks/mca.py --library build/aarch64/libticketkit.so --mca llvm-mca-19

`--library` is a build for 64-bit ARM (kernels/README.md); needs Debian's g++-aarch64-linux-gnu for its objdump, and llvm. The inner loop of
a kernel is found as the code between a backward branch and its target that has the most multiply-adds and no further branch, in the
function of the kernel's widest tile. The model has everything in L1 and no mispredicted branch. Cortex-A55 runs instructions in order. LLVM
has no model of its own for Cortex-A76; Neoverse-N1, the same core for servers, stands for it.

Bound is what the busiest unit of LLVM's model needs: for the A55 it counts a pair of 128-bit loads as six cycles, where the guide has four.
The limit beside it is that of the core's units, for loads and multiply-adds alone (Arm's Software Optimization Guides): the A55 starts
one 128-bit multiply-add a cycle and loads 64 bits a cycle, the N1 starts two of both a cycle, 128 bits wide. Rows go to
results/mca.jsonl; cycles are per stored value and pixel.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import command
from rich.console import Console
from rich.table import Table

from ticketkit import __version__
from ticketkit.errors import DataError, KernelError

RESULTS = Path(__file__).resolve().parent / "results" / "mca.jsonl"
OBJDUMP = "aarch64-linux-gnu-objdump"
ITERATIONS = 200
CORES = {"cortex-a55": (1.0, 2.0), "neoverse-n1": (0.5, 0.5)}  # cycles of a 128-bit multiply-add, and of a 128-bit load
LANES = {"neon": 4, "neon_fp16": 8}
ROWS = {"csr": 1, "bsr": 4}
LOOPS = {  # kernel, ISA -> the rows of the loop, as they are named in kernels/algo
    ("csr", "neon"): "CsrRows",
    ("bsr", "neon"): "BsrRows",
    ("csr", "neon_fp16"): "HalfCsrRows",
    ("bsr", "neon_fp16"): "HalfBsrRows",
}

_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
_LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*?)(?:\s*//.*)?$")
_FMLA = re.compile(r"v\d+\.(?:4s|8h)")


@dataclass(frozen=True)
class Line:
    address: int
    name: str
    words: str  # operands

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        if not (self.name == "b" or self.name.startswith(("b.", "cb", "tb"))):
            return None
        found = re.search(r"(?:^|, )([0-9a-f]+)(?: <|$)", self.words)
        return int(found[1], 16) if found else None

    @property
    def multiplies(self) -> bool:
        return self.name == "fmla" and bool(_FMLA.match(self.words))

    @property
    def loads(self) -> int:
        """128-bit vectors that it loads."""
        return {"ldr": 1, "ldur": 1, "ldp": 2}.get(self.name, 0) if self.words.startswith("q") else 0


@dataclass(frozen=True)
class Estimate:
    """The inner loop of one kernel on one core; cycles per stored value and pixel, *simulated*."""

    kernel: str
    isa: str
    core: str
    vectors: int  # of a tile
    instructions: int  # of one pass of the loop
    multiply_adds: int
    loads: int  # 128-bit vectors, weights among them
    cycles: float
    bound: float  # what the model's busiest unit needs
    limit: float  # what the core's guide says of loads and multiply-adds
    llvm: str
    ticketkit: str
    timestamp: str


def functions(text: str) -> Iterator[tuple[str, list[Line]]]:
    """Names and lines of objdump's functions."""
    name, lines = "", []
    for row in text.splitlines():
        if head := _FUNCTION.match(row):
            if lines:
                yield name, lines
            name, lines = head[1], []
        elif found := _LINE.match(row):
            lines.append(Line(int(found[1], 16), found[2], found[3]))
    if lines:
        yield name, lines


def innermost(lines: Sequence[Line]) -> list[Line]:
    """The loop with the most multiply-adds among those without another branch; empty where there is none."""
    at = {line.address: i for i, line in enumerate(lines)}
    best: list[Line] = []
    for i, line in enumerate(lines):
        start = at.get(line.target, i) if line.target is not None else i
        body = list(lines[start : i + 1])
        if start < i and not any(each.target is not None for each in body[:-1]) and _work(body) > _work(best):
            best = body
    return best


def _work(body: Sequence[Line]) -> int:
    return sum(line.multiplies for line in body)


def loop(text: str, rows: str, isa: str) -> tuple[int, list[Line]]:
    """Vectors of the widest tile of those rows, and its inner loop. Raises DataError where the library has none."""
    widest: tuple[int, list[Line]] = (0, [])
    name_of = re.compile(rf"tk::{isa}::{rows}(?:>?::of<|, )(\d+)[,>]")
    for name, lines in functions(text):
        if (found := name_of.search(name)) and (body := innermost(lines)):
            vectors = int(found[1])
            if vectors > widest[0] or (vectors == widest[0] and _work(body) > _work(widest[1])):
                widest = vectors, body
    if not widest[1]:
        raise DataError(f"the library has no inner loop of {rows} on {isa}; expected a build of ticketkit for 64-bit ARM with symbols")
    return widest


def run(words: Sequence[str], text: str | None = None) -> str:
    """What a program prints. Raises KernelError."""
    try:
        done = subprocess.run(words, check=False, input=text, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        raise KernelError(f"{words[0]} is not installed; Debian has llvm-mca-19 in llvm-19, {OBJDUMP} in g++-aarch64-linux-gnu") from None
    if done.returncode:
        raise KernelError(f"{words[0]} failed with status {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing'])[0]}")
    return done.stdout


def assembly(body: Sequence[Line]) -> str:
    """The loop as an assembler reads it."""
    lines = [f"{line.name} {line.words}" for line in body[:-1]]
    last = re.sub(r"(^|, )[0-9a-f]+ <.*", r"\1again", f"{body[-1].words}")
    return "\n".join(["again:", *lines, f"{body[-1].name} {last}", ""])


def estimate(mca: str, text: str, kernel: str, isa: str, core: str, version: str) -> Estimate:
    """One loop on one core. Raises DataError, KernelError."""
    vectors, body = loop(text, LOOPS[kernel, isa], isa)
    said = run([mca, "-mtriple=aarch64-linux-gnu", f"-mcpu={core}", "-mattr=+fullfp16", f"-iterations={ITERATIONS}", "-"], assembly(body))
    total, bound = re.search(r"Total Cycles:\s+(\d+)", said), re.search(r"Block RThroughput:\s+([\d.]+)", said)
    if not total or not bound:
        raise KernelError(f"{mca}: expected lines 'Total Cycles' and 'Block RThroughput', got {said[:200]!r}")
    work, loads = _work(body), sum(line.loads for line in body)
    fma, load = CORES[core]
    columns = work // (vectors * ROWS[kernel])
    per_pixel = work * LANES[isa]  # stored values x pixels of one pass
    cycles, limit = int(total[1]) / ITERATIONS / per_pixel, max(work * fma, columns * vectors * load) / per_pixel
    return Estimate(
        f"conv2d_{kernel}_f32", isa, core, vectors, len(body), work, loads, cycles, float(bound[1]) / per_pixel, limit,
        version, __version__, datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )  # fmt: skip


def show(rows: Sequence[Estimate]) -> None:
    table = Table(title="simulated: cycles per stored value and pixel of the inner loops")
    for head in ("kernel", "ISA", "core", "vectors", "instructions", "cycles", "bound", "limit"):
        table.add_column(head, justify="left" if head in ("kernel", "ISA", "core") else "right")
    for r in rows:
        per_instruction = r.instructions / (r.multiply_adds * LANES[r.isa])
        numbers = (per_instruction, r.cycles, r.bound, r.limit)
        table.add_row(r.kernel, r.isa, r.core, str(r.vectors), *(f"{n:.3f}" for n in numbers))
    Console(width=120).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--library", type=Path, required=True, help="libticketkit.so for 64-bit ARM")
    words.add_argument("--mca", default="llvm-mca-19", help="llvm-mca, of LLVM 19 or later")
    words.add_argument("--results", type=Path, default=RESULTS)
    given = words.parse_args(arguments)
    if not given.library.exists():
        raise DataError(f"{given.library}: no such file; expected a library for 64-bit ARM")
    version = re.search(r"version ([\d.]+)", run([given.mca, "--version"]))
    text = run([OBJDUMP, "-d", "-C", "--no-show-raw-insn", str(given.library)])
    rows = [estimate(given.mca, text, kernel, isa, core, version[1] if version else "") for kernel, isa in LOOPS for core in CORES]
    given.results.parent.mkdir(parents=True, exist_ok=True)
    with given.results.open("a") as out:
        for row in rows:
            out.write(json.dumps(asdict(row)) + "\n")
    show(rows)
    return 0


if __name__ == "__main__":
    command.run(main)
