"""Downstream tasks by name. One file here is one task; adding a file adds its name here, on the command line and in the tests.

A task file states `TASK: Task`, with everything that defines the task, and a `load` function that returns its images. Files that
begin with an underscore are no tasks. A file name's underscores are dashes in the task's name.

**What is measured on what.** A tenth of the training images is held out (`Data.val`) for whoever wants to choose something: a
learning rate, a round to stop at. The test images are measured once a round and recorded as `metric`; nothing is chosen by them.
Weights pretrained on the whole training set have seen the held-out images too: `val_metric` then flatters them, and the sparser they are
made the less, for pruning forgets; choosing by it on the pre-training task itself favours denser tickets.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from ticketkit.errors import DataError
from ticketkit.tasks._data import Augmentation, Batches, Crops, Data, Params, Split, Task, Views, evaluation_batches
from ticketkit.tasks._recipes import RECIPES, SCHEDULES, Recipe, describe

__all__ = [
    "RECIPES", "SCHEDULES", "Augmentation", "Batches", "Crops", "Data", "Params", "Recipe", "Split", "Task", "Views", "describe",
    "evaluation_batches", "get", "names",
]  # fmt: skip


@cache
def tasks() -> dict[str, Task]:
    """Task name -> task."""
    found = sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))
    return {name.replace("_", "-"): import_module(f"{__name__}.{name}").TASK for name in found}


def names() -> list[str]:
    """Every task that `get` knows."""
    return list(tasks())


def get(name: str) -> Task:
    """The task of that name.

    Raises:
        DataError: there is none.
    """
    if name not in tasks():
        raise DataError(f"unknown task {name!r}; expected one of {', '.join(names())}")
    return tasks()[name]
