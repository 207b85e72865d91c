"""Training objectives by name. One file here is one objective; adding a file adds its name here, on the command line and in the tests.

An objective file states `OBJECTIVE`, the class of a frozen dataclass that keeps to `Objective`; its fields are its options. Files
that begin with an underscore are no objectives. A file name's underscores are dashes in the objective's name.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import Field
from importlib import import_module
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ticketkit.errors import TicketError
from ticketkit.tasks import Split, Task

__all__ = ["Objective", "Views", "get", "names"]

Draw = Mapping[str, NDArray[Any]]


class Views(Protocol):
    """How images become what the network sees. Drawing and rendering are apart, so that a part of a batch can be rendered alone."""

    def draw(self, count: int, generator: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Everything random about `count` images, as arrays [count, ...]; a function of the generator's state alone."""

    def render(self, images: NDArray[np.uint8], params: Draw) -> tuple[Tensor, ...]:
        """uint8 [B, H, W, 3] and their B rows of a draw -> views, each normalised float32 [B, 3, size, size] in channels_last."""


class Objective(Protocol):
    """A loss for the training loop and the metric that goes with it.

    Attributes:
        name: as on the command line.
        metric: name of what `evaluate` measures, "accuracy" or "retrieval accuracy"; a fraction in [0, 1].
        queries: queries per image that `loss` counts.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    queries: ClassVar[int]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def head(self, features: int, num_classes: int) -> nn.Module | None:
        """What takes the place of the network's head, [N, features] -> [N, anything]; None keeps the network's own."""

    def views(self, task: Task) -> Views:
        """How the task's training images become batches."""

    def begin(self, network: nn.Module) -> nn.Module:
        """The objective's own state for one round, made from the rewound and masked network; saved and resumed by its state dict."""

    def loss(self, network: nn.Module, state: nn.Module, views: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, int | Tensor]:
        """Mean loss of a batch, and how many of its `queries` per image were right (0-dimensional)."""

    def after_step(self, network: nn.Module, state: nn.Module) -> None:
        """Called after each optimizer step, once the weights are masked again."""

    def evaluate(self, network: nn.Module, task: Task, split: Split, num_classes: int) -> tuple[float, float]:
        """(metric, mean loss) over a split in evaluation mode; the network's mode is put back afterwards."""


def names() -> list[str]:
    """Every objective that `get` knows."""
    return sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def get(name: str) -> type[Objective]:
    """The objective's class; called with its options, it gives the objective.

    Raises:
        TicketError: there is none of that name.
    """
    if name not in names():
        raise TicketError(f"unknown objective {name!r}; expected one of {', '.join(names())}")
    objective: type[Objective] = import_module(f"{__name__}.{name.replace('-', '_')}").OBJECTIVE
    return objective
