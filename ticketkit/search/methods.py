"""How the zeros come about. Every method shares the loop, the masks, the run directory and the verdicts; each is one class here.

    imp       iterative magnitude pruning: train, prune 20 % of what is left, rewind (P1, Algorithm 1)
    oneshot   each level is pruned from the trained dense network at once, then rewound and trained
    gmp       gradual magnitude pruning while training, the sparsity a cubic curve (Zhu and Gupta 2017, equation 1)
    acdc      alternating compressed and decompressed phases (Peste et al. 2021, algorithm 1)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from ticketkit import masks as algebra
from ticketkit.errors import TicketError
from ticketkit.masks import Masks
from ticketkit.search.rundir import Arrays
from ticketkit.search.train import Change, Due, unchanged

Trained = Callable[[int], tuple[Arrays, Masks]]


class Method(Protocol):
    """What is pruned when."""

    name: ClassVar[str]
    rewinds: ClassVar[tuple[str, ...]]  # the rewind points that make sense

    def source(self, round: int) -> int | None:
        """The finished round whose trained weights and masks decide the masks that round `round` >= 1 starts with; None: none does."""

    def masks(self, trained: Arrays, masks: Masks, rate: float, level: float, block: algebra.Block) -> Masks:
        """The masks that a round of sparsity `level` starts with, from those of its source and the weights trained under them."""

    def due(self, level: float, steps: int) -> Due:
        """The changes of masks within a round of that sparsity and that many steps."""


@dataclass(frozen=True)
class IMP:
    """P1, Algorithm 1: round k prunes a fixed fraction of what round k - 1 left, by the magnitudes it trained."""

    name: ClassVar[str] = "imp"
    rewinds: ClassVar[tuple[str, ...]] = ("pretrained", "init", "early", "lr")

    def source(self, round: int) -> int:
        """The round before."""
        return round - 1

    def masks(self, trained: Arrays, masks: Masks, rate: float, level: float, block: algebra.Block) -> Masks:
        """`rate` of the remaining weights pruned."""
        return algebra.global_magnitude(trained, masks, rate, block)

    def due(self, level: float, steps: int) -> Due:
        """No change."""
        return unchanged


@dataclass(frozen=True)
class OneShot:
    """Every level straight from the dense network's trained magnitudes."""

    name: ClassVar[str] = "oneshot"
    rewinds: ClassVar[tuple[str, ...]] = ("pretrained", "init", "early", "lr")

    def source(self, round: int) -> int:
        """The dense reference."""
        return 0

    def masks(self, trained: Arrays, masks: Masks, rate: float, level: float, block: algebra.Block) -> Masks:
        """Pruned to the level at once."""
        return algebra.global_magnitude(trained, masks, level, block)

    def due(self, level: float, steps: int) -> Due:
        """No change."""
        return unchanged


@dataclass(frozen=True)
class GMP:
    """Zhu and Gupta 2017, equation 1: s_t = s (1 - (1 - (t - t_0) / (t_1 - t_0))^3), nested masks.

    Attributes:
        begin, end: fractions of the round between which the sparsity rises.
        times: how often masks change on the way.
    """

    name: ClassVar[str] = "gmp"
    rewinds: ClassVar[tuple[str, ...]] = ("pretrained", "init")
    begin: float = 0.1
    end: float = 0.7
    times: int = 30

    def source(self, round: int) -> None:
        """The masks start full."""

    def masks(self, trained: Arrays, masks: Masks, rate: float, level: float, block: algebra.Block) -> Masks:
        """Full."""
        return algebra.full(masks)

    def due(self, level: float, steps: int) -> Due:
        """`times` changes at equal distances, the last at `end`; fewer where there are fewer steps."""
        first, last = int(self.begin * steps), int(self.end * steps)
        at = {}
        for n in range(1, self.times + 1):
            done = n / self.times
            at[first + round((last - first) * done)] = Change(level * (1.0 - (1.0 - done) ** 3), nested=True)
        return at.get


@dataclass(frozen=True)
class ACDC:
    """Peste et al. 2021, algorithm 1: dense warm-up, then phases of the whole network under a fresh top-k mask and without one.

    After a decompression the pruned weights grow again from zero, with no momentum. The last phase is compressed and longest.

    Attributes:
        warmup: fraction of the round before the first compression.
        phase: fraction of the round that each phase takes.
        last: fraction of the round from which on the network stays compressed.
    """

    name: ClassVar[str] = "acdc"
    rewinds: ClassVar[tuple[str, ...]] = ("pretrained", "init")
    warmup: float = 0.1
    phase: float = 0.05
    last: float = 0.75

    def source(self, round: int) -> None:
        """The masks start full."""

    def masks(self, trained: Arrays, masks: Masks, rate: float, level: float, block: algebra.Block) -> Masks:
        """Full."""
        return algebra.full(masks)

    def due(self, level: float, steps: int) -> Due:
        """Compressed at warmup, then by turns; compressed for good from `last` on."""
        at: dict[int, Change] = {}
        bounds = [self.warmup + n * self.phase for n in range(round((self.last - self.warmup) / self.phase))]
        for n, bound in enumerate(bounds):
            at[int(bound * steps)] = Change(level, nested=False) if n % 2 == 0 else Change(0.0, nested=False, forget=True)
        at[int(self.last * steps)] = Change(level, nested=False)
        return at.get


METHODS: Mapping[str, Method] = {method.name: method for method in (IMP(), OneShot(), GMP(), ACDC())}


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        TicketError: there is none.
    """
    if name not in METHODS:
        raise TicketError(f"--method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
