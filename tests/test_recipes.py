"""The recipes of P1, Table 1, against the numbers of the table, and what they do to the learning rate."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torch")

from ticketkit import tasks
from ticketkit.search.settings import recipe, settings
from ticketkit.tasks import RECIPES, Recipe

IMAGES = 1024
SMALL = (182, 256, 0.1, 2e-4, {91: 0.01, 136: 0.001})
# epochs, batch, learning rate, weight decay, and where the learning rate falls to what: read off the paper's table
TABLE = {
    "paper-imagenet": (10, 256, 1e-4, 1e-4, {}),
    "paper-simclr": (10, 256, 1e-4, 1e-4, {}),
    "paper-moco": (10, 256, 3e-4, 1e-4, {}),
    **dict.fromkeys(("paper-cifar10", "paper-cifar100", "paper-svhn", "paper-fashion-mnist"), SMALL),
    "paper-visda": (20, 128, 1e-3, 5e-4, {10: 1e-4}),
}


def test_the_table_is_whole() -> None:
    assert RECIPES.keys() == TABLE.keys() and all(recipe.name == name for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", TABLE)
def test_recipe_trains_as_the_table_says(name: str) -> None:
    epochs, batch, lr, weight_decay, falls = TABLE[name]
    chosen = settings(tasks.get("digits"), IMAGES, 0, recipe=name)
    per_epoch = IMAGES // batch
    assert (chosen.steps, chosen.batch_size, chosen.weight_decay) == (epochs * per_epoch, batch, weight_decay)
    assert chosen.momentum == 0.9 and chosen.warmup == 0
    expected, rates = lr, []
    for epoch in range(epochs):
        expected = falls.get(epoch, expected)
        rates += [expected] * per_epoch
    assert [chosen.lr_at(step) for step in range(chosen.steps)] == pytest.approx(rates)


@pytest.mark.parametrize("name", tasks.names())
def test_each_task_trains_by_its_own_recipe(name: str) -> None:
    """P1's where the table has the task, VisDA's for photographs of one's own."""
    expected = {"digits": "digits", "image-folder": "paper-visda"}.get(name, f"paper-{name}")
    assert tasks.get(name).recipe.name == expected == recipe(None, tasks.get(name)).name


def test_a_recipe_is_one_line() -> None:
    assert str(RECIPES["paper-cifar10"]) == "182 epochs, batch 256, SGD lr 0.1 x0.1 at 50 % and 74.7 %, momentum 0.9, weight decay 0.0002"
    assert "lr 0.0001 constant, momentum" in str(RECIPES["paper-imagenet"])
    warm = str(Recipe(1, 8, 0.5, "cosine", 0.0, momentum=0.5, warmup=7))
    assert warm == "1 epochs, batch 8, SGD lr 0.5 cosine, warm-up 7 steps, momentum 0.5, weight decay 0"
    assert not any(re.search(r"\n|\(|\[", str(recipe)) for recipe in RECIPES.values())


def test_unknown_keywords_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        settings(tasks.get("digits"), IMAGES, 0, epoch=3)  # type: ignore[call-arg]


def test_every_field_can_be_changed() -> None:
    sgd = {"lr": 0.3, "schedule": "multistep", "weight_decay": 0.0, "momentum": 0.5, "milestones": [0.25], "warmup": 2}
    chosen = settings(tasks.get("digits"), IMAGES, 5, recipe="paper-simclr", epochs=3, batch_size=64, **sgd)
    assert (chosen.steps, chosen.batch_size, chosen.lr, chosen.schedule) == (48, 64, 0.3, "multistep")
    assert (chosen.weight_decay, chosen.momentum, chosen.milestones, chosen.warmup, chosen.seed) == (0.0, 0.5, (0.25,), 2, 5)
