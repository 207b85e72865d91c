"""Speedup against sparsity, from the rows of benchmarks/models.py, with what the FLOPs left would allow.

    python benchmarks/plot.py                            results/models.jsonl -> results/models.svg
    python benchmarks/plot.py --output models.png --cpu "AMD EPYC"

One panel for each network and kind of sparsity, one line for each batch and number of threads. Where a model was measured more than
once the newest row counts. Needs the extra `report`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import command

from ticketkit.errors import DataError, TicketkitError

RESULTS = Path(__file__).resolve().parent / "results"
ENGINE = "ticketkit"
FILE = re.compile(r"(?P<network>\w+)-(?P<distribution>gm|uniform|pointwise)-[\d.]+(-(?P<block>\d+x1))?-(?P<image>\d+px)(-plain)?\.onnx")
KINDS = {"gm": "global magnitude", "uniform": "uniform", "pointwise": "uniform, depthwise dense"}


@dataclass(frozen=True)
class Point:
    """A measurement: prunable sparsity, speedup over the fastest dense engine, and dense FLOPs over the FLOPs left."""

    sparsity: float
    speedup: float
    limit: float


Setting: TypeAlias = tuple[int, int]  # batch, threads
Panels: TypeAlias = dict[str, dict[Setting, list[Point]]]  # title -> lines, the points by sparsity


def panels(path: Path, cpu: str | None = None) -> Panels:
    """What is to be drawn of the rows in the file, of the processor named or else of the newest row's.

    Raises DataError for a file that is missing, holds anything but rows, or has none to draw.
    """
    rows = [row for row in read(path) if row["engine"] == ENGINE and row["speedup"] is not None and row["sparsity_prunable"] is not None]
    rows.sort(key=lambda row: str(row["timestamp"]))
    cpu = cpu or (rows[-1]["cpu"] if rows else None)
    newest: dict[tuple[str, Setting], dict[str, Any]] = {  # a network is measured as its plain file where no layer gains
        (row["model"].replace("-plain", ""), (row["batch"], row["threads"])): row
        for row in rows
        if row["cpu"] == cpu and FILE.fullmatch(row["model"])
    }
    if not newest:
        raise DataError(f"{path}: no row of {ENGINE} with a speedup{f' on {cpu}' if cpu else ''}; run benchmarks/models.py first")
    found: Panels = defaultdict(lambda: defaultdict(list))
    for (model, setting), row in sorted(newest.items(), key=lambda item: float(item[1]["sparsity_prunable"])):
        point = Point(row["sparsity_prunable"], row["speedup"], row["flops_dense"] / row["flops_left"])
        found[title(model)][setting].append(point)
    return {name: dict(sorted(found[name].items())) for name in sorted(found)}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of the file; DataError where a line is none."""
    if not path.exists():
        raise DataError(f"{path}: no such file; run benchmarks/models.py first")
    rows = []
    needed = {"engine", "model", "cpu", "batch", "threads", "sparsity_prunable", "speedup", "flops_dense", "flops_left", "timestamp"}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: expected a row as JSON, got {line[:40]!r} ({error})") from None
        if not isinstance(row, dict) or needed - row.keys():
            missing = ", ".join(sorted(needed - row.keys() if isinstance(row, dict) else needed))
            raise DataError(f"{path}:{number}: a row without {missing}")
        rows.append(row)
    return rows


def title(model: str) -> str:
    """ "resnet50, uniform, 4x1, 224px" of the name of a model file that FILE matches."""
    found = FILE.fullmatch(model)
    assert found, model
    return ", ".join(filter(None, (found["network"], KINDS[found["distribution"]], found["block"], found["image"])))


def draw(found: Panels, output: Path) -> None:
    """Write the picture; its suffix (.svg, .png) decides the format."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise TicketkitError(f"a plot needs matplotlib ({error}); pip install 'ticketkit[report]'") from None
    columns = min(len(found), 3)
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.5 * lines), layout="constrained")
    for place, (name, settings) in enumerate(found.items(), 1):
        axes = figure.add_subplot(lines, columns, place)
        limits = sorted({(point.sparsity, point.limit) for points in settings.values() for point in points})
        axes.plot(*zip(*limits, strict=True), ".--", color="grey", label="FLOPs dense / FLOPs left")
        for (batch, threads), points in settings.items():
            label = f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}"
            axes.plot([p.sparsity for p in points], [p.speedup for p in points], "o-", label=label)
        axes.axhline(1, color="black", linewidth=0.8, label="fastest dense engine")
        axes.set(title=name, xlabel="sparsity of the prunable weights", ylabel="speedup", ylim=(0, None))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(fontsize="small")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ENGINE}):  # small, and the same from run to run
        figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "models.jsonl", help="rows of benchmarks/models.py")
    parser.add_argument("--output", type=Path, default=RESULTS / "models.svg", help=".svg or .png; default %(default)s")
    parser.add_argument("--cpu", help="draw the rows of this processor; default: that of the newest row")
    chosen = parser.parse_args(words)
    draw(panels(chosen.results, chosen.cpu), chosen.output)
    print(chosen.output)


if __name__ == "__main__":
    command.run(main)
