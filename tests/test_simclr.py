"""NT-Xent against the paper's formula, retrieval on embeddings made by hand, and SimCLR on digits."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import pairs  # noqa: E402

from ticketkit import pretrain  # noqa: E402
from ticketkit.errors import TicketError  # noqa: E402
from ticketkit.pretrain import _retrieval  # noqa: E402
from ticketkit.pretrain._retrieval import nt_xent, retrieved  # noqa: E402
from ticketkit.pretrain.moco import MoCo  # noqa: E402
from ticketkit.pretrain.simclr import SimCLR  # noqa: E402


def probabilities(first: np.ndarray, second: np.ndarray, temperature: float) -> np.ndarray:
    """Chen et al. 2020, eq. 1, query by query: the softmax of each query's partner among the other 2n - 1."""
    both = np.concatenate([first, second]).astype(np.float64)
    count, out = len(first), []
    for i, query in enumerate(both):
        cosines = [query @ other / (np.linalg.norm(query) * np.linalg.norm(other)) for other in both]
        weights = np.exp(np.array(cosines) / temperature)
        weights[i] = 0
        out.append(weights[(i + count) % (2 * count)] / weights.sum())
    return np.array(out)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("count", "dim"), [(1, 3), (2, 5), (7, 4), (33, 128)])
def test_nt_xent_against_the_paper(count: int, dim: int, temperature: float) -> None:
    first, second = np.random.default_rng(count).standard_normal((2, count, dim)) * 3
    loss, right = nt_xent(torch.from_numpy(first), torch.from_numpy(second), temperature)
    p = probabilities(first, second, temperature)
    assert float(loss) == pytest.approx(-np.log(p).mean(), rel=1e-12, abs=1e-12)
    assert int(right) == int(retrieved(torch.from_numpy(first), torch.from_numpy(second)))
    if count > 1:
        assert abs(float(loss) + np.log(p.mean())) > 1e-3, "-log(mean p), the published code's, is another loss"
        unlike = probabilities(first, second[::-1], temperature)
        assert abs(float(loss) + np.log(unlike).mean()) > 1e-3, "other pairs, another loss"


def test_nt_xent_in_half_precision_and_its_gradient() -> None:
    """Embeddings may come from autocast: cosines and softmax are float32. The gradient is that of the formula, by differences."""
    first, second = (torch.from_numpy(z).requires_grad_() for z in np.random.default_rng(0).standard_normal((2, 6, 4)))
    exact, _ = nt_xent(first, second, 0.5)
    half, _ = nt_xent(first.bfloat16(), second.bfloat16(), 0.5)
    assert half.dtype == torch.float32 and abs(half.item() - exact.item()) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        single, _ = nt_xent(first.float(), second.float(), 0.5)
    assert abs(single.item() - exact.item()) < 1e-5
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.5)[0], (first, second))


UNITS = torch.eye(8)


@pytest.mark.parametrize(
    ("first", "second", "right"),
    [
        (UNITS, UNITS, 16),
        (UNITS * 3, UNITS * 0.1, 16),  # by angle, not by length
        (UNITS, UNITS.roll(1, 0), 0),
        (UNITS, torch.cat([UNITS[:4], UNITS[4:].roll(1, 0)]), 8),
        (UNITS, -UNITS, 0),  # the partner is the farthest of all
        (torch.ones(8, 4), torch.ones(8, 4), 0),  # collapsed: no partner is nearer than the others
        (UNITS[:1], UNITS[1:2], 2),  # a single pair has no other candidates
    ],
)
def test_retrieval_of_hand_made_embeddings(first: torch.Tensor, second: torch.Tensor, right: int) -> None:
    assert int(retrieved(first, second)) == right
    assert int(nt_xent(first, second, 0.5)[1]) == right


def test_each_direction_is_a_query_of_its_own() -> None:
    """At angles z = (0, 2), z' = (0.5, 1.2): all find their partner but z'_1, which is nearer to z'_0 (0.7) than to z_1 (0.8)."""
    angles = torch.tensor([[0.0, 2.0], [0.5, 1.2]])
    first, second = torch.stack([angles.cos(), angles.sin()], dim=-1)
    assert int(retrieved(first, second)) == int(retrieved(second, first)) == 3


