"""SimCLR (Chen et al. 2020): the two views of an image find one another among those of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ticketkit import models
from ticketkit.pretrain._objective import Gather, Objective, Stateless, need, same
from ticketkit.pretrain._retrieval import evaluate, nt_xent
from ticketkit.pretrain._views import BLUR_FROM, TwoViews
from ticketkit.tasks import Split, Task


@dataclass(frozen=True)
class SimCLR(Stateless):
    """NT-Xent on the output of a projection head with one hidden layer; both views of a batch go through the network as one.

    Attributes:
        temperature: τ of eq. 1.
        dim: width of the embeddings.
        strength: s of the colour distortion (A); None: as there, 0.5 for small images (B.9: CIFAR-10) and 1 for others (ImageNet).

    Raises:
        TicketError: an option out of its range.
    """

    temperature: float = 0.5
    dim: int = 128
    strength: float | None = None

    name: ClassVar[str] = "simclr"
    metric: ClassVar[str] = "retrieval accuracy"
    queries: ClassVar[int] = 2
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        need(self.temperature > 0, "temperature", "a number above 0", self.temperature)
        need(self.dim >= 1, "dim", "at least 1", self.dim)
        if self.strength is not None:
            need(0 <= self.strength <= 2.5, "strength", "a number from 0 to 2.5", self.strength)

    def head(self, features: int, num_classes: int) -> nn.Module:
        """[N, features] -> embeddings [N, dim]."""
        return models.projection(features, self.dim)

    def views(self, task: Task) -> TwoViews:
        """Two views of each image."""
        usual = 0.5 if task.size < BLUR_FROM else 1.0
        return TwoViews(task, usual if self.strength is None else self.strength)

    def loss(
        self, network: nn.Module, state: nn.Module, views: tuple[Tensor, ...], labels: Tensor, gather: Gather = same
    ) -> tuple[Tensor, Tensor]:
        """Mean NT-Xent over the 2N queries of all processes' batches, and this one's equal share of those that were right.

        Labels are not looked at.
        """
        first, second = (gather(part) for part in network(torch.cat(views)).chunk(2))
        loss, right = nt_xent(first, second, self.temperature)
        return loss, right * len(views[0]) / len(first)

    def evaluate(self, network: nn.Module, task: Task, split: Split, num_classes: int) -> tuple[float, float]:
        """Top-1 retrieval accuracy (P1, A.2) and mean NT-Xent, see `ticketkit.pretrain._retrieval.evaluate`."""
        return evaluate(network, self.views(task), split, self.temperature)


OBJECTIVE: type[Objective] = SimCLR
