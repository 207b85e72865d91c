"""The supervised objective: cross-entropy of the class, measured by top-1 accuracy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

NAME = "supervised"


def loss(module: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and the logits [N, classes] it came from; images float32 [N, 3, H, W], labels int64 [N]."""
    logits: Tensor = module(images)
    return F.cross_entropy(logits, labels), logits


def metric(num_classes: int) -> Metric:
    """Top-1 accuracy, a fraction in [0, 1] over all images (not a mean over classes)."""
    return MulticlassAccuracy(num_classes, average="micro")


def evaluate(module: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> tuple[float, float]:
    """(metric, mean loss) over all images, in evaluation mode; the module's mode is put back afterwards."""
    was_training = module.training
    module.eval()
    device = next(module.parameters()).device
    score, total, count = metric(num_classes).to(device), torch.zeros((), dtype=torch.float64), 0
    with torch.inference_mode():
        for images, labels in batches:
            here = labels.to(device)
            batch_loss, logits = loss(module, images.to(device), here)
            score.update(logits, here)
            total += batch_loss.cpu().double() * len(here)
            count += len(here)
    module.train(was_training)
    return float(score.compute()), float(total / max(count, 1))
