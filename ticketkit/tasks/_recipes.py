"""Recipes: the training algorithm of a round, and those of P1 by name.

P1 is Chen et al., "The Lottery Tickets Hypothesis for Supervised and Self-supervised Pre-training in Computer Vision Models" (CVPR
2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

SCHEDULES = ("multistep", "cosine", "constant")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained for one round: SGD with momentum, and a schedule over the steps of the round.

    Attributes:
        epochs: length of the round.
        batch_size: images a step.
        lr: learning rate before the schedule lowers it.
        schedule: one of `SCHEDULES`: "multistep" (times 0.1 at each milestone), "cosine" (down to 0 at the end), "constant".
        weight_decay: L2 penalty, of every parameter.
        momentum: of SGD.
        milestones: increasing fractions of the round, for "multistep".
        warmup: first optimizer steps, over which the learning rate rises linearly to the schedule's.
        name: as on the command line.
    """

    epochs: int
    batch_size: int
    lr: float
    schedule: str
    weight_decay: float
    momentum: float = 0.9
    milestones: tuple[float, ...] = (91 / 182, 136 / 182)
    warmup: int = 0
    name: str = "unnamed"

    def __str__(self) -> str:
        """One line: "182 epochs, batch 256, SGD lr 0.1 x0.1 at 50 % and 74.7 %, momentum 0.9, weight decay 0.0002"."""
        return describe(f"{self.epochs} epochs", self)


class Sgd(Protocol):
    """What `describe` reads; `Recipe` has it, and so have the settings of a search."""

    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def milestones(self) -> tuple[float, ...]: ...
    @property
    def warmup(self) -> int: ...


def describe(length: str, sgd: Sgd) -> str:
    """A training algorithm in one line; `length` says how long it is, in words."""
    falls = " and ".join(f"{100 * milestone:.3g} %" for milestone in sgd.milestones)
    course = {"multistep": f" x0.1 at {falls}", "cosine": " cosine", "constant": " constant"}[sgd.schedule]
    warmup = f", warm-up {sgd.warmup} steps" if sgd.warmup else ""
    return (
        f"{length}, batch {sgd.batch_size}, SGD lr {sgd.lr:g}{course}{warmup}, "
        f"momentum {sgd.momentum:g}, weight decay {sgd.weight_decay:g}"
    )


def _paper(name: str, epochs: int, batch_size: int, lr: float, weight_decay: float, *falls: int) -> Recipe:
    """A row of P1, Table 1; `falls` are the epochs after which the learning rate falls, none for a fixed one."""
    schedule, milestones = ("multistep", tuple(epoch / epochs for epoch in falls)) if falls else ("constant", ())
    return Recipe(epochs, batch_size, lr, schedule, weight_decay, milestones=milestones, name=f"paper-{name}")


# P1, Table 1
PAPER = (
    _paper("imagenet", 10, 256, 1e-4, 1e-4),
    _paper("simclr", 10, 256, 1e-4, 1e-4),
    _paper("moco", 10, 256, 3e-4, 1e-4),
    *(_paper(name, 182, 256, 0.1, 2e-4, 91, 136) for name in ("cifar10", "cifar100", "svhn", "fashion-mnist")),
    _paper("visda", 20, 128, 1e-3, 5e-4, 10),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in PAPER}
