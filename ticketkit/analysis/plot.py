"""A comparison of tickets as a figure: similarities as a heat map, zero kernels by layer (P1, Fig. 6 and 7). Needs matplotlib."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ticketkit.analysis.compare import Comparison
from ticketkit.errors import TicketError
from ticketkit.ticket import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png")
NUMBERED = 8  # more tickets than that leave no room for numbers in the heat map
# Text stays text, and equal comparisons are equal files.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "ticketkit", "font.size": 8}


def save(found: Comparison, path: str | os.PathLike[str]) -> Path:
    """Draw the figure and write it, in the format that the name ends in, one of `FORMATS`.

    Raises:
        TicketError: another ending, matplotlib is not installed, or the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise TicketError(f"{path}: expected the name of a figure to end in {' or '.join(FORMATS)}, got {suffix or 'no ending'!r}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise TicketError(f"{path}: a figure needs {error.name}, which is not installed; pip install 'ticketkit[report]'") from None
    written = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        layers = sum(layer.kernel_size > 1 for layer in found.tickets[0].layers)
        longest = max(len(ticket.name) for ticket in found.tickets)
        figure = Figure(figsize=(9 + 0.08 * (layers + longest), 4 + 0.1 * len(found.tickets)), layout="constrained")
        similarity, kernels = figure.subplots(1, 2, width_ratios=(4, 5))
        _similarity(similarity, found)
        _zero_kernels(kernels, found)
        figure.savefig(written, format=suffix[1:], dpi=150, metadata={"Date": None} if suffix == ".svg" else {})
    return write_atomic(path, written.getvalue())


def _similarity(axes: Axes, found: Comparison) -> None:
    """The heat map, symmetric; the diagonal, always 1, is left out so that the colours serve the others."""
    count = len(found.tickets)
    shared = np.full((count, count), np.nan)
    for pair in found.pairs:
        shared[pair.a, pair.b] = shared[pair.b, pair.a] = 100 * pair.similarity
        if count <= NUMBERED:
            text = f"{100 * pair.similarity:.1f}\n({100 * pair.by_chance_in_layers:.1f})"
            for x, y in ((pair.a, pair.b), (pair.b, pair.a)):
                axes.text(x, y, text, ha="center", va="center", bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1})
    image = axes.imshow(shared, vmin=0)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    numbers = [str(number) for number in range(1, count + 1)]
    axes.set_xticks(range(count), numbers)
    axes.set_yticks(range(count), [f"{ticket.name}: {number}" for ticket, number in zip(found.tickets, numbers, strict=True)])
    axes.set_title("relative similarity, % (by chance in layers)")


def _zero_kernels(axes: Axes, found: Comparison) -> None:
    """One line for each ticket over the layers whose kernels are larger than one weight."""
    if len(found.tickets) > 10:  # than matplotlib's colours
        from matplotlib import colormaps

        axes.set_prop_cycle(color=colormaps["viridis"](np.linspace(0.0, 0.95, len(found.tickets))))
    for number, ticket in enumerate(found.tickets, start=1):
        shares = [100 * layer.zero_kernels / layer.kernels for layer in ticket.layers if layer.kernel_size > 1]
        axes.plot(range(len(shares)), shares, marker=".", linewidth=1, label=f"{number}: {ticket.sparsity:.1%} sparse")
    names = [layer.name for layer in found.tickets[0].layers if layer.kernel_size > 1]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_ylim(-2, 102)
    axes.set_title("zero kernels, %" if names else "no layer has kernels larger than 1x1")
    axes.legend(fontsize=6)
