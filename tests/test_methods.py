"""The methods: which masks every round has, what changes them within a round, and what each rewind point gives back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import DIGITS, everything, few_digits, settings, start

torch = pytest.importorskip("torch")

from ticketkit import masks, models, tasks  # noqa: E402
from ticketkit.errors import TicketError  # noqa: E402
from ticketkit.search.find import find  # noqa: E402
from ticketkit.search.methods import ACDC, GMP, METHODS  # noqa: E402
from ticketkit.search.rundir import RunDir  # noqa: E402
from ticketkit.search.train import Change, Due, Training  # noqa: E402
from ticketkit.tasks import Batches, Crops, Data  # noqa: E402
from ticketkit.ticket import Ticket  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"steps": 10, "batch_size": 8, "lr": 0.05, "threads": 1}
LEVELS = {"imp": [0.0, 0.2, 0.36], **{key: [0.0, 0.5, 0.9] for key in ("oneshot", "gmp", "acdc")}}
STEPS = 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """One finished search by each method: round 0 and two levels."""
    found = {}
    for method in METHODS:
        length = {"rounds": 2} if method == "imp" else {"sparsity": (0.5, 0.9)}
        found[method] = RunDir(find("digits", method=method, out=tmp_path_factory.mktemp(method) / "run", **length, **SHORT).path)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_round_has_the_level_that_was_promised(runs: dict[str, RunDir], method: str) -> None:
    run, total = runs[method], sum(array.size for array in everything(start()).values())
    assert [row["sparsity"] for row in run.rows()] == pytest.approx(LEVELS[method], abs=1 / total)
    assert run.rows()[0]["kept"] == total, "the dense reference stays dense"
    left = total
    for row, level in zip(run.rows()[1:], LEVELS[method][1:], strict=True):
        left = left - round(0.2 * left) if method == "imp" else total - round(level * total)
        assert row["kept"] == left == masks.kept(run.round(row["round"])[1].masks)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_touches_the_dense_reference(runs: dict[str, RunDir], method: str) -> None:
    first, second = ((runs[name].folder(0) / "weights.safetensors").read_bytes() for name in (method, "imp"))
    assert first == second


@pytest.mark.parametrize("method", METHODS)
def test_rewound_and_trained_weights_lie_side_by_side_under_one_mask(runs: dict[str, RunDir], method: str) -> None:
    run = runs[method]
    for k in (1, 2):
        trained, ticket = run.round(k)
        assert all(np.array_equal(ticket.weights[name], weights) for name, weights in run.rewind().items()), "the rewound weights whole"
        for name, mask in ticket.masks.items():
            assert not trained[name][~mask].any() and (trained[name][mask] != ticket.weights[name][mask]).mean() > 0.9


def test_where_the_masks_of_a_round_come_from(runs: dict[str, RunDir]) -> None:
    """imp: from the round before; oneshot: each from the dense network. Either rule fails on the other's run."""

    def steps_of_imp(run: RunDir) -> list[bool]:
        before = [run.round(k) for k in (0, 1)]
        expected = [masks.global_magnitude(trained, in_order(ticket.masks), 0.2) for trained, ticket in before]
        return [run.round(k + 1)[1].mask_sha256 == masks_sha256(mask) for k, mask in enumerate(expected)]

    def shots(run: RunDir) -> list[bool]:
        trained, ticket = run.round(0)
        expected = [masks.global_magnitude(trained, in_order(ticket.masks), row["sparsity"]) for row in run.rows()[1:]]
        return [run.round(k + 1)[1].mask_sha256 == masks_sha256(mask) for k, mask in enumerate(expected)]

    def in_order(found: dict[str, Any]) -> dict[str, Any]:
        return {name: found[name] for name in everything(start())}

    def masks_sha256(found: dict[str, Any]) -> str:
        return Ticket(found, {}, {}).mask_sha256

    assert steps_of_imp(runs["imp"]) == [True, True] and steps_of_imp(runs["oneshot"]) == [False, False]
    assert shots(runs["oneshot"]) == [True, True] and shots(runs["imp"]) == [True, False], "the first round of imp is a shot, too"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "lottery"}, "--method: expected one of imp, oneshot, gmp, acdc, got 'lottery'"),
        *[
            ({"method": method, "rewind": point}, f"--rewind: method {method} prunes while it trains; expected .* got {point}")
            for method in ("gmp", "acdc")
            for point in ("lr", "early")
        ],
        ({"method": "imp", "sparsity": (0.5, 0.9)}, "--sparsity: imp .* expected the last alone, got 2"),
        ({"method": "gmp", "sparsity": (0.5, 1.0)}, "target sparsity: expected 0 <= s < 1, got 1"),
        ({"method": "gmp", "sparsity": (0.5,), "rate": 1.0}, "--rate: expected a fraction between 0 and 1, got 1"),
        ({"method": "oneshot", "rounds": 2, "sparsity": (0.5,)}, "say the same thing"),
    ],
)
def test_combinations_without_sense_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TicketError, match=words) as caught:
        find("digits", out=tmp_path / "run", **options, **SHORT)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "sources"), [("imp", [0, 1]), ("oneshot", [0, 0])])
