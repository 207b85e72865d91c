"""`compare`: which weights tickets keep, how much of it they share, and how much of that is chance (P1, Fig. 6 and 7). Numpy only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

from ticketkit import masks as algebra
from ticketkit.errors import TicketError
from ticketkit.masks import Masks
from ticketkit.search.rundir import RunDir, named
from ticketkit.ticket import Ticket

Source: TypeAlias = "str | os.PathLike[str] | Ticket"


@dataclass(frozen=True)
class Layer:
    """What a ticket keeps of one layer.

    Attributes:
        name, shape: of the parameter.
        kernel_size: weights in a kernel, 9 for a 3x3 convolution, 1 where a kernel is a single weight.
        kept: weights left.
        zero_kernels, kernels: kernels without a weight left, and all of them, see `ticketkit.masks.zero_kernels`.
    """

    name: str
    shape: tuple[int, ...]
    kernel_size: int
    kept: int
    zero_kernels: int
    kernels: int

    @property
    def total(self) -> int:
        """Weights of the layer."""
        return self.kernel_size * self.kernels

    @property
    def sparsity(self) -> float:
        """Fraction of the layer's weights that are pruned."""
        return 1.0 - self.kept / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {**vars(self), "shape": list(self.shape), "total": self.total, "sparsity": self.sparsity}


@dataclass(frozen=True)
class Structure:
    """What a ticket keeps.

    Attributes:
        name: the file, the run directory as PATH@ROUND, or "ticket" and the start of the hash of its masks.
        model, objective, task, round: where it came from, None where the ticket does not say.
        mask_sha256: of the masks.
        layers: in order of their names, numbers in them as numbers: that of the network in ResNets.
    """

    name: str
    model: str | None
    objective: str | None
    task: str | None
    round: int | None
    mask_sha256: str
    layers: tuple[Layer, ...]

    @property
    def kept(self) -> int:
        """Weights left of the prunable ones."""
        return sum(layer.kept for layer in self.layers)

    @property
    def total(self) -> int:
        """Prunable weights."""
        return sum(layer.total for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that are pruned."""
        return 1.0 - self.kept / self.total if self.total else 0.0

    def zero_kernels(self, larger: bool) -> tuple[int, int]:
        """(kernels without a weight left, all kernels): of the layers with kernels larger than one weight, or of the others."""
        chosen = [layer for layer in self.layers if (layer.kernel_size > 1) == larger]
        return sum(layer.zero_kernels for layer in chosen), sum(layer.kernels for layer in chosen)

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        counts = {"sparsity": self.sparsity, "kept": self.kept, "total": self.total}
        zero = {"kxk": self.zero_kernels(larger=True), "1x1": self.zero_kernels(larger=False)}
        kernels = {name: {"zero": found, "total": total} for name, (found, total) in zero.items()}
        return {**vars(self), **counts, "zero_kernels": kernels, "layers": [layer.to_dict() for layer in self.layers]}


@dataclass(frozen=True)
class Pair:
    """Two tickets.

    Attributes:
        a, b: their places in `Comparison.tickets`, a < b.
        similarity: |a ∩ b| / |a ∪ b|.
        by_chance: of two independent random masks as sparse as these, see `ticketkit.masks.expected_similarity`.
        by_chance_in_layers: the same for masks as sparse as these in every layer.
    """

    a: int
    b: int
    similarity: float
    by_chance: float
    by_chance_in_layers: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` says: the tickets in the order given, and every two of them."""

    tickets: tuple[Structure, ...]
    pairs: tuple[Pair, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {"tickets": [ticket.to_dict() for ticket in self.tickets], "pairs": [vars(pair) for pair in self.pairs]}


def compare(*sources: Source, round: int | None = None) -> Comparison:
    """Compare the masks of two or more tickets of one network.

    Args:
        sources: ticket files, run directories of `find`, with the round as PATH@K, or tickets in memory.
        round: of the run directories without @K; None: the last finished one.

    Raises:
        TicketError: fewer than two sources, one that is missing or damaged or has no such finished round, a round for a source
            that has none, or tickets of different networks.
    """
    if len(sources) < 2:
        raise TicketError(f"expected two tickets or more to compare, got {len(sources)}; rounds of a run are RUN@1 RUN@2")
    found, read = [], []
    for source in sources:
        name, ticket = _read(source, round)
        found.append(_structure(name, ticket))
        read.append(ticket.masks)  # and not its weights
    return Comparison(tuple(found), tuple(_pairs(read, found)))


def _pairs(read: list[Masks], found: list[Structure]) -> Iterable[Pair]:
    for a, b in combinations(range(len(read)), 2):
        ours, theirs = read[a], read[b]
        try:
            yield Pair(a, b, algebra.similarity(ours, theirs), *(algebra.expected_similarity(ours, theirs, each) for each in (False, True)))
        except TicketError as error:
            raise TicketError(f"{found[a].name} and {found[b].name}: {error}") from None


def _structure(name: str, ticket: Ticket) -> Structure:
    zero = algebra.zero_kernels(ticket.masks)
    layers = tuple(
        Layer(layer, mask.shape, algebra.kernel_size(mask), algebra.kept({layer: mask}), *zero[layer])
        for layer, mask in sorted(ticket.masks.items(), key=lambda item: _natural(item[0]))
    )
    model, objective, task = (None if key not in ticket.meta else str(ticket.meta[key]) for key in ("model", "objective", "task"))
    round = ticket.meta.get("round")
    return Structure(name, model, objective, task, round if isinstance(round, int) else None, ticket.mask_sha256, layers)


def _natural(name: str) -> list[str | int]:
    """layer3.2 before layer3.10: text and numbers take turns."""
    return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", name)]


def _read(source: Source, round: int | None) -> tuple[str, Ticket]:
    """(name, ticket) of a source."""
    if isinstance(source, Ticket):
        path, chosen, name = None, round, f"ticket {source.mask_sha256[:12]}"
    else:
        path, at = named(source)
        chosen, name = round if at is None else at, str(path)
        if path.is_dir():
            run = RunDir(path)
            k = run.finished(chosen)
            return f"{path}@{k}", Ticket.load(run.folder(k) / "ticket.safetensors")
        if not path.exists():
            raise TicketError(f"{path}: no such file or folder; expected a ticket file or a run directory of `ticketkit find`")
    if chosen is not None:
        raise TicketError(f"{name}: --round and @{chosen} choose a round of a run directory, this is a ticket; leave them out")
    return name, source if isinstance(source, Ticket) else Ticket.load(name)
