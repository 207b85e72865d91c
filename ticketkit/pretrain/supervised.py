"""The supervised objective: cross-entropy of the class, measured by top-1 accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from ticketkit import models
from ticketkit.pretrain._objective import Gather, Objective, Stateless, same
from ticketkit.tasks import Crops, Split, Task, evaluation_batches


@dataclass(frozen=True)
class Supervised(Stateless):
    """Cross-entropy on the task's classes."""

    name: ClassVar[str] = "supervised"
    metric: ClassVar[str] = "accuracy"
    queries: ClassVar[int] = 1
    whole: ClassVar[bool] = False

    def head(self, features: int, num_classes: int) -> None:
        """The network keeps its own."""

    def views(self, task: Task) -> Crops:
        """One view: a random crop of the padded image, mirrored by chance."""
        return Crops(task)

    def loss(
        self, network: nn.Module, state: nn.Module, views: tuple[Tensor, ...], labels: Tensor, gather: Gather = same
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy, and how many images are classified rightly; one view float32 [N, 3, H, W], labels int64 [N]."""
        logits: Tensor = network(views[0])
        return F.cross_entropy(logits, labels), (logits.detach().argmax(1) == labels).sum()

    def evaluate(self, network: nn.Module, task: Task, split: Split, num_classes: int) -> tuple[float, float]:
        """(top-1 accuracy, mean cross-entropy) over the centre of every image; the accuracy over all images, not a mean over classes."""
        device = next(network.parameters()).device
        score, total = MulticlassAccuracy(num_classes, average="micro").to(device), torch.zeros((), dtype=torch.float64)
        with models.evaluating(network), torch.inference_mode():
            for images, labels in evaluation_batches(task, split):
                here = labels.to(device)
                logits = network(images.to(device))
                score.update(logits, here)
                total += F.cross_entropy(logits, here, reduction="sum").cpu().double()
        return float(score.compute()), float(total / max(len(split), 1))


OBJECTIVE: type[Objective] = Supervised
