"""What an objective is: how images become batches, a loss, a metric, and a state of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field
from typing import Any, ClassVar, Protocol, TypeAlias

from torch import Tensor, nn

from ticketkit.errors import TicketError
from ticketkit.tasks import Split, Task, Views

Gather: TypeAlias = Callable[[Tensor], Tensor]


def same(embeddings: Tensor) -> Tensor:
    """The `Gather` of a single process."""
    return embeddings


def need(holds: bool, option: str, expected: str, got: float) -> None:
    """Raise TicketError unless the option's value is as expected."""
    if not holds:
        raise TicketError(f"--{option.replace('_', '-')}: expected {expected}, got {got}; choose another value")


class Stateless:
    """The part of an `Objective` that has no state of its own."""

    def begin(self, network: nn.Module) -> nn.Module:
        """Nothing beside the network."""
        return nn.Module()

    def twins(self, state: nn.Module) -> Sequence[nn.Module]:
        """None."""
        return ()

    def after_step(self, network: nn.Module, state: nn.Module) -> None:
        """Nothing to do."""


class Objective(Protocol):
    """A loss and everything it needs; its dataclass fields are the options of a run.

    Attributes:
        name: as on the command line.
        metric: name of what `evaluate` measures, a fraction in [0, 1].
        queries: per image, among which `loss` counts those that are right.
        whole: the images of a batch are compared with one another, so that it cannot be worked off in parts.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    queries: ClassVar[int]
    whole: ClassVar[bool]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def head(self, features: int, num_classes: int) -> nn.Module | None:
        """What stands in the place of the network's head; None: its own, a linear layer to the classes."""

    def views(self, task: Task) -> Views:
        """The augmentation of training images."""

    def begin(self, network: nn.Module) -> nn.Module:
        """The objective's own state for one round, made anew from the rewound and masked network, so that none survives a rewind."""

    def twins(self, state: nn.Module) -> Sequence[nn.Module]:
        """Networks within the state that have the trained one's parameters by name, and so its masks."""

    def loss(
        self, network: nn.Module, state: nn.Module, views: tuple[Tensor, ...], labels: Tensor, gather: Gather = same
    ) -> tuple[Tensor, Tensor]:
        """(mean loss, number of queries of this batch that are right), both 0-dimensional; their mean and sum over the processes
        are those of the global batch.

        Args:
            network: the network to be called; images float32 [B, 3, H, W].
            state: from `begin`.
            views: from the objective's `views`, one or two.
            labels: int64 [B].
            gather: embeddings [B, d] of this process -> those of all processes, [ranks * B, d].
        """

    def after_step(self, network: nn.Module, state: nn.Module) -> None:
        """Called after each optimizer step, with the weights already masked again."""

    def evaluate(self, network: nn.Module, task: Task, split: Split, num_classes: int) -> tuple[float, float]:
        """(metric, mean loss) over a split, in evaluation mode; the network's mode is put back afterwards."""
