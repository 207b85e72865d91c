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


class BeforeTraining:
    """The part of a `Method` that prunes between two rounds."""

    rewinds: ClassVar[tuple[str, ...]] = ("pretrained", "init", "early", "lr")

    def due(self, level: float, steps: int) -> Due:
        """No change within a round."""
        return unchanged


class WhileTraining:
    """The part of a `Method` that prunes within a round, which starts dense."""

    rewinds: ClassVar[tuple[str, ...]] = ("pretrained", "init")

    def source(self, round: int) -> None:
        """No round before it matters."""

    def masks(self, trained: Arrays, masks: Masks, rate: float, level: float, block: algebra.Block) -> Masks:
        """Full."""
        return algebra.full(masks)


@dataclass(frozen=True)
class IMP(BeforeTraining):
    """P1, Algorithm 1: round k prunes a fixed fraction of what round k - 1 left, by the magnitudes it trained."""

    name: ClassVar[str] = "imp"

    def source(self, round: int) -> int:
        """The round before."""
        return round - 1

    def masks(self, trained: Arrays, masks: Masks, rate: float, level: float, block: algebra.Block) -> Masks:
        """`rate` of the remaining weights pruned."""
        return algebra.global_magnitude(trained, masks, rate, block)


@dataclass(frozen=True)
class OneShot(BeforeTraining):
    """Every level straight from the dense network's trained magnitudes."""

    name: ClassVar[str] = "oneshot"

    def source(self, round: int) -> int:
        """The dense reference."""
        return 0

    def masks(self, trained: Arrays, masks: Masks, rate: float, level: float, block: algebra.Block) -> Masks:
        """Pruned to the level at once."""
        return algebra.global_magnitude(trained, masks, level, block)


@dataclass(frozen=True)
class GMP(WhileTraining):
    """Zhu and Gupta 2017, equation 1: s_t = s (1 - (1 - (t - t_0) / (t_1 - t_0))^3), nested masks.

    Attributes:
        begin, end: fractions of the round between which the sparsity rises.
        times: how often masks change on the way.
    """

    name: ClassVar[str] = "gmp"
    begin: float = 0.1
    end: float = 0.7
    times: int = 30

    def due(self, level: float, steps: int) -> Due:
        """`times` changes at equal distances, the last at `end`; fewer where there are fewer steps."""
        first, last = int(self.begin * steps), int(self.end * steps)
        at = {}
        for n in range(1, self.times + 1):
            done = n / self.times
            at[first + round((last - first) * done)] = Change(level * (1.0 - (1.0 - done) ** 3), nested=True)
        return at.get


@dataclass(frozen=True)
class ACDC(WhileTraining):
    """Peste et al. 2021, algorithm 1: dense warm-up, then phases of the whole network under a fresh top-k mask and without one.

    After a decompression the pruned weights grow again from zero, and the momentum of all weights starts again from zero, as in the
    authors' code (`reset_momentum_after_recycling`). The last phase is compressed, and with the one before it longer than the others:
    of 100 epochs theirs on ImageNet compress 10-15, 20-25, ... 70-75 and 85-100.

    Attributes:
        warmup: fraction of the round before the first compression.
        phase: fraction of the round that each phase takes, at least one step.
        last: fraction of the round from which on the network stays compressed.
    """

    name: ClassVar[str] = "acdc"
    warmup: float = 0.1
    phase: float = 0.05
    last: float = 0.85

    def due(self, level: float, steps: int) -> Due:
        """Compressed at warmup and decompressed a phase later, as often as a phase or more is left before `last`; then compressed."""
        first, last = round(self.warmup * steps), min(round(self.last * steps), steps - 1)
        phase = max(1, round(self.phase * steps))
        compress, at = Change(level, nested=False), {}
        for n in range((last - first) // (2 * phase)):
            at[first + 2 * n * phase] = compress
            at[first + (2 * n + 1) * phase] = Change(0.0, nested=False, forget=True)
        at[last] = compress
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
