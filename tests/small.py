"""A small network on digits, and how the tests of search and verification train it."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ticketkit import models, tasks  # noqa: E402
from ticketkit.search.train import Settings  # noqa: E402
from ticketkit.tasks import (  # noqa: E402
    Data,
    Split,
    Task,
)

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


def little(name: str = "digits", classes: int = 10, wrong: bool = False) -> Task:
    """Digits with 64 training, 24 validation and 24 test images: an epoch of 4 steps of 16.

    `classes` merges labels that are neighbours; `wrong` gives every test image a wrong label.
    """

    def load(folder: Path | None) -> Data:
        whole = DIGITS.load(None)
        parts = [part.take(np.arange(count)) for part, count in ((whole.train, 64), (whole.val, 24), (whole.test, 24))]
        train, val, test = (Split(part.images, part.labels * classes // 10) for part in parts)
        shifted = Split(test.images, (test.labels + 1) % classes) if wrong else test
        return Data(train, val, shifted, tuple("0123456789"[:classes]))

    return dataclasses.replace(DIGITS, name=name, load=load)


def few(data: Data) -> Data:
    """The first 40 images of each split."""
    first = np.arange(40)
    return replace(data, train=data.train.take(first), val=data.val.take(first), test=data.test.take(first))


def few_digits() -> Task:
    """Digits with no more than 120 images."""
    return replace(DIGITS, load=lambda folder: few(DIGITS.load(folder)))
