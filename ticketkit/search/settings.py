"""The training algorithm of a search or a verification: a recipe, and what the user changes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypedDict

from ticketkit.errors import TicketError
from ticketkit.search.train import Settings
from ticketkit.tasks import RECIPES, SCHEDULES, Recipe, Task

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Changes(TypedDict, total=False):
    """Keyword arguments of every verb that trains; what is missing or None is the recipe's.

    recipe: one of `ticketkit.tasks.RECIPES`, the settings of P1, Table 1; default: the task's. The others change it.
    epochs, steps: length of a training (of a round, in a search), one of the two.
    batch_size: images a step, of all processes together.
    lr, weight_decay, momentum: of SGD.
    schedule: of the learning rate: multistep, cosine or constant.
    milestones: increasing fractions of a training at which multistep multiplies the learning rate by 0.1.
    warmup: steps over which the learning rate first rises linearly.
    """

    recipe: str | None
    epochs: int | None
    steps: int | None
    batch_size: int | None
    lr: float | None
    schedule: str | None
    weight_decay: float | None
    momentum: float | None
    milestones: Sequence[float] | None
    warmup: int | None


def recipe(name: str | None, task: Task) -> Recipe:
    """The recipe of that name, the task's where none is given."""
    if name is not None and name not in RECIPES:
        raise TicketError(f"--recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    return task.recipe if name is None else RECIPES[name]


def settings(task: Task, images: int, seed: int, accumulate: int = 1, **changes: Unpack[Changes]) -> Settings:
    """The recipe with the user's changes, for `images` training images.

    Raises:
        TicketError: a change that makes no sense, the option is named.
        TypeError: a keyword that is none of `Changes`.
    """
    if unknown := changes.keys() - Changes.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}; expected one of {', '.join(Changes.__annotations__)}")
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    _check(given, seed, accumulate)
    base = recipe(changes.get("recipe"), task)
    sgd = ("lr", "schedule", "weight_decay", "momentum", "warmup")
    chosen: dict[str, Any] = {name: given.get(name, getattr(base, name)) for name in sgd}
    batch = min(changes.get("batch_size") or base.batch_size, images)
    if batch % accumulate:
        raise TicketError(f"--accumulate: expected a divisor of the batch of {batch} images, got {accumulate}")
    length = changes.get("steps") or (changes.get("epochs") or base.epochs) * (images // batch)
    if chosen["warmup"] != 0 and not 0 < chosen["warmup"] < length:
        raise TicketError(f"--warmup: expected 0 or more steps and fewer than the {length} of a round, got {chosen['warmup']}")
    milestones = _milestones(base, changes.get("milestones"), chosen["schedule"])
    return Settings(steps=length, batch_size=batch, milestones=milestones, seed=seed, accumulate=accumulate, **chosen)


def _check(given: dict[str, Any], seed: int, accumulate: int) -> None:
    if "epochs" in given and "steps" in given:
        raise TicketError("--epochs and --steps say the same thing; give one of them")
    counts = {name: given[name] for name in ("epochs", "steps", "batch_size") if name in given} | {"accumulate": accumulate}
    for name, value in counts.items():
        if value < 1:
            raise TicketError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if seed < 0:
        raise TicketError(f"--seed: expected 0 or more, got {seed}")
    if not 0.0 < given.get("lr", 1.0) < math.inf:
        raise TicketError(f"--lr: expected a positive learning rate, got {given['lr']:g}")
    if not 0.0 <= given.get("weight_decay", 0.0) < math.inf:
        raise TicketError(f"--weight-decay: expected 0 or more, got {given['weight_decay']:g}")
    if given.get("schedule", SCHEDULES[0]) not in SCHEDULES:
        raise TicketError(f"--schedule: expected one of {', '.join(SCHEDULES)}, got {given['schedule']!r}")
    if not 0.0 <= given.get("momentum", 0.0) < 1.0:
        raise TicketError(f"--momentum: expected at least 0 and less than 1, got {given['momentum']:g}")


def _milestones(recipe: Recipe, given: Sequence[float] | None, schedule: str) -> tuple[float, ...]:
    if given is not None and schedule != "multistep":
        raise TicketError(f"--milestones: only --schedule multistep has them, got {schedule}")
    if schedule != "multistep":
        return recipe.milestones
    fractions = tuple(map(float, recipe.milestones if given is None else given))
    rising = (0.0, *fractions, 1.0)
    if not fractions or not all(a < b for a, b in pairwise(rising)):  # "not <": NaN too
        got = ",".join(f"{fraction:g}" for fraction in fractions) or "none"
        raise TicketError(f"--milestones: expected increasing fractions of a round between 0 and 1, such as 0.5,0.75, got {got}")
    return fractions
