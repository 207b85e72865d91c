"""How far `ticketkit estimate` is off: predicted against measured speedup over onnxruntime; rows are appended to results/estimate.jsonl.

    python benchmarks/estimate.py                      all networks of results/models.jsonl at batch 1, one thread
    python benchmarks/estimate.py --rows /tmp/new.jsonl --network mobilenet_v2 resnet50

Of each network the newest measurement counts: the median over its rounds of onnxruntime's time over ticketkit's. The network is built
again with the same zeros and estimated at its own sparsity, so that what is compared is the prediction, and not one distribution with
another. Needs the extra `find`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import command
import numpy as np
from models import HERE, Model
from rich.console import Console
from rich.table import Table

from ticketkit import cost, estimate
from ticketkit.bench import machine
from ticketkit.quickstart import network


@dataclass(frozen=True)
class Row:
    """One network; times are milliseconds."""

    model: str
    predicted_dense_ms: float
    predicted_ms: float
    predicted_speedup: float
    measured_dense_ms: float
    measured_ms: float
    measured_speedup: float
    error: float  # predicted speedup over the measured one, less 1
    cpu: str
    isa: str
    measured_commit: str
    measured: str  # UTC, ISO 8601, start of that run
    cost_model: str  # the machine it was fitted on
    commit: str
    timestamp: str


def measurements(path: Path, networks: list[str] | None) -> Iterator[tuple[Model, int, dict[str, Any], dict[str, Any]]]:
    """(model, image side, row of onnxruntime, row of ticketkit): the newest run of each file, at batch 1 on one thread."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if (row["batch"], row["threads"]) == (1, 1):
            runs.setdefault(f"{row['timestamp']} {row['model']}", {})[row["engine"]] = row
    newest = {key.split()[1]: run for key, run in sorted(runs.items()) if {"onnxruntime", "ticketkit"} <= run.keys()}
    for file, run in newest.items():
        name, _, image = file.removesuffix(".onnx").removesuffix("-plain").rpartition("-")
        model = Model.parse(name)
        if not networks or model.network in networks:
            yield model, int(image.removesuffix("px")), run["onnxruntime"], run["ticketkit"]


def compare(model: Model, image: int, dense: dict[str, Any], sparse: dict[str, Any]) -> Row:
    """The prediction for a network beside its measurement."""
    zeros = model.sparsity()
    built = network(model.network, zeros, image, block=model.block)
    own = sparse["sparsity_prunable"] or model.level  # None where there are no convolutions to prune
    level = estimate(built, own, granularity=f"{model.block}x1").levels[0]
    rounds = zip(dense["rounds_p50_ms"], sparse["rounds_p50_ms"], strict=False)  # an interrupted run has one of unequal length
    measured = float(np.median([d / s for d, s in rounds]))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Row(
        str(model), *level.ms, level.speedup, dense["p50_ms"], sparse["p50_ms"], measured, level.speedup / measured - 1, sparse["cpu"],
        sparse["isa"], sparse["commit"], sparse["timestamp"], str(cost.table()["machine"]), machine.commit(), now,
    )  # fmt: skip


def show(rows: list[Row]) -> None:
    """A table of the rows, and the mean and largest size of their errors."""
    table = Table("model", "predicted ms", "measured ms", "predicted", "measured", "error", box=None, pad_edge=False)
    for r in rows:
        predicted, measured = f"{r.predicted_dense_ms:.4g} → {r.predicted_ms:.4g}", f"{r.measured_dense_ms:.4g} → {r.measured_ms:.4g}"
        table.add_row(r.model, predicted, measured, f"{r.predicted_speedup:.2f}x", f"{r.measured_speedup:.2f}x", f"{r.error:+.0%}")
    worst, mean = max(rows, key=lambda r: abs(r.error)), np.mean([abs(r.error) for r in rows])
    console = Console(width=140)
    console.print(table)
    console.print(f"\n{len(rows)} networks: the speedup is off by {mean:.1%} in the mean, by {worst.error:+.1%} at most ({worst.model})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=HERE / "results" / "models.jsonl", help="measurements; default %(default)s")
    parser.add_argument("--network", nargs="+", metavar="NAME", help="of torchvision; default: all that were measured")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "estimate.jsonl", help="rows are appended to this file")
    chosen = parser.parse_args()
    rows: list[Row] = []
    for found in measurements(chosen.rows, chosen.network):
        rows.append(compare(*found))
        with chosen.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(rows[-1])) + "\n")
        print(f"{rows[-1].model}: {rows[-1].error:+.0%}", file=sys.stderr, flush=True)
    if not rows:
        sys.exit(f"{chosen.rows}: no run of onnxruntime and ticketkit at batch 1, one thread, of these networks")
    show(rows)


if __name__ == "__main__":
    command.run(main)
