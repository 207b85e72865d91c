"""The training loop: masks, schedules, and state that resumes to the bit."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
from small import DIGITS, TINY, everything, settings, start

torch = pytest.importorskip("torch")
from torch.nn import functional as F  # noqa: E402

from ticketkit import masks, models  # noqa: E402
from ticketkit.errors import ModelError  # noqa: E402
from ticketkit.search.find import find  # noqa: E402
from ticketkit.search.train import Settings, Training  # noqa: E402
from ticketkit.tasks import Batches, Crops, Data  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def plainly_trained(data: Data, chosen: Settings) -> dict[str, np.ndarray]:
    """Training as a textbook writes it, with no idea of masks."""
    module = start().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=chosen.lr, momentum=0.9, weight_decay=chosen.weight_decay)
    for _, ((images,), labels) in zip(range(chosen.steps), Batches(data.train, Crops(DIGITS), 32).epoch(0, 0, 0), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(module(images), labels).backward()
        optimizer.step()
    return models.arrays(module)


def trained(data: Data, mask: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    training = Training(start(), mask, settings(), round=0)
    training.run(Batches(data.train, Crops(DIGITS), 32), lambda now: None)
    return models.arrays(training.module)


def test_all_ones_mask_trains_bit_identically_to_dense(data: Data) -> None:
    dense, ones = plainly_trained(data, settings()), masks.full(everything(start()))
    masked = trained(data, ones)
    assert all(np.array_equal(dense[name], masked[name]) for name in dense)
    ones["layer1.0.conv1.weight"][0, 0, 0, 0] = False
    other = trained(data, ones)
    assert not np.array_equal(other["conv1.weight"], dense["conv1.weight"]), "one pruned weight must show everywhere"
    assert other["layer1.0.conv1.weight"][0, 0, 0, 0] == 0.0


def test_pruned_weights_are_zero_after_every_step_and_the_rest_moves(data: Data) -> None:
    mask = masks.random(masks.full(everything(start())), 0.9, 0)
    before = models.arrays(start())
    training = Training(start(), mask, settings(), round=0)

    def look(now: Training) -> None:
        weights = models.arrays(now.module)
        assert all((weights[name][~mask[name]] == 0).all() for name in mask)

    training.run(Batches(data.train, Crops(DIGITS), 32), look)
    after = models.arrays(training.module)
    assert all((after[name][mask[name]] != before[name][mask[name]]).mean() > 0.99 for name in mask)
    assert (after["conv1.weight"] != before["conv1.weight"]).all() and (after["linear.bias"] != before["linear.bias"]).all()


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_state_resumes_bit_identically(data: Data, stop: int) -> None:
    ones, batches = masks.full(everything(start())), Batches(data.train, Crops(DIGITS), 32)
    states: dict[int, dict[str, np.ndarray]] = {}
    whole = Training(start(), ones, settings(schedule="cosine"), round=0)
    whole.run(batches, lambda now: states.update({now.step: {k: v.copy() for k, v in now.state().items()}}))
    resumed = Training(models.build("resnet20", 10, 16), ones, settings(schedule="cosine"), round=0)
    resumed.load(states[stop])
    assert resumed.step == stop
    resumed.run(batches, lambda now: None)
    assert all(np.array_equal(resumed.state()[key], states[4][key]) for key in states[4])
    del states[stop]["momentum/conv1.weight"]
    forgetful = Training(start(), ones, settings(schedule="cosine"), round=0)
    forgetful.load(states[stop])
    forgetful.run(batches, lambda now: None)
    assert not np.array_equal(forgetful.state()["module/conv1.weight"], states[4]["module/conv1.weight"]), "momentum matters"


HEAD = ["linear.weight", "linear.bias"]


def probed(data: Data, stop: int, resumed: dict[str, np.ndarray] | None = None) -> Training:
    """Only the head trains, `stop` steps of 4, evaluated after each as `verify` does at the end of an epoch."""
    training = Training(start(), masks.full(everything(start())), settings(), round=0, trainable=HEAD)
    if resumed:
        training.load(resumed)

    def after_step(now: Training) -> None:
        with models.evaluating(now.module):
            pass
        if now.step == stop:
            raise StopIteration

    with contextlib.suppress(StopIteration):
        training.run(Batches(data.train, Crops(DIGITS), 32), after_step)
    return training


def test_frozen_parameters_and_norm_statistics_keep_every_bit(data: Data) -> None:
    before, after = models.arrays(start()), models.arrays(probed(data, 4).module)
    assert {name for name in before if not np.array_equal(before[name], after[name])} == set(HEAD)
    whole = trained(data, masks.full(everything(start())))
    moved = {name for name in before if not np.array_equal(before[name], whole[name])}
    assert {"conv1.weight", "bn1.weight", "bn1.running_mean"} <= moved, "without `trainable` everything trains"


def test_frozen_training_resumes_bit_identically(data: Data) -> None:
    whole, half = probed(data, 4).state(), probed(data, 2).state()
    assert {name for name in half if name.startswith("momentum/")} == {f"momentum/{name}" for name in HEAD}
    resumed = probed(data, 4, half).state()
    assert whole.keys() == resumed.keys() and all(np.array_equal(whole[key], resumed[key]) for key in whole)
    assert not np.array_equal(half["module/linear.weight"], whole["module/linear.weight"])


def test_a_frozen_module_can_be_trained_whole_again(data: Data) -> None:
    module = probed(data, 1).module
    Training(module, masks.full(everything(module)), settings(), round=1)
    assert all(parameter.requires_grad for parameter in module.parameters()) and all(layer.training for layer in module.modules())


@pytest.mark.parametrize("names", [[], ["fc.weight"], [*HEAD, "fc.bias"]])
def test_trainable_names_must_be_the_modules(names: list[str]) -> None:
    with pytest.raises(ModelError, match="trainable: expected parameters of the model"):
        Training(start(), {}, settings(), round=0, trainable=names)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0] * 8),
        ("multistep", [1.0] * 4 + [0.1] * 2 + [0.01] * 2),
        ("cosine", [0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(8)]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    chosen = settings(schedule=schedule, steps=8, lr=1.0)
    assert [chosen.lr_at(step) for step in range(8)] == pytest.approx(expected)


def test_warm_up_is_linear_and_ends_in_the_schedule() -> None:
    """Goyal et al. 2017, section 2.2."""
    for schedule in ("constant", "multistep", "cosine"):
        warm, cold = (settings(schedule=schedule, steps=8, lr=1.0, warmup=warmup) for warmup in (4, 0))
        factors = [warm.lr_at(step) / cold.lr_at(step) for step in range(8)]
        assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0])


def test_divergence_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"diverged: .* lower --lr"):
        find("digits", out=tmp_path / "run", lr=1e30, **TINY)
