"""A small network on digits, and how the tests of the search train it."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ticketkit import models, tasks  # noqa: E402
from ticketkit.search.train import Settings  # noqa: E402

DIGITS = tasks.get("digits")
TINY = {"rounds": 1, "steps": 2, "batch_size": 32, "threads": 1}


def settings(**changes: object) -> Settings:
    values = {"steps": 4, "batch_size": 32, "lr": 0.1, "schedule": "constant", "milestones": (0.5, 0.75), "weight_decay": 1e-3}
    return Settings(**{**values, "momentum": 0.9, "seed": 0, **changes})  # type: ignore[arg-type]


def start() -> torch.nn.Module:
    torch.manual_seed(7)
    return models.build("resnet20", 10, 16)


def everything(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: weights[name] for weights in [models.arrays(module)] for name in models.prunable("resnet20", module)}