class Echo(torch.nn.Module):
    """An embedding that shows what it was given, and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.seen.append(images)
        return images.flatten(1)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(("count", "groups"), [(5, [5]), (256, [256]), (257, [129, 128]), (600, [200, 200, 200])])
def test_evaluation_over_a_split(count: int, groups: list[int], mode: bool) -> None:
    echo, objective = Echo().train(mode), SimCLR()
    split = pairs.some(count)
    score, loss = objective.evaluate(echo, pairs.DIGITS, split, 10)
    assert echo.training is mode and [len(view) for view in echo.seen[::2]] == groups
    found = [nt_xent(a.flatten(1), b.flatten(1), 0.5) for a, b in zip(echo.seen[::2], echo.seen[1::2], strict=True)]
    assert score == sum(int(right) for _, right in found) / (2 * count)
    assert loss == pytest.approx(sum(float(value) * n for (value, _), n in zip(found, groups, strict=True)) / count)
    assert (score, loss) == objective.evaluate(echo, pairs.DIGITS, split, 10), "always the same views"


def test_retrieval_gets_harder_the_more_candidates_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    split = pairs.some(200)
    many, _ = SimCLR().evaluate(Echo(), pairs.DIGITS, split, 10)
    monkeypatch.setattr(_retrieval, "GROUP", 10)
    few, _ = SimCLR().evaluate(Echo(), pairs.DIGITS, split, 10)
    assert few > 2 * many


@pytest.mark.parametrize("name", [name for name in pretrain.names() if name != "supervised"])
def test_every_self_supervised_objective_keeps_to_the_contract(name: str) -> None:
    """An objective is tested by being there: two steps, and its head takes the place of the network's."""
    objective = pretrain.get(name)()
    assert (objective.name, objective.metric) == (name, "retrieval accuracy")
    module, masks = pairs.network(objective, 0.5)
    assert [key for key in module.state_dict() if key.startswith("fc.")] == ["fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"]
    assert module.fc[0].weight.shape == (32, 32) and module.fc[2].weight.shape == (128, 32)
    state, losses = pairs.train(objective, module, masks, 2, batch=7)
    assert np.isfinite(losses).all() and isinstance(state.state_dict(), dict)
    for wrong, option in ((-1, field.name) for field in fields(objective)):
        with pytest.raises(TicketError, match=f"^--{option.replace('_', '-')}: expected .*, got -1"):
            type(objective)(**{option: wrong})


def test_unknown_objective_is_refused() -> None:
    assert {"simclr", "moco"} <= set(pretrain.names())
    for name in ("simclr2", "_views", "Simclr"):
        with pytest.raises(TicketError, match=r"expected one of .*moco, simclr"):
            pretrain.get(name)


def test_both_views_share_one_batch_of_statistics() -> None:
    """One pass of 2N images; labels are not looked at."""
    objective = SimCLR()
    module, _ = pairs.network(objective)
    views = pairs.rendered(objective, pairs.some(8).images, 0)
    loss, right = objective.loss(module, objective.begin(module), views, torch.zeros(8))
    first, second = module(torch.cat(views)).split(8)
    expected, expected_right = nt_xent(first, second, 0.5)
    assert loss.item() == expected.item() and int(right) == int(expected_right)
    apart, _ = nt_xent(module(views[0]), module(views[1]), 0.5)
    assert apart.item() != expected.item()


@pytest.mark.parametrize("objective", [SimCLR(), MoCo(key_momentum=0.99, queue=256, bn_groups=2)], ids=lambda o: o.name)
def test_training_finds_partners_among_unseen_digits(objective: SimCLR | MoCo, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 steps lower the loss and raise the retrieval by half among 20 test images; steps of no length (negative control) do not."""
    monkeypatch.setattr(_retrieval, "GROUP", 20)
    test = pairs.DIGITS.load(None).test

    def change(lr: float, steps: int) -> tuple[float, float]:
        module, masks = pairs.network(objective)
        before = objective.evaluate(module, pairs.DIGITS, test, 10)
        pairs.train(objective, module, masks, steps, lr=lr)
        after = objective.evaluate(module, pairs.DIGITS, test, 10)
        return after[0] / before[0], before[1] - after[1]

    retrieval, loss = change(0.02, 100)
    assert retrieval > 1.5 and loss > 0.15
    retrieval, loss = change(0.0, 30)
    assert retrieval < 1.3 and loss < 0.08
