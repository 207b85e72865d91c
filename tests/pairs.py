"""What the tests of the self-supervised objectives share: a small network on digits, trained for some steps outside the search."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ticketkit import tasks  # noqa: E402
from ticketkit.tasks import Split  # noqa: E402

DIGITS = tasks.get("digits")
PRUNABLE = ("conv2.weight", "conv3.weight")


class Small(torch.nn.Module):
    """Three convolutions and a head named `fc`, [N, 3, 16, 16] -> [N, 32] before the head."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 32)
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            self.add_module(f"conv{i}", torch.nn.Conv2d(before, after, 3, 2, padding=1, bias=False))
            self.add_module(f"bn{i}", torch.nn.BatchNorm2d(after))
        self.fc: Any = torch.nn.Identity()

    def forward(self, x: Any) -> Any:
        for i in (1, 2, 3):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)).relu()
        return self.fc(x.mean((2, 3)))


def network(objective: Any, sparsity: float = 0.0) -> tuple[Any, dict[str, Any]]:
    """The small network with the objective's head, and random masks [name] bool, already applied."""
    torch.manual_seed(7)
    module = Small()
    module.fc = objective.head(32, 10)
    masks = {name: torch.rand_like(weight) >= sparsity for name, weight in module.named_parameters() if name in PRUNABLE}
    apply(module, masks)
    return module.to(memory_format=torch.channels_last).train(), masks


def apply(module: Any, masks: Mapping[str, Any]) -> None:
    weights = dict(module.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].mul_(mask)


def some(count: int) -> Split:
    """The first training digits."""
    return DIGITS.load(None).train.take(np.arange(count))


def rendered(objective: Any, images: np.ndarray, seed: int) -> tuple[Any, ...]:
    views = objective.views(DIGITS)
    out: tuple[Any, ...] = views.render(images, views.draw(len(images), np.random.default_rng(seed)))
    return out


def train(objective: Any, module: Any, masks: Mapping[str, Any], steps: int, lr: float = 0.05, batch: int = 32) -> tuple[Any, list[float]]:
    """SGD with momentum under masks: the objective's state after the last step, and the loss of each step."""
    torch.manual_seed(0)
    state = objective.begin(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    data, losses, order = some(512), [], np.random.default_rng(0)
    for step in range(steps):
        part = data.take(order.choice(len(data), batch, replace=False))
        loss, right = objective.loss(module, state, rendered(objective, part.images, step), torch.from_numpy(part.labels))
        assert 0 <= int(right) <= objective.queries * batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apply(module, masks)
        objective.after_step(module, state)
        losses.append(loss.item())
    return state, losses