def test_learning_rate_rewinding_goes_on_from_trained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, sources: list[int]
) -> None:
    """Renda et al. 2020, section 3: the weights as trained, bit for bit, the schedule at its start, and no momentum."""
    began: list[tuple[dict[str, np.ndarray], int, float]] = []
    run = Training.run

    def look(self: Training, *rest: Any) -> None:
        assert not self.optimizer.state
        began.append((models.arrays(self.module), self.step, self.settings.lr_at(self.step)))
        run(self, *rest)

    monkeypatch.setattr(Training, "run", look)
    monkeypatch.setitem(tasks.tasks(), "digits", few_digits())
    length = {"rounds": 2} if method == "imp" else {"sparsity": (0.2, 0.36)}
    found = RunDir(find("digits", method=method, rewind="lr", out=tmp_path / "run", **length, **{**SHORT, "steps": 3}).path)
    assert [(step, lr) for _, step, lr in began] == [(0, SHORT["lr"])] * 3
    for k, source in enumerate(sources, 1):
        _, ticket = found.round(k)
        for name, array in found.round(source)[0].items():
            mask = ticket.masks.get(name, np.ones(array.shape, np.bool_))
            assert np.array_equal(began[k][0][name], array * mask) and np.array_equal(ticket.weights[name], array)
        other = found.round(1 - source)[0]["conv1.weight"]
        assert k == 1 or not np.array_equal(began[k][0]["conv1.weight"], other), "negative control: the other method's source"


# Within a round -----------------------------------------------------------------------------------------------------------------


def training(due: Due, round: int = 1) -> Training:
    module = start()
    return Training(module, masks.full(everything(module)), settings(steps=STEPS, batch_size=8), round, due=due)


def batches(data: Data) -> Batches:
    return Batches(data.train, Crops(DIGITS), 8)


def watched(data: Data, due: Due, look: Callable[[Training], object]) -> list[Any]:
    """What `look` sees after each step of a round."""
    seen: list[Any] = []
    training(due).run(batches(data), lambda now: seen.append(look(now)))
    return seen


def test_gmp_follows_the_cubic_and_its_masks_nest(data: Data) -> None:
    """Zhu and Gupta 2017, equation 1, written out here: s_t after the step before which it is due, to half a weight."""
    level, method = 0.9, GMP(begin=0.1, end=0.7, times=6)
    seen = watched(data, method.due(level, STEPS), lambda now: now.masks)
    total = sum(mask.size for mask in seen[0].values())
    expected, changes = [0.0] * STEPS, range(4, 15, 2)  # every 2 steps from 10 % of 20 steps, step 2, to 70 %, step 14
    for at in changes:
        expected[at:] = [level + (0.0 - level) * (1 - (at - 2) / 12) ** 3] * (STEPS - at)
    pruned = [total - masks.kept(mask) for mask in seen]
    assert np.abs(np.array(pruned) - np.array(expected) * total).max() <= 0.5 + 1e-9 * total
    assert all(masks.is_nested(inner, outer) for outer, inner in pairwise(seen))
    linear = [level * min(max((step - 2) / 12, 0), 1) for step in range(STEPS)]
    assert np.abs(np.array(pruned) - np.array(linear) * total).max() > 0.1 * total, "a straight line is another curve"


