"""What the networks people deploy would gain on phones and boards: *simulated*, nothing is run (`ticketkit estimate --device`).

    python benchmarks/simulated.py                       five networks, 70, 80 and 90 %, single weights and blocks of 4x1, every core
    python benchmarks/simulated.py --network resnet18 --core cortex-a55 cortex-a76@2.8
    python benchmarks/simulated.py --report              the newest rows of results/simulated.jsonl as a page: results/simulated.md

Rows are appended to results/simulated.jsonl; one is a network at a sparsity, spread evenly over the layers but the first and the last, in
blocks of some size, at 224 x 224 and batch 1, on one core. Beside the core that is the processor of results/models.jsonl the page has what
was measured there, as a check of the model. Needs the extra `find`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import command
import numpy as np

from ticketkit import __version__, cores
from ticketkit.bench import machine
from ticketkit.estimator import estimates

RESULTS = Path(__file__).resolve().parent / "results"
NETWORKS = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet18", "resnet50")
SPARSITIES = (0.7, 0.8, 0.9)
BLOCKS = ("1x1", "4x1")
MEASURED_ON = "zen3"  # the core whose rows are in results/models.jsonl


@dataclass(frozen=True)
class Row:
    """One network on one core; times are milliseconds of convolutions and matrix products on that core alone."""

    simulated: bool  # always
    network: str
    distribution: str
    granularity: str
    sparsity: float
    core: str
    ghz: float
    dense_ms: float
    sparse_ms: float
    speedup: float
    flops_left: float  # share
    csr_layers: int
    bsr_layers: int
    layers: int
    ticketkit: str
    commit: str
    timestamp: str  # UTC, ISO 8601, start of the run

    @property
    def key(self) -> tuple[str, str, float, str]:
        return self.network, self.granularity, self.sparsity, f"{self.core}@{self.ghz:g}"


def simulate(network: str, block: str, on: Sequence[str], sparsities: Sequence[float], commit: str, timestamp: str) -> list[Row]:
    """Rows of a network of torchvision on these cores, one for each sparsity."""
    made = []
    found = estimates(network, sparsities, on, distribution="uniform", granularity=block)
    for device, level in ((one.device, level) for one in found for level in one.levels):
        assert device is not None
        totals, (dense, sparse) = level.plan.totals(), level.ms
        made.append(
            Row(
                True, network, "uniform", block, level.sparsity, device.name, device.ghz, dense, sparse, level.speedup,
                totals["flops_left"] / totals["flops_dense"], level.count("csr"), level.count("bsr"), len(level.plan.choices),
                __version__, commit, timestamp,
            )
        )  # fmt: skip
    return made


def newest(path: Path) -> list[Row]:
    """The last row of each network, granularity, sparsity and core."""
    rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return list({row.key: row for row in rows}.values())


def measured(path: Path) -> dict[tuple[str, str, float], float]:
    """(network, granularity, sparsity) -> speedup of ticketkit over dense onnxruntime, batch 1, one thread, the newest run: the median over
    its rounds."""
    runs: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else ()):
        if (row["batch"], row["threads"]) == (1, 1):
            runs.setdefault((row["timestamp"], row["model"]), {})[row["engine"]] = row["rounds_p50_ms"]
    found = {}
    for (_, model), rounds in sorted(runs.items()):
        name = model.removesuffix(".onnx").removesuffix("-224px")
        for network in NETWORKS:
            distribution, _, rest = name.removeprefix(f"{network}-").partition("-")
            percent, _, block = rest.partition("-")
            if name.startswith(f"{network}-") and distribution == "uniform" and {"ticketkit", "onnxruntime"} <= rounds.keys():
                ratios = [d / s for d, s in zip(rounds["onnxruntime"], rounds["ticketkit"], strict=False)]
                found[network, block or "1x1", round(float(percent) / 100, 4)] = float(np.median(ratios))
    return found


def report(rows: Iterable[Row], checks: dict[tuple[str, str, float], float]) -> str:
    """The page: for every core a table of networks, and what of it was measured."""
    by_core: dict[str, list[Row]] = {}
    for row in rows:
        by_core.setdefault(f"{row.core} at {row.ghz:g} GHz", []).append(row)
    page = ["# Simulated: networks people deploy, on phones and boards\n"]
    page.append(
        "**Simulated, nothing here was run**: `ticketkit estimate NETWORK --device CORE --distribution uniform`, a model of the pipes and\n"
        "caches of one core (`ticketkit/cores`), at 224 x 224, batch 1, float32. Convolutions and matrix products only; dense is an\n"
        "engine that keeps its loops 95 % busy (in order: as busy as its pipes allow). Cells are milliseconds dense, and times faster at\n"
        "70 / 80 / 90 % zeros, single weights and blocks of 4x1. To measure a device, use `ticketkit bench --device`.\n"
    )
    for core, found in sorted(by_core.items()):
        page.append(f"\n## {core}, simulated\n")
        page.append("| network | simulated dense ms | 1x1: 70 / 80 / 90 % | 4x1: 70 / 80 / 90 % |\n|---|---|---|---|")
        for network in dict.fromkeys(row.network for row in found):
            of = [row for row in found if row.network == network]
            cells = [
                " / ".join(f"{row.speedup:.2f}" for row in sorted(of, key=lambda row: row.sparsity) if row.granularity == block) + "x"
                for block in BLOCKS
            ]
            page.append(f"| {network} | {of[0].dense_ms:.3g} | {cells[0]} | {cells[1]} |")
    page.append(f"\n## The check: {MEASURED_ON} against its measurements\n")
    page.append(
        "Speedups over dense onnxruntime of whole networks in `models.jsonl` (one thread, batch 1). Measured networks have pooling and\n"
        "changes of layout too, which simulated ones leave out.\n"
    )
    page.append("| network | blocks | zeros | simulated | measured | error |\n|---|---|---|---|---|---|")
    errors = []
    for row in (row for group in by_core.values() for row in group if row.core == MEASURED_ON):
        if (speedup := checks.get((row.network, row.granularity, row.sparsity))) is not None:
            errors.append(row.speedup / speedup - 1)
            cells = f"{row.sparsity:.0%} | {row.speedup:.2f}x | {speedup:.2f}x | {errors[-1]:+.0%}"
            page.append(f"| {row.network} | {row.granularity} | {cells} |")
    if errors:
        page.append(f"\nOff by {np.mean(np.abs(errors)):.0%} in the mean, by {max(errors, key=abs):+.0%} at most, of {len(errors)}.")
    return "\n".join(page) + "\n"


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=NETWORKS, metavar="NAME", help="of torchvision; default %(default)s")
    parser.add_argument("--core", nargs="+", default=cores.names(), metavar="CORE[@GHZ]", help="default: all, %(default)s")
    parser.add_argument("--sparsity", nargs="+", type=float, default=SPARSITIES, metavar="S", help="fractions; default %(default)s")
    parser.add_argument("--granularity", nargs="+", default=BLOCKS, metavar="RxC", help="default %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS / "simulated.jsonl", help="rows are appended to this file")
    parser.add_argument("--report", action="store_true", help="write the page beside that file, and stop")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Simulate and append, or write the page."""
    chosen = arguments(words)
    if chosen.report:
        page = chosen.results.with_suffix(".md")
        page.write_text(report(newest(chosen.results), measured(RESULTS / "models.jsonl")), encoding="utf-8")
        print(page)
        return 0
    commit, now = machine.commit(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    for core in chosen.core:
        cores.get(core)  # before anything is appended
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    with chosen.results.open("a", encoding="utf-8") as file:
        for network in chosen.network:
            for block in chosen.granularity:
                for row in simulate(network, block, chosen.core, chosen.sparsity, commit, now):
                    file.write(json.dumps(asdict(row)) + "\n")
                    what = f"{row.network} {row.granularity} {row.sparsity:.0%} on {row.core} at {row.ghz:g} GHz"
                    times = f"{row.dense_ms:.4g} -> {row.sparse_ms:.4g} ms, {row.speedup:.2f}x"
                    print(f"{what}: simulated {times}", file=sys.stderr, flush=True)
                file.flush()
    return 0


if __name__ == "__main__":
    command.run(main)
