"""Rows of benchmarks/gpu.py: how they are read, and the page and the map that are made of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ticketkit.errors import DataError

FORMS = {"csr": None, "bsr16": 16, "bsr32": 32, "bsr64": 64}  # name -> side of its blocks


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