def test_acdc_alternates_and_ends_compressed(data: Data) -> None:
    """Of 20 steps: compressed from 2, 4, ... 14 for one step each, decompressed after each, compressed for good from 17 on."""
    total = sum(array.size for array in everything(start()).values())

    def look(now: Training) -> tuple[dict[str, Any], dict[str, Any]]:
        weights = models.arrays(now.module)
        return now.masks, {name: weights[name] for name in now.masks}

    seen = watched(data, ACDC().due(0.5, STEPS), look)
    compressed = {2, 4, 6, 8, 10, 12, 14, 17, 18, 19}
    for step, (mask, weights) in enumerate(seen):
        assert masks.kept(mask) == (total - round(0.5 * total) if step in compressed else total)
        assert all(not weights[name][~mask[name]].any() for name in mask)
    first, last = (seen[step][0] for step in (2, 17))
    assert not masks.is_nested(last, first), "chosen anew among all weights"
    before, after = seen[4][1], seen[5][1]
    assert all((before[name] != after[name]).mean() > 0.99 for name in before), "decompressed, all weights move"
    assert all(np.array_equal(*(seen[step][0][name] for step in (17, 19))) for name in first)


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 30])
def test_short_rounds_of_acdc_alternate_too(steps: int) -> None:
    due = ACDC().due(0.9, steps)
    found = [change.sparsity for change in map(due, range(steps)) if change is not None]
    assert found == [0.9, 0.0] * (len(found) // 2) + [0.9]


def test_acdc_s_phases_are_its_authors() -> None:
    """Compressed from epochs 10, 20, ... 70 and 85 of 100, decompressed from 15, 25, ... 75: their ResNet-50 on ImageNet."""
    due = ACDC().due(0.9, 100)
    changes = {step: change.sparsity for step in range(100) if (change := due(step)) is not None}
    assert changes == {**dict.fromkeys((*range(10, 71, 10), 85), 0.9), **dict.fromkeys(range(15, 76, 10), 0.0)}


def test_decompressed_weights_start_without_momentum(data: Data) -> None:
    """The first update after a decompression is -lr * (gradient + decay * weight) for every weight; before it, momentum counts."""

    def update(at: int) -> tuple[bool, bool]:
        momenta: dict[int, list[torch.Tensor]] = {}

        def keep(now: Training) -> None:
            momenta[now.step] = [now.optimizer.state[weight]["momentum_buffer"].clone() for weight in now.module.parameters()]
            gradients[now.step] = [
                weight.grad + 1e-3 * before for weight, before in zip(now.module.parameters(), weights[now.step - 1], strict=True)
            ]
            weights[now.step] = [weight.detach().clone() for weight in now.module.parameters()]

        run = training(ACDC().due(0.9, STEPS))
        gradients: dict[int, list[torch.Tensor]] = {}
        weights = {0: [weight.detach().clone() for weight in run.module.parameters()]}
        run.run(batches(data), keep)
        fresh = all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(momenta[at + 1], gradients[at + 1], strict=True))
        still = any(bool(buffer.any()) for buffer in momenta[at])
        return fresh, still

    assert update(5) == (True, True), "decompressed before step 5"
    assert update(4) == (False, True), "negative control: compression keeps the momentum"


def test_a_decompression_without_momentum_has_none_to_forget(data: Data) -> None:
    """Also after a checkpoint, which asks every parameter for its momentum."""

    def ends(momentum: float) -> tuple[dict[str, np.ndarray], bool]:
        module = start()
        due = {1: Change(0.9, nested=False), 2: Change(0.0, nested=False, forget=True)}.get
        run = Training(module, masks.full(everything(module)), settings(steps=3, batch_size=8, momentum=momentum), 1, due=due)
        states: list[dict[str, np.ndarray]] = []
        run.run(batches(data), lambda now: states.append(now.state()))
        return run.masks, any(key.startswith("momentum/") for key in states[-1])

    assert [(masks.sparsity(mask), kept) for mask, kept in map(ends, (0.0, 0.9))] == [(0.0, False), (0.0, True)]


@pytest.mark.parametrize("method", [GMP(), ACDC()])
def test_resumed_after_a_change_of_masks_nothing_differs(data: Data, method: GMP | ACDC) -> None:
    due = method.due(0.9, STEPS)
    states = watched(data, due, lambda now: {key: array.copy() for key, array in now.state().items()})

    def resumed(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        again = training(due)
        again.load(state)
        again.run(batches(data), lambda now: None)
        return again.state()

    state = states[17]  # after the last change: a later one would choose the weights that are zero again
    assert masks.sparsity(training_masks(state)) == pytest.approx(0.9, abs=1e-5)
    end = resumed(state)
    assert end.keys() == states[-1].keys() and all(np.array_equal(end[key], states[-1][key]) for key in end)
    without = {key: np.full_like(array, 255) if key.startswith("mask/") else array for key, array in state.items()}
    assert any(not np.array_equal(array, states[-1][key]) for key, array in resumed(without).items()), "the masks matter"


def training_masks(state: dict[str, np.ndarray]) -> dict[str, Any]:
    shapes = {name: array.shape for name, array in everything(start()).items()}
    bits = {name: np.unpackbits(state[f"mask/{name}"], bitorder="little", count=int(np.prod(shape))) for name, shape in shapes.items()}
    return {name: values.astype(bool) for name, values in bits.items()}
