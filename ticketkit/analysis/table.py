"""A comparison of tickets as tables, for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ticketkit.analysis.compare import Comparison, Layer

NOTES = (
    "sparsity, left: of the prunable weights; zero kernels: without a weight left, of the kernels larger than 1x1",
    "similarity: weights that both keep over weights that either keeps, at most the fewer kept by one over the more kept by the other",
    "by chance: the similarity of independent random masks as sparse as these; in layers: as sparse as these in every layer",
)


def render(found: Comparison, layers: bool = False) -> RenderableType:
    """Tickets and pairs, and with `layers` sparsity and zero kernels of every layer; tickets are numbered from 1."""
    parts: list[RenderableType] = [_tickets(found), "", _pairs(found), ""]
    if layers:
        parts += [_layers(found), ""]
    return Group(*parts, *map(Text, NOTES))


def share(zero: int, total: int) -> str:
    """A part in percent, a dash where there is nothing to be a part of."""
    return f"{zero / total:.2%}" if total else "-"


def _tickets(found: Comparison) -> Table:
    table = _grid("", "ticket", "network", "objective", "task", words=4)
    for title in ("sparsity", "left", "of", "zero kernels", "of", "1x1 pruned", "of"):
        table.add_column(title, justify="right", no_wrap=True)
    for number, ticket in enumerate(found.tickets, start=1):
        origin = [Text(value or "-") for value in (ticket.model, ticket.objective, ticket.task)]
        counts = [f"{ticket.sparsity:.2%}", f"{ticket.kept:,}", f"{ticket.total:,}"]
        for zero, total in (ticket.zero_kernels(larger=True), ticket.zero_kernels(larger=False)):
            counts += [share(zero, total), f"{total:,}"]
        table.add_row(str(number), Text(ticket.name), *origin, *counts)
    return table


def _pairs(found: Comparison) -> Table:
    table = _grid("tickets", "similarity", "by chance", "by chance in layers", words=0)
    for pair in found.pairs:
        values = (pair.similarity, pair.by_chance, pair.by_chance_in_layers)
        table.add_row(f"{pair.a + 1}, {pair.b + 1}", *(f"{value:.2%}" for value in values))
    return table


def _layers(found: Comparison) -> Table:
    table = _grid("layer", "weight", words=1)
    for number in range(1, len(found.tickets) + 1):
        for title in (f"sparsity {number}", f"zero kernels {number}"):
            table.add_column(title, justify="right", no_wrap=True)
    for same in zip(*(ticket.layers for ticket in found.tickets), strict=True):
        table.add_row(Text(same[0].name), "x".join(map(str, same[0].shape)), *(value for layer in same for value in _values(layer)))
    return table


def _values(layer: Layer) -> tuple[str, str]:
    return f"{layer.sparsity:.2%}", share(layer.zero_kernels, layer.kernels) if layer.kernel_size > 1 else "-"


def _grid(*titles: str, words: int) -> Table:
    """A table with these columns; the first and `words` after it hold words, the others numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i <= words else "right", no_wrap=i != 1)
    return table
